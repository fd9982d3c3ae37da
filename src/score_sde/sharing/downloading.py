"""Folders from the Hub, and what is said where it refuses: in words that quote nothing of a request."""

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..pipelines.wording import quoted


# configs, and the words and pieces of words of tokenizers
DATA = ("*.json", "*.txt", "*.model")
# weights of a LoRA adapter, as diffusers calls them
ADAPTER = "pytorch_lora_weights.safetensors"
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def check_token(token=None):
    """Raise ValueError for a token of the Hub that cannot be one: the client fails at it with an error that quotes it.

    Args:
        token: as the client takes it: None or True for the one that is stored or in HF_TOKEN, False for none.
    """
    token = get_token() if token in (None, True) else token
    if token and not (isinstance(token, str) and re.fullmatch(r"[!-~]+", token)):
        raise ValueError(
            "the token of the Hub holds spaces, line feeds or other letters than a token has: log in by `hf auth "
            "login`, or set HF_TOKEN, anew"
        )


def is_adapter(folder):
    """Whether a folder holds a LoRA adapter and no pipeline."""
    return os.path.lexists(os.path.join(folder, ADAPTER)) and not os.path.lexists(
        os.path.join(folder, "model_index.json")
    )


class NoPipelineFolder(ValueError):
    """A folder without a model_index.json; `folder` is its path."""

    def __init__(self, folder):
        # of a training run
        inside = os.path.join(folder, "pipeline")
        super().__init__(
            f"{folder!r} is a LoRA adapter and no pipeline: `score-sde merge` makes one of it and its model"
            if is_adapter(folder)
            else f"{folder!r} holds no model_index.json: it is not a diffusers pipeline folder"
            + (f"; its pipeline is {inside!r}" if os.path.lexists(os.path.join(inside, "model_index.json")) else "")
        )
        self.folder = folder


@contextmanager
def hub_errors(kind, what, token=None):
    """Let errors of the Hub's client inside be of one kind of exception, `what` and why it is (`hub_problem`); they,
    and what is printed of them, quote nothing of a request. ValueError stays one. A token that cannot be one is found
    before."""
    check_token(token)
    try:
        yield
    except Exception as error:  # the client has no common class of errors
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise ValueError(str(error)[:2000]) from None
        raise kind(f"{what}: {hub_problem(error)}") from None


def hub_problem(error):
    """Why a request to the Hub failed and what to do, in words that quote nothing of the request: it holds a token."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    status = next((each.response.status_code for each in causes if getattr(each, "response", None) is not None), None)
    kinds = {kind for each in causes for kind in type(each).__mro__}
    if OfflineModeIsEnabled in kinds:
        return "HF_HUB_OFFLINE is set: unset it, or load what is in the cache already"
    if RepositoryNotFoundError in kinds:
        return (
            "there is no such repo, or it is private: check its name, and log in by `hf auth login`, or set HF_TOKEN, "
            "with a token that may see it"
        )
    if RevisionNotFoundError in kinds:
        return "it has no such revision: check the name of the branch, tag or commit"
    if status == 401:
        return "there is no token, or the Hub doesn't know it: log in by `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return (
            "the token may not do that: log in by `hf auth login`, or set HF_TOKEN, with a token of the repo's owner "
            "that may write, or open a pull request (create_pr)"
        )
    if status == 429:
        return "the Hub limits the number of requests: wait some minutes and try again; what has arrived is kept"
    if status is not None:
        return f"the Hub answered with status {status}: try again later"
    if isinstance(error, LocalEntryNotFoundError) and len(causes) == 1:
        return "it is not in the cache: load it once without local_files_only"
    if getattr(causes[-1], "filename", None) or getattr(causes[-1], "errno", None) == errno.ENOSPC:
        return f"{causes[-1].strerror}: {causes[-1].filename or 'make room'}"
    return f"the Hub cannot be reached ({type(causes[-1]).__name__}): check the network and try again"


def download(folder_or_repo, allow_patterns, ignore_patterns=None, **arguments):
    """The local folder, without links in its path, of a folder or of a repo on the Hub, of which it has what the
    patterns allow. Raises ValueError for what can't be had, with what to do."""
    folder = str(folder_or_repo)
    if os.path.isfile(folder):
        raise ValueError(f"{quoted(folder)} is a file: give the folder that holds it")
    if not os.path.isdir(folder):
        if folder.count("/") > 1 or folder.startswith((".", "/", "~")):
            raise ValueError(f"{quoted(folder)} is neither a folder nor the id of a repo on the Hub")
        what = f"{quoted(folder)} is no folder here and cannot be had from the Hub"
        with hub_errors(ValueError, what, arguments.get("token")):
            folder = snapshot_download(
                folder, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns, **arguments
            )
    return os.path.realpath(folder)


def fetch(folder_or_repo, patterns=None, **kwargs):
    """The local folder of a bundle, and the arguments that were not about downloading.

    Args:
        folder_or_repo: a folder, or the id of a repo on the Hub.
        patterns: of the files to download; by default data, and safetensors weights: of the `variant` asked for, and
            the others of those models that have none of it.

    Raises ValueError for what is no pipeline folder and for what cannot be downloaded, with what to do.
    """
    arguments = {key: kwargs.pop(key) for key in DOWNLOAD_ARGUMENTS if key in kwargs}
    variant, plain = kwargs.get("variant"), {"ignore_patterns": ["*.*.safetensors"]}
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w[\w-]*", variant)):
        raise ValueError(f"variant {quoted(variant)} is no name of a variant, such as 'fp16'")
    if patterns or not variant:
        patterns = {"allow_patterns": patterns} if patterns else {"allow_patterns": [*DATA, "*.safetensors"]} | plain
        folder = download(folder_or_repo, **patterns, **arguments)
    else:
        patterns = [*DATA, f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"]
        folder = download(folder_or_repo, patterns, **arguments)
        without = [path.parent for path in Path(folder).glob("*/config.json") if not any(path.parent.glob("*.safet*"))]
        if without and any(Path(folder).glob(f"*/*.{variant}*.safetensors")):
            patterns = [f"{path.name}/*.safetensors" for path in without]
            folder = download(folder_or_repo, patterns, **plain, **arguments)
    if not os.path.lexists(os.path.join(folder, "model_index.json")):
        raise NoPipelineFolder(folder)
    return folder, kwargs
