"""Images of several sizes: buckets, one for each height and width, so that little of an image is cropped."""

import itertools
import math
import re
import warnings
from dataclasses import dataclass

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string

from .config import option


@dataclass
class BucketConfig:
    aspect_ratio_buckets: str | None = option(
        None,
        "Sizes of the images in pixels, 'height,width;height,width': each image takes the one of the nearest aspect "
        "ratio, is resized to cover it, and cropped by what is left. The first is the network's own. Or auto: sizes "
        "of about resolution x resolution pixels in multiples of an eighth of it; auto,16: of 16. One size alone, "
        "'64,96', is a rectangle for all. The resolution is then not read otherwise.",
        "data",
        common=True,
    )

    @property
    def sizes(self):
        """[(height, width), ...] in pixels; None for the square of the resolution. Raises ValueError for what are
        none."""
        return None if self.aspect_ratio_buckets is None else parse_sizes(self.aspect_ratio_buckets, self.resolution)

    @property
    def first_size(self):
        """The size that is to be the network's own; None for that of most images."""
        named = self.aspect_ratio_buckets is not None and "auto" not in self.aspect_ratio_buckets
        return self.sizes[0] if named else None

    def bucket_problems(self):
        try:
            _ = self.sizes
        except ValueError as error:
            yield f"aspect_ratio_buckets {self.aspect_ratio_buckets!r}: {error}"


def parse_sizes(text, resolution):
    """The sizes of an option `aspect_ratio_buckets`, [(height, width), ...]. Raises ValueError for what are none, and
    for two of one aspect ratio."""
    automatic = re.fullmatch(r"\s*auto\s*(?:,\s*(\d+)\s*)?", text)
    if automatic:
        parts = 1 if automatic[1] else 8
        step = int(automatic[1] or resolution // parts)
        if step < 1 or resolution % (step if automatic[1] else parts):
            raise ValueError(f"auto needs a resolution that is a multiple of {automatic[1] or parts}, not {resolution}")
        return generate_aspect_ratio_buckets(resolution, step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sides that 8 doesn't divide: what must is checked with the network
        sizes = parse_buckets_string(text)
    by_ratio = {}
    for size in sizes:
        divisor = math.gcd(*size)
        by_ratio.setdefault(tuple(side // divisor for side in size), []).append(in_words(size))
    if alike := [" and ".join(each) for each in by_ratio.values() if len(each) > 1]:
        raise ValueError(f"{', '.join(alike)} have one aspect ratio: an image takes one of them, leave the others out")
    return sizes


def in_words(size):
    """A height and width: "48 x 80"."""
    return " x ".join(map(str, size))


def counts_of_sizes(facts):
    """{(height, width): how many images are of it} of what `row_facts` of a dataset says, or training.json; {} for
    squares. Raises ValueError for what says neither."""
    found = {}
    for words, count in (facts.get("sizes") or {}).items():
        sides = re.fullmatch(r"([1-9]\d{0,5}) x ([1-9]\d{0,5})", words)
        if not sides or not isinstance(count, int) or count < 1:
            raise ValueError(f"sizes {words!r}: {count!r} must be a height x width and how many images are of it")
        found[int(sides[1]), int(sides[2])] = count
    return found


def shares_of_sizes(counts, count):
    """[(size, numbers)]: the numbers 0 to count - 1, parted in proportion to {size: number}; [(None, numbers)] where
    there are no sizes."""
    if not counts:
        return [(None, range(count))]
    total = sum(counts.values())
    ends = [round(count * each / total) for each in itertools.accumulate(counts.values())]
    parts = zip(counts, map(range, [0, *ends], ends), strict=True)
    return [(size, numbers) for size, numbers in parts if numbers]


def nearest_size(height, width, sizes):
    """The number of the size of which the least of an image is cropped: that of the nearest aspect ratio."""
    # of one area: else diffusers' measure would favour small ones
    return find_nearest_bucket(height, width, [(math.sqrt(h / w), math.sqrt(w / h)) for h, w in sizes])
