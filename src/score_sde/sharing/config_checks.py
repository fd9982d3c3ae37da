"""Checks of the values in a config from a folder that somebody else may have made."""

import inspect
import json
import math
import re
import types
import typing
from contextlib import contextmanager

from diffusers import SchedulerMixin

from ..pipelines.wording import quoted, shortened


# keys that make diffusers or transformers run code, read weights in other ways than those that are checked, or pass
# over what a config says; none is ever saved in a bundle
FORBIDDEN_KEYS = {"auto_map", "custom_pipeline", "custom_pipelines", "quantization_config", "_use_default_values"}
FORBIDDEN_KEYS |= {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
FORBIDDEN_KEYS |= {"transformers_weights", "use_kernels"}


@contextmanager
def naming(path):
    """Errors inside, of whatever kind, as ValueError that name the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {shortened(error)}") from error


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
