"""Files and folders that are whole or not there: written under a temporary name of their own, synced, then renamed."""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import tempfile
from contextlib import contextmanager


# read once: it can only be read by setting it, which other threads would see
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def whole_file(path):
    """A temporary path beside `path`, to be written inside; it takes the place of `path` in the end, or is removed
    where anything failed. Processes that write the same file at once don't disturb each other."""
    path = os.path.abspath(path)
    name, folder = os.path.basename(path), os.path.dirname(path)
    handle, temporary = tempfile.mkstemp(suffix=".partial", prefix=f".{name}.", dir=folder)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp's is for its owner alone
        _sync(temporary)
        os.replace(temporary, path)
        _sync(folder)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path, value, **options):
    """Write a value as JSON, indented and ending in a line feed; `options` are those of `json.dump`."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, **options)
        file.write("\n")


@contextmanager
def whole_folder(path):
    """A temporary folder beside `path`, to be filled inside; it takes the place of `path`, in one step where the system
    can (Linux), or is removed where anything failed."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = tempfile.mkdtemp(suffix=".partial", prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    before = temporary.removesuffix(".partial") + ".replaced"
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_UMASK)
        sync_folder(temporary)
        _swap_in(temporary, path, before)
        _sync(os.path.dirname(path))
    finally:
        # what was there before, or what could not be finished
        shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def _swap_in(new, path, before):
    """Put a folder in the place of another, or of none; what was there then stands at `new` or at `before`."""
    while True:
        try:
            os.rename(new, path)  # an empty folder gives way, too
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if _exchange(new, path):
            return
        shutil.rmtree(before, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            os.rename(path, before)


def _exchange(a, b):
    """Let two paths change places in one step. Returns whether the system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_working_folder, exchange = -100, 2
    return renameat2(at_working_folder, os.fsencode(a), at_working_folder, os.fsencode(b), exchange) == 0


def sync_folder(path):
    """Let every file in a folder, and the folders, reach the disk."""
    for parent, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync(os.path.join(parent, name))
        _sync(parent)


def _sync(path):
    if os.name == "nt" and os.path.isdir(path):
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
