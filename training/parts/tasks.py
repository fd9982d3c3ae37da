"""What the training loop is told of what it trains, and what a task is told of the training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .averages import Averages


@dataclass
class TrainingState:
    """Where a run stands, for the methods of its task.

    Attributes:
        model: the network to call in the loss.
        network: the same as a bare module, for its config and parameters.
        modules: {name: module} as the task named them in `modules_to_save`, to call in the loss: of several processes
            wrapped, so that their gradients are shared. The task's own are the bare ones.
        averages: the averages of the network's weights; `averages.teacher` is a network that has them.
        progress: {"step": optimizer steps that are done, "images_seen": images up to now, "seconds": ..., and of a run
            that was resumed "share": the `share_done` by then, ...}.
    """

    model: Callable
    network: torch.nn.Module
    modules: dict[str, torch.nn.Module]
    averages: Averages
    progress: dict[str, Any]


def share_done(progress, max_train_steps, max_train_seconds=None):
    """The share of a run that is done, in [0, 1], by a `TrainingState.progress` and where the run is to end: what a
    schedule of stages hangs on. It is never less than it was where the end has moved since."""
    share = max(progress.get("share", 0.0), progress["step"] / max_train_steps)
    return min(1.0, max(share, progress["seconds"] / max_train_seconds) if max_train_seconds else share)


def is_over(progress, config):
    """Whether a run is at its end, by a `TrainingState.progress` and the options that say where that is."""
    out_of_time = config.max_train_seconds and progress["seconds"] >= config.max_train_seconds
    return progress["step"] >= config.max_train_steps or bool(out_of_time)


class Task:
    """What `fit` trains: a network, on which rows, by which loss, and what is done on the way. A subclass states
    `compute_loss`; what else it leaves out does nothing.

    Args:
        model: the network. Its averaged weights are sampled, evaluated and published.
        dataset: of a map style, whose items are dicts of tensors, or an `ImageStream`.
        data_fingerprint: what tells the data from others, JSON-able; a checkpoint of other data is refused.
        origin: what is known of the weights that the network was started from, JSON-able, None without; checkpoints
            carry it.
    """

    # optimizer steps between calls of `evaluate`, the last of which is at the end, and `push`, 0 for none; those of
    # `sample` are config.sample_steps
    evaluation_steps = push_steps = 0
    # what trackers call what `sample` writes, the suffix of its file, a PNG or a text, and what the data are
    pictures = "samples"
    samples_suffix = ".png"
    unit = "images"

    def __init__(self, model, dataset, data_fingerprint=None, origin=None):
        self.model, self.dataset, self.data_fingerprint, self.origin = model, dataset, data_fingerprint, origin

    def modules_to_save(self):
        """{name: module} beside the network: a discriminator, the head of a learned weighting. Their parameters are
        further ones of the network's optimizer; checkpoints hold them, and a resumed run puts them back. They are not
        averaged."""
        return {}

    def compute_loss(self, state, batch, draws):
        """(scalar loss, details to log beside it) of a micro-batch on the device; `draws` are its random numbers.

        Details are {name: value}, a value a scalar tensor, a tensor (sum, count) whose mean is logged, or a tuple
        (values (B,), which of them the logged mean is of, bool (B,) on the CPU)."""
        raise NotImplementedError

    def after_step(self, state):
        """Called after each optimizer step, when the averages have taken it in. A step that was not finite has changed
        nothing."""

    def sample(self, network, path):
        """Write a picture, or a text, of what the network with the averaged weights does, with the suffix
        `samples_suffix`; called in the main process."""

    def evaluate(self, network):
        """{name: value} of the network with the averaged weights, logged and added to evaluation.jsonl; called in every
        process."""
        return {}

    def push(self, network, facts):
        """Publish the network with the averaged weights, with the facts of the run so far; called in the main
        process."""


def loss_by_time(losses, t, scheduler, parts=4):
    """{name: (losses, which of them count)} of the losses in equal parts of the time; t on the CPU. Their mean is
    worked out where it is logged: nothing is to do for the device."""
    part = ((t - scheduler.t_min) / (scheduler.t_max - scheduler.t_min) * parts).long().clamp(0, parts - 1)
    return {f"loss_in_quarter_{i + 1}": (losses, part == i) for i in range(parts)}
