"""Kinds of data: images and signals, through the whole pipeline and into pictures."""

import math

import numpy as np
import pytest
import torch
from exact import GaussianImages
from PIL import Image
from tiny import seeded, tiny_pipeline, tiny_vae

from score_sde import DiTModel, ScoreSDEInversePipeline, ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines.kinds import kind_of
from score_sde.pipelines.operators import inpainting


def signal_dit(**arguments):
    """Two channels of 8 values, with three classes."""
    torch.manual_seed(0)
    model = DiTModel((8,), 2, 2, 16, 1, 2, num_classes=3, **arguments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def gaussian_signals(pipeline_class=ScoreSDEPipeline, **scheduler):
    """A pipeline of exactly known signals, three channels of four independent values of standard deviation 0.5."""
    network = GaussianImages(isotropic=True, sample_size=(4,))
    pipeline = pipeline_class(ScoreSDEScheduler(prediction_type="sample", **scheduler), unet=network)
    network.scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, network.mean.reshape(3, 4)


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [20, None])
def test_signals_are_drawn_as_they_are_distributed(steps):
    pipeline, mean = gaussian_signals()
    output = pipeline(batch_size=4000, num_inference_steps=steps, generator=seeded(0))
    assert isinstance(output.images, np.ndarray) and output.images.shape == (4000, 3, 4)
    assert np.abs(output.images.mean(0) - mean.numpy()).max() < 5 * 0.5 / 4000**0.5
    assert np.abs(output.images.std(0) - 0.5).max() < 5 * 0.5 / 8000**0.5
    tensor = pipeline(batch_size=4000, num_inference_steps=steps, generator=seeded(0), output_type="pt").images
    assert torch.equal(tensor, torch.from_numpy(output.images))


def test_signals_have_the_likelihood_of_their_distribution():
    pipeline, mean = gaussian_signals(t_min=1e-4)
    x = mean.float() + 0.5 * torch.randn(5, 3, 4, generator=seeded(1))
    found = pipeline.log_likelihood(samples=x, trace="exact")
    nats = ((x - mean) ** 2 / 0.25 + math.log(2 * math.pi * 0.25)).flatten(1).mean(1) / 2
    assert found.dimensions == 12
    assert (found.nats_per_dim() - nats).abs().max() < 1e-3
    # of values on a grid of 256 levels over an interval of 2
    assert (found.bits_per_dim() - (nats / math.log(2) + 7)).abs().max() < 2e-3


def test_signals_are_encoded_and_led_back():
    pipeline, mean = gaussian_signals(denoise_final=False)
    x = mean.float() + 0.5 * torch.randn(5, 3, 4, generator=seeded(1))
    code = pipeline.encode(samples=x)
    back = pipeline(latents=code, num_inference_steps=None, rtol=1e-5, atol=1e-5).images
    assert np.abs(back - x.numpy()).max() < 1e-3
    # the code of a Gaussian is its standardised value
    assert (code - (x - mean) / 0.5).abs().max() < 0.02
    # and of a model without an autoencoder, data are samples
    assert torch.equal(pipeline.encode(images=x), code)


def test_signals_are_reconstructed_from_measurements():
    pipeline, mean = gaussian_signals(ScoreSDEInversePipeline, denoise_final=False)
    operator, y = inpainting([1, 0, 1, 0]), torch.tensor([0.3, 0.0, -0.2, 0.0]).expand(1, 3, 4)
    found = pipeline(
        operator, y, noise_std=0.1, batch_size=2000, data_std=0.5, adaptive_weight=False, generator=seeded(0)
    ).images
    gain = torch.tensor([1, 0, 1, 0]) * 0.25 / (0.25 + 0.01)
    expected, std = mean + gain * (y[0] - mean), (0.25 * (1 - gain)).sqrt()
    assert ((torch.from_numpy(found.mean(0)) - expected).abs() / std).max() < 0.15
    assert (torch.from_numpy(found.std(0)) / std - 1).abs().max() < 0.15


def test_classes_guidance_and_editing_of_signals():
    pipeline = tiny_pipeline(network=signal_dit())
    arguments = {"num_inference_steps": 3, "generator": seeded(0)}
    guided = pipeline(class_labels=[0, 2], guidance_scale=2.0, **arguments).images
    assert guided.shape == (2, 2, 8)
    # weakly into the noise, a signal stays what it is; whichever way it is given
    signal, edited = torch.linspace(-3, 3, 16).reshape(2, 8), []
    for given in (signal, signal.numpy(), [signal], signal[None].double()):
        arguments["generator"] = seeded(0)
        edited.append(pipeline(image=given, strength=0.02, class_labels=1, **arguments).images)
        assert np.abs(edited[-1] - signal.numpy()).max() < 0.5
        assert np.array_equal(edited[-1], edited[0])


def test_a_pipeline_of_signals_is_saved_and_opened(tmp_path):
    pipeline = tiny_pipeline(network=signal_dit())
    pipeline.save_pretrained(tmp_path)
    opened = ScoreSDEPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    first, again = (each(class_labels=[1], generator=seeded(3)).images for each in (pipeline, opened))
    np.testing.assert_allclose(again, first, rtol=0, atol=1e-5)
    assert (opened.kind.name, opened.sample_shape(5)) == ("signal", (5, 2, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "pil"}, "choose one of np, pt, latent: this model makes no images but signals"),
        ({"latents": torch.zeros(1, 2, 4)}, r"latents has shape \(1, 2, 4\); this model needs \(1, 2, 8\)"),
        ({"image": torch.zeros(3, 8)}, r"signals must be a tensor \(batch, 2, length\); got shape \(1, 3, 8\)"),
        ({"image": torch.zeros(2, 4)}, r"shape \(1, 2, 8\), not \(1, 2, 4\): resize the signals from 4 to 8 values"),
        ({"image": torch.full((2, 8), math.nan)}, "signals must be finite floating-point numbers"),
        ({"image": "sound.wav"}, "signals must be a tensor .*; got a str"),
    ],
)  # fmt: skip
def test_what_does_not_fit_signals(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(network=signal_dit())(num_inference_steps=1, **arguments)


# --- kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        ({"sample_size": 8, "in_channels": 3}, "image", (2, 3, 8, 8)),
        ({"sample_size": [4, 8], "in_channels": 3}, "image", (2, 3, 4, 8)),
        ({"sample_size": [8], "patch_size": 2, "in_channels": 3}, "signal", (2, 3, 8)),
        ({"sample_size": 8, "patch_size": [2], "in_channels": 3}, "signal", (2, 3, 8)),
        ({"sample_size": 8, "patch_size": [1, 2, 2], "in_channels": 3}, "sample", (2, 3, 8, 8, 8)),
    ],
)
def test_the_kind_of_a_config(config, name, shape):
    kind = kind_of(config)
    assert (kind.name, kind.sample_shape(2), kind.data_channels) == (name, shape, 3)
    assert kind.noise(2, seeded(0), torch.device("cpu")).shape == shape
    if name == "image":
        assert kind_of(config, {"in_channels": 1}).data_channels == 1
    else:
        with pytest.raises(ValueError, match="an autoencoder of images does not fit"):
            kind_of(config, {"in_channels": 1})


def test_an_autoencoder_of_images_decodes_no_signals():
    pipeline = tiny_pipeline(network=signal_dit())
    pipeline.vae = tiny_vae()
    with pytest.raises(ValueError, match="autoencoder of images does not fit a network whose samples have 1 axes"):
        pipeline(num_inference_steps=1)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_a_grid_of_images(tmp_path):
    kind, colours = kind_of({"sample_size": 2, "in_channels": 3}), ["red", "lime", "blue"]
    images = [Image.new("RGB", (2, 2), colour) for colour in colours]
    for columns, size, places in (
        (None, (64, 192), [(0, 0), (0, 1), (0, 2)]),
        (2, (128, 128), [(0, 0), (1, 0), (0, 1)]),
    ):
        kind.save_grid(images, tmp_path / "grid.png", columns=columns)
        grid = Image.open(tmp_path / "grid.png")
        assert grid.size == size
        for image, (column, row) in zip(images, places, strict=True):
            assert grid.getpixel((64 * column + 32, 64 * row + 32)) == image.getpixel((0, 0))
    # what is left is black
    assert grid.getpixel((96, 96)) == (0, 0, 0)
    kind.save_grid(images, tmp_path / "grid.png", columns=17)
    assert Image.open(tmp_path / "grid.png").size == (64, 192)


def test_a_grid_of_signals_is_of_curves(tmp_path):
    kind = kind_of({"sample_size": [32], "in_channels": 1})
    rising = np.linspace(-1, 1, 32)
    signals = np.stack([rising, -rising, 0 * rising + 0.5])[:, None]
    kind.save_grid(signals, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("HSV"))[..., 1]
    panels = np.split(grid > 100, 3, axis=1)  # the coloured curves, on white and grey
    heights = [panel.argmax(0) for panel in panels]
    assert all(panel.any(0).all() for panel in panels)
    # up is up, on one scale, by eye: 4 pixels of margin in panels of 96
    assert heights[0][2] > 88 and heights[0][-3] < 8 and heights[1][2] < 8 and heights[1][-3] > 88
    assert np.abs(heights[2] - (48 - 0.5 * 44)).max() <= 1
    # a signal with gaps is drawn, too
    kind.save_grid(np.full((1, 1, 32), np.nan), tmp_path / "grid.png")
