"""Bundles: pipeline folders that carry their code (`pipelines.bundling`), their facts and a model card; to and from the
Hub.

    python -m score_sde.hub runs/dit/pipeline somebody/model --private
    python -m score_sde.hub verify somebody/model
"""

import argparse
import glob
import json
import os
import re
import shutil
import sys
import tempfile

import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from . import __version__, pipelines
from .bundle_checks import while_unchanged
from .bundle_code import compare_code
from .model_card import check_metrics, write_card
from .pipelines.bundling import BundleMixin, fetch, hub_problem, read_index, saved_class_name, shortened


# precisions in which weights can be saved beside those that a pipeline has
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def save_bundle(pipeline, folder, facts=None, metrics=(), sample_grid=None, variant=None, max_shard_size=None):
    """Save a pipeline as a bundle; an existing one at this place is replaced only once the new one is whole.

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
        raise ValueError(f"variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    folder = os.path.abspath(folder)
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    pipeline.save_pretrained(partial, safe_serialization=True, **shards)
    for name, component in pipeline.components.items():
        if variant and isinstance(component, ModelMixin):
            path = os.path.join(partial, name)
            with open(os.path.join(path, component.config_name), "rb") as file:
                config = file.read()
            narrow = type(component).from_pretrained(path, dtype=VARIANTS[variant])
            narrow.save_pretrained(path, variant=variant, **shards)
            with open(os.path.join(path, component.config_name), "wb") as file:
                file.write(config)  # without the path that it was loaded from
    if facts:
        _write_json(os.path.join(partial, "training.json"), facts)
    if metrics:
        _write_json(os.path.join(partial, "metrics.json"), list(metrics))
    if sample_grid:
        shutil.copyfile(sample_grid, os.path.join(partial, "samples.png"))
    write_card(partial)
    replaced = folder + ".replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if os.path.isdir(folder):
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def add_metrics(folder, metrics):
    """Add measurements to a bundle's metrics.json and write its card anew. A measurement of the same name and settings
    replaces the one before.

    Raises ValueError for a measurement without provenance; nothing is written then.
    """
    check_metrics(metrics)
    path = os.path.join(folder, "metrics.json")
    known = []
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            known = json.load(file)

    def identity(metric):
        return {
            key: value
            for key, value in metric.items()
            # an explanation holds what else was found: errors, spread
            if key not in ("value", "explanation", "command", "commit", "machine", "seconds")
        }

    new = list(metrics)
    kept = [metric for metric in known if identity(metric) not in [identity(each) for each in new]]
    _write_json(path, kept + new)
    write_card(folder)


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


# what a bundle, a model or a scheduler is made of; anything else, such as a pickle or a token, stays here
PUSHED = ("*.json", "*.py", "*.safetensors", "*.md", "*.png", "*.txt", "*.model")
# what would contradict the files that are pushed, where it is left over from what was pushed before
_STALE = re.compile(
    r"\.safetensors(\.index.*\.json)?$|_[0-9a-f]{10}\.py$|^(training|metrics|samplers)\.json$|^samples\.png$"
)
_CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")


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
    """Upload a pipeline as a bundle with its card, or a bundle, or a single model or scheduler, and nothing else.

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
        The address of the commit or pull request. Raises ValueError for what cannot be pushed, OSError where the Hub
        cannot be reached or refuses, with what to do; nothing on this machine or in the repo has changed then.
    """
    if create_pr and revision is not None:
        raise ValueError(f"revision {revision!r}: a pull request is against main; leave out one of the two")
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
    folder = os.path.abspath(source)
    if not any(os.path.isfile(os.path.join(folder, name)) for name in _CONFIGS):
        raise ValueError(f"{str(source)!r} cannot be shared: it holds no {', '.join(_CONFIGS[:-1])} or {_CONFIGS[-1]}")
    names = [
        os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")
        for parent, _, files in os.walk(folder)
        for name in files
    ]
    hidden = [".*", "*/.*"]
    pushed = set(filter_repo_objects(names, allow_patterns=list(PUSHED), ignore_patterns=hidden))
    places = {os.path.dirname(name) for name in pushed}
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or take another name")
        if tag is not None and tag in [each.name for each in api.list_repo_refs(repo_id).tags]:
            raise ValueError(f"{repo_id} has a tag {tag!r} already: take another name, or delete it there")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale = [
            glob.escape(name)
            for name in api.list_repo_files(repo_id, revision=revision)
            if _STALE.search(name) and name not in pushed and os.path.dirname(name) in places
        ]
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(PUSHED),
            ignore_patterns=hidden,
            delete_patterns=stale or None,
            revision=revision,
            commit_message=commit_message or f"Upload {os.path.basename(folder)}",
            create_pr=create_pr,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    except ValueError:
        raise
    except Exception as error:  # the client has no common class of errors
        raise OSError(f"{repo_id} was not pushed: {hub_problem(error)}") from error
    return commit.pr_url or commit.commit_url


def _write_json(path, value):
    with open(path + ".partial", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(path + ".partial", path)


def main(argv=None):
    argv, name = sys.argv[1:] if argv is None else argv, "python -m score_sde.hub"
    verifies = argv[:1] == ["verify"]
    if verifies:
        parser = argparse.ArgumentParser(f"{name} verify", description="Compare a bundle's code with this release's.")
        parser.add_argument("folder_or_repo", help="a bundle, or somebody/model on the Hub")
        parser.add_argument("--revision", default="main", help="branch, tag or commit (default: %(default)s)")
    else:
        parser = argparse.ArgumentParser(
            name,
            description="Upload a bundle, a model or a scheduler to the Hub.",
            epilog=f"{name} verify --help: whether the code in a bundle is this release's",
        )
        parser.add_argument("source", metavar="folder", help="such as the pipeline folder of a training run")
        parser.add_argument("repo_id", help="somebody/model; made if it doesn't exist")
        parser.add_argument("--private", action="store_true", default=None, help="make a new repo private")
        parser.add_argument("--revision", help="branch, made if it doesn't exist (default: main)")
        parser.add_argument("--commit_message", help="(default: the name of the folder)")
        parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
        parser.add_argument("--tag", help="a tag for the new commit")
    arguments = vars(parser.parse_args(argv[1:] if verifies else argv))
    try:
        if not verifies:
            print(push_to_hub(**arguments))
            return
        verdicts = verify(**arguments)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for path, verdict in verdicts.items():
        # a file's name may hold what a terminal would obey
        print(f"{verdict:8} {''.join(each if each.isprintable() else repr(each)[1:-1] for each in path)}")
    others = sum(verdict != "same" for verdict in verdicts.values())
    if others:
        print(
            f"{others} of {len(verdicts)} files are not those of score-sde {__version__}: of another release, or "
            f"changed by somebody. Read them before you pass trust_remote_code=True; load_bundle runs none of them"
        )
        raise SystemExit(1)
    print(f"all {len(verdicts)} files are those of score-sde {__version__}")


if __name__ == "__main__":
    main()
