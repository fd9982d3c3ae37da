"""Images for training, by the numbers of their rows or as a stream: any dataset that `sources` opens."""

import itertools

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from .buckets import in_words, nearest_size
from .hashes import hash_of
from .image_rows import ImageRows
from .samples import from_bytes
from .sources import as_stream
from .streams import Stream


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
        """(height, width) that the image of a row has here; None where all are squares."""
        if self.size_of_row is None:
            return self.sizes[0] if self.has_sizes else None
        return self.sizes[self.size_of_row[row]]

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


class ImageStream(ImageRows, Stream):
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
