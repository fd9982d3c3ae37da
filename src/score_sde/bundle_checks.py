"""Checks of a bundle before anything of it is built: a folder from the Hub may hold anything.

Its files are read as data only. What is checked here can then be loaded without surprise: classes that are known,
arguments of the right types, and no more memory than its weights take.
"""

import importlib
import inspect
import os
import threading
import types
import typing
from contextlib import contextmanager

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from .pipelines.bundling import FORMAT, LIBRARIES, read_config, read_index


# any whole number in a config, unless the weights hold more numbers than this
LARGEST_INTEGER = 10**6
# numbers in tables that are computed and not saved, such as positions
LARGEST_TABLES = 2**26


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
    if not isinstance(bundle_format, int) or bundle_format > FORMAT:
        raise ValueError(
            f"{path}: _bundle_format {bundle_format!r} is newer than this package, which knows up to {FORMAT}: "
            f"`pip install -U score-sde`"
        )
    package = importlib.import_module(pipeline_class.installed_package())
    with naming(path):
        index = pipeline_class.use_installed_classes(index)
    arguments = {}
    for name, value in index.items():
        if name.startswith("_") or name in given:
            continue
        if not (isinstance(value, list) and len(value) == 2):
            arguments[name] = value
        elif value[0] is not None:
            check_component(folder, name, *value, package, variant)
    check_types(arguments, pipeline_class, path)


def check_component(folder, name, library, class_name, package, variant):
    """Raise ValueError for a component whose class, config or weights are not what model_index.json says."""
    path = os.path.join(folder, "model_index.json")
    if not name.isidentifier():
        raise ValueError(f"{path}: {name!r} is no name of a component")
    component_class = getattr(importlib.import_module(library), str(class_name), None)
    bases = (ModelMixin, SchedulerMixin) if library != "transformers" else (object,)
    if not (isinstance(component_class, type) and issubclass(component_class, bases)):
        raise ValueError(f"{path}: component {name!r}, {class_name!r} of {library}, is neither a model nor a scheduler")
    if library == "transformers":
        return

    path = os.path.join(folder, name, component_class.config_name)
    config = read_config(path)
    if config.get("_class_name") != class_name:
        raise ValueError(
            f"{path}: _class_name {config.get('_class_name')!r} is not {class_name}, as model_index.json says"
        )
    if library not in LIBRARIES:
        check_types(config, component_class, path)
    if issubclass(component_class, ModelMixin):
        check_model(os.path.join(folder, name), path, config, component_class, variant)
    else:
        check_integers(config, path, LARGEST_INTEGER)
        with naming(path):
            component_class.from_config(config)


def check_model(folder, path, config, model_class, variant):
    """Raise ValueError for a model that takes more memory than its weights, or has none as safetensors. It is built
    without memory, and no further than its weights reach."""
    tensors, numbers = count_weights(folder, variant)
    check_integers(config, path, max(numbers, LARGEST_INTEGER))
    too_large = ValueError(
        f"the network that this describes is larger than its weights, which hold {numbers:,} numbers"
    )
    # a layer may be made twice while a model is built
    with naming(path), at_most(4 * tensors, 4 * numbers, too_large), torch.device("meta"):
        model = model_class.from_config(config)
        if sum(parameter.numel() for parameter in model.parameters()) > numbers:
            raise too_large


def count_weights(folder, variant):
    """The number of tensors, and of numbers in them, in the safetensors files that hold the weights of a model."""
    infix = f".{variant}" if variant else ""
    files = [SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f"{infix}.safetensors")]
    path = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{infix}.json"))
    if os.path.isfile(path):
        weight_map = read_config(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{path}: weight_map {weight_map!r} is no mapping")
        files = sorted(set(map(str, weight_map.values())))
    for name in files:
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path}: {name!r} is no safetensors file beside it")
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{folder} holds no {name}: weights are opened as safetensors only, never as pickles")
    tensors = numbers = 0
    for name in files:
        try:
            with safe_open(os.path.join(folder, name), framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    tensors += 1
                    numbers += torch.Size(weights.get_slice(key).get_shape()).numel()
        except SafetensorError as error:
            raise ValueError(f"{os.path.join(folder, name)} is damaged: {error}") from error
    return tensors, numbers


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
        raise ValueError(f"{path}: {error}") from error


def check_integers(value, path, largest, name=""):
    """Raise ValueError for a whole number above `largest` anywhere in a config."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            check_integers(each, path, largest, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int) and abs(value) > largest:
        raise ValueError(f"{path}: {name} {value:,} is more than the {largest:,} that there can be")


def check_types(config, cls, path):
    """Raise ValueError for an argument that a class of this package doesn't have, or of another type."""
    known, types_of = inspect.signature(cls.__init__).parameters, typing.get_type_hints(cls.__init__)
    for name, value in config.items():
        # a scheduler made from a stock one keeps what only that one has
        if name.startswith("_") or (name not in known and issubclass(cls, SchedulerMixin)):
            continue
        if name not in known:
            raise ValueError(
                f"{path}: {cls.__name__} has no argument {name!r} (here {value!r}); a newer one may have it"
            )
        if not fits(value, types_of.get(name, object)):
            raise ValueError(f"{path}: {name} {value!r} must be of type {inspect.formatannotation(types_of[name])}")


def fits(value, expected):
    """Whether a value from JSON can be an argument that is annotated with a type."""
    origin, arguments = typing.get_origin(expected) or expected, typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(each, arguments[0]) for each in value)
    if origin in (int, float):
        return isinstance(value, int if origin is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, origin)
