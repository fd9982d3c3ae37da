"""What pipelines do, on samples of one, two and three axes, with both networks."""

import diffusers.guiders
import numpy as np
import pytest
import torch
from exact import GaussianImages
from tiny import seeded

from score_sde import DiTModel, ScoreSDEInversePipeline, ScoreSDEPipeline, ScoreSDEScheduler, ScoreUNetModel
from score_sde.pipelines.operators import inpainting


SIZES = {1: (8,), 2: (4, 4), 3: (2, 4, 4)}
RATES = {1: {"sampling_rate": 8000}, 2: {}, 3: {"frame_rate": 8}}
NETWORKS = [("dit", 1), ("dit", 2), ("dit", 3), ("latte", 3), ("unet", 1), ("unet", 2), ("unet", 3)]
every_network = pytest.mark.parametrize(("network", "axes"), NETWORKS)


def make_network(network, axes):
    torch.manual_seed(0)
    size = SIZES[axes]
    if network == "unet":
        model = ScoreUNetModel(
            size, 1, block_out_channels=(8, 8), layers_per_block=1, attention_resolutions=(), num_classes=3,
            dimensions=axes, fir=True, dropout=0.0,
        )  # fmt: skip
    else:
        patch = (1, 2, 2)[-axes:] if axes > 1 else (2,)
        model = DiTModel(size, patch, 1, 24, 1, 2, num_classes=3, factorized_attention=network == "latte")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_pipeline(network, axes, pipeline_class=ScoreSDEPipeline, **scheduler):
    component = {"unet" if network == "unet" else "transformer": make_network(network, axes)}
    scheduler = ScoreSDEScheduler(prediction_type="v_prediction", **scheduler)
    pipeline = pipeline_class(scheduler, **component, **RATES[axes])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples_of(pipeline, count=2, seed=1):
    return 0.5 * torch.randn(pipeline.sample_shape(count), generator=seeded(seed))


@every_network
def test_guidance(network, axes):
    """By a scale, from the network's own outputs for the class and for none; by a guider; each in a whole trajectory
    from a seed for each sample, which then depends on nothing else."""
    pipeline = make_pipeline(network, axes)
    model, x, time = pipeline.denoiser, samples_of(pipeline), torch.tensor([100.0, 700.0])
    with torch.no_grad():
        labels = torch.tensor([0, 2])
        to, away = (model(x, time, class_labels=each).sample for each in (labels, torch.full((2,), 3)))
        guided = pipeline.guided_network(2, [0, 2], 2.5)(x, time)
    assert (guided - (away + 2.5 * (to - away))).abs().max() < 1e-5 and (to - away).abs().max() > 1e-4

    def draw(labels, seeds, **arguments):
        generators = [seeded(seed) for seed in seeds]
        arguments |= {"num_inference_steps": 4, "output_type": "latent", "generator": generators}
        return pipeline(class_labels=labels, **arguments).images

    both = draw([0, 2], [5, 6], guidance_scale=2.5)
    assert both.shape == (2, 1, *SIZES[axes])
    assert (draw([2], [6], guidance_scale=2.5) - both[1:]).abs().max() < 1e-5
    guider = diffusers.guiders.ClassifierFreeGuidance(guidance_scale=2.5, use_original_formulation=False)
    by_guider = draw([0, 2], [5, 6], guider=guider)
    assert (by_guider - both).abs().max() < 1e-5


@every_network
def test_likelihood(network, axes):
    """With the trace by automatic differentiation of the whole network, and as probes have it on average."""
    pipeline = make_pipeline(network, axes)
    x = samples_of(pipeline)
    given = {"samples": x, "class_labels": [0, 2], "steps": 2}
    exact = pipeline.log_likelihood(**given, trace="exact")
    estimate = pipeline.log_likelihood(**given, num_probes=16, generator=seeded(0))
    assert exact.dimensions == x[0].numel() and exact.noise.shape == x.shape
    assert ((estimate.log_prob - exact.log_prob).abs() < 5 * estimate.probe_error).all()


@pytest.mark.parametrize("axes", SIZES)
def test_the_likelihood_is_that_of_gaussian_data(axes):
    """Of 12 independent values around a mean, whatever their shape; and their codes lead back to them."""
    pytest.importorskip("torchdiffeq")
    network = GaussianImages(isotropic=True, sample_size={1: (4,), 2: (2, 2), 3: (1, 2, 2)}[axes])
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(prediction_type="sample", t_min=1e-4), unet=network, **RATES[axes])
    network.scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    mean = network.mean.reshape(pipeline.sample_shape(1)[1:])
    x = mean.float() + 0.5 * torch.randn(pipeline.sample_shape(4), generator=seeded(1))
    found = pipeline.log_likelihood(samples=x, trace="exact")
    nats = ((x - mean) ** 2 / 0.25 + np.log(2 * np.pi * 0.25)).flatten(1).sum(1) / 2
    assert (found.log_prob + nats).abs().max() < 0.01
    arguments = {"num_inference_steps": None, "rtol": 1e-5, "atol": 1e-5, "output_type": "latent"}
    assert (pipeline(latents=pipeline.encode(samples=x), **arguments).images - x).abs().max() < 0.02


@pytest.mark.parametrize("method", ["pigdm", "tmpd", "dps", "replacement", "repaint"])
@every_network
def test_inverse_problems(network, axes, method):
    """Half of the values are known; what is made has them, to the accuracy of the method."""
    pipeline = make_pipeline(network, axes, ScoreSDEInversePipeline)
    mask = (torch.arange(SIZES[axes][-1]) % 2).expand(SIZES[axes])
    operator, truth = inpainting(mask), samples_of(pipeline, 1)
    arguments = {"class_labels": [1], "num_inference_steps": 6, "generator": seeded(0), "output_type": "latent"}
    if method == "repaint":
        arguments |= {"jump_length": 2, "resamplings": 2}
    found = pipeline(operator, operator(truth), method=method, **arguments)
    assert found.images.shape == truth.shape and torch.isfinite(found.images).all()
    alone = ScoreSDEPipeline(**pipeline.components, **RATES[axes])
    alone.set_progress_bar_config(disable=True)
    unguided = alone(class_labels=[1], num_inference_steps=6, generator=seeded(0), output_type="latent").images
    before = float((operator(unguided) - operator(truth)).square().mean().sqrt())
    assert float(found.residual) < {"dps": 1.0, "pigdm": 0.5, "tmpd": 0.5}.get(method, 1e-5) * before


@every_network
def test_editing_trajectories_and_output_types(network, axes):
    """Weakly into the noise data stay what they are, whichever way they are given; callbacks see every evaluation; an
    adaptive solver ends where many steps do."""
    pipeline, seen = make_pipeline(network, axes), []

    def draw(**arguments):
        arguments = {"num_inference_steps": 6, "generator": seeded(0), "class_labels": [0, 2]} | arguments
        return pipeline(**arguments)

    latent = draw(
        output_type="latent",
        callback_on_step_end=lambda pipe, step, time, given: seen.append(given["latents"].shape) or {},
    )
    assert seen == [tuple(latent.images.shape)] * latent.nfe
    for output_type in pipeline.kind.output_types[:-1]:
        if output_type != "pil" or axes == 1:
            given = draw(output_type=output_type).images
            again = draw(image=given, strength=0.02, output_type="latent").images
            wanted = latent.images if axes == 1 else latent.images.clamp(-1, 1)
            assert (again - wanted).abs().max() < 0.5
    fine, adaptive = (
        draw(num_inference_steps=steps, output_type="latent", **more).images
        for steps, more in ((60, {}), (None, {"rtol": 1e-3, "atol": 1e-3}))
    )
    assert (fine - adaptive).abs().max() < 0.1


@every_network
def test_calibration(network, axes):
    pipeline = make_pipeline(network, axes)
    found = pipeline.scheduler.calibrate(pipeline, 3, num_samples=2, reference_steps=10, sweeps=1, generator=seeded(0))
    before, after = found[3]
    assert after <= before
    assert pipeline(class_labels=[0], num_inference_steps=3, generator=seeded(0), output_type="latent").nfe == 3


@every_network
def test_data_of_another_shape_are_refused(network, axes):
    pipeline = make_pipeline(network, axes)
    wrong = torch.zeros(1, 1, *(2 * side for side in SIZES[axes]))
    with pytest.raises(ValueError, match="this model needs"):
        pipeline(latents=wrong, class_labels=[0])
    with pytest.raises(ValueError, match="the model works on samples of shape|must be a multiple of"):
        pipeline.check_data(None, wrong)
    with pytest.raises(ValueError, match="must be a tensor"):
        pipeline.kind.check(wrong[0])
