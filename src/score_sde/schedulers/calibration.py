"""A grid of times fitted to one model: the times at which a solver of few steps errs least, with predictor "auto".

The error is measured, on a few trajectories, against the same trajectories in many steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils import logging

from .checks import LARGEST_NFE, check_choice, check_number
from .solvers import AUTOMATIC, PREDICTORS, Memory


@dataclass
class Trajectory:
    """A trajectory along some times that remembers its states, so that one with other late times needs to run from
    there only."""

    times: torch.Tensor
    stages: list
    states: list
    score: float


class Fit:
    """Search for the times of n steps that bring x closest to where a fine solution leads.

    Args:
        path: the noise path.
        denoise: f(x, t) -> denoised samples, one network evaluation.
        build: f(times, predictor) -> stages, deterministic, one per time.
        x: samples at the first time, (B, ...).
        target: where the exact trajectory leads from there, (B, ...).
        t_min: the smallest time allowed.
    """

    def __init__(self, path, denoise: Callable, build: Callable, x, target, t_min):
        self.path, self.denoise, self.build, self.x, self.target = path, denoise, build, x, target
        self.t_min = t_min

    def run(self, times, predictor, known: Trajectory | None = None):
        """The trajectory along these times; what it shares with a known one is not evaluated again."""
        stages = self.build(times, predictor)
        states, start = [(self.x, Memory(stages))], 0
        if known is not None:
            same = 0
            while same < len(stages) and stages[same] == known.stages[same]:
                same += 1
            states, start = known.states[: same + 1], same
            if start == len(stages):
                return known
        for stage in stages[start:]:
            x, memory = states[-1]
            after = Memory(stages)
            after.samples.extend(memory.samples)
            after.denoised.extend(memory.denoised)
            states.append((stage.update(x, self.denoise(x, stage.t_eval), after, None), after))
        return Trajectory(times, stages, states, self.error(states[-1][0]))

    def error(self, x):
        """Half the log of the geometric mean, and half the log of the root mean square, of the samples' distances."""
        distance = (x - self.target).flatten(1).double().pow(2).mean(1).clamp_min(1e-30)
        value = float(distance.log().mean() / 4 + distance.mean().log() / 4)
        return value if math.isfinite(value) else math.inf

    def improve(self, best: Trajectory, predictor, sweeps: int, on_step: Callable = lambda: None):
        """Move one time after another in lambda, back and forth, for as long as that helps."""
        half_log_snr = self.path.half_log_snr(best.times)
        gaps = half_log_snr.diff()
        reach = torch.minimum(gaps, torch.cat([gaps[1:], gaps[-1:]])) / 3
        for _ in range(sweeps):
            # late times first: what comes before them need not run again
            for i in range(len(best.times) - 1, 0, -1):
                on_step()
                for direction in (1.0, -1.0):
                    moved = self.path.half_log_snr(best.times)
                    moved[i] = moved[i] + direction * reach[i - 1]
                    times = best.times.clone()
                    times[i] = self.path.t_from_half_log_snr(moved[i])
                    # times that coincide would make the solver's weights infinite
                    if not (moved.diff() > 1e-2).all() or times[i] < self.t_min:
                        continue
                    tried = self.run(times, predictor, best)
                    if tried.score < best.score:
                        best, reach[i - 1] = tried, reach[i - 1] * 1.5
                        break
                else:
                    reach[i - 1] = reach[i - 1] / 2
        return best


def calibrate(
    scheduler, model, nfe, noise, num_samples, class_labels, guidance_scale, generator, reference_steps, sweeps
):
    """Fit the times of a `ScoreSDEScheduler`: its method of this name says how."""
    counts = list(nfe) if isinstance(nfe, (list, tuple)) else [nfe]
    check_number("reference_steps", reference_steps, 3, LARGEST_NFE, whole=True)
    for each in counts:
        check_number("nfe", each, 2, reference_steps - 1, whole=True)
    for name, value in (("num_samples", num_samples), ("sweeps", sweeps)):
        check_number(name, value, 1, LARGEST_NFE, whole=True)
    if scheduler.config.predictor != "auto" or scheduler.config.corrector or not scheduler.config.denoise_final:
        raise ValueError(
            f"times are fitted for predictor 'auto' with denoise_final and without a corrector; this scheduler has "
            f"predictor={scheduler.config.predictor!r}, corrector={scheduler.config.corrector!r}, "
            f"denoise_final={scheduler.config.denoise_final}"
        )
    if hasattr(model, "guided_network"):
        network, noise = model.prepare_trajectories(num_samples, class_labels, guidance_scale, generator, noise)
    elif noise is None:
        raise ValueError("a model that is no ScoreSDEPipeline needs noise: pass a (B, C, ...) tensor")
    else:
        network = model
    x = noise.to(torch.promote_types(noise.dtype, torch.float32)) * scheduler.init_noise_sigma
    denoise = scheduler.denoiser(network)

    stages = scheduler._build_plan(
        scheduler._grid(reference_steps, scheduler.t_max), scheduler._solver(reference_steps)
    )
    target, memory = x, Memory(stages)
    for stage in logging.tqdm(stages, desc="reference"):
        target = stage.update(target, denoise(target, stage.t_eval), memory, None)
    if not torch.isfinite(target).all():
        raise ValueError("the model's output is not finite on the reference trajectory")

    fit = Fit(scheduler.path, denoise, scheduler._build_plan, x, target, scheduler.t_min)
    calibration, errors = dict(scheduler.config.calibration or {}), {}
    for n in counts:
        grid = scheduler._grid(n, scheduler.t_max)
        before = fit.run(grid, scheduler._solver(n))
        predictors = dict.fromkeys(rule.predictor for rule in AUTOMATIC)
        found = [(fit.run(grid, predictor), predictor) for predictor in predictors]
        best, predictor = min(found, key=lambda each: each[0].score)
        with logging.tqdm(total=sweeps * (n - 1), desc=f"{n} evaluations") as bar:
            best = fit.improve(best, predictor, sweeps, bar.update)
        if best.score < before.score:
            calibration[str(n)] = [predictor, best.times.tolist()]
        errors[n] = (math.exp(before.score), math.exp(min(best.score, before.score)))
    scheduler.register_to_config(calibration=calibration)
    return errors


def check_calibration(calibration):
    """Raise ValueError unless `calibration` holds what `calibrate` writes: None, or {number of steps: [predictor,
    times]}."""
    if not isinstance(calibration, dict | None):
        raise ValueError(f"calibration {calibration!r} must be a dictionary, as `calibrate` writes it, or None")
    for n, entry in (calibration or {}).items():
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[1], (list, tuple)):
            raise ValueError(f"calibration {n!r} must hold a predictor and a list of times, not {entry!r}")
        predictor, times = entry
        check_choice(f"predictor of calibration {n!r}", predictor, PREDICTORS)
        for time in times:
            check_number(f"time of calibration {n!r}", time, 0, 1)
        falls = all(a > b for a, b in zip(times, times[1:], strict=False))
        if str(len(times)) != n or not falls or not times or times[-1] <= 0:
            raise ValueError(f"calibration {n!r} must hold as many times, falling strictly from at most 1: {times}")
