"""Tiny random components of the pipelines with transformers, for `stock_pipelines.py`: by class, and by pipeline."""

import transformers
from tiny_cases import Case


# one character, one token
CHARACTERS = [chr(code) for code in range(33, 127)]


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((each, -2.0) for each in CHARACTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


def t5_config(**changes):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 200}
    return transformers.T5Config(**(sizes | changes))


# by the name of the class in the type hint: a function that makes one
COMPONENTS = {
    "T5Tokenizer": t5_tokenizer,
    "T5EncoderModel": lambda: transformers.T5EncoderModel(t5_config()),
}

# (regular expression for the name of the pipeline without "Pipeline", what it needs beside); later rows win
CASES: list[tuple[str, Case]] = []
