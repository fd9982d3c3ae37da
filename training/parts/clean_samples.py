"""Clean samples, and what a network is told of them, made of batches of rows: in training, and wherever a model is
measured on real images."""

import torch

from score_sde.pipelines.latents import encode_moments, normalize_latents

from .precision import frozen


class CleanSamples:
    """What is made of a batch of rows.

    Args:
        vae: the autoencoder whose latents the samples are; None for pixels.
        num_classes: None without labels.
        captions: a `CaptionEncoder`, None without captions.
        condition: an `ImageCondition`, None without images that are seen beside the samples.
        random_flip: mirror half of the images.

    Attributes: `units`, of the data, arguments of a pipeline, see `pipelines.units`; none of images. `vision`, an
    `alignment.VisionModel` whose features of the images a batch has or gets; None without. `precision`, the
    `mixed_precision` of what encodes images and captions on the way, as `frozen` takes it.
    """

    units: dict = {}
    vision = precision = None

    def __init__(self, vae=None, num_classes=None, captions=None, condition=None, random_flip=False):
        self.vae, self.num_classes, self.captions, self.condition = vae, num_classes, captions, condition
        self.random_flip = random_flip

    @property
    def discretized(self):
        """Whether samples are whole numbers 0 to 255, as those of images are."""
        return self.vae is None

    @property
    def told(self):
        """The keywords of a network's forward that are conditions."""
        found = [] if self.num_classes is None else ["class_labels"]
        for each in (self.captions, self.condition):
            found += [] if each is None else each.names
        return found

    def conditions(self, batch, draws=None):
        """What a network may be told of the samples of a batch, mirrored where asked for, {keyword of its forward:
        tensor (B, ...)}; `draws` choose among captions."""
        found = {} if self.num_classes is None else {"class_labels": batch["labels"]}
        if self.captions is not None:
            with frozen(self.captions.text_encoder.device, self.precision):
                found |= self.captions.conditions(batch, draws)
        return found if self.condition is None else found | self.condition.conditions(batch, self.precision)

    def mirrored(self, batch, draws):
        """A batch of the dataset's rows with half of the images, or latents, and what they are seen beside mirrored,
        where that is asked for."""
        if not self.random_flip:
            return batch
        flipped, changed = draws.chance(0.5).reshape(-1, 1, 1, 1), {}
        for name in ("images", "condition_images"):
            if name in batch:
                changed[name] = batch[name].flip(-1)
        for name in ("mean", "std", "condition_mean", "features"):
            if name in batch:
                changed[name] = batch[f"{name}_flipped"]
        return batch | {name: torch.where(flipped, x, batch[name]) for name, x in changed.items()}

    def draw(self, batch, draws):
        """Clean samples (B, C, ...) of a batch: images, or normalised latents drawn from the autoencoder's
        posterior."""
        if self.vae is None:
            return batch["images"]
        if "mean" in batch:
            mean, std = batch["mean"], batch["std"]
        else:
            with torch.no_grad(), frozen(batch["images"].device, self.precision):
                mean, std = (each.float() for each in encode_moments(self.vae, batch["images"]))
        return normalize_latents(mean + std * draws.normal(mean.shape[1:]), self.vae.config)
