"""The real images that a pipeline's are measured beside: which they are, and what fits them."""

import json
import os
import re
from dataclasses import replace

from score_sde.sharing.facts import last_part

from .buckets import counts_of_sizes, in_words
from .captions import CaptionReader
from .config import DataConfig
from .data import ImageDataset
from .labelled_rows import field
from .sources import on_hub


# fewer images have no distance worth the name: no splits of the Inception score, hardly neighbours
LEAST_IMAGES = 10


COLUMNS = ("image_column", "label_column", "num_classes", "background", "skip_corrupt_images")


# what names the splits of `open_data`
SPLIT_OPTIONS = {"train": "split", "test": "test_split", "reference": "reference_split"}


def training_facts(config):
    """What the pipeline's training.json says; {} without one."""
    path = os.path.join(config.pipeline or "", "training.json")
    if config.pipeline is None or not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
        return facts | {"config": dict(facts.get("config") or {})}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path!r} holds no facts of a training run: {error}") from None


def trained_on(config, facts):
    """Whether the real images are those that the pipeline was trained on, as far as an id on the Hub or the last part
    of a path tells, as a folder may have been moved."""
    if facts.get("dataset") is None:
        return False
    both = (config.dataset, on_hub(config.dataset)), (facts["dataset"], facts.get("dataset_on_hub"))
    own, theirs = (name if is_id else last_part(str(name)) for name, is_id in both)
    return own == theirs


def sizes_of(config, shape):
    """{(height, width): how many images are of it} of the images that are measured, {} for squares of one size.

    Args:
        shape: (channels, height, width) that the pipeline draws unless told otherwise, or of the samples.
    """
    _, height, width = shape
    try:
        found = counts_of_sizes(training_facts(config))
    except ValueError as error:
        raise ValueError(f"training.json of {config.pipeline!r}: {error}") from None
    return found or ({} if height == width else {(height, width): 1})


def complete(config, shape):
    """The config with what it leaves out: which real images, by the pipeline's training.json, and their shape, that of
    the generated ones, `resolution` None for other than squares of one size.

    Args:
        shape: (channels, height, width) of the images that are measured.

    Raises ValueError for options that contradict the shape, and where nothing says which dataset.
    """
    channels, height, width = shape
    sizes = ", ".join(map(in_words, sizes_of(config, shape)))
    if channels not in (1, 3):
        raise ValueError(f"images of {width} x {height} pixels and {channels} channels: 1 or 3 channels are measured")
    for name, truth in (("resolution", sizes or height), ("image_channels", channels)):
        given = getattr(config, name)
        if given not in (None, truth):
            whose = "samples have" if config.pipeline is None else "pipeline draws"
            raise ValueError(f"{name} {given}: the {whose} {truth}; leave --{name} out")
    facts = training_facts(config)
    dataset, trained = config.dataset or facts.get("dataset"), facts.get("config", {})
    if dataset is None:
        raise ValueError(f"{config.pipeline!r} doesn't say what it was trained on: pass --dataset")
    config, known = replace(config, dataset=dataset), DataConfig()
    if trained_on(config, facts):
        # what latents were encoded from is not for the run's options to say
        said = {name: facts.get(name) for name in COLUMNS} if trained.get("latents") else trained
        known = replace(known, **{name: said[name] for name in COLUMNS if said.get(name) is not None})
    columns = {name: getattr(config, name) or getattr(known, name) for name in COLUMNS}
    if columns["label_column"] == "none":
        columns["label_column"] = None
    if trained_on(config, facts) and config.caption_column is None:
        said = (facts.get("captions") or {}).get("column") or trained.get("caption_column")
        columns["caption_column"] = None if said == "none" else said
    if trained_on(config, facts) and config.condition_column is None:
        columns["condition_column"] = (facts.get("condition") or {}).get("column")
    split = config.split or facts.get("split") or known.split
    changes = {"split": split, "reference_split": config.reference_split or split}
    resolution = None if sizes else height
    return replace(config, resolution=resolution, image_channels=channels, **columns, **changes)


def open_data(config, pipeline, sizes):
    """The splits of real images that will be needed: {"train", "test", "reference": ImageDataset}, "train" for a
    classifier of their classes.

    Args:
        sizes: of the images, as `sizes_of` gives them.

    Raises ValueError for what cannot be opened, or doesn't fit the pipeline.
    """
    classes = judges_classes(config, pipeline)
    splits = {}
    if classes or (config.num_images and config.features == "classifier"):
        splits["train"] = config.split
    beside = pipeline is not None and pipeline.takes_condition_image
    told = pipeline is not None and pipeline.takes_prompts
    told = told and (config.num_images or config.loss or (beside and config.likelihood))
    if told and config.caption_column is None:
        raise ValueError(
            "caption_column is missing: the pipeline follows words, and its prompts are the captions of real images; "
            "pass --caption_column with the column that holds them"
        )
    pairs = None
    if beside and pipeline.config["condition_from"] is None:
        if config.condition_column is None:
            raise ValueError(
                "condition_column is missing: the pipeline sees an image beside the sample; pass --condition_column "
                "with the column that holds them"
            )
        pairs = config.condition_column, pipeline.condition_shape()[0]
    if classes or config.likelihood or config.loss or told or (beside and config.num_images):
        splits["test"] = config.test_split
    if config.num_images and config.features:
        splits["reference"] = config.reference_split
    facts = training_facts(config)
    data = {}
    for name, split in splits.items():
        try:
            words = None
            if told and name == "test":
                words = CaptionReader(
                    config.caption_column, pipeline.open_encoder()[1], pipeline.prompt_settings["max_tokens"]
                )
            seen = pairs if name == "test" else None
            data[name] = ImageDataset(config, split, captions=words, condition=seen, sizes=list(sizes) or None)
        except ValueError as error:
            remedy = f"--{SPLIT_OPTIONS[name]} names another split"
            if config.dataset == facts.get("dataset"):
                remedy += ". The pipeline was trained on it: where it is now, --dataset says"
            raise ValueError(f"{error}. {remedy}") from error
    if "train" in data and config.label_column is None:
        raise ValueError("label_column is missing: a classifier needs labels; choose other features")
    shown = config.num_images if beside else 0
    # whether the network is told the classes of real images, or images are judged by them
    labelled = classes or config.loss or shown or (config.likelihood and (beside or needs_class(pipeline)))
    labelled = labelled and pipeline.num_classes is not None and config.label_column is not None
    for each in data.values() if labelled else ():
        if pipeline.num_classes != each.num_classes:
            raise ValueError(
                f"the pipeline has {pipeline.num_classes} classes, the dataset {each.num_classes}: pass --label_column "
                f"none to leave them out"
            )
    names = [list((each.id2label or {}).values()) for each in data.values()]
    if any(each != names[0] for each in names):
        raise ValueError(f"the splits of {config.dataset!r} have other classes: {'; '.join(map(str, names))}")
    own = pipeline.config.id2label if labelled else None
    if own and trained_on(config, facts) and [own[key] for key in sorted(own, key=int)] != names[0]:
        raise ValueError(
            f"the pipeline's classes are {', '.join(own.values())}, those of {config.dataset!r} {', '.join(names[0])}: "
            f"pass --label_column none to leave them out"
        )
    if "reference" in data and len(data["reference"]) < LEAST_IMAGES:
        raise ValueError(
            f"split {config.reference_split!r} has {len(data['reference'])} images; distances need {LEAST_IMAGES}"
        )
    by_class = {"likelihood": config.likelihood, "loss": config.loss, "samples of condition images": shown}
    if any(by_class.values()) and needs_class(pipeline) and config.label_column is None:
        what = next(name for name, count in by_class.items() if count)
        raise ValueError(f"the network knows no null label: its {what} needs labels; pass --label_column")
    if not (classes or config.features or beside or config.save_samples) and config.num_images:
        raise ValueError(
            "the pipeline has no classes to judge: pass --features, or --num_images 0 for likelihoods alone"
        )
    return data


def prompts_and_labels(data, count, pipeline):
    """(captions, labels) of the first rows of a dataset that have a caption, as many as that; labels None where the
    pipeline or the dataset has none."""
    reader, prompts, labels = data.captions, [], []
    for row in data.data:
        [text, *_] = reader.texts(field(row, reader.column))
        if text:
            prompts.append(text)
            if pipeline.num_classes is not None and data.label_column is not None:
                labels.append(field(row, data.label_column))
        if len(prompts) == count:
            break
    return prompts, labels or None


def judges_classes(config, pipeline):
    """Whether a classifier looks at the classes of generated images."""
    return bool(config.num_images and pipeline and pipeline.num_classes is not None and config.label_column is not None)


def needs_class(pipeline):
    """Whether a network has no distribution without a class."""
    return pipeline.num_classes is not None and pipeline.null_label is None


def hub_revision(dataset):
    """The commit of a dataset that was read from the Hub; None for another."""
    names = [file["filename"] for file in dataset.data.cache_files] if on_hub(dataset.name) else []
    commits = [re.search(r"[/\\]([0-9a-f]{40})[/\\]", name) for name in names]
    return commits[0][1] if commits and commits[0] else None
