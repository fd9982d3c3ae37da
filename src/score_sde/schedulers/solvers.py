"""Solvers of the reverse process, as plans of stages.

A plan is a list of stages, one per network evaluation. Its numbers are worked out once, in float64, before sampling; a
stage then only combines tensors. The equation numbers are those of `paths`; c, u are the straight coordinates (9) and
kappa = sigma / alpha = exp(-lambda).

A predictor is a row of PREDICTORS. Its stages come from one function, of one of two kinds, which is also given the
options that the row names (`eta` and the like), by name:
    single-step: (path, t, s) -> for each start t and end s, the stages of that step;
    multistep: (path, times, to_data) -> for each of the falling times, the stages of the step that begins there.
A corrector is a function (path, times, snr) -> for each of the times, one stage that keeps its marginal.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch

from .checks import check_choice, check_number
from .paths import expand_to


Stage: TypeAlias = "LinearStage | LangevinStage"


class Memory:
    """What a trajectory remembers between the predictor's stages: the samples at which the network was evaluated and
    the denoised samples that it returned, newest first."""

    def __init__(self, stages=()):
        linear = [stage for stage in stages if isinstance(stage, LinearStage)]
        history = max((max(len(stage.samples), len(stage.denoised)) for stage in linear), default=1)
        self.samples = deque(maxlen=history)
        self.denoised = deque(maxlen=history)


@dataclass(frozen=True)
class LinearStage:
    """x <- sum_k samples[k] X_k + sum_k denoised[k] D_k + noise z.

    X_0 is the sample of this evaluation and D_0 its denoised sample, X_k and D_k those of the k-th evaluation before
    it, z standard normal noise. `corrects` marks a corrector's stage, whose evaluation predictors don't see.

    With `noise_range`, the logarithms of two standard deviations, the network chooses the one of z between them by
    the values in [-1, 1] that it learned (Nichol & Dhariwal 2021, Eq. 15).

    Of a network that maps along the ODE, `t_to` is the time that it is told to lead to, 0 for as near to clean data as
    it was trained, None for t_eval itself; with `at_end` the D_0 of this stage is the sample x_(t_to) there.
    """

    t_eval: float
    samples: tuple[float, ...]
    denoised: tuple[float, ...]
    noise: float = 0.0
    noise_range: tuple[float, float] | None = None
    corrects: bool = False
    t_to: float | None = None
    at_end: bool = False

    @property
    def coefficients(self):
        return (*self.samples, *self.denoised, self.noise, *(self.noise_range or ()))

    def update(self, x, denoised, memory: Memory, draw_noise: Callable, variance=None):
        if self.corrects:
            past_samples, past_denoised = [x], [denoised]
        else:
            memory.samples.appendleft(x)
            memory.denoised.appendleft(denoised)
            past_samples, past_denoised = memory.samples, memory.denoised
        # a plan that begins here asks for no past
        terms = [*zip(self.samples, past_samples, strict=False), *zip(self.denoised, past_denoised, strict=False)]
        (first, value), *more = [term for term in terms if term[0]]
        out = first * value
        for coefficient, value in more:
            out = torch.add(out, value, alpha=coefficient)
        if self.noise_range is not None:
            small, large = self.noise_range
            return out + (small + (variance + 1) / 2 * (large - small)).exp() * draw_noise()
        return torch.add(out, draw_noise(), alpha=self.noise) if self.noise else out


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
    noise_range = None
    t_to = None
    at_end = False

    @property
    def coefficients(self):
        return (self.alpha, self.sigma, self.snr)

    def update(self, x, denoised, memory: Memory, draw_noise: Callable, variance=None):
        noise = draw_noise()
        score = (self.alpha * denoised - x) / self.sigma**2
        score_norm, noise_norm = score.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1)
        root = torch.where(score_norm > 0, self.snr * noise_norm / score_norm, 0.0)  # sqrt(step size / 2)
        return x + expand_to(2 * root**2, x) * score + expand_to(2 * root, x) * noise


def _rows(*columns):
    """The numbers of several tensors, one tuple per time step."""
    return zip(*(column.tolist() for column in columns), strict=True)


# --- single-step predictors -------------------------------------------------------------------------------------------


def euler(path, t, s):
    """Euler in t on the probability-flow ODE: x + (s - t) velocity, Eq. (8)."""
    return euler_maruyama(path, t, s, 0.0)


def euler_maruyama(path, t, s, eta=1.0):
    """Euler-Maruyama on the reverse SDE with noise eta g, Eq. (8): the step is the grid's own."""
    step, (of_x, of_x0) = s - t, path.reverse_coefficients(t, eta)
    noise = eta * path.diffusion(t) * (-step).sqrt() if eta else torch.zeros_like(t)
    rows = _rows(t, 1 + step * of_x, step * of_x0, noise)
    return [[LinearStage(time, (sample,), (denoised,), std)] for time, sample, denoised, std in rows]


def reverse_diffusion(path, t, s):
    """The forward SDE's own discretisation, reversed: (2 - A) x + B^2 score + B z (Song et al. 2021, Eq. 46), with the
    exact transition (A, B) of Eq. (4): DDPM's sqrt(1 - beta_i), sqrt(beta_i) on a discrete path."""
    scale, std = path.transition(s, t)
    pull = std**2 / path.sigma(t) ** 2
    rows = _rows(t, 2 - scale - pull, pull * path.alpha(t), std)
    return [[LinearStage(time, (sample,), (denoised,), std)] for time, sample, denoised, std in rows]


def ddim(path, t, s, eta=0.0):
    """The posterior with x0 replaced by the denoised sample, Eq. (5): DDIM for eta = 0, DDPM's ancestral step for 1."""
    rows = _rows(t, *path.posterior(t, s, eta))
    return [[LinearStage(time, (c_x,), (c_0,), std)] for time, c_x, c_0, std in rows]


VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def ancestral(path, t, s, variance_type="fixed_small"):
    """Draw from the posterior with x0 replaced by the denoised sample: `ddim` with eta = 1 (Ho et al. 2020).

    The noise has the posterior's standard deviation (fixed_small), the transition's (fixed_large), or one between them
    that the network learned (learned_range).
    """
    _, large = path.transition(s, t)
    steps = ddim(path, t, s, 1.0)
    if variance_type == "fixed_large":
        return [[replace(stage, noise=std)] for [stage], std in zip(steps, large.tolist(), strict=True)]
    if variance_type == "learned_range":
        ranges = [(math.log(stage.noise), math.log(std)) for [stage], std in zip(steps, large.tolist(), strict=True)]
        return [[replace(stage, noise_range=both)] for [stage], both in zip(steps, ranges, strict=True)]
    return steps


def runge_kutta(path, t, s, *, tableau):
    """An explicit Runge-Kutta method in the straight coordinates, Eq. (9).

    `tableau` holds after each evaluation the weights of the slopes so far; their sum is the fraction of the step at
    which the next evaluation stands, 1 for the last row, which leads to s.
    """
    (c_t, u_t), (c_s, u_s) = path.straight_coordinates(t), path.straight_coordinates(s)
    times, c, columns = [t], [c_t], []
    for i, weights in enumerate(tableau):
        fraction = sum(weights)
        inside = fraction < 1 and i + 1 < len(tableau)
        times.append(path.t_from_straight(u_t + fraction * (u_s - u_t)) if inside else s)
        c.append(path.straight_coordinates(times[-1])[0] if inside else c_s)
        # newest first; the slope of evaluation j is (X_j - c_j D_j) / sigma_j
        slopes = [c[-1] * (u_s - u_t) * weights[j] / path.sigma(times[j]) for j in range(i, -1, -1)]
        samples = [*slopes[:-1], slopes[-1] + c[-1] / c_t]
        denoised = [-slope * scale for slope, scale in zip(slopes, c[-2::-1], strict=True)]
        columns.append([times[i], *samples, *denoised])
    stages = (
        [LinearStage(time, tuple(rest[: i + 1]), tuple(rest[i + 1 :])) for time, *rest in _rows(*column)]
        for i, column in enumerate(columns)
    )
    return [list(step) for step in zip(*stages, strict=True)]


HEUN = ((1.0,), (1 / 2, 1 / 2))
RK4 = ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def dpmpp_single(path, t, s, *, order):
    """DPM-Solver++, single-step: evaluations at equal parts of the step in lambda, each stage an exponential integrator
    through the start and the newest evaluation (Lu et al. 2022b, algorithm 1; 2022a, algorithm 2, for order 3)."""
    begin, end = path.half_log_snr(t), path.half_log_snr(s)
    times = [t, *(path.t_from_half_log_snr(begin + i / order * (end - begin)) for i in range(1, order)), s]
    steps = ddim(path, t, times[1], 0.0)
    for i in range(1, order):
        levels = torch.stack([path.half_log_snr(time) for time in (times[i], t, times[i + 1])], dim=1)
        points, measure = _denoised_measure(begin, levels[:, 2], 1.0)
        weights = path.alpha(times[i + 1])[:, None] * _integrate(measure, points, levels[:, :2])
        if order == 2:
            # all of it at the middle
            weights = torch.stack([weights.sum(1), torch.zeros_like(begin)], dim=1)
        scale, *_ = path.posterior(t, times[i + 1], 0.0)
        past = (0.0,) * (i - 1)
        for stages, row in zip(steps, _rows(times[i], scale, *weights.unbind(1)), strict=True):
            time, factor, newest, oldest = row
            stages.append(LinearStage(time, (0.0, *past, factor), (newest, *past, oldest)))
    return steps


# --- multistep predictors ---------------------------------------------------------------------------------------------


def multistep(
    path,
    times,
    to_data,
    eta=0.0,
    *,
    order,
    rises=(),
    slope=None,
    bound=None,
    corrected=False,
    halves=False,
    lower_final=False,
):
    """Exponential integrators through past evaluations: the linear term is exact, the rest a polynomial.

    With q the denoised sample (slope None), and for the noise of the reverse SDE, rho = 1 + eta^2, h = lambda_s -
    lambda_t, the step is (DPM-Solver++, Lu et al. 2022b; with eta SA-Solver, Xue et al. 2023)

        x_s = sigma_s / sigma_t e^(-eta^2 h) x_t + sum_j W_j q_j + sigma_s sqrt(1 - e^(-2 eta^2 h)) z,
        W_j = alpha_s int rho e^(-rho (lambda_s - lambda)) L_j dlambda.

    With q = (x - c x0) / sigma, the slope (9) in the coordinates c = alpha + slope sigma, it is (DEIS, Zhang & Chen
    2023, for slope 0, where q is the noise)

        x_s = c_s (x_t / c_t + sum_j W_j q_j),   W_j = int L_j du.

    L_j are the Lagrange polynomials of the evaluations' places. The integrals are exact to rounding.

    Args:
        order: number of evaluations in the polynomial; the first steps have fewer.
        rises: values of lambda, rising; a step that begins below one of them has one evaluation less for it. At high
            noise a guided field bends most, and low orders with a corrector stay stable there.
        bound: polynomials in kappa / (kappa + bound), for which the step to clean data is an ordinary step, but with
            eta: it reaches many steps' lengths beyond the last evaluations, and would enlarge what noise changed
            between them, so it falls to order 1. None for polynomials in lambda, in which that step is infinite and
            falls to order 1, too.
        corrected: evaluations also correct the step that led to them, at no cost (UniC, Zhao et al. 2023).
        halves: weigh two evaluations as the midpoint rule does, which is DPM-Solver++(2M) and UniPC (bh2) of order 2,
            instead of integrating their polynomial.
        lower_final: the order falls to 1 over the last steps to clean data.
    """
    alpha, sigma = path.alpha(times), path.sigma(times)
    if to_data:
        alpha, sigma = torch.cat([alpha, torch.ones(1).to(alpha)]), torch.cat([sigma, torch.zeros(1).to(sigma)])
    half_log_snr = alpha.log() - sigma.log()
    place = half_log_snr if bound is None else torch.sigmoid(-half_log_snr - math.log(bound))
    h, n = half_log_snr.diff(), len(alpha) - 1
    if slope is None:
        scale, factor = sigma[1:] / sigma[:-1], alpha[1:]
        points, measure = _denoised_measure(half_log_snr[:-1], half_log_snr[1:], 1 + eta**2)
        if eta:
            scale = scale * torch.exp(-(eta**2) * h)
    else:
        c, u = path.straight_coordinates(times, slope)
        if to_data:
            c, u = torch.cat([c, torch.ones(1).to(c)]), torch.cat([u, torch.zeros(1).to(u)])
        scale, factor = c[1:] / c[:-1], c[1:]
        points, measure = _slope_measure(half_log_snr, u, slope)
    noise = sigma[1:] * (-torch.expm1(-2 * eta**2 * h)).sqrt() if eta else torch.zeros_like(h)
    if bound is not None:
        points = torch.sigmoid(-points - math.log(bound))

    # number of evaluations in each step's polynomial
    step = torch.arange(n)
    grown = sum(half_log_snr[:-1] >= rise for rise in rises) if rises else 0
    size = torch.minimum(step + 1, torch.as_tensor(order - len(rises) + grown))
    if lower_final and to_data:
        size = torch.minimum(size, n - step)
    if eta and to_data:
        size[-1] = 1
    if bound is None:
        size = size - (torch.isinf(place[0]) & (size > step) & (step > 0)).long()
        size[torch.isinf(h)] = 1

    def weights(of, nodes):
        """W_j of these steps, for polynomials through these evaluations (a row of indices for each)."""
        return factor[of, None] * _integrate(measure[of], points[of], place[nodes])

    # what each step makes of q, newest evaluation first, and what the evaluation at its end adds to that
    made, added = torch.zeros(n, order + 1).to(alpha), torch.zeros(n, order + 1).to(alpha)
    for k in range(1, order + 1):
        of = step[size == k]
        past = of[:, None] - torch.arange(k)
        made[of, :k] = weights(of, past)
        if halves and k == 2:
            ahead = made[of, :2].sum(1) * h[of] / h[of - 1] / 2
            made[of, :2] = torch.stack([made[of, :2].sum(1) + ahead, -ahead], dim=1)
        if corrected:
            # the last step's end is not evaluated, and no polynomial in lambda passes through lambda = -inf
            of = of[(of < n - 1) & (torch.isfinite(place[of - k + 1]))]
            new = weights(of, of[:, None] + 1 - torch.arange(k + 1))
            if halves and k == 1:
                new = new.sum(1, keepdim=True).expand(-1, 2) / 2
            added[of, : k + 1] = new
            added[of, 1 : k + 1] -= made[of, :k]
    made[1:] += scale[1:, None] * added[:-1]

    # evaluations before the first have no weight
    evaluation = (step[:, None] - torch.arange(order + 1)).clamp_min(0)
    if slope is None:
        samples, denoised = torch.zeros(n, 1).to(made), made
    else:
        samples, denoised = made / sigma[evaluation], -made * c[evaluation] / sigma[evaluation]
    samples[:, 0] += scale
    rows = zip(times.tolist(), samples.tolist(), denoised.tolist(), noise.tolist(), strict=False)
    return [[LinearStage(time, tuple(x), tuple(x0), std)] for time, x, x0, std in rows]


def _gauss_legendre(n):
    """Nodes and weights on [0, 1] (Golub & Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    off_diagonal = torch.diag(k / (4 * k**2 - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(off_diagonal + off_diagonal.T)
    return (nodes + 1) / 2, vectors[0] ** 2


NODES, WEIGHTS = _gauss_legendre(64)


def _denoised_measure(begin, end, rho):
    """Points lambda (n, 64) and weights of the integrals of rho e^(-rho (end - lambda)) from begin to end."""
    h = (end - begin)[:, None]
    inside = end[:, None] - h * NODES
    measure = h * WEIGHTS * rho * torch.exp(-rho * h * NODES)
    # in v = e^(-rho (end - lambda)) where an end is infinite
    v_begin = torch.exp(-rho * h)
    v = v_begin + (1 - v_begin) * NODES
    finite = torch.isfinite(h)
    points = torch.where(finite, inside, end[:, None] + v.log() / rho)
    return points, torch.where(finite, measure, (1 - v_begin) * WEIGHTS)


def _slope_measure(half_log_snr, u, slope):
    """Points lambda (n, 64) and weights of the integrals over u between neighbouring levels."""
    h, du = half_log_snr.diff()[:, None], u.diff()[:, None]
    inside = half_log_snr[:-1, None] + h * NODES
    kappa = torch.exp(-inside)
    measure = -h * WEIGHTS * kappa / (1 + slope * kappa) ** 2
    # in u where an end is infinite
    u = u[:-1, None] + du * NODES
    finite = torch.isfinite(h)
    points = torch.where(finite, inside, (1 - slope * u).log() - u.log())
    return points, torch.where(finite, measure, du * WEIGHTS)


def _integrate(measure, points, places):
    """Integrals (n, k) of the Lagrange polynomials through places (n, k), by points and measure (n, 64)."""
    k = places.shape[1]
    integrals = []
    for j in range(k):
        polynomial = torch.ones_like(points)
        for other in range(k):
            if other != j:
                gap = places[:, j, None] - places[:, other, None]
                polynomial = polynomial * (points - places[:, other, None]) / gap
        integrals.append((measure * polynomial).sum(1))
    return torch.stack(integrals, dim=1)


# --- maps -------------------------------------------------------------------------------------------------------------


def flow_map(path, times, to_data, gamma=0.0):
    """The way that a flow map leads: the straight line (9) along its mean velocity, which is the step of DDIM with the
    denoised sample that the network gives when it is told where to.

    With gamma it leads further, to the time (1 - gamma) s for a next time s, counted from where the trajectory ends, in
    whole levels on a discrete path; noise leads from there to s (Kim et al. 2024; Zheng et al. 2024).
    """
    t, s = times[:-1], times[1:]
    below = s
    if gamma:
        end = torch.zeros(1).to(times) if to_data else times[-1:]
        below = end + (1 - gamma) * (s - end)
        below = ((below * path.levels + 1e-6).floor() / path.levels).minimum(s) if path.levels else below
    (of_x, of_x0, _), (scale, std) = path.posterior(t, below, 0.0), path.transition(below, s)
    rows = _rows(t, scale * of_x, scale * of_x0, std, below)
    steps = [[LinearStage(time, (x,), (x0,), noise, t_to=to)] for time, x, x0, noise, to in rows]
    return steps + ([[LinearStage(float(times[-1]), (0.0,), (1.0,), t_to=0.0)]] if to_data else [])


def consistency(path, times, to_data, gamma=1.0):
    """Multi-step sampling of a consistency model, which leads to clean data, or to the last of the times: from there
    noise leads to the next time (Song et al. 2023, algorithm 1). With gamma below 1 the step goes on from the sample,
    as `flow_map` does, by the same network."""
    end = 0.0 if to_data else float(times[-1])
    if gamma < 1:
        return [[replace(stage, t_to=end)] for [stage] in flow_map(path, times, to_data, gamma)]
    t, s = times[:-1], times[1:]
    scale, std = (path.alpha(s), path.sigma(s)) if to_data else path.transition(end, s)
    rows = _rows(t, scale, std)
    steps = [[LinearStage(time, (0.0,), (x0,), noise, t_to=end, at_end=not to_data)] for time, x0, noise in rows]
    return steps + ([[LinearStage(float(times[-1]), (0.0,), (1.0,), t_to=0.0)]] if to_data else [])


# --- predictors -------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """An option of a predictor: its default, and the numbers from `least` to `largest`, or the `choices`, that it may
    be instead."""

    default: Any
    least: float = 0.0
    largest: float = math.inf
    choices: tuple[str, ...] = ()

    def check(self, name, value):
        """Raise ValueError, naming the value and what is allowed, unless it is allowed."""
        if self.choices:
            check_choice(name, value, self.choices)
        else:
            check_number(name, value, self.least, self.largest)


class Predictor(NamedTuple):
    """A row of PREDICTORS.

    stages: the function, of one of the two kinds.
    order: of convergence; None for the stochastic ones, whose mean and covariance converge.
    evaluations: of the network, per time step.
    options: {name: Option} that `stages` takes by name.
    around: {name: Option} of the noise that is added around a single-step ODE solver, which knows none itself.
    multistep: the kind of the function.
    maps: whether it is for networks that map along the ODE, and not for others.
    """

    stages: Callable
    order: int | None
    evaluations: int = 1
    options: dict[str, Option] = {}
    around: dict[str, Option] = {}
    multistep: bool = False
    maps: bool = False

    @property
    def takes(self):
        """{name: Option} of all of them."""
        return self.options | self.around


# amount of noise, in units of what keeps the marginals (Song et al. 2021b, Eq. 16)
UP_TO_ALL = {"eta": Option(0.0, largest=1.0)}
# in units of the reverse SDE's
ANY_AMOUNT = {"eta": Option(0.0, largest=1e3)}
# The noise that Karras et al. 2022 (algorithm 2) add before a step, in the noise levels kappa of x / alpha. Of N steps,
# those that begin between s_tmin and s_tmax begin at kappa (1 + min(s_churn / N, sqrt(2) - 1)) instead; the noise that
# leads there is s_noise times as large as it should be.
CHURN = {
    "s_churn": Option(0.0, largest=1e6),
    "s_tmin": Option(0.0, largest=1e6),
    "s_tmax": Option(math.inf),
    "s_noise": Option(1.0, least=1e-3, largest=1e3),
}


def _multistep(order, **fixed):
    return Predictor(
        partial(multistep, order=order, **fixed),
        # at the least, where it rises
        order - len(fixed.get("rises", ())) + fixed.get("corrected", False),
        options=ANY_AMOUNT if fixed.get("slope") is None else {},
        multistep=True,
    )


def _rising(*rises):
    return _multistep(4, rises=rises, slope=1.0, bound=1.0, corrected=True)


def _ode(stages, order, evaluations):
    return Predictor(stages, order, evaluations, around=UP_TO_ALL | CHURN)


def _nothing(path, t, s):
    return [[] for _ in t]


PREDICTORS = {
    "euler": Predictor(euler, 1, around=CHURN),
    "heun": _ode(partial(runge_kutta, tableau=HEUN), 2, 2),
    "rk4": _ode(partial(runge_kutta, tableau=RK4), 4, 4),
    "ddim": Predictor(ddim, 1, options=UP_TO_ALL),
    "dpmpp_2m": _multistep(2, halves=True),
    "dpmpp_3m": _multistep(3),
    "dpmpp_2s": _ode(partial(dpmpp_single, order=2), 2, 2),
    "dpmpp_3s": _ode(partial(dpmpp_single, order=3), 3, 3),
    "unipc_1": _multistep(1, corrected=True, halves=True, lower_final=True),
    "unipc_2": _multistep(2, corrected=True, halves=True, lower_final=True),
    "unipc_3": _multistep(3, corrected=True, halves=True, lower_final=True),
    "deis_1": _multistep(1, slope=0.0),
    "deis_2": _multistep(2, slope=0.0),
    "deis_3": _multistep(3, slope=0.0),
    "dpmpp_3b": _multistep(3, bound=2.2),
    "adams_1": _multistep(1, slope=1.0, bound=1.0, corrected=True),
    "adams_2": _multistep(2, slope=1.0, bound=1.0, corrected=True),
    "adams_3": _multistep(3, slope=1.0, bound=1.0, corrected=True),
    "adams_4": _multistep(4, slope=1.0, bound=1.0, corrected=True),
    "rising_1": _rising(0.75, 1.25, 3.25),
    "rising_2": _rising(-0.4, 0.75, 3.5),
    "rising_3": _rising(-2.2, 0.0, 1.0),
    "rising_4": _rising(-0.5, 0.5),
    "ancestral": Predictor(ancestral, None, options={"variance_type": Option("fixed_small", choices=VARIANCES)}),
    "euler_maruyama": Predictor(euler_maruyama, None, options={"eta": Option(1.0, largest=1e3)}),
    "reverse_diffusion": Predictor(reverse_diffusion, None),
    "none": Predictor(_nothing, None, evaluations=0),
    "flow_map": Predictor(flow_map, None, options={"gamma": Option(0.0, largest=1.0)}, multistep=True, maps=True),
    "consistency": Predictor(consistency, None, options={"gamma": Option(1.0, largest=1.0)}, multistep=True, maps=True),
}


def predictor_options(predictor, given):
    """All options of a predictor, {name: value}: those given, the defaults for the rest.

    Raises ValueError, naming what is allowed, for an option that the predictor doesn't have ("auto" has none), for a
    value that it can not take, and for options that contradict each other.
    """
    takes = PREDICTORS[predictor].takes if predictor in PREDICTORS else {}
    for name, value in given.items():
        if name not in takes:
            others = [other for other, row in PREDICTORS.items() if name in row.takes]
            known = f"those that do: {', '.join(others)}" if others else f"it takes {', '.join(takes) or 'none'}"
            raise ValueError(f"predictor {predictor!r} takes no {name} (got {value!r}); {known}")
        takes[name].check(name, value)
    options = {name: option.default for name, option in takes.items()} | given
    if options.get("s_tmin", 0.0) > options.get("s_tmax", math.inf):
        raise ValueError(f"s_tmin {options['s_tmin']} must be at most s_tmax {options['s_tmax']}")
    if options.get("s_churn") and options.get("eta"):
        raise ValueError(f"s_churn {options['s_churn']} does not go with eta {options['eta']}: leave out one of them")
    return options


class Rule(NamedTuple):
    """What predictor "auto" stands for from a number of steps on: a key of PREDICTORS and its logistic grid."""

    steps: int
    predictor: str
    center: float
    width: float
    tail: float


# Without guidance: chosen for the least error (median, and root mean square at half the weight) over mixtures of 64
# dimensions on the discrete_vp, ve and linear paths; from 12 steps on, over the targets of AUTOMATIC at scale 1.
UNGUIDED = [
    Rule(1, "dpmpp_3b", 0.65, 1.5, 1.25),
    Rule(8, "dpmpp_3b", 0.44, 1.63, 1.2),
    Rule(10, "adams_2", 0.4, 1.02, 0.55),
    Rule(12, "adams_3", 0.4, 1.1, 0.65),
    Rule(15, "adams_4", 0.4, 1.35, 0.6),
]
# the same where trajectories begin with little noise, sigma / alpha below 30, as with Stable Diffusion's betas: fields
# bend from the first steps on, where adams_4 has no past yet
LITTLE_NOISE = math.log(30)
UNGUIDED_FROM_LITTLE_NOISE = [
    *UNGUIDED[:4],
    Rule(15, "adams_3", 0.0, 1.35, 0.6),
    Rule(20, "rising_4", 0.0, 1.35, 0.6),
]
# With guidance, or where it isn't known: chosen on class-conditional mixtures with scales from 1 to 12, first for
# no diverged sample. benchmarks/README.md has the errors of both on other data, beside those of diffusers.
AUTOMATIC = [
    Rule(1, "adams_1", -1.4, 1.45, 0.9),
    Rule(6, "adams_1", -1.05, 1.45, 0.9),
    Rule(7, "adams_1", -0.75, 1.45, 0.9),
    Rule(10, "adams_1", -0.9, 1.45, 0.9),
    Rule(15, "rising_2", -1.05, 1.45, 0.9),
    Rule(18, "rising_3", -1.05, 1.45, 0.6),
    Rule(25, "rising_4", -1.05, 1.45, 0.6),
]
# on times that were not laid for it: no worse than Euler on any grid measured
ON_GIVEN_TIMES = "rising_1"


def automatic(n, guidance_scale=None, most_noise=math.inf):
    """The rule for n steps under a guidance scale, None where it isn't known, on a path whose log(sigma / alpha) ends
    at most_noise."""
    # few steps with little guidance also want the higher orders
    largest = 2.0 if n < 10 else 1.0
    rules = UNGUIDED if most_noise > LITTLE_NOISE else UNGUIDED_FROM_LITTLE_NOISE
    if guidance_scale is None or not 0 <= guidance_scale <= largest:
        rules = AUTOMATIC
    return max(rule for rule in rules if rule.steps <= n)


# --- correctors -------------------------------------------------------------------------------------------------------


def langevin(path, times, snr):
    """Langevin dynamics with a step size from the ratio of norms (Song et al. 2021, algorithms 4 and 5)."""
    return [LangevinStage(*row, snr=snr) for row in _rows(times, path.alpha(times), path.sigma(times))]


def annealed_langevin(path, times, snr):
    """Annealed Langevin dynamics (Song & Ermon 2019): the step size 2 (snr sigma)^2 follows the noise level."""
    kept, rows = 1 - 2 * snr**2, _rows(times, 2 * snr**2 * path.alpha(times), 2 * snr * path.sigma(times))
    return [LinearStage(t, (kept,), (denoised,), noise, corrects=True) for t, denoised, noise in rows]


CORRECTORS = {"langevin": langevin, "annealed_langevin": annealed_langevin}


# --- plans ------------------------------------------------------------------------------------------------------------


def _raised(path, times, steps, s_churn, s_tmin, s_tmax):
    """The times at which the steps begin with CHURN. The first step begins where the trajectory does."""
    half_log_snr = path.half_log_snr(times)
    kappa = torch.exp(-half_log_snr)
    inside = (s_tmin <= kappa) & (kappa <= s_tmax) & (torch.arange(len(times)) > 0)
    gamma = min(s_churn / steps, math.sqrt(2) - 1)
    return torch.where(inside, path.t_from_half_log_snr(half_log_snr - math.log1p(gamma)), times).clamp_max(times[0])


def _single_steps(row, path, times, to_data, own, eta=0.0, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """The steps of a single-step predictor along the times, with its own options, and the noise around an ODE solver
    as UP_TO_ALL and CHURN have it."""
    t, s = times, times[1:]
    if s_churn:
        t = _raised(path, times, len(times) if to_data else len(times) - 1, s_churn, s_tmin, s_tmax)
        if not to_data:
            t[-1] = times[-1]
    reached, target = s, t[1:]
    if eta:
        # down to a level from which noise of the posterior's standard deviation leads to s (k-diffusion's ancestral)
        *_, std = path.posterior(t[:-1], s, eta)
        level = -((path.sigma(s) ** 2 - std**2) / path.alpha(s) ** 2).log() / 2
        reached, target = torch.where(std > 0, path.t_from_half_log_snr(level), s).clamp_min(times[-1]), s
    steps = row.stages(path, t[:-1], reached, **own)
    scale, std = path.transition(reached, target)
    for step, factor, noise in zip(steps, scale.tolist(), (std * s_noise).tolist(), strict=True):
        if noise:
            last = step[-1]
            samples, denoised = (tuple(factor * each for each in part) for part in (last.samples, last.denoised))
            step[-1] = replace(last, samples=samples, denoised=denoised, noise=noise)
    if to_data:
        steps.append([LinearStage(float(t[-1]), (0.0,), (1.0,))])
    return steps


def plan(
    path,
    times,
    predictor,
    *,
    to_data,
    options=None,
    corrector=None,
    corrector_steps=1,
    corrector_snr=0.16,
    corrector_position="after",
) -> list[Stage]:
    """The stages that carry a sample along `times`, a list with one entry per network evaluation.

    Args:
        times: falling times, a float64 tensor; the network is evaluated at each but the last one reached.
        predictor: a key of PREDICTORS.
        to_data: a last step leads from the last of the times to clean data. Otherwise the trajectory stops at the last
            of the times, with its noise in it.
        options: of the predictor, {name: value}; its defaults for the rest.
        corrector: a key of CORRECTORS or None; `corrector_steps` of it follow each predictor step but the one to clean
            data (corrector_position "after"), or come before each step ("before").

    Raises ValueError when a coefficient is not finite, which happens where the predictor divides by alpha(1) = 0.
    """
    row, options = PREDICTORS[predictor], predictor_options(predictor, options or {})
    own = {name: value for name, value in options.items() if name in row.options}
    if row.multistep:
        steps = row.stages(path, times, to_data, **own)
    else:
        around = {name: value for name, value in options.items() if name in row.around}
        steps = _single_steps(row, path, times, to_data, own, **around)
    if corrector is not None:
        before = corrector_position == "before"
        corrections = CORRECTORS[corrector](path, times if before else times[1:], corrector_snr)
        for step, correction in zip(steps, corrections, strict=False):
            step[0 if before else len(step) : 0 if before else len(step)] = [correction] * corrector_steps
    stages = [stage for step in steps for stage in step]
    for stage in stages:
        if not all(map(math.isfinite, stage.coefficients)):
            raise ValueError(
                f"predictor {predictor!r} is singular at t = {stage.t_eval:g} on {type(path).__name__}, where "
                f"alpha = {float(path.alpha(stage.t_eval)):g}: pass t_max={path.t_max:g}, or use another predictor"
            )
    return stages
