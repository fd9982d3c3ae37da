"""Bundles: pipeline folders that carry their code (`pipelines.bundling`), their facts and a model card; to and from the
Hub.

    score-sde push runs/dit/pipeline somebody/model --private
    score-sde verify somebody/model
"""

import json
import os
import re
import shutil
import tempfile
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from filelock import FileLock
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .. import pipelines
from ..pipelines.bundling import (
    LIBRARIES,
    BundleMixin,
    fetch,
    hub_errors,
    own_file,
    plain_component,
    quoted,
    read_index,
    saved_class_name,
    shortened,
    sibling_imports,
)
from ..pipelines.writing import whole_folder, write_json
from .bundle_checks import ROLES, weight_files, while_unchanged
from .bundle_code import compare_code
from .model_card import check_metrics, check_repo_id, read_json, without_local_paths, write_card


# precisions in which weights can be saved beside those that a pipeline has
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def save_bundle(pipeline, folder, facts=None, metrics=(), sample_grid=None, variant=None, max_shard_size=None):
    """Save a pipeline as a bundle; an existing one at this place is replaced, in one step, once the new one is whole.

    Args:
        pipeline: a pipeline of this package.
        folder: where to write: model_index.json, weights as safetensors, code, README.md and what follows.
        facts: how it was trained, a JSON-able dict, written to training.json; `training.loop.fit` returns one.
        metrics: measurements, a list of dicts, written to metrics.json: see `model_card.check_metrics`.
        sample_grid: a PNG file, copied to samples.png.
        variant: "fp16" or "bf16", to save the weights in this precision, too, for `from_pretrained(..., variant=)`.
        max_shard_size: of a file of weights, in bytes or as "5GB"; None for diffusers' default.

    Returns:
        The folder, absolute. Raises ValueError for another variant.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant {quoted(variant)} is unknown; choose one of {', '.join(VARIANTS)}")
    folder = os.path.abspath(folder)
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with bundle_lock(folder), whole_folder(folder) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True, **shards)
        for name, component in pipeline.components.items():
            component = plain_component(component)
            if variant and isinstance(component, ModelMixin):
                path = os.path.join(partial, name)
                with open(os.path.join(path, component.config_name), "rb") as file:
                    config = file.read()
                narrow = type(component).from_pretrained(path, dtype=VARIANTS[variant])
                narrow.save_pretrained(path, variant=variant, **shards)
                with open(os.path.join(path, component.config_name), "wb") as file:
                    file.write(config)  # without the path that it was loaded from
        if facts:
            write_json(os.path.join(partial, "training.json"), facts)
        if metrics:
            write_json(os.path.join(partial, "metrics.json"), list(metrics))
        if sample_grid:
            shutil.copyfile(sample_grid, os.path.join(partial, "samples.png"))
        write_card(partial, name=os.path.basename(folder))
    return folder


def add_metrics(folder, metrics):
    """Add measurements to a bundle's metrics.json and write its card anew. A measurement of the same name and settings
    replaces the one before. Several processes may do so at once.

    Raises ValueError for a measurement without provenance; nothing is written then.
    """
    check_metrics(metrics)
    path = os.path.join(folder, "metrics.json")

    def identity(metric):
        return {
            key: value
            for key, value in metric.items()
            # an explanation holds what else was found: errors, spread
            if key not in ("value", "explanation", "command", "commit", "machine", "seconds")
        }

    new = list(metrics)
    with bundle_lock(folder):
        known = read_json(path) or []
        check_metrics(known)
        kept = [metric for metric in known if identity(metric) not in [identity(each) for each in new]]
        write_json(path, kept + new)
        write_card(folder)


def save_scheduler(scheduler, folder):
    """Write the config of a scheduler, such as one that was calibrated, into a bundle; the code there stays.

    Raises ValueError for another scheduler than the bundle has.
    """
    path = os.path.join(folder, "scheduler", scheduler.config_name)
    with bundle_lock(folder):
        before, new = read_json(path), json.loads(scheduler.to_json_string())
        if before is None or before.get("_class_name") != new["_class_name"]:
            raise ValueError(f"{path} is of another scheduler than {new['_class_name']}")
        write_json(path, before | new)


def bundle_lock(folder):
    """Held by who reads a bundle and writes it anew: a hidden file beside it, which a kill releases."""
    parent, name = os.path.split(os.path.abspath(folder))
    return FileLock(os.path.join(parent, f".{name}.lock"))


def load_bundle(folder_or_repo, **kwargs):
    """Open a bundle with the installed classes, whichever pipeline of this package it holds; no code of it is run.

    Takes the arguments of `DiffusionPipeline.from_pretrained` but those that would run code, or open other weights than
    safetensors. Raises ValueError for a pipeline class that this package doesn't have, for a bundle that isn't sound
    (`bundle_checks`), and where the Hub refuses, with what to do.
    """
    folder, kwargs = fetch(folder_or_repo, **kwargs)
    return while_unchanged(folder, lambda: _pipeline_class(folder, folder_or_repo).from_pretrained(folder, **kwargs))


def _pipeline_class(folder, folder_or_repo):
    name = saved_class_name(read_index(folder))
    if name not in pipelines.__all__:
        raise ValueError(
            f"{str(folder_or_repo)!r} holds a {shortened(name)}; this package has the pipelines "
            f"{', '.join(pipelines.__all__)}"
        )
    return getattr(pipelines, name)


def verify(folder_or_repo, **download):
    """Compare the code that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` could run from a bundle
    with that of this release, file by file; none of it is run.

    Takes `revision`, `token` and the other arguments of a download. Returns {path: verdict}, where the verdict is
    "same", "differs", "unknown" for code, or a component, that this release doesn't have, "missing" for a file that
    isn't there, or "outside" for what leads out of the folder, such as a link: see `bundle_code.compare_code`. Raises
    ValueError as `load_bundle` does.
    """
    folder, _ = fetch(folder_or_repo, patterns=["*.json", "*.py"], **download)
    return compare_code(folder, _pipeline_class(folder, folder_or_repo))


# what lies in a bundle beside its components
CARD = ("README.md", "LICENSE", "training.json", "metrics.json", "samplers.json", "samples.png")
KINDS = ("model_index.json", "config.json", "scheduler_config.json")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_VARIANT = re.compile(r"diffusion_pytorch_model(?:\.safetensors\.index\.(\w+)\.json|\.(\w+)\.safetensors)")
# what would contradict the files that are pushed, where it is left over from what was pushed before
_STALE = re.compile(
    r"\.safetensors(\.index.*\.json)?$|_[0-9a-f]{10}\.py$|^(training|metrics|samplers)\.json$|^samples\.png$"
)


def files_to_push(folder):
    """The names, with /, of the files that a bundle, a model or a scheduler is made of: those that its index names, and
    its card. Raises ValueError for a folder that is none of these, and for a file of it that is missing, or leads
    elsewhere (`own_file`)."""
    kind = next((name for name in KINDS if os.path.lexists(os.path.join(folder, name))), None)
    if kind is None:
        raise ValueError(f"{quoted(folder)} cannot be shared: it holds no {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    found = [os.path.join(folder, name) for name in CARD if os.path.lexists(os.path.join(folder, name))]
    if kind != "model_index.json":
        found += component_files(folder)
    else:
        index = read_index(folder)
        found.append(own_file(folder, kind))
        if isinstance(index["_class_name"], list):
            found += code_files(folder, index["_class_name"][0])
        for name, value in index.items():
            if not isinstance(value, list) or name.startswith("_") or value == [None, None]:
                continue
            if name not in ROLES or len(value) != 2:
                raise ValueError(f"{folder}/model_index.json: {quoted(name)} is no component that can be shared")
            found += component_files(folder, name)
            if value[0] not in LIBRARIES:
                found += code_files(folder, value[0], name)
    if os.path.join(folder, "README.md") in found:
        card = Path(own_file(folder, "README.md")).read_text(encoding="utf-8", errors="replace")
        for name in os.listdir(folder):
            # not one whose name is the end of another's
            if name.lower().endswith(PICTURES) and re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", card):
                found.append(os.path.join(folder, name))
    names = sorted({os.path.relpath(path, folder).replace(os.sep, "/") for path in found})
    for name in names:
        own_file(folder, *name.split("/"))
    return names


def component_files(folder, *place):
    """The paths of the config of a component, and of the weights of a model in every precision."""
    config = next((name for name in KINDS[1:] if os.path.lexists(os.path.join(folder, *place, name))), None)
    if config is None:
        raise ValueError(f"{os.path.join(folder, *place)} holds no {KINDS[1]} or {KINDS[2]}: save it anew")
    found = [own_file(folder, *place, config)]
    if config == "config.json":
        names = os.listdir(os.path.join(folder, *place))
        variants = sorted({match[1] or match[2] for match in map(_VARIANT.fullmatch, names) if match})
        if not variants or {SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME}.intersection(names):
            variants.append(None)
        for variant in variants:
            files, indexed = weight_files(folder, place, variant)
            infix = f".{variant}" if variant else ""
            index = SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{infix}.json")
            found += files + ([] if indexed is None else [own_file(folder, *place, index)])
    return found


def code_files(folder, module, *place):
    """The paths of the file of a module that a bundle carries, and of those beside it that it imports."""
    found, pending = [], [module]
    while pending:
        path = own_file(folder, *place, f"{pending.pop()}.py")
        if path not in found:
            found.append(path)
            pending += sibling_imports(Path(path).read_text(encoding="utf-8", errors="replace"))
    return found


def left_out(folder, names):
    """What lies in a folder beside the files of these names: files, and folders with a slash at their end."""
    places = {os.path.dirname(name) for name in names}
    others = []
    for place in sorted(places):
        for entry in sorted(os.scandir(os.path.join(folder, place)), key=lambda each: each.name):
            name = os.path.join(place, entry.name).replace(os.sep, "/")
            if entry.is_dir(follow_symlinks=False):
                others += [] if any(each == name or each.startswith(f"{name}/") for each in places) else [f"{name}/"]
            elif name not in names:
                others.append(name)
    return others


def published(path):
    """What of a file is published: of weights the file, of configs and facts all but the paths of this machine."""
    name = os.path.basename(path)
    if name.endswith(".safetensors"):
        return path
    content = Path(path).read_bytes()
    if name in ("training.json", "metrics.json", "samplers.json", *KINDS):
        value = read_json(path)
        public = without_local_paths(value) if name not in KINDS else value
        if name in KINDS and isinstance(value, dict):
            public = {key: each for key, each in value.items() if key != "_name_or_path"}
        if public != value:
            content = (json.dumps(public, indent=2) + "\n").encode()
    return content


@contextmanager
def repo_to_push_to(api, repo_id, private=None, repo_type=None, **making):
    """Let a repo be there inside. One that is made for it is removed again where nothing has come into it."""
    new = not api.repo_exists(repo_id, repo_type=repo_type)
    if new:
        api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True, **making)
    first = api.repo_info(repo_id, repo_type=repo_type)
    if private and not first.private:
        raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or take another name")
    try:
        yield
    except Exception:
        with suppress(Exception):
            if new and api.repo_info(repo_id, repo_type=repo_type).sha == first.sha:
                api.delete_repo(repo_id, repo_type=repo_type)
        raise


def push_to_hub(
    source,
    repo_id,
    private=None,
    revision=None,
    commit_message=None,
    create_pr=False,
    tag=None,
    token=None,
    **saving,
):
    """Upload a pipeline as a bundle with its card, or a bundle, or a single model or scheduler, and nothing else: of a
    folder the files that its index names, its card and facts, without the paths of this machine. What else lies there
    is left out, with a warning that names it.

    The repo then holds what was pushed: weights and code that are left over from what was pushed before are removed in
    the same commit. An upload that was interrupted goes on where it stopped when it is started again.

    Args:
        source: a pipeline, a model, a scheduler, or the folder of one. Measurements are in a bundle's folder: push that
            to keep them on the card.
        repo_id: "somebody/model", or of an organisation; made if it doesn't exist.
        private: visibility of a new repo; None for the owner's default.
        revision: branch, made if it doesn't exist; None for main.
        commit_message: None for the name of the model.
        create_pr: open a pull request instead of committing; anybody may.
        tag: a new tag for the new commit.
        token: None for the one that `hf auth login` stored, or in HF_TOKEN.
        saving: for a pipeline, arguments of `save_bundle`; for a model or scheduler, of its `save_pretrained`.

    Returns:
        The address of the commit or pull request. Raises ValueError for what cannot be pushed, such as a folder with
        links, OSError where the Hub cannot be reached or refuses, with what to do; nothing on this machine has changed
        then, nor in the repo, and one that was made for it is gone.
    """
    check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(f"revision {quoted(revision)}: a pull request is against main; leave out one of the two")
    if not isinstance(source, (str, os.PathLike)):
        with tempfile.TemporaryDirectory() as temporary:
            folder = os.path.join(temporary, repo_id.split("/")[-1])
            if isinstance(source, BundleMixin):
                save_bundle(source, folder, **saving)
                write_card(folder, repo_id)
            else:
                source.save_pretrained(folder, **saving)
            return push_to_hub(folder, repo_id, private, revision, commit_message, create_pr, tag, token)
    if saving:
        raise TypeError(f"{', '.join(saving)}: only for a pipeline, model or scheduler, not for the folder {source!r}")
    folder = os.path.realpath(source)

    def read():
        names = files_to_push(folder)
        operations = [CommitOperationAdd(name, published(os.path.join(folder, name))) for name in names]
        return names, operations, left_out(folder, names)

    names, operations, others = while_unchanged(folder, read)
    if others:
        warnings.warn(f"not pushed, as it doesn't belong to what {folder!r} holds: {shown_names(others)}", stacklevel=2)
    places, api, commit = {os.path.dirname(name) for name in names}, HfApi(token=token), None
    with hub_errors(OSError, f"{repo_id} was not pushed", token), repo_to_push_to(api, repo_id, private):
        if tag is not None and tag in [each.name for each in api.list_repo_refs(repo_id).tags]:
            raise ValueError(f"{repo_id} has a tag {tag!r} already: take another name, or delete it there")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations += [
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id, revision=revision)
            if _STALE.search(name) and name not in names and os.path.dirname(name) in places
        ]
        commit = api.create_commit(
            repo_id,
            operations,
            revision=revision,
            commit_message=commit_message or f"Upload {os.path.basename(os.path.abspath(source))}",
            create_pr=create_pr,
        )
    address = commit.pr_url or commit.commit_url
    if tag is not None:
        with hub_errors(OSError, f"{repo_id} was pushed ({address}), but without the tag {tag!r}", token):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return address


def shown_names(names, limit=10):
    """The first names of many, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
