"""Pictures of samples: grids, curves, contact sheets, as PNG and, where they move, as GIF."""

import math
import os
import re
import shutil

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .wording import one_line
from .writing import whole_file


# what a browser shows no faster, and a GIF no slower
LEAST_MILLISECONDS, MOST_MILLISECONDS = 20, 655_350


def enlarged(images, side):
    """PIL images as RGB, all enlarged by one whole number, the first to about `side` pixels of width."""
    zoom = max(1, side // images[0].width)
    sizes = [(zoom * each.width, zoom * each.height) for each in images]
    nearest = Image.Resampling.NEAREST
    return [each.resize(size, nearest).convert("RGB") for each, size in zip(images, sizes, strict=True)]


def curves(signal, largest, size=(256, 96)):
    """A picture (width, height) of a signal, an array (C, length): a curve of its own colour for each channel, with a
    line at 0; values of size `largest` reach its edges."""
    width, height = size
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.line([(0, height / 2), (width, height / 2)], fill="lightgrey")
    across = np.linspace(0, width - 1, signal.shape[-1])
    for channel, colour in zip(signal, _colours(len(signal)), strict=True):
        down = height / 2 - np.nan_to_num(channel) / largest * (height / 2 - 4)
        draw.line(list(zip(across, down, strict=True)), fill=colour)
    return picture


def _colours(count):
    return [f"hsl({210 + 360 * i // count}, 70%, 40%)" for i in range(count)]


def contact_sheet(frames, most=8, side=48):
    """Up to `most` of the frames of a video, PIL images, from the first to the last, side by side."""
    count = min(most, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]
    return tiled(enlarged(chosen, side), count)


def with_text(picture, text, lines=3, size=11):
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
    framed = Image.new("RGB", (picture.width, picture.height + height), "white")
    framed.paste(picture)
    draw = ImageDraw.Draw(framed)
    for i, line in enumerate(found):
        draw.text((2, picture.height + 1 + i * (size + 2)), line, fill="black", font=font)
    return framed


def grid_columns(count, columns=None, pairs=False):
    """How many columns a grid of so many pictures has: by default, or for more than 16, as many as rows; of pictures in
    pairs, an even number of up to 16."""
    if columns is None or columns > 16:
        columns = max(1, math.isqrt(count))
    if pairs:
        columns = 2 * max(1, min(columns, 16) // 2)
    return min(columns, count)


def tiled(pictures, columns):
    """RGB pictures as one, in so many columns, black where there is none; each row is as high as its highest."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width, heights = max(each.width for each in pictures), [max(each.height for each in row) for row in rows]
    grid = Image.new("RGB", (columns * width, sum(heights)))
    for number, row in enumerate(rows):
        for i, picture in enumerate(row):
            grid.paste(picture, (i * width, sum(heights[:number])))
    return grid


def save_grid(pictures, path, columns=None, captions=None):
    """Write RGB pictures as a PNG grid; with `captions`, one text for each, these beneath."""
    if captions is not None:
        pictures = [with_text(*each) for each in zip(pictures, captions, strict=True)]
    with whole_file(path) as temporary:
        tiled(pictures, grid_columns(len(pictures), columns)).save(temporary, format="PNG")


def save_moving_grid(videos, path, frame_rate, columns=None, captions=None):
    """Write videos, lists of as many RGB pictures each, as a GIF that shows them side by side, again and again, at a
    rate in frames a second; with `captions`, one text for each, these beneath."""
    if captions is not None:
        videos = [[with_text(frame, text) for frame in video] for video, text in zip(videos, captions, strict=True)]
    columns = grid_columns(len(videos), columns)
    first, *others = [tiled(frames, columns) for frames in zip(*videos, strict=True)]
    duration = round(min(max(LEAST_MILLISECONDS, 1000 / frame_rate), MOST_MILLISECONDS))
    with whole_file(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)


def recordings_of(path):
    """What moves or sounds of the samples that a picture shows, the files that a kind of data wrote beside it: {how
    their names go on after the picture's, such as ".gif" or "_00.wav": path}."""
    folder, name = os.path.split(os.path.abspath(path))
    stem = os.path.splitext(name)[0]
    ends = {each.removeprefix(stem): os.path.join(folder, each) for each in os.listdir(folder) if each.startswith(stem)}
    return {end: ends[end] for end in sorted(ends) if re.fullmatch(r"\.gif|_\d\d\.wav", end)}


def copy_samples(path, folder):
    """Copy a picture of samples into a folder as samples.png, and what moves or sounds of them: samples.gif, or
    samples_00.wav and so on."""
    for end, each in {".png": path, **recordings_of(path)}.items():
        shutil.copyfile(each, os.path.join(folder, f"samples{end}"))
