"""Figures of the averaged weights during training: the loss on held-out images, the Fréchet distance of samples."""

from dataclasses import dataclass, fields

import torch
from classifier import train_classifier
from config import DataConfig, option
from data import ImageDataset
from evaluate import EvaluateConfig, features_of, gathered, generate, quantized, reference_features, share
from loop import Draws
from metrics import ClassifierFeatures, frechet_distance, moments, open_features


@dataclass
class ValidationConfig:
    evaluation_steps: int = option(
        0, "Optimizer steps between evaluations of the averaged weights (evaluation.jsonl); 0 for none."
    )
    evaluation_images: int = option(1000, "Images of an evaluation: held out, for the loss, and generated.")
    evaluation_split: str = option("test", "Split that the held-out images are from, the first ones.")
    evaluation_features: str | None = option(
        None,
        "Also measure the Fréchet distance of generated images to up to 10,000 training images in these features: "
        "classifier, inception, an .onnx file, or a vision model of transformers by Hub id or folder.",
    )

    def problems(self):
        if self.evaluation_steps < 0:
            yield f"evaluation_steps {self.evaluation_steps} must be at least 0"
        if self.evaluation_images < 2:
            yield f"evaluation_images {self.evaluation_images} must be at least 2"


def make_validation(config, accelerator, data, losses_of, make_pipeline):
    """f(network) -> {name: value}, for `fit`. Opens all that it needs, so that what is missing is known at once.

    Args:
        data: the `CleanData` that is trained on.
        losses_of: f(network, batch, draws) -> losses (B,), and more.
        make_pipeline: f(network) -> pipeline.
    """
    image_config = DataConfig(**{each.name: getattr(config, each.name) for each in fields(DataConfig)})
    if config.latents:  # which images they are of is not for the config to say
        for name in ("dataset", "split", "resolution"):
            setattr(image_config, name, data.dataset.facts[name])
        image_config.image_channels = data.vae.config.in_channels
    held_out = ImageDataset(image_config, split=config.evaluation_split)
    count = min(config.evaluation_images, len(held_out))
    own, _ = share(count, accelerator)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(held_out, own), config.batch_size, num_workers=config.num_workers
    )
    if config.evaluation_features:
        sampling = EvaluateConfig(
            **vars(image_config),
            num_images=config.evaluation_images,
            reference_split=image_config.split,
            reference_images=10_000,
            guidance_scale=config.sample_guidance_scale,
            num_inference_steps=config.sample_num_inference_steps,
        )
        if config.evaluation_features == "classifier":
            judge = train_classifier(
                ImageDataset(image_config), sampling.classifier_epochs, config.seed, accelerator.device
            )
            features = ClassifierFeatures(judge)
        else:
            features = open_features(config.evaluation_features, accelerator.device)
        with torch.no_grad():
            real = moments(reference_features(features, sampling, accelerator)[0])

    @torch.no_grad()
    def validate(network):
        total = torch.zeros(2, device=accelerator.device)
        for start, batch in zip(range(0, len(own), config.batch_size), loader, strict=True):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            # the same noise and times at every evaluation
            draws = Draws(config.seed, start, accelerator, len(batch["images"]))
            losses, _ = losses_of(network, batch, draws)
            total += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        loss, rows = accelerator.reduce(total, reduction="sum").tolist()
        values = {"held_out_loss": loss / rows}
        if config.evaluation_features:
            indices, padded = share(config.evaluation_images, accelerator)
            images = generate(make_pipeline(network), indices, sampling, accelerator.device)
            found, _ = features_of(features, quantized(images), sampling.batch_size)
            found = gathered(found, config.evaluation_images, padded, accelerator)
            values["frechet_distance"] = frechet_distance(*moments(found), *real)
        return values

    return validate
