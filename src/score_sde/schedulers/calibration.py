"""A grid of times fitted to one model: the times at which a solver of few steps errs least.

The error is measured, on a few trajectories, against the same trajectories in many steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .solvers import Memory


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
