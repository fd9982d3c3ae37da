"""The facts of a bundle, training.json and metrics.json: checked, and without the paths of this machine."""

import json
import math
import os
import re
import warnings
from types import UnionType

from huggingface_hub.utils import validate_repo_id

from ..pipelines.wording import quoted, shortened


# what every measurement must say about itself
REQUIRED_OF_METRICS = ("name", "value", "n", "seed", "dataset", "split", "command")
# the identifiers that the Hub knows: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license llama2 gemma unknown other
"""
# what training.json may say, where a card needs it to be of a kind
FACTS: dict[str, type | UnionType] = {
    **dict.fromkeys(("config", "samples", "captions", "class_counts", "sizes", "id2label", "condition"), dict),
    **dict.fromkeys(("started_from", "alignment"), dict),
    **dict.fromkeys(("dataset", "split", "model_name", "base_model", "command", "run_id", "converted_from"), str),
    **dict.fromkeys(("rows", "skipped_files", "steps", "images_seen", "parameters", "resolution"), int),
    "trained_parameters": int,
    # of texts
    **dict.fromkeys(("characters", "tokens", "length", "long_texts"), int),
    **dict.fromkeys(("data_kind", "tokenizer"), str),
    **dict.fromkeys(("final_loss", "train_seconds"), int | float),
    # the names of what the network was told beside time, and of the numbers of a point; (channels, ...) of other data
    **dict.fromkeys(("conditions", "columns", "data_shape"), list),
    "domain": str | list,
    "missing_rows": int,
}


# what a sample is, by the kind of data that training.json says
SAMPLES = {"image": "image", "text": "text", "audio": "sound", "video": "video", "points": "point"}


def check_repo_id(repo_id):
    """Raise ValueError for what cannot be the id of a repo on the Hub."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo id {quoted(repo_id)}: it must be like somebody/model. {shortened(error)}") from None


def check_license(license):
    """Warn of a licence that isn't among the Hub's, as this package knows them: it may be newer. None is none."""
    if license is not None and not isinstance(license, str):
        raise ValueError(f"license {quoted(license)} must be an identifier of the Hub, such as apache-2.0")
    if license is not None and license not in LICENSES.split():
        warnings.warn(
            f"license {quoted(license)} is not among those of the Hub that this package knows, such as apache-2.0: if "
            f"the Hub doesn't know it either, it refuses the card",
            stacklevel=2,
        )


def check_metrics(metrics):
    """Raise ValueError for a measurement without provenance, naming it and what is missing, or whose value is no finite
    number."""
    if not isinstance(metrics, (list, tuple)) or not all(isinstance(metric, dict) for metric in metrics):
        raise ValueError(f"metrics {quoted(metrics)} must be a list of dicts")
    for metric in metrics:
        name = quoted(metric.get("name", metric))
        missing = [key for key in REQUIRED_OF_METRICS if key not in metric]
        if missing:
            raise ValueError(f"metric {name} lacks {', '.join(missing)}: it cannot stand on a card")
        empty = [key for key in ("name", "dataset", "split", "command") if not str(metric[key] or "").strip()]
        if empty:
            raise ValueError(f"metric {name}: {', '.join(empty)} must not be empty")
        value, n = metric["value"], metric["n"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"metric {name}: the value {quoted(value)} is not a finite number")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"metric {name}: n {quoted(n)} must be a whole number of images, at least 1")


def check_facts(training):
    """Raise ValueError for facts of a run that are of another kind than a card needs."""
    if not isinstance(training, dict):
        raise ValueError(f"training.json: {quoted(training)} must be a dict")
    for name, kind in FACTS.items():
        value = training.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"training.json: {name} {quoted(value)} must be of type {getattr(kind, '__name__', kind)}")
    for key in ("conditions", "columns"):
        if not all(isinstance(name, str) for name in training.get(key) or []):
            raise ValueError(f"training.json: {key} {quoted(training[key])} must be names")
    parts = training.get("domain")
    if isinstance(parts, list) and not all(isinstance(each, list) and len(each) == 2 for each in parts):
        raise ValueError(f"training.json: domain {quoted(parts)} must be pairs of a name and a number")
    texts = (training.get("samples") or {}).get("texts") or []
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise ValueError(f"training.json: samples.texts {quoted(texts)} must be a list of texts")
    check_license(training.get("license"))
    if training.get("repo_id") is not None:
        check_repo_id(training["repo_id"])


def read_json(path):
    """What a JSON file holds, `writable`, None where there is none. Raises ValueError, naming the file, for what is no
    JSON."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return writable(json.load(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {shortened(error)}") from None


def writable(value):
    """A JSON value whose halves of surrogate pairs, which cannot be written to a file, are ?."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def read_facts(folder):
    """What is in training.json of a folder, checked; {} where there is none."""
    training = read_json(os.path.join(folder, "training.json")) or {}
    check_facts(training)
    return training


def model_name(folder, otherwise):
    """The name that a bundle's training.json gives it, or another."""
    return read_facts(folder).get("model_name") or otherwise


# --- facts that can be published ------------------------------------------------------------------------------------

# a path that says where things are on one machine: from its root, somebody's home or the folder above, in a longer text
_START, _SLASH = r"(?:file://|~|\.\.|[A-Za-z]:)", r"(?:/|\\+(?! ))"
# blanks stand in a name where a backslash is before them, in the name of somebody's home, and in quotes
_NAME = r"(?:[^\s/\\'\"=,;]|\\ )+"
_HOME = rf"(?:{_SLASH}(?:home|Users){_SLASH}[^/\\'\"=,;\n]*[^\s/\\'\"=,;](?=[/\\]))"
_LOCAL = re.compile(
    rf"(?<![\w.~/\\-])(?:{_START}{_HOME}?(?:{_SLASH}{_NAME})+|{_HOME}(?:{_SLASH}{_NAME})+|(?:{_SLASH}{_NAME}){{2,}})[/\\]?"
)
_QUOTED = re.compile(
    rf"(?P<before>(?P<quote>['\"])(?:--?[\w-]+=)?)"
    rf"(?P<path>(?:{_START}{_SLASH}|{_SLASH}[^'\"/\\\n]+{_SLASH})[^'\"\n]*)(?P=quote)"
)


def without_local_paths(value):
    """A JSON value in which paths of this machine, in texts however deep, are their last parts alone; relative paths
    stay."""
    if isinstance(value, dict):
        public = {key: without_local_paths(each) for key, each in value.items()}
        return public | ({"dataset": dataset_name(value)} if "dataset_on_hub" in public and "dataset" in public else {})
    if isinstance(value, list):
        return [without_local_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(file://)?([A-Za-z]:[/\\]|[/\\~]|\.\.[/\\])", value) and "\n" not in value:
        return last_part(value) or value
    value = _QUOTED.sub(lambda match: match["before"] + last_part(match["path"]) + match["quote"], value)
    return _LOCAL.sub(lambda match: last_part(match[0]), value)


def parts_of(path):
    return re.split(r"/|\\(?! )", path.rstrip("/\\"))


def last_part(path):
    return parts_of(path)[-1]


def dataset_name(facts):
    """How a card calls the dataset of a measurement or a run: its id on the Hub, or the last part of a path; of a
    pattern, which is the same in many places, with the folder that it is in, unless that is somebody's home."""
    name = facts.get("dataset")
    if name is None or facts.get("dataset_on_hub"):
        return name
    *above, last = parts_of(str(name))
    parent, folder = ["", "", *above][-2:]
    is_home = parent in ("home", "Users") or folder in ("", ".", "..", "~", "root") or folder.endswith(":")
    is_pattern = "{split}" in last or any(magic in last for magic in "*?[")
    return f"{folder}/{last}" if is_pattern and not is_home else last
