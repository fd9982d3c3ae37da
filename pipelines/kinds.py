"""Kinds of data: what shape samples have, the noise that they begin as, what goes in, and what comes out."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image as PIL_Image
from PIL import ImageDraw, ImageFont

from .conditions import sample_channels
from .images import to_mode
from .latents import data_channels as channels_of_data
from .wording import one_line
from .writing import whole_file


def kind_of(network_config, vae_config=None, sampling_rate=None, frame_rate=None, data_std=None, vae_axes=2):
    """The kind of data that a network generates, with an autoencoder or without.

    Args:
        network_config, vae_config: their configs, as diffusers has them or as in config.json.
        sampling_rate, frame_rate, data_std: the units of the data, see `units.py`.
        vae_axes: how many axes the autoencoder's data have: see `latents.Autoencoder`.

    Raises ValueError for a network without sample_size, and an autoencoder of data of other axes than the network's.
    """
    sample_size = network_config.get("sample_size")
    if sample_size is None:
        raise ValueError(
            "this network has no sample_size: set the height and width that it was trained on, "
            "pipe.denoiser.register_to_config(sample_size=32)"
        )
    # of a DiT either may say how many axes there are
    several = [each for each in (network_config.get("patch_size"), sample_size) if isinstance(each, (list, tuple))]
    axes = len(several[0]) if several else 2
    size = (sample_size,) * axes if isinstance(sample_size, int) else tuple(sample_size)
    if vae_config is not None and axes != vae_axes:
        what = {1: "sound", 2: "images", 3: "videos"}[vae_axes]
        raise ValueError(
            f"an autoencoder of {what} does not fit a network whose samples have {axes} axes, not {vae_axes}"
        )
    channels = data_channels = sample_channels(network_config)
    if vae_config is not None:
        data_channels = channels_of_data(vae_config)
    # what has units of its own is no image in [-1, 1]
    kind = {1: Signal, 2: Image if data_std is None else Kind}.get(axes, Kind)
    return kind(channels, size, data_channels)


# networks of diffusers whose forward takes any number of tokens for that of a square
SQUARES_ALONE = ("DiTTransformer2DModel",)


def divisors_of_sides(network_config, axes=2):
    """What the sides of a network's samples must be multiples of, a number for each axis: the patch, or 2 for each time
    that a U-Net halves them; 1 where its config says neither.

    Args:
        network_config: as of `kind_of`.
    """
    patch, levels = (network_config.get(name) for name in ("patch_size", "block_out_channels"))
    if isinstance(patch, (list, tuple)):
        return tuple(patch)
    return (patch or (2 ** (len(levels) - 1) if levels else 1),) * axes


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
        raise ValueError(
            f"height {height} and width {width} are of images; this model makes {self.name}s of size {self.size}"
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

    def _shape_in_words(self, *before):
        words = {1: ("length",), 2: ("height", "width")}.get(len(self.size), ("size",) * len(self.size))
        return f"({', '.join([*before, str(self.data_channels), *words])})"


class Signal(Kind):
    """Sequences of values, such as sound (B, C, length), in and out in the units of the training data."""

    name = "signal"

    def save_grid(self, outputs, path, columns: int | None = None, captions=None) -> None:
        """Write signals, an array or tensor (B, C, length), as a PNG of curves, one colour for each channel, all on one
        scale, with a line at 0; with `captions`, one text for each, these beneath."""
        signals, (width, height) = np.asarray(outputs, dtype=np.float64), (256, 96)
        largest = np.abs(signals[np.isfinite(signals)]).max(initial=1e-12)
        across = np.linspace(0, width - 1, signals.shape[-1])
        pictures = []
        for signal in signals:
            picture = PIL_Image.new("RGB", (width, height), "white")
            draw = ImageDraw.Draw(picture)
            draw.line([(0, height / 2), (width, height / 2)], fill="lightgrey")
            for channel, colour in zip(signal, _colours(len(signal)), strict=True):
                down = height / 2 - np.nan_to_num(channel) / largest * (height / 2 - 4)
                draw.line(list(zip(across, down, strict=True)), fill=colour)
            pictures.append(picture)
        if captions is not None:
            pictures = [_with_text(*each) for each in zip(pictures, captions, strict=True)]
        _save_grid(pictures, path, columns)


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
        zoom = max(1, (64 if captions is None else 128) // outputs[0].width)
        nearest = PIL_Image.Resampling.NEAREST
        pictures = [
            image.resize((zoom * image.width, zoom * image.height), nearest).convert("RGB") for image in outputs
        ]
        if captions is not None:
            pictures = [_with_text(*each) for each in zip(pictures, captions, strict=True)]
        _save_grid(pictures, path, columns)


def _with_text(picture, text, lines=3, size=11):
    """An RGB picture with a text beneath, in up to three lines, cut off where it is longer."""
    font, words, found = ImageFont.load_default(size), one_line(text).split(), [""]
    for word in words:
        longer = f"{found[-1]} {word}".strip()
        if font.getlength(longer) <= picture.width - 4 or not found[-1]:
            found[-1] = longer
        else:
            found.append(word)
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1] + " ..."]
    height = lines * (size + 2) + 4
    framed = PIL_Image.new("RGB", (picture.width, picture.height + height), "white")
    framed.paste(picture)
    draw = ImageDraw.Draw(framed)
    for i, line in enumerate(found):
        draw.text((2, picture.height + 1 + i * (size + 2)), line, fill="black", font=font)
    return framed


def _colours(count):
    return [f"hsl({210 + 360 * i // count}, 70%, 40%)" for i in range(count)]


def grid_columns(count, columns=None, pairs=False):
    """How many columns a grid of so many pictures has: by default, or for more than 16, as many as rows; of pictures in
    pairs, an even number of up to 16."""
    if columns is None or columns > 16:
        columns = max(1, math.isqrt(count))
    if pairs:
        columns = 2 * max(1, min(columns, 16) // 2)
    return min(columns, count)


def _save_grid(pictures, path, columns):
    """Write RGB pictures as a PNG grid, black where there is none; each row is as high as its highest."""
    columns = grid_columns(len(pictures), columns)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width, heights = max(each.width for each in pictures), [max(each.height for each in row) for row in rows]
    grid = PIL_Image.new("RGB", (columns * width, sum(heights)))
    for number, row in enumerate(rows):
        for i, picture in enumerate(row):
            grid.paste(picture, (i * width, sum(heights[:number])))
    with whole_file(path) as temporary:
        grid.save(temporary, format="PNG")
