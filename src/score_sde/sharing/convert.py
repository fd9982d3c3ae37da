"""Other people's checkpoints as pipelines of this package, and ours as stock diffusers pipelines.

    score-sde convert dit DiT-XL-2-256x256.pt converted --vae stabilityai/sd-vae-ft-ema
    score-sde convert score-sde checkpoint_24.pth converted --sde_type ve
    score-sde convert guided-diffusion 256x256_diffusion.pt converted --network ADM-256
    score-sde convert from-diffusers google/ddpm-cifar10-32 converted
    score-sde convert to-diffusers runs/dit/pipeline converted

Every kind of checkpoint has one table, {our key: (their keys, how to combine them)}. A checkpoint whose keys or shapes
are not those of its table is refused, with their names; pickles are read with `weights_only=True` alone.
"""

import argparse
import copy
import itertools
import json
import math
import os
import shutil
import sys

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ..models.transformer_score_dit import DiTModel, sincos_position_embedding
from ..models.unet_score import UNETS, ScoreUNetModel
from ..pipelines import ScoreSDEPipeline
from ..pipelines.bundling import check_token, fetch, plain_component, quoted, shortened
from ..pipelines.latents import shift_and_scale
from ..pipelines.writing import whole_folder, write_json
from ..schedulers.scheduling_score_sde import ScoreSDEScheduler
from .bundle_checks import open_autoencoder, open_stock_pipeline
from .hub import load_bundle, save_bundle
from .model_card import check_license, read_json, write_card


# heads of the published sizes (Peebles & Xie 2023, Table 1), by hidden size: a checkpoint doesn't show them
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# repos in diffusers' format that hold the original's weights, trained with the original's timestep embedding
ORIGINAL_DITS = ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512")
SCORE_SDE_TYPES = ("ve", "vp", "subvp")
# of the weights that the originals' authors released; DiT's is not commercial
LICENSES = {"dit": "cc-by-nc-4.0", "score-sde": "apache-2.0", "guided-diffusion": "mit"}


# --- reading ------------------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """What a .pt, .pth or .safetensors file holds.

    Raises ValueError for a file that is missing, damaged, or would need code to be run.
    """
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {path!r} is not a file")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        # facebookresearch/DiT keeps its command line beside the weights: plain data
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no pickle, anything
        raise ValueError(
            f"{path!r} is no checkpoint that can be read as weights alone (it may be damaged, or hold code, which is "
            f"never run): {shortened(error)}"
        ) from None


def some(names, limit=8):
    """The first names of many, for a message."""
    names = sorted(map(str, names))
    return shortened(", ".join(names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def tensors(state, what):
    """A checkpoint's {name: tensor}. Raises ValueError for anything else, and for tensors that are not all there: empty
    ones, and those of few bytes that repeat themselves to any size."""

    def is_whole(value):
        if not torch.is_tensor(value) or value.layout != torch.strided or value.device.type != "cpu":
            return False
        return 0 < value.numel() * value.element_size() <= value.untyped_storage().nbytes()

    if not isinstance(state, dict) or not state:
        raise ValueError(f"{what}: it holds {quoted(state)}")
    if odd := [name for name, value in state.items() if not (isinstance(name, str) and is_whole(value))]:
        raise ValueError(f"{what}: it holds {some(state)}, of which {some(odd)} is no tensor, or no whole one")
    return dict(state)


def fill(model, table, state, source):
    """Load a checkpoint's tensors into a model by a table {our key: (their keys, function of those tensors)}.

    Raises ValueError, naming the keys, where the checkpoint lacks some, has others, has some of another shape, or holds
    numbers that are not finite.
    """
    expected = {key for keys, _ in table.values() for key in keys}
    problems = []
    if missing := expected - set(state):
        problems.append(f"lacks {some(missing)}")
    if unexpected := set(state) - expected:
        problems.append(f"has the unexpected {some(unexpected)}")
    if not problems:
        bad = [key for key in expected if not torch.isfinite(state[key]).all()]
        problems += [f"holds numbers that are not finite in {some(bad)}"] if bad else []
    if not problems:
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        ours, misshapen = {}, []
        for key, (keys, combine) in table.items():
            theirs = ", ".join(f"{name} {tuple(state[name].shape)}" for name in keys[:2])
            try:
                ours[key] = combine(*[state[name].float() for name in keys])
            except RuntimeError:
                misshapen.append(theirs)
                continue
            if tuple(ours[key].shape) != shapes[key]:
                misshapen.append(f"{theirs} for {key} {shapes[key]}")
        problems += [f"has other shapes: {some(misshapen)}"] if misshapen else []
    if problems:
        raise ValueError(f"{source} doesn't fit {type(model).__name__}: it {'; it '.join(problems)}")
    model.load_state_dict(ours)
    return model.eval()


def same(tensor):
    return tensor


def both(ours, theirs):
    """Table entries of a layer's weight and bias."""
    return {f"{ours}.{name}": ((f"{theirs}.{name}",), same) for name in ("weight", "bias")}


def part(index, count):
    """The function that takes one of equal parts of the rows."""
    return lambda tensor: tensor.chunk(count)[index]


def stacked(*tensors):
    return torch.cat(tensors)


def with_null_row(table):
    """A class table with a row of zeros for the null label, which the network never saw."""
    return torch.cat([table, torch.zeros_like(table[:1])])


# --- Diffusion Transformers ---------------------------------------------------------------------------------------


def original_dit_table(num_layers):
    """facebookresearch/DiT."""
    table = {"patch_embed.weight": (("x_embedder.proj.weight",), lambda weight: weight.flatten(1))}
    table["patch_embed.bias"] = (("x_embedder.proj.bias",), same)
    table |= both("time_embed.0", "t_embedder.mlp.0") | both("time_embed.2", "t_embedder.mlp.2")
    table["class_embed.weight"] = (("y_embedder.embedding_table.weight",), same)
    modulations = [*(f"blocks.{i}.adaLN_modulation.1" for i in range(num_layers)), "final_layer.adaLN_modulation.1"]
    for name in ("weight", "bias"):
        table[f"adaln.{name}"] = (tuple(f"{each}.{name}" for each in modulations), stacked)
        for i in range(num_layers):
            for j, ours in enumerate(("to_q", "to_k", "to_v")):
                table[f"blocks.{i}.attn.{ours}.{name}"] = ((f"blocks.{i}.attn.qkv.{name}",), part(j, 3))
    for i in range(num_layers):
        table |= both(f"blocks.{i}.attn.to_out.0", f"blocks.{i}.attn.proj")
        table |= both(f"blocks.{i}.ff.net.0.proj", f"blocks.{i}.mlp.fc1")
        table |= both(f"blocks.{i}.ff.net.2", f"blocks.{i}.mlp.fc2")
    return table | both("proj_out", "final_layer.linear")


def dit_from_original(path, weights="ema", num_attention_heads=None, num_classes=None):
    """A `DiTModel` from a checkpoint of facebookresearch/DiT, with that implementation's outputs.

    Args:
        path: a released file (the averaged weights alone) or one that its train.py wrote.
        weights: of the latter: "ema" or "model".
        num_attention_heads: needed for hidden sizes that are not published (S, B, L, XL).
        num_classes: needed for a model that was trained without label dropout, whose class table has no null label.

    Raises ValueError for a file that is not such a checkpoint, with what is wrong.
    """
    source = os.path.basename(path)
    state = read_checkpoint(path)
    if weights not in ("ema", "model"):
        raise ValueError(f"weights {weights!r} is unknown; choose ema or model")
    what = f"{source} is no checkpoint of facebookresearch/DiT"
    if isinstance(state, dict) and "x_embedder.proj.weight" not in state and weights in state:
        state = state[weights]
    state = tensors(state, what)
    # their numbers of axes
    needed = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2}
    needed |= {"final_layer.linear.weight": 2}
    if "x_embedder.proj.weight" not in state:
        raise ValueError(f"{what}: it holds {some(state)}")
    if missing := set(needed) - set(state):
        raise ValueError(f"{what}: it lacks {some(missing)}")
    if odd := [f"{key} {tuple(state[key].shape)}" for key, axes in needed.items() if state[key].ndim != axes]:
        raise ValueError(f"{what}: it has other shapes: {some(odd)}")
    projection, positions = state["x_embedder.proj.weight"], state.pop("pos_embed").float()
    hidden_size, channels, patch, _ = projection.shape
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    heads = num_attention_heads or DIT_HEADS.get(hidden_size)
    if heads is None:
        raise ValueError(f"{source} has the hidden size {hidden_size} of no published model: pass num_attention_heads")
    grid = (math.isqrt(positions.shape[1]),) * 2
    expected = sincos_position_embedding(grid, grid, "resize", hidden_size)
    if positions[0].shape != expected.shape or (positions[0] - expected).abs().max() > 1e-4:
        raise ValueError(f"{source}: pos_embed is not the fixed sine-cosine table of the original")
    num_layers = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    dropped = num_classes is None or rows > num_classes
    model = DiTModel(
        sample_size=grid[0] * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_attention_heads=heads,
        num_classes=rows - 1 if num_classes is None else num_classes,
        class_dropout_prob=0.1 if dropped else 0.0,
        learn_sigma=state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
    )
    table = original_dit_table(num_layers)
    if not dropped:
        table["class_embed.weight"] = (("y_embedder.embedding_table.weight",), with_null_row)
    return fill(model, table, state, source)


def diffusers_dit_table(num_layers):
    """diffusers' `DiTTransformer2DModel`, without the embedders of all blocks but the first."""
    table = {"patch_embed.weight": (("pos_embed.proj.weight",), lambda weight: weight.flatten(1))}
    table["patch_embed.bias"] = (("pos_embed.proj.bias",), same)
    embedder = "transformer_blocks.0.norm1.emb"
    table |= both("time_embed.0", f"{embedder}.timestep_embedder.linear_1")
    table |= both("time_embed.2", f"{embedder}.timestep_embedder.linear_2")
    table["class_embed.weight"] = ((f"{embedder}.class_embedder.embedding_table.weight",), same)
    modulations = [*(f"transformer_blocks.{i}.norm1.linear" for i in range(num_layers)), "proj_out_1"]
    for name in ("weight", "bias"):
        table[f"adaln.{name}"] = (tuple(f"{each}.{name}" for each in modulations), stacked)
    for i in range(num_layers):
        for ours in ("to_q", "to_k", "to_v", "to_out.0"):
            table |= both(f"blocks.{i}.attn.{ours}", f"transformer_blocks.{i}.attn1.{ours}")
        for ours in ("ff.net.0.proj", "ff.net.2"):
            table |= both(f"blocks.{i}.{ours}", f"transformer_blocks.{i}.{ours}")
    return table | both("proj_out", "proj_out_2")


def dit_from_diffusers(model, frequency_shift=None):
    """A `DiTModel` from diffusers' `DiTTransformer2DModel`.

    Args:
        model: the model.
        frequency_shift: the convention of the timestep's embedding that the weights were trained with: 0 the
            original's, 1 that of diffusers. None: 0 for the repos `ORIGINAL_DITS`, which hold the original's weights, 1
            for others.

    Raises ValueError for a model with options that `DiTModel` doesn't have, or whose blocks embed time or label
    differently.
    """
    config = model.config
    stock = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
    stock |= {"norm_type": "ada_norm_zero", "dropout": 0.0}
    if other := [f"{key}={config[key]!r}" for key, value in stock.items() if config[key] != value]:
        raise ValueError(f"DiTModel has no {', '.join(other)}")
    state = dict(model.state_dict())
    state.pop("pos_embed.pos_embed", None)  # fixed sines and cosines
    embedder = "transformer_blocks.0.norm1.emb."
    shared = {key.removeprefix(embedder): value for key, value in state.items() if key.startswith(embedder)}
    for i, (name, value) in itertools.product(range(1, config.num_layers), shared.items()):
        key = f"transformer_blocks.{i}.norm1.emb.{name}"
        if not torch.equal(state.pop(key), value):
            raise ValueError(
                f"{key} differs from that of block 0: this model embeds time or label in every block anew, DiTModel "
                f"once for all"
            )
    if frequency_shift is None:
        frequency_shift = 0.0 if str(config.get("_name_or_path", "")).rstrip("/") in ORIGINAL_DITS else 1.0
    hidden_size = config.num_attention_heads * config.attention_head_dim
    ours = DiTModel(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=hidden_size,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_classes=config.num_embeds_ada_norm,
        learn_sigma=model.out_channels == 2 * config.in_channels,
        frequency_shift=frequency_shift,
    )
    return fill(ours, diffusers_dit_table(config.num_layers), state, type(model).__name__)


def dit_to_diffusers(model, num_classes=None):
    """diffusers' `DiTTransformer2DModel` with the weights and the outputs of a `DiTModel`. `num_classes` is that of the
    result: labels beyond the model's own mean the null label.

    Raises ValueError, with every reason, for a model that the stock class cannot be.
    """
    config = model.config
    size = model.trained_grid[0] * model.patch[0]
    needed = {
        "conditioning": "adaln_zero",
        "position_embedding": "sincos",
        "mlp_ratio": 4.0,
        "frequency_shift": 1.0,
        "shared_adaln": False,
        "qk_norm": False,
        "swiglu": False,
        "cross_attention_dim": None,
    }
    reasons = [f"{key} is {config[key]!r}, not {value!r}" for key, value in needed.items() if config[key] != value]
    if len(model.patch) != 2 or len(set(model.patch)) > 1 or len(set(model.trained_grid)) > 1:
        reasons.append(f"samples of size {config.sample_size} in patches of {config.patch_size} are not square")
    if config.num_classes is None:
        reasons.append("it has no classes")
    elif num_classes is not None and config.num_classes > num_classes:
        reasons.append(f"it has {config.num_classes} classes, more than {num_classes}")
    if reasons:
        raise ValueError(f"diffusers' DiTTransformer2DModel cannot be this model: {'; '.join(reasons)}")
    stock = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.hidden_size // config.num_attention_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        sample_size=size,
        patch_size=model.patch[0],
        num_embeds_ada_norm=num_classes or config.num_classes,
        norm_eps=1e-6,
    )
    state, shapes = {}, {key: value.shape for key, value in stock.state_dict().items()}
    ours = dict(model.state_dict())
    null_rows = stock.config.num_embeds_ada_norm - config.num_classes
    ours["class_embed.weight"] = torch.cat([ours["class_embed.weight"], *[ours["class_embed.weight"][-1:]] * null_rows])
    for key, (names, _) in diffusers_dit_table(config.num_layers).items():
        parts = ours[key].split([shapes[name][0] for name in names])
        state |= {name: value.reshape(shapes[name]) for name, value in zip(names, parts, strict=True)}
    for key in shapes:
        if ".norm1.emb." in key:
            state[key] = state[f"transformer_blocks.0.norm1.emb.{key.split('.norm1.emb.')[1]}"]
    stock.load_state_dict(state)
    return stock.eval()


# --- U-Nets -------------------------------------------------------------------------------------------------------


def residual_block(ours, block, theirs, names):
    """Table entries of a residual block; `names` are theirs of norm, conv, time, norm, conv and shortcut."""
    own = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2"]
    own += ["conv_shortcut"] if block.conv_shortcut is not None else []
    found = {}
    for name, their_name in zip(own, names, strict=False):
        found |= both(f"{ours}.{name}", f"{theirs}.{their_name}")
    return found


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
        for i, (block, follows) in enumerate(blocks.blocks()):
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
    if sde_type not in SCORE_SDE_TYPES:
        raise ValueError(f"sde_type {sde_type!r} is unknown; choose one of {', '.join(SCORE_SDE_TYPES)}")
    if weights not in ("ema", "model"):
        raise ValueError(f"weights {weights!r} is unknown; choose ema or model")
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


def halve_score(layers):
    """The score by images in [-1, 1] of a network that gives the score by images in [0, 1]: exact in floating point."""
    with torch.no_grad():
        for parameter in itertools.chain.from_iterable(layer.parameters() for layer in layers):
            parameter /= 2


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
        for i, (block, follows) in enumerate(blocks.blocks()):
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


# --- pipelines ----------------------------------------------------------------------------------------------------


def pipeline_from_original_dit(path, vae=None, **arguments):
    """A `ScoreSDEPipeline` from a checkpoint of facebookresearch/DiT, with its noise path, a linear chain of 1000
    levels, and its learned variance. Takes the arguments of `dit_from_original`; `vae` is the autoencoder, opened."""
    model = dit_from_original(path, **arguments)
    scheduler = ScoreSDEScheduler(
        sde_type="discrete_vp",
        beta_schedule="linear",
        variance_type="learned_range" if model.config.learn_sigma else "fixed_small",
    )
    return ScoreSDEPipeline(scheduler, transformer=model, vae=vae)


def pipeline_from_diffusers(folder_or_repo, frequency_shift=None, **kwargs):
    """A `ScoreSDEPipeline` from a stock pipeline: a DiTPipeline, or one around a UNet2DModel (DDPMPipeline,
    DDIMPipeline, PNDMPipeline, ScoreSdeVePipeline), on its noise path. A UNet2DModel stays what it is.

    Args:
        folder_or_repo: a folder, or a repo on the Hub; nothing but models and schedulers of diffusers is opened, their
            weights as safetensors, and no code of it is run.
        frequency_shift: of a DiTPipeline: see `dit_from_diffusers`.
        kwargs: of `ScoreSDEPipeline.from_pretrained`: no code of the repo is run, and only safetensors are opened.

    Raises ValueError for another kind of pipeline.
    """
    stock = open_stock_pipeline(folder_or_repo, **kwargs)
    overrides = {}
    if isinstance(stock, DiTPipeline):
        if frequency_shift is None and str(folder_or_repo).rstrip("/") in ORIGINAL_DITS:
            frequency_shift = 0.0
        model = dit_from_diffusers(stock.transformer, frequency_shift)
        if model.config.learn_sigma:
            overrides["variance_type"] = "learned_range"
        # every synonym is a name of its own there
        id2label = {}
        for name, label in stock.labels.items():
            id2label[label] = f"{id2label[label]}, {name}" if label in id2label else name
        components = {"transformer": model, "vae": stock.vae, "id2label": id2label or None}
    elif isinstance(getattr(stock, "unet", None), UNet2DModel):
        if stock.unet.config.center_input_sample:
            overrides = center(stock.unet, stock.scheduler.config)
        components = {"unet": stock.unet, "vae": getattr(stock, "vqvae", None)}
    else:
        raise ValueError(f"the network of {folder_or_repo!r} is a {type(stock.unet).__name__}, not a UNet2DModel")
    scheduler = ScoreSDEScheduler.from_config(stock.scheduler.config, **overrides)
    return ScoreSDEPipeline(scheduler, **components)


def published_license(folder_or_repo):
    """The licence on the card of a folder, or of a repo on the Hub; None where there is none to be found."""
    if str(folder_or_repo).rstrip("/") in ORIGINAL_DITS:
        return LICENSES["dit"]
    card = os.path.join(folder_or_repo, "README.md") if os.path.isdir(folder_or_repo) else folder_or_repo
    check_token()
    try:
        license = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except Exception:  # the client has no common class of errors
        return None
    return license if isinstance(license, str) else None


def center(unet, config):
    """Let a UNet2DModel that was trained by a ScoreSdeVeScheduler on images in [0, 1] see images in [-1, 1]; return
    what changes in the scheduler: the noise counts twice, and the output half."""
    if "sampling_eps" not in config:
        raise ValueError("center_input_sample is only understood together with a ScoreSdeVeScheduler")
    unet.register_to_config(center_input_sample=False)
    halve_score([unet.conv_out])
    return {"sigma_min": 2 * config["sigma_min"], "sigma_max": 2 * config["sigma_max"], "time_scale": 0.5}


def pipeline_to_diffusers(pipeline):
    """The stock `DiTPipeline` with the network, autoencoder and noise path of a `ScoreSDEPipeline`. It samples with
    diffusers' `DDIMScheduler`, or any other of that path. Labels up to 1000, which is the null label in that pipeline,
    are filled up by it.

    Raises ValueError, with every reason, for a pipeline that it cannot be.
    """
    config, stock, reasons = pipeline.scheduler.config, None, []
    network, vae = plain_component(pipeline.denoiser), plain_component(pipeline.vae)
    if isinstance(network, DiTModel):
        try:
            stock = dit_to_diffusers(network, num_classes=1000)
        except ValueError as error:
            reasons.append(str(error))
    else:
        reasons.append(f"its network is a {type(network).__name__}, not a DiTModel")
    if vae is None:
        reasons.append("it has no autoencoder")
    elif not plain_statistics(vae) and None in (getattr(vae, name, None) for name in ("quant_conv", "post_quant_conv")):
        reasons.append(f"its {type(vae).__name__} shifts or scales latents for each channel, which DiTPipeline doesn't")
    if config.sde_type != "discrete_vp":
        reasons.append(f"its noise path {config.sde_type} is not the discrete_vp of diffusers' schedulers")
    if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        reasons.append(f"diffusers has no prediction type {config.prediction_type}")
    if reasons:
        raise ValueError(f"this pipeline cannot be a stock DiTPipeline: {'; '.join(reasons)}")
    betas = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    scheduler = DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        **{key: config[key] for key in betas if config[key] is not None},
        prediction_type=config.prediction_type,
        clip_sample=config.clip_sample,
        clip_sample_range=config.clip_sample_range,
    )
    names = pipeline.config.id2label
    id2label = {int(label): name for label, name in names.items()} if names else None
    vae = vae if plain_statistics(vae) else with_plain_statistics(vae)
    stock_pipeline = DiTPipeline(transformer=stock, vae=vae, scheduler=scheduler, id2label=id2label)
    # as in the published repos; the class itself doesn't save it
    stock_pipeline.register_to_config(id2label=names or None)
    return stock_pipeline


def export_to_diffusers(pipeline_or_folder, folder):
    """Write a `ScoreSDEPipeline` as a folder that plain diffusers opens, with no code of ours: see
    `pipeline_to_diffusers`. Its card carries the licence, the repo that the weights are from, and what was measured.

    Args:
        pipeline_or_folder: a pipeline; or a bundle, a folder or a repo on the Hub, whose facts and figures go along.
        folder: where to write; it must not exist, or be empty.

    Returns:
        The folder, absolute. Raises ValueError, with every reason, for a pipeline that stock diffusers cannot be, and
        for a folder that holds something.
    """
    folder, pipeline, bundle = check_output(folder), pipeline_or_folder, None
    if not isinstance(pipeline, ScoreSDEPipeline):
        bundle, _ = fetch(pipeline_or_folder)
        pipeline = load_bundle(bundle)
    with whole_folder(folder) as partial:
        pipeline_to_diffusers(pipeline).save_pretrained(partial)
        for name in ("training.json", "metrics.json", "samples.png") if bundle else ():
            if os.path.isfile(os.path.join(bundle, name)):
                shutil.copyfile(os.path.join(bundle, name), os.path.join(partial, name))
        if bundle and not os.path.isdir(pipeline_or_folder):
            facts = os.path.join(partial, "training.json")
            write_json(facts, (read_json(facts) or {}) | {"base_model": pipeline_or_folder})
        write_card(partial, name=os.path.basename(folder))
    return folder


def check_output(folder):
    """The absolute path of a folder that can be written. Raises ValueError for one that holds something."""
    folder = os.path.abspath(folder)
    if os.path.isfile(folder) or os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"output {folder!r} exists: choose another folder, or remove it")
    return folder


def plain_statistics(vae):
    """Whether an autoencoder's latents are normalised by scaling_factor alone, as stock pipelines do it."""
    shift, scale = shift_and_scale(vae.config, torch.zeros(1, 1))
    return not shift.any() and bool((scale == vae.config.scaling_factor).all())


def with_plain_statistics(vae):
    """A copy of an `AutoencoderKL` whose latents are the normalised ones themselves (scaling_factor 1): the
    normalisation becomes part of its 1x1 convolutions around the latents."""
    vae = copy.deepcopy(vae)
    channels = vae.config.latent_channels
    shift, scale = (x.expand(1, channels)[0] for x in shift_and_scale(vae.config, torch.zeros(1, 1)))
    with torch.no_grad():
        after, before = vae.post_quant_conv, vae.quant_conv
        after.bias += after.weight.flatten(1) @ shift
        after.weight /= scale[:, None, None]
        # the first half of the rows is the mean, the second the logarithm of the variance
        before.bias[:channels] -= shift
        before.bias[:channels] *= scale
        before.weight[:channels] *= scale[:, None, None, None]
        before.bias[channels:] += 2 * scale.abs().log()
    vae.register_to_config(latents_mean=None, latents_std=None, shift_factor=None, scaling_factor=1.0)
    return vae


# --- the command --------------------------------------------------------------------------------------------------


def parser_of_command():
    parser = argparse.ArgumentParser(
        "score-sde convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def add(kind, help, source):
        command = kinds.add_parser(kind, help=help, description=help)
        command.add_argument("source", help=source)
        command.add_argument("output", help="the folder that is written; it must not exist, or be empty")
        if kind != "to-diffusers":
            license = f"(default: {LICENSES[kind]}, the released weights')" if kind in LICENSES else ""
            command.add_argument("--license", default=LICENSES.get(kind), help=f"licence of the weights {license}")
        return command

    def add_network(command, required):
        command.add_argument("--network", required=required, choices=list(UNETS), help="the published network")
        command.add_argument("--network_kwargs", default="{}", help="arguments of the network that differ, JSON")

    command = add("dit", "a checkpoint of facebookresearch/DiT", "the .pt file")
    command.add_argument("--vae", help="folder or repo of the autoencoder; without, a model of pixels")
    command.add_argument("--weights", default="ema", choices=("ema", "model"))
    command.add_argument("--num_attention_heads", type=int, help="for hidden sizes that are not published")
    command.add_argument("--num_classes", type=int, help="for a model that was trained without label dropout")

    command = add("score-sde", "a checkpoint of score_sde_pytorch, with continuous times", "the .pth file")
    command.add_argument("--sde_type", required=True, choices=SCORE_SDE_TYPES)
    command.add_argument("--weights", default="ema", choices=("ema", "model"))
    command.add_argument("--centered", type=int, choices=(0, 1), help="1: it saw images in [-1, 1], 0: in [0, 1]")
    add_network(command, required=False)

    command = add("guided-diffusion", "a checkpoint of openai/guided-diffusion", "the .pt file")
    command.add_argument("--beta_schedule", choices=("linear", "squaredcos_cap_v2"))
    add_network(command, required=True)

    command = add("from-diffusers", "a DiTPipeline, or a pipeline around a UNet2DModel", "folder or repo")
    command.add_argument("--frequency_shift", type=float, choices=(0.0, 1.0), help="see dit_from_diffusers")

    add("to-diffusers", "a pipeline of this package with a DiT as a stock DiTPipeline", "folder or repo")
    return parser


def main(argv=None):
    parser = parser_of_command()
    options = vars(parser.parse_args(argv))
    kind, source, output = (options.pop(name) for name in ("kind", "source", "output"))
    license = options.pop("license", None)
    try:
        if license is None and kind == "from-diffusers":
            license = published_license(source)
        check_license(license)
        output = check_output(output)
        network_kwargs = json.loads(options.pop("network_kwargs", "{}"))
        if not isinstance(network_kwargs, dict):
            raise ValueError(f"network_kwargs {quoted(network_kwargs)} must be a JSON object")
        if kind == "dit":
            vae = options.pop("vae")
            vae = None if vae is None else open_autoencoder(vae)
            pipeline = pipeline_from_original_dit(source, vae, **options)
        elif kind == "score-sde":
            centered = options.pop("centered")
            options["centered"] = None if centered is None else bool(centered)
            model, scheduler = unet_from_score_sde(source, **options, **network_kwargs)
            pipeline = ScoreSDEPipeline(scheduler, unet=model)
        elif kind == "guided-diffusion":
            model, scheduler = unet_from_guided_diffusion(source, **options, **network_kwargs)
            pipeline = ScoreSDEPipeline(scheduler, unet=model)
        elif kind == "from-diffusers":
            pipeline = pipeline_from_diffusers(source, **options)
        else:
            export_to_diffusers(source, output)
    except (TypeError, ValueError, OSError) as error:  # TypeError: an argument that the network doesn't have
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    if kind != "to-diffusers":
        name = os.path.splitext(os.path.basename(source.rstrip("/")))[0]
        facts = {"model_name": name, "license": license, "converted_from": os.path.basename(source)}
        if kind == "from-diffusers" and not os.path.isdir(source):
            facts["base_model"] = source
        save_bundle(pipeline, output, facts=facts)
    print(f"pipeline: {output}")


if __name__ == "__main__":
    main()
