"""What pipelines of every kind of data share: the state of one call, its callbacks, and class labels."""

import copy
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .conditions import label_ids, null_conditions, number_of_classes
from .protocols import Conditions, Network
from .wording import check_count, quoted


class CallMixin:
    """For subclasses of `DiffusionPipeline` with a `scheduler`, a `denoiser`, an entry id2label in their config, and
    `_callback_tensor_inputs` of which the first is the name of the samples."""

    scheduler: Any
    config: Any
    _callback_tensor_inputs: list[str]
    # of one call, on its own view: see `_for_one_call`
    _called: Any = None
    _guidance_scale: float = 1.0
    _conditions: Conditions = {}
    _timestep_to: torch.Tensor | None = None
    _num_timesteps = 0
    _interrupt = False

    @property
    def denoiser(self) -> Network:
        """The network."""
        raise NotImplementedError

    def _for_one_call(self):
        """This pipeline as one call sees it: the same networks, with a scheduler and a state of its own, so that calls
        in several threads don't disturb each other."""
        if self._called is not None:
            return self
        call = copy.copy(self)
        call._called, call.scheduler, call._num_timesteps = self, copy.deepcopy(self.scheduler), 0
        return call

    def _end_call(self):
        """Let the pipeline itself know what its properties for callbacks were in the end, as diffusers' own do."""
        if self._called is not None:
            self._called._guidance_scale, self._called._num_timesteps = self._guidance_scale, self._num_timesteps

    @property
    def guidance_scale(self):
        """For callbacks: of the call, and after it of the last one. They may set `_guidance_scale` for the evaluations
        that follow."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        """For callbacks: whether guidance_scale is other than 1."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self):
        """For callbacks: number of network evaluations of the call, and after it of the last one."""
        return self._num_timesteps

    @property
    def interrupt(self):
        """Whether the call shall end before its next network evaluation: a callback sets `_interrupt` of the pipeline
        that it is given, for that call, anyone that of the pipeline itself, for all of its calls, until the next."""
        return self._interrupt or (self._called is not None and self._called._interrupt)

    def call_back(self, callback, names, step, timestep, latents):
        """Call callback_on_step_end with the tensors of these names. What it returns holds from then on: conditions on
        this call, the samples (`latents`, under the first name of `_callback_tensor_inputs`) are returned. Raises
        ValueError where it returns anything else."""
        # diffusers' callbacks call the condition so, whatever it is
        first = next(iter(self._conditions), None)
        samples = self._callback_tensor_inputs[0]
        values = {samples: latents, **self._conditions}
        given = {name: values[first if name == "prompt_embeds" else name] for name in names}
        returned = callback(self, step, timestep, given)
        returned = {} if returned is None else returned
        if not isinstance(returned, dict):
            raise ValueError(
                f"callback_on_step_end returned a {type(returned).__name__}: return a dict of the tensors that it "
                f"changed, such as {{'{samples}': ...}}, or None"
            )
        for name, value in returned.items():
            name = first if name == "prompt_embeds" else name
            if name not in values:
                raise ValueError(
                    f"callback_on_step_end returned {name!r}, which is none of {', '.join(values)}, which it may change"
                )
            values[name] = value
        latents, self._conditions = values.pop(samples), values
        return latents

    def check_call(self, batch_size, generator, callback_inputs, conditions):
        """Raise ValueError for arguments of every call that contradict each other, before any work."""
        check_count("batch_size", batch_size)
        for each in generator if isinstance(generator, list) else [generator]:
            if generator is not None and not isinstance(each, torch.Generator):
                raise ValueError(
                    f"generator {quoted(generator)} must be a torch.Generator, such as "
                    f"torch.Generator().manual_seed(0), or a list of one per sample"
                )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators were given for {batch_size} samples: pass one, or one per sample"
            )
        known = [*self._callback_tensor_inputs, *conditions]
        unknown = [name for name in callback_inputs if name not in known]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs {unknown} are unknown; choose from {known}")

    @staticmethod
    def callback_inputs(callback, names):
        """The tensors that a callback asks for: those of its own where it is one of diffusers' classes."""
        own = isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))
        return callback.tensor_inputs if own else names

    @property
    def num_classes(self) -> int | None:
        """Number of class labels of the network, None for an unconditional one."""
        return number_of_classes(self.denoiser.config)

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", None for a network that has none or never saw it in training."""
        null = null_conditions(self.denoiser, {"class_labels": torch.zeros(1, dtype=torch.long)})
        return int(null["class_labels"]) if "class_labels" in null else None

    def label_ids(self, class_labels, num_classes=None):
        """Class labels given as a number, a name, a tensor or array of them or a list, as a list of numbers from 0 to
        num_classes - 1, by default the network's.

        Raises ValueError for a name or number that the model doesn't know, and for what is neither.
        """
        num_classes = self.num_classes if num_classes is None else num_classes
        return label_ids(class_labels, num_classes, self.config.id2label)

    def prepare_labels(self, class_labels, batch_size=None, classifier=None):
        """Class labels as `__call__` takes them, as a list of one number per sample: by default as many samples as
        labels. None for no class.

        Raises ValueError where the network has no classes, or needs one, or for another number of labels than samples.
        """
        num_classes = self.num_classes if classifier is None else classifier.config.num_classes
        if class_labels is None:
            if self.num_classes is not None and self.null_label is None:
                raise ValueError("this network knows no null label: pass class_labels")
            return None
        if num_classes is None:
            raise ValueError("class_labels were given, but the network is unconditional (it has no class table)")
        if self.num_classes not in (None, num_classes):
            raise ValueError(f"the classifier has {num_classes} classes, the network {self.num_classes}")
        labels = self.label_ids(class_labels, num_classes)
        if batch_size is not None and len(labels) == 1:
            labels = labels * batch_size
        if batch_size not in (None, len(labels)):
            raise ValueError(f"{len(labels)} class_labels were given for {batch_size} samples")
        return labels
