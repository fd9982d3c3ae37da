"""Between an autoencoder's latents and the unit-variance latents that a diffusion model sees.

Training and sampling both go through here, by the statistics in the autoencoder's own config: `latents_mean` and
`latents_std` per channel, `shift_factor` and `scaling_factor`, each where present. An autoencoder that applies them
itself (`normalises_itself`) gives unit-variance latents already.
"""

import inspect
from functools import lru_cache
from typing import NamedTuple

import torch


class Autoencoder(NamedTuple):
    """What is known of a class of autoencoders: `output`, how the result of its `encode` is called; `statistics`, the
    entries of its config that say how latents are scaled; `levels`, the entry whose length less one is the number of
    times that height and width are halved, or that is the factor itself; `axes`, of its data and latents, 1 for sound
    (B, C, length), 2 for images, 3 for videos (B, C, frames, H, W)."""

    output: str
    statistics: tuple
    levels: str
    axes: int = 2


# those of data in [-1, 1], here and back, whose latents are scaled outside of them; but for AutoencoderRAE
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
    # which `normalises_itself`
    "AutoencoderRAE": Autoencoder("latent", ("latents_mean", "latents_std", "scaling_factor"), "patch_size"),
    # before the quantisation, which is a part of its `decode`
    "VQModel": Autoencoder("latents", ("scaling_factor",), "block_out_channels"),
    "AutoencoderOobleck": Autoencoder("latent_dist", (), "downsampling_ratios", 1),
    # which encodes each frame by itself
    "AutoencoderKLTemporalDecoder": Autoencoder("latent_dist", ("scaling_factor",), "block_out_channels", 3),
    "AutoencoderKLCogVideoX": Autoencoder(
        "latent_dist", ("latents_mean", "latents_std", "shift_factor", "scaling_factor"), "block_out_channels", 3
    ),
    "AutoencoderKLHunyuanVideo": Autoencoder("latent_dist", ("scaling_factor",), "spatial_compression_ratio", 3),
    "AutoencoderKLMagvit": Autoencoder("latent_dist", ("scaling_factor",), "block_out_channels", 3),
    "AutoencoderKLMochi": Autoencoder(
        "latent_dist", ("latents_mean", "latents_std", "scaling_factor"), "encoder_block_out_channels", 3
    ),
    "AutoencoderKLWan": Autoencoder("latent_dist", ("latents_mean", "latents_std"), "dim_mult", 3),
}

_VIDEO, _OTHER = "its latents are scaled by what is not in its config", "it is one of neither waveforms nor images"
REFUSED = {
    "ConsistencyDecoderVAE": "its decoder draws noise of its own",
    "AutoencoderKLAllegro": "it encodes and decodes in tiles alone",
    "AutoencoderKLCosmos": "its statistics are of each frame",
    "AutoencoderKLHunyuanImageRefiner": _VIDEO,
    "AutoencoderKLHunyuanVideo15": "its attention takes one video at a time",
    "AutoencoderKLKVAEVideo": _VIDEO,
    "AutoencoderKLLTX2Video": _VIDEO,
    "AutoencoderKLLTXVideo": _VIDEO,
    "AutoencoderKLMiniMaxH3": _VIDEO,
    "AutoencoderKLQwenImage": "it is one of videos of a single frame",
    "AutoencoderKLQwenImage21": "it is one of videos of a single frame",
    "AutoencoderVidTok": _VIDEO,
    "Kandinsky6SRVAE": _VIDEO,
    "LTX2VideoDiffusionDecoderModel": _VIDEO,
    "AutoencoderKLKVAEAudio": _OTHER,
    "AutoencoderKLLTX2Audio": _OTHER,
    "AutoencoderKLMiniMaxH3Audio": _OTHER,
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


def data_axes(vae):
    """How many axes the data of an autoencoder have beside batch and channels; 2 without one."""
    name = type(vae).__name__
    return AUTOENCODERS[name].axes if name in AUTOENCODERS else 2


def data_channels(vae_config):
    """Number of channels of an autoencoder's data by its config, None where it doesn't say."""
    if "audio_channels" in vae_config:
        return vae_config["audio_channels"]
    if normalises_itself(vae_config):
        return vae_config["num_channels"]
    # what Mochi's calls in_channels are features that it makes of the data
    return vae_config.get("out_channels" if "temporal_expansions" in vae_config else "in_channels")


def normalises_itself(vae_config):
    """Whether an autoencoder is one of images in [0, 1] whose `encode` and `decode` apply the statistics in its config:
    AutoencoderRAE."""
    return "encoder_norm_mean" in vae_config


def check_only_size(vae, size):
    """Raise ValueError for images of a height and width that an autoencoder would resize: AutoencoderRAE knows one
    size alone. Raises ValueError, too, for one whose latents are sequences."""
    if vae is None or not normalises_itself(vae.config):
        return
    if not vae.config.reshape_to_2d:
        raise ValueError(f"a {type(vae).__name__} with reshape_to_2d false makes sequences: set it true in its config")
    side = spatial_factor(vae) * (vae.config.encoder_input_size // vae.config.encoder_patch_size)
    if tuple(size) != (side, side):
        raise ValueError(
            f"a {type(vae).__name__} is one of images of {side} x {side} pixels, not of {size[0]} x {size[1]}"
        )


def _by_frame(vae):
    """Whether an autoencoder takes the frames of a video as images, which it is told at decoding."""
    return "num_frames" in inspect.signature(vae.decode).parameters


def encode_moments(vae, data):
    """Mean and standard deviation of the latents of data (B, C, ...) in [-1, 1], in the autoencoder's own units.

    The standard deviation is zero for a deterministic autoencoder (AutoencoderTiny, AutoencoderDC). Raises ValueError
    for an autoencoder that isn't one of `AUTOENCODERS`, and for images of a size that it doesn't take.
    """
    output, batch = autoencoder_of(type(vae).__name__).output, len(data)
    if normalises_itself(vae.config):
        check_only_size(vae, data.shape[2:])
        data = (data + 1) / 2
    by_frame = data.ndim == 5 and _by_frame(vae)
    latents = getattr(vae.encode(data.transpose(1, 2).flatten(0, 1) if by_frame else data), output)
    moments = (latents.mean, latents.std) if output == "latent_dist" else (latents, torch.zeros_like(latents))
    return tuple(each.unflatten(0, (batch, -1)).transpose(1, 2) for each in moments) if by_frame else moments


def decode_latents(vae, latents):
    """Data (B, C, ...) of latents in the autoencoder's own units, the inverse of `encode_moments`."""
    if normalises_itself(vae.config):
        check_only_size(vae, [side * spatial_factor(vae) for side in latents.shape[2:]])
        return 2 * vae.decode(latents).sample - 1
    if latents.ndim < 5 or not _by_frame(vae):
        return vae.decode(latents).sample
    batch, _, frames = latents.shape[:3]
    decoded = vae.decode(latents.transpose(1, 2).flatten(0, 1), num_frames=frames).sample
    return decoded.unflatten(0, (batch, -1)).transpose(1, 2)


def shift_and_scale(vae_config, like):
    """(shift, scale) of z' = (z - shift) scale, each broadcasting against latents (B, C, ...) such as `like`, on its
    device, to which they are sent once; (0, 1) of an autoencoder that `normalises_itself`."""
    given, config = [], {} if normalises_itself(vae_config) else vae_config
    for name, default in (("latents_mean", 0), ("shift_factor", 0), ("scaling_factor", 1), ("latents_std", 1)):
        values = config.get(name)
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
