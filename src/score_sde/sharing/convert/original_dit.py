"""Checkpoints of facebookresearch/DiT (Peebles & Xie 2023)."""

import math
import os

from ...models.transformer_score_dit import DiTModel, sincos_position_embedding
from ...pipelines import ScoreSDEPipeline
from ...pipelines.wording import check_choice
from ...schedulers.scheduling_score_sde import ScoreSDEScheduler
from .checkpoints import both, fill, part, read_checkpoint, same, some, stacked, tensors, with_null_row


# of the weights that the authors released: not commercial
LICENSE = "cc-by-nc-4.0"
# heads of the published sizes (Table 1), by hidden size: a checkpoint doesn't show them
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# repos in diffusers' format that hold the original's weights, trained with the original's timestep embedding
ORIGINAL_DITS = ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512")


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
    check_choice("weights", weights, ("ema", "model"))
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
