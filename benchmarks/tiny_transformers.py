"""Tiny random components of the pipelines with transformers, for `stock_pipelines.py`: by class, and by pipeline.

Where a language model reads the prompt, its embeddings are given instead of it, so that no such model is built.
"""

import diffusers
import torch
import transformers
from tiny_cases import Case, mask, picture, video

from score_sde.schedulers.stock_configs import REFUSED


# one character, one token
CHARACTERS = [chr(code) for code in range(33, 127)]
TEXT = 32  # width of all embeddings


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((each, -2.0) for each in CHARACTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


def t5_config(**changes):
    sizes = {"d_model": TEXT, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 200}
    return transformers.T5Config(**(sizes | changes))


def flow(**changes):
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | changes))


def make(name, **config):
    """A function that makes a model of this class."""
    return lambda: getattr(diffusers, name)(**config)


def noise(*shape, seed=0, scale=1.0):
    """A function that draws a tensor."""
    return lambda: scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape, dtype=torch.long):
    return lambda: torch.ones(shape, dtype=dtype)


NO_TEXT = {
    f"{part}{number}": None
    for part in ("text_encoder", "tokenizer", "processor", "text_processor")
    for number in ("", "_2", "_3", "_4")
}
# of the arguments for embeddings, and for their masks
EMBEDDED = {
    "prompt_embeds": noise(1, 8, TEXT, seed=1),
    "negative_prompt_embeds": noise(1, 8, TEXT, seed=2),
    "pooled_prompt_embeds": noise(1, TEXT, seed=3),
    "negative_pooled_prompt_embeds": noise(1, TEXT, seed=4),
    "prompt_embeds_2": noise(1, 8, TEXT, seed=5),
    "negative_prompt_embeds_2": noise(1, 8, TEXT, seed=6),
    **{
        f"{sign}{name}{number}": ones(1, 8)
        for sign in ("", "negative_")
        for name in ("prompt_attention_mask", "prompt_embeds_mask")
        for number in ("", "_2")
    },
}


def embedded(*names, components=None, without=(), **call):
    """The case of a pipeline that is given these embeddings instead of a prompt; a mask's name stands also for the
    negative prompt's."""
    both = [*names, *(f"negative_{name}" for name in names if not name.startswith("negative"))]
    call = {name: EMBEDDED[name] for name in both} | call
    return Case(components=NO_TEXT | (components or {}), call=call, without=("prompt", "negative_prompt", *without))


def only(*names, components=None, without=(), **call):
    """`embedded` of a pipeline that takes no negative prompt."""
    call = {name: EMBEDDED[name] for name in names} | call
    return Case(components=NO_TEXT | (components or {}), call=call, without=("prompt", *without))


def vae(**changes):
    """Pictures to half their size."""
    config = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 32,
        "shift_factor": 0.1,
        "scaling_factor": 0.5,
    }
    return make("AutoencoderKL", **(config | changes))


WAN_VAE = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WAN_VAE |= {"temperal_downsample": [False, True, True]}


def flux(**changes):
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": TEXT,
        "axes_dims_rope": (4, 4, 8),
    }
    return make("FluxTransformer2DModel", **(config | changes))


def flux_2(**changes):
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return make("Flux2Transformer2DModel", **(config | changes))


SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": TEXT,
    "pooled_projection_dim": 2 * TEXT,
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (8, 4, 4),
}
QWEN_VAE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
Z_IMAGE = {
    "in_channels": 16,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": TEXT,
    "axes_dims": [8, 4, 4],
    "axes_lens": [64, 32, 32],
}
Z_CONTROLNET = {
    "control_layers_places": [0],
    "control_refiner_layers_places": [0],
    "control_in_dim": 16,
    "dim": 32,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
}
COGVIDEOX = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT,
    "num_layers": 1,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 16,
}
SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": TEXT,
    "sample_size": 16,
    "patch_size": 1,
}
SANA_VAE = {
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 0.5,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "text_embed_dim": TEXT,
    "pooled_projection_dim": TEXT,
    "rope_axes_dim": (2, 4, 4),
}
COGVIEW4 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": TEXT,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "rope_axes_dim": (32, 32),
}
SINGLE = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (0, 8, 8),
}
COSMOS = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": TEXT,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
}
HUNYUAN_DIT = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 16,
    "hidden_size": 24,
    "cross_attention_dim": TEXT,
    "cross_attention_dim_t5": TEXT,
    "pooled_projection_dim": 16,
    "text_len": 8,
    "text_len_t5": 8,
}
KANDINSKY_5 = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": TEXT,
    "in_text_dim2": TEXT,
    "time_dim": 16,
    "model_dim": 16,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (1, 1, 2),
}
LTX = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "num_layers": 1,
    "caption_channels": TEXT,
}
PIXART = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 16,
    "caption_channels": TEXT,
}
# the schedulers of the published models
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}

COMPONENTS_DDIM = make("DDIMScheduler", clip_sample=False)


class Harmless:
    """In place of Cosmos' guardrails, which would be downloaded."""

    def to(self, *args, **kwargs):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


# by the name of the class in the type hint: a function that makes one
COMPONENTS = {
    "T5Tokenizer": t5_tokenizer,
    "T5EncoderModel": lambda: transformers.T5EncoderModel(t5_config()),
    "FlowMatchEulerDiscreteScheduler": flow(),
    "FluxTransformer2DModel": flux(),
    "Flux2Transformer2DModel": flux_2(guidance_embeds=False),
    "AutoencoderKLFlux2": make(
        "AutoencoderKLFlux2",
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
    ),
    "SD3Transformer2DModel": make("SD3Transformer2DModel", **SD3),
    "ChromaTransformer2DModel": make(
        "ChromaTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ),
    "AutoencoderKLWan": make("AutoencoderKLWan", **WAN_VAE),
    "WanTransformer3DModel": make("WanTransformer3DModel", **WAN),
    "QwenImageTransformer2DModel": make("QwenImageTransformer2DModel", **QWEN),
    "AutoencoderKLQwenImage": make("AutoencoderKLQwenImage", **QWEN_VAE),
    "ZImageTransformer2DModel": make("ZImageTransformer2DModel", **Z_IMAGE),
    "CogVideoXTransformer3DModel": make("CogVideoXTransformer3DModel", **COGVIDEOX),
    "AutoencoderKLCogVideoX": make(
        "AutoencoderKLCogVideoX",
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ),
    "CogVideoXDDIMScheduler": make(
        "CogVideoXDDIMScheduler",
        snr_shift_scale=1.0,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "CogView4Transformer2DModel": make("CogView4Transformer2DModel", **COGVIEW4),
    "CogView3PlusTransformer2DModel": make(
        "CogView3PlusTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=TEXT,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
        sample_size=16,
    ),
    "SanaControlNetModel": make("SanaControlNetModel", **SANA | {"num_layers": 1}),
    "SanaTransformer2DModel": make("SanaTransformer2DModel", **SANA),
    "AutoencoderDC": make("AutoencoderDC", **SANA_VAE),
    "PixArtTransformer2DModel": make("PixArtTransformer2DModel", **PIXART),
    "AuraFlowTransformer2DModel": make(
        "AuraFlowTransformer2DModel",
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    ),
    "Lumina2Transformer2DModel": make(
        "Lumina2Transformer2DModel",
        sample_size=16,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 32, 32),
        cap_feat_dim=TEXT,
    ),
    "LuminaNextDiT2DModel": make(
        "LuminaNextDiT2DModel",
        sample_size=16,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=TEXT,
    ),
    "HunyuanVideoTransformer3DModel": make("HunyuanVideoTransformer3DModel", **HUNYUAN),
    "AutoencoderKLHunyuanVideo": make(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ),
    "LTXVideoTransformer3DModel": make("LTXVideoTransformer3DModel", **LTX),
    "AutoencoderKLLTXVideo": make(
        "AutoencoderKLLTXVideo",
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    ),
    "MochiTransformer3DModel": make(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=TEXT,
        time_embed_dim=8,
        max_sequence_length=16,
    ),
    "AutoencoderKLMochi": make(
        "AutoencoderKLMochi",
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ),
    "BriaTransformer2DModel": make("BriaTransformer2DModel", **SINGLE, joint_attention_dim=TEXT),
    "BriaFiboTransformer2DModel": make(
        "BriaFiboTransformer2DModel", **SINGLE, joint_attention_dim=2 * TEXT, text_encoder_dim=TEXT
    ),
    "OvisImageTransformer2DModel": make(
        "OvisImageTransformer2DModel", **SINGLE | {"axes_dims_rope": (4, 4, 8)}, joint_attention_dim=TEXT
    ),
    "LongCatImageTransformer2DModel": make(
        "LongCatImageTransformer2DModel",
        **SINGLE | {"axes_dims_rope": (4, 4, 8)},
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
    ),
    "ChronoEditTransformer3DModel": make("ChronoEditTransformer3DModel", **WAN | {"in_channels": 36}, image_dim=TEXT),
    "SkyReelsV2Transformer3DModel": make("SkyReelsV2Transformer3DModel", **WAN),
    "CosmosTransformer3DModel": make("CosmosTransformer3DModel", **COSMOS),
    "AutoencoderKLCosmos": make(
        "AutoencoderKLCosmos",
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ),
    "AllegroTransformer3DModel": make(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=8,
        sample_frames=8,
        caption_channels=TEXT,
    ),
    "AutoencoderKLAllegro": make(
        "AutoencoderKLAllegro", block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    ),
    "LatteTransformer3DModel": make(
        "LatteTransformer3DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT,
    ),
    "HunyuanDiT2DModel": make("HunyuanDiT2DModel", **HUNYUAN_DIT, num_layers=2),
    "HunyuanDiT2DControlNetModel": make("HunyuanDiT2DControlNetModel", **HUNYUAN_DIT, transformer_num_layers=2),
    "HunyuanVideoFramepackTransformer3DModel": make(
        "HunyuanVideoFramepackTransformer3DModel",
        **HUNYUAN | {"image_proj_dim": TEXT, "patch_size": 1},
        has_image_proj=True,
        has_clean_x_embedder=True,
    ),
    "HunyuanVideo15Transformer3DModel": make(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        image_embed_dim=TEXT,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    ),
    "AutoencoderKLHunyuanVideo15": make(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ),
    "HunyuanImageTransformer2DModel": make(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        rope_axes_dim=(4, 4),
    ),
    "AutoencoderKLHunyuanImage": make(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=0.5,
    ),
    "Kandinsky5Transformer3DModel": make("Kandinsky5Transformer3DModel", **KANDINSKY_5),
    "Krea2Transformer2DModel": make(
        "Krea2Transformer2DModel",
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=TEXT,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    ),
    "MotifVideoTransformer3DModel": make(
        "MotifVideoTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        text_embed_dim=TEXT,
        rope_axes_dim=(4, 4, 4),
    ),
    "NucleusMoEImageTransformer2DModel": make(
        "NucleusMoEImageTransformer2DModel",
        **QWEN | {"num_attention_heads": 4},
        moe_enabled=False,
        capacity_factors=[8.0],
    ),
    "PRXTransformer2DModel": make(
        "PRXTransformer2DModel",
        in_channels=4,
        patch_size=1,
        context_in_dim=TEXT,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[2, 2],
    ),
    "SanaVideoTransformer3DModel": make(
        "SanaVideoTransformer3DModel",
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT,
        sample_size=8,
        rope_max_seq_len=32,
    ),
    "AutoencoderKLLTX2Video": make(
        "AutoencoderKLLTX2Video",
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
    ),
    "AutoencoderKLLTX2Audio": make(
        "AutoencoderKLLTX2Audio",
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    ),
    "LTX2TextConnectors": lambda: diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=TEXT,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        causal_temporal_positioning=False,
        rope_type="split",
        rope_double_precision=False,
    ),
    "LTX2VideoTransformer3DModel": make(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=TEXT,
        rope_type="split",
        rope_double_precision=False,
    ),
    "LTX2Vocoder": lambda: diffusers.pipelines.ltx2.LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    ),
    "StableAudioProjectionModel": lambda: diffusers.pipelines.stable_audio.StableAudioProjectionModel(
        text_encoder_dim=TEXT, conditioning_dim=TEXT, min_value=0, max_value=32
    ),
    "StableAudioDiTModel": make(
        "StableAudioDiTModel",
        sample_size=4,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=TEXT,
        time_proj_dim=8,
        global_states_input_dim=2 * TEXT,
        cross_attention_input_dim=TEXT,
    ),
    "DiTTransformer2DModel": make(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
    ),
    "AutoencoderOobleck": make(
        "AutoencoderOobleck",
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=8,
        channel_multiples=[2, 4],
        sampling_rate=4,
    ),
}

FLUX_CONTROLNET = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": TEXT,
    "axes_dims_rope": (4, 4, 8),
}

BOOL_MASKS = {f"{sign}prompt_attention_mask": ones(1, 8, dtype=torch.bool) for sign in ("", "negative_")}

# (regular expression for the name of the pipeline without "Pipeline", what it needs beside); later rows win
CASES: list[tuple[str, Case]] = [
    (
        r"(Flux(?!2)|VisualCloze).*",
        Case(components={"vae": vae(), "scheduler": flow(**DYNAMIC), "transformer": flux()}),
    ),
    (r"FluxControl(Img2Img|Inpaint)?", Case(components={"transformer": flux(in_channels=32, out_channels=16)})),
    (
        r"FluxControlNet.*",
        Case(components={"controlnet": make("FluxControlNetModel", **FLUX_CONTROLNET)}),
    ),
    (r"FluxFill|VisualCloze.*", Case(components={"transformer": flux(in_channels=48, out_channels=16)})),
    (r"FluxKontext.*", Case(call={"max_area": 32 * 32, "_auto_resize": False})),
    (r"FluxPriorRedux", Case(reason="no scheduler")),
    (r"VisualClozeGeneration", Case(components={"resolution": 32})),
    (
        r"VisualCloze.*",
        Case(
            components={"resolution": 32},
            call={
                "task_prompt": "a task",
                "content_prompt": "a cat",
                "image": lambda: [[picture(seed=1), picture(seed=2)], [picture(seed=3), None]],
            },
        ),
    ),
    (r"VisualCloze", Case(call={"upsampling_height": 32, "upsampling_width": 32})),
    (r"Flux2.*", only("prompt_embeds", components={"scheduler": flow(**DYNAMIC)})),
    (r"Flux2Klein(Inpaint)?", embedded("prompt_embeds")),
    (r"Flux2(Klein)?", Case(without=("image",))),
    (r"Flux2KleinKV", Case(call={"image": lambda: picture(64)})),
    (r"Flux2", Case(components={"transformer": flux_2()})),
    (r"StableDiffusion3.*", Case(components={"vae": vae()})),
    (
        r"StableDiffusion3Inpaint",
        Case(
            components={
                "vae": vae(latent_channels=16),
                "transformer": make("SD3Transformer2DModel", **SD3 | {"in_channels": 33, "out_channels": 16}),
            }
        ),
    ),
    (
        r"StableDiffusion3ControlNet",
        Case(components={"controlnet": make("SD3ControlNetModel", **SD3)}),
    ),
    (
        r"StableDiffusion3ControlNetInpainting",
        Case(
            components={"controlnet": make("SD3ControlNetModel", **SD3, extra_conditioning_channels=1)},
            call={"control_mask": mask},
        ),
    ),
    (r"Chroma.*", embedded("prompt_embeds", components={"vae": vae()}, **BOOL_MASKS)),
    (r"AuraFlow", embedded("prompt_embeds", "prompt_attention_mask", components={"vae": vae()})),
    (
        r"(Wan|LucyEdit).*",
        embedded(
            "prompt_embeds",
            components={"scheduler": flow(shift=5.0), "transformer": make("WanTransformer3DModel", **WAN)},
        ),
    ),
    (r"LucyEdit", Case(components={"transformer": make("WanTransformer3DModel", **WAN | {"in_channels": 32})})),
    (r"WanVideoToVideo", Case(call={"height": 32, "width": 32})),
    (
        r"WanVACE",
        Case(
            components={"transformer": make("WanVACETransformer3DModel", **WAN, vace_layers=[0, 1])},
            call={"mask": lambda: [mask() for _ in range(5)]},
        ),
    ),
    (
        r"WanImageToVideo",
        Case(
            components={
                "image_encoder": None,
                "image_processor": None,
                "transformer": make("WanTransformer3DModel", **WAN | {"in_channels": 36}),
            }
        ),
    ),
    (r"QwenImage.*", embedded("prompt_embeds", "prompt_embeds_mask", components={"scheduler": flow(**DYNAMIC)})),
    (
        r"ZImage.*",
        embedded(
            components={"vae": vae(latent_channels=16)},
            prompt_embeds=lambda: [noise(8, TEXT, seed=1)()],
            negative_prompt_embeds=lambda: [noise(8, TEXT, seed=2)()],
        ),
    ),
    (r"CogVideoX.*", Case(components={"scheduler": COMPONENTS["CogVideoXDDIMScheduler"]})),
    (
        r"CogVideoXImageToVideo",
        Case(components={"transformer": make("CogVideoXTransformer3DModel", **COGVIDEOX | {"in_channels": 8})}),
    ),
    (
        r"CogVideoXFunControl",
        Case(
            components={"transformer": make("CogVideoXTransformer3DModel", **COGVIDEOX | {"in_channels": 8})},
            call={"control_video": video},
        ),
    ),
    (r"CogView3Plus", Case(components={"scheduler": COMPONENTS["CogVideoXDDIMScheduler"]})),
    (
        r"CogView4.*",
        embedded(
            "prompt_embeds",
            components={
                "scheduler": flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
            },
        ),
    ),
    (
        r"CogView4Control",
        Case(components={"transformer": make("CogView4Transformer2DModel", **COGVIEW4 | {"in_channels": 8})}),
    ),
    (
        r"Sana.*",
        embedded("prompt_embeds", "prompt_attention_mask", components={"scheduler": flow()}, negative_prompt=None),
    ),
    (r"Sana(PAG|ControlNet)?", Case(call={"use_resolution_binning": False})),
    # by the type hint it has another scheduler
    (r"SanaSprint.*", Case(reason=f"SCMScheduler's: {REFUSED['SCMScheduler']}")),
    (
        r"QwenImageControlNet.*",
        Case(
            components={"controlnet": make("QwenImageControlNetModel", **QWEN)},
            call={"control_image": lambda: picture(seed=1)},
        ),
    ),
    (
        r"QwenImageControlNetInpaint",
        Case(
            components={"controlnet": make("QwenImageControlNetModel", **QWEN, extra_condition_channels=4)},
            call={"control_mask": mask},
        ),
    ),
    (r"ZImageControlNet.*", Case(components={"controlnet": make("ZImageControlNetModel", **Z_CONTROLNET)})),
    (
        r"Mochi",
        embedded(
            "prompt_embeds", "prompt_attention_mask", components={"scheduler": flow(shift=1.0, invert_sigmas=True)}
        ),
    ),
    (r"PixArt.*", Case(call={"use_resolution_binning": False}, without=("max_sequence_length",))),
    (r"Lumina.*", embedded("prompt_embeds", "prompt_attention_mask", components={"vae": vae()})),
    (r"HunyuanVideo.*", embedded("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")),
    (r"LTX.*", embedded("prompt_embeds", "prompt_attention_mask", components={"scheduler": flow(**DYNAMIC)})),
    (r"LTX.*LatentUpsample.*", Case(reason="no scheduler")),
    (r"LTXCondition", Case(components={"scheduler": flow(shift=1.0)})),
    (r"Bria", embedded("prompt_embeds", components={"vae": vae()})),
    (r"(Ovis|LongCat)Image.*", embedded("prompt_embeds", components={"vae": vae()})),
    (r"(ChronoEdit|SkyReelsV2.*)", embedded("prompt_embeds")),
    (
        r"SkyReelsV2.*",
        Case(
            components={
                "scheduler": make(
                    "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
                )
            }
        ),
    ),
    (
        r"SkyReelsV2ImageToVideo",
        Case(
            components={
                "transformer": make("SkyReelsV2Transformer3DModel", **WAN | {"in_channels": 36}, image_dim=TEXT)
            }
        ),
    ),
    (
        r"SkyReelsV2DiffusionForcingImageToVideo",
        Case(
            components={"transformer": make("SkyReelsV2Transformer3DModel", **WAN, pos_embed_seq_len=34)},
        ),
    ),
    (
        r"SkyReelsV2DiffusionForcing.*",
        Case(call={"num_frames": 9, "base_num_frames": 9, "prompt": None}),
    ),
    (
        r"SkyReelsV2DiffusionForcingVideoToVideo",
        Case(call={"num_frames": 17, "base_num_frames": 5, "overlap_history": 3}),
    ),
    (r"Cosmos.*", embedded("prompt_embeds", components={"safety_checker": Harmless})),
    (
        r"CosmosTextToWorld",
        Case(
            components={
                "transformer": make("CosmosTransformer3DModel", **COSMOS | {"in_channels": 4, "out_channels": 4})
            }
        ),
    ),
    (
        r"CosmosVideoToWorld",
        Case(
            components={
                "transformer": make("CosmosTransformer3DModel", **COSMOS | {"in_channels": 5, "out_channels": 4})
            },
            without=("image",),
        ),
    ),
    (
        r"Cosmos2VideoToWorld",
        Case(components={"transformer": make("CosmosTransformer3DModel", **COSMOS | {"in_channels": 17})}),
    ),
    (r"(Allegro|Latte)", embedded("prompt_embeds", components={"vae": None})),
    (
        r"Allegro",
        embedded("prompt_embeds", "prompt_attention_mask", components={"vae": COMPONENTS["AutoencoderKLAllegro"]}),
    ),
    (r"Latte", Case(components={"vae": vae(shift_factor=None)}, call={"video_length": 1})),
    (r"EasyAnimate.*", Case(components=NO_TEXT)),
    (
        r"HunyuanDiT.*",
        embedded(
            "prompt_embeds",
            "prompt_embeds_2",
            "prompt_attention_mask",
            "prompt_attention_mask_2",
            components={"vae": vae(), "feature_extractor": None, "scheduler": COMPONENTS_DDIM},
            use_resolution_binning=False,
        ),
    ),
    (r"Allegro", Case(call={"output_type": "latent"})),
    (r"ChromaInpaint", Case(reason="fails with every scheduler of this version of diffusers")),
    (
        r"HunyuanVideoImageToVideo",
        Case(
            components={
                "transformer": make("HunyuanVideoTransformer3DModel", **HUNYUAN, image_condition_type="token_replace")
            }
        ),
    ),
    (r"HunyuanVideoFramepack", Case(components={"image_encoder": None, "feature_extractor": None})),
    (
        r"HunyuanSkyreelsImageToVideo",
        embedded(
            "prompt_embeds",
            "pooled_prompt_embeds",
            "prompt_attention_mask",
            components={"transformer": make("HunyuanVideoTransformer3DModel", **HUNYUAN | {"in_channels": 8})},
        ),
    ),
    (
        r"HunyuanVideo15.*|HunyuanImage.*",
        embedded(
            "prompt_embeds",
            "prompt_embeds_mask",
            components={"guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0)},
        ),
    ),
    (
        r"HunyuanVideo15.*|HunyuanImage",
        embedded(
            "prompt_embeds",
            "prompt_embeds_mask",
            "prompt_embeds_2",
            "prompt_embeds_mask_2",
            components={"guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0)},
        ),
    ),
    (
        r"Kandinsky5.*",
        embedded(
            components={"vae": None},
            prompt_embeds_qwen=noise(1, 8, TEXT, seed=1),
            prompt_embeds_clip=noise(1, TEXT, seed=2),
            negative_prompt_embeds_qwen=noise(1, 8, TEXT, seed=3),
            negative_prompt_embeds_clip=noise(1, TEXT, seed=4),
            prompt_cu_seqlens=lambda: torch.tensor([0, 8], dtype=torch.int32),
            negative_prompt_cu_seqlens=lambda: torch.tensor([0, 8], dtype=torch.int32),
        ),
    ),
    (r"Kandinsky5.2V", Case(components={"vae": COMPONENTS["AutoencoderKLHunyuanVideo"]})),
    (r"Kandinsky5.2I", Case(components={"vae": vae()})),
    (
        r"Kandinsky5I2.",
        Case(components={"transformer": make("Kandinsky5Transformer3DModel", **KANDINSKY_5, visual_cond=True)}),
    ),
    (
        r"Krea2",
        embedded(
            "prompt_embeds_mask",
            prompt_embeds=noise(1, 8, 3, TEXT, seed=1),
            negative_prompt_embeds=noise(1, 8, 3, TEXT, seed=2),
        ),
    ),
    (
        r"MotifVideo.*",
        embedded(
            "prompt_embeds",
            "prompt_attention_mask",
            components={
                "guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
                "scheduler": flow(),
                "feature_extractor": None,
            },
        ),
    ),
    (r"NucleusMoEImage", embedded("prompt_embeds", "prompt_embeds_mask")),
    (r"PRX", embedded("prompt_embeds", components={"vae": vae()}, use_resolution_binning=False, **BOOL_MASKS)),
    (
        r"SanaVideo|SanaImageToVideo",
        Case(components={"vae": COMPONENTS["AutoencoderKLWan"]}, call={"frames": 5, "use_resolution_binning": False}),
    ),
    (r"Allegro|Latte|OvisImage", Case(call={"negative_prompt": None})),
    (r"MotifVideoImage2Video", Case(call={"prompt": None})),
    (r"Krea2", Case(call={f"{sign}prompt_embeds_mask": ones(1, 8, dtype=torch.bool) for sign in ("", "negative_")})),
    (
        r"HunyuanDiT.*",
        Case(
            components={
                "vae": vae(
                    block_out_channels=(8,) * 4,
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                    shift_factor=None,
                )
            }
        ),
    ),
    (r"LTX2.*", Case(components={"scheduler": flow(**DYNAMIC), "audio_scheduler": None})),
    (r"DiT", Case(call={"class_labels": [1]}, without=("prompt",))),
]
