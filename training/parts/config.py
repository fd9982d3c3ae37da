"""Configuration of the training scripts: dataclasses, read from a YAML file and the command line.

    accelerate launch training/train.py config.yaml --learning_rate 1e-4

Every field of a dataclass is a key of the YAML file and an option of the command line, which wins. A default stands
only here; a YAML file states what differs.
"""

import argparse
import difflib
import inspect
import json
import os
import re
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import get_args

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers.optimization import SchedulerType
from PIL import ImageColor
from transformers import HfArgumentParser

from score_sde.ema import gamma_of


# all of diffusers' but the one that needs rules of its own
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
MIXED_PRECISIONS = ("no", "fp16", "bf16")


def option(default, help):
    return field(default=default, metadata={"help": help})


def one_of(names):
    """ "a, b, or c" of a table's names."""
    *others, last = names
    return f"{', '.join(others)}, or {last}"


@dataclass
class LoaderConfig:
    num_workers: int = option(0, "Processes that decode images, per training process; 0 decodes in the process itself.")

    def problems(self):
        if self.num_workers < 0:
            yield f"num_workers {self.num_workers} must be 0 or more"


@dataclass
class DataConfig(LoaderConfig):
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
class LoopConfig(LoaderConfig):
    output_dir: str = option("runs/run", "Folder for everything that the run writes, and no other run.")
    on_existing_run: str = option(
        "refuse", "Where output_dir holds a run that isn't resumed: refuse, or set_aside, in a folder inside it."
    )
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
    mixed_precision: str | None = option(None, "no, fp16, or bf16; that of `accelerate launch` where it isn't given.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    compile: bool = option(
        False,
        "Compile the network by torch.compile: its repeated blocks, where it has them, else the whole. The "
        "dynamo_backend of `accelerate launch` does the same, by its backend and mode.",
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
    allow_other_data: bool = option(False, "Go on from a checkpoint that was trained on other data.")
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
        if self.on_existing_run not in ("refuse", "set_aside"):
            yield f"on_existing_run {self.on_existing_run!r} is unknown; choose one of refuse, set_aside"
        if self.crop not in ("centre", "random"):
            yield f"crop {self.crop!r} is unknown; choose one of centre, random"
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        self.mixed_precision = self.mixed_precision or launched
        if self.mixed_precision not in MIXED_PRECISIONS:
            yield f"mixed_precision {self.mixed_precision!r} is unknown; choose one of {', '.join(MIXED_PRECISIONS)}"
        # "no" is what the launcher says unasked, too
        elif launched not in ("no", self.mixed_precision):
            yield (
                f"mixed_precision {self.mixed_precision!r} contradicts {launched!r} of accelerate launch: leave one of "
                f"them out"
            )
        resume = self.resume_from_checkpoint
        if resume not in (None, "latest") and not os.path.isdir(resume):
            yield f"resume_from_checkpoint {resume!r} is not a folder; pass a checkpoint folder or 'latest'"


def parse(config_class, argv):
    """A config from command-line arguments, the first of which may be a YAML file. Exits with a message that names the
    value and what is allowed when anything is wrong, before any work."""
    parser = HfArgumentParser(
        config_class,
        usage="%(prog)s [config.yaml] [--option value ...]",
        description=f"{config_class.__doc__} Every option may stand in the YAML file, too, as 'option: value'.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.register("type", int, whole_number)
    known = {each.name: each for each in fields(config_class)}
    from_file = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        path, *argv = argv
        from_file = yaml_arguments(parser, path, known)
    arguments = from_file + list(argv)
    config, unknown = parser.parse_args_into_dataclasses(arguments, True, look_for_args_file=False)
    if unknown:
        name, *_ = unknown[0].split("=")
        parser.error(f"{name} is unknown{nearest(name, [f'--{each}' for each in known])}; --help lists all options")
    problems = list(config.problems())
    if problems:
        parser.error("; ".join(problems))
    return config


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Every option by one spelling and what it takes, with its default where it has one."""

    def _format_action_invocation(self, action):
        kind = {int: " N", float: " X", str: " TEXT"}.get(action.type, "")
        more = " ..." if action.nargs == "+" else ""
        return action.option_strings[-1 if action.option_strings[0] == "-h" else 0] + kind + more

    def _get_help_string(self, action):
        return action.help if action.default in (None, "", [], "{}") else super()._get_help_string(action)


def nearest(name, known):
    """ ", did you mean ...", where a known name is near."""
    found = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {found[0]}?" if found else ""


def whole_number(text):
    """A whole number as its text says it, 1000, 1_000 or 1e3. Raises argparse's error for others."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        if float(text).is_integer():
            return int(float(text))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


class YamlLoader(yaml.SafeLoader):
    """YAML whose 1e-4 is a number, as in JSON and YAML 1.2, and which names no key twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]!r} stands there twice")
        return super().construct_mapping(node, deep)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def yaml_arguments(parser, path, known):
    """The key-value pairs of a YAML file as command-line arguments; `known`: {name: field}."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, YamlLoader) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"cannot read {path}: {one_line(error)}")
    if not isinstance(values, dict):
        parser.error(f"{path} must hold 'option: value' lines")
    arguments = []
    for key, value in values.items():
        if key not in known:
            near = nearest(str(key), list(known))
            parser.error(f"{path}: option {key!r} is unknown{near}; the options are {', '.join(sorted(known))}")
        if value is None and known[key].default is None:
            continue
        try:
            texts = [option_text(each, known[key]) for each in (value if isinstance(value, list) else [value])]
        except ValueError as error:
            parser.error(f"{path}: {key} {error}")
        arguments += [f"--{key}", *texts]
    return arguments


def option_text(value, field):
    """A value of a YAML file as the command line says it. Raises ValueError where it has another type than the option
    of that field."""
    # of X | None and list[X], X
    kind = next((each for each in get_args(field.type) if each is not type(None)), field.type)
    if isinstance(value, dict) and field.default == "{}":
        return json.dumps(value)
    taken = {float: (int, float), int: (int, float)}.get(kind, kind)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, taken):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        quotes = ": write it in quotes, where it is meant as text" if kind is str else ""
        raise ValueError(f"must be {names[kind]}; YAML reads {value!r} there{quotes}")
    return str(value)


def mapping(name, text):
    """The mapping that an option holds as YAML, of which JSON is a part: {hidden_size: 64}. Raises ValueError, naming
    the option, when it is none."""
    try:
        value = yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} {text!r} is not YAML: {one_line(error)}") from None
    # {a:1} is a key without a value
    if not isinstance(value, dict) or not all(isinstance(key, str) and ":" not in key for key in value):
        raise ValueError(f"{name} {text!r} must be a mapping, {{argument: value}}, with a space after the colon")
    return value


def arguments_of(network_class, name, text):
    """As `mapping`, of arguments of a class. Raises ValueError for others, with the nearest name."""
    value, known = mapping(name, text), inspect.signature(network_class).parameters
    for each in value:
        if each not in known:
            near = nearest(each, list(known))
            raise ValueError(f"{name}: {each!r} is no argument of {network_class.__name__}{near}")
    return value


# set by a script once everything is open and checked: from then on an error is no matter of its options alone
WORK_BEGUN = threading.Event()


@contextmanager
def one_line_errors():
    """What a script's `main` runs in: a ValueError or OSError before its work has begun (`WORK_BEGUN`) is a line on
    stderr and exit status 2, as a wrong option is. Later ones keep their traceback."""
    WORK_BEGUN.clear()
    try:
        yield
    except (ValueError, OSError) as error:
        if WORK_BEGUN.is_set():
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__
