"""Checks of a bundle before anything of it is built: a folder from the Hub may hold anything.

Its files are read as data only. What is checked here can then be loaded without surprise: classes that are known and
fit their part, arguments of the right types, the files that are then opened and no others, no more memory than the
weights take, and weights that are those of the network, and finite.
"""

import importlib
import inspect
import json
import math
import os
import re
import threading
import time
import types
import typing
from contextlib import contextmanager

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.models import autoencoders
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ..pipelines.bundling import (
    DOWNLOAD_ARGUMENTS,
    FORMAT,
    download,
    fetch,
    own_file,
    quoted,
    read_config,
    read_index,
    shortened,
    tensor_problems,
)
from ..pipelines.latents import AUTOENCODERS, autoencoder_of


PACKAGE = __package__.split(".")[0]
# any whole number in a model's config, unless its weights hold more numbers than this
LARGEST_INTEGER = 10**6
# any whole number in a scheduler's config, which counts noise levels and steps: of ours, and of diffusers', some of
# which take a time that grows with its square
LARGEST_COUNT, LARGEST_STOCK_COUNT = 10**5, 10**4
# numbers in tables that are computed and not saved, such as positions
LARGEST_TABLES = 2**24

NETWORKS = ("DiTModel", "ScoreUNetModel", "DiTTransformer2DModel", "UNet2DModel")
SCHEDULERS = ("ScoreSDEScheduler", *(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")))
# the components that there are, what each may be, and the classes of that
ROLES = {
    "scheduler": ("a ScoreSDEScheduler, or a scheduler of diffusers", SCHEDULERS, SchedulerMixin),
    "transformer": (f"one of {', '.join(NETWORKS)}", NETWORKS, ModelMixin),
    "unet": (f"one of {', '.join(NETWORKS)}", NETWORKS, ModelMixin),
    "vae": ("an autoencoder of diffusers", AUTOENCODERS, ModelMixin),
    # in stock pipelines
    "vqvae": ("an autoencoder of diffusers", AUTOENCODERS, ModelMixin),
}
# the stock pipelines that can be converted
STOCK_PIPELINES = ("DiTPipeline", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline", "LDMPipeline")

# of `DiffusionPipeline.from_pretrained`, beside those of the download and the components
LOADING_ARGUMENTS = {"dtype", "torch_dtype", "variant", "device_map", "max_memory", "offload_folder"}
LOADING_ARGUMENTS |= {"offload_state_dict", "low_cpu_mem_usage", "disable_mmap", "quantization_config"}
# what a safe loader never leaves to its caller
FIXED_ARGUMENTS = {"trust_remote_code": False, "use_safetensors": True}
# keys that make diffusers or transformers run code, read weights in other ways than those that are checked, or pass
# over what a config says; none is ever saved in a bundle
FORBIDDEN_KEYS = {"auto_map", "custom_pipeline", "custom_pipelines", "quantization_config", "_use_default_values"}


# --- opening ------------------------------------------------------------------------------------------------------


def safe_arguments(given, pipeline_class):
    """The arguments for `DiffusionPipeline.from_pretrained`: those that are given, with no code run and safetensors
    only. Raises ValueError for those that a safe loader doesn't have."""
    parts = inspect.signature(pipeline_class.__init__).parameters.keys() - {"self"}
    for name, value in given.items():
        if name in FIXED_ARGUMENTS and value in (None, FIXED_ARGUMENTS[name]):
            continue
        if name not in LOADING_ARGUMENTS | parts:
            raise ValueError(
                f"{name}={quoted(value)} cannot be given here, where no code of a bundle is run and weights are opened "
                f"as safetensors only; the arguments are {', '.join(sorted({*DOWNLOAD_ARGUMENTS, *LOADING_ARGUMENTS}))}"
                f", and components: {', '.join(sorted(parts))}. DiffusionPipeline.from_pretrained takes others"
            )
    return given | FIXED_ARGUMENTS


def while_unchanged(folder, read, attempts=10):
    """What `read()` returns of a bundle, read again where somebody put another in its place meanwhile. Raises
    ValueError where that happens every time."""
    for _ in range(attempts):
        before = _identity(folder)
        result = error = None
        try:
            result = read()
        except Exception as failure:
            error = failure
            time.sleep(0.02)  # for the other to finish
        if _identity(folder) == before:
            if error is not None:
                raise error
            return result
    raise ValueError(f"{folder} was replaced {attempts} times while it was read: load it when it is no longer written")


def _identity(folder):
    """What changes where a bundle, or a component in it, takes the place of another."""
    try:
        found = os.stat(folder)
        with os.scandir(folder) as entries:
            shown = [each for each in entries if not each.name.startswith(".")]
            parts = {
                each.name: (each.stat().st_ino, each.stat().st_mtime_ns)
                for each in shown
                if each.name == "model_index.json" or each.is_dir()
            }
    except OSError:
        return None
    return found.st_dev, found.st_ino, parts


def open_autoencoder(folder_or_repo, **kwargs):
    """An autoencoder of diffusers, whichever class its config names, from its folder, from a pipeline or latents that
    have one in the folder vae, or from a repo on the Hub that holds either.

    Takes `dtype`, `variant`, and `revision`, `token` and the other arguments of a download. Raises ValueError for what
    is none, or not sound; no code of it is run, and its weights are opened as safetensors only.
    """
    if os.path.isfile(folder_or_repo):
        raise ValueError(f"{str(folder_or_repo)!r} is a file: give the folder that it lies in, with its config.json")
    arguments = {key: kwargs.pop(key) for key in DOWNLOAD_ARGUMENTS if key in kwargs}
    if kwargs.keys() - LOADING_ARGUMENTS:
        raise ValueError(
            f"{', '.join(sorted(kwargs.keys() - LOADING_ARGUMENTS))} cannot be given here; the arguments are "
            f"{', '.join(sorted({*DOWNLOAD_ARGUMENTS, *LOADING_ARGUMENTS}))}"
        )
    files = ["config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.json"]
    patterns = ["model_index.json", *files, *(f"vae/{each}" for each in files)]
    folder = download(folder_or_repo, patterns, **arguments)
    has_index, has_config = (os.path.lexists(os.path.join(folder, x)) for x in ("model_index.json", "config.json"))
    place = ("vae",) if has_index or not has_config else ()
    name = read_config(folder, *place, "config.json").get("_class_name")
    autoencoder_of(shortened(name))

    def open_checked():
        check_component(folder, place, name, getattr(autoencoders, name), kwargs.get("variant"))
        return getattr(autoencoders, name).from_pretrained(os.path.join(folder, *place), use_safetensors=True, **kwargs)

    return while_unchanged(folder, open_checked)


def open_stock_pipeline(folder_or_repo, **kwargs):
    """A stock pipeline of those that can be converted, checked as a bundle is. Takes the arguments of
    `ScoreSDEPipeline.from_pretrained`. Raises ValueError for others, and for what is not sound."""
    folder, kwargs = fetch(folder_or_repo, **kwargs)
    name = read_index(folder)["_class_name"]
    if name not in STOCK_PIPELINES:
        raise ValueError(
            f"{str(folder_or_repo)!r} is a {shortened(name)}: only DiTPipeline and pipelines around a UNet2DModel can "
            f"be converted ({', '.join(STOCK_PIPELINES)}); of others, replace the scheduler by "
            f"ScoreSDEScheduler.from_config(pipe.scheduler.config)"
        )
    pipeline_class = getattr(diffusers, name)
    arguments = safe_arguments(kwargs, pipeline_class)

    def open_checked():
        index = read_index(folder)
        check_components(folder, index, pipeline_class, kwargs.get("variant"), kwargs)
        return pipeline_class.from_pretrained(folder, **arguments)

    return while_unchanged(folder, open_checked)


# --- the whole folder ---------------------------------------------------------------------------------------------


def check_bundle(folder, pipeline_class, variant=None, given=()):
    """Raise ValueError, naming the file and the value, for a bundle that is not sound or newer than this package.

    Args:
        folder: a folder with a model_index.json.
        pipeline_class: the installed class that is to open it.
        variant: of the weights that are to be loaded.
        given: names of components that are not taken from the folder.
    """
    path, index = os.path.join(folder, "model_index.json"), read_index(folder)
    bundle_format = index.get("_bundle_format", FORMAT)
    if not fits(bundle_format, int) or bundle_format > FORMAT:
        raise ValueError(
            f"{path}: _bundle_format {quoted(bundle_format)} is newer than this package, which knows up to {FORMAT}: "
            f"`pip install -U score-sde`"
        )
    with naming(path):
        index = pipeline_class.use_installed_classes(index)
    check_components(folder, index, pipeline_class, variant, given)


def check_components(folder, index, pipeline_class, variant, given):
    """Raise ValueError for a model index whose components or arguments the pipeline class doesn't have, or whose
    components are not sound."""
    path, arguments = os.path.join(folder, "model_index.json"), {}
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
        elif value[0] is not None:
            classes[name] = component_class(path, name, *value)
    check_types(arguments, pipeline_class, path)
    check_labels(arguments.get("id2label"), path)
    for name, part in parts.items():
        needed = part.default is part.empty and name in ROLES and name not in pipeline_class._optional_components
        if needed and name not in classes and name not in given:
            raise ValueError(f"{path}: there is no {name}, which a {pipeline_class.__name__} needs")
    check_no_code(folder, index, classes)
    variants = {name: find_variant(folder, name, variant) for name in classes}
    if variant is not None and not any(variants.values()):
        raise ValueError(
            f"You are trying to load the model files of the `variant={variant}`, but no such modeling files are "
            f"available in {folder}"
        )
    for name, found in classes.items():
        if name not in given:
            check_component(folder, (name,), index[name][1], found, variants[name])


def component_class(path, name, library, class_name):
    """The class of a component. Raises ValueError for one that this part of a pipeline cannot be; only those that it
    can be are looked up."""
    description, names, base = ROLES[name]
    found = None
    if class_name in names and library in ("diffusers", PACKAGE):
        found = getattr(importlib.import_module(library), class_name, None)
    if class_name == "Transformer2DModel" and library == "diffusers" and name == "transformer":
        found = diffusers.DiTTransformer2DModel  # its name in published repos
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"{path}: component {name!r}, {quoted(class_name)} of {shortened(library)}, cannot be loaded: it must be "
            f"{description}"
        )
    return found


def check_no_code(folder, index, classes):
    """Raise ValueError for code where diffusers would look for it before it takes the installed classes."""
    for names in [("None.py",), *((name, f"{index[name][0]}.py") for name in classes)]:
        path = os.path.join(folder, *names)
        if os.path.lexists(path):
            raise ValueError(f"{path} would be taken for the installed code: remove it")


def check_keys(config, path, level=""):
    """Raise ValueError for a key anywhere in a config that would make something run code."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key in FORBIDDEN_KEYS:
            raise ValueError(
                f"{path}: {level}{key} {quoted(value)} is not allowed in a bundle, of which no code is run"
            )
        if isinstance(value, dict | list):
            check_keys(value, path, f"{level}{shortened(key)}.")


def check_labels(id2label, path):
    for label, name in (id2label or {}).items():
        if not re.fullmatch(r"\d{1,7}", label, re.ASCII) or not isinstance(name, str) or len(name) > 10_000:
            raise ValueError(
                f"{path}: id2label {quoted(label)}: {quoted(name)} must be the number of a class and its name"
            )


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


# --- components ---------------------------------------------------------------------------------------------------


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
        check_numbers(config, path, LARGEST_STOCK_COUNT if stock else LARGEST_COUNT)
        check_types(config, component_class, path)
        with naming(path):
            component_class.from_config(config)


def check_statistics(config, path):
    """Raise ValueError for statistics of latents that nothing can be scaled by and back."""
    for name in ("scaling_factor", "latents_std"):
        values = config.get(name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not (fits(value, float) and value > 0):
                raise ValueError(f"{path}: {name} {quoted(values)} must be positive: latents are divided by it")


def check_model(folder, place, path, config, model_class, variant):
    """Raise ValueError for a model that takes more memory than its weights, or whose weights are not its own, not
    finite, or no safetensors. It is built without memory, and no further than its weights reach."""
    files, indexed = weight_files(folder, place, variant)
    shapes = {}
    for file in files:
        with reading(file) as weights:
            shapes |= {key: torch.Size(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    if indexed is not None and indexed != shapes.keys():
        raise ValueError(f"{os.path.dirname(path)}: the index of the weights does not list what is in its files")
    numbers = sum(shape.numel() for shape in shapes.values())
    check_numbers(config, path, max(numbers, LARGEST_INTEGER), finite=True)
    too_large = ValueError(
        f"the network that this describes is larger than its weights, which hold {numbers:,} numbers"
    )
    # a layer may be made twice while a model is built
    with naming(path), at_most(4 * len(shapes), 4 * numbers, too_large), torch.device("meta"):
        model = model_class.from_config(config)

    if indexed is None:  # as diffusers does it: names of attention from before there were shards
        shapes = dict(model._fix_state_dict_keys_on_load(shapes))
    expected = model.state_dict()
    # tables that were saved once and are computed now
    ignored = {name for name, _ in model.named_buffers()} - expected.keys()
    patterns = model_class._keys_to_ignore_on_load_unexpected or []
    shapes = {
        name: shape
        for name, shape in shapes.items()
        if name not in ignored and (name in expected or not any(re.search(each, name) for each in patterns))
    }
    problems = tensor_problems({name: tensor.shape for name, tensor in expected.items()}, shapes)
    if problems:
        raise ValueError(f"the weights in {os.path.dirname(path)} are not those of its config: {problems}")
    for file in files:
        check_values(file, expected)


def weight_files(folder, place, variant):
    """The safetensors files that diffusers opens for a model: (paths, names of the tensors that their index lists, None
    without index). Raises ValueError for what leads elsewhere, and for pickles."""
    infix = f".{variant}" if variant else ""
    name = SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{infix}.json")
    legacy = variant and legacy_index(os.path.join(folder, *place), variant)
    if os.path.lexists(os.path.join(folder, *place, name)):
        path, index = os.path.join(folder, *place, name), read_config(folder, *place, name)
        weight_map = index.get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map and isinstance(index.get("metadata"), dict)):
            raise ValueError(f"{path}: weight_map {quoted(weight_map)} is no mapping, or there is no metadata")
        for file in weight_map.values():
            if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
                raise ValueError(f"{path}: {quoted(file)} is no safetensors file beside it")
        names, indexed = sorted(set(weight_map.values())), weight_map.keys()
    elif legacy and os.path.lexists(legacy):
        raise ValueError(
            f"{legacy} is the index of weights in a form that diffusers has given up: save them anew with "
            f"save_pretrained(variant={variant!r})"
        )
    else:
        names, indexed = [SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f"{infix}.safetensors")], None
    for each in names:
        if not os.path.lexists(os.path.join(folder, *place, each)):
            raise ValueError(
                f"{os.path.join(folder, *place)} holds no {shortened(each)}: weights are opened as safetensors only, "
                f"never as pickles; DiffusionPipeline.from_pretrained and save_pretrained make the ones of the others"
            )
    return [own_file(folder, *place, each) for each in names], indexed


def legacy_index(folder, variant):
    """Where diffusers looks, last, for the index of a variant's shards: with the variant behind the second dot of the
    whole path, or below a .cache behind the third."""
    path = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    parts, count = path.split("."), 3 if ".cache" in path else 2
    return ".".join([*parts[:count], variant, *parts[count:]])


@contextmanager
def reading(path):
    """A safetensors file; ValueError, naming it, where it is damaged."""
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {shortened(error)}") from error


def check_values(path, expected):
    """Raise ValueError for a tensor that is not finite, or not of the kind of the model's own; one at a time."""
    with reading(path) as weights:
        for name in weights.keys():  # noqa: SIM118
            with naming(path):
                tensor = weights.get_tensor(name)
                own = expected.get(name)
                if not tensor.is_floating_point() and (own is None or own.dtype != tensor.dtype):
                    raise ValueError(f"{shortened(name)} holds {tensor.dtype}, where floating-point weights belong")
                parts = tensor.flatten().split(2**24) if tensor.is_floating_point() else ()
                # numbers of one byte know no infinity everywhere, those of eight are cast down
                if not all(torch.isfinite(part.float() if part.itemsize in (1, 8) else part).all() for part in parts):
                    raise ValueError(
                        f"{shortened(name)} holds values that are not finite (NaN, infinite): its training failed, or "
                        f"the file is damaged"
                    )


@contextmanager
def at_most(parameters, numbers, error):
    """Raise an error in this thread as soon as more parameters are made, or more numbers in them or in tables."""
    thread, counts = threading.get_ident(), {"parameters": 0, "numbers": 0, "tables": 0}

    def count(kind, tensor):
        if tensor is not None and threading.get_ident() == thread:
            counts["parameters"] += kind == "numbers"
            counts[kind] += tensor.numel()
            if counts["parameters"] > parameters or counts["numbers"] > numbers:
                raise error
            if counts["tables"] > numbers + LARGEST_TABLES:
                raise error

    hooks = [
        register_module_parameter_registration_hook(lambda module, name, tensor: count("numbers", tensor)),
        register_module_buffer_registration_hook(lambda module, name, tensor: count("tables", tensor)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def naming(path):
    """Errors inside, of whatever kind, as ValueError that name the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {shortened(error)}") from error


# --- values -------------------------------------------------------------------------------------------------------


def check_numbers(value, path, largest, finite=False, name=""):
    """Raise ValueError for a whole number, or a length, above `largest` anywhere in a config, and for NaN; with
    `finite` for infinity, too."""
    if isinstance(value, dict | list):
        if len(value) > largest:
            raise ValueError(f"{path}: {name} has {len(value):,} entries, more than the {largest:,} that there can be")
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            check_numbers(each, path, largest, finite, f"{name}.{key}" if name else shortened(key))
    elif isinstance(value, int) and abs(value) > largest:
        raise ValueError(f"{path}: {name} {value:,} is more than the {largest:,} that there can be")
    elif isinstance(value, float) and (math.isnan(value) or finite and math.isinf(value)):
        raise ValueError(f"{path}: {name} {value} must be finite")


def check_types(config, cls, path):
    """Raise ValueError for an argument of another type than a class says, or that a class of this package doesn't
    have."""
    known, types_of = inspect.signature(cls.__init__).parameters, typing.get_type_hints(cls.__init__)
    stock = cls.__module__.split(".")[0] == "diffusers"
    for name, value in config.items():
        # a scheduler made from a stock one keeps what only that one has
        if name.startswith("_") or (name not in known and (stock or issubclass(cls, SchedulerMixin))):
            continue
        if name not in known:
            raise ValueError(
                f"{path}: {cls.__name__} has no argument {quoted(name)} (here {quoted(value)}); a newer one may have it"
            )
        # some of diffusers' defaults, and flags, are not of the type that they say
        default = json.loads(json.dumps(known[name].default, default=str))
        if stock and (isinstance(value, bool) or value == default):
            continue
        if not fits(value, types_of.get(name, object)):
            raise ValueError(
                f"{path}: {name} {quoted(value)} must be of type {inspect.formatannotation(types_of[name])}"
            )


def fits(value, expected):
    """Whether a value from JSON can be an argument that is annotated with a type."""
    origin, arguments = typing.get_origin(expected) or expected, typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is typing.Any:
        return True
    if origin in (list, tuple):
        if not isinstance(value, list):
            return False
        if origin is tuple and len(arguments) > 1 and Ellipsis not in arguments:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return not arguments or all(fits(each, arguments[0]) for each in value)
    if origin in (int, float):
        return isinstance(value, int if origin is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, origin)
