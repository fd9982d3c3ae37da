"""Checks of a bundle before anything of it is built: a folder from the Hub may hold anything.

Its files are read as data only. What is checked here can then be loaded without surprise: classes that are known and
fit their part, arguments of the right types, the files that are then opened and no others, no more memory than the
weights take, and weights that are those of the network, and finite.
"""

import importlib
import inspect
import os

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from torch.utils._pytree import tree_leaves

from ..pipelines.bundle_files import read_config, read_index
from ..pipelines.bundling import FORMAT, NETWORK_ROLES, any_component
from ..pipelines.image_conditions import Measurement
from ..pipelines.latents import AUTOENCODERS
from ..pipelines.prompts import check_prompt_settings
from ..pipelines.wording import quoted, shortened
from .config_checks import check_keys, check_labels, check_numbers, check_types, fits, naming
from .text_checks import check_text_component, check_vocabulary, text_class
from .weight_checks import check_model


PACKAGE = __package__.split(".")[0]
# any whole number in a scheduler's config, which counts noise levels and steps: of ours, and of diffusers', some of
# which take a time that grows with its square
LARGEST_COUNT, LARGEST_STOCK_COUNT = 10**5, 10**4

NETWORKS = ("DiTModel", "ScoreUNetModel", "DiTTransformer2DModel", "UNet2DModel")
# those of this package: of numbers, and of tokens
OWN_SCHEDULERS = ("ScoreSDEScheduler", "DiscreteScoreScheduler")
SCHEDULERS = (*OWN_SCHEDULERS, *(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")))
# those by which a pipeline of ours draws: with set_timesteps(number), step(output, timestep, sample), a scale of the
# noise to start from; what lacks these (tokens, flows that count otherwise, two outputs) is converted, or refused
DRIVEN_SCHEDULERS = (
    *("ScoreSDEScheduler", "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler"),
    *("CosineDPMSolverMultistepScheduler", "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler"),
    *("DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverMultistepInverseScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler"),
    *("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler"),
    *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler"),
    *("TCDScheduler", "UnCLIPScheduler", "UniPCMultistepScheduler"),
)
# the pipelines that draw by others: {class: its schedulers}
DRIVEN_BY = {"ScoreSDETextPipeline": ("DiscreteScoreScheduler",)}
# the components that there are, what each may be, and the classes of that
ROLES = {
    "scheduler": (
        "a ScoreSDEScheduler, a DiscreteScoreScheduler, or a scheduler of diffusers",
        SCHEDULERS,
        SchedulerMixin,
    ),
    "transformer": (f"one of {', '.join(NETWORKS)}", NETWORKS, ModelMixin),
    "unet": (f"one of {', '.join(NETWORKS)}", NETWORKS, ModelMixin),
    "vae": ("an autoencoder of diffusers", AUTOENCODERS, ModelMixin),
    "text_encoder": ("a model of transformers without a head", (), torch.nn.Module),
    "tokenizer": ("a fast tokenizer of transformers", (), object),
    # in stock pipelines
    "vqvae": ("an autoencoder of diffusers", AUTOENCODERS, ModelMixin),
}
# of these, those of transformers
TEXT_ROLES = ("text_encoder", "tokenizer")


def check_classes(classes):
    """Raise ValueError for what is no class of a network that diffusers can open."""
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, ModelMixin) and issubclass(each, ConfigMixin)):
            raise ValueError(f"classes: {quoted(each)} must be a class of networks: a ModelMixin and a ConfigMixin")


def outside_classes(index, classes):
    """{component: class} of the networks in a model index whose class, by its name, is among those of a caller."""
    held = {each.__name__: each for each in classes}
    entries = {name: index.get(name) for name in NETWORK_ROLES}
    named = {name: value[1] for name, value in entries.items() if isinstance(value, list) and len(value) == 2}
    return {name: held[each] for name, each in named.items() if isinstance(each, str) and each in held}


def check_bundle(folder, pipeline_class, variant=None, given=(), classes=()):
    """Raise ValueError, naming the file and the value, for a bundle that is not sound or newer than this package.

    Args:
        folder: a folder with a model_index.json.
        pipeline_class: the installed class that is to open it.
        variant: of the weights that are to be loaded.
        given: names of components that are not taken from the folder.
        classes: of networks from outside this package.

    Returns {component: class} of the networks that are of one of `classes`.
    """
    path, index = os.path.join(folder, "model_index.json"), read_index(folder)
    bundle_format = index.get("_bundle_format", FORMAT)
    if not fits(bundle_format, int) or bundle_format > FORMAT:
        raise ValueError(
            f"{path}: _bundle_format {quoted(bundle_format)} is newer than this package, which knows up to {FORMAT}: "
            f"`pip install -U score-sde`"
        )
    outside = {name: each for name, each in outside_classes(index, classes).items() if name not in given}
    try:
        index = pipeline_class.use_installed_classes(index, [*given, *outside])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    found = check_components(folder, index, pipeline_class, variant, given, outside)
    driven = DRIVEN_BY.get(pipeline_class.__name__, DRIVEN_SCHEDULERS)
    if "scheduler" not in given and found["scheduler"].__name__ not in driven:
        own = f"{driven[0]}.from_config(...) of the folder's scheduler, or one of " if len(driven) > 1 else ""
        raise ValueError(
            f"{path}: a {pipeline_class.__name__} cannot draw by a {found['scheduler'].__name__}, whose steps are of "
            f"another kind: pass scheduler={own}{', '.join(driven)}"
        )
    of_tokens = pipeline_class.__name__ in DRIVEN_BY
    check_vocabulary(folder, {name: each for name, each in found.items() if name not in given}, of_tokens)
    return outside


def check_components(folder, index, pipeline_class, variant, given, outside=None):
    """Raise ValueError for a model index whose components or arguments the pipeline class doesn't have, or whose
    components are not sound. `outside` are the classes of those components that are not this package's.

    Returns {component: class}."""
    path, arguments, outside = os.path.join(folder, "model_index.json"), {}, outside or {}
    check_keys(index, path)
    parts = inspect.signature(pipeline_class.__init__).parameters
    classes = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if name not in ROLES and not isinstance(value, list):
            arguments[name] = value
        elif name not in ROLES or name not in parts:
            raise ValueError(f"{path}: {quoted(name)} is no name of a component that a {pipeline_class.__name__} has")
        elif not (isinstance(value, list) and len(value) == 2 and {*map(type, value)} in ({str}, {type(None)})):
            raise ValueError(f"{path}: {name} {quoted(value)} must be a library and a class, or twice null")
        elif name in outside:
            classes[name] = outside[name]
        elif value[0] is not None and not (name in given and value == any_component(name)):
            classes[name] = component_class(path, name, *value)
    check_types(arguments, pipeline_class, path)
    check_labels(arguments.get("id2label"), path)
    with naming(path):
        check_prompt_settings(arguments.get("prompt_settings") or {})
        if arguments.get("condition_from") is not None:
            Measurement(arguments["condition_from"])
    for name, part in parts.items():
        needed = part.default is part.empty and name in ROLES and name not in pipeline_class._optional_components
        if needed and name not in classes and name not in given:
            raise ValueError(f"{path}: there is no {name}, which a {pipeline_class.__name__} needs")
    opened = [name for name in index if name in classes or (name in ROLES and name in given)]
    check_no_code(folder, {name: index[name][0] for name in opened})
    variants = {name: find_variant(folder, name, variant) for name in classes}
    if variant is not None and not any(variants.values()):
        raise ValueError(
            f"You are trying to load the model files of the `variant={variant}`, but no such modeling files are "
            f"available. {folder} holds none: load it without variant, or save it with one"
        )
    for name, found in classes.items():
        if name in TEXT_ROLES and name not in given:
            check_text_component(folder, name, found)
        elif name not in given:
            class_name = found.__name__ if name in outside else index[name][1]
            check_component(folder, (name,), class_name, found, variants[name])
    return classes


def component_class(path, name, library, class_name):
    """The class of a component. Raises ValueError for one that this part of a pipeline cannot be; only those that it
    can be are looked up."""
    description, names, base = ROLES[name]
    found = None
    if name in TEXT_ROLES and library == "transformers":
        found = text_class(name, class_name)
    elif class_name in names and library in ("diffusers", PACKAGE):
        found = getattr(importlib.import_module(library), class_name, None)
    if class_name == "Transformer2DModel" and library == "diffusers" and name == "transformer":
        found = diffusers.DiTTransformer2DModel  # its name in published repos
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"{path}: component {name!r}, {quoted(class_name)} of {shortened(library)}, cannot be loaded: it must be "
            f"{description}"
        )
    return found


def check_no_code(folder, libraries):
    """Raise ValueError for code where diffusers would look for it before it takes the installed classes, which are of
    {component: library}."""
    for names in [("None.py",), *((name, f"{library}.py") for name, library in libraries.items())]:
        path = os.path.join(folder, *names)
        if os.path.lexists(path):
            raise ValueError(f"{path} would be taken for the installed code: remove it")


def find_variant(folder, name, variant):
    """The variant where diffusers takes a component's folder to have it, None where it takes the plain weights."""
    if variant is None:
        return None
    place = os.path.join(folder, name)
    entries = os.listdir(place) if os.path.isdir(place) and not os.path.islink(place) else []
    without = [entry for entry in entries if "." not in entry]
    if without:
        raise ValueError(
            f"{os.path.join(place, without[0])}: diffusers finds no variant where a name has no dot: remove it, or "
            f"load without variant"
        )
    return variant if any(entry.split(".")[1].startswith(variant) for entry in entries) else None


def check_component(folder, place, class_name, component_class, variant):
    """Raise ValueError for a component whose config or weights are not what they should be.

    Args:
        folder: of the bundle.
        place: names of the subfolders, from there, that hold the component.
        class_name: as the config names it.
        component_class: which is to open it.
        variant: of its weights.
    """
    config = read_config(folder, *place, component_class.config_name)
    path = os.path.join(folder, *place, component_class.config_name)
    if config.get("_class_name") != class_name:
        raise ValueError(
            f"{path}: _class_name {quoted(config.get('_class_name'))} is not {class_name}, as model_index.json says"
        )
    if class_name == "Transformer2DModel" and config.get("norm_type") != "ada_norm_zero":
        raise ValueError(f"{path}: norm_type {quoted(config.get('norm_type'))} is not ada_norm_zero, a DiT's")
    check_keys(config, path)
    if issubclass(component_class, ModelMixin):
        check_types(config, component_class, path)
        if class_name in AUTOENCODERS:
            check_statistics(config, path)
        check_model(folder, place, path, config, component_class, variant)
    else:
        stock = component_class.__module__.split(".")[0] == "diffusers"
        # the number of tokens is held against the network's
        counted = {name: value for name, value in config.items() if name != "vocab_size"}
        check_numbers(counted, path, LARGEST_STOCK_COUNT if stock else LARGEST_COUNT)
        check_types(config, component_class, path)
        with naming(path):
            component_class.from_config(config)


def check_statistics(config, path):
    """Raise ValueError for statistics of latents that nothing can be scaled by and back."""
    for name in ("scaling_factor", "latents_std"):
        values = config.get(name)
        # one number for all, one for each channel, or, of AutoencoderRAE, for each place of each
        for value in tree_leaves(values):
            if value is not None and not (fits(value, float) and value > 0):
                raise ValueError(f"{path}: {name} {quoted(values)} must be positive: latents are divided by it")
