"""Solvers with the exact score: declared orders, exact means and covariances, plans."""

import math

import pytest
import torch
from exact import GAUSSIAN, MIXTURE
from test_paths import PATHS, every_path

from score_sde.paths import VPSDE, LinearSDE
from score_sde.solvers import CORRECTORS, PREDICTORS, LangevinStage, Memory, plan


def ends(path):
    """A stretch of time over which every path goes from mostly noise to mostly data of unit size."""
    return (0.04, 0.01) if path is PATHS["edm"] else (0.9, 0.1)


def solve(path, times, data, x, predictor, **arguments):
    stages = plan(path, times, predictor, **{"to_data": False} | arguments)
    memory = Memory(stages)
    generator = torch.Generator().manual_seed(0)
    for stage in stages:
        denoised = data.denoised(x, path, torch.tensor(stage.t_eval, dtype=torch.float64))
        x = stage.update(x, denoised, memory, lambda x=x: torch.randn(x.shape, generator=generator, dtype=x.dtype))
    return x


def line(start, end, n):
    return torch.linspace(start, end, n + 1, dtype=torch.float64)


def with_start(times, order):
    """The times, begun by steps so short that a multistep solver's first ones, of orders 1, 2, ..., don't show."""
    parts = [(1 / len(times)) ** (order / (k + 1) - 1) for k in range(1, order - 1)]
    early = times[0] + (times[1] - times[0]) * torch.tensor(parts, dtype=torch.float64)
    return torch.cat([times[:1], early, times[1:]])


def start(path, t, data, n):
    generator = torch.Generator().manual_seed(1)
    x0 = data.sample(n, generator)
    return path.sample(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), torch.tensor(t))


def slope(sizes, errors):
    """Order of convergence: minus the slope of log error over log n between the two finest runs."""
    return math.log(errors[-2] / errors[-1]) / math.log(sizes[-1] / sizes[-2])


ODE_PREDICTORS = [name for name, row in PREDICTORS.items() if row.order is not None]
STOCHASTIC = [("ancestral", None), ("ddim", 0.5), ("euler_maruyama", None), ("euler_maruyama", 0.5)]
STOCHASTIC += [("reverse_diffusion", None)]


# --- deterministic ------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("predictor", ODE_PREDICTORS)
def test_order_on_the_exact_flow_of_a_gaussian(path, predictor):
    (begin, end), sizes, declared = ends(path), (64, 256), PREDICTORS[predictor].order
    x = start(path, begin, GAUSSIAN, 16)
    exact = GAUSSIAN.flow(x, path, begin, end)
    grids = [with_start(line(begin, end, n), declared) for n in sizes]
    errors = [(solve(path, grid, GAUSSIAN, x, predictor) - exact).abs().max() for grid in grids]
    assert declared - 0.6 < slope(sizes, errors) < declared + 1
    assert errors[-1] < 0.3**declared


@pytest.mark.parametrize("path", [PATHS["vp"], PATHS["ve"], PATHS["linear_flow"]], ids=["vp", "ve", "linear"])
@pytest.mark.parametrize("predictor", ODE_PREDICTORS)
def test_order_on_a_mixture(path, predictor):
    (begin, end), sizes = ends(path), (32, 256)
    x = start(path, begin, MIXTURE, 64)
    reference = solve(path, line(begin, end, 1024), MIXTURE, x, "rk4")
    declared = PREDICTORS[predictor].order
    grids = [with_start(line(begin, end, n), declared) for n in sizes]
    # the median: single samples near the border of two modes converge late
    errors = [(solve(path, grid, MIXTURE, x, predictor) - reference).abs().median().item() for grid in grids]
    assert slope(sizes, errors) > declared - 0.6


# --- stochastic ---------------------------------------------------------------------------------------------------


def gaussian_moments(path, stages, begin):
    """Mean and variances of the samples of a plan of linear, single-stage updates, in closed form."""
    mean, variance = GAUSSIAN.noised(path, begin)
    (mean_0,), (variance_0,) = GAUSSIAN.means, GAUSSIAN.variances
    for stage in stages:
        alpha, sigma = path.alpha(stage.t_eval), path.sigma(stage.t_eval)
        # the denoised sample is gain x + offset
        gain = alpha * variance_0 / (alpha**2 * variance_0 + sigma**2)
        offset = mean_0 - gain * alpha * mean_0
        (weight,) = stage.denoised
        factor = stage.samples[0] + weight * gain
        mean, variance = factor * mean + weight * offset, factor**2 * variance + stage.noise**2
    return mean, variance


@every_path
@pytest.mark.parametrize(("predictor", "eta"), STOCHASTIC)
@pytest.mark.parametrize("corrector", [None, "annealed_langevin"])
def test_exact_mean_and_covariance_in_the_limit(path, predictor, eta, corrector):
    (begin, end), sizes, errors = ends(path), (128, 256, 512), []
    exact_mean, exact_variance = GAUSSIAN.noised(path, end)
    for n in sizes:
        # a corrector whose step shrinks with the grid leaves the limit alone
        arguments = {"eta": eta, "corrector": corrector, "corrector_snr": n**-0.5}
        stages = plan(path, line(begin, end, n), predictor, to_data=False, **arguments)
        mean, variance = gaussian_moments(path, stages, begin)
        errors.append(max((mean - exact_mean).abs().max(), (variance / exact_variance - 1).abs().max()))
    assert errors[-1] < 0.06
    assert slope(sizes, errors) > 0.8


@pytest.mark.parametrize("path", [PATHS["vp"], PATHS["subvp"], PATHS["ve"]], ids=["vp", "subvp", "ve"])
def test_langevin_corrector_pulls_towards_the_marginal(path):
    """Song's corrector, on samples whose spread is wrong: many steps at fixed t bring it back.

    A step size that follows each sample's own norms gives the radius the density of two more dimensions, and its noise
    as much again: to first order the variance settles at 1 + 4 / D + snr^2 times the marginal's.
    """
    t, dimensions, n = 0.3, 64, 512
    data = type(GAUSSIAN)([1.0], torch.full((1, dimensions), 0.5), torch.full((1, dimensions), 0.8))
    mean, variance = data.noised(path, t)
    generator = torch.Generator().manual_seed(0)
    x = mean + 1.5 * variance.sqrt() * torch.randn(n, dimensions, generator=generator, dtype=torch.float64)
    [stage] = CORRECTORS["langevin"](path, torch.tensor([t], dtype=torch.float64), 0.1)
    for _ in range(250):
        x = stage.update(
            x,
            data.denoised(x, path, torch.tensor(t)),
            None,
            lambda: torch.randn(n, dimensions, generator=generator, dtype=torch.float64),
        )
    standard_error = (2 / (n * dimensions)) ** 0.5
    expected = 1 + 4 / dimensions + 0.1**2
    assert abs((x - mean).var() / variance.mean() - expected) < 4 * standard_error
    assert ((x - mean).mean() / variance.mean().sqrt()).abs() < 5 / (n * dimensions) ** 0.5 + 0.01


def test_annealed_langevin_has_its_exact_stationary_variance():
    path, t, snr = VPSDE(), 0.3, 0.2
    [stage] = CORRECTORS["annealed_langevin"](path, torch.tensor([t], dtype=torch.float64), snr)
    _, variance = gaussian_moments(path, [stage] * 2000, t)
    _, target = GAUSSIAN.noised(path, t)
    # x <- (1 - h / v) x + sqrt(2 h) z has the variance v / (1 - h / (2 v))
    step = 2 * (snr * path.sigma(t)) ** 2
    assert ((variance - target / (1 - step / (2 * target))).abs() / target).max() < 1e-9


def test_langevin_steps_are_per_sample():
    stage = LangevinStage(t_eval=0.5, alpha=0.8, sigma=0.6, snr=0.16)
    generator = torch.Generator().manual_seed(0)
    x, denoised, noise = torch.randn(3, 4, 5, 5, generator=generator).unbind(0)
    together = stage.update(x, denoised, None, lambda: noise)
    for i in range(4):
        alone = stage.update(x[i : i + 1], denoised[i : i + 1], None, lambda i=i: noise[i : i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-5
    # Song et al. 2021, algorithm 5: step size 2 (snr |z| / |score|)^2
    score = (0.8 * denoised[0] - x[0]) / 0.36
    step = 2 * (0.16 * noise[0].norm() / score.norm()) ** 2
    expected = x[0] + step * score + (2 * step).sqrt() * noise[0]
    assert (together[0] - expected).abs().max() < 1e-5


def test_langevin_stands_still_where_the_score_is_zero():
    stage = LangevinStage(t_eval=0.5, alpha=1.0, sigma=0.6, snr=0.16)
    x = torch.ones(2, 3)
    assert torch.equal(stage.update(x, x, None, lambda: torch.randn(2, 3)), x)


# --- plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("corrector", [None, *CORRECTORS])
def test_a_plan_has_one_stage_per_evaluation(predictor, corrector):
    times = line(1.0, 0.1, 6)
    arguments = {"corrector": corrector, "corrector_steps": 2}
    evaluations = PREDICTORS[predictor].evaluations + (2 if corrector else 0)
    assert len(plan(VPSDE(), times, predictor, to_data=False, **arguments)) == 6 * evaluations
    stages = plan(VPSDE(), times, predictor, to_data=True, **arguments)
    assert len(stages) == 6 * evaluations + 1


@pytest.mark.parametrize("predictor", ["heun", "dpmpp_2m", "ddim"])
def test_straight_solvers_are_exact_for_a_single_data_point(predictor):
    """One data point: the flow is a straight line in (9), which these solvers follow exactly in one step."""
    point = type(GAUSSIAN)([1.0], [[0.7, -0.3]], [[0.0, 0.0]])
    for path in PATHS.values():
        begin, end = ends(path)
        x = start(path, begin, point, 4)
        exact = point.flow(x, path, begin, end)
        assert (solve(path, line(begin, end, 3), point, x, predictor) - exact).abs().max() < 1e-9


def test_singular_plans_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'euler_maruyama' is singular at t = 1 on LinearSDE.*t_max=0.999"):
        plan(LinearSDE(), line(1.0, 0.1, 4), "euler_maruyama", to_data=False)
