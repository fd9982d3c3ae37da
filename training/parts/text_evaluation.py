"""Measure a pipeline of texts: the bound on the likelihood of held-out ones, and figures of generated ones."""

import copy
import json
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar

import torch
from tqdm.auto import tqdm

from score_sde import DiscreteScoreScheduler
from score_sde.pipelines.texts import decode_texts
from score_sde.pipelines.wording import unknown
from score_sde.pipelines.writing import whole_file
from score_sde.sharing.bundles import load_bundle
from score_sde.sharing.facts import dataset_name

from .bound import bound_metrics, measure_bound, nats
from .config import option
from .figures import averaging_facts, sampling_facts
from .measured import MeasuredConfig, add_each, samples_file_problems
from .molecules import open_rdkit
from .networks import outside_classes
from .options import WORK_BEGUN
from .provenance import provenance
from .real_images import needs_class, training_facts
from .rounds import gathered, rounds
from .samples import labels_of
from .sources import text_on_hub
from .starting import kept_classes
from .text_data import TextDataConfig, Texts, TokenDataset
from .text_figures import FIGURES
from .text_rows import TextClasses


@dataclass
class TextEvaluateConfig(MeasuredConfig):
    """Measure a pipeline of texts: the bound on the likelihood of held-out texts, and how generated ones are."""

    configs = "evaluation"
    data_kind: ClassVar[str] = "text"

    dataset: str | None = option(
        None, "Texts, as for training; by default those that the pipeline was trained on.", "data", common=True
    )
    test_split: str = option("test", "Split of the texts that are measured, and measured beside.", "data", common=True)
    text_column: str | None = option(None, "Column that holds the texts; by default as in training.", "data")
    label_column: str | None = option(
        None, "Column of class labels; by default as in training; 'none' leaves the classes out.", "data"
    )
    packing: bool | None = option(
        None,
        "Cut sequences from texts that follow one another; false: each text is one. By default as in training.",
        "data",
    )
    likelihood: int = option(
        256,
        "Held-out sequences, from the first, whose likelihood is bounded; 0 leaves it out.",
        "likelihood",
        common=True,
    )
    num_times: int = option(4, "Times that are drawn for each of them.", "likelihood", common=True)
    num_texts: int = option(
        64, "Texts to generate, the classes in turn; 0 leaves them out.", "what is measured", common=True
    )
    figures: list[str] = option(
        ["ngrams"], f"What is measured of generated texts: {', '.join(FIGURES)}.", "what is measured", common=True
    )
    save_samples: str | None = option(
        None, "Also write the generated texts, as a .jsonl file, {text, label} in each line.", "what is measured"
    )
    num_inference_steps: int = option(128, "Time steps of the sampler.", "sampling", common=True)
    guidance_scale: float = option(1.0, "Classifier-free guidance: 1 is none.", "sampling", common=True)
    temperature: float | None = option(
        None, "Temperature of the tokens' distributions; by default the pipeline's own.", "sampling"
    )
    batch_size: int = option(32, "Texts generated, or sequences measured, at once.", "sampling", common=True)
    seed: int = option(0, "Seed of the times and the noise; text i is drawn from seed + i.", "sampling", common=True)

    def problems(self):
        yield from MeasuredConfig.problems(self)
        for name in ("num_times", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                yield f"{name} {getattr(self, name)} must be at least 1"
        for name in ("likelihood", "num_texts", "seed"):
            if getattr(self, name) < 0:
                yield f"{name} {getattr(self, name)} must be at least 0"
        if self.likelihood == self.num_texts == 0:
            yield "likelihood 0, num_texts 0: one of them must be positive"
        if self.likelihood == 1:
            yield "likelihood 1: a standard error needs at least 2 sequences"
        yield from (unknown("figures", name, FIGURES) for name in self.figures if name not in FIGURES)
        if "molecules" in self.figures:
            try:
                open_rdkit()
            except ValueError as error:
                yield str(error)
        try:
            DiscreteScoreScheduler.check_limits(temperature=self.temperature, guidance_scale=self.guidance_scale)
        except ValueError as error:
            yield str(error)
        yield from samples_file_problems(self.save_samples)


class HeldOutTexts:
    """The texts that a pipeline is measured beside, read as it was trained on them.

    Attributes: `tokenizer`, the pipeline's; `config`, the `TextDataConfig`; `classes`, None where the pipeline or the
    data have none; `labels`, the pipeline's label of each of them (N,); `dataset`, the sequences of the split that is
    measured; `trained`, for figures of molecules the `Texts` that the pipeline was trained on, None where these are
    others.

    Raises ValueError where nothing says which data and how they make sequences, for another packing than that of the
    training, for classes that the pipeline doesn't know, and where the network needs classes that there are not.
    """

    def __init__(self, config, pipeline):
        facts = training_facts(config)
        trained = facts.get("config", {})
        names = {each.name for each in fields(TextDataConfig)} & trained.keys()
        known = replace(TextDataConfig(), **{name: trained[name] for name in names})
        if config.dataset is None and "dataset" not in trained:
            raise ValueError(f"pipeline {config.pipeline!r} doesn't say what it was trained on: pass --dataset")
        if config.packing is None and "packing" not in trained:
            raise ValueError(
                f"pipeline {config.pipeline!r} doesn't say how its sequences were made: pass --packing true for those "
                f"that were cut from texts that follow one another, or --packing false for a text each"
            )
        if config.packing is not None and trained.get("packing", config.packing) != config.packing:
            raise ValueError(
                f"packing {config.packing} contradicts {trained['packing']}, by which {config.pipeline!r} was trained: "
                f"leave it out"
            )
        given = {name: getattr(config, name) for name in ("dataset", "text_column", "label_column", "packing")}
        known = replace(known, **{name: value for name, value in given.items() if value is not None})
        known.label_column = None if known.label_column == "none" else known.label_column
        known.length = pipeline.length
        self.config, self.tokenizer, self.classes = known, pipeline.tokenizer, None
        if known.label_column is not None and pipeline.num_classes is not None:
            # a stream's classes stand in the features of every split
            own = Texts(known, config.test_split if known.streaming else None)
            self.classes = TextClasses(known.label_column, own.labels, own.feature, known.label_bins)
            theirs = {int(label): name for label, name in (pipeline.config.id2label or {}).items()}
            labels = kept_classes(theirs, self.classes.id2label)
            if len(labels) < len(self.classes.id2label):
                raise ValueError(
                    f"the classes of label column {known.label_column!r}, {', '.join(self.classes.id2label.values())}, "
                    f"are not among those of the pipeline, {', '.join(theirs.values())}: pass --label_column none"
                )
            self.labels = torch.tensor([labels[label] for label in sorted(labels)])
        elif config.likelihood and needs_class(pipeline):
            raise ValueError(
                "the network knows no null label: its likelihood needs the classes of texts; pass --label_column"
            )
        self.dataset, self.trained = self.split(config.test_split), None
        if config.num_texts and "molecules" in config.figures and is_of_training(known, facts):
            self.trained = Texts(known)

    def split(self, name):
        """The sequences of a split."""
        return TokenDataset(self.config, Texts(self.config, name), self.tokenizer, self.classes)

    def told(self, batch):
        """What the network is told of a batch of sequences, {keyword of its forward: tensor (B, ...)}."""
        if self.classes is None:
            return {}
        labels = batch["labels"]
        return {"class_labels": self.labels.to(labels.device)[labels]}

    def texts(self, count, dataset=None):
        """The first sequences as texts, as the pipeline decodes its own."""
        dataset = dataset or self.dataset
        return decode_texts(
            self.tokenizer, torch.stack([dataset[i]["tokens"] for i in range(min(count, len(dataset)))])
        )


def is_of_training(known, facts):
    """Whether texts that a `TextDataConfig` names are those that a pipeline of these facts was trained on."""
    same_column = known.text_column == facts.get("config", {}).get("text_column", known.text_column)
    own = {"dataset": known.dataset, "dataset_on_hub": text_on_hub(known.dataset)}
    return same_column and dataset_name(own) == dataset_name(facts)


def open_pipeline(config, device):
    """The pipeline, ready to draw. Raises ValueError for one that cannot do what the config asks."""
    pipeline = load_bundle(config.pipeline, classes=outside_classes(config.network))
    if config.num_texts and config.guidance_scale != 1 and pipeline.null_label is None:
        raise ValueError(
            f"guidance_scale {config.guidance_scale} needs a network with classes and a null label, which that of "
            f"{config.pipeline!r} hasn't: pass 1"
        )
    if config.num_texts:
        copy.deepcopy(pipeline.scheduler).set_timesteps(config.num_inference_steps)  # which refuses what it cannot
    pipeline.to(device).set_progress_bar_config(disable=True)
    return pipeline


def measure_likelihood(pipeline, data, config, accelerator):
    """The metrics of the bound on the likelihood of held-out texts."""
    bound = partial(nats, pipeline.scheduler, pipeline.transformer, told=data.told)
    numbers = config.likelihood, config, accelerator, config.seed, config.num_times
    found = measure_bound(bound, data.dataset, *numbers, what="bound")
    for name in ("bits_per_token", "bits_per_character"):
        error = found[f"{name}_error"]
        accelerator.print(f"at most {found[name]:.4f} {name.replace('_', ' ')}, standard error {error:.4f}")
    return bound_metrics(found, {"num_times": config.num_times}, data.classes is not None)


def draw(pipeline, config, accelerator):
    """(token ids (N, L), their class labels or None, network evaluations), text i from seed + i, the classes in
    turn."""
    labels, rows, nfe = labels_of(range(config.num_texts), pipeline), [], None
    parts = list(rounds(config.num_texts, config.batch_size, accelerator))
    for own, size in tqdm(parts, desc="texts", unit="batch", disable=not accelerator.is_main_process):
        output = pipeline(
            batch_size=len(own),
            class_labels=labels and [labels[i] for i in own],
            guidance_scale=config.guidance_scale,
            temperature=config.temperature,
            num_inference_steps=config.num_inference_steps,
            generator=[torch.Generator("cpu").manual_seed(config.seed + i) for i in own],
        )
        nfe = output.nfe
        rows.append(gathered(output.token_ids, size, accelerator))
    return torch.cat(rows), labels, nfe


def measure_texts(pipeline, data, config, accelerator):
    """The metrics of generated texts; [] but in the main process."""
    tokens, labels, nfe = draw(pipeline, config, accelerator)
    if not accelerator.is_main_process:
        return []
    texts = pipeline.decode(tokens)
    if config.save_samples:
        labels = labels or [None] * len(texts)
        lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
        with whole_file(config.save_samples) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    found = [figure for name in config.figures for figure in FIGURES[name](texts, data.texts(len(texts)), data)]
    for figure in found:
        print(f"{figure['name']}: {figure['value']:.4g}; {figure['explanation']}")
    shared = {"split": config.test_split, "type": "text"} | sampling_facts(pipeline, nfe, config)
    shared |= temperature_facts(pipeline, config)
    return [shared | figure | {"value": float(f"{figure['value']:.5g}")} for figure in found]


def temperature_facts(pipeline, config):
    """Which temperature texts are drawn at, where that is another than 1."""
    own = pipeline.scheduler.config
    given = own.temperature if config.temperature is None else config.temperature
    facts = {"temperature": given, "final_temperature": own.final_temperature}
    return {name: value for name, value in facts.items() if value is not None and (name, value) != ("temperature", 1)}


def evaluate_texts(config, accelerator):
    """Measure as a `TextEvaluateConfig` says, and add the figures to the pipeline's."""
    # everything that will be needed, before anything is drawn
    pipeline = open_pipeline(config, accelerator.device)
    with accelerator.main_process_first():
        data = HeldOutTexts(config, pipeline)
    accelerator.print(data.dataset.describe())
    WORK_BEGUN.set()

    own = {"dataset": data.config.dataset, "dataset_on_hub": text_on_hub(data.config.dataset)}
    shared = own | {"dataset": dataset_name(own), "seed": config.seed} | averaging_facts(config)
    shared |= {} if config.packing is None else {"packing": config.packing}
    shared |= provenance(accelerator.device)
    measured = ((measure_likelihood, config.likelihood), (measure_texts, config.num_texts))
    measures = [partial(measure, pipeline, data, config, accelerator) for measure, count in measured if count]
    add_each(measures, config.pipeline, shared, accelerator)
    accelerator.end_training()
