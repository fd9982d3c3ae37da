"""Sound from bytes, and at another sampling rate."""

import importlib.util
import io
import math
import struct
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from score_sde.pipelines.kinds import LARGEST_RATE
from score_sde.pipelines.wording import one_line


# of WAV `read_wave` reads most; the others need soundfile
SOUND_SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".mp3"))
# how the header of a WAV file calls whole and floating-point numbers, and one that says it further on
WHOLE, FLOATING, EXTENSIBLE = 1, 3, 0xFFFE
WIDTHS = {(WHOLE, 1), (WHOLE, 2), (WHOLE, 3), (WHOLE, 4), (FLOATING, 4), (FLOATING, 8)}
# lengths from here on are those of what was written while nobody knew its end
UNKNOWN_LENGTH = 0x7FFFF000
# floating-point sound may go over full scale, but not so far
LOUDEST = 100.0
# values that are read at once
PIECE = 2**20
# zero crossings on each side of the filter, its edge as a share of the lower Nyquist frequency, and its Kaiser window
ZEROS, ROLLOFF, KAISER_BETA = 64, 0.945, 10.0
# numbers that a filter may have: rates without a common divisor would need one that is too long
MOST_TAPS = 2**24


def read_sound(file):
    """(samples (channels, length), float32 in [-1, 1], sampling rate in Hz) of an open file: WAV of whole and of
    floating-point numbers by `read_wave`, and what else soundfile reads, where it is installed.

    Raises ValueError for what cannot be read, is damaged or cut off, holds values that are not finite or far outside of
    [-1, 1], or claims a rate that no sound has.
    """
    data = file.read()
    samples, rate = read_wave(data) or read_others(data)
    if not 1 <= rate <= LARGEST_RATE:
        raise ValueError(f"its sampling rate, {rate:,} Hz, must lie in 1 to {LARGEST_RATE:,}")
    if not np.isfinite(samples).all():
        raise ValueError("it holds values that are not finite (nan, infinite)")
    if samples.size and (largest := float(np.abs(samples).max())) > LOUDEST:
        raise ValueError(f"it holds values up to {largest:g}: sound lies in [-1, 1], divide it by what full scale is")
    return torch.from_numpy(samples), rate


def read_wave(data):
    """(samples (channels, length), float32; rate) of the bytes of a RIFF WAV file of whole numbers of 8 to 32 bits or
    of floating-point ones of 32 or 64; None for another file. Raises ValueError for one whose header contradicts
    itself or what follows it."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    form, place = None, 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        place += 8
        if name == b"fmt ":
            if size < 16 or len(data) < place + size:
                raise ValueError(f"the header of this WAV file is damaged: its format has {size} bytes")
            form = struct.unpack_from("<HHIIHH", data, place)
            if form[0] == EXTENSIBLE and size >= 26:  # which says it further on
                form = struct.unpack_from("<H", data, place + 24) + form[1:]
        elif name == b"data":
            break
        place += size + size % 2
    else:
        raise ValueError("this WAV file is damaged, or cut off: it holds no samples")
    if form is None:
        raise ValueError("the header of this WAV file is damaged: it says no format")
    encoding, channels, rate, _, step, bits = form
    width = -(-bits // 8)
    if (encoding, width) not in WIDTHS:
        return None
    if channels < 1 or step != channels * width:
        raise ValueError(
            f"the header of this WAV file is damaged: {channels} channels of {bits} bits are not {step} bytes"
        )
    there = len(data) - place
    unknown = size >= UNKNOWN_LENGTH or (size == 0 and struct.unpack_from("<I", data, 4)[0] in (0, 0xFFFFFFFF))
    if size > there and not unknown:
        raise ValueError(
            f"it is cut off: its header says {size // step:,} values in each channel, {there // step:,} are there"
        )
    count = (there if unknown else size) // step
    raw = np.frombuffer(data, np.uint8, count * step, place)
    if encoding == FLOATING:
        values = raw.view(f"<f{width}").astype(np.float32)
    elif width == 1:  # without a sign
        values = (raw.astype(np.float32) - 128) / 128
    else:
        # the last bytes of four
        last = np.zeros((len(raw) // width, 4), np.uint8)
        last[:, 4 - width :] = raw.reshape(-1, width)
        values = (last.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    return np.ascontiguousarray(values.reshape(-1, channels).T), rate


def read_others(data):
    """As `read_wave`, of what soundfile reads. Raises ValueError without it, and for what it doesn't."""
    if importlib.util.find_spec("soundfile") is None:
        raise ValueError("it is no WAV file of plain numbers; others need soundfile: pip install soundfile")
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            claimed, rate = file.frames, file.samplerate
            # piece by piece: a header may claim any length
            pieces = [*file.blocks(PIECE, dtype="float32", always_2d=True)] if claimed else []
            samples = np.concatenate(pieces or [np.zeros((0, file.channels), np.float32)])
    except soundfile.SoundFileError as error:
        raise ValueError(f"soundfile cannot read it: {one_line(error)}") from None
    if len(samples) < claimed < UNKNOWN_LENGTH:
        raise ValueError(
            f"it is cut off: its header says {claimed:,} values in each channel, {len(samples):,} are there"
        )
    return np.ascontiguousarray(samples.T), rate


@lru_cache(maxsize=8)
def _filters(up, down):
    """(filters (up, 1, taps), how many of their taps are before the first value) that resample by up / down."""
    # in units of the input's samples
    cutoff = ROLLOFF * min(1.0, up / down)
    width = math.ceil(ZEROS / cutoff)
    taps = 2 * width + down
    if up * taps > MOST_TAPS:
        raise ValueError(f"rates in the proportion {down} to {up} need a filter of {up * taps:,} numbers: too many")
    place = (
        torch.arange(-width, width + down, dtype=torch.float64)
        - torch.arange(up, dtype=torch.float64)[:, None] * down / up
    )
    # sinc, in a Kaiser window that ends at the last zero crossing
    share = (1 - (place * cutoff / ZEROS).square()).clamp_min(0).sqrt()
    window = torch.special.i0(KAISER_BETA * share) / torch.special.i0(torch.tensor(KAISER_BETA, dtype=torch.float64))
    window = torch.where((place * cutoff).abs() <= ZEROS, window, torch.zeros_like(window))
    return (cutoff * torch.sinc(cutoff * place) * window).float()[:, None], width


def resample(samples, rate, new_rate):
    """Samples (channels, length) of one sampling rate at another, by a polyphase filter, a sinc in a Kaiser window
    (Smith, "Digital audio resampling"): what is below 0.89 of the lower Nyquist frequency stays, what is above it goes.
    The length becomes ceil(length new_rate / rate)."""
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    if up == down:
        return samples
    filters, width = _filters(up, down)
    length = -(-samples.shape[-1] * up // down)
    padded = F.pad(samples[:, None], (width, width + down))
    found = F.conv1d(padded, filters, stride=down)  # (channels, up, steps)
    return found.transpose(1, 2).flatten(1)[:, :length]
