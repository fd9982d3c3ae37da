"""Images and latents for training: any dataset that `datasets` reads, checked before training starts."""

import glob
import itertools
import json
import os
from importlib.resources import files

import numpy as np
import torch
from datasets import ClassLabel, load_dataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from PIL import Image
from safetensors import SafetensorError, safe_open

from score_sde.pipelines.bundling import check_token, shown


EMBEDDED = {"fashion_mnist_10k": "data/fashion_mnist"}
FILES = {".parquet": "parquet", ".tar": "webdataset"}


def on_hub(name):
    """Whether a dataset of this name is read from the Hub."""
    return not (name in EMBEDDED or os.path.splitext(name)[1] in FILES or os.path.isdir(name))


def open_split(name, split, streaming=False):
    """A split of a dataset: embedded in the package, local files or a folder of them, or on the Hub.

    Raises ValueError naming the dataset, the split and what there is.
    """
    if on_hub(name):
        check_token()
    if name in EMBEDDED:
        name = str(files("score_sde") / EMBEDDED[name] / "{split}.parquet")
    try:
        kind = FILES.get(os.path.splitext(name)[1])
        if kind and not os.path.isdir(name):
            path = name.replace("{split}", split)
            if not glob.has_magic(path) and not os.path.isfile(path):
                raise ValueError(f"the file {path!r} does not exist")
            data = load_dataset(kind, data_files={split: path}, split=split, streaming=streaming)
        else:
            data = load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # every reader and the Hub client raise their own
        raise ValueError(
            f"dataset {name!r}, split {split!r}, cannot be opened: {shown(error, 1000)}. Give one of "
            f"{', '.join(EMBEDDED)}, parquet or tar files, a folder of them or of images, or the id of a dataset on "
            f"the Hub that can be reached"
        ) from None
    if not streaming and len(data) == 0:
        raise ValueError(f"split {split!r} of dataset {name!r} is empty")
    return data


def field(values, column):
    """What a mapping holds for a column: "json.label" is the field label of the column json. Raises LookupError or
    TypeError where there is none."""
    for name in [column] if column in values else column.split("."):
        values = values[name]
    return values


class ImageRows:
    """Rows of a split, as {"images": (channels, resolution, resolution) in [-1, 1], "labels": class number}.

    Attributes: `shape` of an image; `num_classes` and `id2label`, None without labels.
    """

    def __init__(self, config, split, crop_seed, streaming):
        self.name, self.split, self.crop_seed = config.dataset, split or config.split, crop_seed
        self.data = open_split(self.name, self.split, streaming)
        self.image_column, self.label_column = config.image_column, config.label_column
        for kind, column in (("image", self.image_column), ("label", self.label_column)):
            try:
                _ = column and field(self.data.features, column)
            except (LookupError, TypeError):
                raise ValueError(
                    f"dataset {self.name!r} has no column {column!r}; it has {', '.join(self.data.column_names)}: "
                    f"name its {kind} column by --{kind}_column"
                    + (", or pass --label_column none" if kind == "label" else "")
                ) from None
        self.skip_corrupt_images = config.skip_corrupt_images
        self.resolution, self.mode = config.resolution, "L" if config.image_channels == 1 else "RGB"
        self.shape = (config.image_channels, config.resolution, config.resolution)
        self.num_classes = self.id2label = None
        if self.label_column is not None:
            feature = field(self.data.features, self.label_column)
            known = len(feature.names) if isinstance(feature, ClassLabel) else None
            if known and config.num_classes not in (None, known):
                raise ValueError(f"num_classes {config.num_classes}: dataset {self.name!r} has {known} classes")
            self.num_classes = known or config.num_classes
            self.check_labels()
            names = feature.names if known else map(str, range(self.num_classes))
            self.id2label = dict(enumerate(names))
        self.data, self.decoder = self.data.cast_column(self.image_column, ImageFeature(decode=False)), ImageFeature()

    def is_label(self, label):
        return isinstance(label, int) and label >= 0 and (self.num_classes is None or label < self.num_classes)

    def decode(self, row):
        """The PIL image of a row."""
        image = self.decoder.decode_example(row[self.image_column])
        return image if image.mode == self.mode else image.convert(self.mode)

    def item(self, image, row, key):
        """An image and its row as they are trained on. A random crop is a function of the seed and `key`, integers."""
        image = resize_and_crop(image, self.resolution, None if self.crop_seed is None else (self.crop_seed, *key))
        pixels = torch.from_numpy(np.array(image)).reshape(*self.shape[1:], -1).permute(2, 0, 1).contiguous()
        item = {"images": pixels.float().div_(127.5).sub_(1)}
        if self.label_column is not None:
            item["labels"] = field(row, self.label_column)
        return item

    def problem(self, where, row, error):
        """What to say of a row that cannot be decoded."""
        paths = [(row[self.image_column] or {}).get("path"), row.get("__url__")]
        found = ", ".join(path for path in paths if path)
        return (
            f"{where} of dataset {self.name!r}, split {self.split!r}: the image in column {self.image_column!r}"
            + (f" ({found})" if found else "")
            + f" cannot be decoded: {error}"
        )


class ImageDataset(ImageRows, torch.utils.data.Dataset):
    """Images by the numbers of their rows. `crop_seed` asks for random crops, of another place in every epoch."""

    knows_epochs = True

    def __init__(self, config, split=None, crop_seed=None):
        super().__init__(config, split, crop_seed, streaming=False)
        self.corrupt = set()

    def check_labels(self):
        top = self.label_column if self.label_column in self.data.features else self.label_column.split(".")[0]
        labels = self.data.select_columns([top]).flatten().unique(self.label_column)
        if not all(self.is_label(label) for label in labels):
            raise ValueError(
                f"label column {self.label_column!r} must hold integers from 0"
                + (f" to {self.num_classes - 1}" if self.num_classes else "")
                + f"; it has {[label for label in labels if not self.is_label(label)][:5]}"
            )
        self.num_classes = self.num_classes or max(labels) + 1

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        if row >= len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.__getitems__([row])[0]

    def __getitems__(self, keys):
        """Items for the keys of a `GlobalBatchSampler`."""
        epochs, numbers = zip(*(divmod(key, len(self)) for key in keys), strict=True)
        columns = self.data[list(numbers)]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        decoded = [self.decode_or_next(*each) for each in zip(numbers, rows, strict=True)]
        return [self.item(*each, key) for each, key in zip(decoded, zip(epochs, numbers, strict=True), strict=True)]

    def decode_or_next(self, number, row):
        """The image and the row of this number, or of the next that can be decoded."""
        try:
            return self.decode(row), row
        except Exception as error:  # whatever the decoder raises
            problem = self.problem(f"row {number}", row, error)
            if not self.skip_corrupt_images:
                raise ValueError(f"{problem}. Repair it, or pass --skip_corrupt_images") from error
            following = (number + 1) % len(self)
            if number not in self.corrupt:
                self.corrupt.add(number)
                if len(self.corrupt) == len(self):
                    raise ValueError(f"{problem}, and no other row of it can") from error
                print(f"{problem}: row {following} is taken instead")
            return self.decode_or_next(following, self.data[following])


class ImageStream(ImageRows, torch.utils.data.IterableDataset):
    """Images as they come, endlessly: each process, and each of its workers, reads its own part of the files, shuffled
    by a buffer.

    The order is a function of the seed, the number of processes and the number of workers. `begin` says which part
    this process reads and where.
    """

    def __init__(self, config, crop_seed=None):
        super().__init__(config, None, crop_seed, streaming=True)
        self.seed, self.shuffle_buffer = config.seed, config.shuffle_buffer
        self.begin(rank=0, world_size=1, given=0)

    def check_labels(self):
        if self.num_classes is None:
            raise ValueError(
                f"the stream of dataset {self.name!r} doesn't say how many classes its column {self.label_column!r} "
                f"has: pass --num_classes, or --label_column none"
            )

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
                    image = self.decode(row)
                except Exception as error:  # whatever the decoder raises
                    problem = self.problem(where, row, error)
                    if not self.skip_corrupt_images:
                        raise ValueError(f"{problem}. Repair it, or pass --skip_corrupt_images") from error
                    print(f"{problem}: the next row is taken instead")
                    corrupt += 1
                    continue
                item = self.item(image, row, (self.rank, worker, position))
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


def resize_and_crop(image, resolution, seed=None):
    """Resize the shorter side of a PIL image to `resolution` (Lanczos), then crop the centre square, or a random one
    where a seed is given (integers)."""
    scale = resolution / min(image.size)
    if scale != 1:
        image = image.resize([max(resolution, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    spare = [side - resolution for side in image.size]
    if not any(spare):
        return image
    if seed is None:
        left, top = [number // 2 for number in spare]
    else:
        left, top = np.random.default_rng(seed).integers(0, spare, endpoint=True).tolist()
    return image.crop((left, top, left + resolution, top + resolution))


def shard_path(folder, shard):
    return os.path.join(folder, f"moments-{shard:05d}.safetensors")


def open_shard(folder, shard, facts):
    """The tensors of a shard of latents, memory-mapped; `facts` are those of latents.json. Raises ValueError naming a
    file that is missing, damaged or of other latents."""
    path, rows = shard_path(folder, shard), min(facts["shard_size"], facts["rows"] - shard * facts["shard_size"])
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if tensors["mean"].shape != (rows, *facts["shape"]):
            raise ValueError(f"it holds {tuple(tensors['mean'].shape)}, not {(rows, *facts['shape'])}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path!r} is missing or damaged ({error}): run training/encode_latents.py again with the same options, it "
            f"writes what is not whole"
        ) from error
    return tensors


class LatentDataset(torch.utils.data.Dataset):
    """Moments of latents, written by `encode_latents.py`: {"mean": ..., "std": ..., "labels": ...}; with `flips` also
    those of the mirror images, "mean_flipped" and "std_flipped"."""

    knows_epochs = True

    def __init__(self, folder, flips=False):
        index = os.path.join(folder, "latents.json")
        if not os.path.isfile(index):
            raise ValueError(
                f"{folder!r} holds no latents.json: encode a dataset into it by training/encode_latents.py"
            )
        with open(index, encoding="utf-8") as file:
            self.facts = json.load(file)
        if flips and not self.facts.get("both_flips"):
            raise ValueError(
                f"random_flip needs the mirror images, which {folder!r} lacks: encode the dataset into another folder "
                f"by training/encode_latents.py --both_flips"
            )
        for shard in range(self.facts["num_shards"]):
            open_shard(folder, shard, self.facts)
        self.folder, self.flips, self.shards = folder, flips, {}
        self.shape, self.num_classes = tuple(self.facts["shape"]), self.facts["num_classes"]
        names = self.facts["id2label"]
        self.id2label = {int(label): name for label, name in names.items()} if names else None

    def __len__(self):
        return self.facts["rows"]

    def __getitem__(self, key):
        """The item of a row, or of a key of a `GlobalBatchSampler`."""
        shard, row = divmod(key % len(self), self.facts["shard_size"])
        if shard not in self.shards:  # opened once in each process
            tensors = open_shard(self.folder, shard, self.facts)
            self.shards[shard] = {name: x for name, x in tensors.items() if self.flips or not name.endswith("_flipped")}
        return {name: values[row] for name, values in self.shards[shard].items()}


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

    Raises ValueError for a stream that was begun with other processes, workers or batches than now.
    """
    rank, world_size, workers = accelerator.process_index, accelerator.num_processes, config.num_workers
    if isinstance(dataset, torch.utils.data.IterableDataset):
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
        batches = {"batch_sampler": GlobalBatchSampler(len(dataset), config.batch_size, *position)}
    pin_memory = accelerator.device.type == "cuda"
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers, pin_memory=pin_memory, **batches)
    return itertools.islice(loader, skip, None)


def mix_seeds(*numbers):
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
