"""What a bundle of tokens is made of, from its configs and its tokenizer's rules, none of which is run."""

import os

from ..pipelines.bundle_files import read_config, read_index, saved_class_name
from .downloading import NoPipelineFolder, fetch
from .facts import read_facts, read_json, writable


FACTS = "training.json"


def is_of_tokens(index):
    """Whether a model index is of a pipeline that generates tokens, with code or without."""
    return saved_class_name(index) == "ScoreSDETextPipeline"


def makes_texts(folder_or_repo, **download):
    """Whether a pipeline makes texts, by its model_index.json alone, or a LoRA adapter's, by its training.json. Takes
    `revision`, `token` and the other arguments of a download. Raises ValueError for what can't be had."""
    try:
        return is_of_tokens(read_index(fetch(folder_or_repo, patterns=["model_index.json", FACTS], **download)[0]))
    except NoPipelineFolder as error:
        return read_facts(error.folder).get("data_kind") == "text"


def token_facts(folder):
    """{"process", "noise", "vocab_size", "length", "tokenizer"} of a bundle of tokens: what becomes of a token and how
    fast, the number of tokens, how many a text has, and what they are (`kind_of_tokens`). What its files don't tell is
    left out."""
    scheduler = read_config(folder, "scheduler", "scheduler_config.json")
    network = read_config(folder, "transformer", "config.json")
    size = network.get("sample_size")
    length = size[0] if isinstance(size, list) and len(size) == 1 else size
    facts = {name: scheduler.get(name) for name in ("process", "noise")}
    facts |= {"vocab_size": network.get("vocab_size"), "length": length, "tokenizer": kind_of_tokens(folder)}
    return writable({name: value for name, value in facts.items() if value is not None})


def kind_of_tokens(folder):
    """What the tokens of a bundle are, in words, by the rules of its tokenizer; None where it holds none, or others
    than these."""
    rules = read_json(os.path.join(folder, "tokenizer", "tokenizer.json"))
    model = rules.get("model") if isinstance(rules, dict) else None
    kind, vocabulary = (model.get("type"), model.get("vocab")) if isinstance(model, dict) else (None, None)
    if kind == "BPE":
        return "byte pairs" if model.get("merges") else "bytes"
    if kind == "WordLevel" and isinstance(vocabulary, dict) and all(len(each) == 1 for each in vocabulary):
        return "characters"
    words = {"WordLevel": "words", "WordPiece": "pieces of words", "Unigram": "pieces of words"}
    return words.get(kind) if isinstance(kind, str) else None
