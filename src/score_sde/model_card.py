"""Model cards from facts: a bundle's model_index.json, configs, training.json and metrics.json become its README.md.

A fact that is absent is left out of the card.
"""

import json
import os
from importlib.resources import files

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import __version__


# what every measurement must say about itself
REQUIRED_OF_METRICS = ("name", "value", "n", "seed", "dataset", "split", "command")


def check_metrics(metrics):
    """Raise ValueError for a measurement without provenance, naming it and what is missing."""
    for metric in metrics:
        missing = [key for key in REQUIRED_OF_METRICS if key not in metric]
        if missing:
            raise ValueError(
                f"metric {metric.get('name', metric)} lacks {', '.join(missing)}: it cannot stand on a card"
            )


def _read_json(*path):
    path = os.path.join(*path)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def training_rows(training):
    """What is known of the training run, as (name, value) rows."""
    config = training.get("config", {})
    rows = [
        ("data", training.get("dataset"), "{}"),
        ("split", training.get("split"), "{}"),
        ("training images", training.get("rows"), "{:,}"),
        ("optimizer steps", training.get("steps"), "{:,}"),
        ("images seen", training.get("images_seen"), "{:,}"),
        ("final training loss", training.get("final_loss"), "{:.4f}"),
        ("time", training.get("train_seconds"), "{} s"),
        ("processes", training.get("processes"), "{}"),
        ("machine", training.get("machine"), "{}"),
        ("learning rate", config.get("learning_rate"), "{}"),
        ("EMA decay", config.get("ema_decay"), "{}"),
        ("EMA sigma_rel, reconstructed", training.get("ema_sigma_rel"), "{}"),
        ("torch", training.get("torch"), "{}"),
        ("diffusers", training.get("diffusers"), "{}"),
    ]
    return [(name, form.format(value)) for name, value, form in rows if value is not None]


def write_card(folder):
    """Write README.md of a bundle from the files in it, under a temporary name first.

    Raises ValueError for metrics without provenance.
    """
    index = _read_json(folder, "model_index.json")
    training = _read_json(folder, "training.json") or {}
    metrics = _read_json(folder, "metrics.json") or []
    check_metrics(metrics)
    network = "transformer" if index.get("transformer", [None])[0] else "unet"
    network_config = _read_json(folder, network, "config.json")
    id2label = index.get("id2label") or {}
    name = training.get("model_name") or os.path.basename(os.path.abspath(folder))
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["score-sde", "diffusion", index[network][1]] + (["class-conditional"] if id2label else []),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=metric["dataset"],
                dataset_name=metric["dataset"],
                dataset_split=metric["split"],
                metric_type=metric["name"],
                metric_name=metric["name"],
                metric_value=metric["value"],
            )
            for metric in metrics
        ]
        or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(files("score_sde.model_cards") / "template.md"),
        model_name=name,
        version=__version__,
        network_class=index[network][1],
        network_config=network_config,
        scheduler=_read_json(folder, "scheduler", "scheduler_config.json"),
        vae_class=(index.get("vae") or [None, None])[1],
        labels=[id2label[label] for label in sorted(id2label, key=int)],
        num_classes=network_config.get("num_classes"),
        training=training,
        training_rows=training_rows(training),
        metrics=metrics,
        has_samples=os.path.isfile(os.path.join(folder, "samples.png")),
    )
    path = os.path.join(folder, "README.md")
    card.save(path + ".partial")
    os.replace(path + ".partial", path)
