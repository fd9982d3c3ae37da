"""Evaluation: figures of pipelines and of images that were made before, by themselves and during training."""

import json
import re
import shutil
from types import SimpleNamespace

import classifier
import datasets
import evaluate
import numpy as np
import pytest
import torch
from data import ImageDataset
from loop import Draws
from PIL import Image
from test_training import (  # noqa: F401
    EMBEDDED_TRAIN,
    TINY_DATA,
    TRAINING,
    data_config,
    encode,
    equal,
    fresh_accelerate_state,
    launch,
    run,
    train_tiny,
)
from tiny import tiny_vae

from score_sde import load_bundle
from score_sde.losses import TIME_DENSITIES, denoising_loss


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """60 real images."""
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    data = datasets.Dataset.from_parquet(str(TRAINING.parent / EMBEDDED_TRAIN))
    data.select(range(0, 10_000, 167)).to_parquet(path)
    return str(path)


def test_evaluation_during_training(small_data, tmp_path):
    """The last figures are those of the pipeline that the run ends in."""
    arguments = ["--dataset", small_data, "--evaluation_split", "train", "--evaluation_images", 20]
    arguments += ["--max_train_steps", 4, "--evaluation_steps", 2, "--evaluation_features", "classifier"]
    weights = train_tiny(tmp_path / "run", *arguments)
    assert equal(weights, train_tiny(tmp_path / "without", "--dataset", small_data, "--max_train_steps", 4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["images_seen"]) for line in lines] == [(2, 8), (4, 16)]

    # by hand, batch by batch
    dataset = ImageDataset(data_config(dataset=small_data, resolution=8))
    pipeline = load_bundle(tmp_path / "run" / "pipeline")
    network, scheduler = pipeline.transformer, pipeline.scheduler
    one_process, losses = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu")), []
    for start in range(0, 20, 4):
        x0 = torch.stack([dataset[i]["images"] for i in range(start, start + 4)])
        labels = torch.tensor([dataset[i]["labels"] for i in range(start, start + 4)])
        draws = Draws(0, start, one_process, 4)
        t = TIME_DENSITIES["uniform"](scheduler, draws.stratified())
        with torch.no_grad():
            losses.append(denoising_loss(network, scheduler, x0, draws.normal((1, 8, 8)), t, labels))
    assert lines[1]["held_out_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert lines[0]["held_out_loss"] != lines[1]["held_out_loss"]

    measured = ["--pipeline", tmp_path / "run" / "pipeline", *TINY_DATA, "--dataset", small_data, "--num_images", 20]
    measured += ["--features", "classifier", "--test_split", "train", "--num_inference_steps", 2]
    run(evaluate.main, *measured)
    metrics = json.loads((tmp_path / "run" / "pipeline" / "metrics.json").read_text())
    [distance] = [metric["value"] for metric in metrics if metric["name"].startswith("Fréchet distance")]
    assert lines[1]["frechet_distance"] == pytest.approx(distance, rel=1e-3)


def test_a_latent_model_is_evaluated_on_held_out_images(small_data, tmp_path):
    """The same figure for latents that were encoded before, which don't say what the images are, and on the fly."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    encode(small_data, tmp_path / "vae", tmp_path / "latents")
    losses = []
    for name, data in (
        ("before", ["--latents", tmp_path / "latents", "--resolution", 32]),
        ("on the fly", ["--dataset", small_data, "--vae", tmp_path / "vae"]),
    ):
        options = ["--evaluation_steps", 1, "--evaluation_images", 10, "--evaluation_split", "train"]
        train_tiny(tmp_path / name, *data, *options, "--max_train_steps", 1)
        losses.append(json.loads((tmp_path / name / "evaluation.jsonl").read_text())["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_accuracy_is_the_share_of_images_that_are_recognised():
    logits = torch.eye(3).repeat(200, 1)
    labels = torch.tensor([0, 1, 0]).repeat(200)
    assert classifier.accuracy(lambda images: images, logits, labels) == pytest.approx(2 / 3)


def test_evaluation_writes_figures_onto_the_card(small_data, tmp_path):
    train_tiny(tmp_path, "--dataset", small_data, "--max_train_steps", 1)
    folder = tmp_path / "pipeline"
    arguments = ["--test_split", "train", "--num_images", 13, "--num_inference_steps", 2, "--guidance_scale", 1.5]
    arguments += ["--classifier_epochs", 1, "--dataset", small_data, "--pipeline", folder]
    found = []
    # a measurement that is made again replaces the one before
    for _ in range(2):
        run(evaluate.main, *TINY_DATA, *arguments)
        found.append(json.loads((folder / "metrics.json").read_text()))
    real, samples = found[0]
    assert (real["n"], samples["n"], samples["nfe"], samples["guidance_scale"]) == (60, 13, 2, 1.5)
    trained = json.loads((folder / "training.json").read_text())
    assert samples["ema_decay"] == trained["config"]["ema_decay"]
    assert samples["commit"] == trained["commit"] and re.match("[0-9a-f]{40}|score-sde [0-9]", samples["commit"])
    assert not samples["dataset_on_hub"]
    assert [metric["value"] for metric in found[1]] == [real["value"], samples["value"]]
    assert f"| classifier accuracy on samples | {samples['value']} | 13 |" in (folder / "README.md").read_text()
    # and the images don't depend on the batch size
    together, apart = (
        evaluate.generate(
            load_bundle(folder),
            [0, 1, 2, 3, 4],
            evaluate.EvaluateConfig(num_inference_steps=2, batch_size=batch_size, seed=5),
            torch.device("cpu"),
        )
        for batch_size in (5, 2)
    )
    assert (together - apart).abs().max() < 1e-4
    assert (together[0] - together[2]).abs().max() > 0.1


def test_evaluation_measures_distances(small_data, tmp_path, capsys):
    """The same figures for every batch size, and from the images alone that were saved."""
    train_tiny(tmp_path, "--dataset", small_data, "--max_train_steps", 1)
    folder = tmp_path / "pipeline"
    arguments = [*TINY_DATA, "--num_images", 20, "--num_inference_steps", 2, "--features", "classifier"]
    arguments += ["--classifier_epochs", 1, "--dataset", small_data, "--test_split", "train"]
    found = []
    for batch_size in (20, 7):
        own = ["--batch_size", batch_size, "--repeats", 2, "--save_samples", tmp_path / f"{batch_size}.npz"]
        run(evaluate.main, *arguments, "--pipeline", folder, *own)
        found.append({metric["name"]: metric for metric in json.loads((folder / "metrics.json").read_text())})
    name = "Fréchet distance of 20 samples to the 60 images of train, a small classifier of the training images"
    kinds = ("Fréchet distance", "kernel distance (KID)", "precision", "recall", "inception score")
    measured = [metric for metric in found[0] if metric.startswith(kinds)]
    assert len(measured) == 5 and name in measured
    for metric in measured:
        assert found[0][metric]["value"] == pytest.approx(found[1][metric]["value"], rel=1e-3, abs=1e-6)
        assert found[0][metric]["explanation"].startswith("mean of 2 sets of samples, standard deviation")
    assert (found[0][name]["n"], found[0][name]["nfe"]) == (20, 2)
    first, second = (np.load(tmp_path / f"{batch_size}.npz")["arr_0"] for batch_size in (20, 7))
    assert first.shape == (20, 8, 8, 1) and first.dtype == np.uint8
    assert np.abs(first.astype(int) - second).max() <= 1

    # one set: that of the pipeline and of the images alone
    run(evaluate.main, *arguments, "--pipeline", folder)
    metrics = {metric["name"]: metric for metric in json.loads((folder / "metrics.json").read_text())}
    capsys.readouterr()
    run(evaluate.main, *arguments, "--samples", tmp_path / "20.npz")
    lines = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert float(lines[name]) == pytest.approx(metrics[name]["value"], rel=1e-3)
    for value, message in (
        (first.astype(float), "must hold uint8"),
        (first[:5], "holds 5 images; --num_images asks for 20"),
    ):
        np.savez(tmp_path / "bad.npz", value)
        with pytest.raises(ValueError, match=message):
            run(evaluate.main, *arguments, "--samples", tmp_path / "bad.npz")
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(first):
        Image.fromarray(image[..., 0]).save(folder / f"{i:03d}.png")
    run(evaluate.main, *arguments, "--samples", folder, "--image_channels", 3)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(small_data, tmp_path):
    train_tiny(tmp_path, "--dataset", small_data, "--max_train_steps", 1)
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        shutil.copytree(tmp_path / "pipeline", folder)
        arguments = [*TINY_DATA, "--num_images", 21, "--num_inference_steps", 2, "--features", "classifier"]
        arguments += ["--classifier_epochs", 1, "--dataset", small_data, "--test_split", "train", "--pipeline", folder]
        if processes == 1:
            run(evaluate.main, *arguments)
        else:
            launch("evaluate.py", *arguments, processes=2)
        found.append({metric["name"]: metric["value"] for metric in json.loads((folder / "metrics.json").read_text())})
    assert found[0] == pytest.approx(found[1], rel=1e-3)
