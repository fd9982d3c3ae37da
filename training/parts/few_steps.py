"""Training for one to four evaluations: the options of flow maps and consistency models, what they are taught by, and
their loss."""

import json
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import ClassVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32

from score_sde.losses import FEW_STEP_METHODS, drop_conditions
from score_sde.pipelines.conditions import null_conditions, number_of_classes, sample_channels
from score_sde.pipelines.wording import few, unknown

from .config import one_of, option
from .diffusion_loss import DiffusionLoss
from .networks import network_class
from .objective_config import ObjectiveConfig
from .options import mapping
from .starting import TRAINED_ON, StartConfig, kept_classes, names_of_classes


# the method of networks that are none of these
DENOISING = "denoising"
GROUP = "few steps"


@dataclass
class FewStepConfig(ObjectiveConfig):
    method: str = option(
        DENOISING,
        f"{DENOISING}, or for one to four evaluations a flow map or consistency model: {one_of(FEW_STEP_METHODS)}.",
        GROUP,
        common=True,
    )
    method_kwargs: str = option("{}", "Numbers of the method, as YAML: {warmup: 0.1}.", GROUP)
    map_steps: int = option(2, "Steps that the pipeline takes by itself, and the sample grids.", GROUP)
    folded_guidance: float = option(
        1.0,
        "Classifier-free guidance that the map has folded in, one evaluation a step; 1 is none.",
        GROUP,
        common=True,
    )
    guidance_range: list[float] = option(
        [],
        "Lowest and highest guidance scale, between which it is drawn in training; the network is told it, and the "
        "pipeline's guidance_scale then takes one evaluation a step.",
        GROUP,
    )

    # who is learned from, a `StartingPoint`; None for the data alone
    teaching: ClassVar = None
    given: ClassVar[frozenset[str]]

    @property
    def guidance(self):
        return tuple(self.guidance_range) or self.folded_guidance

    def start_problems(self):
        """What is wrong with the weights to start from and with the method; first, for it fills in the options that
        come with them."""
        try:
            stated = mapping("scheduler_kwargs", self.scheduler_kwargs)
        except ValueError as error:
            yield str(error)
            return
        yield from list(StartConfig.problems(self)) or self.few_step_problems(stated)

    def few_step_problems(self, stated):
        """What is wrong; fills in what the method decides, once all that comes with weights is there. `stated` are the
        scheduler's arguments that were given."""
        try:
            options = mapping("network_kwargs", self.network_kwargs)
        except ValueError as error:
            yield str(error)
            return
        folded = options.pop("folded_guidance", None)
        if self.teaching is None and "network_kwargs" not in self.given and folded is not None:
            # the data don't have the guidance that the weights to start from had folded in
            self.network_kwargs = json.dumps(options)
        if self.method == DENOISING:
            unused = sorted({"method_kwargs", "map_steps", "folded_guidance", "guidance_range"} & self.given)
            if unused:
                yield f"{', '.join(unused)} need a method for few steps: {', '.join(FEW_STEP_METHODS)}"
            network_map = mapping("scheduler_kwargs", self.scheduler_kwargs).get("network_map")
            if network_map is not None:
                yield (
                    f"network_map {network_map!r}: such a network goes on by --method {one_of(FEW_STEP_METHODS)}, not "
                    f"by {DENOISING}"
                )
            return
        if self.method not in FEW_STEP_METHODS:
            yield unknown("method", self.method, (DENOISING, *FEW_STEP_METHODS))
            return
        for name in {"weighting", "weighting_kwargs", "vlb_weight"} & self.given:
            yield f"{name} is of {DENOISING}; method {self.method} has its own weights: leave it out"
        if self.time_shift is not None:
            yield f"time_shift is of {DENOISING}; method {self.method} draws times in its own way: leave it out"
        if self.lora_rank:
            yield f"lora_rank trains adapters of a denoiser; method {self.method} trains the network: leave it out"
        if self.map_steps < 1:
            yield f"map_steps {self.map_steps} must be at least 1"
        yield from self.guidance_problems()
        self.complete(FEW_STEP_METHODS[self.method], stated)
        yield from self.network_problems()

    def guidance_problems(self):
        if self.guidance_range and self.folded_guidance != 1:
            yield "folded_guidance is one scale and guidance_range many: leave one of them out"
        if self.guidance_range and not (len(self.guidance_range) == 2 and self.guidance_range[0] >= 0):
            yield f"guidance_range {self.guidance_range} must be two scales, the lowest and the highest, at least 0"
        elif self.guidance_range and not self.guidance_range[0] < self.guidance_range[1]:
            yield f"guidance_range {self.guidance_range} must rise"
        if not 0 <= self.folded_guidance < float("inf"):
            yield f"folded_guidance {self.folded_guidance} must be at least 0"

    def complete(self, kind, stated):
        """Options that the method decides, where they aren't given."""
        if "time_density" not in self.given:
            own = mapping("time_density_kwargs", self.time_density_kwargs)
            known = dict(kind.density_options) if kind.time_density == self.time_density or not own else {}
            self.time_density, self.time_density_kwargs = kind.time_density, json.dumps(known | own)
        if "sample_num_inference_steps" not in self.given:
            self.sample_num_inference_steps = self.map_steps
        if "sample_guidance_scale" not in self.given:
            self.sample_guidance_scale = sum(self.guidance_range) / 2 if self.guidance_range else self.folded_guidance
        # how a teacher is sampled says nothing of its student
        options = mapping("scheduler_kwargs", self.scheduler_kwargs)
        options = {name: value for name, value in options.items() if name in TRAINED_ON or name in stated}
        self.scheduler_kwargs = json.dumps(options)
        told = {"two_times": True} if kind.told else {}
        told |= {"guidance_embeds": True} if self.guidance_range else {}
        told |= {"folded_guidance": self.folded_guidance} if self.folded_guidance != 1 else {}
        self.network_kwargs = json.dumps(mapping("network_kwargs", self.network_kwargs) | told)

    def network_problems(self):
        try:
            _, found = network_class(self.network)
        except ValueError as error:
            yield str(error)
            return
        taken, options = signature(found).parameters, mapping("network_kwargs", self.network_kwargs)
        what = {
            "two_times": f"be told the second time of method {self.method}: choose consistency, ect or scm, or another "
            f"network",
            "guidance_embeds": "be told a guidance scale (guidance_range): fold one in, or choose another network",
            "folded_guidance": "say in its config which guidance it has folded in: leave folded_guidance out",
        }
        for name in what:
            # a scale of 0 is one, too
            asked = options.get(name) is not None and options[name] is not False
            if asked and name not in taken:
                yield f"network {self.network!r}: a {found.__name__} cannot {what[name]}"

    def teacher_problems(self):
        """What a teacher cannot teach."""
        network, scheduler = self.teaching.network.config, self.teaching.scheduler
        network_map = scheduler and scheduler.config.get("network_map")
        if network_map == "consistency":
            yield "it is a consistency model, which has no ODE to follow: take its teacher"
        guided = self.guidance != 1.0
        if network.get("guidance_embeds"):
            yield "it is guidance-distilled, told a scale: take the model that it was distilled from"
        elif network.get("folded_guidance") is not None and guided:
            yield (
                f"it has guidance {network['folded_guidance']} folded in: leave folded_guidance and guidance_range "
                f"out, or take the model that it was distilled from"
            )
        elif network.get("folded_guidance") is not None and self.method == "ect":
            yield (
                f"it has guidance {network['folded_guidance']} folded in, and method ect follows the data, which have "
                f"none: choose {one_of([name for name in FEW_STEP_METHODS if name != 'ect'])}"
            )

    def make_scheduler(self, shape=None):
        if self.method == DENOISING:
            return super().make_scheduler(shape)
        return super().make_scheduler(network_map=FEW_STEP_METHODS[self.method].network_map, map_steps=self.map_steps)

    def make_objective(self, scheduler, teacher=None, null_of=None):
        if self.method == DENOISING:
            return super().make_objective(scheduler)
        return FEW_STEP_METHODS[self.method](
            scheduler,
            teacher,
            null_of,
            self.guidance,
            self.time_density,
            mapping("time_density_kwargs", self.time_density_kwargs),
            mapping("method_kwargs", self.method_kwargs),
        )

    def few_step_facts(self):
        """What a card says of it; {} of a denoiser."""
        if self.method == DENOISING:
            return {}
        teacher = self.teaching and (self.teaching.name or self.teaching.source)
        guidance = list(self.guidance_range) or (self.folded_guidance if self.folded_guidance != 1 else None)
        facts = {"method": self.method, "teacher": teacher, "map_steps": self.map_steps, "guidance": guidance}
        return {"few_step": facts}


def check_taught(teaching, id2label, shape):
    """Raise ValueError for data that a teacher doesn't know: `id2label` {label: name} of classes, None where they are
    not told; `shape` (channels, *size) of samples."""
    config = teaching.network.config
    size = config.get("sample_size")
    size = (size,) * len(shape[1:]) if isinstance(size, int) else tuple(size or shape[1:])
    theirs = (sample_channels(config), *size)
    if theirs != tuple(shape):
        raise ValueError(
            f"the teacher's samples are of shape {theirs}, those of the data of {tuple(shape)}: leave resolution and "
            f"image_channels out, or encode latents of its size"
        )
    count = number_of_classes(config)
    if id2label is None:
        if count is not None and config.get("class_dropout_prob", 0) == 0:
            raise ValueError("the teacher always needs a class, and the data have none")
        return
    if count is None:
        raise ValueError(
            f"the teacher knows no classes, and the data have {few(id2label.values())}: pass --class_conditional false"
        )
    known = kept_classes(names_of_classes(count, teaching.id2label), id2label)
    if missing := [name for label, name in id2label.items() if label not in known]:
        names = names_of_classes(count, teaching.id2label).values()
        raise ValueError(f"the teacher doesn't know the classes {few(missing)}; it knows {few(names)}")


def check_guides(objective, conditions, null_of):
    """Raise ValueError for guidance where nothing is known of samples without `conditions`, names."""
    # of whatever shape: it is the names that are asked for
    seen = {name: torch.zeros(1, 1, 1, 1) for name in conditions}
    if objective.is_guided and not null_of(seen):
        raise ValueError(
            f"folded_guidance or guidance_range {objective.guidance} needs "
            + ("a teacher" if objective.teacher else "a network")
            + " that was trained without its conditions, too (class_dropout_prob above 0), on data that have some: "
            "leave it out"
        )


def as_teacher(network, accelerator):
    """A network as a function without gradients, in the precision of the training, on its device."""
    network = network.to(accelerator.device).eval().requires_grad_(False)
    return convert_outputs_to_fp32(accelerator.autocast()(network.forward))


class FewStepLoss(DiffusionLoss):
    """The loss of a flow map or consistency model; its objective is a `FewStepObjective`."""

    def __call__(self, network, batch, draws, dropout_prob=0.0, progress=1.0):
        """As `DiffusionLoss.__call__`; `progress` is the share of the training that is done."""
        batch = self.data.mirrored(batch, draws)
        x0 = self.data.draw(batch, draws)
        drawn = self.objective.draw(draws.stratified(), draws.uniform(), draws.uniform(), progress)
        draws.times, dropped = drawn.t, None
        noise, conditions = draws.normal(x0.shape[1:]), self.conditions_of(batch, draws)
        if dropout_prob > 0:
            dropped = draws.chance(dropout_prob)
            conditions = drop_conditions(conditions, partial(null_conditions, self.model), dropped)
        before = self.objective.derivative
        losses = self.objective(network, x0, noise, drawn, conditions, dropped, progress)
        if self.objective.derivative != before:
            if self.objective.derivative == "finite_difference" and AcceleratorState().mixed_precision != "no":
                raise ValueError(
                    "step 0 of method_kwargs: this network has no torch.func.jvp, and the difference that stands for "
                    "it needs float32: leave step out, or pass --mixed_precision no"
                )
            PartialState().print(f"derivatives along the ODE: {self.objective.derivative}")
        return losses
