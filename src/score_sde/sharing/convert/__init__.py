"""Other people's checkpoints as pipelines of this package, and ours as stock diffusers pipelines.

    score-sde convert dit DiT-XL-2-256x256.pt converted --vae stabilityai/sd-vae-ft-ema
    score-sde convert score-sde checkpoint_24.pth converted --sde_type ve
    score-sde convert guided-diffusion 256x256_diffusion.pt converted --network ADM-256
    score-sde convert from-diffusers google/ddpm-cifar10-32 converted
    score-sde convert to-diffusers runs/dit/pipeline converted

A checkpoint whose keys or shapes are not those of the network is refused, with their names; pickles are read with
`weights_only=True` alone.
"""

from .command import convert
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
    "pipeline_from_diffusers",
    "pipeline_from_guided_diffusion",
    "pipeline_from_original_dit",
    "pipeline_from_score_sde",
    "pipeline_to_diffusers",
    "unet_from_guided_diffusion",
    "unet_from_score_sde",
]
