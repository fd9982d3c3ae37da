"""Sound, videos and arrays as they are read: what they are, and what is refused before any work."""

import importlib.util
import io
import math
import re
import struct
import tarfile
import wave

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.training.parts import clips, signal_rows
from score_sde.training.parts.options import parse
from score_sde.training.parts.sounds import read_sound, resample
from score_sde.training.train import TrainConfig


def wav(values, rate=8000, width=2):
    """The bytes of a WAV file of sound (channels, length) in [-1, 1]."""
    whole = np.round(np.atleast_2d(values).T * (2.0 ** (8 * width - 1) - 1)).astype(np.int64)
    raw = whole + 128 if width == 1 else whole
    data = b"".join(int(each).to_bytes(width, "little", signed=width > 1) for each in raw.flatten())
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(whole.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return buffer.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape)


def rows_of(kind, dataset, *options):
    """The rows of a dataset, as training opens them."""
    given = ["--data_kind", kind, "--dataset", str(dataset), "--network_kwargs", "{patch_size: 1}", *map(str, options)]
    return parse(TrainConfig, given).open_rows()


def refused(capsys, kind, dataset, *options):
    """What opening says, as a script or by an error."""
    try:
        rows_of(kind, dataset, *options).statistics()
    except ValueError as error:
        return str(error)
    except SystemExit:
        return capsys.readouterr().err
    return "nothing"


# --- sound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sound_of_every_width_is_read(width):
    values = noise(2, 50)
    found, rate = read_sound(io.BytesIO(wav(values, 11025, width)))
    assert rate == 11025 and found.shape == (2, 50)
    assert np.abs(found.numpy() - values).max() < 1.01 / 2 ** (8 * width - 1) + 1e-6


@pytest.mark.parametrize(("rate", "new_rate"), [(8000, 16000), (16000, 8000), (44100, 8000), (8000, 11025)])
def test_sines_are_resampled_exactly_and_what_is_too_high_is_gone(rate, new_rate):
    lower = min(rate, new_rate) / 2
    times, new_times = np.arange(4000) / rate, np.arange(4000 * new_rate // rate) / new_rate
    for share in (0.01, 0.3, 0.85):
        frequency = share * lower
        found = resample(
            torch.tensor(np.sin(2 * math.pi * frequency * times + 1), dtype=torch.float32)[None], rate, new_rate
        )
        assert abs(found.shape[1] - 4000 * new_rate / rate) <= 1
        truth = np.sin(2 * math.pi * frequency * new_times[: found.shape[1]] + 1)
        inside = slice(found.shape[1] // 4, -found.shape[1] // 4)  # the filter reaches over the ends
        assert np.abs(found[0, : len(truth)].numpy() - truth)[inside].max() < 1e-4
    if new_rate < rate:
        high = torch.tensor(np.sin(2 * math.pi * 1.1 * lower * times), dtype=torch.float32)[None]
        found = resample(high, rate, new_rate)[0]
        assert found[len(found) // 4 : -len(found) // 4].abs().max() < 1e-4


def sounds(folder, **files):
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".wav").write_bytes(data)
    return folder


def test_a_folder_of_sound_has_the_classes_of_its_folders(tmp_path):
    values = {name: noise(1, 20, seed=i) for i, name in enumerate(("a__1", "a__2", "b__3"))}
    rows = rows_of("audio", sounds(tmp_path, **{name: wav(each) for name, each in values.items()}), "--length", 20)
    assert (len(rows), rows.shape, rows.sampling_rate) == (3, (1, 20), 8000)
    assert rows.id2label == {0: "a", 1: "b"} and rows.class_counts == {"a": 2, "b": 1}
    for number, each in enumerate(values.values()):
        assert np.abs(rows[number]["images"].numpy() - each).max() < 1e-4
    assert [rows[i]["labels"] for i in range(3)] == [0, 0, 1]


@pytest.mark.parametrize("feature", ["audio", "bytes"])
def test_a_column_of_sound_is_read_undecoded(tmp_path, feature):
    values = [noise(1, 30, seed=i) for i in range(2)]
    column = [{"bytes": wav(each), "path": None} if feature == "audio" else wav(each) for each in values]
    data = datasets.Dataset.from_dict({"audio": column, "label": [1, 0]})
    if feature == "audio":
        data = data.cast_column("audio", datasets.Audio(decode=False))
    data.to_parquet(tmp_path / "train.parquet")
    rows = rows_of("audio", tmp_path / "train.parquet", "--length", 16, "--label_column", "label")
    assert np.abs(rows[1]["images"].numpy() - values[1][:, :16]).max() < 1e-4 and rows[1]["labels"] == 0


def test_clips_are_filled_up_cut_mixed_and_resampled(tmp_path):
    stereo = noise(2, 12)
    folder = sounds(tmp_path, one=wav(stereo), two=wav(noise(1, 40), 16000))
    rows = rows_of("audio", folder, "--length", 16, "--short_clips", "pad", "--sampling_rate", 8000)
    first = rows[0]["images"].numpy()
    assert np.abs(first[0, :12] - stereo.mean(0)).max() < 1e-4 and (first[0, 12:] == 0).all()
    assert len(rows_of("audio", folder, "--length", 16, "--short_clips", "leave_out", "--sampling_rate", 8000)) == 1
    # random parts: the same for the same key, others in other epochs
    config = parse(
        TrainConfig, ["--data_kind", "audio", "--dataset", str(folder), "--length", "8", "--sampling_rate", "8000"]
    )
    rows = config.open_rows(crop_seed=0)
    parts = [rows[1 + 2 * epoch]["images"] for epoch in range(8)]
    assert torch.equal(parts[0], rows[1]["images"]) and any(not torch.equal(parts[0], each) for each in parts[1:])


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a": wav(noise(1, 30))}, (), "length 0 and audio_channels 1 must be at least 1"),
        ({"a": wav(noise(1, 9))}, ("--length", 32), "row 0 .*9 values, fewer than length 32: pass --short_clips pad"),
        ({"a": wav(noise(1, 9)), "b": wav(noise(1, 9), 16000)}, ("--length", 8), "several sampling rates, 8000 "),
        ({"a": wav(noise(1, 30)), "b": wav(np.zeros((1, 0)))}, ("--length", 8), "row 1 .*it has 0 values, fewer than"),
        (
            {"a": wav(noise(1, 30)), "b": wav(noise(1, 30), 7919), "c": wav(noise(1, 30), 99991)},
            ("--length", 8, "--sampling_rate", 99989),
            "row [012] .*need a filter of .* numbers: too many",
        ),
        ({"a": wav(np.zeros(30))}, ("--length", 8), "channel 0 is constant, 0: nothing is to be learned"),
        ({"a": wav(noise(3, 30))}, ("--length", 8, "--audio_channels", 2), "has 3 channels, not audio_channels 2"),
        ({"a": wav(noise(1, 30))}, ("--length", 8, "--streaming"), "streaming is an option for data of the kind image"),
        ({"a": wav(noise(1, 30))}, ("--length", 8, "--short_clips", "loop"), "short_clips 'loop' is unknown"),
    ],
)  # fmt: skip
def test_sound_that_does_not_fit_is_refused(tmp_path, capsys, files, options, message):
    found = refused(capsys, "audio", sounds(tmp_path, **files), *options)
    assert re.search(message, found), found


def riff(form, data, claimed=None, whole=None, step=None, more=b"", before=b""):
    """A WAV file by hand: form is (encoding, channels, rate, bits), `claimed` and `whole` the lengths that its header
    says, `more` what goes on in its format, `before` a chunk before the samples."""
    encoding, channels, rate, bits = form
    step = channels * -(-bits // 8) if step is None else step
    header = struct.pack("<HHIIHH", encoding, channels, rate, rate * step % 2**32, step, bits) + more
    body = b"WAVEfmt " + struct.pack("<I", len(header)) + header + before
    body += b"data" + struct.pack("<I", len(data) if claimed is None else claimed) + data
    return b"RIFF" + struct.pack("<I", len(body) if whole is None else whole) + body


def extensible(encoding, bits):
    """How the format of a long header goes on."""
    return struct.pack("<HHIH", 22, bits, 0, encoding) + bytes.fromhex("000000001000800000AA00389B71")


VALUES = noise(2, 20).astype(np.float32)
FLOATS = VALUES.T.tobytes()
WHOLE = np.round(VALUES.T * 2**15).astype("<i2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        riff((3, 2, 8000, 32), FLOATS),
        riff((3, 2, 8000, 64), VALUES.T.astype("<f8").tobytes()),
        riff((0xFFFE, 2, 8000, 32), FLOATS, more=extensible(3, 32)),
        riff((0xFFFE, 2, 8000, 16), WHOLE, more=extensible(1, 16)),
        riff((1, 2, 8000, 16), WHOLE, before=b"LIST" + struct.pack("<I", 3) + b"abc\0"),
        # what was written while its end was not known
        riff((1, 2, 8000, 16), WHOLE, claimed=0xFFFFFFFF, whole=0xFFFFFFFF),
        riff((1, 2, 8000, 16), WHOLE, claimed=0x7FFFF000),
        riff((1, 2, 8000, 16), WHOLE, claimed=0, whole=0),
        # what follows is no sound
        riff((1, 2, 8000, 16), WHOLE + b"LIST" + bytes(8), claimed=len(WHOLE)),
    ],
)
def test_a_wav_file_of_any_header_is_read(data):
    found, rate = read_sound(io.BytesIO(data))
    assert rate == 8000 and found.shape == (2, 20) and np.abs(found.numpy() - VALUES).max() < 1e-4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is no WAV file of plain numbers; others need soundfile|soundfile cannot read it"),
        (b"RIFF", "it is no WAV file of plain numbers; others need soundfile|soundfile cannot read it"),
        (b"ID3" + bytes(100), "others need soundfile: pip install soundfile|soundfile cannot read it"),
        (riff((1, 2, 8000, 16), WHOLE)[:-7], "it is cut off: its header says 20 values in each channel, 18 are there"),
        (riff((1, 2, 8000, 16), WHOLE, claimed=2**30), "it is cut off: its header says 268,435,456 values"),
        (riff((1, 2, 8000, 16), WHOLE)[:40], "it holds no samples"),
        (riff((1, 2, 8000, 16), WHOLE)[:30], "its format has 16 bytes"),
        (b"RIFF" + bytes(4) + b"WAVE" + b"data" + struct.pack("<I", 4) + bytes(4), "it says no format"),
        (riff((1, 0, 8000, 16), WHOLE), "0 channels of 16 bits are not 0 bytes"),
        (riff((1, 2, 8000, 16), WHOLE, step=3), "2 channels of 16 bits are not 3 bytes"),
        (riff((1, 2, 0, 16), WHOLE), "its sampling rate, 0 Hz, must lie in 1 to 100,000,000"),
        (riff((1, 2, 4 * 10**9, 16), WHOLE), "its sampling rate, 4,000,000,000 Hz, must lie in"),
        (riff((3, 1, 8000, 32), np.full(20, np.nan, "<f4").tobytes()), "not finite"),
        (riff((3, 1, 8000, 32), np.full(20, 3e4, "<f4").tobytes()), r"values up to 30000: sound lies in \[-1, 1\]"),
    ],
)
def test_a_wav_file_that_is_damaged_is_refused_by_its_row(tmp_path, capsys, data, message):
    found = refused(capsys, "audio", sounds(tmp_path, a=wav(noise(1, 30)), b=data), "--length", 8)
    assert re.search(message, found) and "row 1 " in found, found


def test_what_a_column_says_of_its_rate_is_heard(tmp_path):
    """A dataset whose sounds are to be at one rate, whatever their files have."""
    times = np.arange(4000)
    column = [wav(0.5 * np.sin(2 * math.pi * 200 * times / rate), rate) for rate in (8000, 16000)]
    data = datasets.Dataset.from_dict({"audio": [{"bytes": each, "path": None} for each in column]})
    data.cast_column("audio", datasets.Audio(sampling_rate=16000)).to_parquet(tmp_path / "train.parquet")
    rows = rows_of("audio", tmp_path / "train.parquet", "--length", 3000)
    assert rows.sampling_rate == 16000
    truth = 0.5 * np.sin(2 * math.pi * 200 * np.arange(3000) / 16000)
    for row in range(2):
        assert np.abs(rows[row]["images"][0].numpy() - truth)[500:].max() < 1e-3
    assert rows_of("audio", tmp_path / "train.parquet", "--length", 300, "--sampling_rate", 4000).sampling_rate == 4000


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is not None, reason="with the decoder they need none")
def test_tar_files_of_sound_need_no_decoder(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for i in range(3):
            for suffix, data in (("wav", wav(noise(1, 20, seed=i))), ("cls", str(i % 2).encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    options = ["--length", 20, "--audio_column", "wav", "--label_column", "cls"]
    rows = rows_of("audio", tmp_path / "train.tar", *options)
    assert [rows[i]["labels"] for i in range(3)] == [0, 1, 0]
    assert np.abs(rows[2]["images"].numpy() - noise(1, 20, seed=2)).max() < 1e-4


@pytest.mark.parametrize(("form", "bound"), [("FLAC", 1e-4), ("OGG", 0.05), ("WAVEX", 1e-6), ("AU", 1e-4)])
def test_other_files_of_sound_are_read_by_soundfile(tmp_path, form, bound):
    soundfile = pytest.importorskip("soundfile")
    sound = 0.4 * np.sin(2 * math.pi * 440 * np.arange(8000) / 8000)
    soundfile.write(tmp_path / "a.ogg", sound, 8000, format=form, subtype="PCM_24" if form == "WAVEX" else None)
    rows = rows_of("audio", tmp_path, "--length", 4000)
    assert np.abs(rows[0]["images"].numpy()[0] - sound[:4000]).max() < bound
    (tmp_path / "a.ogg").write_bytes((tmp_path / "a.ogg").read_bytes()[:3000])
    with pytest.raises(ValueError, match="row 0 .*(cut off|soundfile cannot read it|fewer than length)"):
        rows_of("audio", tmp_path, "--length", 4000)


# --- arrays -------------------------------------------------------------------------------------------------------


def test_arrays_of_every_source_are_the_same(tmp_path):
    values = noise(4, 3, 5, 6).astype(np.float32)
    np.save(tmp_path / "all.npy", values)
    np.savez(tmp_path / "all.npz", array=values, label=np.arange(4) % 2)
    folder = tmp_path / "folder"
    for i, each in enumerate(values):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        np.save(folder / f"class{i % 2}" / f"{i}.npy", each)
    features = datasets.Features({"array": datasets.Array3D((3, 5, 6), "float32"), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"array": list(values), "label": [0, 1, 0, 1]}, features=features)
    data.to_parquet(tmp_path / "all.parquet")
    for source in (tmp_path / "all.npy", tmp_path / "all.npz", tmp_path / "all.parquet", folder):
        rows = rows_of("array", source)
        order = [0, 2, 1, 3] if source == folder else range(4)
        assert rows.shape == (3, 5, 6) and len(rows) == 4
        assert all(np.array_equal(rows[i]["images"], values[each]) for i, each in enumerate(order))
        assert rows.num_classes == (None if source.suffix == ".npy" else 2)
        mean, std = rows.statistics()
        assert np.allclose(mean, values.mean((0, 2, 3)), atol=1e-6) and np.allclose(
            std, values.std((0, 2, 3)), atol=1e-6
        )


def test_the_channels_of_arrays(tmp_path):
    np.save(tmp_path / "a.npy", noise(2, 5, 6, 3))
    assert rows_of("array", tmp_path / "a.npy", "--channel_axis", "last").shape == (3, 5, 6)
    assert rows_of("array", tmp_path / "a.npy", "--channel_axis", "none").shape == (1, 5, 6, 3)
    np.save(tmp_path / "b.npy", noise(2, 7))
    assert rows_of("array", tmp_path / "b.npy").shape == (1, 7)


def test_columns_are_cut_into_windows(tmp_path):
    values = noise(2, 12).astype(np.float32)
    datasets.Dataset.from_dict({"x": values[0], "y": values[1], "z": ["?"] * 12}).to_csv(tmp_path / "train.csv")
    rows = rows_of("array", tmp_path / "train.csv", "--columns", "y", "x", "--length", 5)
    assert len(rows) == 8 and rows.shape == (2, 5)
    assert all(np.allclose(rows[i]["images"], values[::-1, i : i + 5]) for i in range(8))
    with_commas = rows_of("array", tmp_path / "train.csv", "--columns", "y,x", "--length", 5)
    assert torch.equal(with_commas[0]["images"], rows[0]["images"])


class Stop:
    """What a pickle would run."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.array([1.0, np.nan, 2.0] * 4).reshape(3, 4), (), "values that are not finite"),
        (np.stack([noise(4, 5), np.ones((4, 5))], 1), (), "channel 1 is constant, 1:"),
        (np.array([Stop()] * 3, dtype=object), (), "cannot be opened: .*Pickles are not"),
        (np.array([["a", "b"], ["c", "d"]]), (), "holds texts"),
        (noise(3, 4) * 1j, (), "complex numbers"),
        (noise(3, 2, 2, 2, 2, 2), (), "must have 1 to 3 axes"),
        (noise(3, 2, 4, 4), ("--length", 4), r"length 4 is of signals"),
        (noise(3, 8), ("--length", 9), "has 8 values, fewer than length 9"),
        (noise(3, 8), ("--columns", "x", "--length", 4), "columns x are of tables"),
        (np.float64(3.0), (), "must have as many rows"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(tmp_path, capsys, array, options, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    found = refused(capsys, "array", tmp_path / "a.npy", *options)
    assert re.search(message, found), found


def test_arrays_of_several_shapes_are_refused(tmp_path, capsys):
    np.save(tmp_path / "a.npy", noise(3, 4))
    np.save(tmp_path / "b.npy", noise(3, 5))
    assert "several shapes, (3, 4) (row 0), (3, 5) (row 1)" in refused(capsys, "array", tmp_path)
    assert rows_of("array", tmp_path, "--length", 4).shape == (3, 4)


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(noise(3, 2, 4, 5)),
        noise(3, 2, 4, 5).astype(np.float16),
        noise(3, 2, 4, 5).astype(">f8"),
        (100 * noise(3, 2, 4, 5)).astype(">i2"),
        noise(3, 2, 4, 5) > 0,
    ],
    ids=["fortran", "half", "big-endian", "big-endian whole", "bool"],
)
def test_arrays_of_every_layout_are_read(tmp_path, array):
    np.save(tmp_path / "all.npy", array)
    (tmp_path / "folder").mkdir()
    for i, each in enumerate(array):
        np.save(tmp_path / "folder" / f"{i}.npy", each)
    for source in (tmp_path / "all.npy", tmp_path / "folder"):
        rows = rows_of("array", source)
        assert rows.shape == (2, 4, 5)
        assert all(np.array_equal(rows[i]["images"], array[i].astype(np.float32)) for i in range(3))


def npy(array, claimed=None):
    """The bytes of an .npy file; `claimed` is the shape that its header says instead, of as many letters."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    data = buffer.getvalue()
    return data if claimed is None else data.replace(str(array.shape).encode(), claimed.encode())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither an .npy nor an .npz"),
        (b"x,y", "neither an .npy nor an .npz"),
        (npy(np.array([Stop()], dtype=object)), "it holds pickled objects, which are not opened: save arrays of num"),
        (npy(noise(3, 4))[:-8], "damaged, or cut off"),
        (npy(noise(3, 4), "(9, 9)"), "damaged, or cut off"),
        (npy(noise(3, 4))[:60], "damaged, or cut off"),
        (npy(np.where(noise(3, 4) > 0, np.nan, 1.0)), "not finite"),
        (npy(np.zeros((3, 0))), "several shapes|without values"),
        (npy(np.float32(3.0)), "several shapes"),
        (npy(np.zeros(3, dtype=[("a", "f4")])), "holds no numbers"),
        (b"PK\x03\x04" + bytes(50), "damaged, or cut off"),
    ],
)
def test_an_array_file_that_is_damaged_is_refused_by_its_row(tmp_path, capsys, data, message):
    (tmp_path / "a.npy").write_bytes(npy(noise(3, 4)))
    (tmp_path / "b.npy").write_bytes(data)
    found = refused(capsys, "array", tmp_path)
    assert re.search(message, found) and "row 1" in found, found


def test_an_archive_that_unpacks_to_more_than_memory_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clips, "MOST_BYTES", 100_000)
    (tmp_path / "folder").mkdir()
    np.savez_compressed(tmp_path / "folder" / "a.npz", np.zeros((2, 100_000)))
    assert (tmp_path / "folder" / "a.npz").stat().st_size < 10_000
    found = refused(capsys, "array", tmp_path / "folder")
    assert re.search("row 0 .*unpacked it would have 1,600,128 bytes, more than 100,000", found), found


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1.0, 2.0], [1.0, 2.0, 3.0]], r"several shapes, \(1, 2\) \(row 0\), \(1, 3\) \(row 1\).*pass --length"),
        ([[[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0]]], "row 0 .*it is no array"),
        ([[1.0, None], [1.0, 2.0]], "row 0 .*missing|row 0 .*not finite"),
        ([None, [1.0, 2.0]], "row 0 .*missing"),
        ([["a", "b"], ["c", "d"]], "row 0 .*holds texts"),
        ([[], [1.0]], r"several shapes, \(1, 0\)"),
    ],
)
def test_columns_of_ragged_lists_are_refused(tmp_path, capsys, column, message):
    datasets.Dataset.from_dict({"array": column}).to_parquet(tmp_path / "train.parquet")
    found = refused(capsys, "array", tmp_path / "train.parquet")
    assert re.search(message, found), found


def test_a_table_without_a_column_of_arrays_says_how_its_columns_are_named(tmp_path, capsys):
    datasets.Dataset.from_dict({"pressure": noise(9)}).to_csv(tmp_path / "train.csv")
    assert "or those of a table of times by --columns" in refused(capsys, "array", tmp_path / "train.csv")
    found = refused(capsys, "array", tmp_path / "train.csv", "--columns", "presure", "--length", 4)
    assert "has no column 'presure'; it has pressure, did you mean pressure" in found


# --- videos -------------------------------------------------------------------------------------------------------


def frames(count=4, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_videos_of_arrays_and_gifs(tmp_path):
    grey = frames()[..., 0]
    np.save(tmp_path / "a.npy", grey)
    rows = rows_of("video", tmp_path, "--frames", 3, "--resolution", 8, "--image_channels", 1, "--frame_rate", 5)
    assert rows.shape == (1, 3, 8, 8) and rows.units == {"frame_rate": 5.0}
    assert np.allclose(rows[0]["images"].numpy()[0], grey[:3] / 127.5 - 1, atol=1e-6)
    (tmp_path / "gif").mkdir()
    images = [Image.fromarray(each) for each in grey]
    images[0].save(tmp_path / "gif" / "b.gif", save_all=True, append_images=images[1:], duration=200, optimize=False)
    rows = rows_of("video", tmp_path / "gif", "--frames", 4, "--resolution", 8, "--image_channels", 1)
    assert rows.frame_rate == 5 and np.abs(rows[0]["images"].numpy()[0] - (grey / 127.5 - 1)).max() < 0.02
    # every second frame, and the last one again
    half = rows_of(
        "video", tmp_path / "gif", "--frames", 3, "--resolution", 8, "--image_channels", 1, "--frame_rate", 2.5,
        "--short_clips", "pad",
    )[0]["images"]  # fmt: skip
    assert np.abs(half.numpy()[0] - (grey[[1, 3, 3]] / 127.5 - 1)).max() < 0.02


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (frames(), (), "doesn't say how many frames it has in a second: pass --frame_rate"),
        (frames(), ("--frame_rate", 5), "has 4 frames, fewer than frames 16: pass --short_clips pad"),
        (frames().astype(float), ("--frame_rate", 5), r"is no video: uint8 \(frames, height, width\)"),
        (frames(), ("--frame_rate", -1), "frame_rate -1.0 must be positive"),
        (frames(), ("--image_channels", 2), "image_channels 2 must be 1 or 3"),
    ],
)
def test_videos_that_do_not_fit_are_refused(tmp_path, capsys, array, options, message):
    np.save(tmp_path / "a.npy", array)
    found = refused(capsys, "video", tmp_path, *options)
    assert re.search(message, found), found


def gif(durations, side=8, noisy=False):
    """The bytes of a GIF whose frames are shown for so many milliseconds, and its frames (N, side, side)."""
    values = np.linspace(0, 255, len(durations)).round().astype(np.uint8)[:, None, None].repeat(side, 1).repeat(side, 2)
    values = frames(len(durations), side)[..., 0] if noisy else values
    images, buffer = [Image.fromarray(each) for each in values], io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations)
    return buffer.getvalue(), values


def test_frames_are_taken_when_they_are_shown(tmp_path):
    """Of frames that are shown for other times each, at a rate those that are seen then."""
    data, values = gif([100, 300, 100, 500])
    (tmp_path / "a.gif").write_bytes(data)
    options = ["--frames", 5, "--resolution", 8, "--image_channels", 1, "--frame_rate", 5]
    found = rows_of("video", tmp_path, *options)[0]["images"][0, :, 0, 0].numpy()
    # in the middles of fifths of a second: 0.1, 0.3, 0.5, 0.7, 0.9
    assert np.abs(found - (values[[1, 1, 3, 3, 3], 0, 0] / 127.5 - 1)).max() < 0.02


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (gif([100])[0], (), "has 1 frames, fewer than frames 4|doesn't say how many frames"),
        (gif([100, 300, 100, 500])[0], (), "are shown for 0.1 to 0.5 seconds: pass --frame_rate"),
        (gif([100] * 6, side=64, noisy=True)[0][:9000], (), "it is damaged, or cut off"),
        (gif([100] * 30)[0], (), "more than the 16 frames that are held of this size: cut it into shorter ones"),
        (b"GIF89a", (), "it is damaged, or cut off|need PyAV|PyAV cannot read it"),
        (b"", (), "need PyAV: pip install av|PyAV cannot read it"),
        (bytes(1000), (), "need PyAV: pip install av|PyAV cannot read it"),
    ],
)
def test_a_video_that_is_damaged_is_refused_by_its_row(tmp_path, capsys, monkeypatch, data, options, message):
    monkeypatch.setattr(signal_rows, "MOST_HELD", 16 * 8 * 8)
    (tmp_path / "a.gif").write_bytes(gif([100] * 6)[0])
    (tmp_path / "b.gif").write_bytes(data)
    size = ["--frames", 4, "--resolution", 8, "--image_channels", 1]
    found = refused(capsys, "video", tmp_path, *size, *options)
    assert re.search(message, found) and "row 1 " in found, found


def film(av, suffix, frames, rate=10, codec="mpeg4"):
    """The bytes of a video of frames (N, height, width, 3)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format={"mkv": "matroska"}.get(suffix, suffix)) as container:
        stream = container.add_stream(codec, rate=rate, options={"qscale": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_other_videos_are_read_by_pyav(tmp_path):
    av = pytest.importorskip("av")
    ramp = np.linspace(30, 220, 20).round().astype(np.uint8)
    values = np.broadcast_to(ramp[:, None, None, None], (20, 32, 48, 3)).copy()
    for suffix in ("mp4", "mov", "avi", "mkv"):
        folder = tmp_path / suffix
        folder.mkdir()
        data = film(av, suffix, values)
        (folder / f"a.{suffix}").write_bytes(data)
        rows = rows_of("video", folder, "--frames", 16, "--resolution", 16)
        assert rows.frame_rate == 10 and rows.shape == (3, 16, 16, 16)
        assert np.abs(rows[0]["images"][:, :, 8, 8].numpy() - (ramp[:16] / 127.5 - 1)).max() < 0.1
        # every fourth frame, that in the middle of its time
        rows = rows_of("video", folder, "--frames", 4, "--resolution", 16, "--frame_rate", 2.5)
        assert np.abs(rows[0]["images"][0, :, 8, 8].numpy() - (ramp[[2, 6, 10, 14]] / 127.5 - 1)).max() < 0.1
    feature = datasets.Features({"video": datasets.Video()})
    column = [{"bytes": (tmp_path / "mkv" / "a.mkv").read_bytes(), "path": None}]
    datasets.Dataset.from_dict({"video": column}, features=feature).to_parquet(tmp_path / "train.parquet")
    assert rows_of("video", tmp_path / "train.parquet", "--frames", 16, "--resolution", 16).frame_rate == 10
    (tmp_path / "mkv" / "a.mkv").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="row 0 .*it is cut off: of 2 seconds it has frames of|PyAV cannot read it"):
        rows_of("video", tmp_path / "mkv", "--frames", 4, "--resolution", 16)
