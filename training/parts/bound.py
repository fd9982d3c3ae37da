"""The bound on the likelihood of texts: nats of sequences, as bits per token and per character with standard errors."""

import math

import torch

from .rounds import gathered, real_batches
from .validation import RowDraws


def nats(scheduler, network, batch, draws, told=None):
    """A bound on -log p of each sequence of a batch, estimated at one time: nats (B,), float64; `told`(batch) are the
    conditions that the network is told, {keyword of its forward: tensor (B, ...)}, None for none."""
    tokens, conditions = batch["tokens"], {} if told is None else told(batch)

    def output(x_t, timesteps):
        return network(x_t, timesteps, **conditions).sample.float()

    return scheduler.likelihood_bound(output, tokens, draws.stratified(), draws.generators)


@torch.no_grad()
def measure_bound(bound, dataset, count, config, accelerator, seed, draws=1, what=None):
    """The bound on the likelihood of the first sequences of a `TokenDataset`.

    Args:
        bound: f(batch, draws) -> nats of each sequence (B,), estimated at one drawn time.
        count: how many sequences, at most.
        draws: times that are drawn for each sequence.
        what: of a progress bar; None for none.

    Returns:
        {"nats_per_token", "bits_per_token", "bits_per_character", with "_error" behind each name its standard error
        over sequences and times, "n", "tokens", "split"}. A sequence's nats are those of all of its tokens, also of end
        marks that fill it up; its tokens are those that count, up to the first end mark with it.
    """
    count, total, tokens, characters = min(count, len(dataset)), [], [], []
    for own, batch, size in real_batches(dataset, count, config, accelerator, what):
        turns = [
            bound(batch, RowDraws(seed, [turn * count + i for i in own], draws * count, accelerator.device))
            for turn in range(draws)
        ]
        total.append(gathered(torch.stack(turns).mean(0).float(), size, accelerator))
        tokens.append(gathered(dataset.counted(batch["tokens"]), size, accelerator))
        characters.append(gathered(dataset.characters_of(batch["tokens"]), size, accelerator))
    total, tokens, characters = (torch.cat(each).double() for each in (total, tokens, characters))
    found = {"n": count, "tokens": int(tokens.sum()), "split": dataset.texts.split}
    for name, value, unit in (
        ("nats_per_token", total, tokens),
        ("bits_per_token", total / math.log(2), tokens),
        ("bits_per_character", total / math.log(2), characters),
    ):
        found[name], found[f"{name}_error"] = ratio(value, unit)
    return found


def ratio(values, units):
    """(sum of the values / sum of the units, its standard error over rows)."""
    mean, count = float(values.sum() / units.sum()), len(values)
    error = (values - mean * units).square().sum().sqrt() / units.sum() * math.sqrt(count / max(count - 1, 1))
    return mean, float(error)


def bound_metrics(found, shared, by_class):
    """The measurements of a bundle of what `measure_bound` found, with what they share; `by_class`: whether the bound
    is given the class of each sequence."""
    metrics, given = [], " given the class" if by_class else ""
    for name, unit in (("bits_per_token", "bits/token"), ("bits_per_character", "bits/character")):
        value, error = found[name], found[f"{name}_error"]
        metrics.append(
            {
                "name": f"negative log-likelihood{given}, at most, {unit}",
                "value": round(value, 4),
                "standard_error": round(error, 4),
                "n": found["n"],
                "split": found["split"],
                "type": name,
                "explanation": f"bound on the likelihood of {found['n']:,} sequences of {found['tokens']:,} "
                f"tokens{given}, standard error {error:.4f} over sequences and times.",
            }
            | shared
        )
    return metrics
