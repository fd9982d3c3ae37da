"""Folders of LoRA adapters: pytorch_lora_weights.safetensors, as diffusers has it, with training.json, which names the
model that it is of, and a card."""

import json
import math
import os

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

from ..pipelines.bundling import plain_component
from ..pipelines.pictures import copy_samples
from ..pipelines.wording import one_line, shortened
from ..pipelines.writing import whole_folder, write_json
from .downloading import ADAPTER, NoPipelineFolder, download, fetch, hub_errors, is_adapter
from .facts import SAMPLES, check_metrics, check_repo_id, read_facts, read_json, without_local_paths, writable
from .markdown import render
from .model_card import TASKS, eval_results, save_card, told_of_run


def save_adapter(pipeline, folder, facts, metrics=(), sample_grid=None):
    """Write the adapter of a pipeline's network as a folder, which takes the place of what is there in one step.

    Args:
        pipeline: a pipeline of this package whose network has one adapter.
        facts: of its training, JSON-able; "started_from" says what the adapter is of.
        metrics: measurements, written to metrics.json, and
        sample_grid: a PNG file, copied to samples.png, with what lies beside it, as `save_bundle` does.

    Returns the folder, absolute.
    """
    from peft import get_peft_model_state_dict

    role, folder = pipeline.adapted_component, os.path.abspath(folder)
    network = plain_component(getattr(pipeline, role))
    [(name, config)] = network.peft_config.items()
    metadata, rows = config.to_dict(), (config.trainable_token_indices or {}).get("class_embed", ())
    if rows:
        names = pipeline.config.id2label or {}
        metadata["class_names"] = [names.get(str(label), str(label)) for label in rows]
    with whole_folder(folder) as partial:
        pipeline.save_lora_weights(
            partial,
            **{
                f"{role}_lora_layers": get_peft_model_state_dict(network, adapter_name=name),
                f"{role}_lora_adapter_metadata": metadata,
            },
        )
        write_json(os.path.join(partial, "training.json"), facts)
        if metrics:
            write_json(os.path.join(partial, "metrics.json"), list(metrics))
        if sample_grid:
            copy_samples(sample_grid, partial)
        write_adapter_card(partial, name=os.path.basename(folder))
    return folder


def open_adapter(folder, classes=(), dtype=None):
    """The pipeline that an adapter is of, with the adapter on it; no code of either is run.

    Args:
        folder: with `ADAPTER` and training.json.
        classes: of networks from outside this package.
        dtype: of the network; None for float32.

    Raises ValueError where the model is not to be had, or is another than the adapter was trained on.
    """
    from .convert.starting_point import starting_point, weights_hash

    base = read_facts(folder).get("started_from") or {}
    itself = f"open the model yourself, and pipe.load_lora_weights({folder!r})"
    if not isinstance(base.get("source"), str):
        raise ValueError(f"{folder!r} is an adapter, and no training.json there says of which model: {itself}")
    on_hub = base["source"] == base.get("base_model")
    try:
        start = starting_point(base["source"], base.get("revision") if on_hub else None, classes)
    except ValueError as error:
        raise ValueError(f"the model that the adapter in {folder!r} is of: {shortened(error)}; or {itself}") from error
    if start.scheduler is None:
        raise ValueError(f"the model that the adapter in {folder!r} is of is a network alone: {itself}")
    if weights_hash(start.network) != base.get("weights"):
        raise ValueError(
            f"{base['source']!r} holds other weights than those that the adapter in {folder!r} was trained on; to use "
            f"it on these all the same, {itself}"
        )
    pipeline = start.pipeline
    pipeline.load_lora_weights(folder)
    return pipeline if dtype in (None, torch.float32) else pipeline.to(dtype)


def merge(folder_or_repo, output, classes=()):
    """Write an adapter and the model that it is of as one plain bundle, whose weights are the sums; return its folder.

    Args:
        folder_or_repo: of the adapter.
        output: the folder that is written; it must not exist, or be empty.
        classes: of networks from outside this package.

    Raises ValueError for what is no adapter, and as `open_adapter` does.
    """
    from .bundles import load_bundle, save_bundle
    from .convert.checkpoints import check_output

    output = check_output(output)
    folder = download(folder_or_repo, [ADAPTER, "training.json", "samples.png"])
    if not is_adapter(folder):
        raise ValueError(f"{str(folder_or_repo)!r} holds no {ADAPTER}: it is not an adapter")
    pipeline = load_bundle(folder, classes=classes)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    picture = os.path.join(folder, "samples.png")
    return save_bundle(
        pipeline,
        output,
        facts=read_json(os.path.join(folder, "training.json")),
        sample_grid=picture if os.path.isfile(picture) else None,
    )


def small_files_of(folder_or_repo, **arguments):
    """(folder, adapter): the small files of a bundle, with its code, and None, or those of a LoRA adapter, and what its
    header says (`header_of`). Takes `revision`, `token` and the other arguments of a download. Raises ValueError for
    what is neither, and for what can't be had."""
    try:
        return fetch(folder_or_repo, patterns=["*.json", "*.py"], **arguments)[0], None
    except NoPipelineFolder as error:
        found = header_of(folder_or_repo, error.folder, **arguments)
        if found is None:
            raise
        return error.folder, found


def header_of(folder_or_repo, folder, revision=None, token=None, **_):
    """{"network", "rank", "alpha", "targets", "classes", "parameters"} of an adapter by the header of its weights,
    which are not downloaded: the component that it is for, numbers, names of layers and of the classes that it brings,
    and the number of its weights; what isn't said is left out. None where there is no adapter.

    Args:
        folder: where its small files are, and maybe its weights.
    """
    path = os.path.join(folder, ADAPTER)
    if os.path.lexists(path):
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
                count = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path!r} is damaged, or no safetensors: {one_line(error)}") from None
    elif os.path.isdir(folder_or_repo):
        return None
    else:
        api = HfApi(token=token)
        with hub_errors(ValueError, f"what {str(folder_or_repo)!r} holds cannot be said", token):
            if ADAPTER not in api.list_repo_files(folder_or_repo, revision=revision):
                return None
            header = api.parse_safetensors_file_metadata(folder_or_repo, ADAPTER, revision=revision)
        metadata, names, count = header.metadata, list(header.tensors), sum(header.parameter_count.values())
    role = next((role for role in ("transformer", "unet") if any(name.startswith(f"{role}.") for name in names)), "")
    said = arguments_of_header(metadata, role)
    return writable(({"network": role} if role else {}) | said | {"parameters": count})


def arguments_of_header(metadata, role):
    """{"rank", "alpha", "targets", "classes"}, those that the metadata of an adapter of a component tell soundly."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        config = None
    config = config if isinstance(config, dict) else {}
    rank, alpha, targets, classes = (
        config.get(f"{role}.{key}") for key in ("r", "lora_alpha", "target_modules", "class_names")
    )
    numbers = {"rank": rank, "alpha": alpha}
    found = {name: each for name, each in numbers.items() if type(each) in (int, float)}
    # targets are a set, in the order of nothing
    texts = {"targets": sorted(targets) if are_texts(targets) else None, "classes": classes}
    return found | {name: each for name, each in texts.items() if are_texts(each)}


def are_texts(value):
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def write_adapter_card(folder, name, repo_id=None):
    """Write README.md of an adapter from its training.json and metrics.json, without the paths of this machine.

    Args:
        name: of the adapter, where training.json has none.
        repo_id: where it is on the Hub, instead of the fact of that name.

    Raises ValueError for what is no repo's id, and for measurements without provenance.
    """
    if repo_id is not None:
        check_repo_id(repo_id)
    training = without_local_paths(read_facts(folder))
    metrics = without_local_paths(read_json(os.path.join(folder, "metrics.json")) or [])
    check_metrics(metrics)
    kind = SAMPLES.get(str(training.get("data_kind", "image")), "sample")
    texts = (training.get("samples") or {}).get("texts") if kind == "text" else None
    name = training.get("model_name") or name
    base, config = training.get("started_from") or {}, training.get("config") or {}
    data = ModelCardData(
        license=training.get("license"),
        base_model=training.get("base_model"),
        datasets=[training["dataset"]] if training.get("dataset_on_hub") and training.get("dataset") else None,
        library_name="diffusers",
        tags=["score-sde", "diffusion", "lora"],
        model_name=one_line(name),
        eval_results=eval_results(metrics, TASKS.get(kind)) or None,
    )
    card = render(
        "adapter_template.md",
        data,
        model_name=name,
        repo=repo_id or training.get("repo_id") or "path/or/repo",
        base=base.get("base_model") or base.get("source"),
        base_name=base.get("base_model") or base.get("name") or base.get("source"),
        rank=config.get("lora_rank"),
        has_samples=os.path.isfile(os.path.join(folder, "samples.png")),
        texts=texts or [],
        **told_of_run(training, metrics, kind, "px"),
    )
    save_card(ModelCard(card), os.path.join(folder, "README.md"))
