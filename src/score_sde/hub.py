"""Bundles: pipeline folders that carry their code (`pipelines.bundling`), their facts and a model card.

python -m score_sde.hub runs/dit/pipeline somebody/model --private
"""

import argparse
import json
import os
import shutil
import sys

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from . import pipelines
from .model_card import check_metrics, write_card
from .pipelines.bundling import BundleMixin, read_index, saved_class_name


def save_bundle(pipeline, folder, facts=None, metrics=(), sample_grid=None):
    """Save a pipeline as a bundle; an existing one at this place is replaced only once the new one is whole.

    Args:
        pipeline: a pipeline of this package.
        folder: where to write: model_index.json, weights as safetensors, code, README.md and what follows.
        facts: how it was trained, a JSON-able dict, written to training.json; `training.loop.fit` returns one.
        metrics: measurements, a list of dicts, written to metrics.json: see `model_card.check_metrics`.
        sample_grid: a PNG file, copied to samples.png.

    Returns:
        The folder, absolute.
    """
    folder = os.path.abspath(folder)
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
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
            if key not in ("value", "command", "commit", "machine", "seconds")
        }

    new = list(metrics)
    kept = [metric for metric in known if identity(metric) not in [identity(each) for each in new]]
    _write_json(path, kept + new)
    write_card(folder)


def load_bundle(folder_or_repo, **kwargs):
    """Open a bundle with the installed classes, whichever pipeline of this package it holds; no code of it is run.

    Takes the arguments of `DiffusionPipeline.from_pretrained`. Raises ValueError for a pipeline class that this package
    doesn't have.
    """
    folder, kwargs = BundleMixin.fetch(folder_or_repo, **kwargs)
    name = saved_class_name(read_index(folder))
    if name not in pipelines.__all__:
        raise ValueError(
            f"{str(folder_or_repo)!r} holds a {name}; this package has the pipelines {', '.join(pipelines.__all__)}"
        )
    return getattr(pipelines, name).from_pretrained(folder, **kwargs)


# what a bundle is made of; anything else, such as a pickle or a token, stays here
PUSHED = ("*.json", "*.py", "*.safetensors", "*.md", "*.png", "*.txt", "*.model")


def push_bundle(
    folder, repo_id, private=None, revision=None, commit_message=None, create_pr=False, tag=None, token=None
):
    """Upload a bundle to the Hub, and nothing but what a bundle is made of.

    Args:
        folder: a bundle.
        repo_id: "somebody/model"; made if it doesn't exist.
        private: visibility of a new repo; None for the owner's default.
        revision: branch, made if it doesn't exist; None for main.
        commit_message: None for the name of the model.
        create_pr: open a pull request instead of committing.
        tag: a tag for the new commit.
        token: None for the one that `hf auth login` stored.

    Returns:
        The address of the commit or pull request. Raises ValueError for a folder that is no bundle, OSError where the
        Hub cannot be reached or refuses, with what to do; the folder stays as it is.
    """
    if not os.path.isfile(os.path.join(folder, "model_index.json")):
        raise ValueError(f"{str(folder)!r} is not a bundle: it holds no model_index.json")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(PUSHED),
            revision=revision,
            commit_message=commit_message or f"Upload {os.path.basename(os.path.abspath(folder))}",
            create_pr=create_pr,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = "log in by `hf auth login` with a token that may write to it" if status in (401, 403) else "try again"
        raise OSError(f"{repo_id} could not be pushed (status {status}): {remedy}; {folder} stays as it is") from error
    except (OSError, OfflineModeIsEnabled) as error:
        raise OSError(
            f"{repo_id} could not be pushed: the Hub cannot be reached ({type(error).__name__}); {folder} stays as it "
            f"is, push it by `python -m score_sde.hub {folder} {repo_id}`"
        ) from error
    return commit.pr_url or commit.commit_url


def _write_json(path, value):
    with open(path + ".partial", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(path + ".partial", path)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m score_sde.hub", description="Upload a bundle to the Hub.")
    parser.add_argument("folder", help="a bundle, such as the pipeline folder of a training run")
    parser.add_argument("repo_id", help="somebody/model; made if it doesn't exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repo private")
    parser.add_argument("--revision", help="branch, made if it doesn't exist (default: main)")
    parser.add_argument("--commit_message", help="(default: the name of the folder)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--tag", help="a tag for the new commit")
    try:
        print(push_bundle(**vars(parser.parse_args(argv))))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
