"""A grid of times fitted to one model: the times at which a solver of few steps errs least, with predictor "auto".

The error is measured, on a few trajectories, against the same trajectories in many steps. The search does not call the
network: it asks for evaluations, one after another, so that a function can answer it as well as one call of a pipeline,
whose every step is one of them.
"""

import contextlib
import copy
import inspect
import math
import numbers
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging

from .checks import LARGEST_NFE, check_number
from .paths import shifted
from .solvers import Memory
from .timetables import grid, noise_levels, shift_of, solver
from .trajectory import planned


# what the search begins with, beside what auto takes: predictors, and the grids (center, width, largest lambda)
PREDICTORS_TRIED = ("dpmpp_2m", "dpmpp_3b", "adams_2", "unipc_2")
GRIDS_TRIED = [(c, w, e) for c in (-0.75, 0.4) for w in (1.2, 3.0) for e in (1.5, 2.5, 8.0)]
# of the fine solution: stable under guidance
REFERENCE = "adams_2", (-0.75, 2.0, math.inf)

_Scheduler: Any = object
# yields (x, t), is sent the denoised samples
Evaluations = Generator[tuple[torch.Tensor, float], torch.Tensor, Any]


def logistic_times(path, n, t_max, t_min, center, width, largest):
    """n times from t_max, whose lambda are at equal shares of a logistic distribution, to `largest`, or to t_min where
    that is less."""
    ends = path.half_log_snr(torch.tensor([t_max, t_min], dtype=torch.float64))
    begin, end = torch.sigmoid((ends.clamp_max(largest) - center) / width).tolist()
    inside = torch.linspace(begin, end, n, dtype=torch.float64)[1:]
    later = path.t_from_half_log_snr(center + width * torch.logit(inside))
    # up to rounding
    return torch.cat([torch.tensor([t_max], dtype=torch.float64), later.clamp_min(t_min)])


@dataclass
class Trajectory:
    """A trajectory along some times that remembers its samples and what the network made of them, so that one with
    other late times needs to run from there only."""

    times: torch.Tensor
    stages: list
    samples: list
    denoised: list
    score: float = math.inf


class Search:
    """Search for the times of n steps that bring samples closest to where a fine solution leads.

    Args:
        scheduler: of predictor "auto".
        n: number of steps.
        shift: of its grid.
        reference_steps: of the fine solution.
        sweeps: how often every time is tried, which says what the search may cost.

    cost: the evaluations that it may ask for: the reference's; n - 1 for every pair of grid and predictor that it may
        begin with, as all trajectories begin with the same one; and two trials of every time in every sweep, which run
        from that time on.
    before, best: the trajectories of auto and of the best times so far, `predictor` that of the best.
    """

    def __init__(self, scheduler, n: int, shift: float = 1.0, reference_steps: int = 100, sweeps: int = 6):
        self.scheduler, self.n, self.shift, self.reference_steps = scheduler, n, shift, reference_steps
        auto = grid(scheduler, n, scheduler.t_max, shift), solver(scheduler, n)
        grids = [self.logistic(n, center, width, largest) for center, width, largest in GRIDS_TRIED]
        self.starts = [auto, *((auto[0], each) for each in PREDICTORS_TRIED if each != auto[1])]
        self.starts += [(grid, predictor) for grid in grids for predictor in PREDICTORS_TRIED]
        self.cost = reference_steps + len(self.starts) * (n - 1) + sweeps * n * (n - 1)
        self.before: Trajectory
        self.best: Trajectory

    def evaluations(self, x) -> Evaluations:
        """The evaluations of the search from samples x at the largest time; it ends where no time can move."""
        start = yield from self.follow_reference(x)
        found = []
        for times, predictor in self.starts:
            found.append((yield from self.run(times, predictor, start)))
        self.before = found[0]
        self.best, (_, self.predictor) = min(zip(found, self.starts, strict=True), key=lambda each: each[0].score)
        yield from self.improve()

    def logistic(self, n, center, width, largest):
        """`logistic_times` of this scheduler, moved by the shift as its grids are."""
        path, t_max, t_min, moved = (
            self.scheduler.path,
            self.scheduler.t_max,
            self.scheduler.t_min,
            math.log(self.shift),
        )
        return logistic_times(path, n, t_max, t_min, center - moved, width, largest - moved)

    def follow_reference(self, x) -> Evaluations:
        """Set the target, what the network makes of the sample at t_min to which a fine solution leads, as the last
        step of stock schedulers does; return the beginning of all trajectories."""
        predictor, grid = REFERENCE
        times = self.logistic(self.reference_steps, *grid)
        stages = planned(self.scheduler, times, predictor)
        memory, start = Memory(stages), Trajectory(times[:1], stages[:1], [x], [])
        for stage in stages:
            denoised = yield x, stage.t_eval
            start.denoised = start.denoised or [denoised]
            x = stage.update(x, denoised, memory, None)
        if not torch.isfinite(denoised).all():
            raise ValueError("the model's output is not finite on the reference trajectory")
        self.target = denoised
        return start

    def run(self, times, predictor, known: Trajectory) -> Evaluations:
        """The trajectory along these times; what it shares with a known one is not evaluated again."""
        stages = planned(self.scheduler, times, predictor)
        same = 0
        while same < len(known.stages) and stages[same] == known.stages[same]:
            same += 1
        if same == len(stages):
            return known
        samples, denoised = known.samples[: same + 1], known.denoised[:same]
        if same < len(known.stages) and stages[same].t_eval == known.stages[same].t_eval:
            denoised.append(known.denoised[same])
        memory = Memory(stages)
        memory.samples.extendleft(samples[:-1])
        memory.denoised.extendleft(denoised[:same])
        for i, stage in enumerate(stages[same:], same):
            if i == len(denoised):
                denoised.append((yield samples[i], stage.t_eval))
            samples.append(stage.update(samples[i], denoised[i], memory, None))
        return Trajectory(times, stages, samples, denoised, self.error(samples[-1]))

    def error(self, x):
        """Half the log of the geometric mean, and half the log of the root mean square, of the samples' distances."""
        distance = (x - self.target).flatten(1).double().pow(2).mean(1).clamp_min(1e-30)
        value = float(distance.log().mean() / 4 + distance.mean().log() / 4)
        return value if math.isfinite(value) else math.inf

    def improve(self) -> Evaluations:
        """Move one time after another in lambda, back and forth, until no time can move."""
        path, t_min = self.scheduler.path, self.scheduler.t_min
        # where a path begins in noise alone lambda is infinite
        gaps = path.half_log_snr(self.best.times).clamp(-10, 10).diff()
        reach = torch.minimum(gaps, torch.cat([gaps[1:], gaps[-1:]])) / 3
        while (reach > 1e-4).any():
            # late times first: what comes before them need not run again
            for i in range(self.n - 1, 0, -1):
                for direction in (1.0, -1.0):
                    moved = path.half_log_snr(self.best.times)
                    moved[i] = moved[i] + direction * reach[i - 1]
                    times = self.best.times.clone()
                    times[i] = path.t_from_half_log_snr(moved[i])
                    # times that coincide would make the solver's weights infinite
                    if not (moved.diff() > 1e-2).all() or times[i] < t_min:
                        continue
                    tried = yield from self.run(times, self.predictor, self.best)
                    if tried.score < self.best.score:
                        self.best, reach[i - 1] = tried, reach[i - 1] * 1.5
                        break
                else:
                    reach[i - 1] = reach[i - 1] / 2

    def answer(self, x, denoise: Callable):
        """Run the search from samples x, by a function f(x, t) -> denoised samples."""
        asked = self.evaluations(x)
        with logging.tqdm(total=self.cost, desc=f"calibrating {self.n} evaluations") as bar:
            request = next(asked)
            for _ in range(self.cost):
                bar.update()
                try:
                    request = asked.send(denoise(*request))
                except StopIteration:
                    # what ends early is through
                    bar.total = bar.n
                    break


class Recording(_Scheduler):
    """A scheduler, of a class made of this and its own, whose steps are the evaluations of a search: whatever a
    pipeline does around them, its guidance above all, is part of what the search sees.

    A call of the pipeline runs as many steps as the search costs. The entries of `timesteps` are written one after
    another, as the search asks for them: what a pipeline loops over are views of them. From a pipeline that does not
    evaluate its network where it was told to, or not always in the same way, nothing can be learned: ValueError.
    """

    @classmethod
    def of(cls, scheduler, reference_steps, sweeps):
        """One that stands in for a scheduler; for the rest see `Search`."""
        new = copy.copy(scheduler)
        new.__class__ = type(cls.__name__, (cls, type(scheduler)), {})
        new.register_to_config(calibration=None)
        new.search, new.finished, new._settings = None, False, (reference_steps, sweeps)
        return new

    def __deepcopy__(self, memo):
        raise ValueError("this pipeline samples several things at once, with copies of its scheduler: no single search")

    def set_begin_index(self, begin_index=0):
        if begin_index:
            raise ValueError("times are fitted to whole trajectories: leave out what cuts them, such as strength")

    def set_timesteps(
        self,
        num_inference_steps=None,
        device=None,
        timesteps=None,
        sigmas=None,
        t_start=None,
        mu=None,
        guidance_scale=None,
        original_inference_steps=None,
        strength=1.0,
    ):
        given = (timesteps, sigmas, t_start, mu, guidance_scale, original_inference_steps, strength)
        super().set_timesteps(num_inference_steps, device, *given)
        n, shift = self.nfe, shift_of(self, mu)
        if not torch.equal(self._planned().times, grid(self, n, self.t_max, shift)):
            raise ValueError(
                f"this call sets its own times, {self.timesteps.tolist()}: fitted ones of {n} evaluations would not be "
                f"used in it"
            )
        self.search = Search(self, n, shift, *self._settings)
        # the first evaluation comes again in the middle and at the end: it must not depend on when it comes
        entries = self.search.cost + 2
        self._again = (entries // 2, entries - 1)
        self.timesteps, self.sigmas = torch.zeros(entries, device=device), torch.zeros(entries + 1)
        self._ask(0, None, self.t_max)

    def _ask(self, entry, x, t):
        """Let the next evaluation be that of samples x at time t; None for whatever samples the pipeline begins at."""
        self._step_index, self._x, self._t = entry, x, t
        if entry < len(self.timesteps):
            self.timesteps[entry] = self.timestep(t)
            self.sigmas[entry] = noise_levels(self.path, torch.tensor(t, dtype=torch.float64))

    def _known_time(self, timesteps):
        # its entries are no longer those of the plan
        return self.path_time(timesteps)

    def scale_model_input(self, sample, timestep=None):
        return sample * float(self.parameterization.row(self._t).input_scale)

    def step(
        self,
        model_output,
        timestep,
        sample,
        generator=None,
        return_dict: bool = True,
        prev_timestep=None,
        use_clipped_model_output=None,
        per_token_timesteps=None,
        eta=None,
    ):
        if eta:
            raise ValueError(f"times are fitted to trajectories without noise: leave out eta {eta}")
        if per_token_timesteps is not None:
            raise ValueError("times are fitted to whole samples: leave out what gives tokens times of their own")
        entry, x = self._step_index, sample.to(torch.promote_types(sample.dtype, torch.float32))
        if entry == 0:
            self._begin = x.clone()
            self._requests = self.search.evaluations(self._begin)
            self._request = next(self._requests)
            self._bar = logging.tqdm(total=len(self.timesteps), desc=f"calibrating {self.search.n} evaluations")
        told = self.timesteps[entry]
        as_asked = entry == 0 or sample.shape == self._x.shape and torch.equal(sample, self._x.to(sample.dtype))
        if not as_asked or (torch.as_tensor(timestep, device=told.device) - told).abs().max() > 0.01 * told.abs():
            raise ValueError("this pipeline changes samples or times between its steps: no search can follow that")
        denoised = self.denoiser(lambda model_input, timesteps: model_output)(x, self._t)
        if entry == 0:
            self._first = denoised
        if entry not in self._again:
            # what ends early is asked for its last again
            with contextlib.suppress(StopIteration):
                self._request = self._requests.send(denoised)
        elif (denoised - self._first).abs().max() > 0.01 * self._first.abs().max():
            raise ValueError(
                "this pipeline's network depends on the number of the step and not on time alone, as by guidance or "
                "control in a part of the steps, or by a cache: leave that out of the call"
            )
        self._ask(entry + 1, *((self._begin, self.t_max) if entry + 1 in self._again else self._request))
        self._bar.update()
        self.finished = entry + 1 == len(self.timesteps)
        if self.finished:
            self._bar.close()
        prev_sample = self._x.to(sample.dtype, copy=True)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample, denoised.to(sample.dtype))


def search_in_call(scheduler, pipeline, n, call, reference_steps, sweeps) -> Search:
    """A finished search whose evaluations were the steps of pipeline(**call, num_inference_steps=n)."""
    names = [name for name, part in pipeline.components.items() if part is scheduler]
    stand_in = Recording.of(scheduler, reference_steps, sweeps)
    # what it returns is thrown away
    if "output_type" in inspect.signature(pipeline.__call__).parameters:
        call = {"output_type": "latent"} | call
    bar = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**bar | {"disable": True})
    for name in names:
        setattr(pipeline, name, stand_in)
    try:
        pipeline(**call, num_inference_steps=n)
    except Exception:
        # pipelines that return no latents say so after the last step
        if not stand_in.finished:
            raise
    finally:
        pipeline.set_progress_bar_config(**bar)
        for name in names:
            setattr(pipeline, name, scheduler)
    if not stand_in.finished:
        raise ValueError("this call left out steps of its scheduler: leave out what cuts trajectories")
    return stand_in.search


def check_call(scheduler, pipeline, call, others):
    """Raise ValueError unless `call` can be that of a stock pipeline, beside which none of `others` may be given."""
    if not isinstance(call, dict) or not hasattr(pipeline, "components") or hasattr(pipeline, "guided_network"):
        raise ValueError(
            "call is the dictionary of arguments of a stock pipeline; for a ScoreSDEPipeline or a function pass noise, "
            "class_labels, conditions or guidance_scale"
        )
    for name in ("num_inference_steps", "timesteps", "sigmas"):
        if name in call:
            raise ValueError(f"call has {name}={call[name]!r}: leave it out, nfe says how many times are to be found")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} does not go with call: put it there, under the pipeline's own name")
    if all(part is not scheduler for part in pipeline.components.values()):
        raise ValueError("this pipeline samples with another scheduler: set pipe.scheduler = scheduler before")


def calibrate(
    scheduler,
    model,
    nfe,
    noise,
    num_samples,
    class_labels,
    guidance_scale,
    generator,
    conditions,
    mu,
    call,
    reference_steps,
    sweeps,
):
    """Fit the times of a `ScoreSDEScheduler`: its method of this name says how."""
    if (network_map := scheduler.config.network_map) is not None:
        raise ValueError(f"times are fitted to the ODE of a denoiser; this scheduler has network_map={network_map!r}")
    counts = list(nfe) if isinstance(nfe, (list, tuple)) else [nfe]
    check_number("reference_steps", reference_steps, 3, LARGEST_NFE, whole=True)
    for each in counts:
        check_number("nfe", each, 2, reference_steps - 1, whole=True)
    for name, value in (("num_samples", num_samples), ("sweeps", sweeps)):
        check_number(name, value, 1, LARGEST_NFE, whole=True)
    if scheduler.domain is not None:
        raise ValueError(f"times are fitted in flat space, not on domain {scheduler.config.domain!r}")
    if scheduler.config.predictor != "auto" or scheduler.config.corrector or not scheduler.config.denoise_final:
        raise ValueError(
            f"times are fitted for predictor 'auto' with denoise_final and without a corrector; this scheduler has "
            f"predictor={scheduler.config.predictor!r}, corrector={scheduler.config.corrector!r}, "
            f"denoise_final={scheduler.config.denoise_final}"
        )
    record, is_pipeline = {}, hasattr(model, "guided_network")
    if call is not None:
        others = {"noise": noise, "class_labels": class_labels, "generator": generator, "conditions": conditions}
        others |= {"mu": mu, "guidance_scale": None if guidance_scale == 1 else guidance_scale}
        check_call(scheduler, model, call, others)
        default = inspect.signature(model.__call__).parameters.get("guidance_scale")
        scale = call.get("guidance_scale", default and default.default)
        record = {"guidance_scale": scale} if isinstance(scale, numbers.Real) else {}
    elif is_pipeline:
        network, noise = model.prepare_trajectories(
            num_samples, class_labels, guidance_scale, generator, noise, conditions
        )
        record = {"guidance_scale": guidance_scale}
    elif hasattr(model, "components"):
        raise ValueError("a stock pipeline needs call: a dictionary of its arguments, without num_inference_steps")
    elif noise is None:
        raise ValueError("a model that is no ScoreSDEPipeline needs noise: pass a (B, C, ...) tensor")
    else:
        network = model

    calibration, errors = dict(scheduler.config.calibration or {}), {}
    for n in counts:
        if call is not None:
            search = search_in_call(scheduler, model, n, call, reference_steps, sweeps)
        else:
            search = Search(scheduler, n, shift_of(scheduler, mu), reference_steps, sweeps)
            x = noise.to(torch.promote_types(noise.dtype, torch.float32)) * scheduler.init_noise_sigma
            search.answer(x, scheduler.denoiser(network))
        errors[n] = (math.exp(search.before.score), math.exp(search.best.score))
        if errors[n][1] < errors[n][0]:
            made_with = record | {"shift": search.shift, "evaluations": search.cost}
            calibration[str(n)] = [search.predictor, search.best.times.tolist(), made_with]
    scheduler.register_to_config(calibration=calibration)
    return errors


def fitted(scheduler, n, shift):
    """(times, predictor) that were fitted for n steps, moved as grids are where the shift is another than then."""
    predictor, times, *made_with = scheduler.config.calibration[str(n)]
    times = torch.tensor(times, dtype=torch.float64)
    # bundles of before don't say it
    before = made_with[0].get("shift", shift) if made_with else shift
    return torch.cat([times[:1], shifted(scheduler.path, times[1:], shift / before)]), predictor
