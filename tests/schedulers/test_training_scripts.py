"""What diffusers' training examples ask of a scheduler, beside the stock scheduler;
`benchmarks/training_examples.py` runs the examples."""

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from score_sde import ScoreSDEScheduler


SCHEDULES = {
    "Stable Diffusion": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "Kandinsky": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_targets_and_weights_are_those_of_the_stock_scheduler(name, tmp_path):
    stock = diffusers.DDPMScheduler(**SCHEDULES[name])
    stock.save_pretrained(tmp_path / "scheduler")
    ours = ScoreSDEScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert ours.config.num_train_timesteps == 1000 and ours.config.prediction_type == stock.config.prediction_type
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 8, 3, 2, 2, generator=generator)
    timesteps = torch.tensor([0, 1, 10, 300, 500, 900, 998, 999])
    for name in ("add_noise", "get_velocity"):
        expected, found = (getattr(each, name)(images, noise, timesteps) for each in (stock, ours))
        assert (expected - found).abs().max() < 1e-4, name
    # at the last level zero SNR has none
    inside = timesteps[:-1]
    assert (compute_snr(ours, inside) / compute_snr(stock, inside) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_type_that_a_script_registers_is_what_is_drawn_by(prediction_type):
    """As `--prediction_type` of the examples does."""
    stock = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="ddim")
    x, output = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    steps = []
    for scheduler in (stock, ours):
        scheduler.register_to_config(prediction_type=prediction_type)
        scheduler.set_timesteps(10)
        steps.append(scheduler.step(output, scheduler.timesteps[3], x).prev_sample)
    assert (steps[0] - steps[1]).abs().max() < 1e-5
    assert ScoreSDEScheduler.from_config(ours.config).parameterization.prediction_type == prediction_type


def test_a_prediction_type_that_is_none_is_refused():
    scheduler = ScoreSDEScheduler()
    with pytest.raises(ValueError, match="prediction_type 'noise'"):
        scheduler.register_to_config(prediction_type="noise")
    assert scheduler.config.prediction_type == "epsilon"
