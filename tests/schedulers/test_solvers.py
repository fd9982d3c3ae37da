"""Solvers with the exact score: declared orders, exact means and covariances, plans."""

import math

import pytest
import torch
from every_path import PATHS
from exact import GAUSSIAN, MIXTURE

from score_sde.schedulers.paths import VPSDE, DiscreteVPSDE, LinearSDE, time_grid
from score_sde.schedulers.solvers import (
    AUTOMATIC,
    CORRECTORS,
    PREDICTORS,
    UNGUIDED,
    LangevinStage,
    Memory,
    automatic,
    multistep,
    plan,
)


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
STOCHASTIC += [(name, 1.0) for name in ("dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_3s", "unipc_2", "heun", "rk4")]


# --- deterministic ------------------------------------------------------------------------------------------------


# a solver of each kind meets every path, every solver meets one
ON_EVERY_PATH = [("vp", name) for name in ODE_PREDICTORS]
ON_EVERY_PATH += [(path, name) for path in PATHS for name in ("heun", "dpmpp_2s", "adams_4")]


@pytest.mark.parametrize(("path", "predictor"), sorted(set(ON_EVERY_PATH)))
def test_order_on_the_exact_flow_of_a_gaussian(path, predictor):
    path = PATHS[path]
    (begin, end), sizes, declared = ends(path), (64, 256), PREDICTORS[predictor].order
    x = start(path, begin, GAUSSIAN, 16)
    exact = GAUSSIAN.flow(x, path, begin, end)
    grids = [with_start(line(begin, end, n), declared) for n in sizes]
    errors = [(solve(path, grid, GAUSSIAN, x, predictor) - exact).abs().max() for grid in grids]
    assert declared - 0.6 < slope(sizes, errors) < declared + 1
    assert errors[-1] < 0.3**declared


@pytest.fixture(scope="module")
def mixture_flow():
    """(path, samples at its begin, where the exact flow leads)."""
    path = PATHS["linear"]
    begin, end = ends(path)
    x = start(path, begin, MIXTURE, 64)
    return path, x, solve(path, line(begin, end, 512), MIXTURE, x, "rk4")


@pytest.mark.parametrize("predictor", ODE_PREDICTORS)
def test_order_on_a_mixture(mixture_flow, predictor):
    path, x, reference = mixture_flow
    (begin, end), sizes = ends(path), (32, 128)
    declared = PREDICTORS[predictor].order
    grids = [with_start(line(begin, end, n), declared) for n in sizes]
    # the median: single samples near the border of two modes converge late
    errors = [(solve(path, grid, MIXTURE, x, predictor) - reference).abs().median().item() for grid in grids]
    assert slope(sizes, errors) > declared - 0.6


# --- stochastic ---------------------------------------------------------------------------------------------------


def gaussian_moments(path, stages, begin):
    """Mean and variances of the samples of a plan of linear stages, in closed form.

    With Gaussian data every stage is affine, so a sample is its mean plus a sum of independent noises: row 0 of x is
    the mean, row 1 the factor of the noise at the start, and every other row that of one later noise.
    """
    (mean_0,), (variance_0,) = GAUSSIAN.means, GAUSSIAN.variances
    mean, variance = GAUSSIAN.noised(path, begin)
    noises = iter(torch.eye(2 + sum(stage.noise > 0 for stage in stages), dtype=torch.float64)[2:])
    x = torch.zeros(2 + sum(stage.noise > 0 for stage in stages), mean.shape[1], dtype=torch.float64)
    x[0], x[1], memory = mean, variance.sqrt(), Memory(stages)
    for stage in stages:
        alpha, sigma = path.alpha(stage.t_eval), path.sigma(stage.t_eval)
        gain = alpha * variance_0 / (alpha**2 * variance_0 + sigma**2)
        denoised = gain * x
        denoised[0] += mean_0 - gain * alpha * mean_0
        x = stage.update(x, denoised, memory, lambda x=x: next(noises)[:, None].expand(x.shape))
    return x[0], x[1:].pow(2).sum(0)


# a solver of each kind meets every path, every solver meets one; a corrector follows the simplest
LIMITS = [("vp", name, eta, None) for name, eta in STOCHASTIC]
LIMITS += [(path, *each) for path in PATHS for each in (("ddim", 0.5, None), ("euler_maruyama", None, None))]
LIMITS += [(path, *each) for path in ("ve", "linear") for each in (("dpmpp_2m", 1.0, None), ("heun", 1.0, None))]
LIMITS += [(path, "reverse_diffusion", None, "annealed_langevin") for path in PATHS]


@pytest.mark.parametrize(("path", "predictor", "eta", "corrector"), sorted(set(LIMITS), key=str))
def test_exact_mean_and_covariance_in_the_limit(path, predictor, eta, corrector):
    path = PATHS[path]
    (begin, end), sizes, errors = ends(path), (64, 256), []
    exact_mean, exact_variance = GAUSSIAN.noised(path, end)
    for n in sizes:
        # a corrector whose step shrinks with the grid leaves the limit alone
        arguments = {"options": {} if eta is None else {"eta": eta}, "corrector": corrector, "corrector_snr": n**-0.5}
        stages = plan(path, line(begin, end, n), predictor, to_data=False, **arguments)
        mean, variance = gaussian_moments(path, stages, begin)
        errors.append(max((mean - exact_mean).abs().max(), (variance / exact_variance - 1).abs().max()))
    assert errors[-1] < 0.1
    assert errors[-1] < 1e-3 or slope(sizes, errors) > 0.6


@pytest.mark.parametrize("path", [PATHS["subvp"], PATHS["ve"]], ids=["subvp", "ve"])
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


# --- multistep weights --------------------------------------------------------------------------------------------


def integral(function, begin, end, n=20001):
    """By Simpson's rule."""
    x = torch.linspace(begin, end, n, dtype=torch.float64)
    y = function(x)
    return (y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum()) * (end - begin) / (n - 1) / 3


@pytest.mark.parametrize("to_data", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_polynomials_of_the_denoised_sample_are_integrated_exactly(eta, to_data):
    """Where the denoised sample is a polynomial in the place, whatever x is, the step is the exact one; with noise but
    for the step to clean data, which takes the last denoised sample."""
    path, bound, times = VPSDE(), 0.8, torch.tensor([0.9, 0.7, 0.6, 0.4, 0.15], dtype=torch.float64)
    steps = multistep(path, times, to_data, eta, order=3, bound=bound)
    levels = path.half_log_snr(times)
    place = torch.sigmoid(-levels - math.log(bound))
    for i in range(2, len(steps)):
        [stage] = steps[i]
        start, end = levels[i], levels[i + 1] if i + 1 < len(times) else torch.tensor(40.0, dtype=torch.float64)
        alpha, rho = path.alpha(times[i + 1]) if i + 1 < len(times) else 1.0, 1 + eta**2
        if eta and i + 1 == len(times):
            assert stage.denoised == pytest.approx((1.0, 0.0, 0.0, 0.0)) and stage.samples == (0.0,)
            continue
        for power in range(3):
            exact = alpha * integral(
                lambda level, end=end, rho=rho, power=power: (
                    rho * torch.exp(-rho * (end - level)) * torch.sigmoid(-level - math.log(bound)) ** power
                ),
                float(start),
                float(end),
            )
            ours = sum(weight * place[i - j] ** power for j, weight in enumerate(stage.denoised[:3]))
            assert abs(ours - exact) < 1e-6


@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_polynomials_of_the_slope_are_integrated_exactly(slope, bound):
    path, times = VPSDE(), torch.tensor([0.9, 0.7, 0.6, 0.4, 0.15], dtype=torch.float64)
    steps = multistep(path, times, False, order=3, slope=slope, bound=bound)
    levels, c, u = path.half_log_snr(times), *path.straight_coordinates(times, slope)

    def place(level):
        return level if bound is None else torch.sigmoid(-level - math.log(bound))

    for i in range(2, len(steps)):
        [stage] = steps[i]
        for power in range(3):
            # dy/du = place^power along x = c y, whatever the denoised sample then is
            exact = integral(
                lambda at, power=power: place((1 - slope * at).log() - at.log()) ** power, float(u[i]), float(u[i + 1])
            )
            slopes = [place(levels[i - j]) ** power for j in range(3)]
            ours = sum(
                -weight * path.sigma(times[i - j]) / c[i - j] * value
                for j, (weight, value) in enumerate(zip(stage.denoised[:3], slopes, strict=True))
            )
            assert abs(ours / c[i + 1] - exact) < 1e-6


def test_the_corrector_adds_what_the_evaluation_at_the_end_of_a_step_tells():
    """Correcting with the polynomial through one more evaluation equals a step made with it from the start."""
    path, times = VPSDE(), torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=torch.float64)
    corrected = multistep(path, times, False, order=2, corrected=True)
    x = start(path, 0.9, MIXTURE, 8)
    memory = Memory([stage for step in corrected for stage in step])
    states = [x]
    for [stage] in corrected[:2]:
        denoised = MIXTURE.denoised(states[-1], path, torch.tensor(stage.t_eval))
        states.append(stage.update(states[-1], denoised, memory, None))
    # the first step: through its two ends, linear in lambda, exponentially weighted
    levels = path.half_log_snr(times)
    h = float(levels[1] - levels[0])
    scale, first = path.sigma(times[1]) / path.sigma(times[0]), [memory.denoised[1], memory.denoised[0]]
    grows = (math.exp(-h) - 1 + h) / h
    trapezoid = scale * x + path.alpha(times[1]) * ((-math.expm1(-h) - grows) * first[0] + grows * first[1])
    # the second step of order 2 from there, by the rows without a corrector
    plain = multistep(path, times, False, order=2)[1][0]
    expected = plain.samples[0] * trapezoid + plain.denoised[0] * first[1] + plain.denoised[1] * first[0]
    assert (states[2] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_is_exact_for_velocities_that_are_polynomials_of_u(order):
    """In the coordinates of flow matching, y = x / (alpha + sigma) and u = sigma / (alpha + sigma), where dy/du is the
    velocity noise - x0; down to clean data, once the steps of lower order that begin are corrected."""
    path, times = VPSDE(), torch.tensor([0.9, 0.8, 0.75, 0.6, 0.55, 0.4, 0.3, 0.15], dtype=torch.float64)
    scale = torch.cat([path.alpha(times) + path.sigma(times), torch.ones(1)])
    u = torch.cat([path.sigma(times) / scale[:-1], torch.zeros(1)])
    stages = plan(path, times, f"adams_{order}", to_data=True)
    for power in range(order):
        x, memory, off = torch.ones(1, 1, dtype=torch.float64), Memory(stages), []
        for i, stage in enumerate(stages):
            denoised = (x - path.sigma(times[i]) * u[i] ** power) / scale[i]
            x = stage.update(x, denoised, memory, None)
            off.append(float(x) / scale[i + 1] - u[i + 1] ** (power + 1) / (power + 1))
        assert torch.stack(off[order:]).diff().abs().max() < 1e-9


# --- churn --------------------------------------------------------------------------------------------------------


def test_churn_is_the_stochastic_sampler_of_karras():
    """Algorithm 2 of Karras et al. 2022, written as there, with the same noise."""
    path, churn = PATHS["edm"], {"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 20.0, "s_noise": 1.01}
    steps = 9
    times = time_grid(path, "karras", steps, 0.002 / 80, 1.0, levels=1000)
    x = 80 * torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    stages, memory, ours = plan(path, times, "heun", to_data=True, options=churn), None, x
    memory = Memory(stages)
    for stage in stages:
        denoised = MIXTURE.denoised(ours, path, torch.tensor(stage.t_eval, dtype=torch.float64))
        ours = stage.update(ours, denoised, memory, lambda: torch.randn(16, 2, generator=generator).double())

    generator, sigmas = torch.Generator().manual_seed(1), [*(80 * times).tolist(), 0.0]

    def slope(x, sigma):
        return (x - MIXTURE.denoised(x, path, torch.tensor(sigma / 80, dtype=torch.float64))) / sigma

    for i in range(steps):
        gamma = min(6.0 / steps, 2**0.5 - 1) if 0.1 <= sigmas[i] <= 20.0 else 0.0
        raised = sigmas[i] * (1 + gamma)
        if gamma:
            noise = 1.01 * torch.randn(16, 2, generator=generator).double()
            x = x + (raised**2 - sigmas[i] ** 2) ** 0.5 * noise
        first = slope(x, raised)
        following = x + (sigmas[i + 1] - raised) * first
        if sigmas[i + 1] > 0:
            following = x + (sigmas[i + 1] - raised) * (first + slope(following, sigmas[i + 1])) / 2
        x = following
    assert sum(stage.noise > 0 for stage in stages) > 3
    assert (ours - x).abs().max() < 1e-9


@pytest.mark.parametrize("to_data", [True, False])
def test_churn_is_shared_among_the_steps(to_data):
    """Every step but the first begins at a noise level (1 + s_churn / N) times as large, of N steps."""
    path, times = PATHS["ve"], line(0.9, 0.1, 5)
    begins = plan(path, times, "euler", to_data=to_data, options={"s_churn": 0.5})
    steps = 6 if to_data else 5
    levels = path.sigma(torch.tensor([stage.t_eval for stage in begins]))
    assert len(levels) == steps
    expected = path.sigma(times[:steps]) * torch.tensor([1.0] + [1 + 0.5 / steps] * (steps - 1))
    assert levels == pytest.approx(expected)


def test_churn_converges_to_the_exact_covariance():
    path, errors, sizes = PATHS["ve"], [], (128, 512)
    begin, end = ends(path)
    _, exact_variance = GAUSSIAN.noised(path, end)
    for n in sizes:
        stages = plan(path, line(begin, end, n), "heun", to_data=False, options={"s_churn": 20.0})
        errors.append((gaussian_moments(path, stages, begin)[1] / exact_variance - 1).abs().max())
    assert errors[-1] < 1e-3
    assert slope(sizes, errors) > 1.5


# --- plans --------------------------------------------------------------------------------------------------------


def test_the_automatic_choice_follows_the_number_of_steps():
    numbers = (1, 5, 6, 7, 9, 10, 14, 15, 17, 18, 25, 1000)
    assert [automatic(n) for n in numbers] == [AUTOMATIC[i] for i in (0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6)]
    assert [automatic(n, 1.0) for n in (1, 9, 10, 14, 15, 1000)] == [UNGUIDED[i] for i in (0, 1, 2, 3, 4, 4)]


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("corrector", [None, *CORRECTORS])
def test_a_plan_has_one_stage_per_evaluation(predictor, corrector):
    times = line(1.0, 0.1, 6)
    arguments = {"corrector": corrector, "corrector_steps": 2}
    evaluations = PREDICTORS[predictor].evaluations + (2 if corrector else 0)
    assert len(plan(VPSDE(), times, predictor, to_data=False, **arguments)) == 6 * evaluations
    stages = plan(VPSDE(), times, predictor, to_data=True, **arguments)
    assert len(stages) == 6 * evaluations + 1
    if corrector:
        # before every step, also the one to clean data
        stages = plan(VPSDE(), times, predictor, to_data=True, corrector_position="before", **arguments)
        assert len(stages) == 6 * evaluations + 3


@pytest.mark.parametrize("predictor", [name for name in ODE_PREDICTORS if name != "euler"])
def test_straight_solvers_are_exact_for_a_single_data_point(predictor):
    """One data point: the flow is a straight line in (9), which these solvers follow exactly in one step."""
    point = type(GAUSSIAN)([1.0], [[0.7, -0.3]], [[0.0, 0.0]])
    for path in PATHS.values():
        begin, end = ends(path)
        x = start(path, begin, point, 4)
        exact = point.flow(x, path, begin, end)
        assert (solve(path, line(begin, end, 3), point, x, predictor) - exact).abs().max() < 1e-9


SINGULAR_AT_NOISE = ("euler", "dpmpp_2s", "dpmpp_3s", "deis_1", "deis_2", "deis_3")


@pytest.mark.parametrize("path", [PATHS["linear"], PATHS["cosine_vp"]], ids=["linear", "cosine_vp"])
@pytest.mark.parametrize("predictor", [name for name in ODE_PREDICTORS if name not in SINGULAR_AT_NOISE])
def test_straight_solvers_begin_at_pure_noise(path, predictor):
    """Where alpha = 0 and lambda is infinite, a single data point is still reached exactly."""
    point = type(GAUSSIAN)([1.0], [[0.7, -0.3]], [[0.0, 0.0]])
    x = start(path, 1.0, point, 4)
    exact = point.flow(x, path, *torch.tensor([1.0, 0.1], dtype=torch.float64))
    assert (solve(path, line(1.0, 0.1, 3), point, x, predictor) - exact).abs().max() < 1e-9


def test_singular_plans_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'euler_maruyama' is singular at t = 1 on LinearSDE.*t_max=0.999"):
        plan(LinearSDE(), line(1.0, 0.1, 4), "euler_maruyama", to_data=False)


@pytest.mark.parametrize("predictor", ["dpmpp_2m", "dpmpp_3b", "unipc_3"])
def test_noise_is_not_enlarged_by_short_steps(predictor):
    """Gaussian data, exactly denoised: in 100 steps with noise the samples have its standard deviation."""
    path, std, generator = DiscreteVPSDE.from_beta_schedule(), 0.3, torch.Generator().manual_seed(0)
    times = time_grid(path, "log_snr", 100, path.t_min, 1.0, levels=1000)
    stages = plan(path, times, predictor, to_data=True, options={"eta": 1.0})

    def draw():
        return torch.randn(20_000, 1, generator=generator, dtype=torch.float64)

    x, memory = draw(), Memory(stages)
    for stage in stages:
        t = stage.t_eval
        x = stage.update(x, path.alpha(t) * path.gaussian_gain(t, std) * x, memory, draw)
    assert x.std() == pytest.approx(std, rel=0.03)
