"""Frames of videos: of files that a decoder reads, of GIFs, and of arrays."""

import importlib.util
import io
import zipfile

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from score_sde.pipelines.wording import few, one_line


VIDEO_SUFFIXES = frozenset((".gif", ".webp", ".npy", ".npz", ".mp4", ".mov", ".avi", ".mkv", ".webm"))
# how files of arrays begin
ARRAYS, ARCHIVES = b"\x93NUMPY", b"PK\x03\x04"
# bytes of the array of one sample, which a small archive may claim to hold
MOST_BYTES = 2**32
# pixels of the frames of a video that are held at once
MOST_HELD = 2**29


def read_array(data):
    """The array in the bytes of an .npy file, or the one in an .npz file. Raises ValueError for what is none, for
    several, for more than `MOST_BYTES`, and for pickles, which are not opened."""
    try:
        size = 0
        if data.startswith(ARCHIVES):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                size = sum(each.file_size for each in archive.infolist())
        found = {} if size > MOST_BYTES else np.load(io.BytesIO(data), allow_pickle=False)
        arrays = {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in list(found)[:2]}
    except Exception as error:  # whatever a reader raises
        if "allow_pickle" in str(error):
            raise ValueError("it holds pickled objects, which are not opened: save arrays of numbers") from None
        raise ValueError(f"it is damaged, or cut off: {one_line(error)}") from None
    if size > MOST_BYTES:
        raise ValueError(f"unpacked it would have {size:,} bytes, more than {MOST_BYTES:,}")
    if len(arrays) != 1:
        raise ValueError(f"it holds {len(found)} arrays ({few(found, 5)}), not one")
    return next(iter(arrays.values()))


def read_frames(data, shrink, most):
    """([shrink(PIL image), ...], when they are shown, frames in a second) of the bytes of a video: of an array, uint8
    (frames, height, width) or (frames, height, width, 1 or 3), a GIF or another picture that moves, by Pillow, or
    anything that PyAV reads, where it is installed.

    When is an array of seconds (frames + 1,), at which each begins and the last ends. It and the rate are None where
    nothing says.

    Raises ValueError for what is none, what is damaged, and for more than `most` frames.
    """
    if data.startswith((ARRAYS, ARCHIVES)):
        return held(((frame, 0.0, 0.0) for frame in frames_of(read_array(data))), shrink, most)[0], None, None
    try:
        image = Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG"))
    except UnidentifiedImageError:
        return decode(data, shrink, most)
    except OSError as error:
        raise ValueError(f"it is damaged, or cut off: {one_line(error)}") from None
    frames, times = held(frames_of_picture(image), shrink, most)
    return (frames, times, len(frames) / times[-1]) if times[-1] else (frames, None, None)


def held(shown, shrink, most):
    """([shrink(image), ...], times) of (PIL image, begin, end) in turn."""
    frames, begins, last = [], [], 0.0
    for image, begin, end in shown:
        if len(frames) == most:
            raise ValueError(
                f"it has more than the {most:,} frames that are held of this size: cut it into shorter ones"
            )
        frames.append(shrink(image))
        begins.append(begin)
        last = end
    return frames, np.array([*begins, last], dtype=np.float64)


def frames_of_picture(image):
    """(RGB or RGBA image, begin, end in seconds) of the frames of a picture that moves."""
    end = 0.0
    try:
        for frame in ImageSequence.Iterator(image):
            begin, end = end, end + (frame.info.get("duration") or 0) / 1000
            yield frame.convert("RGBA" if frame.has_transparency_data else "RGB"), begin, end
    except Exception as error:  # whatever Pillow raises
        raise ValueError(f"it is damaged, or cut off: {one_line(error)}") from None


def frames_of(array):
    """PIL images of an array of frames. Raises ValueError for another than `read_frames` names."""
    channels = array.shape[3:] or (1,)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or channels[0] not in (1, 3) or not array.size:
        raise ValueError(
            f"an array {array.dtype} {array.shape} is no video: uint8 (frames, height, width) or (frames, height, "
            f"width, 3) is; other numbers are --data_kind array"
        )
    return [Image.fromarray(frame) for frame in (array.squeeze(-1) if array.shape[3:] == (1,) else array)]


def decode(data, shrink, most):
    """`read_frames` by PyAV."""
    if importlib.util.find_spec("av") is None:
        raise ValueError("it is neither an array nor a GIF; other videos need PyAV: pip install av")
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise ValueError("it holds no video")
            stream = container.streams.video[0]
            rate = stream.average_rate and float(stream.average_rate)
            frames, times = held(frames_of_stream(container, stream, rate), shrink, most)
            # of one stream alone: others may go on when the pictures have ended
            claimed = container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0
    except av.FFmpegError as error:
        raise ValueError(f"PyAV cannot read it: {one_line(error)}") from None
    if not frames:
        raise ValueError("it holds no frames")
    if not times[-1]:
        return frames, None, None
    rate = rate or len(frames) / times[-1]
    times -= times[0]
    if times[-1] < claimed - 3 / rate:
        raise ValueError(f"it is cut off: of {claimed:.4g} seconds it has frames of {times[-1]:.4g}")
    return frames, times, rate


def frames_of_stream(container, stream, rate):
    """(RGB image, upright; begin, end in seconds) of the frames of a video; without times, as its rate says."""
    begin = None
    for number, frame in enumerate(container.decode(stream)):
        before, begin = begin, frame.time
        if begin is None:
            begin = number / rate if rate else 0.0
        lasts = (
            float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 1 / rate if rate else 0
        )
        begin = begin if before is None else max(begin, before)
        image = frame.to_image()
        yield image.rotate(frame.rotation, expand=True) if frame.rotation else image, begin, begin + lasts
