"""Autoencoders and their latents, as data for training."""

import hashlib
import os

import torch
from huggingface_hub import snapshot_download

from score_sde.pipelines.latents import (
    data_axes,
    data_channels,
    decode_latents,
    encode_moments,
    normalises_itself,
    spatial_factor,
)
from score_sde.pipelines.wording import one_line
from score_sde.sharing.downloading import hub_errors
from score_sde.sharing.opening import open_autoencoder

from .sources import nearest_path


def load_vae(path):
    """An autoencoder of diffusers from a folder or Hub id, for inference, in float32; of a pipeline, its autoencoder.

    Raises ValueError for what is none, or not sound.
    """
    try:
        vae = open_autoencoder(path, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(
            f"autoencoder {path!r} cannot be opened: {one_line(error)}. Give a folder in diffusers' format, of an "
            f"autoencoder or of a pipeline with one, or the id of one on the Hub{nearest_path(path)}"
        ) from error
    return vae.eval().requires_grad_(False)


def fingerprint(vae):
    """A hash of the autoencoder's weights, to tell one from another under the same path; and of the factor by which its
    latents are scaled, where it does that itself."""
    digest = hashlib.sha256()
    if normalises_itself(vae.config):
        digest.update(str(vae.config.scaling_factor).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def latent_shape(vae, shape):
    """Shape (channels, ...) of the latent of data of shape (channels, ...): an image (channels, height, width), sound
    (channels, length), a video (channels, frames, height, width). Raises ValueError for data that the autoencoder
    doesn't take, or gives back in another size."""
    axes = data_axes(vae)
    if len(shape) - 1 != axes:
        kinds = {1: "sound", 2: "images", 3: "videos"}
        raise ValueError(f"a {type(vae).__name__} is an autoencoder of {kinds[axes]}, not of data of shape {shape}")
    channels, expected = shape[0], data_channels(vae.config)
    if axes == 2:
        check_sides(vae, shape[1:])
    if channels != expected:
        name = {1: "audio_channels", 2: "image_channels", 3: "image_channels"}[axes]
        raise ValueError(f"{name} {channels}: the autoencoder is one of {expected} channels")
    latents = encode_moments(vae, torch.zeros(1, *shape, device=vae.device))[0]
    if axes != 2:
        found = tuple(decode_latents(vae, latents).shape[1:])
        if found != tuple(shape):
            raise ValueError(
                f"a {type(vae).__name__} gives data of shape {tuple(shape)} back as {found}: choose another "
                f"{'length' if axes == 1 else 'number of frames, or resolution'}, such as that"
            )
    return tuple(latents.shape[1:])


def check_sides(vae, sides):
    """Raise ValueError for an image of a height and width that an autoencoder doesn't give back."""
    factor = spatial_factor(vae)
    for name, size in zip(("resolution",) if len(set(sides)) == 1 else ("height", "width"), sides, strict=False):
        if size % factor:
            good = [each for each in (size // factor * factor, -(-size // factor) * factor) if each]
            raise ValueError(
                f"{name} {size} is no multiple of {factor}, the factor of the autoencoder: use "
                f"{' or '.join(map(str, good))}"
            )


def latent_statistics(moments):
    """Lists of numbers per channel of the latents of some moments, an iterable of (mean, std), each (B, C, ...): their
    mean, and the standard deviations of the posteriors' means and of samples from the posteriors."""
    values, sums = 0, 0.0
    for mean, std in moments:
        mean, std = mean.cpu().double(), std.cpu().double()  # some devices have no float64
        sums = sums + torch.stack([x.transpose(0, 1).flatten(1).sum(1) for x in (mean, mean**2, std**2)])
        values += mean.numel() // mean.shape[1]
    mean, square, variance = sums / values
    variance_of_means = (square - mean**2).clamp_min(0)
    return {
        "mean": mean.tolist(),
        "std_of_means": variance_of_means.sqrt().tolist(),
        "std": (variance_of_means + variance).sqrt().tolist(),
    }


def fetch_latents(folder_or_repo):
    """The folder of latents: itself, or that of a dataset on the Hub, downloaded into the cache; what is there already
    is not downloaded again.

    Raises ValueError for what is neither.
    """
    if os.path.isdir(folder_or_repo) or folder_or_repo.count("/") != 1:
        return folder_or_repo
    wanted = ["latents.json", "moments-*.safetensors", "vae/*.json", "vae/*.safetensors"]
    what = f"latents {folder_or_repo!r} are no folder here and cannot be had from the Hub{nearest_path(folder_or_repo)}"
    with hub_errors(ValueError, what):
        return snapshot_download(folder_or_repo, repo_type="dataset", allow_patterns=wanted)
