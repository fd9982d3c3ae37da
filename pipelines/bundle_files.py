"""Reading a folder that somebody else may have made: its own files alone, its configs as data of bounded size."""

import json
import os
import stat
from pathlib import Path

from .wording import quoted


# bytes
LARGEST_CONFIG = 2**24
# lists and objects in each other
DEEPEST_CONFIG = 32


def own_file(folder, *names):
    """The path of a file in a folder, `names` being its subfolders and its name.

    Raises ValueError, naming it, where there is none, for what is no plain file (a device, a pipe), and for what leads
    out of the folder: names with "..", links. Links of the Hub's own cache, from snapshots/ to blobs/, are followed.
    """
    path = os.path.join(folder, *names)
    if any(name in ("", ".", "..") or os.path.basename(name) != name or "\0" in name for name in names):
        raise ValueError(f"{quoted(path)} leads out of {folder}")
    parents = [os.path.join(folder, *names[:count]) for count in range(1, len(names))]
    for parent in parents:
        if os.path.islink(parent):
            raise ValueError(f"{parent} is a link: a bundle holds its own folders; copy what it leads to")
    if not os.path.lexists(path):
        raise ValueError(f"{os.path.dirname(path)} holds no {names[-1]}")
    target = _cached_blob(folder, path) if os.path.islink(path) else path
    if target is None:
        raise ValueError(f"{path} is a link: a bundle holds its own files; copy what it leads to")
    if not (os.path.lexists(target) and stat.S_ISREG(os.lstat(target).st_mode)):
        raise ValueError(f"{path} is no file")
    return path


def _cached_blob(folder, link):
    """What a link in a snapshot of the Hub's cache leads to: a file in blobs/ beside snapshots/, or on in the store
    that the repos of a cache share. None for any other link."""
    # the folder is the snapshot, or lies in it
    snapshot = next((each for each in (Path(folder), *Path(folder).parents) if each.parent.name == "snapshots"), None)
    if snapshot is None:
        return None
    storage, target = str(snapshot.parent.parent), _link_target(link)
    cache = os.path.dirname(storage)
    if os.path.dirname(target) != os.path.join(storage, "blobs"):
        return None
    if os.path.islink(target):
        target = _link_target(target)
        if os.path.dirname(os.path.dirname(target)) != os.path.join(cache, "blobs"):
            return None
    return target


def _link_target(link):
    parent, name = os.path.split(os.path.join(os.path.dirname(link), os.readlink(link)))
    return os.path.join(os.path.realpath(parent), name)


def read_config(folder, *names):
    """The JSON object in a file of a folder (`own_file`). Raises ValueError, naming the file, where there is none."""
    path = own_file(folder, *names)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
        if len(content) > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        config = json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object but {quoted(config)}")
    level = [config]
    for _ in range(DEEPEST_CONFIG):
        children = [each for value in level for each in (value.values() if isinstance(value, dict) else value)]
        level = [each for each in children if isinstance(each, (dict, list))]
    if level:
        raise ValueError(f"{path} is no config: lists and objects lie in each other more than {DEEPEST_CONFIG} deep")
    return config


def read_index(folder):
    """The model_index.json of a folder. Raises ValueError where it names no pipeline class, with or without code."""
    index = read_config(folder, "model_index.json")
    name = index.get("_class_name")
    names = name if isinstance(name, list) and len(name) == 2 else [name]
    if not all(isinstance(each, str) for each in names):
        raise ValueError(f"{folder}/model_index.json: _class_name {quoted(name)} is no name of a class")
    return index


def saved_class_name(index):
    """The name of the pipeline class that a model index names, with or without code."""
    return index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][1]
