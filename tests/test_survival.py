"""What training survives: kills at any moment, SIGTERM, damaged checkpoints, a full disk, data workers that
die, steps that are not finite."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import averages
import checkpoints
import datasets
import loop
import psutil
import pytest
import torch
import train
from safetensors.torch import load_file
from test_training import TINY_DIT, TINY_RUN, TRAINING, equal, fresh_accelerate_state, train_tiny  # noqa: F401


def weights(folder):
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def command(output_dir, *arguments, processes=1):
    launcher = []
    if processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
        launcher += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = [*TINY_RUN, "--network_kwargs", TINY_DIT, "--output_dir", output_dir, *arguments]
    return [str(part) for part in [sys.executable, *launcher, TRAINING / "train.py", *arguments]]


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1")


def wait_for_checkpoint(process, output_dir, after=None):
    """Wait until a checkpoint newer than `after` is whole."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = checkpoints.list_checkpoints(output_dir)
        if found and found[-1] != after:
            return found[-1]
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.02)
    raise AssertionError("no checkpoint was written")


LONG_RUN = ["--max_train_steps", 400, "--checkpointing_steps", 5, "--logging_steps", 5]


def killed_and_resumed(output_dir, *arguments, processes, kills):
    """Kill all processes of the run by signal 9 at some moment after each new checkpoint, then run it to its end."""
    newest = None
    for kill in range(kills):
        process = subprocess.Popen(
            command(output_dir, *arguments, "--resume_from_checkpoint", "latest", processes=processes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        newest = wait_for_checkpoint(process, output_dir, newest)
        time.sleep(0.013 * (kill + 1))
        # the launcher gives its processes sessions of their own
        launcher = psutil.Process(process.pid)
        for victim in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        process.communicate()
        assert not (Path(output_dir) / "pipeline").exists(), "the run was over before it was killed"
    result = subprocess.run(
        command(output_dir, *arguments, "--resume_from_checkpoint", "latest", processes=processes),
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resuming from" in result.stdout


@pytest.mark.parametrize(
    "processes",
    [1, pytest.param(2, marks=pytest.mark.slow)],
)
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, processes):
    """With kill -9, shuffling, two workers that load data, and label dropout."""
    arguments = [*LONG_RUN, "--num_workers", 2, "--random_flip"]
    killed_and_resumed(tmp_path / "killed", *arguments, processes=processes, kills=2)
    subprocess.run(
        command(tmp_path / "whole", *arguments, processes=processes), capture_output=True, check=True, env=environment()
    )
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_sigterm_saves_and_says_resume_me(tmp_path):
    arguments = ["--max_train_steps", 100_000, "--checkpointing_steps", 20, "--logging_steps", 7]
    process = subprocess.Popen(
        command(tmp_path, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_for_checkpoint(process, tmp_path)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == loop.EXIT_RESUME
    newest = checkpoints.list_checkpoints(tmp_path)[-1]
    step = int(newest[-8:])
    assert f"told to stop: step {step}; go on by --resume_from_checkpoint latest" in out
    state = json.loads((Path(newest) / "state.json").read_text())
    assert state["progress"]["step"] == step


@pytest.mark.parametrize("damaged", ["model.safetensors", "ema.safetensors", "optimizer.bin", "state.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, damaged, capsys):
    arguments = ["--max_train_steps", 4, "--checkpointing_steps", 2]
    whole = train_tiny(tmp_path, *arguments)
    shutil.rmtree(tmp_path / "pipeline")
    path = tmp_path / "checkpoints" / "step-00000004" / damaged
    path.write_bytes(path.read_bytes()[:-7])
    loop_output = train_tiny(tmp_path, *arguments, "--resume_from_checkpoint", "latest")
    assert equal(loop_output, whole)
    out = capsys.readouterr().out
    assert "step-00000004' is" in out and "going back to the one before" in out
    assert "resuming from" in out and "step 2, 8 images seen" in out


def test_a_damaged_only_or_named_checkpoint_is_an_error(tmp_path):
    train_tiny(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    path = tmp_path / "checkpoints" / "step-00000002"
    (path / "ema.safetensors").write_bytes(b"")
    for name in ("latest", path):
        with pytest.raises(checkpoints.DamagedCheckpoint, match=r"is damaged: ema.safetensors has 0 of [\d,]+ bytes"):
            train_tiny(tmp_path, "--max_train_steps", 4, "--resume_from_checkpoint", name)


@contextmanager
def no_room():
    """This process may write no more than 10 kB into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_without_room_loses_nothing(tmp_path, monkeypatch, capsys):
    """The second checkpoint finds no room; the run goes on, and the third replaces the first."""
    listed = []

    def save(config, *rest):
        *_, progress, _ = rest
        with no_room() if progress["step"] == 2 else nullcontext():
            saved = checkpoints.save_checkpoint(config, *rest)
        listed.append([os.path.basename(path) for path in checkpoints.list_checkpoints(config.output_dir)])
        return saved

    monkeypatch.setattr(loop, "save_checkpoint", save)
    arguments = ["--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1]
    train_tiny(tmp_path, *arguments)
    assert listed == [["step-00000001"], ["step-00000001"], ["step-00000003"]]
    assert "step-00000002 could not be written: " in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000003"]


def test_a_snapshot_without_room_stops_nothing(tmp_path, monkeypatch, capsys):
    save = averages.Averages.save_snapshots

    def save_without_room(*arguments):
        with no_room():
            save(*arguments)

    monkeypatch.setattr(averages.Averages, "save_snapshots", save_without_room)
    train_tiny(tmp_path, "--max_train_steps", 2, "--ema_snapshot_steps", 1)
    assert "step-00000001-sigma_rel-0.05.safetensors could not be written" in capsys.readouterr().out
    assert os.listdir(tmp_path / "ema_snapshots") == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB, and a function that makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount file systems")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoints_and_a_larger_one_goes_on(small_disk, tmp_path):
    """The first two checkpoints fit, the third doesn't, and is the last."""
    folder, enlarge = small_disk
    arguments = ["--max_train_steps", 6, "--checkpointing_steps", 2, "--checkpoints_total_limit", 9]
    with pytest.raises(OSError, match="the last checkpoint could not be written"):
        train_tiny(folder, *arguments)
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-00000002", "step-00000004"]
    enlarge()
    resumed = train_tiny(folder, *arguments, "--resume_from_checkpoint", "latest")
    assert equal(resumed, train_tiny(tmp_path / "whole", *arguments))


def test_a_data_worker_that_dies_is_named_and_nothing_is_lost(tmp_path):
    arguments = ["--max_train_steps", 100_000, "--checkpointing_steps", 20, "--num_workers", 2]
    process = subprocess.Popen(
        command(tmp_path, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_for_checkpoint(process, tmp_path)
    workers = [child for child in psutil.Process(process.pid).children() if "resource_tracker" not in child.cmdline()]
    workers[0].kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode not in (0, loop.EXIT_RESUME)
    # PyTorch's own message, where its handler of signals is the first to see it
    pid = workers[0].pid
    assert re.search(rf"data died: pid {pid} \(|DataLoader worker \(pid {pid}\) is killed", error), error[-2000:]
    newest = checkpoints.list_checkpoints(tmp_path)[-1]
    arguments[1] = int(newest[-8:]) + 1
    train_tiny(tmp_path, *arguments, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, where, capsys):
    """Weights, moments and averages of step 2 are those of step 1, and the run goes on."""
    original, calls = train.Objective.__call__, []

    def poisoned(self, *arguments):
        losses = original(self, *arguments)
        calls.append(losses)
        if len(calls) == 2:
            losses = losses * float("nan") if where == "loss" else losses + (losses - losses.detach()) * float("inf")
        return losses

    monkeypatch.setattr(train.Objective, "__call__", poisoned)
    arguments = [
        "--max_train_steps",
        4,
        "--checkpointing_steps",
        1,
        "--checkpoints_total_limit",
        9,
        "--logging_steps",
        9,
    ]
    train_tiny(tmp_path, *arguments, "--ema_decay", 0.5)
    # none is written right after the step that was skipped
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names == ["step-00000001", "step-00000003", "step-00000004"]
    [line] = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert (line["step"], line["images_seen"], line["seed"]) == (2, 4, 0)
    optimizers = [
        torch.load(tmp_path / "checkpoints" / name / "optimizer.bin", weights_only=True)["state"] for name in names
    ]
    assert [int(state[0]["step"]) for state in optimizers] == [1, 2, 3]
    for name in names:
        assert all(
            torch.isfinite(value).all()
            for value in load_file(tmp_path / "checkpoints" / name / "ema.safetensors").values()
        )
    monkeypatch.setattr(train.Objective, "__call__", original)


def test_a_corrupt_image_is_passed_over_if_asked(tmp_path, capsys):
    from data import ImageDataset
    from test_training import data_config

    data = datasets.Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}] * 2, "label": [0, 1]})
    good = (
        ImageDataset(data_config(resolution=8)).data.select(range(2)).cast_column("image", datasets.Image(decode=False))
    )
    rows = [*good, *data]
    rows = [rows[0], rows[2], rows[3], rows[1]]
    table = datasets.Dataset.from_list([{"image": row["image"], "label": row["label"]} for row in rows])
    table.to_parquet(tmp_path / "train.parquet")
    path = str(tmp_path / "train.parquet")
    found = ImageDataset(data_config(dataset=path, resolution=8, skip_corrupt_images=True))
    assert torch.equal(found[1]["images"], found[3]["images"])
    assert found[1]["labels"] == found[3]["labels"]
    assert "row 1 of dataset" in capsys.readouterr().out
    with pytest.raises(ValueError, match="row 1 of dataset .* cannot be decoded: .*pass --skip_corrupt_images"):
        ImageDataset(data_config(dataset=path, resolution=8))[1]


@pytest.mark.parametrize(
    "options",
    [
        ["--sde_type", "discrete_vp", "--prediction_type", "epsilon", "--vlb_weight", 0.001],
        ["--weighting", "min_snr", "--weighting_kwargs", '{"gamma": 3}'],
        ["--weighting", "likelihood", "--time_density", "importance"],
        ["--time_density", "logit_normal", "--time_density_kwargs", '{"std": 0.5}', "--sde_type", "linear"],
    ],
    ids=["hybrid", "min_snr", "likelihood", "logit_normal"],
)
def test_objectives_train(tmp_path, options):
    from score_sde import load_bundle

    train_tiny(tmp_path, "--max_train_steps", 2, *options)
    pipeline = load_bundle(tmp_path / "pipeline")
    assert pipeline.transformer.config.learn_sigma == ("--vlb_weight" in options)
    if "--vlb_weight" in options:
        assert pipeline.scheduler.config.variance_type == "learned_range"
