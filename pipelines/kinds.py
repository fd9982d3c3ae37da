"""Kinds of data: what shape samples have, the noise that they begin as, what goes in, and what comes out.

A network's axes and the rates of a pipeline say which: one axis, `Signal`, or with a sampling_rate `Sound`, or of
length 1 `Points`; two, `Image`; three, `Kind`, or with a frame_rate `Video`.
"""

import os
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image as PIL_Image

from .conditions import sample_channels
from .coordinates import Coordinates
from .images import to_mode
from .latents import data_channels as channels_of_data
from .pictures import contact_sheet, curves, enlarged, save_grid, save_moving_grid, tiled
from .scatter import DATA, MOST_PLOTS, SAMPLES, pairs_of, save_scatter
from .sounds import save_wav, spectrogram
from .wording import quoted


def axes_of(network_config):
    """How many axes the samples of a network have beside their channels, by its config."""
    # of a DiT either may say how many there are
    several = [
        each
        for each in (network_config.get(name) for name in ("patch_size", "sample_size"))
        if not isinstance(each, int)
    ]
    return next((len(each) for each in several if each is not None), network_config.get("dimensions") or 2)


def kind_of(
    network_config,
    vae_config=None,
    sampling_rate=None,
    frame_rate=None,
    data_std=None,
    vae_axes=2,
    coordinates=None,
):
    """The kind of data that a network generates, with an autoencoder or without.

    Args:
        network_config, vae_config: their configs, as diffusers has them or as in config.json.
        sampling_rate: in Hz, of a network of one axis whose samples are sound; None for other signals.
        frame_rate: in frames a second, of a network of three axes whose samples are videos; None for other volumes.
        data_std: of data that are in units of their own, see `units.py`; None for images, in [-1, 1].
        vae_axes: how many axes the autoencoder's data have, see `latents.Autoencoder`.
        coordinates: {argument of `Coordinates`: value}, of a network whose samples are points; None for what it says of
            its domain alone.

    Raises ValueError for a network without sample_size, an autoencoder of data of other axes than the network's, and a
    rate of what the network doesn't generate.
    """
    sample_size = network_config.get("sample_size")
    if sample_size is None:
        raise ValueError(
            "this network has no sample_size: set the height and width that it was trained on, "
            "pipe.denoiser.register_to_config(sample_size=32)"
        )
    axes = axes_of(network_config)
    size = (sample_size,) * axes if isinstance(sample_size, int) else tuple(sample_size)
    if vae_config is not None and axes != vae_axes:
        what = {1: "sound", 2: "images", 3: "videos"}[vae_axes]
        raise ValueError(
            f"an autoencoder of {what} does not fit a network whose samples have {axes} axes, not {vae_axes}"
        )
    for name, rate, needed in (("sampling_rate", sampling_rate, 1), ("frame_rate", frame_rate, 3)):
        if rate is not None and axes != needed:
            raise ValueError(
                f"{name} {rate} is of samples with {needed} axes; this network's have {axes}: leave it out"
            )
    channels = sample_channels(network_config)
    told = channels, size, channels if vae_config is None else channels_of_data(vae_config)
    if sampling_rate is not None:
        return Sound(*told, sampling_rate)
    if frame_rate is not None:
        return Video(*told, frame_rate)
    if size == (1,):
        own = {"domain": network_config.get("domain"), "channels": channels}
        return Points(*told, Coordinates(**own | (coordinates or {})))
    return {1: Signal, 2: Image if data_std is None else Kind}.get(axes, Kind)(*told)


# in Hz, what a WAV file says; of slow films less than one frame a second
LARGEST_RATE = 10**8


def check_rate(name, rate):
    """Raise ValueError for a rate that is no positive number, or one that files of sound and video don't have."""
    number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not number or not 0 < rate <= LARGEST_RATE or (name == "sampling_rate" and rate < 1):
        raise ValueError(
            f"{name} {quoted(rate)} must be a positive number of Hz, from 1 on, or of frames a second, up to "
            f"{LARGEST_RATE:,}"
        )


# networks of diffusers whose forward takes any number of tokens for that of a square
SQUARES_ALONE = ("DiTTransformer2DModel",)


def divisors_of_sides(network_config):
    """What the sides of a network's samples must be multiples of, a number for each axis: the patch, or 2 for each time
    that a U-Net halves them; 1 where its config says neither.

    Args:
        network_config: as of `kind_of`.
    """
    patch, levels = (network_config.get(name) for name in ("patch_size", "block_out_channels"))
    if isinstance(patch, (list, tuple)):
        return tuple(patch)
    axes = axes_of(network_config)
    halved = 2 ** (len(levels) - 1) if levels else 1
    if patch is None and axes == 3 and not network_config.get("halve_frames"):
        return (1, halved, halved)
    return (patch or halved,) * axes


@dataclass
class Kind:
    """Data of any number of axes (B, C, *size), which go in and out as they are; what has more to it is a subclass.

    channels, size: of what the network generates.
    data_channels: of the data, which with an autoencoder are other than what the network generates; None where its
        config doesn't say.
    """

    channels: int
    size: tuple[int, ...]
    data_channels: int | None

    name: ClassVar[str] = "sample"
    unit: ClassVar[str] = "values"
    # the first is the default
    output_types: ClassVar[tuple[str, ...]] = ("np", "pt", "latent")

    def of_size(self, height: int | None, width: int | None, divisors, factor: int = 1):
        """The same data in another size, which only images have."""
        sides = {name: side for name, side in (("height", height), ("width", width)) if side is not None}
        given = " and ".join(f"{name} {side!r}" for name, side in sides.items())
        raise ValueError(
            f"{given} {'are' if len(sides) > 1 else 'is'} of images; this model makes {self.name}s of size {self.size}"
        )

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        """Shape (batch, channels, *size) of what the network generates."""
        return (batch_size, self.channels, *self.size)

    def noise(self, batch_size: int, generator, device: torch.device) -> torch.Tensor:
        """Standard normal noise of the shape of samples, float32: half precision is for the network only. With a list
        of one generator per sample, each draws its own."""
        return randn_tensor(self.sample_shape(batch_size), generator=generator, device=device, dtype=torch.float32)

    def check(self, data) -> None:
        """Raise ValueError for what are no data (B, C, *size), in the units that `decode` of a pipeline returns."""
        self._check_shape(data)
        if not torch.is_floating_point(data) or not torch.isfinite(data).all():
            raise ValueError(f"{self.name}s must be finite floating-point numbers; got {data.dtype}")

    def accepted(self, data) -> torch.Tensor:
        """Data that `check` accepts, (B, C, *size)."""
        self.check(data)
        return data

    def _check_shape(self, data):
        axes = 2 + len(self.size)
        if not torch.is_tensor(data) or data.ndim != axes or data.shape[1] != self.data_channels:
            what = f"shape {tuple(data.shape)}" if torch.is_tensor(data) else f"a {type(data).__name__}"
            raise ValueError(f"{self.name}s must be a tensor {self._shape_in_words('batch')}; got {what}")

    def prepare(self, given, what="image") -> torch.Tensor:
        """What `__call__` takes as `image`, or as another argument, a tensor or array (C, *size), a batch or a list of
        them, as data (B, C, *size). Raises ValueError for other types and shapes."""
        prepared: list[torch.Tensor] = []
        for each in given if isinstance(given, (list, tuple)) else [given]:
            each = torch.from_numpy(each) if isinstance(each, np.ndarray) else each
            if torch.is_tensor(each) and each.ndim == 1 + len(self.size):
                each = each[None]
            self.check(each)
            prepared.append(each.float())
        if not prepared:
            raise ValueError(f"{what} is an empty list")
        return torch.cat(prepared)

    def output(self, data: torch.Tensor, output_type: str | None = None):
        """What a user gets of decoded samples (B, C, *size): "np", an array, or "pt", a tensor, of the same shape and
        values."""
        self.check_output_type(output_type)
        return data.cpu().numpy() if output_type in (None, "np") else data

    def check_output_type(self, output_type: str | None) -> None:
        """Raise ValueError for a type of output that this kind doesn't have; None is its default."""
        if output_type is not None and output_type not in self.output_types:
            raise ValueError(
                f"output_type {output_type!r} is unknown; choose one of {', '.join(self.output_types)}"
                + (f": this model makes no images but {self.name}s" if output_type == "pil" else "")
            )

    def save_grid(self, outputs, path, columns: int | None = None, captions=None) -> None:
        """Write samples of two or three axes, an array or tensor (B, C, *size), as a PNG: the first channel in grey,
        from the least to the largest value of all, of three axes slices across the first of them, side by side; with
        `captions`, one text for each, these beneath."""
        values = np.asarray(outputs, dtype=np.float64)[:, 0]
        low, high = np.nanmin(values), np.nanmax(values)
        grey = (np.nan_to_num((values - low) / max(high - low, 1e-12)) * 255).round().astype(np.uint8)
        layers = grey.reshape(len(grey), -1, *grey.shape[-2:])
        sheets = [contact_sheet([PIL_Image.fromarray(layer) for layer in volume]) for volume in layers]
        save_grid(sheets, path, columns, captions)

    def _shape_in_words(self, *before):
        words = {1: ("length",), 2: ("height", "width")}.get(len(self.size), ("size",) * len(self.size))
        return f"({', '.join([*before, str(self.data_channels), *words])})"


class Signal(Kind):
    """Sequences of values, such as sound (B, C, length), in and out in the units of the training data."""

    name = "signal"

    def save_grid(self, outputs, path, columns: int | None = None, captions=None) -> None:
        """Write signals, an array or tensor (B, C, length), as a PNG of curves, one colour for each channel, all on one
        scale, with a line at 0; with `captions`, one text for each, these beneath."""
        signals = np.asarray(outputs, dtype=np.float64)
        save_grid([curves(each, _largest(signals)) for each in signals], path, columns, captions)


def _largest(signals):
    """The largest size of a finite value, above 0."""
    return np.abs(signals[np.isfinite(signals)]).max(initial=1e-12)


@dataclass
class Sound(Signal):
    """Sound (B, channels, samples) at a rate in Hz, in and out as it is: around [-1, 1], as files have it."""

    sampling_rate: float

    name: ClassVar[str] = "sound"
    # players beside a picture
    most_files: ClassVar[int] = 16

    def save_grid(self, outputs, path, columns: int | None = None, captions=None) -> None:
        """Write sounds, an array or tensor (B, channels, samples), as a PNG of curves and, beneath each, its
        spectrogram; with `captions`, one text for each, these beneath. Beside it the first ones as WAV files, named
        after the picture, and _00, _01, ..."""
        sounds, pictures = np.asarray(outputs, dtype=np.float64), []
        for number, sound in enumerate(sounds):
            curve = curves(sound, _largest(sounds), (256, 48))
            pictures.append(tiled([curve, spectrogram(sound)], 1))
            if number < self.most_files:
                save_wav(sound, f"{os.path.splitext(path)[0]}_{number:02}.wav", self.sampling_rate)
        save_grid(pictures, path, columns, captions)


@dataclass
class Points(Kind):
    """Points (B, C, 1) of a domain or of flat space, in and out as the columns of their data, (B, columns)."""

    coordinates: Coordinates

    name: ClassVar[str] = "point"

    def accepted(self, data) -> torch.Tensor:
        """Points (B, C, 1) of values (B, columns), which must lie in the domain; or such points, as they are."""
        if torch.is_tensor(data) and data.ndim == 2:
            data = self._of_values(data)
        self.check(data)
        return data

    def prepare(self, given, what="image") -> torch.Tensor:
        """What `__call__` takes as `image`, tensors or arrays (columns,) or (B, columns) or a list of them, as points
        (B, C, 1). Raises ValueError for other types and shapes, and for values outside of the domain."""
        parts = [torch.as_tensor(each) for each in (given if isinstance(given, (list, tuple)) else [given])]
        if not parts:
            raise ValueError(f"{what} is an empty list")
        return torch.cat([self._of_values(each[None] if each.ndim == 1 else each) for each in parts]).float()

    def _of_values(self, values):
        count = self.coordinates.count
        if values.ndim != 2 or values.shape[1] != count or not torch.is_floating_point(values):
            raise ValueError(
                f"points must be floating-point numbers (batch, {count}), {', '.join(self.coordinates.names)}; got "
                f"shape {tuple(values.shape)} and {values.dtype}"
            )
        return self.coordinates.to_points(values).unsqueeze(2)

    def output(self, data: torch.Tensor, output_type: str | None = None):
        """What a user gets of points (B, C, 1): "np", an array, or "pt", a tensor, of their columns (B, columns)."""
        return super().output(self.coordinates.to_values(data.squeeze(2)), output_type)

    def save_grid(
        self, outputs, path, columns: int | None = None, captions=None, data=None, data_captions=None
    ) -> None:
        """Write points, an array or tensor (B, columns), as a PNG of scatter plots of pairs of columns, of latitude and
        longitude a map; with `captions`, one text for each, such as its class, a plot for each text in one row, however
        many `columns` are asked for, and one plot of all where there are more than `MOST_PLOTS`. Above them `data`
        (N, columns), with texts of their own."""
        if len(set(captions or ())) > MOST_PLOTS:
            captions = data_captions = None
        sets = [(outputs, captions, SAMPLES, "" if data is None else "samples")]
        if data is not None:
            sets = [(data, data_captions, DATA, "data"), *sets]
        titles, rows = list(dict.fromkeys(captions or [""])), []
        for values, texts, colour, what in sets:
            values = np.asarray(values, dtype=np.float64)
            texts = np.asarray(texts or [""] * len(values))
            rows.append([(f"{title} {what}".strip(), values[texts == title], colour) for title in titles])
        space = self.coordinates
        by_map = space.on_sphere is not None and space.count == 2
        pairs, limits = ([(1, 0)] if by_map else pairs_of(space.count)), space.limits()
        save_scatter(rows, path, pairs, limits, space.names, 2.0 if by_map else 1.0)


class Image(Kind):
    """Images (B, C, height, width): around [-1, 1] inside, in [0, 1] or as PIL images outside."""

    name = "image"
    unit = "pixels"
    output_types = ("pil", "np", "pt", "latent")

    def of_size(self, height: int | None, width: int | None, divisors, factor: int = 1):
        """The same images in another size.

        Args:
            height, width: in pixels; None for what it is.
            divisors: what the network's samples must be multiples of, in height and width: see `divisors_of_sides`.
            factor: how many times smaller than an image its latent is, in height and width.

        Raises ValueError for a side that is no such multiple, naming the nearest ones that are.
        """
        size = []
        for name, own, given, divisor in zip(("height", "width"), self.size, (height, width), divisors, strict=True):
            side, step = own * factor if given is None else given, divisor * factor
            whole = isinstance(side, int) and not isinstance(side, bool)
            if not whole or side < 1 or side % step:
                below = side // step * step if whole else own * factor
                near = [each for each in (below, below + step * whole) if each > 0] or [step]
                product = f", {factor} of the autoencoder times {divisor} of the network" if factor > 1 else ""
                raise ValueError(
                    f"{name} {side!r} must be a multiple of {step} pixels{product}: use "
                    f"{' or '.join(map(str, dict.fromkeys(near)))}"
                )
            size.append(side // factor)
        return replace(self, size=tuple(size))

    def check(self, data) -> None:
        """Raise ValueError for what are no images (B, C, height, width) in [-1, 1]."""
        self._check_shape(data)
        self._check_range("images", data, -1)

    def _check_range(self, what, data, lowest):
        low, high = float(data.min()), float(data.max())
        if not torch.is_floating_point(data) or not lowest - 0.001 <= low <= high <= 1.001:
            raise ValueError(
                f"{what} must be floating-point in [{lowest}, 1]; got {data.dtype} from {low:g} to {high:g}"
            )

    def prepare(self, given, what="image") -> torch.Tensor:
        """What `__call__` takes as `image`, or as another argument, as images (B, channels, height, width) in [-1, 1].
        A PIL image of any mode becomes grey or RGB, as the model has it, on white where it is transparent.

        Raises ValueError for other types, shapes, numbers of channels and ranges.
        """
        channels = self.data_channels
        prepared: list[torch.Tensor] = []
        for each in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(each, PIL_Image.Image):
                if channels not in (1, 3):
                    raise ValueError(
                        f"{what}: a PIL image has no {channels} channels, as this model has: pass a tensor"
                    )
                each = np.asarray(to_mode(each, "L" if channels == 1 else "RGB"), dtype=np.float32) / 255
                each = each.reshape(*each.shape[:2], channels)
            if isinstance(each, np.ndarray):
                each = torch.from_numpy(each).movedim(-1, -3) if each.ndim > 2 else torch.from_numpy(each)
            if not torch.is_tensor(each):
                raise ValueError(
                    f"{what} must be a PIL image, an array or tensor in [0, 1], or a list of them; got a "
                    f"{type(each).__name__}"
                )
            each = each[None] if each.ndim == 3 else each
            if each.ndim != 4 or each.shape[1] != channels or each.shape[2:] != (prepared or [each])[0].shape[2:]:
                raise ValueError(
                    f"{what} has shape {tuple(each.shape)}; this model takes tensors ({channels}, height, width) and "
                    f"arrays (height, width, {channels}), or batches of them, all of one size"
                )
            self._check_range(what, each, 0)
            prepared.append(each.float())
        if not prepared:
            raise ValueError(f"{what} is an empty list")
        return 2 * torch.cat(prepared) - 1

    def output(self, data: torch.Tensor, output_type: str | None = None):
        """What a user gets of decoded images (B, C, height, width) around [-1, 1]: "pil", a list of PIL images; "np",
        an array (B, height, width, C) in [0, 1]; "pt", a tensor (B, C, height, width) in [0, 1]."""
        self.check_output_type(output_type)
        processor = VaeImageProcessor(do_resize=False)
        return processor.postprocess(data, output_type=output_type or self.output_types[0])

    def save_grid(self, outputs, path, columns: int | None = None, captions=None) -> None:
        """Write PIL images as a PNG grid, small ones enlarged, all by the same factor; with `captions`, one text for
        each, these beneath."""
        side = 64 if captions is None else 128
        save_grid(enlarged(outputs, side), path, columns, captions)


@dataclass
class Video(Kind):
    """Videos (B, C, frames, height, width) at a rate in frames a second: around [-1, 1] inside, in [0, 1] or as PIL
    images outside, as diffusers' pipelines have them."""

    frame_rate: float

    name: ClassVar[str] = "video"
    unit: ClassVar[str] = "pixels"
    output_types: ClassVar[tuple[str, ...]] = ("pil", "np", "pt", "latent")

    @property
    def frame(self) -> Image:
        """The images that its frames are."""
        return Image(self.channels, self.size[1:], self.data_channels)

    def of_size(self, height: int | None, width: int | None, divisors, factor: int = 1):
        """The same videos in another height and width: see `Image.of_size`."""
        frame = self.frame.of_size(height, width, divisors[-2:], factor)
        return replace(self, size=(self.size[0], *frame.size))

    def check(self, data) -> None:
        """Raise ValueError for what are no videos (B, C, frames, height, width) in [-1, 1]."""
        self._check_shape(data)
        self.frame.check(data.flatten(3))

    def prepare(self, given, what="image") -> torch.Tensor:
        """What `__call__` takes as `image`, or as another argument, as videos (B, C, frames, height, width) in [-1, 1]:
        a list of PIL images, an array (frames, height, width, C) or tensor (frames, C, height, width) in [0, 1], a
        batch of these, or a list of them.

        Raises ValueError for other types, shapes, numbers of channels and ranges, and for videos of several sizes.
        """
        if not isinstance(given, (list, tuple)):
            given = given if getattr(given, "ndim", 0) == 5 else [given]
        elif given and getattr(given[0], "ndim", 3) == 3 and not isinstance(given[0], (list, tuple)):
            given = [given]  # the frames of one
        videos = [self.frame.prepare(video, what) for video in given]
        if len({video.shape for video in videos}) != 1:
            shapes = [tuple(video.shape) for video in videos]
            raise ValueError(f"{what}: videos must be of one size and length, not {shapes or 'none'}")
        return torch.stack(videos).transpose(1, 2)

    def output(self, data: torch.Tensor, output_type: str | None = None):
        """What a user gets of decoded videos (B, C, frames, height, width) around [-1, 1]: "pil", lists of PIL images;
        "np", an array (B, frames, height, width, C) in [0, 1]; "pt", a tensor (B, frames, C, height, width) in
        [0, 1]."""
        self.check_output_type(output_type)
        processor = VideoProcessor(do_resize=False)
        return processor.postprocess_video(data, output_type=output_type or self.output_types[0])

    def save_grid(self, outputs, path, columns: int | None = None, captions=None) -> None:
        """Write videos, lists of PIL images, as a PNG of some frames of each, side by side, and beside it as a GIF of
        the same name in which they play together; with `captions`, one text for each, these beneath."""
        save_grid([contact_sheet(frames) for frames in outputs], path, columns, captions)
        self.save_moving(outputs, f"{os.path.splitext(path)[0]}.gif", columns, captions)

    def save_moving(self, outputs, path, columns: int | None = None, captions=None) -> None:
        """Write videos, lists of PIL images, as a GIF in which they play together."""
        side = 64 if captions is None else 128
        videos = [enlarged(frames, side) for frames in outputs]
        save_moving_grid(videos, path, self.frame_rate, columns, captions)
