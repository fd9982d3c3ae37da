"""ScoreSDEPipeline and its bundles: sampling, folders opened with and without this package, cards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from test_models import tiny_dit, tiny_unet

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.hub import add_metrics
from score_sde.pipelines.latents import denormalize_latents, encode_moments, normalize_latents


LABELS = {0: "shirt", 1: "shoe", 2: "bag", 3: "coat", 4: "hat"}
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def tiny_vae(channels=1, latent_channels=3):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
        latents_mean=[0.5, -1.0, 2.0],
        latents_std=[2.0, 0.5, 1.0],
        scaling_factor=0.8,
    ).eval()


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
    for labels in (["shoe", "coat"], ["shoe", 3], torch.tensor([1, 3])):
        assert torch.equal(draw(pipeline, class_labels=labels), expected)
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
    network = tiny_dit(learn_sigma=learn_sigma)
    pipeline, scheduler = pixel_pipeline(network=network), ScoreSDEScheduler()
    latents, labels, null = torch.randn(2, 3, 8, 8), torch.tensor([1, 4]), torch.tensor([5, 5])
    x = latents
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            conditional, unconditional = (network(x, timestep, label).sample[:, :3] for label in (labels, null))
            x = scheduler.step(unconditional + 2.5 * (conditional - unconditional), timestep, x).prev_sample
    guided = draw(pipeline, class_labels=[1, 4], latents=latents, guidance_scale=2.5, num_inference_steps=4)
    assert (guided - x).abs().max() < 1e-5 * x.abs().max()
    assert (guided - draw(pipeline, class_labels=[1, 4], latents=latents, num_inference_steps=4)).abs().max() > 1e-2


@pytest.mark.parametrize("arguments", [{}, {"predictor": "euler_maruyama", "corrector": "langevin"}], ids=str)
def test_an_image_depends_on_its_seed_only(arguments):
    pipeline = pixel_pipeline(ScoreSDEScheduler(**arguments))
    together = draw(pipeline, class_labels=[0, 1, 2], generator=seeds(7, 8, 9))
    for i, seed in enumerate([7, 8, 9]):
        alone = draw(pipeline, class_labels=[i], generator=seeds(seed))
        assert (together[i] - alone[0]).abs().max() < 1e-4
    assert torch.equal(together, draw(pipeline, class_labels=[0, 1, 2], generator=seeds(7, 8, 9)))


def test_callback_sees_every_evaluation_and_may_replace_the_latents():
    pipeline = pixel_pipeline(ScoreSDEScheduler(predictor="heun"))
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if len(seen) == 5 else {}

    images = draw(pipeline, class_labels=0, callback_on_step_end=callback)
    assert [timestep for _, timestep in seen] == pipeline.scheduler.timesteps.tolist()
    assert len(seen) == pipeline.scheduler.nfe == 5
    assert images.abs().max() == 0


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
    images = draw(pixel_pipeline(stock), class_labels=[0, 1], guidance_scale=2.0)
    assert torch.isfinite(images).all()
    if isinstance(stock, diffusers.DDIMScheduler):
        ours = ScoreSDEScheduler.from_config(stock.config, predictor="ddim")
        assert (draw(pixel_pipeline(ours), class_labels=[0, 1], guidance_scale=2.0) - images).abs().max() < 1e-3


def test_learned_variance_reaches_a_stock_ddpm_scheduler():
    network = tiny_dit(learn_sigma=True)
    drawn = [
        draw(pixel_pipeline(diffusers.DDPMScheduler(variance_type=kind), network=network), class_labels=[0])
        for kind in ("learned_range", "fixed_small")
    ]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4


def test_networks_of_diffusers_fit():
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    assert draw(quiet(ScoreSDEPipeline(ScoreSDEScheduler(), unet=unet)), batch_size=2).shape == (2, 3, 8, 8)
    dit = diffusers.DiTTransformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, out_channels=8, norm_num_groups=8
    )
    pipeline = quiet(ScoreSDEPipeline(ScoreSDEScheduler(), transformer=dit.eval()))
    assert draw(pipeline, class_labels=[999], guidance_scale=2.0).shape == (1, 4, 4, 4)
    ours = quiet(ScoreSDEPipeline(ScoreSDEScheduler(sde_type="ve", prediction_type="score"), unet=tiny_unet()))
    assert torch.isfinite(draw(ours, class_labels=[1])).all()


def test_half_precision_networks_keep_a_float32_state():
    pipeline = latent_pipeline().to(torch.bfloat16)
    images = draw(pipeline, class_labels=[0, 1])
    assert images.dtype == torch.float32
    assert draw(pipeline, class_labels=[0], output_type="pt").dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": ["dress"]}, "class name 'dress' is unknown; this model knows shirt, shoe"),
        ({"class_labels": [5]}, "class label 5 is out of range: this model has labels 0 to 4"),
        ({"class_labels": [-1]}, "class label -1 is out of range"),
        ({"class_labels": [0, 1], "batch_size": 3}, "2 class_labels were given for batch_size 3"),
        ({"guidance_scale": 2.0}, "guidance_scale 2.0 needs class_labels"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"output_type": "tensor"}, "output_type 'tensor' is unknown; choose one of pil, np, pt, latent"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, r"latents has shape \(2, 3, 4, 4\); this model needs \(2, 3, 8, 8\)"),
        ({"batch_size": 2, "generator": seeds(0, 1, 2)}, "3 generators were given for 2 images"),
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


# --- latents ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("load", [ScoreSDEPipeline.from_pretrained, load_bundle])
def test_what_is_no_bundle_is_refused(tmp_path, load):
    with pytest.raises(ValueError, match=r"holds no model_index.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor the id of a repo"):
        load(tmp_path / "missing")


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
    for fact in ("# Tiny", "DiTModel", "AutoencoderKL", "1,234 images", "train it", "0.5000", "measure", "shirt"):
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
    with pytest.raises(ValueError, match="metric fid lacks value, n, seed"):
        add_metrics(folder, [{"name": "fid"}])
    assert (tmp_path / "bundle" / "metrics.json").read_text() == before


def test_a_failed_save_keeps_the_bundle_before(tmp_path):
    folder = save_bundle(pixel_pipeline(), tmp_path / "bundle", facts=FACTS)
    before = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="lacks value"):
        save_bundle(latent_pipeline(), tmp_path / "bundle", metrics=[{"name": "fid"}])
    assert {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()} == before
