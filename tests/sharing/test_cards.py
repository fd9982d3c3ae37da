"""Cards: what their metadata says, what is refused, and what travels with converted and exported weights."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import score_sde
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline
from huggingface_hub import ModelCard
from PIL import Image
from places import ROOT
from tiny import random_dit, tiny_pipeline
from words import prompt_pipeline, worded_network

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, save_bundle
from score_sde.sharing import convert, model_card
from score_sde.sharing.bundles import add_metrics
from score_sde.sharing.facts import dataset_name, without_local_paths
from score_sde.sharing.pushed_files import files_to_push


METRIC = {
    "name": "FID of 20 samples to the 60 images of train, Inception",
    "type": "fid",
    "value": 12.5,
    "n": 20,
    "seed": 0,
    "dataset": "me/my photos",
    "split": "train",
    "sampler": "auto",
    "num_inference_steps": 7,
    "nfe": 7,
    "guidance_scale": 1.25,
    "ema_decay": 0.99,
    "command": "python evaluate.py",
    "commit": "abc123",
    "machine": "a machine",
}
SAMPLERS = {
    "samples": 100,
    "guidance_scale": 1.5,
    "command": "python samplers.py",
    "median error, rms error, accuracy": {"auto": {"5": [0.03, 0.05, 0.9], "10": [0.01, 0.02, 0.9]}}
    | {"calibrated": {"5": [0.02, 0.04, 0.9]}},
}


def test_the_metadata_are_the_hubs(tmp_path):
    facts = {"license": "cc-by-nc-4.0", "base_model": "facebook/DiT-XL-2-256", "dataset": "me/photos"}
    facts |= {"dataset_on_hub": True, "resolution": 8}
    picture = tmp_path / "grid.png"
    shutil.copyfile(ROOT / "model_cards" / "quick_start" / "samples.png", picture)
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle", facts, [METRIC], picture)
    card = ModelCard.load(os.path.join(folder, "README.md"))
    data = card.data
    assert (data.license, data.base_model, data.datasets) == ("cc-by-nc-4.0", "facebook/DiT-XL-2-256", ["me/photos"])
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert data.to_dict()["widget"][0]["output"] == {"url": "samples.png"}
    assert data.model_name == "bundle"
    [result] = data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("fid", METRIC["name"], 12.5)
    assert (result.dataset_type, result.dataset_split) == ("my-photos", "train")
    assert result.metric_args["nfe"] == 7 and result.metric_args["ema_decay"] == 0.99
    # how to use it is how it was measured
    assert "pipe(class_labels=[0, 2], guidance_scale=1.25, num_inference_steps=7)" in card.text
    assert "Measured by `python evaluate.py` on a machine, code abc123." in card.text
    assert "does not allow commercial use" in card.text
    assert "8 x 8 pixels" in card.text


def test_a_dataset_that_is_not_on_the_hub_is_not_in_the_metadata(tmp_path):
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle", {"dataset": "/home/me/photos", "dataset_on_hub": False})
    card = ModelCard.load(os.path.join(folder, "README.md"))
    assert card.data.datasets is None
    assert "| data | photos |" in card.text and "/home/me" not in card.content


def test_the_data_and_the_run_stand_on_the_card(tmp_path):
    facts = {"run_id": "0123abcd", "rows": 1234, "class_counts": {"cat": 1000, "a_b|c": 234}, "skipped_files": 3}
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle", facts)
    text = Path(folder, "README.md").read_text()
    for row in ("run | 0123abcd", "training images | 1,234", "files that were skipped | 3"):
        assert f"| {row} |\n" in text
    assert "| images by class | cat 1,000, a_b\\|c 234 |\n" in text
    # of many classes, how many and how large
    facts["class_counts"] = {f"class {i}": 10 + i for i in range(1000)}
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle", facts)
    assert "| images by class | 1,000, of 10 to 1,009 images |\n" in Path(folder, "README.md").read_text()
    # and where nothing is known, nothing
    text = Path(save_bundle(tiny_pipeline(), tmp_path / "bundle", {"rows": 3}), "README.md").read_text()
    assert "| run |" not in text and "by class" not in text and "skipped" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, "the value nan is not a finite number"),
        ({"value": "12.5"}, "the value '12.5' is not a finite number"),
        ({"n": 0}, "n 0 must be a whole number of images"),
        ({"n": 20.0}, "n 20.0 must be a whole number of images"),
        ({"name": " "}, "name must not be empty"),
        ({"command": None}, "command must not be empty"),
    ],
)
def test_a_figure_that_is_none_is_refused(tmp_path, change, message):
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle")
    with pytest.raises(ValueError, match=message):
        add_metrics(folder, [METRIC | change])
    assert not (tmp_path / "bundle" / "metrics.json").exists()


def test_a_licence_newer_than_this_package_stands_on_the_card_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="license 'apache-3.0' is not among those of the Hub that this package knows"):
        folder = save_bundle(tiny_pipeline(), tmp_path / "bundle", facts={"license": "apache-3.0"})
    assert ModelCard.load(os.path.join(folder, "README.md")).data.license == "apache-3.0"


def test_figures_of_several_commands_name_each(tmp_path):
    other = METRIC | {"name": "precision", "command": "python other.py", "commit": "def456"}
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle", metrics=[METRIC, other])
    text = Path(folder, "README.md").read_text()
    assert "Measured by `python evaluate.py` on a machine, code abc123.\n" in text
    assert "Measured by `python other.py` on a machine, code def456.\n" in text
    # measured again by newer code, a figure replaces the one before
    add_metrics(folder, [other | {"value": 3.0, "commit": "ghi789"}])
    assert len(json.loads(Path(folder, "metrics.json").read_text())) == 2


def test_what_figures_of_several_settings_are_is_said_once(tmp_path):
    explained = METRIC | {"explanation": "of classes in turn"}
    of_other_words = explained | {"guidance_scale": 4.0, "explanation": "of random classes"}
    metrics = [explained, explained | {"guidance_scale": 2.0}, of_other_words]
    text = Path(save_bundle(tiny_pipeline(), tmp_path / "bundle", metrics=metrics), "README.md").read_text()
    assert text.count(f"| {METRIC['name']} | ") == 3
    for words in ("of classes in turn", "of random classes"):
        assert text.count(f"- {METRIC['name']}: {words}\n") == 1


def test_samplers_that_were_measured_stand_on_the_card(tmp_path, capsys):
    folder = save_bundle(tiny_pipeline(), tmp_path / "bundle")
    assert "## Samplers" not in Path(folder, "README.md").read_text()
    measured = (ROOT / "benchmarks" / "samplers_network.json").read_text()
    Path(folder, "samplers.json").write_text(measured)
    model_card.write_card(folder)
    text = Path(folder, "README.md").read_text()
    assert "| sampler | 5 | 6 | 8 | 10 | 15 | 20 | 30 | 50 |\n" in text
    errors = json.loads(measured)["median error, rms error, accuracy"]
    for name in ("auto", "calibrated"):
        assert f"| {name} | {errors[name]['5'][0]:.4g} | {errors[name]['6'][0]:.4g} |" in text
    Path(folder, "samplers.json").write_text(json.dumps(SAMPLERS))
    assert score_sde("card", folder, "--repo_id", "me/model") == 0
    text = Path(folder, "README.md").read_text()
    assert "| sampler | 5 | 10 |\n|---|---|---|\n| auto | 0.03 | 0.01 |\n| calibrated | 0.02 |  |\n" in text
    assert 'from_pretrained("me/model", trust_remote_code=True)' in text
    assert score_sde("card", tmp_path) == 2
    assert "holds no model_index.json" in capsys.readouterr().err


def test_the_card_says_the_conditions_that_the_facts_do(tmp_path):
    network = random_dit(num_classes=None)
    facts = {"conditions": ["encoder_hidden_states", "class_labels", "a`b"]}
    text = Path(save_bundle(tiny_pipeline(network=network), tmp_path / "told", facts), "README.md").read_text()
    assert "# told\n\nA conditional score-based" in text and "\n- conditional\n" in text
    assert "The network is also told `encoder_hidden_states`, ``a`b``: pass `conditions={name: tensor}`" in text
    assert "| conditions | encoder_hidden_states, class_labels, a\\`b |" in text
    classes = Path(save_bundle(tiny_pipeline(), tmp_path / "classes", {"conditions": ["class_labels"]}), "README.md")
    assert "A class-conditional score-based" in classes.read_text() and "is also told" not in classes.read_text()
    assert "| conditions | class_labels |" in classes.read_text()
    for odd in ("class_labels", [3]):
        with pytest.raises(ValueError, match="training.json: conditions"):
            save_bundle(tiny_pipeline(), tmp_path / "odd", {"conditions": odd})


def test_the_card_of_a_model_that_follows_words(tmp_path):
    network = worded_network(num_classes=3)
    captions = {"captions": 1200, "truncated": 7, "empty": 0, "text_encoder": "/home/me/words", "layers": [-1, -2]}
    captions |= {"text_encoder_class": "BertModel", "max_tokens": 8}
    samples = {"prompts": ['a "red" hat', "a bag"], "guidance_scale": 3.0, "num_inference_steps": 5}
    facts = {
        "conditions": ["class_labels", "encoder_hidden_states", "encoder_attention_mask"],
        "captions": captions,
        "samples": samples,
    }
    grid = tmp_path / "grid.png"
    Image.new("RGB", (8, 8)).save(grid)
    card = ModelCard.load(
        os.path.join(save_bundle(prompt_pipeline(network), tmp_path / "bundle", facts, sample_grid=grid), "README.md")
    )
    assert card.data.pipeline_tag == "text-to-image" and "text-to-image" in card.data.tags
    assert "A text-to-image score-based diffusion model" in card.text and "is also told" not in card.text
    call = r'pipe(class_labels=[0, 2], guidance_scale=3.0, prompt="a \"red\" hat", num_inference_steps=5).images'
    assert call in card.text and "guidance scale 3.0" in card.text and "The prompts stand beneath." in card.text
    for row in ("captions | 1200", "captions that were cut off | 7", "text encoder | words (BertModel)"):
        assert f"| {row} |" in card.text
    assert r"| its layers | \-1, -2 |" in card.text and "rows without a caption" not in card.text
    named = prompt_pipeline(worded_network(), encoder=False, settings={"text_encoder": "somebody/words"})
    text = Path(save_bundle(named, tmp_path / "named"), "README.md").read_text()
    assert "Prompts are encoded by `somebody/words`, which is downloaded" in text
    assert 'pipe(batch_size=4, prompt="a prompt").images' in text


def test_a_card_of_signals_speaks_of_signals(tmp_path):
    """Its example asks for no images, and the Hub knows no such task."""
    network = DiTModel((8,), 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=None)
    facts = {"rows": 5, "resolution": 8, "images_seen": 7, "class_counts": {"a": 1}, "conditions": []}
    metrics = [METRIC | {"name": "error", "dataset": "me/sounds"}]
    folder = save_bundle(tiny_pipeline(network=network), tmp_path / "bundle", facts, metrics)
    card = ModelCard.load(os.path.join(folder, "README.md"))
    text = card.text.replace("diffusion", "")
    assert "\nsignals = pipe(batch_size=4, num_inference_steps=7).images\n" in text and ".save(" not in text
    assert "| training signals | 5 |" in text and "| resolution | 8 values |" in text and "| signals seen | 7 |" in text
    assert "Drawing signals like" in text and "trained on signals of 8 values alone" in text
    assert re.findall("image", text) == ["image"]  # in `.images`
    assert card.data.pipeline_tag is None and card.data.eval_results[0].task_type == "other"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("my photos", "my-photos"),
        ("me/photos.v2", "me/photos.v2"),
        ("classics_{split}.parquet", "classics.parquet"),
        ("{split}-photos", "photos"),
        ("{split}.parquet", "parquet"),
        ("my.books/{split}.parquet", "my-books/parquet"),
        ("{split}", "-split-"),
    ],
)
def test_the_type_of_a_dataset_is_an_id(name, found):
    assert model_card.as_id(name) == found


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("books/*.txt", "books/*.txt"),
        ("/data/letters/{split}.parquet", "letters/{split}.parquet"),
        ("C:\\data\\letters\\*.txt", "letters/*.txt"),
        ("*.txt", "*.txt"),
        ("../*.txt", "*.txt"),
        ("/home/somebody/*.txt", "*.txt"),
        ("~/*.txt", "*.txt"),
        ("/home/somebody/books/part-?.txt", "books/part-?.txt"),
        ("books/all.txt", "all.txt"),
        ("books/", "books"),
    ],
)
def test_a_pattern_is_named_with_its_folder_and_no_dataset_with_a_place_of_this_machine(path, name):
    facts = {"dataset": path, "dataset_on_hub": False}
    assert dataset_name(facts) == dataset_name(facts | {"dataset": name}) == name
    assert without_local_paths(facts)["dataset"] == name
    assert dataset_name(facts | {"dataset_on_hub": True}) == path


def test_limits_are_those_of_the_model(tmp_path):
    unconditional = Path(
        save_bundle(tiny_pipeline(network=random_dit(num_classes=None)), tmp_path / "one"), "README.md"
    )
    assert "pipe(batch_size=4)" in unconditional.read_text()
    assert "was not measured" in unconditional.read_text()
    network = DiTModel(
        4, 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3, class_dropout_prob=0
    )
    labelled = Path(save_bundle(tiny_pipeline(network=network), tmp_path / "two"), "README.md").read_text()
    assert "has no classifier-free guidance" in labelled


@pytest.mark.parametrize(
    "name",
    [
        "quick_start",
        "cifar10",
        "cifar10_one_gpu",
        "fashion_mnist",
        "clothing128",
        "emoji64",
        "classics",
        "qm9",
        "torsions",
        "sidechains",
        "earth_events",
        "moving_fashion",
        "spoken_digits",
    ],
)
def test_the_committed_cards_are_what_their_facts_say(name, tmp_path):
    committed = ROOT / "model_cards" / name
    shutil.copytree(committed, tmp_path / name)
    model_card.write_card(str(tmp_path / name))
    assert (tmp_path / name / "README.md").read_text() == (committed / "README.md").read_text()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        (
            {
                "optimizer": "adamw",
                "adam_beta1": 0.0,
                "adam_beta2": 0.9,
                "adam_weight_decay": 0.1,
                "optimizer_kwargs": "{}",
            },
            "adamw, beta1 0.0, beta2 0.9, weight decay 0.1",
        ),
        (
            {"optimizer": "sgd", "adam_beta1": None, "adam_weight_decay": 0.0, "optimizer_kwargs": "{momentum: 0.9}"},
            "sgd, {momentum: 0.9}",
        ),
    ],
)
def test_a_card_says_which_optimizer_and_what_it_was_told(config, expected):
    assert dict(model_card.training_rows({"config": config})).get("optimizer") == expected


# --- weights that go elsewhere --------------------------------------------------------------------------------------


def exportable_pipeline():
    torch.manual_seed(0)
    network = DiTModel(
        8,
        2,
        3,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_classes=3,
        frequency_shift=1.0,
        learn_sigma=True,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scheduler = ScoreSDEScheduler(sde_type="discrete_vp", variance_type="learned_range")
    vae = AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=3,
        norm_num_groups=4,
        latents_mean=[0.5, -1.0, 0.2],
        latents_std=[2.0, 0.5, 1.0],
    )
    labels = {0: "cat", 1: "dog", 2: "owl"}
    return ScoreSDEPipeline(scheduler, transformer=network.eval(), vae=vae.eval(), id2label=labels)


def test_an_exported_pipeline_draws_the_same_images_without_our_code(tmp_path):
    bundle = save_bundle(
        exportable_pipeline(), tmp_path / "bundle", {"license": "cc-by-4.0", "base_model": "me/base"}, [METRIC]
    )
    folder = convert.export_to_diffusers(bundle, tmp_path / "stock")
    assert list(Path(folder).rglob("*.py")) == []
    assert "score_sde" not in Path(folder, "model_index.json").read_text()
    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock) is DiTPipeline
    ours = ScoreSDEPipeline.from_pretrained(bundle)
    ours.scheduler = ScoreSDEScheduler.from_config(ours.scheduler.config, predictor="ddim", timestep_spacing="leading")
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
    arguments = {"class_labels": [0, 2], "guidance_scale": 2.0, "num_inference_steps": 5}
    theirs = stock(generator=torch.Generator().manual_seed(3), output_type="np", **arguments).images
    noise = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    assert abs(ours(latents=noise, output_type="np", **arguments).images - theirs).max() < 1e-4

    card = ModelCard.load(os.path.join(folder, "README.md"))
    assert (card.data.license, card.data.base_model) == ("cc-by-4.0", "me/base")
    assert card.data.eval_results[0].metric_value == 12.5
    assert "DiTPipeline.from_pretrained" in card.text and "trust_remote_code" not in card.text
    with pytest.raises(ValueError, match="exists: choose another folder"):
        convert.export_to_diffusers(bundle, folder)


def test_a_pipeline_that_stock_diffusers_cannot_be_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="frequency_shift is 0.0, not 1.0; .*its noise path vp is not the discrete_vp"):
        convert.export_to_diffusers(tiny_pipeline(), tmp_path / "stock")
    assert os.listdir(tmp_path) == []


def rated_bundle(folder, name, **facts):
    """A bundle of sounds or videos of three classes, with its samples."""
    size, rates = {"sound": ((64,), {"sampling_rate": 8000}), "video": ((4, 8, 8), {"frame_rate": 5})}[name]
    network = DiTModel(size, (2,) * len(size), 1, 24, 1, 2, num_classes=3)
    names = {0: "zero", 1: "<b>one</b>", 2: "t|wo"}
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network, id2label=names, **rates)
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(class_labels=[0, 1, 2, 0], num_inference_steps=1).images
    pipeline.kind.save_grid(samples, folder / "step-0007.png", columns=3)
    return Path(save_bundle(pipeline, folder / "bundle", facts, sample_grid=folder / "step-0007.png"))


@pytest.mark.parametrize("name", ["sound", "video"])
def test_cards_play_what_their_bundle_holds(name, tmp_path):
    """Every file that a card names lies in the bundle and is pushed with it, and it stays nothing but a card."""
    folder = rated_bundle(tmp_path, name)
    card, data = (folder / "README.md").read_text(), ModelCard.load(folder / "README.md").data
    if name == "sound":
        assert re.findall(r'^\| (.*) \| <audio controls src="(.*)"></audio> \|$', card, flags=re.MULTILINE) == [
            (label, f"samples_{number:02}.wav")
            for number, label in enumerate(["zero", r"\<b\>one\</b\>", r"t\|wo", "zero"])
        ]
        assert "![samples](samples.png)" in card and 'pipe.kind.save_grid(sounds, "sounds.png")' in card
        shown = {"samples.png", *(f"samples_{number:02}.wav" for number in range(4))}
    else:
        assert "![samples](samples.gif)" in card and "audio" not in card
        shown = {"samples.png", "samples.gif"}
        with Image.open(folder / "samples.gif") as gif:
            assert gif.n_frames == 4 or gif.info["duration"] >= 200  # alike frames are one
    assert {path.name for path in folder.iterdir() if path.name.startswith("samples")} == shown
    assert shown <= set(files_to_push(str(folder)))
    assert data.pipeline_tag is None and data.to_dict()["widget"][0]["output"]["url"] in shown
    assert r"the classes zero, \<b\>one\</b\>, t\|wo" in card


@pytest.mark.parametrize("rate", ["8000", -1, 1e400, [1], True])
def test_a_rate_in_an_index_is_a_number(rate, tmp_path):
    folder = rated_bundle(tmp_path, "sound")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"sampling_rate": rate}))
    with pytest.raises(ValueError, match="sampling_rate .* must be a positive number"):
        model_card.write_card(folder)
