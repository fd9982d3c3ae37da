"""Bundles on this machine: pipeline folders that carry their code (`pipelines.bundling`), their facts, measurements and
a model card."""

import json
import os

import torch
from filelock import FileLock

from ..pipelines.bundling import BundleMixin, add_code, plain_component
from ..pipelines.pictures import copy_samples
from ..pipelines.wording import check_choice
from ..pipelines.writing import whole_folder, write_json
from .adapters import open_adapter
from .downloading import DOWNLOAD_ARGUMENTS, NoPipelineFolder, is_adapter
from .facts import check_metrics, read_json
from .model_card import write_card
from .opening import open_bundle


# precisions in which weights can be saved beside those that a pipeline has
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def save_bundle(pipeline, folder, facts=None, metrics=(), sample_grid=None, variant=None, max_shard_size=None):
    """Save a pipeline as a bundle; an existing one at this place is replaced, in one step, once the new one is whole.

    Args:
        pipeline: a pipeline of this package, or a stock pipeline of diffusers with a scheduler of this package.
        folder: where to write: model_index.json, weights as safetensors, code, README.md and what follows.
        facts: how it was trained, a JSON-able dict, written to training.json; `training.loop.fit` returns one.
        metrics: measurements, a list of dicts, written to metrics.json: see `model_card.check_metrics`.
        sample_grid: a PNG file, copied to samples.png; with it what lies beside, of videos a GIF of the same name, of
            sounds its WAV files (`pictures.recordings_of`).
        variant: "fp16" or "bf16", to save the weights in this precision, too, for `from_pretrained(..., variant=)`.
        max_shard_size: of a file of weights, in bytes or as "5GB"; None for diffusers' default.

    Returns:
        The folder, absolute. Raises ValueError for another variant.
    """
    if variant is not None:
        check_choice("variant", variant, VARIANTS)
    folder = os.path.abspath(folder)
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with bundle_lock(folder), whole_folder(folder) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True, **shards)
        if not isinstance(pipeline, BundleMixin):
            add_code(pipeline, partial)
        for name, component in pipeline.components.items():
            component = plain_component(component)
            if variant and isinstance(component, torch.nn.Module):
                path = os.path.join(partial, name)
                with open(os.path.join(path, "config.json"), "rb") as file:
                    config = file.read()
                narrow = type(component).from_pretrained(path, dtype=VARIANTS[variant])
                narrow.save_pretrained(path, variant=variant, **shards)
                with open(os.path.join(path, "config.json"), "wb") as file:
                    file.write(config)  # without the path that it was loaded from
        if facts:
            write_json(os.path.join(partial, "training.json"), facts)
        if metrics:
            write_json(os.path.join(partial, "metrics.json"), list(metrics))
        if sample_grid:
            copy_samples(sample_grid, partial)
        write_card(partial, name=os.path.basename(folder))
    return folder


def add_metrics(folder, metrics):
    """Add measurements to a bundle's metrics.json and write its card anew. A measurement of the same name and settings
    replaces the one before. Several processes may do so at once.

    Raises ValueError for a measurement without provenance; nothing is written then.
    """
    check_metrics(metrics)
    path = os.path.join(folder, "metrics.json")

    def identity(metric):
        return {
            key: value
            for key, value in metric.items()
            # an explanation holds what else was found: errors, spread
            if key not in ("value", "explanation", "command", "commit", "machine", "seconds")
        }

    new = list(metrics)
    with bundle_lock(folder):
        known = read_json(path) or []
        check_metrics(known)
        kept = [metric for metric in known if identity(metric) not in [identity(each) for each in new]]
        write_json(path, kept + new)
        write_card(folder)


def save_scheduler(scheduler, folder):
    """Write the config of a scheduler, such as one that was calibrated, into a bundle; the code there stays.

    Raises ValueError for another scheduler than the bundle has.
    """
    path = os.path.join(folder, "scheduler", scheduler.config_name)
    with bundle_lock(folder):
        before, new = read_json(path), json.loads(scheduler.to_json_string())
        if before is None or before.get("_class_name") != new["_class_name"]:
            raise ValueError(f"{path} is of another scheduler than {new['_class_name']}")
        write_json(path, before | new)


def bundle_lock(folder):
    """Held by who reads a bundle and writes it anew: a hidden file beside it, which a kill releases."""
    parent, name = os.path.split(os.path.abspath(folder))
    return FileLock(os.path.join(parent, f".{name}.lock"))


def load_bundle(folder_or_repo, classes=(), **kwargs):
    """Open a bundle with the installed classes, whichever pipeline it holds, of this package or a stock one whose
    scheduler is of this package, or a LoRA adapter on the model that it is of; no code of either is run.

    Args:
        folder_or_repo: a folder, or the id of a repo on the Hub.
        classes: of networks from outside this package, such as [MyNetwork]: see `opening.open_bundle`.
        kwargs: arguments of `DiffusionPipeline.from_pretrained` but those that would run code, or open other weights
            than safetensors.

    Raises ValueError as `opening.open_bundle` and `adapters.open_adapter` do.
    """
    try:
        return open_bundle(folder_or_repo, classes=classes, **kwargs)
    except NoPipelineFolder as error:
        if not is_adapter(error.folder):
            raise
        if other := kwargs.keys() - {*DOWNLOAD_ARGUMENTS, "dtype"}:
            raise ValueError(
                f"{', '.join(sorted(other))} cannot be given with an adapter: open the model that it is of with them, "
                f"and pipe.load_lora_weights({error.folder!r})"
            ) from None
        return open_adapter(error.folder, classes, kwargs.get("dtype"))
