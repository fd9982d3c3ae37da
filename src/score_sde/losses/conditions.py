"""Conditions: what a network is told beside the noisy sample, {keyword of its forward: tensor with a batch axis}."""

import torch

from ..schedulers.paths import expand_to


def drop_conditions(conditions, null_conditions, dropped):
    """The conditions of a batch, those of some samples replaced by what stands for "none": the network learns what it
    returns without them, too, as classifier-free guidance needs it (Ho & Salimans 2022, Algorithm 1).

    Args:
        conditions: {name: (B, ...)}.
        null_conditions: the network's own, f(conditions) -> {name: what stands for "none", of the same shape}; a
            condition that it doesn't name has none, and stays.
        dropped: (B,) bool.
    """
    null = null_conditions(conditions)
    return conditions | {
        name: torch.where(expand_to(dropped, values).bool(), null[name], values)
        for name, values in conditions.items()
        if name in null
    }
