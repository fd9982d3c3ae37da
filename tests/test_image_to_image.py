"""SDEdit: from an image under noise, with labels, by every kind of sampler."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import random_dit, tiny_pipeline

from score_sde import ScoreSDEScheduler


@pytest.fixture
def pipeline():
    return tiny_pipeline(network=random_dit(sample_size=8))


def image(n=2):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def edit(pipeline, **arguments):
    arguments = {"image": image(), "class_labels": [0, 2], "num_inference_steps": 12} | arguments
    return pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **arguments)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"predictor": "heun", "s_churn": 3.0},
        {"predictor": "ancestral", "corrector": "langevin"},
        {"sde_type": "discrete_vp", "predictor": "ddim", "timestep_spacing": "trailing"},
        {"sde_type": "ve", "predictor": "euler_maruyama"},
        {"sde_type": "linear", "predictor": "dpmpp_3m"},
    ],
)
def test_less_strength_stays_closer_to_the_image(pipeline, settings):
    pipeline.scheduler = ScoreSDEScheduler(prediction_type="v_prediction", **settings)
    distances = []
    for strength in (0.05, 0.4, 1.0):
        output = edit(pipeline, strength=strength)
        assert output.images.shape == (2, 1, 8, 8)
        distances.append((output.images - image()).abs().mean())
        pipeline.scheduler.set_timesteps(12, t_start=pipeline.scheduler.t_min + strength * (1 - 1e-3))
        assert output.nfe == pipeline.scheduler.nfe
    assert distances[0] < distances[1]
    assert distances[0] < 0.3


def test_it_begins_where_the_noise_puts_it(pipeline):
    """Strength s is the path time at which the trajectory begins, with all of its steps."""
    output = edit(pipeline, strength=0.4)
    scheduler = pipeline.scheduler
    begin = torch.tensor(scheduler.t_min + 0.4 * (1 - scheduler.t_min), dtype=torch.float64)
    assert output.nfe == 12
    # by hand
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = scheduler.path.sample(2 * image() - 1, noise, begin)
    scheduler.set_timesteps(12, t_start=float(begin))
    network = pipeline.guided_network(2, [0, 2])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(network(x, timestep.expand(2)), timestep, x).prev_sample
    assert (output.images - (x / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


def test_one_image_makes_several_and_pil_is_taken(pipeline):
    output = pipeline(image=image(1), class_labels=[0, 1, 2], num_inference_steps=3, output_type="pil")
    assert len(output.images) == 3
    again = pipeline(image=output.images, class_labels=[0, 1, 2], num_inference_steps=3, output_type="pt")
    assert again.images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("adaptive_solver", ["ode", "sde"])
def test_adaptive_solvers_begin_there_too(pipeline, adaptive_solver):
    weak = edit(pipeline, num_inference_steps=None, strength=0.1, adaptive_solver=adaptive_solver)
    strong = edit(pipeline, num_inference_steps=None, strength=1.0, adaptive_solver=adaptive_solver)
    assert weak.nfe < strong.nfe
    assert (weak.images - image()).abs().mean() < (strong.images - image()).abs().mean()
    if adaptive_solver == "ode":
        fixed = edit(pipeline, num_inference_steps=60, strength=0.1)
        assert (fixed.images - weak.images).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.0}, "strength 0.0 must lie in .0, 1."),
        ({"strength": 1.2}, "strength 1.2"),
        ({"image": torch.rand(3, 1, 8, 8)}, "3 images were given for batch_size 2"),
        ({"image": torch.rand(2, 1, 4, 4)}, r"shape \(2, 1, 8, 8\), not \(2, 1, 4, 4\)"),
    ],
)
def test_wrong_arguments_are_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        edit(pipeline, **arguments)


def test_stock_schedulers_are_refused(pipeline):
    pipeline.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="image needs a ScoreSDEScheduler"):
        edit(pipeline)


def test_the_scheduler_refuses_a_start_outside_the_path():
    scheduler = ScoreSDEScheduler()
    for arguments in ({"num_inference_steps": 5, "t_start": 1.5}, {"timesteps": [500.0], "t_start": 0.5}):
        with pytest.raises(ValueError, match="t_start .* must lie above 0.001 and at most at 1"):
            scheduler.set_timesteps(**arguments)
