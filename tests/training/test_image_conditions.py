"""Training on images that a network sees beside the samples: paired by a column or measured, mirrored and cropped
alike, cached with latents, started from weights without, saved, refused."""

import json
import re
import shutil

import datasets
import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from words import save_encoder

from runs import TINY_DIT, TINY_RUN, equal, forget_runs, run, tiny_dc
from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, ScoreUNetModel, cli, load_bundle, save_bundle
from score_sde.pipelines.image_conditions import Measurement
from score_sde.pipelines.likelihood import dequantize
from score_sde.training import encode_latents, evaluate, train
from score_sde.training.parts.captions import CaptionReader
from score_sde.training.parts.clean_data import CleanData
from score_sde.training.parts.latent_shards import read_latents_json
from score_sde.training.parts.loop import Draws
from score_sde.training.parts.options import parse
from score_sde.training.parts.starting import transfer
from score_sde.training.share_latents import latents_card


COLUMNS = ("same", "small", "inverse", "mask", "absent", "wide", "number")
COLUMNS_BESIDE = [name for name in COLUMNS if name != "mask"]


@pytest.fixture(scope="session")
def paired(tmp_path_factory):
    """Colourful images of 12 x 16 with, in other columns, the same ones, half the size, their negatives, masks, some
    that are missing, and some of other proportions."""
    generator, rows = np.random.default_rng(0), {name: [] for name in ("image", *COLUMNS)}
    for i in range(24):
        low = Image.fromarray(generator.integers(0, 256, (4, 3, 3), dtype=np.uint8))
        image = low.resize((12, 16), Image.Resampling.BICUBIC)
        rows["image"].append(image)
        rows["same"].append(image)
        rows["small"].append(image.resize((6, 8), Image.Resampling.BOX))
        rows["inverse"].append(Image.eval(image, lambda value: 255 - value))
        rows["mask"].append(image.convert("L").point(lambda value: 255 * (value > 128)).convert("1"))
        rows["absent"].append(None if i in (3, 5) else image)
        rows["wide"].append(image.resize((16, 12)) if i == 7 else image)
        rows["number"].append(i)
    rows["label"] = [i % 2 for i in range(24)]
    kinds = {name: datasets.Image() for name in rows if name not in ("number", "label")}
    kinds |= {"number": datasets.Value("int64"), "label": datasets.ClassLabel(names=["a", "b"])}
    path = tmp_path_factory.mktemp("paired") / "train.parquet"
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(path)
    return str(path)


SMALL = ["--resolution", 8, "--batch_size", 4]


def config_of(*arguments):
    return parse(train.TrainConfig, [str(each) for each in [*SMALL, *arguments]])


def data_of(*arguments):
    config = config_of(*arguments)
    return CleanData(config, Accelerator(cpu=True), captions=config, conditions=config)


def batch_of(data, rows):
    return torch.utils.data.default_collate([data.dataset[row] for row in rows])


def clean_and_conditions(data, rows=range(24), seed=3):
    """(x0, what the network is told) as training draws them."""
    draws = Draws(seed, 0, Accelerator(cpu=True), len(rows))
    batch = data.mirrored(batch_of(data, rows), draws)
    return data.draw(batch, draws), data.conditions(batch, draws)


# --- what a network is told -------------------------------------------------------------------------------------------


def test_images_that_are_kept_in_memory_have_theirs(paired):
    data = data_of("--dataset", paired, "--condition_column", "mask", "--condition_channels", 1, "--cache_images")
    first, again = ([data.dataset.__getitems__(list(range(4)))] for _ in range(2))
    assert data.dataset.is_kept[:4].all() and data.dataset.beside.column_names == [*COLUMNS_BESIDE, "label"]
    for one, other in zip(*first, *again, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(*map(torch.as_tensor, (one[n], other[n]))) for n in one)
        assert other["images"].shape == (3, 8, 8) and other["condition_images"].shape == (1, 8, 8)


def test_mirroring_and_cropping_do_to_both_what_they_do_to_one(paired):
    options = ["--dataset", paired, "--random_flip", "true", "--crop", "random"]
    x0, told = clean_and_conditions(data_of(*options, "--condition_column", "same"))
    assert torch.equal(told["condition_sample"], x0) and list(told) == ["class_labels", "condition_sample"]
    plain, _ = clean_and_conditions(data_of("--dataset", paired))
    mirrored = [torch.equal(each, other.flip(-1)) for each, other in zip(x0, plain, strict=True)]
    assert (x0 - plain).flatten(1).abs().amax(1).gt(0.01).sum() > 12 and sum(mirrored) < 24
    x0, told = clean_and_conditions(data_of(*options, "--condition_column", "inverse"))
    assert (told["condition_sample"] + x0).abs().max() < 0.05
    # a smaller one is cropped at the same place
    x0, told = clean_and_conditions(data_of(*options, "--condition_column", "small"))
    others = [(told["condition_sample"][i] - x0[j]).abs().mean() for i in range(24) for j in range(24) if i != j]
    assert max((told["condition_sample"][i] - x0[i]).abs().mean() for i in range(24)) < 0.5 * min(others)


@pytest.mark.parametrize("name", ["downsample:2", "grayscale", "blur:0.7"])
def test_a_measured_one_is_that_of_the_mirrored_image(paired, name):
    data = data_of("--dataset", paired, "--random_flip", "true", "--crop", "random", "--condition_from", name)
    x0, told = clean_and_conditions(data)
    assert torch.equal(told["condition_sample"], Measurement(name)(x0))
    assert data.condition.width == told["condition_sample"].shape[1] == (1 if name == "grayscale" else 3)


def test_masks_have_one_channel_where_that_is_asked_for(paired):
    data = data_of("--dataset", paired, "--condition_column", "mask", "--condition_channels", 1)
    _, told = clean_and_conditions(data)
    assert told["condition_sample"].shape == (24, 1, 8, 8)
    stream = data_of(
        *("--dataset", paired, "--condition_column", "mask", "--condition_channels", 1, "--streaming", "true")
    )
    assert next(iter(stream.dataset))["condition_images"].shape == (1, 8, 8)


def test_a_folder_says_by_its_metadata_which_images_are_paired(paired, tmp_path):
    data, lines = datasets.Dataset.from_parquet(paired), []
    for i, row in enumerate(data.select(range(4))):
        row["image"].save(tmp_path / f"{i}.png")
        row["inverse"].save(tmp_path / f"{i}_inverse.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "inverse_file_name": f"{i}_inverse.png"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = data_of("--dataset", tmp_path, "--label_column", "none", "--condition_column", "inverse")
    x0, told = clean_and_conditions(data, range(4))
    assert (told["condition_sample"] + x0).abs().max() < 0.05
    assert data.dataset.row_facts()["skipped_files"] == 0


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("condition", [("--condition_column", "same"), ("--condition_from", "downsample:2")])
def test_in_latents_it_is_encoded_by_the_same_autoencoder(paired, condition, cached, tmp_path):
    vae = tmp_path / "vae"
    rgb_dc(vae)
    where = ["--dataset", paired, "--vae", vae, *condition]
    if cached:
        run(
            encode_latents.main, "--resolution", 8, *where, "--output_dir", tmp_path / "latents", "--both_flips", "true"
        )
        where = ["--latents", tmp_path / "latents"]
    data = data_of(*where, "--random_flip", "true")
    x0, told = clean_and_conditions(data)
    if condition[1] == "same":  # an autoencoder without noise
        assert (told["condition_sample"] - x0).abs().max() < 1e-5
    pixels, _ = clean_and_conditions(data_of("--dataset", paired, "--random_flip", "true"))
    pipeline = ScoreSDEPipeline(
        ScoreSDEScheduler(),
        vae=data.vae,
        transformer=train.make_network(config_of(), data.shape, None, data.condition.arguments()),
        condition_from=data.condition.measured,
    )
    if condition[1] != "same":
        pixels = Measurement(condition[1]).operator(pixels)
    with torch.no_grad():
        expected = pipeline.encode_condition(pixels / 2 + 0.5)["condition_sample"]
    assert (told["condition_sample"] - expected).abs().max() < 1e-4
    if cached:
        facts = read_latents_json(tmp_path / "latents")
        card = str(latents_card(facts, "somebody/latents", None))
        assert f"| images seen beside, `condition_mean` | {condition[1]} |" in card


def rgb_dc(folder):
    """As `tiny_dc`, of colours."""
    tiny_dc(folder)
    config = dict(diffusers.AutoencoderDC.load_config(folder)) | {"in_channels": 3}
    torch.manual_seed(0)
    diffusers.AutoencoderDC.from_config(config).save_pretrained(folder)


# --- trained ----------------------------------------------------------------------------------------------------------


RGB = ["--image_channels", 3]


def train_rgb(output_dir, *arguments):
    forget_runs()
    run(train.main, *TINY_RUN, "--network_kwargs", TINY_DIT, "--output_dir", output_dir, *RGB, *arguments)
    return load_bundle(output_dir / "pipeline")


def test_a_run_learns_with_classes_goes_on_and_is_saved(paired, tmp_path):
    options = ["--dataset", paired, "--condition_column", "inverse", "--random_flip", "true"]
    options += ["--sample_guidance_scale", 2]
    whole = train_rgb(tmp_path / "whole", *options, "--max_train_steps", 4)
    train_rgb(tmp_path / "run", *options, "--max_train_steps", 2, "--checkpointing_steps", 2)
    resumed = train_rgb(
        *(tmp_path / "run", *options, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"),
    )
    assert equal(whole.transformer.state_dict(), resumed.transformer.state_dict())
    config = whole.transformer.config
    assert (config.in_channels, config.condition_channels, config.out_channels) == (6, 3, 3)
    assert whole.config.condition_from is None and whole.num_classes == 2
    # the first rows, each beside what was seen: 10 pairs of 8 x 8, enlarged
    with Image.open(tmp_path / "whole" / "pipeline" / "samples.png") as grid:
        assert grid.size == (4 * 64, 5 * 64)
    card = (tmp_path / "whole" / "pipeline" / "README.md").read_text()
    assert "| image that it sees beside the sample | of the column inverse |" in card
    assert "| conditions | class_labels, condition_sample |" in card
    facts = json.loads((tmp_path / "whole" / "pipeline" / "training.json").read_text())
    assert facts["condition"] == {"column": "inverse", "from": None}
    with pytest.raises(ValueError, match="condition column was 'inverse', is 'same'"):
        train_rgb(
            *(tmp_path / "run", *options[:3], "same", *options[4:], "--max_train_steps", 5),
            *("--resume_from_checkpoint", "latest"),
        )


def test_a_unet_learns_from_a_measured_one(paired, tmp_path):
    unet = "{block_out_channels: [8, 8], layers_per_block: 1, attention_resolutions: [4]}"
    pipeline = train_rgb(
        *(tmp_path / "run", "--dataset", paired, "--condition_from", "grayscale", "--label_column", "none"),
        *("--network", "unet", "--network_kwargs", unet, "--max_train_steps", 2, "--evaluation_steps", 2),
        *("--evaluation_split", "train", "--evaluation_images", 8),
    )
    assert pipeline.unet.config.in_channels == 4 and pipeline.config.condition_from == "grayscale"
    assert "held_out_loss" in (tmp_path / "run" / "evaluation.jsonl").read_text()
    assert not torch.equal(pipeline.unet.conv_in.weight[:, 3], torch.zeros(8, 3, 3))
    grey = Image.new("L", (8, 8), 100)
    images = pipeline(condition_image=grey, num_inference_steps=2).images
    assert images[0].size == (8, 8) and images[0].mode == "RGB"
    grey.save(tmp_path / "grey.png")
    bundle, output = str(tmp_path / "run" / "pipeline"), str(tmp_path / "drawn.png")
    sampling = ["sample", bundle, "--steps", "2", "--output", output]
    with pytest.raises(SystemExit) as end:
        cli.main([*sampling, "--condition_image", str(tmp_path / "grey.png")])
    assert not end.value.code
    with Image.open(output) as drawn:
        assert drawn.size == (64, 64)
    with pytest.raises(ValueError, match="pass --condition_image, files of 8 x 8 pixels"):
        cli.main(sampling)
    with pytest.raises(ValueError, match="'missing.png' cannot be opened as an image"):
        cli.main([*sampling, "--condition_image", "missing.png"])


@pytest.fixture(scope="module")
def trained(paired, tmp_path_factory):
    """A model of each condition, with classes, and what was measured of it in training."""
    found = {}
    for name, condition in (
        ("measured", ("--condition_from", "downsample:2")),
        ("paired", ("--condition_column", "inverse")),
    ):
        folder = tmp_path_factory.mktemp(name)
        train_rgb(
            *(folder, "--dataset", paired, *condition, "--max_train_steps", 2, "--evaluation_steps", 2),
            *("--evaluation_split", "train", "--evaluation_images", 12, "--evaluation_features", "classifier"),
        )
        found[name] = folder / "pipeline", json.loads((folder / "evaluation.jsonl").read_text())
    return found


@pytest.mark.parametrize("name", ["measured", "paired"])
def test_a_model_is_evaluated_beside_the_images_of_test_rows(trained, paired, name, tmp_path):
    pytest.importorskip("torchdiffeq")
    source, before = trained[name]
    folder, saved = shutil.copytree(source, tmp_path / "pipeline"), tmp_path / "x.npz"
    options = ["--pipeline", folder, "--test_split", "train", "--num_images", 12, "--features", "classifier"]
    options += ["--loss", 12, "--likelihood", 4, "--tolerance", 1e-2, "--batch_size", 5, "--save_samples", saved]
    run(evaluate.main, *options, "--num_inference_steps", 2)
    found = {each["name"]: each for each in json.loads((folder / "metrics.json").read_text())}
    assert found["loss on train images"]["value"] == pytest.approx(before["held_out_loss"], rel=1e-4)
    [distance] = [each for key, each in found.items() if key.startswith("Fréchet distance of 12 samples to the 24")]
    assert distance["value"] == pytest.approx(before["frechet_distance"], rel=1e-3)
    assert distance["conditions"] == "class_labels, condition_sample of split train"

    # by hand: the first rows, each beside its own image and of its class
    pipeline = load_bundle(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = ["--dataset", paired] + (["--condition_column", "inverse"] if name == "paired" else [])
    rows = [data_of(*options).dataset[row] for row in range(12)]
    truth, labels = torch.stack([row["images"] for row in rows]), [row["labels"] for row in rows]
    seen = torch.stack([row["condition_images"] for row in rows]) if name == "paired" else truth
    operator = Measurement("downsample:2").operator
    seen = (seen if name == "paired" else operator(truth)) / 2 + 0.5
    generators = [torch.Generator().manual_seed(row) for row in range(12)]
    images = pipeline(
        class_labels=labels, condition_image=seen, num_inference_steps=2, generator=generators, output_type="pt"
    ).images
    drawn = torch.from_numpy(np.load(saved)["arr_0"]).permute(0, 3, 1, 2).float()
    assert (drawn - (255 * images).round()).abs().max() <= 1
    drawn = drawn / 127.5 - 1
    psnr = -10 * ((drawn - truth) / 2).square().mean((1, 2, 3)).log10().mean()
    assert found["PSNR of 12 samples to train images"]["value"] == pytest.approx(float(psnr), rel=1e-4)
    residual = found.get("residual of 12 samples to train images", {}).get("value")
    expected = float((operator(drawn) - operator(truth)).square().mean().sqrt())
    assert residual == (pytest.approx(expected, rel=1e-4) if name == "measured" else None)

    likelihood, values = found["negative log-likelihood of the pixels, bits/dim"], []
    assert "given the class and the condition image by" in likelihood["explanation"]
    for row in range(4):
        generator = torch.Generator().manual_seed(row)
        image = dequantize(((truth[row] + 1) * 127.5).round(), generator)[None]
        told = pipeline.encode_condition(seen[row])
        found_of = pipeline.log_likelihood(
            image, None, labels[row], conditions=told, generator=generator, rtol=1e-2, atol=1e-2
        )
        values.append(found_of.bits_per_dim())
    assert float(torch.cat(values).mean()) == pytest.approx(likelihood["value"], abs=0.02)
    card = (folder / "README.md").read_text()
    assert "| PSNR of 12 samples to train images |" in card


def test_evaluation_of_what_sees_images_is_refused_before_work(trained, paired, tmp_path):
    by_column, _ = trained["paired"]
    options = ["--num_images", 10, "--test_split", "train", "--pipeline"]
    other = tmp_path / "other.parquet"
    datasets.Dataset.from_parquet(paired).remove_columns("inverse").to_parquet(other)
    for arguments, message in (
        ((by_column, "--dataset", other), "condition_column is missing: the pipeline sees an image beside the sample"),
        ((by_column, "--condition_column", "depth"), "has no column 'depth'"),
        ((by_column, "--condition_column", "absent"), "2 rows have no image in condition column 'absent'"),
    ):
        forget_runs()
        with pytest.raises(ValueError, match=message):
            run(evaluate.main, *options, *arguments)


def test_latents_with_captions_classes_and_images_at_once(paired, tmp_path):
    vae, encoder = tmp_path / "vae", save_encoder(tmp_path / "encoder")
    rgb_dc(vae)
    data = datasets.Dataset.from_parquet(paired)
    data = data.add_column("caption", [["a red hat", "a blue bag"]] * len(data))
    data.to_parquet(tmp_path / "captioned.parquet")
    words = ["--caption_column", "caption", "--text_encoder", encoder, "--max_caption_tokens", 8]
    where = ["--dataset", tmp_path / "captioned.parquet", "--vae", vae, "--condition_column", "inverse"]
    run(encode_latents.main, "--resolution", 8, *where, *words, "--output_dir", tmp_path / "latents")
    pipeline = train_rgb(tmp_path / "run", "--latents", tmp_path / "latents", "--max_train_steps", 2)
    told = json.loads((tmp_path / "run" / "pipeline" / "training.json").read_text())["conditions"]
    assert told == ["class_labels", "encoder_hidden_states", "encoder_attention_mask", "condition_sample"]
    images = pipeline(
        prompt="a red hat", class_labels="a", condition_image=data[0]["inverse"].resize((8, 8)), num_inference_steps=2
    ).images
    assert images[0].size == (8, 8)
    # all of them are those of the rows where it is measured
    saved = tmp_path / "x.npz"
    options = ["--num_images", 3, "--num_inference_steps", 2, "--label_column", "label", "--classifier_epochs", 1]
    options += ["--test_split", "train", "--image_channels", 3, "--batch_size", 2]
    run(evaluate.main, "--pipeline", tmp_path / "run" / "pipeline", *options, "--save_samples", saved)
    told = data_of(*where, *words, "--image_channels", 3)
    row = CaptionReader("caption", told.captions.tokenizer, 8).item(data[2]["caption"], (0, 2))
    conditions = told.captions.encoded(row["caption_ids"][None], row["caption_mask"][None])
    conditions = {
        "encoder_hidden_states": conditions["caption_embeds"].float(),
        "encoder_attention_mask": conditions["caption_mask"],
    }
    seen = told.dataset[2]["condition_images"] / 2 + 0.5
    generator = torch.Generator().manual_seed(2)
    alone = pipeline(
        *(1, data[2]["label"]), conditions=conditions, condition_image=seen, num_inference_steps=2, generator=generator
    )
    assert np.abs(np.load(saved)["arr_0"][2].astype(int) - np.asarray(alone.images[0])).max() <= 1
    # without what the latents hold
    forget_runs()
    bare = train_rgb(
        *(tmp_path / "bare", "--latents", tmp_path / "latents", "--max_train_steps", 1),
        *("--condition_column", "none", "--caption_column", "none"),
    )
    assert bare.transformer.config.condition_channels is None


# --- from weights -----------------------------------------------------------------------------------------------------

DIT = {"sample_size": 8, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "num_classes": 2}
UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_resolutions": (4,)}
UNET |= {"dropout": 0.0, "progressive_input": "input_skip"}
KINDS = {"dit": (DiTModel, DIT), "unet": (ScoreUNetModel, UNET)}


def randomized(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_new_weights_are_zero_so_that_the_output_is_the_old_ones(kind, learn_sigma):
    model, options = KINDS[kind]
    source = randomized(model(in_channels=2, learn_sigma=learn_sigma, **options))
    network = randomized(model(in_channels=5, condition_channels=3, learn_sigma=learn_sigma, **options))
    x, beside = torch.randn(2, 2, 8, 8), torch.randn(2, 3, 8, 8)
    assert (network(x, 5, condition_sample=beside).sample - source(x, 5).sample).abs().max() > 0.1
    transfer(source, network, {0: 0, 1: 1})
    assert (network(x, 5, condition_sample=beside).sample - source(x, 5).sample).abs().max() < 1e-5
    # and once more, with more channels of both
    wider = randomized(model(in_channels=7, condition_channels=4, learn_sigma=learn_sigma, **options))
    network.load_state_dict(randomized(network).state_dict())
    transfer(network, wider, {0: 0, 1: 1})
    more, besides = torch.cat([x, torch.randn(2, 1, 8, 8)], 1), torch.cat([beside, torch.randn(2, 1, 8, 8)], 1)
    found = wider(more, 5, condition_sample=besides).sample.unflatten(1, (-1, 3))[:, :, :2].flatten(1, 2)
    assert (found - network(x, 5, condition_sample=beside).sample).abs().max() < 1e-5
    with pytest.raises(ValueError, match="takes 3 channels of a condition image, the data have 0: they may have more"):
        transfer(network, source, {})


def test_a_run_begins_with_a_model_that_saw_none(paired, tmp_path):
    source = randomized(DiTModel(in_channels=3, **DIT))
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=source, id2label={0: "a", 1: "b"})
    folder = save_bundle(pipeline, tmp_path / "source")
    still = ["--batch_size", 4, "--max_train_steps", 1, "--learning_rate", "1e-30", "--lr_warmup_steps", 0]
    still += ["--sample_num_images", 2, "--sample_num_inference_steps", 2, "--dataset", paired]
    run(
        train.main,
        *("--init_from", folder, "--output_dir", tmp_path / "run", *still, "--condition_from", "downsample:4"),
    )
    begun = load_bundle(tmp_path / "run" / "pipeline")
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 0])
    with torch.no_grad():
        expected = source(x, 0.5, labels).sample
        found = begun.transformer(x, 0.5, labels, condition_sample=torch.randn(2, 3, 8, 8)).sample
    assert (found - expected).abs().max() < 1e-5
    # a model that saw them goes on with them, and not without
    forget_runs()
    again = ["--init_from", tmp_path / "run" / "pipeline", *still]
    run(train.main, *again, "--output_dir", tmp_path / "again", "--condition_from", "downsample:2")
    tensors = load_file(tmp_path / "again" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all((tensors[name] - each).abs().max() < 1e-20 for name, each in begun.transformer.state_dict().items())
    forget_runs()
    with pytest.raises(ValueError, match="takes 3 channels of a condition image, the data have 0"):
        run(train.main, *again, "--output_dir", tmp_path / "without")


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--condition_column", "depth"], "has no column 'depth'; it has .*name its condition column by --condition_c"),
        (["--condition_column", "number"], "condition column 'number' must hold images, not Value"),
        (["--condition_column", "absent"], r"2 rows have no image in condition column 'absent' \(rows 3, 5\)"),
        (
            ["--condition_column", "wide"],
            "row 7 of condition column 'wide': the condition image of 16 x 12 pixels is not paired with its image of "
            "12 x 16",
        ),
        (["--condition_column", "same", "--condition_from", "grayscale"], "were given: pass one of them"),
        (["--condition_column", "same", "--condition_channels", 2], "condition_channels 2 must be 1 or 3"),
        (["--condition_from", "grayscale", "--condition_channels", 1], "condition_channels needs condition_column"),
        (["--condition_from", "shrink:4"], "condition_from 'shrink' is unknown"),
        (["--condition_from", "downsample:3"], "condition_from downsample:3: super-resolution by 3 does not fit"),
        (["--condition_from", "grayscale", "--image_channels", 1], "condition_from grayscale: colourisation of 3"),
        (
            ["--condition_column", "same", "--network_kwargs", "{condition_channels: 1}"],
            "condition_channels 1 of network_kwargs contradicts the condition images, which have 3",
        ),
        (
            [
                *("--condition_column", "same", "--network_kwargs", "{class_dropout_prob: 0}"),
                *("--sample_guidance_scale", 2, "--label_column", "none"),
            ],
            "sample_guidance_scale 2 needs a network that is trained with a class_dropout_prob above 0",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(paired, arguments, message, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        run(train.main, "--dataset", paired, *SMALL, "--output_dir", tmp_path / "run", *arguments)
    assert re.search(message, " ".join(f"{error.value} {capsys.readouterr().err}".split()))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_latents_without_and_with_others_are_refused(paired, tmp_path):
    vae = tmp_path / "vae"
    rgb_dc(vae)
    encode = ["--dataset", paired, "--resolution", 8, "--vae", vae, "--output_dir"]
    run(encode_latents.main, *encode, tmp_path / "bare")
    with pytest.raises(ValueError, match="hold no condition images: encode them anew"):
        data_of("--latents", tmp_path / "bare", "--condition_from", "grayscale")
    with pytest.raises(ValueError, match="holds other latents .*condition images were not there"):
        run(encode_latents.main, *encode, tmp_path / "bare", "--condition_from", "grayscale")
    run(encode_latents.main, *encode, tmp_path / "grey", "--condition_from", "grayscale")
    with pytest.raises(ValueError, match="condition_column 'same': .* are those of --condition_from grayscale"):
        data_of("--latents", tmp_path / "grey", "--condition_column", "same")
    with pytest.raises(ValueError, match="condition_channels 1: the autoencoder, which encodes the condition, too"):
        run(
            *(encode_latents.main, *encode, tmp_path / "mask", "--condition_column", "mask"),
            *("--condition_channels", 1),
        )


def test_one_that_is_broken_or_unpaired_is_named_or_passed_over(paired, tmp_path):
    """Further down than where a look is taken first."""
    rows = datasets.Dataset.from_parquet(paired).cast_column("wide", datasets.Image(decode=False))
    order = [i for i in range(24) if i != 7]
    many = datasets.concatenate_datasets([rows.select(order)] * 3 + [rows.select([7])])
    many.to_parquet(tmp_path / "many.parquet")
    options = ["--dataset", tmp_path / "many.parquet", "--condition_column", "wide"]
    with pytest.raises(ValueError, match="row 69 .*, or its condition in 'wide', cannot be decoded: the condition im"):
        batch_of(data_of(*options), [69])
    batch_of(data_of(*options, "--skip_corrupt_images", "true"), [69])
