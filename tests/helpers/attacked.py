"""Bundles that somebody has tampered with."""

import shutil
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

from bundles import edit


@contextmanager
def attacked_copy(sound_bundle, folder, monkeypatch):
    """A copy of a bundle in a folder, to be tampered with, whose opening reaches nothing and leaves no trace."""

    def refuse(*_, **__):
        raise AssertionError("loading reached out")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield Path(shutil.copytree(sound_bundle, folder / "bundle"))
    assert not (folder / "trace").exists() and "evil" not in sys.modules


def write(file, text):
    """The attack by a file; TRACE in it is a path outside of the bundle."""

    def attack(folder):
        (folder / file).write_text(text.replace("TRACE", str(folder.parent / "trace")))

    return attack


def config(file, **changes):
    """The attack by values in a file of JSON."""
    return lambda folder: edit(folder / file, **changes)
