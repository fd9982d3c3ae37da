"""Cards from facts: the files of a bundle (configs, training.json, metrics.json, samplers.json) become its README.md.

    score-sde card runs/dit/pipeline

A fact that is absent is left out of the card.
"""

import json
import math
import os
import re
import warnings
from importlib.resources import files

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..pipelines.bundling import quoted, read_config, read_index, saved_class_name, shortened
from ..pipelines.writing import whole_file


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


# what training.json may say, where a card needs it to be of a kind
FACTS = {"config": dict, "samples": dict, "class_counts": dict, "id2label": dict}
FACTS |= dict.fromkeys(("dataset", "split", "model_name", "base_model", "command", "run_id", "converted_from"), str)
FACTS |= dict.fromkeys(("rows", "skipped_files", "steps", "images_seen", "parameters", "resolution"), int)
FACTS |= dict.fromkeys(("final_loss", "train_seconds"), int | float)


# --- facts that are checked -----------------------------------------------------------------------------------------


def check_repo_id(repo_id):
    """Raise ValueError for what cannot be the id of a repo on the Hub."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo id {quoted(repo_id)}: it must be like somebody/model. {shortened(error)}") from None


def check_license(license):
    """Warn of a licence that isn't among the Hub's, as this package knows them: it may be newer. None is none."""
    if license is not None and not isinstance(license, str):
        raise ValueError(f"license {quoted(license)} must be an identifier of the Hub, such as apache-2.0")
    if license is not None and license not in LICENSES.split():
        warnings.warn(
            f"license {quoted(license)} is not among those of the Hub that this package knows, such as apache-2.0: if "
            f"the Hub doesn't know it either, it refuses the card",
            stacklevel=2,
        )


def check_metrics(metrics):
    """Raise ValueError for a measurement without provenance, naming it and what is missing, or whose value is no finite
    number."""
    if not isinstance(metrics, (list, tuple)) or not all(isinstance(metric, dict) for metric in metrics):
        raise ValueError(f"metrics {quoted(metrics)} must be a list of dicts")
    for metric in metrics:
        name = quoted(metric.get("name", metric))
        missing = [key for key in REQUIRED_OF_METRICS if key not in metric]
        if missing:
            raise ValueError(f"metric {name} lacks {', '.join(missing)}: it cannot stand on a card")
        empty = [key for key in ("name", "dataset", "split", "command") if not str(metric[key] or "").strip()]
        if empty:
            raise ValueError(f"metric {name}: {', '.join(empty)} must not be empty")
        value, n = metric["value"], metric["n"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"metric {name}: the value {quoted(value)} is not a finite number")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"metric {name}: n {quoted(n)} must be a whole number of images, at least 1")


def check_facts(training):
    """Raise ValueError for facts of a run that are of another kind than a card needs."""
    if not isinstance(training, dict):
        raise ValueError(f"training.json: {quoted(training)} must be a dict")
    for name, kind in FACTS.items():
        value = training.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"training.json: {name} {quoted(value)} must be of type {getattr(kind, '__name__', kind)}")
    check_license(training.get("license"))
    if training.get("repo_id") is not None:
        check_repo_id(training["repo_id"])


def read_json(path):
    """What a JSON file holds, `writable`, None where there is none. Raises ValueError, naming the file, for what is no
    JSON."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return writable(json.load(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {shortened(error)}") from None


def writable(value):
    """A JSON value whose halves of surrogate pairs, which cannot be written to a file, are ?."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def read_facts(folder):
    """What is in training.json of a folder, checked; {} where there is none."""
    training = read_json(os.path.join(folder, "training.json")) or {}
    check_facts(training)
    return training


# --- facts that can be published ------------------------------------------------------------------------------------

# a path that says where things are on one machine: from its root, somebody's home or the folder above, in a longer text
_NAME = r"[^\s/\\'\"=,;]+"
_LOCAL = re.compile(
    rf"(?<![\w.~/\\-])(?:(?:file://|~|\.\.|[A-Za-z]:)(?:(?:/|\\+){_NAME})+|(?:(?:/|\\+){_NAME}){{2,}})[/\\]?"
)


def without_local_paths(value):
    """A JSON value in which paths of this machine, in texts however deep, are their last parts alone; relative paths
    stay."""
    if isinstance(value, dict):
        public = {key: without_local_paths(each) for key, each in value.items()}
        return public | ({"dataset": dataset_name(value)} if "dataset_on_hub" in public and "dataset" in public else {})
    if isinstance(value, list):
        return [without_local_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(file://)?([A-Za-z]:[/\\]|[/\\~]|\.\.[/\\])", value) and "\n" not in value:
        return last_part(value) or value
    return _LOCAL.sub(lambda match: last_part(match[0]), value)


def last_part(path):
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def dataset_name(facts):
    """How a card calls the dataset of a measurement or a run: its id on the Hub, or the last part of a path."""
    name = facts.get("dataset")
    return name if name is None or facts.get("dataset_on_hub") else last_part(str(name))


# --- facts as they are written --------------------------------------------------------------------------------------

# what cannot be written, or would turn the direction of writing
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# an underscore inside a word is one
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")


class Written(str):
    """A text that stands in a card as it is."""


def one_line(value):
    return _UNWRITABLE.sub("\ufffd", " ".join(str(value).split()))


def as_text(value):
    """Any value as Markdown that shows it and is nothing else, in a paragraph, a heading, a list or a table."""
    text = _MARKDOWN.sub(r"\\\g<0>", one_line(value))
    # what begins a heading, a list, a line
    return Written(re.sub(r"^(\d*)([#+=:-]|[.)](?=\s|$))", r"\1\\\2", text))


def as_code(value):
    """Any value as a code span of Markdown."""
    text = one_line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Written(f"{ticks}{space}{text}{space}{ticks}" if text else "")


def as_code_cell(value):
    """The same in a table, which knows no | even there."""
    return Written(as_code(value).replace("|", "\\|"))


def as_python(value):
    """A value of JSON as a literal of Python, in one line."""
    text = json.dumps(value, ensure_ascii=False)
    return Written("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def as_number(value):
    """A whole number with commas."""
    return f"{value:,}" if isinstance(value, int) else value


CARDS = jinja2.Environment(
    loader=jinja2.FunctionLoader(lambda name: (files("score_sde.model_cards") / name).read_text(encoding="utf-8")),
    finalize=lambda value: value if isinstance(value, (Written, int, float)) else as_text(value),
)
CARDS.filters |= {"code": as_code, "code_cell": as_code_cell, "python": as_python, "number": as_number}


def render(template, data, **facts):
    """A card from a template in model_cards. Whatever the template names stands there as Markdown text, unless the
    template says otherwise: `| code`, `| code_cell` (in a table), `| python` or `| number`.

    Args:
        template: its name.
        data: the head of the card, `ModelCardData` or `DatasetCardData`.
        facts: what the template names.
    """
    return CARDS.get_template(template).render(card_data=Written(data.to_yaml()), version=__version__, **facts)


def model_name(folder, otherwise):
    """The name that a bundle's training.json gives it, or another."""
    return read_facts(folder).get("model_name") or otherwise


def training_rows(training):
    """What is known of the training run, as (name, value) rows."""
    config = training.get("config") or {}
    counts = {name: count for name, count in (training.get("class_counts") or {}).items() if isinstance(count, int)}
    classes = ", ".join(f"{name} {count:,}" for name, count in counts.items()) if len(counts) <= 20 else ""
    if counts and not classes:
        classes = f"{len(counts):,}, of {min(counts.values()):,} to {max(counts.values()):,} images"
    rows = [
        ("run", training.get("run_id"), "{}"),
        ("data", dataset_name(training), "{}"),
        ("split", training.get("split"), "{}"),
        ("training images", training.get("rows"), "{:,}"),
        ("images by class", classes or None, "{}"),
        ("files that were skipped", training.get("skipped_files"), "{:,}"),
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
    try:
        found = samplers["median error, rms error, accuracy"]
        columns = sorted({int(n) for figures in found.values() for n in figures})
        return columns, [(name, [figures.get(str(n), [""])[0] for n in columns]) for name, figures in found.items()]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"samplers.json {quoted(samplers)} is none of benchmarks/samplers_network.py") from None


def eval_results(metrics):
    """Measurements as the Hub's model index has them."""
    return [
        EvalResult(
            task_type=TASK,
            # the Hub takes ids alone
            dataset_type=re.sub(r"[^\w./-]+", "-", dataset_name(metric), flags=re.ASCII),
            dataset_name=one_line(dataset_name(metric)),
            dataset_split=metric["split"],
            metric_type=metric.get("type", metric["name"]),
            metric_name=metric["name"],
            metric_value=metric["value"],
            metric_args={key: metric[key] for key in ARGUMENTS_OF_METRICS if metric.get(key) is not None},
        )
        for metric in metrics
    ]


def call_arguments(stock, num_classes, labels, settings):
    """The arguments of a call of the pipeline, Python: of the first and last class where there are some."""
    arguments = {"batch_size": 4}
    if num_classes:
        # a stock pipeline knows numbers alone
        numbers = [0, (len(labels) or num_classes) - 1]
        arguments = {"class_labels": [labels[0], labels[-1]] if labels and not stock else numbers}
        arguments |= {"guidance_scale": settings.get("guidance_scale")}
    arguments |= {"num_inference_steps": settings.get("num_inference_steps")}
    return Written(", ".join(f"{name}={as_python(value)}" for name, value in arguments.items() if value))


def component_class(index, name, path):
    """The class of a component, None for one that isn't there; the name of a class is one word."""
    value = index.get(name) or [None, None]
    found = value[1] if isinstance(value, list) and len(value) == 2 else value
    if found is not None and not (isinstance(found, str) and found.isidentifier()):
        raise ValueError(f"{path}: {name} {quoted(value)} names no class")
    return found


def write_card(folder, repo_id=None, name=None):
    """Write README.md of a bundle, or of a stock pipeline that a bundle was exported to, from the files in it.

    Whatever they hold stands on the card as text, code or data, without the paths of this machine.

    Args:
        folder: a pipeline folder. Beside what diffusers writes there may be training.json (facts of the run, with
            `license`, an identifier of the Hub, `base_model`, the repo that the weights are from, and `repo_id`, where
            it is pushed), metrics.json, samplers.json and samples.png.
        repo_id: where it is on the Hub, for the lines of code on the card, instead of the fact of that name.
        name: of the model, where training.json has none; None for the folder's.

    Raises ValueError for metrics without provenance, values that are no finite numbers, facts of a wrong type and what
    is no repo's id.
    """
    path = os.path.join(folder, "model_index.json")
    if not os.path.isfile(path):
        raise ValueError(f"{str(folder)!r} holds no model_index.json: it is not a pipeline folder")
    index = writable(read_index(folder))
    training = without_local_paths(read_facts(folder))
    metrics = read_json(os.path.join(folder, "metrics.json")) or []
    samplers = without_local_paths(read_json(os.path.join(folder, "samplers.json")))
    check_metrics(metrics)
    metrics = without_local_paths(metrics)
    if repo_id is not None:
        check_repo_id(repo_id)
    stock = isinstance(index["_class_name"], str)
    pipeline_class = component_class({"_class_name": ["", saved_class_name(index)]}, "_class_name", path)
    network = "transformer" if component_class(index, "transformer", path) else "unet"
    network_class = component_class(index, network, path)
    if network_class is None:
        raise ValueError(f"{path} names no network: neither transformer nor unet")
    network_config = read_config(folder, network, "config.json")
    # of our networks, diffusers' UNet2DModel and its DiTTransformer2DModel
    class_counts = [network_config.get(key) for key in ("num_classes", "num_class_embeds", "num_embeds_ada_norm")]
    num_classes = next((count for count in class_counts if isinstance(count, int) and count), None)
    id2label = index.get("id2label") or {}
    if not isinstance(id2label, dict) or not all(label.isdecimal() for label in id2label):
        raise ValueError(f"{path}: id2label {quoted(id2label)} must be {{number of a class: its name}}")
    labels = [str(id2label[label]) for label in sorted(id2label, key=int)]
    has_samples = os.path.isfile(os.path.join(folder, "samples.png"))
    caption = ", ".join(labels) if len(labels) <= 20 else f"{num_classes} classes" if num_classes else "samples"
    name = training.get("model_name") or name or os.path.basename(os.path.abspath(folder))
    data = ModelCardData(
        license=training.get("license"),
        base_model=training.get("base_model"),
        datasets=[training["dataset"]] if training.get("dataset_on_hub") and training.get("dataset") else None,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["score-sde", "diffusion", network_class] + (["class-conditional"] if num_classes else []),
        model_name=one_line(name),
        eval_results=eval_results(metrics) or None,
        widget=[{"text": one_line(caption), "output": {"url": "samples.png"}}] if has_samples else None,
    )
    # the settings that were measured, else those of the picture
    measured = [metric for metric in metrics if "num_inference_steps" in metric]
    card = render(
        "template.md",
        data,
        model_name=name,
        repo=repo_id or training.get("repo_id") or "path/or/repo",
        stock=stock,
        pipeline_class=Written(pipeline_class),
        network_class=network_class,
        network_config=network_config,
        scheduler=writable(read_config(folder, "scheduler", "scheduler_config.json")),
        vae_class=component_class(index, "vae", path),
        labels=labels,
        num_classes=num_classes,
        arguments=call_arguments(stock, num_classes, labels, (measured or [training.get("samples") or {}])[0]),
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
    save_card(ModelCard(card), os.path.join(folder, "README.md"))


def save_card(card, path):
    with whole_file(path) as temporary:
        card.save(temporary)
