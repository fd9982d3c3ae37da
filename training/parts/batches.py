"""Endless batches of rows for training: in which order, and which of them a process takes."""

import itertools

import torch
from datasets.distributed import split_dataset_by_node

from .buckets import in_words
from .cores import loading_processes
from .seeds import mix_seeds
from .workers import DataLoader


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
    return itertools.islice(DataLoader(dataset, workers, accelerator, **batches), skip, None)
