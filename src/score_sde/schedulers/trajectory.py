"""A trajectory as the scheduler runs it: the plan of its stages, what the network's output means at each of them, and
what it remembers between them."""

import torch

from .arguments import given_options
from .parameterization import Parameterization
from .paths import moved
from .solvers import Memory, Stage, plan


def planned(scheduler, times, predictor, options=None):
    """The stages along these times by the settings of a `ScoreSDEScheduler`; `options`, or those of its config."""
    config = scheduler.config
    return plan(
        scheduler.path,
        times,
        predictor,
        to_data=config.denoise_final,
        options=given_options(type(scheduler), config) if options is None else options,
        corrector=config.corrector,
        corrector_steps=config.corrector_steps,
        corrector_snr=config.corrector_snr,
        corrector_position=config.corrector_position,
    )


class PlannedTrajectory:
    """The stages along some times, one for each evaluation of the network, and where they take samples.

    times: where the time steps begin, and where the last one leads if that is not clean data.
    predictor: a key of `solvers.PREDICTORS`.
    stages: the plan, of `planned`.
    evaluated: the times of evaluation, float64.
    rows: for each of them (a, b, input_scale, alpha), what the network's output means there.

    Raises ValueError where that is nothing.
    """

    def __init__(self, parameterization: Parameterization, times, predictor, stages: list[Stage]):
        self.parameterization, self.times, self.predictor, self.stages = parameterization, times, predictor, stages
        self.evaluated = torch.tensor([stage.t_eval for stage in stages], dtype=torch.float64)
        path, row = parameterization.path, self._rows()
        # states are float32
        if not all(torch.isfinite(values.float()).all() for values in row):
            raise ValueError(
                f"prediction_type {parameterization.prediction_type!r} says nothing of clean samples at "
                f"t = {times[0]:g}, where alpha is {float(path.alpha(times[0])):g}: pass a smaller t_max, or a path "
                f"with less noise"
            )
        self.rows = list(zip(*(values.tolist() for values in (*row, path.alpha(self.evaluated))), strict=True))
        self._times_there: torch.Tensor | None = None  # on the device of the samples
        self.forget()

    def _rows(self):
        """(a, b, input_scale) at each evaluation: of the denoised sample, or of the end of the network's map."""
        a, b, input_scale = self.parameterization.row(self.evaluated)
        at_end = torch.tensor([stage.at_end for stage in self.stages])
        if at_end.any():
            to = torch.tensor([stage.t_to if stage.at_end else stage.t_eval for stage in self.stages]).to(a)
            of_x, of_x0, _ = self.parameterization.path.posterior(self.evaluated, to, 0.0)
            a, b = torch.where(at_end, of_x + of_x0 * a, a), torch.where(at_end, of_x0 * b, b)
        return a, b, input_scale

    def forget(self):
        """Begin without a past."""
        self.memory = Memory(self.stages)

    def replace(self, entry, stages):
        """Go on from this entry by other stages, without a past."""
        self.stages[entry:] = stages
        self.forget()

    def step(self, entry, output, x, draw_noise, variance=None, redo_noise=True):
        """(the samples after this entry, their denoised ones), (B, C, ...) each, in the dtype of x.

        Args:
            output: of the network, (B, C, ...), for samples x.
            draw_noise: () -> standard normal, as x.
            variance: (B, C, ...), what the network learned of the noise, or None.
            redo_noise: see use_clipped_model_output.
        """
        a, b, _, alpha = self.rows[entry]
        unlimited = torch.add(a * x, output.to(x.dtype), alpha=b)
        denoised = self.parameterization.limit(unlimited)
        if redo_noise is False and denoised is not unlimited:
            # the sample of the clipped one and the noise that the network had
            x = torch.add(x, denoised - unlimited, alpha=alpha)
        if variance is not None:
            variance = variance.to(x.dtype)
        return self.stages[entry].update(x, denoised, self.memory, draw_noise, variance), denoised

    def step_tokens(self, entry, output, x, draw_noise, own):
        """The same for samples (B, L, C) whose tokens are at times of their own, (B, L) or (B, 1), as video models have
        them whose first frames are given (LTX), on the straight path.

        A token at the stage's own time takes the stage. One with less noise, which waits for the others, takes an Euler
        step to the first lower of the plan's times; what the memory keeps of it is where it would be at the stage's
        time. The output is x0 - noise as the network estimates it, the negative velocity, as those pipelines pass it.
        """
        if self._times_there is None or self._times_there.device != x.device:
            self._times_there = moved(torch.cat([self.times, torch.zeros(1)]).to(x.dtype), x.device)
        stage, output, times = self.stages[entry], output.to(x.dtype), self._times_there.to(x.dtype)
        own = own.to(x.device, x.dtype).unsqueeze(-1)  # (B, L, 1)
        x0 = x + own * output
        denoised = self.parameterization.limit(x0)
        after = stage.update(x0 - stage.t_eval * output, denoised, self.memory, draw_noise)
        below = torch.where(times < own - 1e-6, times, 0.0).amax(-1, keepdim=True)
        waits = own < stage.t_eval - 1e-6
        return torch.where(waits, denoised - below * output, after), denoised
