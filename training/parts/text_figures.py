"""Figures of generated texts beside real ones. A new kind of figure is a function and a row of `FIGURES`."""

import math
from collections import Counter

from .molecules import molecule_figures


def ngrams(sequences, n):
    """How often each run of n elements stands in some sequences: a Counter."""
    return Counter(tuple(each[i : i + n]) for each in sequences for i in range(len(each) - n + 1))


def entropy(counts):
    """Bits per n-gram of counts, 0 of none."""
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0


def distinct(counts):
    """Share of n-grams that are different ones (Li et al. 2016), 0 of none."""
    return len(counts) / total if (total := sum(counts.values())) else 0.0


def ngram_figures(texts, real, data):
    """Distinct-n of words, n = 1 to 3, and the entropy of the n-grams of tokens, n = 1 to 4: of as many texts as there
    are real ones, since both depend on how many."""
    found = []
    count = min(len(texts), len(real))
    pairs = texts[:count], real[:count]
    of_words = [[text.split() for text in each] for each in pairs]
    of_tokens = [data.tokenizer(each, add_special_tokens=False)["input_ids"] for each in pairs]
    for n in (1, 2, 3):
        own, theirs = (distinct(ngrams(each, n)) for each in of_words)
        meaning = f"share of {'words' if n == 1 else f'runs of {n} words'} that are different ones (Li et al. 2016)"
        found.append({"name": f"distinct-{n}", "value": own, "of_real_texts": theirs, "explanation": meaning})
    for n in (1, 2, 3, 4):
        own, theirs = (entropy(ngrams(each, n)) for each in of_tokens)
        meaning = f"of {'tokens' if n == 1 else f'runs of {n} tokens'}, in bits"
        found.append({"name": f"{n}-gram entropy", "value": own, "of_real_texts": theirs, "explanation": meaning})
    for figure in found:
        figure["explanation"] += f"; of as many real texts {figure['of_real_texts']:.4g}."
    return [figure | {"n": count} for figure in found]


# name -> f(texts, real texts, data), a list of {"name", "value", "n", "explanation", ...}: `data` is a `HeldOutTexts`,
# which opens other splits, too
FIGURES = {"ngrams": ngram_figures, "molecules": molecule_figures}
