"""The folder of a run: whose it is, who writes into it, and what a resumed run goes on with.

A folder holds one run, which has an identity: its checkpoints, snapshots, records and card carry it. A lock, which
a kill releases, keeps a second run out. A write that fails during the run costs what it would have written, no more.
"""

import errno
import glob
import json
import os
import re
import shutil
import sys
import uuid
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from score_sde.pipelines.writing import whole_file


# what is written step by step, under the names step-00001000...
BY_STEP = ("checkpoints", "ema_snapshots", "samples")
# lines of JSON, each with its step
EVALUATIONS = "evaluation.jsonl"
RECORDS = ("log.jsonl", EVALUATIONS, "nonfinite.jsonl")
RESULTS = ("pipeline", "pushed", "vae", "classifier", "init_from")


@contextmanager
def surviving(what):
    """A write, or a picture, without which the run goes on: where it fails, that is said."""
    try:
        yield
    except Exception as error:  # PIL, torch, safetensors and trackers have their own for a full disk
        print(f"{what} could not be written: {error}; the run goes on")


@contextmanager
def open_run(config, accelerator):
    """A `Run` that alone writes into config.output_dir, for a while. What another run left there is refused, or set
    aside where config.on_existing_run says so, or where there is no checkpoint from which it could be resumed.

    Raises ValueError, in every process, for a folder of another run or one in which another run writes now.
    """
    folder = os.path.abspath(config.output_dir)
    with ExitStack() as closing:
        problem = None
        if accelerator.is_main_process:
            try:
                os.makedirs(folder, exist_ok=True)
                closing.enter_context(FileLock(os.path.join(folder, ".run.lock"), timeout=0))
                remove_partials(folder)
                make_way(folder, config)
            except Timeout:
                problem = (
                    f"another run writes into output_dir {config.output_dir!r} now: wait for it, or choose another"
                )
            except (OSError, ValueError) as error:
                problem = str(error)
        problem, run_id = broadcast_object_list([problem, uuid.uuid4().hex])
        if problem is not None:
            raise ValueError(problem)
        closing.enter_context(redirect_stdout(Unbroken(sys.stdout)))
        closing.enter_context(redirect_stderr(Unbroken(sys.stderr)))
        yield Run(folder, run_id, accelerator.is_main_process, closing)


def remove_partials(folder):
    """Remove what a run that was killed had begun to write."""
    for name in os.listdir(folder):
        if name.endswith(".partial") and name.split(".")[1] in RESULTS:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    for parent in (os.path.join(folder, name) for name in BY_STEP):
        for name in os.listdir(parent) if os.path.isdir(parent) else []:
            if name.endswith(".partial"):
                path = os.path.join(parent, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def make_way(folder, config):
    """Leave nothing of a run in a folder but one that the config resumes. Raises ValueError where it may not."""
    there = [name for name in (*BY_STEP, *RECORDS, *RESULTS) if is_used(os.path.join(folder, name))]
    resumed = config.resume_from_checkpoint
    if resumed == "latest":
        goes_on = any(re.fullmatch(r"step-\d{8}", name) for name in listed(folder, "checkpoints"))
    else:
        own = os.path.join(os.path.realpath(folder), "checkpoints")
        goes_on = resumed is not None and os.path.dirname(os.path.realpath(resumed)) == own
    if not there or goes_on:
        return
    if resumed != "latest" and config.on_existing_run != "set_aside":
        raise ValueError(
            f"output_dir {config.output_dir!r} holds a run ({', '.join(there)}): choose another folder, go on with "
            f"that run by --resume_from_checkpoint latest, or move it out of the way by --on_existing_run set_aside"
        )
    tracked = os.path.basename(folder)  # TensorBoard's
    if glob.glob(os.path.join(glob.escape(folder), tracked, "events.out.tfevents*")):
        there.append(tracked)
    why = "no checkpoint to resume" if resumed == "latest" else "another run"
    print(f"{why}: {', '.join(there)} set aside in {set_aside(folder, there)}")


def is_used(path):
    return os.path.isfile(path) or os.path.isdir(path) and bool(os.listdir(path))


def listed(folder, name):
    path = os.path.join(folder, name)
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def set_aside(folder, names):
    """Move parts of a run into a new folder inside its own; return that."""
    number = 1
    while os.path.lexists(aside := os.path.join(folder, f"set_aside-{number}")):
        number += 1
    for name in names:
        os.makedirs(os.path.dirname(os.path.join(aside, name)), exist_ok=True)
        os.rename(os.path.join(folder, name), os.path.join(aside, name))
    return aside


def read_record(line):
    """A line of a record as a dict with its "step", None for what is none: half of one, of a run that was killed as it
    wrote."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return record
    return None


def read_records(path):
    """The lines of a record, [] where there is none."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [record for line in file if (record := read_record(line)) is not None]


class Run:
    """A run and its folder.

    Attributes: `id`, of a resumed run that of its checkpoint; `closing`, an ExitStack that ends with the run.
    """

    def __init__(self, folder, run_id, writes, closing):
        self.folder, self.id, self.writes, self.closing = folder, run_id, writes, closing

    def write_line(self, name, values):
        """Add a line of JSON to one of the run's records: all of it, or where there is no room, nothing."""
        path, line = os.path.join(self.folder, name), json.dumps({"run_id": self.id} | values).encode() + b"\n"
        with surviving(f"a line of {path}"), open(path, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rewind(self, step):
        """Forget what was written after this step, from which the run now goes on: it is written again. Newer
        checkpoints, damaged ones or those that were passed over by name, are set aside."""
        if not self.writes:
            return
        newer = [
            os.path.join(kind, name)
            for kind in BY_STEP
            for name in listed(self.folder, kind)
            if (match := re.match(r"step-(\d{8})", name)) and int(match[1]) > step
        ]
        checkpoints = [name for name in newer if name.startswith("checkpoints")]
        with surviving("what was written after the checkpoint"):
            if checkpoints:
                print(f"set aside in {set_aside(self.folder, newer)}: {', '.join(newer)}")
            for name in newer if not checkpoints else []:
                os.remove(os.path.join(self.folder, name))
            for name in RECORDS:
                self.rewind_record(name, step)

    def rewind_record(self, name, step):
        """Forget the lines of one of the run's records that are of later steps."""
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
        kept = [line for line in lines if (record := read_record(line)) is not None and record["step"] <= step]
        if kept != lines:
            with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.writelines(kept)


class Unbroken:
    """A text stream in which a line that cannot be written, as of a log on a full disk, is lost and breaks nothing."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()
