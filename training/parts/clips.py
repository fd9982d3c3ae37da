"""Frames of videos: of files that a decoder reads, of GIFs, and of arrays."""

import importlib.util
import io

import numpy as np
from PIL import Image, ImageSequence


VIDEO_SUFFIXES = frozenset((".gif", ".webp", ".npy", ".npz", ".mp4", ".mov", ".avi", ".mkv", ".webm"))
# how files of arrays begin
ARRAYS, ARCHIVES = b"\x93NUMPY", b"PK\x03\x04"


def read_array(data):
    """The array in the bytes of an .npy file, or the one in an .npz file. Raises ValueError for what is none, for
    several, and for pickles, which are not opened."""
    found = np.load(io.BytesIO(data), allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    if len(found.files) != 1:
        raise ValueError(f"it holds {len(found.files)} arrays ({', '.join(found.files[:5])}), not one")
    return found[found.files[0]]


def read_frames(data):
    """([PIL image, ...], frames in a second or None) of the bytes of a video: of an array, uint8 (frames, height,
    width) or (frames, height, width, 1 or 3), a GIF or another picture that moves, by Pillow, or anything that PyAV
    reads, where it is installed.

    Raises ValueError for what is none.
    """
    if data.startswith((ARRAYS, ARCHIVES)):
        array = read_array(data)
        return frames_of(array), None
    try:
        image = Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG"))
    except OSError:
        return decode(data)
    frames, milliseconds = [], []
    for frame in ImageSequence.Iterator(image):
        frames.append(frame.convert("RGBA" if frame.has_transparency_data else "RGB"))
        milliseconds.append(frame.info.get("duration") or 0)
    seconds = sum(milliseconds) / 1000
    return frames, len(frames) / seconds if seconds else None


def frames_of(array):
    """PIL images of an array of frames. Raises ValueError for another than `read_frames` names."""
    channels = array.shape[3:] or (1,)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or channels[0] not in (1, 3):
        raise ValueError(
            f"an array {array.dtype} {array.shape} is no video: uint8 (frames, height, width) or (frames, height, "
            f"width, 3) is; other numbers are --data_kind array"
        )
    return [Image.fromarray(frame) for frame in (array.squeeze(-1) if array.shape[3:] == (1,) else array)]


def decode(data):
    """`read_frames` by PyAV."""
    if importlib.util.find_spec("av") is None:
        raise ValueError("it is neither an array nor a GIF; other videos need PyAV: pip install av")
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate
            return [frame.to_image() for frame in container.decode(stream)], float(rate) if rate else None
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"PyAV cannot read it: {error}") from None
