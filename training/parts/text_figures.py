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
    return sum(count / total * math.log2(total / count) for count in counts.values()) if total else 0.0


def distinct(counts):
    """Share of n-grams that are different ones (Li et al. 2016), 0 of none."""
    return len(counts) / total if (total := sum(counts.values())) else 0.0


def ngram_figures(texts, real, data):
    """Distinct-n of words, n = 1 to 3, and the entropy of the n-grams of tokens, n = 1 to 4: of as many texts as there
    are real ones, since both depend on how many. Runs that no real text has, as molecules have none of two words, are
    left out."""
    count = min(len(texts), len(real))
    pairs = texts[:count], real[:count]
    of_words = [[text.split() for text in each] for each in pairs]
    of_tokens = [data.tokenizer(each, add_special_tokens=False)["input_ids"] for each in pairs]
    found = []
    for runs, what, most, measure, name, meaning in (
        (of_words, "words", 3, distinct, "distinct-{}", "share of {} that are different ones (Li et al. 2016)"),
        (of_tokens, "tokens", 4, entropy, "{}-gram entropy", "of {}, in bits"),
    ):
        for n in range(1, most + 1):
            own, theirs = (ngrams(each, n) for each in runs)
            if theirs:
                meant = meaning.format(what if n == 1 else f"runs of {n} {what}")
                figure = {"name": name.format(n), "value": measure(own), "of_real_texts": measure(theirs), "n": count}
                explanation = f"{meant}; of as many real texts {figure['of_real_texts']:.4g}."
                found.append(figure | {"explanation": explanation})
    return found


# name -> f(texts, real texts, data), a list of {"name", "value", "n", "explanation", ...}: `data` is a `HeldOutTexts`,
# which opens other splits, too
FIGURES = {"ngrams": ngram_figures, "molecules": molecule_figures}
