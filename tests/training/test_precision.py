"""mixed_precision: auto is bfloat16 where it pays; what encodes images and captions on the way has that of the run."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from accelerate import Accelerator
from places import CONFIGS
from vision import save_vision
from words import save_encoder

from runs import TINY_DIT, train_tiny
from score_sde import DiTModel
from score_sde.pipelines.latents import encode_moments, normalize_latents
from score_sde.training import train
from score_sde.training.parts import precision
from score_sde.training.parts.alignment import Alignment
from score_sde.training.parts.clean_data import CleanData
from score_sde.training.parts.latents import load_vae
from score_sde.training.parts.loop import Draws, make_accelerator
from score_sde.training.parts.options import parse


ALIGNED = {"align_block": 1, "align_projection": "conv", "align_gamma": None}


def test_the_gain_is_a_measurement():
    assert 0.01 < precision.gain_of_bfloat16(rows=64, width=64) < 100


@pytest.mark.parametrize(("gain", "expected"), [(2.5, "bf16"), (0.4, "no")])
def test_it_is_used_where_it_pays_and_recorded(gain, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "gain_of_bfloat16", lambda: gain)
    weights = train_tiny(tmp_path / "auto", "--max_train_steps", 2, "--mixed_precision", "auto")
    said = f"mixed_precision {expected}: on this CPU matrix products in bfloat16 are {gain} times as fast as in float32"
    assert said in capsys.readouterr().out
    facts = json.loads((tmp_path / "auto" / "pipeline" / "training.json").read_text())
    assert facts["config"]["mixed_precision"] == expected
    given = train_tiny(tmp_path / "given", "--max_train_steps", 2, "--mixed_precision", expected)
    assert all(torch.equal(weights[name], given[name]) for name in given)


def rows_of(data, count=6):
    return torch.utils.data.default_collate([data.dataset[row] for row in range(count)])


@pytest.fixture
def opened(small_data):
    """f(precision, *arguments) -> the data of a run, and the batch of their first rows with its draws."""

    def open_data(wanted, *arguments):
        options = ["--dataset", small_data, "--resolution", 8, "--image_channels", 1, *arguments]
        config = parse(train.TrainConfig, [str(each) for each in [*options, "--mixed_precision", wanted]])
        accelerator = make_accelerator(config)
        data = CleanData(config, accelerator, captions=config, conditions=config, align=config)
        batch = rows_of(data)
        return data, batch, Draws(0, 0, accelerator, len(batch["images"]))

    return open_data


def test_images_are_encoded_on_the_way_in_the_precision_of_the_run(opened, tiny_vae, tmp_path):
    """Also those that are seen beside; and latents are float32."""
    found, vae = {}, load_vae(str(tiny_vae))
    for wanted in ("no", "bf16"):
        data, batch, draws = opened(wanted, "--vae", tiny_vae, "--condition_from", "blur:1.0")
        found[wanted] = data.draw(batch, draws), data.conditions(batch)["condition_sample"]
        assert {each.dtype for each in found[wanted]} == {torch.float32}
    noise = Draws(0, 0, Accelerator(), len(batch["images"])).normal(found["no"][0].shape[1:])
    shown = data.condition.pixels(batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mean, std = (each.float() for each in encode_moments(vae, batch["images"]))
        beside = encode_moments(vae, shown)[0].float()
    assert torch.equal(found["bf16"][0], normalize_latents(mean + std * noise, vae.config))
    for one, other in zip(*found.values(), strict=True):
        assert 0 < (one - other).square().mean() < (0.1 * one.std()) ** 2
    assert torch.equal(found["bf16"][1], normalize_latents(beside, vae.config))


def test_what_is_seen_in_pixels_is_exact_in_any_precision(opened):
    """A blur is a convolution, which autocast would round."""
    exact, rounded = (
        data.conditions(batch)["condition_sample"]
        for data, batch, _ in (opened(wanted, "--condition_from", "blur:1.0") for wanted in ("no", "bf16"))
    )
    assert torch.equal(exact, rounded)


def test_captions_and_features_are_encoded_in_the_precision_of_the_run(opened, small_data, tmp_path):
    data = datasets.Dataset.from_parquet(small_data).add_column("caption", ["a red hat", "the blue bag"] * 30)
    data.to_parquet(tmp_path / "train.parquet")
    told = ["--dataset", tmp_path / "train.parquet", "--caption_column", "caption", "--max_caption_tokens", 8]
    told += ["--text_encoder", save_encoder(tmp_path / "encoder"), "--align_to", save_vision(tmp_path / "vision")]
    told += ["--align_block", 1, "--network_kwargs", TINY_DIT]
    found = {}
    for wanted in ("no", "bf16"):
        data, batch, draws = opened(wanted, *told)
        heard = SimpleNamespace(tokens=torch.ones(len(batch["images"]), 16, 16), size=(8, 8))
        network = DiTModel(8, 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2)
        torch.manual_seed(0)
        alignment = Alignment(SimpleNamespace(**ALIGNED, mixed_precision=wanted), network, data.vision)
        loss = alignment(alignment.projection, heard, batch)
        found[wanted] = data.conditions(batch, draws)["encoder_hidden_states"], loss
    for one, other in zip(*found.values(), strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert 0 < (one - other).abs().max() < 0.05 * one.abs().max()


def test_float16_is_for_what_is_trained_alone():
    for wanted in ("no", "fp16", None):
        with precision.frozen(torch.device("cpu"), wanted):
            assert not torch.is_autocast_enabled("cpu")


def test_files_that_are_not_for_a_gpu_alone_measure():
    """bfloat16 where it was never asked whether it pays may be slower than float32."""
    for path in CONFIGS.glob("*/*.yaml"):
        if "gpu" not in path.stem:
            assert yaml.safe_load(path.read_text()).get("mixed_precision", "auto") == "auto", path
