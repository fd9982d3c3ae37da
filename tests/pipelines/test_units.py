"""Data in units of their own: what goes in and comes out, likelihoods, measurements."""

import math

import numpy as np
import pytest
import torch
from exact import GaussianImages
from tiny import seeded

from score_sde import DiTModel, ScoreSDEInversePipeline, ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines.operators import inpainting


MEAN, STD = [100.0, -3.0, 0.0], [20.0, 0.5, 1000.0]


def gaussian(pipeline_class=ScoreSDEPipeline, **scheduler):
    """(a pipeline of exactly known signals (3, 4) in units, their mean, their standard deviation)."""
    network = GaussianImages(isotropic=True, sample_size=(4,))
    settings = ScoreSDEScheduler(prediction_type="sample", **scheduler)
    pipeline = pipeline_class(settings, unet=network, data_mean=MEAN, data_std=STD)
    network.scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None] for each in (MEAN, STD))
    return pipeline, mean + std * network.mean.reshape(3, 4), 0.5 * std.expand(3, 4)


def test_samples_come_out_in_the_units_of_the_data():
    pipeline, mean, std = gaussian()
    found = torch.from_numpy(pipeline(batch_size=4000, num_inference_steps=20, generator=seeded(0)).images)
    assert ((found.mean(0) - mean) / std).abs().max() < 5 / 4000**0.5
    assert (found.std(0) / std - 1).abs().max() < 5 / 8000**0.5


def test_the_likelihood_is_the_density_in_the_units_of_the_data():
    pipeline, mean, std = gaussian(t_min=1e-4)
    x = (mean + std * torch.randn(5, 3, 4, generator=seeded(1), dtype=torch.float64)).float()
    found = pipeline.log_likelihood(images=x, trace="exact")
    truth = torch.distributions.Normal(mean, std).log_prob(x.double()).sum((1, 2))
    assert (found.log_prob - truth).abs().max() < 0.03
    # of what the network sees, without the change of units
    seen = pipeline.log_likelihood(samples=pipeline.to_latents(x), trace="exact")
    assert torch.allclose(seen.log_prob - found.log_prob, torch.tensor(4 * sum(map(math.log, STD))).double(), atol=1e-3)


def test_what_goes_in_comes_back():
    pipeline, mean, std = gaussian(denoise_final=False)
    x = (mean + std * torch.randn(2, 3, 4, generator=seeded(1), dtype=torch.float64)).float()
    assert torch.allclose(pipeline.decode(pipeline.to_latents(x)), x, rtol=1e-5)
    back = pipeline(latents=pipeline.encode(images=x), num_inference_steps=None, rtol=1e-5, atol=1e-5).images
    assert (np.abs(back - x.numpy()) / std.numpy()).max() < 1e-3
    edited = pipeline(image=x, batch_size=2, strength=0.02, num_inference_steps=5, generator=seeded(0)).images
    assert (np.abs(edited - x.numpy()) / std.numpy()).max() < 0.5


@pytest.mark.parametrize("method", ["pigdm", "replacement"])
def test_measurements_are_in_the_units_of_the_data(method):
    pipeline, mean, std = gaussian(ScoreSDEInversePipeline, denoise_final=False)
    operator = inpainting([1, 0, 1, 0])
    x = mean + std * torch.randn(3, 4, generator=seeded(2), dtype=torch.float64)
    y = operator(x[None].float())
    arguments = {"data_std": 0.5, "adaptive_weight": False} if method == "pigdm" else {}
    output = pipeline(operator, y, method=method, batch_size=500, generator=seeded(0), **arguments)
    found = torch.from_numpy(output.images)
    # the seen values are those that were measured, the others as they are distributed
    assert ((found - x)[:, :, [0, 2]] / std[:, [0, 2]]).abs().max() < 0.1
    assert ((found.mean(0) - mean)[:, [1, 3]] / std[:, [1, 3]]).abs().max() < 0.25


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"data_mean": 0.0}, "belong together"),
        ({"data_mean": 0.0, "data_std": 0.0}, "data_std 0.0 must be positive numbers"),
        ({"data_mean": math.nan, "data_std": 1.0}, "data_mean nan must be finite numbers"),
        ({"data_mean": [0.0, 1.0, 2.0], "data_std": 1.0}, "data_mean is of 3 channels, the network's samples have 2"),
        ({"data_mean": [0.0, "1"], "data_std": 1.0}, "must be finite numbers"),
        ({"data_mean": 10**400, "data_std": 1.0}, "must be finite numbers"),
        ({"data_mean": 0.0, "data_std": 1e-320}, "must be positive numbers"),
        ({"data_mean": {"a": 0.0}, "data_std": 1.0}, "data_mean {'a': 0.0} must be a number for each channel"),
        ({"data_mean": 0.0, "data_std": {"1": 1.0}}, "must be a number for each channel, by its number, from 0 on"),
    ],
)
def test_impossible_units_are_refused(units, message):
    network = DiTModel((8,), 2, 2, 16, 1, 2, num_classes=3)
    with pytest.raises(ValueError, match=message):
        ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network, **units)


def test_units_are_saved_and_opened(tmp_path):
    network = DiTModel((8,), 2, 2, 16, 1, 2, num_classes=3)
    ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network, data_mean=[1.0, 2], data_std=4.0).save_pretrained(
        tmp_path
    )
    opened = ScoreSDEPipeline.from_pretrained(tmp_path)
    assert opened.units == {"data_mean": [1.0, 2], "data_std": 4.0}
    index = (tmp_path / "model_index.json").read_text(encoding="utf-8")
    (tmp_path / "model_index.json").write_text(index.replace('"data_std": 4.0', '"data_std": -4.0'), encoding="utf-8")
    with pytest.raises(ValueError, match="data_std -4.0 must be positive"):
        ScoreSDEPipeline.from_pretrained(tmp_path)
