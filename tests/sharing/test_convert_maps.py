"""Consistency models of Song et al. 2023 as bundles: the images of diffusers' pipeline, and the released files."""

import pytest
import torch
from commands import score_sde
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from networks import awake
from tiny import seeded

from score_sde import ScoreUNetModel, load_bundle
from score_sde.sharing import convert


# as diffusers' script that converts the released ones configures them
CONFIG = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "attention_head_dim": 8,
    "num_class_embeds": 4,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 32,
}
# the same of ScoreUNetModel
OURS = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "attention_resolutions": [4],
    "attention_head_dim": 8,
    "num_classes": 4,
}


def stock_pipeline(scale_shift, num_train_timesteps=40):
    torch.manual_seed(0)
    unet = UNet2DModel(**CONFIG, resnet_time_scale_shift="scale_shift" if scale_shift else "default")
    pipe = ConsistencyModelPipeline(awake(unet), CMStochasticIterativeScheduler(num_train_timesteps))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_images(stock, ours):
    ours.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 3, 8, 8, generator=seeded(3))
    for steps in (1, 2, 3):
        expected, found = (
            pipe(
                2,
                class_labels=[1, 3],
                num_inference_steps=steps,
                latents=latents,
                generator=seeded(4),
                output_type="pt",
            ).images
            for pipe in (stock, ours)
        )
        assert expected.std() > 0.05 and (expected - found).abs().max() < 2e-4
    # as often as the stock pipeline by default
    assert ours(class_labels=[1], output_type="pt").nfe == 1


def test_a_pipeline_of_diffusers_draws_the_same(tmp_path):
    stock = stock_pipeline(scale_shift=True)
    stock.save_pretrained(tmp_path / "stock")
    assert score_sde("convert", "from-diffusers", str(tmp_path / "stock"), str(tmp_path / "ours")) == 0
    assert_same_images(stock, load_bundle(tmp_path / "ours"))


def original_state(unet):
    """The weights of a UNet2DModel as openai/consistency_models names and stacks them."""
    state, found = unet.state_dict(), {}

    def both(theirs, ours):
        found.update({f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")})

    def resnet(theirs, ours):
        names = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
        for name, own in zip(names, ("norm1", "conv1", "time_emb_proj", "norm2", "conv2"), strict=True):
            both(f"{theirs}.{name}", f"{ours}.{own}")
        if f"{ours}.conv_shortcut.weight" in state:
            both(f"{theirs}.skip_connection", f"{ours}.conv_shortcut")

    def attention(theirs, ours):
        both(f"{theirs}.norm", f"{ours}.group_norm")
        for part in ("weight", "bias"):
            rows = torch.cat([state[f"{ours}.to_{each}.{part}"] for each in "qkv"])
            found[f"{theirs}.qkv.{part}"] = rows[..., None] if part == "weight" else rows
            out = state[f"{ours}.to_out.0.{part}"]
            found[f"{theirs}.proj_out.{part}"] = out[..., None] if part == "weight" else out

    both("time_embed.0", "time_embedding.linear_1")
    both("time_embed.2", "time_embedding.linear_2")
    found["label_emb.weight"] = state["class_embedding.weight"]
    both("input_blocks.0.0", "conv_in")
    resnet("input_blocks.1.0", "down_blocks.0.resnets.0")
    resnet("input_blocks.2.0", "down_blocks.0.downsamplers.0")
    resnet("input_blocks.3.0", "down_blocks.1.resnets.0")
    attention("input_blocks.3.1", "down_blocks.1.attentions.0")
    resnet("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    for i in range(2):
        resnet(f"output_blocks.{i}.0", f"up_blocks.0.resnets.{i}")
        attention(f"output_blocks.{i}.1", f"up_blocks.0.attentions.{i}")
        resnet(f"output_blocks.{2 + i}.0", f"up_blocks.1.resnets.{i}")
    resnet("output_blocks.1.2", "up_blocks.0.upsamplers.0")
    both("out.0", "conv_norm_out")
    both("out.2", "conv_out")
    assert sum(each.numel() for each in found.values()) == sum(each.numel() for each in state.values())
    return found


@pytest.mark.parametrize(("network", "scale_shift"), [("imagenet64", True), ("lsun256", False)])
def test_a_released_file_draws_what_diffusers_makes_of_it(network, scale_shift, tmp_path):
    stock = stock_pipeline(scale_shift, num_train_timesteps=151)
    torch.save(original_state(stock.unet), tmp_path / "ct.pt")
    folder = convert.convert(
        "consistency-models",
        str(tmp_path / "ct.pt"),
        tmp_path / "ours",
        network=network,
        num_train_timesteps=151,
        **OURS,
    )
    ours = load_bundle(folder)
    assert isinstance(ours.unet, ScoreUNetModel) and "license: mit" in (tmp_path / "ours" / "README.md").read_text()
    assert_same_images(stock, ours)


def test_another_file_is_refused_by_name(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    path, output = str(tmp_path / "other.pt"), str(tmp_path / "out")
    with pytest.raises(ValueError, match="other.pt doesn't fit ScoreUNetModel: it lacks"):
        convert.pipeline_from_consistency_models(path, "imagenet64", **OURS)
    with pytest.raises(ValueError, match="network 'cifar' is unknown; choose one of imagenet64, lsun256"):
        convert.pipeline_from_consistency_models(path, "cifar")
    assert score_sde("convert", "consistency-models", path, output, "--network", "cifar") == 2
