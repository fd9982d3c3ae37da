"""Images as conditions: what a network sees beside the sample. They are given, or measured from the image itself by a
named operator, the same in training and in sampling."""

import math

import torch

from .operators import LUMINANCE, colourisation, deblurring, super_resolution
from .wording import check_choice, quoted


# name: the operator of its number, (least, largest) of that, and what it is; None where there is no number
MEASUREMENTS = {
    "downsample": (super_resolution, (2, 64), "a whole factor"),
    "grayscale": (lambda: colourisation(weights=LUMINANCE), None, None),
    "blur": (deblurring, (0.1, 32), "a standard deviation in pixels"),
}


class Measurement:
    """What a condition image is of the image itself, by name: "downsample:4", the means of squares of 4 x 4 pixels;
    "grayscale", as Pillow has it; "blur:1.5", by a Gaussian of this standard deviation in pixels.

    Attributes: `name`; `operator`, a `LinearOperator`; `factor`, how many times its result is smaller than the image in
    height and width.

    Raises ValueError for what is none.
    """

    def __init__(self, name):
        if not isinstance(name, str):
            raise ValueError(f"condition_from {quoted(name)} must be a text, such as downsample:4")
        kind, _, number = name.partition(":")
        check_choice("condition_from", kind, MEASUREMENTS)
        make, limits, meaning = MEASUREMENTS[kind]
        self.name, self.kind, self.factor = name, kind, 1
        if limits is None:
            if name != kind:
                raise ValueError(f"condition_from {quoted(name)}: {kind} takes no number")
            self.operator = make()
            return
        least, largest = limits
        try:
            value = int(number) if isinstance(least, int) else float(number)
        except ValueError:
            value = math.nan
        if not least <= value <= largest:  # true for nan, too
            raise ValueError(
                f"condition_from {quoted(name)}: {kind} needs {meaning} from {least} to {largest}, such as {kind}:4"
            )
        self.operator = make(value)
        if kind == "downsample":
            self.factor = value

    def channels(self, of_image):
        """Number of channels of its result for images of so many."""
        return 1 if self.kind == "grayscale" else of_image

    def check(self, channels, size):
        """Raise ValueError for images of these channels and this size (height, width) that it doesn't take."""
        try:
            self.operator(torch.zeros(1, channels, *size))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"condition_from {self.name}: {error}") from error

    def __call__(self, images):
        """The condition of images (B, C, H, W) in [-1, 1], (B, C', H, W)."""
        return at_size(self.operator(images), images.shape[2:])


def at_size(image, size):
    """An image (B, C, h, w) at this size (H, W), multiples of its own, each of its pixels repeated."""
    for axis, side in enumerate(size, start=2):
        image = image.repeat_interleave(side // image.shape[axis], axis)
    return image
