"""What of a folder is pushed: the files that a bundle, a model or a scheduler is made of, its card and its facts, these
without the paths of this machine."""

import json
import os
import re
from pathlib import Path

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

from ..pipelines.bundle_files import own_file, read_index
from ..pipelines.carried_code import sibling_imports
from ..pipelines.wording import quoted
from .bundle_checks import PACKAGE, ROLES, TEXT_ROLES
from .bundle_code import is_of_libraries, is_stock_bundle
from .downloading import ADAPTER, DATA
from .facts import read_json, without_local_paths
from .weight_checks import weight_files


# what lies in a bundle beside its components
CARD = ("README.md", "LICENSE", "training.json", "metrics.json", "samplers.json", "samples.png")
DATA_ENDS = (".safetensors", *(pattern.removeprefix("*") for pattern in DATA))
KINDS = ("model_index.json", "config.json", "scheduler_config.json", ADAPTER)
SHOWN = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".wav")
_VARIANT = re.compile(r"diffusion_pytorch_model(?:\.safetensors\.index\.(\w+)\.json|\.(\w+)\.safetensors)")


def files_to_push(folder):
    """The names, with /, of the files that a bundle, a model, a scheduler or an adapter is made of: those that its
    index names, and its card. Raises ValueError for a folder that is none of these, and for a file of it that is
    missing, or leads elsewhere (`own_file`)."""
    kind = next((name for name in KINDS if os.path.lexists(os.path.join(folder, name))), None)
    if kind is None:
        raise ValueError(f"{quoted(folder)} cannot be shared: it holds no {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    found = [os.path.join(folder, name) for name in CARD if os.path.lexists(os.path.join(folder, name))]
    if kind == ADAPTER:
        found.append(own_file(folder, ADAPTER))
    elif kind != "model_index.json":
        found += component_files(folder)
    else:
        index = read_index(folder)
        found.append(own_file(folder, kind))
        stock = is_stock_bundle(index)
        if isinstance(index["_class_name"], list):
            found += code_files(folder, index["_class_name"][0])
        for name, value in index.items():
            if not isinstance(value, list) or name.startswith("_") or value == [None, None]:
                continue
            if name not in ROLES and not stock or len(value) != 2:
                raise ValueError(f"{folder}/model_index.json: {quoted(name)} is no component that can be shared")
            if str(value[0]).split(".")[0] == PACKAGE:
                raise ValueError(
                    f"{folder}/model_index.json: {quoted(name)} is without its code, and diffusers would not open it "
                    f"from the Hub: score_sde.push_to_hub(score_sde.load_bundle({quoted(folder)}), ...) pushes it with"
                )
            others = is_of_libraries(value) and (name not in ROLES or name in TEXT_ROLES)
            found += data_files(folder, name) if others else component_files(folder, name)
            if not is_of_libraries(value):
                found += code_files(folder, value[0], name)
    if os.path.join(folder, "README.md") in found:
        card = Path(own_file(folder, "README.md")).read_text(encoding="utf-8", errors="replace")
        for name in os.listdir(folder):
            # not one whose name is the end of another's
            if name.lower().endswith(SHOWN) and re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", card):
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


def data_files(folder, name):
    """The paths of what a text encoder, a tokenizer or the like is made of: data, and weights."""
    place = os.path.join(folder, name)
    if not os.path.isdir(place):
        raise ValueError(f"{place} is no folder: save it anew")
    return [own_file(folder, name, each) for each in sorted(os.listdir(place)) if each.endswith(DATA_ENDS)]


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
    if name in ("training.json", "metrics.json", "samplers.json", "tokenizer_config.json", *KINDS):
        value = read_json(path)
        public = without_local_paths(value) if name.startswith(("training", "metrics", "samplers")) else value
        if public is value and isinstance(value, dict):
            public = {key: each for key, each in value.items() if key != "_name_or_path"}
        if public != value:
            content = (json.dumps(public, indent=2) + "\n").encode()
    return content
