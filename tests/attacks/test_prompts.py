"""A text encoder or a tokenizer in a bundle brings no code, leads to no other files or weights, and takes no more
memory than its weights: one row per attack."""

import json
from pathlib import Path

import pytest
import torch
from attacked import attacked_copy, config, write
from safetensors.torch import load_file, save_file
from words import prompt_pipeline

from score_sde import load_bundle, save_bundle
from score_sde.sharing.bundle_code import compare_code
from score_sde.sharing.pushed_files import files_to_push


@pytest.fixture(scope="session")
def sound_bundle(tmp_path_factory):
    return Path(save_bundle(prompt_pipeline(), tmp_path_factory.mktemp("sound") / "bundle"))


@pytest.fixture
def bundle(sound_bundle, tmp_path, monkeypatch):
    with attacked_copy(sound_bundle, tmp_path, monkeypatch) as copy:
        yield copy


def weights(change):
    def attack(folder):
        path = folder / "text_encoder" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return attack


ENCODER, TOKENIZER, INDEX = "text_encoder/config.json", "tokenizer/tokenizer_config.json", "model_index.json"
CODE = "open('TRACE', 'w')\n"
ATTACKS = {
    "code of an encoder": (write("text_encoder/evil.py", CODE), "evil.py has no place in a bundle: remove it"),
    "code of a tokenizer": (write("tokenizer/evil.py", CODE), "evil.py has no place in a bundle"),
    "code where a library is looked for": (write("tokenizer/transformers.py", CODE), "taken for the installed code"),
    "a pickle": (write("text_encoder/pytorch_model.bin", "x"), "pytorch_model.bin has no place in a bundle"),
    "an adapter": (
        write("text_encoder/adapter_config.json", '{"base_model_name_or_path": "somebody/evil"}'),
        "adapter_config.json has no place in a bundle",
    ),
    "rules in another file": (write("tokenizer/spiece.model", "x"), "spiece.model has no place in a bundle"),
    "remote code": (config(ENCODER, auto_map={"AutoModel": "evil.Evil"}), "config.json: auto_map .* is not allowed"),
    "remote code of a tokenizer": (config(TOKENIZER, auto_map={"AutoTokenizer": ["evil.Evil", None]}), "auto_map"),
    "remote code deeper": (config(ENCODER, text_config={"auto_map": 1}), "text_config.auto_map 1 is not allowed"),
    "a kernel from the Hub": (config(ENCODER, attn_implementation="evil/kernel"), "attn_implementation 'evil/kernel'"),
    "a kernel by its other name": (config(ENCODER, _attn_implementation="evil/kernel"), "_attn_implementation 'evil"),
    "other weights": (config(ENCODER, transformers_weights="../evil.safetensors"), "transformers_weights"),
    "quantised": (config(ENCODER, quantization_config={"quant_method": "awq"}), "quantization_config"),
    "another file": (config(TOKENIZER, vocab_file="/etc/passwd"), "'vocab_file' '/etc/passwd' is not allowed"),
    "a model with a head": (config(INDEX, text_encoder=["transformers", "BertForMaskedLM"]), "a model of transformers"),
    "a pipeline": (config(INDEX, text_encoder=["transformers", "pipeline"]), "'pipeline' of transformers, cannot be"),
    "an automatic class": (config(INDEX, text_encoder=["transformers", "AutoModel"]), "cannot be loaded: it must be"),
    "a class of ours": (config(INDEX, tokenizer=["transformers", "BertModel"]), "a fast tokenizer of transformers"),
    "an automatic tokenizer": (config(INDEX, tokenizer=["transformers", "AutoTokenizer"]), "a fast tokenizer of"),
    "a processor": (config(INDEX, tokenizer=["transformers", "CLIPProcessor"]), "a fast tokenizer of transformers"),
    "another library": (config(INDEX, tokenizer=["evil", "BertTokenizer"]), "component 'tokenizer' is a BertTokenizer"),
    "another family": (config(ENCODER, model_type="gpt2"), "model_type 'gpt2' is not bert, a BertModel's"),
    "a huge encoder": (config(ENCODER, num_hidden_layers=10**5), "is larger than its weights"),
    "a wide encoder": (config(ENCODER, vocab_size=10**6), "is larger than its weights"),
    "a count out of bounds": (config(ENCODER, vocab_size=10**12), "is more than the 1,000,000 that there can be"),
    "no weights": (lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(), "model.safetensors"),
    "no rules": (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json"),
    "a weight less": (weights(lambda each: each.pop("embeddings.word_embeddings.weight")), "missing: .*word_embed"),
    "a weight more": (weights(lambda each: each.update(evil=torch.zeros(1))), "unexpected: .*evil"),
    "not finite": (weights(lambda each: each["embeddings.LayerNorm.bias"].fill_(torch.nan)), "not finite"),
    "settings": (config(INDEX, prompt_settings={"max_tokens": 10**9}), "model_index.json: prompt_settings: max_tokens"),
    "settings of another kind": (config(INDEX, prompt_settings=[1]), "'prompt_settings' is no name of a component"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_by_name(bundle, attack):
    make, message = ATTACKS[attack]
    make(bundle)
    with pytest.raises(ValueError, match=message) as error:
        load_bundle(bundle)
    assert len(str(error.value)) < 2000


def test_a_sound_bundle_opens_and_is_pushed_as_it_is(bundle):
    assert load_bundle(bundle).encode_prompt("a hat")["encoder_hidden_states"].isfinite().all()
    names = files_to_push(str(bundle))
    assert {"text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= set(names)
    assert not any(str(bundle.parent) in (bundle / name).read_text() for name in names if name.endswith(".json"))
    assert set(compare_code(str(bundle), type(load_bundle(bundle))).values()) == {"same"}


def test_weights_in_parts_open(bundle):
    pipeline = load_bundle(bundle)
    pipeline.save_pretrained(bundle.parent / "parts", max_shard_size="20KB")
    assert (bundle.parent / "parts" / "text_encoder" / "model.safetensors.index.json").exists()
    told = load_bundle(bundle.parent / "parts").encode_prompt("a hat")["encoder_hidden_states"]
    assert torch.equal(told, pipeline.encode_prompt("a hat")["encoder_hidden_states"])
    index = bundle.parent / "parts" / "text_encoder" / "model.safetensors.index.json"
    changed = json.loads(index.read_text())
    changed["weight_map"] = dict.fromkeys(changed["weight_map"], "../../evil.safetensors")
    index.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="weight_map names no safetensors files beside it"):
        load_bundle(bundle.parent / "parts")
