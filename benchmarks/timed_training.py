"""A training that is given some seconds: what it has learned by then is its result."""

import os
import signal
import threading

from score_sde.training import train
from score_sde.training.parts.checkpoints import list_checkpoints
from score_sde.training.parts.loop import EXIT_RESUME


def train_for(seconds, arguments, main=train.main):
    """Train by a script's `main`; one that isn't through after so many seconds stops as SIGTERM stops it, and makes
    its result of the averaged weights that it has. None leaves it its time.

    Args:
        arguments: of the command, with --output_dir.
    """
    arguments = [str(argument) for argument in arguments]
    # a signal that comes when the loop is over changes nothing
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    timer = threading.Timer(seconds or 0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        main(arguments)
    except SystemExit as stopped:
        if stopped.code != EXIT_RESUME:
            raise
        newest = list_checkpoints(arguments[arguments.index("--output_dir") + 1])[-1]
        step = str(int(newest.rpartition("-")[2]))
        main([*arguments, "--resume_from_checkpoint", "latest", "--max_train_steps", step])
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
