"""`score-sde sample` of a model of texts: drawn in batches, shown while they form, printed or written."""

import json
import os
import shutil
import sys

import torch

from .pipelines.wording import printable
from .pipelines.writing import whole_file


def check_texts_file(option, path):
    """Raise ValueError for what is no name of a file of texts, or is a folder."""
    if not path.endswith((".txt", ".jsonl")) or os.path.isdir(path):
        raise ValueError(f"{option} {path!r}: texts go to a .txt file, or with their seeds to a .jsonl file")


def check_terminal(option):
    """Raise ValueError where the output is no terminal, which a text could form on."""
    if not sys.stdout.isatty():
        raise ValueError(f"{option} shows a text on a terminal, which the output is not: leave it out")


def draw_texts(pipeline, count, seed, batch_size, classes=None, prompts=None, stream=False, **arguments):
    """(texts, each of the seed of its number, of these classes and prompts in turn; network evaluations of all
    batches).

    Args:
        stream: whether to show the first text of a batch on the terminal while it forms.
        arguments: of the pipeline's call.
    """
    texts, nfe, screen = [], 0, Screen() if stream else None
    pipeline.set_progress_bar_config(desc="sampling", leave=False, disable=stream)
    for first in range(0, count, batch_size):
        numbers = range(first, min(first + batch_size, count))
        output = pipeline(
            batch_size=len(numbers),
            class_labels=classes and [classes[i % len(classes)] for i in numbers],
            prompt=prompts and [prompts[i % len(prompts)] for i in numbers],
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in numbers],
            callback_on_step_end=screen and screen.show,
            **arguments,
        )
        texts, nfe = texts + output.texts, nfe + output.nfe
    if screen:
        screen.clear()
    return texts, nfe


def in_one(texts):
    """Texts one after the other: a line each, or with rules between where some have several lines."""
    return ("\n\n-----\n\n" if any("\n" in text for text in texts) else "\n").join(texts)


def print_texts(texts):
    """Print texts, on a terminal without what it would obey."""
    print(printable(in_one(texts)) if sys.stdout.isatty() else in_one(texts))


def write_texts(path, texts, seed):
    """Write texts, whole, as they are printed, or to a .jsonl file as {"seed", "text"} in each line."""
    rows = [json.dumps({"seed": seed + i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace", newline="") as file:
        file.write(("\n".join(rows) if path.endswith(".jsonl") else in_one(texts)) + "\n")


class Screen:
    """A place on the terminal where a text stands in place of the one before."""

    def __init__(self):
        self.lines = 0

    def show(self, pipeline, step, timestep, tensors):
        """A callback_on_step_end: show the first text as far as it is known."""
        [text] = pipeline.decode(tensors["token_ids"][:1])
        width, height = shutil.get_terminal_size()
        lines = [
            line[at : at + width] for line in printable(text).split("\n") for at in range(0, len(line) or 1, width)
        ]
        self.clear()
        lines = lines[: height - 1]
        print("\n".join(lines), flush=True)
        self.lines = len(lines)

    def clear(self):
        if self.lines:  # up to where it began, and nothing below
            print(f"\x1b[{self.lines}F\x1b[J", end="", flush=True)
        self.lines = 0
