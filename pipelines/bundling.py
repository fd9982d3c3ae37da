"""Pipelines that travel with their code.

`save_pretrained` of a `BundleMixin` pipeline writes a bundle: a diffusers folder that also carries the source files of
its classes (`carried_code`), so that `DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True)` opens it where
this package is not installed. `from_pretrained` of the installed classes opens the same bundle, or a repo on the Hub
that holds one, and runs none of its code.
"""

import importlib
import inspect
import json
import os
import re
import shutil
import tempfile
from copy import copy
from pathlib import Path

import torch
from diffusers import ModelMixin

from .bundle_files import read_config, read_index, saved_class_name
from .carried_code import LIBRARIES, write_code
from .wording import few, quoted, shortened


# of the bundles that are written here; those of lower numbers are opened, too
FORMAT = 1
# of a pipeline's components, those that are networks
NETWORK_ROLES = ("transformer", "unet")


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
        if isinstance(model, torch.nn.Module) and type(model).__module__.split(".")[0] != "transformers":
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
_STALE = re.compile(r"(diffusion_pytorch_)?model.*\.(safetensors|bin)(\..*\.json)?|.*_[0-9a-f]{10}\.py")


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


def any_component(name):
    """What stands in a model index for a component that its caller gives, so that diffusers lets any take its place."""
    return ["diffusers", "SchedulerMixin" if name == "scheduler" else "ModelMixin"]


def of_library(cls):
    """Whether a class is one of the libraries that whoever opens a bundle has."""
    return cls.__module__.split(".")[0] in LIBRARIES


def add_code(pipeline, folder):
    """Make a bundle of a folder that diffusers saved a pipeline in: what is of neither diffusers nor transformers, the
    pipeline's class or a component's, comes with its code."""
    index = read_index(folder) | {"_bundle_format": FORMAT}
    if not of_library(type(pipeline)):
        index["_class_name"] = [write_code(type(pipeline), folder), type(pipeline).__name__]
    for name, component in pipeline.components.items():
        if component is None:
            continue
        place, component = Path(folder, name), plain_component(component)
        if not of_library(type(component)):
            index[name] = [write_code(type(component), place), type(component).__name__]
        for path in place.glob("*config.json"):
            _write_config(path, read_config(folder, name, path.name))
    _write_config(Path(folder, "model_index.json"), index)


def installed_components(index, package, given=()):
    """{component: entry} for a model index, of the components whose class is of neither diffusers nor transformers: the
    class of that name that a package has; of those that are given, without it, any.

    Raises ValueError for a component that the package doesn't have, naming it."""
    installed = {}
    for name, value in index.items():
        is_component = isinstance(value, (list, tuple)) and len(value) == 2 and not name.startswith("_")
        if not is_component or value[0] is None or value[0] in LIBRARIES:
            continue
        if value[1] not in package.__all__ and name not in given:
            by_class = f"its class, classes=[{shortened(value[1])}], or " if name in NETWORK_ROLES else ""
            raise ValueError(
                f"component {quoted(name)} is a {shortened(value[1])} of {quoted(value[0])}, which "
                f"{package.__name__} doesn't have: pass {by_class}one that is opened, {shortened(name)}=...; "
                f"DiffusionPipeline.from_pretrained(..., trust_remote_code=True) runs the folder's own code instead"
            )
        installed[name] = [package.__name__, value[1]] if value[1] in package.__all__ else any_component(name)
    return installed


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
            add_code(plain, new)
            _move_in(new, save_directory, variant)
        finally:
            shutil.rmtree(new)

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
        # what is opened was checked before: classes that are not of this package are those of components that are given
        config = cls.use_installed_classes(config, given=config)
        return (config, *others) if others else config

    @classmethod
    def use_installed_classes(cls, index, given=()):
        """A model index in which every class that a bundle carries is the installed one, and the pipeline this class;
        of components that are given, a class that this package doesn't have is any network.

        Raises ValueError for another component that this package doesn't have, naming it, and for a pipeline of other
        components than this one's."""
        package = importlib.import_module(cls.installed_package())
        saved = saved_class_name(index)
        saved_class = getattr(package, saved) if saved in package.__all__ else object
        # pipelines of one constructor have the same components
        related = issubclass(cls, saved_class) or saved_class.__init__ is cls.__init__
        if saved_class is object or not related:
            raise ValueError(
                f"this folder holds a {shortened(saved)}: open it with that class, not with {cls.__name__}"
            )
        return dict(index, _class_name=cls.__name__) | installed_components(index, package, given)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """A pipeline of this class with the components of another, ours or a stock one, which are shared, and with what
        its config says, such as the names of classes.

        Args:
            pipeline: what it is made of; components that this class doesn't have are left out.
            kwargs: arguments of the class in place of its own; and `dtype`, to which the components are then cast.
        """
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        names = inspect.signature(cls.__init__).parameters
        taken = {**pipeline.config, **pipeline.components}
        made = cls(**{name: value for name, value in taken.items() if name in names} | kwargs)
        dtype = next(filter(None, dtypes), None)
        return made if dtype is None else made.to(dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Open a bundle: a folder, or the id of a repo on the Hub.

        Called on an installed class, it uses the installed classes and runs no code of the bundle. Takes the arguments
        of `DiffusionPipeline.from_pretrained` but those that would run code, or open other weights than safetensors;
        and `classes`, those of networks from outside this package, such as [MyNetwork].
        """
        if cls.installed_package() is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        opening = importlib.import_module(f"{cls.installed_package()}.sharing.opening")
        return opening.open_bundle(pretrained_model_name_or_path, cls, **kwargs)
