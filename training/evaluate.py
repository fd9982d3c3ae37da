"""Measure how well a class-conditional pipeline follows the classes that it is asked for.

    python training/evaluate.py --pipeline runs/quick_start/diffusion/pipeline --num_images 500

A small classifier is trained on the dataset's training images; its accuracy on real test images is measured first, then
on generated images against the class that each was asked to be. The figures go into metrics.json of the pipeline folder
and onto its model card. Image i is drawn from seed + i, so the figures don't depend on the batch size.
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


@dataclass
class EvaluateConfig(DataConfig):
    """Measure how well a class-conditional pipeline follows the classes that it is asked for."""

    pipeline: str = option("", "The pipeline to measure: a folder.")
    test_split: str = option("test", "Split of real images that the classifier is tested on.")
    num_images: int = option(500, "Images to generate, the classes in turn.")
    num_inference_steps: int = option(50, "Time steps of the sampler.")
    guidance_scale: float = option(1.0, "Classifier-free guidance: 1 is none.")
    batch_size: int = option(100, "Images generated at once.")
    classifier_epochs: int = option(6, "Epochs for which the classifier is trained.")
    seed: int = option(0, "Seed of the classifier; image i is drawn from seed + i.")

    def problems(self):
        yield from super().problems()
        if not os.path.isfile(os.path.join(self.pipeline, "model_index.json")):
            yield f"pipeline {self.pipeline!r} is not a pipeline folder (it holds no model_index.json)"
        if self.label_column is None:
            yield "label_column is missing: a classifier needs labels"
        for name in ("num_images", "num_inference_steps", "batch_size", "classifier_epochs"):
            if getattr(self, name) < 1:
                yield f"{name} {getattr(self, name)} must be at least 1"


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


def main(argv=None):
    config = parse(EvaluateConfig, sys.argv[1:] if argv is None else argv)
    device = Accelerator().device
    train, test = ImageDataset(config), ImageDataset(config, split=config.test_split)
    pipeline = load_bundle(config.pipeline)
    if pipeline.num_classes != train.num_classes:
        raise ValueError(f"the pipeline has {pipeline.num_classes} classes, the dataset {train.num_classes}")

    classifier = train_classifier(train, config.classifier_epochs, config.seed, device)
    real = next(iter(torch.utils.data.DataLoader(test, batch_size=len(test))))
    real_accuracy = accuracy(classifier, real["images"].to(device), real["labels"].to(device))
    labels = [i % pipeline.num_classes for i in range(config.num_images)]
    generated = generate(pipeline, labels, config, device)
    generated_accuracy = accuracy(classifier, generated, torch.tensor(labels, device=device))

    provenance = {
        "seed": config.seed,
        "dataset": config.dataset,
        "command": " ".join([os.path.basename(sys.executable), *sys.argv]),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {device.type}",
    }
    add_metrics(
        config.pipeline,
        [
            {
                "name": "classifier accuracy on real images",
                "value": round(real_accuracy, 4),
                "n": len(test),
                "split": config.test_split,
                "explanation": f"share of real {config.test_split} images that the classifier recognises; it was "
                f"trained on the {len(train):,} images of split {config.split}.",
                **provenance,
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
                **provenance,
            },
        ],
    )
    print(f"the classifier recognises {real_accuracy:.1%} of {len(test)} real test images")
    print(f"and {generated_accuracy:.1%} of {config.num_images} samples as the class asked for")


if __name__ == "__main__":
    main()
