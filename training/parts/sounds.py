"""Sound from bytes, and at another sampling rate."""

import importlib.util
import math
import wave
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F


# what the standard library reads; the others need soundfile
SOUND_SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".mp3"))
# zero crossings on each side of the filter, its edge as a share of the lower Nyquist frequency, and its Kaiser window
ZEROS, ROLLOFF, KAISER_BETA = 64, 0.945, 10.0
# numbers that a filter may have: rates without a common divisor would need one that is too long
MOST_TAPS = 2**24


def read_wave(file):
    """(bytes, channels, bytes of a value, rate) of an open WAV file of whole numbers."""
    with wave.open(file, "rb") as reader:
        data = reader.readframes(reader.getnframes())
        return data, reader.getnchannels(), reader.getsampwidth(), reader.getframerate()


def read_sound(file):
    """(samples (channels, length), float32 in [-1, 1], sampling rate in Hz) of an open file: WAV of whole numbers by
    the standard library, and what else soundfile reads, where it is installed.

    Raises ValueError for what cannot be read.
    """
    try:
        data, channels, width, rate = read_wave(file)
    except (wave.Error, EOFError) as error:
        if importlib.util.find_spec("soundfile") is None:
            raise ValueError(f"it is no WAV file of whole numbers ({error}); others need soundfile") from None
        import soundfile

        file.seek(0)
        try:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as other:
            raise ValueError(f"soundfile cannot read it: {other}") from None
        return torch.from_numpy(np.ascontiguousarray(samples.T)), rate
    data = data[: len(data) // (width * channels) * width * channels]
    if width == 1:  # without a sign
        values = np.frombuffer(data, np.uint8).astype(np.float32) - 128
    else:
        # the last bytes of four
        raw = np.zeros((len(data) // width, 4), np.uint8)
        raw[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
        values = (raw.view("<i4")[:, 0] / 2.0 ** (32 - 8 * width)).astype(np.float32)
    return torch.from_numpy(values.reshape(-1, channels).T / 2.0 ** (8 * width - 1)).contiguous(), rate


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
