"""Images and latents for training: any dataset that `sources` opens, checked before training starts."""

import bisect
import hashlib
import io
import itertools
import json
import os

import datasets
import fsspec
import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from score_sde.pipelines.images import to_mode
from score_sde.pipelines.wording import few

from .buckets import in_words, nearest_size
from .cores import loading_processes
from .hashes import hash_of, hash_of_file
from .samples import from_bytes
from .sources import FORMATS, as_stream, nearest_path, open_split


# a side of 1 pixel would be made as long as the resolution, and the other as many times longer
MOST_PIXELS = 2**27
# rows of which a look is taken at how the images are paired
CHECKED_PAIRS = 64


def field(values, column):
    """What a mapping holds for a column: "json.label" is the field label of the column json. Raises LookupError or
    TypeError where there is none."""
    for name in [column] if column in values else column.split("."):
        values = values[name]
    return values


class ImageRows:
    """Rows of a split, as {"images": (channels, height, width) in [-1, 1], "labels": class number}.

    Attributes: `sizes`, [(height, width), ...] of the images; `shape` of one of the first size; `num_classes` and
    `id2label`, None without labels; `class_counts`, {name: rows} of the classes, None without labels or where only
    reading all of a stream could tell.
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
        for kind, column in columns:
            try:
                _ = column and field(self.data.features, column)
            except (LookupError, TypeError):
                raise ValueError(
                    f"dataset {self.name!r} has no column {column!r}; it has {', '.join(self.data.column_names)}: "
                    f"name its {kind} column by --{kind}_column"
                    + (", or pass --label_column none" if kind == "label" else "")
                ) from None
        self.skip_corrupt_images = config.skip_corrupt_images
        self.sizes, self.background = sizes or [(config.resolution, config.resolution)], config.background
        self.mode = "L" if config.image_channels == 1 else "RGB"
        self.shape = (config.image_channels, *self.sizes[0])
        self.num_classes = self.id2label = self.class_counts = self.labels_hash = None
        if self.label_column is not None:
            feature = field(self.data.features, self.label_column)
            known = len(feature.names) if isinstance(feature, ClassLabel) else None
            if known and config.num_classes not in (None, known):
                raise ValueError(f"num_classes {config.num_classes}: dataset {self.name!r} has {known} classes")
            self.num_classes = known or config.num_classes
            found = self.count_labels() if isinstance(self.data, Dataset) else None
            if self.num_classes is None:
                raise ValueError(
                    f"the stream of dataset {self.name!r} doesn't say how many classes its column "
                    f"{self.label_column!r} has: pass --num_classes, or --label_column none"
                )
            names = feature.names if known else map(str, range(self.num_classes))
            self.id2label = dict(enumerate(names))
            if found:
                self.class_counts = {name: found.get(label, 0) for label, name in self.id2label.items()}
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

    def count_labels(self):
        """{label: rows}; sets `labels_hash`, and `num_classes` where it isn't known."""
        top = self.label_column if self.label_column in self.data.features else self.label_column.split(".")[0]
        table = self.data.select_columns([top]).flatten().with_format("arrow")[:]
        counts = {each["values"]: each["counts"] for each in table[self.label_column].value_counts().to_pylist()}
        wrong = [label for label in counts if not self.is_label(label)]
        if wrong:
            raise ValueError(
                f"label column {self.label_column!r} must hold integers from 0"
                + (f" to {self.num_classes - 1}" if self.num_classes else "")
                + f"; it has {wrong[:5]}"
            )
        if self.num_classes is None:
            if max(counts) >= len(self.data):
                raise ValueError(
                    f"label column {self.label_column!r} has {len(counts)} labels, but up to {max(counts)}: pass "
                    f"--num_classes if there are so many classes"
                )
            self.num_classes = max(counts) + 1
        labels = table[self.label_column].cast(pyarrow.int64()).to_numpy()
        self.labels_hash = hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
        return counts

    def is_label(self, label):
        return isinstance(label, int) and label >= 0 and (self.num_classes is None or label < self.num_classes)

    def open_image(self, value):
        """The PIL image of what the image column holds: bytes, or a file of the dataset, and no other."""
        with self.file_of(value) as file:
            image = Image.open(file, formats=FORMATS)
            image.load()
        return image

    def file_of(self, value):
        """The open file of what the image column holds."""
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ValueError("the row has none")
        return io.BytesIO(value["bytes"]) if value["bytes"] is not None else self.open_file(value["path"])

    def upright_size(self, value):
        """(height, width) of the image of what the image column holds, from its header."""
        with self.file_of(value) as file:
            image = Image.open(file, formats=FORMATS)
            # Pillow would decode a PNG to look for what hardly any has
            turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) > 4
            return image.size if turned else image.size[::-1]

    def open_file(self, path):
        """A file of the dataset, to be read. What is in the rows of a dataset may name any."""
        *_, source = path.split("::")  # of an archive, where it is
        if "://" in source:
            if not source.startswith((f"hf://datasets/{self.name}@", f"hf://datasets/{self.name}/")):
                raise ValueError(f"{path!r} is no file of the dataset")
            return fsspec.open(path, "rb").open()
        roots = [self.origin.root]
        if self.origin.root is None:  # of the Hub, what was downloaded
            caches = datasets.config
            roots = [caches.HF_DATASETS_CACHE, caches.DOWNLOADED_DATASETS_PATH, caches.EXTRACTED_DATASETS_PATH]
            roots.append(huggingface_hub.constants.HF_HUB_CACHE)
        roots = [os.path.abspath(root) for root in roots]
        path = os.path.abspath(os.path.join(roots[0], path))
        if not any(os.path.commonpath([path, root]) == root for root in roots):
            raise ValueError(f"{path!r} is no file of the dataset")
        if not os.path.isfile(path):
            raise ValueError(f"{path!r} is no file")
        return open(path, "rb")

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

    def row_facts(self):
        """What the rows are, for training.json: {"rows", "class_counts", "skipped_files"}; None where a stream doesn't
        say."""
        return {
            "rows": len(self.data) if isinstance(self.data, Dataset) else None,
            "class_counts": self.class_counts,
            "skipped_files": sum(map(len, self.origin.left_out.values())),
        }

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
        """What tells these rows from others, here and on another machine: {"classes": names in order, "rows": a hash of
        their files' names and sizes and of the labels, "autoencoder": None}."""
        rows = {"files": list(self.origin.sizes.items()), "labels": self.labels_hash, "rows": self.row_facts()["rows"]}
        if not self.origin.sizes:  # on the Hub
            rows |= {"name": self.name, "split": self.split, "bytes": self.data.info.dataset_size}
        captions = {} if self.captions is None else {"captions": self.captions.hash}
        return fingerprint_of(self.id2label, rows) | captions


class ImageDataset(ImageRows, torch.utils.data.Dataset):
    """Images by the numbers of their rows. `crop_seed` asks for random crops, of another place in every epoch.

    `sizes` are those that they may have, None for the square of the config's resolution. Where there are several, each
    takes that of the nearest aspect ratio; those that none has are left out, and the others begin with `first_size`, or
    if that is None with the one that most have.

    Attributes: `buckets`, the numbers of the rows of each size, None where there is one size.
    """

    knows_epochs = True

    def __init__(self, config, split=None, crop_seed=None, captions=None, condition=None, sizes=None, first_size=None):
        super().__init__(config, split, crop_seed, False, captions, condition, sizes)
        self.corrupt, self.kept = set(), None
        self.has_sizes, self.size_of_row, self.buckets = sizes is not None, None, None
        if len(self.sizes) > 1:
            self.sort_by_size(first_size)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        if row >= len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.__getitems__([row])[0]

    def __getitems__(self, keys):
        """Items for the keys of a `GlobalBatchSampler`."""
        return [item for item, _ in self.items_and_rows(keys)]

    def keep_images(self):
        """Decode every image once and keep it in memory as uint8, which all processes of a data loader share."""
        channels, size = self.shape[0] + (self.condition_channels or 0), self.shape[1:]
        self.kept = torch.zeros((len(self), channels, *size), dtype=torch.uint8).share_memory_()
        self.is_kept = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        others = [name for name in self.data.column_names if name not in (self.image_column, self.condition_column)]
        self.beside = self.data.select_columns(others) if others else None

    def sort_by_size(self, first_size):
        """Find the size of every row. Raises ValueError where none is of the first size."""
        found = []
        images = self.data.select_columns([self.image_column])
        for number, row in enumerate(tqdm(images, desc="sizes of images", unit="image", leave=False)):
            try:
                found.append(nearest_size(*self.upright_size(row[self.image_column]), self.sizes))
            except Exception as error:  # whatever the decoder raises
                if not self.skip_corrupt_images:
                    problem = self.problem(f"row {number}", row, error)
                    raise ValueError(f"{problem}. Repair it, or pass --skip_corrupt_images") from error
                found.append(None)
        following = next((size for size in found if size is not None), None)
        if following is None:
            raise ValueError(f"dataset {self.name!r}, split {self.split!r}: none of its images can be decoded")
        # what cannot be read is of the size of the next one, which is taken instead
        for number in reversed(range(len(found))):
            following = found[number] = following if found[number] is None else found[number]
        buckets = {size: np.flatnonzero(np.equal(found, number)) for number, size in enumerate(self.sizes)}
        there = {size: rows for size, rows in buckets.items() if len(rows)}
        if first_size is None:
            there = dict(sorted(there.items(), key=lambda each: -len(each[1])))
        elif first_size not in there:
            raise ValueError(
                f"dataset {self.name!r}, split {self.split!r}: no image is nearest to {in_words(first_size)}, the "
                f"first size, which would be the network's own: pass those that images have, --aspect_ratio_buckets "
                f"'{';'.join(f'{height},{width}' for height, width in there)}'"
            )
        self.sizes, self.buckets = list(there), list(there.values())
        self.shape = (self.shape[0], *self.sizes[0])
        self.size_of_row = np.empty(len(found), dtype=np.int64)
        for number, rows in enumerate(self.buckets):
            self.size_of_row[rows] = number

    def size_of(self, row):
        """(height, width) that the image of a row has here."""
        return self.sizes[0] if self.size_of_row is None else self.sizes[self.size_of_row[row]]

    def row_after(self, row):
        """The row that is taken instead of one that cannot be decoded: the next of its size."""
        if self.size_of_row is None:
            return (row + 1) % len(self)
        same = self.buckets[self.size_of_row[row]]
        return int(same[(np.searchsorted(same, row) + 1) % len(same)])

    def row_facts(self):
        """As `ImageRows.row_facts`; with sizes that were asked for, also {"sizes": {"height x width": rows}}."""
        counts = [len(self)] if self.buckets is None else map(len, self.buckets)
        sizes = dict(zip(map(in_words, self.sizes), counts, strict=True))
        return super().row_facts() | ({"sizes": sizes} if self.has_sizes else {})

    def is_readable(self, row):
        """Whether the image of a row can be decoded."""
        try:
            self.item(self.data[row], (0, row))
        except Exception:  # whatever the decoder raises
            return False
        return True

    def source_of(self, rows):
        """A hash that tells whether the images of some rows are what they were: of their files' names and sizes in a
        folder of images, else of all that the rows are from."""
        if len(self.origin.sizes) == len(self):
            files = list(self.origin.sizes.items())
            return hash_of([files[row] for row in rows])
        return self.fingerprint()["rows"]

    def items_and_rows(self, keys):
        """The items for some keys, each with the number of the row that it is of: the next one, where one cannot be
        decoded."""
        epochs, numbers = zip(*(divmod(key, len(self)) for key in keys), strict=True)
        if self.kept is not None and self.is_kept[list(numbers)].all():
            images, rows = from_bytes(self.kept[list(numbers)]), rows_of(self.beside, numbers)
            return [
                (self.item_of(image, row, key), key[1])
                for image, row, key in zip(images, rows, zip(epochs, numbers, strict=True), strict=True)
            ]
        rows = rows_of(self.data, numbers)
        return [self.item_or_next(*each) for each in zip(epochs, numbers, rows, strict=True)]

    def item_or_next(self, epoch, number, row):
        taken = number
        while True:
            try:
                pixels = self.pixels(row, (epoch, number), self.size_of(number))
                item = self.item_of(from_bytes(pixels), row, (epoch, number))
                if self.kept is not None and taken == number:
                    self.kept[number] = pixels
                    self.is_kept[number] = True
                return item, taken
            except Exception as error:  # whatever the decoder raises
                problem = self.problem(f"row {taken}", row, error)
                if not self.skip_corrupt_images:
                    raise ValueError(f"{problem}. Repair it, or pass --skip_corrupt_images") from error
                following = self.row_after(taken)
                if following == number:
                    of_its_size = "" if self.size_of_row is None else " of its size"
                    raise ValueError(f"{problem}, and no other row of it{of_its_size} can") from error
                if taken not in self.corrupt:
                    self.corrupt.add(taken)
                    print(f"{problem}: row {following} is taken instead")
                taken, row = following, self.data[following]


class ImageStream(ImageRows, torch.utils.data.IterableDataset):
    """Images as they come, endlessly: each process, and each of its workers, reads its own part of the files, shuffled
    by a buffer.

    The order is a function of the seed, the number of processes and the number of workers. `begin` says which part
    this process reads and where.
    """

    def __init__(self, config, crop_seed=None, captions=None, condition=None):
        super().__init__(config, None, crop_seed, streaming=True, captions=captions, condition=condition)
        self.seed, self.shuffle_buffer = config.seed, config.shuffle_buffer
        if isinstance(self.data, Dataset):  # a folder of images
            self.data = as_stream(self.data)
        self.begin(rank=0, world_size=1, given=0)

    def begin(self, rank, world_size, given):
        """Start as process `rank` after every worker of it gave so many images."""
        self.rank, self.world_size, self.given = rank, world_size, given

    def rows(self, epoch):
        shuffled = self.data.shuffle(seed=mix_seeds(self.seed, epoch), buffer_size=self.shuffle_buffer)
        return split_dataset_by_node(shuffled, self.rank, self.world_size)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        position = corrupt = 0
        for epoch in itertools.count():
            first, rows = position, iter(self.rows(epoch))
            while True:
                where = f"row {position - first} of pass {epoch} of worker {worker} in process {self.rank}"
                try:
                    row = next(rows, None)
                except Exception as error:  # every reader has its own
                    raise ValueError(f"dataset {self.name!r} cannot be read on at {where}: {error}") from error
                if row is None:
                    break
                position += 1
                if position <= self.given:
                    continue
                try:
                    item = self.item(row, (self.rank, worker, position))
                except Exception as error:  # whatever the decoder raises
                    problem = self.problem(where, row, error)
                    if not self.skip_corrupt_images:
                        raise ValueError(f"{problem}. Repair it, or pass --skip_corrupt_images") from error
                    print(f"{problem}: the next row is taken instead")
                    corrupt += 1
                    continue
                if self.label_column is not None and not self.is_label(item["labels"]):
                    raise ValueError(
                        f"{where} of dataset {self.name!r}: label column {self.label_column!r} must hold integers from "
                        f"0 to {self.num_classes - 1}; it has {item['labels']!r}"
                    )
                yield from [item] * (1 + corrupt)
                corrupt = 0
            if corrupt >= position - first:  # true for no rows, too
                raise ValueError(
                    f"pass {epoch} of worker {worker} in process {self.rank} found no image in dataset {self.name!r}, "
                    f"split {self.split!r}, among its {position - first} rows: use fewer processes or num_workers"
                )


def rows_of(data, numbers):
    """Rows of a dataset by their numbers, each as {column: value}; None has no columns."""
    if data is None:
        return [{} for _ in numbers]
    columns = data[list(numbers)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


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


def describe(name, dataset):
    """One line on the rows of a dataset."""
    facts = dataset.row_facts()
    rows = "a stream of images" if facts["rows"] is None else f"{facts['rows']:,} images"
    sizes = [f"{size} {count:,}" for size, count in facts.get("sizes", {}).items()]
    sizes = f"; heights and widths: {', '.join(sizes)}" if sizes else ""
    if dataset.id2label is None:
        return f"{name}: {rows}, read without classes{sizes}"
    counts = facts["class_counts"] or {}
    classes = [f"{label} {counts[label]:,}" if counts else label for label in dataset.id2label.values()]
    return f"{name}: {rows} of {len(classes)} classes: {few(classes, 20)}{sizes}"


def fingerprint_of(id2label, rows, autoencoder=None):
    """What tells data from others, as JSON; `rows` is hashed."""
    return {
        "classes": list(id2label.values()) if id2label else None,
        "rows": hash_of(rows),
        "autoencoder": autoencoder,
    }


def shard_path(folder, shard):
    return os.path.join(folder, f"moments-{shard:05d}.safetensors")


def shard_layout(facts):
    """(first row, number of rows, shape of a latent) of every shard of latents, which are of one size each."""
    layout, first = [], 0
    for bucket in facts.get("buckets") or [facts]:
        for start in range(0, bucket["rows"], facts["shard_size"]):
            layout.append((first + start, min(facts["shard_size"], bucket["rows"] - start), tuple(bucket["shape"])))
        first += bucket["rows"]
    return layout


def shard_record(path):
    """What tells a shard from a damaged one: {"bytes", "sha256"}."""
    return {"bytes": os.path.getsize(path), "sha256": hash_of_file(path)}


def check_shard(folder, shard, facts, content=True):
    """Raise ValueError naming a shard of latents that is missing, damaged or of other latents; without `content` only
    by its size and header."""
    path = shard_path(folder, shard)
    try:
        _, rows, wanted = shard_layout(facts)[shard]
        with safe_open(path, framework="pt") as file:
            shape = tuple(file.get_slice("mean").get_shape())
        if shape != (rows, *wanted):
            raise ValueError(f"it holds {shape}, not {(rows, *wanted)}")
        if facts.get("shards"):  # latents from before they were recorded have none
            expected = facts["shards"][shard]
            found = shard_record(path) if content else {"bytes": os.path.getsize(path)}
            if found != {name: expected[name] for name in found}:
                raise ValueError(f"it is not what was written: {found}")
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path!r} is missing or damaged ({error}): run `score-sde encode-latents` again with the same options, it "
            f"writes what is not whole"
        ) from error


def open_shard(folder, shard):
    """The tensors of a shard of latents, memory-mapped."""
    with safe_open(shard_path(folder, shard), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_latents_json(folder):
    """The facts of latents in a folder. Raises ValueError where there are none."""
    index = os.path.join(folder, "latents.json")
    if not os.path.isfile(index):
        raise ValueError(
            f"{folder!r} holds no latents.json: encode a dataset into it by `score-sde encode-latents`"
            f"{nearest_path(folder)}"
        )
    try:
        with open(index, encoding="utf-8") as file:
            facts = json.load(file)
        needed = ("rows", "shape", "shard_size", "num_shards", "num_classes", "id2label", "vae", "vae_fingerprint")
        missing = [key for key in needed if key not in facts]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index!r} is damaged ({error}): encode the dataset anew") from error
    return facts


class LatentDataset(torch.utils.data.Dataset):
    """Moments of latents, written by `encode_latents.py`: {"mean": ..., "std": ..., "labels": ...}; with `flips` also
    those of the mirror images, "mean_flipped" and "std_flipped". Latents of several sizes lie in their order, the rows
    of each size together; `sizes` are those of their images in pixels, None for squares, and `buckets` the numbers of
    the rows of each size, None where there is one.

    What each shard holds is checked against its hash where it is first read in a process.
    """

    knows_epochs = True
    most_workers = 2  # rows are copied, no more, and each process checks the shards

    def __init__(self, folder, flips=False):
        self.facts = read_latents_json(folder)
        if flips and not self.facts.get("both_flips"):
            raise ValueError(
                f"random_flip needs the mirror images, which {folder!r} lacks: encode the dataset into another folder "
                f"by `score-sde encode-latents --both_flips`"
            )
        for shard in range(self.facts["num_shards"]):
            check_shard(folder, shard, self.facts, content=False)
        self.folder, self.flips, self.shards = folder, flips, {}
        buckets, self.sizes, self.buckets = self.facts.get("buckets"), None, None
        self.first_rows = [first for first, _, _ in shard_layout(self.facts)]
        if buckets:
            self.sizes = [(bucket["height"], bucket["width"]) for bucket in buckets]
            ends = np.cumsum([bucket["rows"] for bucket in buckets])
            self.buckets = np.split(np.arange(len(self)), ends[:-1]) if len(buckets) > 1 else None
        self.shape, self.num_classes = tuple(self.facts["shape"]), self.facts["num_classes"]
        names = self.facts["id2label"]
        self.id2label = {int(label): name for label, name in names.items()} if names else None

    def __len__(self):
        return self.facts["rows"]

    def __getitem__(self, key):
        """The item of a row, or of a key of a `GlobalBatchSampler`."""
        row = key % len(self)
        shard = bisect.bisect_right(self.first_rows, row) - 1
        row -= self.first_rows[shard]
        if shard not in self.shards:  # opened once in each process
            check_shard(self.folder, shard, self.facts)
            tensors = open_shard(self.folder, shard)
            self.shards[shard] = {name: x for name, x in tensors.items() if self.flips or not name.endswith("_flipped")}
        return {name: values[row] for name, values in self.shards[shard].items()}

    def row_facts(self):
        """As `ImageRows.row_facts`; an image that could not be decoded is a file that was skipped."""
        skipped = self.facts.get("skipped_files", 0) + len(self.facts.get("skipped_rows", ()))
        return {
            "rows": len(self),
            "class_counts": self.facts.get("class_counts"),
            "skipped_files": skipped,
        } | self.size_facts()

    def size_facts(self):
        """{"sizes": {"height x width": rows}} of the images; {} of squares."""
        buckets = self.facts.get("buckets")
        if not buckets:
            return {}
        return {"sizes": {in_words((each["height"], each["width"])): each["rows"] for each in buckets}}

    def describe(self):
        """One line that says what the rows are."""
        skipped = self.facts.get("skipped_rows", ())
        return describe(f"latents {self.folder!r}", self) + (
            f"; of {len(skipped)} that could not be decoded (rows {few(map(str, skipped))}) the next ones are taken"
            if skipped
            else ""
        )

    def fingerprint(self):
        """As `ImageRows.fingerprint`: of the shards' content."""
        names = ("rows", "shape", "shards", "statistics")
        rows = {name: self.facts.get(name) for name in names}
        rows |= {"buckets": self.facts["buckets"]} if self.buckets else {}
        return fingerprint_of(self.id2label, rows, self.facts["vae_fingerprint"])


class GlobalBatchSampler:
    """Endless batches of keys: each epoch a new permutation, each process its share of every global batch. A key is the
    number of a row plus the number of all rows for every epoch before: no two keys are the same.

    The order is a function of (seed, position in the stream of images), so it doesn't depend on the number of
    processes, and a resumed run continues exactly where it stopped.
    """

    def __init__(self, rows, batch_size, seed, rank, world_size, images_seen=0):
        self.rows, self.batch_size, self.seed, self.images_seen = rows, batch_size, seed, images_seen
        self.rank, self.world_size = rank, world_size

    def __iter__(self):
        position, epoch, order = self.images_seen, None, None
        while True:
            batch = []
            for i in range(position + self.rank * self.batch_size, position + (self.rank + 1) * self.batch_size):
                if i // self.rows != epoch:
                    epoch = i // self.rows
                    generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
                    order = torch.randperm(self.rows, generator=generator).tolist()
                batch.append(epoch * self.rows + order[i % self.rows])
            yield batch
            position += self.batch_size * self.world_size


class BucketBatchSampler:
    """Endless batches as those of `GlobalBatchSampler`, with all images of an optimizer step from one bucket.

    Each bucket has an endless row of its images, every epoch of them in a new order, which is cut into steps. An epoch
    adds each image to the row of its bucket and takes every step that is full by then, in random order; what is left,
    less than a step of each bucket, is the beginning of its next one. So every image is seen once an epoch, but that
    some are seen in a later one; a bucket smaller than a step fills one with the images of several epochs.

    The order is a function of (seed, position in the stream of images), of any number of processes, as long as a step
    has as many images.

    Args:
        buckets: the numbers of the rows of each.
        images_per_step: of all processes and micro-batches, a multiple of batch_size times world_size.
    """

    def __init__(self, buckets, images_per_step, batch_size, seed, rank, world_size, images_seen=0):
        self.buckets, self.step, self.batch_size, self.seed = buckets, images_per_step, batch_size, seed
        self.rank, self.world_size, self.images_seen = rank, world_size, images_seen
        self.rows, self.orders = sum(map(len, buckets)), {}

    def steps_of(self, epoch):
        """The steps of each bucket that an epoch takes, numbered from its first epoch on."""
        counts = [len(rows) for rows in self.buckets]
        return [range(epoch * count // self.step, (epoch + 1) * count // self.step) for count in counts]

    def plan(self, epoch):
        """The (bucket, its step) that an epoch takes, in turn: those of one bucket in the order of its row."""
        steps = [iter(each) for each in self.steps_of(epoch)]
        turns = [bucket for bucket, each in enumerate(self.steps_of(epoch)) for _ in each]
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
        return [(turns[i], next(steps[turns[i]])) for i in torch.randperm(len(turns), generator=generator).tolist()]

    def order(self, bucket, epoch):
        """The rows of a bucket in the order of an epoch."""
        if self.orders.get(bucket, (None, None))[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch, bucket))
            order = torch.randperm(len(self.buckets[bucket]), generator=generator).numpy()
            self.orders[bucket] = epoch, self.buckets[bucket][order]
        return self.orders[bucket][1]

    def keys(self, bucket, step):
        """The keys of a step of a bucket."""
        begin, end, count, keys = step * self.step, (step + 1) * self.step, len(self.buckets[bucket]), []
        for epoch in range(begin // count, -(-end // count)):
            first, last = max(begin - epoch * count, 0), end - epoch * count
            keys += (epoch * self.rows + self.order(bucket, epoch)[first:last]).tolist()
        return keys

    def __iter__(self):
        past, epoch = self.images_seen // self.step, 0
        while past >= (here := sum(map(len, self.steps_of(epoch)))):
            past, epoch = past - here, epoch + 1
        while True:
            for bucket, step in self.plan(epoch)[past:]:
                keys = self.keys(bucket, step)
                for start in range(self.rank * self.batch_size, self.step, self.world_size * self.batch_size):
                    yield keys[start : start + self.batch_size]
            past, epoch = 0, epoch + 1


class EveryEpoch(torch.utils.data.Dataset):
    """Any dataset of a map style, by the keys of a `GlobalBatchSampler`, which one that `knows_epochs` takes itself."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        return self.dataset[key % len(self.dataset)]


def training_batches(dataset, config, accelerator, progress):
    """Endless batches of this process, from where `progress` stands, of an `ImageStream` or any dataset of a map style.

    Raises ValueError for a stream that was begun with other processes, workers or batches than now, and for images of
    several sizes with another number in an optimizer step.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    workers = loading_processes(config, accelerator, dataset)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        if config.num_workers is None:  # what it was begun with on another machine
            workers = progress.get("stream", {}).get("num_workers", workers)
        layout = {"processes": world_size, "num_workers": workers, "batch_size": config.batch_size}
        if progress.setdefault("stream", layout) != layout:
            raise ValueError(f"a stream goes on only as it was begun, with {progress['stream']}; now it is {layout}")
        # a worker without a file would find nothing
        workers = min(workers, split_dataset_by_node(dataset.data, rank, world_size).num_shards)
        rounds, skip = divmod(progress["images_seen"] // (world_size * config.batch_size), max(1, workers))
        dataset.begin(rank, world_size, given=rounds * config.batch_size)
        batches = {"batch_size": config.batch_size}
    else:
        position, skip = (config.seed, rank, world_size, progress["images_seen"]), 0
        dataset = dataset if getattr(dataset, "knows_epochs", False) else EveryEpoch(dataset)
        buckets = getattr(dataset, "buckets", None)
        if buckets is None:
            sampler = GlobalBatchSampler(len(dataset), config.batch_size, *position)
        else:
            step = config.batch_size * world_size * config.gradient_accumulation_steps
            if progress.setdefault("images_per_step", step) != step:
                raise ValueError(
                    f"images of several sizes go on only in optimizer steps of {progress['images_per_step']} images, "
                    f"as they were begun, not {step}: batch_size times processes times gradient_accumulation_steps"
                )
            small = [
                f"{in_words(size)} has {len(rows):,}"
                for size, rows in zip(dataset.sizes, buckets, strict=True)
                if len(rows) < step
            ]
            if small:
                accelerator.print(
                    f"fewer images than an optimizer step, which has {step:,}, all of one size: {', '.join(small)}; "
                    f"such a step comes once in several epochs and holds each image more than once"
                )
            sampler = BucketBatchSampler(buckets, step, config.batch_size, *position)
        batches = {"batch_sampler": sampler}
    pin_memory = accelerator.device.type == "cuda"
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers, pin_memory=pin_memory, **batches)
    return itertools.islice(loader, skip, None)


def mix_seeds(*numbers):
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
