"""Attacks on the page: many visitors at once, and requests that no slider of the page would send."""

import threading
import time

import numpy as np
import pytest
from tiny import random_dit, tiny_pipeline

from score_sde.sharing import space_app
from score_sde.sharing.space_app import PREDICTORS, draw


ARGUMENTS = {"label": 1, "predictor": "auto", "num_inference_steps": 3, "guidance_scale": 1.5, "seed": 0}
ARGUMENTS |= {"num_images": 2}


def pictures(pipeline, **arguments):
    return [np.asarray(image).astype(int) for image in draw(pipeline, **ARGUMENTS | arguments)[:2]]


def test_visitors_do_not_disturb_each_other():
    """Every one gets the pictures that it gets alone, while all draw at once with other samplers and step counts."""
    pipeline = tiny_pipeline()
    wanted = [
        {"predictor": predictor, "num_inference_steps": steps, "seed": seed}
        for seed, (predictor, steps) in enumerate(zip(PREDICTORS, (3, 4, 5, 6, 7, 4, 3, 5, 6), strict=True))
    ]
    alone = [pictures(pipeline, **arguments) for arguments in wanted]
    config, found, start = dict(pipeline.scheduler.config), {}, threading.Barrier(len(wanted))
    denoiser, forward = pipeline.denoiser, pipeline.denoiser.forward

    def slowly(*args, **kwargs):
        time.sleep(0.001)  # the others go on
        return forward(*args, **kwargs)

    def visit(number):
        start.wait()
        try:
            found[number] = pictures(pipeline, **wanted[number])
        except Exception as error:
            found[number] = error

    denoiser.forward = slowly
    threads = [threading.Thread(target=visit, args=(number,)) for number in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert not isinstance(found[number], Exception), found[number]
        for ours, theirs in zip(found[number], expected, strict=True):
            assert abs(ours - theirs).max() <= 1, wanted[number]
    assert dict(pipeline.scheduler.config) == config


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_inference_steps", 0, "time steps '0' must be a whole number from 1 to 100"),
        ("num_inference_steps", 10**9, "time steps '1000000000' must be a whole number"),
        ("num_inference_steps", 2.5, "time steps '2.5' must be a whole number"),
        ("num_inference_steps", None, "time steps 'None' must be a whole number"),
        ("num_images", 10**6, "images '1000000' must be a whole number from 1 to 64"),
        ("num_images", True, "images 'True' must be a whole number"),
        ("num_images", float("nan"), "images 'nan' must be a whole number"),
        ("seed", -1, "seed '-1' must be a whole number from 0"),
        ("seed", 2**64, "seed '18446744073709551616' must be a whole number"),
        ("seed", float("inf"), "seed 'inf' must be a whole number"),
        ("seed", "x" * 10**7, "seed 'xxx"),
        ("guidance_scale", float("nan"), "guidance scale 'nan' must be a number from 0 to 20"),
        ("guidance_scale", 1e30, r"guidance scale '1e\+30' must be a number"),
        ("guidance_scale", "2", "guidance scale '2' must be a number"),
        ("predictor", "euler\n", "sampler .* is unknown; choose one of auto, ddim"),
        ("predictor", ["ddim"], "sampler .* is unknown"),
        ("label", 3, "class label 3 is out of range"),
        ("label", -1, "class label -1 is out of range"),
        ("label", "owl", "class name 'owl' is unknown"),
        ("label", [0, 1], "must be the name or the number of one"),
        ("label", 0.5, "must be the name or the number of one"),
    ],
)
def test_what_no_slider_sends_is_refused_before_any_work(argument, value, message):
    pipeline = tiny_pipeline()
    pipeline.denoiser.forward = None
    with pytest.raises(ValueError, match=message) as error:
        draw(pipeline, **ARGUMENTS | {argument: value})
    assert len(str(error.value)) < 1000


def test_numbers_as_a_browser_sends_them():
    pipeline = tiny_pipeline()
    whole = pictures(pipeline)
    for ours, theirs in zip(pictures(pipeline, num_inference_steps=3.0, seed=0.0, num_images=2.0), whole, strict=True):
        assert (ours == theirs).all()


def test_guidance_of_a_model_without_classes_is_refused():
    with pytest.raises(ValueError, match="needs a class-conditional network"):
        draw(tiny_pipeline(network=random_dit(num_classes=None)), **ARGUMENTS | {"label": None})


def test_a_title_is_text():
    """As gradio's Markdown shows it: MarkdownIt, which it is made of."""
    markdown_it = pytest.importorskip("markdown_it")
    title = "# a\n\n## b <img src=x onerror=y> [c](javascript:d) `e` \\ | *f* <script>"
    tokens = markdown_it.MarkdownIt("commonmark").parse("# " + space_app.as_title(title))
    assert [token.type for token in tokens] == ["heading_open", "inline", "heading_close"]
    [text] = tokens[1].children
    assert text.content == " ".join(title.split())
