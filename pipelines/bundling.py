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
import shutil
import stat
import tempfile
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from diffusers import ModelMixin
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
# lists and objects in each other
DEEPEST_CONFIG = 32
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")

_RELATIVE_IMPORT = re.compile(r"^(from \.)(\w+)( import )", re.MULTILINE)
_STAMP = re.compile(r"_[0-9a-f]{10}$")


def without_stamps(source):
    """Source code as it is in this package: its imports of siblings without the stamps of a bundle."""
    return _RELATIVE_IMPORT.sub(lambda match: match[1] + unstamped(match[2]) + match[3], source)


def unstamped(module):
    """The name of a module of a bundle as it is in this package."""
    return _STAMP.sub("", module)


def sibling_imports(source):
    """Names of the modules beside it that a source file imports."""
    return [match[2] for match in _RELATIVE_IMPORT.finditer(source)]


def carried_sources(cls):
    """The code that a class needs: {module name: source} of its file and, through relative imports, its siblings; the
    class's own file first. Stamps of an earlier bundle are taken off."""
    entry = Path(inspect.getsourcefile(cls))
    sources, pending = {}, [entry]
    while pending:
        path = pending.pop(0)
        name = unstamped(path.stem)
        if name in sources:
            continue
        source = path.read_text(encoding="utf-8")
        pending += [path.with_name(f"{sibling}.py") for sibling in sibling_imports(source)]
        sources[name] = without_stamps(source)
    return sources


def write_code(cls, folder):
    """Write the code of a class into a folder under stamped names; return the stamped name of its module."""
    sources = carried_sources(cls)
    stamp = hashlib.sha256("".join(name + sources[name] for name in sorted(sources)).encode()).hexdigest()[:10]
    for name, source in sources.items():
        source = _RELATIVE_IMPORT.sub(rf"\g<1>\g<2>_{stamp}\g<3>", source)
        Path(folder, f"{name}_{stamp}.py").write_text(source, encoding="utf-8")
    return f"{next(iter(sources))}_{stamp}"


def shortened(text):
    """What a message says of a text that may be of any length."""
    text = str(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def quoted(value):
    """A value in a message, of bounded length."""
    return shortened(repr(value))


def few(names, most=3):
    """A list of names as text, of many the first ones and their number."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
            raise ValueError(str(error)[:2000]) from None
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


def download(folder_or_repo, allow_patterns, ignore_patterns=None, **arguments):
    """The local folder, without links in its path, of a folder or of a repo on the Hub, of which it has what the
    patterns allow. Raises ValueError for what can't be had, with what to do."""
    folder = str(folder_or_repo)
    if os.path.isfile(folder):
        raise ValueError(f"{quoted(folder)} is a file: give the folder that holds it")
    if not os.path.isdir(folder):
        if folder.count("/") > 1 or folder.startswith((".", "/", "~")):
            raise ValueError(f"{quoted(folder)} is neither a folder nor the id of a repo on the Hub")
        what = f"{quoted(folder)} is no folder here and cannot be had from the Hub"
        with hub_errors(ValueError, what, arguments.get("token")):
            folder = snapshot_download(
                folder, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns, **arguments
            )
    return os.path.realpath(folder)


def fetch(folder_or_repo, patterns=None, **kwargs):
    """The local folder of a bundle, and the arguments that were not about downloading.

    Args:
        folder_or_repo: a folder, or the id of a repo on the Hub.
        patterns: of the files to download; by default configs, and safetensors weights: of the `variant` asked for, and
            the others of those models that have none of it.

    Raises ValueError for what is no pipeline folder and for what cannot be downloaded, with what to do.
    """
    arguments = {key: kwargs.pop(key) for key in DOWNLOAD_ARGUMENTS if key in kwargs}
    variant, plain = kwargs.get("variant"), {"ignore_patterns": ["*.*.safetensors"]}
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w[\w-]*", variant)):
        raise ValueError(f"variant {quoted(variant)} is no name of a variant, such as 'fp16'")
    if patterns or not variant:
        patterns = {"allow_patterns": patterns} if patterns else {"allow_patterns": ["*.json", "*.safetensors"]} | plain
        folder = download(folder_or_repo, **patterns, **arguments)
    else:
        patterns = ["*.json", f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"]
        folder = download(folder_or_repo, patterns, **arguments)
        without = [path.parent for path in Path(folder).glob("*/config.json") if not any(path.parent.glob("*.safet*"))]
        if without and any(Path(folder).glob(f"*/*.{variant}*.safetensors")):
            patterns = [f"{path.name}/*.safetensors" for path in without]
            folder = download(folder_or_repo, patterns, **plain, **arguments)
    if not os.path.lexists(os.path.join(folder, "model_index.json")):
        raise ValueError(f"{folder!r} holds no model_index.json: it is not a diffusers pipeline folder")
    return folder, kwargs


# --- saving -------------------------------------------------------------------------------------------------------


def plain_component(component):
    """A component without what `torch.compile` and data parallelism wrap around it."""
    while isinstance(component, torch.nn.Module) and not isinstance(component, ModelMixin):
        inner = getattr(component, "_orig_mod", None) or getattr(component, "module", None)
        if inner is None:
            return component
        component = inner
    return component


def tensor_problems(expected, found):
    """How tensors differ from those that a model has, in words; None where they don't.

    Args:
        expected, found: {name: shape}.
    """

    problems = []
    for problem, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            problems.append(f"{problem}: {few(sorted(names))}")
    shapes = [
        f"{name} {tuple(found[name])} for {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if shapes:
        problems.append(f"of another shape: {few(shapes)}")
    return "; ".join(problems) or None


def check_saveable(name, model):
    """Raise ValueError for a component whose weights its class and config do not describe: nothing could open it."""
    if not isinstance(model, ModelMixin):
        if isinstance(model, torch.nn.Module):
            raise ValueError(f"{name} is a {type(model).__name__}, which is no ModelMixin: diffusers cannot save it")
        return
    # as it is saved: not without what was left at its default
    config = {key: value for key, value in model.config.items() if key != "_use_default_values"}
    with torch.device("meta"):
        described = type(model).from_config(config)
    problems = tensor_problems(
        {key: tensor.shape for key, tensor in described.state_dict().items()},
        {key: tensor.shape for key, tensor in model.state_dict().items()},
    )
    if problems:
        raise ValueError(
            f"the tensors of {name} are not those that its config describes ({problems}), so that nothing could open "
            f"it: take adapters off (pipe.unload_lora_weights(), after pipe.fuse_lora() to keep them), undo "
            f"fuse_qkv_projections, and unwrap compiled or parallel blocks before saving"
        )


def _write_config(path, config):
    config.pop("_name_or_path", None)
    Path(path).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# what a bundle of the same name had before and would contradict what is written now
_STALE = re.compile(r"diffusion_pytorch_model.*\.(safetensors|bin)(\..*\.json)?|.*_[0-9a-f]{10}\.py")


def _move_in(new, folder, variant):
    """Move the files of a new bundle into a folder. While they move it has no model_index.json: what is half there
    doesn't open. Weights and code of an earlier bundle go; with a variant, of its weights those of the variant."""
    index = Path(folder, "model_index.json")
    index.unlink(missing_ok=True)
    for parent, _, names in os.walk(new):
        target = Path(folder, os.path.relpath(parent, new))
        target.mkdir(exist_ok=True)
        for path in target.iterdir():
            stale = _STALE.fullmatch(path.name) and path.name not in names
            if stale and (variant is None or path.suffix == ".py" or f".{variant}" in path.name):
                path.unlink()
        for name in names:
            if name != index.name:
                os.replace(os.path.join(parent, name), target / name)
    os.replace(os.path.join(new, index.name), index)


class BundleMixin:
    """Saving and loading of bundles, for subclasses of `DiffusionPipeline`: name it before that base class."""

    def save_pretrained(
        self,
        save_directory,
        safe_serialization=True,
        variant=None,
        max_shard_size=None,
        push_to_hub=False,
        **kwargs,
    ):
        """As `DiffusionPipeline.save_pretrained`; the folder then also carries the code of the classes that come from
        neither diffusers nor transformers, and doesn't tell where on this machine the pipeline was loaded from. What
        `torch.compile` and data parallelism wrap around a component is not saved. In a folder that holds a bundle, the
        new one takes its place once it is whole; with `variant` its weights come beside those that are there.

        Raises ValueError for push_to_hub=True, for weights other than safetensors, and for components that nothing
        could open again: with adapters attached, or fused projections.
        """
        if push_to_hub:
            raise ValueError(
                "save_pretrained(push_to_hub=True) would upload no code: call push_to_hub(repo_id) instead"
            )
        if not safe_serialization or kwargs.get("use_flashpack"):
            raise ValueError(
                "bundles hold their weights as safetensors: leave out safe_serialization=False and use_flashpack"
            )
        kwargs.pop("use_flashpack", None)
        if kwargs:
            raise TypeError(f"save_pretrained has no argument {', '.join(kwargs)}")
        plain = copy(self)
        for name, component in self.components.items():
            component = plain_component(component)
            check_saveable(name, component)
            setattr(plain, name, component)
        os.makedirs(save_directory, exist_ok=True)
        new = tempfile.mkdtemp(prefix=".", suffix=".partial", dir=save_directory)
        try:
            super(BundleMixin, plain).save_pretrained(new, variant=variant, max_shard_size=max_shard_size)
            plain._add_code(new)
            _move_in(new, save_directory, variant)
        finally:
            shutil.rmtree(new)

    def _add_code(self, folder):
        """Make a bundle of a folder that diffusers saved this pipeline in."""
        index = read_index(folder)
        index |= {"_class_name": [write_code(type(self), folder), type(self).__name__], "_bundle_format": FORMAT}
        for name, component in self.components.items():
            if component is None:
                continue
            place = Path(folder, name)
            if type(component).__module__.split(".")[0] not in LIBRARIES:
                index[name] = [write_code(type(component), place), type(component).__name__]
            for path in place.glob("*config.json"):
                _write_config(path, read_config(folder, name, path.name))
        _write_config(Path(folder, "model_index.json"), index)

    def push_to_hub(self, repo_id, **kwargs):
        """Upload this pipeline as a bundle with its card: see `hub.push_to_hub` of the installed package. A pipeline
        that came out of a bundle is uploaded by diffusers."""
        if self.installed_package() is None:
            return super().push_to_hub(repo_id, **kwargs)
        return importlib.import_module(f"{self.installed_package()}.sharing.hub").push_to_hub(self, repo_id, **kwargs)

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
        Raises ValueError for a component that this package doesn't have, naming it, and for a pipeline of other
        components than this one's."""
        package = importlib.import_module(cls.installed_package())
        saved = saved_class_name(index)
        saved_class = getattr(package, saved) if saved in package.__all__ else object
        # pipelines of one constructor have the same components
        if saved_class.__init__ is not cls.__init__:
            raise ValueError(
                f"this folder holds a {shortened(saved)}: open it with that class, not with {cls.__name__}"
            )
        installed = dict(index, _class_name=cls.__name__)
        for name, value in index.items():
            is_component = isinstance(value, (list, tuple)) and len(value) == 2 and not name.startswith("_")
            if not is_component or value[0] is None or value[0] in LIBRARIES:
                continue
            if value[1] not in package.__all__:
                raise ValueError(
                    f"component {quoted(name)} is a {shortened(value[1])} of {quoted(value[0])}, which "
                    f"{package.__name__} doesn't have: "
                    f"DiffusionPipeline.from_pretrained(..., trust_remote_code=True) runs the folder's own code instead"
                )
            installed[name] = [package.__name__, value[1]]
        return installed

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Open a bundle: a folder, or the id of a repo on the Hub.

        Called on an installed class, it uses the installed classes and runs no code of the bundle. Takes the arguments
        of `DiffusionPipeline.from_pretrained` but those that would run code, or open other weights than safetensors.
        """
        if cls.installed_package() is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        folder, kwargs = fetch(pretrained_model_name_or_path, **kwargs)
        checks = importlib.import_module(f"{cls.installed_package()}.sharing.bundle_checks")
        open_folder = super().from_pretrained
        arguments = checks.safe_arguments(kwargs, cls)

        def open_checked():
            checks.check_bundle(folder, cls, kwargs.get("variant"), given=kwargs)
            return open_folder(folder, **arguments)

        return checks.while_unchanged(folder, open_checked)
