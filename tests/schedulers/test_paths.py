"""The noise mathematics against autograd, closed forms, Bayes' rule and diffusers' noise levels."""

import math

import diffusers
import pytest
import torch
from every_path import CHAINS, PATHS, SCHEDULES, every_path

from score_sde.schedulers import paths
from score_sde.schedulers.paths import EDMSDE, VESDE, VPSDE, CosineVPSDE, DiscreteVPSDE, LinearSDE, Path, SubVPSDE


TIMES = torch.tensor([1e-6, 1e-3, 0.0137, 0.1, 0.3333, 0.5, 0.71, 0.9, 0.999], dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    """max |a - b| relative to the size of b, at least 1."""
    return ((a - b).abs() / b.abs().clamp_min(1)).max() < tolerance


def derivative(function, t):
    t = t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((function(t) + 0 * t).sum(), t)
    return gradient


def test_every_path_is_held_against_the_truth():
    def kinds(cls):
        return {cls, *(each for kind in cls.__subclasses__() for each in kinds(kind))}

    public = {each for each in kinds(Path) if each.__module__ == paths.__name__ and each.__name__[0] != "_"}
    assert public - {Path} == {type(path) for path in PATHS.values()}


# --- paths --------------------------------------------------------------------------------------------------------


@every_path
def test_derivatives_equal_autograd(path):
    assert close(path.alpha_prime(TIMES), derivative(path.alpha, TIMES))
    assert close(path.variance_prime(TIMES), derivative(lambda t: path.sigma(t) ** 2, TIMES))
    assert close(path.sigma_prime(TIMES), derivative(path.sigma, TIMES), 1e-9)
    # g^2 falls out of f and the variance: d sigma^2 = 2 f sigma^2 + g^2 (Song et al. 2021, Eq. 29)
    growth = 2 * path.drift(TIMES) * path.sigma(TIMES) ** 2 + path.diffusion(TIMES) ** 2
    assert close(growth, path.variance_prime(TIMES))


def test_vp_is_the_published_sde():
    beta = 0.1 + TIMES * 19.9
    for path, g2 in [
        (VPSDE(), beta),
        (SubVPSDE(), beta * (1 - torch.exp(-2 * (0.1 * TIMES + 9.95 * TIMES**2)))),  # Song et al. 2021, Eq. 34
    ]:
        assert close(path.drift(TIMES), -beta / 2)
        assert close(path.diffusion(TIMES) ** 2, g2)
    # integral of beta by Simpson's rule, exact for a line
    integral = TIMES / 6 * (0.1 + 4 * (0.1 + TIMES / 2 * 19.9) + beta)
    assert close(VPSDE().alpha(TIMES), torch.exp(-integral / 2))
    assert close(SubVPSDE().sigma(TIMES), 1 - torch.exp(-integral))


def test_ve_is_the_published_sde():
    path = VESDE(0.01, 50)
    assert close(path.diffusion(TIMES), path.sigma(TIMES) * math.sqrt(2 * math.log(5000)))  # Eq. 31
    assert path.drift(TIMES).abs().max() == 0
    assert close(path.sigma(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.01, 0.5**0.5, 50], dtype=torch.float64))


def test_cosine_is_the_published_schedule():
    angle = (TIMES + 0.008) / 1.008 * math.pi / 2
    alpha2 = torch.cos(angle) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert close(CosineVPSDE().alpha(TIMES) ** 2, alpha2)
    assert CosineVPSDE().alpha(1.0) == 0


@every_path
def test_ends(path):
    assert path.alpha(0.0) == 1
    assert path.sigma(0.0) == (path.sigma_min if isinstance(path, VESDE) else 0)
    assert path.sigma(1.0) == pytest.approx(path.prior_std, rel=1e-3)
    assert 0 < path.t_min < path.t_max <= 1


@pytest.mark.parametrize("path", [VPSDE(), CosineVPSDE(), CHAINS["linear"], CHAINS["squaredcos_cap_v2"]])
def test_sigma_keeps_its_digits_near_the_data(path):
    # sigma^2 = 1 - alpha^2 ~ rate t for small t: no cancellation
    t = torch.tensor([1e-15, 1e-12, 1e-9], dtype=torch.float64)
    assert (path.sigma(t) ** 2 / (path.variance_prime(0.0) * t) - 1).abs().max() < 1e-6


@every_path
def test_half_log_snr_falls_and_its_inverse_inverts(path):
    t = torch.cat([torch.logspace(-9, -3, 50, dtype=torch.float64), torch.linspace(1e-3, path.t_max, 997)])
    t = t.double()
    half_log_snr = path.half_log_snr(t)
    assert (half_log_snr.diff()[t.diff() > 0] < 0).all()
    assert (path.t_from_half_log_snr(half_log_snr) - t).abs().max() < 1e-9
    assert ((path.t_from_half_log_snr(half_log_snr) - t).abs() / t)[t > 1e-6].max() < 1e-6


@every_path
def test_transitions_compose(path):
    r, s, t = (torch.tensor(value, dtype=torch.float64) for value in (0.2, 0.55, 0.9))
    (a1, b1), (a2, b2), (a, b) = path.transition(r, s), path.transition(s, t), path.transition(r, t)
    assert close(a1 * a2, a)
    assert close(a2**2 * b1**2 + b2**2, b**2)
    # and the marginal at s is carried to the marginal at t
    assert close(a2 * path.alpha(s), path.alpha(t))
    assert close(a2**2 * path.sigma(s) ** 2 + b2**2, path.sigma(t) ** 2)


@every_path
def test_posterior_is_bayes_rule(path):
    s, t = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    scale, std = path.transition(s, t)
    # x_s | x0 has precision 1 / sigma_s^2, x_t | x_s adds scale^2 / std^2
    precision = 1 / path.sigma(s) ** 2 + scale**2 / std**2
    c_x, c_0, posterior_std = path.posterior(t, s)
    assert close(posterior_std**2, 1 / precision)
    assert close(c_x, scale / std**2 / precision)
    assert close(c_0, path.alpha(s) / path.sigma(s) ** 2 / precision)


@every_path
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_posteriors_keep_the_marginal(path, eta):
    s, t = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    c_x, c_0, std = path.posterior(t, s, eta)
    assert close(c_x * path.alpha(t) + c_0, path.alpha(s))
    assert close(c_x**2 * path.sigma(t) ** 2 + std**2, path.sigma(s) ** 2)


@every_path
def test_times_of_any_shape_and_type(path):
    for t in (0.5, torch.tensor(0.5), torch.full((3,), 0.5), torch.full((2, 3), 0.5)):
        for function in (path.alpha, path.sigma, path.drift, path.diffusion, path.half_log_snr):
            value = function(t)
            assert value.dtype == torch.float64
            assert value.shape == torch.as_tensor(t).shape
            assert close(value, function(torch.tensor(0.5, dtype=torch.float64)).expand(value.shape))


@every_path
def test_sample_broadcasts_over_images_and_videos(path):
    for shape in [(2, 3), (2, 3, 4, 4), (2, 3, 2, 4, 4)]:
        x0, noise, t = torch.ones(shape), torch.full(shape, 2.0), torch.tensor([0.25, 0.75])
        x_t = path.sample(x0, noise, t)
        assert x_t.dtype == torch.float32
        for i in range(2):
            assert close(x_t[i].double(), (path.alpha(t[i]) + 2 * path.sigma(t[i])).expand(shape[1:]), 1e-6)


@every_path
def test_gaussian_data_in_closed_form(path):
    """Gaussian data of standard deviation s: x_t has variance alpha^2 s^2 + sigma^2; the posterior by Bayes' rule."""
    s, t = 0.7, torch.tensor([0.2, 0.6], dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    gain = path.gaussian_gain(t, s)
    assert close(sigma**2 * gain, 1 / (1 / s**2 + alpha**2 / sigma**2))
    # of unit variance for s = 1
    x = (alpha**2 + sigma**2).sqrt()[:, None] * torch.ones(2, 3, dtype=torch.float64)
    assert close(path.unit_variance(x, t), torch.ones_like(x))
    # Tweedie: x0 = (x_t + sigma^2 score) / alpha
    added = path.add_to_score(torch.zeros_like(x), x, t)
    assert close(added, (sigma**2 / alpha)[:, None] * x)


@every_path
@pytest.mark.parametrize("slope", [None, 0.0, 0.5, 1.0])
def test_the_straight_coordinate_and_its_inverse(path, slope):
    c, u = path.straight_coordinates(TIMES, slope)
    k = path.straight if slope is None else slope
    assert close(c, path.alpha(TIMES) + k * path.sigma(TIMES))
    assert close(u * c, path.sigma(TIMES))
    assert ((path.t_from_straight(u, slope) - TIMES).abs() / TIMES)[1:].max() < 1e-6


def test_the_straight_coordinates_of_flow_matching_are_its_own():
    c, u = LinearSDE().straight_coordinates(TIMES)
    assert close(c, torch.ones_like(TIMES))
    assert close(u, TIMES)
    x0, noise = torch.randn(2, len(TIMES), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = LinearSDE().sample(x0, noise, TIMES)
    assert close(LinearSDE().straight_velocity(x_t, x0, TIMES), noise - x0, 1e-9)


def test_times_that_fit_no_batch_are_refused():
    with pytest.raises(ValueError, match=r"times of shape \(3,\) do not fit a batch of shape \(2, 4\)"):
        VPSDE().sample(torch.zeros(2, 4), torch.zeros(2, 4), torch.rand(3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VPSDE(20, 0.1), "beta_min=20"),
        (lambda: VESDE(-1, 50), "sigma_min=-1"),
        (lambda: EDMSDE(80, 0.002), "sigma_min=80"),
        (lambda: CosineVPSDE(0), "offset must be positive; got 0"),
        (lambda: DiscreteVPSDE([0.1, 1.5]), "betas must be"),
        (lambda: DiscreteVPSDE.from_beta_schedule(beta_schedule="cubic"), "'cubic' is unknown"),
    ],
)
def test_bad_parameters_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- the DDPM chain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_path_passes_through_the_levels_of_ddpm(schedule):
    stock = diffusers.DDPMScheduler(beta_schedule=schedule)
    path = CHAINS[schedule]
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha2 = path.alpha(t) ** 2
    # diffusers keeps float32 betas and their products
    assert (alpha2 - stock.alphas_cumprod.double()).abs().max() < 1e-6
    assert ((1 - stock.betas.double()).cumprod(0) / alpha2 - 1).abs()[:-1].max() < 1e-4
    exact_betas = {
        "linear": torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
        "scaled_linear": torch.linspace(1e-2, 0.02**0.5, 1000, dtype=torch.float64) ** 2,
    }
    if schedule in exact_betas:
        assert ((1 - exact_betas[schedule]).cumprod(0) / alpha2 - 1).abs().max() < 1e-12
    assert path.levels == 1000
    assert path.t_min == 1 / 1000


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_path_is_smooth_and_monotone(schedule):
    path = CHAINS[schedule]
    knots = torch.arange(1, 1000, dtype=torch.float64) / 1000
    left, right = path.log_alpha_prime(knots - 1e-12), path.log_alpha_prime(knots + 1e-12)
    assert ((left - right) / right).abs().max() < 1e-6
    between = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (path.log_alpha_prime(between) < 0).all()


def test_zero_terminal_snr_equals_diffusers():
    arguments = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    stock = diffusers.EulerDiscreteScheduler(**arguments, rescale_betas_zero_snr=True)
    path = DiscreteVPSDE.from_beta_schedule(**arguments, rescale_betas_zero_snr=True)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    assert (path.alpha(t) ** 2 - stock.alphas_cumprod.double()).abs().max() < 1e-6
    assert path.alpha(1.0) ** 2 == pytest.approx(2**-24)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [1000, 4000])
def test_zero_terminal_snr_on_every_chain(schedule, n):
    """The levels of stock DDIM, whose last alpha is 0; ours is small, and below the one before it."""
    stock = diffusers.DDIMScheduler(n, beta_schedule=schedule, rescale_betas_zero_snr=True)
    path = DiscreteVPSDE.from_beta_schedule(n, schedule, rescale_betas_zero_snr=True)
    alpha2 = path.alpha((torch.arange(n, dtype=torch.float64) + 1) / n) ** 2
    assert (alpha2 - stock.alphas_cumprod.double()).abs().max() < 2e-6
    assert (alpha2.diff() < 0).all()
    assert 0 < alpha2[-1] <= 2**-24 * (1 + 1e-9)
    assert torch.isfinite(path.half_log_snr(1.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_chain_that_ends_without_signal(schedule):
    """Exactly stock DDIM's levels; in the last segment smooth, falling and invertible down to alpha = 0."""
    stock = diffusers.DDIMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=True)
    path = DiscreteVPSDE.from_beta_schedule(1000, schedule, rescale_betas_zero_snr=True, exact_zero_snr=True)
    alpha2 = path.alpha((torch.arange(1000, dtype=torch.float64) + 1) / 1000) ** 2
    assert (alpha2 - stock.alphas_cumprod.double()).abs().max() < 2e-6 and alpha2[-1] == 0 and path.sigma(1.0) == 1
    t = torch.linspace(0.995, 1, 5001, dtype=torch.float64)
    assert (path.alpha(t).diff() < 0).all() and (path.alpha_prime(t) < 0).all()
    # but for the rounding of t itself
    assert (path.t_from_half_log_snr(path.half_log_snr(t)) - t).abs().max() < 1e-11
    t = t[:-1].requires_grad_()
    (slope,) = torch.autograd.grad(path.alpha(t).sum(), t)
    assert (slope / path.alpha_prime(t) - 1).abs().max() < 1e-9
    ends = torch.tensor([0.999 - 1e-12, 0.999 + 1e-12], dtype=torch.float64)
    before, after = path.alpha_prime(ends).tolist()
    assert before == pytest.approx(after, rel=1e-6)


def test_the_end_without_signal_goes_with_the_shift_to_it():
    with pytest.raises(ValueError, match="exact_zero_snr=True needs rescale_betas_zero_snr=True"):
        DiscreteVPSDE.from_beta_schedule(exact_zero_snr=True)


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0])
def test_snr_shift_divides_the_ratio(scale):
    path = DiscreteVPSDE.from_beta_schedule(snr_shift_scale=scale)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    shift = CHAINS["linear"].half_log_snr(t) - path.half_log_snr(t)
    assert close(shift, torch.full_like(shift, math.log(scale) / 2), 1e-9)


# --- prediction types ---------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("prediction_type", paths.PREDICTIONS)
def test_every_prediction_row_gives_x0_back(path, prediction_type):
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0.01, 0.3, 0.8, 0.99], dtype=torch.float64)
    x0, noise = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    x_t = path.sample(x0, noise, t)
    row = paths.prediction(path, prediction_type, t, sigma_data=0.7)
    target = paths.training_target(path, prediction_type, x0, noise, t, sigma_data=0.7)
    assert close(row.a[:, None] * x_t + row.b[:, None] * target, x0, 1e-9)

    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    by_definition = {
        "epsilon": noise,
        "sample": x0,
        "score": -noise / sigma,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": path.alpha_prime(t)[:, None] * x0 + path.sigma_prime(t)[:, None] * noise,
    }
    if prediction_type in by_definition:
        assert close(target, by_definition[prediction_type], 1e-9)
        assert (row.input_scale == 1).all()


@every_path
def test_velocity_is_the_time_derivative(path):
    x0, noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        t = torch.tensor(t, dtype=torch.float64)
        slope = torch.stack([derivative(lambda r, i=i: path.sample(x0, noise, r)[i], t) for i in range(3)])
        x_t = path.sample(x0, noise, t)
        assert close(path.reverse_drift(x_t, x0, t), slope, 1e-9)
        # Eq. (8): with the score of this one data point, the drift of the reverse SDE falls by g^2/2 of it for eta = 1
        score, eta = -noise / path.sigma(t), 0.7
        expected = slope - eta**2 / 2 * path.diffusion(t) ** 2 * score
        assert close(path.reverse_drift(x_t, x0, t, eta), expected, 1e-8)


def test_edm_row_is_the_published_preconditioning():
    path, sigma_data = EDMSDE(), 0.5
    t = torch.tensor([1e-4, 0.01, 0.5], dtype=torch.float64)
    sigma = 80 * t
    row = paths.prediction(path, "edm", t, sigma_data)
    # Karras et al. 2022, Table 1
    assert close(row.a, sigma_data**2 / (sigma**2 + sigma_data**2))
    assert close(row.b, sigma * sigma_data / (sigma_data**2 + sigma**2).sqrt())
    assert close(row.input_scale, 1 / (sigma**2 + sigma_data**2).sqrt())


# --- what the network is told, and grids --------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("time_input", paths.TIME_INPUTS)
def test_network_time_inverts(path, time_input):
    t = torch.tensor([0.01, 0.4, 0.95], dtype=torch.float64)
    told = paths.network_time(path, t, time_input, 250.0, -1.0)
    assert (paths.path_time(path, told, time_input, 250.0, -1.0) - t).abs().max() < 1e-9


def test_network_time_has_the_published_meanings():
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert close(paths.network_time(EDMSDE(), t, "log_sigma", 0.25, 0), (80 * t).log() / 4)
    assert close(paths.network_time(VESDE(), t, "sigma", 1, 0), VESDE().sigma(t))
    assert close(paths.network_time(VPSDE(), t, "t", 999, 0), 999 * t)


def grid(path, spacing, n, **overrides):
    arguments = {"t_min": path.t_min, "t_max": path.t_max, "levels": 1000, **overrides}
    return paths.time_grid(path, spacing, n, **arguments)


@every_path
@pytest.mark.parametrize("spacing", paths.TIME_GRIDS)
@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_grids_fall_strictly(path, spacing, n):
    times = grid(path, spacing, n)
    assert len(times) == n
    assert (times.diff() < 0).all()
    assert times[-1] > 0
    if spacing != "leading":
        assert times[0] == pytest.approx(path.t_max, abs=1e-3)
    if spacing in ("linspace", "uniform", "quadratic", "karras", "log_snr", "beta") and n > 1:
        assert times[-1] == pytest.approx(path.t_min, rel=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [5, 7, 10, 16, 28, 30, 50, 64, 100, 999])
def test_grids_equal_diffusers(spacing, n):
    stock = diffusers.DDIMScheduler(timestep_spacing=spacing)
    stock.set_timesteps(n)
    times = grid(CHAINS["linear"], spacing, n, t_max=1.0)
    assert torch.equal((times * 1000 - 1).round().long(), stock.timesteps)


def test_karras_grid_is_the_published_one():
    n, low, high = 18, 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = torch.tensor([(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)], dtype=torch.float64)
    assert close(80 * grid(EDMSDE(), "karras", n), sigma)


def test_log_snr_grid_is_uniform_in_lambda():
    steps = VPSDE().half_log_snr(grid(VPSDE(), "log_snr", 12)).diff()
    assert close(steps, steps.mean().expand(11), 1e-8)


@pytest.mark.parametrize("rho", [1.0, 3.0])
def test_karras_grid_with_another_exponent_is_uniform_in_its_root(rho):
    sigma = 80 * grid(EDMSDE(), "karras", 12, rho=rho)
    steps = (sigma ** (1 / rho)).diff()
    assert close(steps, steps.mean().expand(11), 1e-8)


def test_beta_grid_has_the_quantiles_of_its_distribution():
    scipy_stats = pytest.importorskip("scipy.stats")
    times = grid(VPSDE(), "beta", 25, t_min=1e-3, t_max=1.0)
    share = torch.tensor(scipy_stats.beta.cdf(((times - 1e-3) / 0.999).clamp(0, 1).numpy(), 0.6, 0.6))
    assert (share - torch.linspace(1, 0, 25, dtype=torch.float64)).abs().max() < 1e-4


def test_uniform_grid_keeps_to_no_levels():
    times = grid(CHAINS["linear"], "uniform", 8, t_max=1.0)
    assert close(times.diff(), times.diff().mean().expand(7), 1e-9)
    assert ((times * 1000) % 1).max() > 0.1


@every_path
def test_logistic_grid_has_equal_shares_and_a_tail(path):
    n, center, width, tail = 9, 0.3, 1.4, 0.6
    times = grid(path, "logistic", n, t_min=1e-5, center=center, width=width, tail=tail)
    share = torch.sigmoid((path.half_log_snr(times) - center) / width)
    steps = share.diff()
    assert close(steps, steps.mean().expand(n - 1), 1e-6)
    # the rest, to clean data, unless the path ends before
    rest = (1 - share[-1]) / steps.mean()
    assert rest == pytest.approx(tail, rel=1e-4) or times[-1] == pytest.approx(1e-5, rel=1e-3)


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="2000 time steps with timestep_spacing 'linspace'"):
        grid(CHAINS["linear"], "linspace", 2000)
