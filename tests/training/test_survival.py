"""What training survives: kills at any moment, SIGTERM, damaged checkpoints, disks that fail, data workers that
die, steps that are not finite; and that runs don't mix."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from diffusers.training_utils import EMAModel
from places import TRAINING
from safetensors import safe_open
from safetensors.torch import load_file

from runs import TINY_DIT, TINY_RUN, equal, train_tiny
from score_sde.losses import Objective
from score_sde.training import train
from score_sde.training.parts import averages, checkpoints, loop, run_folder


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


def workers_of(process):
    """The ids of the processes that load data for a process."""
    children = psutil.Process(process.pid).children()
    return [child.pid for child in children if not any("resource_tracker" in part for part in child.cmdline())]


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


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, processes):
    """With kill -9, shuffling, two workers that load data, and label dropout."""
    arguments = [*LONG_RUN, "--num_workers", 2, "--random_flip"]
    killed_and_resumed(tmp_path / "killed", *arguments, processes=processes, kills=2)
    subprocess.run(
        command(tmp_path / "whole", *arguments, processes=processes), capture_output=True, check=True, env=environment()
    )
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
def test_sigterm_saves_and_says_resume_me(tmp_path, whole_group):
    """Also one that reaches the processes that load data, too, as a scheduler's and `timeout`'s does."""
    arguments = ["--max_train_steps", 100_000, "--checkpointing_steps", 20, "--logging_steps", 7, "--num_workers", 2]
    process = subprocess.Popen(
        command(tmp_path, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    first = wait_for_checkpoint(process, tmp_path)
    if whole_group:
        for name in ("TERM", "INT"):
            subprocess.run(["kill", f"-{name}", *map(str, workers_of(process))], check=True)
        wait_for_checkpoint(process, tmp_path, first)
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == loop.EXIT_RESUME
    newest = checkpoints.list_checkpoints(tmp_path)[-1]
    step = int(newest[-8:])
    assert re.search(rf"told to stop: step {step}; go on by `.*--resume_from_checkpoint latest`\n", out)
    state = json.loads((Path(newest) / "state.json").read_text())
    assert state["progress"]["step"] == step


@pytest.mark.parametrize("damaged", ["model.safetensors", "ema.safetensors", "optimizer.bin", "state.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, damaged, capsys):
    """One bit of it is another: only the hash can tell."""
    arguments = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--checkpoints_total_limit"]
    whole = train_tiny(tmp_path, *arguments, 2)
    path = tmp_path / "checkpoints" / "step-00000004" / damaged
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    assert equal(train_tiny(tmp_path, *arguments, 1, "--resume_from_checkpoint", "latest"), whole)
    out = capsys.readouterr().out
    assert "step-00000004' is" in out and "going back to the one before" in out
    assert "resuming from" in out and "step 2, 8 images seen" in out
    # the damaged one doesn't count as one of those that are kept
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert (tmp_path / "set_aside-1" / "checkpoints" / "step-00000004").is_dir()
    checkpoints.read_state(tmp_path / "checkpoints" / "step-00000004")


def test_a_checkpoint_that_cannot_be_read_is_passed_over_whole(tmp_path, capsys):
    """Of a network that was larger: the weights fit in part, and nothing of them stays."""
    arguments = ["--max_train_steps", 4, "--checkpointing_steps", 2]
    whole = train_tiny(tmp_path / "run", *arguments)
    train_tiny(tmp_path / "other", *arguments, "--network_kwargs", TINY_DIT.replace("16", "32"))
    newest, foreign = (tmp_path / name / "checkpoints" / "step-00000004" for name in ("run", "other"))
    state = checkpoints.read_state(newest)
    (newest / "state.json").unlink()
    shutil.copyfile(foreign / "model.safetensors", newest / "model.safetensors")
    checkpoints.write_state(newest, state)
    capsys.readouterr()
    assert equal(train_tiny(tmp_path / "run", *arguments, "--resume_from_checkpoint", "latest"), whole)
    out = capsys.readouterr().out
    assert "step-00000004' cannot be read: " in out and "step 2, 8 images seen" in out


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
        _, _, state, *_ = rest
        with no_room() if state.progress["step"] == 2 else nullcontext():
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
    with pytest.raises(OSError, match="No space left on device"):  # for the pipeline
        train_tiny(folder, *arguments)
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-00000002", "step-00000004"]
    enlarge()
    resumed = train_tiny(folder, *arguments, "--resume_from_checkpoint", "latest")
    assert equal(resumed, train_tiny(tmp_path / "whole", *arguments))


def ext4(tmp_path):
    """A file system of 2 MB with 96 files, mounted at the folder that is returned."""
    folder, image = tmp_path / "disk", tmp_path / "image"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(2 << 20)
    make = ["mkfs.ext4", "-q", "-m", "0", "-N", "96", "-O", "^has_journal", str(image)]
    for command in (make, ["mount", "-o", "loop", str(image), str(folder)]):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount file systems")
    shutil.rmtree(folder / "lost+found")
    return folder


def fill(folder):
    with suppress(OSError), open(folder / "rest", "wb", buffering=0) as file:
        while True:
            file.write(b"0" * 512)


def use_up_inodes(folder):
    (folder / "rest").mkdir()
    with suppress(OSError):
        for number in range(96):
            (folder / "rest" / str(number)).touch()


def make_read_only(folder):
    """As the kernel does where the disk fails."""
    subprocess.run(["mount", "-o", "remount,abort", str(folder)], check=True)


@pytest.mark.parametrize("fail", [fill, use_up_inodes, make_read_only])
def test_a_disk_that_fails_costs_what_is_written_then_and_never_the_run(tmp_path, monkeypatch, capsys, fail):
    """It fails after the second of five steps; one that only lacks room has it again before the last. Every step
    writes everything, and the third isn't finite."""
    folder = ext4(tmp_path)

    def failing(losses):
        fail(folder)
        return losses * float("nan")

    def mended(losses):
        if fail is not make_read_only:
            rest = folder / "rest"
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        return losses

    # an evaluation of ten images asks for three batches of losses
    do_in_loss(monkeypatch, {9: failing, 17: mended})
    arguments = ["--max_train_steps", 5, "--checkpointing_steps", 1, "--sample_steps", 1, "--ema_snapshot_steps", 1]
    arguments += ["--evaluation_steps", 1, "--evaluation_images", 10, "--logging_steps", 1]
    arguments += ["--checkpoints_total_limit", 1, "--ema_sigma_rel", 0.1]
    try:
        if fail is make_read_only:
            with pytest.raises(OSError, match="Read-only file system"):  # for the pipeline, after the last step
                train_tiny(folder, *arguments)
        else:
            train_tiny(folder, *arguments)
        out = capsys.readouterr().out
        lost = ["a line of .*nonfinite.jsonl", "samples of step 4", "snapshot .*-00000004.*", "checkpoint .*-00000004"]
        # else a line finds room in the last block of its file
        lost += ["a line of .*evaluation.jsonl"] if fail is make_read_only else []
        for what in lost:
            assert re.search(f"{what} could not be written", out), what
        found = [Path(path).name for path in checkpoints.list_checkpoints(folder)]
        assert found == ["step-00000002" if fail is make_read_only else "step-00000005"]
        checkpoints.read_state(folder / "checkpoints" / found[0])
        lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == ([1, 2] if fail is make_read_only else [1, 2, 3, 4, 5])
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_line_for_a_log_without_room_is_lost_alone():
    with open("/dev/full", "w") as full:
        stream = run_folder.Unbroken(full)
        print("lost", file=stream, flush=True)
        assert stream.encoding == full.encoding
        with suppress(OSError):
            full.close()


# --- a folder, a run ----------------------------------------------------------------------------------------------

RECORDED = ["--ema_snapshot_steps", 1, "--evaluation_steps", 1, "--evaluation_images", 4, "--checkpointing_steps", 2]
RECORDED += ["--checkpoints_total_limit", 9, "--ema_sigma_rel", 0.1]


def identities(folder):
    """Every run that a checkpoint, a snapshot, a record or a card in the folder is of."""
    found = {checkpoints.read_state(path)["run_id"] for path in checkpoints.list_checkpoints(folder)}
    for _, _, path in averages.list_snapshots(folder):
        with safe_open(path, framework="pt") as file:
            found.add(file.metadata()["run_id"])
    found |= {json.loads(line)["run_id"] for line in (folder / "evaluation.jsonl").read_text().splitlines()}
    return found | {json.loads((folder / "pipeline" / "training.json").read_text())["run_id"]}


def test_all_that_a_run_writes_carries_its_identity_and_no_step_twice(tmp_path):
    """Killed after step 3, while it wrote a line, it goes on from step 2."""
    train_tiny(tmp_path, *RECORDED, "--max_train_steps", 3)
    [run_id] = identities(tmp_path)
    assert re.fullmatch("[0-9a-f]{32}", run_id)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")
    (tmp_path / "checkpoints" / ".step-00000004.abc.partial").mkdir()
    with open(tmp_path / "evaluation.jsonl", "a") as file:
        file.write('{"run_id": "')
    train_tiny(tmp_path, *RECORDED, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert identities(tmp_path) == {run_id}
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000002", "step-00000004"]
    assert not list(tmp_path.glob("set_aside*"))


def test_a_used_folder_is_refused_or_set_aside(tmp_path, capsys):
    train_tiny(tmp_path, *RECORDED, "--max_train_steps", 3)
    [first] = identities(tmp_path)
    with pytest.raises(
        ValueError, match="holds a run .checkpoints, ema_snapshots, samples, log.jsonl, evaluation.jsonl, pipeline"
    ):
        train_tiny(tmp_path, "--dataset", "nowhere.parquet")
    (tmp_path / "notes.txt").touch()
    train_tiny(tmp_path, *RECORDED, "--max_train_steps", 1, "--on_existing_run", "set_aside")
    [second] = identities(tmp_path)
    assert identities(tmp_path / "set_aside-1") == {first} != {second}
    assert (tmp_path / "notes.txt").is_file()
    assert "set aside in" in capsys.readouterr().out


def test_latest_without_a_checkpoint_begins_anew_and_mixes_nothing(tmp_path):
    arguments = ["--max_train_steps", 2, "--ema_snapshot_steps", 1, "--checkpointing_steps", 0]
    train_tiny(tmp_path, *arguments, "--resume_from_checkpoint", "latest")
    train_tiny(tmp_path, *arguments, "--resume_from_checkpoint", "latest", "--ema_snapshot_steps", 2)
    assert sorted(os.listdir(tmp_path / "set_aside-1")) == ["ema_snapshots", "log.jsonl", "pipeline", "samples"]
    assert [step for step, _, _ in averages.list_snapshots(tmp_path)] == [2, 2]


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path):
    """Else those that it writes would be the oldest, and go."""
    train_tiny(tmp_path, "--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 9)
    with pytest.raises(ValueError, match="of step 4, beyond max_train_steps 3"):
        train_tiny(tmp_path, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    second = tmp_path / "checkpoints" / "step-00000002"
    arguments = ["--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", second]
    train_tiny(tmp_path, "--max_train_steps", 3, *arguments)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000003"]
    assert sorted(os.listdir(tmp_path / "set_aside-1" / "checkpoints")) == ["step-00000003", "step-00000004"]
    with pytest.raises(ValueError, match="holds a run"):
        elsewhere = tmp_path / "set_aside-1" / "checkpoints" / "step-00000004"
        train_tiny(tmp_path, "--max_train_steps", 5, "--resume_from_checkpoint", elsewhere)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    def another(losses):
        with pytest.raises(ValueError, match="another run writes into output_dir .* now"):
            train_tiny(tmp_path, "--resume_from_checkpoint", "latest")
        return losses

    do_in_loss(monkeypatch, {2: another})
    train_tiny(tmp_path, "--max_train_steps", 3)


@pytest.mark.slow
def test_a_data_worker_that_dies_is_named_and_nothing_is_lost(tmp_path):
    arguments = ["--max_train_steps", 100_000, "--checkpointing_steps", 20, "--num_workers", 2]
    process = subprocess.Popen(
        command(tmp_path, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_for_checkpoint(process, tmp_path)
    pid = workers_of(process)[0]
    os.kill(pid, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode not in (0, loop.EXIT_RESUME)
    # PyTorch's own message, where its handler of signals is the first to see it
    assert re.search(rf"data died: pid {pid} \(|DataLoader worker \(pid {pid}\) is killed", error), error[-2000:]
    newest = checkpoints.list_checkpoints(tmp_path)[-1]
    arguments[1] = int(newest[-8:]) + 1
    train_tiny(tmp_path, *arguments, "--resume_from_checkpoint", "latest")


# what becomes of the losses of a step
NOT_FINITE = {
    "loss": lambda losses: losses * float("nan"),
    "gradient": lambda losses: losses + (losses - losses.detach()) * float("inf"),
    "loss_alone": lambda losses: losses + float("inf"),
}


@pytest.mark.parametrize(("where", "optimizer"), [*((where, "adamw") for where in NOT_FINITE), ("gradient", "rmsprop")])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, where, optimizer, capsys):
    """Weights, moments and averages of step 2 are those of step 1, and the run goes on."""
    original, calls = Objective.__call__, []

    def poisoned(self, *arguments):
        losses = original(self, *arguments)
        calls.append(losses)
        return NOT_FINITE[where](losses) if len(calls) == 2 else losses

    monkeypatch.setattr(Objective, "__call__", poisoned)
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
    train_tiny(tmp_path, *arguments, "--ema_decay", 0.5, "--ema_snapshot_steps", 1, "--optimizer", optimizer)
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
    first, second, third = (
        load_file(tmp_path / "ema_snapshots" / f"step-{step:08d}-sigma_rel-0.1.safetensors") for step in (1, 2, 3)
    )
    assert equal(first, second) and not equal(second, third)


def test_averages_stay_in_a_step_that_is_skipped():
    network = torch.nn.Linear(3, 2)
    ema = averages.Averages(train.TrainConfig(ema_decay=0.5, further_ema_decays=[0.9], ema_snapshot_steps=1), network)
    for skipped in (0.0, 1.0, 0.0):
        before = [ema.tensors(file)["weight"].clone() for file in ema.emas]
        torch.nn.init.normal_(network.weight)
        ema.step(torch.tensor(skipped))
        after = [ema.tensors(file)["weight"] for file in ema.emas]
        assert len(after) == 4
        assert all(torch.equal(*pair) == bool(skipped) for pair in zip(before, after, strict=True))


def test_averages_of_weights_of_several_types_and_layouts_are_those_of_diffusers():
    """Half and single precision, channels last, and one that is frozen."""
    torch.manual_seed(0)
    network = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2), "c": torch.nn.Conv2d(3, 4, 3)}
    )
    network["b"].to(torch.bfloat16)
    network["c"].to(memory_format=torch.channels_last)
    network["a"].bias.requires_grad_(False)
    own = averages.Averages(train.TrainConfig(ema_decay=0.7), network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    other = EMAModel(trained, decay=0.7)
    for _ in range(5):
        for parameter in trained:
            torch.nn.init.normal_(parameter)
        own.step(torch.tensor(0.0))
        other.step(trained)
    for one, expected in zip(own.emas[averages.MAIN].shadow_params, other.shadow_params, strict=True):
        assert one.stride() == expected.stride()
        assert (one - expected).abs().max() <= 4 * torch.finfo(one.dtype).eps


def test_the_network_has_its_weights_again_whatever_happens_while_it_has_the_averaged_ones():
    network = torch.nn.Linear(3, 2)
    ema = averages.Averages(train.TrainConfig(ema_decay=0.5), network)
    for _ in range(3):
        torch.nn.init.normal_(network.weight)
        ema.step(torch.tensor(0.0))
    before, averaged = network.weight.detach().clone(), ema.tensors(averages.MAIN)["weight"].clone()
    where = network.weight.data_ptr()
    with pytest.raises(RuntimeError, match="out of memory"), ema.averaged_network() as found:
        assert torch.equal(found.weight, averaged) and not found.training
        assert found.weight.data_ptr() == ema.emas[averages.MAIN].shadow_params[0].data_ptr()
        raise RuntimeError("out of memory")
    assert torch.equal(network.weight, before) and network.weight.data_ptr() == where and network.training
    assert torch.equal(ema.tensors(averages.MAIN)["weight"], averaged)


def do_in_loss(monkeypatch, actions):
    """Training calls actions[n] with the losses of its n-th micro-batch, and trains on what it returns."""
    original, calls = Objective.__call__, []

    def losses(self, *arguments):
        calls.append(original(self, *arguments))
        return actions.get(len(calls), lambda losses: losses)(calls[-1])

    monkeypatch.setattr(Objective, "__call__", losses)


def test_a_last_step_that_is_not_finite_costs_itself_alone(tmp_path, monkeypatch, capsys):
    before = train_tiny(tmp_path / "shorter", "--max_train_steps", 2)
    do_in_loss(monkeypatch, {3: lambda losses: losses * float("nan")})
    found = train_tiny(tmp_path / "run", "--max_train_steps", 3, "--logging_steps", 1)
    assert equal(found, before)
    assert "the last 1 steps were not finite and changed nothing" in capsys.readouterr().out
    trained = [
        load_file(tmp_path / run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        for run, step in (("shorter", 2), ("run", 3))
    ]
    assert equal(*trained)
    facts = [
        json.loads((tmp_path / run / "pipeline" / "training.json").read_text())["final_loss"]
        for run in ("run", "shorter")
    ]
    assert facts[0] == pytest.approx(facts[1], rel=0.5)  # no nan


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_step_that_is_not_finite_saves_it(tmp_path, monkeypatch, number):
    def poisoned(losses):
        os.kill(os.getpid(), number)
        return losses * float("nan")

    before = signal.getsignal(number)
    do_in_loss(monkeypatch, {2: poisoned})
    with pytest.raises(SystemExit) as stopped:
        train_tiny(tmp_path, "--max_train_steps", 4)
    assert stopped.value.code == loop.EXIT_RESUME
    state = checkpoints.read_state(tmp_path / "checkpoints" / "step-00000002")
    assert (state["progress"]["step"], state["progress"]["skipped"]) == (2, 1)
    assert signal.getsignal(number) == before
    train_tiny(tmp_path, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")


def test_a_second_interrupt_ends_the_run_at_once(tmp_path, monkeypatch, capfd):
    def interrupted(losses):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return losses

    do_in_loss(monkeypatch, {2: interrupted})
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, "--max_train_steps", 4)
    assert "stopping after this step, with a checkpoint; Ctrl-C again" in capfd.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_a_grid_that_cannot_be_drawn_costs_itself_alone(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "sample_grid", fails)
    train_tiny(tmp_path, "--max_train_steps", 2, "--sample_steps", 1)
    out = capsys.readouterr().out
    assert "samples of step 1 could not be written: out of memory; the run goes on" in out
    assert "the samples could not be written: out of memory; the run goes on" in out
    assert not (tmp_path / "pipeline" / "samples.png").exists()
    facts = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert facts["steps"] == 2 and "samples" not in facts


def test_a_corrupt_image_is_passed_over_if_asked(tmp_path, capsys):
    from test_training import data_config

    from score_sde.training.parts.data import ImageDataset

    data = datasets.Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}] * 2, "label": [0, 1]})
    good = (
        ImageDataset(data_config(resolution=8)).data.select(range(2)).cast_column("image", datasets.Image(decode=False))
    )
    rows = [*good, *data]
    rows = [rows[0], rows[2], rows[3], rows[1]]
    table = datasets.Dataset.from_list([{"image": row["image"], "label": row["label"]} for row in rows])
    table.to_parquet(tmp_path / "train.parquet")
    path = str(tmp_path / "train.parquet")
    found = ImageDataset(data_config(dataset=path, resolution=8, num_classes=10, skip_corrupt_images=True))
    assert torch.equal(found[1]["images"], found[3]["images"])
    assert found[1]["labels"] == found[3]["labels"]
    assert "row 1 of dataset" in capsys.readouterr().out
    with pytest.raises(ValueError, match="row 1 of dataset .* cannot be decoded: .*pass --skip_corrupt_images"):
        ImageDataset(data_config(dataset=path, resolution=8, num_classes=10))[1]


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
