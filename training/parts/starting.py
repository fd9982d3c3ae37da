"""Training that starts from weights: what comes with them, which of them are kept, and which are trained.

The options that come with the weights (network, path, time conventions, size) are filled in before anything else reads
them, as if they had been given, so that checkpoints hold them and a resumed run needs the weights no more.
"""

import fnmatch
import importlib.util
import inspect
import json
import os
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import UNet2DModel
from diffusers.loaders import PeftAdapterMixin

from score_sde import ScoreSDEScheduler
from score_sde.pipelines import prompts
from score_sde.pipelines.conditions import number_of_classes, sample_channels
from score_sde.pipelines.kinds import axes_of
from score_sde.pipelines.latents import data_channels, spatial_factor
from score_sde.pipelines.wording import few, one_line
from score_sde.pipelines.writing import whole_folder
from score_sde.schedulers.paths import SDE_TYPES
from score_sde.sharing.convert.starting_point import StartingPoint, starting_point, weights_hash

from .checkpoints import list_checkpoints
from .config import option
from .latent_shards import read_latents_json
from .latents import fingerprint, load_vae
from .networks import NETWORKS, outside_classes
from .options import mapping


# arguments of networks that may be other than they were: those that no weight hangs on
FREE_OF_NETWORK = {"class_dropout_prob", "dropout", "attention_resolutions", "position_scaling"}
# and those that the data decide
FROM_DATA = {"sample_size", "in_channels", "out_channels", "condition_channels", "num_classes", "num_class_embeds"}
FROM_DATA |= {"vocab_size"}
# arguments of the scheduler that say what the network was trained on; the others are of sampling
TRAINED_ON = {
    *("num_train_timesteps", "variance_type", "t_min", "t_max", "beta_min", "beta_max", "sigma_min", "sigma_max"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale"),
    *("sigma_data", "preconditioned", "time_input", "time_scale", "time_offset", "invert_sigmas"),
}
# DiT's weight of the variational bound, for a network that learned the variance
VLB_WEIGHT = 0.001
# what comes with weights of samples of numbers
ADOPTED = ("network", "network_kwargs", "sde_type", "prediction_type", "scheduler_kwargs", "vlb_weight")
# what has so many axes
MADE_OF = {1: "signals, of one axis", 2: "images, or fields of two axes", 3: "videos, or volumes of three axes"}
# option: setting of `prompts.PROMPT_SETTINGS`
CAPTION_SETTINGS = {"max_caption_tokens": "max_tokens", "caption_layers": "layers", "pooled_captions": "pooled"}
# where a run keeps the autoencoder that came with the weights
KEPT_VAE = os.path.join("init_from", "vae")
# and the text encoder, with its tokenizer
KEPT_TEXT_ENCODER = os.path.join("init_from", "text_encoder")


@dataclass
class WeightsConfig:
    """Options of training that starts from weights, whatever the data are. A subclass states what comes with them
    (`adopted`, `scheduler_class`, `trained_on`) and how: `begin_from_start`, `go_on`."""

    init_from: str | None = option(
        None,
        "Weights to start from, a folder or repo on the Hub: a pipeline of this package, a DiTPipeline, a pipeline "
        "around a UNet2DModel, or a network alone. What network, path and autoencoder are comes with them.",
        "start from weights",
        common=True,
    )
    init_revision: str | None = option(None, "Branch, tag or commit of that repo.", "start from weights")
    freeze: list[str] = option(
        [],
        "Weights that stay as they are, by patterns of their names, or of the modules that they are in: time_embed "
        "'blocks.[0-3].*'.",
        "start from weights",
    )
    lora_rank: int = option(
        0,
        "Train LoRA adapters of this rank alone, beside the weights; 0 trains the weights. Needs peft.",
        "start from weights",
        common=True,
    )
    lora_alpha: float | None = option(
        None, "Adapters count lora_alpha / lora_rank; None is the rank.", "start from weights"
    )
    lora_targets: list[str] = option(
        ["to_q", "to_k", "to_v", "to_out.0"],
        "Layers that get adapters, by the ends of their names.",
        "start from weights",
    )

    given: ClassVar[frozenset[str]]
    # the option that names the weights
    start_option: ClassVar[str] = "init_from"
    # the options that come with the weights; the class of the scheduler, and its arguments that say what the network
    # was trained on: the others are of sampling
    adopted: ClassVar[tuple[str, ...]]
    scheduler_class: ClassVar[type]
    trained_on: ClassVar[set[str]]
    # (the option that names the noise, {name: what makes it of numbers that the scheduler takes, too})
    noises: ClassVar[tuple[str, dict]]
    # what to start from, None for a run that is resumed; and what is known of it, JSON-able
    start: ClassVar[StartingPoint | None] = None
    origin: ClassVar[dict | None] = None

    def problems(self):
        if self.init_from is None:
            if self.freeze or self.init_revision or self.lora_rank:
                yield "freeze, init_revision and lora_rank need init_from, the weights to start from"
            return
        yield from self.adapter_problems()
        try:
            checkpoint, state = resumable_state(self)
            if state is not None:
                self.origin = state["origin"]
                options = {name: state["config"][name] for name in self.adopted}
                yield from self.adopt(options, f"checkpoint {checkpoint!r}")
                # the run's folder may have moved
                self.go_on(state["config"], os.path.dirname(os.path.dirname(checkpoint)))
            else:
                self.start = starting_point(self.init_from, self.init_revision, self.outside())
                yield from self.begin_from_start()
        except ValueError as error:
            yield f"{self.start_option} {self.init_from!r}: {one_line(error)}"

    def begin_from_start(self):
        """Fill in what comes with `start`, as if it had been given; yields what contradicts it."""
        raise NotImplementedError

    def go_on(self, before, folder):
        """Fill in what else a resumed run needs of what it was started from: `before`, the options of its checkpoint,
        {name: value}, and its folder, which holds what was kept."""

    def kept_units(self):
        """{name: value} of the units of the data that the pipeline keeps which adapters are trained for; None where
        those of the data are taken, or where there are none."""

    def adapter_problems(self):
        if not self.lora_rank >= 0:
            yield f"lora_rank {self.lora_rank} must be at least 0"
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            yield f"lora_alpha {self.lora_alpha} must be positive"
        if not self.lora_rank and {"lora_alpha", "lora_targets"} & self.given:
            yield "lora_alpha and lora_targets need lora_rank"
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            yield "lora_rank needs peft: pip install score-sde[lora]"
        if self.lora_rank and self.freeze:
            yield "lora_rank trains adapters alone, all else is frozen: leave freeze out"
        if self.lora_rank and (self.further_ema_decays or self.ema_snapshot_steps):
            yield "further_ema_decays and ema_snapshot_steps are of whole networks: leave them out with lora_rank"

    def outside(self):
        return outside_classes(self.network) if ":" in self.network else []

    def adopt(self, options, whence):
        """Take options that aren't given from somewhere; yields what contradicts them."""
        if "network_name" in self.given:
            yield f"network_name {self.network_name!r}: the network comes from {whence}, leave network_name out"
        for name, theirs in options.items():
            own = getattr(self, name)
            if name.endswith("_kwargs"):
                own, theirs = mapping(name, own) if name in self.given else {}, mapping(name, theirs)
                if name == "scheduler_kwargs" and getattr(self, "time_shift", None) is not None:
                    theirs.pop("shift", None)
                if name == "scheduler_kwargs":
                    known = self.defaults_of_scheduler(options)
                    fixed = {key: theirs.get(key, known[key]) for key in self.trained_on}
                else:
                    # what it has not may be added
                    fixed = {k: v for k, v in theirs.items() if k not in FREE_OF_NETWORK and v is not None}
                for key in own.keys() & fixed.keys():
                    if own[key] != fixed[key]:
                        yield f"{name} {key} {own[key]!r} contradicts {fixed[key]!r} of {whence}: leave it out"
                setattr(self, name, json.dumps(theirs | own))
            elif name == "vlb_weight" and name in self.given and (own > 0) == (theirs > 0):
                continue
            elif name in self.given and own != theirs:
                yield f"{name} {own!r} contradicts {theirs!r} of {whence}: leave it out"
            else:
                setattr(self, name, theirs)

    def defaults_of_scheduler(self, options):
        """{argument of the scheduler: what stands for it where it isn't given}, beside options that come with the
        weights: None alone where that is neither its default nor that of its noise."""
        known = inspect.signature(self.scheduler_class).parameters
        defaults = {name: each.default for name, each in known.items()}
        which, kinds = self.noises
        # a domain has numbers of its own
        flat = options.get("domain") in (None, "flat") and "domain" not in mapping("", options["scheduler_kwargs"])
        of_noise = inspect.signature(kinds[options[which]]).parameters if flat else {}
        return defaults | {name: each.default for name, each in of_noise.items() if defaults.get(name, 0) is None}


@dataclass
class StartConfig(WeightsConfig):
    """Of samples of numbers: images, sound, videos, arrays."""

    adopted: ClassVar[tuple[str, ...]] = ADOPTED
    scheduler_class: ClassVar = ScoreSDEScheduler
    trained_on: ClassVar = TRAINED_ON
    noises: ClassVar = ("sde_type", SDE_TYPES)

    def begin_from_start(self):
        if hasattr(self.start.scheduler, "clean_log_probs"):
            raise ValueError("it is a pipeline of tokens, not of images: --data_kind text")
        self.check_start()
        # of videos, which a network of images can become one of
        options = options_of(self.start, self.given, getattr(self, "frames", None))
        yield from self.adopt(options, repr(self.init_from))
        yield from self.adopt_autoencoder()
        self.adopt_sizes(sizes_of(self.start))
        opened = self.start.opened
        if opened is not None and opened.takes_prompts:
            settings = opened.prompt_settings
            named = settings["text_encoder"] if opened.text_encoder is None else None
            self.adopt_text_encoder(
                named or os.path.join(self.output_dir, KEPT_TEXT_ENCODER),
                {name: settings[setting] for name, setting in CAPTION_SETTINGS.items()},
            )

    def check_start(self):
        """Raise ValueError for weights of another kind of data than this one."""
        if is_of_points(self.start.network):
            raise ValueError("it is a pipeline of points: --data_kind points, with the --columns that they are of")

    def check_axes(self, shape):
        """Raise ValueError for weights of samples of other axes than those of the data, of this shape (channels, ...),
        but for images, which the frames of videos begin as."""
        if self.start is None:
            return
        own, axes = axes_of(self.start.network.config), len(shape) - 1
        if own != axes and not (own == 2 and hasattr(self, "frames")):
            raise ValueError(
                f"{self.start_option} {self.init_from!r} is a network of {MADE_OF[own]}; these data are "
                f"{MADE_OF[axes]}, of shape {tuple(shape)} with channels first"
            )

    def kept_units(self):
        """{"data_mean", "data_std", "sampling_rate", ...}, as `WeightsConfig.kept_units` has it."""
        if not self.lora_rank:
            return None
        if self.start is None:
            return self.origin.get("units")
        opened = self.start.opened
        return None if opened is None else {**opened.units, **opened.rates}

    def go_on(self, before, folder):
        self.adopt_sizes({name: before.get(name) for name in ("resolution", "image_channels")})
        if self.origin["has_vae"]:
            self.vae = os.path.join(folder, KEPT_VAE)
        kept = os.path.join(folder, KEPT_TEXT_ENCODER)
        source = kept if os.path.isdir(kept) else before.get("text_encoder")
        self.adopt_text_encoder(source, {name: before.get(name) for name in CAPTION_SETTINGS})

    def adopt_sizes(self, sizes):
        """Take sizes of images that aren't given, which only images, and videos, have."""
        for name, value in sizes.items():
            if name not in self.given and hasattr(self, name):
                setattr(self, name, value)

    def adopt_text_encoder(self, source, settings):
        """Take the text encoder of the weights, and of its settings, {option: value}, those that aren't given, where
        captions are named without an encoder."""
        if not getattr(self, "reads_captions", False) or self.text_encoder is not None or self.latents:
            return
        self.text_encoder = source
        for name, value in settings.items():
            if name not in self.given:
                setattr(self, name, list(value) if isinstance(value, (list, tuple)) else value)

    def adopt_autoencoder(self):
        """Take the autoencoder from what to start from; yields what contradicts it."""
        ours = self.start.vae
        if self.start.scheduler is not None and ours is None and (self.vae or self.latents):
            yield (
                f"{'vae' if self.vae else 'latents'} {self.vae or self.latents!r} contradicts {self.init_from!r}, a "
                f"model of pixels: leave it out"
            )
        if ours is None:
            return
        if self.normalize_latents:
            yield (
                f"normalize_latents contradicts the autoencoder of {self.init_from!r}, whose config says how its "
                f"latents are normalised: leave it out"
            )
        if self.vae and fingerprint(load_vae(self.vae)) != fingerprint(ours):
            yield f"vae {self.vae!r} is another autoencoder than that of {self.init_from!r}: leave it out"
        here = self.latents and os.path.isdir(self.latents)
        if here and read_latents_json(self.latents)["vae_fingerprint"] != fingerprint(ours):
            yield (
                f"latents {self.latents!r} were encoded by another autoencoder than that of {self.init_from!r}: "
                f"encode them anew by it, --vae {self.init_from}"
            )
        self.vae = os.path.join(self.output_dir, KEPT_VAE)

    def keep_components(self, accelerator):
        """Write the autoencoder that came with the weights, and the text encoder, into the run's folder."""
        if self.start is None:
            return
        kept = {} if self.start.vae is None else {KEPT_VAE: [self.start.vae]}
        if getattr(self, "text_encoder", None) == os.path.join(self.output_dir, KEPT_TEXT_ENCODER):
            kept[KEPT_TEXT_ENCODER] = [self.start.opened.text_encoder, self.start.opened.tokenizer]
        if accelerator.is_main_process:
            for place, components in kept.items():
                with whole_folder(os.path.join(self.output_dir, place)) as folder:
                    for component in components:
                        component.save_pretrained(folder)
        accelerator.wait_for_everyone()


def is_of_points(network):
    """Whether the samples of a network are points, of one token."""
    size = network.config.get("sample_size")
    return isinstance(size, (list, tuple)) and tuple(size) == (1,)


def resumable_state(config):
    """(folder, state.json) of the checkpoint that a run is to go on from, which is checked later; (None, None) where it
    begins. Raises ValueError for a checkpoint of a run that started from nothing."""
    latest = config.resume_from_checkpoint == "latest"
    folders = list_checkpoints(config.output_dir)[::-1] if latest else [config.resume_from_checkpoint]
    for folder in filter(None, folders):
        try:
            with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
                state = json.load(file)
            if state["origin"] is None or not all(name in state["config"] for name in config.adopted):
                raise ValueError(f"checkpoint {folder!r} is of a run that began without init_from: leave it out")
            return os.path.abspath(folder), state
        except (OSError, LookupError, TypeError, json.JSONDecodeError):
            continue  # a damaged one: the one before is taken
    return None, None


def options_of(start, given, frames=None):
    """{name of an option: value} that come with a starting point; of a network of images that is to be one of videos of
    so many frames, those of its `with_frames`. Raises ValueError where a network alone doesn't say what only its
    scheduler would."""
    kind, own = type(start.network), start.network.config
    if frames is not None and axes_of(own) == 2:
        if not hasattr(kind, "with_frames"):
            raise ValueError(f"it is a {kind.__name__} of images, which cannot become one of videos")
        own = start.network.with_frames(frames).config
    options = network_options(kind, own)
    if start.scheduler is None:
        missing = [name for name in ("sde_type", "prediction_type") if name not in given]
        if missing:
            raise ValueError(
                f"it is a network alone, which doesn't say what it was trained on: pass "
                f"{' and '.join(f'--{name}' for name in missing)}, and more by --scheduler_kwargs"
            )
        return options
    learned = start.scheduler.config["variance_type"] == "learned_range"
    # times calibrated to weights hold for these alone
    options |= scheduler_options(start.scheduler, ("sde_type", "prediction_type"), ("calibration",))
    return options | {"vlb_weight": VLB_WEIGHT if learned else 0.0}


def network_options(kind, config):
    """{"network", "network_kwargs"} of a network's class and its config."""
    classes = {found: name for name, (_, found) in NETWORKS.items()}
    # modules that carry code have long names
    module = "diffusers" if kind.__module__.split(".")[0] == "diffusers" else kind.__module__
    defaults = {
        name: each.default for name, each in inspect.signature(kind).parameters.items() if name not in FROM_DATA
    }
    own = {name: config[name] for name in defaults if name in config}
    # conditions that it hasn't are the data's matter
    own = {name: each for name, each in own.items() if each is not None or defaults[name] is not None}
    return {"network": classes.get(kind, f"{module}:{kind.__name__}"), "network_kwargs": json.dumps(own)}


def scheduler_options(scheduler, named, left_out=()):
    """{name of an option: value} of a scheduler: its arguments that are `named` options of their own, and the others
    that are not at their default, but for those `left_out`, as "scheduler_kwargs"."""
    known = inspect.signature(type(scheduler)).parameters
    config = {name: each for name, each in scheduler.config.items() if name in known}
    other = {
        name: each
        for name, each in config.items()
        if each != known[name].default and name not in named and name not in left_out
    }
    return {name: config[name] for name in named} | {"scheduler_kwargs": json.dumps(other)}


def sizes_of(start):
    """{"resolution", "image_channels"} of the images that a starting point was trained on, where it says so."""
    config, vae = start.network.config, start.vae
    size = config.get("sample_size")
    sizes = {size} if isinstance(size, int) else set(size or ())
    factor, channels = spatial_factor(vae), sample_channels(config) if vae is None else data_channels(vae.config)
    found = {"resolution": sizes.pop() * factor} if len(sizes) == 1 else {}
    return found | ({"image_channels": channels} if channels in (1, 3) else {})


# weights of what else a network may be told, and those by which they join what there was
CONDITIONS = (
    *("context_embed.*", "pooled_embed.*", "time_to_embed.*", "guidance_embed.*"),
    *("*.cross_attn.*", "*.cross_attentions.*"),
)
LAST_OF_CONDITIONS = (
    *("pooled_embed.2.*", "time_to_embed.2.*", "guidance_embed.2.*"),
    *("*.cross_attn.to_out.0.*", "*.cross_attentions.*.to_out.0.*"),
)


# weights of what frames of a video tell each other, which is zero at first
OVER_FRAMES = ("temporal_*", "*.frame_layers.*")


def matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# --- weights ----------------------------------------------------------------------------------------------------------


def class_table(network):
    """(name, table) of the embedding of classes of a network; (None, None) without classes."""
    for name in ("class_embed.weight", "class_embedding.weight"):
        if name in network.state_dict():
            return name, network.state_dict()[name]
    return None, None


def class_of_none(network):
    """The row of a table of classes that stands for none (D,): the null label's, or, where that was never trained, the
    mean of all classes."""
    _, table = class_table(network)
    count = number_of_classes(network.config)
    return table[count] if network.config.get("class_dropout_prob", 0) > 0 else table[:count].mean(0)


def kept_classes(before, names):
    """{new label: old label} of classes of the same name, or of a name that is one of an old class's synonyms,
    "goldfish, Carassius auratus", and of no other's.

    Args:
        before, names: {label: name}.
    """
    synonyms: dict[str, list[int]] = {}
    for label, name in before.items():
        for each in name.split(", "):
            synonyms.setdefault(each, []).append(label)
    whole = {name: label for label, name in before.items()}
    whole |= {name: labels[0] for name, labels in synonyms.items() if len(labels) == 1 and name not in whole}
    return {label: whole[name] for label, name in names.items() if name in whole}


@torch.no_grad()
def transfer(source, network, kept):
    """Give a network the weights of another, so that its output is the other's for what both know.

    Args:
        source: the other, of the same class.
        network: it may have other classes, or more channels, of the samples or of a condition image, whose weights
            begin as zero; more channels of the output are zero then. A sequence, a vector or a second time that it is
            told, too, goes through layers the last of which is zero.
        kept: {its label: label of the source} of the classes that keep their rows. The others begin as no class
            (`class_of_none`), and so does a network without classes; of a source without classes, as zero.

    Raises ValueError for weights that the one has and the other has not, or of shapes that channels don't explain.
    """
    old, new = source.state_dict(), network.state_dict()
    (old_name, old_table), (new_name, new_table) = class_table(source), class_table(network)
    tokens = source.config.get("conditioning") in ("cross_attention", "in_context")
    if tokens and (old_table is None) != (new_table is None):
        raise ValueError(
            f"with conditioning {source.config.conditioning!r} classes are tokens of their own, which a network cannot "
            f"begin with, or without, and give what it gave: "
            + ("pass --class_conditional false" if old_table is None else "train on data with classes")
        )
    before, now = (
        {"channels": sample_channels(config), "channels of a condition image": config.get("condition_channels") or 0}
        if config.get("vocab_size") is None
        else {}  # tokens have none
        for config in (source.config, network.config)
    )
    for what in before:
        if now[what] < before[what]:
            remedy = "" if what == "channels" else "; pass condition_column or condition_from"
            raise ValueError(
                f"the network takes {before[what]} {what}, the data have {now[what]}: they may have more, not fewer"
                f"{remedy}"
            )
    added = new.keys() - old.keys() - {new_name}
    if tokens and (told := [name for name in added if matches(name, ("context_embed.*",))]):
        raise ValueError(
            f"with conditioning {source.config.conditioning!r} words are tokens in one sequence with time and class: "
            f"further ones take a share of the attention, whatever they say, so that a network cannot begin with them "
            f"({few(sorted(told))}) and give what it gave: leave the captions out, or begin with a network of "
            f"adaln_zero or adaln, where they join by a layer of zeros"
        )
    if missing := {name for name in added if not matches(name, CONDITIONS + OVER_FRAMES)}:
        raise ValueError(f"it has no {few(sorted(missing))}, which the network is to have")
    if other := old.keys() - new.keys() - {old_name}:
        classes = source.config.get("num_classes") and not network.config.get("num_classes")
        remedy = ": it knows classes, pass label_column" if classes else ""
        raise ValueError(f"it has {few(sorted(other))}, which the network is not to have{remedy}")
    for name in added:
        if matches(name, LAST_OF_CONDITIONS):
            new[name].zero_()
    for name in old.keys() - {old_name}:
        new[name].copy_(widened(name, old[name], new[name].shape, source.config, network.config))
    if new_table is not None:
        new_table.zero_()
        if old_table is not None:
            new_table.copy_(class_of_none(source))
            for label, old_label in kept.items():
                new_table[label] = old_table[old_label]
    elif old_table is not None:
        place = "time_embedding.linear_2.bias" if isinstance(network, UNet2DModel) else "time_embed.2.bias"
        new[place] += class_of_none(source)


def widened(name, tensor, shape, before, now):
    """A weight as it is, or for more channels of the input (columns) or the output (rows), with zeros in their places.

    A DiT's patches hold their channels one after the other at the input, side by side at the output; channels of a
    learned variance follow those of the mean.
    """
    if tensor.shape == shape:
        return tensor
    result, own = tensor.new_zeros(shape), tensor.shape
    channels, more = sample_channels(before), sample_channels(now)
    if own[0] == shape[0] and own[2:] == shape[2:] and own[1] * now.in_channels == shape[1] * before.in_channels:
        parts, old = result.view(own[0], now.in_channels, -1), tensor.view(own[0], before.in_channels, -1)
        parts[:, :channels] = old[:, :channels]
        # those of a condition image follow
        parts[:, more : more + before.in_channels - channels] = old[:, channels:]
        return result
    outputs = now.out_channels // more  # 2 with a learned variance
    if own[1:] == shape[1:] and own[0] * now.out_channels == shape[0] * before.out_channels:
        parts = result.view(-1, outputs, more, *shape[1:])
        parts[:, :, :channels] = tensor.view(-1, outputs, channels, *own[1:])
        return result
    raise ValueError(f"its {name} is of shape {tuple(own)}, the network's of {tuple(shape)}")


def begin(config, network, id2label, keep_all=False):
    """Give a network the weights that a config starts from; return what is known of them, JSON-able.

    Args:
        config: a `TrainConfig` whose `start` is there.
        network: of the options that came with them.
        id2label: {label: name} of the network's classes, None without.
        keep_all: let the network keep the classes that it had.
    """
    start = config.start
    count = number_of_classes(start.network.config)
    before = names_of_classes(count, start.id2label)
    kept = {label: label for label in before} if keep_all else kept_classes(before, id2label or {})
    try:
        transfer(start.network.float(), network, kept)
    except ValueError as error:
        raise ValueError(f"{config.start_option} {config.init_from!r}: {error}") from error
    classes = {name: before[kept[label]] if label in kept else None for label, name in (id2label or {}).items()}
    origin = {
        **{key: getattr(start, key) for key in ("source", "name", "base_model", "revision", "license")},
        "weights": weights_hash(start.network),
        "has_vae": start.vae is not None,
        "had_classes": count,
        "classes": classes or None,
    }
    return origin


def names_of_classes(count, id2label):
    """{label: name} of a network of so many classes, or None, whose names are known or not."""
    return id2label or {label: str(label) for label in range(count or 0)}


def describe(origin):
    """What a network was started from, in lines to print: the source, and the classes with where their rows are
    from."""
    revision = f", revision {origin['revision']}" if origin["revision"] else ""
    yield f"started from {origin['source']}{revision}; licence {origin['license'] or 'not known'}"
    classes = origin["classes"] or {}
    width = max(map(len, classes), default=0)
    for name, old in classes.items():
        yield f"  class {name:{width}}  {'new' if old is None else f'kept from {old}' if old != name else 'kept'}"


# --- adapters ---------------------------------------------------------------------------------------------------------


class AdaptedClasses:
    """The classes of a network that keeps its own while adapters are trained on data that have others, by their names;
    those that it doesn't know follow its own.

    Attributes: `num_classes` and `id2label` of the network, None without; `labels`, of every class of the data (N,);
    `new`, those that follow.

    Raises ValueError for data with classes where the network has none, and for data without where it always needs one.
    """

    def __init__(self, start, origin, id2label):
        """`start` is None for a run that goes on, of which `origin` knows as much; `id2label` are the data's classes,
        None where they are not told."""
        if start is not None:
            self.num_classes, self.id2label = number_of_classes(start.network.config), start.id2label
            never_none = start.network.config.get("class_dropout_prob", 0) == 0
        else:
            names = origin["id2label"]
            self.num_classes, never_none = origin["had_classes"], False
            self.id2label = names and {int(label): name for label, name in names.items()}
        self.labels, self.new = None, []
        if id2label is not None:
            if self.num_classes is None:
                raise ValueError(
                    f"lora_rank leaves a network without classes as it is, and the data have {few(id2label.values())}: "
                    f"train without --lora_rank, or with --class_conditional false"
                )
            before = names_of_classes(self.num_classes, self.id2label)
            labels = kept_classes(before, id2label)
            self.new = list(range(self.num_classes, self.num_classes + len(id2label) - len(labels)))
            added = dict(zip((label for label in sorted(id2label) if label not in labels), self.new, strict=True))
            if self.new:
                self.id2label = before | {new: id2label[label] for label, new in added.items()}
                self.num_classes += len(self.new)
            self.labels = torch.tensor([(labels | added)[label] for label in sorted(id2label)])
        elif self.num_classes is not None and never_none:
            raise ValueError("lora_rank: the network always needs a class, and the data have none")


# argument of a network for a condition: (what one without it does not do, the remedy)
TOLD = {
    "cross_attention_dim": ("follows no words", "leave caption_column and text_encoder out"),
    "pooled_projection_dim": ("was not told pooled captions", "leave pooled_captions out"),
    "condition_channels": (
        "sees no image beside the sample",
        "leave condition_column and condition_from out (--condition_column none, where latents hold one)",
    ),
}


def check_told(who, start, captions, condition, with_its_settings=False):
    """Raise ValueError for conditions of the data that mean nothing, or something else, to a network that stays as it
    is.

    Args:
        who: begins the sentence, such as "the teacher".
        start: its `StartingPoint`.
        captions: the `CaptionEncoder` of the data, None without.
        condition: the `ImageCondition` of the data, None without.
        with_its_settings: whether prompts are encoded as its own pipeline does it, later.
    """
    config, opened = start.network.config, start.opened
    told = (captions.arguments() if captions else {}) | (condition.arguments() if condition else {})
    for name, (what, remedy) in TOLD.items():
        if told.get(name) and not config.get(name):
            raise ValueError(f"{who} {what}: {remedy}")
    own, given = (each.get("condition_channels") or 0 for each in (config, told))
    if own != given:
        raise ValueError(
            f"{who} sees an image of {own} channels beside the sample, and the data have {given or 'none'}: pass the "
            f"condition_column or condition_from that it was trained with"
        )
    if opened is None:
        return
    before = opened.config.get("condition_from")
    if condition and before != condition.measured:
        raise ValueError(
            f"{who} sees images of {before or 'a column'} beside the sample, not of "
            f"{condition.measured or 'a column'}: pass --{f'condition_from {before}' if before else 'condition_column'}"
        )
    if not captions:
        return
    if encoder_of(opened) not in (None, captions.fingerprint):
        raise ValueError(
            f"text_encoder {captions.source!r} is another one than that of {start.source!r}, to which its vectors mean "
            f"nothing: pass that"
        )
    theirs = opened.prompt_settings
    for name, setting in CAPTION_SETTINGS.items():
        before, given = theirs[setting], captions.settings[setting]
        if (setting != "max_tokens" or with_its_settings) and before != given:
            raise ValueError(
                f"{who} was told captions with {name} {before}, not {given}: pass --{name} "
                f"{' '.join(map(str, before)) if setting == 'layers' else str(before).lower()}"
            )


def encoder_of(pipeline):
    """The fingerprint of the text encoder that a pipeline has, or names; None where it says nothing of one."""
    if pipeline.text_encoder is not None:
        return prompts.fingerprint(pipeline.text_encoder, pipeline.tokenizer)
    return pipeline.prompt_settings["fingerprint"]


def begin_adapted(config, network, adapted):
    """Give a network all the weights that a config starts from; return what is known of them, as `begin` does.

    Args:
        adapted: its `AdaptedClasses`.

    Raises ValueError for one of another shape, which an adapter alone could not describe.
    """
    # sizes of a file are lists
    own, now = (json.loads(each.to_json_string()) for each in (config.start.network, network))
    for name in ("sample_size", "in_channels"):
        if own.get(name) != now.get(name):
            raise ValueError(
                f"lora_rank leaves the network as it is, of {name} {own.get(name)}, which the data are not: "
                f"{now.get(name)}"
            )
    if added := network.state_dict().keys() - config.start.network.state_dict().keys():
        raise ValueError(
            f"lora_rank leaves the network as it is, and it has no {few(sorted(added))}: train without --lora_rank"
        )
    classes = adapted.id2label if adapted.new else None
    known = {"id2label": config.start.id2label, "units": config.kept_units()}
    return begin(config, network, classes, keep_all=True) | known


def add_adapters(network, config, new_classes=()):
    """Put LoRA adapters on a network, which alone are trained, beside the rows of new classes in its table. Raises
    ValueError for a network that takes none, and for targets that are none of its layers."""
    from peft import LoraConfig

    if not isinstance(network, PeftAdapterMixin):
        raise ValueError(
            f"lora_rank: a {type(network).__name__} takes no adapters, it is no PeftAdapterMixin: train its weights "
            f"without --lora_rank, some of them by --freeze"
        )
    layers = [
        name for name, module in network.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    for target in config.lora_targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers)
            raise ValueError(f"lora_targets {target!r} is no layer of the network; there are {few(ends, 30)}")
    network.requires_grad_(False)
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    rows = {"class_embed": list(new_classes)} if new_classes else None
    targets = list(config.lora_targets)
    network.add_adapter(
        LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets, trainable_token_indices=rows)
    )


# --- what is trained --------------------------------------------------------------------------------------------------


def freeze(network, patterns):
    """Let parameters stay as they are: those whose names, or the names of modules that they are in, match one of some
    shell patterns. Raises ValueError for a pattern that matches nothing, and where nothing is left to train."""
    names = dict(network.named_parameters())
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern) or within(name, pattern)]
        if not found:
            raise ValueError(f"freeze {pattern!r} matches no weight; there are {few(names, 30)}")
        for name in found:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ValueError(f"freeze {' '.join(patterns)}: nothing is left to train")


def within(name, pattern):
    """Whether a parameter is in a module whose name matches a pattern."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts)))


# --- the whole of it --------------------------------------------------------------------------------------------------


class Begun(NamedTuple):
    """A network as its training begins.

    network: with the weights that it starts from, its adapters, and what is frozen.
    id2label: {label: name} of its classes, None without.
    labels: its label of every class of the data (N,), where they are others; None where they are the same.
    origin: what is known of the weights that it was started from, JSON-able, None without.
    """

    network: Any
    id2label: dict[int, str] | None
    labels: torch.Tensor | None
    origin: dict | None


def begun(config, accelerator, make, num_classes, id2label, teacher=None):
    """The network of a config, with what its `WeightsConfig` says, `Begun`; what came of the classes is printed.

    Args:
        make: f(number of classes or None) -> a network as the options have it.
        num_classes, id2label: of the data's classes, None where the network is not told them.
        teacher: the `StartingPoint` whose classes a student keeps; None without.

    Raises ValueError for weights, data and patterns that don't go together.
    """
    origin, labels, adapted, names = config.origin, None, None, id2label
    if config.lora_rank or teacher:
        adapted = AdaptedClasses(teacher or config.start, origin, id2label)
        num_classes, names = adapted.num_classes, adapted.id2label
        labels = None if adapted.labels is None else adapted.labels.to(accelerator.device)
    network = make(num_classes)
    if config.start is not None:
        if config.lora_rank:
            origin = begin_adapted(config, network, adapted)
        else:
            origin = begin(config, network, None if teacher else id2label, bool(teacher))
        accelerator.print("\n".join(describe(origin)))
    if config.lora_rank:
        add_adapters(network, config, adapted.new)
    freeze(network, config.freeze)
    return Begun(network, names, labels, origin)
