"""The columns of data that points of a domain have, such as angles in degrees or latitude and longitude: checked, and
as the domain has them."""

import math
from dataclasses import dataclass

import torch

from .wording import quoted


# how a point of a sphere may be given beside its unit vector: two columns, in degrees
LATITUDE_LONGITUDE = "latitude_longitude"
# how far numbers may lie outside of a domain by rounding, relative to its size
ROUNDING = 1e-5


@dataclass(frozen=True)
class Coordinates:
    """What the columns of data are to a domain. A value is mean + std u (a pipeline's data_mean and data_std), where u
    is an angle in radians on a torus, a number in [-1, 1] in a box, a component of a unit vector on a sphere, and any
    number in flat space.

    domain: a name, {name: channels} or a list of such pairs, in their order, as schedulers have it; None is flat.
    channels: C of the points.
    columns: their names in the data; None where they have none.
    mean, std: a number for each channel, or one for all; None for 0 and 1.
    on_sphere: how the data give the points of a sphere of 3 channels, None or latitude_longitude.

    Raises ValueError for a form and for numbers of columns that a domain doesn't have.
    """

    domain: str | dict | list | None
    channels: int
    columns: tuple[str, ...] | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    on_sphere: str | None = None

    def __post_init__(self):
        sizes = [size for _, size in self._sizes()]
        if sum(sizes) != self.channels:
            raise ValueError(f"domain {self.domain!r} has {sum(sizes)} channels; the points have {self.channels}")
        spheres = [size for name, size in self._sizes() if name == "sphere"]
        if self.on_sphere is not None and (self.on_sphere != LATITUDE_LONGITUDE or spheres != [3]):
            raise ValueError(
                f"coordinates {quoted(self.on_sphere)} must be {LATITUDE_LONGITUDE}, of a domain with a sphere of 3 "
                f"channels, which {self.domain!r} of {self.channels} channels isn't"
            )
        if self.columns is not None and len(self.columns) != self.count:
            raise ValueError(
                f"columns {quoted(list(self.columns))} are {len(self.columns)}; domain {self.domain!r} of "
                f"{self.channels} channels has {self.count}"
            )

    def _sizes(self):
        if self.domain is None or isinstance(self.domain, str):
            return [(self.domain or "flat", self.channels)]
        return [*(self.domain.items() if isinstance(self.domain, dict) else map(tuple, self.domain))]

    @property
    def parts(self) -> list[tuple[str, slice, slice]]:
        """[(name of the domain, its columns, its channels)] in their order."""
        found, column, channel = [], 0, 0
        for name, size in self._sizes():
            width = 2 if name == "sphere" and self.on_sphere else size
            found.append((name, slice(column, column + width), slice(channel, channel + size)))
            column, channel = column + width, channel + size
        return found

    @property
    def count(self) -> int:
        """Number of columns."""
        return self.parts[-1][1].stop

    @property
    def names(self) -> list[str]:
        """The names of the columns, or numbers."""
        return list(self.columns) if self.columns else [f"column {i}" for i in range(self.count)]

    def scale_of(self, channel: int) -> tuple[float, float]:
        """(mean, std) of a channel."""
        mean, std = (
            each[channel] if isinstance(each, (tuple, list)) else otherwise if each is None else each
            for each, otherwise in ((self.mean, 0.0), (self.std, 1.0))
        )
        return float(mean), float(std)

    def limits(self) -> list[tuple[float, float] | None]:
        """Between which values each column lies; None for any."""
        found: list[tuple[float, float] | None] = []
        for name, _, channels in self.parts:
            largest = {"torus": math.pi, "box": 1.0, "sphere": 1.0}.get(name)
            if name == "sphere" and self.on_sphere:
                found += [(-90.0, 90.0), (-180.0, 180.0)]
                continue
            for channel in range(channels.start, channels.stop):
                mean, std = self.scale_of(channel)
                found.append(None if largest is None else (mean - largest * std, mean + largest * std))
        return found

    def to_points(self, values: torch.Tensor) -> torch.Tensor:
        """Points (B, channels), in the units of the data, of values (B, columns) in their dtype. Raises ValueError for
        what is not finite or outside of the domain."""
        self.check(values)
        found = []
        for name, columns, channels in self.parts:
            part = values[:, columns]
            if name == "sphere" and self.on_sphere:
                latitude, longitude = torch.deg2rad(part).unbind(1)
                across = latitude.cos()
                part = torch.stack([across * longitude.cos(), across * longitude.sin(), latitude.sin()], dim=1)
            elif name == "sphere":
                part = part / part.norm(dim=1, keepdim=True)
            elif name == "torus":
                # both ends are the same angle, and the lower one is in the domain
                turns = [2 * math.pi * self.scale_of(i)[1] for i in range(channels.start, channels.stop)]
                highest = part.new_tensor([limits[1] for limits in self.limits()[columns] if limits])
                part = torch.where(part >= highest, part - part.new_tensor(turns), part)
            found.append(part)
        return torch.cat(found, dim=1)

    def to_values(self, points: torch.Tensor) -> torch.Tensor:
        """Values (B, columns) of points (B, channels) in the units of the data."""
        found = []
        for name, _, channels in self.parts:
            part = points[:, channels]
            if name == "sphere" and self.on_sphere:
                x, y, z = part.unbind(1)
                part = torch.rad2deg(torch.stack([torch.atan2(z, torch.hypot(x, y)), torch.atan2(y, x)], dim=1))
            found.append(part)
        return torch.cat(found, dim=1)

    def check(self, values: torch.Tensor) -> None:
        """Raise ValueError for values (B, columns) that are not finite or outside of the domain, naming the column,
        what is allowed and, where the values look like it, other units."""
        for i, (column, limits) in enumerate(zip(self.names, self.limits(), strict=True)):
            strange = ~torch.isfinite(values[:, i])
            if strange.any():
                raise ValueError(
                    f"{column}: {int(strange.sum()):,} of {len(values):,} values are not finite (nan, infinite)"
                )
            if limits is None:
                continue
            low, high = limits
            beyond = ROUNDING * (high - low)
            outside = (values[:, i] < low - beyond) | (values[:, i] > high + beyond)
            if outside.any():
                least, most = float(values[:, i].min()), float(values[:, i].max())
                raise ValueError(
                    f"{column}: {int(outside.sum()):,} of {len(values):,} values are outside of [{low:.6g}, "
                    f"{high:.6g}], they lie from {least:g} to {most:g}{self._remedy(i, least, most)}"
                )
        for name, columns, _ in self.parts:
            lengths = values[:, columns].norm(dim=1)
            if name == "sphere" and not self.on_sphere and len(lengths) and (lengths - 1).abs().max() > 1e-3:
                raise ValueError(
                    f"{', '.join(self.names[columns])}: points of a sphere are unit vectors; these have lengths from "
                    f"{lengths.min():g} to {lengths.max():g}: divide by them"
                )

    def _remedy(self, column, least, most):
        """The end of a sentence on values of a column that are outside of its domain."""
        [(name, _, channels)] = [each for each in self.parts if each[1].start <= column < each[1].stop]
        _, std = self.scale_of(channels.start)
        largest, half_turn = max(-least, most), math.pi * std
        if name == "torus" and std == 1 and 2 * math.pi * (1 + ROUNDING) < largest <= 360:
            return ": they look like degrees; say units degrees"
        if name == "torus" and least >= 0 and most <= 2 * half_turn * (1 + ROUNDING):
            return (
                f": they look like angles from 0 on; subtract a turn, {2 * half_turn:.6g}, from those above half of it"
            )
        if name == "sphere" and not self.on_sphere and largest <= 180:
            return f": they look like latitude and longitude in degrees; say units {LATITUDE_LONGITUDE}"
        if name == "sphere" and column == 0 and largest <= 180:
            return ": latitude comes first, then longitude"
        if name == "box":
            return ": say by box_ranges between which numbers the column lies"
        return ""
