"""Pipelines of this package as stock diffusers pipelines, which plain diffusers opens with no code of ours."""

import copy
import os
import shutil

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from ...models.transformer_score_dit import DiTModel
from ...pipelines import ScoreSDEPipeline
from ...pipelines.bundling import plain_component
from ...pipelines.latents import normalises_itself, shift_and_scale
from ...pipelines.writing import whole_folder, write_json
from ...schedulers.scheduling_score_sde import ScoreSDEScheduler
from ..bundles import load_bundle
from ..downloading import fetch
from ..facts import read_json
from ..model_card import write_card
from .checkpoints import check_output
from .from_diffusers import diffusers_dit_table


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
        "condition_channels": None,
        "two_times": False,
        "guidance_embeds": False,
        "folded_guidance": None,
        "head_hidden_size": None,
        "patch_bottleneck": None,
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


def pipeline_to_diffusers(pipeline):
    """The stock `DiTPipeline` with the network, autoencoder and noise path of a `ScoreSDEPipeline`. It samples with
    diffusers' `DDIMScheduler`, or any other of that path. Labels up to 1000, which is the null label in that pipeline,
    are filled up by it.

    Raises ValueError, with every reason, for a pipeline that it cannot be.
    """
    if not isinstance(pipeline, ScoreSDEPipeline) or not isinstance(pipeline.scheduler, ScoreSDEScheduler):
        raise ValueError(
            f"a {type(pipeline).__name__} with a {type(pipeline.scheduler).__name__} cannot be a stock DiTPipeline: "
            f"a ScoreSDEPipeline with a ScoreSDEScheduler can"
        )
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
    elif normalises_itself(vae.config):
        reasons.append(f"its {type(vae).__name__} gives images in [0, 1], and DiTPipeline takes them for [-1, 1]")
    elif not plain_statistics(vae) and None in (getattr(vae, name, None) for name in ("quant_conv", "post_quant_conv")):
        reasons.append(f"its {type(vae).__name__} shifts or scales latents for each channel, which DiTPipeline doesn't")
    if config.sde_type != "discrete_vp":
        reasons.append(f"its noise path {config.sde_type} is not the discrete_vp of diffusers' schedulers")
    if config.network_map is not None:
        reasons.append(f"its network is a {config.network_map} model, which DDIMScheduler cannot sample")
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
    if isinstance(pipeline, (str, os.PathLike)):
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
