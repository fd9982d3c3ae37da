"""The default predictor under classifier-free guidance, and on grids that are given."""

import pytest
import torch

from score_sde import ScoreSDEScheduler
from score_sde.schedulers.solvers import AUTOMATIC, UNGUIDED, UNGUIDED_FROM_LITTLE_NOISE, automatic


STABLE_DIFFUSION = {
    "sde_type": "discrete_vp",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SETTINGS = {"sd": STABLE_DIFFUSION, "edm": {"sde_type": "edm"}, "flow": {"sde_type": "linear"}}


class Classes:
    """Eight normal distributions, each a class, in 256 dimensions: far apart, as the classes of latents are."""

    def __init__(self, scale):
        generator = torch.Generator().manual_seed(0)
        self.means = 0.5 * torch.randn(8, 256, generator=generator, dtype=torch.float64)
        self.noise = torch.randn(16, 256, generator=generator, dtype=torch.float64)
        self.labels, self.scale = torch.arange(16) % 8, scale

    def guided(self, x, alpha, sigma):
        """D + scale (D_class - D), exactly."""
        total = alpha**2 * 0.09 + sigma**2
        share = torch.softmax(-(torch.cdist(x, alpha * self.means) ** 2) / (2 * total), dim=1)
        own = torch.nn.functional.one_hot(self.labels, 8).to(x)
        mean = (share + self.scale * (own - share)) @ self.means
        return mean + alpha * 0.09 / total * (x - alpha * mean)

    def run(self, scheduler, **times):
        scheduler.set_timesteps(**times)
        path, x = scheduler.path, self.noise * scheduler.init_noise_sigma
        for timestep, stage in zip(scheduler.timesteps, scheduler._planned().stages, strict=True):
            denoised = self.guided(x, float(path.alpha(stage.t_eval)), float(path.sigma(stage.t_eval)))
            x = scheduler.step(denoised, timestep, x).prev_sample
        return x


def distance(x, exact):
    return (x - exact).pow(2).mean(1).sqrt()


@pytest.fixture(scope="module", params=SETTINGS)
def reference(request):
    settings, problem = SETTINGS[request.param] | {"prediction_type": "sample"}, Classes(12.0)
    exact = problem.run(
        ScoreSDEScheduler(**settings, predictor="heun", timestep_spacing="logistic"), num_inference_steps=400
    )
    return settings, problem, exact


@pytest.mark.parametrize("n", [5, 6, 8, 10, 15, 20, 30, 50])
def test_no_sample_diverges_under_much_guidance(reference, n):
    """Where the scale isn't told, as in stock pipelines."""
    settings, problem, exact = reference
    errors = distance(problem.run(ScoreSDEScheduler(**settings), num_inference_steps=n), exact)
    assert errors.max() < exact.pow(2).mean().sqrt()


GRIDS = [("sd", "linspace", 1.0), ("sd", "trailing", 1.0), ("sd", "karras", 1.0), ("edm", "karras", 1.0)]
GRIDS += [("flow", "linspace", 1.0), ("flow", "linspace", 3.0)]


@pytest.mark.parametrize("path, spacing, shift", GRIDS)
@pytest.mark.parametrize("n", [6, 15, 30])
def test_on_given_times_it_is_no_worse_than_euler(path, spacing, shift, n):
    settings, problem = SETTINGS[path] | {"prediction_type": "sample"}, Classes(7.5)
    exact = problem.run(
        ScoreSDEScheduler(**settings, predictor="heun", timestep_spacing="logistic"), num_inference_steps=400
    )
    stock = ScoreSDEScheduler(**settings, predictor="ddim", timestep_spacing=spacing, shift=shift)
    ends = [problem.run(stock, num_inference_steps=n)]
    ends.append(problem.run(ScoreSDEScheduler(**settings), timesteps=stock.timesteps))
    euler, auto = (distance(end, exact).median() for end in ends)
    assert auto < euler


def test_the_rule_follows_the_guidance_scale():
    assert automatic(20) is automatic(20, 7.5) is AUTOMATIC[5]
    assert automatic(20, 1.0) is automatic(20, 0.0) is UNGUIDED[-1]
    assert automatic(8, 1.5) is UNGUIDED[1]
    assert automatic(8, -1.0) is automatic(8, 4.0) is AUTOMATIC[2]
    # Stable Diffusion's chain begins at sigma / alpha = 14.6
    assert automatic(20, 1.0, 2.68) is UNGUIDED_FROM_LITTLE_NOISE[-1] and automatic(20, 7.5, 2.68) is AUTOMATIC[5]


def test_a_path_of_little_noise_has_its_own_rules_without_guidance():
    predictors = []
    for settings in (STABLE_DIFFUSION, {"sde_type": "discrete_vp"}):
        scheduler = ScoreSDEScheduler(**settings)
        scheduler.set_timesteps(15, guidance_scale=1.0)
        predictors.append(scheduler._planned().predictor)
    assert predictors == ["adams_3", "adams_4"]


def test_set_timesteps_is_told_the_guidance_scale():
    scheduler, times = ScoreSDEScheduler(), []
    for scale in (None, 1.0, 7.5):
        scheduler.set_timesteps(20, guidance_scale=scale)
        times.append(scheduler.timesteps)
    assert torch.equal(times[0], times[2]) and not torch.equal(times[0], times[1])
    scheduler.set_timesteps(20)
    assert torch.equal(scheduler.timesteps, times[0])
    with pytest.raises(ValueError, match="guidance_scale nan must be a number"):
        scheduler.set_timesteps(20, guidance_scale=float("nan"))
