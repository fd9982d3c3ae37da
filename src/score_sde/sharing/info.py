"""What a bundle is, from its small files alone: nothing of it is built or run, no weights are downloaded."""

import inspect
import math
import os
import re

from huggingface_hub import HfApi
from safetensors import safe_open

from .. import __version__
from ..pipelines.bundle_files import read_index, saved_class_name
from ..pipelines.units import as_given
from ..pipelines.wording import few, one_line
from ..schedulers.paths import SDE_TYPES
from .adapters import small_files_of
from .bundle_checks import TEXT_ROLES
from .bundle_code import is_of_libraries, known_class
from .downloading import hub_errors
from .facts import SAMPLES, read_facts, read_json
from .hub import verify
from .model_card import training_rows
from .token_facts import is_of_tokens, token_facts


# what a pipeline's index says of its data
SAID = ("columns", "condition_from", "sampling_rate", "frame_rate", "data_mean", "data_std")


def describe(folder_or_repo, **download):
    """What is known of a bundle, as a JSON-able dict; what its files don't tell is left out.

    Takes `revision`, `token` and the other arguments of a download. Raises ValueError as `load_bundle` does.

    Returns:
        pipeline: the name of its class.
        path: {"sde_type": ..., its numbers that are not the defaults}; or of a model of tokens
        tokens: {"process", "noise", "vocab_size", "length", "tokenizer"}, see `token_facts`.
        prediction: what the network predicts.
        sampler: {argument: value} of the scheduler's other arguments that are not the defaults.
        components: {name: {"class", "arguments" that are not the defaults, "parameters", a number}}.
        classes: their names.
        columns: names of the numbers of a point, with commas.
        condition_from: what the image that the network sees beside the sample is of the one to be made.
        sampling_rate, frame_rate: of sound in Hz, of videos in frames a second.
        data_mean, data_std: of data in units of their own, numbers, or one for each channel.
        training: what training.json holds.
        metrics: measurements, as metrics.json holds them.
        code: {path: verdict} of the code that it carries, see `verify`.

    Of a LoRA adapter:
        adapter: {"network", "rank", "alpha", "targets", "classes", "parameters"}, see `adapters.header_of`.
        training, metrics, code: as above.
    """
    folder, adapter = small_files_of(folder_or_repo, **download)
    told = {"training": read_facts(folder), "metrics": read_json(os.path.join(folder, "metrics.json")) or []}
    if adapter is not None:
        return {"adapter": adapter, **told, "code": {}}
    index = read_index(folder)
    components = {
        name: value for name, value in index.items() if name[0] != "_" and isinstance(value, list) and value[1]
    }
    facts = {"pipeline": saved_class_name(index)}
    if "scheduler" in components:
        scheduler = known_class("scheduler", components.pop("scheduler"))
        given = arguments(os.path.join(folder, "scheduler", "scheduler_config.json"), scheduler)
        numbers = (
            inspect.signature(SDE_TYPES[given["sde_type"]]).parameters if given.get("sde_type") in SDE_TYPES else {}
        )
        if is_of_tokens(index):
            facts["tokens"] = token_facts(folder)
            given = {name: value for name, value in given.items() if name not in facts["tokens"]}
        else:
            facts["path"] = {name: given.pop(name) for name in ("sde_type", *numbers, "domain") if name in given}
        facts["prediction"] = given.pop("prediction_type", None)
        if "corrector" not in given:
            given.pop("corrector_steps", None)
        facts["sampler"] = given
    facts["components"] = {}
    for name, (_, class_name) in components.items():
        cls = known_class(name, components[name])
        # what is of transformers, or of a stock pipeline, is described where these libraries are
        described = name not in TEXT_ROLES and (cls is not None or not is_of_libraries(components[name]))
        own = arguments(os.path.join(folder, name, "config.json"), cls) if described else {}
        facts["components"][name] = {"class": class_name, "arguments": own}
        parameters = count_parameters(folder_or_repo, folder, name, **download)
        facts["components"][name] |= {"parameters": parameters} if parameters else {}
    labels = index.get("id2label") or {}
    facts["classes"] = [labels[number] for number in sorted(labels, key=int)]
    facts |= {name: as_given(index[name]) for name in SAID if index.get(name) is not None}
    return facts | told | {"code": verify(folder)}


def arguments(path, cls):
    """{argument: value} of a config that are not the defaults of its class, None for one that isn't known; in any case
    what says which path and prediction a scheduler has."""
    given = {name: value for name, value in (read_json(path) or {}).items() if name[0] != "_" and value is not None}
    defaults = inspect.signature(cls.__init__).parameters if cls else {}
    return {
        name: value
        for name, value in given.items()
        if name in ("sde_type", "prediction_type") or name not in defaults or defaults[name].default != value
    }


def count_parameters(folder_or_repo, folder, name, revision=None, token=None, **_):
    """The number of a component's weights, by the headers of its safetensors files; 0 where there are none.

    Args:
        folder: where the bundle's small files are, and maybe its weights.
    """
    # a variant has a second dot
    weights = re.compile(rf"{re.escape(name)}/[^./]+\.safetensors")
    place = os.path.join(folder, name)
    local = [f"{name}/{file}" for file in (os.listdir(place) if os.path.isdir(place) else [])]
    count = 0
    if any(map(weights.fullmatch, local)) or os.path.isdir(folder_or_repo):
        for path in filter(weights.fullmatch, local):
            with safe_open(os.path.join(folder, path), framework="pt") as file:
                count += sum(math.prod(file.get_slice(each).get_shape()) for each in file.keys())  # noqa: SIM118
        return count
    api = HfApi(token=token)
    with hub_errors(ValueError, f"the weights of {folder_or_repo!r} cannot be counted", token):
        for path in filter(weights.fullmatch, api.list_repo_files(folder_or_repo, revision=revision)):
            header = api.parse_safetensors_file_metadata(folder_or_repo, path, revision=revision)
            count += sum(header.parameter_count.values())
    return count


def as_text(facts):
    """What `describe` found, a fact per line."""

    def listed(values):
        return ", ".join(f"{name} {value}" for name, value in values.items())

    rows = [("pipeline", facts["pipeline"])] if "pipeline" in facts else list(rows_of_adapter(facts))
    if "path" in facts:
        numbers = dict(facts["path"])
        rows += [("path", " ".join([numbers.pop("sde_type", "unknown"), listed(numbers)]))]
    if "tokens" in facts:
        tokens = facts["tokens"]
        rows += [("process", f"{tokens.get('process', 'unknown')}, {tokens.get('noise', 'unknown')} noise")]
        rows += [("vocabulary", f"{tokens.get('vocab_size')} {tokens.get('tokenizer', 'tokens')}")]
        rows += [("length", f"{tokens.get('length')} tokens")]
    if "prediction" in facts:
        rows += [("prediction", facts["prediction"]), ("sampler", listed(facts["sampler"]) or "as by default")]
    for name, each in facts.get("components", {}).items():
        count = f"{each['parameters']:,} parameters" if "parameters" in each else "no weights here"
        rows.append((name, ", ".join([each["class"], count, *listed(each["arguments"]).split(", ")]).rstrip(", ")))
    if facts.get("classes"):
        rows.append(("classes", f"{len(facts['classes'])}: {few(facts['classes'], 10)}"))
    rows += [(name, facts[name]) for name in SAID if name in facts]
    data_kind = facts["training"].get("data_kind", "image")
    kind, unit = ("text", "tokens") if "tokens" in facts else (SAMPLES.get(str(data_kind), "sample"), "px")
    rows += training_rows(facts["training"], kind, unit)
    settings = ("standard_error", "n", "split", "nfe", "sampler", "guidance_scale", "dataset")
    for each in facts["metrics"]:
        how = listed({name: each[name] for name in settings if name in each})
        rows.append(("measured", f"{each['name']}: {each['value']} ({how})"))
    whose = f"all those of score-sde {__version__}"
    others = [f"{path} ({verdict})" for path, verdict in facts["code"].items() if verdict != "same"]
    if others:
        whose = f"{len(others)} not those of score-sde {__version__}: {few(others, 10)}"
    nothing = "none: a LoRA adapter is weights alone" if "adapter" in facts else "none"
    rows.append(("code", f"{len(facts['code'])} files, {whose}" if facts["code"] else nothing))
    return "\n".join(f"{one_line(name):28} {one_line(value)}" for name, value in rows)


def rows_of_adapter(facts):
    """What a LoRA adapter is, as (name, value) rows."""
    adapter, begun = facts["adapter"], facts["training"].get("started_from") or {}
    said = [f"{name} {adapter[name]}" for name in ("rank", "alpha") if name in adapter]
    targets = few(adapter.get("targets", ()), 10)
    parts = [*said, f"{adapter['parameters']:,} parameters", *([f"in {targets}"] if targets else [])]
    yield "LoRA adapter", ", ".join(parts)
    yield "of the model", begun.get("base_model") or begun.get("source") or "not said: it lies with who trained it"
    if adapter.get("classes"):
        yield "classes that it brings", few(adapter["classes"], 10)
    yield "as a pipeline", "score-sde merge, or load_bundle, opens it with its model"
