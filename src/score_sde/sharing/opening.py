"""Opening what somebody else may have made with the classes that are installed: a bundle, an autoencoder, a stock
pipeline. No code of it is run, and all of it is checked before (`bundle_checks`)."""

import inspect
import os
import time

import diffusers
import torch
from diffusers.models import autoencoders

import score_sde

from .. import pipelines
from ..pipelines.bundle_files import read_config, read_index, saved_class_name
from ..pipelines.bundling import BundleMixin, installed_components
from ..pipelines.latents import autoencoder_of
from ..pipelines.wording import quoted, shortened
from .bundle_checks import (
    OWN_SCHEDULERS,
    check_bundle,
    check_classes,
    check_component,
    check_components,
    check_no_code,
    find_variant,
    outside_classes,
)
from .bundle_code import is_of_libraries, is_stock_bundle
from .config_checks import check_keys
from .downloading import DOWNLOAD_ARGUMENTS, download, fetch


# the stock pipelines that can be converted
STOCK_PIPELINES = (
    *("DiTPipeline", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline", "LDMPipeline"),
    "ConsistencyModelPipeline",
)

# those of this package
OWN_PIPELINES = {name: each for name, each in vars(pipelines).items() if isinstance(each, type)}

# of `DiffusionPipeline.from_pretrained`, beside those of the download and the components
LOADING_ARGUMENTS = {"dtype", "torch_dtype", "variant", "device_map", "max_memory", "offload_folder"}
LOADING_ARGUMENTS |= {"offload_state_dict", "low_cpu_mem_usage", "disable_mmap", "quantization_config"}
# those that say nothing about places, which the pipeline deals out among its components
LOADING_ARGUMENTS_OF_ONE = {"dtype", "torch_dtype", "variant", "low_cpu_mem_usage", "disable_mmap"}
# what a safe loader never leaves to its caller
FIXED_ARGUMENTS = {"trust_remote_code": False, "use_safetensors": True}


def safe_arguments(given, pipeline_class):
    """The arguments for `DiffusionPipeline.from_pretrained`: those that are given, with no code run and safetensors
    only. Raises ValueError for those that a safe loader doesn't have."""
    signature = inspect.signature(pipeline_class.__init__).parameters
    parts = signature.keys() - {"self"}
    needed = [name for name in parts if signature[name].default is inspect.Parameter.empty]
    for name, value in given.items():
        if name in FIXED_ARGUMENTS and value in (None, FIXED_ARGUMENTS[name]):
            continue
        if name not in LOADING_ARGUMENTS | parts:
            raise ValueError(
                f"{name}={quoted(value)} cannot be given here, where no code of a bundle is run and weights are opened "
                f"as safetensors only; the arguments are {', '.join(sorted({*DOWNLOAD_ARGUMENTS, *LOADING_ARGUMENTS}))}"
                f", and components: {', '.join(sorted(parts))}. DiffusionPipeline.from_pretrained takes others"
            )
    for name in ("dtype", "torch_dtype"):
        check_dtype(name, given.get(name), {*needed, *pipeline_class._optional_components})
    return given | FIXED_ARGUMENTS


def check_dtype(argument, value, components):
    """Raise ValueError for a dtype that diffusers would take for float32, or overlook: it is a torch.dtype, or one for
    each of the components by its name, and for the others as "default"."""
    types = value if isinstance(value, dict) else {"default": value}
    for name, dtype in types.items():
        if name not in components | {"default"}:
            raise ValueError(
                f"{argument}: {quoted(name)} is no component; choose from default, {', '.join(sorted(components))}"
            )
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"{argument}: {quoted(dtype)} is no torch.dtype, such as torch.bfloat16")


def open_bundle(folder_or_repo, pipeline_class=None, classes=(), **kwargs):
    """Open a bundle with the installed classes; no code of it is run.

    Args:
        folder_or_repo: a folder, or the id of a repo on the Hub.
        pipeline_class: of this package; None for the one that the folder names.
        classes: of networks from outside this package, such as [MyNetwork]: the folder's network is opened by the one
            that has the name of its class. Nothing is imported that the caller doesn't hold.
        kwargs: arguments of `DiffusionPipeline.from_pretrained` but those that would run code, or open other weights
            than safetensors.

    Raises ValueError for a pipeline class that this package doesn't have, for a bundle that isn't sound
    (`bundle_checks`), and where the Hub refuses, with what to do.
    """
    check_classes(classes)
    folder, kwargs = fetch(folder_or_repo, **kwargs)

    def open_checked():
        own_class = pipeline_class or installed_pipeline_class(folder)
        arguments = safe_arguments(kwargs, own_class)
        if not issubclass(own_class, BundleMixin):
            return open_stock(folder, own_class, arguments, classes)
        outside = check_bundle(folder, own_class, kwargs.get("variant"), kwargs, classes)
        arguments |= {name: open_network(folder, name, network, kwargs) for name, network in outside.items()}
        return super(BundleMixin, own_class).from_pretrained(folder, **arguments)

    return while_unchanged(folder, open_checked)


def installed_pipeline_class(folder):
    """The pipeline class that a folder names: of this package, or of diffusers where the scheduler is of this package.
    Raises ValueError for another."""
    index = read_index(folder)
    name, stock = saved_class_name(index), getattr(diffusers, str(index["_class_name"]), None)
    if name in OWN_PIPELINES:
        return OWN_PIPELINES[name]
    is_pipeline = isinstance(stock, type) and diffusers.DiffusionPipeline in stock.__mro__[1:]
    # some open other repos, which a card names
    if is_pipeline and not stock._load_connected_pipes and is_stock_bundle(index):
        return stock
    raise ValueError(
        f"{str(folder)!r} holds a {shortened(name)}; this package has the pipelines {', '.join(OWN_PIPELINES)} "
        f"and opens those of diffusers whose scheduler is a {' or a '.join(OWN_SCHEDULERS)}"
        + ("; `score-sde convert from-diffusers` makes one of it" if name in STOCK_PIPELINES else "")
    )


def open_stock(folder, pipeline_class, arguments, classes):
    """A stock pipeline whose scheduler is of this package: see `open_bundle`. What is of this package is checked as in
    its own bundles; what is of diffusers and transformers, they open, without running code of the folder."""
    path, index = os.path.join(folder, "model_index.json"), read_index(folder)
    check_keys(index, path)
    entries = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    for name, value in entries.items():
        if name not in inspect.signature(pipeline_class.__init__).parameters:
            raise ValueError(f"{path}: {quoted(name)} is no name of a component of a {pipeline_class.__name__}")
        if [*map(type, value)] not in ([str, str], [type(None)] * 2):
            raise ValueError(f"{path}: {quoted(name)} {quoted(value)} must be a library and a class, or twice null")
    outside = {name: each for name, each in outside_classes(index, classes).items() if name not in arguments}
    foreign = {name: value for name, value in entries.items() if not is_of_libraries(value)}
    own = installed_components(foreign, score_sde, [*arguments, *outside])
    check_no_code(folder, {name: value[0] for name, value in (entries | own).items() if value[0]})
    for name in own.keys() - arguments.keys() - outside.keys():
        found = getattr(score_sde, own[name][1])
        check_component(folder, (name,), found.__name__, found, find_variant(folder, name, arguments.get("variant")))
    arguments |= {name: open_network(folder, name, network, arguments) for name, network in outside.items()}
    # diffusers is given another index than the one in the file
    replaced = {"__module__": pipeline_class.__module__, "load_config": lambda *_, **__: index | own}
    opened = type(pipeline_class.__name__, (pipeline_class,), replaced)
    pipeline = opened.from_pretrained(folder, **arguments)
    pipeline.__class__ = pipeline_class
    return pipeline


def open_network(folder, name, network_class, given):
    """A component of a bundle by a class from outside this package, as the pipeline itself would open it. Raises
    ValueError for arguments that deal the components out among devices."""
    if refused := sorted(given.keys() & (LOADING_ARGUMENTS - LOADING_ARGUMENTS_OF_ONE)):
        raise ValueError(
            f"{', '.join(refused)} cannot be given with classes: open the network yourself, "
            f"{network_class.__name__}.from_pretrained({os.path.join(folder, name)!r}, ...), and pass {name}="
        )
    arguments = {key: given[key] for key in given.keys() & LOADING_ARGUMENTS_OF_ONE}
    for key in ("dtype", "torch_dtype"):
        if isinstance(arguments.get(key), dict):
            arguments[key] = arguments[key].get(name, arguments[key].get("default"))
    arguments["variant"] = find_variant(folder, name, given.get("variant"))
    return network_class.from_pretrained(os.path.join(folder, name), use_safetensors=True, **arguments)


def while_unchanged(folder, read, attempts=10):
    """What `read()` returns of a bundle, read again where somebody put another in its place meanwhile. Raises
    ValueError where that happens every time."""
    for _ in range(attempts):
        before = _identity(folder)
        result = error = None
        try:
            result = read()
        except Exception as failure:
            error = failure
            time.sleep(0.02)  # for the other to finish
        if _identity(folder) == before:
            if error is not None:
                raise error
            return result
    raise ValueError(f"{folder} was replaced {attempts} times while it was read: load it when it is no longer written")


def _identity(folder):
    """What changes where a bundle, or a component in it, takes the place of another."""
    try:
        found = os.stat(folder)
        with os.scandir(folder) as entries:
            shown = [each for each in entries if not each.name.startswith(".")]
            parts = {
                each.name: (each.stat().st_ino, each.stat().st_mtime_ns)
                for each in shown
                if each.name == "model_index.json" or each.is_dir()
            }
    except OSError:
        return None
    return found.st_dev, found.st_ino, parts


def open_autoencoder(folder_or_repo, **kwargs):
    """An autoencoder of diffusers, whichever class its config names, from its folder, from a pipeline or latents that
    have one in the folder vae, or from a repo on the Hub that holds either.

    Takes `dtype`, `variant`, and `revision`, `token` and the other arguments of a download. Raises ValueError for what
    is none, or not sound; no code of it is run, and its weights are opened as safetensors only.
    """
    if os.path.isfile(folder_or_repo):
        raise ValueError(f"{str(folder_or_repo)!r} is a file: give the folder that it lies in, with its config.json")
    arguments = {key: kwargs.pop(key) for key in DOWNLOAD_ARGUMENTS if key in kwargs}
    if kwargs.keys() - LOADING_ARGUMENTS:
        raise ValueError(
            f"{', '.join(sorted(kwargs.keys() - LOADING_ARGUMENTS))} cannot be given here; the arguments are "
            f"{', '.join(sorted({*DOWNLOAD_ARGUMENTS, *LOADING_ARGUMENTS}))}"
        )
    files = ["config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.json"]
    patterns = ["model_index.json", *files, *(f"vae/{each}" for each in files)]
    folder = download(folder_or_repo, patterns, **arguments)
    has_index, has_config = (os.path.lexists(os.path.join(folder, x)) for x in ("model_index.json", "config.json"))
    place = ("vae",) if has_index or not has_config else ()
    name = read_config(folder, *place, "config.json").get("_class_name")
    autoencoder_of(shortened(name))

    def open_checked():
        check_component(folder, place, name, getattr(autoencoders, name), kwargs.get("variant"))
        return getattr(autoencoders, name).from_pretrained(os.path.join(folder, *place), use_safetensors=True, **kwargs)

    return while_unchanged(folder, open_checked)


def open_stock_pipeline(folder_or_repo, **kwargs):
    """A stock pipeline of those that can be converted, checked as a bundle is. Takes the arguments of
    `ScoreSDEPipeline.from_pretrained`. Raises ValueError for others, and for what is not sound."""
    folder, kwargs = fetch(folder_or_repo, **kwargs)
    name = read_index(folder)["_class_name"]
    if name not in STOCK_PIPELINES:
        raise ValueError(
            f"{str(folder_or_repo)!r} is a {shortened(name)}: only DiTPipeline and pipelines around a UNet2DModel can "
            f"be converted ({', '.join(STOCK_PIPELINES)}); of others, replace the scheduler by "
            f"ScoreSDEScheduler.from_config(pipe.scheduler.config)"
        )
    pipeline_class = getattr(diffusers, name)
    arguments = safe_arguments(kwargs, pipeline_class)

    def open_checked():
        index = read_index(folder)
        check_components(folder, index, pipeline_class, kwargs.get("variant"), kwargs)
        return pipeline_class.from_pretrained(folder, **arguments)

    return while_unchanged(folder, open_checked)
