"""Cards from facts: the files of a bundle (configs, training.json, metrics.json, samplers.json) become its README.md.

    score-sde card runs/dit/pipeline

A fact that is absent is left out of the card.
"""

import os
import re

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..pipelines.bundle_files import read_config, read_index, saved_class_name
from ..pipelines.conditions import number_of_classes
from ..pipelines.kinds import check_rate, kind_of
from ..pipelines.pictures import recordings_of
from ..pipelines.wording import few, one_line, quoted
from ..pipelines.writing import whole_file
from .bundle_code import is_stock_bundle, own_scheduler
from .config_checks import naming
from .facts import (
    check_metrics,
    check_repo_id,
    dataset_name,
    last_part,
    read_facts,
    read_json,
    without_local_paths,
    writable,
)
from .markdown import Written, as_python, render
from .token_facts import is_of_tokens, token_facts


# what a network is told of a prompt
CONDITIONS_OF_WORDS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
# what the Hub calls the task of a kind of data; of others it knows none
TASKS = {"image": "unconditional-image-generation", "text": "text-generation", "text-to-sound": "text-to-audio"}
TASKS |= {each: each for each in ("text-to-image", "image-to-image", "text-to-video", "image-to-video")}
# what a measurement may say beside, as it goes into the model index
ARGUMENTS_OF_METRICS = ("n", "seed", "sampler", "nfe", "num_inference_steps", "guidance_scale", "ema_decay", "features")
# what it may say of its sampler, which stands with it on the card, too
OF_SAMPLERS = ("corrector", "temperature", "final_temperature")


def training_rows(training, kind="image", unit="px"):
    """What is known of the training run, as (name, value) rows; `kind` is of data, with the unit of their size."""
    config, begun = training.get("config") or {}, training.get("started_from") or {}
    few_step = training.get("few_step") or {}
    trained, is_text = training.get("trained_parameters"), training.get("data_kind") == "text"
    counts = {name: count for name, count in (training.get("class_counts") or {}).items() if isinstance(count, int)}
    classes = ", ".join(f"{name} {count:,}" for name, count in counts.items()) if len(counts) <= 20 else ""
    if counts and not classes:
        classes = f"{len(counts):,}, of {min(counts.values()):,} to {max(counts.values()):,} {kind}s"
    rows = [
        ("run", training.get("run_id"), "{}"),
        ("started from", begun.get("base_model") or begun.get("name") or begun.get("source"), "{}"),
        ("its revision", begun.get("revision"), "{}"),
        ("its licence", begun.get("license"), "{}"),
        ("classes whose weights were kept", classes_in_words(begun, new=False), "{}"),
        ("new classes", classes_in_words(begun, new=True), "{}"),
        ("weights that were trained", trained if trained != training.get("parameters") else None, "{:,}"),
        ("data", dataset_name(training), "{}"),
        ("split", training.get("split"), "{}"),
        (f"training {kind}s", training.get("rows"), "{:,}"),
        *token_rows(training),
        (f"{kind}s by class", classes or None, "{}"),
        ("files that were skipped", training.get("skipped_files"), "{:,}"),
        ("rows left out, in which something is missing", training.get("missing_rows") or None, "{:,}"),
        ("domain", domain_in_words(training.get("domain")) if training.get("columns") else None, "{}"),
        ("columns", ", ".join(training.get("columns") or []) or None, "{}"),
        ("resolution", training.get("resolution"), f"{{}} {unit}"),
        (f"shape of a {kind}", " x ".join(map(str, training.get("data_shape") or [])) or None, "{}"),
        (f"{kind}s by height x width in {unit}", sizes_in_words(training), "{}"),
        ("optimizer steps", training.get("steps"), "{:,}"),
        ("sequences seen" if is_text else f"{kind}s seen", training.get("images_seen"), "{:,}"),
        ("conditions", ", ".join(training.get("conditions") or []) or None, "{}"),
        *caption_rows(training.get("captions") or {}),
        ("image that it sees beside the sample", condition_in_words(training.get("condition") or {}), "{}"),
        ("aligned to", alignment_in_words(training.get("alignment") or {}), "{}"),
        ("final training loss", training.get("final_loss"), "{:.4f}"),
        ("time", training.get("train_seconds"), "{} s"),
        ("processes", training.get("processes"), "{}"),
        ("machine", training.get("machine"), "{}"),
        ("objective", config.get("loss") if is_text else few_step.get("method"), "{}"),
        ("distilled from", few_step.get("teacher"), "{}"),
        ("guidance that was learned", few_step.get("guidance"), "{}"),
        ("density of times", config.get("time_density"), "{}"),
        ("shift of times", config.get("time_shift"), "{}"),
        ("weighting of the loss", None if few_step else config.get("weighting"), "{}"),
        ("optimizer", optimizer_in_words(config), "{}"),
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


def optimizer_in_words(config):
    """The optimizer of a run and what it was told but for the learning rate, in words; None where that isn't known."""
    if not config.get("optimizer"):
        return None
    told = [f"{name} {config[f'adam_{name}']}" for name in ("beta1", "beta2") if config.get(f"adam_{name}") is not None]
    told += [f"weight decay {config['adam_weight_decay']}"] if config.get("adam_weight_decay") else []
    told += [config["optimizer_kwargs"]] if config.get("optimizer_kwargs", "{}") != "{}" else []
    return ", ".join(map(str, [config["optimizer"], *told]))


def domain_in_words(domain):
    """Where points lie, in words, by the domain of their scheduler."""
    if isinstance(domain, dict):
        domain = list(domain.items())
    if isinstance(domain, list):
        return ", ".join(f"{name} of {size}" for name, size in domain)
    return domain or "flat"


def sizes_in_words(training):
    """The sizes of the images and how many there are of each, in words; None where there is one, the resolution."""
    counts = {size: count for size, count in (training.get("sizes") or {}).items() if isinstance(count, int)}
    return ", ".join(f"{size} {count:,}" for size, count in counts.items()) or None


def condition_in_words(condition):
    """What is known of a condition image, in words, None for nothing."""
    if condition.get("from"):
        return f"made from the image itself, {condition['from']}"
    return f"of the column {condition['column']}" if condition.get("column") else None


def alignment_in_words(alignment):
    """Whose features a network was aligned to, and how, in words; None where it wasn't."""
    model = alignment.get("model")
    if not model:
        return None
    model = last_part(str(model)) if os.path.isabs(str(model)) else model
    words = f"{model} ({alignment.get('class')}) after block {alignment.get('block')}, weight {alignment.get('weight')}"
    words += f", projection {alignment.get('projection')}"
    gamma = alignment.get("gamma")
    return words if gamma is None else f"{words}, features normalised over space, gamma {gamma}"


def classes_in_words(begun, new):
    """The classes of a network that began as another, in words: those that were new, or those that kept their weights,
    with their former names; None where there are none."""
    classes = begun.get("classes") or {}
    found = [
        name if new or before == name else f"{name} (from {before})"
        for name, before in classes.items()
        if (before is None) == new
    ]
    return few(found, 20) or None


def caption_rows(captions):
    """What is known of captions, as rows of `training_rows`."""
    encoder, layers = captions.get("text_encoder"), captions.get("layers")
    kind = captions.get("text_encoder_class")
    if encoder and kind:
        encoder = f"{last_part(str(encoder)) if os.path.isabs(str(encoder)) else encoder} ({kind})"
    return [
        ("captions", captions.get("captions"), "{}"),
        ("captions that were cut off", captions.get("truncated") or None, "{}"),
        ("rows without a caption", captions.get("empty") or None, "{}"),
        ("text encoder", encoder, "{}"),
        ("its layers", ", ".join(map(str, layers)) if layers and layers != [-1] else None, "{}"),
        ("tokens of a caption", captions.get("max_tokens"), "{}"),
    ]


def token_rows(training):
    """What is known of texts and how they were parted, as rows of `training_rows`."""
    length, seen, packing = (training.get(name) for name in ("length", "images_seen", "packing"))
    sequences = "cut from texts that follow one another" if packing is True else "a text each"
    return [
        ("characters", training.get("characters"), "{:,}"),
        ("tokens, with end marks", training.get("tokens"), "{:,}"),
        ("tokenizer", training.get("tokenizer"), "{}"),
        ("tokens of a sequence", length, "{:,}"),
        ("sequences", None if packing is None else sequences, "{}"),
        ("texts that were longer", training.get("long_texts") or None, "{:,}"),
        ("tokens seen", seen * length if seen is not None and length is not None else None, "{:,}"),
    ]


def sampler_table(samplers):
    """What benchmarks/samplers_network.py measured: numbers of evaluations, and rows (sampler, median errors to four
    digits)."""
    try:
        found = samplers["median error, rms error, accuracy"]
        columns = sorted({int(n) for figures in found.values() for n in figures})
        return columns, [
            (name, [f"{figures[str(n)][0]:.4g}" if str(n) in figures else "" for n in columns])
            for name, figures in found.items()
        ]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"samplers.json {quoted(samplers)} is none of benchmarks/samplers_network.py") from None


def as_id(name):
    """A dataset's name as the Hub takes it, which takes ids alone: "my data_{split}.parquet" is my-data.parquet."""
    *folders, last = [re.sub(r"[_.-]?\{split\}", "", part).lstrip("._-") or part for part in name.split("/")]
    folders = [re.sub(r"[^\w-]+", "-", part, flags=re.ASCII) for part in folders]
    return "/".join([*folders, re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII)])


def eval_results(metrics, task):
    """Measurements as the Hub's model index has them."""
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=as_id(dataset_name(metric)),
            dataset_name=one_line(dataset_name(metric)),
            dataset_split=metric["split"],
            metric_type=metric.get("type", metric["name"]),
            metric_name=metric["name"],
            metric_value=metric["value"],
            metric_args={
                key: metric[key] for key in (*ARGUMENTS_OF_METRICS, *OF_SAMPLERS) if metric.get(key) is not None
            },
        )
        for metric in metrics
    ]


def call_arguments(stock, num_classes, labels, settings, prompts=(), by_image=False, learned=None):
    """The arguments of a call of the pipeline, Python: of the first and last class, and the first prompt, where there
    are some, and of a condition image; without guidance where a network has `learned` that of one scale."""
    arguments: dict = {"batch_size": 4}
    if num_classes:
        # a stock pipeline knows numbers alone
        numbers = [0, (len(labels) or num_classes) - 1]
        arguments = {"class_labels": [labels[0], labels[-1]] if labels and not stock else numbers}
        arguments |= {"guidance_scale": settings.get("guidance_scale")}
    if prompts:
        # beside classes, one for both
        arguments |= {"prompt": prompts[0], "guidance_scale": settings.get("guidance_scale")}
    if by_image:
        arguments |= {"condition_image": Written("condition"), "guidance_scale": settings.get("guidance_scale")}
    if learned is not None:
        arguments.pop("guidance_scale", None)
    arguments |= {"num_inference_steps": settings.get("num_inference_steps")}
    written = {
        name: value if isinstance(value, Written) else as_python(value) for name, value in arguments.items() if value
    }
    return Written(", ".join(f"{name}={value}" for name, value in written.items()))


def component_class(index, name, path):
    """The class of a component, None for one that isn't there; the name of a class is one word."""
    value = index.get(name) or [None, None]
    found = value[1] if isinstance(value, list) and len(value) == 2 else value
    if found is not None and not (isinstance(found, str) and found.isidentifier()):
        raise ValueError(f"{path}: {name} {quoted(value)} names no class")
    return found


def classes_of(index, network_config, path):
    """(number of classes, their names in order) of a pipeline, None and () without classes."""
    num_classes, id2label = number_of_classes(network_config), index.get("id2label") or {}
    if not isinstance(id2label, dict) or not all(label.isdecimal() for label in id2label):
        raise ValueError(f"{path}: id2label {quoted(id2label)} must be {{number of a class: its name}}")
    labels = [str(id2label[label]) for label in sorted(id2label, key=int)]
    return num_classes if isinstance(num_classes, int) and num_classes else None, labels


def rates_of(index):
    """{"sampling_rate", "frame_rate"} of a pipeline, None where it has none. Raises ValueError for what is no rate."""
    rates = {name: index.get(name) for name in ("sampling_rate", "frame_rate")}
    for name, rate in rates.items():
        if rate is not None:
            check_rate(name, rate)
    return rates


def origin_of(training):
    """What the head of a card says of where a model is from."""
    on_hub = training.get("dataset_on_hub") and training.get("dataset")
    return {
        "license": training.get("license"),
        "base_model": training.get("base_model"),
        "datasets": [training["dataset"]] if on_hub else None,
    }


def told_of_run(training, metrics, kind, unit):
    """What the templates measured.md and training.md name; of data of this kind, with the unit of their size."""
    return {
        "training": training,
        "training_rows": training_rows(training, kind, unit),
        "data_kind": kind,
        "dataset_name": dataset_name,
        "metrics": metrics,
        "of_samplers": OF_SAMPLERS,
        # each once: figures of other settings may share one
        "explanations": list(
            dict.fromkeys((metric["name"], metric["explanation"]) for metric in metrics if metric.get("explanation"))
        ),
        # every way in which figures of this card were made
        "provenances": list(
            dict.fromkeys((metric["command"], metric.get("machine"), metric.get("commit")) for metric in metrics)
        ),
    }


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
    if is_stock_bundle(index):
        write_stock_card(folder, index, repo_id, name)
        return
    if is_of_tokens(index):
        write_text_card(folder, index, repo_id, name)
        return
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
    num_classes, labels = classes_of(index, network_config, path)
    vae_class = component_class(index, "vae", path)
    with naming(os.path.join(folder, network, "config.json")):
        # a network that doesn't say its size can be saved all the same
        sized = network_config | {"sample_size": network_config.get("sample_size") or 1}
        kind = kind_of(sized, **rates_of(index), data_std=index.get("data_std"))
    picture = os.path.join(folder, "samples.png")
    has_samples = os.path.isfile(picture)
    recordings = [f"samples{end}" for end in recordings_of(picture)] if has_samples else []
    caption = ", ".join(labels) if len(labels) <= 20 else f"{num_classes} classes" if num_classes else "samples"
    name = training.get("model_name") or name or os.path.basename(os.path.abspath(folder))
    others = [each for each in training.get("conditions") or [] if each != "class_labels"]
    words = index.get("prompt_settings") if isinstance(index.get("prompt_settings"), dict) else {}
    by_words = bool(words) or component_class(index, "text_encoder", path) is not None
    sampled = training.get("samples") or {}
    prompts = sampled.get("prompts") if by_words else None
    prompts = [str(each) for each in prompts] if isinstance(prompts, list) and prompts else ["a prompt"] * by_words
    others = [each for each in others if not by_words or each not in CONDITIONS_OF_WORDS]
    by_image = bool(network_config.get("condition_channels"))
    others = [each for each in others if not by_image or each != "condition_sample"]
    conditional = "class-conditional" if num_classes else "conditional" if others else None
    conditional = f"{kind.name}-to-{kind.name}" if by_image else conditional
    conditional = f"text-to-{kind.name}" if by_words else conditional
    shown = [*recordings, "samples.png"][0]
    spoken = prompts or (labels if num_classes else [])
    players = [
        (Written(name), spoken[i % len(spoken)] if spoken else i)
        for i, name in enumerate(recordings)
        if name.endswith(".wav")
    ]
    data = ModelCardData(
        **origin_of(training),
        library_name="diffusers",
        pipeline_tag=TASKS.get(conditional if by_words or by_image else kind.name),
        tags=["score-sde", "diffusion", network_class] + ([conditional] if conditional else []),
        model_name=one_line(name),
        eval_results=eval_results(metrics, TASKS.get(kind.name)) or None,
        widget=[{"text": one_line(caption), "output": {"url": shown}}] if has_samples else None,
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
        vae_class=vae_class,
        kind=kind,
        labels=labels,
        num_classes=num_classes,
        conditional=conditional,
        other_conditions=others,
        columns=str(index["columns"]).split(",") if index.get("columns") else [],
        prompts=prompts,
        named_encoder=words.get("text_encoder"),
        by_image=by_image,
        condition_from=index.get("condition_from"),
        arguments=call_arguments(
            *(stock, num_classes, labels, (measured or [sampled])[0], prompts, by_image),
            learned=network_config.get("folded_guidance"),
        ),
        samplers=samplers,
        sampler_table=sampler_table(samplers) if samplers else None,
        has_samples=has_samples,
        moving="samples.gif" in recordings,
        players=players,
        **told_of_run(training, metrics, kind.name, {"pixels": "px"}.get(kind.unit, kind.unit)),
    )
    save_card(ModelCard(card), os.path.join(folder, "README.md"))


def write_stock_card(folder, index, repo_id, name):
    """The card of a stock pipeline whose scheduler is of this package: what it is made of, and how it is opened."""
    path = os.path.join(folder, "model_index.json")
    if repo_id is not None:
        check_repo_id(repo_id)
    pipeline_class = component_class({"_class_name": ["", index["_class_name"]]}, "_class_name", path)
    parts = {each: component_class(index, each, path) for each in index if isinstance(index[each], list)}
    name = name or os.path.basename(os.path.abspath(folder))
    card = render(
        "stock_template.md",
        ModelCardData(library_name="diffusers", tags=["score-sde", "diffusion"], model_name=one_line(name)),
        model_name=name,
        repo=repo_id or "path/or/repo",
        pipeline_class=pipeline_class,
        parts={each: value for each, value in parts.items() if value},
        scheduler=writable(read_config(folder, own_scheduler(index), "scheduler_config.json")),
    )
    save_card(ModelCard(card), os.path.join(folder, "README.md"))


def write_text_card(folder, index, repo_id, name):
    """The card of a pipeline of tokens, with the texts of training.json's samples: see `write_card`."""
    path = os.path.join(folder, "model_index.json")
    training = without_local_paths(read_facts(folder))
    metrics = read_json(os.path.join(folder, "metrics.json")) or []
    check_metrics(metrics)
    metrics = without_local_paths(metrics)
    if repo_id is not None:
        check_repo_id(repo_id)
    network_class = component_class(index, "transformer", path)
    if network_class is None:
        raise ValueError(f"{path} names no network: no transformer")
    num_classes, labels = classes_of(index, read_config(folder, "transformer", "config.json"), path)
    name = training.get("model_name") or name or os.path.basename(os.path.abspath(folder))
    sampled = training.get("samples") or {}
    measured = [metric for metric in metrics if "num_inference_steps" in metric]
    data = ModelCardData(
        **origin_of(training),
        library_name="diffusers",
        pipeline_tag=TASKS["text"],
        tags=["score-sde", "diffusion", "discrete-diffusion", network_class],
        model_name=one_line(name),
        eval_results=eval_results(metrics, TASKS["text"]) or None,
    )
    card = render(
        "text_template.md",
        data,
        model_name=name,
        repo=repo_id or training.get("repo_id") or "path/or/repo",
        pipeline_class=Written(component_class({"_class_name": ["", saved_class_name(index)]}, "_class_name", path)),
        network_class=network_class,
        scheduler=writable(read_config(folder, "scheduler", "scheduler_config.json")),
        tokens=token_facts(folder),
        labels=labels,
        num_classes=num_classes,
        texts=sampled.get("texts") or [],
        sampled=sampled,
        arguments=call_arguments(False, num_classes, labels, (measured or [sampled])[0]),
        has_samples=os.path.isfile(os.path.join(folder, "samples.png")),
        **told_of_run(training, metrics, "text", "tokens"),
    )
    save_card(ModelCard(card), os.path.join(folder, "README.md"))


def save_card(card, path):
    with whole_file(path) as temporary:
        card.save(temporary)
