"""Generated images: drawn, read from where they were saved, written as 8 bits."""

import os
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from score_sde.pipelines.images import to_mode
from score_sde.pipelines.pictures import grid_columns
from score_sde.pipelines.writing import whole_file


def to_bytes(images):
    """Images in [-1, 1] as 8-bit images have them, uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images):
    return images.float() / 127.5 - 1


def quantized(images):
    """Images in [-1, 1] as if saved with 8 bits: what is measured is what would be saved."""
    return from_bytes(to_bytes(images))


def draw(
    pipeline,
    numbers,
    seed,
    guidance_scale,
    num_inference_steps,
    prompts=None,
    labels=None,
    conditions=None,
    image_size=None,
):
    """(images (B, C, H, W) in [-1, 1], network evaluations), each from the seed of its number and, of these labels and
    prompts, of those whose turn it is: see `labels_of`; or of conditions, one for each number. `image_size` is their
    height and width in pixels, None for the network's own."""
    height, width = image_size or (None, None)
    output = pipeline(
        batch_size=len(numbers),
        class_labels=labels_of(numbers, pipeline, labels) if conditions is None else None,
        prompt=in_turn(prompts, numbers),
        conditions=conditions,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in numbers],
        output_type="pt",
        height=height,
        width=width,
    )
    return output.images * 2 - 1, output.nfe


@torch.compiler.set_stance("force_eager")
def sample_grid(pipeline, config, path, seed=0, prompts=None, labels=None, conditions=None, sizes=None):
    """Draw samples as a `TrainConfig` says, these labels and prompts in turn as `draw` does, one seed per sample, and
    write them as a PNG grid, with the prompts beneath. Of several sizes, (height, width) in pixels, each row is of one
    in turn. Or by conditions, [(size, numbers, conditions (B, ...))], each right of the image that the network sees
    beside it. Return the number of network evaluations."""
    count, told = config.sample_num_images, None
    if conditions is None:
        told, sizes = labels_of(range(count), pipeline, labels), sizes or [None]
        columns = grid_columns(count, pipeline.num_classes if told and not prompts else None)
        size_of = [sizes[i // columns % len(sizes)] for i in range(count)]
        parts = [(size, [i for i in range(count) if size_of[i] == size], None) for size in dict.fromkeys(size_of)]
    else:
        columns, parts = grid_columns(2 * count, pairs=True), conditions
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    images, seen = {}, {}
    for size, numbers, beside in parts:
        height, width = size or (None, None)
        output = pipeline(
            batch_size=len(numbers),
            class_labels=told and [told[i] for i in numbers],
            prompt=in_turn(prompts, numbers),
            conditions=beside,
            guidance_scale=config.sample_guidance_scale if told or prompts or beside else 1.0,
            num_inference_steps=config.sample_num_inference_steps,
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in numbers],
            height=height,
            width=width,
        )
        images |= dict(zip(numbers, output.images, strict=True))
        if beside is not None:
            shown = pipeline.decode(beside["condition_sample"].to(pipeline.device))
            seen |= dict(zip(numbers, pipeline.kind.output(shown), strict=True))
    pictures, words = [images[i] for i in range(count)], in_turn(prompts, range(count))
    if seen:
        pictures = [each for i in range(count) for each in (seen[i], images[i])]
        words = words and [each for word in words for each in ("", word)]
    pipeline.kind.save_grid(pictures, path, columns, **({} if words is None else {"captions": words}))
    return output.nfe


def in_turn(values, numbers):
    """The value of each number, in turn; None for None."""
    return None if values is None else [values[i % len(values)] for i in numbers]


def labels_of(numbers, pipeline, labels=None):
    """The class that each image is asked to be: of these labels, of () none, or of all classes of the model, if it has
    any, those whose turn it is."""
    if labels is None and pipeline.num_classes is not None:
        labels = range(pipeline.num_classes)
    return in_turn(labels, numbers) if labels else None


@contextmanager
def array_file(path, shape):
    """f(images (B, C, H, W), uint8), which adds them to an .npz file as ADM has it, of `shape` (N, C, H, W) in the end;
    nothing stays of one that isn't finished."""
    count, channels, *size = shape
    with (
        whole_file(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, channels)}
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda images: file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())


class ArraySamples:
    """The images of an .npz file, uint8 (N, H, W, C), read from the disk as they are asked for, in order.

    Attributes: `shape` (C, H, W); `count`.
    """

    def __init__(self, path):
        self.path = path
        try:
            archive = zipfile.ZipFile(path)
            name = next((each for each in archive.namelist() if each.endswith(".npy")), None)
            if name is None:
                raise ValueError("it holds no array")
            self.file = archive.open(name)
            version = np.lib.format.read_magic(self.file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, in_columns, dtype = read_header(self.file)
            self.begin, size = self.file.tell(), archive.getinfo(name).file_size
        except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise ValueError(f"samples {path!r} cannot be read: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or in_columns:
            order = " in Fortran order" if in_columns else ""
            raise ValueError(f"samples {path!r} must hold uint8 (N, H, W, C); they are {dtype} {shape}{order}")
        if size - self.begin != np.prod(shape, dtype=object):
            raise ValueError(f"samples {path!r} cannot be read: the array is shorter or longer than its shape {shape}")
        self.count, self.rows, self.shape = shape[0], shape[1:], (shape[3], *shape[1:3])

    def read(self, numbers):
        """Images (B, C, H, W) in [-1, 1] of numbers that rise."""
        first, size = numbers[0], int(np.prod(self.rows))
        try:
            self.file.seek(self.begin + first * size)
            found = self.file.read((numbers[-1] + 1 - first) * size)
            array = np.frombuffer(found, np.uint8).reshape(-1, *self.rows)[[number - first for number in numbers]]
        except (OSError, ValueError, EOFError, IndexError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"samples {self.path!r} are damaged at image {first}: {error}") from error
        return from_bytes(torch.from_numpy(array).permute(0, 3, 1, 2))


class FolderSamples:
    """The images of a folder, in the order of their names, as `ArraySamples`; of `channels`, by default 1 where all are
    greyscale, else 3, and on `background`."""

    def __init__(self, folder, channels=None, background="white"):
        self.background = background
        kinds = (".png", ".jpg", ".jpeg", ".webp")
        self.paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.lower().endswith(kinds)]
        if not self.paths:
            raise ValueError(f"samples {folder!r}: the folder holds no PNG, JPEG or WebP files")
        sizes, grey = {}, True
        for path in self.paths:
            with self.opened(path) as image:
                sizes.setdefault(image.size, path)
                grey = grey and image.mode.split(";")[0] in ("1", "L", "LA", "La", "I", "F")
        if len(sizes) > 1:
            found = ", ".join(f"{size} ({os.path.basename(path)})" for size, path in list(sizes.items())[:3])
            raise ValueError(f"samples {folder!r}: the images are not of one size: {found}")
        [(width, height)] = sizes
        channels = channels or (1 if grey else 3)
        self.count, self.shape, self.mode = len(self.paths), (channels, height, width), "L" if channels == 1 else "RGB"

    @staticmethod
    @contextmanager
    def opened(path):
        try:
            with Image.open(path) as image:
                yield image
        except Exception as error:  # whatever the decoder raises
            raise ValueError(f"samples: {path!r} cannot be decoded: {error}") from error

    def read(self, numbers):
        found = []
        for number in numbers:
            with self.opened(self.paths[number]) as image:
                found.append(np.array(to_mode(image, self.mode, self.background)).reshape(*self.shape[1:], -1))
        return from_bytes(torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2))


def open_samples(config):
    """Images that were made before. Raises ValueError for what is none, or too few."""
    if config.samples.endswith(".npz"):
        samples = ArraySamples(config.samples)
    elif os.path.isdir(config.samples):
        samples = FolderSamples(config.samples, config.image_channels, config.background or "white")
    else:
        raise ValueError(f"samples {config.samples!r} is neither a folder nor an .npz file")
    if samples.count < config.num_images:
        raise ValueError(
            f"samples {config.samples!r} holds {samples.count} images; --num_images asks for {config.num_images}"
        )
    return samples
