"""Measure a pipeline of sound, videos or arrays: the loss by time, and the exact likelihood, of held-out data."""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

import torch

from score_sde.sharing.bundles import load_bundle
from score_sde.sharing.facts import dataset_name

from .clean_samples import CleanSamples
from .config import option
from .diffusion_loss import DiffusionLoss
from .figures import averaging_facts
from .measured import MeasuredConfig, add_each
from .networks import outside_classes
from .objective_config import trained_objective
from .options import WORK_BEGUN
from .provenance import provenance
from .real_images import needs_class, training_facts
from .rounds import gathered, real_batches
from .signal_config import SIGNAL_KINDS
from .sources import on_hub
from .validation import RowDraws


PARTS = 4


@dataclass
class SignalEvaluateConfig(MeasuredConfig):
    """Measure a pipeline of sound, videos or arrays: the loss by time, and the likelihood, of held-out data."""

    configs = "evaluation"
    data_kind: ClassVar[str] = "signal"

    dataset: str | None = option(
        None, "Data, as for training; by default those that the pipeline was trained on.", "data", common=True
    )
    test_split: str = option("test", "Split of the data that are measured.", "data", common=True)
    loss: int = option(
        256, "Rows, from the first, on which the loss is measured; 0 leaves it out.", "what is measured", common=True
    )
    likelihood: int = option(
        0, "Rows, from the first, whose likelihood is measured; 0 leaves it out.", "what is measured", common=True
    )
    num_probes: int = option(1, "Probes of the likelihood's trace, for every row.", "likelihood")
    tolerance: float = option(1e-4, "Tolerance of the likelihood's ODE.", "likelihood")
    batch_size: int = option(32, "Rows measured at once.", "what is measured")
    seed: int = option(0, "Seed of times, noise and probes.", "what is measured", common=True)

    def problems(self):
        yield from MeasuredConfig.problems(self)
        for name, least in (("batch_size", 1), ("num_probes", 1), ("seed", 0), ("loss", 0), ("likelihood", 0)):
            if getattr(self, name) < least:
                yield f"{name} {getattr(self, name)} must be at least {least}"
        if self.loss == self.likelihood == 0 or 1 in (self.loss, self.likelihood):
            yield f"loss {self.loss}, likelihood {self.likelihood}: one must be positive, and an error needs at least 2"
        if not self.tolerance > 0:
            yield f"tolerance {self.tolerance} must be positive"


class SignalSamples(CleanSamples):
    """Clean samples of rows for a pipeline, in what its network sees."""

    def __init__(self, pipeline, num_classes):
        super().__init__(pipeline.vae, num_classes)
        self.pipeline = pipeline

    def draw(self, batch, draws):
        return self.pipeline.to_sample_space(batch["images"]) if self.vae is None else super().draw(batch, draws)


def open_rows(config, pipeline, facts):
    """The rows of the split, read as those that the pipeline was trained on. Raises ValueError where nothing says how,
    and for rows that don't fit it."""
    trained = facts.get("config", {})
    if trained.get("data_kind") not in SIGNAL_KINDS:
        raise ValueError(f"training.json of {config.pipeline!r} doesn't say how its data were read")
    if trained.get("latents"):
        raise ValueError(
            f"pipeline {config.pipeline!r} was trained on latents, which don't say how its data were read: train with "
            f"--vae and --dataset to measure it"
        )
    kind = SIGNAL_KINDS[trained["data_kind"]]
    known = kind(**{each.name: trained[each.name] for each in fields(kind) if each.name in trained})
    known.dataset, known.crop = config.dataset or known.dataset, "start"
    for name in ("sampling_rate", "frame_rate"):
        if pipeline.rates[name] is not None:
            setattr(known, name, pipeline.rates[name])
    rows = known.open_rows(config.test_split)
    labelled = pipeline.num_classes is not None and rows.label_column is not None
    own = pipeline.config.id2label or {}
    if labelled and [own.get(str(i)) for i in range(pipeline.num_classes)] != list(rows.id2label.values()):
        raise ValueError(f"the classes of {known.dataset!r} are not the pipeline's, {', '.join(own.values())}")
    if not labelled and needs_class(pipeline):
        raise ValueError(f"the network knows no null label, and {known.dataset!r} has no classes to tell it")
    return rows, labelled


def measure_loss(pipeline, rows, labelled, facts, config, accelerator):
    """The metrics of the loss that a pipeline was trained by, and of its parts by time; [] but in the main process."""
    objective = trained_objective(pipeline.scheduler, facts["config"])
    named = {"time_density": objective.time_density, "weighting": objective.weighting}
    data = SignalSamples(pipeline, pipeline.num_classes if labelled else None)
    loss, count = DiffusionLoss(objective, data, pipeline.denoiser, data.told), min(config.loss, len(rows))
    losses, times, scheduler = [], [], pipeline.scheduler
    for own, batch, size in real_batches(rows, count, config, accelerator, "loss"):
        draws = RowDraws(config.seed, own, count, accelerator.device)
        with torch.no_grad():
            losses.append(gathered(loss(pipeline.denoiser, batch, draws).float(), size, accelerator))
        times.append(gathered(draws.times.float(), size, accelerator))
    if not accelerator.is_main_process:
        return []
    losses, times = torch.cat(losses).double(), torch.cat(times)
    part = ((times - scheduler.t_min) / (scheduler.t_max - scheduler.t_min) * PARTS).long().clamp(0, PARTS - 1)
    metrics = []
    for number in (None, *range(PARTS)):
        own = losses if number is None else losses[part == number]
        if len(own) < 2:
            continue
        error = float(own.std() / len(own) ** 0.5)
        when = "" if number is None else f", times {number / PARTS:g} to {(number + 1) / PARTS:g} of the path"
        print(f"loss{when}: {own.mean():.4f}, standard error {error:.4f}")
        metric = {"name": f"loss on {config.test_split} data{when}", "value": float(f"{own.mean():.5g}")}
        metric |= {"n": len(own), "type": "loss", "split": config.test_split, "standard_error": float(f"{error:.3g}")}
        metrics.append(
            metric | {"explanation": f"the loss that it was trained by, standard error {error:.4f}."} | named
        )
    return metrics


def measure_likelihood(pipeline, rows, labelled, config, accelerator):
    """The metric of the likelihood of the data, in nats per dimension, in their own units; [] but in the main
    process."""
    count, values, nfe = min(config.likelihood, len(rows)), [], []
    told = labelled and pipeline.null_label is None
    for own, batch, size in real_batches(rows, count, config, accelerator, "likelihood"):
        found = pipeline.log_likelihood(
            images=batch["images"],
            class_labels=batch["labels"].tolist() if told else None,
            num_probes=config.num_probes,
            generator=[torch.Generator().manual_seed(config.seed + i) for i in own],
            rtol=config.tolerance,
            atol=config.tolerance,
        )
        values.append(gathered(found.nats_per_dim().float(), size, accelerator))
        nfe.append(gathered(torch.full((len(own),), float(found.nfe)), size, accelerator))
    if not accelerator.is_main_process:
        return []
    values, nfe = torch.cat(values).double(), torch.cat(nfe)
    error, what = float(values.std() / count**0.5), "the data" if pipeline.vae is None else "the normalised latents"
    given = " given the class" if told else ""
    print(f"{values.mean():.4f} nats/dim of {what} on {count} rows, standard error {error:.4f}")
    metric = {"name": f"negative log-likelihood of {what}{given}, nats/dim", "value": float(f"{values.mean():.5g}")}
    metric |= {"n": count, "split": config.test_split, "type": "nats_per_dim", "nfe": round(float(nfe.mean()))}
    metric |= {"num_probes": config.num_probes, "tolerance": config.tolerance, "standard_error": float(f"{error:.3g}")}
    metric["explanation"] = (
        f"exact density by the probability-flow ODE{given}, in the units of {what}, "
        f"standard error {error:.4f}; in bits {values.mean() / math.log(2):.4f}."
    )
    return [metric]


def evaluate_signals(config, accelerator):
    """Measure as a `SignalEvaluateConfig` says, and add the figures to the pipeline's."""
    pipeline, facts = load_bundle(config.pipeline, classes=outside_classes(config.network)), training_facts(config)
    pipeline.check_own_scheduler("evaluate needs")
    if config.likelihood:
        pipeline.check_adaptive(config.tolerance, config.tolerance, "ode")
        try:
            import torchdiffeq  # noqa: F401
        except ImportError:
            raise ValueError("likelihoods need torchdiffeq: pip install torchdiffeq") from None
    pipeline.to(accelerator.device).set_progress_bar_config(disable=True)
    with accelerator.main_process_first():
        rows, labelled = open_rows(config, pipeline, facts)
    accelerator.print(rows.describe())
    WORK_BEGUN.set()
    own = {"dataset": rows.name, "dataset_on_hub": on_hub(rows.name, rows.files)}
    shared = own | {"dataset": dataset_name(own), "seed": config.seed} | averaging_facts(config)
    shared |= provenance(accelerator.device)
    measured = {
        "loss": partial(measure_loss, pipeline, rows, labelled, facts, config, accelerator),
        "likelihood": partial(measure_likelihood, pipeline, rows, labelled, config, accelerator),
    }
    measures = [measure for name, measure in measured.items() if getattr(config, name)]
    add_each(measures, config.pipeline, shared, accelerator)
    accelerator.end_training()
