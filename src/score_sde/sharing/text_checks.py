"""Checks of the text encoder and the tokenizer in a bundle, classes of `transformers`, before they are opened: their
own files alone, none of which is code or leads to other files."""

import os
import re

import torch

from ..pipelines.bundle_files import own_file, read_config
from ..pipelines.bundling import NETWORK_ROLES
from ..pipelines.wording import quoted
from .config_checks import check_keys, check_numbers, naming
from .weight_checks import LARGEST_INTEGER, at_most, check_values, reading


INDEX = "model.safetensors.index.json"
# what may lie in a component's folder: transformers looks for more, adapters that name their base and other weights
FILES = {
    "text_encoder": re.compile(r"config\.json|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|" + INDEX),
    "tokenizer": re.compile(r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|chat_template\.jinja"),
}
# bytes
LARGEST_TOKENIZER = 2**26
_TOKENIZER = re.compile(r"[A-Z]\w*Tokenizer(Fast)?|TokenizersBackend")


def text_class(name, class_name):
    """The class of `transformers` of the component text_encoder or tokenizer, None for one that it cannot be: a model
    without a head, or a tokenizer whose rules are in tokenizer.json."""
    import transformers
    from transformers.models.auto import modeling_auto

    if name == "tokenizer":
        known, base = _TOKENIZER.fullmatch(class_name), transformers.PreTrainedTokenizerFast
    else:
        tables = modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        names = [name for table in tables for each in table.values() for name in ([each], each)[type(each) is tuple]]
        known, base = class_name in names, transformers.PreTrainedModel
    found = getattr(transformers, class_name, None) if known else None
    return found if isinstance(found, type) and issubclass(found, base) else None


def check_text_component(folder, name, component_class):
    """Raise ValueError, naming the file, for a text encoder or a tokenizer that is not sound."""
    place = os.path.join(folder, name)
    for entry in sorted(os.listdir(place)) if os.path.isdir(place) and not os.path.islink(place) else []:
        if not FILES[name].fullmatch(entry):
            raise ValueError(f"{os.path.join(place, entry)} has no place in a bundle: remove it")
    check = check_tokenizer if name == "tokenizer" else check_text_encoder
    check(folder, place, component_class)


def check_tokenizer(folder, place, component_class):
    config = read_config(folder, "tokenizer", "tokenizer_config.json")
    path = os.path.join(place, "tokenizer_config.json")
    check_keys(config, path)
    for key, value in config.items():
        if key.endswith("_file") and value is not None:
            raise ValueError(f"{path}: {quoted(key)} {quoted(value)} is not allowed in a bundle: it names another file")
    rules = own_file(folder, "tokenizer", "tokenizer.json")
    if os.path.getsize(rules) > LARGEST_TOKENIZER:
        raise ValueError(f"{rules} has more than {LARGEST_TOKENIZER:,} bytes")


def check_vocabulary(folder, classes, of_tokens):
    """Raise ValueError for a network of tokens in a pipeline of other data or the reverse, and for a network, a
    scheduler and a tokenizer of different vocabularies.

    Args:
        folder: a bundle whose components are sound.
        classes: {component: class} of those that are opened.
        of_tokens: whether its pipeline generates tokens.
    """
    sizes = {}
    for name in NETWORK_ROLES:
        if name in classes:
            sizes[name] = read_config(folder, name, "config.json").get("vocab_size")
            if (sizes[name] is not None) != of_tokens:
                raise ValueError(
                    f"{os.path.join(folder, name, 'config.json')}: vocab_size {quoted(sizes[name])} is of a network of "
                    f"{'other data' if of_tokens else 'tokens'}, with which this pipeline cannot draw"
                )
    if not of_tokens:
        return
    if "scheduler" in classes:
        sizes["scheduler"] = read_config(folder, "scheduler", "scheduler_config.json").get("vocab_size")
    if "tokenizer" in classes:
        place = os.path.join(folder, "tokenizer")
        with naming(place):
            numbers = sorted(classes["tokenizer"].from_pretrained(place, local_files_only=True).get_vocab().values())
        sizes["tokenizer"] = len(numbers)
        if numbers != [*range(len(numbers))]:
            raise ValueError(f"{place}: the numbers of its {len(numbers):,} tokens are not 0 to {len(numbers) - 1:,}")
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"the {name}'s {size}" for name, size in sizes.items())
        raise ValueError(f"{folder}: the parts of this pipeline are of different vocabularies: {found} tokens")


def check_text_encoder(folder, place, component_class):
    config, path = read_config(folder, "text_encoder", "config.json"), os.path.join(place, "config.json")
    check_keys(config, path)
    own_type = component_class.config_class.model_type
    if config.get("model_type") != own_type:
        raise ValueError(
            f"{path}: model_type {quoted(config.get('model_type'))} is not {own_type}, a {component_class.__name__}'s"
        )
    files = text_weights(folder)
    shapes = {}
    for file in files:
        with reading(file) as weights:
            shapes |= {key: torch.Size(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    numbers = sum(shape.numel() for shape in shapes.values())
    check_numbers(config, path, max(numbers, LARGEST_INTEGER), finite=True)
    too_large = ValueError(
        f"the text encoder that this describes is larger than its weights, which hold {numbers:,} numbers"
    )
    with naming(path), at_most(4 * len(shapes), 4 * numbers, too_large), torch.device("meta"):
        model = component_class(component_class.config_class.from_dict(config))
    # a weight that two modules share is saved once, under either name
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    missing = [each[0] for each in names.values() if not shapes.keys() & each]
    unexpected = sorted(shapes.keys() - {name for each in names.values() for name in each})
    expected = {name: tensor for name, tensor in model.state_dict().items() if name in shapes}
    other = [name for name, tensor in expected.items() if tensor.shape != shapes[name]]
    for problem, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", other)):
        if found:
            raise ValueError(f"the weights in {place} are not those of its config: {problem}: {quoted(found[:3])}")
    for file in files:
        check_values(file, expected)


def text_weights(folder):
    """The safetensors files of a text encoder. Raises ValueError where there are none."""
    place = os.path.join(folder, "text_encoder")
    if not os.path.lexists(os.path.join(place, INDEX)):
        return [own_file(folder, "text_encoder", "model.safetensors")]
    weight_map = read_config(folder, "text_encoder", INDEX).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(each, str) and FILES["text_encoder"].fullmatch(each) for each in names):
        raise ValueError(f"{os.path.join(place, INDEX)}: weight_map names no safetensors files beside it")
    return [own_file(folder, "text_encoder", each) for each in sorted(names)]
