"""Images that a network sees beside the samples: read from a column of the dataset, each paired with a row's image, or
measured from that image itself; in pixels, or encoded by the autoencoder of the latents."""

from dataclasses import dataclass

import torch

from score_sde.pipelines.image_conditions import Measurement
from score_sde.pipelines.latents import data_channels, encode_moments, normalize_latents

from .config import option
from .precision import frozen


@dataclass
class ImageConditionConfig:
    condition_column: str | None = option(
        None,
        "Column that holds an image for each image, which the network sees beside it: a photograph in grey, a depth "
        "map, a mask, a smaller one; resized and cropped like the image. 'none' for latents that have them, to train "
        "without.",
        "image conditions",
        common=True,
    )
    condition_from: str | None = option(
        None,
        "Make that image from the image itself: downsample:4, the means of 4 x 4 pixels; grayscale; blur:1.5, by a "
        "Gaussian of that many pixels.",
        "image conditions",
        common=True,
    )
    condition_channels: int | None = option(
        None,
        "Channels of the column's images, 1 or 3; those of the images unless given. With an autoencoder they are its "
        "own.",
        "image conditions",
    )

    def condition_problems(self):
        if self.condition_column and self.condition_from:
            yield "condition_column and condition_from were given: pass one of them"
        if self.condition_channels not in (None, 1, 3):
            yield f"condition_channels {self.condition_channels} must be 1 or 3"
        elif self.condition_channels is not None and not self.reads_conditions:
            yield "condition_channels needs condition_column, the images that have them"
        if self.condition_from is not None:
            try:
                Measurement(self.condition_from)
            except ValueError as error:
                yield str(error)

    @property
    def reads_conditions(self):
        return self.condition_column not in (None, "none")

    @property
    def has_conditions(self):
        return self.reads_conditions or self.condition_from is not None

    def make_condition(self, image_channels, sizes, vae=None, latent_channels=None):
        """The `ImageCondition` of images of these channels and sizes [(height, width), ...], None without."""
        if not self.has_conditions:
            return None
        column = self.condition_column if self.reads_conditions else None
        said = column, self.condition_from, self.condition_channels
        return ImageCondition(*said, image_channels, sizes, vae, latent_channels)

    def paired_column(self, image_channels):
        """(column, channels) of the images that are paired with images, as `ImageDataset` takes it, None without."""
        return (self.condition_column, self.condition_channels or image_channels) if self.reads_conditions else None


class ImageCondition:
    """What a network sees beside samples, and how it is made of a batch.

    Args:
        column: of the images, None where they are measured.
        measured: how, the name of a `Measurement`; None for a column.
        channels: of the images in the column, None for those of the images.
        image_channels, sizes: of the images, [(height, width), ...].
        vae, latent_channels: the autoencoder and the channels of its latents; None for pixels.

    Attributes: those; `width`, the number of channels that the network is told.

    Raises ValueError for images that cannot be measured so, and channels that the autoencoder doesn't take.
    """

    names = ("condition_sample",)

    def __init__(self, column, measured, channels, image_channels, sizes, vae=None, latent_channels=None):
        self.column, self.measured, self.vae = column, measured, vae
        self.measurement = None
        self.channels = channels or image_channels
        if measured is not None:
            self.measurement = Measurement(measured)
            for size in sizes:
                self.measurement.check(image_channels, size)
            self.channels = self.measurement.channels(image_channels)
        elif vae is not None and self.channels != data_channels(vae.config):
            raise ValueError(
                f"condition_channels {self.channels}: the autoencoder, which encodes the condition, too, is one of "
                f"{data_channels(vae.config)} channels"
            )
        self.width = self.channels if vae is None else latent_channels

    def facts(self):
        """What latents.json, or training.json, says of it, and tells data from others."""
        return {"column": self.column, "from": self.measured}

    def arguments(self):
        """Arguments of a network's class for it."""
        return {"condition_channels": self.width}

    def pixels(self, batch):
        """The condition images (B, channels, H, W) in [-1, 1] of a batch of images."""
        return batch["condition_images"] if self.measurement is None else self.measurement(batch["images"])

    @torch.no_grad()
    def encoded(self, images, precision=None):
        """The mean latents (B, C, h, w), float32, of condition images, in the autoencoder's own units, as sampling
        takes them; `precision` as `frozen` takes it."""
        with frozen(images.device, precision):
            return encode_moments(self.vae, images.expand(-1, data_channels(self.vae.config), -1, -1))[0].float()

    def conditions(self, batch, precision=None):
        """What a network is told of a batch of images or latents, {keyword of its forward: tensor (B, ...)}."""
        if self.vae is None:
            return {"condition_sample": self.pixels(batch)}
        latents = batch["condition_mean"] if "condition_mean" in batch else self.encoded(self.pixels(batch), precision)
        return {"condition_sample": normalize_latents(latents, self.vae.config)}


def condition_of_latents(facts, config, where):
    """(column, measured) of the conditions in latents, None for none.

    Args:
        facts: latents.json.
        config: an `ImageConditionConfig`, which must ask for no others.
        where: the latents, for messages.
    """
    found = facts.get("condition")
    if config.condition_column == "none":
        return None
    given = {"column": config.condition_column, "from": config.condition_from}
    if found is None and any(given.values()):
        raise ValueError(
            f"latents {where!r} hold no condition images: encode them anew by `score-sde encode-latents` with "
            f"--condition_column or --condition_from"
        )
    for name, value in given.items():
        if value not in (None, (found or {}).get(name)):
            raise ValueError(
                f"condition_{name} {value!r}: the condition images in latents {where!r} are those of "
                + " ".join(f"--condition_{each} {other}" for each, other in found.items() if other)
            )
    return found and (found["column"], found["from"])
