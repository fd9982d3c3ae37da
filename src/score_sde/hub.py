"""Bundles: pipeline folders that carry their code (`pipelines.bundling`), their facts and a model card."""

import json
import os
import shutil

from . import pipelines
from .model_card import check_metrics, write_card
from .pipelines.bundling import BundleMixin, read_index, saved_class_name


def save_bundle(pipeline, folder, facts=None, metrics=(), sample_grid=None):
    """Save a pipeline as a bundle; an existing one at this place is replaced only once the new one is whole.

    Args:
        pipeline: a pipeline of this package.
        folder: where to write: model_index.json, weights as safetensors, code, README.md and what follows.
        facts: how it was trained, a JSON-able dict, written to training.json; `training.loop.fit` returns one.
        metrics: measurements, a list of dicts, written to metrics.json: see `model_card.check_metrics`.
        sample_grid: a PNG file, copied to samples.png.

    Returns:
        The folder, absolute.
    """
    folder = os.path.abspath(folder)
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    if facts:
        _write_json(os.path.join(partial, "training.json"), facts)
    if metrics:
        _write_json(os.path.join(partial, "metrics.json"), list(metrics))
    if sample_grid:
        shutil.copyfile(sample_grid, os.path.join(partial, "samples.png"))
    write_card(partial)
    replaced = folder + ".replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if os.path.isdir(folder):
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def add_metrics(folder, metrics):
    """Add measurements to a bundle's metrics.json and write its card anew. A measurement of the same name and settings
    replaces the one before.

    Raises ValueError for a measurement without provenance; nothing is written then.
    """
    check_metrics(metrics)
    path = os.path.join(folder, "metrics.json")
    known = []
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            known = json.load(file)

    def identity(metric):
        return {key: value for key, value in metric.items() if key not in ("value", "command", "machine", "seconds")}

    new = list(metrics)
    kept = [metric for metric in known if identity(metric) not in [identity(each) for each in new]]
    _write_json(path, kept + new)
    write_card(folder)


def load_bundle(folder_or_repo, **kwargs):
    """Open a bundle with the installed classes, whichever pipeline of this package it holds; no code of it is run.

    Takes the arguments of `DiffusionPipeline.from_pretrained`. Raises ValueError for a pipeline class that this package
    doesn't have.
    """
    folder, kwargs = BundleMixin.fetch(folder_or_repo, **kwargs)
    name = saved_class_name(read_index(folder))
    if name not in pipelines.__all__:
        raise ValueError(
            f"{str(folder_or_repo)!r} holds a {name}; this package has the pipelines {', '.join(pipelines.__all__)}"
        )
    return getattr(pipelines, name).from_pretrained(folder, **kwargs)


def _write_json(path, value):
    with open(path + ".partial", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(path + ".partial", path)
