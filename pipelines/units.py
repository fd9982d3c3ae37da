"""The units of data: statistics by which data in their own units become what a network sees, of mean 0 and standard
deviation 1. They travel in a pipeline's config."""

import math

from .latents import denormalize_latents, normalize_latents
from .wording import quoted


# the keys of a pipeline's config that are units
UNITS = ("data_mean", "data_std")
# of float32, in which data are divided by them
LEAST, LARGEST = 1e-30, 1e30


def check_units(data_mean, data_std, channels):
    """Raise ValueError for statistics that data cannot have: means and positive standard deviations, numbers, or one
    for each of so many channels, belong together."""
    if (data_mean is None) != (data_std is None):
        raise ValueError("data_mean and data_std belong together: pass both or neither")
    for name, values in (("data_mean", data_mean), ("data_std", data_std)):
        if isinstance(values, dict) and set(map(str, values)) != {str(i) for i in range(len(values))}:
            raise ValueError(f"{name} {quoted(values)} must be a number for each channel, by its number, from 0 on")
        for value in _listed(values):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
            if values is not None and not (number and (name == "data_mean" or value >= LEAST)):
                what = "positive numbers: data are divided by them" if name == "data_std" else "finite numbers"
                raise ValueError(f"{name} {quoted(values)} must be {what}, one or one for each channel")
    for name, values in (("data_mean", data_mean), ("data_std", data_std)):
        if values is not None and len(_listed(values)) not in (1, channels):
            raise ValueError(f"{name} is of {len(_listed(values))} channels, the network's samples have {channels}")


def _listed(values):
    if isinstance(values, dict):
        # files keep no order of keys
        return [values[channel] for channel in sorted(values, key=int)]
    return list(values) if isinstance(values, (list, tuple)) else [values]


def as_saved(values):
    """Numbers, one for each channel, as a config has them, {"0": ...}: a list in it would be a component."""
    return {str(i): value for i, value in enumerate(values)} if isinstance(values, (list, tuple)) else values


def as_given(values):
    """The inverse of `as_saved`; what that never gives stays as it is."""
    return _listed(values) if isinstance(values, dict) and all(map(str.isdigit, values)) else values


def to_unit_scale(data, units):
    """Data (B, C, ...) in their own units -> what the network sees; the same where there are no statistics."""
    return data if units["data_std"] is None else normalize_latents(data, _statistics(units))


def to_data_units(samples, units):
    """The inverse of `to_unit_scale`."""
    return samples if units["data_std"] is None else denormalize_latents(samples, _statistics(units))


def log_scale(shape, units):
    """The logarithm of how many times larger a volume of data (C, ...) is than that of what the network sees."""
    if units["data_std"] is None:
        return 0.0
    scales = _listed(units["data_std"])
    return sum(map(math.log, scales)) / len(scales) * math.prod(shape)


def _statistics(units):
    return {"latents_mean": units["data_mean"], "latents_std": units["data_std"]}
