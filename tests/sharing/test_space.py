"""The Space: what its page draws, the folder that is pushed, and the page itself in a browser."""

import base64
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SCORE_SDE
from huggingface_hub import SpaceCard
from PIL import Image
from tiny import random_dit, tiny_pipeline
from words import prompt_pipeline, worded_network

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler, save_bundle
from score_sde.sharing import space
from score_sde.sharing.space_app import PREDICTORS, draw, guidance_offered, predictors_of


FILES = {"app.py", "space_app.py", "space_text_app.py", "requirements.txt", "README.md"}


def labelled_pipeline(**scheduler):
    pipeline = tiny_pipeline(**scheduler)
    pipeline.register_to_config(id2label={"0": "cat", "1": "dog", "2": "owl"})
    return pipeline


def seeing_pipeline(source, **options):
    """Of colours, which sees an image beside the sample."""
    torch.manual_seed(0)
    network = DiTModel(8, 2, 6, 16, 1, 2, condition_channels=3, **{"num_classes": 3} | options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network.eval(), condition_from=source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_page_draws_what_the_pipeline_draws():
    pipeline = labelled_pipeline()
    grid, way, nfe, _ = draw(pipeline, None, "dpmpp_2m", 5, 2.0, seed=3, num_images=4)
    assert nfe == 5
    assert pipeline.scheduler.config.predictor == "auto"
    pipeline.scheduler.register_to_config(predictor="dpmpp_2m")
    generators = [torch.Generator().manual_seed(3 + i) for i in range(4)]
    images = pipeline(class_labels=[0, 1, 2, 0], guidance_scale=2.0, num_inference_steps=5, generator=generators).images
    # two rows of a column for every class, in tiles of 96 pixels
    assert grid.size == (3 * 96, 2 * 96)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        tile = np.asarray(grid.convert("L"))[row * 96 : row * 96 + 96, column * 96 : column * 96 + 96]
        assert (tile == np.asarray(image).repeat(24, 0).repeat(24, 1)).all()
    # at the end the network takes the first image for what it becomes
    assert way.size == (5 * 96, 2 * 96)
    last = np.asarray(way.convert("L")).astype(int)[96:, -96:]
    assert abs(last - np.asarray(images[0]).astype(int).repeat(24, 0).repeat(24, 1)).max() <= 3


@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_page_draws_by_words(num_classes):
    """The lines of the prompt in turn; the first one's way ends in what it becomes."""
    pipeline = prompt_pipeline(worded_network(num_classes=num_classes))
    label = None if num_classes is None else ""
    arguments = {"prompt": "a red hat\n\n the blue bag \n", "negative_prompt": "dots"}
    grid, way, *_ = draw(pipeline, label, "ddim", 5, 4.0, seed=3, num_images=4, **arguments)
    pipeline.scheduler.register_to_config(predictor="ddim")
    generators = [torch.Generator().manual_seed(3 + i) for i in range(4)]
    images = pipeline(
        prompt=["a red hat", "the blue bag"] * 2,
        negative_prompt="dots",
        guidance_scale=4.0,
        num_inference_steps=5,
        generator=generators,
    ).images
    assert grid.size == (2 * 96, 2 * 96)
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        tile = np.asarray(grid.convert("L"))[row * 96 : row * 96 + 96, column * 96 : column * 96 + 96]
        assert (tile == np.asarray(image).repeat(24, 0).repeat(24, 1)).all()
    last = np.asarray(way.convert("L")).astype(int)[96:, -96:]
    assert abs(last - np.asarray(images[0]).astype(int).repeat(24, 0).repeat(24, 1)).max() <= 3
    # an empty prompt is none
    nothing, *_ = draw(pipeline, label, "ddim", 2, 3.0, seed=3, num_images=1, prompt=" ")
    none = pipeline(num_inference_steps=2, generator=[torch.Generator().manual_seed(3)]).images[0]
    assert (np.asarray(nothing.convert("L")) == np.asarray(none).repeat(24, 0).repeat(24, 1)).all()
    for wrong in ({"prompt": "x" * 2001}, {"prompt": ["a"]}, {"prompt": "", "negative_prompt": "a\nb"}):
        with pytest.raises(ValueError, match="must be a text of at most 2000 characters|must be one line"):
            draw(pipeline, label, "auto", 2, 3.0, seed=3, num_images=1, **wrong)


@pytest.mark.parametrize("source", [None, "downsample:2"])
def test_the_page_draws_beside_an_image(source):
    """A visitor's picture of any size and kind, upright, cut around the middle and made of the size that the model
    takes."""
    pipeline = seeing_pipeline(source)
    side = 8 if source is None else 4
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    grid, way, *_ = draw(pipeline, "", "ddim", 4, 2.0, seed=3, num_images=2, condition_image=picture)
    pipeline.scheduler.register_to_config(predictor="ddim")
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    images = pipeline(
        2, condition_image=picture, guidance_scale=2.0, num_inference_steps=4, generator=generators
    ).images
    assert grid.size == (2 * 96, 96)
    for i, image in enumerate(images):
        tile = np.asarray(grid)[:, i * 96 : i * 96 + 96]
        assert (tile == np.asarray(image).repeat(12, 0).repeat(12, 1)).all()
    last = np.asarray(way).astype(int)[96:, -96:]
    assert abs(last - np.asarray(images[0]).astype(int).repeat(12, 0).repeat(12, 1)).max() <= 3
    # as large as it likes
    wide = Image.new("RGBA", (3 * side, side), "red")
    wide.paste(picture, (side, 0))
    assert draw(pipeline, "", "ddim", 4, 2.0, seed=3, num_images=2, condition_image=wide)[0] == grid
    lying = wide.transpose(Image.Transpose.ROTATE_90).convert("RGB")
    lying.getexif()[0x0112] = 6  # to be turned by a quarter
    assert draw(pipeline, "", "ddim", 4, 2.0, seed=3, num_images=2, condition_image=lying)[0] == grid
    with pytest.raises(ValueError, match="the image 'x+' must be a picture"):
        draw(pipeline, "", "ddim", 4, 2.0, seed=3, num_images=2, condition_image="x" * 100)
    assert draw(pipeline, "", "ddim", 4, 1.0, seed=3, num_images=2)[2] == 4
    always = seeing_pipeline(source, num_classes=None, class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="this network always saw an image beside the sample: pass condition_image"):
        draw(always, None, "ddim", 4, 1.0, seed=3, num_images=2)


@pytest.mark.parametrize("sde_type", ["vp", "ve", "linear"])
def test_every_sampler_of_the_page_draws(sde_type):
    pipeline = labelled_pipeline(sde_type=sde_type)
    for predictor in PREDICTORS:
        grid, way, *_ = draw(pipeline, "dog", predictor, 12, 1.5, seed=0, num_images=2)
        assert (grid.size, way.size) == ((2 * 96, 96), (10 * 96, 2 * 96)), predictor
    unconditional = tiny_pipeline(network=random_dit(num_classes=None), sde_type=sde_type)
    assert draw(unconditional, None, "auto", 1, 1.0, seed=0, num_images=1)[2] == 1


def test_the_page_offers_the_samplers_of_a_map():
    model = tiny_pipeline(network_map="consistency", map_steps=2)
    assert predictors_of(model) == ("auto",) and draw(model, 1, "auto", 2, 1.0, seed=0, num_images=1)[2] == 2
    with pytest.raises(ValueError, match="sampler 'ddim' is unknown; choose one of auto"):
        draw(model, 1, "ddim", 2, 1.0, seed=0, num_images=1)
    flow = tiny_pipeline(network=random_dit().with_two_times(), network_map="flow_map")
    assert predictors_of(flow) == PREDICTORS
    for predictor in ("auto", "ddim"):
        assert draw(flow, 1, predictor, 2, 1.0, seed=0, num_images=1)[2] == 2


@pytest.mark.parametrize("learned", [{}, {"folded_guidance": 1.5}, {"guidance_embeds": True}], ids=str)
@pytest.mark.parametrize("worded", [True, False])
def test_the_page_begins_with_guidance_that_the_network_takes(worded, learned):
    pipeline = tiny_pipeline(network=DiTModel(4, 2, 1, 16, 1, 2, num_classes=3, **learned))
    if worded:
        pipeline = prompt_pipeline(worded_network(**learned))
    scale, guided, rather_not = guidance_offered(pipeline)
    assert guided == ("folded_guidance" not in learned) and rather_not == (worded and not learned)
    words = {"prompt": "a red hat", "negative_prompt": "dots" if rather_not else ""} if worded else {}
    draw(pipeline, None, "ddim", 1, scale, seed=0, num_images=1, **words)
    if guided:
        draw(pipeline, None, "ddim", 1, scale + 1, seed=0, num_images=1, **words)
    if worded and not rather_not:
        with pytest.raises(ValueError, match="negative_prompt: this network has learned its guidance"):
            draw(pipeline, None, "ddim", 1, scale, seed=0, num_images=1, **words | {"negative_prompt": "dots"})


@pytest.mark.parametrize("domain", ["torus", None])
def test_the_page_draws_points(domain):
    """Every sampler that it offers draws them, all on their way, a plot for each class."""
    torch.manual_seed(0)
    network = DiTModel((1,), (1,), 2, 16, 1, 2, num_classes=2)
    torch.nn.init.normal_(network.proj_out.weight, std=0.1)
    stated = {"sde_type": "ve", "domain": "torus", "prediction_type": "score"} if domain else {}
    pipeline = ScoreSDEPipeline(
        ScoreSDEScheduler(**stated), transformer=network.eval(), columns="phi,psi", id2label={"0": "alpha", "1": "beta"}
    )
    pipeline.set_progress_bar_config(disable=True)
    one, *_ = draw(pipeline, "beta", "ddim", 4, 1.0, seed=5, num_images=70)
    for predictor in predictors_of(pipeline):
        grid, way, nfe, players = draw(pipeline, None, predictor, 4, 1.5, seed=5, num_images=70)
        assert (grid.size, way.size) == ((2 * one.width, one.height), (4 * one.width, one.height)) and players == ""
    with pytest.raises(ValueError, match="points '2001' must be a whole number from 1 to 2000"):
        draw(pipeline, None, "auto", 4, 1.0, seed=5, num_images=2001)
    if domain:
        with pytest.raises(ValueError, match="sampler 'dpmpp_2m' is unknown; choose one of auto, ddim, heun, deis_2"):
            draw(pipeline, None, "dpmpp_2m", 4, 1.0, seed=5, num_images=2)


def test_the_folder_is_a_space(tmp_path):
    folder = Path(space.write_space(tmp_path / "space", "me/model"))
    assert {path.name for path in folder.iterdir()} == FILES
    data = SpaceCard.load(folder / "README.md").data
    assert (data.sdk, data.app_file, data.models, data.title) == ("gradio", "app.py", ["me/model"], "model")
    app = (folder / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert 'from_pretrained("me/model", trust_remote_code=True)' in app
    for line in (folder / "requirements.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z]+==[0-9]+(\.[0-9]+)+", line), line
    assert os.listdir(tmp_path) == ["space"]
    with pytest.raises(ValueError, match="exists: choose another"):
        space.write_space(folder, "me/model")
    for model in (str(tmp_path), "model", 'me/model", exec("...")'):
        with pytest.raises(ValueError, match="push .* and pass its id, somebody/model|must be like somebody/model"):
            space.write_space(tmp_path / "other", model)


@pytest.mark.slow
def test_a_space_is_pushed_and_renewed(local_hub):
    for _ in range(2):
        result = local_hub.run(SCORE_SDE, "space", "me/model", "--push", "me/page", "--private", token="hf_writer")
        assert result.returncode == 0, result.stderr
    files = local_hub.files("me/page", repo_type="space")
    assert set(files) == {".gitattributes", *FILES}
    assert local_hub.repos["space", "me/page"].private
    result = local_hub.run(SCORE_SDE, "space", "me/model", "--push", "you/page", "--private", token="hf_writer")
    assert result.returncode == 2
    assert "error: you/page was not pushed: the token may not do that" in result.stderr
    assert "hf_writer" not in result.stderr and "Traceback" not in result.stderr


# as on the Hub, where this package is not installed
WITHOUT_PACKAGE = """
import runpy, sys
sys.modules["score_sde"] = None
sys.path.insert(0, "")
runpy.run_path("app.py", run_name="__main__")
"""
CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update", "--window-size=1280,1000"]


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_the_space_draws_in_a_browser(local_hub, tmp_path):
    pytest.importorskip("gradio")
    webdriver = pytest.importorskip("selenium.webdriver")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    bundle = Path(save_bundle(labelled_pipeline(), tmp_path / "bundle"))
    files = {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    local_hub.put("me/model", files)
    folder = space.write_space(tmp_path / "space", "me/model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | local_hub.environment(tmp_path / "home")
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    log = tmp_path / "log"
    with open(log, "w") as output:
        app = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_PACKAGE], cwd=folder, env=environment, stdout=output, stderr=output
        )
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in [*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(argument)
    try:
        wait_for(lambda: app.poll() is not None or "Running on local URL" in log.read_text())
        assert app.poll() is None, log.read_text()
        page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            page.get(f"http://127.0.0.1:{port}")
            buttons = lambda: [each for each in page.find_elements("tag name", "button") if each.text == "Draw"]  # noqa: E731
            wait_for(buttons)[0].click()
            wait_for(lambda: "Images after 20 network evaluations of auto" in page.page_source)
            pictures = wait_for(lambda: page.find_elements("css selector", "img[src*='gradio_api/file']"))
            assert len(pictures) == 2
            widths = wait_for(lambda: [int(each.get_attribute("naturalWidth")) for each in pictures])
            assert widths == [3 * 96, 10 * 96]
            page.save_screenshot(str(tmp_path / "page.png"))
        finally:
            page.quit()
    finally:
        app.terminate()
        app.wait()


@pytest.mark.parametrize("name", ["sound", "video"])
def test_the_page_plays(name):
    """What it plays are the samples that the pipeline draws."""
    size, rates = {"sound": ((64,), {"sampling_rate": 8000}), "video": ((4, 8, 8), {"frame_rate": 5})}[name]
    torch.manual_seed(0)
    network = DiTModel(size, (2,) * len(size), 1, 24, 1, 2, num_classes=None)
    torch.nn.init.normal_(network.proj_out.weight, std=0.1)
    pipeline = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network.eval(), **rates)
    pipeline.set_progress_bar_config(disable=True)
    grid, way, nfe, players = draw(pipeline, None, "ddim", 3, 1.0, seed=5, num_images=2)
    pipeline.scheduler.register_to_config(predictor="ddim")
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    samples = pipeline(2, num_inference_steps=3, generator=generators, output_type="np").images
    found = [base64.b64decode(each) for each in re.findall(r'base64,([^"]+)"', players)]
    assert nfe == 3 and grid.width > 100 and way.width > 100
    if name == "sound":
        assert len(found) == 2
        with wave.open(io.BytesIO(found[1])) as file:
            values = np.frombuffer(file.readframes(64), "<i2") / 32767
        assert file.getframerate() == 8000 and np.abs(values - samples[1, 0].clip(-1, 1)).max() < 1e-4
    else:
        with Image.open(io.BytesIO(found[0])) as gif:
            assert len(found) == 1 and (gif.n_frames, gif.info["duration"], gif.size) == (4, 200, (128, 64))
            gif.seek(2)
            second = np.asarray(gif.convert("L"))[:, 64:].reshape(8, 8, 8, 8)[:, 0, :, 0]
        assert np.abs(second - 255 * samples[1, 2, :, :, 0]).max() < 3
