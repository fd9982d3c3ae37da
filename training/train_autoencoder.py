"""Train a diffusers AutoencoderKL on images, for latent diffusion.

    score-sde train-autoencoder quick_start/autoencoder

The loss is reconstruction (mean absolute error of pixels in [-1, 1]) plus kl_weight times the KL divergence to the
standard normal, summed over the latent. Writes output_dir/vae, a folder that AutoencoderKL.from_pretrained opens; its
config holds latents_mean and latents_std per channel, measured over the training images, and scaling_factor 1: with
them the latents have zero mean and unit variance.
"""

import os
import sys
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm.auto import tqdm

from score_sde.pipelines.denoising_pipeline import PIXELS_AT_ONCE
from score_sde.pipelines.kinds import Image
from score_sde.pipelines.latents import encode_moments
from score_sde.training.parts.config import DataConfig, ImageLoopConfig, option
from score_sde.training.parts.cores import loading_processes
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.latents import latent_statistics
from score_sde.training.parts.loop import fit, make_accelerator, sample_path, save_model, show_samples
from score_sde.training.parts.options import one_line_errors, parse
from score_sde.training.parts.run_folder import open_run, surviving
from score_sde.training.parts.tasks import Task
from score_sde.training.parts.trackers import main_process_goes_on
from score_sde.training.parts.workers import DataLoader


@dataclass
class AutoencoderConfig(ImageLoopConfig, DataConfig):
    """Train a diffusers AutoencoderKL on images, for latent diffusion."""

    configs = "autoencoder"

    latent_channels: int = option(4, "Channels of the latent.", "network")
    block_out_channels: list[int] = option(
        [64, 128, 256],
        "Channels at each resolution; each but the first halves height and width.",
        "network",
    )
    layers_per_block: int = option(1, "Residual blocks at each resolution.", "network")
    norm_num_groups: int = option(
        16,
        "Groups of the group normalisation; must divide every entry of block_out_channels.",
        "network",
    )
    kl_weight: float = option(1e-6, "Weight of the KL divergence.", "network")
    statistics_images: int = option(
        10_000, "Training images over which latents_mean and latents_std are measured.", "network"
    )
    sample_num_images: int = option(32, "Images in a grid of reconstructions.", "samples and logs")

    def problems(self):
        yield from DataConfig.problems(self)
        yield from ImageLoopConfig.problems(self)
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            yield f"norm_num_groups {self.norm_num_groups} must divide block_out_channels {self.block_out_channels}"
        factor = 2 ** (len(self.block_out_channels) - 1)
        if self.resolution % factor:
            yield f"resolution {self.resolution} must be a multiple of {factor}, the factor of the autoencoder"
        for name in ("latent_channels", "layers_per_block", "statistics_images", "sample_num_images"):
            if getattr(self, name) < 1:
                yield f"{name} {getattr(self, name)} must be at least 1"
        if not self.kl_weight >= 0:
            yield f"kl_weight {self.kl_weight} must be 0 or more"


class Reconstruction(nn.Module):
    """An autoencoder as one forward pass, so that distributed training sees every parameter: images and standard normal
    noise to reconstructions and the KL divergence (B,)."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def enable_gradient_checkpointing(self):
        self.vae.enable_gradient_checkpointing()

    def forward(self, images, noise):
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


def at_once(pixels):
    """How many images of so many pixels go through an autoencoder together, at most 128."""
    return min(128, max(1, PIXELS_AT_ONCE // pixels))


@torch.no_grad()
def reconstruction_grid(vae, dataset, count, path, device):
    """Write images and, below each row of them, their reconstructions; return the mean PSNR in dB."""
    images = torch.stack([dataset[i]["images"] for i in range(min(count, len(dataset)))])
    parts = images.split(at_once(images.shape[2] * images.shape[3]))
    decoded = torch.cat([vae.decode(encode_moments(vae, part.to(device))[0]).sample.cpu() for part in parts])
    decoded = decoded.clamp(-1, 1)
    error = ((decoded - images) / 2).square().flatten(1).mean(1)
    kind, rows = Image(images.shape[1], tuple(images.shape[2:]), images.shape[1]), []
    for start in range(0, len(images), 8):
        rows += [images[start : start + 8], decoded[start : start + 8]]
    kind.save_grid(kind.output(torch.cat(rows)), path, columns=min(8, len(images)))
    return float((-10 * error.log10()).mean())


def main(argv=None):
    config = parse(AutoencoderConfig, sys.argv[1:] if argv is None else argv)
    config.label_column = None
    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        train(config, accelerator, run)


class AutoencoderTask(Task):
    """An AutoencoderKL on the images of an `AutoencoderConfig`."""

    pictures = "reconstructions"

    def __init__(self, config, dataset, device):
        self.config, self.device, levels = config, device, len(config.block_out_channels)
        vae = AutoencoderKL(
            in_channels=config.image_channels,
            out_channels=config.image_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            sample_size=config.resolution,
            scaling_factor=1.0,
        )
        super().__init__(Reconstruction(vae), dataset, dataset.fingerprint())
        size = config.resolution // 2 ** (levels - 1)
        self.latent_shape = (config.latent_channels, size, size)

    def compute_loss(self, state, batch, draws):
        images = batch["images"]
        if self.config.random_flip:
            images = torch.where(draws.chance(0.5).reshape(-1, 1, 1, 1), images.flip(-1), images)
        reconstructed, kl = state.model(images, draws.normal(self.latent_shape))
        error, kl = (reconstructed.float() - images).abs().mean(), kl.mean()
        return error + self.config.kl_weight * kl, {"reconstruction_error": error, "kl": kl}

    def sample(self, network, path):
        """A grid of reconstructions; return their mean PSNR in dB."""
        return reconstruction_grid(network.vae, self.dataset, self.config.sample_num_images, path, self.device)


def train(config, accelerator, run):
    with accelerator.main_process_first():
        dataset = ImageDataset(config, crop_seed=config.crop_seed)
    if config.cache_images:
        dataset.keep_images()
    accelerator.print(dataset.describe())
    task = AutoencoderTask(config, dataset, accelerator.device)
    model, facts = fit(config, accelerator, run, task)

    with main_process_goes_on(accelerator):
        if accelerator.is_main_process:
            vae = model.vae
            rows = torch.utils.data.Subset(dataset, range(min(config.statistics_images, len(dataset))))
            workers = loading_processes(config, accelerator, dataset)
            loader = DataLoader(rows, workers, accelerator, batch_size=at_once(config.resolution**2))
            with torch.no_grad():
                statistics = latent_statistics(
                    encode_moments(vae, batch["images"].to(accelerator.device))
                    for batch in tqdm(loader, desc="latent statistics")
                )
            vae.register_to_config(latents_mean=statistics["mean"], latents_std=statistics["std"])
            with surviving("the grid of reconstructions"):
                grid = sample_path(config.output_dir, facts["steps"])
                facts["training_psnr_db"] = task.sample(model, grid)
                print(f"reconstruction {facts['training_psnr_db']:.1f} dB PSNR\nsamples: {grid}")
                show_samples(accelerator, run, task, grid, facts["steps"])
            print(f"autoencoder: {save_model(vae, os.path.join(config.output_dir, 'vae'), facts)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
