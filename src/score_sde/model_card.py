"""Cards from facts: the files of a bundle (configs, training.json, metrics.json, samplers.json) become its README.md.

    python -m score_sde.model_card runs/dit/pipeline

A fact that is absent is left out of the card.
"""

import argparse
import json
import math
import os
import re
import sys
from importlib.resources import files

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import __version__


TASK = "unconditional-image-generation"
# what every measurement must say about itself
REQUIRED_OF_METRICS = ("name", "value", "n", "seed", "dataset", "split", "command")
# what it may say beside, as it goes into the model index
ARGUMENTS_OF_METRICS = ("n", "seed", "sampler", "nfe", "num_inference_steps", "guidance_scale", "ema_decay", "features")
# the identifiers that the Hub knows: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license llama2 gemma unknown other
"""


def check_license(license):
    """Raise ValueError for a licence that the Hub doesn't know; None is none."""
    known = LICENSES.split()
    if license is not None and license not in known:
        raise ValueError(f"license {license!r} is unknown to the Hub; choose one of {', '.join(known)}")


def check_metrics(metrics):
    """Raise ValueError for a measurement without provenance, naming it and what is missing, or whose value is no finite
    number."""
    for metric in metrics:
        name = metric.get("name", metric)
        missing = [key for key in REQUIRED_OF_METRICS if key not in metric]
        if missing:
            raise ValueError(f"metric {name} lacks {', '.join(missing)}: it cannot stand on a card")
        empty = [key for key in ("name", "dataset", "split", "command") if not str(metric[key] or "").strip()]
        if empty:
            raise ValueError(f"metric {name!r}: {', '.join(empty)} must not be empty")
        value, n = metric["value"], metric["n"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"metric {name!r}: the value {value!r} is not a finite number")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"metric {name!r}: n {n!r} must be a whole number of images, at least 1")


def _read_json(*path):
    path = os.path.join(*path)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def dataset_name(facts):
    """How a card calls the dataset of a measurement or a run: its id on the Hub, or the last part of a path."""
    name = facts.get("dataset")
    return name if name is None or facts.get("dataset_on_hub") else os.path.basename(name.rstrip("/"))


def model_name(folder, otherwise):
    """The name that a bundle's training.json gives it, or another."""
    return (_read_json(folder, "training.json") or {}).get("model_name") or otherwise


def training_rows(training):
    """What is known of the training run, as (name, value) rows."""
    config = training.get("config", {})
    rows = [
        ("data", dataset_name(training), "{}"),
        ("split", training.get("split"), "{}"),
        ("training images", training.get("rows"), "{:,}"),
        ("resolution", training.get("resolution"), "{} px"),
        ("optimizer steps", training.get("steps"), "{:,}"),
        ("images seen", training.get("images_seen"), "{:,}"),
        ("final training loss", training.get("final_loss"), "{:.4f}"),
        ("time", training.get("train_seconds"), "{} s"),
        ("processes", training.get("processes"), "{}"),
        ("machine", training.get("machine"), "{}"),
        ("density of times", config.get("time_density"), "{}"),
        ("weighting of the loss", config.get("weighting"), "{}"),
        ("learning rate", config.get("learning_rate"), "{}"),
        ("EMA decay", config.get("ema_decay"), "{}"),
        ("EMA sigma_rel, reconstructed", training.get("ema_sigma_rel"), "{}"),
        ("mixed precision", config.get("mixed_precision"), "{}"),
        ("seed", config.get("seed"), "{}"),
        ("commit", training.get("commit"), "{}"),
        ("torch", training.get("torch"), "{}"),
        ("diffusers", training.get("diffusers"), "{}"),
    ]
    return [(name, form.format(value)) for name, value, form in rows if value is not None]


def sampler_table(samplers):
    """What benchmarks/samplers_network.py measured: numbers of evaluations, and rows (sampler, median errors)."""
    found = samplers["median error, rms error, accuracy"]
    columns = sorted({int(n) for figures in found.values() for n in figures})
    return columns, [(name, [figures.get(str(n), [""])[0] for n in columns]) for name, figures in found.items()]


def eval_results(metrics):
    """Measurements as the Hub's model index has them."""
    return [
        EvalResult(
            task_type=TASK,
            # the Hub takes ids alone
            dataset_type=re.sub(r"[^\w./-]+", "-", dataset_name(metric)),
            dataset_name=dataset_name(metric),
            dataset_split=metric["split"],
            metric_type=metric.get("type", metric["name"]),
            metric_name=metric["name"],
            metric_value=metric["value"],
            metric_args={key: metric[key] for key in ARGUMENTS_OF_METRICS if metric.get(key) is not None},
        )
        for metric in metrics
    ]


def write_card(folder, repo_id=None):
    """Write README.md of a bundle, or of a stock pipeline that a bundle was exported to, from the files in it; under a
    temporary name first.

    Args:
        folder: a pipeline folder. Beside what diffusers writes there may be training.json (facts of the run, with
            `license`, an identifier of the Hub, `base_model`, the repo that the weights are from, and `repo_id`, where
            it is pushed), metrics.json, samplers.json and samples.png.
        repo_id: where it is on the Hub, for the lines of code on the card, instead of the fact of that name.

    Raises ValueError for metrics without provenance, values that are no finite numbers, and an unknown licence.
    """
    index = _read_json(folder, "model_index.json")
    if index is None:
        raise ValueError(f"{str(folder)!r} holds no model_index.json: it is not a pipeline folder")
    training = _read_json(folder, "training.json") or {}
    metrics = _read_json(folder, "metrics.json") or []
    samplers = _read_json(folder, "samplers.json")
    check_metrics(metrics)
    check_license(training.get("license"))
    network = "transformer" if index.get("transformer", [None])[0] else "unet"
    network_config = _read_json(folder, network, "config.json")
    # of our networks, diffusers' UNet2DModel and its DiTTransformer2DModel
    class_counts = [network_config.get(key) for key in ("num_classes", "num_class_embeds", "num_embeds_ada_norm")]
    num_classes = next((count for count in class_counts if count), None)
    id2label = index.get("id2label") or {}
    labels = [id2label[label] for label in sorted(id2label, key=int)]
    name = model_name(folder, os.path.basename(os.path.abspath(folder)).removesuffix(".partial"))
    has_samples = os.path.isfile(os.path.join(folder, "samples.png"))
    caption = ", ".join(labels) if len(labels) <= 20 else f"{num_classes} classes" if num_classes else "samples"
    data = ModelCardData(
        license=training.get("license"),
        base_model=training.get("base_model"),
        datasets=[training["dataset"]] if training.get("dataset_on_hub") else None,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["score-sde", "diffusion", index[network][1]] + (["class-conditional"] if num_classes else []),
        model_name=name,
        eval_results=eval_results(metrics) or None,
        widget=[{"text": caption, "output": {"url": "samples.png"}}] if has_samples else None,
    )
    # the settings that were measured, else those of the picture
    measured = [metric for metric in metrics if "num_inference_steps" in metric]
    card = ModelCard.from_template(
        data,
        template_path=str(files("score_sde.model_cards") / "template.md"),
        model_name=name,
        repo=repo_id or training.get("repo_id") or "path/or/repo",
        stock=isinstance(index["_class_name"], str),
        pipeline_class=index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][1],
        version=__version__,
        network_class=index[network][1],
        network_config=network_config,
        scheduler=_read_json(folder, "scheduler", "scheduler_config.json"),
        vae_class=(index.get("vae") or [None, None])[1],
        labels=labels,
        num_classes=num_classes,
        examples=[labels[0], labels[-1]] if labels else [0, num_classes - 1] if num_classes else None,
        settings=(measured or [training.get("samples") or {}])[0],
        training=training,
        training_rows=training_rows(training),
        dataset_name=dataset_name,
        metrics=metrics,
        # every way in which figures of this card were made
        provenances=list(
            dict.fromkeys((metric["command"], metric.get("machine"), metric.get("commit")) for metric in metrics)
        ),
        samplers=samplers,
        sampler_table=sampler_table(samplers) if samplers else None,
        has_samples=has_samples,
    )
    _save(card, folder)


def _save(card, folder):
    path = os.path.join(folder, "README.md")
    card.save(path + ".partial")
    os.replace(path + ".partial", path)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m score_sde.model_card", description="Write the card of a bundle anew.")
    parser.add_argument("folder", help="a bundle, such as the pipeline folder of a training run")
    parser.add_argument("--repo_id", help="where it is on the Hub, for the lines of code on the card")
    options = parser.parse_args(argv)
    try:
        write_card(options.folder, options.repo_id)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(os.path.join(options.folder, "README.md"))


if __name__ == "__main__":
    main()
