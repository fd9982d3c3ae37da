"""What diffusion is trained on: images, latents encoded before, or images encoded on the fly by an autoencoder."""

import os
from dataclasses import dataclass

import torch
from config import DataConfig, option
from data import ImageDataset, LatentDataset, on_hub
from encode_latents import fingerprint, load_vae
from share_latents import fetch_latents

from score_sde.pipelines.latents import encode_moments, normalize_latents


@dataclass
class CleanDataConfig(DataConfig):
    latents: str | None = option(
        None,
        "Folder written by training/encode_latents.py, or dataset on the Hub that holds one, somebody/latents: train "
        "on these latents instead of images.",
    )
    vae: str | None = option(
        None,
        "Autoencoder in diffusers format, a folder or Hub id: encode images on the fly. With latents, it is the one "
        "they were encoded by, unless given.",
    )

    def problems(self):
        yield from DataConfig.problems(self)
        if self.latents and self.random_flip:
            yield "random_flip needs images: latents cannot be mirrored"


class CleanData:
    """The clean samples of a `CleanDataConfig`.

    Attributes: `dataset`, its rows; `vae`, None for pixels; `shape` (channels, height, width) of a sample;
    `num_classes` and `id2label`, None without labels.
    """

    def __init__(self, config, accelerator):
        self.random_flip, self.vae = config.random_flip, None
        if config.latents:
            with accelerator.main_process_first():
                folder = fetch_latents(config.latents)
            self.dataset = LatentDataset(folder)
            vae = config.vae or self.dataset.facts["vae"]
            # of latents from the Hub, it may be in their own folder
            vae = os.path.join(folder, vae) if vae == "vae" else vae
            self.vae = load_vae(vae)
            if fingerprint(self.vae) != self.dataset.facts["vae_fingerprint"]:
                raise ValueError(
                    f"the latents in {config.latents!r} were encoded by another autoencoder than the one that is now "
                    f"in {vae!r}: encode them anew, or pass --vae with the one they are from"
                )
            self.vae.to(accelerator.device)
            self.shape = self.dataset.shape
        else:
            with accelerator.main_process_first():
                self.dataset = ImageDataset(config)
            self.shape = self.dataset.shape
            if config.vae:
                self.vae = load_vae(config.vae).to(accelerator.device)
                example = self.dataset[0]["images"][None].to(accelerator.device)
                self.shape = tuple(encode_moments(self.vae, example)[0].shape[1:])
        self.num_classes, self.id2label = self.dataset.num_classes, self.dataset.id2label

    def facts(self, config):
        """Where the rows are from, for the card."""
        source = self.dataset.facts if config.latents else vars(config) | {"dataset_on_hub": on_hub(config.dataset)}
        facts = {key: source.get(key) for key in ("dataset", "dataset_on_hub", "split", "resolution")}
        return {"rows": len(self.dataset)} | facts

    def draw(self, batch, draws):
        """Clean samples (B, *shape) of a batch of the dataset's rows: images, mirrored where asked for, or normalised
        latents drawn from the autoencoder's posterior."""
        if "images" in batch:
            x0 = batch["images"]
            if self.random_flip:
                flipped = draws.uniform() < 0.5
                x0 = torch.where(flipped.reshape(-1, 1, 1, 1), x0.flip(-1), x0)
        if self.vae is not None:
            with torch.no_grad():
                mean, std = (batch["mean"], batch["std"]) if "mean" in batch else encode_moments(self.vae, x0)
            x0 = normalize_latents(mean + std * draws.normal(mean.shape[1:]), self.vae.config)
        return x0
