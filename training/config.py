"""Configuration of the training scripts: dataclasses, read from a YAML file and the command line.

    accelerate launch training/train.py config.yaml --learning_rate 1e-4

Every field of a dataclass is a key of the YAML file and an option of the command line, which wins. A default stands
only here; a YAML file states what differs.
"""

import json
import os
from dataclasses import dataclass, field, fields

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers.optimization import SchedulerType
from PIL import ImageColor
from transformers import HfArgumentParser

from score_sde.ema import gamma_of


# all of diffusers' but the one that needs rules of its own
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class DataConfig:
    dataset: str = option(
        "fashion_mnist_10k",
        "Images: fashion_mnist_10k (inside the package), a folder of images (one sub-folder per class), a parquet file "
        "or a webdataset's .tar, several of them as a pattern or a folder (a {split} in the name is replaced by the "
        "split), or a dataset id on the Hub.",
    )
    split: str = option("train", "Split of the dataset to use.")
    image_column: str = option("image", "Column that holds the images.")
    label_column: str | None = option(
        "label", "Column that holds the class labels (json.label: a field of the column json); 'none' for no labels."
    )
    num_classes: int | None = option(None, "Number of classes, where the data don't say: the labels are 0 to one less.")
    resolution: int = option(32, "Height and width in pixels: the shorter side is resized to it, a square cropped.")
    image_channels: int = option(3, "1 for greyscale, 3 for RGB.")
    background: str = option("white", "Colour behind transparent images, as Pillow names it: white, #808080.")
    skip_corrupt_images: bool = option(False, "Take the next row for an image that cannot be decoded, and name it.")
    num_workers: int = option(0, "Processes that decode images, per training process; 0 decodes in the process itself.")

    def problems(self):
        if self.label_column == "none":
            self.label_column = None
        if self.image_channels not in (1, 3):
            yield f"image_channels {self.image_channels} must be 1 or 3"
        if self.resolution < 1:
            yield f"resolution {self.resolution} must be at least 1 pixel"
        if self.num_classes is not None and self.num_classes < 1:
            yield f"num_classes {self.num_classes} must be at least 1"
        if self.num_workers < 0:
            yield f"num_workers {self.num_workers} must be 0 or more"
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            yield f"background {self.background!r} is no colour that Pillow knows, such as white or #808080"


@dataclass
class LoopConfig:
    output_dir: str = option("runs/run", "Folder for everything that the run writes.")
    batch_size: int = option(64, "Images per process and micro-batch.")
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.")
    max_train_steps: int = option(100_000, "Optimizer steps.")
    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.")
    lr_scheduler: str = option("constant_with_warmup", "Schedule of the learning rate, by its name in diffusers.")
    lr_warmup_steps: int = option(500, "Optimizer steps of linear warm-up.")
    adam_beta1: float = option(0.9, "AdamW: decay of the first moment, in [0, 1).")
    adam_beta2: float = option(0.999, "AdamW: decay of the second moment, in [0, 1).")
    adam_weight_decay: float = option(0.0, "AdamW: weight decay.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    ema_decay: float = option(0.9999, "Decay per step of the averaged weights; it warms up as (1 + n) / (10 + n).")
    further_ema_decays: list[float] = field(
        default_factory=list,
        metadata={"help": "Decays of further averages, in the checkpoints for training/reconstruct_ema.py."},
    )
    ema_snapshot_steps: int = option(
        0,
        "Optimizer steps between snapshots of power-function averages, from which training/reconstruct_ema.py makes "
        "averages of any length after training; 0 for none.",
    )
    ema_sigma_rel: list[float] = field(
        default_factory=lambda: [0.05, 0.10], metadata={"help": "Relative widths of those averages."}
    )
    mixed_precision: str = option("no", "no, fp16, or bf16.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    compile: bool = option(
        False, "Compile the network by torch.compile: its repeated blocks, where it has them, else the whole."
    )
    allow_tf32: bool = option(False, "Let matrix products of float32 round to TF32: much faster on recent GPUs.")
    random_flip: bool = option(False, "Mirror half of the images, at random.")
    crop: str = option("centre", "Square of an image that isn't one: centre, or random, another in every epoch.")
    seed: int = option(0, "Seed of everything that is random in the run.")
    checkpointing_steps: int = option(1000, "Optimizer steps between checkpoints; 0 for none.")
    checkpoints_total_limit: int = option(2, "Number of newest checkpoints to keep.")
    max_skipped_steps: int = option(
        10, "Steps in a row whose loss or gradient may be nan or infinite; they are skipped."
    )
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or 'latest' for the newest in output_dir.")
    sample_steps: int = option(0, "Optimizer steps between sample grids (PNG); 0 for none before the end.")
    logging_steps: int = option(50, "Optimizer steps between logged values.")
    log_with: str | None = option(None, "Trackers of accelerate, with commas: tensorboard, wandb, trackio, ...")
    peak_tflops: float | None = option(
        None, "Peak of the device in 10^12 operations per second, for its logged utilisation (mfu); None measures it."
    )

    @property
    def crop_seed(self):
        """What `ImageDataset` makes random crops from."""
        return self.seed if self.crop == "random" else None

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
        if not (self.learning_rate > 0 and self.max_grad_norm > 0):
            yield f"learning_rate {self.learning_rate} and max_grad_norm {self.max_grad_norm} must be positive"
        decays = [("further_ema_decays", decay) for decay in self.further_ema_decays]
        for name, value in [(n, getattr(self, n)) for n in ("adam_beta1", "adam_beta2", "ema_decay")] + decays:
            if not 0 <= value < 1:
                yield f"{name} {value} must lie in [0, 1)"
        for width in self.ema_sigma_rel:
            try:
                gamma_of(width)
            except ValueError as error:
                yield f"ema_sigma_rel: {error}"
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            yield f"peak_tflops {self.peak_tflops} must be positive"
        for tracker in self.log_with.split(",") if self.log_with else []:
            if tracker not in LOGGER_TYPE_TO_CLASS:
                yield f"log_with {tracker!r} is unknown; choose one of {', '.join(LOGGER_TYPE_TO_CLASS)}"
            elif tracker not in map(str, get_available_trackers()):
                yield f"log_with {tracker!r} is not installed: pip install {tracker}"
        if self.lr_scheduler not in LR_SCHEDULERS:
            yield f"lr_scheduler {self.lr_scheduler!r} is unknown; choose one of {', '.join(LR_SCHEDULERS)}"
        if self.crop not in ("centre", "random"):
            yield f"crop {self.crop!r} is unknown; choose one of centre, random"
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            yield f"mixed_precision {self.mixed_precision!r} is unknown; choose one of no, fp16, bf16"
        resume = self.resume_from_checkpoint
        if resume not in (None, "latest") and not os.path.isdir(resume):
            yield f"resume_from_checkpoint {resume!r} is not a folder; pass a checkpoint folder or 'latest'"


def parse(config_class, argv):
    """A config from command-line arguments, the first of which may be a YAML file. Exits with a message that names the
    value and what is allowed when anything is wrong, before any work."""
    parser = HfArgumentParser(
        config_class,
        usage="%(prog)s [config.yaml] [--option value ...]",
        description=config_class.__doc__,
        allow_abbrev=False,
    )
    from_file = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        path, *argv = argv
        from_file = yaml_arguments(parser, path, {each.name for each in fields(config_class)})
    (config,) = parser.parse_args_into_dataclasses(from_file + list(argv), look_for_args_file=False)
    problems = list(config.problems())
    if problems:
        parser.error("; ".join(problems))
    return config


def yaml_arguments(parser, path, known):
    """The key-value pairs of a YAML file as command-line arguments."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"{path} must hold 'option: value' lines")
    arguments = []
    for key, value in values.items():
        if key not in known:
            parser.error(f"{path}: option {key!r} is unknown; the options are {', '.join(sorted(known))}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        arguments += [f"--{key}", *map(str, values)]
    return arguments


def json_options(name, text):
    """The mapping that an option of type JSON holds. Raises ValueError, naming the option, when it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} {text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f'{name} {text!r} must be a JSON object, {{"argument": value}}')
    return value
