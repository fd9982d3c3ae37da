"""Training on captions: what the network is told, which caption of several, cached with latents, saved, refused."""

import json
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import BertConfig, BertModel
from words import WIDTH, save_encoder, tiny_tokenizer

from runs import EMBEDDED_TRAIN, encode, equal, forget_runs, run, train_tiny
from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.pipelines.prompts import PROMPT_SETTINGS, fingerprint, open_text_encoder
from score_sde.pipelines.prompts import encode as encode_words
from score_sde.training import distill, encode_latents, evaluate, train
from score_sde.training.parts.captions import CaptionReader
from score_sde.training.parts.clean_data import CleanData
from score_sde.training.parts.loop import Draws


NAMES = ["t shirt top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
TOO_LONG = "the red dress with the blue hat of dots and a bag"


@pytest.fixture(scope="session")
def captioned(tmp_path_factory, small_data):
    """Real images with a caption each, and with several; the first row's is empty, the second's too long."""
    data = datasets.Dataset.from_parquet(small_data)
    single = [f"a {NAMES[label]}" for label in data["label"]]
    single[:2] = ["", TOO_LONG]
    several = [["a " + NAMES[label], f"the {NAMES[label]} with dots", " "] for label in data["label"]]
    path = tmp_path_factory.mktemp("captioned") / "train.parquet"
    columns = {"caption": single, "captions": several, "empty": [" "] * len(data), "number": list(range(len(data)))}
    for name, values in columns.items():
        data = data.add_column(name, values)
    data.to_parquet(path)
    return str(path)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def options(captioned, encoder, column="caption"):
    return [
        *("--dataset", captioned, "--evaluation_split", "train", "--caption_column", column),
        *("--text_encoder", encoder, "--max_caption_tokens", 8),
    ]


def config_of(*arguments):
    from score_sde.training.parts.options import parse

    small = ["--resolution", "8", "--image_channels", "1", "--batch_size", "4"]
    return parse(train.TrainConfig, [*small, *map(str, arguments)])


def items(data, rows):
    return torch.utils.data.default_collate(data.dataset.__getitems__(rows))


def test_a_network_is_told_what_the_encoder_makes_of_captions(captioned, encoder, capsys):
    config = config_of(*options(captioned, encoder), "--pooled_captions")
    data = CleanData(config, Accelerator(cpu=True), captions=config)
    told = data.conditions(items(data, [0, 1, 2]))
    assert list(told) == data.told == ["class_labels", *data.captions.names] and len(told) == 4
    by_hand = tiny_tokenizer()(TOO_LONG, truncation=True, max_length=8, return_tensors="pt")
    text_encoder, _ = open_text_encoder(encoder)
    with torch.no_grad():
        expected = text_encoder(**{name: by_hand[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
    assert (told["encoder_hidden_states"][1] - expected[0]).abs().max() < 1e-5
    assert (told["pooled_projections"][1] - expected[0].mean(0)).abs().max() < 1e-5
    # an empty caption is what stands for none
    null = train.make_network(config, data.shape, 10, data.captions.arguments()).null_conditions(told)
    assert all(torch.equal(told[name][0], null[name][0]) for name in data.captions.names)
    assert "; 59 captions of up to 14 tokens, 1 cut off after 8 tokens (--max_caption_tokens), 1 rows without" in (
        capsys.readouterr().out
    )


def test_one_of_several_captions_is_drawn(captioned, encoder):
    reader = CaptionReader("captions", tiny_tokenizer(), 8, seed=3)
    value = ["a red hat", "", None, "the blue bag"]
    drawn = [reader.item(value, (epoch, 5))["caption_ids"] for epoch in range(40)]
    red, blue = (reader.item(text, (0, 0))["caption_ids"] for text in ("a red hat", "the blue bag"))
    counts = [sum(torch.equal(each, text) for each in drawn) for text in (red, blue)]
    assert sum(counts) == 40 and min(counts) > 8
    assert torch.equal(drawn[7], reader.item(value, (7, 5))["caption_ids"])
    other = [
        CaptionReader("captions", tiny_tokenizer(), 8, seed=4).item(value, (e, 5))["caption_ids"] for e in range(40)
    ]
    assert not all(torch.equal(a, b) for a, b in zip(drawn, other, strict=True))


def test_captions_are_dropped_with_the_classes_for_guidance(captioned, encoder):
    config = config_of(*options(captioned, encoder))
    task = train.DiffusionTask(config, Accelerator(cpu=True))
    seen = {}

    def network(x, timestep, **conditions):
        seen.update(conditions)
        return SimpleNamespace(sample=x)

    draws = Draws(0, 0, Accelerator(cpu=True), 4)
    task.loss(network, items(task.data, [1, 2, 3, 4]), draws, dropout_prob=0.5)
    dropped = seen["class_labels"] == 10
    assert 0 < dropped.sum() < 4
    assert torch.equal(~seen["encoder_hidden_states"].flatten(1).any(1), dropped)
    assert torch.equal(seen["encoder_attention_mask"].sum(1) == 1, dropped)


def test_a_run_learns_captions_resumes_and_is_opened_with_its_words(captioned, encoder, tmp_path):
    arguments = [*options(captioned, encoder, "captions"), "--checkpointing_steps", 2, "--pooled_captions"]
    arguments += ["--evaluation_steps", 4, "--evaluation_images", 8, "--sample_guidance_scale", 2]
    whole = train_tiny(tmp_path / "whole", *arguments, "--max_train_steps", 4)
    forget_runs()
    train_tiny(tmp_path / "parts", *arguments, "--max_train_steps", 2)
    forget_runs()
    resumed = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    assert equal(train_tiny(tmp_path / "parts", *arguments, *resumed), whole)
    assert {"context_embed.weight", "pooled_embed.0.weight", "class_embed.weight"} <= whole.keys()

    pipeline = load_bundle(tmp_path / "whole" / "pipeline")
    assert pipeline.prompt_settings == PROMPT_SETTINGS | {"max_tokens": 8, "pooled": True}
    told = pipeline.encode_prompt("a bag")
    ids = tiny_tokenizer()("a bag", padding="max_length", max_length=8, return_tensors="pt")
    settings = PROMPT_SETTINGS | {"pooled": True}
    expected = encode_words(open_text_encoder(encoder)[0], ids.input_ids, ids.attention_mask.bool(), settings)
    assert all((told[name].float() - expected[name].float()).abs().max() < 1e-5 for name in expected)
    facts = json.loads((tmp_path / "whole" / "pipeline" / "training.json").read_text())
    assert facts["captions"] | {"captions": 120, "truncated": 0, "empty": 0, "per_row": 2} == facts["captions"]
    assert facts["samples"]["prompts"][0].startswith("a ") and len(facts["samples"]["prompts"]) == 10
    # the grid has the prompts beneath its ten pictures of 128 px, in rows of three
    assert Image.open(tmp_path / "whole" / "pipeline" / "samples.png").size == (3 * 128, 4 * (128 + 43))
    forget_runs()
    with pytest.raises(ValueError, match="text_encoder was .*, is "):
        other = save_encoder(tmp_path / "other", "qwen")
        train_tiny(tmp_path / "parts", *arguments, *resumed, "--text_encoder", other, "--max_train_steps", 5)


def test_captions_that_are_cached_with_latents_are_those_of_the_images(captioned, encoder, tiny_vae, tmp_path):
    forget_runs()
    words = ["--caption_column", "captions", "--text_encoder", encoder, "--max_caption_tokens", 8]
    encode(captioned, tiny_vae, tmp_path / "latents", *words)
    latents = config_of("--latents", tmp_path / "latents", "--pooled_captions")
    images = config_of(*options(captioned, encoder, "captions"), "--vae", tiny_vae, "--pooled_captions")
    cached, read = (CleanData(config, Accelerator(cpu=True), captions=config) for config in (latents, images))
    assert cached.told == read.told and cached.examples == read.examples
    assert cached.captions.arguments() == read.captions.arguments() == {
        "cross_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
    }  # fmt: skip
    rows = [3, 7, 11, 15]
    # each caption of a row is drawn, and it is what the encoder makes of it
    seen = set()
    for step in range(20):
        told = cached.conditions(items_by_row(cached, rows), Draws(0, 4 * step, Accelerator(cpu=True), 4))
        for i, row in enumerate(rows):
            choices = read.dataset.data[row]["captions"][:2]
            ids, mask = zip(*(read.dataset.captions.item(text, (0, 0)).values() for text in choices), strict=True)
            expected = encode_words(
                read.captions.text_encoder, torch.stack(ids), torch.stack(mask), read.captions.settings
            )
            errors = (expected["encoder_hidden_states"] - told["encoder_hidden_states"][i]).abs().amax((1, 2))
            choice = int(errors.argmin())
            assert errors[choice] < 0.02 and (errors.max() > 0.1)
            assert torch.equal(told["encoder_attention_mask"][i], expected["encoder_attention_mask"][choice])
            assert (told["pooled_projections"][i] - expected["pooled_projections"][choice]).abs().max() < 0.02
            seen.add((row, choice))
    assert len(seen) == 8
    # again, it has nothing to do; with other captions it refuses
    forget_runs()
    encode(captioned, tiny_vae, tmp_path / "latents", *words)
    with pytest.raises(ValueError, match="holds other latents .captions was"):
        encode(captioned, tiny_vae, tmp_path / "latents", *words[:-1], 7)
    with pytest.raises(ValueError, match="holds other latents .captions were there"):
        encode(captioned, tiny_vae, tmp_path / "latents")
    # trained on, with and without
    forget_runs()
    weights = train_tiny(tmp_path / "run", "--latents", tmp_path / "latents", "--max_train_steps", 1)
    assert "context_embed.weight" in weights
    assert load_bundle(tmp_path / "run" / "pipeline").takes_prompts
    forget_runs()
    without = ["--latents", tmp_path / "latents", "--max_train_steps", 1, "--caption_column", "none"]
    assert "context_embed.weight" not in train_tiny(tmp_path / "without", *without)
    # what contradicts them
    other = save_encoder(tmp_path / "other", "qwen")
    for arguments, message in (
        (["--text_encoder", other], "were encoded by another text encoder than the one that is now in"),
        (["--max_caption_tokens", 7], "max_caption_tokens 7: the captions in latents .* were encoded with 8"),
        (["--caption_column", "caption"], "the captions in latents .* are those of 'captions'"),
    ):
        config = config_of("--latents", tmp_path / "latents", *arguments)
        with pytest.raises(ValueError, match=message):
            CleanData(config, Accelerator(cpu=True), captions=config)


def items_by_row(data, rows):
    return torch.utils.data.default_collate([data.dataset[row] for row in rows])


def test_a_stream_has_captions(captioned, encoder, tmp_path):
    arguments = [*options(captioned, encoder, "captions"), "--streaming", "--max_train_steps", 2]
    assert "context_embed.weight" in train_tiny(tmp_path / "run", *arguments)
    facts = json.loads((tmp_path / "run" / "pipeline" / "training.json").read_text())
    assert facts["samples"]["prompts"][0].startswith("a ")


def test_words_alone_and_a_unet(captioned, encoder, tmp_path):
    small = "{block_out_channels: [8, 16], layers_per_block: 1, attention_resolutions: [4]}"
    arguments = [*options(captioned, encoder), "--class_conditional", "false", "--network", "unet"]
    arguments += ["--network_kwargs", small, "--sample_prompts", "a hat", "a red bag", "--max_train_steps", 1]
    run(
        train.main,
        *("--resolution", 8, "--image_channels", 1, "--batch_size", 4, "--output_dir", tmp_path / "run"),
        *("--sample_num_images", 2, "--sample_num_inference_steps", 1, *arguments),
    )
    pipeline = load_bundle(tmp_path / "run" / "pipeline")
    assert pipeline.num_classes is None and pipeline.config.id2label is None
    facts = json.loads((tmp_path / "run" / "pipeline" / "training.json").read_text())
    assert facts["conditions"] == ["encoder_hidden_states", "encoder_attention_mask"]
    assert facts["samples"]["prompts"] == ["a hat", "a red bag"]


@pytest.fixture(scope="module")
def trained(captioned, encoder, tmp_path_factory):
    """A run on captions and classes that measured its loss at the end."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    forget_runs()
    arguments = ["--evaluation_steps", 3, "--evaluation_images", 12, "--max_train_steps", 3]
    train_tiny(folder, *options(captioned, encoder), *arguments, "--time_density", "logit_normal")
    return folder


@pytest.mark.parametrize("method", ["flow_map", "consistency"])
def test_a_model_of_words_is_distilled_with_its_words(trained, captioned, encoder, method, tmp_path):
    """The student has the teacher's encoder, and with nothing learned and no guidance its velocity for a prompt; with
    guidance it samples in one evaluation a step."""
    forget_runs()
    short = ["--max_train_steps", 1, "--batch_size", 4, "--sample_num_images", 4, "--learning_rate", "1e-30"]
    arguments = ["--teacher", trained / "pipeline", *options(captioned, encoder), *short, "--method", method]
    run(distill.main, *arguments, "--folded_guidance", 2, "--output_dir", tmp_path / "run")
    student, teacher = load_bundle(tmp_path / "run" / "pipeline"), load_bundle(trained / "pipeline")
    assert student.prompt_settings == teacher.prompt_settings
    told, theirs = (each.encode_prompt(["a bag", "a coat"]) for each in (student, teacher))
    assert all(torch.equal(told[name], theirs[name]) for name in theirs)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    values = (each.transformer(x, 500.0, class_labels=labels, **told).sample for each in (student, teacher))
    assert torch.allclose(*values, atol=1e-6)
    found = student(prompt=["a bag", "a coat"], class_labels=[8, 4], output_type="pt")
    assert found.nfe == 2 and torch.isfinite(found.images).all()
    facts = json.loads((tmp_path / "run" / "pipeline" / "training.json").read_text())
    assert facts["few_step"]["guidance"] == 2 and facts["captions"]["captions"] == 59


def test_a_teacher_knows_the_words_of_its_encoder_alone(trained, captioned, encoder, tmp_path, capsys):
    forget_runs()
    short = ["--max_train_steps", 1, "--batch_size", 4, "--sample_num_images", 4]
    arguments = ["--teacher", trained / "pipeline", *short, "--output_dir", tmp_path / "run"]
    other = save_encoder(tmp_path / "other", "qwen")
    with pytest.raises(ValueError, match="is another one than that of '.*', to which its vectors mean nothing"):
        run(distill.main, *arguments, *options(captioned, other))
    wordless = DiTModel(8, 4, 1, hidden_size=32, num_layers=1, num_attention_heads=2, num_classes=None)
    save_bundle(ScoreSDEPipeline(ScoreSDEScheduler(), transformer=wordless), tmp_path / "wordless")
    arguments = ["--teacher", tmp_path / "wordless", *arguments[2:], "--class_conditional", "false"]
    with pytest.raises(ValueError, match="the teacher follows no words: leave caption_column and text_encoder out"):
        run(distill.main, *arguments, *options(captioned, encoder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--caption_layers", -2],
            r"was told captions with caption_layers \[-1\], not \[-2\]: pass --caption_layers -1",
        ),
        (["--pooled_captions", "true"], "was not told pooled captions: leave pooled_captions out"),
        (
            ["--max_caption_tokens", 5],
            "was told captions with max_caption_tokens 8, not 5: pass --max_caption_tokens 8",
        ),
        (["--text_encoder", "other"], "is another one than that of '.*', to which its vectors mean nothing"),
    ],
)
def test_an_adapter_is_told_captions_as_its_model_is(trained, captioned, encoder, tmp_path, arguments, message):
    """Which encodes them, wherever the adapter is put on it."""
    if arguments[1] == "other":
        arguments = ["--text_encoder", save_encoder(tmp_path / "other", "qwen")]
    short = ["--max_train_steps", 1, "--batch_size", 4, "--sample_num_images", 4, "--lora_rank", 2]
    begun = ["--init_from", trained / "pipeline", *short, "--output_dir", tmp_path / "run"]
    forget_runs()
    with pytest.raises(ValueError, match=message):
        run(train.main, *begun, *options(captioned, encoder), *arguments)


def test_a_model_is_evaluated_by_the_captions_of_test_images(trained, captioned, tmp_path):
    folder = shutil.copytree(trained / "pipeline", tmp_path / "pipeline")
    arguments = ["--pipeline", folder, "--test_split", "train", "--num_inference_steps", 2, "--guidance_scale", 2]
    arguments += ["--num_images", 12, "--batch_size", 5, "--classifier_epochs", 1, "--save_samples", tmp_path / "x.npz"]
    run(evaluate.main, *arguments, "--features", "classifier", "--loss", 12)
    found = {each["name"]: each for each in json.loads((folder / "metrics.json").read_text())}
    # as during training
    lines = [json.loads(line) for line in (trained / "evaluation.jsonl").read_text().splitlines()]
    loss = found["loss on train images"]
    assert loss["value"] == pytest.approx(lines[-1]["held_out_loss"], rel=1e-4)
    assert (loss["n"], loss["time_density"], loss["weighting"]) == (12, "logit_normal", "output")
    # the images of the captions in turn, the empty one left out, with their classes
    data, pipeline = datasets.Dataset.from_parquet(captioned), load_bundle(folder)
    assert data["caption"][0] == ""
    images = pipeline(
        prompt=data["caption"][1:13],
        class_labels=data["label"][1:13],
        guidance_scale=2,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(i) for i in range(12)],
        output_type="np",
    ).images
    saved = np.load(tmp_path / "x.npz")["arr_0"]
    assert np.abs(saved.astype(int) - (images * 255).round()).max() <= 1
    [distance] = [each for name, each in found.items() if name.startswith("Fréchet distance of 12 samples to the 60")]
    assert distance["prompts"] == "captions of split train" and distance["guidance_scale"] == 2
    assert "classifier accuracy on samples" in found


def test_what_a_model_of_words_cannot_be_asked_is_refused(trained, captioned, tmp_path):
    arguments = ["--pipeline", trained / "pipeline", "--test_split", "train", "--num_images", 12]
    other = datasets.Dataset.from_parquet(captioned).remove_columns("caption")
    other.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="caption_column is missing: the pipeline follows words"):
        run(evaluate.main, *arguments, "--dataset", tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has no column 'text'; .* name its caption column by --caption_column"):
        run(evaluate.main, *arguments, "--caption_column", "text")
    with pytest.raises(ValueError, match="caption column 'empty' holds no captions"):
        run(evaluate.main, *arguments, "--caption_column", "empty")


def test_classes_alone_remain_as_they_are(tmp_path):
    weights = train_tiny(tmp_path / "run", "--dataset", EMBEDDED_TRAIN, "--max_train_steps", 1)
    assert not any("context" in name or "pooled" in name for name in weights)
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None] and index["prompt_settings"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption_column", "text"], "has no column 'text'; it has .*: name its caption column by --caption_column"),
        (["--caption_column", "empty"], "caption column 'empty' holds no captions: all 60 are empty"),
        (["--caption_column", "number"], "caption column 'number' must hold texts, or lists of texts; it has 0"),
        (["--text_encoder", "no_such_folder"], "text encoder 'no_such_folder' cannot be opened"),
        (
            ["--max_caption_tokens", 40],
            "40 tokens of a text .* are more than the 32 that its encoder, a BertModel, .*; --max_caption_tokens",
        ),
        (["--caption_layers", 5], "layer 5 of the text encoder, a BertModel, is not among its -3 to 2"),
        (
            ["--network_kwargs", "{cross_attention_dim: 12}"],
            "cross_attention_dim 12 of network_kwargs contradicts the text encoder, which makes vectors of width 16",
        ),
    ],
)
def test_captions_that_cannot_be_learned_are_refused_before_work(captioned, encoder, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = config_of(*options(captioned, encoder), *arguments)
    with pytest.raises(ValueError, match=message):
        train.DiffusionTask(config, Accelerator(cpu=True))


def test_a_network_that_follows_words_is_begun_with(captioned, encoder, tmp_path, capsys):
    """An encoder of another width is refused by both names; captions that are given up are said."""
    first, wide = tmp_path / "first" / "pipeline", tmp_path / "wide"
    train_tiny(tmp_path / "first", *options(captioned, encoder), "--max_train_steps", 1)
    config = BertConfig.from_pretrained(encoder)
    config.hidden_size = 2 * WIDTH
    BertModel(config).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    begin = ["--init_from", first, "--dataset", captioned, "--output_dir", tmp_path / "run", "--batch_size", 4]
    words = ["--caption_column", "caption", "--max_caption_tokens", 8, "--text_encoder"]
    with pytest.raises(ValueError, match="cross_attention_dim 16 of .*pipeline contradicts the text encoder, .* 32"):
        run(train.main, *begin, *words, wide)
    forget_runs()
    task = train.DiffusionTask(config_of(*begin), Accelerator(cpu=True))
    assert task.prompts is None and not task.make_pipeline(task.model).takes_prompts
    said = capsys.readouterr().out
    assert "follows words, of which this run has none" in said and "--caption_column keeps" in said
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(encoder)).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    for source in (encoder, tmp_path / "other"):
        train.DiffusionTask(config_of(*begin, *words, source), Accelerator(cpu=True))
        said = capsys.readouterr().out
        assert ("is another one than that of" in said) == (source != encoder)


def test_the_encoder_of_the_weights_comes_with_them(captioned, encoder, tmp_path):
    """With its settings, but for those that are given; a resumed run needs the weights no more."""
    told = ["--caption_layers", -1, -2, "--pooled_captions", "--max_train_steps", 1]
    train_tiny(tmp_path / "first", *options(captioned, encoder), *told)
    first = tmp_path / "first" / "pipeline"
    small = ["--batch_size", 4, "--lr_warmup_steps", 0, "--sample_num_images", 4, "--sample_num_inference_steps", 2]
    begin = ["--init_from", first, "--dataset", captioned, "--caption_column", "caption", "--learning_rate", "1e-2"]
    begin += [*small, "--checkpointing_steps", 1]

    def trained(name, *arguments):
        forget_runs()
        run(train.main, *begin, "--output_dir", tmp_path / name, *arguments)
        return ScoreSDEPipeline.from_pretrained(tmp_path / name / "pipeline")

    whole, before = trained("whole", "--max_train_steps", 2), ScoreSDEPipeline.from_pretrained(first)
    assert whole.prompt_settings == before.prompt_settings
    assert whole.prompt_settings["pooled"] and list(whole.prompt_settings["layers"]) == [-1, -2]
    assert fingerprint(whole.text_encoder, whole.tokenizer) == fingerprint(before.text_encoder, before.tokenizer)
    assert trained("shorter", "--max_train_steps", 1, "--max_caption_tokens", 5).prompt_settings["max_tokens"] == 5
    trained("parts", "--max_train_steps", 1)
    first.rename(tmp_path / "elsewhere")
    parts = trained("parts", "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert parts.prompt_settings == whole.prompt_settings
    assert equal(parts.transformer.state_dict(), whole.transformer.state_dict())
    # and the folder of a pipeline is one of its encoder
    opened = open_text_encoder(tmp_path / "elsewhere")
    assert fingerprint(*opened) == fingerprint(before.text_encoder, before.tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption_column", "caption"], "caption_column and text_encoder belong together"),
        (["--text_encoder", "words"], "caption_column and text_encoder belong together"),
        (["--pooled_captions"], "pooled_captions need captions"),
        (["--sample_prompts", "a hat"], "sample_prompts need captions"),
        (["--caption_column", "c", "--text_encoder", "t", "--max_caption_tokens", "0"], "max_caption_tokens 0 must be"),
        (
            ["--caption_column", "c", "--text_encoder", ".", "--save_text_encoder", "false"],
            "save_text_encoder false needs a text_encoder on the Hub, which the pipeline can name, not the folder '.'",
        ),
    ],
)
def test_options_that_do_not_fit_each_other(arguments, message, capsys):
    with pytest.raises(SystemExit):
        config_of(*arguments)
    assert message in capsys.readouterr().err
    if "--pooled_captions" not in arguments and "--sample_prompts" not in arguments and "--save" not in message:
        with pytest.raises(SystemExit):
            run(encode_latents.main, "--vae", "vae", *[a for a in arguments if not a.startswith("--save")])


def test_latents_without_captions_say_so(captioned, encoder, tiny_vae, tmp_path):
    forget_runs()
    encode(captioned, tiny_vae, tmp_path / "latents")
    config = config_of("--latents", tmp_path / "latents", "--caption_column", "caption", "--text_encoder", encoder)
    with pytest.raises(ValueError, match="hold no captions: encode them anew by `score-sde encode-latents` with"):
        CleanData(config, Accelerator(cpu=True), captions=config)
