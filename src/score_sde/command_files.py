"""Files that the command reads pictures from and writes samples into."""

import csv
import os


def open_image(option, path):
    """A PIL image from a file. Raises ValueError for what is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # whatever the decoder raises
        raise ValueError(f"{option} {path!r} cannot be opened as an image: {error}") from error
    return image


def check_png(option, path):
    """Raise ValueError for what is no name of a PNG, or lies in a folder that isn't there."""
    if not path.lower().endswith(".png") or os.path.isdir(path):
        raise ValueError(f"{option} {path!r} must be a .png file")
    check_folder(option, path)


# what samples can be written as, beside a picture and an array, by the kind of data
FILES_OF_KINDS = {".wav": "sound", ".gif": "video", ".csv": "point"}


def check_samples_file(option, path, kind=None):
    """Raise ValueError for what is no name of a file that samples can be written into, or lies in a folder that isn't
    there; and for one that a kind of data hasn't."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".png", ".npy", *FILES_OF_KINDS) or os.path.isdir(path):
        raise ValueError(f"{option} {path!r} must be a .png, .npy, .wav, .gif or .csv file")
    if kind is not None and FILES_OF_KINDS.get(suffix, kind) != kind:
        raise ValueError(f"{option} {path!r}: {suffix} is of {FILES_OF_KINDS[suffix]}s, this model makes {kind}s")
    check_folder(option, path)


def write_samples(kind, samples, path, columns, captions):
    """Write samples of a kind of data: a grid (.png), an array (.npy), a grid that moves (.gif), sounds (.wav; of
    several path_00.wav, path_01.wav, ...), or points (.csv). Returns what a message calls the files."""
    import numpy as np

    from score_sde.pipelines.sounds import save_wav
    from score_sde.pipelines.writing import whole_file

    stem, suffix = os.path.splitext(path)
    if suffix.lower() == ".npy":
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.stack(samples))
    elif suffix.lower() == ".wav":
        paths = [path] if len(samples) == 1 else [f"{stem}_{number:02}{suffix}" for number in range(len(samples))]
        for sound, each in zip(samples, paths, strict=True):
            save_wav(sound, each, kind.sampling_rate)
        return " to ".join(dict.fromkeys([paths[0], paths[-1]]))
    elif suffix.lower() == ".gif":
        kind.save_moving(samples, path, columns, captions)
    elif suffix.lower() == ".csv":
        write_points(path, samples, kind.coordinates.names, captions)
    else:
        kind.save_grid(samples, path, columns=columns, captions=captions)
    return path


def write_points(path, points, columns, classes=None):
    """Write points (N, columns) as a table with commas, with the names of their classes, where they have any."""
    from score_sde.pipelines.writing import whole_file

    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *(["class"] if classes else [])])
        for i, values in enumerate(points):
            writer.writerow([*(f"{value:.7g}" for value in values), *([classes[i]] if classes else [])])


def check_folder(option, path):
    """Raise ValueError for a file in a folder that isn't there."""
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"{option} {path!r}: there is no such folder; make it first")
