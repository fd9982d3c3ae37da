"""Train a classifier of noisy samples, which guides a diffusion model that was trained without classes.

    score-sde train-classifier --pipeline runs/pixels/pipeline --dataset fashion_mnist_10k \\
        --resolution 32 --image_channels 1 --output_dir runs/classifier

The data are those of the diffusion model (--latents or --vae for one of latents), noised as the scheduler of its
pipeline does. Writes into output_dir: checkpoints/, and classifier/, a folder that
`NoiseConditionalClassifier.from_pretrained` opens, with training.json: the run's facts, and the accuracy on test rows
at several noise levels. To go on with a stopped run, add `--resume_from_checkpoint latest`.
"""

import os
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from score_sde import NoiseConditionalClassifier
from score_sde.losses import TIME_DENSITIES
from score_sde.pipelines.latents import shift_and_scale
from score_sde.pipelines.wording import unknown
from score_sde.sharing.bundles import load_bundle
from score_sde.training.parts.clean_data import CleanData, CleanDataConfig
from score_sde.training.parts.config import ImageLoopConfig, option
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.loop import fit, make_accelerator, save_model
from score_sde.training.parts.options import arguments_of, mapping, one_line_errors, parse
from score_sde.training.parts.run_folder import open_run, surviving
from score_sde.training.parts.tasks import Task


@dataclass
class ClassifierConfig(ImageLoopConfig, CleanDataConfig):
    """Train a classifier of noisy samples, for classifier guidance."""

    configs = "classifier"

    pipeline: str = option(
        "", "The pipeline to guide: a folder, or Hub id. Its scheduler makes the noise.", "network", common=True
    )
    network_kwargs: str = option(
        "{}", "Arguments of NoiseConditionalClassifier, as YAML: {layers_per_block: 1}.", "network", common=True
    )
    time_density: str = option(
        "uniform", "Density of the training times: uniform in t, or log_normal in sigma (EDM).", "path and objective"
    )
    test_split: str = option("test", "Split that the accuracy is measured on.", "samples and logs")
    test_images: int = option(1000, "Rows of it, from the first.", "samples and logs")

    def problems(self):
        yield from CleanDataConfig.problems(self)
        yield from ImageLoopConfig.problems(self)
        if not self.pipeline:
            yield "pipeline is missing: the folder or Hub id of the pipeline to guide"
        if self.label_column is None:
            yield "label_column is missing: a classifier needs labels"
        if self.time_density not in TIME_DENSITIES:
            yield unknown("time_density", self.time_density, TIME_DENSITIES)
        if self.aspect_ratio_buckets:
            yield "aspect_ratio_buckets: a classifier is trained on images of one size, the square of the resolution"
        if self.sample_steps:
            yield f"sample_steps {self.sample_steps}: a classifier draws no samples; leave it out"
        if self.test_images < 1:
            yield f"test_images {self.test_images} must be at least 1"
        try:
            arguments_of(NoiseConditionalClassifier, "network_kwargs", self.network_kwargs)
        except ValueError as error:
            yield str(error)


@torch.no_grad()
def measure_accuracy(classifier, pipeline, test, config, shares=(0.0, 0.2, 0.4, 0.6, 0.8)):
    """Accuracy on test rows at these shares of the way from t_min to t_max, as rows for training.json."""
    scheduler = pipeline.scheduler
    rows = [test[i] for i in range(min(config.test_images, len(test)))]
    x0 = torch.cat([pipeline.to_latents(row["images"][None]) for row in rows])
    labels = torch.tensor([row["labels"] for row in rows], device=x0.device)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(config.seed)).to(x0)
    found = []
    for share in shares:
        t = torch.tensor(scheduler.t_min + share * (scheduler.t_max - scheduler.t_min), dtype=torch.float64)
        x, half_log_snr = scheduler.classifier_input(scheduler.path.sample(x0, noise, t), t)
        right = torch.cat(
            [
                classifier(*part).logits.argmax(1) == own
                for *part, own in zip(x.split(256), half_log_snr.split(256), labels.split(256), strict=True)
            ]
        )
        found.append({"t": float(t), "accuracy": round(float(right.float().mean()), 4), "n": len(rows)})
    return found


class ClassifierTask(Task):
    """A classifier of clean data, noised by the scheduler of a pipeline."""

    def __init__(self, config, data, scheduler):
        self.config, self.data, self.scheduler = config, data, scheduler
        from_data = {"sample_size": data.shape[1], "in_channels": data.shape[0], "num_classes": data.num_classes}
        model = NoiseConditionalClassifier(**(from_data | mapping("network_kwargs", config.network_kwargs)))
        noise = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        super().__init__(model, data.dataset, data.fingerprint() | {"noise": noise})

    def compute_loss(self, state, batch, draws):
        batch = self.data.mirrored(batch, draws)
        x0, labels = self.data.draw(batch, draws), self.data.conditions(batch)["class_labels"]
        t = TIME_DENSITIES[self.config.time_density](self.scheduler, draws.stratified())
        x = self.scheduler.path.sample(x0, draws.normal(x0.shape[1:]), t)
        logits = state.model(*self.scheduler.classifier_input(x, t)).logits
        return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}


def main(argv=None):
    config = parse(ClassifierConfig, sys.argv[1:] if argv is None else argv)
    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        train(config, accelerator, run)


def train(config, accelerator, run):
    pipeline = load_bundle(config.pipeline)
    scheduler, data = pipeline.scheduler, CleanData(config, accelerator)
    if data.num_classes is None:
        raise ValueError("these data have no classes, and a classifier needs some: give images in folders of classes")
    if data.sizes:
        raise ValueError(
            f"latents {config.latents!r} are of several sizes or rectangles: a classifier is trained on one"
        )
    if pipeline.sample_shape(1)[1:] != data.shape:
        raise ValueError(f"the pipeline generates {pipeline.sample_shape(1)[1:]}, the data are {data.shape}")
    if data.vae is not None:
        statistics = [shift_and_scale(vae.config, like=torch.zeros(1, 1, 1, 1)) for vae in (pipeline.vae, data.vae)]
        if not all(torch.equal(*pair) for pair in zip(*statistics, strict=True)):
            raise ValueError(
                "the pipeline and the data normalise latents by other statistics of the autoencoder: pass "
                "--normalize_latents where the pipeline was trained with it, and only there"
            )
    test = ImageDataset(config, split=config.test_split)
    if test.id2label is None:
        raise ValueError(f"split {config.test_split!r} of dataset {config.dataset!r} has no classes: pass --dataset")
    if not test.id2label.items() <= data.id2label.items():
        own, others = (", ".join(each.id2label.values()) for each in (data, test))
        raise ValueError(
            f"the classes are {own}, those of split {config.test_split!r} of dataset {config.dataset!r}, on which the "
            f"accuracy is measured, {others}: pass by --dataset the images that the latents were encoded from"
        )
    if config.resolution != (own := data.facts(config)["resolution"]):
        raise ValueError(f"resolution {config.resolution}: the latents are of images of {own} pixels; pass {own}")
    classifier, facts = fit(config, accelerator, run, ClassifierTask(config, data, scheduler))

    with surviving("the log"):
        accelerator.end_training()
    # no other process waits for what follows
    if accelerator.is_main_process:
        facts |= data.facts(config) | {
            "accuracy": measure_accuracy(classifier, pipeline.to(accelerator.device), test, config)
        }
        folder = save_model(classifier, os.path.join(config.output_dir, "classifier"), facts)
        for row in facts["accuracy"]:
            print(f"t = {row['t']:.3f}: recognises {row['accuracy']:.1%} of {row['n']} test rows")
        print(f"classifier: {folder}")


if __name__ == "__main__":
    with one_line_errors():
        main()
