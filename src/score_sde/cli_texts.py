"""`score-sde sample` of a model of texts: drawn in batches, shown as they form, printed or written."""

import json
import shutil
import sys

import torch

from .pipelines.wording import one_line
from .pipelines.writing import whole_file


def check_output(path):
    """Raise ValueError for a file that texts cannot be written to."""
    if not path.endswith((".txt", ".jsonl")):
        raise ValueError(f"--output {path!r}: texts are written to .txt, or with their seeds to .jsonl")


def draw_texts(pipeline, count, seed, batch_size, classes=None, prompts=None, stream=False, **options):
    """Texts, each of the seed of its number, of these classes and prompts in turn, and the number of network
    evaluations of each batch.

    Args:
        options: of the pipeline's call.
        stream: whether to show the first text of a batch on the terminal while it forms.
    """
    texts, evaluations = [], []
    for first in range(0, count, batch_size):
        numbers = range(first, min(first + batch_size, count))
        screen = Screen() if stream else None
        output = pipeline(
            batch_size=len(numbers),
            class_labels=[classes[i % len(classes)] for i in numbers] if classes else None,
            prompt=[prompts[i % len(prompts)] for i in numbers] if prompts else None,
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in numbers],
            callback_on_step_end=screen and screen.show,
            **options,
        )
        if screen:
            screen.clear()
        texts += output.texts
        evaluations.append(output.nfe)
    return texts, evaluations


def as_one(texts):
    """Texts one after the other: a line each, or with rules between where some have several."""
    return ("\n" if all("\n" not in text for text in texts) else "\n\n-----\n\n").join(texts)


def write_texts(path, texts, seed):
    """Write texts whole: as they are printed, or as lines of JSON with their seeds."""
    rows = [json.dumps({"seed": seed + i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.write(("\n".join(rows) if path.endswith(".jsonl") else as_one(texts)) + "\n")


class Screen:
    """A place on the terminal where one text takes the place of the one before."""

    def __init__(self):
        self.lines = 0

    def show(self, pipeline, step, timestep, tensors):
        """A callback of the pipeline: show the first text as far as it is known."""
        [text] = pipeline.show(tensors["tokens"][:1])
        width, height = shutil.get_terminal_size()
        lines = [line[at : at + width - 1] for line in text.splitlines() for at in range(0, len(line) or 1, width - 1)]
        self.clear()
        shown = [one_line_but_blanks(line) for line in lines[: height - 1]]
        self.lines = len(shown)
        print("\n".join(shown), flush=True)
        return {}

    def clear(self):
        if self.lines:
            # up to where the text began, and nothing below
            print(f"\x1b[{self.lines}F\x1b[J", end="", flush=True)
        self.lines = 0
