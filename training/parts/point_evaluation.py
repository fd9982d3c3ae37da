"""Measure a pipeline of points: the exact likelihood of held-out ones, of all and of each class."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

from score_sde.sharing.bundles import add_metrics, load_bundle
from score_sde.sharing.facts import dataset_name

from .config import option
from .figures import averaging_facts
from .measured import MeasuredConfig
from .networks import outside_classes
from .options import WORK_BEGUN
from .point_data import MISSING, PointDataConfig, PointDataset, Table
from .point_likelihood import likelihood_metrics, point_nats
from .provenance import provenance
from .real_images import training_facts
from .sources import table_on_hub
from .text_rows import TextClasses


@dataclass
class PointEvaluateConfig(MeasuredConfig):
    """Measure a pipeline of points: the exact likelihood of held-out points, in nats."""

    configs = "evaluation"
    data_kind: ClassVar[str] = "points"

    dataset: str | None = option(
        None, "Rows, as for training; by default those that the pipeline was trained on.", "data", common=True
    )
    test_split: str = option("test", "Split of the points that are measured.", "data", common=True)
    label_column: str | None = option(
        None, "Column of class labels; by default as in training; 'none' leaves the classes out.", "data"
    )
    missing: str | None = option(
        None,
        "Rows in which a number or the class is missing: refuse, or drop; by default as in training.",
        "data",
    )
    likelihood: int = option(
        0, "Points, from the first, whose likelihood is measured; 0 for all.", "likelihood", common=True
    )
    tolerance: float = option(1e-4, "Tolerance of the likelihood's ODE.", "likelihood")
    batch_size: int = option(1000, "Points measured at once.", "likelihood", common=True)
    seed: int = option(0, "Seed of the probes, where there are more than 8 coordinates.", "likelihood")

    def problems(self):
        yield from MeasuredConfig.problems(self)
        if self.missing not in (None, *MISSING):
            yield f"missing {self.missing!r} is unknown; choose one of {', '.join(MISSING)}"
        if self.likelihood < 0 or self.likelihood == 1 or self.seed < 0:
            yield f"likelihood {self.likelihood} must be 0 for all or at least 2, seed {self.seed} at least 0"
        if self.batch_size < 1 or not self.tolerance > 0:
            yield f"batch_size {self.batch_size} and tolerance {self.tolerance} must be positive"


def held_out_points(config, pipeline):
    """(the points of the split that is measured, as a `PointDataset` in the pipeline's units and classes; the
    `PointDataConfig` that they are read by).

    Raises ValueError where nothing says which data, for columns that a pipeline doesn't name, and for classes that it
    doesn't know.
    """
    trained = training_facts(config).get("config", {})
    names = {each.name for each in fields(PointDataConfig)} & trained.keys()
    known = replace(PointDataConfig(), **{name: trained[name] for name in names})
    given = {name: getattr(config, name) for name in ("dataset", "label_column", "missing")}
    known = replace(known, **{name: value for name, value in given.items() if value is not None})
    coordinates = pipeline.kind.coordinates
    if not known.dataset or coordinates.columns is None:
        what = "what it was trained on: pass --dataset" if coordinates.columns else "of which columns its points are"
        raise ValueError(f"pipeline {config.pipeline!r} doesn't say {what}")
    known.columns, classes = list(coordinates.columns), None
    if known.label_column == "none" or pipeline.num_classes is None:
        known.label_column = None
    table = Table(known, config.test_split)
    if known.label_column is not None:
        own = table if config.test_split == known.split else Table(known)
        classes = TextClasses(known.label_column, own.labels, own.feature, known.label_bins)
        theirs = {int(label): name for label, name in (pipeline.config.id2label or {}).items()}
        numbers = {name: label for label, name in theirs.items()}
        if not numbers.keys() >= set(classes.id2label.values()):
            raise ValueError(
                f"the classes of label column {known.label_column!r}, {', '.join(classes.id2label.values())}, are not "
                f"those of the pipeline, {', '.join(theirs.values())}: pass --label_column none"
            )
    elif pipeline.num_classes is not None and pipeline.null_label is None:
        raise ValueError("the network knows no null label: its likelihood needs the classes; pass --label_column")
    dataset = PointDataset(table, coordinates, classes)
    if classes is not None:
        # it may have more of them
        dataset.renumber(torch.tensor([numbers[name] for _, name in sorted(classes.id2label.items())]), theirs)
    return dataset, known


def evaluate_points(config, accelerator):
    """Measure as a `PointEvaluateConfig` says, and add the figures to the pipeline's."""
    pipeline = load_bundle(config.pipeline, classes=outside_classes(config.network))
    pipeline.check_adaptive(config.tolerance, config.tolerance, "ode")
    pipeline.to(accelerator.device).set_progress_bar_config(disable=True)
    with accelerator.main_process_first():
        dataset, known = held_out_points(config, pipeline)
    accelerator.print(dataset.describe())
    WORK_BEGUN.set()

    count = config.likelihood or len(dataset)
    nats, labels, nfe = point_nats(pipeline, dataset, count, config, accelerator, "likelihood")
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    own = {"dataset": known.dataset, "dataset_on_hub": table_on_hub(known.dataset)}
    shared = own | {"dataset": dataset_name(own), "split": config.test_split, "seed": config.seed}
    shared |= {"tolerance": config.tolerance, "nfe": nfe} | averaging_facts(config) | provenance(accelerator.device)
    metrics = likelihood_metrics(nats, labels, dataset.id2label, dataset.coordinates, shared)
    for metric in metrics:
        error = f", standard error {metric['standard_error']:.4f}" if "standard_error" in metric else ""
        print(f"{metric['name']}: {metric['value']:.4f} on {metric['n']:,} points{error}")
    add_metrics(config.pipeline, metrics)
