"""Schedulers and objectives on a GPU: what they make on the CPU of the same noise, by every path, predictor, corrector
and weighting."""

import pytest
import torch
from device import DEVICE, difference
from networks import randn, small_dit

from score_sde import ScoreSDEScheduler
from score_sde.losses import TIME_DENSITIES, WEIGHTINGS, Objective, hybrid_loss
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES
from score_sde.schedulers.solvers import PREDICTORS


pytestmark = pytest.mark.gpu

EXACT = 1e-4


def sample(device, steps=6, dtype=torch.float32, **settings):
    """A trajectory of a smooth denoiser, with noise of the CPU."""
    scheduler, generator = ScoreSDEScheduler(**settings), torch.Generator().manual_seed(0)
    learned = 2 if settings.get("variance_type") == "learned_range" else 1
    scheduler.set_timesteps(steps, device)
    assert scheduler.timesteps.device.type == torch.device(device).type
    x = (randn(3, 2, 4, 4) * scheduler.init_noise_sigma).to(device, dtype)
    for timestep in scheduler.timesteps:
        output = 0.5 * scheduler.scale_model_input(x, timestep).tanh()
        output = torch.cat([output] * learned, dim=1)
        x = scheduler.step(output, timestep, x, generator=generator).prev_sample
    assert x.device.type == torch.device(device).type and x.dtype == dtype
    return x


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_every_path_and_prediction(sde_type, prediction_type):
    settings = {"sde_type": sde_type, "prediction_type": prediction_type}
    assert difference(sample(DEVICE, **settings), sample("cpu", **settings)) < EXACT


@pytest.mark.parametrize("predictor", ["auto", *(name for name, row in PREDICTORS.items() if not row.maps)])
@pytest.mark.parametrize("corrector", [None, "langevin", "annealed_langevin"])
def test_every_predictor_and_corrector(predictor, corrector):
    if predictor == "none" and corrector is None:
        pytest.skip("does nothing")
    settings = {"predictor": predictor, "corrector": corrector, "prediction_type": "v_prediction"}
    assert difference(sample(DEVICE, **settings), sample("cpu", **settings)) < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"predictor": "ancestral", "variance_type": "learned_range", "sde_type": "discrete_vp"},
        {"predictor": "heun", "s_churn": 3.0},
        {"thresholding": True, "sample_max_value": 2.0},
        {"clip_sample": True},
    ],
    ids=str,
)
def test_options(settings):
    assert difference(sample(DEVICE, **settings), sample("cpu", **settings)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_states_in_half_precision(dtype):
    found, expected = sample(DEVICE, dtype=dtype), sample("cpu")
    assert difference(found, expected) < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_noise_is_added_as_on_the_cpu(sde_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type)
    timesteps = scheduler.timestep(torch.tensor([0.1, 0.5, 0.9]))
    x0, noise = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=2)
    expected = scheduler.add_noise(x0, noise, timesteps)
    found = scheduler.add_noise(x0.to(DEVICE), noise.to(DEVICE), timesteps.to(DEVICE))
    assert found.device.type == DEVICE.type and difference(found, expected) < EXACT


def uniform_numbers(count=4):
    return (torch.arange(count, dtype=torch.float64) + 0.3) / count


OBJECTIVES = [("uniform", weighting) for weighting in WEIGHTINGS]
OBJECTIVES += [(density, "output") for density in TIME_DENSITIES] + [("importance", "likelihood")]


@pytest.mark.parametrize(("density", "weighting"), OBJECTIVES)
def test_every_objective(density, weighting):
    def gradient(device):
        model, objective = small_dit().to(device), Objective(ScoreSDEScheduler(), density, weighting)
        labels = torch.arange(4, device=device)
        x0, noise = randn(4, 3, 8, 8).to(device), randn(4, 3, 8, 8, seed=2).to(device)
        t = objective.times(uniform_numbers())
        objective(model, x0, noise, t, {"class_labels": labels}).mean().backward()
        return model.proj_out.weight.grad

    assert difference(gradient(DEVICE), gradient("cpu")) < EXACT


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_the_plain_objective_of_every_path(sde_type):
    def loss(device):
        objective = Objective(ScoreSDEScheduler(sde_type=sde_type))
        x0, noise = randn(4, 3, 8, 8).to(device), randn(4, 3, 8, 8, seed=2).to(device)
        return objective(small_dit().to(device), x0, noise, objective.times(uniform_numbers()))

    assert difference(loss(DEVICE), loss("cpu")) < EXACT


def test_the_variational_bound():
    def gradient(device):
        model = small_dit(learn_sigma=True).to(device)
        scheduler = ScoreSDEScheduler(sde_type="discrete_vp", num_train_timesteps=4, variance_type="learned_range")
        t = Objective(scheduler, "levels").times(uniform_numbers())
        x0, noise = randn(4, 3, 8, 8).to(device), randn(4, 3, 8, 8, seed=2).to(device)
        hybrid_loss(model, scheduler, x0, noise, t, vlb_weight=1.0).mean().backward()
        return model.proj_out.weight.grad

    assert difference(gradient(DEVICE), gradient("cpu")) < EXACT
