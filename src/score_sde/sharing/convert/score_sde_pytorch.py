"""Checkpoints of yang-song/score_sde_pytorch, trained with continuous times (Song et al. 2021)."""

import itertools
import os

import torch

from ...models.unet_score import UNETS, ScoreUNetModel
from ...pipelines import ScoreSDEPipeline
from ...pipelines.wording import check_choice, quoted
from ...schedulers.scheduling_score_sde import ScoreSDEScheduler
from .checkpoints import both, fill, halve_score, read_checkpoint, residual_block, same, some, tensors


# of the weights that the authors released
LICENSE = "apache-2.0"
SCORE_SDE_TYPES = ("ve", "vp", "subvp")


def original_unet_table(model):
    """NCSN++ and DDPM++ of score_sde_pytorch, whose modules stand in one list in the order of the forward pass."""
    numbers = itertools.count()
    table = {}

    def following():
        return f"all_modules.{next(numbers)}"

    def resnet(ours, block):
        names = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2")
        table.update(residual_block(ours, block, following(), names))

    def attention(ours):
        theirs = following()
        table.update(both(f"{ours}.group_norm", f"{theirs}.GroupNorm_0"))
        for i, name in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
            table[f"{ours}.{name}.weight"] = ((f"{theirs}.NIN_{i}.W",), lambda weight: weight.T)
            table[f"{ours}.{name}.bias"] = ((f"{theirs}.NIN_{i}.b",), same)

    def level(ours, blocks):
        for i, (block, follows, *_) in enumerate(blocks.blocks()):
            resnet(f"{ours}.resnets.{i}", block)
            if follows is not None:
                attention(f"{ours}.attentions.{list(blocks.attentions).index(follows)}")

    if model.fourier is not None:
        table["fourier.weight"] = ((f"{following()}.W",), same)
    for name in ("time_embed.0", "time_embed.2", "conv_in"):
        table |= both(name, following())
    for i, blocks in enumerate(model.down_blocks):
        ours = f"down_blocks.{i}"
        level(ours, blocks)
        if blocks.resample is not None:
            resnet(f"{ours}.resample", blocks.resample)
        if blocks.progressive is not None:
            theirs = following()
            if model.config.progressive_input == "input_skip":
                table |= both(f"{ours}.progressive.conv", f"{theirs}.Conv_0")
            else:
                name = "Conv2d_0" if model.config.fir else "Conv_0"
                table |= both(f"{ours}.progressive.downsample.1", f"{theirs}.{name}")
    resnet("mid_block.resnets.0", model.mid_block.resnets[0])
    attention("mid_block.attentions.0")
    resnet("mid_block.resnets.1", model.mid_block.resnets[1])
    for i, blocks in enumerate(model.up_blocks):
        ours = f"up_blocks.{i}"
        level(ours, blocks)
        if blocks.progressive is not None:
            table |= both(f"{ours}.progressive.0", following()) | both(f"{ours}.progressive.2", following())
        if blocks.resample is not None:
            resnet(f"{ours}.resample", blocks.resample)
    return table | both("norm_out", following()) | both("conv_out", following())


def output_layers(model):
    """The layers whose sum is the output of a `ScoreUNetModel`."""
    return [blocks.progressive[-1] for blocks in model.up_blocks if blocks.progressive is not None] + [model.conv_out]


def unet_of(build, make_table, state, source, name, network_kwargs):
    """The published network that a checkpoint fits, or the one that is named."""
    if name is not None:
        model = build(name, **network_kwargs)
        return fill(model, make_table(model), state, source)
    with torch.device("meta"):
        tables = {name: make_table(build(name, **network_kwargs)) for name in UNETS}
    fitting = [name for name, table in tables.items() if {k for keys, _ in table.values() for k in keys} == set(state)]
    for name in fitting:
        model = build(name, **network_kwargs)
        table = make_table(model)
        try:
            return fill(model, table, state, source)
        except ValueError:
            if name == fitting[-1]:
                raise
    raise ValueError(
        f"{source} fits none of the published networks {', '.join(UNETS)}: pass a network and its arguments"
    )


def unet_from_score_sde(path, sde_type, network=None, weights="ema", centered=None, **network_kwargs):
    """A `ScoreUNetModel` and its `ScoreSDEScheduler` from a checkpoint of score_sde_pytorch, trained with continuous
    times.

    Args:
        path: a checkpoint_N.pth.
        sde_type: "ve", "vp" or "subvp", with the paper's constants.
        network: a name of `ScoreUNetModel.from_name`; None finds the one that fits.
        weights: "ema" or "model".
        centered: whether it saw images in [-1, 1], as all of vp and subvp did; those of ve saw [0, 1], the default
            there. Here images lie in [-1, 1] always: the noise of such a checkpoint counts twice, and its output half.
        network_kwargs: arguments of the network that differ.

    Returns:
        (model, scheduler). Raises ValueError for a file that is not such a checkpoint, with what is wrong.
    """
    check_choice("sde_type", sde_type, SCORE_SDE_TYPES)
    check_choice("weights", weights, ("ema", "model"))
    centered = sde_type != "ve" if centered is None else centered
    source = os.path.basename(path)
    checkpoint = read_checkpoint(path)
    what = f"{source} is no checkpoint of score_sde_pytorch"
    if not isinstance(checkpoint, dict) or "model" not in checkpoint or "ema" not in checkpoint:
        raise ValueError(f"{what}: it holds {some(checkpoint) if isinstance(checkpoint, dict) else quoted(checkpoint)}")
    state = {key.removeprefix("module."): value for key, value in tensors(checkpoint["model"], what).items()}
    sigmas = state.pop("sigmas", None)
    if weights == "ema":
        # in the order of the parameters that were trained: all but the Fourier frequencies
        trained = [key for key in state if not (key == "all_modules.0.W" and state[key].ndim == 1)]
        averaged = checkpoint["ema"].get("shadow_params") if isinstance(checkpoint["ema"], dict) else None
        if not isinstance(averaged, list) or not all(map(torch.is_tensor, averaged)):
            raise ValueError(f"{what}: its averaged weights, shadow_params in ema, are no list of tensors")
        if len(averaged) != len(trained):
            raise ValueError(f"{source} has {len(averaged)} averaged tensors for {len(trained)} parameters")
        misshapen = [key for key, value in zip(trained, averaged, strict=True) if state[key].shape != value.shape]
        if misshapen:
            raise ValueError(f"{source}: the averaged weights have other shapes: {some(misshapen)}")
        state |= dict(zip(trained, averaged, strict=True))

    model = unet_of(ScoreUNetModel.from_name, original_unet_table, state, source, network, network_kwargs)
    if sde_type != "ve":
        return model, ScoreSDEScheduler(sde_type=sde_type, time_scale=999.0)
    if not model.config.scale_by_sigma:
        raise ValueError(f"{source} doesn't divide its output by sigma, as the published models of ve do")
    noise = {"sigma_min": 0.01, "sigma_max": 50.0}
    if sigmas is not None:
        noise = {"sigma_min": float(sigmas.min()), "sigma_max": float(sigmas.max())}
    if not centered:
        halve_score(output_layers(model))
        noise = {key: 2 * value for key, value in noise.items()}
    scheduler = ScoreSDEScheduler(
        sde_type="ve",
        prediction_type="score",
        time_input="sigma",
        time_scale=1.0 if centered else 0.5,
        **noise,
    )
    return model, scheduler


def pipeline_from_score_sde(path, sde_type, **arguments):
    """A `ScoreSDEPipeline` from a checkpoint of score_sde_pytorch; takes the arguments of `unet_from_score_sde`."""
    model, scheduler = unet_from_score_sde(path, sde_type, **arguments)
    return ScoreSDEPipeline(scheduler, unet=model)
