"""Bundles to the Hub, and whether the code of one that is there is this release's.

score-sde push runs/dit/pipeline somebody/model --private
score-sde verify somebody/model
"""

import os
import re
import tempfile
import warnings
from contextlib import contextmanager, suppress

from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..pipelines.wording import few, quoted
from .adapters import small_files_of
from .bundle_checks import check_classes
from .bundle_code import compare_code
from .bundles import save_bundle
from .downloading import hub_errors
from .facts import check_repo_id
from .model_card import write_card
from .opening import installed_pipeline_class, while_unchanged
from .pushed_files import files_to_push, left_out, published


# what would contradict the files that are pushed, where it is left over from what was pushed before
_STALE = re.compile(
    r"\.safetensors(\.index.*\.json)?$|_[0-9a-f]{10}\.py$|^(training|metrics|samplers)\.json$|^samples(\.png|\.gif|_\d\d\.wav)$"
)


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
            if isinstance(source, DiffusionPipeline):
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
    isn't there, or "outside" for what leads out of the folder, such as a link: see `bundle_code.compare_code`. Nothing
    of a LoRA adapter, which is weights alone. Raises ValueError as `load_bundle` does.
    """
    check_classes(classes)
    folder, adapter = small_files_of(folder_or_repo, **download)
    return {} if adapter is not None else compare_code(folder, installed_pipeline_class(folder), classes)
