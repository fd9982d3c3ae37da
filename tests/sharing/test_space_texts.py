"""The page of a Space of texts: what it shows while a text forms, and what no field of it may send."""

import threading

import pytest
import torch
from texts import characters_pipeline

from score_sde import ScoreSDETextPipeline, save_bundle
from score_sde.sharing import space, space_app, space_text_app
from score_sde.sharing.space_text_app import write


ARGUMENTS = {"prompt": "ab", "label": 1, "num_inference_steps": 6, "temperature": 0.8, "guidance_scale": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def pipeline():
    return characters_pipeline(num_classes=2, id2label={0: "prose", 1: "verse"})


def test_the_page_writes_what_the_pipeline_writes(pipeline):
    *frames, (text, nfe) = write(pipeline, **ARGUMENTS)
    output = pipeline(
        prompt="ab",
        class_labels="verse",
        num_inference_steps=6,
        temperature=0.8,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(3),
    )
    assert ([text], nfe) == (output.texts, output.nfe)
    assert len(frames) >= 2 and all(shown.startswith("ab") and known is None for shown, known in frames)
    gaps = [shown.count("\u2591") for shown, _ in frames]
    assert gaps[0] > 0 and gaps == sorted(gaps, reverse=True)
    # without prompt and class
    *_, (text, _) = write(pipeline, **ARGUMENTS | {"prompt": "", "label": None, "guidance_scale": 1})
    limits = {"num_inference_steps": 6, "temperature": 0.8}
    assert [text] == pipeline(**limits, generator=torch.Generator().manual_seed(3)).texts


def test_visitors_do_not_disturb_each_other(pipeline):
    wanted = [ARGUMENTS | {"seed": seed, "num_inference_steps": 3 + seed} for seed in range(6)]
    alone = [list(write(pipeline, **arguments))[-1] for arguments in wanted]
    found, start = {}, threading.Barrier(len(wanted))

    def visit(number):
        start.wait()
        found[number] = list(write(pipeline, **wanted[number]))[-1]

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(wanted))] == alone


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_inference_steps", 0, "time steps '0' must be a whole number from 1 to 256"),
        ("num_inference_steps", 2.5, "time steps '2.5' must be a whole number"),
        ("num_inference_steps", 10**9, "must be a whole number from 1 to 256"),
        ("num_inference_steps", "3", "must be a whole number"),
        ("temperature", float("nan"), "temperature 'nan' must be a number from 0 to 2"),
        ("temperature", -1, "temperature '-1' must be"),
        ("guidance_scale", True, "guidance scale 'True' must be a number"),
        ("seed", -1, "seed '-1' must be a whole number"),
        ("seed", 10**30, "must be a whole number from 0"),
        ("label", "song", "song"),
        ("label", 7, "7"),
        ("label", True, "class 'True' must be the name or the number of one"),
        ("label", [1], "class '.1.' must be"),
        ("prompt", "a" * 10**5, "prompt 'a+' must be a text of at most 4000 characters"),
        ("prompt", ["a"], "must be a text"),
        ("prompt", "a" * 20, "has 20 tokens, more than the length 12"),
        ("prompt", "A", "the tokenizer has no token for 'A'"),
    ],
)
def test_what_no_field_would_send_is_refused(pipeline, argument, value, message):
    with pytest.raises(ValueError, match=message):
        list(write(pipeline, **ARGUMENTS | {argument: value}))


def test_the_page_of_a_folder_is_that_of_its_kind(pipeline, tmp_path, monkeypatch):
    opened = []

    class Page:
        def launch(self, server_port):
            opened.append(server_port)

    def page(pipeline, title):
        opened.append((type(pipeline), title))
        return Page()

    monkeypatch.setattr(space, "installed_version", lambda package: "6.0")
    monkeypatch.setattr(space_text_app, "page", page)
    monkeypatch.setattr(space_app, "page", None)
    space.open_page(save_bundle(pipeline, tmp_path / "bundle", {"model_name": "Verses"}), 7000)
    assert opened == [(ScoreSDETextPipeline, "Verses"), 7000]


def test_the_page_has_its_fields(pipeline):
    pytest.importorskip("gradio")
    blocks = space_text_app.page(pipeline, "*Verses* & more")
    shown = str(blocks.get_config_file())
    for label in ("Prompt", "Class", "Time steps", "Temperature", "Guidance scale", "Seed", "Write", "prose", "verse"):
        assert label in shown, label
    assert "\\\\*Verses\\\\*" in shown
