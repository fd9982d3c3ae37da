"""Any image as what a model is trained on: 8-bit greyscale or RGB, upright, on an opaque background."""

import numpy as np
from PIL import Image, ImageOps

from .wording import check_choice


def to_mode(image, mode, background="white"):
    """A PIL image of any mode in mode "L" or "RGB".

    Every mode is scaled by its range: 16-bit ones by 255 / 65535; "I", in which 16-bit files are opened, too, likewise;
    "F" by 255, of values in [0, 1]. What is transparent, by an alpha channel or one transparent value, lies on
    `background`, a colour as Pillow names it ("white", "#808080"). The EXIF orientation is applied.

    Raises ValueError, with the range found, for "I" outside 0 to 65535 and "F" outside [0, 1]: nothing says what is
    black and white there.
    """
    check_choice("mode", mode, ("L", "RGB"))
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow converts it to nothing else
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # likewise
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert(mode)


def _to_8_bits(image):
    """The image of mode "L", or "LA" where one of its values is transparent, of one with more bits."""
    values = np.asarray(image).astype(np.float32)  # holds every integer to 2^24
    white = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= white):  # true for nan, too
        raise ValueError(
            f"an image of mode {image.mode} has values from {values.min():g} to {values.max():g}; they must lie in "
            f"0 (black) to {white} (white): scale them before"
        )
    grey = Image.fromarray((values * (255 / white) + 0.5).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey
