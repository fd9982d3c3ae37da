"""Images and latents for training: any dataset that `datasets` reads, checked before training starts."""

import glob
import json
import os
from importlib.resources import files

import numpy as np
import torch
from datasets import ClassLabel, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from safetensors import safe_open


EMBEDDED = {"fashion_mnist_10k": "data/fashion_mnist"}


def on_hub(name):
    """Whether a dataset of this name is read from the Hub."""
    return not (name in EMBEDDED or name.endswith((".parquet", ".tar")) or os.path.isdir(name))


def open_split(name, split):
    """A split of a dataset: embedded in the package, a local parquet file or image folder, or on the Hub.

    Raises ValueError naming the dataset, the split and what there is.
    """
    if name in EMBEDDED:
        name = str(files("score_sde") / EMBEDDED[name] / "{split}.parquet")
    try:
        if name.endswith(".parquet"):
            path = name.replace("{split}", split)
            if not os.path.isfile(path):
                raise ValueError(f"the file {path!r} does not exist")
            data = load_dataset("parquet", data_files={split: path}, split=split)
        elif os.path.isdir(name):
            data = load_dataset("imagefolder", data_dir=name, split=split)
        else:
            data = load_dataset(name, split=split)
    except Exception as error:  # every reader and the Hub client raise their own
        raise ValueError(
            f"dataset {name!r}, split {split!r}, cannot be opened: {error}. Give one of {', '.join(EMBEDDED)}, a "
            f"parquet file, a folder of images, or the id of a dataset on the Hub that this machine can reach"
        ) from error
    if len(data) == 0:
        raise ValueError(f"split {split!r} of dataset {name!r} is empty")
    return data


class ImageDataset(torch.utils.data.Dataset):
    """Images (channels, resolution, resolution) in [-1, 1] and their labels, as {"images": ..., "labels": ...}.

    Attributes: `num_classes` and `id2label`, None without labels.
    """

    def __init__(self, config, split=None):
        self.name, self.split = config.dataset, split or config.split
        self.data = open_split(self.name, self.split)
        for kind, column in (("image", config.image_column), ("label", config.label_column)):
            if column is not None and column not in self.data.column_names:
                raise ValueError(
                    f"dataset {self.name!r} has no column {column!r}; it has {', '.join(self.data.column_names)}: "
                    f"name its {kind} column by --{kind}_column"
                    + (", or pass --label_column none" if kind == "label" else "")
                )
        if not isinstance(self.data.features[config.image_column], ImageFeature):
            self.data = self.data.cast_column(config.image_column, ImageFeature())
        self.image_column, self.label_column = config.image_column, config.label_column
        self.skip_corrupt_images, self.corrupt = config.skip_corrupt_images, set()
        self.resolution, self.mode = config.resolution, "L" if config.image_channels == 1 else "RGB"
        self.shape = (config.image_channels, config.resolution, config.resolution)
        self.num_classes = self.id2label = None
        if self.label_column is not None:
            feature = self.data.features[self.label_column]
            labels = self.data.unique(self.label_column)
            if not all(isinstance(label, int) and label >= 0 for label in labels):
                raise ValueError(f"label column {self.label_column!r} must hold integers from 0; it has {labels[:5]}")
            known = isinstance(feature, ClassLabel)
            names = feature.names if known else [str(label) for label in range(max(labels) + 1)]
            self.num_classes, self.id2label = len(names), dict(enumerate(names))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        try:
            row = self.data[index]
            image = row[self.image_column].convert(self.mode)
        except Exception as error:  # whatever the decoder raises
            problem = (
                f"row {index} of dataset {self.name!r}, split {self.split!r}: the image in column "
                f"{self.image_column!r} cannot be decoded: {error}"
            )
            if not self.skip_corrupt_images:
                raise ValueError(f"{problem}. Repair it, or pass --skip_corrupt_images") from error
            if index not in self.corrupt:
                self.corrupt.add(index)
                if len(self.corrupt) == len(self):
                    raise ValueError(f"{problem}, and no other row of it can") from error
                print(f"{problem}: row {(index + 1) % len(self)} is taken instead")
            return self[(index + 1) % len(self)]
        pixels = torch.from_numpy(np.asarray(resize_and_crop(image, self.resolution), dtype=np.float32))
        item = {"images": pixels.reshape(*self.shape[1:], -1).permute(2, 0, 1) / 127.5 - 1}
        if self.label_column is not None:
            item["labels"] = row[self.label_column]
        return item


def resize_and_crop(image, resolution):
    """Resize the shorter side of a PIL image to `resolution` (Lanczos), then crop the centre square."""
    scale = resolution / min(image.size)
    if scale != 1:
        image = image.resize([max(resolution, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    left, top = [(side - resolution) // 2 for side in image.size]
    return image.crop((left, top, left + resolution, top + resolution))


class LatentDataset(torch.utils.data.Dataset):
    """Moments of latents, written by `encode_latents.py`: {"mean": ..., "std": ..., "labels": ...}."""

    def __init__(self, folder):
        index = os.path.join(folder, "latents.json")
        if not os.path.isfile(index):
            raise ValueError(
                f"{folder!r} holds no latents.json: encode a dataset into it by training/encode_latents.py"
            )
        with open(index, encoding="utf-8") as file:
            self.facts = json.load(file)
        found = sorted(glob.glob(os.path.join(folder, "moments-*.safetensors")))
        if len(found) != self.facts["num_shards"]:
            raise ValueError(
                f"{folder!r} holds {len(found)} of {self.facts['num_shards']} shards: run training/encode_latents.py "
                f"again, it goes on where it stopped"
            )
        self.shards, self.open_shards = found, {}
        self.shape, self.num_classes = tuple(self.facts["shape"]), self.facts["num_classes"]
        names = self.facts["id2label"]
        self.id2label = {int(label): name for label, name in names.items()} if names else None

    def __len__(self):
        return self.facts["rows"]

    def __getitem__(self, index):
        shard, row = divmod(index, self.facts["shard_size"])
        if shard not in self.open_shards:  # opened once in each process, memory-mapped
            file = safe_open(self.shards[shard], framework="pt")
            self.open_shards[shard] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        tensors = self.open_shards[shard]
        return {
            name: values[row] if name != "labels" else int(values[row : row + 1]) for name, values in tensors.items()
        }


class GlobalBatchSampler:
    """Endless batches of row numbers: each epoch a new permutation, each process its share of every global batch.

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
                batch.append(order[i % self.rows])
            yield batch
            position += self.batch_size * self.world_size


def mix_seeds(*numbers):
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
