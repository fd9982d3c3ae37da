"""Between an autoencoder's latents and the unit-variance latents that a diffusion model sees.

Training and sampling both go through here, by the statistics in the autoencoder's own config: `latents_mean` and
`latents_std` per channel, `shift_factor` and `scaling_factor`, each where present.
"""

import torch


def encode_moments(vae, images):
    """Mean and standard deviation of the latents of images (B, C, H, W) in [-1, 1], in the autoencoder's own units.

    The standard deviation is zero for a deterministic autoencoder (AutoencoderTiny, AutoencoderDC).
    """
    encoded = vae.encode(images)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean, encoded.latent_dist.std
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return latents, torch.zeros_like(latents)


def shift_and_scale(vae_config, like):
    """(shift, scale) of z' = (z - shift) scale, each broadcasting against latents (B, C, ...) such as `like`."""

    def per_channel(name, default):
        values = vae_config.get(name)
        values = torch.as_tensor(default if values is None else values, device=like.device, dtype=like.dtype)
        return values.reshape(-1, *[1] * (like.ndim - 2))

    shift = per_channel("latents_mean", 0.0) + per_channel("shift_factor", 0.0)
    return shift, per_channel("scaling_factor", 1.0) / per_channel("latents_std", 1.0)


def normalize_latents(latents, vae_config):
    """Latents (B, C, ...) in the autoencoder's units -> the diffusion model's."""
    shift, scale = shift_and_scale(vae_config, latents)
    return (latents - shift) * scale


def denormalize_latents(latents, vae_config):
    """The inverse of `normalize_latents`."""
    shift, scale = shift_and_scale(vae_config, latents)
    return latents / scale + shift
