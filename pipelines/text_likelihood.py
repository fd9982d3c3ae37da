"""Bounds on the likelihood of texts under a model of tokens."""

import math
from dataclasses import dataclass

import torch

from .texts import encode_texts, end_ids, filled_up
from .wording import check_count, quoted


@dataclass
class TextLikelihood:
    """Upper bounds on -log p of T texts, estimated without bias.

    nats: the bound of each text, (T,), float64.
    error: the standard error of each, (T,); nan for a single sample.
    tokens, characters: how many each text has, (T,): the end mark is a token, what fills up behind it is none.
    nfe: number of network evaluations, of a batch each.
    """

    nats: torch.Tensor
    error: torch.Tensor
    tokens: torch.Tensor
    characters: torch.Tensor
    nfe: int

    def bits_per_token(self) -> float:
        """Of all texts together, at most so many bits on average; each text's own are nats / tokens / log(2)."""
        return float(self.nats.sum() / self.tokens.sum()) / math.log(2)

    def bits_per_character(self) -> float:
        """Of all texts together, at most so many bits on average."""
        return float(self.nats.sum() / self.characters.sum()) / math.log(2)

    def bits_per_token_error(self) -> float:
        """Standard error of `bits_per_token`, by the draws of times and noise; that of the choice of texts is none of
        it."""
        return float(self.error.norm() / self.tokens.sum()) / math.log(2)

    def bits_per_character_error(self) -> float:
        """Standard error of `bits_per_character`, as of `bits_per_token_error`."""
        return float(self.error.norm() / self.characters.sum()) / math.log(2)


@dataclass
class Window:
    """A sequence of at most as many tokens as the model's, of which those that are `given` were counted before.

    text: the number of the text that it is of.
    """

    text: int
    tokens: torch.Tensor
    given: torch.Tensor


def windows_of(number, ids, length, filled, tokenizer):
    """A text's token ids as `Window`s: one; of one that is longer than the model's length one after the other, of which
    the last is as long as the others and sees again what was counted before, so that their bounds add up to that of the
    text. With `filled` as training fills up texts of their own: the end mark, and then what fills up.

    Raises ValueError for a text without tokens, and for one that is longer and to be filled up.
    """
    if not ids:
        raise ValueError(f"text {number} is empty: leave it out")
    if filled:
        if len(ids) > length:
            raise ValueError(
                f"text {number} has {len(ids)} tokens, more than the model's {length}, into which a whole text must "
                f"fit: shorten it, or pass filled=False to count it in parts"
            )
        if tokenizer.eos_token_id is None and len(ids) < length:
            raise ValueError("filled=True needs an end mark, and this tokenizer has none (no eos_token)")
        ids = filled_up(ids, length, tokenizer)
    tokens, windows = torch.tensor(ids), []
    for begin in range(0, len(ids), length):
        first = max(0, min(begin, len(ids) - length))
        part = tokens[first : first + length]
        windows.append(Window(number, part, torch.arange(len(part)) < begin - first))
    return windows


def counted_tokens(ids, length, filled, tokenizer):
    """How many tokens a text has: its own, with an end mark, but not what fills up behind one; and an end mark where it
    is to be filled up, has none and there is room for one."""
    (end, pad), count = end_ids(tokenizer), len(ids)
    while count > 1 and ids[count - 1] == pad and ids[count - 2] in (end, pad):
        count -= 1
    return min(count + 1, length) if filled and ids[count - 1] != end else count


def bound_of_windows(bound, windows, num_samples, batch_size, generator):
    """(mean (W,), variance of the mean (W,), number of batches): the bounds in nats of windows.

    Each is estimated at one time in each of `num_samples` equal parts of the interval. The variance is that of
    neighbours' differences, which those between the parts' means only add to; nan for one sample.

    Args:
        bound: f(tokens (B, L), given (B, L), uniform numbers (B,), generators: list of B, windows' numbers (B,)) ->
            nats (B,).
        generator: of all draws, None for torch's. A window's draws depend on it and on the window's number, not on the
            others of its batch.
    """
    seeds = torch.randint(
        2**62, (len(windows), num_samples), generator=generator, device=getattr(generator, "device", "cpu")
    )
    rows = []
    for number, of_window in enumerate(seeds.tolist()):
        for sample, seed in enumerate(of_window):
            own = torch.Generator().manual_seed(seed)
            place = (sample + torch.rand((), generator=own, dtype=torch.float64)) / num_samples
            rows.append((number, sample, place, own))
    # of one length in each batch
    rows.sort(key=lambda row: len(windows[row[0]].tokens))
    nats, batches = torch.zeros(len(windows), num_samples, dtype=torch.float64), 0
    while rows:
        length = len(windows[rows[0][0]].tokens)
        batch = [row for row in rows[:batch_size] if len(windows[row[0]].tokens) == length]
        rows, batches = rows[len(batch) :], batches + 1
        numbers, samples, places, generators = zip(*batch, strict=True)
        found = bound(
            torch.stack([windows[number].tokens for number in numbers]),
            torch.stack([windows[number].given for number in numbers]),
            torch.stack(places),
            list(generators),
            torch.tensor(numbers),
        )
        nats[list(numbers), list(samples)] = found.double().cpu()
    if num_samples == 1:
        return nats[:, 0], torch.full((len(windows),), math.nan, dtype=torch.float64), batches
    variance = nats.diff(dim=1).pow(2).sum(1) / (2 * (num_samples - 1) * num_samples)
    return nats.mean(1), variance, batches


def text_likelihood(bound, tokenizer, texts, token_ids, length, filled, num_samples, batch_size, generator):
    """`TextLikelihood` of texts, or of sequences of token ids (T, L), with `bound` as `bound_of_windows` takes it, but
    for numbers of texts.

    Raises ValueError for texts that are empty, no texts, or of characters that the tokenizer lacks, for numbers that
    are not whole or below 1, and for what is no generator.
    """
    check_count("num_samples", num_samples)
    check_count("batch_size", batch_size)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator {quoted(generator)} must be one torch.Generator, of all draws")
    if token_ids is not None:
        ids = token_ids.tolist()
        texts = [tokenizer.decode(each, skip_special_tokens=True, clean_up_tokenization_spaces=False) for each in ids]
    else:
        ids = encode_texts(tokenizer, texts)
    windows = [each for number, one in enumerate(ids) for each in windows_of(number, one, length, filled, tokenizer)]
    of_text = torch.tensor([window.text for window in windows])

    def of_windows(tokens, given, u, generators, numbers):
        return bound(tokens, given, u, generators, of_text[numbers])

    nats, variance, batches = bound_of_windows(of_windows, windows, num_samples, batch_size, generator)
    total, uncertainty = (torch.zeros(len(ids), dtype=torch.float64).index_add(0, of_text, x) for x in (nats, variance))
    return TextLikelihood(
        nats=total,
        error=uncertainty.sqrt(),
        tokens=torch.tensor([counted_tokens(one, length, filled, tokenizer) for one in ids]),
        characters=torch.tensor([len(text) for text in texts]),
        nfe=batches,
    )
