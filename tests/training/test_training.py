"""Training: objectives against the exact score, data, configuration, exact resume, several processes, whole runs."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import diffusers
import dit_gflops
import numpy as np
import pytest
import torch
import yaml
from diffusers.optimization import get_scheduler
from exact import GAUSSIAN
from PIL import Image
from places import SHARED, TRAINING
from safetensors.torch import load_file

from runs import (
    CONFIG_CLASSES,
    TINY_DATA,
    TINY_DIT,
    TINY_RUN,
    data_config,
    encode,
    equal,
    launch,
    run,
    tiny_dc,
    train_tiny,
)
from score_sde import NoiseConditionalClassifier, ScoreSDEPipeline, ScoreSDEScheduler, load_bundle
from score_sde.losses import TIME_DENSITIES, denoising_loss
from score_sde.pipelines.latents import normalize_latents
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES, expand_to, prediction
from score_sde.training import distill, encode_latents, evaluate, train, train_autoencoder, train_classifier
from score_sde.training.parts import checkpoints, point_task, text_evaluation, text_task
from score_sde.training.parts.batches import GlobalBatchSampler
from score_sde.training.parts.config import LoopConfig
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.image_rows import resize_and_crop
from score_sde.training.parts.loop import Draws, fit, make_accelerator
from score_sde.training.parts.options import parse
from score_sde.training.parts.run_folder import open_run, read_records
from score_sde.training.parts.schedule import follow_schedule, position
from score_sde.training.parts.tasks import Task


# --- objectives ---------------------------------------------------------------------------------------------------


def batch(scheduler, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = GAUSSIAN.sample(n, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return x0, noise, TIME_DENSITIES["uniform"](scheduler, torch.rand(n, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_exact_score_minimises_the_loss(sde_type, prediction_type):
    """In every parametrisation the exact denoiser's loss rises when its output is shifted or scaled, by the square of
    the change, because the error of the exact output is uncorrelated with every function of x_t."""
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type=prediction_type)
    x0, noise, t = batch(scheduler, 20_000)
    outputs = []

    def exact(x, timestep, class_labels=None):
        # Gaussian data: the denoised sample is linear in x_t, with one gain per time
        path, (mean,), (variance,) = scheduler.path, GAUSSIAN.means, GAUSSIAN.variances
        alpha, sigma = expand_to(path.alpha(t), x), expand_to(path.sigma(t), x)
        x_t = path.sample(x0, noise, t)
        denoised = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)
        row = prediction(path, prediction_type, t, 0.5)
        outputs.append((denoised - expand_to(row.a, x) * x_t) / expand_to(row.b, x))
        return SimpleNamespace(sample=outputs[-1] * factor + offset)

    factor, offset = 1.0, 0.0
    best = denoising_loss(exact, scheduler, x0, noise, t).double()
    for factor, offset in [(1.0, 0.2), (1.0, -0.2), (0.9, 0.0), (1.1, 0.0)]:
        change = denoising_loss(exact, scheduler, x0, noise, t).double() - best
        expected = ((factor - 1) * outputs[0] + offset).square().mean(1)
        standard_error = (change - expected).std() / len(t) ** 0.5
        assert (change - expected).mean().abs() < 5 * standard_error
    assert best.shape == (20_000,)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_time_densities(sde_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    uniform = TIME_DENSITIES["uniform"](scheduler, u)
    assert scheduler.t_min <= uniform.min() < uniform.max() <= scheduler.t_max
    assert uniform.mean() == pytest.approx((scheduler.t_min + scheduler.t_max) / 2)
    log_normal = TIME_DENSITIES["log_normal"](scheduler, u)
    assert scheduler.t_min <= log_normal.min() <= log_normal.max() <= scheduler.t_max
    log_sigma = -scheduler.path.half_log_snr(log_normal)
    # Karras et al. 2022: median exp(-1.2), one standard deviation 1.2
    assert log_sigma.quantile(0.5) == pytest.approx(-1.2, abs=1e-3)
    assert log_sigma.quantile(0.8413447) == pytest.approx(0.0, abs=5e-3)


def target_by_hand(prediction_type, path, t, x0, noise, sigma_data=0.5):
    """What a network of this prediction type should return, from its definition."""
    alpha, sigma = expand_to(path.alpha(t), x0), expand_to(path.sigma(t), x0)
    if prediction_type in ("inverted_flow_prediction", "edm_v_prediction"):
        positive = {"inverted_flow_prediction": "flow_prediction", "edm_v_prediction": "edm"}[prediction_type]
        return -target_by_hand(positive, path, t, x0, noise, sigma_data)
    if prediction_type == "edm":  # Karras et al. 2022, Table 1, for x_t / alpha
        scaled, ratio = x0 + sigma / alpha * noise, sigma / alpha
        c_skip, c_out = (
            sigma_data**2 / (ratio**2 + sigma_data**2),
            ratio * sigma_data / (ratio**2 + sigma_data**2) ** 0.5,
        )
        return (x0 - c_skip * scaled) / c_out
    if prediction_type == "edm_consistency":  # Song et al. 2023, appendix C, for x_t / alpha
        scaled, ratio = x0 + sigma / alpha * noise, sigma / alpha
        least = path.sigma(torch.tensor(path.t_min)) / path.alpha(torch.tensor(path.t_min))
        c_skip = sigma_data**2 / ((ratio - least) ** 2 + sigma_data**2)
        c_out = sigma_data * (ratio - least) / (ratio**2 + sigma_data**2) ** 0.5
        # the end of the map at the least level, on the line through x0
        end = x0 + least * (scaled - x0) / ratio
        return (end - c_skip * scaled) / c_out
    return {
        "epsilon": noise,
        "sample": x0,
        "original_sample": x0,
        "score": -noise / sigma,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": expand_to(path.alpha_prime(t), x0) * x0 + expand_to(path.sigma_prime(t), x0) * noise,
    }[prediction_type]


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_loss_is_zero_at_the_target_and_the_network_sees_what_the_sampler_shows_it(sde_type, prediction_type):
    scheduler, seen = ScoreSDEScheduler(sde_type=sde_type, prediction_type=prediction_type), {}
    scheduler.set_timesteps(7)
    timestep = scheduler.timesteps[3]
    x0, noise, _ = batch(scheduler, 8)
    t = scheduler.path_time(timestep).expand(8)

    def network(x, timestep, class_labels=None):
        seen.update(x=x, timestep=timestep, labels=class_labels)
        target = target_by_hand(prediction_type, scheduler.path, t, x0, noise)
        return SimpleNamespace(sample=torch.cat([target + error, 1e3 * target], dim=1))  # a variance is not trained

    error = 0.0
    scale = target_by_hand(prediction_type, scheduler.path, t, x0, noise).square().mean()
    assert (denoising_loss(network, scheduler, x0, noise, t, {"class_labels": "labels"}) < 1e-10 * scale).all()
    error = 0.5
    assert (denoising_loss(network, scheduler, x0, noise, t, {"class_labels": "labels"}) - 0.25).abs().max() < 1e-3
    shown = scheduler.scale_model_input(scheduler.path.sample(x0, noise, t), timestep)
    assert (seen["x"] - shown).abs().max() < 1e-6 * shown.abs().max()
    assert (seen["timestep"] - timestep).abs().max() < 1e-5 * abs(timestep)
    assert seen["labels"] == "labels"


# --- randomness and order of the data -----------------------------------------------------------------------------


def draws_of(rows, processes=1, micro_batches=1):
    """The `Draws` of a step of so many rows, of all its micro-batches and processes in order."""
    found = []
    for micro_batch in range(micro_batches):
        for index in range(processes):
            accelerator = SimpleNamespace(num_processes=processes, process_index=index, device=torch.device("cpu"))
            batch_size = rows // processes // micro_batches
            found.append(Draws(3, 128, accelerator, batch_size, micro_batch, micro_batches))
    return found


@pytest.mark.parametrize(
    ("rows", "shares"),
    [
        (8, [(2, 1), (1, 2), (2, 2)]),
        # of blocks of 32 rows, which these shares don't divide
        (120, [(8, 1), (1, 5), (3, 2), (2, 20)]),
        (96, [(1, 3), (4, 1)]),
    ],
)
def test_processes_and_micro_batches_share_the_draws_of_one(rows, shares):
    """Times are stratified over the whole optimizer step."""
    kinds = (("normal", ((3, 2),)), ("uniform", ()), ("stratified", ()), ("normal", ((5,),)))
    for share in shares:
        [alone], shared = draws_of(rows), draws_of(rows, *share)
        for name, arguments in kinds:
            together = torch.cat([getattr(each, name)(*arguments) for each in shared])
            assert torch.equal(getattr(alone, name)(*arguments), together)
    [alone] = draws_of(rows)
    assert torch.equal((alone.stratified() * rows).floor(), torch.arange(rows, dtype=torch.float64))
    noise = alone.normal((64,))
    assert len({float(row[0]) for row in noise}) == rows
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert (noise.var() - 1).abs() < 5 * (2 / noise.numel()) ** 0.5


def test_a_process_draws_no_more_than_its_rows_and_the_blocks_that_they_touch():
    """One of 64 processes."""
    for draws in draws_of(64 * 8, processes=64):
        assert sum(rows for rows, _ in draws.blocks) == 32


def take(sampler, batches):
    return [row for _, rows in zip(range(batches), iter(sampler), strict=False) for row in rows]


def test_every_row_is_seen_once_an_epoch_and_resume_goes_on():
    whole = take(GlobalBatchSampler(10, 4, 0, 0, 1), 10)
    for epoch in range(4):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10 * epoch, 10 * epoch + 10))
    assert whole[:10] != [key - 10 for key in whole[10:20]]
    assert take(GlobalBatchSampler(10, 4, 0, 0, 1, images_seen=12), 7) == whole[12:]
    shared = [take(GlobalBatchSampler(10, 2, 0, rank, 2), 10) for rank in range(2)]
    merged = [row for i in range(10) for rank in range(2) for row in shared[rank][2 * i : 2 * i + 2]]
    assert merged == whole
    assert take(GlobalBatchSampler(10, 4, 1, 0, 1), 10) != whole


# --- configuration ------------------------------------------------------------------------------------------------


def test_a_yaml_file_states_differences_and_the_command_line_wins(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("batch_size: 3\nlearning_rate: 1e-3\nnetwork_kwargs: {hidden_size: 48}\nrandom_flip: true\n")
    config = parse(train.TrainConfig, [str(path), "--batch_size", "5"])
    assert (config.batch_size, config.learning_rate, config.random_flip) == (5, 0.001, True)
    assert json.loads(config.network_kwargs) == {"hidden_size": 48}
    assert config.resolution == train.TrainConfig().resolution


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "batch_size 0 must be at least 1"),
        (["--batch_size", "many"], "'many' is not a whole number"),
        (["--learning_rate", "-1"], "learning_rate -1.0"),
        (["--learning_rate", "nan"], "learning_rate nan"),
        (["--max_grad_norm", "0"], "max_grad_norm 0.0"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps 0 must be at least 1"),
        (["--max_train_steps", "0"], "max_train_steps 0 must be at least 1"),
        (["--checkpoints_total_limit", "0"], "checkpoints_total_limit 0 must be at least 1"),
        (["--adam_beta2", "1"], "adam_beta2 1.0 must lie in [0, 1)"),
        (["--adam_weight_decay", "-1"], "adam_weight_decay -1.0"),
        (["--seed", "-1"], "seed -1 must be at least 0"),
        (["--resolution", "0"], "resolution 0 must be at least 1"),
        (["--num_workers", "-1"], "num_workers -1 must be 0 or more"),
        (["--sample_num_images", "0"], "sample_num_images 0 must be at least 1"),
        (["--sample_num_inference_steps", "200000"], "sample_num_inference_steps 200000 must be from 1 to 100,000"),
        (["--sample_guidance_scale", "nan"], "sample_guidance_scale nan must be from -1000000 to 1000000"),
        (["--sample_guidance_scale", "1e9"], "sample_guidance_scale 1e+09 must be from -1000000 to 1000000"),
        (["--network_name", "DiT-S/3"], "model name 'DiT-S/3' is unknown; choose one of DiT-S/2"),
        (["--network_kwargs", '{"hidden": 1}'], "'hidden'"),
        (["--network_kwargs", "{hiden_size: 1}"], "'hiden_size' is no argument of DiTModel, did you mean hidden_size?"),
        (["--network_kwargs", "{depth: 1}", "--latents", "here"], "network_kwargs: 'depth' is no argument of DiTModel"),
        (["--network_kwargs", '{"patch_size": 5}'], "patch_size 5 must divide sample_size 32"),
        (["--scheduler_kwargs", '{"predictor": "huen"}'], "predictor 'huen' is unknown; choose one of auto, euler"),
        (
            ["--network_kwargs", "{class_dropout_prob: 0}", "--sample_guidance_scale", "2"],
            "sample_guidance_scale 2 needs a network that is trained with a class_dropout_prob above 0",
        ),
        (["--on_existing_run", "delete"], "on_existing_run 'delete' is unknown; choose one of refuse, set_aside"),
        (["--ema_decay", "1"], "ema_decay 1.0 must lie in [0, 1)"),
        (["--further_ema_decays", "0.9", "-1"], "further_ema_decays -1.0 must lie in [0, 1)"),
        (
            ["--further_ema_decays", "0.9", "0.9999999", "0.99999991"],
            "further_ema_decays 0.9999999 and 0.99999991 agree to six digits",
        ),
        (["--ema_sigma_rel", "0.1", "0.1"], "ema_sigma_rel 0.1 and 0.1 agree to six digits"),
        (["--ema_sigma_rel", "0.3"], "ema_sigma_rel: sigma_rel 0.3 must lie in (0, 0.2887)"),
        (["--ema_snapshot_steps", "-1"], "ema_snapshot_steps -1 must be at least 0"),
        (["--log_with", "tensorbord"], "log_with 'tensorbord' is unknown; choose one of aim, comet_ml"),
        (["--log_with", "tensorboard,aim"], "log_with 'aim' is not installed: pip install aim"),
        (["--peak_tflops", "0"], "peak_tflops 0.0 must be positive"),
        (["--evaluation_steps", "-1"], "evaluation_steps -1 must be at least 0"),
        (["--evaluation_images", "1"], "evaluation_images 1 must be at least 2"),
        (["--evaluation_images", "8"], "evaluation_images: nothing is measured without evaluation_steps, how often"),
        (["--evaluation_features", "nowhere"], "evaluation_features: nothing is measured without evaluation_steps"),
        (["--lr_scheduler", "exotic"], "lr_scheduler 'exotic' is unknown; choose one of linear"),
        (["--mixed_precision", "fp8"], "mixed_precision 'fp8' is unknown; choose one of no, fp16, bf16, auto"),
        (["--network", "cnn"], "network 'cnn' is unknown; choose one of dit, unet"),
        (["--sde_type", "vpp"], "sde_type 'vpp' is unknown; choose one of vp"),
        (["--prediction_type", "noise"], "prediction_type 'noise' is unknown"),
        (["--scheduler_kwargs", "{"], "scheduler_kwargs '{' is not YAML"),
        (["--scheduler_kwargs", '{"beta": 1}'], "scheduler_kwargs: 'beta' is no argument of ScoreSDEScheduler"),
        (["--scheduler_kwargs", "{sde_type: ve}"], "scheduler_kwargs: sde_type is an option of its own: --sde_type ve"),
        (["--network_kwargs", "[1]"], "network_kwargs '[1]' must be a mapping"),
        (["--time_density", "normal"], "time_density 'normal' is unknown; choose one of uniform, log_normal"),
        (["--image_channels", "2"], "image_channels 2 must be 1 or 3"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint 'nowhere' is not a folder"),
        (["--latents", "here", "--crop", "random"], "crop random and streaming need images"),
        (["--latents", "here", "--streaming"], "crop random and streaming need images"),
        (["--crop", "corner"], "crop 'corner' is unknown; choose one of centre, random"),
        (["--max_train_seconds", "0"], "max_train_seconds 0.0 must be positive"),
        (["--cache_images", "--crop", "random"], "cache_images keeps an image as it is cropped first"),
        (["--cache_images", "--streaming"], "cache_images needs a dataset of images of one size"),
        (["--cache_images", "--aspect_ratio_buckets", "auto"], "cache_images needs a dataset of images of one size"),
        (["--normalize_latents"], "normalize_latents needs the statistics of latents"),
        (["--num_classes", "0"], "num_classes 0 must be at least 1"),
        (["--shuffle_buffer", "0"], "shuffle_buffer 0 must be at least 1"),
        (["missing.yaml"], "cannot read missing.yaml"),
    ],
)
def test_bad_options_are_refused_before_any_data_is_opened(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(train.main, *arguments, "--dataset", "does_not_exist.parquet")
    error = capsys.readouterr().err
    assert message in error
    assert "does_not_exist" not in error


def test_unknown_keys_of_a_yaml_file_are_refused(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("learning_rat: 1\n")
    with pytest.raises(SystemExit):
        parse(train.TrainConfig, [str(path)])
    assert "option 'learning_rat' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_help_explains_every_option(config_class, capsys):
    with pytest.raises(SystemExit):
        parse(config_class, ["--help_all"])
    text = " ".join(capsys.readouterr().out.split())
    for each in dataclasses.fields(config_class):
        assert f"--{each.name}" in text
        assert len(each.metadata["help"]) > 10


@pytest.mark.parametrize(
    ("config_class", "name"),
    [
        (train_autoencoder.AutoencoderConfig, "quick_start/autoencoder"),
        (train.TrainConfig, "quick_start/diffusion"),
        (encode_latents.EncodeConfig, "quick_start/latents"),
        (evaluate.EvaluateConfig, "quick_start/evaluation"),
        (train_classifier.ClassifierConfig, "quick_start/classifier"),
        (train.TrainConfig, "clothing32/diffusion"),
        (encode_latents.EncodeConfig, "clothing128/latents"),
        (train.TrainConfig, "clothing128/diffusion"),
        (train.TrainConfig, "cifar10/diffusion"),
        (text_task.TextTrainConfig, "quick_start_text/diffusion"),
        (text_evaluation.TextEvaluateConfig, "quick_start_text/evaluation"),
        (point_task.PointTrainConfig, "torsions/diffusion"),
        (point_task.PointTrainConfig, "sidechains/diffusion"),
        (point_task.PointTrainConfig, "earth_events/diffusion"),
    ],
)
def test_the_presets_fit_their_scripts(config_class, name, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    pipeline = ["--pipeline", tmp_path]
    needed = {"latents": ["--vae", "a"], "evaluation": pipeline, "classifier": pipeline}.get(Path(name).name, [])
    needed = ["--dataset", "rows.csv"] if config_class is point_task.PointTrainConfig else needed
    path = TRAINING / "configs" / f"{name}.yaml"
    config = dataclasses.asdict(parse(config_class, [str(each) for each in (path, *needed)]))
    for key, value in yaml.safe_load(path.read_text()).items():
        value = None if value == "none" else value
        assert config[key] == (json.dumps(value) if isinstance(value, dict) else value)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (train_autoencoder.main, ["--norm_num_groups", "7"], "norm_num_groups 7 must divide"),
        (train_autoencoder.main, ["--resolution", "30"], "resolution 30 must be a multiple of 4"),
        (train_autoencoder.main, ["--kl_weight", "-1"], "kl_weight -1.0"),
        (train_autoencoder.main, ["--latent_channels", "0"], "latent_channels 0 must be at least 1"),
        (train_classifier.main, [], "pipeline is missing"),
        (train_classifier.main, ["--pipeline", "a", "--label_column", "none"], "label_column is missing"),
        (train_classifier.main, ["--pipeline", "a", "--test_images", "0"], "test_images 0 must be at least 1"),
        (
            train_classifier.main,
            ["--pipeline", "a", "--network_kwargs", "8"],
            "network_kwargs '8' must be a mapping",
        ),
        (encode_latents.main, [], "vae is missing"),
        (encode_latents.main, ["--vae", "a", "--shard_size", "0"], "shard_size 0"),
        (evaluate.main, ["--pipeline", "nowhere"], "pipeline 'nowhere' is not a pipeline folder"),
        (evaluate.main, [], "pass either --pipeline or --samples"),
        (evaluate.main, ["--samples", "x.npz"], "samples are measured by --features alone"),
        (evaluate.main, ["--label_column", "none"], "label_column is missing"),
        (evaluate.main, ["--num_images", "0"], "num_images 0, likelihood 0, loss 0: one of them must be positive"),
    ],
)
def test_bad_options_of_the_other_scripts(main, arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(main, *arguments, "--dataset", "does_not_exist.parquet")
    error = capsys.readouterr().err
    assert message in error
    assert "does_not_exist" not in error


# --- data ---------------------------------------------------------------------------------------------------------


def parquet(path, rows, **columns):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    values = {"image": [Image.new("L", (9, 7), 10 * i) for i in range(rows)], "label": [i % 2 for i in range(rows)]}
    datasets.Dataset.from_dict(values | columns, features=features).to_parquet(path)
    return str(path)


def test_embedded_data():
    dataset = ImageDataset(data_config())
    assert (len(dataset), dataset.num_classes, dataset.id2label[9]) == (10_000, 10, "Ankle boot")
    item = dataset[0]
    assert item["images"].shape == (1, 32, 32)
    assert item["images"].min() == -1
    assert len(ImageDataset(data_config(), split="test")) == 2000
    counts = np.bincount(dataset.data["label"])
    assert (counts == 1000).all()


def test_resize_and_crop_keeps_the_centre():
    columns = np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))
    cropped = np.asarray(resize_and_crop(Image.fromarray(columns), 32))
    assert np.array_equal(cropped, columns[:, 16:48])
    assert resize_and_crop(Image.new("RGB", (30, 90)), 10).size == (10, 10)


def test_a_folder_of_images(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8), (100 * i, 0, 200)).save(tmp_path / name / f"{i}.png")
    dataset = ImageDataset(data_config(dataset=str(tmp_path), resolution=8, image_channels=3))
    assert (len(dataset), dataset.id2label) == (4, {0: "cat", 1: "dog"})
    assert torch.allclose(dataset[0]["images"][2], torch.full((8, 8), 200 / 127.5 - 1))


def test_what_is_missing_in_the_data_is_named(tmp_path):
    path = parquet(tmp_path / "train.parquet", 4)
    for changes, message in [
        ({"dataset": path, "image_column": "picture"}, "no column 'picture'; it has image, label.*--image_column"),
        ({"dataset": path, "label_column": "class"}, "no column 'class'; it has image, label.*--label_column none"),
        ({"dataset": str(tmp_path / "{split}.parquet"), "split": "dev"}, "dev.parquet' does not exist"),
        (
            {"dataset": parquet(tmp_path / "empty.parquet", 0)},
            "dataset '.*empty.parquet', split 'train', cannot be opened: .*no data",
        ),
        ({"dataset": "no/such-dataset"}, "dataset 'no/such-dataset', split 'train', cannot be opened"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageDataset(data_config(**changes))


def test_a_corrupt_image_is_named(tmp_path):
    good = io.BytesIO()
    Image.new("L", (9, 7)).save(good, format="PNG")
    images = [{"bytes": good.getvalue(), "path": None}] * 3 + [{"bytes": b"not an image", "path": None}]
    dataset = ImageDataset(data_config(dataset=parquet(tmp_path / "train.parquet", 4, image=images), resolution=8))
    assert dataset[2]["images"].shape == (1, 8, 8)
    with pytest.raises(
        ValueError, match="row 3 of dataset '.*train.parquet', split 'train': the image in column 'image'"
    ):
        dataset[3]


def test_greyscale_and_colour(tmp_path):
    (tmp_path / "all").mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "all" / "red.png")
    colour = ImageDataset(data_config(dataset=str(tmp_path), resolution=8, image_channels=3, label_column=None))[0]
    assert colour.keys() == {"images"}
    assert torch.equal(colour["images"][:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    grey = ImageDataset(data_config(dataset=str(tmp_path), resolution=8, label_column=None))[0]["images"]
    # the luma of red, ITU-R 601-2
    assert (grey - (0.299 * 255 / 127.5 - 1)).abs().max() < 1 / 127.5


@pytest.mark.parametrize("labels", [["cat", "dog"], [0, -1], [0.5, 1.5]], ids=str)
def test_labels_that_are_no_class_numbers_are_refused(labels, tmp_path):
    images = [Image.new("L", (8, 8))] * 2
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    if not isinstance(labels[0], str):
        features["label"] = datasets.Value("float64" if isinstance(labels[0], float) else "int64")
    data = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="label column 'label' must hold integers from 0; it has"):
        ImageDataset(data_config(dataset=str(tmp_path / "train.parquet")))


def test_a_row_without_a_class_is_refused(tmp_path):
    """-1 is how datasets on the Hub say that a split is not labelled."""
    path = parquet(tmp_path / "train.parquet", 2, label=[0, -1])
    with pytest.raises(ValueError, match="label column 'label' must hold integers from 0 to 1; it has .-1."):
        ImageDataset(data_config(dataset=path))


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "component"),
    [
        ([], "transformer"),
        (["--label_column", "none", "--random_flip"], "transformer"),
        (["--mixed_precision", "bf16", "--gradient_checkpointing"], "transformer"),
        (["--sde_type", "edm", "--prediction_type", "edm", "--time_density", "log_normal"], "transformer"),
        (["--sde_type", "ve", "--prediction_type", "score"], "transformer"),
        (["--network", "unet", "--network_kwargs", '{"block_out_channels": [8, 8], "layers_per_block": 1, '
          '"attention_resolutions": [4]}'], "unet"),
    ],
    ids=["plain", "unconditional", "bf16", "edm", "ve", "unet"],
)  # fmt: skip
def test_a_run_ends_in_a_pipeline_with_samples_and_card(arguments, component, tmp_path):
    train_tiny_or_unet = ["--output_dir", tmp_path, "--max_train_steps", 2, "--sample_steps", 1]
    run(train.main, *TINY_RUN, "--network_kwargs", TINY_DIT, *train_tiny_or_unet, *arguments)
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "pipeline")
    assert getattr(pipeline, component) is not None
    assert pipeline.num_classes == (None if "none" in arguments else 10)
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline(num_inference_steps=2, output_type="np").images).all()
    for name in ("step-00000001.png", "step-00000002.png"):
        grid = Image.open(tmp_path / "samples" / name)
        assert grid.size == ((3 if "none" in arguments else 10) * 64, (4 if "none" in arguments else 1) * 64)
    facts = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert (facts["steps"], facts["images_seen"], facts["rows"]) == (2, 8, 10_000)
    assert facts["conditions"] == ([] if "none" in arguments else ["class_labels"])
    assert "## Training" in (tmp_path / "pipeline" / "README.md").read_text()


def by_hand(x0, draws, density):
    """The mean square of a v-prediction network's target on the VP path: the loss of a network that returns 0."""
    scheduler, u = ScoreSDEScheduler(), draws.stratified()
    t = scheduler.t_min + (1 - scheduler.t_min) * u
    if density == "log_normal":  # log(sigma / alpha) ~ N(-1.2, 1.2^2)
        t = scheduler.path.t_from_half_log_snr(1.2 - 1.2 * torch.special.ndtri(u)).clamp(scheduler.t_min, 1)
    target = target_by_hand("v_prediction", scheduler.path, t, x0, draws.normal(x0.shape[1:]))
    return pytest.approx(target.square().mean().item(), rel=1e-5)


def first_batch(dataset, seed):
    rows = next(iter(GlobalBatchSampler(len(dataset), 4, seed, 0, 1)))
    one_process = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    return torch.stack([dataset[row]["images"] for row in rows]), Draws(seed, 0, one_process, 4)


@pytest.mark.parametrize("density", ["uniform", "log_normal"])
def test_the_first_loss_is_the_one_worked_out_by_hand(density, tmp_path):
    """A fresh DiT returns 0."""
    train_tiny(tmp_path, "--max_train_steps", 1, "--random_flip", "--time_density", density, "--seed", 3)
    x0, draws = first_batch(ImageDataset(data_config(resolution=8)), seed=3)
    mirrored = draws.uniform() < 0.5
    assert 0 < mirrored.sum() < 4
    x0[mirrored] = x0[mirrored].flip(3)
    facts = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert facts["final_loss"] == by_hand(x0, draws, density)


def test_the_network_is_trained_on_the_labels_of_the_images(tmp_path):
    no_dropout = json.dumps(json.loads(TINY_DIT) | {"class_dropout_prob": 0.0})
    # the label of a fresh DiT has no influence, and so no gradient, in the first two steps
    first, last = (
        train_tiny(tmp_path / str(steps), "--max_train_steps", steps, "--network_kwargs", no_dropout)[
            "class_embed.weight"
        ]
        for steps in (2, 4)
    )
    trained = (first != last).any(1).nonzero().flatten().tolist()
    dataset = ImageDataset(data_config())
    rows = take(GlobalBatchSampler(len(dataset), 4, 0, 0, 1, images_seen=8), 2)
    assert trained == sorted({dataset[row]["labels"] for row in rows})


def test_the_optimizer_does_what_the_options_say(tmp_path):
    options = ["--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--max_grad_norm", 1e-3, "--adam_weight_decay", 0.1]
    options += ["--adam_beta1", 0.8, "--adam_beta2", 0.95, "--gradient_accumulation_steps", 2, "--max_train_steps", 4]
    train_tiny(tmp_path, *options, "--checkpointing_steps", 1, "--checkpoints_total_limit", 4)
    # the rate of the next step: two steps of warm-up to 1e-2, then half a cosine over the two that are left
    for step, rate in enumerate([0.5e-2, 1e-2, 0.5e-2, 0.0], start=1):
        checkpoint = tmp_path / "checkpoints" / f"step-{step:08d}"
        optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
        [group], states = optimizer["param_groups"], optimizer["state"].values()
        assert group["lr"] == pytest.approx(rate, abs=1e-9)
        assert (*group["betas"], group["weight_decay"]) == (0.8, 0.95, 0.1)
        # two micro-batches of four images make one step
        assert {int(state["step"]) for state in states} == {step}
        assert json.loads((checkpoint / "state.json").read_text())["progress"]["images_seen"] == 8 * step
        if step == 1:  # the first moment is 1 - beta1 of a gradient that was clipped
            norm = torch.cat([state["exp_avg"].flatten() for state in states]).norm() / 0.2
            assert norm == pytest.approx(1e-3, rel=1e-3)


def test_the_published_weights_are_the_averaged_ones(tmp_path):
    weights = train_tiny(tmp_path, "--max_train_steps", 3, "--ema_decay", "0.9")
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    averaged = load_file(checkpoint / "ema.safetensors")
    trained = load_file(checkpoint / "model.safetensors")
    assert all(any(torch.equal(value, each) for each in averaged.values()) for value in weights.values())
    assert not equal(weights, trained)


RESUMED = ["--checkpointing_steps", 3, "--gradient_accumulation_steps", 2, "--checkpoints_total_limit", 5]


def test_resume_repeats_the_run_bit_for_bit(tmp_path):
    whole = train_tiny(tmp_path / "whole", *RESUMED, "--max_train_steps", 6)
    train_tiny(tmp_path / "parts", *RESUMED, "--max_train_steps", 3)
    # a checkpoint that was being written when the run stopped counts for nothing
    (tmp_path / "parts" / "checkpoints" / "step-00000004.partial").mkdir()
    resumed = train_tiny(tmp_path / "parts", *RESUMED, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert equal(whole, resumed)
    last = Path("checkpoints") / "step-00000006"
    for name in ("model.safetensors", "ema.safetensors"):
        assert equal(load_file(tmp_path / "whole" / last / name), load_file(tmp_path / "parts" / last / name))
    states = [
        torch.load(tmp_path / each / last / "optimizer.bin", weights_only=True)["state"] for each in ("whole", "parts")
    ]
    for parameter in states[0]:
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(states[0][parameter][name], states[1][parameter][name])
    # and the training was no standstill
    assert not equal(whole, load_file(tmp_path / "whole" / "checkpoints" / "step-00000003" / "ema.safetensors"))


def test_a_finished_run_can_be_run_again(tmp_path):
    """Stopped after the last checkpoint but before the pipeline was written: the same command writes it."""
    whole = train_tiny(tmp_path, "--max_train_steps", 2)
    facts = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    shutil.rmtree(tmp_path / "pipeline")
    assert equal(train_tiny(tmp_path, "--max_train_steps", 2, "--resume_from_checkpoint", "latest"), whole)
    again = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert again["final_loss"] == facts["final_loss"]
    assert again["images_seen"] == facts["images_seen"] == 8


def test_values_reach_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    arguments = ["--max_train_steps", 2, "--log_with", "tensorboard", "--logging_steps", 1, "--peak_tflops", 2]
    train_tiny(tmp_path, *arguments)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = [path for path in tmp_path.rglob("events.out.tfevents*") if path.parent.name == tmp_path.name]
    log = EventAccumulator(str(events.parent)).Reload()
    assert [event.value for event in log.Scalars("images_seen")] == [4, 8]
    names = {"loss", "loss_in_quarter_1", "gradient_norm", "learning_rate", "images_per_second", "waiting_for_data"}
    assert names | {"tflops_per_second", "mfu"} <= set(log.Tags()["scalars"])
    speed, tflops, mfu = (
        np.array([event.value for event in log.Scalars(name)])
        for name in ("images_per_second", "tflops_per_second", "mfu")
    )
    assert np.allclose(mfu, tflops / 2.0, rtol=1e-5)
    # a backward pass takes twice what the forward pass takes, but for the gradient of the pixels
    model = load_bundle(tmp_path / "pipeline").transformer
    assert 2.5 < (tflops / speed)[0] * 1e12 / (2e9 * dit_gflops.gflops(model)) < 3


@pytest.mark.slow
def test_a_compiled_network_trains_as_an_eager_one_does(tmp_path):
    eager = train_tiny(tmp_path / "eager", "--max_train_steps", 3, "--batch_size", 2)
    arguments = ["--max_train_steps", 3, "--batch_size", 2, "--sample_steps", 2]
    compiled = train_tiny(tmp_path / "compiled", *arguments, "--compile")
    assert compiled.keys() == eager.keys()
    assert max((compiled[name] - eager[name]).abs().max() for name in eager) < 1e-4


def test_bf16_trains_nearly_as_float32_does(tmp_path):
    """In one process, where neither precision stays for what comes after it."""
    plain = train_tiny(tmp_path / "plain", "--max_train_steps", 4)
    mixed = train_tiny(tmp_path / "mixed", "--max_train_steps", 4, "--mixed_precision", "bf16")
    assert {value.dtype for value in mixed.values()} == {torch.float32}
    assert not equal(plain, mixed)
    assert equal(plain, train_tiny(tmp_path / "again", "--max_train_steps", 4))
    facts = [json.loads((tmp_path / run / "pipeline" / "training.json").read_text()) for run in ("plain", "mixed")]
    assert facts[0]["final_loss"] != facts[1]["final_loss"]
    assert facts[0]["final_loss"] == pytest.approx(facts[1]["final_loss"], rel=0.02)


def test_tf32_is_used_where_asked_for(tmp_path):
    train_tiny(tmp_path / "with", "--max_train_steps", 1, "--allow_tf32")
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    train_tiny(tmp_path / "without", "--max_train_steps", 1)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_latents_are_encoded_with_tf32_where_asked_for(allowed, tiny_vae, small_data, tmp_path):
    torch.backends.cudnn.allow_tf32 = not allowed
    encode(small_data, tiny_vae, tmp_path / "latents", *["--allow_tf32"] * allowed)
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert torch.backends.cudnn.allow_tf32 == allowed
    torch.set_float32_matmul_precision("highest")


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train_tiny(tmp_path, "--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000003", "step-00000004"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train_tiny(tmp_path, "--max_train_steps", 1, "--checkpointing_steps", 1)
    more = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    for option, message in [
        (["--sde_type", "ve"], "sde_type was 'vp', is 've'"),
        (["--ema_decay", "0.5"], "ema_decay was 0.9999, is 0.5"),
        (["--network_kwargs", TINY_DIT.replace("16", "32")], "network_kwargs hidden_size was 16, is 32"),
    ]:
        with pytest.raises(ValueError, match=f"of a different run: {message}"):
            train_tiny(tmp_path, *more, *option)
    # the same in other words
    train_tiny(
        tmp_path, *more, "--network_kwargs", "{num_attention_heads: 2, num_layers: 1, hidden_size: 16, patch_size: 2}"
    )
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    state = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    state.write_text(state.read_text()[:100])
    with pytest.raises(ValueError, match="step-00000001' is not a checkpoint"):
        train_tiny(tmp_path, *more)


FREE = {
    *("output_dir", "on_existing_run", "resume_from_checkpoint", "allow_other_data", "max_train_steps", "num_workers"),
    *("checkpointing_steps", "checkpoints_total_limit", "max_skipped_steps", "skip_corrupt_images", "peak_tflops"),
    *("gradient_checkpointing", "compile", "logging_steps", "log_with", "push_to_hub", "hub_private", "push_steps"),
    *("evaluation_steps", "evaluation_images", "evaluation_features", "evaluation_split", "model_name", "license"),
    *("sample_steps", "sample_num_images", "sample_guidance_scale", "sample_num_inference_steps"),
    *("statistics_images", "test_split", "test_images", "sample_prompts", "save_text_encoder", "cache_images"),
    *("max_train_seconds", "evaluation_texts", "sample_num_texts", "evaluation_points"),
}


def test_it_is_decided_of_every_option_whether_it_may_change_on_resume():
    sets = (checkpoints.FIXED, checkpoints.PLACES, checkpoints.SAID, FREE)
    scripts = (
        train.TrainConfig,
        distill.DistillConfig,
        train_autoencoder.AutoencoderConfig,
        train_classifier.ClassifierConfig,
    )
    scripts += tuple(train.TrainConfig.other_kinds.values())
    options = {each.name for config_class in scripts for each in dataclasses.fields(config_class)}
    assert options == set.union(*sets)
    assert sum(map(len, sets)) == len(options)


def test_the_same_data_may_move_and_other_data_are_seen(tmp_path):
    """Photographs in folders by class: moved, then a class is called otherwise, then one of them is gone."""
    folder = tmp_path / "data"
    for i in range(12):
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(path)
    arguments = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--dataset"]
    whole = train_tiny(tmp_path / "whole", *arguments, folder)
    train_tiny(tmp_path / "parts", *arguments, folder, "--max_train_steps", 2)
    more = ["--resume_from_checkpoint", "latest"]
    folder = folder.rename(tmp_path / "elsewhere")
    assert equal(train_tiny(tmp_path / "parts", *arguments, folder, *more), whole)
    (folder / "cat").rename(folder / "zebra")
    with pytest.raises(ValueError, match="other data: classes 0 was 'cat', is 'dog', classes 1 was 'dog', is 'zebra'"):
        train_tiny(tmp_path / "parts", *arguments, folder, *more)
    (folder / "zebra").rename(folder / "cat")
    (folder / "cat" / "4.png").unlink()
    with pytest.raises(ValueError, match="was trained on other data: rows was '.*Pass the same data, or --allow_other"):
        train_tiny(tmp_path / "parts", *arguments, folder, *more)
    train_tiny(tmp_path / "parts", *arguments, folder, *more, "--allow_other_data")


def test_what_changes_no_weights_may_change_on_resume(tmp_path, capsys):
    arguments = ["--max_train_steps", 4, "--checkpointing_steps", 2]
    whole = train_tiny(tmp_path / "whole", *arguments)
    train_tiny(tmp_path / "parts", *arguments, "--max_train_steps", 2)
    changed = ["--sample_guidance_scale", 2, "--sample_num_images", 3, "--sample_steps", 1, "--model_name", "other"]
    changed += ["--license", "mit", "--gradient_checkpointing", "--batch_size", 2, "--gradient_accumulation_steps", 2]
    more = ["--resume_from_checkpoint", "latest", *changed]
    found = train_tiny(tmp_path / "parts", *arguments, *more)
    assert max((whole[name] - found[name]).abs().max() for name in whole) < 1e-5
    out = capsys.readouterr().out
    assert "changed since then: batch_size was 4, is 2, gradient_accumulation_steps was 1, is 2" in out


def positions(seconds, durations):
    """Where the schedule over as many steps as durations stands after each of them that is in time."""
    config = LoopConfig(max_train_steps=len(durations), max_train_seconds=seconds)
    found, passed = [0], 0.0
    for step, took in enumerate(durations):
        passed += took
        if seconds and passed > seconds:
            break
        found.append(position(found[-1], {"step": step, "seconds": passed}, config, took) + 1)
    return np.array(found)


@pytest.mark.parametrize(("seconds", "taken"), [(100.0, 100), (5000.0, 1000), (None, 1000)])
def test_the_schedule_of_the_learning_rate_ends_with_the_time_or_the_steps(seconds, taken):
    """1,000 steps of a second each, in 100 s or in more than enough."""
    found = positions(seconds, [1.0] * 1000)
    assert len(found) == taken + 1 and found[-1] == pytest.approx(1000, abs=1)
    assert np.abs(found - np.linspace(0, 1000, taken + 1)).max() <= 10


def test_a_step_that_takes_long_hurries_the_schedule_no_further_than_the_time_and_nothing_that_is_in_time():
    """100 steps of a second each, one of which takes 30: in 400 s, and in 60."""
    durations = [1.0] * 10 + [30.0] + [1.0] * 89
    assert (positions(400.0, durations) == np.arange(101)).all()
    found = positions(60.0, durations)
    assert found[11] == pytest.approx(100 * 40 / 60, abs=1) and found[-1] == pytest.approx(100, abs=1)


def test_training_ends_in_time(tmp_path):
    options = ["--max_train_steps", 10**6, "--max_train_seconds", 1, "--lr_scheduler", "cosine", "--logging_steps", 1]
    train_tiny(tmp_path / "run", *options)
    facts = json.loads((tmp_path / "run/pipeline/training.json").read_text())
    assert 0 < facts["steps"] < 10**6 and facts["train_seconds"] >= 1
    # a run whose time is over does nothing more
    before = learning_rates(tmp_path / "run")
    train_tiny(tmp_path / "run", *options, "--resume_from_checkpoint", "latest")
    assert learning_rates(tmp_path / "run") == before


def test_more_time_raises_the_learning_rate_that_had_come_to_its_end(tmp_path, capsys):
    options = {"max_train_steps": 10**6, "lr_scheduler": "linear", "learning_rate": 0.01, "checkpointing_steps": 10**6}
    fit_linear(tmp_path, rows_of(range(8)), max_train_seconds=0.5, **options)
    assert learning_rates(tmp_path)[-1] < 1e-3
    took = checkpoints.read_state(checkpoints.list_checkpoints(tmp_path)[-1])["progress"]["seconds"]
    fit_linear(tmp_path, rows_of(range(8)), max_train_seconds=1.5, resume_from_checkpoint="latest", **options)
    [was] = re.findall("the next step's learning rate was .*, is (.*): .* its end changed", capsys.readouterr().out)
    assert float(was) == pytest.approx(0.01 * (1 - took / 1.5), rel=0.01)
    # time over again
    assert learning_rates(tmp_path)[-1] < 1e-3


class Counting(Task):
    """A network of one weight, whose evaluations are numbered."""

    evaluation_steps = 2

    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1), rows_of(range(8)))
        self.done = []

    def compute_loss(self, state, batch, draws):
        return state.model(batch["x"][:, :1]).square().mean(), {}

    def evaluate(self, network):
        self.done.append(network.weight.item())
        return {"weight": self.done[-1]}


def test_the_last_weights_are_evaluated_once_also_of_a_run_that_goes_on_at_its_end(tmp_path):
    tasks, options = [], {"output_dir": str(tmp_path), "batch_size": 2, "checkpointing_steps": 4, "learning_rate": 0.1}
    for steps in (5, 5, 7, 7):
        config, task = LoopConfig(max_train_steps=steps, resume_from_checkpoint="latest", **options), Counting()
        accelerator = make_accelerator(config)
        with open_run(config, accelerator) as run:
            fit(config, accelerator, run, task)
        tasks.append(task.done)
    assert [len(done) for done in tasks] == [3, 1, 2, 1]
    assert (tasks[1], tasks[3]) == (tasks[0][-1:], tasks[2][-1:])
    records = read_records(tmp_path / "evaluation.jsonl")
    assert [each["step"] for each in records] == [2, 4, 5, 6, 7]
    assert [each["weight"] for each in records] == tasks[0] + tasks[2]


def test_a_pause_hurries_no_schedule_whose_steps_are_in_time(tmp_path):
    """A cosine over 60 steps in more time than they need, two of which take long."""

    def pause(step):
        if step in (10, 20):
            time.sleep(0.4)

    options = {"max_train_steps": 60, "lr_scheduler": "cosine", "max_train_seconds": 6.0, "checkpointing_steps": 30}
    fit_linear(tmp_path / "paused", rows_of(range(8)), before_step=pause, **options)
    states = [checkpoints.read_state(path) for path in checkpoints.list_checkpoints(tmp_path / "paused")]
    assert [state["lr_scheduler"]["last_epoch"] for state in states] == [30, 60]


@pytest.mark.parametrize("steps", [10_000, 100])
def test_other_steps_in_the_same_time_keep_the_share_of_the_schedule(steps):
    """A run of which half of the time is over after 20 steps, and which thus stands in the middle of 1,000."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    schedule.last_epoch = 500.0
    config = LoopConfig(max_train_steps=steps, max_train_seconds=60.0, learning_rate=1.0)
    before = {"max_train_steps": 1000, "max_train_seconds": 60.0}
    state = {"progress": {"step": 20, "seconds": 30.0}, "config": before}
    follow_schedule(config, SimpleNamespace(print=print), schedule, state)
    assert schedule.get_last_lr() == [0.5]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_other_micro_batches_begin_with_an_optimizer_step(tmp_path, micro_batches):
    """After three steps of one micro-batch, or of two, six of the other: the weights are those of one way."""
    parts, other = {"batch_size": 4 // micro_batches}, {"batch_size": 2 * micro_batches}
    parts["gradient_accumulation_steps"], other["gradient_accumulation_steps"] = micro_batches, 3 - micro_batches
    options = {"learning_rate": 0.1, "optimizer": "sgd", "checkpointing_steps": 3}
    rows = [{"x": torch.tensor([1.0, number, -number])} for number in range(8)]
    found = []
    for name, begins in (("whole", other), ("parts", parts)):
        fit_linear(tmp_path / name, rows, max_train_steps=3, **options, **begins)
        resumed = {"max_train_steps": 6, "resume_from_checkpoint": "latest", **options, **other}
        fit_linear(tmp_path / name, rows, **resumed)
        found.append(load_file(tmp_path / name / "checkpoints" / "step-00000006" / "model.safetensors"))
    assert max((found[0][name] - found[1][name]).abs().max() for name in found[0]) < 1e-5


def test_another_column_of_the_same_file_is_other_data(tmp_path):
    pictures = [Image.new("L", (8, 8), 20 * i) for i in range(8)]
    rows = {"image": pictures, "depth": pictures[::-1]}
    features = datasets.Features({name: datasets.Image() for name in rows})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows.parquet")
    options = ["--dataset", tmp_path / "rows.parquet", "--label_column", "none", "--checkpointing_steps", 1]
    train_tiny(tmp_path / "run", *options, "--max_train_steps", 1)
    more = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest", "--image_column", "depth"]
    with pytest.raises(ValueError, match="trained on other data: image_column was 'image', is 'depth'"):
        train_tiny(tmp_path / "run", *options, *more)
    train_tiny(tmp_path / "run", *options, *more, "--allow_other_data")


def test_other_labels_of_the_same_stream_are_other_data(tmp_path):
    """Of which no row is read before: nothing but the name of their column tells them from those before."""
    folder, names = tmp_path / "images", [f"{i}.png" for i in range(4)]
    folder.mkdir()
    for name in names:
        Image.new("L", (8, 8), 60).save(folder / name)
    rows = [json.dumps({"file_name": name, "label": i % 2, "sort": i // 2}) for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    options = ["--dataset", folder, "--streaming", "--num_classes", 2, "--checkpointing_steps", 1]
    train_tiny(tmp_path / "run", *options, "--max_train_steps", 1)
    more = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest", "--label_column", "sort"]
    with pytest.raises(ValueError, match="trained on other data: label_column was 'label', is 'sort'"):
        train_tiny(tmp_path / "run", *options, *more)


def learning_rates(folder):
    """Of the step that follows each checkpoint."""
    paths = [Path(path) / "optimizer.bin" for path in checkpoints.list_checkpoints(folder)]
    return [torch.load(path, weights_only=True)["param_groups"][0]["lr"] for path in paths]


def test_a_schedule_that_changes_on_resume_is_followed_at_once_and_said(tmp_path, capsys):
    """A cosine over four steps that has come to 0, and then is one over eight."""
    arguments = ["--lr_scheduler", "cosine", "--checkpointing_steps", 1, "--checkpoints_total_limit", 9]
    train_tiny(tmp_path / "whole", *arguments, "--max_train_steps", 8)
    train_tiny(tmp_path / "parts", *arguments, "--max_train_steps", 4)
    capsys.readouterr()
    train_tiny(tmp_path / "parts", *arguments, "--max_train_steps", 8, "--resume_from_checkpoint", "latest")
    assert "the next step's learning rate was 0, is 0.005: " in capsys.readouterr().out
    assert learning_rates(tmp_path / "parts")[4:] == learning_rates(tmp_path / "whole")[4:]
    before = load_file(tmp_path / "parts" / "checkpoints" / "step-00000004" / "model.safetensors")
    assert not equal(before, load_file(tmp_path / "parts" / "checkpoints" / "step-00000005" / "model.safetensors"))
    # no word where nothing changes
    train_tiny(tmp_path / "parts", *arguments, "--max_train_steps", 8, "--resume_from_checkpoint", "latest")
    assert "learning rate" not in capsys.readouterr().out
    more = ["--max_train_steps", 9, "--lr_scheduler", "constant", "--learning_rate", 0.5]
    train_tiny(tmp_path / "parts", *arguments, *more, "--resume_from_checkpoint", "latest")
    out = capsys.readouterr().out
    assert "changed since then: learning_rate was 0.01, is 0.5, lr_scheduler was 'cosine', is 'constant'" in out
    assert learning_rates(tmp_path / "parts")[-1] == 0.5


def rows_of(numbers):
    return [{"x": torch.full((3,), float(number))} for number in numbers]


def fit_linear(folder, rows, data_fingerprint=None, before_step=None, **options):
    """Train a linear layer on a list of rows, by the loop's own options alone; the rows of each batch. `before_step` is
    called with the number of steps that are done."""
    config = LoopConfig(**{"output_dir": str(folder), "batch_size": 2, "lr_warmup_steps": 0} | options)
    accelerator, seen = make_accelerator(config), []

    class Linear(Task):
        def compute_loss(self, state, batch, draws):
            seen.append(batch["x"][:, 0].tolist())
            if before_step is not None:
                before_step(state.progress["step"])
            return state.model(batch["x"]).square().mean(), {}

    torch.manual_seed(0)
    with open_run(config, accelerator) as run:
        fit(config, accelerator, run, Linear(torch.nn.Linear(3, 1), rows, data_fingerprint))
    return seen


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loop_takes_any_dataset_that_has_rows(tmp_path, num_workers):
    """A list: it knows of no epoch, and of no row beyond its end."""
    seen = fit_linear(tmp_path, rows_of(range(6)), max_train_steps=6, num_workers=num_workers)
    for epoch in (seen[:3], seen[3:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(6))
    assert seen[:3] != seen[3:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["cat", "bird"]}, "classes 1 was 'dog', is 'bird'"),
        ({"classes": ["dog", "cat"]}, "classes 0 was 'cat', is 'dog', classes 1 was 'dog', is 'cat'"),
        ({"classes": ["cat"]}, "classes 1 was 'dog', is None"),
        ({"rows": "b"}, "rows was 'a', is 'b'"),
        ({"autoencoder": "c"}, "autoencoder was None, is 'c'"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused_unless_allowed(tmp_path, change, message, capsys):
    data = {"classes": ["cat", "dog"], "rows": "a", "autoencoder": None}
    rows = rows_of(range(6))
    fit_linear(tmp_path, rows, data, max_train_steps=1)
    options = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=f"trained on other data: {message}. .*--allow_other_data"):
        fit_linear(tmp_path, rows, data | change, **options)
    assert len(fit_linear(tmp_path, rows, data | change, allow_other_data=True, **options)) == 1
    assert f"data: {message.split(', classes')[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_labels_are_dropped_for_the_whole_step(tmp_path, network):
    """However micro-batches share it; and they are dropped."""
    kwargs = {"dit": json.loads(TINY_DIT), "unet": json.loads(TINY_UNET) | {"dropout": 0.0}}[network]
    arguments = ["--network", network, "--max_train_steps", 4, "--checkpointing_steps", 0]
    found = {}
    for name, probability, batch in (("one", 0.5, [8, 1]), ("two", 0.5, [4, 2]), ("never", 0.0, [8, 1])):
        options = ["--network_kwargs", json.dumps(kwargs | {"class_dropout_prob": probability})]
        options += [
            "--batch_size",
            batch[0],
            "--gradient_accumulation_steps",
            batch[1],
            "--output_dir",
            tmp_path / name,
        ]
        run(train.main, *TINY_RUN, *arguments, *options)
        pipeline = load_bundle(tmp_path / name / "pipeline")
        found[name] = dict(pipeline.denoiser.named_parameters())
        assert pipeline.denoiser.config.class_dropout_prob == probability
    differences = [
        max(float((found["one"][name] - found[other][name]).detach().abs().max()) for name in found["one"])
        for other in ("two", "never")
    ]
    # Adam's first steps hardly know how large a gradient is, only how it is rounded where it is small
    assert differences[0] < 1e-4 < 1e-3 < differences[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(tmp_path):
    arguments = ["--max_train_steps", 20, "--checkpointing_steps", 1, "--logging_steps", 1, "--learning_rate", "1e30"]
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* lower learning_rate \(now 1e\+30\)"):
        train_tiny(tmp_path, *arguments, "--max_skipped_steps", 2)
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[0]["step"] + 3))
    assert lines[0]["images_seen"] == 4 * (lines[0]["step"] - 1)
    assert len(lines[0]["times"][0]) == 4
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        assert (checkpoint / "state.json").is_file()
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_same_global_batch(tmp_path):
    no_dropout = json.dumps(json.loads(TINY_DIT) | {"class_dropout_prob": 0.0})
    arguments = [*TINY_RUN, "--network_kwargs", no_dropout, "--max_train_steps", 4, "--random_flip"]
    run(train.main, *arguments, "--batch_size", 8, "--output_dir", tmp_path / "one")
    launch("train.py", *arguments, "--batch_size", 4, "--output_dir", tmp_path / "two", processes=2)
    one, two = (
        load_file(tmp_path / name / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("one", "two")
    )
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4
    losses = [json.loads((tmp_path / each / "pipeline" / "training.json").read_text()) for each in ("one", "two")]
    assert losses[0]["final_loss"] == pytest.approx(losses[1]["final_loss"], rel=1e-4)
    assert losses[1]["processes"] == 2
    assert losses[0]["images_seen"] == losses[1]["images_seen"] == 32


def test_recomputing_activations_and_sampling_on_the_way_change_no_weights(tmp_path):
    weights = train_tiny(tmp_path / "plain", "--max_train_steps", 3)
    for option in (["--gradient_checkpointing"], ["--sample_steps", 1], ["--num_workers", 1]):
        assert equal(train_tiny(tmp_path / option[0], "--max_train_steps", 3, *option), weights)
    assert not equal(train_tiny(tmp_path / "seed", "--max_train_steps", 3, "--seed", 1), weights)


TINY_UNET = '{"block_out_channels": [8, 8], "layers_per_block": 1, "attention_resolutions": [4], "dropout": 0.5}'


def test_an_interrupted_run_with_dropout_and_a_schedule_goes_on(tmp_path):
    """The same command again after the newest checkpoint was lost, or with its folder named."""
    network = ["--network", "unet", "--network_kwargs", TINY_UNET, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2]
    arguments = [*TINY_RUN, *network, *RESUMED, "--max_train_steps", 6, "--output_dir"]
    run(train.main, *arguments, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "latest" / "checkpoints")
    shutil.rmtree(tmp_path / "latest" / "checkpoints" / "step-00000006")
    run(train.main, *arguments, tmp_path / "latest", "--resume_from_checkpoint", "latest")
    third = tmp_path / "whole" / "checkpoints" / "step-00000003"
    run(train.main, *arguments, tmp_path / "named", "--resume_from_checkpoint", third)
    whole, latest, named = (
        load_file(tmp_path / name / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("whole", "latest", "named")
    )
    assert equal(whole, latest)
    assert equal(whole, named)


def test_no_checkpoint_holds_a_loss_that_is_not_finite(tmp_path):
    """Also when the loss is looked at less often than checkpoints are written."""
    often = ["--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--logging_steps", 50]
    with pytest.raises(FloatingPointError, match=r"lower learning_rate \(now 1e\+30\)"):
        train_tiny(tmp_path, "--max_train_steps", 20, "--learning_rate", "1e30", *often)
    [checkpoint] = (tmp_path / "checkpoints").iterdir()
    assert all(torch.isfinite(value).all() for value in load_file(checkpoint / "model.safetensors").values())


# --- autoencoder and latents --------------------------------------------------------------------------------------


def test_autoencoder_and_latents(tiny_vae, small_data, tmp_path):
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_vae)
    assert vae.config.scaling_factor == 1.0
    encode(small_data, tiny_vae, tmp_path / "latents")
    shards = sorted((tmp_path / "latents").glob("moments-*.safetensors"))
    assert len(shards) == 4
    moments = [load_file(shard) for shard in shards]
    mean, std = (torch.cat([each[name] for each in moments]) for name in ("mean", "std"))
    assert mean.shape == (60, 4, 4, 4)
    # posterior samples, normalised by the config, have zero mean and unit variance in every channel
    first = normalize_latents(mean, vae.config).double()
    spread = (std.double() / per_channel(vae.config.latents_std)) ** 2
    assert first.mean((0, 2, 3)).abs().max() < 1e-3
    assert ((first**2 + spread).mean((0, 2, 3)) - 1).abs().max() < 1e-3

    # stopped and run again: the missing shard comes back, byte for byte, and the others stay
    before = {shard: (shard.read_bytes(), shard.stat().st_mtime_ns) for shard in shards}
    shards[2].unlink()
    encode(small_data, tiny_vae, tmp_path / "latents")
    assert {shard: shard.read_bytes() for shard in shards} == {shard: data for shard, (data, _) in before.items()}
    assert all(shards[i].stat().st_mtime_ns == before[shards[i]][1] for i in (0, 1, 3))

    # trained on, with the autoencoder in the pipeline
    arguments = ["--latents", tmp_path / "latents", "--max_train_steps", 2, "--output_dir", tmp_path / "run"]
    train_tiny(tmp_path / "run", *arguments)
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert list(pipeline.vae.config.latents_mean) == list(vae.config.latents_mean)
    assert pipeline.transformer.config.in_channels == 4
    assert pipeline(class_labels="Bag", num_inference_steps=2).images[0].size == (8, 8)

    # latents of another autoencoder are refused, in both places
    other = tmp_path / "other"
    shutil.copytree(tiny_vae, other)
    weights = diffusers.AutoencoderKL.from_pretrained(other)
    with torch.no_grad():
        weights.post_quant_conv.bias += 1
    weights.save_pretrained(other)
    with pytest.raises(ValueError, match="holds other latents"):
        encode(small_data, other, tmp_path / "latents")
    with pytest.raises(ValueError, match="were encoded by another autoencoder"):
        train_tiny(tmp_path / "run2", *arguments[:4], "--vae", other)
    shards[0].unlink()
    with pytest.raises(ValueError, match="moments-00000.safetensors' is missing or damaged"):
        train_tiny(tmp_path / "run3", *arguments[:4])


def test_training_sees_the_same_latents_encoded_before_or_on_the_fly(tiny_vae, small_data, tmp_path):
    encode(small_data, tiny_vae, tmp_path / "latents")
    train_tiny(tmp_path / "before", "--latents", tmp_path / "latents", "--max_train_steps", 1)
    train_tiny(tmp_path / "on the fly", "--dataset", small_data, "--vae", tiny_vae, "--max_train_steps", 1)
    assert ScoreSDEPipeline.from_pretrained(tmp_path / "on the fly" / "pipeline").transformer.config.sample_size == 4
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_vae)
    images, draws = first_batch(ImageDataset(data_config(dataset=small_data, resolution=8)), seed=0)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    latents = posterior.mean + posterior.std * draws.normal(posterior.mean.shape[1:])
    x0 = (latents - per_channel(vae.config.latents_mean)) / per_channel(vae.config.latents_std)
    expected = by_hand(x0, draws, "uniform")
    for name in ("before", "on the fly"):
        assert json.loads((tmp_path / name / "pipeline" / "training.json").read_text())["final_loss"] == expected


def per_channel(values):
    return torch.tensor(values).reshape(-1, 1, 1)


def test_images_are_encoded_on_the_fly_by_any_autoencoder(tiny_vae, small_data, tmp_path):
    tiny_dc(tmp_path / "dc")
    for name, vae in (("kl", tiny_vae), ("dc", tmp_path / "dc")):
        train_tiny(tmp_path / name, "--dataset", small_data, "--vae", vae, "--max_train_steps", 2)
        pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / name / "pipeline")
        assert pipeline.transformer.config.sample_size == 4
        assert type(pipeline.vae).__name__ == {"kl": "AutoencoderKL", "dc": "AutoencoderDC"}[name]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no photographs beside the checkout")
def test_photographs_in_the_latents_of_a_pretrained_autoencoder(tmp_path):
    arguments = ["--dataset", SHARED / "clothing256_{split}.parquet", "--split", "test", "--vae", SHARED / "taesd"]
    train_tiny(tmp_path, *arguments, "--image_channels", 3, "--resolution", 32, "--max_train_steps", 2)
    pipeline = ScoreSDEPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline(class_labels=0, num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.slow
def test_two_processes_encode_the_same_latents(tiny_vae, small_data, tmp_path):
    encode(small_data, tiny_vae, tmp_path / "one")
    arguments = [*TINY_DATA, "--dataset", small_data, "--vae", tiny_vae, "--shard_size", 16]
    launch("encode_latents.py", *arguments, "--output_dir", tmp_path / "two", processes=2)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 5
    assert one == two


def test_an_autoencoder_is_measured_in_parts(small_data, tmp_path, monkeypatch):
    """Its statistics, and the grid of its reconstructions: of 128 large images at once a GPU has no room."""
    found, seen = {}, []

    def noting(function):
        def call(self, data, *arguments, **options):
            if not torch.is_grad_enabled():
                seen.append(len(data))
            return function(self, data, *arguments, **options)

        return call

    for name in ("encode", "decode"):
        monkeypatch.setattr(diffusers.AutoencoderKL, name, noting(getattr(diffusers.AutoencoderKL, name)))
    arguments = ["--block_out_channels", 8, 8, "--norm_num_groups", 4, "--lr_warmup_steps", 0, "--batch_size", 4]
    arguments += ["--dataset", small_data, "--max_train_steps", 2]
    for pixels, images in ((None, 60), (7 * 64, 7), (1, 1)):
        if pixels:
            monkeypatch.setattr(train_autoencoder, "PIXELS_AT_ONCE", pixels)
        seen.clear()
        run(train_autoencoder.main, *TINY_DATA, *arguments, "--output_dir", tmp_path / str(images))
        # twice 32 for the grid
        assert max(seen) == images and sum(seen) == 60 + 2 * 32
        facts = json.loads((tmp_path / str(images) / "vae" / "training.json").read_text())
        config = json.loads((tmp_path / str(images) / "vae" / "config.json").read_text())
        found[images] = torch.tensor([facts["training_psnr_db"], *config["latents_mean"], *config["latents_std"]])
    assert all(torch.allclose(each, found[60], rtol=1e-4, atol=1e-6) for each in found.values())


def test_an_autoencoder_resumes_bit_for_bit(small_data, tmp_path):
    arguments = [*TINY_DATA, "--block_out_channels", 8, 8, "--norm_num_groups", 4, "--dataset", small_data]
    arguments += ["--batch_size", 4, "--checkpointing_steps", 2, "--random_flip", "--output_dir"]
    run(train_autoencoder.main, *arguments, tmp_path / "whole", "--max_train_steps", 4)
    run(train_autoencoder.main, *arguments, tmp_path / "parts", "--max_train_steps", 2)
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    run(train_autoencoder.main, *arguments, tmp_path / "parts", *more)
    name = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert equal(load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name))


@pytest.mark.slow
def test_a_classifier_of_noisy_samples_is_trained_for_a_pipeline(tiny_vae, small_data, tmp_path):
    """In pixels with several paths, and on latents; it lands in a folder with the facts of its training."""
    encode(small_data, tiny_vae, tmp_path / "latents")
    arguments = [*TINY_DATA, "--test_split", "train", "--test_images", 40, "--batch_size", 30, "--lr_warmup_steps", 0]
    arguments += ["--network_kwargs", '{"block_out_channels": [16, 32], "dropout": 0.0}', "--max_train_steps", 200]
    arguments += ["--learning_rate", 3e-3, "--ema_decay", 0.9, "--checkpointing_steps", 0]
    for name, data, path in (
        ("pixels", ["--dataset", small_data], ["--sde_type", "ve"]),
        ("latents", ["--latents", tmp_path / "latents"], []),
    ):
        train_tiny(tmp_path / name, *data, *path, "--max_train_steps", 1)
        folder = tmp_path / name / "pipeline"
        output_dir = tmp_path / f"classifier of {name}"
        run(
            train_classifier.main,
            *arguments,
            *data,
            "--dataset",
            small_data,
            "--pipeline",
            folder,
            "--output_dir",
            output_dir,
        )
        facts = json.loads((output_dir / "classifier" / "training.json").read_text())
        assert [row["n"] for row in facts["accuracy"]] == [40] * 5
        # far better than a guess (1 in 10) without noise; latents of an autoencoder of three steps hold little
        if name == "pixels":
            assert facts["accuracy"][0]["accuracy"] > 0.5 > facts["accuracy"][-1]["accuracy"]
        trained = NoiseConditionalClassifier.from_pretrained(output_dir / "classifier")
        pipeline = load_bundle(folder)
        assert pipeline(class_labels=[3], classifier=trained, num_inference_steps=2).images[0].size == (8, 8)
    with pytest.raises(ValueError, match="the pipeline generates .4, 4, 4., the data are .1, 8, 8."):
        run(
            train_classifier.main,
            *arguments,
            "--dataset",
            small_data,
            "--pipeline",
            folder,
            "--output_dir",
            tmp_path / "x",
        )
    # the accuracy would be one on other images
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / name / "0.png")
    other = ["--latents", tmp_path / "latents", "--dataset", tmp_path / "photos", "--pipeline", folder]
    with pytest.raises(ValueError, match="the classes are T-shirt/top, .* measured, cat, dog: pass by --dataset"):
        run(train_classifier.main, *arguments, *other, "--output_dir", tmp_path / "y")
    other[3:4] = [small_data, "--resolution", 16]
    with pytest.raises(ValueError, match="resolution 16: the latents are of images of 8 pixels; pass 8"):
        run(train_classifier.main, *arguments, *other, "--output_dir", tmp_path / "y")


def test_every_option_is_used():
    """A field of a config that no script reads would be an option that is accepted and ignored."""
    sources = "".join(path.read_text() for path in TRAINING.rglob("*.py"))
    for config_class in (LoopConfig, *CONFIG_CLASSES):
        for each in dataclasses.fields(config_class):
            assert f"config.{each.name}" in sources or f"self.{each.name}" in sources, each.name


@pytest.mark.slow
def test_quick_start_reaches_its_quality(tmp_path):
    command = [sys.executable, str(TRAINING / "quick_start.py"), "--output_dir", str(tmp_path / "run")]
    assert subprocess.run(command).returncode == 0
    metrics = json.loads((tmp_path / "run" / "diffusion" / "pipeline" / "metrics.json").read_text())
    values = {metric["name"]: metric["value"] for metric in metrics}
    assert values["classifier accuracy on real images"] >= 0.85
    assert values["classifier accuracy on samples"] >= 0.8
