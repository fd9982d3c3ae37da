"""Images that a network sees beside the sample: what it is told of them, by pictures, arrays and tensors, in pixels and
latents, with guidance, likelihood and measurements, saved and opened, and what is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from bundles import LOAD_BY_REMOTE_CODE
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from safetensors.torch import save_file
from tiny import seeded, tiny_pipeline, tiny_vae

from score_sde import (
    DiTModel,
    ScoreSDEInversePipeline,
    ScoreSDEPipeline,
    ScoreSDEScheduler,
    ScoreUNetModel,
    load_bundle,
    save_bundle,
)
from score_sde.pipelines.image_conditions import Measurement
from score_sde.pipelines.operators import LUMINANCE, LinearOperator, colourisation, super_resolution
from score_sde.sharing import info


GREY = torch.rand(2, 1, 8, 8, generator=seeded(1))


def randomized(model, std=0.1):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def seeing_dit(channels=1, sample_channels=1, size=8, **options):
    """A DiT that sees so many channels beside its own, and is told classes."""
    options = {"num_classes": 3, "condition_channels": channels} | options
    return randomized(DiTModel(size, 2, sample_channels + (channels or 0), 16, 1, 2, **options))


UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_resolutions": (4,)}


def seeing_unet(channels=1, sample_channels=1, **options):
    options = UNET | {"condition_channels": channels, "dropout": 0} | options
    options["in_channels"] = sample_channels + (channels or 0)
    return randomized(ScoreUNetModel(**options))


def draw(pipeline, **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded(0)} | arguments
    return pipeline(**arguments).images


def with_measurement(network, condition_from, pipeline_class=ScoreSDEPipeline):
    scheduler = ScoreSDEScheduler(prediction_type="v_prediction")
    component = "unet" if isinstance(network, ScoreUNetModel) else "transformer"
    pipeline = pipeline_class(scheduler, condition_from=condition_from, **{component: network})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_size_that_the_measurement_does_not_divide_is_refused():
    pipeline = with_measurement(seeing_dit(), "downsample:4")
    with pytest.raises(ValueError, match="height 10 and width 8 must be multiples of 4 pixels, of which downsample:4"):
        draw(pipeline, condition_image=torch.zeros(1, 2, 2), height=10, width=8)
    assert draw(pipeline, condition_image=torch.zeros(1, 3, 2), height=12, width=8).shape == (1, 1, 12, 8)


# --- the networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pyramid", [{}, {"progressive_input": "residual"}, {"progressive_input": "input_skip"}])
def test_a_unet_sees_what_a_plain_one_sees_of_both(pyramid):
    network = seeing_unet(channels=2, **pyramid)
    plain = ScoreUNetModel(**UNET, in_channels=3, out_channels=1, dropout=0, **pyramid).eval()
    plain.load_state_dict(network.state_dict())
    x, condition = torch.randn(2, 1, 8, 8, generator=seeded(2)), torch.randn(2, 2, 8, 8, generator=seeded(3))
    found = network(x, 5, condition_sample=condition).sample
    assert torch.equal(found, plain(torch.cat([x, condition], 1), 5).sample)
    assert (found - network(x, 5, condition_sample=condition.flip(-1)).sample).abs().max() > 1e-3


@pytest.mark.parametrize("make", [seeing_dit, seeing_unet])
def test_none_is_zeros_and_what_does_not_fit_is_refused(make):
    network, x, beside = make(), torch.randn(2, 1, 8, 8, generator=seeded(2)), torch.ones(2, 1, 8, 8)
    null = network.null_conditions({"condition_sample": beside})
    assert null.keys() == {"condition_sample"} and not null["condition_sample"].any()
    assert torch.equal(network(x, 5).sample, network(x, 5, condition_sample=torch.zeros_like(beside)).sample)
    assert network.config.in_channels == 2 and network.config.out_channels == 1
    for wrong in (beside[:1], beside[:, :, :4], torch.ones(2, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"condition_sample has shape .*; this model takes \(2, 1, 8, 8\)"):
            network(x, 5, condition_sample=wrong)
    with pytest.raises(ValueError, match="this model takes"):
        network(torch.cat([x, beside], 1), 5)
    always = make(class_dropout_prob=0.0)
    assert always.null_conditions({"condition_sample": beside}) == {}
    with pytest.raises(ValueError, match="condition_sample is missing"):
        always(x, 5)
    assert make(learn_sigma=True).config.out_channels == 2
    with pytest.raises(ValueError, match="condition_channels 2 are a part of in_channels 2"):
        make(channels=2, sample_channels=0)
    with pytest.raises(ValueError, match="given to a model without condition_channels"):
        make(channels=None)(x, 5, condition_sample=beside)


# --- what a network is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_it_is_guided_with_classes_from_neither(scale):
    network, scheduler = seeing_dit(), ScoreSDEScheduler(prediction_type="v_prediction")
    told = {"condition_sample": 2 * GREY - 1, "class_labels": torch.tensor([2, 0])}
    away = {"condition_sample": torch.zeros(2, 1, 8, 8), "class_labels": torch.tensor([3, 3])}
    x = torch.randn(2, 1, 8, 8, generator=seeded(0))
    scheduler.set_timesteps(3, guidance_scale=scale)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            origin, output = (network(x, timestep, **each).sample for each in (away, told))
            x = scheduler.step(origin + scale * (output - origin), timestep, x).prev_sample
    found = draw(tiny_pipeline(network=network), condition_image=GREY, class_labels=[2, 0], guidance_scale=scale)
    assert (found - x).abs().max() < 1e-4
    assert (found - draw(tiny_pipeline(network=network), class_labels=[2, 0])).abs().max() > 1e-2


def test_pictures_arrays_tensors_and_lists_say_the_same():
    pipeline = tiny_pipeline(network=seeing_dit(channels=3, sample_channels=3))
    values = torch.randint(0, 256, (2, 3, 8, 8), generator=seeded(4), dtype=torch.uint8)
    tensors = values.float() / 255
    arrays = tensors.movedim(1, -1).numpy()
    pictures = [Image.fromarray(each.movedim(0, -1).numpy()) for each in values]
    expected = pipeline.encode_condition(tensors)["condition_sample"]
    assert torch.equal(expected, 2 * tensors - 1)
    for given in (list(tensors), arrays, list(arrays), pictures):
        assert torch.equal(pipeline.encode_condition(given)["condition_sample"], expected)
    one = draw(pipeline, condition_image=pictures[0], batch_size=2)
    assert torch.equal(one, draw(pipeline, condition_image=[pictures[0]] * 2))
    assert len(draw(pipeline, condition_image=pictures)) == 2


def test_a_measured_one_is_given_as_it_was_measured_and_shown_at_full_size():
    pipeline = with_measurement(seeing_dit(channels=3, sample_channels=3), "downsample:4")
    x0 = torch.rand(2, 3, 8, 8, generator=seeded(4)) * 2 - 1
    small = super_resolution(4)(x0)
    assert pipeline.condition_shape() == (3, 2, 2)
    told = pipeline.encode_condition(small / 2 + 0.5)["condition_sample"]
    assert (told - Measurement("downsample:4")(x0)).abs().max() < 1e-6
    assert (told[:, :, 4:, :4] - x0[:, :, 4:, :4].mean((2, 3), keepdim=True)).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"is of 8 x 8 pixels; this model takes 2 x 2, as downsample:4 makes them"):
        pipeline.encode_condition(x0 / 2 + 0.5)


@pytest.mark.parametrize("make", [seeing_dit, seeing_unet])
def test_it_is_of_the_size_that_is_asked_for(make):
    pipeline = with_measurement(make(), "downsample:2")
    small = torch.rand(1, 1, 8, 4, generator=seeded(4))
    found = draw(pipeline, condition_image=small, height=16, width=8)
    told = pipeline.encode_condition(small, height=16, width=8)
    assert found.shape == told["condition_sample"].shape == (1, 1, 16, 8)
    assert torch.equal(found, draw(pipeline, conditions=told, height=16, width=8))
    with pytest.raises(ValueError, match="is of 8 x 4 pixels; this model takes 4 x 4, as downsample:2 makes them"):
        draw(pipeline, condition_image=small)
    assert pipeline.condition_shape() == (1, 4, 4)


def test_grey_is_that_of_pillow():
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pipeline = with_measurement(seeing_dit(sample_channels=3), "grayscale")
    told = pipeline.encode_condition(Image.fromarray(values).convert("L"))["condition_sample"]
    x0 = torch.from_numpy(values).movedim(-1, 0)[None].float() / 127.5 - 1
    assert told.shape == (1, 1, 8, 8)
    assert (Measurement("grayscale")(x0) - told).abs().max() < 1.01 / 127.5
    colourisation(weights=LUMINANCE).check((2, 3, 4, 4))
    assert abs(colourisation(weights=LUMINANCE).gram - sum(each**2 for each in LUMINANCE)) < 1e-6


@pytest.mark.parametrize("condition_from", [None, "grayscale", "downsample:2"])
def test_in_latents_it_is_encoded_as_images_are(condition_from):
    vae = tiny_vae(channels=3)
    network = seeing_dit(channels=3, sample_channels=3, size=4, num_classes=None)
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network, vae=vae, condition_from=condition_from)
    x0 = torch.rand(2, 3, 8, 8, generator=seeded(4)) * 2 - 1
    given, shown = x0, x0
    if condition_from is not None:
        given = Measurement(condition_from).operator(x0)
        shown = Measurement(condition_from)(x0).expand(-1, 3, -1, -1)
    assert pipeline.condition_shape() == tuple(given.shape[1:])
    with torch.no_grad():
        told = pipeline.encode_condition(given / 2 + 0.5)["condition_sample"]
        assert (told - pipeline.to_latents(shown)).abs().max() < 1e-5
    assert draw(pipeline, condition_image=given / 2 + 0.5).shape == (2, 3, 4, 4)


# --- a model whose answers are known ----------------------------------------------------------------------------------

SLOPE, SPREAD = 0.7, 0.3


class LinearGaussian(ModelMixin, ConfigMixin):
    """x0 = SLOPE c + SPREAD n for what is seen beside, c: the exact denoised sample."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=2, condition_channels=1):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.scheduler = None

    def forward(self, sample, timestep, condition_sample):
        t = self.scheduler.path_time(timestep).reshape(-1, 1, 1, 1)
        alpha, sigma = self.scheduler.path.alpha(t), self.scheduler.path.sigma(t)
        mean = SLOPE * condition_sample.double()
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return UNet2DOutput(sample=(mean + gain * (sample.double() - alpha * mean)).float())


def exact(pipeline_class=ScoreSDEPipeline, **scheduler):
    network = LinearGaussian()
    pipeline = pipeline_class(ScoreSDEScheduler(prediction_type="sample", **scheduler), transformer=network)
    network.scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_samples_have_the_conditional_mean_and_spread():
    seen = torch.rand(1, 1, 4, 4, generator=seeded(1))
    found = draw(exact(), condition_image=seen, batch_size=2000, num_inference_steps=20)
    mean = SLOPE * (2 * seen - 1)
    assert (found.mean(0) - mean[0]).abs().max() < 4.5 * SPREAD / 2000**0.5
    assert abs(float((found - mean).std()) / SPREAD - 1) < 0.02


def test_likelihood_and_encoding_are_those_given_the_image():
    pytest.importorskip("torchdiffeq")
    pipeline, seen = exact(), torch.rand(2, 1, 4, 4, generator=seeded(1))
    told, mean = pipeline.encode_condition(seen), SLOPE * (2 * seen - 1)
    x = mean + SPREAD * torch.randn(2, 1, 4, 4, generator=seeded(2))
    found = pipeline.log_likelihood(samples=x, conditions=told, trace="rademacher", generator=seeded(3))
    expected = torch.distributions.Normal(mean, SPREAD).log_prob(x).flatten(1).sum(1)
    # at t_min instead of 0
    assert (found.log_prob - expected).abs().max() < 0.05
    code = pipeline.encode(samples=x, conditions=told)
    assert (code - (x - mean) / SPREAD).abs().max() < 0.02


def test_a_measurement_adds_to_what_is_seen():
    """tmpd is exact for Gaussian data: here given both."""
    pipeline, seen = exact(ScoreSDEInversePipeline), torch.rand(1, 1, 4, 4, generator=seeded(1))
    mean, std = SLOPE * (2 * seen - 1), 0.3
    y = torch.full((1, 1, 4, 4), 0.4)
    found = pipeline(
        LinearOperator(lambda x: x, lambda y: y, gram=1.0, value_range=(-1, 1)),
        y,
        method="tmpd",
        noise_std=std,
        batch_size=2000,
        conditions=pipeline.encode_condition(seen),
        num_inference_steps=50,
        output_type="latent",
        generator=seeded(0),
    ).images
    posterior = mean + SPREAD**2 / (SPREAD**2 + std**2) * (y - mean)
    assert (found.mean(0) - posterior[0]).abs().max() < 0.04
    assert (posterior - mean).abs().max() > 0.2


# --- saved ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [seeing_dit, seeing_unet])
def test_it_is_saved_and_opened_with_its_card(make, tmp_path):
    pipeline = with_measurement(make(channels=1, sample_channels=1), "downsample:2")
    small = torch.rand(2, 1, 4, 4, generator=seeded(1))
    expected = draw(pipeline, condition_image=small, guidance_scale=2.0)
    facts = {"conditions": ["condition_sample"], "condition": {"column": None, "from": "downsample:2"}}
    folder = save_bundle(pipeline, tmp_path / "bundle", facts=facts)
    for opened in (load_bundle(folder), ScoreSDEPipeline.from_pretrained(folder)):
        opened.set_progress_bar_config(disable=True)
        assert opened.config.condition_from == "downsample:2"
        torch.testing.assert_close(draw(opened, condition_image=small, guidance_scale=2.0), expected, rtol=0, atol=1e-5)
    with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
        card = file.read()
    assert "pipeline_tag: image-to-image" in card and "`downsample:2`" in card
    assert 'condition = Image.open("condition.png")\nimages = pipe(' in card and "condition_image=condition" in card
    assert "conditions={name: tensor}" not in card
    described = info.describe(folder)
    assert described["condition_from"] == "downsample:2"
    assert "downsample:2" in info.as_text(described) and "condition_channels 1" in info.as_text(described)
    opened = ScoreSDEInversePipeline.from_pretrained(folder)
    assert opened.config.condition_from == "downsample:2"


def test_it_opens_by_its_own_code_where_the_package_is_not(tmp_path):
    pipeline = with_measurement(seeing_dit(), "blur:0.5")
    folder, told = save_bundle(pipeline, tmp_path / "bundle"), {"guidance_scale": 2.0, "class_labels": [1, 0]}
    image = draw(pipeline, output_type="pt", generator=seeded(3), condition_image=GREY, **told)
    save_file({"image": image, "condition": GREY}, tmp_path / "tensors.safetensors")
    arguments = "json.loads(sys.argv[3])"
    code = LOAD_BY_REMOTE_CODE.replace(
        arguments, f"{arguments} | {{'condition_image': load_file(sys.argv[1])['condition']}}"
    )
    command = [sys.executable, "-c", code, tmp_path / "tensors.safetensors", folder, json.dumps(told)]
    environment = dict(os.environ, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    difference, package = json.loads(result.stdout.splitlines()[-1])
    assert difference < 1e-5 and package == "diffusers_modules"


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition_image": torch.rand(1, 1, 6, 8)}, "condition_image is of 6 x 8 pixels; this model takes 8 x 8"),
        ({"condition_image": torch.rand(1, 3, 8, 8)}, r"condition_image has shape \(1, 3, 8, 8\); this model takes"),
        ({"condition_image": 3 * torch.ones(1, 1, 8, 8)}, r"condition_image must be floating-point in \[0, 1\]"),
        ({"condition_image": "a.png"}, "condition_image must be a PIL image, an array or tensor"),
        ({"condition_image": []}, "condition_image is an empty list"),
        ({"condition_image": GREY, "batch_size": 3}, "condition_sample has 2 elements for 3 samples"),
        ({"condition_image": GREY, "conditions": {"condition_sample": GREY}}, "condition_sample was given twice"),
        ({"guidance_scale": 2.0}, "needs class_labels or condition_image"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline(network=seeing_dit()), **arguments)


def test_a_model_without_and_one_that_always_saw_one():
    with pytest.raises(ValueError, match="this DiTModel sees none beside the sample: it has no condition_channels"):
        draw(tiny_pipeline(), condition_image=GREY)
    always = tiny_pipeline(network=seeing_dit(class_dropout_prob=0.0, num_classes=None))
    with pytest.raises(ValueError, match=r"always saw an image beside the sample: pass condition_image, of shape \(1,"):
        draw(always)
    assert draw(always, condition_image=GREY).isfinite().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("upsample:4", "condition_from 'upsample' is unknown; choose one of downsample, grayscale, blur"),
        ("downsample", "downsample needs a whole factor from 2 to 64"),
        ("downsample:1", "downsample needs a whole factor"),
        ("downsample:2.5", "downsample needs a whole factor"),
        ("blur:nan", "blur needs a standard deviation in pixels from 0.1 to 32"),
        ("grayscale:2", "grayscale takes no number"),
        (4, "must be a text"),
    ],
)
def test_what_is_no_measurement_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        ScoreSDEPipeline(ScoreSDEScheduler(), transformer=seeing_dit(), condition_from=name)


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("downsample:3", 3, "condition_from downsample:3: .* does not fit"),
        ("grayscale", 1, "condition_from grayscale: colourisation of 3 channels does not fit"),
        ("blur:9", 3, "condition_from blur:9"),
    ],
)
def test_images_that_cannot_be_measured_are_refused(name, channels, message):
    with pytest.raises(ValueError, match=message):
        Measurement(name).check(channels, (8, 8))
    Measurement("downsample:4").check(3, (8, 8))
