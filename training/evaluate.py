"""Measure a pipeline: how well it follows the classes that it is asked for, and the likelihood of real images.

    python training/evaluate.py --pipeline runs/quick_start/diffusion/pipeline --num_images 500
    python training/evaluate.py --pipeline runs/pixels/pipeline --num_images 0 --likelihood 256

Classes: a small classifier is trained on the dataset's training images; its accuracy on real test images is measured
first, then on generated images against the class that each was asked to be. Image i is drawn from seed + i, so the
figures don't depend on the batch size.

Likelihood: the exact one of the probability-flow ODE (Song et al. 2021, section 4.3) of test images without a class: of
a model of pixels in bits/dim, with uniform dequantisation, of a latent model in nats/dim of its latents.

The figures go into metrics.json of the pipeline folder and onto its model card.
"""

import os
import platform
import sys
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from classifier import accuracy, train_classifier
from config import DataConfig, option, parse
from data import ImageDataset
from tqdm.auto import tqdm

from score_sde.hub import add_metrics, load_bundle
from score_sde.pipelines.likelihood import dequantize


@dataclass
class EvaluateConfig(DataConfig):
    """Measure a pipeline: how well it follows the classes that it is asked for, and the likelihood of real images."""

    pipeline: str = option("", "The pipeline to measure: a folder.")
    test_split: str = option("test", "Split of real images that the classifier is tested on.")
    num_images: int = option(500, "Images to generate, the classes in turn; 0 leaves the classes out.")
    num_inference_steps: int = option(50, "Time steps of the sampler.")
    guidance_scale: float = option(1.0, "Classifier-free guidance: 1 is none.")
    batch_size: int = option(100, "Images generated at once.")
    classifier_epochs: int = option(6, "Epochs for which the classifier is trained.")
    likelihood: int = option(0, "Test images, from the first, whose likelihood is measured; 0 leaves it out.")
    num_probes: int = option(1, "Probes of the likelihood's trace, for every image.")
    tolerance: float = option(1e-4, "Tolerance of the likelihood's ODE.")
    seed: int = option(0, "Seed of the classifier, the probes and the dequantisation; image i is drawn from seed + i.")

    def problems(self):
        yield from super().problems()
        if not os.path.isfile(os.path.join(self.pipeline, "model_index.json")):
            yield f"pipeline {self.pipeline!r} is not a pipeline folder (it holds no model_index.json)"
        if self.label_column is None and self.num_images > 0:
            yield "label_column is missing: a classifier needs labels; pass --num_images 0 to leave it out"
        for name in ("num_inference_steps", "batch_size", "classifier_epochs", "num_probes"):
            if getattr(self, name) < 1:
                yield f"{name} {getattr(self, name)} must be at least 1"
        if self.num_images < 0 or self.likelihood < 0 or self.num_images + self.likelihood == 0:
            yield f"num_images {self.num_images} and likelihood {self.likelihood}: one of them must be positive"
        if self.tolerance <= 0:
            yield f"tolerance {self.tolerance} must be positive"


def generate(pipeline, labels, config, device):
    """Images (N, C, H, W) in [-1, 1] for the labels, one seed each."""
    pipeline.to(device).set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(labels), config.batch_size), desc="generating", unit="batch"):
        part = labels[start : start + config.batch_size]
        seeds = range(config.seed + start, config.seed + start + len(part))
        images.append(
            pipeline(
                class_labels=part,
                guidance_scale=config.guidance_scale,
                num_inference_steps=config.num_inference_steps,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="pt",
            ).images
        )
    return torch.cat(images) * 2 - 1


def measure_classes(pipeline, config, device):
    """The metrics of a classifier on real and on generated images."""
    train, test = ImageDataset(config), ImageDataset(config, split=config.test_split)
    if pipeline.num_classes != train.num_classes:
        raise ValueError(f"the pipeline has {pipeline.num_classes} classes, the dataset {train.num_classes}")
    classifier = train_classifier(train, config.classifier_epochs, config.seed, device)
    real = next(iter(torch.utils.data.DataLoader(test, batch_size=len(test))))
    real_accuracy = accuracy(classifier, real["images"].to(device), real["labels"].to(device))
    labels = [i % pipeline.num_classes for i in range(config.num_images)]
    generated = generate(pipeline, labels, config, device)
    generated_accuracy = accuracy(classifier, generated, torch.tensor(labels, device=device))
    print(f"the classifier recognises {real_accuracy:.1%} of {len(test)} real test images")
    print(f"and {generated_accuracy:.1%} of {config.num_images} samples as the class asked for")
    return [
        {
            "name": "classifier accuracy on real images",
            "value": round(real_accuracy, 4),
            "n": len(test),
            "split": config.test_split,
            "explanation": f"share of real {config.test_split} images that the classifier recognises; it was "
            f"trained on the {len(train):,} images of split {config.split}.",
        },
        {
            "name": "classifier accuracy on samples",
            "value": round(generated_accuracy, 4),
            "n": config.num_images,
            "split": config.split,
            "sampler": pipeline.scheduler.config.predictor,
            "nfe": pipeline.scheduler.nfe,
            "guidance_scale": config.guidance_scale,
            "explanation": "share of samples that the same classifier recognises as the class asked for.",
        },
    ]


def measure_likelihood(pipeline, config, device):
    """The metric of the likelihood of real images."""
    test, generator = ImageDataset(config, split=config.test_split), torch.Generator().manual_seed(config.seed)
    count = min(config.likelihood, len(test))
    pipeline.to(device).set_progress_bar_config(disable=True)
    # a network that knows no null label has no distribution without a class
    labelled = pipeline.num_classes is not None and pipeline.null_label is None
    values, nfe = [], []
    for start in tqdm(range(0, count, config.batch_size), desc="likelihood", unit="batch"):
        images = torch.stack([test[i]["images"] for i in range(start, min(start + config.batch_size, count))])
        if pipeline.vae is None:
            images = dequantize(((images + 1) * 127.5).round(), generator)
        found = pipeline.log_likelihood(
            images=images.to(device),
            class_labels=[test[start + i]["labels"] for i in range(len(images))] if labelled else None,
            num_probes=config.num_probes,
            generator=generator,
            rtol=config.tolerance,
            atol=config.tolerance,
        )
        values.append(found.bits_per_dim() if pipeline.vae is None else found.nats_per_dim)
        nfe.append(found.nfe)
    values = torch.cat(values)
    error = float(values.std() / count**0.5) if count > 1 else float("nan")
    unit, what = ("nats/dim", "the normalised latents") if pipeline.vae is not None else ("bits/dim", "the pixels")
    print(f"{values.mean():.4f} +- {error:.4f} {unit} of {what} on {count} test images")
    return {
        "name": f"negative log-likelihood of {what}, {unit}",
        "value": round(float(values.mean()), 4),
        "n": count,
        "split": config.test_split,
        "nfe": round(sum(nfe) / len(nfe)),
        "explanation": f"exact likelihood of {what} {'given' if labelled else 'without'} the class by the "
        f"probability-flow ODE, standard error {error:.4f} over images and probes ({config.num_probes} per image), "
        f"tolerance {config.tolerance:g}"
        + (", uniform dequantisation." if pipeline.vae is None else "; the likelihood of the images is not known."),
    }


def main(argv=None):
    config = parse(EvaluateConfig, sys.argv[1:] if argv is None else argv)
    device = Accelerator().device
    pipeline = load_bundle(config.pipeline)
    metrics = measure_classes(pipeline, config, device) if config.num_images else []
    if config.likelihood:
        metrics.append(measure_likelihood(pipeline, config, device))
    provenance = {
        "seed": config.seed,
        "dataset": config.dataset,
        "command": " ".join([os.path.basename(sys.executable), *sys.argv]),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {device.type}",
    }
    add_metrics(config.pipeline, [metric | provenance for metric in metrics])


if __name__ == "__main__":
    main()
