"""What is saved opens again, as what it was, or is refused with the remedy; a folder holds a whole bundle or none."""

import json
import os

import pytest
import torch
from bundles import WEIGHTS
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import draw, latent_pipeline, random_dit, tiny_pipeline, tiny_vae

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.pipelines import bundling
from score_sde.sharing import convert


def compiled_inside(network):
    network.blocks[0] = torch.compile(network.blocks[0])
    return network


def with_adapter(network):
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    return network


def merged_adapter(network):
    network = with_adapter(network)
    network.fuse_lora()
    return network


def fused(network):
    network.fuse_qkv_projections()
    return network


def truncated(network):
    network.proj_out = torch.nn.Linear(16, 3)
    return network


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "parallel"])
def test_what_is_wrapped_around_a_component_is_not_saved(tmp_path, wrap):
    pipeline = latent_pipeline()
    expected = draw(pipeline)
    pipeline.transformer, pipeline.vae = wrap(pipeline.transformer), wrap(pipeline.vae)
    wrapped = pipeline.transformer
    pipeline.save_pretrained(tmp_path / "saved")
    save_bundle(pipeline, tmp_path / "bundle", variant="fp16")
    assert pipeline.transformer is wrapped
    for name in ("saved", "bundle"):
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["transformer"][1] == "DiTModel" and index["vae"] == ["diffusers", "AutoencoderKL"]
        torch.testing.assert_close(draw(load_bundle(tmp_path / name)), expected, rtol=0, atol=1e-5)
    assert (draw(load_bundle(tmp_path / "bundle", variant="fp16")) - expected).abs().max() < 0.1


@pytest.mark.parametrize("change", [with_adapter, merged_adapter, fused, compiled_inside, truncated])
def test_components_that_nothing_could_open_are_refused(tmp_path, change):
    save_bundle(tiny_pipeline(), tmp_path / "bundle")
    pipeline = tiny_pipeline()
    pipeline.transformer = change(pipeline.transformer)
    with pytest.raises(ValueError, match="the tensors of transformer are not those that its config describes .*: take"):
        pipeline.save_pretrained(tmp_path / "bundle")
    torch.testing.assert_close(draw(load_bundle(tmp_path / "bundle")), draw(tiny_pipeline()), rtol=0, atol=1e-5)


def test_a_merged_adapter_is_saved_once_it_is_taken_off(tmp_path):
    from peft.tuners.tuners_utils import BaseTunerLayer

    pipeline = tiny_pipeline()
    merged_adapter(pipeline.transformer)
    pipeline.transformer.unload_lora()
    assert not any(isinstance(module, BaseTunerLayer) for module in pipeline.transformer.modules())
    pipeline.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(load_bundle(tmp_path)), draw(pipeline), rtol=0, atol=1e-5)


def test_other_networks_and_other_files_of_weights_are_refused(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="transformer is a Linear, which is no ModelMixin"):
        pipeline.save_pretrained(tmp_path)
    for arguments in ({"safe_serialization": False}, {"use_flashpack": True}):
        with pytest.raises(ValueError, match="bundles hold their weights as safetensors"):
            tiny_pipeline().save_pretrained(tmp_path, **arguments)
    with pytest.raises(TypeError, match="has no argument max_shard"):
        tiny_pipeline().save_pretrained(tmp_path, max_shard="1GB")
    assert os.listdir(tmp_path) == []


def test_a_compiled_pipeline_becomes_a_stock_one():
    pipeline = ScoreSDEPipeline(
        ScoreSDEScheduler(sde_type="discrete_vp"),
        vae=tiny_vae(latent_channels=3).requires_grad_(False),
        transformer=random_dit(in_channels=3),
    )
    pipeline.transformer = torch.compile(pipeline.transformer)
    with pytest.raises(ValueError) as error:
        convert.pipeline_to_diffusers(pipeline)
    assert "OptimizedModule" not in str(error.value)


def test_a_bundle_takes_the_place_of_another_and_other_files_stay(tmp_path):
    """Shards, an index and code that the new one doesn't have would be opened first."""
    tiny_pipeline().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / ".git").mkdir()
    for file in (".git/config", "NOTES.md", "transformer/LICENSE"):
        (tmp_path / file).write_text("mine")
    (tmp_path / "paths_0123456789.py").touch()
    other = tiny_pipeline(network=random_dit(seed=1))
    other.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(load_bundle(tmp_path)), draw(other), rtol=0, atol=1e-5)
    names = {path.name for path in (tmp_path / "transformer").iterdir() if path.suffix != ".py"}
    assert names == {"config.json", "LICENSE", WEIGHTS}
    assert not (tmp_path / "paths_0123456789.py").exists() and (tmp_path / ".git" / "config").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.partial"))


def test_a_variant_comes_beside_the_weights_and_a_new_bundle_replaces_both(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    half = tiny_pipeline()
    half.transformer.half()
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    half.save_pretrained(tmp_path, variant="fp16")
    weights = sorted(path.name for path in (tmp_path / "transformer").glob("*model*"))
    assert weights == [WEIGHTS.replace(".s", ".fp16.s"), WEIGHTS]
    torch.testing.assert_close(draw(load_bundle(tmp_path)), draw(pipeline), rtol=0, atol=1e-5)
    assert load_file(tmp_path / "transformer" / weights[0])["proj_out.bias"].dtype == torch.float16
    load_bundle(tmp_path, variant="fp16")
    pipeline.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "transformer").glob("*model*")] == [WEIGHTS]


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_what_is_half_there_does_not_open(tmp_path, monkeypatch, after):
    """Killed between two of the files of the new bundle: nothing opens that is of the one and of the other."""
    tiny_pipeline().save_pretrained(tmp_path)
    moves, move = [], os.replace

    def killed(source, target):
        if len(moves) == after:
            raise KeyboardInterrupt
        moves.append(target)
        move(source, target)

    monkeypatch.setattr(bundling.os, "replace", killed)
    other = tiny_pipeline(network=random_dit(seed=1))
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds no model_index.json"):
        load_bundle(tmp_path)
    other.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(load_bundle(tmp_path)), draw(other), rtol=0, atol=1e-5)
