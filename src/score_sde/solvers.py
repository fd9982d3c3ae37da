"""Solvers of the reverse process, as plans of stages.

A plan is a list of stages, one per network evaluation. Its numbers are worked out once, in float64, before sampling; a
stage then only combines tensors. The equation numbers are those of `paths`.

A predictor is a function (path, times, i, eta) -> the stages that lead from times[i] to times[i + 1]; adding a solver
is adding one such function and its row in PREDICTORS. A corrector is a function (path, t, snr) -> one stage that keeps
the marginal at t.
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


def _numbers(*values):
    return tuple(float(value) for value in values)


def euler(path, times, i, eta):
    """Euler in t on the probability-flow ODE: x + (s - t) velocity, Eq. (8)."""
    return euler_maruyama(path, times, i, 0.0)


def euler_maruyama(path, times, i, eta):
    """Euler-Maruyama on the reverse SDE with noise eta g, Eq. (8): the step is the grid's own."""
    t, s = times[i], times[i + 1]
    alpha, sigma = path.alpha(t), path.sigma(t)
    # velocity = sigma'/sigma x + (alpha' - sigma'/sigma alpha) x0;   -score = x / sigma^2 - alpha / sigma^2 x0
    growth = path.sigma_prime(t) / sigma
    stiffness = noise = 0.0
    if eta:
        stiffness = eta**2 * path.diffusion(t) ** 2 / (2 * sigma**2)
        noise = eta * path.diffusion(t) * (t - s).sqrt()
    sample = 1 + (s - t) * (growth + stiffness)
    denoised = (s - t) * (path.alpha_prime(t) - (growth + stiffness) * alpha)
    return [LinearStage(float(t), float(sample), _numbers(denoised), noise=float(noise))]


def reverse_diffusion(path, times, i, eta):
    """The forward SDE's own discretisation, reversed: (2 - A) x + B^2 score + B z (Song et al. 2021, Eq. 46), with the
    exact transition (A, B) of Eq. (4): DDPM's sqrt(1 - beta_i), sqrt(beta_i) on a discrete path."""
    t, s = times[i], times[i + 1]
    scale, std = path.transition(s, t)
    pull = std**2 / path.sigma(t) ** 2
    return [LinearStage(float(t), float(2 - scale - pull), _numbers(pull * path.alpha(t)), noise=float(std))]


def ddim(path, times, i, eta):
    """The posterior with x0 replaced by the denoised sample, Eq. (5): DDIM for eta = 0, DDPM's ancestral step for 1."""
    t, s = times[i], times[i + 1]
    c_x, c_0, std = path.posterior(t, s, eta)
    return [LinearStage(float(t), float(c_x), _numbers(c_0), noise=float(std))]


def heun(path, times, i, eta):
    """The trapezoid rule in the straight coordinates, Eq. (9): Heun's method (Karras et al. 2022, algorithm 1)."""
    t, s = times[i], times[i + 1]
    (c_t, sigma_t), (c_s, sigma_s) = [(path.alpha(r) + path.straight * path.sigma(r), path.sigma(r)) for r in (t, s)]
    scale, half_step = c_s / c_t, c_s * (sigma_s / c_s - sigma_t / c_t) / 2
    to_s = LinearStage(float(t), float(scale + 2 * half_step / sigma_t), _numbers(-2 * half_step * c_t / sigma_t))
    average = LinearStage(
        float(s),
        sample=float(half_step / sigma_s),
        denoised=_numbers(-half_step * c_s / sigma_s, -half_step * c_t / sigma_t),
        start=float(scale + half_step / sigma_t),
        first=False,
    )
    return [to_s, average]


def dpmpp_2m(path, times, i, eta):
    """DPM-Solver++(2M), the midpoint form of diffusers (Lu et al. 2022, algorithm 2): exact in the linear term, the
    denoised sample extrapolated linearly in lambda from the two latest evaluations."""
    [first_order] = ddim(path, times, i, 0.0)
    if i == 0:
        return [first_order]
    before, t, s = [path.half_log_snr(times[j]) for j in (i - 1, i, i + 1)]
    # D_0 + (s - t) / (t - before) / 2 (D_0 - D_1); the first ratio is 0 where `before` has no signal at all
    extrapolation = (s - t) / (t - before) / 2
    (c_0,) = first_order.denoised
    weights = _numbers(c_0 * (1 + extrapolation), -c_0 * extrapolation)
    return [LinearStage(first_order.t_eval, first_order.sample, weights)]


class Predictor(NamedTuple):
    """A row of PREDICTORS: the function, its order of convergence (None for the stochastic ones, whose mean and
    covariance converge), network evaluations per time step, and the noise eta it uses unless told otherwise (None for
    a solver that has none)."""

    stages: Callable
    order: int | None
    evaluations: int
    eta: float | None


PREDICTORS = {
    "euler": Predictor(euler, 1, 1, None),
    "heun": Predictor(heun, 2, 2, None),
    "dpmpp_2m": Predictor(dpmpp_2m, 2, 1, None),
    "ddim": Predictor(ddim, 1, 1, 0.0),
    "ancestral": Predictor(ddim, None, 1, 1.0),
    "euler_maruyama": Predictor(euler_maruyama, None, 1, 1.0),
    "reverse_diffusion": Predictor(reverse_diffusion, None, 1, None),
}


# --- correctors -------------------------------------------------------------------------------------------------------


def langevin(path, t, snr):
    """Langevin dynamics with a step size from the ratio of norms (Song et al. 2021, algorithms 4 and 5)."""
    return LangevinStage(float(t), float(path.alpha(t)), float(path.sigma(t)), snr)


def annealed_langevin(path, t, snr):
    """Annealed Langevin dynamics (Song & Ermon 2019): the step size 2 (snr sigma)^2 follows the noise level."""
    return LinearStage(
        float(t),
        sample=1 - 2 * snr**2,
        denoised=_numbers(2 * snr**2 * path.alpha(t)),
        noise=float(2 * snr * path.sigma(t)),
        corrects=True,
    )


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
    stages = []
    for i in range(len(times) - 1):
        stages += row.stages(path, times, i, eta)
        if corrector is not None:
            stages += [CORRECTORS[corrector](path, times[i + 1], corrector_snr)] * corrector_steps
    if denoise_final:
        stages.append(LinearStage(float(times[-1]), sample=0.0, denoised=(1.0,)))
    for stage in stages:
        if not all(map(math.isfinite, stage.coefficients)):
            raise ValueError(
                f"predictor {predictor!r} is singular at t = {stage.t_eval:g} on {type(path).__name__}, where "
                f"alpha = {float(path.alpha(stage.t_eval)):g}: pass t_max={path.t_max:g}, or use another predictor"
            )
    return stages
