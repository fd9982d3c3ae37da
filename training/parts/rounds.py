"""Work on numbered images, by batch, shared by all processes."""

import torch
from tqdm.auto import tqdm

from score_sde.schedulers.paths import moved

from .cores import loading_processes
from .workers import DataLoader


def rounds(count, batch_size, accelerator):
    """The numbers 0 to count - 1 shared by all processes, in rounds of a batch each: (the numbers of this process, how
    many the round has). Every process has as many, the last number again where there is none left for it."""
    processes = accelerator.num_processes
    number = -(-count // (batch_size * processes))
    size = -(-count // (number * processes))
    for start in range(0, count, size * processes):
        first = start + accelerator.process_index * size
        yield [min(i, count - 1) for i in range(first, first + size)], min(count - start, size * processes)


def by_size(dataset, numbers):
    """[((height, width), numbers)]: the rows of some numbers, in turn where they are fewer, by the sizes of their
    images; [(None, numbers)] where all are squares, or no images."""
    if not hasattr(dataset, "size_of"):
        return [(None, numbers)]
    found = {}
    for number in numbers:
        found.setdefault(dataset.size_of(number % len(dataset)), []).append(number)
    return list(found.items())


def rounds_by_size(groups, batch_size, accelerator):
    """(size, numbers of this process, how many the round has): the `rounds` of groups as `by_size` makes them."""
    for image_size, numbers in groups:
        for own, count in rounds(len(numbers), batch_size, accelerator):
            yield image_size, [numbers[i] for i in own], count


def gathered(rows, count, accelerator):
    """The rows of a round of all processes in the order of their numbers, (count, ...), on the CPU."""
    return accelerator.gather(rows.contiguous().to(accelerator.device))[:count].cpu()


def real_batches(data, count, config, accelerator, what=None):
    """(numbers of the rows, batch, size of the round) of the first images of a dataset, those of each height and width
    together, with a progress bar where it has a name."""
    parts = list(rounds_by_size(by_size(data, range(count)), config.batch_size, accelerator))
    workers = loading_processes(config, accelerator, data)
    loader = DataLoader(data, workers, accelerator, batch_sampler=[own for _, own, _ in parts])
    bar = tqdm(loader, desc=what, unit="batch", disable=what is None or not accelerator.is_main_process)
    for (_, own, size), batch in zip(parts, bar, strict=True):
        yield own, {name: moved(values, accelerator.device) for name, values in batch.items()}, size


class FeatureTable:
    """The features of images, and the logits of a network that classifies, as they come in; in the main process."""

    def __init__(self, network, accelerator):
        self.network, self.accelerator, self.parts = network, accelerator, []

    @torch.no_grad()
    def add(self, images, count):
        """Take in a round of images (B, C, H, W), of every process a part."""
        found = [gathered(each, count, self.accelerator) for each in self.network(images) if each is not None]
        if self.accelerator.is_main_process:
            self.parts.append(found)

    def columns(self):
        """(features (N, D), logits or None), float32."""
        columns = [torch.cat(each) for each in zip(*self.parts, strict=True)]
        return columns[0], columns[1] if len(columns) > 1 else None
