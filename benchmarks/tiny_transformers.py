"""Tiny random components of the pipelines with transformers, for `stock_pipelines.py`: by class, and by pipeline.

Where a language model reads the prompt, its embeddings are given instead of it, so that no such model is built.
"""

import diffusers
import torch
import transformers
from tiny_cases import Case, mask, picture, video


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

VIDEO = {"num_frames": 9, "height": 32, "width": 32}
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

# (regular expression for the name of the pipeline without "Pipeline", what it needs beside); later rows win
CASES: list[tuple[str, Case]] = [
    (r"(Flux(?!2)|VisualCloze).*", Case(components={"vae": vae(), "scheduler": flow(**DYNAMIC), "transformer": flux()})),
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
    (r"Flux2", Case(components={"transformer": flux_2()})),
    (r"StableDiffusion3.*", Case(components={"vae": vae()})),
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
    (r"Chroma.*", embedded("prompt_embeds", "prompt_attention_mask", components={"vae": vae()})),
    (r"AuraFlow", embedded("prompt_embeds", "prompt_attention_mask", components={"vae": vae()})),
    (r"(Wan|LucyEdit).*", embedded("prompt_embeds", components={"scheduler": flow(shift=5.0)}, **VIDEO)),
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
    (r"ZImage.*", embedded(components={"vae": vae(latent_channels=16)})),
    (r"CogVideoX.*", Case(components={"scheduler": COMPONENTS["CogVideoXDDIMScheduler"]}, call=VIDEO)),
    (r"Sana.*", embedded("prompt_embeds", "prompt_attention_mask", components={"scheduler": flow()})),
    (r"PixArt.*", Case(call={"use_resolution_binning": False}, without=("max_sequence_length",))),
    (r"Lumina.*", embedded("prompt_embeds", "prompt_attention_mask", components={"vae": vae()})),
    (r"HunyuanVideo.*", embedded("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask", **VIDEO)),
    (r"LTX.*", embedded("prompt_embeds", "prompt_attention_mask", components={"scheduler": flow(**DYNAMIC)}, **VIDEO)),
    (r"DiT", Case(call={"class_labels": [1]}, without=("prompt",))),
]
