"""Rows of sound, videos and arrays, as tensors (C, ...) of one shape.

Where rows are from, `sources` says, as of images: files with many rows (parquet, tar, of tables csv), a folder of files
with a sample each, in folders of classes, or the Hub. A single .npy file, or an .npz file with an array for each
column, holds many rows, too: its first axis counts them.
"""

import hashlib
import math
import os
from dataclasses import replace

import datasets
import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from score_sde.pipelines.images import to_mode
from score_sde.pipelines.wording import few, one_line

from .clips import ARCHIVES, ARRAYS, MOST_HELD, VIDEO_SUFFIXES, frames_of, read_array, read_frames
from .image_rows import resize_and_crop
from .labelled_rows import LabelledRows, describe, field
from .options import nearest
from .samples import from_bytes
from .sounds import SOUND_SUFFIXES, read_sound, resample
from .sources import FILES, FilesOf, Origin, nearest_path, open_split


SOUNDS = FilesOf("audio", SOUND_SUFFIXES, FILES)
VIDEOS = FilesOf("video", VIDEO_SUFFIXES, FILES)
ARRAY_FILES = FilesOf("array", frozenset((".npy", ".npz")), FILES | {".csv": "csv"})
# rows from which statistics are measured, at most
STATISTICS_ROWS = 4096


class SignalRows(LabelledRows, torch.utils.data.Dataset):
    """Rows of a split by their numbers, {"images": (C, ...), float32, "labels": class number}.

    A subclass states `files`, a `FilesOf`; `look`(config), which finds `shape` and checks what can be checked before
    any work; and `decode`(value, rng), a tensor of this shape of what its column holds, whose random numbers `rng` has,
    None for what begins at the start.

    Attributes, beside those of all rows: `shape` (C, ...); `left_out_rows`, how many are too short.
    """

    knows_epochs = True
    files: FilesOf
    # words for what is too short
    fewer, filled = "values, fewer than length", "fill it up by zeros"

    def __init__(self, config, split=None, crop_seed=None):
        self.name, self.split, self.crop_seed = config.dataset, split or config.split, crop_seed
        self.column, self.label_column = config.data_column, config.label_column
        self.table, self.left_out_rows = None, 0
        self.open(config)
        if self.label_column == "label" and "label" not in self.data.features and not self.origin_has_labels():
            self.label_column = None  # there are no folders of classes, or columns
        self.check_columns([(self.files.what, self.column), ("label", self.label_column)])
        self.read_labels(config.num_classes)
        self.values_as_they_are()
        self.config = config
        self.look(config)

    def open(self, config):
        """Find `data`, `origin` and, of a file of arrays, its `table`."""
        if os.path.splitext(self.name)[1] in (".npy", ".npz") and not any(each in self.name for each in "*?["):
            self.open_table()
        else:
            self.data, self.origin = open_split(self.name, self.split, kind=self.files)

    def origin_has_labels(self):
        """Whether the rows are from where a column of labels is looked for unasked."""
        return self.table is None and list(self.data.features) != [self.column]

    def open_table(self):
        """The rows of one .npy or .npz file, which are counted by its first axis."""
        path = self.name.replace("{split}", self.split)
        if not os.path.isfile(path):
            raise ValueError(f"dataset {self.name!r}: the file {path!r} does not exist{nearest_path(path)}")
        self.origin = Origin(os.path.dirname(os.path.abspath(path)), {os.path.basename(path): os.path.getsize(path)})
        try:
            found = np.load(path, mmap_mode="r" if path.endswith(".npy") else None, allow_pickle=False)
            columns = {self.column: found} if isinstance(found, np.ndarray) else dict(found)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(
                f"dataset {self.name!r} cannot be opened: {one_line(error)}. Pickles are not: save arrays of numbers"
            ) from None
        if self.column not in columns and self.label_column not in columns and len(columns) == 1:
            columns = {self.column: next(iter(columns.values()))}
        rows = {name: len(values) if values.ndim else 0 for name, values in columns.items()}
        if len(set(rows.values())) != 1 or not all(rows.values()):
            raise ValueError(f"dataset {self.name!r}: its arrays must have as many rows, at least 1; they have {rows}")
        self.table = columns.get(self.column)
        count = next(iter(rows.values()))
        beside = {name: values.tolist() for name, values in columns.items() if values.ndim == 1 and name != self.column}
        # of the table, the numbers of its rows
        there = {} if self.table is None else {self.column: range(count)}
        self.data = Dataset.from_dict(there | beside)

    def values_as_they_are(self):
        """Let the column give {"bytes", "path"} of sound and videos, undecoded."""
        feature = field(self.data.features, self.column)
        if isinstance(feature, (datasets.Audio, datasets.Video)):
            self.data = self.data.cast_column(self.column, replace(feature, decode=False))

    def value_of(self, row):
        value = field(row, self.column)
        return self.table[value] if self.table is not None else value

    def bytes_of(self, value):
        """The bytes of what a column of files holds."""
        with self.file_of({"bytes": value, "path": None} if isinstance(value, bytes) else value) as file:
            return file.read()

    def each_value(self, what):
        """(number of the row, its value) of all rows, with a progress bar."""
        rows = self.data.select_columns([self.column])
        for number, row in enumerate(tqdm(rows, desc=f"looking at {what}", unit="row", leave=False)):
            yield number, self.value_of(row)

    def naming(self, number, problem):
        """A ValueError that says which row it is of."""
        return ValueError(
            f"row {number} of dataset {self.name!r}, split {self.split!r}, column {self.column!r}: {one_line(problem)}"
        )

    def leave_out(self, numbers):
        """Take these rows out."""
        if len(numbers) == len(self.data):
            raise ValueError(f"dataset {self.name!r}, split {self.split!r}: all {len(numbers):,} rows are too short")
        if numbers:
            self.left_out_rows = len(numbers)
            kept = np.setdiff1d(np.arange(len(self.data)), numbers)
            self.data = self.data.select(kept)
            self.read_labels(self.num_classes)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        """The item of a row, or of a key of a `GlobalBatchSampler`."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        numbers = [key % len(self) for key in keys]
        columns = self.data[numbers]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [self.item(row, number, key // len(self)) for row, number, key in zip(rows, numbers, keys, strict=True)]

    def item(self, row, number, epoch):
        rng = None if self.crop_seed is None else np.random.default_rng((self.crop_seed, epoch, number))
        try:
            found = self.decode(self.value_of(row), rng)
            if tuple(found.shape) != self.shape:
                raise ValueError(f"it is of shape {tuple(found.shape)}, the others are of {self.shape}")
            if not torch.isfinite(found).all():
                raise ValueError("it holds values that are not finite (nan, infinite)")
        except Exception as error:  # whatever a decoder raises
            raise self.naming(number, error) from error
        labels = {} if self.label_column is None else {"labels": field(row, self.label_column)}
        return {"images": found} | labels

    def windowed(self, values, length, rng):
        """A part of this length of values (..., time): from the start, or where `rng` says. What is shorter is filled
        up by zeros, where short_clips is pad."""
        spare = values.shape[-1] - length
        if spare < 0:
            self.check_length(values.shape[-1], length)
            return torch.nn.functional.pad(values, (0, -spare))
        first = 0 if rng is None else int(rng.integers(0, spare, endpoint=True))
        return values[..., first : first + length]

    def check_length(self, found, length):
        """Raise ValueError for what is too short and is neither filled up nor left out."""
        if found < length and self.config.short_clips != "pad":
            raise ValueError(
                f"it has {found} {self.fewer} {length}: pass --short_clips pad, to {self.filled}, or leave_out"
            )

    def rates_of(self, what, measure, length):
        """{rate: the first row that has it} of all rows; those that are too short are taken out, or refused.
        `measure`(value) is (rate, length) of a value."""
        rates, short = {}, []
        for number, value in self.each_value(what):
            try:
                rate, found = measure(value)
                rates.setdefault(rate, number)
                if found < length and self.config.short_clips == "leave_out":
                    short.append(number)
                else:
                    self.check_length(found, length)
            except Exception as error:  # whatever a decoder raises
                raise self.naming(number, error) from error
        self.leave_out(short)
        return rates

    def statistics(self):
        """(means, standard deviations) of the channels, of up to `STATISTICS_ROWS` rows, spread evenly. Raises
        ValueError for a channel that is constant."""
        numbers = np.unique(np.linspace(0, len(self) - 1, min(len(self), STATISTICS_ROWS)).round().astype(int))
        sums, count = torch.zeros(2, self.shape[0], dtype=torch.float64), 0
        for start in range(0, len(numbers), 64):
            items = self.__getitems__(numbers[start : start + 64].tolist())
            values = torch.stack([item["images"] for item in items]).double().transpose(0, 1).flatten(1)
            sums, count = sums + torch.stack([values.sum(1), values.square().sum(1)]), count + values.shape[1]
        mean, square = sums / count
        std = (square - mean.square()).clamp_min(0).sqrt()
        flat = (std <= 1e-6 * mean.abs().clamp_min(1e-30)).nonzero().flatten().tolist()
        if flat:
            raise ValueError(
                f"dataset {self.name!r}, split {self.split!r}: channel {flat[0]} is constant, {float(mean[flat[0]]):g}:"
                f" nothing is to be learned of it, leave it out"
            )
        return mean.tolist(), std.tolist()

    def describe(self):
        """One line that says what the rows are, and what is left out."""
        left_out = [f"{few(names)} ({reason})" for reason, names in self.origin.left_out.items()]
        left_out += [f"{self.left_out_rows:,} rows that are too short"] if self.left_out_rows else []
        words = describe(f"dataset {self.name!r}, split {self.split!r}", self, f"{self.files.what} of {self.shape}")
        return words + (f"; left out: {', '.join(left_out)}" if left_out else "")

    def fingerprint(self):
        """As `LabelledRows.fingerprint`; of rows in memory by what they hold."""
        found = super().fingerprint()
        if self.table is not None and not self.origin.sizes:
            found["rows"] = hashlib.sha256(np.ascontiguousarray(self.table).tobytes()).hexdigest()
        return found


class SoundRows(SignalRows):
    """Sound (channels, length), in [-1, 1].

    Attributes: `sampling_rate`, in Hz.
    """

    files = SOUNDS

    @property
    def wanted_rate(self):
        """In Hz, what was asked for, or what the column of a dataset says of itself; None where neither is."""
        return self.config.sampling_rate or getattr(field(self.data.features, self.column), "sampling_rate", None)

    def look(self, config):
        self.shape = config.audio_channels, config.length
        rates = self.rates_of("sounds", self.measure, config.length)
        if len(rates) > 1 and self.wanted_rate is None:
            found = ", ".join(f"{rate} Hz (row {number})" for rate, number in rates.items())
            raise ValueError(
                f"dataset {self.name!r} has several sampling rates, {found}: pass --sampling_rate, to which all are "
                f"resampled"
            )
        self.sampling_rate = self.wanted_rate or next(iter(rates))
        self.units = {"sampling_rate": self.sampling_rate}
        for rate, number in rates.items():
            try:
                resample(torch.zeros(1, 1), rate, self.sampling_rate)
            except ValueError as error:
                raise self.naming(number, error) from None

    def read(self, value):
        """(samples (audio_channels, length), rate) of a sound."""
        with self.file_of({"bytes": value, "path": None} if isinstance(value, bytes) else value) as file:
            samples, rate = read_sound(file)
        channels = self.config.audio_channels
        if channels == 1:
            samples = samples.mean(0, keepdim=True)
        if len(samples) != channels:
            raise ValueError(f"it has {len(samples)} channels, not audio_channels {channels}: 1 mixes all of them")
        return samples, rate

    def measure(self, value):
        samples, rate = self.read(value)
        length, resampled = samples.shape[1], self.wanted_rate
        return rate, -(-length * resampled // rate) if resampled else length

    def decode(self, value, rng):
        samples, rate = self.read(value)
        return self.windowed(resample(samples, rate, self.sampling_rate), self.shape[1], rng)


class VideoRows(SignalRows):
    """Videos (channels, frames, height, width), in [-1, 1].

    Attributes: `frame_rate`, in 1/s.
    """

    files, fewer, filled = VIDEOS, "frames, fewer than frames", "repeat the last one"

    def look(self, config):
        self.shape = config.image_channels, config.frames, config.resolution, config.resolution
        self.mode = "L" if config.image_channels == 1 else "RGB"
        rates = self.rates_of("videos", self.measure, config.frames)
        if len(rates) > 1 and config.frame_rate is None:
            found = ", ".join(f"{rate} (row {number})" for rate, number in rates.items())
            raise ValueError(
                f"dataset {self.name!r} has several frame rates, {few(found.split(', '), 5)} frames in a second: pass "
                f"--frame_rate, at which frames are taken"
            )
        self.frame_rate = config.frame_rate or next(iter(rates))
        self.units = {"frame_rate": self.frame_rate}

    def measure(self, value):
        # the first one shows whether they can be made of this size
        frames, times, rate = self.frames_of(value, most=1)
        if self.config.frame_rate is None:
            if rate is None:
                raise ValueError("it doesn't say how many frames it has in a second: pass --frame_rate")
            even = np.arange(len(frames)) / rate
            if np.abs(times[:-1] - even).max() * rate > 0.5:  # of a frame; files round
                lasting = np.diff(times)
                raise ValueError(
                    f"its frames are shown for {lasting.min():.3g} to {lasting.max():.3g} seconds: pass --frame_rate, "
                    f"at which they are taken"
                )
        return rate and round(rate, 3), self.count(frames, times)

    def frames_of(self, value, most=None):
        """(frames, times, rate) of a video, as `read_frames`; `most` of the frames, or all, as they are trained on,
        those behind as None."""
        count, size = 0, self.shape[2:]

        def shrink(frame):
            nonlocal count
            count += 1
            return resize_and_crop(to_mode(frame, self.mode), size) if most is None or count <= most else None

        held = MOST_HELD // math.prod(size)
        if self.table is not None:
            return [shrink(frame) for frame in frames_of(value)], None, None
        return read_frames(self.bytes_of(value), shrink, held)

    def count(self, frames, times):
        """How many frames there are at the rate that was asked for."""
        wanted = self.config.frame_rate
        return len(frames) if times is None or not wanted else max(1, int(times[-1] * wanted + 1e-6))

    def decode(self, value, rng):
        frames, times, _ = self.frames_of(value)
        there, count, size = self.count(frames, times), self.shape[1], self.shape[2:]
        spare = there - count
        first = 0 if rng is None or spare <= 0 else int(rng.integers(0, spare, endpoint=True))
        numbers = np.arange(first, min(first + count, there))
        if times is not None and self.config.frame_rate:
            # those that are shown in the middle of each, of which there may be the beginning of one
            middle = (numbers + 0.5) / self.config.frame_rate
            numbers = np.searchsorted(times, middle + 1e-6, side="right") - 1
        chosen = [frames[min(number, len(frames) - 1)] for number in numbers]
        chosen += [chosen[-1]] * max(0, -spare)
        pixels = np.stack([np.asarray(frame) for frame in chosen]).reshape(count, *size, -1)
        return from_bytes(torch.from_numpy(pixels).permute(3, 0, 1, 2).contiguous())


class ArrayRows(SignalRows):
    """Arrays (C, ...) of numbers: of a column of lists or arrays, of .npy and .npz files; or windows (C, length) of
    columns of a table whose rows are times."""

    files = ARRAY_FILES

    def open(self, config):
        super().open(config)
        self.series = None
        if not config.columns:
            return
        if self.table is not None:
            raise ValueError(f"columns {' '.join(config.columns)} are of tables, csv or parquet, not of {self.name!r}")
        series = []
        for name in config.columns:
            if name not in self.data.features:
                names = self.data.column_names
                raise ValueError(
                    f"dataset {self.name!r} has no column {name!r}; it has {few(names, 30)}{nearest(name, names)}"
                )
            values = self.data.with_format("arrow")[:].column(name)
            if values.null_count:
                raise ValueError(f"dataset {self.name!r}: column {name!r} has {values.null_count:,} missing values")
            series.append(as_numbers(values.to_numpy(zero_copy_only=False), f"dataset {self.name!r}: column {name!r}"))
        self.series = torch.stack(series)
        if not torch.isfinite(self.series).all():
            channel = int((~torch.isfinite(self.series)).any(1).nonzero()[0])
            raise ValueError(
                f"dataset {self.name!r}: column {config.columns[channel]!r} holds values that are not finite"
            )
        count = self.series.shape[1] - config.length + 1
        if count < 1:
            raise ValueError(
                f"dataset {self.name!r} has {self.series.shape[1]} rows, fewer than length {config.length}"
            )
        self.data, self.label_column = Dataset.from_dict({self.column: range(count)}), None

    def look(self, config):
        self.units = {}
        if self.series is not None:
            self.shape = (len(self.series), config.length)
            return
        shapes = {}
        short = []
        for number, value in self.each_value("arrays"):
            try:
                found = self.channels_first(value)
                shape = tuple(found.shape)
                if not torch.isfinite(found).all():
                    raise ValueError("it holds values that are not finite (nan, infinite)")
                if config.length and len(shape) == 2:
                    if shape[1] < config.length and config.short_clips == "leave_out":
                        short.append(number)
                    else:
                        self.check_length(shape[1], config.length)
                    shape = shape[0], config.length
                shapes.setdefault(shape, number)
            except Exception as error:
                raise self.naming(number, error) from error
        if len(shapes) > 1:
            found = ", ".join(f"{shape} (row {number})" for shape, number in list(shapes.items())[:4])
            raise ValueError(
                f"dataset {self.name!r} has arrays of several shapes, {found}: they must be of one"
                + ("; or pass --length, which cuts signals" if all(len(each) == 2 for each in shapes) else "")
            )
        [self.shape] = shapes
        if not math.prod(self.shape):
            raise ValueError(f"dataset {self.name!r} has arrays of shape {self.shape}, without values")
        if not 2 <= len(self.shape) <= 4:
            raise ValueError(
                f"dataset {self.name!r} has arrays of shape {self.shape}, with channels first: they must have 1 to 3 "
                f"axes beside"
            )
        if config.length and len(self.shape) != 2:
            raise ValueError(f"length {config.length} is of signals, (channels, length), not of arrays {self.shape}")
        self.leave_out(short)

    def channels_first(self, value):
        """The array of what a column holds, (C, ...)."""
        if isinstance(value, (bytes, dict)):
            data = self.bytes_of(value)
            if not data.startswith((ARRAYS, ARCHIVES)):
                raise ValueError("it is neither an .npy nor an .npz file")
            value = read_array(data)
        found = as_numbers(value, "it")
        axis = self.config.channel_axis
        if axis == "none" or found.ndim == 1:
            return found[None]
        return found.movedim(-1, 0) if axis == "last" else found

    def decode(self, value, rng):
        if self.series is not None:
            return self.series[:, value : value + self.shape[1]]
        found = self.channels_first(value)
        return self.windowed(found, self.shape[1], rng) if self.config.length else found


def as_numbers(value, what):
    """A float32 tensor of an array, or lists of numbers. Raises ValueError for what is none."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{what} is no array: {error}") from None
    if array.dtype.kind not in "biuf":
        kinds = {"c": "complex numbers: give their parts as channels", "M": "times", "U": "texts", "S": "texts"}
        kinds["O"] = "values that are missing, or no numbers"
        raise ValueError(f"{what} holds {kinds.get(array.dtype.kind, 'no numbers')} ({array.dtype})")
    return torch.from_numpy(np.array(array, dtype=np.float32))
