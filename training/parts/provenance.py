"""Where a figure comes from, for everything that ends on a card."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import score_sde


# the folder that holds training/: the checkout, or the installed package
ROOT = str(Path(__file__).resolve().parents[2])


def without_place(argument):
    """An argument of a command without where this machine keeps things: a path from this project's folder or from the
    working one, where it lies in them, of another its last part."""
    option, equals, path = argument.rpartition("=")
    if not os.path.isabs(path):
        return argument
    path = os.path.normpath(path)
    for folder in (ROOT, os.getcwd()):
        if path.startswith(os.path.join(folder, "")):
            return option + equals + os.path.relpath(path, folder)
    return option + equals + os.path.basename(path)


def typed_command():
    """The command of this process, as a list of words. The parts of `score-sde` name themselves in sys.argv[0], as
    "score-sde train"; a script's path follows Python."""
    program, *arguments = sys.argv
    if program.startswith("score-sde "):
        return [*program.split(), *arguments]
    return [os.path.basename(sys.executable), program, *arguments]


def provenance(device):
    """The command, the code and the machine: {"command", "commit", "machine"}."""
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if device.type != "cpu":
        machine += f", {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
    return {
        "command": shlex.join(map(without_place, typed_command())),
        # of a source tree that git doesn't know, the version
        "commit": commit or f"score-sde {score_sde.__version__}",
        "machine": machine,
    }
