"""Domains: kernels against sums and integrals, geometry, and the scheduler on them."""

import math

import pytest
import torch

from score_sde import ScoreSDEScheduler
from score_sde.losses import Objective
from score_sde.schedulers import sphere_kernel
from score_sde.schedulers.domains import Box, Sphere, Torus, build_domain, listed


DOMAINS = {
    "torus": ("torus", 3),
    "box": ("box", 3),
    "circle": ("sphere", 2),
    "sphere": ("sphere", 3),
    "sphere of 5": ("sphere", 5),
    "product": ({"torus": 2, "sphere": 3, "flat": 1, "box": 1}, 7),
}
every_domain = pytest.mark.parametrize(("domain", "channels"), DOMAINS.values(), ids=DOMAINS)


def scheduler_on(domain, **kwargs):
    return ScoreSDEScheduler(sde_type="ve", domain=domain, **{"prediction_type": "score"} | kwargs)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(domain, channels, n, seed=0):
    return scheduler_on(domain).domain.prior((n, channels), seeded(seed), dtype=torch.float64)


@every_domain
@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.5, 2.4, 2.6, 4.0])
def test_the_score_is_the_gradient_of_the_log_kernel(domain, channels, sigma):
    """Riemannian: along a geodesic the log kernel changes by the score, to fourth order of the way."""
    domain = scheduler_on(domain).domain
    x0 = domain.prior((50, channels), seeded(), dtype=torch.float64)
    x = domain.perturb(x0, sigma, generator=seeded(1))
    direction, h = domain.tangent_noise(x, seeded(2)), 1e-3 * min(sigma, 1.0)
    ends = [domain.log_kernel(domain.step(x, c * h * direction), x0, sigma) for c in (-2, -1, 1, 2)]
    difference = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
    slope = (domain.score(x, x0, sigma) * direction).sum(1)
    assert (difference - slope).abs().max() < 1e-5 / sigma


@every_domain
def test_steps_stay_on_the_domain_and_carry_tangent_vectors(domain, channels):
    domain = scheduler_on(domain).domain
    x = domain.prior((200, channels), seeded())
    tangent, vectors = 3 * domain.tangent_noise(x, seeded(1)), domain.tangent_noise(x, seeded(2))
    end, carried = domain.step(x, tangent), domain.transport(x, tangent, vectors)
    domain.check(end)
    assert torch.allclose(domain.wrap(end), end, rtol=0, atol=2e-7)
    assert torch.allclose(domain.tangent(end, carried), carried, atol=1e-5)
    assert torch.allclose(carried.norm(dim=1), vectors.norm(dim=1), rtol=1e-5)
    # back along the same geodesic, with what was carried
    back = domain.transport(x, tangent, -tangent)
    assert torch.allclose(domain.tangent(x, domain.step(end, back) - x), torch.zeros_like(x), atol=2e-5)
    assert torch.allclose(domain.transport(end, back, carried), vectors, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["score", "epsilon"])
@every_domain
def test_training_noise_target_and_loss(domain, channels, prediction_type):
    """The network that returns the kernel's score, or -sigma times it, has no loss; noise decides the sample."""
    scheduler = scheduler_on(domain, prediction_type=prediction_type)
    x0 = scheduler.domain.prior((8, channels), seeded())
    noise = torch.randn(x0.shape, generator=seeded(1))
    t = torch.linspace(0.1, 1, 8, dtype=torch.float64)

    class Exact:
        def __call__(self, x, timestep):
            self.x = x
            sigma = scheduler.path.sigma(t)
            self.sample = scheduler.domain.score(x, x0, sigma)
            if prediction_type == "epsilon":
                self.sample = -sigma.reshape(-1, *[1] * (x.ndim - 1)).float() * self.sample
            return self

    network = Exact()
    objective = Objective(scheduler, weighting="simple")
    assert objective(network, x0, noise, t).abs().max() < 1e-8
    # whose times are float32
    assert torch.allclose(network.x, scheduler.add_noise(x0, noise, scheduler.timestep(t)), atol=1e-4)
    scheduler.domain.check(network.x)


def test_configs_keep_the_domain(tmp_path):
    scheduler = scheduler_on({"torus": 2, "flat": 1}, sigma_max=7.0)
    scheduler.save_pretrained(tmp_path)
    opened = ScoreSDEScheduler.from_pretrained(tmp_path)
    assert opened.config.domain == [["torus", 2], ["flat", 1]] and opened.domain.counts == [2, 1]
    assert opened.domain.domains[1].sigma_max == 7.0
    assert scheduler_on("box").path.sigma_max == Box.sigma_max


@pytest.mark.parametrize("domain", [Torus, Box])
def test_the_kernel_of_an_interval_is_the_sum_over_many_images(domain):
    domain = domain()
    low, high = (-math.pi, math.pi) if domain.name == "torus" else (-1.0, 1.0)
    x = torch.linspace(low, high - 1e-9, 101, dtype=torch.float64)[:, None]
    for sigma in torch.tensor([0.1, 1.0, 1.59, 1.6, 2.5, 2.51, 5.0], dtype=torch.float64):
        for x0 in (low, 0.3, 0.99 * high):
            shifts = domain.period * torch.arange(-60, 61, dtype=torch.float64)
            means = [x0 + shifts] if domain.name == "torus" else [x0 + shifts, 2 - x0 + shifts]
            truth = torch.distributions.Normal(torch.cat(means), sigma).log_prob(x).logsumexp(1)
            found = domain.log_kernel(x, torch.full_like(x, x0), sigma)
            assert (found - truth).abs().max() < 1e-11


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 15])
def test_the_two_sums_of_the_sphere_agree_where_they_meet(n):
    sigma = torch.tensor(sphere_kernel.SWITCH, dtype=torch.float64)
    theta = torch.linspace(1e-4, min(sphere_kernel.FARTHEST, float(sigma) * (n**0.5 + 3.5)), 200, dtype=torch.float64)
    of_series, of_expansion = (f(theta, sigma, n) for f in (sphere_kernel._series, sphere_kernel._expansion))
    assert (of_series[0] - of_expansion[0]).abs().max() < (1e-8 if n < 10 else 2e-6)
    assert (of_series[1] - of_expansion[1]).abs().max() < (1e-7 if n < 10 else 5e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prediction_type": "sample"},
            "prediction_type 'sample' has no meaning on domain 'torus'; choose one of score, epsilon",
        ),
        ({"sde_type": "vp"}, "sde_type 'vp' has no meaning"),
        ({"predictor": "unipc_2"}, "predictor 'unipc_2' has no meaning .* euler_maruyama"),
        ({"corrector": "langevin"}, "corrector 'langevin' has no meaning .* None, annealed_langevin"),
        ({"clip_sample": True}, "clip_sample"),
        ({"domain": "tours"}, "domain 'tours' is unknown; choose one of torus, box, sphere"),
        ({"domain": {"torus": 0}}, "number of entries of torus 0"),
        ({"domain": 3}, "domain 3 must be one of torus, box, sphere"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreSDEScheduler(**{"sde_type": "ve", "domain": "torus", "prediction_type": "score"} | arguments)


@pytest.mark.parametrize(
    ("domain", "values", "message"),
    [
        ("torus", [[170.0, -30.0]], "seem to be degrees: torch.deg2rad"),
        ("torus", [[6.1, 0.0]], r"wrap\(x\)"),
        ("torus", [[math.nan, 0.0]], "1 not finite"),
        ("box", [[0.0, 255.0]], "seem to be pixels"),
        ("box", [[-1.2, 0.0]], r"must lie in \[-1, 1\]; got values from -1.2"),
        ("sphere", [[0.6, 0.9, 0.0]], "length 1 along axis 1"),
        ("sphere", [[1.0]], "2 to 16 numbers"),
        ({"torus": 2, "flat": 1}, [[0.0, 0.0]], r"must hold 3 numbers \(torus 2, flat 1\)"),
    ],
)
def test_values_outside_are_refused(domain, values, message):
    with pytest.raises(ValueError, match=message):
        scheduler_on(domain).domain.check(torch.tensor(values))


def test_spheres_of_too_many_dimensions_are_refused():
    with pytest.raises(ValueError, match="2 to 16 numbers"):
        Sphere().perturb(torch.eye(17), 0.1)


def test_training_scripts_can_not_set_another_prediction():
    with pytest.raises(ValueError, match="prediction_type 'epsilon' is unknown; choose one of score"):
        scheduler_on("torus").register_to_config(prediction_type="epsilon")


def test_products_are_listed_in_their_order():
    assert listed({"torus": 2, "flat": 1}) == listed([("torus", 2), ("flat", 1)]) == [["torus", 2], ["flat", 1]]
    assert build_domain(listed({"sphere": 3, "box": 2})).counts == [3, 2]
