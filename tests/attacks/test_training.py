"""What lies in the folder of a run may be anything: it is passed over or refused by name, and nothing hangs."""

import json
import os
import subprocess
import sys

import pytest
from accelerate import Accelerator
from filelock import FileLock

from runs import forget_runs, train_tiny
from score_sde.training import train
from score_sde.training.parts import checkpoints, run_folder
from score_sde.training.parts.hashes import hash_of


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The files of a checkpoint: {name: bytes}."""
    forget_runs()
    folder = tmp_path_factory.mktemp("run")
    train_tiny(folder, "--max_train_steps", 1)
    checkpoint = folder / "checkpoints" / "step-00000001"
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.fixture
def checkpoint(content, tmp_path):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    checkpoints.read_state(tmp_path)  # whole
    return tmp_path


def without(key):
    def change(state):
        del state[key]

    return change


def sealed(state):
    return json.dumps(state | {"hash": hash_of(state)}).encode()


def replaced(path):
    path.unlink()
    return path


STATES = {
    "empty": lambda path: path.write_bytes(b""),
    "object": lambda path: path.write_bytes(b"{}"),
    "list": lambda path: path.write_bytes(b"[]"),
    "null": lambda path: path.write_bytes(b"null"),
    "text": lambda path: path.write_bytes(b'"hash"'),
    "number": lambda path: path.write_bytes(b"7"),
    "nan": lambda path: path.write_bytes(b'{"hash": NaN}'),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "nested": lambda path: path.write_bytes(b"[" * 200_000),
    "a huge number": lambda path: path.write_bytes(b'{"hash": 1e999, "n": ' + b"9" * 5000 + b"}"),
    "sealed, of nothing": lambda path: path.write_bytes(sealed({})),
    "sealed, without hashes": lambda path: path.write_bytes(sealed({"sizes": {}})),
    "sealed, of lists": lambda path: path.write_bytes(sealed({"sizes": [], "hashes": []})),
    "sealed, of sizes alone": lambda path: path.write_bytes(sealed({"sizes": {"state.json": 1}, "hashes": {}})),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "half": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: replaced(path).mkdir(),
    "FIFO": lambda path: os.mkfifo(replaced(path)),
    "device": lambda path: replaced(path).symlink_to("/dev/zero"),
    "link to nothing": lambda path: replaced(path).symlink_to("nowhere"),
    "link to itself": lambda path: replaced(path).symlink_to("state.json"),
}


@pytest.mark.parametrize("attack", STATES)
def test_a_state_of_any_content_is_no_checkpoint(checkpoint, attack):
    STATES[attack](checkpoint / "state.json")
    with pytest.raises(checkpoints.DamagedCheckpoint, match="is not a checkpoint of this script"):
        checkpoints.read_state(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        *(without(key) for key in ("run_id", "progress", "ema", "lr_scheduler", "config", "data", "sizes", "hashes")),
        lambda state: state["progress"].update(step=7),
        lambda state: state["progress"].update(step="1"),
        lambda state: state["hashes"].clear(),
        lambda state: state["config"].update(seed=1),
        lambda state: state.update(hash=None),
        lambda state: state.update(more=1),
    ],
)
def test_a_state_that_was_changed_is_no_checkpoint(checkpoint, change):
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(checkpoints.DamagedCheckpoint, match="its state.json is damaged"):
        checkpoints.read_state(checkpoint)


FILES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "zeros of its size": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit flipped": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x55" + path.read_bytes()[-8:]),
    "folder": lambda path: replaced(path).mkdir(),
    "FIFO": lambda path: os.mkfifo(replaced(path)),
    "device": lambda path: replaced(path).symlink_to("/dev/zero"),
    "link to nothing": lambda path: replaced(path).symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("attack", FILES)
def test_a_damaged_file_is_named(checkpoint, name, attack):
    FILES[attack](checkpoint / name)
    with pytest.raises(checkpoints.DamagedCheckpoint, match=f"is damaged: {name} (has|is not what was written)"):
        checkpoints.read_state(checkpoint)


def resume_latest(folder):
    train_tiny(folder, "--max_train_steps", 1, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.touch(), lambda path: os.mkfifo(path)])
def test_what_is_called_a_checkpoint_and_is_none_is_passed_over(content, tmp_path, make, capsys):
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    make(tmp_path / "checkpoints" / "step-00000002")
    resume_latest(tmp_path)
    assert "step-00000002' is not a checkpoint of this script: it has no state.json" in capsys.readouterr().out
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def opened(folder, **options):
    """Open the folder for a run, and leave it."""
    with run_folder.open_run(train.TrainConfig(output_dir=str(folder), **options), Accelerator(cpu=True)) as run:
        return run


USED = ["checkpoints/step-00000001/state.json", "checkpoints/other", "ema_snapshots/a", "samples/step-00000001.png"]
USED += ["evaluation.jsonl", "nonfinite.jsonl", "pipeline/model_index.json", "pushed/a", "vae/config.json"]
USED += ["classifier/config.json"]


@pytest.mark.parametrize("name", USED)
def test_a_folder_with_anything_of_a_run_is_refused_or_emptied(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(ValueError, match=f"holds a run .{name.split('/')[0]}.: choose another folder, go on with that"):
        opened(tmp_path)
    assert path.exists()
    opened(tmp_path, on_existing_run="set_aside")
    assert not path.exists() and (tmp_path / "set_aside-1" / name).exists()


def test_what_a_tracker_wrote_goes_aside_with_the_run(tmp_path):
    names = ["evaluation.jsonl", f"{tmp_path.name}/events.out.tfevents.1"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    opened(tmp_path, on_existing_run="set_aside")
    assert all((tmp_path / "set_aside-1" / name).exists() for name in names)


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "latents/latents.json", "checkpoints/", "samples/"])
def test_a_folder_with_other_things_is_taken(tmp_path, name):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    opened(tmp_path)
    assert path.exists()


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="File exists"):
        opened(tmp_path / "file")


def test_a_lock_keeps_a_second_run_out_until_its_holder_is_killed(tmp_path):
    script = "import sys, time, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); "
    script += "time.sleep(60)"
    command = [sys.executable, "-c", script, str(tmp_path / ".run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match="another run writes into output_dir .* now"):
            opened(tmp_path)
        holder.kill()
    opened(tmp_path)


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_leaves_no_lock(tmp_path, exception):
    config = train.TrainConfig(output_dir=str(tmp_path))
    with pytest.raises(exception), run_folder.open_run(config, Accelerator(cpu=True)):
        raise exception
    opened(tmp_path)
    with FileLock(tmp_path / ".run.lock", timeout=0):
        pass


@pytest.mark.parametrize(
    "line", ["", "{", "null", "[]", "7", "{}", '{"step": "1"}', '{"step": null}', '{"step": 3}', "\udcff"]
)
def test_a_line_of_a_record_that_is_none_is_dropped(tmp_path, line):
    run = opened(tmp_path)
    for step in (1, 2):
        run.write_line("evaluation.jsonl", {"step": step})
    with open(tmp_path / "evaluation.jsonl", "ab") as file:
        file.write(line.encode(errors="surrogateescape"))
    run.rewind(2)
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert lines == [{"run_id": run.id, "step": 1}, {"run_id": run.id, "step": 2}]
