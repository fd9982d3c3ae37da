"""Attacks on converters: no code of a folder or a checkpoint runs, nothing is asked, and what is odd is named."""

import io
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from bundles import edit
from commands import score_sde
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

from score_sde.sharing import convert
from score_sde.sharing.opening import open_autoencoder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock pipeline of pixels; not to be changed."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(8, 3, 3, norm_num_groups=4, layers_per_block=1, **blocks)
    folder = tmp_path_factory.mktemp("stock") / "stock"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """Source code that leaves a trace when it runs; whoever asks on stdin hears yes."""
    trace = tmp_path / "code_was_run"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    yield f"open({str(trace)!r}, 'w')\n"
    assert not trace.exists()
    assert sys.stdin.read() == "y\n" * 100, "somebody asked"


def copy_of(folder, target):
    for path in folder.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model_index.json", {"unet": ["transformers", "CLIPTokenizer"]}),
        ("model_index.json", {"feature_extractor": ["transformers", "CLIPImageProcessor"]}),
        ("model_index.json", {"unet": ["evil", "Model"]}),
        ("model_index.json", {"unet": ["os", "system"]}),
        ("model_index.json", {"unet": ["diffusers", "DiffusionPipeline"]}),
        ("model_index.json", {"_class_name": ["evil", "DDPMPipeline"]}),
        ("model_index.json", {"_class_name": "AutoPipelineForText2Image"}),
        ("model_index.json", {"custom_pipeline": "evil"}),
        ("model_index.json", {"auto_map": {"AutoModel": "evil.Model"}}),
        ("unet/config.json", {"auto_map": {"AutoModel": "evil.Model"}}),
        ("unet/config.json", {"_class_name": "AutoencoderKL"}),
        ("unet/config.json", {"block_out_channels": [10**9]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
    ],
    ids=str,
)
def test_a_folder_that_leads_to_code_is_refused(stock, tmp_path, trap, file, change):
    folder = copy_of(stock, tmp_path / "evil")
    for place in (".", "unet"):
        for name in ("evil.py", "pipeline.py", "tokenization_evil.py"):
            (folder / place / name).write_text(trap)
    edit(folder / file, **change)
    with pytest.raises(ValueError) as error:
        convert.pipeline_from_diffusers(folder)
    assert len(str(error.value)) < 1000
    assert score_sde("convert", "from-diffusers", str(folder), str(tmp_path / "converted")) == 2
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "option",
    [{"trust_remote_code": True}, {"custom_pipeline": "evil"}, {"use_safetensors": False}, {"use_onnx": True}],
    ids=str,
)
def test_no_option_turns_code_or_pickles_on(stock, trap, option):
    with pytest.raises(ValueError, match="cannot be given here"):
        convert.pipeline_from_diffusers(stock, **option)


def test_pickled_weights_are_not_opened(stock, tmp_path, trap):
    folder = copy_of(stock, tmp_path / "evil")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    Path(weights.with_suffix(".bin")).write_bytes(pickled(trap))
    with pytest.raises(ValueError, match="holds no diffusion_pytorch_model.safetensors"):
        convert.pipeline_from_diffusers(folder)


class Evil:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def pickled(code):
    return pickle.dumps({"x_embedder.proj.weight": Evil(code)})


def zipped(code):
    file = io.BytesIO()
    torch.save({"x_embedder.proj.weight": Evil(code)}, file)
    return file.getvalue()


@pytest.mark.parametrize("make", [pickled, zipped], ids=["pickle", "zip"])
@pytest.mark.parametrize("kind", ["dit", "score-sde", "guided-diffusion"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, trap, capsys, kind, make):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(make(trap))
    options = {"score-sde": ["--sde_type", "ve"], "guided-diffusion": ["--network", "ADM-64"]}.get(kind, [])
    assert score_sde("convert", kind, str(path), str(tmp_path / "converted"), *options) == 2
    error = capsys.readouterr().err
    assert "never run" in error and "Traceback" not in error and len(error) < 2000
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "is no checkpoint"),
        ({}, "is no checkpoint of facebookresearch/DiT: it holds"),
        ({1: 2}, "is no checkpoint of facebookresearch/DiT: it holds 1"),
        ({"ema": 3}, "is no checkpoint"),
        ({"ema": {"x_embedder.proj.weight": 3}}, "is no checkpoint of facebookresearch/DiT"),
        ({"x_embedder.proj.weight": torch.zeros(3)}, "is no checkpoint of facebookresearch/DiT: it lacks"),
        ({"k" * 10**6: torch.zeros(3)}, "is no checkpoint of facebookresearch/DiT"),
    ],
    ids=range(7),
)
def test_a_checkpoint_of_something_else_is_named(tmp_path, content, message):
    path = str(tmp_path / "checkpoint.pt")
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        convert.dit_from_original(path)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>", b"PK\x03\x04", bytes(1000), b"version https://git-lfs"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_bytes_that_are_no_checkpoint_are_named(tmp_path, content, suffix):
    path = tmp_path / f"checkpoint.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no checkpoint that can be read as weights alone"):
        convert.dit_from_original(str(path))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x_embedder.proj.weight", torch.zeros(3), "other shapes"),
        ("y_embedder.embedding_table.weight", torch.zeros(()), "other shapes"),
        ("pos_embed", torch.zeros(1, 10**6, 0), "pos_embed is no tensor, or no whole one"),
        ("pos_embed", torch.zeros(1).expand(1, 10**12, 384), "pos_embed is no tensor, or no whole one"),
        ("x_embedder.proj.weight", torch.zeros(0, 4, 2, 2), "x_embedder.proj.weight is no tensor, or no whole one"),
        ("pos_embed", torch.zeros(1, 16, 384).to_sparse(), "pos_embed is no tensor, or no whole one"),
        ("pos_embed", torch.zeros(1, 16, 384, device="meta"), "pos_embed is no tensor, or no whole one"),
        ("final_layer.linear.weight", "text", "final_layer.linear.weight is no tensor"),
    ],
    ids=str,
)
def test_a_checkpoint_with_odd_tensors_is_named(tmp_path, name, change, message):
    sizes = {"x_embedder.proj.weight": (384, 4, 2, 2), "y_embedder.embedding_table.weight": (11, 384)}
    sizes |= {"pos_embed": (1, 16, 384), "final_layer.linear.weight": (32, 384)}
    path = str(tmp_path / "checkpoint.pt")
    torch.save({key: torch.zeros(size) for key, size in sizes.items()} | {name: change}, path)
    with pytest.raises(ValueError, match=message):
        convert.dit_from_original(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it holds"),
        ({"model": 3, "ema": {}}, "it holds 3"),
        ({"model": {"a": 1}, "ema": {}}, "a is no tensor"),
        ({"model": {"a": torch.zeros(1)}, "ema": 5}, "shadow_params in ema, are no list"),
        ({"model": {"a": torch.zeros(1)}, "ema": {"shadow_params": [1]}}, "shadow_params in ema, are no list"),
    ],
    ids=range(5),
)
def test_a_checkpoint_of_score_sde_of_something_else_is_named(tmp_path, content, message):
    path = str(tmp_path / "checkpoint.pth")
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"is no checkpoint of score_sde_pytorch: .*{message}"):
        convert.unet_from_score_sde(path, "vp")


@pytest.mark.parametrize(
    "change", [{"_class_name": "UNet2DModel"}, {"_class_name": "../x"}, {"auto_map": {"A": "b.c"}}]
)
def test_an_autoencoder_that_is_none_is_refused(tmp_path, trap, change):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    edit(tmp_path / "vae" / "config.json", **change)
    (tmp_path / "vae" / "b.py").write_text(trap)
    with pytest.raises(ValueError):
        open_autoencoder(str(tmp_path / "vae"))


@pytest.mark.parametrize("option", ["[1]", "{", '{"no_such": 1}', '{"hidden_size": "x"}', "nan"])
def test_arguments_of_a_network_that_are_none_are_one_line(tmp_path, capsys, option):
    path = str(tmp_path / "checkpoint.safetensors")
    save_file({"a": torch.zeros(1)}, path)
    arguments = ["--network", "ADM-64", "--network_kwargs", option]
    assert score_sde("convert", "guided-diffusion", path, str(tmp_path / "converted"), *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("score-sde convert: error: ") and error.count("\n") == 1


def test_a_sound_folder_is_converted_and_only_read(stock, trap):
    before = {path: path.read_bytes() for path in stock.rglob("*") if path.is_file()}
    assert type(convert.pipeline_from_diffusers(stock).unet) is UNet2DModel
    assert {path: path.read_bytes() for path in stock.rglob("*") if path.is_file()} == before
