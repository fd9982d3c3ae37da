"""Evaluation: figures of pipelines and of images that were made before, by themselves and during training."""

import json
import os
import re
import shutil
import sys
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from places import TRAINING
from tiny import random_dit, seeded, tiny_pipeline, tiny_vae

from runs import TINY_DATA, TINY_DIT, TINY_RUN, data_config, encode, equal, launch, run, train_tiny
from score_sde import load_bundle, save_bundle
from score_sde.losses import TIME_DENSITIES, denoising_loss
from score_sde.pipelines.images import to_mode
from score_sde.pipelines.likelihood import dequantize
from score_sde.training import evaluate, train
from score_sde.training.parts import classifier, options, provenance, rounds, validation
from score_sde.training.parts import samples as samples_of
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.metrics import frechet_distance, moments


@pytest.fixture(scope="module")
def bundle(small_data, tmp_path_factory):
    """A random model of these images, as if it had been trained on them."""
    dataset = small_data.replace("train", "{split}")
    return bundle_of(small_data, tmp_path_factory.mktemp("bundle") / "pipeline", {"dataset": dataset})


def bundle_of(dataset, folder, facts=(), pipeline=None):
    names = datasets.Dataset.from_parquet(dataset).features["label"].names
    if pipeline is None:
        pipeline = tiny_pipeline(network=random_dit(8, 1, 10, std=0.3))
        pipeline.register_to_config(id2label={str(i): name for i, name in enumerate(names)})
    found = {"dataset": dataset, "dataset_on_hub": False, "split": "train", "config": {"ema_decay": 0.5}}
    return Path(save_bundle(pipeline, folder, facts=found | dict(facts)))


QUICK = ["--num_inference_steps", 2, "--classifier_epochs", 1, "--test_split", "train", "--pipeline"]


def figures(folder):
    """{name: metric} of a bundle."""
    return {metric["name"]: metric for metric in json.loads((folder / "metrics.json").read_text())}


# --- during training ----------------------------------------------------------------------------------------------


def test_evaluation_during_training(small_data, tmp_path):
    """The last figures are those of the pipeline that the run ends in."""
    arguments = ["--dataset", small_data, "--evaluation_split", "train", "--evaluation_images", 20]
    arguments += ["--max_train_steps", 4, "--evaluation_steps", 2, "--evaluation_features", "classifier"]
    weights = train_tiny(tmp_path / "run", *arguments)
    assert equal(weights, train_tiny(tmp_path / "without", "--dataset", small_data, "--max_train_steps", 4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["images_seen"]) for line in lines] == [(2, 8), (4, 16)]

    # by hand, row by row
    dataset = ImageDataset(data_config(dataset=small_data, resolution=8))
    pipeline = load_bundle(tmp_path / "run" / "pipeline")
    network, scheduler, losses = pipeline.transformer, pipeline.scheduler, []
    for row in range(20):
        x0, labels = dataset[row]["images"][None], torch.tensor([dataset[row]["labels"]])
        draws = validation.RowDraws(0, [row], 20, torch.device("cpu"))
        t = TIME_DENSITIES["uniform"](scheduler, draws.stratified())
        with torch.no_grad():
            losses.append(denoising_loss(network, scheduler, x0, draws.normal((1, 8, 8)), t, {"class_labels": labels}))
    assert lines[1]["held_out_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert lines[0]["held_out_loss"] != lines[1]["held_out_loss"]

    measured = ["--pipeline", tmp_path / "run" / "pipeline", "--num_images", 20]
    measured += ["--features", "classifier", "--test_split", "train", "--num_inference_steps", 2]
    run(evaluate.main, *measured)
    found = figures(tmp_path / "run" / "pipeline")
    [distance] = [metric["value"] for name, metric in found.items() if name.startswith("Fréchet distance")]
    assert lines[1]["frechet_distance"] == pytest.approx(distance, rel=1e-3)


def test_the_draws_of_a_row_are_its_own():
    def draws(rows):
        return validation.RowDraws(3, rows, 12, torch.device("cpu"))

    for name, arguments in (("normal", ((2, 3),)), ("uniform", ()), ("stratified", ())):
        whole = getattr(draws(list(range(12))), name)(*arguments)
        parts = [getattr(draws(rows), name)(*arguments) for rows in ([0, 1, 2, 3, 4], [5], list(range(6, 12)))]
        assert torch.equal(whole, torch.cat(parts))
        assert len(whole.unique()) == whole.numel()
    # a time in each of as many parts as there are rows, in no order
    strata = (draws(list(range(12))).stratified() * 12).floor()
    assert sorted(strata.tolist()) == list(range(12)) != strata.tolist()


def test_a_latent_model_is_evaluated_on_held_out_images(small_data, tmp_path):
    """The same figure for latents that were encoded before, which don't say what the images are, and on the fly."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    encode(small_data, tmp_path / "vae", tmp_path / "latents")
    losses = []
    for name, data in (
        ("before", ["--latents", tmp_path / "latents"]),
        ("on the fly", ["--dataset", small_data, "--vae", tmp_path / "vae"]),
    ):
        options = ["--evaluation_steps", 1, "--evaluation_images", 10, "--evaluation_split", "train"]
        train_tiny(tmp_path / name, *data, *options, "--max_train_steps", 1)
        losses.append(json.loads((tmp_path / name / "evaluation.jsonl").read_text())["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    # the size and the data of the images, which the options of the run don't say
    run(evaluate.main, *QUICK, tmp_path / "before" / "pipeline", "--num_images", 2)
    found = figures(tmp_path / "before" / "pipeline")["classifier accuracy on samples"]
    assert (found["resolution"], found["image_channels"], found["dataset"]) == (8, 1, "train.parquet")


# --- what is measured ---------------------------------------------------------------------------------------------


def test_what_is_measured_comes_from_the_bundle(small_data, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "pipeline")
    arguments = [*QUICK, folder, "--num_images", 12, "--features", "classifier"]
    run(evaluate.main, *arguments)
    before = figures(folder)
    name = "Fréchet distance of 12 samples to the 60 images of train, a small classifier of the training images"
    where = os.path.basename(os.path.dirname(small_data))
    expected = {"resolution": 8, "image_channels": 1, "dataset": where + "/{split}.parquet", "split": "train", "n": 12}
    assert {key: before[name][key] for key in expected} == expected
    assert (before[name]["reference_images"], before[name]["ema_decay"]) == (60, 0.5)
    assert str(tmp_path) not in json.dumps(before)
    # given by hand they may be, where they agree, from wherever the dataset now is
    (tmp_path / "moved" / where).mkdir(parents=True)
    moved = shutil.copy(small_data, tmp_path / "moved" / where)
    run(evaluate.main, *arguments, *TINY_DATA, "--dataset", str(moved).replace("train", "{split}"))
    assert {each: metric["value"] for each, metric in figures(folder).items()} == {
        each: metric["value"] for each, metric in before.items()
    }
    # what is measured against other images is another figure
    other = tmp_path / "other.parquet"
    datasets.Dataset.from_parquet(small_data).select(range(30)).to_parquet(other)
    run(evaluate.main, *arguments, "--dataset", other)
    after = figures(folder)
    assert [after[each]["value"] for each in before] == [before[each]["value"] for each in before]
    assert len(after) == 2 * len(before)
    for each in after.keys() - before.keys():
        assert " of other.parquet" in each and after[each]["dataset"] == "other.parquet"


def test_corrupt_images_are_skipped_as_in_training(tmp_path, capsys):
    data, rng = tmp_path / "photos", np.random.default_rng(0)
    for path in [data / split / name / f"{i}.png" for split in ("train", "test") for name in "ab" for i in range(6)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
    (data / "train" / "a" / "3.png").write_bytes(b"no image")
    tiny_vae().save_pretrained(tmp_path / "vae")
    encode(data, tmp_path / "vae", tmp_path / "latents", "--skip_corrupt_images")
    skips = ["--dataset", data, "--skip_corrupt_images"]
    for name, source in (("pixels", skips), ("latent", ["--latents", tmp_path / "latents"])):
        train_tiny(tmp_path / name, *source, "--max_train_steps", 1)
        capsys.readouterr()
        options = ["--num_images", 2, "--num_inference_steps", 2, "--classifier_epochs", 1]
        arguments = ["--pipeline", tmp_path / name / "pipeline", *options]
        run(evaluate.main, *arguments)
        said = capsys.readouterr().out
        assert f"dataset '{data}', split 'train': 12 images of 2 classes: a 6, b 6\n" in said
        assert "split 'test': 12 images of 2 classes" in said and "row 4 is taken instead" in said


def test_columns_are_those_of_training(small_data, tmp_path):
    data = datasets.Dataset.from_parquet(small_data).rename_columns({"image": "picture", "label": "kind"})
    data.to_parquet(tmp_path / "renamed.parquet")
    columns = {"image_column": "picture", "label_column": "kind"}
    facts = {"dataset": str(tmp_path / "renamed.parquet"), "config": columns}
    folder = bundle_of(small_data, tmp_path / "pipeline", facts)
    run(evaluate.main, *QUICK, folder, "--num_images", 2)
    assert figures(folder)["classifier accuracy on samples"]["n"] == 2


def named(label, data, tmp_path, names):
    """The same images with other names of their classes."""
    features = data.features.copy()
    features["label"] = datasets.ClassLabel(names=names)
    path = tmp_path / label / "train.parquet"
    path.parent.mkdir()
    data.map(lambda row: {"label": row["label"] % len(names)}).cast(features).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", 16], "resolution 16: the pipeline draws 8; leave --resolution out"),
        (["--image_channels", 3], "image_channels 3: the pipeline draws 1; leave --image_channels out"),
        (
            ["--dataset", "{tmp}/swapped/{{split}}.parquet"],
            "the pipeline's classes are T-shirt/top, .* those of .* Bag, ",
        ),
        (["--dataset", "{tmp}/fewer/train.parquet"], "the pipeline has 10 classes, the dataset 9"),
        (["--test_split", "nowhere"], "split 'nowhere', cannot .*--test_split names another.*--dataset says"),
        (["--features", "inception", "--reference_split", "nowhere"], "'nowhere', cannot .*--reference_split names"),
        (["--features", "{tmp}/nothing"], "features '.*nothing' cannot be opened"),
        (["--features", "absent.onnx"], "features 'absent.onnx'"),
        (["--features", "classifier", "--label_column", "none"], "label_column is missing: a classifier needs labels"),
        (["--label_column", "none"], "label_column is missing"),
        (["--dataset", "{tmp}/few.parquet", "--features", "classifier"], "split 'train' has 9 images; distances need"),
        (["--features", "classifier", "--num_images", 3], "num_images 3: distances need at least 10"),
        (["--features", "classifier", "--reference_images", 3], "reference_images 3: distances need at least 10"),
        (["--likelihood", 1], "likelihoods need torchdiffeq: pip install torchdiffeq"),
        (["--tolerance", "nan"], "tolerance nan must be positive"),
        (["--dequantization", "normal"], "dequantization 'normal' is unknown; choose one of uniform, truncated_normal"),
        (["--save_samples", "nowhere/x.npz"], "save_samples 'nowhere/x.npz': there is no such folder"),
        (["--save_samples", "{tmp}"], "save_samples '.*' is a folder: name a file in it"),
        (["--num_inference_steps", 200000], "num_inference_steps 200000 must be a whole number from 1 to"),
        (["--guidance_scale", "nan"], "guidance_scale nan must be a finite number"),
    ],
)
def test_everything_is_opened_before_anything_is_drawn(
    arguments, message, small_data, bundle, tmp_path, monkeypatch, capsys
):
    data = datasets.Dataset.from_parquet(small_data)
    names = data.features["label"].names
    named("swapped", data, tmp_path, names[::-1])
    named("fewer", data, tmp_path, names[:9])
    data.select(range(9)).to_parquet(tmp_path / "few.parquet")
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    options.WORK_BEGUN.clear()
    given = [str(each).format(tmp=tmp_path) for each in arguments]
    with pytest.raises((ValueError, SystemExit)) as error:
        run(evaluate.main, *QUICK, bundle, *given)
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    assert not options.WORK_BEGUN.is_set()


@pytest.mark.parametrize(
    ("facts", "network", "arguments", "message"),
    [
        ({"dataset": None}, None, [], "doesn't say what it was trained on: pass --dataset"),
        ({"dataset": "gone.parquet"}, None, [], "'gone.parquet' does not exist.*where it is now, --dataset says"),
        ({}, (8, 1, None), [], "the pipeline has no classes to judge: pass --features, or --num_images 0"),
        ({}, (8, 1, None), ["--guidance_scale", 2], "guidance_scale 2.0 needs a network with classes and a null label"),
        ({}, ((8, 4), 1, 10), ["--resolution", 8], "resolution 8: the pipeline draws 8 x 4; leave --resolution out"),
        ({}, (8, 4, 10), [], "images of 8 x 8 pixels and 4 channels: 1 or 3 channels are measured"),
        ({"sizes": {"8 by 8": 3}}, None, [], "training.json of .*: sizes '8 by 8': 3 must be a height x width and how"),
        (
            {"sizes": {"8 x 8": 3, "8 x 4": 1}},
            None,
            ["--save_samples", "x.npz"],
            "save_samples 'x.npz': such a file holds images of one size, the pipeline draws 8 x 8, 8 x 4",
        ),
        ({}, (8, 1, 9), ["--num_images", 0, "--loss", 3], "the pipeline has 9 classes, the dataset 10"),
    ],
)
def test_a_pipeline_that_cannot_be_measured(facts, network, arguments, message, small_data, tmp_path):
    pipeline = tiny_pipeline(network=random_dit(*network)) if network else None
    folder = bundle_of(small_data, tmp_path / "pipeline", facts, pipeline)
    options.WORK_BEGUN.clear()
    with pytest.raises(ValueError, match=message):
        run(evaluate.main, *QUICK, folder, *arguments)
    assert not options.WORK_BEGUN.is_set()


def test_a_training_json_that_holds_no_facts_is_named(small_data, tmp_path, capsys):
    folder = bundle_of(small_data, tmp_path / "pipeline")
    for text in ("[]", "{", "null", '{"config": 3}', "\udcff"):
        (folder / "training.json").write_text(text, errors="surrogateescape")
        with pytest.raises((ValueError, SystemExit)) as error:
            run(evaluate.main, *QUICK, folder)
        assert "training.json" in f"{error.value} {capsys.readouterr().err}"


# --- figures ------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_images_that_are_recognised():
    logits = torch.eye(3).repeat(200, 1)
    labels = torch.tensor([0, 1, 0]).repeat(200)
    assert classifier.accuracy(lambda images: images, logits, labels) == pytest.approx(2 / 3)


def test_evaluation_writes_figures_onto_the_card(small_data, tmp_path):
    train_tiny(tmp_path, "--dataset", small_data, "--max_train_steps", 1)
    folder = tmp_path / "pipeline"
    arguments = ["--test_split", "train", "--num_images", 13, "--num_inference_steps", 2, "--guidance_scale", 1.5]
    arguments += ["--classifier_epochs", 1, "--pipeline", folder]
    found = []
    # a measurement that is made again replaces the one before
    for _ in range(2):
        run(evaluate.main, *arguments)
        found.append(json.loads((folder / "metrics.json").read_text()))
    real, samples = found[0]
    assert (real["n"], samples["n"], samples["nfe"], samples["guidance_scale"]) == (60, 13, 2, 1.5)
    trained = json.loads((folder / "training.json").read_text())
    assert samples["ema_decay"] == trained["config"]["ema_decay"]
    assert samples["commit"] == trained["commit"] and re.match("[0-9a-f]{40}|score-sde [0-9]", samples["commit"])
    assert not samples["dataset_on_hub"]
    assert [metric["value"] for metric in found[1]] == [real["value"], samples["value"]]
    assert f"| classifier accuracy on samples | {samples['value']} | 13 |" in (folder / "README.md").read_text()


def test_accuracies_are_those_of_a_classifier_of_the_training_images(small_data, bundle, tmp_path):
    """By hand, of the images as they would be saved; and of a network that takes no other than its own seeds."""
    folder = shutil.copytree(bundle, tmp_path / "pipeline")
    own = ["--num_images", 21, "--batch_size", 4, "--seed", 3, "--guidance_scale", 1.5, "--classifier_epochs", 20]
    run(evaluate.main, *QUICK, folder, *own)
    dataset = ImageDataset(data_config(dataset=small_data, resolution=8))
    judge = classifier.train_classifier(dataset, 20, 3, torch.device("cpu"))
    rows = [dataset[i] for i in range(60)]
    images, labels = torch.stack([row["images"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    values = {name: metric["value"] for name, metric in figures(folder).items()}
    assert values["classifier accuracy on real images"] == round(classifier.accuracy(judge, images, labels), 4)
    pipeline = load_bundle(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline(1, i % 10, 1.5, 2, generator=torch.Generator().manual_seed(3 + i), output_type="pt").images
        for i in range(21)
    ]
    drawn = (torch.cat(drawn) * 255).round() / 127.5 - 1
    expected = classifier.accuracy(judge, drawn, torch.arange(21) % 10)
    assert values["classifier accuracy on samples"] == round(expected, 4)


def test_evaluation_measures_distances(small_data, bundle, tmp_path, capsys):
    """The same figures for every batch size, and from the images alone that were saved."""
    folder = shutil.copytree(bundle, tmp_path / "pipeline")
    arguments = ["--num_images", 20, "--features", "classifier", *QUICK[:4]]
    found = []
    for batch_size in (20, 7):
        own = ["--batch_size", batch_size, "--repeats", 2, "--save_samples", tmp_path / f"{batch_size}.npz"]
        run(evaluate.main, *arguments, "--test_split", "train", "--pipeline", folder, *own)
        found.append(figures(folder))
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
    assert len(np.unique(first, axis=0)) == 20

    # one set: that of the pipeline, and of the images alone, however they are saved
    run(evaluate.main, *arguments, "--test_split", "train", "--pipeline", folder)
    expected = figures(folder)[name]["value"]
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(first):
        Image.fromarray(image[..., 0]).save(images / f"{i:03d}.png")
    np.savez_compressed(tmp_path / "compressed.npz", first)
    capsys.readouterr()
    for samples in (tmp_path / "20.npz", tmp_path / "compressed.npz", images):
        run(evaluate.main, *arguments, "--samples", samples, "--dataset", small_data, "--batch_size", 7)
        lines = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
        assert float(lines[name.replace("train,", "train of train.parquet,") + " of train.parquet"]) == pytest.approx(
            expected, rel=1e-4
        )

    # by hand
    dataset = ImageDataset(data_config(dataset=small_data, resolution=8))
    judge = classifier.train_classifier(dataset, 1, 0, torch.device("cpu"))
    real = torch.stack([dataset[i]["images"] for i in range(60)])
    generated = torch.from_numpy(first).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        pair = [moments(judge[:-4](each).mean((2, 3))) for each in (generated, real)]
    assert expected == pytest.approx(frechet_distance(*pair[0], *pair[1]), rel=1e-4)


def test_rectangles_are_measured_beside_such_images(small_data, tmp_path):
    """As a pipeline draws them, and from the images alone that were saved."""
    pipeline = tiny_pipeline(network=random_dit((8, 4), 1, None))
    folder = bundle_of(small_data, tmp_path / "pipeline", pipeline=pipeline)
    saved, options = tmp_path / "x.npz", ["--features", "classifier", "--classifier_epochs", 1, "--num_images", 20]
    run(evaluate.main, *QUICK[:2], *options, "--save_samples", saved, "--pipeline", folder)
    [found] = [each for name, each in figures(folder).items() if name.startswith("Fréchet distance of 20 samples")]
    assert found["sizes"] == ["8 x 4"] and "resolution" not in found
    images = np.load(saved)["arr_0"]
    assert images.shape == (20, 8, 4, 1)
    # by hand
    dataset = ImageDataset(data_config(dataset=small_data), sizes=[(8, 4)])
    judge = classifier.train_classifier(dataset, 1, 0, torch.device("cpu"))
    pair = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.stack([row["images"] for row in dataset])
    with torch.no_grad():
        of_both = [moments(judge[:-4](each).mean((2, 3))) for each in pair]
    assert found["value"] == pytest.approx(frechet_distance(*of_both[0], *of_both[1]), rel=1e-4)
    run(evaluate.main, *options, "--samples", saved, "--dataset", small_data)


def test_few_images_have_accuracies_and_likelihoods(bundle, tmp_path):
    pytest.importorskip("torchdiffeq")
    folder = shutil.copytree(bundle, tmp_path / "pipeline")
    run(evaluate.main, *QUICK, folder, "--num_images", 1, "--likelihood", 1, "--tolerance", 0.1)
    found = figures(folder)
    assert found["classifier accuracy on samples"]["n"] == 1
    name = "negative log-likelihood of the pixels, bits/dim"
    assert "one image (1 probes per image)" in found[name]["explanation"]
    assert found[name]["explanation"].endswith("uniform dequantisation.")
    more = ["--num_images", 0, "--likelihood", 1, "--tolerance", 0.1, "--dequantization", "truncated_normal"]
    run(evaluate.main, *QUICK, folder, *more)
    other = figures(folder)[f"{name}, truncated-normal dequantisation"]
    assert other["value"] != found[name]["value"] and name in figures(folder)


def test_the_likelihood_is_that_of_every_image_alone(small_data, tmp_path):
    pytest.importorskip("torchdiffeq")
    # a smooth one, for which a few steps do
    bundle = bundle_of(small_data, tmp_path / "pipeline", pipeline=tiny_pipeline(network=random_dit(8, 1, 10)))
    name = "negative log-likelihood of the pixels, bits/dim"
    found = []
    for batch_size in (2, 5):
        folder = shutil.copytree(bundle, tmp_path / str(batch_size))
        own = ["--num_images", 0, "--likelihood", 5, "--tolerance", 1e-3, "--num_probes", 2, "--seed", 4]
        run(evaluate.main, *QUICK, folder, *own, "--batch_size", batch_size)
        found.append(figures(folder)[name])
    assert found[0]["value"] == pytest.approx(found[1]["value"], abs=2e-3)
    dataset, values = ImageDataset(data_config(dataset=small_data, resolution=8)), []
    pipeline = load_bundle(folder)
    pipeline.set_progress_bar_config(disable=True)
    for i in range(5):
        generator = seeded(4 + i)
        image = dequantize(((dataset[i]["images"] + 1) * 127.5).round(), generator)[None]
        values.append(pipeline.log_likelihood(image, num_probes=2, generator=generator, rtol=1e-3, atol=1e-3))
    expected = float(torch.cat([each.bits_per_dim() for each in values]).mean())
    assert found[0]["value"] == pytest.approx(expected, abs=2e-3)
    assert (found[0]["n"], found[0]["num_probes"], found[0]["tolerance"]) == (5, 2, 1e-3)


def test_a_loss_is_kept_whatever_becomes_of_the_images(bundle, tmp_path, monkeypatch):
    folder = shutil.copytree(bundle, tmp_path / "pipeline")
    monkeypatch.setattr(evaluate, "measure_images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(evaluate.main, *QUICK, folder, "--num_images", 2, "--loss", 3)
    assert [metric["type"] for metric in figures(folder).values()] == ["loss"]


def test_a_stock_scheduler_is_named(small_data, tmp_path):
    pipeline = tiny_pipeline(network=random_dit(8, 1, 10))
    pipeline.register_modules(scheduler=DDIMScheduler())
    folder = bundle_of(small_data, tmp_path / "pipeline", pipeline=pipeline)
    run(evaluate.main, *QUICK, folder, "--num_images", 2)
    found = figures(folder)["classifier accuracy on samples"]
    assert (found["sampler"], found["nfe"]) == ("DDIMScheduler", 2)
    with pytest.raises(ValueError, match="need a ScoreSDEScheduler, not a DDIMScheduler"):
        run(evaluate.main, *QUICK, folder, "--num_images", 0, "--likelihood", 2)


def test_no_more_than_a_batch_is_held(small_data, bundle, tmp_path, monkeypatch):
    """When a batch is drawn, the one before the last is gone; features carry no graph."""
    folder, alive, draw = shutil.copytree(bundle, tmp_path / "pipeline"), [], evaluate.draw

    def watched(*arguments, **more):
        assert sum(each() is not None for each in alive) <= 1
        images, nfe = draw(*arguments, **more)
        alive.append(weakref.ref(images))
        return images, nfe

    monkeypatch.setattr(evaluate, "draw", watched)
    monkeypatch.setattr(validation, "draw", watched)
    own = ["--features", "classifier", "--batch_size", 3, "--save_samples", tmp_path / "x.npz", "--repeats", 2]
    run(evaluate.main, *QUICK, folder, "--num_images", 20, *own)
    assert len(alive) == 14
    arguments = ["--evaluation_split", "train", "--evaluation_images", 20, "--evaluation_features", "classifier"]
    arguments += ["--max_train_steps", 1, "--evaluation_steps", 1]
    train_tiny(tmp_path / "run", "--dataset", small_data, *arguments)
    assert len(alive) == 19


def one_of(processes, index):
    return SimpleNamespace(num_processes=processes, process_index=index, is_main_process=index == 0)


@pytest.mark.parametrize("count", [1, 5, 20, 21])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_the_images_evenly_and_in_order(count, processes):
    for batch_size in (1, 4, 100):
        parts = [list(rounds.rounds(count, batch_size, one_of(processes, i))) for i in range(processes)]
        assert len({tuple(len(own) for own, _ in each) for each in parts}) == 1
        assert all(0 < len(own) <= batch_size for own, _ in parts[0])
        numbers = []
        for shares in zip(*parts, strict=True):
            together = [number for own, _ in shares for number in own]
            numbers += together[: shares[0][1]]
        assert numbers == list(range(count))


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(bundle, tmp_path):
    found, saved = [], []
    for processes in (1, 2):
        folder = shutil.copytree(bundle, tmp_path / str(processes))
        arguments = [*QUICK, folder, "--num_images", 21, "--features", "classifier", "--likelihood", 5]
        arguments += ["--tolerance", 1e-3, "--batch_size", 4, "--save_samples", tmp_path / f"{processes}.npz"]
        if processes == 1:
            run(evaluate.main, *arguments)
        else:
            launch("evaluate.py", *arguments, processes=2)
        found.append({name: metric["value"] for name, metric in figures(folder).items()})
        saved.append(np.load(tmp_path / f"{processes}.npz")["arr_0"])
    assert len(found[0]) == 8
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert np.abs(saved[0].astype(int) - saved[1]).max() <= 1


@pytest.mark.slow
def test_two_processes_evaluate_in_training_as_one_does(small_data, tmp_path):
    arguments = ["--dataset", small_data, "--evaluation_split", "train", "--evaluation_images", 21]
    arguments += ["--evaluation_features", "classifier", "--evaluation_steps", 1, "--max_train_steps", 1]
    no_dropout = json.dumps(json.loads(TINY_DIT) | {"class_dropout_prob": 0.0})
    arguments = [*TINY_RUN, "--network_kwargs", no_dropout, *arguments]
    run(train.main, *arguments, "--batch_size", 8, "--output_dir", tmp_path / "one")
    launch("train.py", *arguments, "--batch_size", 4, "--output_dir", tmp_path / "two", processes=2)
    one, two = (json.loads((tmp_path / name / "evaluation.jsonl").read_text()) for name in ("one", "two"))
    for key in ("step", "images_seen", "held_out_loss", "frechet_distance"):
        assert one[key] == pytest.approx(two[key], rel=1e-4)


# --- samples ------------------------------------------------------------------------------------------------------


def images_of_every_kind():
    grey = np.arange(0, 256, dtype=np.uint16).reshape(16, 16)
    colours = np.stack([grey, 255 - grey, grey.T], axis=2).astype(np.uint8)
    return {
        "L": Image.fromarray(grey.astype(np.uint8)),
        "16-bit": Image.fromarray(grey * 257),
        "RGB": Image.fromarray(colours),
        "RGBA": Image.fromarray(np.concatenate([colours, grey[..., None].astype(np.uint8)], axis=2)),
        "palette": Image.fromarray(colours).quantize(16),
        "1-bit": Image.fromarray(grey.astype(np.uint8)).convert("1"),
    }


def test_samples_of_every_mode_are_taken_as_training_takes_them(tmp_path):
    found = images_of_every_kind()
    for name, image in found.items():
        image.save(tmp_path / f"{name}.png")
    samples = samples_of.FolderSamples(str(tmp_path))
    assert (samples.shape, samples.count) == ((3, 16, 16), 6)
    for image, name in zip(samples.read(range(6)), sorted(found), strict=True):
        expected = torch.from_numpy(np.array(to_mode(found[name], "RGB"))).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(image, expected)
    assert (samples.read([1, 1])[0] - samples.read([3])[0]).abs().max() > 0.1
    for name in ("RGB", "RGBA", "palette"):
        (tmp_path / f"{name}.png").unlink()
    samples = samples_of.FolderSamples(str(tmp_path))
    assert samples.shape == (1, 16, 16)
    ramp, eight_bits = samples.read([1]), samples.read([2])
    assert torch.equal(ramp, eight_bits) and len(ramp.unique()) == 256
    assert samples_of.FolderSamples(str(tmp_path), 3).shape == (3, 16, 16)


def array_with_header(path, shape, content, dtype="|u1", order=False):
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": order, "shape": shape})
        file.write(content)


def damaged(path):
    np.savez(path, ARRAY.repeat(16, axis=1).repeat(16, axis=2))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_array_of_samples_is_named(tmp_path):
    damaged(tmp_path / "x.npz")
    samples = samples_of.ArraySamples(str(tmp_path / "x.npz"))
    with pytest.raises(ValueError, match="x.npz' are damaged at image 18"):
        for i in range(0, 20, 2):
            samples.read([i, i + 1])


ARRAY = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.savez(path, ARRAY.astype(float)), "must hold uint8 .N, H, W, C.; they are float64"),
        (lambda path: np.savez(path, ARRAY[..., 0]), "must hold uint8"),
        (lambda path: np.savez(path, ARRAY[:5]), "holds 5 images; --num_images asks for 20"),
        (lambda path: np.savez(path, np.asfortranarray(ARRAY)), "they are uint8 .* in Fortran order"),
        (lambda path: np.savez(path, np.array([object()] * 20)), "must hold uint8 .* they are object"),
        (lambda path: array_with_header(path, (10**6, 8, 8, 1), b"x" * 64), "shorter or longer than its shape"),
        (lambda path: array_with_header(path, (10**12, 10**12, 8, 1), b""), "shorter or longer than its shape"),
        (lambda path: array_with_header(path, (20, 8, 8, 1), b"x" * 9999), "shorter or longer than its shape"),
        (lambda path: np.savez(path), "holds no array"),
        (lambda path: path.write_bytes(b"no archive"), "cannot be read: File is not a zip file"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: np.savez(path, ARRAY.repeat(2, axis=3)), "and 2 channels: 1 or 3 channels are measured"),
        (lambda path: path.mkdir(), "cannot be read: .*directory"),
    ],
)
def test_broken_arrays_of_samples_are_named(write, message, small_data, tmp_path):
    write(tmp_path / "x.npz")
    arguments = ["--samples", tmp_path / "x.npz", "--dataset", small_data, "--num_images", 20, *QUICK[:4]]
    with pytest.raises(ValueError, match=message):
        run(evaluate.main, *arguments, "--features", "classifier")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "the folder holds no PNG, JPEG or WebP files"),
        ({"a.png": b"no image"}, "a.png' cannot be decoded"),
        ({"a.png": (8, 8), "b.png": (9, 9)}, "not of one size: .8, 8. .a.png., .9, 9. .b.png."),
        ({"a.png": (8, 8)}, "holds 1 images; --num_images asks for 20"),
        (None, "is neither a folder nor an .npz file"),
    ],
)
def test_broken_folders_of_samples_are_named(content, message, small_data, tmp_path):
    folder = tmp_path / "images"
    if content is not None:
        folder.mkdir()
    for name, value in (content or {}).items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        else:
            Image.new("RGBA", value).save(folder / name)
    arguments = ["--samples", folder, "--dataset", small_data, "--num_images", 20, *QUICK[:4]]
    with pytest.raises(ValueError, match=message):
        run(evaluate.main, *arguments, "--features", "classifier")


def test_saved_samples_are_whole_or_not_there(tmp_path):
    images = torch.from_numpy(ARRAY).permute(0, 3, 1, 2)
    with samples_of.array_file(tmp_path / "x.npz", (20, 1, 8, 8)) as write:
        for part in images.split(7):
            write(part)
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], ARRAY)
    samples = samples_of.ArraySamples(str(tmp_path / "x.npz"))
    assert torch.equal(samples.read([3, 4, 19]), samples_of.from_bytes(images[[3, 4, 19]]))
    with pytest.raises(KeyboardInterrupt), samples_of.array_file(tmp_path / "y.npz", (20, 1, 8, 8)) as write:
        write(images[:3])
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x.npz"]


def test_images_are_measured_as_they_would_be_saved():
    values = torch.tensor([-1.2, -1, -0.5, 0.001, 1, 1.3]).reshape(1, 1, 2, 3)
    assert samples_of.to_bytes(values).flatten().tolist() == [0, 0, 64, 128, 255, 255]
    assert torch.equal(samples_of.to_bytes(samples_of.quantized(values)), samples_of.to_bytes(values))
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(samples_of.to_bytes(samples_of.from_bytes(every)), every)


# --- where figures come from --------------------------------------------------------------------------------------


def test_a_recorded_command_is_quoted_and_names_no_place_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = str(TRAINING / "train.py")
    options = ["--network_kwargs", '{"hidden_size": 64}', "--dataset", "/home/me/photos/", f"--vae={tmp_path}/runs/vae"]
    monkeypatch.setattr(sys, "argv", [script, *options, "--output_dir", "runs/my run"])
    command = provenance.provenance(torch.device("cpu"))["command"].split(" ", 1)
    assert command[0].startswith("python")
    expected = "training/train.py --network_kwargs '{\"hidden_size\": 64}' --dataset photos --vae=runs/vae"
    assert command[1] == f"{expected} --output_dir 'runs/my run'"


REVISION = """
import sys
sys.path.insert(0, sys.argv[1])
from score_sde.training.parts.config import DataConfig
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.real_images import hub_revision
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("me/photos", repo_type="dataset", exist_ok=True)
where = {"repo_id": "me/photos", "repo_type": "dataset", "path_in_repo": "data/train-00000-of-00001.parquet"}
commit = api.upload_file(path_or_fileobj=sys.argv[2], **where)
found = ImageDataset(DataConfig(dataset="me/photos"))
assert hub_revision(found) == commit.oid == api.dataset_info("me/photos").sha, hub_revision(found)
assert hub_revision(ImageDataset(DataConfig(dataset=sys.argv[2]))) is None
"""


@pytest.mark.slow
def test_the_revision_of_a_dataset_on_the_hub_is_known(small_data, local_hub):
    result = local_hub.run(REVISION, TRAINING, small_data, token="hf_writer")
    assert result.returncode == 0, result.stderr
