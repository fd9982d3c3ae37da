"""Measuring a pipeline, as all kinds of data have it: options, checks, and what becomes of the figures."""

import os
from dataclasses import dataclass

from score_sde.sharing.bundles import add_metrics

from .config import LoaderConfig, option
from .networks import outside_classes
from .sources import has_no_splits, of_no_splits


@dataclass
class MeasuredConfig(LoaderConfig):
    pipeline: str = option("", "The pipeline to measure: a folder.", "what is measured", common=True)
    network: str | None = option(
        None,
        "Class of its network, where it was trained as one from outside: package.module:Class, which is imported.",
        "what is measured",
    )

    def problems(self):
        yield from LoaderConfig.problems(self)
        yield from pipeline_problems(self.pipeline)
        try:
            outside_classes(self.network)
        except ValueError as error:
            yield str(error)


def pipeline_problems(folder):
    """Why a folder cannot be a pipeline that is measured."""
    if not os.path.isfile(os.path.join(folder, "model_index.json")):
        yield (
            f"pipeline {folder!r} is not a pipeline folder (it holds no model_index.json); an adapter becomes one by "
            f"`score-sde merge`"
        )


def samples_file_problems(path):
    """Why generated samples cannot be written into a file; `path` None for none."""
    if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        yield f"save_samples {path!r}: there is no such folder"
    elif path and os.path.isdir(path):
        yield f"save_samples {path!r} is a folder: name a file in it"


def add_each(measures, folder, shared, accelerator):
    """Add to the figures of a bundle what each of these functions measures, with what all share; each is kept, whatever
    becomes of the next. `folder` None for none."""
    for measure in measures:
        metrics = measure()
        if folder is not None and accelerator.is_main_process and metrics:
            add_metrics(folder, [metric | shared for metric in metrics])


def split_in_truth(config, facts, say):
    """The split whose rows are measured: test_split of a configuration, but of the dataset that the model was trained
    on, which has no splits, the one that `facts` of its training name; `say` is told so."""
    dataset, trained = config.dataset or facts.get("dataset"), facts.get("split")
    if dataset is None or dataset != facts.get("dataset") or not has_no_splits(dataset):
        return config.test_split
    if trained in (None, config.test_split):
        return config.test_split
    say(of_no_splits(dataset, config.test_split, trained))
    return trained
