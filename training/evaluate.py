"""Measure a pipeline, or images that were made before: distances to real images, classes, likelihood.

    python training/evaluate.py --pipeline runs/quick_start/diffusion/pipeline --num_images 500
    python training/evaluate.py --pipeline runs/dit/pipeline --num_images 10000 --features facebook/dinov2-base
    python training/evaluate.py --samples samples.npz --num_images 50000 --features inception --reference_split train
    python training/evaluate.py --pipeline runs/pixels/pipeline --num_images 0 --likelihood 256

Distances (--features): Fréchet distance, kernel distance (KID), precision and recall and, of features that classify,
the Inception score. FID is the Fréchet distance in the features "inception"; of other features it is named by them.

Classes: a small classifier is trained on the dataset's training images; its accuracy on real test images is measured
first, then on generated images against the class that each was asked to be.

Likelihood: the exact one of the probability-flow ODE (Song et al. 2021, section 4.3) of test images without a class: of
a model of pixels in bits/dim, with uniform dequantisation, of a latent model in nats/dim of its latents.

Image i is drawn from seed + i, so the figures depend neither on the batch size nor on the number of processes. They go
into metrics.json of the pipeline folder and onto its model card; of images alone they are printed.
"""

import json
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from classifier import accuracy, train_classifier
from config import DataConfig, one_line_errors, option, parse
from data import ImageDataset, on_hub
from metrics import (
    ClassifierFeatures,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    open_features,
    precision_and_recall,
)
from PIL import Image
from provenance import provenance
from tqdm.auto import tqdm

from score_sde.hub import add_metrics, load_bundle
from score_sde.pipelines.likelihood import dequantize


@dataclass
class EvaluateConfig(DataConfig):
    """Measure a pipeline: how well it follows the classes that it is asked for, and the likelihood of real images."""

    pipeline: str | None = option(None, "The pipeline to measure: a folder.")
    samples: str | None = option(
        None, "Images to measure instead: a folder of them, or an .npz file with uint8 (N, H, W, C), as ADM has it."
    )
    save_samples: str | None = option(None, "Also write the generated images, as such an .npz file.")
    test_split: str = option("test", "Split of real images that the classifier is tested on.")
    num_images: int = option(500, "Images to generate, the classes in turn; 0 leaves the classes out.")
    features: str | None = option(
        None,
        "Distances in these features: classifier (the small one), inception, an .onnx file, or a vision model of "
        "transformers by Hub id or folder.",
    )
    reference_split: str = option("train", "Split of real images that the distances are to.")
    reference_images: int = option(0, "That many of its images, from the first; 0 for all.")
    repeats: int = option(1, "Measure distances of this many sets of images, from further seeds: mean and spread.")
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
        if (self.pipeline is None) == (self.samples is None):
            yield "pass either --pipeline or --samples"
        if self.pipeline is not None and not os.path.isfile(os.path.join(self.pipeline, "model_index.json")):
            yield f"pipeline {self.pipeline!r} is not a pipeline folder (it holds no model_index.json)"
        if self.samples is not None and (self.likelihood or self.save_samples or self.repeats > 1 or not self.features):
            yield "samples are measured by --features alone: no likelihood, save_samples or repeats"
        if self.label_column is None and self.num_images > 0 and self.features in (None, "classifier"):
            yield "label_column is missing: a classifier needs labels; pass --num_images 0 to leave it out"
        for name in ("num_inference_steps", "batch_size", "classifier_epochs", "num_probes", "repeats"):
            if getattr(self, name) < 1:
                yield f"{name} {getattr(self, name)} must be at least 1"
        if self.num_images < 0 or self.likelihood < 0 or self.num_images + self.likelihood == 0:
            yield f"num_images {self.num_images} and likelihood {self.likelihood}: one of them must be positive"
        if self.tolerance <= 0:
            yield f"tolerance {self.tolerance} must be positive"


# how the Hub calls metrics in a model index
METRIC_TYPES = {"FID": "fid", "kernel distance (KID)": "kid", "inception score": "inception_score"}


def share(count, accelerator):
    """This process's part of 0..count-1, and how many rows every process has once padded."""
    padded = -(-count // accelerator.num_processes)
    start = min(count, accelerator.process_index * padded)
    return range(start, min(count, start + padded)), padded


def gathered(rows, count, padded, accelerator):
    """The rows of all processes in their order, (count, ...)."""
    if accelerator.num_processes == 1:
        return rows
    filler = rows.new_zeros(padded - len(rows), *rows.shape[1:])
    return accelerator.gather(torch.cat([rows, filler]))[:count]


def generate(pipeline, indices, config, device):
    """Images (N, C, H, W) in [-1, 1], each from the seed of its index and, of a model with classes, of the class whose
    turn it is."""
    pipeline.to(device).set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(indices), config.batch_size), desc="generating", unit="batch"):
        part = indices[start : start + config.batch_size]
        output = pipeline(
            batch_size=len(part),
            class_labels=labels_of(part, pipeline),
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps,
            generator=[torch.Generator("cpu").manual_seed(config.seed + i) for i in part],
            output_type="pt",
        )
        images.append(output.images)
    return torch.cat(images) * 2 - 1


def labels_of(indices, pipeline):
    """The class that each image is asked to be, the classes in turn."""
    return None if pipeline.num_classes is None else [i % pipeline.num_classes for i in indices]


def read_samples(path, count):
    """The first `count` images (N, C, H, W) in [-1, 1] of a folder or an .npz file."""
    if path.endswith(".npz"):
        try:
            arrays = np.load(path)
            array = arrays[arrays.files[0]]
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"samples {path!r} cannot be read: {error}") from error
        if array.dtype != np.uint8 or array.ndim != 4:
            raise ValueError(f"samples {path!r} must hold uint8 (N, H, W, C); they are {array.dtype} {array.shape}")
    elif os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.lower().endswith((".png", ".jpg", ".jpeg", ".webp")))
        if not names:
            raise ValueError(f"samples {path!r}: the folder holds no PNG, JPEG or WebP files")
        opened = [np.asarray(Image.open(os.path.join(path, name)).convert("RGB")) for name in names[:count]]
        if len({image.shape for image in opened}) > 1:
            raise ValueError(f"samples {path!r}: the images are not of one size")
        array = np.stack(opened)
    else:
        raise ValueError(f"samples {path!r} is neither a folder nor an .npz file")
    if len(array) < count:
        raise ValueError(f"samples {path!r} holds {len(array)} images; --num_images asks for {count}")
    return torch.from_numpy(array[:count]).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_samples(path, images):
    """Write images (N, C, H, W) in [-1, 1] as ADM's .npz, under a temporary name first."""
    array = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    with open(path + ".partial", "wb") as file:
        np.savez(file, arr_0=array)
    os.replace(path + ".partial", path)


def quantized(images):
    """As 8-bit images have them: what is measured is what would be saved."""
    return ((images + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


@torch.no_grad()
def features_of(network, images, batch_size):
    """(features, logits or None) of images (N, C, H, W)."""
    found = [network(part) for part in images.split(batch_size)]
    logits = torch.cat([logits for _, logits in found]) if network.logits else None
    return torch.cat([features for features, _ in found]), logits


def reference_features(network, config, accelerator):
    """(features (N, D) of the real images, how the set is called)."""
    data = ImageDataset(config, split=config.reference_split)
    count = min(config.reference_images or len(data), len(data))
    indices, padded = share(count, accelerator)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(data, indices), batch_size=config.batch_size, num_workers=config.num_workers
    )
    found = [
        network(batch["images"].to(accelerator.device))[0] for batch in tqdm(loader, desc="real images", unit="batch")
    ]
    return gathered(torch.cat(found), count, padded, accelerator), f"the {count:,} images of {config.reference_split}"


def measure_distances(image_sets, network, config, accelerator):
    """The metrics of sets of generated images (N, C, H, W), of each the part of this process."""
    with torch.no_grad():
        real, reference = reference_features(network, config, accelerator)
    count, found = config.num_images, {}
    _, padded = share(count, accelerator)
    for images in image_sets:
        features, logits = features_of(network, quantized(images), config.batch_size)
        features = gathered(features, count, padded, accelerator)
        values = {"Fréchet distance": frechet_distance(*moments(features), *moments(real))}
        values["kernel distance (KID)"] = kernel_distance(features, real, seed=config.seed)[0]
        values["precision"], values["recall"] = precision_and_recall(real, features)
        if logits is not None:
            logits = gathered(logits, count, padded, accelerator)
            values["inception score"] = inception_score(logits, seed=config.seed)[0]
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    metrics = []
    for name, values in found.items():
        name = "FID" if (name, network.name) == ("Fréchet distance", "Inception") else name
        what = f"{count:,} samples" if name == "inception score" else f"{count:,} samples to {reference}"
        metric = {"name": f"{name} of {what}, {network.name}", "value": float(f"{np.mean(values):.5g}"), "n": count}
        metric |= {"type": METRIC_TYPES.get(name, name), "split": config.reference_split, "features": network.name}
        if len(values) > 1:
            metric["explanation"] = (
                f"mean of {len(values)} sets of samples, standard deviation {np.std(values, ddof=1):.3g}."
            )
        metrics.append(metric)
        if accelerator.is_main_process:
            print(f"{metric['name']}: {metric['value']}")
    return metrics


def sampling_facts(pipeline, config):
    return {
        "sampler": pipeline.scheduler.config.predictor,
        "num_inference_steps": config.num_inference_steps,
        "nfe": pipeline.scheduler.nfe,
        "guidance_scale": config.guidance_scale,
        "ema_decay": ema_decay(config),
    }


def ema_decay(config):
    """EMA decay of the weights of the pipeline, None where its training.json doesn't say."""
    path = os.path.join(config.pipeline, "training.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("config", {}).get("ema_decay")


def measure_classes(classifier, images, pipeline, config, accelerator):
    """The metrics of a classifier on real and on generated images; `images` are those of this process."""
    test = ImageDataset(config, split=config.test_split)
    real = next(iter(torch.utils.data.DataLoader(test, batch_size=len(test))))
    real_accuracy = accuracy(classifier, real["images"].to(accelerator.device), real["labels"].to(accelerator.device))
    indices, padded = share(config.num_images, accelerator)
    labels = torch.tensor(labels_of(indices, pipeline), device=accelerator.device)
    correct = (classifier(images).argmax(1) == labels).float()
    generated_accuracy = float(gathered(correct, config.num_images, padded, accelerator).mean())
    if accelerator.is_main_process:
        print(f"the classifier recognises {real_accuracy:.1%} of {len(test)} real test images")
        print(f"and {generated_accuracy:.1%} of {config.num_images} samples as the class asked for")
    return [
        {
            "name": "classifier accuracy on real images",
            "type": "accuracy",
            "value": round(real_accuracy, 4),
            "n": len(test),
            "split": config.test_split,
            "explanation": f"share of real {config.test_split} images that the classifier recognises; it was "
            f"trained on the images of split {config.split}.",
        },
        {
            "name": "classifier accuracy on samples",
            "type": "accuracy",
            "value": round(generated_accuracy, 4),
            "n": config.num_images,
            "split": config.split,
            "explanation": "share of samples that the same classifier recognises as the class asked for.",
        }
        | sampling_facts(pipeline, config),
    ]


def measure_images(pipeline, config, accelerator):
    """The metrics of generated images, or of those that are given."""
    network = classifier = None
    if config.features not in (None, "classifier"):
        network = open_features(config.features, accelerator.device)
    conditional = pipeline is not None and pipeline.num_classes is not None and config.label_column is not None
    if conditional or config.features == "classifier":
        train = ImageDataset(config)
        if conditional and pipeline.num_classes != train.num_classes:
            raise ValueError(f"the pipeline has {pipeline.num_classes} classes, the dataset {train.num_classes}")
        classifier = train_classifier(train, config.classifier_epochs, config.seed, accelerator.device)
        network = network or (ClassifierFeatures(classifier) if config.features else None)

    elif network is None and not config.save_samples:
        raise ValueError(
            "the pipeline has no classes to judge: pass --features, or --num_images 0 for likelihoods alone"
        )

    indices, padded = share(config.num_images, accelerator)
    if pipeline is None:
        images = read_samples(config.samples, config.num_images)[indices.start : indices.stop].to(accelerator.device)
        return measure_distances([images], network, config, accelerator)
    images = generate(pipeline, indices, config, accelerator.device)
    if config.save_samples:
        every = gathered(images, config.num_images, padded, accelerator)
        if accelerator.is_main_process:
            save_samples(config.save_samples, every)
    metrics = measure_classes(classifier, images, pipeline, config, accelerator) if conditional else []
    if network is not None:

        def sets():
            yield images
            for repeat in range(1, config.repeats):
                further = [repeat * config.num_images + i for i in indices]
                yield generate(pipeline, further, config, accelerator.device)

        facts = sampling_facts(pipeline, config)
        metrics += [metric | facts for metric in measure_distances(sets(), network, config, accelerator)]
    return metrics


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
        "type": "nats_per_dim" if pipeline.vae is not None else "bits_per_dim",
        "nfe": round(sum(nfe) / len(nfe)),
        "ema_decay": ema_decay(config),
        "explanation": f"exact likelihood of {what} {'given' if labelled else 'without'} the class by the "
        f"probability-flow ODE, standard error {error:.4f} over images and probes ({config.num_probes} per image), "
        f"tolerance {config.tolerance:g}"
        + (", uniform dequantisation." if pipeline.vae is None else "; the likelihood of the images is not known."),
    }


def main(argv=None):
    config = parse(EvaluateConfig, sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipeline = None if config.pipeline is None else load_bundle(config.pipeline)
    metrics = measure_images(pipeline, config, accelerator) if config.num_images else []
    if config.likelihood and accelerator.is_main_process:
        metrics.append(measure_likelihood(pipeline, config, accelerator.device))
    accelerator.wait_for_everyone()
    if pipeline is None or not accelerator.is_main_process:
        return
    shared = {"seed": config.seed, "dataset": config.dataset, "dataset_on_hub": on_hub(config.dataset)}
    shared |= provenance(accelerator.device)
    add_metrics(config.pipeline, [metric | shared for metric in metrics])


if __name__ == "__main__":
    with one_line_errors():
        main()
