"""Configuration of the training scripts: dataclasses with their checks, which options.py reads.

A default stands only here; a YAML file states what differs.
"""

import os
from dataclasses import dataclass, field
from typing import ClassVar

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers.optimization import SchedulerType
from PIL import ImageColor

from score_sde.ema import gamma_of
from score_sde.pipelines.wording import unknown
from score_sde.schedulers.checks import LARGEST_NFE

from .averages import same_in_file_names
from .optimizers import optimizer_arguments, optimizers


# all of diffusers' but the one that needs rules of its own
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
MIXED_PRECISIONS = ("no", "fp16", "bf16", "auto")
# of guidance of samples
LARGEST_SCALE = 10**6


def sample_problems(config, count):
    """What is wrong with the options of the samples of a run; `count` is the name of that which says how many."""
    if getattr(config, count) < 1:
        yield f"{count} {getattr(config, count)} must be at least 1"
    if not 1 <= config.sample_num_inference_steps <= LARGEST_NFE:
        yield f"sample_num_inference_steps {config.sample_num_inference_steps} must be from 1 to {LARGEST_NFE:,}"
    if not abs(config.sample_guidance_scale) <= LARGEST_SCALE:
        yield f"sample_guidance_scale {config.sample_guidance_scale:g} must be from -{LARGEST_SCALE} to {LARGEST_SCALE}"


def option(default, help, group="options", common=False):
    """A field of a config, and an option of the command line.

    Args:
        default: its value where nothing is given; a list takes several values.
        help: what it means, with its unit.
        group: heading under which --help shows it.
        common: whether --help shows it, not --help_all alone.
    """
    metadata = {"help": help, "group": group, "common": common}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(names):
    """ "a, b, or c" of a table's names."""
    *others, last = names
    return f"{', '.join(others)}, or {last}"


@dataclass
class LoaderConfig:
    # names of the options that the command line or the YAML file said (`options.parse`)
    given: ClassVar[frozenset[str]] = frozenset()

    num_workers: int | None = option(
        None,
        "Processes that read and decode data, per training process; 0 reads in the process itself. Unless given 0 on "
        "CPUs, and for a GPU one less than it has cores, at most 8 (of latents 2) and no more than fit shared memory.",
        "speed and memory",
    )

    def problems(self):
        if self.num_workers is not None and self.num_workers < 0:
            yield f"num_workers {self.num_workers} must be 0 or more"


class PrecisionConfig:
    """What has a `mixed_precision`, one of its `precisions`, by default that of the launcher."""

    precisions: tuple[str, ...] = MIXED_PRECISIONS
    mixed_precision: str | None

    def precision_problems(self):
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        # "no" is what the launcher says unasked, too
        if self.mixed_precision is None or (self.mixed_precision == "auto" and launched != "no"):
            self.mixed_precision = launched
        if self.mixed_precision not in self.precisions:
            yield unknown("mixed_precision", self.mixed_precision, self.precisions)
        elif launched not in ("no", self.mixed_precision):
            yield (
                f"mixed_precision {self.mixed_precision!r} contradicts {launched!r} of accelerate launch: leave one of "
                f"them out"
            )


@dataclass
class DataConfig(LoaderConfig):
    dataset: str = option(
        "fashion_mnist_10k",
        "Images: fashion_mnist_10k (inside the package), a folder of images (one sub-folder per class), a parquet file "
        "or a webdataset's .tar, several of them as a pattern or a folder (a {split} in the name is replaced by the "
        "split), or a dataset id on the Hub.",
        "data",
        common=True,
    )
    split: str = option("train", "Split of the dataset to use.", "data")
    image_column: str = option("image", "Column that holds the images.", "data")
    label_column: str | None = option(
        "label",
        "Column that holds the class labels (json.label: a field of the column json); 'none' for no labels.",
        "data",
        common=True,
    )
    num_classes: int | None = option(
        None, "Number of classes, where the data don't say: the labels are 0 to one less.", "data"
    )
    resolution: int = option(
        32, "Height and width in pixels: the shorter side is resized to it, a square cropped.", "data", common=True
    )
    image_channels: int = option(3, "1 for greyscale, 3 for RGB.", "data")
    background: str = option("white", "Colour behind transparent images, as Pillow names it: white, #808080.", "data")
    skip_corrupt_images: bool = option(
        False, "Take the next row for an image that cannot be decoded, and name it.", "data"
    )

    def problems(self):
        yield from LoaderConfig.problems(self)
        if self.label_column == "none":
            self.label_column = None
        if self.image_channels not in (1, 3):
            yield f"image_channels {self.image_channels} must be 1 or 3"
        if self.resolution < 1:
            yield f"resolution {self.resolution} must be at least 1 pixel"
        if self.num_classes is not None and self.num_classes < 1:
            yield f"num_classes {self.num_classes} must be at least 1"
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            yield f"background {self.background!r} is no colour that Pillow knows, such as white or #808080"


@dataclass
class LoopConfig(PrecisionConfig, LoaderConfig):
    output_dir: str = option(
        "runs/run", "Folder for everything that the run writes, and no other run.", "run", common=True
    )
    on_existing_run: str = option(
        "refuse",
        "Where output_dir holds a run that isn't resumed: refuse, or set_aside, in a folder inside it.",
        "run",
    )
    batch_size: int = option(64, "Images per process and micro-batch.", "optimisation", common=True)
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.", "optimisation")
    max_train_steps: int = option(100_000, "Optimizer steps.", "optimisation", common=True)
    max_train_seconds: float | None = option(
        None,
        "Seconds of training, if the steps would take longer: the schedule of the learning rate then ends with them. "
        "It is for one process, and the number of steps depends on the machine.",
        "optimisation",
    )
    optimizer: str = option(
        "adamw",
        "muon: orthogonalised momentum for the matrices within the network (Jordan et al. 2024), as large a step as "
        f"AdamW's, which takes the rest; or of torch: {one_of(name for name in optimizers() if name != 'muon')}; or of "
        "bitsandbytes, where it is installed: adamw8bit, lion8bit, pagedadamw8bit, ...",
        "optimisation",
        common=True,
    )
    optimizer_kwargs: str = option(
        "{}", "More arguments of its class, as YAML: {momentum: 0.9, nesterov: true}.", "optimisation"
    )
    learning_rate: float = option(1e-4, "Peak learning rate.", "optimisation", common=True)
    lr_scheduler: str = option(
        "constant_with_warmup", "Schedule of the learning rate, by its name in diffusers.", "optimisation"
    )
    lr_warmup_steps: int = option(500, "Optimizer steps of linear warm-up.", "optimisation")
    adam_beta1: float | None = option(
        None,
        "Decay of the first moment, in [0, 1), of an optimizer that has it; its own unless given, of AdamW 0.9.",
        "optimisation",
    )
    adam_beta2: float | None = option(
        None, "Decay of the second moment; its own unless given, of AdamW 0.999.", "optimisation"
    )
    adam_weight_decay: float = option(
        0.0,
        "Weight decay: decoupled in AdamW, Muon, Adafactor and Lion; in others of torch part of the gradient, unless "
        "optimizer_kwargs says {decoupled_weight_decay: true}.",
        "optimisation",
    )
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", "optimisation")
    ema_decay: float = option(
        0.9999, "Decay per step of the averaged weights; it warms up as (1 + n) / (10 + n).", "averaged weights"
    )
    further_ema_decays: list[float] = option(
        [],
        "Decays of further averages, in the checkpoints for `score-sde reconstruct-ema`.",
        "averaged weights",
    )
    ema_snapshot_steps: int = option(
        0,
        "Optimizer steps between snapshots of power-function averages, from which `score-sde reconstruct-ema` makes "
        "averages of any length after training; 0 for none.",
        "averaged weights",
    )
    ema_sigma_rel: list[float] = option([0.05, 0.10], "Relative widths of those averages.", "averaged weights")
    mixed_precision: str | None = option(
        None,
        "no, fp16, bf16, or auto: bf16 on GPUs that have it and on CPUs where a measurement at the start says that it "
        "pays, else no. That of `accelerate launch` where it isn't given.",
        "speed and memory",
        common=True,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, more time.", "speed and memory"
    )
    compile: bool = option(
        False,
        "Compile the network by torch.compile: its repeated blocks, where it has them, else the whole. The "
        "dynamo_backend of `accelerate launch` does the same, by its backend and mode.",
        "speed and memory",
    )
    allow_tf32: bool = option(
        False,
        "Let matrix products and convolutions of float32 round to TF32: much faster on recent GPUs.",
        "speed and memory",
    )
    seed: int = option(0, "Seed of everything that is random in the run.", "run", common=True)
    checkpointing_steps: int = option(1000, "Optimizer steps between checkpoints; 0 for none.", "run")
    checkpoints_total_limit: int = option(2, "Number of newest checkpoints to keep.", "run")
    max_skipped_steps: int = option(
        10,
        "Steps in a row whose loss or gradient may be nan or infinite; they are skipped.",
        "run",
    )
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder, or 'latest' for the newest in output_dir.", "run", common=True
    )
    allow_other_data: bool = option(False, "Go on from a checkpoint that was trained on other data.", "data")
    sample_steps: int = option(
        0, "Optimizer steps between sample grids (PNG); 0 for none before the end.", "samples and logs", common=True
    )
    logging_steps: int = option(50, "Optimizer steps between logged values.", "samples and logs")
    log_with: str | None = option(
        None, "Trackers of accelerate, with commas: tensorboard, wandb, trackio, ...", "samples and logs", common=True
    )
    peak_tflops: float | None = option(
        None,
        "Peak of the device in 10^12 operations per second, for its logged utilisation (mfu); None measures it.",
        "speed and memory",
    )

    def problems(self):
        at_least = {
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_train_steps": 1,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 0,
            "checkpoints_total_limit": 1,
            "sample_steps": 0,
            "logging_steps": 1,
            "adam_weight_decay": 0,
            "seed": 0,
            "max_skipped_steps": 0,
            "ema_snapshot_steps": 0,
        }
        for name, least in at_least.items():
            if not getattr(self, name) >= least:  # true for nan, too
                yield f"{name} {getattr(self, name)} must be at least {least}"
        if self.max_train_seconds is not None and not self.max_train_seconds > 0:
            yield f"max_train_seconds {self.max_train_seconds} must be positive"
        if not (self.learning_rate > 0 and self.max_grad_norm > 0):
            yield f"learning_rate {self.learning_rate} and max_grad_norm {self.max_grad_norm} must be positive"
        decays = [("further_ema_decays", decay) for decay in self.further_ema_decays]
        for name, value in [(n, getattr(self, n)) for n in ("adam_beta1", "adam_beta2", "ema_decay")] + decays:
            if value is not None and not 0 <= value < 1:
                yield f"{name} {value} must lie in [0, 1)"
        for name, given in (("further_ema_decays", self.further_ema_decays), ("ema_sigma_rel", self.ema_sigma_rel)):
            if alike := same_in_file_names(given):
                one, other = alike
                yield f"{name} {one} and {other} agree to six digits, by which their files are named: leave one out"
        for width in self.ema_sigma_rel:
            try:
                gamma_of(width)
            except ValueError as error:
                yield f"ema_sigma_rel: {error}"
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            yield f"peak_tflops {self.peak_tflops} must be positive"
        for tracker in self.log_with.split(",") if self.log_with else []:
            if tracker not in LOGGER_TYPE_TO_CLASS:
                yield unknown("log_with", tracker, LOGGER_TYPE_TO_CLASS)
            elif tracker not in map(str, get_available_trackers()):
                yield f"log_with {tracker!r} is not installed: pip install {tracker}"
        try:
            # what is recorded is what is used
            self.adam_beta1, self.adam_beta2, *_ = optimizer_arguments(self).get("betas", (None, None))
        except ValueError as error:
            yield str(error)
        if self.lr_scheduler not in LR_SCHEDULERS:
            yield unknown("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        if self.on_existing_run not in ("refuse", "set_aside"):
            yield unknown("on_existing_run", self.on_existing_run, ("refuse", "set_aside"))
        yield from self.precision_problems()
        resume = self.resume_from_checkpoint
        if resume not in (None, "latest") and not os.path.isdir(resume):
            yield f"resume_from_checkpoint {resume!r} is not a folder; pass a checkpoint folder or 'latest'"


@dataclass
class ImageLoopConfig(LoopConfig):
    random_flip: bool = option(False, "Mirror half of the images, at random.", "data")
    crop: str = option(
        "centre", "Square of an image that isn't one: centre, or random, another in every epoch.", "data"
    )
    cache_images: bool = option(
        False,
        "Decode each image once and keep it in memory, a byte a value: 154 MB for 50,000 of 3x32x32.",
        "speed and memory",
    )

    @property
    def crop_seed(self):
        """What `ImageDataset` makes random crops from."""
        return self.seed if self.crop == "random" else None

    def problems(self):
        yield from LoopConfig.problems(self)
        if self.crop not in ("centre", "random"):
            yield unknown("crop", self.crop, ("centre", "random"))
        if self.cache_images and self.crop == "random":
            yield "cache_images keeps an image as it is cropped first: pass --crop centre"
