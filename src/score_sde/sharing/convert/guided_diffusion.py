"""Checkpoints of openai/guided-diffusion (Dhariwal & Nichol 2021)."""

import itertools
import os

from ...models.unet_score import ScoreUNetModel
from ...pipelines import ScoreSDEPipeline
from ...schedulers.scheduling_score_sde import ScoreSDEScheduler
from .checkpoints import both, fill, read_checkpoint, residual_block, same, tensors, with_null_row


# of the weights that the authors released
LICENSE = "mit"


def guided_diffusion_table(model, new_attention_order):
    """ADM of openai/guided-diffusion."""
    table = both("time_embed.0", "time_embed.0") | both("time_embed.2", "time_embed.2")
    if model.class_embed is not None:
        table["class_embed.weight"] = (("label_emb.weight",), with_null_row)
    table |= both("conv_in", "input_blocks.0.0")
    names = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")

    def resnet(ours, block, theirs):
        table.update(residual_block(ours, block, theirs, names))

    def rows_of(kind, heads):
        def take(rows):
            # (heads, 3, channels of a head) rows of the older order, (3, heads, ...) of the newer
            rows = rows.reshape(*((3, heads) if new_attention_order else (heads, 3)), -1, *rows.shape[1:2])
            return (rows[kind] if new_attention_order else rows[:, kind]).flatten(0, 1)

        return take

    def attention(ours, block, theirs):
        table.update(both(f"{ours}.group_norm", f"{theirs}.norm"))
        for kind, name in enumerate(("to_q", "to_k", "to_v")):
            take = rows_of(kind, block.heads)
            table[f"{ours}.{name}.weight"] = ((f"{theirs}.qkv.weight",), take)
            table[f"{ours}.{name}.bias"] = ((f"{theirs}.qkv.bias",), take)
        table[f"{ours}.to_out.0.weight"] = ((f"{theirs}.proj_out.weight",), lambda weight: weight.flatten(1))
        table[f"{ours}.to_out.0.bias"] = ((f"{theirs}.proj_out.bias",), same)

    def level(ours, blocks, numbers, theirs):
        for i, (block, follows, *_) in enumerate(blocks.blocks()):
            number = next(numbers)
            resnet(f"{ours}.resnets.{i}", block, f"{theirs}.{number}.0")
            if follows is not None:
                attention(f"{ours}.attentions.{i}", follows, f"{theirs}.{number}.1")
        return number

    numbers = itertools.count(1)
    for i, blocks in enumerate(model.down_blocks):
        level(f"down_blocks.{i}", blocks, numbers, "input_blocks")
        if blocks.resample is not None:
            resnet(f"down_blocks.{i}.resample", blocks.resample, f"input_blocks.{next(numbers)}.0")
    resnet("mid_block.resnets.0", model.mid_block.resnets[0], "middle_block.0")
    attention("mid_block.attentions.0", model.mid_block.attentions[0], "middle_block.1")
    resnet("mid_block.resnets.1", model.mid_block.resnets[1], "middle_block.2")
    numbers = itertools.count()
    for i, blocks in enumerate(model.up_blocks):
        number = level(f"up_blocks.{i}", blocks, numbers, "output_blocks")
        if blocks.resample is not None:
            place = 2 if len(blocks.attentions) else 1
            resnet(f"up_blocks.{i}.resample", blocks.resample, f"output_blocks.{number}.{place}")
    return table | both("norm_out", "out.0") | both("conv_out", "out.2")


def unet_from_guided_diffusion(path, network, new_attention_order=None, beta_schedule=None, **network_kwargs):
    """A `ScoreUNetModel` and its `ScoreSDEScheduler` from a checkpoint of openai/guided-diffusion.

    Args:
        path: a released file, or one of its ema_*.pt or model*.pt.
        network: "ADM-64", "ADM-128", "ADM-256" or "ADM-512"; `network_kwargs` are arguments that differ, such as
            num_classes=None for the unconditional models.
        new_attention_order: the option of that name; None for the published model's.
        beta_schedule: "linear" or "squaredcos_cap_v2" (the cosine schedule); None for the published model's.

    Returns:
        (model, scheduler). A class-conditional model never saw a null label: it needs labels, and is guided by a
        classifier. Raises ValueError for a file that is not such a checkpoint, with what is wrong.
    """
    published_64 = network == "ADM-64"
    if new_attention_order is None:
        new_attention_order = published_64
    if beta_schedule is None:
        beta_schedule = "squaredcos_cap_v2" if published_64 else "linear"
    state = tensors(read_checkpoint(path), f"{os.path.basename(path)} is no checkpoint of guided-diffusion")
    model = ScoreUNetModel.from_name(network, **({"class_dropout_prob": 0.0} | network_kwargs))
    model = fill(model, guided_diffusion_table(model, new_attention_order), state, os.path.basename(path))
    scheduler = ScoreSDEScheduler(
        sde_type="discrete_vp",
        beta_schedule=beta_schedule,
        variance_type="learned_range" if model.config.learn_sigma else "fixed_small",
    )
    return model, scheduler


def pipeline_from_guided_diffusion(path, network, **arguments):
    """A `ScoreSDEPipeline` from a checkpoint of guided-diffusion, by the arguments of `unet_from_guided_diffusion`."""
    model, scheduler = unet_from_guided_diffusion(path, network, **arguments)
    return ScoreSDEPipeline(scheduler, unet=model)
