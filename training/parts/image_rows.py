"""Rows of a dataset of images: their columns, labels, captions and paired images, checked before training starts."""

import itertools
import os

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from score_sde.pipelines.images import to_mode
from score_sde.pipelines.wording import few

from .labelled_rows import LabelledRows, describe, field
from .samples import from_bytes
from .sources import FORMATS, open_split


# a side of 1 pixel would be made as long as the resolution, and the other as many times longer
MOST_PIXELS = 2**27
# rows of which a look is taken at how the images are paired
CHECKED_PAIRS = 64


class ImageRows(LabelledRows):
    """Rows of a split, as {"images": (channels, height, width) in [-1, 1], "labels": class number}.

    Attributes, beside those of all rows: `sizes`, [(height, width), ...] of the images; `shape` of one of the first
    size.
    """

    def __init__(self, config, split, crop_seed, streaming, captions=None, condition=None, sizes=None):
        self.name, self.split, self.crop_seed = config.dataset, split or config.split, crop_seed
        self.captions = captions
        # (column, channels) of images that are paired with the images
        self.condition_column, self.condition_channels = condition or (None, None)
        self.data, self.origin = open_split(self.name, self.split, streaming)
        self.image_column, self.label_column = config.image_column, config.label_column
        if os.path.isdir(self.name) and list(self.data.features) == ["image"] and self.label_column == "label":
            self.label_column = None  # there are no folders of classes
        caption_column = captions and captions.column
        columns = [("image", self.image_column), ("label", self.label_column), ("caption", caption_column)]
        columns += [("condition", self.condition_column)]
        self.check_columns(columns)
        self.skip_corrupt_images = config.skip_corrupt_images
        self.sizes, self.background = sizes or [(config.resolution, config.resolution)], config.background
        self.mode = "L" if config.image_channels == 1 else "RGB"
        self.shape = (config.image_channels, *self.sizes[0])
        self.read_labels(config.num_classes)
        self.data = self.data.cast_column(self.image_column, ImageFeature(decode=False))
        if self.condition_column is not None:
            self.open_conditions()
        if captions is not None:
            self.count_captions()

    def open_conditions(self):
        """Have a look at the condition images: that all rows have one, and at the sizes of the first ones. Raises
        ValueError where they are not paired with the images."""
        column, name = self.condition_column, self.name
        try:
            self.data = self.data.cast_column(column, ImageFeature(decode=False))
        except Exception as error:  # datasets and pyarrow have their own
            found = field(self.data.features, column)
            raise ValueError(f"dataset {name!r}: condition column {column!r} must hold images, not {found}") from error
        if isinstance(self.data, Dataset):
            values = self.data.select_columns([column]).with_format("arrow")[:].column(column)
            absent = [pyarrow.compute.is_null(pyarrow.compute.struct_field(values, each)) for each in ("bytes", "path")]
            missing = np.flatnonzero(absent[0].to_numpy() & absent[1].to_numpy()).tolist()
            if missing:
                raise ValueError(
                    f"dataset {name!r}: {len(missing):,} rows have no image in condition column {column!r} (rows "
                    f"{few(map(str, missing))}): every image needs one"
                )
        pairs = self.data.select_columns([self.image_column, column])
        for number, row in enumerate(itertools.islice(pairs, CHECKED_PAIRS)):
            try:
                sizes = [to_mode(self.open_image(row[each]), "L").size for each in (self.image_column, column)]
            except Exception:
                continue  # what cannot be decoded is said where it is read
            try:
                check_pair(*sizes)
            except ValueError as error:
                raise ValueError(f"dataset {name!r}: row {number} of condition column {column!r}: {error}") from error

    def count_captions(self):
        """Look at all captions, of a stream at the first ones."""
        top = self.captions.column
        top = top if top in self.data.features else top.split(".")[0]
        try:
            if isinstance(self.data, Dataset):
                self.captions.count(field(row, self.captions.column) for row in self.data.select_columns([top]))
            else:
                first = itertools.islice(self.data.select_columns([top]), 64)
                self.captions.examples = [self.captions.texts(field(row, self.captions.column))[0] for row in first]
        except ValueError as error:
            raise ValueError(f"dataset {self.name!r}: {error}") from error

    def open_image(self, value):
        """The PIL image of what the image column holds: bytes, or a file of the dataset, and no other."""
        with self.file_of(value) as file:
            image = Image.open(file, formats=FORMATS)
            image.load()
        return image

    def upright_size(self, value):
        """(height, width) of the image of what the image column holds, from its header."""
        with self.file_of(value) as file:
            image = Image.open(file, formats=FORMATS)
            # Pillow would decode a PNG to look for what hardly any has
            turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) > 4
            return image.size if turned else image.size[::-1]

    def item(self, row, key):
        """A row as it is trained on."""
        return self.item_of(from_bytes(self.pixels(row, key)), row, key)

    def pixels(self, row, key, size=None):
        """The image of a row, uint8 (channels, height, width), by default of the first size, its condition image behind
        it. A random crop is a function of the seed and `key`, integers."""
        image = to_mode(self.open_image(row[self.image_column]), self.mode, self.background)
        pixels = self.pixels_of(image, key, size)
        if self.condition_column is not None:
            condition = self.open_image(row[self.condition_column])
            condition = to_mode(condition, "L" if self.condition_channels == 1 else "RGB", self.background)
            check_pair(image.size, condition.size)
            # the same crop
            pixels = torch.cat([pixels, self.pixels_of(condition, key, size, image.size)])
        return pixels

    def pixels_of(self, image, key, size=None, like=None):
        """A PIL image, resized and cropped, as uint8 (channels, height, width); `like` as `resize_and_crop` takes
        it."""
        seed, size = None if self.crop_seed is None else (self.crop_seed, *key), size or self.sizes[0]
        image = resize_and_crop(image, size, seed, like)
        return torch.from_numpy(np.array(image)).reshape(*size, -1).permute(2, 0, 1).contiguous()

    def item_of(self, pixels, row, key):
        """An image with its condition image, and what a row says of it."""
        item = {"images": pixels[: self.shape[0]]}
        if self.condition_column is not None:
            item["condition_images"] = pixels[self.shape[0] :]
        if self.label_column is not None:
            item["labels"] = field(row, self.label_column)
        if self.captions is not None:
            item |= self.captions.item(field(row, self.captions.column), key)
        return item

    def problem(self, where, row, error):
        """What to say of a row that cannot be decoded."""
        paths = [(row[self.image_column] or {}).get("path"), row.get("__url__")]
        found = ", ".join(path for path in paths if path)
        return (
            f"{where} of dataset {self.name!r}, split {self.split!r}: the image in column {self.image_column!r}"
            + (f", or its condition in {self.condition_column!r}," if self.condition_column else "")
            + (f" ({found})" if found else "")
            + f" cannot be decoded: {error}"
        )

    def describe(self):
        """One line that says what the rows are, and which files are left out."""
        left_out = [f"{few(names)} ({reason})" for reason, names in self.origin.left_out.items()]
        captions = "" if not (self.captions and self.captions.facts) else f"; {self.captions.describe()}"
        return (
            describe(f"dataset {self.name!r}, split {self.split!r}", self)
            + captions
            + (f"; left out: {', '.join(left_out)}" if left_out else "")
        )

    def fingerprint(self):
        """As `LabelledRows.fingerprint`, with the captions."""
        return super().fingerprint() | ({} if self.captions is None else {"captions": self.captions.hash})


def check_pair(image, condition):
    """Raise ValueError for a condition image whose proportions are not its image's, up to a rounding to whole pixels;
    sizes (width, height)."""
    (width, height), (own_width, own_height) = image, condition
    allowed = max(width, height, own_width, own_height)
    if abs(width * own_height - height * own_width) > allowed:
        raise ValueError(
            f"the condition image of {own_width} x {own_height} pixels is not paired with its image of {width} x "
            f"{height}: it must have its size, or its proportions"
        )


def resize_and_crop(image, size, seed=None, like=None):
    """Resize a PIL image to cover `size` (Lanczos), then crop the centre, or a random place where a seed is given
    (integers); `size` is a height and width, or one number for both. `like` is the size (width, height) of an image
    that it is paired with: it is resized to what that one would be. Raises ValueError for an image so long that it
    would be of too many pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    before = like or image.size
    scale = max(width / before[0], height / before[1])
    size = [max(least, round(side * scale)) for least, side in zip((width, height), before, strict=True)]
    if tuple(size) != image.size:
        if size[0] * size[1] > MOST_PIXELS:
            raise ValueError(
                f"an image of {image.width} x {image.height} pixels would be resized to {size[0]} x {size[1]}: cut it"
            )
        image = image.resize(size, Image.Resampling.LANCZOS)
    spare = [image.width - width, image.height - height]
    if not any(spare):
        return image
    if seed is None:
        left, top = [number // 2 for number in spare]
    else:
        left, top = np.random.default_rng(seed).integers(0, spare, endpoint=True).tolist()
    return image.crop((left, top, left + width, top + height))
