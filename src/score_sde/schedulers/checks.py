"""What values the scheduler takes: one check for each kind, all with what is allowed in their message."""

import difflib
import inspect
import numbers
from collections.abc import Iterable

import torch


# {argument: (least, largest, whole)} of every number; None stands for its default. Those of solvers are on their rows.
NUMBERS = {
    "num_train_timesteps": (1, 10**5, True),
    "corrector_steps": (1, 10**4, True),
    "map_steps": (1, 10**4, True),
    "original_inference_steps": (1, 10**5, True),
    "steps_offset": (0, 10**5, True),
    "corrector_snr": (1e-6, 1e3, False),
    "rho": (0.1, 1e3, False),
    "t_min": (1e-9, 1, False),
    "t_max": (1e-9, 1, False),
    "beta_min": (0, 1e6, False),
    "beta_max": (0, 1e6, False),
    "sigma_min": (0, 1e6, False),
    "sigma_max": (0, 1e6, False),
    "beta_start": (0, 1, False),
    "beta_end": (0, 1, False),
    "snr_shift_scale": (1e-6, 1e6, False),
    "sigma_data": (1e-6, 1e6, False),
    "time_scale": (-1e6, 1e6, False),
    "time_offset": (-1e6, 1e6, False),
    "clip_sample_range": (1e-6, 1e6, False),
    "dynamic_thresholding_ratio": (0, 1, False),
    "sample_max_value": (1, 1e6, False),
    "shift": (1e-3, 1e3, False),
    "shift_terminal": (1e-6, 0.999, False),
}
FLAGS = (
    *("open_end", "denoise_final", "rescale_betas_zero_snr", "clip_sample", "thresholding", "use_dynamic_shifting"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas", "use_flow_sigmas"),
    *("invert_sigmas", "whole_levels", "preconditioned", "exact_zero_snr"),
)
# of one trajectory
LARGEST_NFE = 10**5


def check_number(name, value, least, largest, whole=False):
    """Raise ValueError, naming the value and the range, unless `value` is a number from least to largest."""
    kind = numbers.Integral if whole else numbers.Real
    # nan is in no range
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= largest:
        number = "a whole number" if whole else "a number"
        raise ValueError(f"{name} {value!r} must be {number} from {least:g} to {largest:g}")


def check_choice(name, value, choices: Iterable):
    """Raise ValueError, naming the value and the choices, unless `value` is one of them."""
    if value not in tuple(choices):
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(map(str, choices))}")


def as_list(name, values) -> list[float]:
    """A list, array or tensor of numbers as a list of floats. Raises ValueError for anything else."""
    try:
        values = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        values = torch.tensor(0.0)
    if values.ndim != 1 or not 0 < len(values) <= LARGEST_NFE:
        raise ValueError(f"{name} must be a list of 1 to {LARGEST_NFE:,} numbers")
    return values.tolist()


def check_arguments(build, config):
    """Raise ValueError for numbers of the config out of their range, and for flags that are not True or False; `build`
    is what takes them as arguments."""
    required = {name for name, each in inspect.signature(build).parameters.items() if each.default is not None}
    for name, (least, largest, whole) in NUMBERS.items():
        if name in required or config[name] is not None:
            check_number(name, config[name], least, largest, whole)
    for name in FLAGS:
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} {config[name]!r} must be True or False")
    if config["time_scale"] == 0:
        raise ValueError("time_scale 0 would tell the network nothing: pass another number, or None")


def refuse_unknown_arguments(scheduler_class, given, known):
    """Raise ValueError for the name of something given that is none of the known arguments, with the nearest."""
    for name in given.keys() - known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name!r} is no argument of {scheduler_class.__name__}; the nearest is {nearest!r}")


def default_arguments(scheduler_class):
    """{argument: its default} of a scheduler."""
    return {name: each.default for name, each in inspect.signature(scheduler_class).parameters.items()}


def without_given(scheduler_class, config):
    """The config that a scheduler is made with, in whose `_use_default_values` no argument stands that holds another
    value: diffusers counts those given by position among them, and `from_config` would forget their values."""
    if "_use_default_values" not in config:
        return config
    defaults = default_arguments(scheduler_class)
    left = [
        name for name in config["_use_default_values"] if config.get(name, defaults.get(name)) is defaults.get(name)
    ]
    return config | {"_use_default_values": left}
