"""Measure a pipeline, or images that were made before: distances to real images, classes, likelihood.

    score-sde evaluate --pipeline runs/quick_start/diffusion/pipeline --num_images 500
    score-sde evaluate --pipeline runs/dit/pipeline --num_images 10000 --features facebook/dinov2-base
    score-sde evaluate --samples samples.npz --num_images 50000 --features inception --dataset imagefolder
    score-sde evaluate --pipeline runs/pixels/pipeline --num_images 0 --likelihood 256

Distances (--features): Fréchet distance, kernel distance (KID), precision and recall and, of features that classify,
the Inception score. FID is the Fréchet distance in the features "inception"; of other features it is named by them.

Classes: a small classifier is trained on the dataset's training images; its accuracy on real test images is measured
first, then on generated images against the class that each was asked to be.

Words: the prompts of a pipeline that follows them are the captions of test images, in turn, with their classes where it
has any. A pipeline that sees an image beside the sample is shown those of test images, in turn, with all else that they
say: how near its samples come to the images themselves, PSNR, and to what was measured of them, the residual.

Sizes: a pipeline of several sizes draws them in the proportions that it was trained on, and real images have the sizes
that they had in training.

Loss: the one that a model was trained by, of test images.

Likelihood: the exact one of the probability-flow ODE (Song et al. 2021, section 4.3) of test images without a class: of
a model of pixels in bits/dim, with uniform or truncated-normal dequantisation, of a latent model in nats/dim of its
latents.

The real images are those that the pipeline was trained on, in its size: neither need be given. Figures of another
dataset say so in their names. Everything is opened before the first image is drawn, and no more than a batch of images
is held at once, beside the features of all.

Image i is drawn from seed + i, so the figures depend neither on the batch size nor on the number of processes. They go
into metrics.json of the pipeline folder and onto its model card; of images alone they are printed.
"""

import copy
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from score_sde.pipelines.conditions import null_conditions
from score_sde.pipelines.likelihood import DEQUANTIZATIONS
from score_sde.pipelines.wording import unknown
from score_sde.sharing.bundles import load_bundle
from score_sde.sharing.facts import dataset_name, read_json
from score_sde.training.parts.buckets import in_words, shares_of_sizes
from score_sde.training.parts.captions import CaptionEncoder
from score_sde.training.parts.classifier import EPOCHS, recognises, trained_classifier
from score_sde.training.parts.clean_samples import CleanSamples
from score_sde.training.parts.config import DataConfig, LoaderConfig, option
from score_sde.training.parts.cores import warn_of_busy_cores
from score_sde.training.parts.diffusion_loss import DiffusionLoss
from score_sde.training.parts.figures import (
    averaging_facts,
    class_metrics,
    distance_metrics,
    of_other_data,
    pair_errors,
    pair_metrics,
    sampling_facts,
)
from score_sde.training.parts.image_conditions import ImageCondition
from score_sde.training.parts.measured import add_each, pipeline_problems, samples_file_problems, split_in_truth
from score_sde.training.parts.metrics import ClassifierFeatures, open_features
from score_sde.training.parts.networks import outside_classes
from score_sde.training.parts.objective_config import trained_objective
from score_sde.training.parts.options import WORK_BEGUN, one_line_errors, parse
from score_sde.training.parts.point_evaluation import PointEvaluateConfig, evaluate_points
from score_sde.training.parts.provenance import provenance
from score_sde.training.parts.real_images import (
    LEAST_IMAGES,
    complete,
    hub_revision,
    judges_classes,
    needs_class,
    open_data,
    prompts_and_labels,
    sizes_of,
    training_facts,
)
from score_sde.training.parts.rounds import FeatureTable, by_size, gathered, real_batches, rounds_by_size
from score_sde.training.parts.samples import array_file, draw, from_bytes, labels_of, open_samples, quantized, to_bytes
from score_sde.training.parts.signal_config import SIGNAL_KINDS
from score_sde.training.parts.signal_evaluation import SignalEvaluateConfig, evaluate_signals
from score_sde.training.parts.sources import on_hub
from score_sde.training.parts.text_evaluation import TextEvaluateConfig, evaluate_texts
from score_sde.training.parts.validation import RowDraws, conditions_of_rows


# conditions in words
TOLD = {
    "class_labels": "the class",
    "encoder_hidden_states": "the caption",
    "condition_sample": "the condition image",
}


@dataclass
class EvaluateConfig(LoaderConfig):
    """Measure a pipeline: how well it follows the classes that it is asked for, and the likelihood of real images."""

    configs = "evaluation"
    data_kind: ClassVar[str] = "image"
    other_kinds: ClassVar[dict] = {
        "text": TextEvaluateConfig,
        "points": PointEvaluateConfig,
        "signal": SignalEvaluateConfig,
    }

    # those of a DataConfig; `complete` finds what isn't given

    dataset: str | None = option(
        None,
        "Real images, as for training; by default those that the pipeline was trained on. Samples need it.",
        "data",
        common=True,
    )
    split: str | None = option(
        None,
        "Split that the classifier is trained on; by default the one that the pipeline was trained on.",
        "data",
    )
    image_column: str | None = option(None, "Column that holds the images; by default as in training.", "data")
    label_column: str | None = option(
        None,
        "Column that holds the class labels; by default as in training; 'none' leaves the classes out.",
        "data",
        common=True,
    )
    resolution: int | None = option(
        None, "Height and width in pixels: those of the pipeline's images or the samples.", "data", common=True
    )
    image_channels: int | None = option(
        None, "1 for greyscale, 3 for RGB: those of the pipeline or the samples.", "data"
    )
    caption_column: str | None = option(
        None,
        "Column that holds captions, which are the prompts of a pipeline that follows words; by default as in "
        "training.",
        "data",
    )
    condition_column: str | None = option(
        None,
        "Column that holds the images which a pipeline sees beside the sample; by default as in training.",
        "data",
    )
    background: str | None = option(
        None, "Colour behind transparent images; by default as in training, else white.", "data"
    )
    num_classes: int | None = option(
        None, "Number of classes, where the data don't say; by default as in training.", "data"
    )
    skip_corrupt_images: bool = option(
        False,
        "Take the next row for an image that cannot be decoded, and name it; it is done where training did.",
        "data",
    )
    pipeline: str | None = option(None, "The pipeline to measure: a folder.", "what is measured", common=True)
    network: str | None = option(
        None,
        "Class of its network, where it was trained as one from outside: package.module:Class, which is imported.",
        "what is measured",
    )
    samples: str | None = option(
        None,
        "Images to measure instead: a folder of them, or an .npz file with uint8 (N, H, W, C), as ADM has it.",
        "what is measured",
        common=True,
    )
    save_samples: str | None = option(
        None, "Also write the generated images, as such an .npz file.", "what is measured"
    )
    test_split: str = option(
        "test",
        "Split of real images that the classifier is tested on, and whose captions are the prompts.",
        "classes",
    )
    num_images: int = option(
        500,
        "Images to generate, the classes, or captions, in turn; 0 leaves the classes out.",
        "what is measured",
        common=True,
    )
    features: str | None = option(
        None,
        "Distances in these features: classifier (the small one), inception, an .onnx file, or a vision model of "
        "transformers by Hub id or folder.",
        "distances",
        common=True,
    )
    reference_split: str | None = option(
        None,
        "Split of real images that the distances are to; by default the one that the pipeline was trained on.",
        "distances",
    )
    reference_images: int = option(0, "That many of its images, from the first; 0 for all.", "distances")
    repeats: int = option(
        1, "Measure distances of this many sets of images, from further seeds: mean and spread.", "distances"
    )
    num_inference_steps: int = option(
        50, "Time steps of the sampler; a few-step model takes its own unless given.", "sampling", common=True
    )
    guidance_scale: float = option(1.0, "Classifier-free guidance: 1 is none.", "sampling", common=True)
    batch_size: int = option(100, "Images generated at once.", "sampling", common=True)
    classifier_epochs: int = option(EPOCHS, "Epochs for which the classifier is trained.", "classes")
    likelihood: int = option(
        0, "Test images, from the first, whose likelihood is measured; 0 leaves it out.", "likelihood", common=True
    )
    loss: int = option(
        0,
        "Test images, from the first, on which the loss of the training is measured; 0 leaves it out.",
        "likelihood",
        common=True,
    )
    num_probes: int = option(1, "Probes of the likelihood's trace, for every image.", "likelihood")
    dequantization: str = option(
        "uniform",
        "Noise that makes a density of whole numbers, of models of pixels: uniform, or truncated_normal, that of the "
        "path's smallest time within the number's bin.",
        "likelihood",
    )
    tolerance: float = option(1e-4, "Tolerance of the likelihood's ODE.", "likelihood")
    seed: int = option(
        0,
        "Seed of the classifier; image i is drawn, and test image i dequantised and probed, from seed + i.",
        "sampling",
        common=True,
    )

    @staticmethod
    def stated_kind(stated):
        """The kind of data of the pipeline that a command line names; `stated`(option) is what it says for an option,
        or None. Raises ValueError for a folder that says none, before options are taken for those of images."""
        pipeline = stated("pipeline")
        for problem in () if pipeline is None else pipeline_problems(pipeline):
            raise ValueError(problem)
        index = read_json(os.path.join(pipeline, "model_index.json")) if pipeline else None
        if index and index.get("columns"):
            return "points"
        # of a bundle a list, the file and the class
        if "ScoreSDETextPipeline" in str(index and index.get("_class_name")):
            return "text"
        facts = read_json(os.path.join(pipeline, "training.json")) if pipeline else None
        return "signal" if isinstance(facts, dict) and facts.get("data_kind") in SIGNAL_KINDS else "image"

    def problems(self):
        given = {each.name: getattr(self, each.name) for each in fields(DataConfig)}
        yield from DataConfig(**{name: value for name, value in given.items() if value is not None}).problems()
        if (self.pipeline is None) == (self.samples is None):
            yield "pass either --pipeline or --samples"
        if self.pipeline is not None:
            yield from pipeline_problems(self.pipeline)
        if self.samples is not None:
            if self.likelihood or self.loss or self.save_samples or self.repeats > 1 or not self.features:
                yield "samples are measured by --features alone: no likelihood, loss, save_samples or repeats"
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
        try:
            outside_classes(self.network)
        except ValueError as error:
            yield str(error)
        counts = {name: getattr(self, name) for name in ("num_images", "likelihood", "loss")}
        if min(counts.values()) < 0 or not any(counts.values()):
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            yield f"{said}: one of them must be positive, none negative"
        if self.features and 0 < self.num_images < LEAST_IMAGES:
            yield f"num_images {self.num_images}: distances need at least {LEAST_IMAGES}; leave --features out"
        if self.features and 0 < self.reference_images < LEAST_IMAGES:
            yield f"reference_images {self.reference_images}: distances need at least {LEAST_IMAGES}, or 0 for all"
        if not self.tolerance > 0:
            yield f"tolerance {self.tolerance} must be positive"
        if self.dequantization not in DEQUANTIZATIONS:
            yield unknown("dequantization", self.dequantization, DEQUANTIZATIONS)
        yield from samples_file_problems(self.save_samples)
        if not math.isfinite(self.guidance_scale):
            yield f"guidance_scale {self.guidance_scale} must be a finite number"


def open_pipeline(config, device):
    """The pipeline, ready to draw. Raises ValueError for one that cannot do what the config asks."""
    pipeline = load_bundle(config.pipeline, classes=outside_classes(config.network))
    if not hasattr(pipeline, "log_likelihood"):
        raise ValueError(f"pipeline {config.pipeline!r} is a {type(pipeline).__name__}, which draws no images")
    if "num_inference_steps" not in config.given:
        # those that a few-step model was made for
        config.num_inference_steps = pipeline.default_steps()
    beside = pipeline.takes_condition_image
    if pipeline.takes_prompts and (config.num_images or config.loss or (beside and config.likelihood)):
        pipeline.encode_prompt("")  # which opens an encoder that is named alone
    guides = pipeline.null_label is not None or pipeline.takes_prompts
    if beside:
        seen = torch.zeros(1, pipeline.denoiser.config["condition_channels"], *pipeline.kind.size)
        guides = bool(null_conditions(pipeline.denoiser, {"condition_sample": seen}))
    if config.num_images and config.guidance_scale != 1 and not guides:
        raise ValueError(
            f"guidance_scale {config.guidance_scale} needs a network with classes and a null label, or one that was "
            f"trained without its other conditions, too, which that of {config.pipeline!r} isn't: pass 1"
        )
    if config.num_images:
        copy.deepcopy(pipeline.scheduler).set_timesteps(config.num_inference_steps)  # which refuses what it cannot
    if config.loss:
        pipeline.check_own_scheduler("loss needs")
        if few_step := training_facts(config).get("few_step"):
            raise ValueError(
                f"loss is of denoisers, and {config.pipeline!r} was trained by {few_step['method']}: leave it out"
            )
    if pipeline.vae is not None and "dequantization" in config.given:
        raise ValueError(f"dequantization is of models of pixels, and {config.pipeline!r} draws latents: leave it out")
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


def loss_on(test, pipeline, config):
    """The loss that a pipeline was trained by, on the rows of a dataset, of which it also says what the network is
    told."""
    captions = condition = None
    if test.captions is not None:
        captions = CaptionEncoder(None, pipeline.prompt_settings, pipeline.open_encoder())
    if pipeline.takes_condition_image:
        measured, kind = pipeline.config["condition_from"], pipeline.kind
        pairs = test.condition_column, measured, test.condition_channels
        condition = ImageCondition(*pairs, test.shape[0], test.sizes, pipeline.vae, kind.channels)
    labelled = pipeline.num_classes is not None and test.label_column is not None
    data = CleanSamples(pipeline.vae, pipeline.num_classes if labelled else None, captions, condition)
    trained = training_facts(config).get("config", {})
    # a learned variance is left out
    instead = {"time_density": "levels"} if trained.get("vlb_weight") else {}
    objective = trained_objective(pipeline.scheduler, trained, **instead)
    return DiffusionLoss(objective, data, pipeline.denoiser, data.told)


# --- figures ------------------------------------------------------------------------------------------------------


def measure_images(pipeline, samples, data, network, sizes, config, accelerator):
    """The metrics of generated images, or of samples that are given; [] but in the main process."""
    classifier = tables = None
    if "train" in data:
        classifier = trained_classifier(data["train"], config.classifier_epochs, config.seed, accelerator.device)
    if config.features == "classifier":
        network = ClassifierFeatures(classifier, f"{ClassifierFeatures.name}{of_other_data(config)}")
    judge = classifier if judges_classes(config, pipeline) else None
    recognised, correct, errors, nfe, prompts, asked = [], [], [], None, None, None
    beside = pipeline is not None and pipeline.takes_condition_image
    loss = loss_on(data["test"], pipeline, config) if beside else None
    if pipeline is not None and pipeline.takes_prompts and not beside:
        prompts, asked = prompts_and_labels(data["test"], config.num_images * config.repeats, pipeline)
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
        writes = saves and accelerator.is_main_process
        numbers = range(repeat * config.num_images, (repeat + 1) * config.num_images)
        groups = [(size, [numbers[i] for i in own]) for size, own in shares_of_sizes(sizes, len(numbers))]
        if beside:  # of the sizes of what they are seen beside
            groups = by_size(data["test"], numbers)
        shape = (config.num_images, config.image_channels, *next(iter(sizes), [config.resolution] * 2))
        with array_file(config.save_samples, shape) if writes else nullcontext() as write:
            parts = list(rounds_by_size(groups, config.batch_size, accelerator))
            bar = tqdm(parts, desc="images", unit="batch", disable=not accelerator.is_main_process)
            for image_size, own, size in bar:
                labels = labels_of(own, pipeline, asked) if judge is not None else None
                if samples is not None:
                    images = samples.read(own).to(accelerator.device)
                else:
                    told = {"prompts": prompts, "labels": asked}
                    if beside:
                        rows = loss, data["test"], own, config.seed, accelerator.device
                        batch, conditions = conditions_of_rows(*rows)
                        told, labels = {"conditions": conditions}, batch.get("labels")
                    settings = config.seed, config.guidance_scale, config.num_inference_steps
                    images, nfe = draw(pipeline, own, *settings, **told, image_size=image_size)
                if not torch.isfinite(images).all():
                    raise ValueError(f"among the images of seeds {own[0]} to {own[-1]} some are not finite")
                images = quantized(images)
                if saves:
                    every = gathered(to_bytes(images), size, accelerator)
                    if writes:
                        write(every)
                if beside and repeat == 0:
                    found = pair_errors(images, batch["images"], loss.data.condition.measurement)
                    errors.append(gathered(found, size, accelerator))
                if judge is not None and repeat == 0:
                    labels = torch.as_tensor(labels, device=accelerator.device)
                    correct.append(gathered(recognises(judge, images, labels), size, accelerator))
                if tables:
                    tables[repeat].add(images, size)

    # what follows is the main process's alone; no other waits for it
    if not accelerator.is_main_process:
        return []
    facts = {} if pipeline is None else sampling_facts(pipeline, nfe, config)
    facts |= {} if prompts is None else {"prompts": f"captions of split {config.test_split}"}
    facts |= {"conditions": f"{', '.join(loss.conditions)} of split {config.test_split}"} if beside else {}
    metrics = [] if judge is None else class_metrics(torch.cat(recognised), torch.cat(correct), facts, config)
    metrics += pair_metrics(torch.cat(errors), pipeline.config["condition_from"], facts, config) if beside else []
    return metrics + (distance_metrics(tables, real, network, facts, config, accelerator) if tables else [])


def measure_loss(pipeline, test, config, accelerator):
    """The metric of the loss that a pipeline was trained by, on real images; [] but in the main process."""
    loss, count, losses = loss_on(test, pipeline, config), min(config.loss, len(test)), []
    for own, batch, size in real_batches(test, count, config, accelerator, "loss"):
        draws = RowDraws(config.seed, own, count, accelerator.device)
        with torch.no_grad():
            found = loss(pipeline.denoiser, batch, draws)
        losses.append(gathered(found.float(), size, accelerator))
    if not accelerator.is_main_process:
        return []
    losses = torch.cat(losses).double()
    error = f"standard error {float(losses.std() / count**0.5):.4f}" if count > 1 else "one image"
    print(f"loss {losses.mean():.4f} on {count} {config.test_split} images, {error}")
    metric = {"name": f"loss on {config.test_split} images{of_other_data(config)}"}
    metric |= {"value": float(f"{losses.mean():.5g}"), "n": count, "type": "loss", "split": config.test_split}
    metric |= {"time_density": loss.objective.time_density, "weighting": loss.objective.weighting}
    metric["explanation"] = f"the loss that it was trained by, of images that it has not seen, {error}."
    return [metric | averaging_facts(config)]


def measure_likelihood(pipeline, test, config, accelerator):
    """The metric of the likelihood of real images; [] but in the main process."""
    count, values, nfe = min(config.likelihood, len(test)), [], []
    beside = loss_on(test, pipeline, config) if pipeline.takes_condition_image else None
    # a network that sees an image learned all of its conditions together
    told = beside.conditions if beside else ["class_labels"] * needs_class(pipeline)
    given = " and ".join(TOLD[name] for name in told if name in TOLD)
    for own, batch, size in real_batches(test, count, config, accelerator, "likelihood"):
        generators = [torch.Generator().manual_seed(config.seed + i) for i in own]
        images, conditions = batch["images"], {}
        if beside:
            conditions = beside.conditions_of(batch, RowDraws(config.seed, own, count, accelerator.device))
        elif told:
            conditions["class_labels"] = batch["labels"]
        found = pipeline.log_likelihood(
            images=images if pipeline.vae is not None else from_bytes(to_bytes(images)),
            conditions=conditions,
            num_probes=config.num_probes,
            generator=generators,
            rtol=config.tolerance,
            atol=config.tolerance,
            dequantization=None if pipeline.vae is not None else config.dequantization,
        )
        value = found.bits_per_dim() if pipeline.vae is None else found.nats_per_dim()
        values.append(gathered(value.float(), size, accelerator))
        nfe.append(gathered(torch.full((len(own),), float(found.nfe)), size, accelerator))
    if not accelerator.is_main_process:
        return []
    values, nfe = torch.cat(values), torch.cat(nfe)
    noise = config.dequantization.replace("_", "-")
    by_noise = "" if config.dequantization == "uniform" else f", {noise} dequantisation"
    unit, what = ("nats/dim", "the normalised latents") if pipeline.vae is not None else ("bits/dim", "the pixels")
    error = (
        f"standard error {float(values.std() / count**0.5):.4f} over images and probes" if count > 1 else "one image"
    )
    print(f"{values.mean():.4f} {unit} of {what} on {count} test images, {error}")
    metric = {
        "name": f"negative log-likelihood of {what}, {unit}{by_noise}{of_other_data(config)}",
        "value": round(float(values.mean()), 4),
        "n": count,
        "split": config.test_split,
        "type": "nats_per_dim" if pipeline.vae is not None else "bits_per_dim",
        "nfe": round(float(nfe.mean())),
        "num_probes": config.num_probes,
        "tolerance": config.tolerance,
        "explanation": f"exact likelihood of {what} {f'given {given}' if given else 'without the class'} by the "
        f"probability-flow ODE, {error} ({config.num_probes} probes per image), "
        f"tolerance {config.tolerance:g}"
        + (
            "; the likelihood of the images is not known." if pipeline.vae is not None else f", {noise} dequantisation."
        ),
    }
    return [metric | averaging_facts(config)]


def evaluate_images(config, accelerator):
    """Measure as an `EvaluateConfig` says, and add the figures to the pipeline's."""
    # everything that will be needed, before anything is drawn
    pipeline = samples = network = None
    if config.samples is None:
        pipeline = open_pipeline(config, accelerator.device)
        shape = image_shape(pipeline)
    else:
        samples = open_samples(config)
        shape = samples.shape
    sizes, config = sizes_of(config, shape), complete(config, shape)
    if config.save_samples and len(sizes) > 1:
        raise ValueError(
            f"save_samples {config.save_samples!r}: such a file holds images of one size, the pipeline draws "
            f"{', '.join(map(in_words, sizes))}; leave it out"
        )
    data = open_data(config, pipeline, sizes)
    for line in dict.fromkeys(each.describe() for each in data.values()):
        accelerator.print(line)
    if config.num_images and config.features not in (None, "classifier"):
        network = open_features(config.features, accelerator.device)
    WORK_BEGUN.set()

    own = {"dataset": config.dataset, "dataset_on_hub": on_hub(config.dataset)}
    shared = own | {"dataset": dataset_name(own), "seed": config.seed}
    shared |= {"sizes": list(map(in_words, sizes))} if sizes else {"resolution": config.resolution}
    shared |= {"image_channels": config.image_channels}
    revision = hub_revision(next(iter(data.values()))) if data else None
    shared |= {"dataset_revision": revision} if revision else {}
    shared |= provenance(accelerator.device)

    measured = {
        "likelihood": partial(measure_likelihood, pipeline, data.get("test"), config, accelerator),
        "loss": partial(measure_loss, pipeline, data.get("test"), config, accelerator),
        "num_images": partial(measure_images, pipeline, samples, data, network, sizes, config, accelerator),
    }
    measures = [measure for name, measure in measured.items() if getattr(config, name)]
    add_each(measures, config.pipeline, shared, accelerator)
    accelerator.end_training()


# what is measured, by the kind of data
EVALUATIONS = {
    "image": evaluate_images,
    "text": evaluate_texts,
    "points": evaluate_points,
    "signal": evaluate_signals,
}


def main(argv=None):
    config = parse(EvaluateConfig, sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    warn_of_busy_cores(accelerator)
    config.test_split = split_in_truth(config, training_facts(config), accelerator.print)
    EVALUATIONS[config.data_kind](config, accelerator)


if __name__ == "__main__":
    with one_line_errors():
        main()
