"""Sound, videos and arrays as they are read: what they are, and what is refused before any work."""

import io
import math
import re
import wave

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.training.parts.options import parse
from score_sde.training.parts.sounds import read_sound, resample
from score_sde.training.train import TrainConfig


def wav(values, rate=8000, width=2):
    """The bytes of a WAV file of sound (channels, length) in [-1, 1]."""
    whole = np.round(np.atleast_2d(values).T * (2.0 ** (8 * width - 1) - 1)).astype(np.int64)
    raw = whole + 128 if width == 1 else whole
    data = b"".join(int(each).to_bytes(width, "little", signed=width > 1) for each in raw.flatten())
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(whole.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return buffer.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape)


def rows_of(kind, dataset, *options):
    """The rows of a dataset, as training opens them."""
    given = ["--data_kind", kind, "--dataset", str(dataset), "--network_kwargs", "{patch_size: 1}", *map(str, options)]
    return parse(TrainConfig, given).open_rows()


def refused(capsys, kind, dataset, *options):
    """What opening says, as a script or by an error."""
    try:
        rows_of(kind, dataset, *options).statistics()
    except ValueError as error:
        return str(error)
    except SystemExit:
        return capsys.readouterr().err
    return "nothing"


# --- sound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sound_of_every_width_is_read(width):
    values = noise(2, 50)
    found, rate = read_sound(io.BytesIO(wav(values, 11025, width)))
    assert rate == 11025 and found.shape == (2, 50)
    assert np.abs(found.numpy() - values).max() < 1.01 / 2 ** (8 * width - 1) + 1e-6


@pytest.mark.parametrize(("rate", "new_rate"), [(8000, 16000), (16000, 8000), (44100, 8000), (8000, 11025)])
def test_sines_are_resampled_exactly_and_what_is_too_high_is_gone(rate, new_rate):
    lower = min(rate, new_rate) / 2
    times, new_times = np.arange(4000) / rate, np.arange(4000 * new_rate // rate) / new_rate
    for share in (0.01, 0.3, 0.85):
        frequency = share * lower
        found = resample(
            torch.tensor(np.sin(2 * math.pi * frequency * times + 1), dtype=torch.float32)[None], rate, new_rate
        )
        assert abs(found.shape[1] - 4000 * new_rate / rate) <= 1
        truth = np.sin(2 * math.pi * frequency * new_times[: found.shape[1]] + 1)
        inside = slice(found.shape[1] // 4, -found.shape[1] // 4)  # the filter reaches over the ends
        assert np.abs(found[0, : len(truth)].numpy() - truth)[inside].max() < 1e-4
    if new_rate < rate:
        high = torch.tensor(np.sin(2 * math.pi * 1.1 * lower * times), dtype=torch.float32)[None]
        found = resample(high, rate, new_rate)[0]
        assert found[len(found) // 4 : -len(found) // 4].abs().max() < 1e-4


def sounds(folder, **files):
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".wav").write_bytes(data)
    return folder


def test_a_folder_of_sound_has_the_classes_of_its_folders(tmp_path):
    values = {name: noise(1, 20, seed=i) for i, name in enumerate(("a__1", "a__2", "b__3"))}
    rows = rows_of("audio", sounds(tmp_path, **{name: wav(each) for name, each in values.items()}), "--length", 20)
    assert (len(rows), rows.shape, rows.sampling_rate) == (3, (1, 20), 8000)
    assert rows.id2label == {0: "a", 1: "b"} and rows.class_counts == {"a": 2, "b": 1}
    for number, each in enumerate(values.values()):
        assert np.abs(rows[number]["images"].numpy() - each).max() < 1e-4
    assert [rows[i]["labels"] for i in range(3)] == [0, 0, 1]


@pytest.mark.parametrize("feature", ["audio", "bytes"])
def test_a_column_of_sound_is_read_undecoded(tmp_path, feature):
    values = [noise(1, 30, seed=i) for i in range(2)]
    column = [{"bytes": wav(each), "path": None} if feature == "audio" else wav(each) for each in values]
    data = datasets.Dataset.from_dict({"audio": column, "label": [1, 0]})
    if feature == "audio":
        data = data.cast_column("audio", datasets.Audio(decode=False))
    data.to_parquet(tmp_path / "train.parquet")
    rows = rows_of("audio", tmp_path / "train.parquet", "--length", 16, "--label_column", "label")
    assert np.abs(rows[1]["images"].numpy() - values[1][:, :16]).max() < 1e-4 and rows[1]["labels"] == 0


def test_clips_are_filled_up_cut_mixed_and_resampled(tmp_path):
    stereo = noise(2, 12)
    folder = sounds(tmp_path, one=wav(stereo), two=wav(noise(1, 40), 16000))
    rows = rows_of("audio", folder, "--length", 16, "--short_clips", "pad", "--sampling_rate", 8000)
    first = rows[0]["images"].numpy()
    assert np.abs(first[0, :12] - stereo.mean(0)).max() < 1e-4 and (first[0, 12:] == 0).all()
    assert len(rows_of("audio", folder, "--length", 16, "--short_clips", "leave_out", "--sampling_rate", 8000)) == 1
    # random parts: the same for the same key, others in other epochs
    config = parse(
        TrainConfig, ["--data_kind", "audio", "--dataset", str(folder), "--length", "8", "--sampling_rate", "8000"]
    )
    rows = config.open_rows(crop_seed=0)
    parts = [rows[1 + 2 * epoch]["images"] for epoch in range(8)]
    assert torch.equal(parts[0], rows[1]["images"]) and any(not torch.equal(parts[0], each) for each in parts[1:])


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a": wav(noise(1, 30))}, (), "length 0 and audio_channels 1 must be at least 1"),
        ({"a": wav(noise(1, 9))}, ("--length", 32), "row 0 .*9 values, fewer than length 32: pass --short_clips pad"),
        ({"a": wav(noise(1, 9)), "b": wav(noise(1, 9), 16000)}, ("--length", 8), "several sampling rates, 8000 "),
        ({"a": b"RIFF"}, ("--length", 8), "row 0 .*it is no WAV file of whole numbers"),
        ({"a": wav(noise(1, 30)), "b": b""}, ("--length", 8), "row 1 .*it is no WAV file"),
        ({"a": wav(np.zeros(30))}, ("--length", 8), "channel 0 is constant, 0: nothing is to be learned"),
        ({"a": wav(noise(3, 30))}, ("--length", 8, "--audio_channels", 2), "has 3 channels, not audio_channels 2"),
        ({"a": wav(noise(1, 30))}, ("--length", 8, "--streaming"), "streaming is an option for data of the kind image"),
        ({"a": wav(noise(1, 30))}, ("--length", 8, "--short_clips", "loop"), "short_clips 'loop' is unknown"),
    ],
)  # fmt: skip
def test_sound_that_does_not_fit_is_refused(tmp_path, capsys, files, options, message):
    found = refused(capsys, "audio", sounds(tmp_path, **files), *options)
    assert re.search(message, found), found


# --- arrays -------------------------------------------------------------------------------------------------------


def test_arrays_of_every_source_are_the_same(tmp_path):
    values = noise(4, 3, 5, 6).astype(np.float32)
    np.save(tmp_path / "all.npy", values)
    np.savez(tmp_path / "all.npz", array=values, label=np.arange(4) % 2)
    folder = tmp_path / "folder"
    for i, each in enumerate(values):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        np.save(folder / f"class{i % 2}" / f"{i}.npy", each)
    features = datasets.Features({"array": datasets.Array3D((3, 5, 6), "float32"), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"array": list(values), "label": [0, 1, 0, 1]}, features=features)
    data.to_parquet(tmp_path / "all.parquet")
    for source in (tmp_path / "all.npy", tmp_path / "all.npz", tmp_path / "all.parquet", folder):
        rows = rows_of("array", source)
        order = [0, 2, 1, 3] if source == folder else range(4)
        assert rows.shape == (3, 5, 6) and len(rows) == 4
        assert all(np.array_equal(rows[i]["images"], values[each]) for i, each in enumerate(order))
        assert rows.num_classes == (None if source.suffix == ".npy" else 2)
        mean, std = rows.statistics()
        assert np.allclose(mean, values.mean((0, 2, 3)), atol=1e-6) and np.allclose(
            std, values.std((0, 2, 3)), atol=1e-6
        )


def test_the_channels_of_arrays(tmp_path):
    np.save(tmp_path / "a.npy", noise(2, 5, 6, 3))
    assert rows_of("array", tmp_path / "a.npy", "--channel_axis", "last").shape == (3, 5, 6)
    assert rows_of("array", tmp_path / "a.npy", "--channel_axis", "none").shape == (1, 5, 6, 3)
    np.save(tmp_path / "b.npy", noise(2, 7))
    assert rows_of("array", tmp_path / "b.npy").shape == (1, 7)


def test_columns_are_cut_into_windows(tmp_path):
    values = noise(2, 12).astype(np.float32)
    datasets.Dataset.from_dict({"x": values[0], "y": values[1], "z": ["?"] * 12}).to_csv(tmp_path / "train.csv")
    rows = rows_of("array", tmp_path / "train.csv", "--columns", "y", "x", "--length", 5)
    assert len(rows) == 8 and rows.shape == (2, 5)
    assert all(np.allclose(rows[i]["images"], values[::-1, i : i + 5]) for i in range(8))
    with_commas = rows_of("array", tmp_path / "train.csv", "--columns", "y,x", "--length", 5)
    assert torch.equal(with_commas[0]["images"], rows[0]["images"])


class Stop:
    """What a pickle would run."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.array([1.0, np.nan, 2.0] * 4).reshape(3, 4), (), "values that are not finite"),
        (np.stack([noise(4, 5), np.ones((4, 5))], 1), (), "channel 1 is constant, 1:"),
        (np.array([Stop()] * 3, dtype=object), (), "cannot be opened: .*Pickles are not"),
        (np.array([["a", "b"], ["c", "d"]]), (), "holds texts"),
        (noise(3, 4) * 1j, (), "complex numbers"),
        (noise(3, 2, 2, 2, 2, 2), (), "must have 1 to 3 axes"),
        (noise(3, 2, 4, 4), ("--length", 4), r"length 4 is of signals"),
        (noise(3, 8), ("--length", 9), "has 8 values, fewer than length 9"),
        (noise(3, 8), ("--columns", "x", "--length", 4), "columns x are of tables"),
        (np.float64(3.0), (), "must have as many rows"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(tmp_path, capsys, array, options, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    found = refused(capsys, "array", tmp_path / "a.npy", *options)
    assert re.search(message, found), found


def test_arrays_of_several_shapes_are_refused(tmp_path, capsys):
    np.save(tmp_path / "a.npy", noise(3, 4))
    np.save(tmp_path / "b.npy", noise(3, 5))
    assert "several shapes, (3, 4) (row 0), (3, 5) (row 1)" in refused(capsys, "array", tmp_path)
    assert rows_of("array", tmp_path, "--length", 4).shape == (3, 4)


# --- videos -------------------------------------------------------------------------------------------------------


def frames(count=4, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_videos_of_arrays_and_gifs(tmp_path):
    grey = frames()[..., 0]
    np.save(tmp_path / "a.npy", grey)
    rows = rows_of("video", tmp_path, "--frames", 3, "--resolution", 8, "--image_channels", 1, "--frame_rate", 5)
    assert rows.shape == (1, 3, 8, 8) and rows.units == {"frame_rate": 5.0}
    assert np.allclose(rows[0]["images"].numpy()[0], grey[:3] / 127.5 - 1, atol=1e-6)
    (tmp_path / "gif").mkdir()
    images = [Image.fromarray(each) for each in grey]
    images[0].save(tmp_path / "gif" / "b.gif", save_all=True, append_images=images[1:], duration=200, optimize=False)
    rows = rows_of("video", tmp_path / "gif", "--frames", 4, "--resolution", 8, "--image_channels", 1)
    assert rows.frame_rate == 5 and np.abs(rows[0]["images"].numpy()[0] - (grey / 127.5 - 1)).max() < 0.02
    # every second frame, and the last one again
    half = rows_of(
        "video", tmp_path / "gif", "--frames", 3, "--resolution", 8, "--image_channels", 1, "--frame_rate", 2.5,
        "--short_clips", "pad",
    )[0]["images"]  # fmt: skip
    assert np.abs(half.numpy()[0] - (grey[[1, 3, 3]] / 127.5 - 1)).max() < 0.02


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (frames(), (), "doesn't say how many frames it has in a second: pass --frame_rate"),
        (frames(), ("--frame_rate", 5), "has 4 frames, fewer than frames 16: pass --short_clips pad"),
        (frames().astype(float), ("--frame_rate", 5), r"is no video: uint8 \(frames, height, width\)"),
        (frames(), ("--frame_rate", -1), "frame_rate -1.0 must be positive"),
        (frames(), ("--image_channels", 2), "image_channels 2 must be 1 or 3"),
    ],
)
def test_videos_that_do_not_fit_are_refused(tmp_path, capsys, array, options, message):
    np.save(tmp_path / "a.npy", array)
    found = refused(capsys, "video", tmp_path, *options)
    assert re.search(message, found), found
