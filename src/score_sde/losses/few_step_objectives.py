"""Published objectives of flow maps and consistency models by name: their times, velocities and weights, by the
formulas of `few_step`."""

import math
from typing import ClassVar, NamedTuple

import torch

from ..schedulers.checks import check_number
from ..schedulers.paths import expand_to, sent, time_grid
from .denoising import TIME_DENSITIES, check_row
from .few_step import (
    composed_loss,
    composed_velocity,
    continuous_loss,
    guided,
    heun_velocity,
    mean_velocity,
    place,
    tuning_times,
    weighted,
    working_derivative,
)


# {number of a method: (least, largest, whole)}
RANGES = {
    "first_levels": (2, 10**6, True),
    "last_levels": (2, 10**6, True),
    "stages": (1, 10**4, True),
    "q": (1, 1e6, False),
    "k": (0, 1e6, False),
    "b": (0, 1e6, False),
    "warmup": (0, 1, False),
    "step": (0, 2, False),
    "moving": (0, 1, False),
    "kappa": (0, 0.99, False),
    "power": (0, 10, False),
    "levels": (1, 50, True),
}


class Drawn(NamedTuple):
    """What is drawn for each sample of a batch, (B,) float64: times s <= middle <= t and the guidance scale, None
    without guidance."""

    t: torch.Tensor
    middle: torch.Tensor
    s: torch.Tensor
    scale: torch.Tensor | None


class FewStepObjective:
    """One of `FEW_STEP_METHODS`, for the scheduler that will sample.

    Args:
        scheduler: a `ScoreSDEScheduler`; it owns the path and what the network's output means.
        teacher: a network of the same scheduler, whose ODE is distilled; None to learn from the data alone.
        null_of: f(conditions) -> what stands for "none" of them, {name: (B, ...)}, of the teacher or, without one, of
            the network itself.
        guidance: classifier-free guidance scale of the ODE that is learned: one number, which the map then has folded
            in, or (lowest, highest), between which it is drawn, and told to the network as `guidance`.
        time_density, density_options: of `TIME_DENSITIES`; None for the method's own.
        options: the method's own numbers, {name: value}, see its `numbers`.
        derivative: where `step` is 0, a name of `DERIVATIVES`; None for the one that the network has
            (`working_derivative`).

    Raises ValueError for unknown names and numbers, numbers out of their range (`RANGES`) or without effect, and for a
    method that needs a teacher.
    """

    # what the network then is (`ScoreSDEScheduler`), and whether it is told where a map leads to
    network_map = "consistency"
    told = False
    needs_teacher = False
    time_density = "log_normal"
    density_options: ClassVar[dict[str, float]] = {"mean": -1.1, "std": 2.0}
    numbers: ClassVar[dict[str, float]] = {}
    numbers_with_teacher: ClassVar[dict[str, float]] = {}

    def __init__(
        self,
        scheduler,
        teacher=None,
        null_of=None,
        guidance=1.0,
        time_density=None,
        density_options=None,
        options=None,
        derivative=None,
    ):
        if self.needs_teacher and teacher is None:
            raise ValueError(f"{self.name} follows a teacher: distil one by `score-sde distill --teacher`")
        if guidance != 1.0 and teacher is None and not self.told:
            raise ValueError(
                f"guidance {guidance} needs the ODE's velocity without conditions: a teacher, or a method whose "
                f"network is told where the map leads to, not {self.name}"
            )
        if unknown := sorted(set(options or {}) - set(self.numbers)):
            known = ", ".join(self.numbers) or "none"
            raise ValueError(f"{self.name} has no number {', '.join(unknown)}; it has {known}")
        self.scheduler, self.teacher, self.null_of = scheduler, teacher, null_of
        self.guidance, self.derivative = guidance, derivative
        if time_density is not None:
            self.time_density, self.density_options = time_density, density_options or {}
        elif density_options:
            self.density_options = self.density_options | density_options
        check_row("time_density", self.time_density, TIME_DENSITIES, self.density_options)
        own = self.numbers | (self.numbers_with_teacher if teacher else {})
        for name, value in (own | (options or {})).items():
            check_number(f"{name} of {self.name}", value, *RANGES[name])
            setattr(self, name, value)

    @property
    def name(self):
        return next(name for name, kind in FEW_STEP_METHODS.items() if kind is type(self))

    @property
    def is_guided(self):
        return self.guidance != 1.0

    # --- what is drawn

    def draw(self, u, v, w, progress=1.0):
        """The `Drawn` of a batch for numbers u, v, w, uniform in (0, 1), (B,) float64; `progress` is the share of the
        training that is done."""
        t, middle, s = self.times(u, v, progress)
        scale = None
        if self.is_guided:
            low, high = self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)
            scale = low + (high - low) * w
        return Drawn(t, middle, s, scale)

    def times(self, u, v, progress):
        """(t, middle, s)."""
        raise NotImplementedError

    def density(self, u):
        """Times (B,) of uniform numbers, at least that of twice the noise level of t_min, from where a map to t_min is
        not nothing."""
        t = TIME_DENSITIES[self.time_density](self.scheduler, u, **self.density_options)
        path, t_min = self.scheduler.path, self.scheduler.t_min
        return t.clamp_min(float(path.t_from_half_log_snr(path.half_log_snr(t_min) - math.log(2))))

    def end(self, t):
        """t_min for each of t."""
        return torch.full_like(t, self.scheduler.t_min)

    # --- the loss

    def __call__(self, network, x0, noise, drawn, conditions=None, dropped=None, progress=1.0):
        """The loss of each sample, (B,) float32.

        Args:
            network: called as network(x, timestep, timestep_to=, guidance=, **conditions).sample, the last two where
                the method tells them.
            x0, noise: (B, C, ...). drawn: what `draw` returned.
            conditions: {keyword: (B, ...)}, with those that were dropped replaced by what stands for none.
            dropped: (B,) bool, which these are; they are learned without guidance.
            progress: the share of the training that is done.
        """
        u, conditions = place(self.scheduler, drawn.t), conditions or {}
        y, v = torch.lerp(x0, noise, expand_to(u, x0)), noise - x0
        told = conditions | self.told_guidance(drawn, y)
        return self.loss(network, y, v, drawn, conditions, told, dropped, progress)

    def told_guidance(self, drawn, y):
        """The keyword that tells the network its guidance scale, where that is drawn."""
        return {"guidance": sent(drawn.scale, y.device, torch.float32)} if isinstance(self.guidance, tuple) else {}

    def loss(self, network, y, v, drawn, conditions, told, dropped, progress):
        """The loss of samples y in straight coordinates, whose data have the velocity v; `told` are the conditions of
        the network, with its guidance."""
        raise NotImplementedError

    @torch.no_grad()
    def of_teacher(self, y, t, conditions, scale):
        """The teacher's velocity at times t, guided."""
        if scale is None:
            return mean_velocity(self.teacher, self.scheduler, y, t, None, conditions)
        null = conditions | self.null_of(conditions)
        both = {name: torch.cat([conditions[name], null[name]]) for name in conditions}
        velocity = mean_velocity(self.teacher, self.scheduler, torch.cat([y, y]), torch.cat([t, t]), None, both)
        return guided(*velocity.chunk(2), scale)

    @torch.no_grad()
    def of_data(self, network, y, v, drawn, conditions, dropped, own=0.0):
        """The velocity of the data, v, or with guidance (MeanFlow, Geng et al. 2025, Eq. 19 to 21) one whose mean is
        the guided ODE's: what it is without conditions is the teacher's or the network's own. `own` is the share of the
        network's own velocity in it, their kappa."""
        if drawn.scale is None:
            return v
        null = conditions | self.null_of(conditions)
        if self.teacher is None:
            # its scale is told to the network without conditions, too: 1, if it is told none, need not be in the range
            scale = self.told_guidance(drawn, y)
            null, conditions = null | scale, conditions | scale
        without = mean_velocity(self.teacher or network, self.scheduler, y, drawn.t, None, null)
        found = guided(v, without, drawn.scale)
        if own > 0:
            found = torch.lerp(found, mean_velocity(network, self.scheduler, y, drawn.t, None, conditions), own)
        return found if dropped is None else torch.where(expand_to(dropped, v).bool(), v, found)

    def velocity(self, network, y, v, drawn, conditions, dropped, own=0.0):
        if self.teacher is not None:
            return self.of_teacher(y, drawn.t, conditions, drawn.scale)
        return self.of_data(network, y, v, drawn, conditions, dropped, own)

    def continuous(self, network, y, v, drawn, told, **options):
        """`continuous_loss`, by a difference over the method's `step`, or, of 0, by the derivative that works."""
        arguments = network, self.scheduler, y, v, drawn.t, drawn.s, told
        if self.step:
            return continuous_loss(*arguments, told=self.told, step=self.step, **options)
        if self.derivative is None:
            end = drawn.s if self.told else None
            self.derivative = working_derivative(network, self.scheduler, y, drawn.t, end, v, told)
        return continuous_loss(*arguments, told=self.told, derivative=self.derivative, **options)

    def gap(self, drawn):
        """Difference of the noise levels sigma / alpha at t and middle (B,)."""
        t, middle = (torch.exp(-self.scheduler.path.half_log_snr(each)) for each in (drawn.t, drawn.middle))
        return t - middle


class Consistency(FewStepObjective):
    """Consistency training with pseudo-Huber errors and a growing number of levels (Song & Dhariwal 2024, Table 1);
    with a teacher consistency distillation (Song et al. 2023, Algorithm 2), whose first leg is Heun's step of its ODE,
    with the same errors, and levels that stay.

    first_levels, last_levels: noise levels at the beginning and the end, each stage twice as many, the last at most.
    """

    numbers: ClassVar[dict[str, float]] = {"first_levels": 10, "last_levels": 1280}

    numbers_with_teacher: ClassVar[dict[str, float]] = {"first_levels": 40, "last_levels": 40}

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        if self.first_levels > self.last_levels:
            raise ValueError(f"first_levels {self.first_levels} must be at most last_levels {self.last_levels}")
        self.grids = {}

    def levels(self, progress):
        """Karras' noise levels, as rising times, and at t_max of a path without signal there its own."""
        # the last stage, of last_levels, may be less than a doubling
        stages = math.ceil(math.log2(self.last_levels / self.first_levels)) + 1
        stage = min(int(progress * stages), stages - 1)
        count = int(min(self.first_levels * 2**stage, self.last_levels)) + 1
        if count not in self.grids:
            path, last = self.scheduler.path, min(self.scheduler.t_max, self.scheduler.path.t_max)
            grid = time_grid(path, "karras", count, self.scheduler.t_min, last, levels=None)
            self.grids[count] = grid.flip(0)
        return self.grids[count]

    def times(self, u, v, progress):
        grid = self.levels(progress)
        # a level is drawn with the probability of the times between it and the next one
        index = torch.searchsorted(grid, self.density(u)).clamp(1, len(grid) - 1)
        return grid[index], grid[index - 1], self.end(u)

    def loss(self, network, y, v, drawn, conditions, told, dropped, progress):
        if self.teacher is None:
            first = v
        else:

            def of_teacher(y, t):
                return self.of_teacher(y, t, conditions, drawn.scale)

            first = heun_velocity(of_teacher, self.scheduler, y, drawn.t, drawn.middle)
        losses = composed_loss(
            *(network, self.scheduler, y, *drawn[:3], first, told),
            told=False,
            error_weight="pseudo_huber",
            of_end=True,
        )
        return losses / sent(self.gap(drawn), losses.device, losses.dtype)


class EasyConsistencyTuning(FewStepObjective):
    """Easy consistency tuning (Geng et al. 2025b), from the weights of a diffusion model: the data's velocity, and
    times that close in by stages.

    stages: how many. q, k, b: see `tuning_times`.
    """

    numbers: ClassVar[dict[str, float]] = {"stages": 8, "q": 2.0, "k": 8.0, "b": 1.0}

    def times(self, u, v, progress):
        t = self.density(u)
        stage = 1 + min(int(progress * self.stages), self.stages - 1)
        return t, tuning_times(self.scheduler, t, stage, self.q, self.k, self.b), self.end(t)

    def loss(self, network, y, v, drawn, conditions, told, dropped, progress):
        first = self.of_data(network, y, v, drawn, conditions, dropped)
        losses = composed_loss(
            *(network, self.scheduler, y, *drawn[:3], first, told),
            told=False,
            error_weight="pseudo_huber",
            of_end=True,
        )
        return losses / sent(self.gap(drawn), losses.device, losses.dtype)


class ContinuousConsistency(FewStepObjective):
    """Continuous-time consistency, sCT and with a teacher sCD (Lu & Song 2025).

    warmup: share of the training in which the derivative grows to its whole. step: of the difference that stands for
        it, see `mean_velocity_and_wide_slope`; 0 for the derivative itself, as published, with networks whose embedding
        of time is smooth.
    """

    density_options: ClassVar[dict[str, float]] = {"mean": -1.0, "std": 1.4}
    numbers: ClassVar[dict[str, float]] = {"warmup": 0.1, "step": 0.5}

    def times(self, u, v, progress):
        t = self.density(u)
        return t, t, self.end(t)

    def loss(self, network, y, v, drawn, conditions, told, dropped, progress):
        v = self.velocity(network, y, v, drawn, conditions, dropped)
        warmup = min(1.0, progress / self.warmup) if self.warmup else 1.0
        return self.continuous(network, y, v, drawn, told, warmup=warmup, error_weight="normalized")


class MeanFlow(FewStepObjective):
    """MeanFlow (Geng et al. 2025), of the data with guidance folded in or of a teacher.

    moving: share of the samples whose map leads elsewhere (s < t); the others learn the velocity. kappa: share of the
        network's own velocity in a guided one (without a teacher). power: of the error by which a sample's loss is
        divided, their p. step: see `ContinuousConsistency`.
    """

    network_map, told = "flow_map", True
    # their logit-normal u is a log-normal u / (1 - u) = sigma / alpha
    density_options: ClassVar[dict[str, float]] = {"mean": -0.4, "std": 1.0}
    numbers: ClassVar[dict[str, float]] = {"moving": 0.25, "kappa": 0.0, "power": 1.0, "step": 0.5}
    numbers_with_teacher: ClassVar[dict[str, float]] = {"moving": 0.5}

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        if self.kappa and (self.teacher is not None or not self.is_guided):
            raise ValueError(
                f"kappa {self.kappa} is the share of the network's own velocity in a guided one without a teacher: "
                + ("leave it out" if self.is_guided else "give a guidance scale, or leave it out")
            )

    def times(self, u, v, progress):
        # of one number, two: whether the map leads elsewhere, and where
        t, other = self.density(u), self.density((v / self.moving).clamp(max=1 - 2**-53))
        other = torch.where(v < self.moving, other, t)
        return torch.maximum(t, other), torch.maximum(t, other), torch.minimum(t, other)

    def loss(self, network, y, v, drawn, conditions, told, dropped, progress):
        v = self.velocity(network, y, v, drawn, conditions, dropped, self.kappa)
        losses = self.continuous(network, y, v, drawn, told)
        # Eq. 22
        return losses / (losses.detach() + 1e-3) ** self.power


class FlowMap(FewStepObjective):
    """A flow map that is learned from its own halves, as shortcut models are (Frans et al. 2025); its velocity is the
    data's or a teacher's.

    moving: share of the samples whose map leads elsewhere, by 1, 1/2, 1/4, ... of the way in u, and is the composition
        of two of half as much; the others learn the velocity. levels: how many such lengths.
    """

    network_map, told = "flow_map", True
    time_density, density_options = "uniform", {}
    numbers: ClassVar[dict[str, float]] = {"moving": 0.25, "levels": 7}
    numbers_with_teacher: ClassVar[dict[str, float]] = {"moving": 0.5, "levels": 7}

    def times(self, u, v, progress):
        path, t = self.scheduler.path, self.density(u)
        # of one number, two: whether the map leads elsewhere, and how far
        moving, level = v < self.moving, (v / self.moving * self.levels).floor()
        last, first = (place(self.scheduler, each) for each in (self.scheduler.t_min, self.scheduler.t_max))
        length = (first - last) * 2.0**-level
        # what the density draws on the whole way, on what is left of it
        begin = first - (first - place(self.scheduler, t)) / (first - last) * (first - last - length)
        t_min, t_max = self.scheduler.t_min, self.scheduler.t_max
        begin, middle, end = (
            path.t_from_straight(begin - part * length, 1.0).clamp(t_min, t_max) for part in (0.0, 0.5, 1.0)
        )
        return [torch.where(moving, each, t) for each in (begin, middle, end)]

    def loss(self, network, y, v, drawn, conditions, told, dropped, progress):
        expected = self.velocity(network, y, v, drawn, conditions, dropped).clone()
        moving = drawn.s < drawn.t
        if moving.any():
            # by their numbers: how many there are, the host knows
            rows, times = sent(moving.nonzero()[:, 0], y.device, torch.long), [each[moving] for each in drawn[:3]]
            own = {name: value[rows] for name, value in told.items()}
            expected[rows] = composed_velocity(network, self.scheduler, y[rows], *times, conditions=own)
        value = mean_velocity(network, self.scheduler, y, drawn.t, drawn.s, told)
        return weighted(value - expected, "none")


FEW_STEP_METHODS = {
    "consistency": Consistency,
    "ect": EasyConsistencyTuning,
    "scm": ContinuousConsistency,
    "mean_flow": MeanFlow,
    "flow_map": FlowMap,
}
