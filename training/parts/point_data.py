"""Points for training: rows of a table, some of whose columns are the coordinates of a point in a domain."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from datasets import ClassLabel

from score_sde.models.transformer_score_dit import DOMAINS
from score_sde.pipelines.coordinates import LATITUDE_LONGITUDE, Coordinates
from score_sde.pipelines.units import to_unit_scale
from score_sde.pipelines.wording import few, unknown
from score_sde.sharing.model_card import domain_in_words

from .config import LoaderConfig, one_of, option
from .hashes import hash_of
from .options import mapping, nearest
from .sources import open_table
from .text_rows import TextClasses


DEGREES = "degrees"
# what columns may be in, where that is not the domain's own
UNITS_OF_COLUMNS = (DEGREES, LATITUDE_LONGITUDE)
# what is done with rows in which a number or the class is missing
MISSING = ("refuse", "drop")
# a network of a point sees all of its coordinates at once
MOST_COLUMNS = 1000


@dataclass
class PointDataConfig(LoaderConfig):
    dataset: str = option(
        "",
        "Rows of numbers: a .parquet, .csv or .jsonl file, several of them as a pattern or a folder (a {split} in the "
        "name is replaced by the split), or a dataset id on the Hub.",
        "data",
        common=True,
    )
    split: str = option("train", "Split of the dataset to use.", "data")
    domain: str = option(
        "flat",
        f"Where the points lie: {one_of(DOMAINS)}, or several as YAML, channels by domain in the order of "
        f"the columns: {{torus: 2, flat: 1}}.",
        "data",
        common=True,
    )
    columns: list[str] = option([], "Columns of a point's coordinates, with commas: phi,psi.", "data", common=True)
    units: list[str] = option(
        [],
        "degrees, of the angles of a torus, which are radians unless said; latitude_longitude, of a sphere's points, "
        "two columns in degrees instead of a unit vector; none, for neither.",
        "data",
        common=True,
    )
    box_ranges: str = option(
        "{}",
        "Between which numbers the columns of a box lie, as YAML: {a: [0, 10]}; [-1, 1] unless said.",
        "data",
    )
    missing: str = option(
        "refuse", "Rows in which a number or the class is missing: refuse, or drop, with their number.", "data"
    )
    label_column: str | None = option(
        None,
        "Column of class labels: whole numbers from 0, names, or with label_bins any numbers; none unless given.",
        "data",
        common=True,
    )
    label_bins: int = option(
        0, "Classes that a column of numbers is parted into, each with as many rows; 0 takes it as it is.", "data"
    )

    def problems(self):
        yield from LoaderConfig.problems(self)
        if self.label_column == "none":
            self.label_column = None
        if self.units == ["none"]:
            self.units = []
        self.columns = [name.strip() for each in self.columns for name in each.split(",") if name.strip()]
        if not self.dataset:
            yield "dataset is missing: a .parquet, .csv or .jsonl file, a folder of them, or a dataset on the Hub"
        if self.missing not in MISSING:
            yield unknown("missing", self.missing, MISSING)
        yield from (unknown("units", each, UNITS_OF_COLUMNS) for each in self.units if each not in UNITS_OF_COLUMNS)
        if self.label_bins < 0 or self.label_bins == 1:
            yield f"label_bins {self.label_bins} must be at least 2, or 0"
        if self.label_bins and self.label_column is None:
            yield "label_bins need label_column, the numbers to part into classes"
        if not 0 < len(self.columns) <= MOST_COLUMNS:
            yield f"columns {few(self.columns) or 'are missing'}: name 1 to {MOST_COLUMNS} of them, such as phi,psi"
            return
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice or self.label_column in self.columns:
            yield f"columns {few(self.columns)}: {few(twice) or self.label_column} is named twice"
        try:
            self.make_coordinates()
        except ValueError as error:
            yield str(error)

    @property
    def domains(self):
        """{name: channels} of the domain, in order. Raises ValueError for an unknown one, and for other channels than
        the columns have."""
        by_latitude = LATITUDE_LONGITUDE in self.units
        given = {self.domain: len(self.columns) + by_latitude}
        if self.domain not in DOMAINS:
            try:
                given = mapping("domain", self.domain)
            except ValueError:
                raise ValueError(
                    unknown("domain", self.domain, DOMAINS) + ", or several, {torus: 2, flat: 1}"
                ) from None
        for name, size in given.items():
            if name not in DOMAINS:
                raise ValueError(unknown("domain", name, DOMAINS))
            if not isinstance(size, int) or isinstance(size, bool) or size < 1 + (name == "sphere"):
                raise ValueError(
                    f"domain {name} has {size!r} channels; it must be a whole number from {1 + (name == 'sphere')} on"
                )
        return given

    @property
    def domain_of_scheduler(self):
        """The domain as `ScoreSDEScheduler` takes it; None in flat space."""
        domains = self.domains
        if set(domains) == {"flat"}:
            return None
        return next(iter(domains)) if len(domains) == 1 else domains

    def make_coordinates(self, mean=None, std=None):
        """The `Coordinates` of the columns; mean and std by channel are those of flat space, which the data say.

        Raises ValueError for options that contradict each other.
        """
        domains, on_sphere = self.domains, LATITUDE_LONGITUDE if LATITUDE_LONGITUDE in self.units else None
        channels = sum(domains.values())
        if DEGREES in self.units and "torus" not in domains:
            raise ValueError("units degrees are of the angles of a torus: leave it out, or pass --domain torus")
        if on_sphere and domains.get("sphere") != 3:
            raise ValueError(f"units {on_sphere} needs a domain sphere of 3 channels, and two columns of it")
        ranges = mapping("box_ranges", self.box_ranges)
        bare = Coordinates(domains, channels, tuple(self.columns), on_sphere=on_sphere)
        for part, columns, _ in bare.parts:
            # where all longitudes are within 90 degrees the numbers don't tell
            if on_sphere and part == "sphere" and self.columns[columns][0].lower().startswith("lon"):
                raise ValueError(f"columns {few(self.columns[columns])}: latitude comes first, then longitude")
        boxed = [name for part, columns, _ in bare.parts if part == "box" for name in self.columns[columns]]
        if other := [name for name in ranges if name not in boxed]:
            raise ValueError(f"box_ranges: {other[0]} is no column of a box; those are {few(boxed) or 'none'}")
        mean, std = list(mean or [0.0] * channels), list(std or [1.0] * channels)
        for part, columns, own in bare.parts:
            for column, channel in zip(self.columns[columns], range(own.start, own.stop), strict=False):
                if part == "torus" and DEGREES in self.units:
                    std[channel] = 180 / np.pi
                if part == "box":
                    low, high = range_of(column, ranges.get(column, [-1, 1]))
                    mean[channel], std[channel] = (low + high) / 2, (high - low) / 2
        return Coordinates(self.domain_of_scheduler, channels, tuple(self.columns), tuple(mean), tuple(std), on_sphere)


def range_of(column, values):
    """(low, high) of a column of a box. Raises ValueError for what is none."""
    numbers = isinstance(values, list) and len(values) == 2 and all(type(each) in (int, float) for each in values)
    if not numbers or not np.isfinite(values).all() or not values[0] < values[1]:
        raise ValueError(f"box_ranges: {column} {values!r} must be two numbers, the lower first: [0, 10]")
    return float(values[0]), float(values[1])


class Table:
    """The rows of a split: numbers, and the values of the label column.

    Attributes: `values` (N, columns), float64; `labels`, a list, None without; `feature`, of the label column;
    `missing`, how many rows were left out for want of a number or a class.

    Raises ValueError for a column that is missing or holds no numbers, for rows that lack something, unless they are
    dropped, and where nothing is left.
    """

    def __init__(self, config, split=None):
        self.name, self.split = config.dataset, split or config.split
        data, self.origin = open_table(self.name, self.split)
        where = f"dataset {self.name!r}, split {self.split!r}"
        wanted = [*config.columns, *([config.label_column] if config.label_column else [])]
        for column in wanted:
            if column not in data.features:
                near = nearest(column, data.column_names)
                raise ValueError(f"{where}: it has no column {column!r}, but {few(data.column_names, 30)}{near}")
        self.feature = data.features.get(config.label_column)
        table = data.select_columns(wanted).with_format("arrow")[:]
        lacking, arrays = np.zeros(len(data), dtype=bool), []
        for column in config.columns:
            values = table.column(column)
            kind = values.type
            if not (pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind) or pyarrow.types.is_null(kind)):
                raise ValueError(f"{where}: column {column!r} must hold numbers, not {kind}")
            lacking |= values.is_null().to_numpy()
            arrays.append(pyarrow.compute.fill_null(values.cast(pyarrow.float64()), 0.0).to_numpy())
        if config.label_column:
            lacking |= table.column(config.label_column).is_null().to_numpy()
        self.missing = int(lacking.sum())
        if self.missing == len(lacking):
            raise ValueError(f"{where}: in all of its {len(lacking):,} rows something is missing of {few(wanted, 30)}")
        if self.missing and config.missing == "refuse":
            counts = {each: table.column(each).null_count for each in wanted}
            named = [f"{each} {count:,}" for each, count in counts.items() if count]
            raise ValueError(
                f"{where}: in {self.missing:,} of {len(lacking):,} rows something is missing ({few(named)}): leave "
                f"them out by --missing drop"
            )
        kept = np.flatnonzero(~lacking)
        self.values = np.stack(arrays, axis=1)[kept]
        self.labels = None
        if config.label_column:
            self.labels = table.column(config.label_column).take(pyarrow.array(kept)).to_pylist()
        if isinstance(self.feature, ClassLabel):
            # by name: of rows that are kept, some classes may have none
            names, found = self.feature.names, set(self.labels)
            self.labels = [names[label] for label in self.labels]
            self.feature = ClassLabel(names=[name for label, name in enumerate(names) if label in found])


class PointDataset(torch.utils.data.Dataset):
    """Points, {"images": (C, 1) float32, as a network sees them, with classes also "labels"}.

    Args:
        table: a `Table`; coordinates: its `Coordinates`; classes: `TextClasses`, None without.

    Attributes: `points` (N, C, 1); `num_classes` and `id2label`, None without classes; `class_counts`, {name: rows}.

    Raises ValueError for values outside of the domain.
    """

    most_workers = 0  # rows are copied, no more

    def __init__(self, table, coordinates, classes=None):
        self.table, self.coordinates = table, coordinates
        try:
            points = coordinates.to_points(torch.from_numpy(table.values))
        except ValueError as error:
            raise ValueError(f"dataset {table.name!r}, split {table.split!r}: {error}") from None
        units = {"data_mean": list(coordinates.mean), "data_std": list(coordinates.std)}
        self.points = to_unit_scale(points.unsqueeze(2), units).float()
        self.shape = tuple(self.points.shape[1:])
        self.id2label = None if classes is None else classes.id2label
        self.num_classes = None if classes is None else len(classes.id2label)
        self.labels, self.class_counts = None, None
        if classes is not None:
            self.labels = torch.as_tensor(classes.labels(table.labels))
            counts = np.bincount(self.labels, minlength=self.num_classes).tolist()
            self.class_counts = dict(zip(self.id2label.values(), counts, strict=True))

    def renumber(self, labels, id2label):
        """Give the classes other numbers, those of a network that has more: `labels`, of every class, and the names of
        all of them."""
        self.labels, self.id2label, self.num_classes = labels[self.labels], id2label, len(id2label)
        counts = np.bincount(self.labels, minlength=self.num_classes).tolist()
        self.class_counts = {name: count for name, count in zip(id2label.values(), counts, strict=True) if count}

    def __len__(self):
        return len(self.points)

    def __getitem__(self, row):
        if row >= len(self):
            raise IndexError(f"row {row} of {len(self)}")
        item = {"images": self.points[row]}
        return item if self.labels is None else item | {"labels": self.labels[row]}

    def values(self):
        """What the data have of the points, (N, columns), float64."""
        return torch.from_numpy(self.table.values)

    def row_facts(self):
        """What the rows are, for training.json."""
        return {
            "rows": len(self),
            "class_counts": self.class_counts,
            "skipped_files": sum(map(len, self.table.origin.left_out.values())),
            "missing_rows": self.table.missing,
        }

    def describe(self):
        """One line that says what the points are."""
        parts = [
            f"dataset {self.table.name!r}, split {self.table.split!r}: {len(self):,} points of "
            f"{few(self.coordinates.names, 10)}, domain {domain_in_words(self.coordinates.domain)}"
        ]
        if self.table.missing:
            parts.append(f"{self.table.missing:,} rows left out, in which something is missing")
        if self.id2label is not None:
            counts = [f"{name} {count:,}" for name, count in self.class_counts.items()]
            parts.append(f"{len(counts)} classes: {few(counts, 20)}")
        parts += [f"left out: {few(names)} ({reason})" for reason, names in self.table.origin.left_out.items()]
        return "; ".join(parts)

    def fingerprint(self):
        """What tells these points from others, here and on another machine."""
        labels = [] if self.labels is None else self.labels.tolist()
        numbers = hashlib.sha256(np.ascontiguousarray(self.table.values)).hexdigest()
        return {
            "classes": None if self.id2label is None else list(self.id2label.values()),
            "rows": hash_of([numbers, labels, list(self.coordinates.columns)]),
        }


class PointData:
    """The data of a `PointDataConfig`: classes, coordinates with the statistics of flat columns, points.

    Attributes: `classes`, None without; `coordinates`; `dataset`.

    Raises ValueError for a column that is constant.
    """

    def __init__(self, config, accelerator):
        self.config = config
        with accelerator.main_process_first():
            table = Table(config)
            self.classes = None
            if config.label_column is not None:
                self.classes = TextClasses(config.label_column, table.labels, table.feature, config.label_bins)
            self.coordinates = fitted_coordinates(config, table, config.kept_units())
            self.dataset = PointDataset(table, self.coordinates, self.classes)
        accelerator.print(self.dataset.describe())

    def split(self, name):
        """The points of another split, in the same classes and units."""
        return PointDataset(Table(self.config, name), self.coordinates, self.classes)


def fitted_coordinates(config, table, kept=None):
    """The coordinates of a config with the mean and standard deviation of the table's flat columns, or of all columns
    those that are `kept`, {"data_mean", "data_std"}. Raises ValueError for a column that is constant, and for ranges
    and units other than those that are kept."""
    for i, column in enumerate(config.columns):
        if len(table.values) > 1 and np.ptp(table.values[:, i]) == 0:
            raise ValueError(
                f"dataset {table.name!r}, split {table.split!r}: column {column!r} is constant, {table.values[0, i]:g} "
                f"in all of {len(table.values):,} rows: leave it out"
            )
    bare = config.make_coordinates()
    mean, std = [0.0] * bare.channels, [1.0] * bare.channels
    for name, columns, channels in bare.parts:
        if name == "flat":
            mean[channels] = table.values[:, columns].mean(0).tolist()
            std[channels] = table.values[:, columns].std(0).tolist()
    if kept is None:
        return config.make_coordinates(mean, std)
    fitted = config.make_coordinates(kept["data_mean"], kept["data_std"])
    if not all(np.allclose(own, kept[name]) for name, own in (("data_mean", fitted.mean), ("data_std", fitted.std))):
        raise ValueError(
            f"lora_rank leaves the pipeline as it is, in whose units columns have means and scales {kept['data_mean']} "
            f"and {kept['data_std']}, and here {list(fitted.mean)} and {list(fitted.std)}: give the units and "
            f"box_ranges that it was trained with"
        )
    return fitted
