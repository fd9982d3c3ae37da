"""A page on which a model draws: here, or as a Space on the Hub.

    score-sde space runs/dit/pipeline
    score-sde space somebody/model --folder space
    score-sde space somebody/model --push somebody/space

The first line opens it on this machine (`pip install 'score-sde[space]'`), running no code of the folder. The others
write and push a Space, which needs neither this package nor its own copy of the weights: it opens the model's repo by
diffusers with the code that the repo carries.
"""

import os
import shutil
import tempfile
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import HfApi, SpaceCardData

from ..pipelines import ScoreSDEPipeline, ScoreSDETextPipeline
from ..pipelines.wording import quoted
from ..pipelines.writing import whole_folder
from . import space_app, space_text_app
from .adapters import open_adapter
from .downloading import ADAPTER, NoPipelineFolder, hub_errors, is_adapter
from .facts import check_repo_id, model_name
from .hub import repo_to_push_to
from .token_facts import makes_texts


APP = '''\
"""Draws with {model}, or writes; the pages are in space_app.py and space_text_app.py."""

from diffusers import DiffusionPipeline

import space_app
import space_text_app


# runs the code that the model's own repo carries
pipeline = DiffusionPipeline.from_pretrained("{model}", trust_remote_code=True)
app = space_text_app if type(pipeline).__name__ == "ScoreSDETextPipeline" else space_app
app.page(pipeline, "{title}").launch()
'''
REQUIREMENTS = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def installed_version(package):
    """The version of an installed package without a local part such as +cpu, None for one that isn't installed."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def write_space(folder, model):
    """Write the folder of a Space, whole or not at all: app.py with the pages, requirements.txt with the versions
    installed here, and README.md with the Space's settings.

    Args:
        folder: where to write; it must not exist, or be empty.
        model: the model's repo on the Hub, somebody/model.

    Returns:
        The folder, absolute. Raises ValueError for a model that is no repo's id, and for a folder that holds something.
    """
    folder = os.path.abspath(folder)
    # an id stands in the code of the page, so it may be nothing else
    if os.path.isdir(model) or str(model).count("/") != 1:
        raise ValueError(f"a Space draws with a model on the Hub: push {quoted(model)} and pass its id, somebody/model")
    check_repo_id(model)
    if os.path.isfile(folder) or (os.path.isdir(folder) and os.listdir(folder)):
        raise ValueError(f"folder {folder!r} exists: choose another, or remove it")
    title = model.split("/")[1]
    requirements = "".join(f"{name}=={installed_version(name)}\n" for name in REQUIREMENTS)
    # without sdk_version, the Hub takes its newest gradio
    data = SpaceCardData(
        title=title, sdk="gradio", sdk_version=installed_version("gradio"), app_file="app.py", models=[model]
    )
    card = f"---\n{data}\n---\n\nDrawn by [{model}](https://huggingface.co/{model}).\n"
    texts = {"app.py": APP.format(model=model, title=title), "requirements.txt": requirements, "README.md": card}
    with whole_folder(folder) as partial:
        for module in (space_app, space_text_app):
            shutil.copy(module.__file__, partial)
        for name, text in texts.items():
            Path(partial, name).write_text(text, encoding="utf-8")
    return folder


def push_space(repo_id, model, private=None, token=None):
    """Make or renew a Space on the Hub that draws with a model.

    Args:
        repo_id: the Space, somebody/space.
        model: the model's repo on the Hub, somebody/model.
        private: visibility of a new Space; None for the owner's default.
        token: None for the one that `hf auth login` stored.

    Returns:
        The address of the commit. Raises ValueError for a model that is no repo's id, OSError where the Hub cannot be
        reached or refuses, with what to do.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as parent:
        folder = write_space(os.path.join(parent, "space"), model)
        with (
            hub_errors(OSError, f"{repo_id} was not pushed", token),
            repo_of_pipeline(api, model),
            repo_to_push_to(api, repo_id, private, "space", space_sdk="gradio"),
        ):
            commit = api.upload_folder(
                repo_id=repo_id, repo_type="space", folder_path=folder, commit_message=f"A page for {model}"
            )
    return commit.commit_url


@contextmanager
def repo_of_pipeline(api, model):
    """Raise ValueError, before what is inside, for a model on the Hub that is a LoRA adapter: by itself diffusers opens
    none."""
    files = api.list_repo_files(model) if api.repo_exists(model) else []
    if ADAPTER in files and "model_index.json" not in files:
        raise ValueError(
            f"{quoted(model)} is a LoRA adapter, and a Space draws with a pipeline: `score-sde merge` makes one of it "
            f"and its model; push that, and pass its id"
        )
    yield


def open_page(model, port=None):
    """Serve the page of a model, or of a LoRA adapter with its model, on this machine, on a port or the first free one
    from 7860, until it is interrupted. Raises ValueError without gradio."""
    if installed_version("gradio") is None:
        raise ValueError("the page needs gradio: pip install 'score-sde[space]'")
    title = model_name(model, os.path.basename(model.rstrip("/")))
    app, kind = (space_text_app, ScoreSDETextPipeline) if makes_texts(model) else (space_app, ScoreSDEPipeline)
    try:
        pipeline = kind.from_pretrained(model)
    except NoPipelineFolder as error:
        if not is_adapter(error.folder):
            raise
        pipeline = open_adapter(error.folder)
    page = app.page(pipeline, title)
    page.launch(server_port=port)
