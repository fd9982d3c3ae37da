"""The floor that the benchmarks of token diffusion are read against: n-grams by counting."""

import numpy as np
from ngrams import Alphabet, NGrams


def test_probabilities_are_those_of_witten_and_bell():
    alphabet = Alphabet(["abab", "ac"])
    assert alphabet.characters == ["a", "b", "c"]
    documents = [alphabet.encode(text) for text in ("abab", "ac")]
    model = NGrams(documents, 3, 2)
    first, second = (2**each for each in model.log2_probabilities([alphabet.encode("abca")]))
    # six letters, of three kinds: 3 a, 2 b, 1 c
    one = {letter: (count + 3 / 3) / (6 + 3) for letter, count in {"a": 3, "b": 2, "c": 1}.items()}
    np.testing.assert_allclose(first, [one[letter] for letter in "abca"])
    # after a: b twice, c once, two kinds; after b: a once, one kind; nothing ever came after c
    expected = [one["a"], (2 + 2 * one["b"]) / (3 + 2), (0 + 1 * one["c"]) / (1 + 1), one["a"]]
    np.testing.assert_allclose(second, expected)


def test_the_probabilities_of_all_symbols_add_up_to_1():
    rng = np.random.default_rng(0)
    model = NGrams([rng.integers(0, 4, 50) for _ in range(5)], 4, 3)
    for context in ([0, 1], [3, 3], [2]):
        documents = [np.array([*context, symbol]) for symbol in range(4)]
        for probabilities in model.log2_probabilities(documents):
            assert abs((2 ** probabilities.reshape(4, -1)[:, -1]).sum() - 1) < 1e-12


def test_samples_follow_the_counts():
    """Of a model without memory limits, the documents in their shares."""
    begin, end = 3, 2
    documents = [np.array([begin, begin, *text, end]) for text in ([0, 1], [0, 1], [0, 1], [1], [0, 0])]
    samples = NGrams(documents, 4, 3).sample(begin, end, count=20_000, longest=6, seed=0)
    shares = {text: np.mean([tuple(each) == text for each in samples]) for text in ((0, 1), (1,), (0, 0))}
    # 3 standard errors
    assert all(abs(shares[text] - share) < 0.011 for text, share in {(0, 1): 0.6, (1,): 0.2, (0, 0): 0.2}.items())
