"""Domains against exact distributions: the forward process, the samplers, the limit."""

import math

import numpy as np
import pytest
import torch
from exact_domains import EVERY, SPHERE, TORUS

from score_sde import ScoreSDEScheduler
from score_sde.schedulers import sphere_kernel
from score_sde.schedulers.domains import Box, Sphere, Torus


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def far(sample, cdf):
    """The Kolmogorov-Smirnov statistic times sqrt(n), of a sample (n,) and its distribution function: above 1.95 by
    chance once in a thousand."""
    n = len(sample)
    below = cdf(sample.double().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(below - steps[:-1], steps[1:] - below).max()) * n**0.5


def interpolated(places, density):
    """The distribution function of a density at many places, by the trapezoid rule."""
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density, places)])
    return lambda x: torch.from_numpy(np.interp(x, places, mass / mass[-1]))


def test_noise_on_von_mises_data():
    """Brownian motion multiplies the k-th Fourier coefficient I_k(kappa) / I_0(kappa) by e^(-k^2 sigma^2 / 2)."""
    kappa, sigma = 4.0, 0.7
    generator = np.random.default_rng(0)
    x0 = torch.from_numpy(generator.vonmises(2.5, kappa, (20000, 1)))
    x = Torus().perturb(x0, sigma, generator=seeded())[:, 0]
    grid = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)
    circle = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)[:-1]
    weights = torch.exp(kappa * circle.cos())
    coefficients = [float((weights * (k * circle).cos()).sum() / weights.sum()) for k in range(30)]
    density = 1 + 2 * sum(
        c * math.exp(-(k**2) * sigma**2 / 2) * (k * (grid - 2.5)).cos() for k, c in enumerate(coefficients) if k
    )
    assert far(x, interpolated(grid, density)) < 1.95
    # the draws themselves, and another width, are told apart
    assert far(x0[:, 0], interpolated(grid, density)) > 5


@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_noise_on_a_face_of_the_box_is_a_folded_normal(sigma):
    x = Box().perturb(torch.ones(20000, 1), sigma, generator=seeded())[:, 0]
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None]
    images = torch.distributions.Normal(0.0, torch.tensor(sigma).double())
    density = sum(images.log_prob(1 - grid[:, 0] + 4 * m).exp() for m in range(-5, 6))
    assert far(x, interpolated(grid[:, 0], density)) < 1.95


@pytest.mark.parametrize(
    ("channels", "sigma"), [(2, 0.5), (2, 4.0), (3, 0.05), (3, 0.3), (3, 0.6), (3, 1.5), (3, 4.0), (5, 0.3), (16, 0.4)]
)
def test_noise_on_a_sphere_has_the_radius_of_the_heat_kernel(channels, sigma):
    """The distribution of the angle by quadrature of the kernel; the direction is uniform."""
    x0 = Sphere().prior((1, channels), seeded(), dtype=torch.float64).expand(10000, -1)
    x = Sphere().perturb(x0, sigma, generator=seeded(1))
    theta = torch.linspace(0, math.pi, 3001, dtype=torch.float64)
    theta = theta[theta < sigma * (channels**0.5 + 9)] if channels > 2 else theta
    log_density, _ = sphere_kernel.heat_kernel(theta, torch.tensor(sigma).double(), channels - 1)
    density = theta.sin() ** (channels - 2) * log_density.exp()
    assert far(torch.acos((x * x0).sum(1).clamp(-1, 1)), interpolated(theta, density)) < 1.95
    around = x - (x * x0).sum(1, keepdim=True) * x0
    around = around / around.norm(dim=1, keepdim=True)
    assert around.mean(0).norm() < 4 / 100


@pytest.mark.parametrize("n", [1, 2, 3, 6, 15])
@pytest.mark.parametrize("sigma", [0.02, 0.34, 0.36, 1.0, 5.0])
def test_the_kernel_of_a_sphere_integrates_to_one(n, sigma):
    theta = torch.linspace(0, min(math.pi, sigma * (n**0.5 + 8)), 4001, dtype=torch.float64)
    log_density, _ = sphere_kernel.heat_kernel(theta, torch.tensor(sigma).double(), n)
    mass = torch.trapezoid(torch.exp(log_density + sphere_kernel.log_volume(n - 1)) * theta.sin() ** (n - 1), theta)
    assert mass == pytest.approx(1, abs=2e-6)


def test_the_kernel_of_the_three_sphere_is_the_sum_over_its_images():
    """e^(tau/2) (2 pi tau)^(-3/2) sum_m (theta + 2 pi m) / sin theta e^(-(theta + 2 pi m)^2 / (2 tau))."""
    theta = torch.linspace(0.01, 2.5, 100, dtype=torch.float64)
    images = theta[:, None] + 2 * math.pi * torch.arange(-5, 6)
    for sigma in (0.2, 0.34, 0.36, 1.0, 2.0):
        tau = sigma**2
        density = (images / theta.sin()[:, None] * torch.exp(-(images**2) / (2 * tau))).sum(1)
        truth = density.log() + tau / 2 - 1.5 * math.log(2 * math.pi * tau)
        found, _ = sphere_kernel.heat_kernel(theta, torch.tensor(sigma).double(), 3)
        # where sums of float64 have digits left
        known = theta < 7 * sigma
        assert (found - truth)[known].abs().max() < 1e-5


@pytest.mark.parametrize(
    ("domain", "channels"), [(Torus(), 1), (Box(), 1), (Sphere(), 2), (Sphere(), 3), (Sphere(), 9)]
)
def test_the_prior_is_reached_to_the_stated_total_variation(domain, channels):
    """Half the mean of |density / uniform - 1|, from where it is largest: the wall, any point."""
    x = domain.prior((20000, channels), seeded(), dtype=torch.float64)
    start = torch.ones_like(x) if channels == 1 else domain.prior((1, channels), seeded(1)).double().expand_as(x)
    ratio = torch.exp(domain.log_kernel(x, start, domain.sigma_max) + domain.log_volume(x.shape))
    assert (ratio - 1).abs().mean() / 2 < 3e-6


@pytest.mark.parametrize("data", EVERY.values(), ids=EVERY)
def test_mixtures_noised_have_the_density_of_wider_ones(data):
    """Chapman-Kolmogorov: the mean over the data of the kernel is the density of the mixture with its widths grown."""
    x, sigma = data.sample(8, seeded()), torch.tensor(0.6, dtype=torch.float64)
    x0 = data.sample(4000, seeded(1))
    for point, exact in zip(x, data.log_density(x, sigma), strict=True):
        kernels = data.domain.log_kernel(point.expand_as(x0), x0, sigma).exp()
        assert abs(kernels.mean() - exact.exp()) < 5 * kernels.std() / 4000**0.5


def features(x):
    """Bounded functions (B, F) that tell distributions apart: waves of every angle and coordinate, products of all."""
    waves = torch.cat([(k * x).sin() for k in (1, 2)] + [(k * x).cos() for k in (1, 2)], dim=1).double()
    return torch.cat([waves, (waves[:, :, None] * waves[:, None]).flatten(1)], dim=1)


def drawn(data, n, steps, seed=0, dtype=torch.float32, **settings):
    scheduler = ScoreSDEScheduler(sde_type="ve", domain=data.name, prediction_type="score", **settings)
    network, generator = data.network(scheduler), seeded(seed)
    scheduler.set_timesteps(steps)
    x = scheduler.init_noise((n, data.centers.shape[1]), generator, dtype=dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
    data.domain.check(x)
    return x


@pytest.mark.parametrize(
    ("name", "steps", "settings"),
    [
        ("torus", 100, {"predictor": "euler_maruyama"}),
        ("torus", 60, {}),
        ("box", 100, {"predictor": "reverse_diffusion", "corrector": "annealed_langevin"}),
        ("box", 60, {}),
        ("sphere", 100, {"predictor": "euler_maruyama"}),
        ("sphere", 60, {"predictor": "ddim", "eta": 1.0}),
        ("sphere", 60, {}),
        ("product", 100, {"predictor": "reverse_diffusion"}),
        ("product", 40, {"predictor": "heun"}),
    ],
)
def test_samplers_with_the_exact_score_reach_the_exact_mixture(name, steps, settings):
    data, n = EVERY[name], 800
    found = features(drawn(data, n, steps, **settings))
    exact = features(data.sample(5000, seeded(7)))
    error = (exact.var(0) / n + exact.var(0) / 5000).sqrt()
    offs = (found.mean(0) - exact.mean(0)) / error
    # of the solver's own error, 0.02 of a standard deviation
    allowed = 4.5 + 0.06 * n**0.5
    assert offs.abs().max() < allowed
    # a sample that knows nothing is far off
    uniform = features(data.domain.prior((n, data.centers.shape[1]), seeded(3)))
    assert ((uniform.mean(0) - exact.mean(0)) / error).abs().max() > 2 * allowed


@pytest.mark.parametrize("data", [TORUS, SPHERE], ids=["torus", "sphere"])
@pytest.mark.parametrize(("predictor", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("deis_2", 2)])
def test_solvers_of_the_ode_have_their_order(data, predictor, order):
    """Trajectories from the same noise, in n and in 2 n steps, against many steps."""

    def end(steps, predictor=predictor):
        return drawn(data, 20, steps, dtype=torch.float64, predictor=predictor, sigma_min=0.05)

    reference = end(160, "heun")
    # the line of angles has no end
    coarse, fine = (
        data.domain.tangent(reference, data.domain.wrap(end(n) - reference) if data is TORUS else end(n) - reference)
        .abs()
        .mean()
        for n in (20, 40)
    )
    assert float((coarse / fine).log2()) > order - 0.35
