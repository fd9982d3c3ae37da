"""Checks of a model before it is opened: no more memory than its weights take, and weights that are its own, finite,
and safetensors."""

import os
import re
import threading
from contextlib import contextmanager

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ..pipelines.bundle_files import own_file, read_config
from ..pipelines.bundling import tensor_problems
from ..pipelines.wording import quoted, shortened
from .config_checks import check_numbers, naming


# any whole number in a model's config, unless its weights hold more numbers than this
LARGEST_INTEGER = 10**6
# numbers in tables that are computed and not saved, such as positions
LARGEST_TABLES = 2**24


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
