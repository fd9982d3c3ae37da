"""What counting letters achieves: n-gram models of the data for token diffusion, as a floor beside its figures.

    python benchmarks/ngrams.py --data DATA --output benchmarks/ngrams.json

Bits per character of the test split under n-grams counted on the training split, smoothed as Witten and Bell (1991)
did: P_n(c | h) = (N(hc) + T(h) P_(n-1)(c | h')) / (N(h) + T(h)), T(h) the number of different successors of h, P_0
uniform; a context h that was never seen backs off. Every chapter and every molecule begins without context. For
molecules, whose last symbol is an end mark, 10,000 samples of n-grams without smoothing, too.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from score_sde.training.parts.molecules import counts


class NGrams:
    """The counts of n-grams up to an order; a symbol is a whole number from 0, a document an array of them.

    Args:
        documents: arrays of whole numbers.
        symbols: how many there are. symbols**order must be below 2**63.
        order: the longest n.
    """

    def __init__(self, documents, symbols, order):
        self.symbols, self.order, self.tables = symbols, order, []
        for n in range(1, order + 1):
            codes, number = np.unique(windows(documents, n, symbols), return_counts=True)
            contexts, first = np.unique(codes // symbols, return_index=True)
            total = np.add.reduceat(number, first)
            self.tables.append((codes, number, contexts, total, np.diff([*first, len(codes)])))

    def log2_probabilities(self, documents):
        """log2 of the probability of each symbol after those before it, under the smoothed model of the highest order,
        in one array, and of each lower order: a list, one entry an order from 1."""
        lengths = np.concatenate([np.arange(len(each)) for each in documents])
        chances, found = np.full(len(lengths), 1 / self.symbols), []
        for n, (codes, number, contexts, total, kinds) in enumerate(self.tables, 1):
            has = lengths >= n - 1
            asked = windows(documents, n, self.symbols)
            seen, successors = (looked_up(contexts, each, asked // self.symbols) for each in (total, kinds))
            better = (looked_up(codes, number, asked) + successors * chances[has]) / np.maximum(seen + successors, 1)
            chances[has] = np.where(seen > 0, better, chances[has])
            found.append(np.log2(chances))
        return found

    def sample(self, begin, end, count, longest, seed=0):
        """Draw documents without smoothing; they start after order - 1 symbols `begin`, which the counted documents had
        in front, too, and are arrays without `begin` and without the `end` that ends them."""
        codes, number, contexts, _, _ = self.tables[-1]
        above = np.concatenate([[0], np.cumsum(number)])
        rng, base = np.random.default_rng(seed), self.symbols ** (self.order - 1)
        context = np.full(count, sum(begin * self.symbols**i for i in range(self.order - 1)))
        drawn = np.full((count, longest), end)
        for i in range(longest):
            low = above[np.searchsorted(codes, context * self.symbols)]
            high = above[np.searchsorted(codes, (context + 1) * self.symbols)]
            chosen = np.searchsorted(above, low + rng.integers(0, np.maximum(high - low, 1)), side="right") - 1
            done = (drawn[:, :i] == end).any(1)
            drawn[:, i] = np.where(done, end, codes[chosen] % self.symbols)
            context = np.where(done, context, codes[chosen] % base)
        return [row[: np.argmax(row == end)] if (row == end).any() else row for row in drawn]


def windows(documents, n, symbols):
    """All n-grams of documents, in order, each as one number to the base `symbols`."""
    parts = []
    for each in documents:
        code = np.zeros(max(len(each) - n + 1, 0), np.int64)
        for i in range(n):
            code = code * symbols + each[i : len(code) + i]
        parts.append(code)
    return np.concatenate(parts)


def looked_up(keys, values, asked):
    """values[keys == asked], 0 where there is none; keys are sorted."""
    places = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[places] == asked, values[places], 0)


class Alphabet:
    """Characters as whole numbers from 0; END is one more."""

    def __init__(self, texts):
        self.characters = sorted(set().union(*map(set, texts)))
        self.end, self.begin = len(self.characters), len(self.characters) + 1
        self.numbers = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text):
        return np.array([self.numbers[character] for character in text], np.int64)

    def decode(self, numbers):
        return "".join(self.characters[i] for i in numbers)


def read_texts(data, name, split):
    """The documents of one of the data sets: tinyshakespeare, which is one, classics, classics_raw, qm9_smiles."""
    if name == "tinyshakespeare":
        text = (data / "tinyshakespeare.txt").read_text()
        cuts = {"train": (0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1)}[split]
        return [text[int(cuts[0] * len(text)) : int(cuts[1] * len(text))]]
    file, column = {
        "classics": ("classics", "text"),
        "classics_raw": ("classics", "raw"),
        "qm9_smiles": ("qm9_smiles", "smiles"),
    }[name]
    return parquet.read_table(data / f"{file}_{split}.parquet", columns=[column])[column].to_pylist()


def bits(data, name, order):
    """Bits per character of test for every n up to `order`."""
    train, test = (read_texts(data, name, split) for split in ("train", "test"))
    alphabet = Alphabet(train)
    end = np.full(name == "qm9_smiles", alphabet.end)
    documents = [[np.concatenate([alphabet.encode(text), end]) for text in texts] for texts in (train, test)]
    model = NGrams(documents[0], len(alphabet.characters) + len(end), order)
    return [round(float(-each.mean()), 4) for each in model.log2_probabilities(documents[1])]


def molecules(data, order, count, seed):
    """What of `count` samples without smoothing are molecules, new ones, ..."""
    train = read_texts(data, "qm9_smiles", "train")
    alphabet = Alphabet(train)
    front = [alphabet.begin] * (order - 1)
    documents = [np.array([*front, *alphabet.encode(text), alphabet.end]) for text in train]
    model = NGrams(documents, len(alphabet.characters) + 2, order)
    samples = [alphabet.decode(each) for each in model.sample(alphabet.begin, alphabet.end, count, 60, seed)]
    return counts(samples, train)


ORDERS = {"tinyshakespeare": 7, "classics": 8, "classics_raw": 8, "qm9_smiles": 10}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the files")
    parser.add_argument("--samples", type=int, default=10_000, help="molecules (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/ngrams.json"))
    options = parser.parse_args()
    found = {"bits_per_character": {}, "molecules": {}}
    for name, order in ORDERS.items():
        found["bits_per_character"][name] = bits(options.data, name, order)
        print(name, *found["bits_per_character"][name], flush=True)
    for order in (3, 5, 7, 10):
        found["molecules"][order] = molecules(options.data, order, options.samples, options.seed)
        print(f"molecules, n = {order}:", found["molecules"][order], flush=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
