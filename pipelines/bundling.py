"""Pipelines that travel with their code.

`save_pretrained` of a `BundleMixin` pipeline writes a bundle: a diffusers folder that also carries the source files of
its classes, so that `DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True)` opens it where this package is
not installed. `from_pretrained` of the installed classes opens the same bundle, or a repo on the Hub that holds one,
and runs none of its code.

diffusers puts the code files of all repos into one flat folder of modules, so every carried file's name ends in a
stamp, a hash of the code it belongs with: bundles of different versions live side by side in one process.
"""

import hashlib
import importlib
import inspect
import json
import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download


LIBRARIES = ("diffusers", "transformers")
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")

_RELATIVE_IMPORT = re.compile(r"^(from \.)(\w+)( import )", re.MULTILINE)
_STAMP = re.compile(r"_[0-9a-f]{10}$")


def carried_sources(cls):
    """The code that a class needs: {module name: source} of its file and, through relative imports, its siblings; the
    class's own file first. Stamps of an earlier bundle are taken off."""
    entry = Path(inspect.getsourcefile(cls))
    sources, pending = {}, [entry]
    while pending:
        path = pending.pop(0)
        name = _STAMP.sub("", path.stem)
        if name in sources:
            continue
        source = path.read_text(encoding="utf-8")
        pending += [path.with_name(f"{match[2]}.py") for match in _RELATIVE_IMPORT.finditer(source)]
        sources[name] = _RELATIVE_IMPORT.sub(lambda match: match[1] + _STAMP.sub("", match[2]) + match[3], source)
    return sources


def write_code(cls, folder):
    """Write the code of a class into a folder under stamped names; return the stamped name of its module."""
    sources = carried_sources(cls)
    stamp = hashlib.sha256("".join(name + sources[name] for name in sorted(sources)).encode()).hexdigest()[:10]
    for stale in Path(folder).glob("*.py"):
        if _STAMP.search(stale.stem):
            stale.unlink()
    for name, source in sources.items():
        source = _RELATIVE_IMPORT.sub(rf"\g<1>\g<2>_{stamp}\g<3>", source)
        Path(folder, f"{name}_{stamp}.py").write_text(source, encoding="utf-8")
    return f"{next(iter(sources))}_{stamp}"


def read_index(folder):
    """The model_index.json of a folder."""
    return json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))


def saved_class_name(index):
    """The name of the pipeline class that a model index names, with or without code."""
    return index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][1]


class BundleMixin:
    """Saving and loading of bundles, for subclasses of `DiffusionPipeline`: name it before that base class."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `DiffusionPipeline.save_pretrained`; the folder then also carries the code of the classes that come from
        neither diffusers nor transformers."""
        super().save_pretrained(save_directory, *args, **kwargs)
        index = read_index(save_directory)
        index["_class_name"] = [write_code(type(self), save_directory), type(self).__name__]
        for name, component in self.components.items():
            if component is not None and type(component).__module__.split(".")[0] not in LIBRARIES:
                module = write_code(type(component), os.path.join(save_directory, name))
                index[name] = [module, type(component).__name__]
        path = Path(save_directory, "model_index.json")
        path.with_suffix(".tmp").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        path.with_suffix(".tmp").replace(path)

    @classmethod
    def installed_package(cls):
        """Name of the installed package that this class comes from; None for a class that came out of a bundle."""
        package = cls.__module__.split(".")[0]
        return None if package == "diffusers_modules" else package

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As `DiffusionPipeline.load_config`, with carried code replaced by the installed classes of the same name."""
        loaded = super().load_config(*args, **kwargs)
        if cls.installed_package() is None:
            return loaded
        config, *others = loaded if isinstance(loaded, tuple) else (loaded,)
        config = cls.use_installed_classes(config)
        return (config, *others) if others else config

    @classmethod
    def use_installed_classes(cls, index):
        """A model index in which every class that a bundle carries is the installed one, and the pipeline this class.
        Raises ValueError for a component that this package doesn't have, naming it, and for a pipeline that is neither
        a base nor a subclass of this one."""
        package = importlib.import_module(cls.installed_package())
        saved = saved_class_name(index)
        saved_class = getattr(package, saved) if saved in package.__all__ else object
        if not (issubclass(saved_class, cls) or issubclass(cls, saved_class)) or saved_class is object:
            raise ValueError(f"this folder holds a {saved}: open it with that class, not with {cls.__name__}")
        installed = dict(index, _class_name=cls.__name__)
        for name, value in index.items():
            is_component = isinstance(value, (list, tuple)) and len(value) == 2 and not name.startswith("_")
            if not is_component or value[0] is None or value[0] in LIBRARIES:
                continue
            if value[1] not in package.__all__:
                raise ValueError(
                    f"component {name!r} is a {value[1]} of {value[0]!r}, which {package.__name__} doesn't have: "
                    f"DiffusionPipeline.from_pretrained(..., trust_remote_code=True) runs the folder's own code instead"
                )
            installed[name] = [package.__name__, value[1]]
        return installed

    @classmethod
    def fetch(cls, folder_or_repo, **kwargs):
        """The local folder of a bundle, and the arguments that were not about downloading. From the Hub only configs
        and safetensors weights are downloaded. Raises ValueError for what is no pipeline folder."""
        folder = str(folder_or_repo)
        download = {key: kwargs.pop(key) for key in DOWNLOAD_ARGUMENTS if key in kwargs}
        if not os.path.isdir(folder):
            if folder.count("/") > 1 or folder.startswith((".", "/", "~")):
                raise ValueError(f"{folder!r} is neither a folder nor the id of a repo on the Hub")
            try:
                folder = snapshot_download(folder, allow_patterns=["*.json", "*.safetensors"], **download)
            except OSError as error:
                raise ValueError(f"{folder!r} is no folder here and cannot be had from the Hub: {error}") from error
        if not os.path.isfile(os.path.join(folder, "model_index.json")):
            raise ValueError(f"{folder!r} holds no model_index.json: it is not a diffusers pipeline folder")
        return folder, kwargs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Open a bundle: a folder, or the id of a repo on the Hub.

        Called on an installed class, it uses the installed classes and runs no code of the bundle. Takes the arguments
        of `DiffusionPipeline.from_pretrained`.
        """
        if cls.installed_package() is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        folder, kwargs = cls.fetch(pretrained_model_name_or_path, **kwargs)
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(folder, **kwargs)
