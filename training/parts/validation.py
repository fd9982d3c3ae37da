"""Figures of the averaged weights during training: the loss on held-out images, the Fréchet distance of samples."""

from dataclasses import dataclass, fields
from itertools import islice
from typing import ClassVar

import torch

from score_sde.pipelines.latents import data_channels

from .buckets import counts_of_sizes, shares_of_sizes
from .classifier import EPOCHS, trained_classifier
from .config import DataConfig, option
from .data import ImageDataset
from .loop import Draws
from .metrics import ClassifierFeatures, Moments, frechet_distance, open_features
from .rounds import by_size, gathered, real_batches, rounds_by_size
from .samples import draw, quantized
from .seeds import mix_seeds


@dataclass
class HeldOutConfig:
    evaluation_steps: int = option(
        0,
        "Optimizer steps between evaluations of the averaged weights (evaluation.jsonl), the last of them at the end; "
        "0 for none.",
        "samples and logs",
    )
    evaluation_images: int = option(
        1000,
        "Samples of an evaluation: held out, for the loss, and where it is asked for generated.",
        "samples and logs",
    )
    evaluation_split: str = option(
        "test", "Split that the held-out samples are from, the first ones.", "samples and logs"
    )

    # what the command line or the YAML file said (`options.parse`)
    given: ClassVar[frozenset[str]] = frozenset()

    def held_out_problems(self):
        if self.evaluation_steps < 0:
            yield f"evaluation_steps {self.evaluation_steps} must be at least 0"
        if self.evaluation_images < 2:
            yield f"evaluation_images {self.evaluation_images} must be at least 2"
        unused = sorted({"evaluation_images", "evaluation_features"} & self.given)
        if unused and not {"evaluation_steps"} & self.given:
            yield f"{', '.join(unused)}: nothing is measured without evaluation_steps, how often that is done"


@dataclass
class ValidationConfig(HeldOutConfig):
    evaluation_features: str | None = option(
        None,
        "Also measure the Fréchet distance of generated images to up to 10,000 training images in these features: "
        "classifier, inception, an .onnx file, or a vision model of transformers by Hub id or folder.",
        "samples and logs",
    )

    def problems(self):
        yield from self.held_out_problems()


class RowDraws(Draws):
    """Random numbers for held-out rows, as `loop.Draws` has them for a step of training, but each a function of the
    seed and its row alone: the same at every evaluation, for any number of processes and any batches.

    Args:
        rows: numbers of the rows, of `count` in all.
    """

    def __init__(self, seed, rows, count, device):
        self.device, self.times, self.count = device, None, count
        self.generators = [torch.Generator().manual_seed(mix_seeds(seed, row)) for row in rows]
        # neighbours, which may be of one class, are not of neighbouring times
        self.parts = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[rows]

    def normal(self, shape):
        return torch.stack([torch.randn(shape, generator=each) for each in self.generators]).to(self.device)

    def uniform(self):
        numbers = [torch.rand((), generator=each, dtype=torch.float64) for each in self.generators]
        return torch.stack(numbers).clamp_min(2**-53)

    def stratified(self):
        return ((self.parts + self.uniform()) / self.count).clamp(2**-53, 1 - 2**-53)


def conditions_of_rows(loss, dataset, numbers, seed, device):
    """(batch, what a network is told of it by a `DiffusionLoss`) of the first rows of a dataset, those of these
    numbers, in turn where they are fewer; of images of one size."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        items, rows = list(islice(dataset, len(numbers))), numbers
    else:
        rows = [number % len(dataset) for number in numbers]
        items = [dataset[row] for row in rows]
    batch = {name: values.to(device) for name, values in torch.utils.data.default_collate(items).items()}
    return batch, loss.conditions_of(batch, RowDraws(seed, list(rows), max(rows) + 1, device))


class HeldOutLoss:
    """The loss on the first rows of a dataset, `held_out`, of a task with its `DiffusionLoss`, `loss`."""

    def __init__(self, config, accelerator, task, held_out):
        self.config, self.accelerator, self.task, self.held_out = config, accelerator, task, held_out
        self.count = min(config.evaluation_images, len(held_out))

    # rounds of other sizes than the batches would be compiled anew
    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def measure(self, network):
        """{"held_out_loss": ...}."""
        losses = []
        for own, batch, size in real_batches(self.held_out, self.count, self.config, self.accelerator):
            draws = RowDraws(self.config.seed, own, self.count, self.accelerator.device)
            losses.append(gathered(self.task.loss(network, batch, draws).float(), size, self.accelerator))
        return {"held_out_loss": float(torch.cat(losses).double().mean())}


class Validation(HeldOutLoss):
    """What a task of diffusion measures on the way. It opens all that it needs, so that what is missing is known at
    once.

    Args:
        task: with `data`, the `CleanData` that is trained on, `loss`, its `DiffusionLoss`, `make_pipeline`(network),
            and `labels_drawn`, of `samples.draw`.
    """

    def __init__(self, config, accelerator, task):
        self.config, self.task = config, task
        reader = None if task.data.captions is None else task.data.captions.reader(task.data.caption_column)
        condition = task.data.condition
        pairs = condition and condition.column and (condition.column, condition.channels)
        images, sizes = self.image_config(), task.data.sizes
        self.sizes = counts_of_sizes(task.data.dataset.row_facts())
        held_out = ImageDataset(images, config.evaluation_split, captions=reader, condition=pairs, sizes=sizes)
        super().__init__(config, accelerator, task, held_out)
        # of generated images
        self.prompts = reader and reader.examples
        if config.evaluation_features:
            self.features, self.of_real = self.measure_real(ImageDataset(images, sizes=sizes))

    def image_config(self):
        """How the images are read that are trained on, in latents or not."""
        config, data = self.config, self.task.data
        images = DataConfig(**{each.name: getattr(config, each.name) for each in fields(DataConfig)})
        if config.latents:  # which images they are of is not for the config to say
            for name in ("dataset", "split", "resolution", "background"):
                setattr(images, name, data.dataset.facts.get(name, getattr(images, name)))
            images.image_channels = data_channels(data.vae.config)
        return images

    def measure_real(self, real):
        """(the network of the features, their mean and covariance over real images)."""
        config, accelerator, moments = self.config, self.accelerator, Moments()
        if config.evaluation_features == "classifier":
            if real.num_classes is None:
                raise ValueError("evaluation_features classifier needs labels: pass --label_column, or other features")
            judge = trained_classifier(real, EPOCHS, config.seed, accelerator.device)
            features = ClassifierFeatures(judge)
        else:
            features = open_features(config.evaluation_features, accelerator.device)
        for _, batch, size in real_batches(real, min(10_000, len(real)), config, accelerator, "real images"):
            self.add_features(moments, features, batch["images"], size)
        return features, moments.result()

    # rounds of other sizes than the batches would be compiled anew
    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def measure(self, network):
        """{"held_out_loss": ..., and where it is asked for "frechet_distance": ...}."""
        config, accelerator, values = self.config, self.accelerator, super().measure(network)
        if config.evaluation_features:
            pipeline, found = self.task.make_pipeline(network).to(accelerator.device), Moments()
            pipeline.set_progress_bar_config(disable=True)
            told, count = {"prompts": self.prompts, "labels": self.task.labels_drawn}, config.evaluation_images
            beside = self.task.data.condition is not None
            groups = by_size(self.held_out, range(count)) if beside else shares_of_sizes(self.sizes, count)
            for image_size, own, size in rounds_by_size(groups, config.batch_size, accelerator):
                settings = config.seed, config.sample_guidance_scale, config.sample_num_inference_steps
                if beside:
                    rows = self.task.loss, self.held_out, own, config.seed, accelerator.device
                    told = {"conditions": conditions_of_rows(*rows)[1]}
                images, _ = draw(pipeline, own, *settings, **told, image_size=image_size)
                self.add_features(found, self.features, quantized(images), size)
            values["frechet_distance"] = frechet_distance(*found.result(), *self.of_real)
        return values

    @torch.no_grad()
    def add_features(self, moments, network, images, count):
        """Let the moments of features take in a round of images, of every process a part."""
        features, _ = network(images)
        moments.add(gathered(features, count, self.accelerator))
