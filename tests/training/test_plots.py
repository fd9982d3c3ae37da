"""What a person sees of a run: curves from its records, pictures in its trackers."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from runs import run, train_tiny
from score_sde.training import train_autoencoder
from score_sde.training.parts import plots
from score_sde.training.parts.plots import plot_runs


def write(folder, name, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_run(folder, level=1.0, evaluated=True):
    """Records as `fit` leaves them, with a step that was not finite and half a line at the end."""
    steps = range(50, 1001, 50)
    values = [
        {"loss": level / step, "gradient_norm": 2.0, "images_per_second": 90.0}
        | {f"loss_in_quarter_{part}": level * part / step for part in (1, 2, 3, 4)}
        for step in steps
    ]
    values[3]["loss"] = None
    write(folder, "log.jsonl", [{"step": step} | value for step, value in zip(steps, values, strict=True)])
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 1050, "lo')
    if evaluated:
        write(folder, "evaluation.jsonl", [{"run_id": "a", "step": 500, "images_seen": 9, "held_out_loss": 0.5}])
    return folder


def drawn_by(monkeypatch, folders, output):
    """The panels, {title: {label: (steps, values)}}."""
    panels = []
    original = plots.draw
    monkeypatch.setattr(plots, "draw", lambda *given: (panels.append(dict(given[0])), original(*given)))
    assert plot_runs(folders, output) == output
    return panels[0]


def test_the_curves_of_a_run_are_its_records(tmp_path, monkeypatch):
    panels = drawn_by(monkeypatch, [a_run(tmp_path / "a")], tmp_path / "a.png")
    assert [title.split(":")[0] for title in panels] == [
        *("training loss", "loss by noise level", "norm of the gradient, before clipping", "samples per second"),
        "evaluation",
    ]
    steps, losses = panels["training loss"]["a"]
    assert steps == [step for step in range(50, 1001, 50) if step != 200]
    assert losses == [1 / step for step in steps]
    by_level = panels["loss by noise level: quarters of the time, 1 is the least noise"]
    assert by_level["quarter 3"] == (list(range(50, 1001, 50)), [3 / step for step in range(50, 1001, 50)])
    assert panels["evaluation: held out loss"] == {"a": ([500], [0.5])}
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert min(picture.shape) > 500 and picture.std() > 10


def test_runs_are_told_apart(tmp_path, monkeypatch):
    folders = [a_run(tmp_path / "x" / "run"), a_run(tmp_path / "y" / "run", 2.0, evaluated=False)]
    panels = drawn_by(monkeypatch, folders, tmp_path / "both.png")
    assert list(panels["training loss"]) == ["x/run", "y/run"]
    assert panels["training loss"]["y/run"][1][0] == 2 * panels["training loss"]["x/run"][1][0]
    assert list(panels["evaluation: held out loss"]) == ["x/run"]
    assert not any(title.startswith("loss by noise level") for title in panels)


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere' is no folder: name the output_dir of a run"):
        plot_runs([tmp_path / "nowhere"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.pdf' must be a .png file"):
        plot_runs([a_run(tmp_path / "a")], tmp_path / "a.pdf")


def pictures(folder):
    """{name: {step: picture}} of what TensorBoard holds."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    [events] = [path for path in folder.rglob("events.out.tfevents*") if path.parent.name == folder.name]
    log = accumulator.EventAccumulator(str(events.parent), {accumulator.IMAGES: 0}).Reload()
    return {
        name: {each.step: np.asarray(Image.open(io.BytesIO(each.encoded_image_string))) for each in log.Images(name)}
        for name in log.Tags()["images"]
    }


def test_grids_and_curves_reach_a_tracker(tmp_path):
    arguments = ["--max_train_steps", 2, "--sample_steps", 1, "--logging_steps", 1, "--log_with", "tensorboard"]
    train_tiny(tmp_path / "run", *arguments)
    found = pictures(tmp_path / "run")
    assert {name: list(steps) for name, steps in found.items()} == {"samples": [1, 2], "curves": [1, 2]}
    for step, picture in found["samples"].items():
        grid = Image.open(tmp_path / "run" / "samples" / f"step-{step:08d}.png")
        assert np.array_equal(picture, np.asarray(grid.convert("RGB")))
    last = np.asarray(Image.open(tmp_path / "run" / "samples" / "curves.png").convert("RGB"))
    assert np.array_equal(found["curves"][2], last)


def test_reconstructions_reach_a_tracker(tmp_path, small_data):
    arguments = ["--resolution", 8, "--image_channels", 1, "--block_out_channels", 8, 8, "--norm_num_groups", 4]
    arguments += ["--dataset", small_data, "--batch_size", 4, "--max_train_steps", 1, "--log_with", "tensorboard"]
    run(train_autoencoder.main, *arguments, "--output_dir", tmp_path / "run")
    assert list(pictures(tmp_path / "run")["reconstructions"]) == [1]


def test_the_bar_says_how_it_goes(tmp_path, capfd):
    """The step, the time that is left, the loss, the speed, and the share of the time that data are waited for."""
    train_tiny(tmp_path, "--max_train_steps", 2, "--logging_steps", 1, "--checkpointing_steps", 0)
    bars = [line for line in re.split(r"[\r\n]", capfd.readouterr().err) if line.startswith("DiTModel")]
    pattern = r"2/2 \[\S+<\S+, .*images_per_s=\d+, loss=\d\.\d{4}, waiting=\d+%\]"
    assert re.search(pattern, bars[-1]), bars[-1]
