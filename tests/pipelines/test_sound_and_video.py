"""Sound and videos: what a pipeline returns and takes, and the files that show them."""

import wave

import numpy as np
import pytest
import torch
from diffusers.utils import export_to_gif
from PIL import Image
from tiny import seeded

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines.kinds import kind_of
from score_sde.pipelines.pictures import recordings_of
from score_sde.pipelines.sounds import power, spectrogram


SIZES = {"sound": (1, (64,)), "video": (3, (4, 4, 6)), "sample": (1, (4, 4, 6))}
RATES = {"sound": {"sampling_rate": 8000}, "video": {"frame_rate": 10}, "sample": {}}


def pipeline_of(name, **arguments):
    torch.manual_seed(0)
    channels, size = SIZES[name]
    network = DiTModel(size, (2,) * len(size), channels, 24, 1, 2, num_classes=3, **arguments)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network.eval(), **RATES[name])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **arguments):
    return pipeline(class_labels=[0, 2], num_inference_steps=2, generator=seeded(0), **arguments)


# --- in and out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_every_output_is_of_the_same_samples(name):
    pipeline = pipeline_of(name)
    latent = draw(pipeline, output_type="latent").images
    channels, size = SIZES[name]
    assert latent.shape == (2, channels, *size)
    array, tensor = (draw(pipeline, output_type=each).images for each in ("np", "pt"))
    if name == "video":
        shown = (latent / 2 + 0.5).clamp(0, 1)
        assert tensor.shape == (2, 4, 3, 4, 6) and (tensor - shown.transpose(1, 2)).abs().max() < 1e-6
        assert array.shape == (2, 4, 4, 6, 3) and np.abs(array - tensor.permute(0, 1, 3, 4, 2).numpy()).max() < 1e-6
        frames = draw(pipeline).frames
        assert [len(video) for video in frames] == [4, 4] and frames[0][0].size == (6, 4)
        assert np.abs(np.asarray(frames[1][2]) - array[1, 2] * 255).max() < 1
    else:
        assert torch.equal(tensor, latent) and np.array_equal(array, latent.numpy())
        assert np.array_equal(draw(pipeline).images, array)
        with pytest.raises(ValueError, match=f"this model makes no images but {name}s"):
            draw(pipeline, output_type="pil")


def test_the_rate_comes_with_the_output_and_the_bundle(tmp_path):
    for name, rates in RATES.items():
        pipeline_of(name).save_pretrained(tmp_path / name)
        opened = ScoreSDEPipeline.from_pretrained(tmp_path / name)
        opened.set_progress_bar_config(disable=True)
        output = draw(opened)
        assert opened.kind.name == name
        assert {"sampling_rate": None, "frame_rate": None} | rates == opened.rates
        assert (output.sampling_rate, output.frame_rate) == (rates.get("sampling_rate"), rates.get("frame_rate"))
    assert output.audios is output.images


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_videos_go_in_as_they_come_out(output_type):
    pipeline = pipeline_of("video")
    videos = draw(pipeline, output_type=output_type).frames
    kind, data = pipeline.kind, pipeline.kind.prepare(videos)
    expected = draw(pipeline, output_type="latent").images.clamp(-1, 1)
    assert data.shape == (2, 3, 4, 4, 6) and (data - expected).abs().max() < 0.005
    # one of them, by its frames, and a list of them
    for one in (videos[0], list(videos[0]), [videos[0]]):
        assert torch.equal(kind.prepare(one), data[:1])
    assert torch.equal(kind.prepare(list(videos)), data)
    edited = draw(pipeline, image=videos, strength=0.02, output_type="latent").images
    assert (edited - data).abs().max() < 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "image: videos must be of one size and length, not none"),
        (torch.zeros(4, 1, 4, 6), "this model takes tensors .3, height, width."),
        ([torch.zeros(4, 3, 4, 6), torch.zeros(5, 3, 4, 6)], "videos must be of one size and length"),
        (torch.full((4, 3, 4, 6), 2.0), r"image must be floating-point in \[0, 1\]"),
        ("clip.mp4", "image must be a PIL image, an array or tensor"),
    ],
)
def test_what_are_no_videos(given, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of("video").kind.prepare(given)


def test_videos_of_another_length_are_refused():
    with pytest.raises(ValueError, match="resize the videos from 5 x 4 x 6 to 4 x 4 x 6 pixels"):
        draw(pipeline_of("video"), image=torch.zeros(5, 3, 4, 6))


def test_videos_of_another_height_and_width():
    pipeline = pipeline_of("video", factorized_attention=True)
    assert draw(pipeline, height=6, width=2, output_type="pt").images.shape == (2, 4, 3, 6, 2)
    with pytest.raises(ValueError, match="height 5 must be a multiple of 2 pixels"):
        draw(pipeline, height=5)


@pytest.mark.parametrize(
    ("config", "rates", "name"),
    [
        ({"sample_size": 8, "dimensions": 1}, {}, "signal"),
        ({"sample_size": 8, "dimensions": 1}, {"sampling_rate": 8000}, "sound"),
        ({"sample_size": [4, 8, 8]}, {"frame_rate": 12.5}, "video"),
        ({"sample_size": [4, 8, 8]}, {}, "sample"),
    ],
)
def test_the_rates_say_what_axes_are(config, rates, name):
    kind = kind_of({"in_channels": 2} | config, **rates)
    axes = config.get("dimensions", 3)
    assert kind.name == name and len(kind.sample_shape(1)) == 2 + axes


@pytest.mark.parametrize(
    ("name", "rates", "message"),
    [
        ("sound", {"frame_rate": 10}, "frame_rate 10 is of samples with 3 axes; this network's have 1"),
        ("video", {"sampling_rate": 8000}, "sampling_rate 8000 is of samples with 1 axes; this network's have 3"),
        *(
            ("sound", {"sampling_rate": rate}, "must be a positive number")
            for rate in (0, -1, 0.3, "8000", True, np.inf, 1e300, 10**400)
        ),
    ],
)
def test_rates_that_do_not_fit(name, rates, message):
    network = pipeline_of(name).transformer
    with pytest.raises(ValueError, match=message):
        ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network, **rates)


# --- files --------------------------------------------------------------------------------------------------------


def test_frames_are_what_diffusers_exports(tmp_path):
    frames = draw(pipeline_of("video")).frames[0]
    export_to_gif(frames, str(tmp_path / "video.gif"), fps=10)
    with Image.open(tmp_path / "video.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (4, (6, 4), 100)


def test_a_grid_of_videos_moves(tmp_path):
    """Two videos, each of one colour a frame; they play side by side, at their rate."""
    kind = kind_of({"sample_size": [3, 4, 4], "in_channels": 3}, frame_rate=8)
    videos = [
        [Image.new("RGB", (4, 4), colour) for colour in each] for each in (("red", "lime", "blue"), ("white",) * 3)
    ]
    kind.save_grid(videos, tmp_path / "step-1.png", columns=2)
    found = recordings_of(tmp_path / "step-1.png")
    assert list(found) == [".gif"]
    with Image.open(found[".gif"]) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (3, (128, 64), 120, 0)
        for number, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
            gif.seek(number)
            picture = gif.convert("RGB")
            assert picture.getpixel((32, 32)) == colour and picture.getpixel((96, 32)) == (255, 255, 255)
    sheet = Image.open(tmp_path / "step-1.png")
    assert sheet.size == (2 * 3 * 48, 48) and sheet.getpixel((72, 24)) == (0, 255, 0)
    # with words beneath, both are higher
    kind.save_grid(videos, tmp_path / "step-2.png", columns=2, captions=["a", "b"])
    assert Image.open(tmp_path / "step-2.png").height > 48
    assert Image.open(recordings_of(tmp_path / "step-2.png")[".gif"]).height > 128


def test_a_grid_of_a_frame_a_day_moves_as_slowly_as_a_gif_may(tmp_path):
    kind = kind_of({"sample_size": [2, 4, 4], "in_channels": 3}, frame_rate=1 / 86400)
    kind.save_grid([[Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.gif").info["duration"] == 655_350


def test_sounds_are_heard_as_they_are(tmp_path):
    """Two channels, louder than a file can be in one place; a file has its values to 16 bits."""
    kind = kind_of({"sample_size": [64], "in_channels": 2}, sampling_rate=8000)
    sounds = np.random.default_rng(0).uniform(-1, 1, (20, 2, 64))
    sounds[0, 0, :3] = 2, -2, np.nan
    kind.save_grid(sounds, tmp_path / "samples.png", columns=4)
    found = recordings_of(tmp_path / "samples.png")
    assert list(found) == [f"_{number:02}.wav" for number in range(16)]
    with wave.open(found["_00.wav"]) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes()) == (8000, 2, 2, 64)
        values = np.frombuffer(file.readframes(64), "<i2").reshape(64, 2).T / 32767
    assert np.abs(values - np.nan_to_num(sounds[0]).clip(-1, 1)).max() < 1 / 32767
    assert Image.open(tmp_path / "samples.png").size == (4 * 256, 5 * (48 + 96))
    # of another picture's name are none
    assert recordings_of(tmp_path / "sample.png") == {}


def test_a_spectrogram_shows_a_tone_at_its_place():
    """A sine of 1 kHz at 8 kHz lies at a quarter of the height, in the second half only where it sounds."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(4096) / 8000) * (np.arange(4096) >= 2048)
    found = power(tone[None], window=256)
    assert found.shape[0] == 129 and set(found[:, -30:-5].argmax(0).tolist()) == {32}
    # Parseval: a window's energy, over the frequencies of both signs, is that of its samples
    inside = found[:, -20]
    assert float(2 * inside.sum() / 256) == pytest.approx(float((torch.hann_window(256) ** 2).sum() / 2), rel=0.01)
    picture = np.asarray(spectrogram(tone[None], (256, 96))).astype(int).sum(-1)
    assert abs(int(picture[:, 200].argmax()) - 72) <= 1
    assert picture[:, :100].max() < 20 < picture[72, 200]


def test_a_grid_of_volumes_is_of_slices(tmp_path):
    kind = kind_of({"sample_size": [3, 4, 4], "in_channels": 1})
    volume = np.zeros((1, 1, 3, 4, 4))
    volume[0, 0, 1] = 5
    kind.save_grid(volume, tmp_path / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert picture.shape == (48, 3 * 48) and picture[:, 48:96].min() == 255 and not picture[:, :48].any()
