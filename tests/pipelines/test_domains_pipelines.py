"""Pipelines and likelihoods on domains against exact densities."""

import math

import pytest
import torch
from exact_domains import BOX, PRODUCT, SPHERE, TORUS, MixtureNetwork

from score_sde import ScoreSDEInversePipeline, ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.losses import few_step
from score_sde.pipelines.likelihood import log_likelihood


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scheduler_on(domain, **kwargs):
    return ScoreSDEScheduler(sde_type="ve", domain=domain, prediction_type="score", **kwargs)


def measure(scheduler, network, x, **arguments):
    arguments = {"trace": "exact", "steps": 24} | arguments
    ends = scheduler.t_min, scheduler.t_max
    return log_likelihood(
        scheduler.path, scheduler.denoiser(network), x, *ends, 1.0, 1e-5, 1e-5, domain=scheduler.domain, **arguments
    )


@pytest.mark.parametrize("data", [TORUS, BOX, SPHERE, PRODUCT], ids=lambda data: type(data.domain).__name__)
def test_the_likelihood_of_the_exact_score_is_the_exact_density(data):
    scheduler = scheduler_on(data.name, sigma_min=0.05)
    x = data.sample(6, seeded())
    found = measure(scheduler, data.network(scheduler), x, steps=48 if data is PRODUCT else 24)
    exact = data.log_density(x, 0.05)
    # flat parts begin with N(0, sigma_max^2), which is not quite what the data become
    assert (found.log_prob - exact).abs().max() < 5e-3
    scheduler.domain.check(found.noise)
    assert found.dimensions == {TORUS: 2, BOX: 2, SPHERE: 2, PRODUCT: 4}[data]


@pytest.mark.parametrize("name", ["torus", "box", "sphere"])
def test_the_density_of_any_network_integrates_to_one(name):
    """A score with an error; in the box one that is tangent to the walls, through which nothing flows then."""
    if name == "sphere":
        nodes, weights = torch.linalg.eigh(
            torch.diag(torch.arange(1, 16).double() / (4 * torch.arange(1, 16).double() ** 2 - 1).sqrt(), 1)
            + torch.diag(torch.arange(1, 16).double() / (4 * torch.arange(1, 16).double() ** 2 - 1).sqrt(), -1)
        )
        height, weight = nodes, 2 * weights[0] ** 2
        longitude = torch.arange(24).double() * (2 * math.pi / 24)
        flat = (1 - height**2).sqrt()[:, None]
        parts = [flat * longitude.cos(), flat * longitude.sin(), height[:, None].expand(-1, 24)]
        x, mass = torch.stack(parts, dim=-1).reshape(-1, 3), weight.repeat_interleave(24) * 2 * math.pi / 24
        matrix = torch.tensor([[0.3, 1, 0], [0, -0.5, 0.4], [0.7, 0, 0.2]]).double()

        def score(x, sigma):
            field = 0.4 * (x @ matrix + torch.tensor([0.5, 0, -0.8]).double()) * torch.exp(-sigma)
            return field - (field * x).sum(1, keepdim=True) * x
    else:
        low, width = (-math.pi, 2 * math.pi) if name == "torus" else (-1.0, 2.0)
        x = (low + width * (torch.arange(64).double() + 0.5) / 64)[:, None]
        mass = torch.full((64,), width / 64).double()

        def score(x, sigma):
            wave = (x + 1).sin() + (2 * x).cos() if name == "torus" else (math.pi * x).sin() + (2 * math.pi * x).sin()
            return 0.25 * wave * torch.exp(-sigma)

    scheduler = scheduler_on(name, sigma_min=0.1)
    network = lambda x, timestep: score(x, scheduler.path.sigma(scheduler.path_time(timestep))[:, None])  # noqa: E731
    found = measure(scheduler, network, x, steps=16)
    assert (found.log_prob.exp() * mass).sum() == pytest.approx(1, abs=1e-4)
    # and is not uniform
    assert found.log_prob.std() > 0.05
    probed = measure(scheduler, network, x, steps=16, trace="gaussian", num_probes=64, generator=seeded())
    offs = (probed.log_prob - found.log_prob) / probed.probe_error
    assert offs.square().mean() < 3


@pytest.fixture(scope="module")
def pipe():
    network = MixtureNetwork()
    network.scheduler = scheduler_on("sphere", sigma_min=0.05)
    pipe = ScoreSDEPipeline(network.scheduler, unet=network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_samples_on_the_domain_and_returns(pipe):
    made = pipe(batch_size=4, num_inference_steps=20, generator=seeded(), output_type="latent").images
    pipe.scheduler.domain.check(made)
    # codes are points, and lead back
    codes = pipe.encode(samples=made, rtol=1e-4, atol=1e-4)
    pipe.scheduler.domain.check(codes)
    back = pipe(latents=codes, num_inference_steps=100, output_type="latent").images
    # the last step denoises
    assert (back - made).norm(dim=1).max() < 0.25
    from_made = pipe(
        image=made[..., 0], strength=0.3, num_inference_steps=10, generator=seeded(), output_type="latent"
    ).images
    pipe.scheduler.domain.check(from_made)
    adaptive = pipe(latents=codes, num_inference_steps=None, output_type="latent").images
    assert (adaptive - back).norm(dim=1).max() < 0.05


def test_its_likelihood_is_the_exact_density(pipe):
    x = SPHERE.sample(6, seeded())[..., None].float()
    found = pipe.log_likelihood(samples=x, trace="exact", steps=16)
    assert (found.log_prob - SPHERE.log_density(x.double(), 0.05)).abs().max() < 0.02


def test_what_has_no_meaning_on_a_domain_is_refused(pipe):
    with pytest.raises(ValueError, match="adaptive_solver 'sde' has no meaning on domain 'sphere'"):
        pipe(num_inference_steps=None, adaptive_solver="sde")
    with pytest.raises(ValueError, match="length 1 along axis 1"):
        pipe(latents=torch.zeros(2, 3, 1) + 0.5)
    inverse = ScoreSDEInversePipeline(pipe.scheduler, unet=pipe.unet)
    with pytest.raises(ValueError, match="in flat space, not on domain 'sphere'"):
        inverse(operator=None, measurement=None)
    with pytest.raises(ValueError, match="few steps are learned in flat space"):
        few_step.flow_map(lambda *_: None, pipe.scheduler, torch.zeros(1, 3, 1), torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="times are fitted in flat space"):
        pipe.scheduler.calibrate(pipe, 4)
