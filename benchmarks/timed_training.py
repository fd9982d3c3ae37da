"""A training that is given some seconds: its steps are as many as fit, and what it has learned by then its result."""

import os
import signal
import threading
import time

from score_sde.training import train
from score_sde.training.parts.checkpoints import list_checkpoints
from score_sde.training.parts.loop import EXIT_RESUME
from score_sde.training.parts.run_folder import read_records


# after these shares of the time the steps that fit in the rest are counted anew, and the schedule of the learning rate
# follows; the last one is for what comes after the steps
SHARES = (0.2, 0.6, 1.0)


def train_to_fit(seconds, batch_size, arguments):
    """Train for so many seconds, by the speed that a run turns out to have on a machine that others use, too: it is
    stopped and goes on, with as many steps as there is time for. None leaves it its steps."""
    if seconds is None:
        return train_for(None, arguments)
    began, steps = time.monotonic(), []
    arguments = [str(argument) for argument in [*arguments, "--resume_from_checkpoint", "latest"]]
    output = arguments[arguments.index("--output_dir") + 1]
    for share in SHARES[:-1]:
        stopped = train_for(share * seconds - (time.monotonic() - began), [*arguments, *steps], finish=False)
        if stopped is None:
            return None  # through with its steps
        speeds = [line["images_per_second"] for line in read_records(os.path.join(output, "log.jsonl"))]
        # the last ones, as the machine is now; some seconds and a twentieth for starting anew and what is not training
        recent = sorted(speeds[-5:])[len(speeds[-5:]) // 2]
        left = seconds - (time.monotonic() - began) - 10
        more = int(0.95 * left * recent / batch_size)
        steps = ["--max_train_steps", str(stopped + max(1, more))]
        print(f"step {stopped}, {recent:.0f} images/s: {steps[-1]} steps fit", flush=True)
    return train_for(seconds - (time.monotonic() - began), [*arguments, *steps])


def train_for(seconds, arguments, main=train.main, finish=True):
    """Train by a script's `main`; one that isn't through after so many seconds stops as SIGTERM stops it, and makes
    its result of the averaged weights that it has. None leaves it its time.

    Args:
        arguments: of the command, with --output_dir.
        finish: false leaves it stopped.

    Returns:
        The step at which it was stopped, None for one that was through.
    """
    arguments = [str(argument) for argument in arguments]
    # a signal that comes before the loop begins, or when it is over, changes nothing
    before, done = signal.signal(signal.SIGTERM, lambda *_: None), threading.Event()

    def ask_to_stop():
        wait = max(1, seconds)
        while not done.wait(wait):
            os.kill(os.getpid(), signal.SIGTERM)
            wait = 5

    if seconds is not None:
        threading.Thread(target=ask_to_stop, daemon=True).start()
    try:
        main(arguments)
    except SystemExit as stopped:
        if stopped.code != EXIT_RESUME:
            raise
        done.set()
        newest = list_checkpoints(arguments[arguments.index("--output_dir") + 1])[-1]
        step = int(newest.rpartition("-")[2])
        if finish:
            main([*arguments, "--resume_from_checkpoint", "latest", "--max_train_steps", str(step)])
        return step
    finally:
        done.set()
        signal.signal(signal.SIGTERM, before)
