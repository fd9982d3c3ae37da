"""Bundles to the Hub, and whether the code of one that is there is this release's.

score-sde push runs/dit/pipeline somebody/model --private
score-sde verify somebody/model
"""

import json
import os
import re
import tempfile
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..pipelines.bundle_files import own_file, read_index
from ..pipelines.bundling import BundleMixin
from ..pipelines.carried_code import LIBRARIES, sibling_imports
from ..pipelines.wording import few, quoted
from .bundle_checks import ROLES, check_classes
from .bundle_code import compare_code
from .bundles import save_bundle
from .downloading import fetch, hub_errors
from .facts import check_repo_id, read_json, without_local_paths
from .model_card import write_card
from .opening import installed_pipeline_class, while_unchanged
from .weight_checks import weight_files


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
        warnings.warn(f"not pushed, as it doesn't belong to what {folder!r} holds: {few(others, 10)}", stacklevel=2)
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


def verify(folder_or_repo, classes=(), **download):
    """Compare the code that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` could run from a bundle
    with that of this release, file by file; none of it is run.

    Takes `revision`, `token` and the other arguments of a download, and `classes`, those of networks from outside this
    package, whose code is compared with that of the class. Returns {path: verdict}, where the verdict is
    "same", "differs", "unknown" for code, or a component, that this release doesn't have, "missing" for a file that
    isn't there, or "outside" for what leads out of the folder, such as a link: see `bundle_code.compare_code`. Raises
    ValueError as `load_bundle` does.
    """
    check_classes(classes)
    folder, _ = fetch(folder_or_repo, patterns=["*.json", "*.py"], **download)
    return compare_code(folder, installed_pipeline_class(folder), classes)
