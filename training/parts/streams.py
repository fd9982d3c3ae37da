"""Datasets that are read as they come, of which each process has its own part."""

import torch
from datasets.distributed import split_dataset_by_node

from .seeds import mix_seeds


class Stream(torch.utils.data.IterableDataset):
    """A dataset that is read as it comes, endlessly: each process reads its own part of the files, in another order in
    every pass, shuffled by a buffer.

    Attributes: `data`, an `IterableDataset` of datasets; `seed`; `shuffle_buffer`, a number of rows. `begin` says which
    part this process reads and where: `rank`, `world_size`, `given`.
    """

    def begin(self, rank, world_size, given):
        """Start as process `rank` after every worker of it gave so many items."""
        self.rank, self.world_size, self.given = rank, world_size, given

    def rows(self, epoch):
        """The rows of this process in a pass."""
        shuffled = self.data.shuffle(seed=mix_seeds(self.seed, epoch), buffer_size=self.shuffle_buffer)
        return split_dataset_by_node(shuffled, self.rank, self.world_size)
