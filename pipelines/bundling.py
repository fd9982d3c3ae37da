"""Pipelines that travel with their code.

`save_pretrained` of a `BundleMixin` pipeline writes a bundle: a diffusers folder that also carries the source files of
its classes, so that `DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True)` opens it where this package is
not installed. `from_pretrained` of the installed classes opens the same bundle, or a repo on the Hub that holds one,
and runs none of its code.

diffusers puts the code files of all repos into one flat folder of modules, so every carried file's name ends in a
stamp, a hash of the code it belongs with: bundles of different versions live side by side in one process.
"""

import errno
import hashlib
import importlib
import inspect
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


# of the bundles that are written here; those of lower numbers are opened, too
FORMAT = 1
LIBRARIES = ("diffusers", "transformers")
# bytes
LARGEST_CONFIG = 2**24
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")

_RELATIVE_IMPORT = re.compile(r"^(from \.)(\w+)( import )", re.MULTILINE)
_STAMP = re.compile(r"_[0-9a-f]{10}$")


def without_stamps(source):
    """Source code as it is in this package: its imports of siblings without the stamps of a bundle."""
    return _RELATIVE_IMPORT.sub(lambda match: match[1] + _STAMP.sub("", match[2]) + match[3], source)


def imported(source):
    """The names of the siblings that source code imports."""
    return [match[2] for match in _RELATIVE_IMPORT.finditer(source)]


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
        pending += [path.with_name(f"{sibling}.py") for sibling in imported(source)]
        sources[name] = without_stamps(source)
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


def compare_code(folder, classes):
    """How the code in a bundle differs from that of installed classes; none of it is run.

    Args:
        folder: a bundle.
        classes: {folder of a component, or "." for the pipeline: installed class}.

    Returns:
        {path in the folder: "same", "differs", "unknown" for a file that no class has, or "missing" for one that isn't
        there}.
    """
    installed = {
        Path(where, f"{name}.py"): source
        for where, cls in classes.items()
        for name, source in carried_sources(cls).items()
    }
    verdicts, found = {}, set()
    for path in sorted(Path(folder).rglob("*.py")):
        place = path.relative_to(folder)
        name = place.with_name(_STAMP.sub("", place.stem) + ".py")
        found.add(name)
        same = without_stamps(path.read_text(encoding="utf-8", errors="replace")) == installed.get(name)
        verdicts[str(place)] = "unknown" if name not in installed else "same" if same else "differs"
    return verdicts | {str(name): "missing" for name in sorted(installed.keys() - found)}


def read_config(path):
    """The JSON object in a file. Raises ValueError, naming the file, where there is none."""
    try:
        if os.path.getsize(path) > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object but {str(config)[:80]}")
    return config


def read_index(folder):
    """The model_index.json of a folder. Raises ValueError where it names no pipeline class, with or without code."""
    path = os.path.join(folder, "model_index.json")
    index = read_config(path)
    name = index.get("_class_name")
    if not isinstance(name[1] if isinstance(name, list) and len(name) == 2 else name, str):
        raise ValueError(f"{path}: _class_name {name!r} is no name of a class")
    return index


def saved_class_name(index):
    """The name of the pipeline class that a model index names, with or without code."""
    return index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][1]


def shown(value, limit=200):
    """A value as a message quotes it, cut where it is long."""
    text = value if isinstance(value, Exception) else repr(value)
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def check_token(token=None):
    """Raise ValueError for a token of the Hub that cannot be one: the client fails at it with an error that quotes it.

    Args:
        token: as the client takes it: None or True for the one that is stored or in HF_TOKEN, False for none.
    """
    token = get_token() if token in (None, True) else token
    if token and not (isinstance(token, str) and re.fullmatch(r"[!-~]+", token)):
        raise ValueError(
            "the token of the Hub holds spaces, line feeds or other letters than a token has: log in by `hf auth "
            "login`, or set HF_TOKEN, anew"
        )


@contextmanager
def hub_errors(kind, what, token=None):
    """Let errors of the Hub's client inside be of one kind of exception, `what` and why it is (`hub_problem`); they,
    and what is printed of them, quote nothing of a request. ValueError stays one. A token that cannot be one is found
    before."""
    check_token(token)
    try:
        yield
    except Exception as error:  # the client has no common class of errors
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise ValueError(shown(error, 2000)) from None
        raise kind(f"{what}: {hub_problem(error)}") from None


def hub_problem(error):
    """Why a request to the Hub failed and what to do, in words that quote nothing of the request: it holds a token."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    status = next((each.response.status_code for each in causes if getattr(each, "response", None) is not None), None)
    kinds = {kind for each in causes for kind in type(each).__mro__}
    if OfflineModeIsEnabled in kinds:
        return "HF_HUB_OFFLINE is set: unset it, or load what is in the cache already"
    if RepositoryNotFoundError in kinds:
        return (
            "there is no such repo, or it is private: check its name, and log in by `hf auth login`, or set HF_TOKEN, "
            "with a token that may see it"
        )
    if RevisionNotFoundError in kinds:
        return "it has no such revision: check the name of the branch, tag or commit"
    if status == 401:
        return "there is no token, or the Hub doesn't know it: log in by `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return (
            "the token may not do that: log in by `hf auth login`, or set HF_TOKEN, with a token of the repo's owner "
            "that may write, or open a pull request (create_pr)"
        )
    if status == 429:
        return "the Hub limits the number of requests: wait some minutes and try again; what has arrived is kept"
    if status is not None:
        return f"the Hub answered with status {status}: try again later"
    if isinstance(error, LocalEntryNotFoundError) and len(causes) == 1:
        return "it is not in the cache: load it once without local_files_only"
    if getattr(causes[-1], "filename", None) or getattr(causes[-1], "errno", None) == errno.ENOSPC:
        return f"{causes[-1].strerror}: {causes[-1].filename or 'make room'}"
    return f"the Hub cannot be reached ({type(causes[-1]).__name__}): check the network and try again"


def fetch(folder_or_repo, patterns=None, **kwargs):
    """The local folder of a bundle, and the arguments that were not about downloading.

    Args:
        folder_or_repo: a folder, or the id of a repo on the Hub.
        patterns: of the files to download; by default configs, and safetensors weights of the `variant` asked for.

    Raises ValueError for what is no pipeline folder and for what cannot be downloaded, with what to do.
    """
    folder = str(folder_or_repo)
    download = {key: kwargs.pop(key) for key in DOWNLOAD_ARGUMENTS if key in kwargs}
    if not os.path.isdir(folder):
        if folder.count("/") > 1 or folder.startswith((".", "/", "~")):
            raise ValueError(f"{folder!r} is neither a folder nor the id of a repo on the Hub")
        variant = kwargs.get("variant")
        weights = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"] if variant else ["*.safetensors"]
        what = f"{folder!r} is no folder here and cannot be had from the Hub"
        with hub_errors(ValueError, what, download.get("token")):
            folder = snapshot_download(
                folder,
                allow_patterns=patterns or ["*.json", *weights],
                ignore_patterns=None if variant else ["*.*.safetensors"],
                **download,
            )
    if not os.path.isfile(os.path.join(folder, "model_index.json")):
        raise ValueError(f"{folder!r} holds no model_index.json: it is not a diffusers pipeline folder")
    return folder, kwargs


def _write_config(path, config):
    config.pop("_name_or_path", None)
    path.with_suffix(".tmp").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


class BundleMixin:
    """Saving and loading of bundles, for subclasses of `DiffusionPipeline`: name it before that base class."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `DiffusionPipeline.save_pretrained`; the folder then also carries the code of the classes that come from
        neither diffusers nor transformers, and doesn't tell where on this machine the pipeline was loaded from.
        Raises ValueError for push_to_hub=True."""
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "save_pretrained(push_to_hub=True) would upload no code: call push_to_hub(repo_id) instead"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        index = read_index(save_directory)
        index |= {
            "_class_name": [write_code(type(self), save_directory), type(self).__name__],
            "_bundle_format": FORMAT,
        }
        for name, component in self.components.items():
            if component is None:
                continue
            folder = Path(save_directory, name)
            if type(component).__module__.split(".")[0] not in LIBRARIES:
                index[name] = [write_code(type(component), folder), type(component).__name__]
            for path in folder.glob("*config.json"):
                _write_config(path, read_config(path))
        _write_config(Path(save_directory, "model_index.json"), index)

    def push_to_hub(self, repo_id, **kwargs):
        """Upload this pipeline as a bundle with its card: see `hub.push_to_hub` of the installed package. A pipeline
        that came out of a bundle is uploaded by diffusers."""
        if self.installed_package() is None:
            return super().push_to_hub(repo_id, **kwargs)
        return importlib.import_module(f"{self.installed_package()}.hub").push_to_hub(self, repo_id, **kwargs)

    @classmethod
    def installed_package(cls):
        """Name of the installed package that this code belongs to; None for code that came out of a bundle."""
        package = __name__.split(".")[0]
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
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Open a bundle: a folder, or the id of a repo on the Hub.

        Called on an installed class, it uses the installed classes and runs no code of the bundle. Takes the arguments
        of `DiffusionPipeline.from_pretrained`.
        """
        if cls.installed_package() is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        folder, kwargs = fetch(pretrained_model_name_or_path, **kwargs)
        checks = importlib.import_module(f"{cls.installed_package()}.bundle_checks")
        checks.check_bundle(folder, cls, kwargs.get("variant"), given=kwargs)
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(folder, **kwargs)
