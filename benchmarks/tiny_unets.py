"""Tiny random components of the pipelines with U-Nets, for `stock_pipelines.py`: by class, and by pipeline."""

import diffusers
import torch
import transformers
from tiny_cases import Case


CHARACTERS = [chr(code) for code in range(33, 127)]
TEXT = 32  # width of all text and image embeddings
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer():
    tokens = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(each + "</w>" for each in CHARACTERS)]
    vocabulary = {token: position for position, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip_text_config(**changes):
    sizes = {"hidden_size": TEXT, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    tokens = {"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return transformers.CLIPTextConfig(**(sizes | tokens | {"projection_dim": TEXT} | changes))


def clip_vision_config(**changes):
    sizes = {"hidden_size": TEXT, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return transformers.CLIPVisionConfig(
        **(sizes | {"image_size": 32, "patch_size": 8, "projection_dim": TEXT} | changes)
    )


def clip_image_processor():
    return transformers.CLIPImageProcessorPil(crop_size=32, size=32)


def unet(**changes):
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**(config | changes))


# of Stable Diffusion XL: two text encoders, sizes and crops
XL = {
    "cross_attention_dim": 2 * TEXT,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT,
    "use_linear_projection": True,
}


def vae(**changes):
    config = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 32,
    }
    return diffusers.AutoencoderKL(**(config | changes))


def vq(**changes):
    config = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "num_vq_embeddings": 12,
    }
    return diffusers.VQModel(**(config | changes))


def unconditional_unet(**changes):
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DModel(**(config | changes))


def controlnet(**changes):
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "conditioning_embedding_out_channels": (4, 8),
    }
    return stirred(diffusers.ControlNetModel(**(config | changes)))


def stirred(model):
    """The model with random weights where its own are zero at first, so that it does something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


# by the name of the class in the type hint: a function that makes one, or None
COMPONENTS = {
    "CLIPTokenizer": clip_tokenizer,
    "CLIPTextModel": lambda: transformers.CLIPTextModel(clip_text_config()),
    "CLIPTextModelWithProjection": lambda: transformers.CLIPTextModelWithProjection(clip_text_config()),
    "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionModelWithProjection(clip_vision_config()),
    "CLIPVisionModel": lambda: transformers.CLIPVisionModel(clip_vision_config()),
    "CLIPImageProcessorPil": clip_image_processor,
    "StableDiffusionSafetyChecker": None,
    "AutoencoderKL": vae,
    "VQModel": vq,
    "UNet2DConditionModel": unet,
    "UNet2DModel": unconditional_unet,
    "ControlNetModel": controlnet,
    "MotionAdapter": lambda: diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    ),
    "KarrasDiffusionSchedulers": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
    "SchedulerMixin": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
    "DDIMScheduler": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
    "EulerDiscreteScheduler": lambda: diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
}

# (regular expression for the name of the pipeline without "Pipeline", what it needs beside); later rows win
CASES: list[tuple[str, Case]] = [
    (r".*(StableDiffusionXL|SDXL).*", Case(components={"unet": lambda: unet(**XL)})),
]
