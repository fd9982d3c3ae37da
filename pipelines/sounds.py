"""Sound as files and as pictures: WAV of 16 bits, and spectrograms."""

import wave

import numpy as np
import torch
from PIL import Image

from .writing import whole_file


# decibels below the loudest that a spectrogram shows
RANGE = 80
# from silence to the loudest
COLOURS = np.array([(0, 0, 4), (80, 18, 123), (182, 54, 121), (251, 136, 97), (252, 253, 191)], dtype=np.float64)


def save_wav(signal, path, sampling_rate):
    """Write sound, an array (channels, samples) in [-1, 1], as a WAV file of 16 bits at a rate in Hz. What is louder is
    cut off, as a loudspeaker would; nan is silence."""
    values = (np.nan_to_num(signal).clip(-1, 1) * 32767).round().astype("<i2")
    with whole_file(path) as temporary, wave.open(temporary, "wb") as file:
        file.setnchannels(len(values))
        file.setsampwidth(2)
        file.setframerate(round(sampling_rate))
        file.writeframes(values.T.tobytes())


def power(signal, window=256, hop=64):
    """The power of sound (channels, samples) by frequency and time, the channels' sum, (window / 2 + 1, times): of
    windows of so many samples, from the lowest frequency, 0, to half the sampling rate."""
    signal = torch.as_tensor(np.nan_to_num(signal), dtype=torch.float32)
    signal = torch.nn.functional.pad(signal, (window // 2, window // 2))
    shape = torch.hann_window(window)
    return torch.stft(signal, window, hop, window=shape, center=False, return_complex=True).abs().square().sum(0)


def spectrogram(signal, size=(256, 96)):
    """A picture (width, height) of sound (channels, samples): time to the right, frequency up, `RANGE` decibels from
    black to bright."""
    found = power(signal, hop=max(1, signal.shape[-1] // size[0]))
    decibels = 10 * (found / found.max().clamp_min(1e-20)).clamp_min(1e-20).log10()
    bright = (1 + decibels / RANGE).clamp(0, 1).numpy()[::-1]
    place = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(bright, place, channel) for channel in COLOURS.T], axis=-1)
    return Image.fromarray(colours.round().astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
