"""Folders of LoRA adapters: pytorch_lora_weights.safetensors, as diffusers has it, with training.json, which names the
model that it is of, and a card."""

import os

from huggingface_hub import ModelCard, ModelCardData

from ..pipelines.bundling import plain_component
from ..pipelines.pictures import copy_samples
from ..pipelines.wording import one_line, shortened
from ..pipelines.writing import whole_folder, write_json
from .downloading import ADAPTER, download, is_adapter
from .facts import SAMPLES, check_metrics, check_repo_id, read_facts, read_json, without_local_paths
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
    return pipeline if dtype is None else pipeline.to(dtype)


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
