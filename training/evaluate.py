"""Measure a pipeline, or images that were made before: distances to real images, classes, likelihood.

    python training/evaluate.py --pipeline runs/quick_start/diffusion/pipeline --num_images 500
    python training/evaluate.py --pipeline runs/dit/pipeline --num_images 10000 --features facebook/dinov2-base
    python training/evaluate.py --samples samples.npz --num_images 50000 --features inception --dataset imagefolder
    python training/evaluate.py --pipeline runs/pixels/pipeline --num_images 0 --likelihood 256

Distances (--features): Fréchet distance, kernel distance (KID), precision and recall and, of features that classify,
the Inception score. FID is the Fréchet distance in the features "inception"; of other features it is named by them.

Classes: a small classifier is trained on the dataset's training images; its accuracy on real test images is measured
first, then on generated images against the class that each was asked to be.

Likelihood: the exact one of the probability-flow ODE (Song et al. 2021, section 4.3) of test images without a class: of
a model of pixels in bits/dim, with uniform dequantisation, of a latent model in nats/dim of its latents.

The real images are those that the pipeline was trained on, in its size: neither need be given. Figures of another
dataset say so in their names. Everything is opened before the first image is drawn, and no more than a batch of images
is held at once, beside the features of all.

Image i is drawn from seed + i, so the figures depend neither on the batch size nor on the number of processes. They go
into metrics.json of the pipeline folder and onto its model card; of images alone they are printed.
"""

import json
import os
import re
import sys
import zipfile
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from classifier import recognises, train_classifier
from config import WORK_BEGUN, DataConfig, one_line_errors, option, parse
from cores import warn_of_busy_cores
from data import ImageDataset
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
from sources import on_hub
from tqdm.auto import tqdm

from score_sde.hub import add_metrics, load_bundle
from score_sde.model_card import dataset_name
from score_sde.pipelines.images import to_mode
from score_sde.pipelines.likelihood import dequantize
from score_sde.pipelines.writing import whole_file


# fewer images have no distance worth the name: no splits of the Inception score, hardly neighbours
LEAST_IMAGES = 10


@dataclass
class EvaluateConfig(DataConfig):
    """Measure a pipeline: how well it follows the classes that it is asked for, and the likelihood of real images."""

    dataset: str | None = option(
        None, "Real images, as for training; by default those that the pipeline was trained on. Samples need it."
    )
    split: str | None = option(
        None, "Split that the classifier is trained on; by default the one that the pipeline was trained on."
    )
    image_column: str | None = option(None, "Column that holds the images; by default as in training.")
    label_column: str | None = option(
        None, "Column that holds the class labels; by default as in training; 'none' leaves the classes out."
    )
    resolution: int | None = option(None, "Height and width in pixels: those of the pipeline's images or the samples.")
    image_channels: int | None = option(None, "1 for greyscale, 3 for RGB: those of the pipeline or the samples.")
    background: str | None = option(None, "Colour behind transparent images; by default as in training, else white.")
    skip_corrupt_images: bool = option(
        False, "Take the next row for an image that cannot be decoded, and name it; it is done where training did."
    )
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
    reference_split: str | None = option(
        None, "Split of real images that the distances are to; by default the one that the pipeline was trained on."
    )
    reference_images: int = option(0, "That many of its images, from the first; 0 for all.")
    repeats: int = option(1, "Measure distances of this many sets of images, from further seeds: mean and spread.")
    num_inference_steps: int = option(50, "Time steps of the sampler.")
    guidance_scale: float = option(1.0, "Classifier-free guidance: 1 is none.")
    batch_size: int = option(100, "Images generated at once.")
    classifier_epochs: int = option(6, "Epochs for which the classifier is trained.")
    likelihood: int = option(0, "Test images, from the first, whose likelihood is measured; 0 leaves it out.")
    num_probes: int = option(1, "Probes of the likelihood's trace, for every image.")
    tolerance: float = option(1e-4, "Tolerance of the likelihood's ODE.")
    seed: int = option(
        0, "Seed of the classifier; image i is drawn, and test image i dequantised and probed, from seed + i."
    )

    def problems(self):
        given = {each.name: getattr(self, each.name) for each in fields(DataConfig)}
        yield from DataConfig(**{name: value for name, value in given.items() if value is not None}).problems()
        if (self.pipeline is None) == (self.samples is None):
            yield "pass either --pipeline or --samples"
        if self.pipeline is not None and not os.path.isfile(os.path.join(self.pipeline, "model_index.json")):
            yield f"pipeline {self.pipeline!r} is not a pipeline folder (it holds no model_index.json)"
        if self.samples is not None:
            if self.likelihood or self.save_samples or self.repeats > 1 or not self.features:
                yield "samples are measured by --features alone: no likelihood, save_samples or repeats"
            if self.dataset is None:
                yield "dataset is missing: the real images that the samples are compared to"
        if self.label_column == "none" and self.num_images > 0 and self.features in (None, "classifier"):
            yield "label_column is missing: a classifier needs labels; pass --num_images 0 to leave it out"
        for name in ("num_inference_steps", "batch_size", "classifier_epochs", "num_probes", "repeats"):
            if getattr(self, name) < 1:
                yield f"{name} {getattr(self, name)} must be at least 1"
        for name in ("seed", "reference_images"):
            if getattr(self, name) < 0:
                yield f"{name} {getattr(self, name)} must be at least 0"
        if self.num_images < 0 or self.likelihood < 0 or self.num_images + self.likelihood == 0:
            yield f"num_images {self.num_images} and likelihood {self.likelihood}: one of them must be positive"
        if self.features and 0 < self.num_images < LEAST_IMAGES:
            yield f"num_images {self.num_images}: distances need at least {LEAST_IMAGES}; leave --features out"
        if self.features and 0 < self.reference_images < LEAST_IMAGES:
            yield f"reference_images {self.reference_images}: distances need at least {LEAST_IMAGES}, or 0 for all"
        if not self.tolerance > 0:
            yield f"tolerance {self.tolerance} must be positive"
        if self.save_samples and not os.path.isdir(os.path.dirname(os.path.abspath(self.save_samples))):
            yield f"save_samples {self.save_samples!r}: there is no such folder"


# how the Hub calls metrics in a model index
METRIC_TYPES = {"FID": "fid", "kernel distance (KID)": "kid", "inception score": "inception_score"}


# --- what is measured ---------------------------------------------------------------------------------------------


def open_pipeline(config, device):
    """The pipeline, ready to draw. Raises ValueError for one that cannot do what the config asks."""
    pipeline = load_bundle(config.pipeline)
    if not hasattr(pipeline, "log_likelihood"):
        raise ValueError(f"pipeline {config.pipeline!r} is a {type(pipeline).__name__}, which draws no images")
    if config.num_images and config.guidance_scale != 1 and pipeline.null_label is None:
        raise ValueError(
            f"guidance_scale {config.guidance_scale} needs a network with classes and a null label, which that of "
            f"{config.pipeline!r} hasn't: pass 1"
        )
    if config.likelihood:
        pipeline.check_adaptive(config.tolerance, config.tolerance, "ode")
        try:
            import torchdiffeq  # noqa: F401
        except ImportError:
            raise ValueError("likelihoods need torchdiffeq: pip install torchdiffeq") from None
    pipeline.to(device).set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def image_shape(pipeline):
    """Shape (channels, height, width) of the images that a pipeline draws."""
    return tuple(pipeline.decode(torch.zeros(pipeline.sample_shape(1), device=pipeline.device)).shape[1:])


class ArraySamples:
    """The images of an .npz file, uint8 (N, H, W, C), read from the disk as they are asked for, in order.

    Attributes: `shape` (C, H, W); `count`.
    """

    def __init__(self, path):
        self.path = path
        try:
            archive = zipfile.ZipFile(path)
            name = next((each for each in archive.namelist() if each.endswith(".npy")), None)
            if name is None:
                raise ValueError("it holds no array")
            self.file = archive.open(name)
            version = np.lib.format.read_magic(self.file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, in_columns, dtype = read_header(self.file)
            self.begin, size = self.file.tell(), archive.getinfo(name).file_size
        except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise ValueError(f"samples {path!r} cannot be read: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or in_columns:
            order = " in Fortran order" if in_columns else ""
            raise ValueError(f"samples {path!r} must hold uint8 (N, H, W, C); they are {dtype} {shape}{order}")
        if size - self.begin != np.prod(shape, dtype=object):
            raise ValueError(f"samples {path!r} cannot be read: the array is shorter or longer than its shape {shape}")
        self.count, self.rows, self.shape = shape[0], shape[1:], (shape[3], *shape[1:3])

    def read(self, numbers):
        """Images (B, C, H, W) in [-1, 1] of numbers that rise."""
        first, size = numbers[0], int(np.prod(self.rows))
        try:
            self.file.seek(self.begin + first * size)
            found = self.file.read((numbers[-1] + 1 - first) * size)
            array = np.frombuffer(found, np.uint8).reshape(-1, *self.rows)[[number - first for number in numbers]]
        except (OSError, ValueError, EOFError, IndexError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"samples {self.path!r} are damaged at image {first}: {error}") from error
        return from_bytes(torch.from_numpy(array).permute(0, 3, 1, 2))


class FolderSamples:
    """The images of a folder, in the order of their names, as `ArraySamples`; of `channels`, by default 1 where all are
    greyscale, else 3, and on `background`."""

    def __init__(self, folder, channels=None, background="white"):
        self.background = background
        kinds = (".png", ".jpg", ".jpeg", ".webp")
        self.paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.lower().endswith(kinds)]
        if not self.paths:
            raise ValueError(f"samples {folder!r}: the folder holds no PNG, JPEG or WebP files")
        sizes, grey = {}, True
        for path in self.paths:
            with self.opened(path) as image:
                sizes.setdefault(image.size, path)
                grey = grey and image.mode.split(";")[0] in ("1", "L", "LA", "La", "I", "F")
        if len(sizes) > 1:
            found = ", ".join(f"{size} ({os.path.basename(path)})" for size, path in list(sizes.items())[:3])
            raise ValueError(f"samples {folder!r}: the images are not of one size: {found}")
        [(width, height)] = sizes
        channels = channels or (1 if grey else 3)
        self.count, self.shape, self.mode = len(self.paths), (channels, height, width), "L" if channels == 1 else "RGB"

    @staticmethod
    @contextmanager
    def opened(path):
        try:
            with Image.open(path) as image:
                yield image
        except Exception as error:  # whatever the decoder raises
            raise ValueError(f"samples: {path!r} cannot be decoded: {error}") from error

    def read(self, numbers):
        found = []
        for number in numbers:
            with self.opened(self.paths[number]) as image:
                found.append(np.array(to_mode(image, self.mode, self.background)).reshape(*self.shape[1:], -1))
        return from_bytes(torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2))


def open_samples(config):
    """Images that were made before. Raises ValueError for what is none, or too few."""
    if config.samples.endswith(".npz"):
        samples = ArraySamples(config.samples)
    elif os.path.isdir(config.samples):
        samples = FolderSamples(config.samples, config.image_channels, config.background or "white")
    else:
        raise ValueError(f"samples {config.samples!r} is neither a folder nor an .npz file")
    if samples.count < config.num_images:
        raise ValueError(
            f"samples {config.samples!r} holds {samples.count} images; --num_images asks for {config.num_images}"
        )
    return samples


def training_facts(config):
    """What the pipeline's training.json says; {} without one."""
    path = os.path.join(config.pipeline or "", "training.json")
    if config.pipeline is None or not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
        return facts | {"config": dict(facts.get("config") or {})}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path!r} holds no facts of a training run: {error}") from None


def complete(config, shape):
    """The config with what it leaves out: which real images, by the pipeline's training.json, and their shape, that of
    the generated ones.

    Args:
        shape: (channels, height, width) of the images that are measured.

    Raises ValueError for options that contradict the shape, and where nothing says which dataset.
    """
    channels, height, width = shape
    if height != width or channels not in (1, 3):
        raise ValueError(f"images of {width} x {height} pixels and {channels} channels: squares of 1 or 3 are measured")
    for name, truth in (("resolution", height), ("image_channels", channels)):
        given = getattr(config, name)
        if given not in (None, truth):
            whose = "samples have" if config.pipeline is None else "pipeline draws"
            raise ValueError(f"{name} {given}: the {whose} {truth}; leave --{name} out")
    facts = training_facts(config)
    dataset, trained = config.dataset or facts.get("dataset"), facts.get("config", {})
    if dataset is None:
        raise ValueError(f"{config.pipeline!r} doesn't say what it was trained on: pass --dataset")
    config, known = replace(config, dataset=dataset), DataConfig()
    if trained_on(config, facts):
        # what latents were encoded from is not for the run's options to say
        said = {name: facts.get(name) for name in COLUMNS} if trained.get("latents") else trained
        known = replace(known, **{name: said[name] for name in COLUMNS if said.get(name) is not None})
    columns = {name: getattr(config, name) or getattr(known, name) for name in COLUMNS}
    if columns["label_column"] == "none":
        columns["label_column"] = None
    split = config.split or facts.get("split") or known.split
    changes = {"split": split, "reference_split": config.reference_split or split}
    return replace(config, resolution=height, image_channels=channels, **columns, **changes)


COLUMNS = ("image_column", "label_column", "num_classes", "background", "skip_corrupt_images")
# what names the splits of `open_data`
SPLIT_OPTIONS = {"train": "split", "test": "test_split", "reference": "reference_split"}


def open_data(config, pipeline):
    """The splits of real images that will be needed: {"train", "test", "reference": ImageDataset}, "train" for a
    classifier of their classes.

    Raises ValueError for what cannot be opened, or doesn't fit the pipeline.
    """
    classes = judges_classes(config, pipeline)
    splits = {}
    if classes or (config.num_images and config.features == "classifier"):
        splits["train"] = config.split
    if classes or config.likelihood:
        splits["test"] = config.test_split
    if config.num_images and config.features:
        splits["reference"] = config.reference_split
    facts = training_facts(config)
    data = {}
    for name, split in splits.items():
        try:
            data[name] = ImageDataset(config, split=split)
        except ValueError as error:
            remedy = f"--{SPLIT_OPTIONS[name]} names another split"
            if config.dataset == facts.get("dataset"):
                remedy += ". The pipeline was trained on it: where it is now, --dataset says"
            raise ValueError(f"{error}. {remedy}") from error
    if "train" in data and config.label_column is None:
        raise ValueError("label_column is missing: a classifier needs labels; choose other features")
    if classes and pipeline.num_classes != data["train"].num_classes:
        raise ValueError(
            f"the pipeline has {pipeline.num_classes} classes, the dataset {data['train'].num_classes}: pass "
            f"--label_column none to leave them out"
        )
    names = [list((each.id2label or {}).values()) for each in data.values()]
    if any(each != names[0] for each in names):
        raise ValueError(f"the splits of {config.dataset!r} have other classes: {'; '.join(map(str, names))}")
    own = pipeline.config.id2label if classes else None
    if own and trained_on(config, facts) and [own[key] for key in sorted(own, key=int)] != names[0]:
        raise ValueError(
            f"the pipeline's classes are {', '.join(own.values())}, those of {config.dataset!r} {', '.join(names[0])}: "
            f"pass --label_column none to leave them out"
        )
    if "reference" in data and len(data["reference"]) < LEAST_IMAGES:
        raise ValueError(
            f"split {config.reference_split!r} has {len(data['reference'])} images; distances need {LEAST_IMAGES}"
        )
    if config.likelihood and needs_class(pipeline) and config.label_column is None:
        raise ValueError("the network knows no null label: its likelihood needs labels; pass --label_column")
    if classes is False and not config.features and config.num_images and not config.save_samples:
        raise ValueError(
            "the pipeline has no classes to judge: pass --features, or --num_images 0 for likelihoods alone"
        )
    return data


def judges_classes(config, pipeline):
    """Whether a classifier looks at the classes of generated images."""
    return bool(config.num_images and pipeline and pipeline.num_classes is not None and config.label_column is not None)


def needs_class(pipeline):
    """Whether a network has no distribution without a class."""
    return pipeline.num_classes is not None and pipeline.null_label is None


def trained_on(config, facts):
    """Whether the real images are those that the pipeline was trained on."""
    own = {"dataset": config.dataset, "dataset_on_hub": on_hub(config.dataset)}
    return facts.get("dataset") is not None and dataset_name(own) == dataset_name(facts)


# --- by batch, shared by all processes ----------------------------------------------------------------------------


def rounds(count, batch_size, accelerator):
    """The numbers 0 to count - 1 shared by all processes, in rounds of a batch each: (the numbers of this process, how
    many the round has). Every process has as many, the last number again where there is none left for it."""
    processes = accelerator.num_processes
    number = -(-count // (batch_size * processes))
    size = -(-count // (number * processes))
    for start in range(0, count, size * processes):
        first = start + accelerator.process_index * size
        yield [min(i, count - 1) for i in range(first, first + size)], min(count - start, size * processes)


def gathered(rows, count, accelerator):
    """The rows of a round of all processes in the order of their numbers, (count, ...), on the CPU."""
    return accelerator.gather(rows.contiguous().to(accelerator.device))[:count].cpu()


def real_batches(data, count, config, accelerator, what=None):
    """(numbers of the rows, batch, size of the round) of the first images of a dataset, with a progress bar where it
    has a name."""
    parts = list(rounds(count, config.batch_size, accelerator))
    loader = torch.utils.data.DataLoader(data, batch_sampler=[own for own, _ in parts], num_workers=config.num_workers)
    bar = tqdm(loader, desc=what, unit="batch", disable=what is None or not accelerator.is_main_process)
    for (own, size), batch in zip(parts, bar, strict=True):
        yield own, {name: values.to(accelerator.device) for name, values in batch.items()}, size


class FeatureTable:
    """The features of images, and the logits of a network that classifies, as they come in; in the main process."""

    def __init__(self, network, accelerator):
        self.network, self.accelerator, self.parts = network, accelerator, []

    @torch.no_grad()
    def add(self, images, count):
        """Take in a round of images (B, C, H, W), of every process a part."""
        found = [gathered(each, count, self.accelerator) for each in self.network(images) if each is not None]
        if self.accelerator.is_main_process:
            self.parts.append(found)

    def columns(self):
        """(features (N, D), logits or None), float32."""
        columns = [torch.cat(each) for each in zip(*self.parts, strict=True)]
        return columns[0], columns[1] if len(columns) > 1 else None


def trained_classifier(data, epochs, seed, device):
    """A classifier of the classes of a dataset, the same in all processes."""
    network = train_classifier(data, epochs, seed, device)
    for values in network.state_dict().values():
        broadcast(values)
    return network


# --- images -------------------------------------------------------------------------------------------------------


def to_bytes(images):
    """Images in [-1, 1] as 8-bit images have them, uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images):
    return images.float() / 127.5 - 1


def quantized(images):
    """Images in [-1, 1] as if saved with 8 bits: what is measured is what would be saved."""
    return from_bytes(to_bytes(images))


def draw(pipeline, numbers, seed, guidance_scale, num_inference_steps):
    """(images (B, C, H, W) in [-1, 1], network evaluations), each from the seed of its number and, of a model with
    classes, of the class whose turn it is."""
    output = pipeline(
        batch_size=len(numbers),
        class_labels=labels_of(numbers, pipeline),
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in numbers],
        output_type="pt",
    )
    return output.images * 2 - 1, output.nfe


def labels_of(numbers, pipeline):
    """The class that each image is asked to be, the classes in turn."""
    return None if pipeline.num_classes is None else [i % pipeline.num_classes for i in numbers]


@contextmanager
def array_file(path, shape):
    """f(images (B, C, H, W), uint8), which adds them to an .npz file as ADM has it, of `shape` (N, C, H, W) in the end;
    nothing stays of one that isn't finished."""
    count, channels, *size = shape
    with (
        whole_file(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, channels)}
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda images: file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())


# --- figures ------------------------------------------------------------------------------------------------------


def measure_images(pipeline, samples, data, network, config, accelerator):
    """The metrics of generated images, or of samples that are given; [] but in the main process."""
    classifier = tables = None
    if "train" in data:
        classifier = trained_classifier(data["train"], config.classifier_epochs, config.seed, accelerator.device)
    if config.features == "classifier":
        network = ClassifierFeatures(classifier, f"{ClassifierFeatures.name}{of_other_data(config)}")
    judge = classifier if judges_classes(config, pipeline) else None
    recognised, correct, nfe = [], [], None
    if judge is not None:
        for _, batch, size in real_batches(data["test"], len(data["test"]), config, accelerator, "test images"):
            right = recognises(judge, batch["images"], batch["labels"])
            recognised.append(gathered(right, size, accelerator))
    if network is not None:
        real = FeatureTable(network, accelerator)
        count = min(config.reference_images or len(data["reference"]), len(data["reference"]))
        for _, batch, size in real_batches(data["reference"], count, config, accelerator, "real images"):
            real.add(batch["images"], size)
        tables = [FeatureTable(network, accelerator) for _ in range(config.repeats)]

    for repeat in range(config.repeats if tables else 1):
        saves = config.save_samples and repeat == 0
        shape = (config.num_images, config.image_channels, config.resolution, config.resolution)
        writes = saves and accelerator.is_main_process
        with array_file(config.save_samples, shape) if writes else nullcontext() as write:
            parts = list(rounds(config.num_images, config.batch_size, accelerator))
            for own, size in tqdm(parts, desc="images", unit="batch", disable=not accelerator.is_main_process):
                if samples is not None:
                    images = samples.read(own).to(accelerator.device)
                else:
                    numbers = [repeat * config.num_images + i for i in own]
                    images, nfe = draw(
                        pipeline, numbers, config.seed, config.guidance_scale, config.num_inference_steps
                    )
                if not torch.isfinite(images).all():
                    raise ValueError(f"among the images of seeds {own[0]} to {own[-1]} some are not finite")
                images = quantized(images)
                if saves:
                    every = gathered(to_bytes(images), size, accelerator)
                    if writes:
                        write(every)
                if judge is not None and repeat == 0:
                    labels = torch.tensor(labels_of(own, pipeline), device=accelerator.device)
                    correct.append(gathered(recognises(judge, images, labels), size, accelerator))
                if tables:
                    tables[repeat].add(images, size)

    # what follows is the main process's alone; no other waits for it
    if not accelerator.is_main_process:
        return []
    facts = {} if pipeline is None else sampling_facts(pipeline, nfe, config)
    metrics = [] if judge is None else class_metrics(torch.cat(recognised), torch.cat(correct), facts, config)
    return metrics + (distance_metrics(tables, real, network, facts, config, accelerator) if tables else [])


def distance_metrics(tables, real, network, facts, config, accelerator):
    """The metrics of the features of some sets of images beside those of real ones."""
    real, _ = real.columns()
    found = {}
    for table in tables:
        features, logits = table.columns()
        values = {"Fréchet distance": frechet_distance(*moments(features), *moments(real))}
        values["kernel distance (KID)"] = kernel_distance(features, real, seed=config.seed)[0]
        values["precision"], values["recall"] = precision_and_recall(real, features, device=accelerator.device)
        if logits is not None:
            values["inception score"] = inception_score(logits, seed=config.seed)[0]
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    metrics, count = [], config.num_images
    for name, values in found.items():
        name = "FID" if (name, network.name) == ("Fréchet distance", "Inception") else name
        what = f"{count:,} samples"
        if name != "inception score":
            what += f" to the {len(real):,} images of {config.reference_split}{of_other_data(config)}"
        metric = {"name": f"{name} of {what}, {network.name}", "value": float(f"{np.mean(values):.5g}"), "n": count}
        metric |= {"type": METRIC_TYPES.get(name, name), "split": config.reference_split, "features": network.name}
        metric |= {"reference_images": len(real), "repeats": len(values)} | facts
        if config.features == "classifier":
            metric |= classifier_facts(config)
        if len(values) > 1:
            metric["explanation"] = (
                f"mean of {len(values)} sets of samples, standard deviation {np.std(values, ddof=1):.3g}."
            )
        metrics.append(metric)
        print(f"{metric['name']}: {metric['value']}")
    return metrics


def class_metrics(recognised, correct, facts, config):
    """The metrics of a classifier that recognised real images or didn't, (N,), and generated ones."""
    real, generated = (float(each.float().mean()) for each in (recognised, correct))
    print(f"the classifier recognises {real:.1%} of {len(recognised)} real test images")
    print(f"and {generated:.1%} of {len(correct)} samples as the class asked for")
    return [
        {
            "name": f"classifier accuracy on real images{of_other_data(config)}",
            "type": "accuracy",
            "value": round(real, 4),
            "n": len(recognised),
            "split": config.test_split,
            "explanation": f"share of real {config.test_split} images that the classifier recognises; it was "
            f"trained on the images of split {config.split}.",
        }
        | classifier_facts(config),
        {
            "name": f"classifier accuracy on samples{of_other_data(config)}",
            "type": "accuracy",
            "value": round(generated, 4),
            "n": len(correct),
            "split": config.split,
            "explanation": "share of samples that the same classifier recognises as the class asked for.",
        }
        | classifier_facts(config)
        | facts,
    ]


def classifier_facts(config):
    return {"classifier_split": config.split, "classifier_epochs": config.classifier_epochs}


def of_other_data(config):
    """What a figure's name says where the real images are not those that the pipeline was trained on."""
    if trained_on(config, training_facts(config)):
        return ""
    return f" of {dataset_name({'dataset': config.dataset, 'dataset_on_hub': on_hub(config.dataset)})}"


def sampling_facts(pipeline, nfe, config):
    return {
        "sampler": pipeline.scheduler.config.get("predictor") or type(pipeline.scheduler).__name__,
        "num_inference_steps": config.num_inference_steps,
        "nfe": nfe,
        "guidance_scale": config.guidance_scale,
    } | averaging_facts(config)


def averaging_facts(config):
    """Which average the weights of the pipeline are, as far as its training.json says."""
    facts = training_facts(config)
    found = {"ema_decay": facts.get("config", {}).get("ema_decay"), "ema_sigma_rel": facts.get("ema_sigma_rel")}
    return {name: value for name, value in found.items() if value is not None}


def measure_likelihood(pipeline, test, config, accelerator):
    """The metric of the likelihood of real images; [] but in the main process."""
    count, given, values, nfe = min(config.likelihood, len(test)), needs_class(pipeline), [], []
    for own, batch, size in real_batches(test, count, config, accelerator, "likelihood"):
        generators = [torch.Generator().manual_seed(config.seed + i) for i in own]
        images = batch["images"]
        if pipeline.vae is None:
            rows = [dequantize(to_bytes(each), g) for each, g in zip(images.cpu(), generators, strict=True)]
            images = torch.stack(rows).to(accelerator.device)
        found = pipeline.log_likelihood(
            images=images,
            class_labels=batch["labels"] if given else None,
            num_probes=config.num_probes,
            generator=generators,
            rtol=config.tolerance,
            atol=config.tolerance,
        )
        value = found.bits_per_dim() if pipeline.vae is None else found.nats_per_dim()
        values.append(gathered(value.float(), size, accelerator))
        nfe.append(gathered(torch.full((len(own),), float(found.nfe)), size, accelerator))
    if not accelerator.is_main_process:
        return []
    values, nfe = torch.cat(values), torch.cat(nfe)
    unit, what = ("nats/dim", "the normalised latents") if pipeline.vae is not None else ("bits/dim", "the pixels")
    error = (
        f"standard error {float(values.std() / count**0.5):.4f} over images and probes" if count > 1 else "one image"
    )
    print(f"{values.mean():.4f} {unit} of {what} on {count} test images, {error}")
    metric = {
        "name": f"negative log-likelihood of {what}, {unit}{of_other_data(config)}",
        "value": round(float(values.mean()), 4),
        "n": count,
        "split": config.test_split,
        "type": "nats_per_dim" if pipeline.vae is not None else "bits_per_dim",
        "nfe": round(float(nfe.mean())),
        "num_probes": config.num_probes,
        "tolerance": config.tolerance,
        "explanation": f"exact likelihood of {what} {'given' if given else 'without'} the class by the "
        f"probability-flow ODE, {error} ({config.num_probes} probes per image), "
        f"tolerance {config.tolerance:g}"
        + (", uniform dequantisation." if pipeline.vae is None else "; the likelihood of the images is not known."),
    }
    return [metric | averaging_facts(config)]


def hub_revision(dataset):
    """The commit of a dataset that was read from the Hub; None for another."""
    names = [file["filename"] for file in dataset.data.cache_files] if on_hub(dataset.name) else []
    commits = [re.search(r"[/\\]([0-9a-f]{40})[/\\]", name) for name in names]
    return commits[0][1] if commits and commits[0] else None


def main(argv=None):
    config = parse(EvaluateConfig, sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    warn_of_busy_cores(accelerator)

    # everything that will be needed, before anything is drawn
    pipeline = samples = network = None
    if config.samples is None:
        pipeline = open_pipeline(config, accelerator.device)
        config = complete(config, image_shape(pipeline))
    else:
        samples = open_samples(config)
        config = complete(config, samples.shape)
    data = open_data(config, pipeline)
    for line in dict.fromkeys(each.describe() for each in data.values()):
        accelerator.print(line)
    if config.num_images and config.features not in (None, "classifier"):
        network = open_features(config.features, accelerator.device)
    WORK_BEGUN.set()

    likelihood = measure_likelihood(pipeline, data["test"], config, accelerator) if config.likelihood else []
    metrics = measure_images(pipeline, samples, data, network, config, accelerator) if config.num_images else []
    accelerator.end_training()
    if pipeline is None or not accelerator.is_main_process:
        return
    own = {"dataset": config.dataset, "dataset_on_hub": on_hub(config.dataset)}
    shared = own | {"dataset": dataset_name(own), "seed": config.seed}
    shared |= {"resolution": config.resolution, "image_channels": config.image_channels}
    revision = hub_revision(next(iter(data.values()))) if data else None
    shared |= {"dataset_revision": revision} if revision else {}
    shared |= provenance(accelerator.device)
    add_metrics(config.pipeline, [metric | shared for metric in metrics + likelihood])


if __name__ == "__main__":
    with one_line_errors():
        main()
