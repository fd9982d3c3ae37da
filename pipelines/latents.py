"""Between an autoencoder's latents and the unit-variance latents that a diffusion model sees.

Training and sampling both go through here, by the statistics in the autoencoder's own config: `latents_mean` and
`latents_std` per channel, `shift_factor` and `scaling_factor`, each where present.
"""

from functools import lru_cache
from typing import NamedTuple

import torch


class Autoencoder(NamedTuple):
    """What is known of a class of autoencoders: `output`, how the result of its `encode` is called; `statistics`, the
    entries of its config that say how latents are scaled; `levels`, the entry whose length less one is the number of
    times that height and width are halved, or that is the factor itself."""

    output: str
    statistics: tuple
    levels: str


# those of images (B, C, H, W) in [-1, 1], here and back, whose latents are scaled outside of them
AUTOENCODERS = {
    "AutoencoderKL": Autoencoder(
        "latent_dist", ("latents_mean", "latents_std", "shift_factor", "scaling_factor"), "block_out_channels"
    ),
    "AsymmetricAutoencoderKL": Autoencoder("latent_dist", ("scaling_factor",), "down_block_out_channels"),
    "AutoencoderTiny": Autoencoder("latents", ("shift_factor", "scaling_factor"), "encoder_block_out_channels"),
    "AutoencoderDC": Autoencoder("latent", ("scaling_factor",), "encoder_block_out_channels"),
    # the statistics are those of a batch norm of patches: --normalize_latents puts others into the config
    "AutoencoderKLFlux2": Autoencoder("latent_dist", (), "block_out_channels"),
    "AutoencoderKLHunyuanImage": Autoencoder("latent_dist", ("scaling_factor",), "spatial_compression_ratio"),
    "AutoencoderKLKVAE": Autoencoder("latent_dist", (), "ch_mult"),
    # before the quantisation, which is a part of its `decode`
    "VQModel": Autoencoder("latents", ("scaling_factor",), "block_out_channels"),
}

_VIDEO, _OTHER = "it is one of videos", "it is one of no images"
REFUSED = {
    "AutoencoderRAE": "it takes images in [0, 1], and normalises images and latents itself",
    "ConsistencyDecoderVAE": "its decoder draws noise of its own",
    "AutoencoderKLTemporalDecoder": _VIDEO,
    "AutoencoderKLAllegro": _VIDEO,
    "AutoencoderKLCogVideoX": _VIDEO,
    "AutoencoderKLCosmos": _VIDEO,
    "AutoencoderKLHunyuanImageRefiner": _VIDEO,
    "AutoencoderKLHunyuanVideo": _VIDEO,
    "AutoencoderKLHunyuanVideo15": _VIDEO,
    "AutoencoderKLKVAEVideo": _VIDEO,
    "AutoencoderKLLTX2Video": _VIDEO,
    "AutoencoderKLLTXVideo": _VIDEO,
    "AutoencoderKLMagvit": _VIDEO,
    "AutoencoderKLMiniMaxH3": _VIDEO,
    "AutoencoderKLMochi": _VIDEO,
    "AutoencoderKLQwenImage": _VIDEO,
    "AutoencoderKLQwenImage21": _VIDEO,
    "AutoencoderKLWan": _VIDEO,
    "AutoencoderVidTok": _VIDEO,
    "Kandinsky6SRVAE": _VIDEO,
    "LTX2VideoDiffusionDecoderModel": _VIDEO,
    "AutoencoderKLKVAEAudio": _OTHER,
    "AutoencoderKLLTX2Audio": _OTHER,
    "AutoencoderKLMiniMaxH3Audio": _OTHER,
    "AutoencoderOobleck": _OTHER,
    "AutoencoderSAME": _OTHER,
    "Cosmos3AVAEAudioTokenizer": _OTHER,
    "LongCatAudioDiTVae": _OTHER,
    "MMAudioVAE": _OTHER,
    "MMAudioVocoder": _OTHER,
    "MiniMaxMusic3Vocoder": _OTHER,
    "RFD4ProteinaAutoencoder": _OTHER,
}


def autoencoder_of(name):
    """The row of `AUTOENCODERS` of a class of autoencoders by its name. Raises ValueError for one that latents of
    images cannot be from, with the reason."""
    if name not in AUTOENCODERS:
        raise ValueError(
            f"{name} cannot be used: {REFUSED.get(name, 'it is no autoencoder that is known')}; choose one of "
            f"{', '.join(AUTOENCODERS)}"
        )
    return AUTOENCODERS[name]


def spatial_factor(vae):
    """How many times smaller than an image its latent is, in height and width; 1 where there is no autoencoder."""
    if vae is None:
        return 1
    value = vae.config[autoencoder_of(type(vae).__name__).levels]
    return value if isinstance(value, int) else 2 ** (len(value) - 1)


def encode_moments(vae, images):
    """Mean and standard deviation of the latents of images (B, C, H, W) in [-1, 1], in the autoencoder's own units.

    The standard deviation is zero for a deterministic autoencoder (AutoencoderTiny, AutoencoderDC). Raises ValueError
    for an autoencoder that isn't one of `AUTOENCODERS`.
    """
    output = autoencoder_of(type(vae).__name__).output
    latents = getattr(vae.encode(images), output)
    if output == "latent_dist":
        return latents.mean, latents.std
    return latents, torch.zeros_like(latents)


def shift_and_scale(vae_config, like):
    """(shift, scale) of z' = (z - shift) scale, each broadcasting against latents (B, C, ...) such as `like`, on its
    device, to which they are sent once."""
    given = []
    for name, default in (("latents_mean", 0), ("shift_factor", 0), ("scaling_factor", 1), ("latents_std", 1)):
        values = vae_config.get(name)
        values = default if values is None else values
        given.append(tuple(map(float, values)) if isinstance(values, (list, tuple)) else float(values))
    shift, scale = _statistics(*given, like.device, like.dtype)
    shape = (-1, *[1] * (like.ndim - 2))
    return shift.reshape(shape), scale.reshape(shape)


@lru_cache(maxsize=16)
def _statistics(mean, shift, scaling, std, device, dtype):
    # not of inference mode, so that training can use them, too
    with torch.inference_mode(False):
        mean, shift, scaling, std = (torch.tensor(each, dtype=dtype) for each in (mean, shift, scaling, std))
        return (mean + shift).to(device), (scaling / std).to(device)


def normalize_latents(latents, vae_config):
    """Latents (B, C, ...) in the autoencoder's units -> the diffusion model's."""
    shift, scale = shift_and_scale(vae_config, latents)
    return (latents - shift) * scale


def denormalize_latents(latents, vae_config):
    """The inverse of `normalize_latents`."""
    shift, scale = shift_and_scale(vae_config, latents)
    return latents / scale + shift
