"""ScoreSDEPipeline and its bundles: sampling, folders opened with and without this package, cards."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from huggingface_hub import ModelCard
from networks import tiny_dit, tiny_unet
from places import SHARED
from safetensors.torch import load_file
from tiny import seeded, tiny_vae

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.pipelines.latents import denormalize_latents, encode_moments, normalize_latents
from score_sde.sharing.bundles import add_metrics
from score_sde.sharing.model_card import write_card


LABELS = {0: "shirt", 1: "shoe", 2: "bag", 3: "coat", 4: "hat"}


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixel_pipeline(scheduler=None, network=None, **arguments):
    scheduler = scheduler or ScoreSDEScheduler()
    return quiet(ScoreSDEPipeline(scheduler, transformer=network or tiny_dit(), id2label=LABELS, **arguments))


def latent_pipeline(**arguments):
    return pixel_pipeline(vae=tiny_vae(), **arguments)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipeline, **arguments):
    defaults = {"num_inference_steps": 3, "output_type": "latent", "generator": seeds(0)[0]}
    return pipeline(**(defaults | arguments)).images


def by_hand(network, scheduler, latents, labels=None, guidance_scale=1.0, null_label=5, generator=None, steps=3):
    """The sampling loop as diffusers' pipelines write it, with two separate network calls for guidance."""
    # stock schedulers draw noise from the generator where their step takes one
    arguments = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    told = {"guidance_scale": guidance_scale} if isinstance(scheduler, ScoreSDEScheduler) else {}
    scheduler.set_timesteps(steps, **told)
    x = latents * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, timestep)
            output = network(scaled, timestep, class_labels=labels).sample
            if guidance_scale != 1:
                unconditional = network(scaled, timestep, class_labels=torch.full_like(labels, null_label)).sample
                output = unconditional + guidance_scale * (output - unconditional)
            x = scheduler.step(output, timestep, x, **arguments).prev_sample
    return x


def close(a, b, tolerance=1e-5):
    """Equal up to rounding, in units of the largest value: networks of random weights give large samples."""
    return (a - b).abs().max() <= tolerance * b.abs().max()


# --- sampling -----------------------------------------------------------------------------------------------------


def test_output_types():
    pipeline = latent_pipeline()
    assert draw(pipeline, class_labels=[0, 1]).shape == (2, 3, 8, 8)
    pixels = draw(pipeline, class_labels=[0, 1], output_type="pt")
    assert pixels.shape == (2, 1, 16, 16)
    assert 0 <= pixels.min() < pixels.max() <= 1
    array = draw(pipeline, class_labels=[0, 1], output_type="np")
    assert np.abs(array - pixels.permute(0, 2, 3, 1).numpy()).max() < 1e-6
    images = draw(pipeline, class_labels=[0, 1], output_type="pil")
    assert [image.size for image in images] == [(16, 16)] * 2
    assert np.abs(np.asarray(images[0]) / 255 - array[0, ..., 0]).max() <= 0.5 / 255 + 1e-6
    (as_tuple,) = pipeline(class_labels=0, num_inference_steps=1, return_dict=False)
    assert len(as_tuple) == 1


def test_class_labels_by_number_name_list_and_tensor():
    pipeline = pixel_pipeline()
    expected = draw(pipeline, class_labels=[1, 3])
    arrays = np.array([1, 3]), np.array(["shoe", "coat"]), [np.int64(1), torch.tensor(3)], (1, 3), range(1, 4, 2)
    for labels in (["shoe", "coat"], ["shoe", 3], torch.tensor([1, 3]), *arrays):
        assert torch.equal(draw(pipeline, class_labels=labels), expected)
    for label in (np.int64(1), torch.tensor(1), np.array(1), "shoe"):
        assert pipeline.label_ids(label) == [1]
    assert torch.equal(draw(pipeline, class_labels="bag", batch_size=2), draw(pipeline, class_labels=[2, 2]))
    assert len(draw(pipeline, class_labels=4)) == 1


def test_no_labels_draw_from_the_null_class():
    pipeline = pixel_pipeline(network=tiny_dit())
    latents = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        scheduler = ScoreSDEScheduler()
        scheduler.set_timesteps(1)
        output = pipeline.transformer(latents, scheduler.timesteps[0], torch.tensor([5, 5])).sample
        expected = scheduler.step(output, scheduler.timesteps[0], latents).prev_sample
    assert torch.equal(draw(pipeline, latents=latents, num_inference_steps=1), expected)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_guidance_is_classifier_free_guidance_on_every_channel(learn_sigma):
    network, latents, labels = tiny_dit(learn_sigma=learn_sigma), torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    expected = by_hand(network, ScoreSDEScheduler(), latents, labels, guidance_scale=2.5)
    arguments = {"class_labels": labels, "latents": latents}
    guided = draw(pixel_pipeline(network=network), guidance_scale=2.5, **arguments)
    assert close(guided, expected)
    assert not close(guided, draw(pixel_pipeline(network=network), **arguments), 1e-2)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"predictor": "euler_maruyama", "corrector": "langevin"}, {"predictor": "ancestral"}],
    ids=str,
)
def test_an_image_depends_on_its_seed_only(arguments):
    pipeline = pixel_pipeline(ScoreSDEScheduler(**arguments))
    together = draw(pipeline, class_labels=[0, 1, 2], generator=seeds(7, 8, 9))
    for i, seed in enumerate([7, 8, 9]):
        alone = draw(pipeline, class_labels=[i], generator=seeds(seed))
        assert close(together[i], alone[0])
    assert torch.equal(together, draw(pipeline, class_labels=[0, 1, 2], generator=seeds(7, 8, 9)))
    assert not close(together, draw(pipeline, class_labels=[0, 1, 2], generator=seeds(7, 8, 10)), 1e-2)


def test_callback_sees_every_evaluation_and_may_replace_the_latents():
    pipeline = pixel_pipeline(ScoreSDEScheduler(predictor="heun"))
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if len(seen) == 5 else {}

    images = draw(pipeline, class_labels=0, callback_on_step_end=callback)
    pipeline.scheduler.set_timesteps(3)
    assert seen == list(enumerate(pipeline.scheduler.timesteps.tolist()))
    assert len(seen) == 5
    assert images.abs().max() == 0


def test_callbacks_of_diffusers_end_guidance():
    """What `SDCFGCutoffCallback` leaves is the network told the class alone, from the evaluation after its step on."""
    pipeline, latents, labels = pixel_pipeline(), torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    scheduler = ScoreSDEScheduler()
    scheduler.set_timesteps(6)
    x, network = latents * scheduler.init_noise_sigma, pipeline.transformer
    for i, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = network(x, timestep, labels).sample
            if i <= 1:
                origin = network(x, timestep, torch.tensor([5, 5])).sample
                output = origin + 2.5 * (output - origin)
        x = scheduler.step(output, timestep, x).prev_sample
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance))
        return tensors

    watch.tensor_inputs = []
    arguments = {"class_labels": labels, "latents": latents, "guidance_scale": 2.5, "num_inference_steps": 6}
    callback = MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=0.2), watch])
    assert close(draw(pipeline, callback_on_step_end=callback, **arguments), x)
    assert seen == [(6, 2.5, True)] + [(6, 0.0, True)] * 5
    # without the callback: guided to the end, as before it
    assert not close(draw(pipeline, **arguments), x, 1e-4)
    unconditional = pixel_pipeline(network=tiny_dit(num_classes=None))
    with pytest.raises(ValueError, match="prompt_embeds are class labels"):
        draw(unconditional, callback_on_step_end=SDCFGCutoffCallback(0.5))


def test_callbacks_change_guidance_and_labels():
    pipeline, latents = pixel_pipeline(), torch.randn(2, 3, 8, 8)
    arguments = {"class_labels": [1, 4], "latents": latents, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}

    def begin(pipe, step, timestep, tensors):
        assert tensors["prompt_embeds"].tolist() == [[5, 5], [1, 4]]
        pipe._guidance_scale = 2.5

    def swap(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.tensor([[5, 5], [0, 0]])}

    scheduler, network = ScoreSDEScheduler(), pipeline.transformer
    for callback, later in ((begin, [1, 4]), (swap, [0, 0])):
        scheduler.set_timesteps(2, guidance_scale=1.0)
        first, second = scheduler.timesteps
        with torch.no_grad():
            x = scheduler.step(network(latents, first, torch.tensor([1, 4])).sample, first, latents).prev_sample
            output = network(x, second, torch.tensor(later)).sample
            if callback is begin:
                origin = network(x, second, torch.tensor([5, 5])).sample
                output = origin + 2.5 * (output - origin)
            x = scheduler.step(output, second, x).prev_sample
        assert close(draw(pipeline, callback_on_step_end=callback, num_inference_steps=2, **arguments), x)


def test_interrupted_calls_return_what_they_have():
    pipeline, states = pixel_pipeline(), []

    def stop_own(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        pipe._interrupt = step == 1

    def stop_all(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        pipeline._interrupt = step == 1

    for callback in (stop_own, stop_all):
        states.clear()
        output = pipeline(class_labels=[1], num_inference_steps=6, callback_on_step_end=callback, output_type="latent")
        assert output.nfe == len(states) == 2
        assert torch.equal(output.images, states[-1])
    # the next call begins anew
    assert pipeline(class_labels=[1], num_inference_steps=3, output_type="latent").nfe == 3
    # before its first evaluation, it returns what it began with
    pipeline.scheduler.set_timesteps(3)
    pipeline._interrupt = True
    noise = torch.randn(1, 1, 4, 4)
    latents, nfe = pipeline.sample_in_steps(None, noise, None)
    assert latents is noise and nfe == 0


@pytest.mark.parametrize(
    ("arguments", "nfe"),
    [({}, 3), ({"predictor": "heun"}, 5), ({"predictor": "euler_maruyama", "corrector": "langevin"}, 5)],
    ids=str,
)
def test_the_network_is_called_nfe_times(arguments, nfe):
    pipeline, calls = pixel_pipeline(ScoreSDEScheduler(**arguments)), []
    pipeline.transformer.register_forward_hook(lambda network, inputs, output: calls.append(len(inputs[0])))
    output = pipeline(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=3, output_type="latent")
    # guidance doubles the batch, not the calls
    assert calls == [4] * nfe
    assert output.nfe == nfe


@pytest.mark.parametrize(
    "stock",
    [
        diffusers.DDIMScheduler(clip_sample=False),
        diffusers.DDPMScheduler(clip_sample=False),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.HeunDiscreteScheduler(),
        diffusers.EulerAncestralDiscreteScheduler(),
    ],
    ids=lambda stock: type(stock).__name__,
)
def test_stock_schedulers_fit(stock):
    latents, arguments = torch.randn(2, 3, 8, 8), {"class_labels": [0, 1], "guidance_scale": 2.0}
    images = draw(pixel_pipeline(stock), latents=latents, generator=seeds(3)[0], **arguments)
    labels, again = torch.tensor([0, 1]), type(stock).from_config(stock.config)
    assert close(images, by_hand(tiny_dit(), again, latents, labels, 2.0, generator=seeds(3)[0]))
    if isinstance(stock, diffusers.DDIMScheduler):
        ours = ScoreSDEScheduler.from_config(stock.config, predictor="ddim")
        assert close(draw(pixel_pipeline(ours), latents=latents, **arguments), images)


def test_learned_variance_is_for_the_schedulers_that_use_it():
    network, latents, labels = tiny_dit(learn_sigma=True), torch.randn(1, 3, 8, 8), torch.tensor([2])
    learned = diffusers.DDPMScheduler(variance_type="learned_range")
    images = draw(pixel_pipeline(learned, network=network), class_labels=labels, latents=latents)
    assert close(images, by_hand(network, learned, latents, labels, generator=seeds(0)[0]))
    fixed = diffusers.DDPMScheduler()
    without = draw(pixel_pipeline(fixed, network=network), class_labels=labels, latents=latents)
    assert not close(without, images, 1e-4)
    ours = ScoreSDEScheduler.from_config(learned.config)
    images = draw(pixel_pipeline(ours, network=network), class_labels=labels, latents=latents)
    assert close(images, by_hand(network, ours, latents, labels))


def tiny_stock_unet(**arguments):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**blocks, **sizes | arguments).eval()


def test_networks_of_diffusers_fit():
    latents, scheduler = torch.randn(2, 3, 8, 8), ScoreSDEScheduler()
    unet = tiny_stock_unet()
    images = draw(quiet(ScoreSDEPipeline(scheduler, unet=unet)), latents=latents)
    assert close(images, by_hand(unet, scheduler, latents))
    # classes without a null label
    unet = tiny_stock_unet(num_class_embeds=4)
    pipeline = quiet(ScoreSDEPipeline(scheduler, unet=unet))
    images = draw(pipeline, class_labels=[3, 0], latents=latents)
    assert close(images, by_hand(unet, scheduler, latents, torch.tensor([3, 0])))
    for arguments in ({}, {"class_labels": [3], "guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="null label"):
            draw(pipeline, **arguments)
    dit = diffusers.DiTTransformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, out_channels=8, norm_num_groups=8
    ).eval()
    pipeline, latents = quiet(ScoreSDEPipeline(scheduler, transformer=dit)), torch.randn(2, 4, 4, 4)
    images = draw(pipeline, class_labels=[999, 0], latents=latents, guidance_scale=2.0)
    labels = torch.tensor([999, 0])
    # that model takes one time per image
    assert close(images, by_hand(one_time_each(dit), scheduler, latents, labels, 2.0, null_label=1000))


def test_a_network_without_a_size_or_none_at_all_is_named():
    pipeline = quiet(ScoreSDEPipeline(ScoreSDEScheduler(), unet=tiny_stock_unet(sample_size=None)))
    with pytest.raises(ValueError, match="this network has no sample_size: .*register_to_config.sample_size=32"):
        draw(pipeline)
    pipeline.denoiser.register_to_config(sample_size=8)
    assert draw(pipeline).shape == (1, 3, 8, 8)
    pipeline.unet = None
    with pytest.raises(ValueError, match="holds no network: set its transformer or its unet"):
        _ = pipeline.num_classes


def one_time_each(network):
    return lambda x, timestep, **arguments: network(x, timestep.expand(len(x)), **arguments)


def test_a_score_network_on_the_variance_exploding_path():
    unet, latents = tiny_unet(), torch.randn(2, 3, 8, 8)
    scheduler = ScoreSDEScheduler(sde_type="ve", prediction_type="score")
    images = draw(quiet(ScoreSDEPipeline(scheduler, unet=unet)), class_labels=[1, 2], latents=latents)
    assert close(images, by_hand(unet, scheduler, latents, torch.tensor([1, 2])))


def test_half_precision_networks_keep_a_float32_state():
    exact = draw(latent_pipeline(), class_labels=[0, 1])
    pipeline = latent_pipeline().to(torch.bfloat16)
    images = draw(pipeline, class_labels=[0, 1])
    assert images.dtype == torch.float32
    # a bfloat16 state would have 8 significant bits everywhere
    assert not torch.equal(images, images.bfloat16().float())
    assert close(images, exact, 0.05)
    assert draw(pipeline, class_labels=[0], output_type="pt").dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": ["dress"]}, "class name 'dress' is unknown; this model knows shirt, shoe"),
        ({"class_labels": [5]}, "class label 5 is out of range: this model has labels 0 to 4"),
        ({"class_labels": [-1]}, "class label -1 is out of range"),
        ({"class_labels": [0, 1], "batch_size": 3}, "2 class_labels were given for 3 samples"),
        ({"guidance_scale": 2.0}, "guidance_scale 2.0 needs class_labels"),
        ({"class_labels": [1], "guidance_scale": float("nan")}, "guidance_scale nan must be a finite number"),
        ({"latents": torch.full((2, 3, 8, 8), float("inf"))}, "latents holds values that are not finite"),
        ({"batch_size": 0}, "batch_size 0 must be a whole number, at least 1"),
        ({"batch_size": 2.0}, "batch_size 2.0 must be a whole number, at least 1"),
        ({"class_labels": [1], "guidance_scale": "3"}, "guidance_scale '3' must be a finite number"),
        ({"class_labels": [1], "guidance_scale": None}, "guidance_scale None must be a finite number"),
        ({"generator": 0}, "generator 0 must be a torch.Generator, such as"),
        ({"batch_size": 2, "generator": seeds(0, 1) + [1]}, r"generator \[.*\] must be a torch.Generator, such as"),
        ({"batch_size": 2, "generator": (1, 2)}, r"generator \(1, 2\) must be a torch.Generator, such as"),
        ({"output_type": "tensor"}, "output_type 'tensor' is unknown; choose one of pil, np, pt, latent"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, r"latents has shape \(2, 3, 4, 4\); this model needs \(2, 3, 8, 8\)"),
        ({"batch_size": 2, "generator": seeds(0, 1, 2)}, "3 generators were given for 2 samples"),
        ({"latents": torch.zeros(2, 3, 8, 8), "generator": seeds(0, 1, 2)}, "3 generators were given for 2 samples"),
        ({"class_labels": torch.tensor([0.5])}, "class label 0.5 must be a whole number or a name"),
        ({"class_labels": True}, "class label True must be a whole number or a name"),
        ({"class_labels": np.array([False])}, "class label False must be a whole number"),
        ({"class_labels": [[0, 1]]}, r"class label \[0, 1\] must be a whole number .* a list of one per sample"),
        ({"class_labels": torch.zeros(1, 2, dtype=torch.long)}, r"class label \[0, 0\] must be"),
        ({"class_labels": [None]}, "class label None must be"),
        ({"class_labels": {"shoe": 1}}, "class label {'shoe': 1} must be"),
        ({"callback_on_step_end": SDXLCFGCutoffCallback(0.5)}, "'add_text_embeds', 'add_time_ids'. are unknown"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs .*'noise'.*latents"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pixel_pipeline(), **arguments)


def test_unconditional_networks_refuse_labels_and_guidance():
    pipeline = pixel_pipeline(network=tiny_dit(num_classes=None))
    for arguments in ({"class_labels": [0]}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="unconditional|class-conditional"):
            draw(pipeline, **arguments)


@pytest.mark.parametrize("networks", [{}, {"transformer": 1, "unet": 1}])
def test_exactly_one_network(networks):
    networks = {name: tiny_dit() for name in networks}
    with pytest.raises(ValueError, match="exactly one network"):
        ScoreSDEPipeline(ScoreSDEScheduler(), **networks)


def test_a_component_that_is_set_later_is_saved(tmp_path):
    pipeline = pixel_pipeline()
    pipeline.vae = tiny_vae()
    pipeline.save_pretrained(tmp_path)
    types = {"transformer": torch.bfloat16, "default": torch.float32}
    opened = ScoreSDEPipeline.from_pretrained(tmp_path, dtype=types)
    assert (opened.transformer.dtype, opened.vae.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(opened.vae.encoder.conv_in.weight, pipeline.vae.encoder.conv_in.weight)
    pipeline.vae = None
    pipeline.save_pretrained(tmp_path / "without")
    assert ScoreSDEPipeline.from_pretrained(tmp_path / "without").vae is None


def test_feature_caches_begin_anew_with_every_call():
    pipeline = pixel_pipeline()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    first, again = (draw(pipeline, class_labels=[1]) for _ in range(2))
    assert torch.equal(first, again)


# --- latents ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_autoencoder_works_on_so_many_pixels_at_once(monkeypatch):
    pipeline, latents = latent_pipeline(), torch.randn(5, 3, 4, 4, generator=seeded(0))
    images, batches = pipeline.decode(latents), []
    means = pipeline.to_latents(images.clamp(-1, 1))
    for name in ("decode", "encode"):
        whole = getattr(pipeline.vae, name)
        monkeypatch.setattr(
            pipeline.vae, name, lambda x, whole=whole, name=name: (batches.append((name, len(x))), whole(x))[1]
        )
    # two images of 8 x 8; of less than one, one
    for budget, sizes in ((2 * 64, [2, 2, 1]), (63, [1] * 5), (5 * 64, [5])):
        monkeypatch.setattr("score_sde.pipelines.denoising_pipeline.PIXELS_AT_ONCE", budget)
        batches.clear()
        assert (pipeline.decode(latents) - images).abs().max() < 1e-5
        assert (pipeline.to_latents(images.clamp(-1, 1)) - means).abs().max() < 1e-5
        assert batches == [(name, size) for name in ("decode", "encode") for size in sizes]


def test_latents_are_normalised_by_the_config_of_the_autoencoder():
    vae = tiny_vae()
    latents = torch.randn(2, 3, 4, 4)
    normalised = normalize_latents(latents, vae.config)
    # (z - mean) scaling_factor / std, as in diffusers' pipelines
    for channel, (mean, std) in enumerate([(0.5, 2.0), (-1.0, 0.5), (2.0, 1.0)]):
        assert (normalised[:, channel] - (latents[:, channel] - mean) * 0.8 / std).abs().max() < 1e-6
    assert (denormalize_latents(normalised, vae.config) - latents).abs().max() < 1e-6
    plain = diffusers.AutoencoderKL(shift_factor=0.3, scaling_factor=2.0, block_out_channels=(8,), norm_num_groups=4)
    assert (normalize_latents(latents, plain.config) - (latents - 0.3) * 2).abs().max() < 1e-6


def test_the_pipeline_decodes_in_the_units_of_the_autoencoder():
    pipeline = latent_pipeline()
    latents = draw(pipeline, class_labels=[0, 1])
    with torch.no_grad():
        decoded = pipeline.vae.decode(denormalize_latents(latents, pipeline.vae.config)).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    assert (draw(pipeline, class_labels=[0, 1], output_type="pt") - expected).abs().max() < 1e-5


@pytest.mark.skipif(not SHARED.is_dir(), reason="no pretrained autoencoder beside the checkout")
@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_pretrained_tiny_autoencoders(name):
    vae = diffusers.AutoModel.from_pretrained(str(SHARED / name), dtype=torch.float32)
    image = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    with torch.no_grad():
        mean, std = encode_moments(vae, image)
        decoded = vae.decode(denormalize_latents(normalize_latents(mean, vae.config), vae.config)).sample
    assert std.abs().max() == 0
    assert (decoded - image).square().mean() < 0.01


# --- bundles ------------------------------------------------------------------------------------------------------

# Opens a folder where `score_sde` cannot be imported, draws into a file, and saves the pipeline again.
WITHOUT_THE_PACKAGE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "score_sde":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import numpy, torch
from diffusers import DiffusionPipeline
folder, images, again = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
arguments = dict(class_labels=["shoe", "hat"], guidance_scale=2.0, num_inference_steps=3, output_type="np")
numpy.save(images, pipeline(generator=generators, **arguments).images)
pipeline.save_pretrained(again)
"""


def in_a_clean_process(code, tmp_path, *arguments):
    environment = dict(os.environ, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_bundle_opens_without_the_package_and_draws_the_same(tmp_path):
    pipeline = latent_pipeline()
    pipeline.save_pretrained(tmp_path / "first")
    expected = draw(
        pipeline,
        class_labels=["shoe", "hat"],
        guidance_scale=2.0,
        generator=seeds(1, 2),
        output_type="np",
    )
    # and what was saved there opens again, here and there
    for source, target in (("first", "second"), ("second", "third")):
        in_a_clean_process(WITHOUT_THE_PACKAGE, tmp_path, tmp_path / source, tmp_path / "images.npy", tmp_path / target)
        assert np.array_equal(np.load(tmp_path / "images.npy"), expected)
    again = quiet(ScoreSDEPipeline.from_pretrained(tmp_path / "third"))
    drawn = draw(again, class_labels=["shoe", "hat"], guidance_scale=2.0, generator=seeds(1, 2), output_type="np")
    assert np.array_equal(drawn, expected)


TWO_VERSIONS = """
import sys
from diffusers import DiffusionPipeline
pipelines = [DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:]]
print([float(pipeline.scheduler.path.alpha(0.5)) for pipeline in pipelines])
"""


@pytest.mark.slow
def test_bundles_of_two_versions_each_run_their_own_mathematics(tmp_path):
    pixel_pipeline().save_pretrained(tmp_path / "one")
    # another version: the same files with another formula, under the stamp that it would have
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    scheduler = tmp_path / "two" / "scheduler"
    stamp = next(scheduler.glob("paths_*.py")).stem.split("_")[-1]
    for path in [*scheduler.glob("*.py"), tmp_path / "two" / "model_index.json"]:
        text = path.read_text().replace(stamp, "0123456789")
        text = text.replace("return self.log_alpha(t).exp()", "return 2 * self.log_alpha(t).exp()")
        path.with_name(path.name.replace(stamp, "0123456789")).write_text(text)
    one, two = (
        json.loads(in_a_clean_process(TWO_VERSIONS, tmp_path, *(tmp_path / name for name in order)))
        for order in (("one", "two"), ("two", "one"))
    )
    assert one[1] == 2 * one[0]
    assert two == one[::-1]


def test_installed_classes_open_a_bundle_and_run_none_of_its_code(tmp_path):
    latent_pipeline().save_pretrained(tmp_path / "bundle")
    trace = tmp_path / "trace"
    for path in (tmp_path / "bundle").rglob("*.py"):
        path.write_text(path.read_text() + f"\nopen({str(trace)!r}, 'a').write('{path.name}')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "bundle")
    for load in (ScoreSDEPipeline.from_pretrained, load_bundle):
        loaded = load(tmp_path / "bundle")
        assert type(loaded) is ScoreSDEPipeline
        assert type(loaded.scheduler) is ScoreSDEScheduler
        assert loaded.label_ids(["hat"]) == [4]
    assert not trace.exists()


def test_a_bundle_in_the_cache_of_the_hub_opens_offline(tmp_path):
    """Configs and weights only, as they are downloaded."""
    cached = tmp_path / "models--me--tiny"
    pixel_pipeline().save_pretrained(cached / "snapshots" / ("a" * 40))
    for path in cached.rglob("*.py"):
        path.unlink()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    for load in (ScoreSDEPipeline.from_pretrained, load_bundle):
        loaded = quiet(load("me/tiny", cache_dir=tmp_path))
        torch.testing.assert_close(
            draw(loaded, class_labels=["hat"]), draw(pixel_pipeline(), class_labels=["hat"]), rtol=0, atol=1e-5
        )


def test_pickled_weights_are_not_opened(tmp_path):
    with pytest.raises(ValueError, match="leave out safe_serialization=False"):
        pixel_pipeline().save_pretrained(tmp_path, safe_serialization=False)
    pixel_pipeline().save_pretrained(tmp_path)
    [weights] = (tmp_path / "transformer").glob("*.safetensors")
    torch.save(load_file(weights), tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    weights.unlink()
    for load in (ScoreSDEPipeline.from_pretrained, load_bundle):
        with pytest.raises(ValueError, match="safetensors only, never as pickles"):
            load(tmp_path)


def test_components_and_dtype_can_be_passed(tmp_path):
    latent_pipeline().save_pretrained(tmp_path)
    scheduler = ScoreSDEScheduler(predictor="heun")
    loaded = ScoreSDEPipeline.from_pretrained(tmp_path, scheduler=scheduler, dtype=torch.bfloat16)
    assert loaded.scheduler is scheduler
    assert loaded.transformer.dtype == torch.bfloat16


def test_saving_again_leaves_no_stale_code(tmp_path):
    pipeline = pixel_pipeline()
    pipeline.save_pretrained(tmp_path)
    stale = tmp_path / "scheduler" / "paths_aaaaaaaaaa.py"
    stale.write_text("")
    before = sorted(tmp_path.rglob("*.py"))
    pipeline.save_pretrained(tmp_path)
    assert sorted(tmp_path.rglob("*.py")) == [path for path in before if path != stale]


def edit_index(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": ["other_file", "OtherScheduler"]}, "component 'scheduler' is a OtherScheduler of 'other_file'"),
        ({"scheduler": ["score_sde", "__doc__"]}, "component 'scheduler' is a __doc__"),
        ({"_class_name": "OtherPipeline"}, "holds a OtherPipeline"),
    ],
)
def test_unknown_classes_are_refused(tmp_path, changes, message):
    pixel_pipeline().save_pretrained(tmp_path)
    edit_index(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        ScoreSDEPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_bundle(tmp_path)


@pytest.mark.parametrize("load", [ScoreSDEPipeline.from_pretrained, load_bundle])
def test_what_is_no_bundle_is_refused(tmp_path, load):
    with pytest.raises(ValueError, match=r"holds no model_index.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor the id of a repo"):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match="'me/missing' is no folder here and cannot be had from the Hub"):
        load("me/missing", cache_dir=tmp_path)


# --- cards --------------------------------------------------------------------------------------------------------

METRIC = {"name": "accuracy", "value": 0.9, "n": 10, "seed": 0, "dataset": "d", "split": "test", "command": "measure"}
FACTS = {
    "model_name": "Tiny",
    "steps": 3,
    "images_seen": 12,
    "rows": 1234,
    "final_loss": 0.5,
    "train_seconds": 1.0,
    "processes": 1,
    "machine": "a machine",
    "parameters": 1000,
    "dataset": "some_data",
    "split": "train",
    "command": "train it",
    "torch": "2",
    "diffusers": "0",
    "config": {"learning_rate": 0.001, "ema_decay": 0.99},
    "samples": {"guidance_scale": 1.5, "num_inference_steps": 3, "network_evaluations": 3},
}


def test_the_card_states_the_facts_and_no_others(tmp_path):
    folder = save_bundle(latent_pipeline(), tmp_path / "bundle", facts=FACTS, metrics=[METRIC])
    card = ModelCard.load(os.path.join(folder, "README.md"))
    assert card.data.library_name == "diffusers"
    assert (card.data.eval_results[0].metric_name, card.data.eval_results[0].metric_value) == ("accuracy", 0.9)
    for fact in (
        "# Tiny",
        "DiTModel",
        "AutoencoderKL",
        "| training images | 1,234 |",
        "train it",
        "0.5000",
        "measure",
        "shirt",
    ):
        assert fact in card.text
    bare = ModelCard.load(os.path.join(save_bundle(pixel_pipeline(), tmp_path / "bare"), "README.md"))
    for absent in ("## Training", "## Measured", "samples.png", "None"):
        assert absent not in bare.text
    assert "More Information Needed" not in card.content + bare.content


def test_metrics_are_added_and_replaced(tmp_path):
    folder = save_bundle(pixel_pipeline(), tmp_path / "bundle", metrics=[METRIC])
    add_metrics(folder, [METRIC | {"value": 0.8}, METRIC | {"name": "other"}])
    metrics = json.loads((tmp_path / "bundle" / "metrics.json").read_text())
    assert [(metric["name"], metric["value"]) for metric in metrics] == [("accuracy", 0.8), ("other", 0.9)]
    assert "| accuracy | 0.8 |" in (tmp_path / "bundle" / "README.md").read_text()


def test_a_metric_without_provenance_is_refused(tmp_path):
    folder = save_bundle(pixel_pipeline(), tmp_path / "bundle", metrics=[METRIC])
    before = (tmp_path / "bundle" / "metrics.json").read_text()
    with pytest.raises(ValueError, match="metric 'fid' lacks value, n, seed"):
        add_metrics(folder, [{"name": "fid"}])
    assert (tmp_path / "bundle" / "metrics.json").read_text() == before


def files_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("fails", ["component", "metrics", "sample_grid"])
def test_a_failed_save_keeps_the_bundle_before(tmp_path, fails):
    save_bundle(pixel_pipeline(), tmp_path / "bundle", facts=FACTS)
    before, broken, arguments = files_of(tmp_path / "bundle"), latent_pipeline(), {}
    if fails == "component":  # weights without values cannot be written
        broken.transformer.to("meta")
    elif fails == "metrics":
        arguments = {"metrics": [{"name": "fid"}]}
    else:
        arguments = {"sample_grid": tmp_path / "missing.png"}
    with pytest.raises((NotImplementedError, ValueError, FileNotFoundError), match="meta|lacks value|missing.png"):
        save_bundle(broken, tmp_path / "bundle", **arguments)
    assert files_of(tmp_path / "bundle") == before
    # the next save starts clean
    save_bundle(latent_pipeline(), tmp_path / "bundle")
    assert set(os.listdir(tmp_path)) <= {"bundle", ".bundle.lock"}
    assert load_bundle(tmp_path / "bundle").vae is not None
    assert not (tmp_path / "bundle" / "training.json").exists()


def test_an_absent_fact_is_left_out_of_the_card(tmp_path):
    folder = Path(save_bundle(pixel_pipeline(), tmp_path / "bundle"))
    for absent in [*FACTS, "all but steps"]:
        facts = {name: value for name, value in FACTS.items() if name != absent}
        (folder / "training.json").write_text(json.dumps({"steps": 3} if absent == "all but steps" else facts))
        write_card(folder)
        card = (folder / "README.md").read_text()
        # no cell without a value, no half of a sentence
        gap = re.search(r"^\|.*(\| *,|, *\||split ,|\|  +\|).*|.*(None|(?<!`)``(?!`)|\(\)).*", card, flags=re.MULTILINE)
        assert gap is None, (absent, gap[0])
        assert ("| optimizer steps | 3 |" in card) == (absent != "steps")
