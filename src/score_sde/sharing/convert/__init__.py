"""Other people's checkpoints as pipelines of this package, and ours as stock diffusers pipelines."""

from .command import convert
from .consistency_models import pipeline_from_consistency_models, unet_from_consistency_models
from .from_diffusers import dit_from_diffusers, pipeline_from_diffusers
from .guided_diffusion import pipeline_from_guided_diffusion, unet_from_guided_diffusion
from .original_dit import dit_from_original, pipeline_from_original_dit
from .score_sde_pytorch import pipeline_from_score_sde, unet_from_score_sde
from .to_diffusers import dit_to_diffusers, export_to_diffusers, pipeline_to_diffusers


__all__ = [
    "convert",
    "dit_from_diffusers",
    "dit_from_original",
    "dit_to_diffusers",
    "export_to_diffusers",
    "pipeline_from_consistency_models",
    "pipeline_from_diffusers",
    "pipeline_from_guided_diffusion",
    "pipeline_from_original_dit",
    "pipeline_from_score_sde",
    "pipeline_to_diffusers",
    "unet_from_consistency_models",
    "unet_from_guided_diffusion",
    "unet_from_score_sde",
]
