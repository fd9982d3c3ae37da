"""Stock diffusers pipelines as pipelines of this package."""

import itertools
import os

import torch
from diffusers import DiTPipeline, UNet2DModel
from huggingface_hub import ModelCard

from ...models.transformer_score_dit import DiTModel
from ...pipelines import ScoreSDEPipeline
from ...schedulers.scheduling_score_sde import ScoreSDEScheduler
from ..downloading import check_token
from ..opening import open_stock_pipeline
from . import original_dit
from .checkpoints import both, fill, halve_score, same, stacked
from .original_dit import ORIGINAL_DITS


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


def pipeline_from_diffusers(folder_or_repo, frequency_shift=None, **kwargs):
    """A `ScoreSDEPipeline` from a stock pipeline: a DiTPipeline, or one around a UNet2DModel (DDPMPipeline,
    DDIMPipeline, PNDMPipeline, ScoreSdeVePipeline, ConsistencyModelPipeline), on its noise path. A UNet2DModel stays
    what it is.

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
        return original_dit.LICENSE
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
