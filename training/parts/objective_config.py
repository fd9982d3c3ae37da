"""What a diffusion model of numbers is trained by, whatever its data are: path, prediction, density of times and
weighting; and how its samples are drawn."""

import math
from dataclasses import dataclass

from score_sde import ScoreSDEScheduler
from score_sde.losses import TIME_DENSITIES, WEIGHTINGS, Objective
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES

from .config import one_of, option, sample_problems
from .options import arguments_of, mapping


# of Zheng et al. 2025: the dimension whose times are as they are
DIMENSION_UNSHIFTED = 4096


@dataclass
class ObjectiveConfig:
    sde_type: str = option("vp", f"Noise path: {one_of(SDE_TYPES)}.", "path and objective", common=True)
    prediction_type: str = option(
        "v_prediction", f"What the network predicts: {one_of(PREDICTIONS)}.", "path and objective", common=True
    )
    scheduler_kwargs: str = option(
        "{}", "More arguments of ScoreSDEScheduler, as YAML: {beta_max: 20}.", "path and objective"
    )
    time_density: str = option(
        "uniform", f"Density of the training times: {one_of(TIME_DENSITIES)}.", "path and objective"
    )
    time_density_kwargs: str = option("{}", "Its numbers, as YAML: {mean: -1.2, std: 1.2}.", "path and objective")
    time_shift: str | None = option(
        None,
        "Shift of the times, in training and, as the shift of the saved scheduler, in sampling: a positive number s, "
        "which lowers log(alpha / sigma) by log(s) (SD3: 3), or dimension, the root of a sample's dimension / 4096 "
        "(RAE). Needs sde_type linear or cosine_vp.",
        "path and objective",
    )
    weighting: str = option(
        "output",
        f"Weight of the squared error of x0: {one_of(WEIGHTINGS)}; score_sde.losses has the published combinations.",
        "path and objective",
    )
    weighting_kwargs: str = option("{}", "Its numbers, as YAML: {gamma: 5}.", "path and objective")
    vlb_weight: float = option(
        0.0,
        "Learn the variance, too, by this weight of the variational bound (DiT: 0.001); needs discrete_vp.",
        "path and objective",
    )
    sample_num_images: int = option(64, "Images in a sample grid.", "samples and logs")
    sample_guidance_scale: float = option(
        1.0, "Classifier-free guidance of the sample grids: 1 is none.", "samples and logs"
    )
    sample_num_inference_steps: int = option(50, "Time steps of the sample grids.", "samples and logs")

    def objective_problems(self):
        if not self.vlb_weight >= 0:
            yield f"vlb_weight {self.vlb_weight} must be at least 0"
        if self.vlb_weight > 0 and (self.sde_type != "discrete_vp" or self.weighting not in ("output", "simple")):
            yield f"vlb_weight {self.vlb_weight} needs sde_type discrete_vp and weighting output"
        yield from self.time_shift_problems()
        yield from sample_problems(self, "sample_num_images")

    def time_shift_problems(self):
        if self.time_shift in (None, "dimension"):
            return
        try:
            positive = 0 < float(self.time_shift) < math.inf
        except ValueError:
            positive = False
        if not positive:
            yield f"time_shift {self.time_shift!r} must be a positive number, or dimension"
            self.time_shift = None

    def shift_of(self, shape):
        """The `shift` of the scheduler for samples of this shape (channels, *size), {} without time_shift; before the
        shape is known (None), that of a dimension is 1."""
        if self.time_shift is None:
            return {}
        if "shift" in mapping("scheduler_kwargs", self.scheduler_kwargs):
            raise ValueError(
                f"shift in scheduler_kwargs is that of sampling alone, and time_shift {self.time_shift} that of "
                f"training and sampling: leave one of them out"
            )
        if self.time_shift != "dimension":
            return {"shift": float(self.time_shift)}
        return {"shift": 1.0 if shape is None else math.sqrt(math.prod(shape) / DIMENSION_UNSHIFTED)}

    def make_scheduler(self, shape=None, **more):
        """The scheduler of samples of this shape (channels, *size), where it is known."""
        learned = {"variance_type": "learned_range"} if self.vlb_weight > 0 else {}
        named = {"sde_type": self.sde_type, "prediction_type": self.prediction_type}
        options = arguments_of(ScoreSDEScheduler, "scheduler_kwargs", self.scheduler_kwargs, named)
        return ScoreSDEScheduler(**named, **learned | options | self.shift_of(shape) | more)

    def make_objective(self, scheduler):
        return Objective(
            scheduler,
            "levels" if self.vlb_weight > 0 else self.time_density,
            self.weighting,
            mapping("time_density_kwargs", self.time_density_kwargs),
            mapping("weighting_kwargs", self.weighting_kwargs),
            shift_times=self.time_shift is not None,
        )


def trained_objective(scheduler, trained, **instead):
    """The `Objective` of a configuration that a run was trained by, a mapping as in training.json; `instead` are names
    that replace its own."""
    named = {name: trained[name] for name in ("time_density", "weighting") if name in trained}
    density, weighting = (
        mapping(name, trained.get(name) or "{}") for name in ("time_density_kwargs", "weighting_kwargs")
    )
    return Objective(
        scheduler,
        **named | instead,
        density_options=density,
        weighting_options=weighting,
        shift_times=trained.get("time_shift") is not None,
    )
