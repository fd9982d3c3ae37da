"""How much of a device's arithmetic training uses: operations per sample, and the speed that the device reaches."""

import copy
import math
import time

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode


class FlopCounter:
    """Counts the operations of a network's forward and backward pass for one sample, at the first call; multiply and
    add are two. Nothing is computed for it. Recomputed activations, frozen autoencoders and the optimizer don't count.
    `flops` is nan of a network that cannot be called without computing anything.
    """

    def __init__(self, network):
        # one sample has no statistics of a batch
        self.skeleton, self.flops = copy.deepcopy(network).to("meta").eval(), None

    def watching(self, model):
        """The model as a function, looked at when it is first called."""

        def call(*args, **kwargs):
            if self.flops is None:
                self.count(*tree_map(first_sample, (args, kwargs)))
            return model(*args, **kwargs)

        return call

    def count(self, args, kwargs):
        try:
            with FlopCounterMode(display=False) as counter, torch.enable_grad():
                sum(tensor.sum() for tensor in tree_leaves(self.skeleton(*args, **kwargs))).backward()
            self.flops = counter.get_total_flops()
        except Exception as error:  # whatever a network of others does
            print(f"the operations of {type(self.skeleton).__name__} cannot be counted: {error}")
            self.flops = math.nan
        self.skeleton = None


def first_sample(value):
    if not isinstance(value, torch.Tensor):
        return value
    return (value[:1] if value.ndim else value).detach().to("meta")


def measured_peak(device, dtype, rounds=5):
    """Operations per second of a large matrix product, the best of some."""
    size = 512 if device.type == "cpu" else 8192
    # random numbers: of ones a GPU, which is bound by its power, takes an eighth less time
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
