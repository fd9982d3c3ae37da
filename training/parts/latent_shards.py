"""Latents that were encoded before: the shards of a folder, and the dataset of their rows."""

import bisect
import json
import os

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from score_sde.pipelines.wording import few
from score_sde.sharing.facts import SAMPLES

from .buckets import in_words
from .hashes import hash_of_file
from .labelled_rows import describe, fingerprint_of
from .sources import nearest_path


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
    those of the mirror images, "mean_flipped" and "std_flipped", and with `features` those of a vision model. Latents
    of several sizes lie in their order, the rows of each size together; `sizes` are those of their images in pixels,
    None for squares, and `buckets` the numbers of the rows of each size, None where there is one.

    What each shard holds is checked against its hash where it is first read in a process.
    """

    knows_epochs = True
    most_workers = 2  # rows are copied, no more, and each process checks the shards

    def __init__(self, folder, flips=False, features=False):
        self.facts = read_latents_json(folder)
        if flips and not self.facts.get("both_flips"):
            raise ValueError(
                f"random_flip needs the mirror images, which {folder!r} lacks: encode the dataset into another folder "
                f"by `score-sde encode-latents --both_flips`"
            )
        for shard in range(self.facts["num_shards"]):
            check_shard(folder, shard, self.facts, content=False)
        self.folder, self.shards = folder, {}
        # parts of the names of tensors that are not read
        self.left_out = ("_flipped",) * (not flips) + ("features",) * (not features)
        buckets, self.sizes, self.buckets = self.facts.get("buckets"), None, None
        self.first_rows = [first for first, _, _ in shard_layout(self.facts)]
        if buckets:
            self.sizes = [(bucket["height"], bucket["width"]) for bucket in buckets]
            self.ends = np.cumsum([bucket["rows"] for bucket in buckets])
            self.buckets = np.split(np.arange(len(self)), self.ends[:-1]) if len(buckets) > 1 else None
        self.shape, self.num_classes = tuple(self.facts["shape"]), self.facts["num_classes"]
        names = self.facts["id2label"]
        self.id2label = {int(label): name for label, name in names.items()} if names else None

    def __len__(self):
        return self.facts["rows"]

    def size_of(self, row):
        """(height, width) of the image of a row; None where all are squares."""
        return self.sizes and self.sizes[int(np.searchsorted(self.ends, row, side="right"))]

    def __getitem__(self, key):
        """The item of a row, or of a key of a `GlobalBatchSampler`."""
        row = key % len(self)
        shard = bisect.bisect_right(self.first_rows, row) - 1
        row -= self.first_rows[shard]
        if shard not in self.shards:  # opened once in each process
            check_shard(self.folder, shard, self.facts)
            tensors = open_shard(self.folder, shard)
            self.shards[shard] = {
                name: x for name, x in tensors.items() if not any(part in name for part in self.left_out)
            }
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
        what = f"{SAMPLES.get(self.facts.get('data_kind', 'image'), 'sample')}s"
        return describe(f"latents {self.folder!r}", self, what) + (
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
