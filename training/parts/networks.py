"""Networks that are trained: those of this package by short names, others by the module that they are in."""

import importlib
import inspect
import os
import sys
from dataclasses import dataclass

from diffusers import ModelMixin, UNet2DModel

from score_sde import DiTModel, ScoreUNetModel
from score_sde.pipelines.kinds import axes_of, divisors_of_sides, kind_of
from score_sde.pipelines.latents import spatial_factor

from .config import option
from .options import arguments_of, mapping


# name -> (component of the pipeline, class)
NETWORKS = {"dit": ("transformer", DiTModel), "unet": ("unet", ScoreUNetModel)}


@dataclass
class NetworkConfig:
    network: str = option(
        "dit",
        f"{', '.join(f'{name} ({kind.__name__})' for name, (_, kind) in NETWORKS.items())}, or a class of your own, "
        f"which is imported: package.module:Class, a ModelMixin of diffusers.",
        "network",
        common=True,
    )
    network_name: str | None = option(
        None, "A published configuration of the network by name, such as DiT-S/2.", "network", common=True
    )
    network_kwargs: str = option(
        "{}",
        "Arguments of the network's class, as YAML: {hidden_size: 256}; they win over network_name.",
        "network",
        common=True,
    )
    class_conditional: bool = option(True, "Train on class labels, where the data has them.", "network", common=True)


def network_class(name):
    """(component of the pipeline, class) of a name in `NETWORKS`, or of a class from outside, "package.module:Class",
    in a module that is installed or lies in the working folder.

    Raises ValueError for an unknown name, a module that cannot be imported, and a class that is no `ModelMixin` or
    whose forward cannot be called with (sample, timestep) alone.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ValueError(
            f"network {name!r} is unknown; choose one of {', '.join(NETWORKS)}, or a class of your own by "
            f"package.module:Class"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: what lies there shadows nothing
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"network {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise ValueError(f"network {name!r} is no model of diffusers: let the class inherit ModelMixin and ConfigMixin")
    signature = inspect.signature(found.forward)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ValueError(
            f"network {name!r}: its forward must take (sample, timestep), and more only by name; it takes {signature}"
        ) from error
    return "unet" if issubclass(found, UNet2DModel) else "transformer", found


def outside_classes(name):
    """`classes` of `load_bundle` for a pipeline whose network is from outside, by the name that it was trained with;
    none for None. Raises ValueError as `network_class` does."""
    return [] if name is None else [network_class(name)[1]]


def check_conditions(model, conditions):
    """Raise ValueError for conditions, names, that the forward of a network doesn't take."""
    parameters = inspect.signature(model.forward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return
    unknown = [name for name in conditions if name not in parameters]
    if unknown:
        raise ValueError(
            f"the data have {', '.join(unknown)}, which the forward of {type(model).__name__} doesn't take: "
            + ("pass --class_conditional false to train without" if unknown == ["class_labels"] else "train without")
        )


def check_sizes(model, sizes, vae=None):
    """Raise ValueError for images of sizes, (height, width) in pixels, that a network or its autoencoder can't have,
    naming the nearest ones that they can."""
    network, factor = model.config, spatial_factor(vae)
    for height, width in sizes:
        try:
            kind_of(network, None if vae is None else vae.config).of_size(
                height, width, divisors_of_sides(network), factor
            )
        except ValueError as error:
            raise ValueError(f"images of {height} x {width} pixels: {error}") from error


def make_network(config, shape, num_classes, told=None):
    """The network of a `TrainConfig` for samples of this shape (channels, size, ...), with `told`, arguments that say
    how wide captions and condition images are; a class from outside is told of these, sample_size, in_channels and
    num_classes what its constructor takes. Raises ValueError for options that don't fit.
    """
    told = told or {}
    _, found = network_class(config.network)
    # of squares one number, which stock networks take alone
    size = shape[1] if len(shape) == 3 and shape[1] == shape[2] else tuple(shape[1:])
    channels = shape[0] + told.get("condition_channels", 0)
    from_data = {"sample_size": size, "in_channels": channels, "num_classes": num_classes} | told
    if config.vlb_weight > 0 or config.network_name:
        from_data["learn_sigma"] = config.vlb_weight > 0
    taken = inspect.signature(found).parameters
    if "dimensions" in taken:
        from_data["dimensions"] = len(shape) - 1
    if config.network not in NETWORKS:
        if "condition_channels" in told and "condition_channels" not in taken:
            raise ValueError(
                f"network {config.network!r}: its constructor takes no condition_channels, those of in_channels that "
                f"are a condition image's: train without, or let it take them"
            )
        if issubclass(found, UNet2DModel):
            outputs = shape[0] * (2 if config.vlb_weight > 0 else 1)
            from_data |= {"out_channels": outputs, "num_class_embeds": num_classes}
        from_data = {name: value for name, value in from_data.items() if name in taken}
    options = mapping("network_kwargs", config.network_kwargs)
    for name, width in told.items():
        if options.get(name) not in (None, width):
            raise ValueError(
                f"{name} {options[name]!r} of {config.init_from or 'network_kwargs'} contradicts "
                + (
                    f"the condition images, which have {width}: leave it out"
                    if name == "condition_channels"
                    else f"the text encoder, which makes vectors of width {width}: give another text_encoder, or other "
                    f"caption_layers"
                )
            )
    options = {name: value for name, value in options.items() if value is not None or name not in told}
    network = build(config, found, from_data | options)
    wanted, axes = len(shape) - 1, axes_of(network.config)
    if network.config.get("sample_size") is not None and axes != wanted:
        said = "dimensions" if "dimensions" in options else "patch_size"
        whose, count = config.init_from or "network_kwargs", f"{axes} {'axes' if axes > 1 else 'axis'}"
        raise ValueError(
            f"{said} {network.config.get(said)} of {whose} is of samples of {count}; the data have {wanted} beside "
            f"their channels, {tuple(shape)}: give one of theirs"
        )
    return network


def make_token_network(config, vocab_size, num_classes):
    """The network of a `TextTrainConfig` for sequences of tokens. Raises ValueError for one that takes none, and for
    options that don't fit."""
    _, found = network_class(config.network)
    taken = inspect.signature(found).parameters
    if "vocab_size" not in taken:
        raise ValueError(
            f"network {config.network!r}: a {found.__name__} takes no vocab_size; tokens need a network that does, "
            f"such as dit"
        )
    from_data = {"vocab_size": vocab_size, "sample_size": (config.length,), "num_classes": num_classes}
    options = arguments_of(found, "network_kwargs", config.network_kwargs)
    for name in ("vocab_size", "sample_size", "num_classes"):
        if name in options:
            raise ValueError(f"network_kwargs: {name} {options[name]!r} is for the data to say: leave it out")
    from_data = {name: value for name, value in from_data.items() if name in taken}
    return build(config, found, from_data | options)


def make_point_network(config, channels, num_classes):
    """The network of a `PointTrainConfig` for points of so many channels, which is told their domain where its
    constructor takes it. Raises ValueError for options that don't fit."""
    _, found = network_class(config.network)
    taken, domains = inspect.signature(found).parameters, config.domains
    if config.network in NETWORKS and "domain" not in taken:
        raise ValueError(
            f"network {config.network!r} is of images and signals: points need dit, or a class of your own"
        )
    domain = next(iter(domains)) if len(domains) == 1 else domains
    from_data = {"sample_size": (1,), "patch_size": 1, "in_channels": channels, "num_classes": num_classes}
    from_data |= {"domain": domain}
    options = arguments_of(found, "network_kwargs", config.network_kwargs)
    for name in ("sample_size", "in_channels", "domain", "num_classes"):
        if name in options:
            raise ValueError(f"network_kwargs: {name} {options[name]!r} is for the data to say: leave it out")
    from_data = {name: value for name, value in from_data.items() if name in taken}
    return build(config, found, from_data | options)


def build(config, found, arguments):
    """A network of a class, by its published configuration where the config names one. Raises ValueError for arguments
    that don't fit."""
    try:
        if config.network_name is None:
            return found(**arguments)
        if not hasattr(found, "from_name"):
            raise ValueError(f"network_name {config.network_name!r}: {found.__name__} has no published configurations")
        return found.from_name(config.network_name, **arguments)
    except (TypeError, RuntimeError) as error:  # of values of other types
        raise ValueError(f"network_kwargs {config.network_kwargs!r}: {error}") from error
