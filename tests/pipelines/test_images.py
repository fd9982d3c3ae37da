"""Images of every mode of Pillow, as what a model is trained on."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from score_sde.pipelines.images import to_mode


def filled(mode, *values):
    """An image of one row with these values; where its bands are more than one, tuples."""
    image = Image.new(mode, (len(values), 1))
    for column, value in enumerate(values):
        image.putpixel((column, 0), value)
    return image


def palette(mode, colours, values):
    image = filled(mode, *values)
    image.putpalette([level for colour in colours for level in colour])
    return image


COLOUR = (200, 100, 50)
GREY = [0.299, 0.587, 0.114]  # ITU-R 601
RAMP = [0, 128, 255]
# mode -> an image, and what it shows in RGB; alpha 51 is a fifth, on white
CASES = {
    "1": (filled("1", 0, 255), [0, 255]),
    "L": (filled("L", *RAMP), RAMP),
    "P": (palette("P", [(255, 0, 0), COLOUR], [1, 0]), [COLOUR, (255, 0, 0)]),
    "RGB": (filled("RGB", COLOUR), [COLOUR]),
    "RGBA": (filled("RGBA", (*COLOUR, 255), (*COLOUR, 0), (0, 100, 255, 51)), [COLOUR, 255, (204, 224, 255)]),
    "CMYK": (filled("CMYK", (55, 155, 205, 0), (0, 0, 0, 255)), [COLOUR, 0]),
    "YCbCr": (Image.merge("RGB", [Image.new("L", (1, 1), v) for v in COLOUR]).convert("YCbCr"), [COLOUR]),
    # L* 53.6 of 100 with a* = b* = 0, which is 128, is the sRGB grey 128
    "LAB": (filled("LAB", (255, 128, 128), (137, 128, 128), (0, 128, 128)), [255, 128, 0]),
    "HSV": (filled("HSV", (0, 0, 128), (85, 255, 255)), [128, (0, 255, 0)]),
    "I": (filled("I", 0, 257 * 128, 65535), RAMP),
    "F": (filled("F", 0.0, 128 / 255, 1.0), RAMP),
    "LA": (filled("LA", (100, 255), (100, 0), (100, 51)), [100, 255, 224]),
    "PA": (palette("PA", [(255, 0, 0), COLOUR], [(1, 255), (1, 0)]), [COLOUR, 255]),
    "La": (filled("La", (100, 255), (0, 0), (20, 51)), [100, 255, 224]),
    "RGBX": (filled("RGBX", (*COLOUR, 0)), [COLOUR]),
    "RGBa": (filled("RGBa", (*COLOUR, 255), (0, 0, 0, 0), (0, 20, 51, 51)), [COLOUR, 255, (204, 224, 255)]),
    **{
        mode: (Image.frombytes(mode, (3, 1), np.array([0, 257 * 128, 65535]).astype(dtype).tobytes()), RAMP)
        for mode, dtype in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2"))
    },
}


def colours(values):
    """Colours of three levels, of colours and of levels of grey."""
    return [(value,) * 3 if isinstance(value, int) else value for value in values]


def test_no_mode_of_pillow_is_missing():
    assert CASES.keys() == set(Image.MODES)


@pytest.mark.parametrize("mode", CASES)
def test_every_mode_is_scaled_by_its_range(mode):
    image, expected = CASES[mode]
    assert image.mode == mode
    expected = np.array([colours(expected)], dtype=float)
    before = image.tobytes()
    # colour spaces of their own, and premultiplied alpha, are rounded twice
    tolerance = 2 if mode in ("YCbCr", "LAB", "RGBa", "La") else 0
    for wanted, truth in (("RGB", expected), ("L", (expected @ GREY).round())):
        found = to_mode(image, wanted)
        assert found.mode == wanted
        assert np.abs(np.asarray(found) - truth).max() <= tolerance
    assert image.tobytes() == before


def png(bits, colour, row, *chunks):
    """A PNG file of one row of samples."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = np.array(row, dtype=">u2" if bits == 16 else ">u1")
    header = struct.pack(">IIBBBBB", len(row), 1, bits, colour, 0, 0, 0)
    data = [("IHDR", header), *chunks, ("IDAT", zlib.compress(b"\0" + pixels.tobytes())), ("IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name.encode(), each) for name, each in data))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (png(8, 0, [5, 128], ("tRNS", b"\0\x05")), [255, 128]),
        (png(16, 0, [0x505, 0x506, 0x8080], ("tRNS", b"\x05\x05")), [255, 5, 128]),
        (png(8, 2, [(5, 5, 6), COLOUR], ("tRNS", b"\0\x05\0\x05\0\x06")), [255, COLOUR]),
        (
            png(8, 3, [0, 1, 2], ("PLTE", bytes([0, 0, 0, *COLOUR, 0, 0, 255])), ("tRNS", b"\0\xff\x33")),
            [255, COLOUR, (204, 204, 255)],
        ),
    ],
    ids=["grey", "16-bit grey", "RGB", "palette"],
)
def test_a_transparent_value_of_a_png_lies_on_the_background(file, expected):
    found = to_mode(Image.open(file), "RGB")
    assert [found.getpixel((column, 0)) for column in range(found.width)] == colours(expected)


def test_background():
    image = CASES["RGBA"][0]
    assert to_mode(image, "RGB", "black").getpixel((1, 0)) == (0, 0, 0)
    assert to_mode(image, "RGB", "#0080ff").getpixel((2, 0)) == (0, 122, 255)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_exif_orientation_is_applied_once(suffix):
    image = Image.fromarray(np.kron([[0, 255]], np.full((16, 16), 1)).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    file = io.BytesIO()
    image.save(file, format=suffix, exif=exif)
    for found in (to_mode(Image.open(file), "L"), to_mode(to_mode(Image.open(file), "RGB"), "L")):
        assert found.size == (16, 32)
        assert np.asarray(found)[:8].max() < 50 and np.asarray(found)[-8:].min() > 200


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (filled("F", -0.1, 0.5), "mode F has values from -0.1 to 0.5; they must lie in 0 .black. to 1 .white."),
        (filled("F", 0.0, 255.0), "mode F has values from 0 to 255"),
        (filled("F", 0.0, float("nan")), "mode F has values from nan to nan"),
        (filled("I", 0, 65536), "mode I has values from 0 to 65536; they must lie in 0 .black. to 65535"),
        (filled("I", -1, 255), "mode I has values from -1 to 255"),
    ],
)
def test_values_without_a_known_range_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        to_mode(image, "RGB")
    with pytest.raises(ValueError, match="mode 'RGBA' is unknown; choose one of L, RGB"):
        to_mode(image, "RGBA")
