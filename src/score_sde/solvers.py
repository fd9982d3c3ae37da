"""Solvers of the reverse process, as plans of stages.

A plan is a list of stages, one per network evaluation. Its numbers are worked out once, in float64, before sampling; a
stage then only combines tensors. The equation numbers are those of `paths`.

A predictor is a function (path, times, eta) -> for each of the steps between the falling times, its list of stages;
adding a solver is adding one such function and its row in PREDICTORS. A corrector is a
function (path, times, snr) -> for each of the times, one stage that keeps its marginal.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .paths import expand_to


class Memory:
    """What a trajectory remembers between stages: the state at the start of the time step, and past denoised samples
    of the predictor's stages, newest first."""

    def __init__(self, history: int = 4):
        self.start = None
        self.denoised = deque(maxlen=history)


@dataclass(frozen=True)
class LinearStage:
    """x <- sample x + start x_start + sum_k denoised[k] D_k + noise z.

    D_0 is the denoised sample of this evaluation, D_k the k-th before it, x_start the state at the start of the time
    step, z standard normal noise. `first` marks the first stage of a time step; `corrects` a corrector's stage, whose
    evaluation multistep solvers don't see.
    """

    t_eval: float
    sample: float
    denoised: tuple[float, ...]
    start: float = 0.0
    noise: float = 0.0
    first: bool = True
    corrects: bool = False

    @property
    def coefficients(self):
        return (self.sample, self.start, self.noise, *self.denoised)

    def update(self, x, denoised, memory: Memory, draw_noise: Callable):
        if self.corrects:
            past = [denoised]
        else:
            if self.first:
                memory.start = x
            memory.denoised.appendleft(denoised)
            past = memory.denoised
        out = self.sample * x if self.sample else 0.0
        for coefficient, value in zip(self.denoised, past, strict=False):
            out = out + coefficient * value
        if self.start:
            out = out + self.start * memory.start
        if self.noise:
            out = out + self.noise * draw_noise()
        return out


@dataclass(frozen=True)
class LangevinStage:
    """One step of Langevin dynamics at fixed t with the step size 2 (snr |z| / |score|)^2 (Song et al. 2021, algorithms
    4 and 5), where the norms are each sample's own, so a sample doesn't depend on the batch around it.

    A sample whose score is exactly 0 stays where it is.
    """

    t_eval: float
    alpha: float
    sigma: float
    snr: float

    @property
    def coefficients(self):
        return (self.alpha, self.sigma, self.snr)

    def update(self, x, denoised, memory: Memory, draw_noise: Callable):
        noise = draw_noise()
        score = (self.alpha * denoised - x) / self.sigma**2
        score_norm, noise_norm = score.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1)
        root = torch.where(score_norm > 0, self.snr * noise_norm / score_norm, 0.0)  # sqrt(step size / 2)
        return x + expand_to(2 * root**2, x) * score + expand_to(2 * root, x) * noise


# --- predictors -------------------------------------------------------------------------------------------------------


def _rows(*columns):
    """The numbers of several tensors, one tuple per time step."""
    return zip(*(column.tolist() for column in columns), strict=True)


def euler(path, times, eta):
    """Euler in t on the probability-flow ODE: x + (s - t) velocity, Eq. (8)."""
    return euler_maruyama(path, times, 0.0)


def euler_maruyama(path, times, eta):
    """Euler-Maruyama on the reverse SDE with noise eta g, Eq. (8): the step is the grid's own."""
    t, step = times[:-1], times.diff()
    alpha, sigma = path.alpha(t), path.sigma(t)
    # velocity = sigma'/sigma x + (alpha' - sigma'/sigma alpha) x0;   -score = x / sigma^2 - alpha / sigma^2 x0
    pull, noise = path.sigma_prime(t) / sigma, torch.zeros_like(t)
    if eta:
        pull = pull + eta**2 * path.diffusion(t) ** 2 / (2 * sigma**2)
        noise = eta * path.diffusion(t) * (-step).sqrt()
    rows = _rows(t, 1 + step * pull, step * (path.alpha_prime(t) - pull * alpha), noise)
    return [[LinearStage(time, sample, (denoised,), noise=std)] for time, sample, denoised, std in rows]


def reverse_diffusion(path, times, eta):
    """The forward SDE's own discretisation, reversed: (2 - A) x + B^2 score + B z (Song et al. 2021, Eq. 46), with the
    exact transition (A, B) of Eq. (4): DDPM's sqrt(1 - beta_i), sqrt(beta_i) on a discrete path."""
    t = times[:-1]
    scale, std = path.transition(times[1:], t)
    pull = std**2 / path.sigma(t) ** 2
    rows = _rows(t, 2 - scale - pull, pull * path.alpha(t), std)
    return [[LinearStage(time, sample, (denoised,), noise=std)] for time, sample, denoised, std in rows]


def ddim(path, times, eta):
    """The posterior with x0 replaced by the denoised sample, Eq. (5): DDIM for eta = 0, DDPM's ancestral step for 1."""
    rows = _rows(times[:-1], *path.posterior(times[:-1], times[1:], eta))
    return [[LinearStage(time, c_x, (c_0,), noise=std)] for time, c_x, c_0, std in rows]


def ancestral(path, times, eta):
    """Draw from the posterior with x0 replaced by the denoised sample: `ddim` with eta = 1 (Ho et al. 2020)."""
    return ddim(path, times, 1.0)


def heun(path, times, eta):
    """The trapezoid rule in the straight coordinates, Eq. (9): Heun's method (Karras et al. 2022, algorithm 1)."""
    sigma = path.sigma(times)
    c = path.alpha(times) + path.straight * sigma
    scale, half = c[1:] / c[:-1], c[1:] * (sigma / c).diff() / 2
    # the slope (x - c x0) / sigma at both ends of the step, times half of it
    x_t, x0_t = half / sigma[:-1], -half * c[:-1] / sigma[:-1]
    x_s, x0_s = half / sigma[1:], -half * c[1:] / sigma[1:]
    stages = []
    for t, s, *step in _rows(times[:-1], times[1:], scale + 2 * x_t, 2 * x0_t, x_s, x0_s, x0_t, scale + x_t):
        to_s, to_s_x0, sample, denoised, denoised_before, start = step
        trapezoid = LinearStage(s, sample, (denoised, denoised_before), start=start, first=False)
        stages.append([LinearStage(t, to_s, (to_s_x0,)), trapezoid])
    return stages


def dpmpp_2m(path, times, eta):
    """DPM-Solver++(2M), the midpoint form of diffusers (Lu et al. 2022, algorithm 2): exact in the linear term, the
    denoised sample extrapolated linearly in lambda from the two latest evaluations."""
    stages, steps = ddim(path, times, 0.0), path.half_log_snr(times).diff()
    # D_0 + (lambda_s - lambda_t) / (lambda_t - lambda_before) / 2 (D_0 - D_1)
    for i, extrapolation in enumerate((steps[1:] / steps[:-1] / 2).tolist(), start=1):
        [first_order] = stages[i]
        (c_0,) = first_order.denoised
        weights = (c_0 * (1 + extrapolation), -c_0 * extrapolation)
        stages[i] = [LinearStage(first_order.t_eval, first_order.sample, weights)]
    return stages


class Predictor(NamedTuple):
    """A row of PREDICTORS: the function, its order of convergence (None for the stochastic ones, whose mean and
    covariance converge), network evaluations per time step, and for a solver whose noise can be chosen the eta that it
    uses unless told otherwise and the largest one allowed."""

    stages: Callable
    order: int | None
    evaluations: int
    eta: float | None = None
    max_eta: float | None = None


PREDICTORS = {
    "euler": Predictor(euler, 1, 1),
    "heun": Predictor(heun, 2, 2),
    "dpmpp_2m": Predictor(dpmpp_2m, 2, 1),
    "ddim": Predictor(ddim, 1, 1, eta=0.0, max_eta=1.0),
    "ancestral": Predictor(ancestral, None, 1),
    "euler_maruyama": Predictor(euler_maruyama, None, 1, eta=1.0, max_eta=math.inf),
    "reverse_diffusion": Predictor(reverse_diffusion, None, 1),
}


# --- correctors -------------------------------------------------------------------------------------------------------


def langevin(path, times, snr):
    """Langevin dynamics with a step size from the ratio of norms (Song et al. 2021, algorithms 4 and 5)."""
    return [LangevinStage(*row, snr=snr) for row in _rows(times, path.alpha(times), path.sigma(times))]


def annealed_langevin(path, times, snr):
    """Annealed Langevin dynamics (Song & Ermon 2019): the step size 2 (snr sigma)^2 follows the noise level."""
    kept, rows = 1 - 2 * snr**2, _rows(times, 2 * snr**2 * path.alpha(times), 2 * snr * path.sigma(times))
    return [LinearStage(t, kept, (denoised,), noise=noise, corrects=True) for t, denoised, noise in rows]


CORRECTORS = {"langevin": langevin, "annealed_langevin": annealed_langevin}


# --- plans ------------------------------------------------------------------------------------------------------------


def plan(path, times, predictor, *, denoise_final, eta=None, corrector=None, corrector_steps=1, corrector_snr=0.16):
    """The stages that carry a sample along `times`, a list with one entry per network evaluation.

    Args:
        times: falling times, a float64 tensor; the network is evaluated at each but the last one reached.
        predictor: a key of PREDICTORS, with its noise `eta` or None for its own default.
        denoise_final: the evaluation at the last of the times returns the denoised sample (the mean of x0). Otherwise
            the trajectory stops at the last of the times, with its noise in it.
        corrector: a key of CORRECTORS or None; `corrector_steps` of it follow each predictor step.

    Raises ValueError when a coefficient is not finite, which happens where the predictor divides by alpha(1) = 0.
    """
    row = PREDICTORS[predictor]
    eta = row.eta if eta is None else eta
    steps = row.stages(path, times, eta)
    if corrector is not None:
        corrections = CORRECTORS[corrector](path, times[1:], corrector_snr)
        steps = [step + [correction] * corrector_steps for step, correction in zip(steps, corrections, strict=True)]
    stages = [stage for step in steps for stage in step]
    if denoise_final:
        stages.append(LinearStage(float(times[-1]), sample=0.0, denoised=(1.0,)))
    for stage in stages:
        if not all(map(math.isfinite, stage.coefficients)):
            raise ValueError(
                f"predictor {predictor!r} is singular at t = {stage.t_eval:g} on {type(path).__name__}, where "
                f"alpha = {float(path.alpha(stage.t_eval)):g}: pass t_max={path.t_max:g}, or use another predictor"
            )
    return stages
