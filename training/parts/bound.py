"""The bound on the likelihood of texts: nats of sequences, as bits per token and per character with standard errors."""

import math

import torch

from .rounds import gathered, real_batches
from .validation import RowDraws


def measure_bound(losses, dataset, count, config, accelerator, seed=0, draws=1, what=None):
    """What a network's bound on the likelihood of the first sequences of a `TokenDataset` is.

    Args:
        losses: f(batch, draws) -> nats per token, the mean of each sequence (B,), one drawn time each.
        count: how many sequences, at most.
        draws: times that are drawn for each sequence.
        what: of a progress bar; None for none.

    Returns:
        {"nats_per_token", "bits_per_token", "bits_per_character", "of each their standard error" over sequences and
        times, "n"}. A sequence's nats are all of its tokens', also of end marks that fill it up; its tokens are those
        that count, up to the first end mark.
    """
    count, nats, tokens, characters = min(count, len(dataset)), [], [], []
    rows = torch.utils.data.Subset(dataset, range(count))
    for own, batch, size in real_batches(rows, count, config, accelerator, what):
        total = torch.zeros(len(own), dtype=torch.float64)
        for turn in range(draws):
            row_draws = RowDraws(seed, [turn * count + i for i in own], draws * count, accelerator.device)
            with torch.no_grad():
                total += losses(batch, row_draws).double().cpu() / draws
        nats.append(gathered(total.float() * dataset.length, size, accelerator))
        tokens.append(gathered(dataset.counted(batch["tokens"]), size, accelerator))
        characters.append(gathered(dataset.characters_of(batch["tokens"]), size, accelerator))
    nats, tokens, characters = (torch.cat(each).double() for each in (nats, tokens, characters))
    found = {"n": count, "tokens": int(tokens.sum()), "split": dataset.texts.split}
    for name, value, unit in (
        ("nats_per_token", nats, tokens),
        ("bits_per_token", nats / math.log(2), tokens),
        ("bits_per_character", nats / math.log(2), characters),
    ):
        found[name], found[f"{name}_error"] = ratio(value, unit)
    return found


def ratio(values, units):
    """(sum of the values / sum of the units, its standard error over rows)."""
    mean, count = float(values.sum() / units.sum()), len(values)
    error = (values - mean * units).square().sum().sqrt() / units.sum() * math.sqrt(count / max(count - 1, 1))
    return mean, float(error)


def bound_metrics(found, shared):
    """The measurements of a bundle of what `measure_bound` found, with what they share."""
    metrics = []
    for name, unit in (("bits_per_token", "bits/token"), ("bits_per_character", "bits/character")):
        value, error = found[name], found[f"{name}_error"]
        metrics.append(
            {
                "name": f"negative log-likelihood, at most, {unit}",
                "value": round(value, 4),
                "standard_error": round(error, 4),
                "n": found["n"],
                "split": found["split"],
                "type": name,
                "explanation": f"bound on the likelihood of {found['n']:,} sequences of {found['tokens']:,} tokens, "
                f"standard error {error:.4f} over sequences and times.",
            }
            | shared
        )
    return metrics
