"""What every table of tiny components needs."""

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image


@dataclass
class Case:
    """What the type hints and the signature of a pipeline don't say, for all whose name (without "Pipeline") fits.

    components: {name: a function that makes it, or the thing itself}, of `__init__`.
    call: {name: a function that makes it, or the thing itself}, of `__call__`; made anew for every call, the function
        with the number of steps where it has an argument `steps`.
    without: arguments of `__call__` that are not given, although `stock_pipelines.ARGUMENTS` knows them.
    reason: why no scheduler of ours can serve the pipeline.
    auto: why predictor "auto" can not serve it as the others do.
    """

    components: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    without: tuple = ()
    reason: str | None = None
    auto: str | None = None


def seeded(make, name):
    """A component with random weights that depend on its name alone."""
    torch.manual_seed(zlib.crc32(name.encode()))
    made = make() if callable(make) and not isinstance(make, torch.nn.Module) else make
    return made.eval() if isinstance(made, torch.nn.Module) else made


def picture(size=32, seed=0):
    """A smooth random photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def mask(size=32):
    """A mask of the left half."""
    values = np.zeros((size, size), dtype=np.uint8)
    values[:, : size // 2] = 255
    return Image.fromarray(values)


def video(frames=5, size=32):
    return [picture(size, seed) for seed in range(frames)]
