"""Samplers of tokens on sources whose conditionals are known exactly.

    python benchmarks/discrete_samplers.py --output benchmarks/discrete_samplers.json

Sequences of 32 tokens: from Markov chains, two random ones of 8 and 32 tokens, on which the samplers were
compared first, and the pairs of characters of the classics and of SMILES strings, on which they are shown; and from a
chain whose second half echoes its first, where what depends on each other lies far apart. A perfect network says
p(x0 | x_t) by forward and backward sums, so every error is the sampler's. For each sampler and number of evaluations:

pairs: total variation between the distribution of neighbouring tokens in the samples and the source's, all places
    together; beside it that of as many samples of the source itself, which is what counting alone costs.
excess: nats per token by which the samples are less likely, in the mean, than the source's entropy; below 0 they are
    too likely: the sampler prefers the usual.
evaluations: of the network, per sequence, where an evaluation is repeated only after a token has changed (absorbing).
"""

import argparse
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from datasets import load_dataset

from score_sde import DiscreteScoreScheduler


LENGTH = 32
STEPS = (2, 4, 8, 16, 32)
SAMPLERS = {
    "absorbing": {
        "ancestral": {"predictor": "ancestral"},
        "ancestral, remasking 0.2": {"predictor": "ancestral", "corrector": "remasking", "remasking_eta": 0.2},
        "first_hitting": {"predictor": "first_hitting"},
        "dilated": {"predictor": "dilated"},
        "dilated, cosine": {"predictor": "dilated", "timestep_spacing": "cosine"},
        "margin": {"predictor": "margin"},
        "confidence": {"predictor": "confidence"},
        "entropy_bounded": {"predictor": "entropy_bounded"},
    },
    "uniform": {
        "ancestral": {"predictor": "ancestral"},
        "ancestral, cosine": {"predictor": "ancestral", "timestep_spacing": "cosine"},
        "tau_leaping": {"predictor": "tau_leaping"},
        "confidence": {"predictor": "confidence"},
        "entropy_bounded": {"predictor": "entropy_bounded"},
        # half of the evaluations are the corrector's
        "ancestral, gibbs of 4": {"predictor": "ancestral", "corrector": "gibbs", "corrector_k": 4},
        "ancestral, gibbs of 4 by margin": {
            "predictor": "ancestral",
            "corrector": "gibbs",
            "corrector_k": 4,
            "corrector_selection": "lowest_log_margin",
        },
    },
}


class MarkovSource:
    """A stationary Markov chain: `transitions` (V, V), rows sum to 1; in float32."""

    def __init__(self, transitions):
        power = transitions = transitions.double() / transitions.double().sum(1, keepdim=True)
        for _ in range(12):
            power = power @ power
        self.transitions, self.first = transitions.float(), (power[0] / power[0].sum()).float()
        self.pairs = self.first[:, None] * self.transitions
        self.vocab_size = len(transitions)
        surprise = -torch.xlogy(self.pairs, self.transitions).sum()
        self.entropy = float(-torch.xlogy(self.first, self.first).sum() + (LENGTH - 1) * surprise) / LENGTH

    def sample(self, n, generator):
        tokens = [torch.multinomial(self.first, n, replacement=True, generator=generator)]
        for _ in range(LENGTH - 1):
            tokens.append(torch.multinomial(self.transitions[tokens[-1]], 1, generator=generator)[:, 0])
        return torch.stack(tokens, 1)

    def clean(self, path, x_t, t):
        """log p(x0 | x_t): (B, L, V)."""
        table = path.marginal(torch.arange(self.vocab_size)[:, None], t)[:, 0].float()  # (V, S)
        evidence = table.T[x_t]  # (B, L, V)
        joint = self.around(evidence) * evidence
        return (joint / joint.sum(-1, keepdim=True)).log()

    def around(self, evidence):
        """What the evidence (B, L, V) of all other places says of each, not normed."""
        forward, backward = [self.first.expand_as(evidence[:, 0])], [torch.ones_like(evidence[:, 0])]
        for place in range(1, evidence.shape[1]):
            step = (forward[-1] * evidence[:, place - 1]) @ self.transitions
            forward.append(step / step.sum(1, keepdim=True))
            step = (backward[-1] * evidence[:, -place]) @ self.transitions.T
            backward.append(step / step.sum(1, keepdim=True))
        return torch.stack(forward, 1) * torch.stack(backward[::-1], 1)

    def of_chain(self, tokens):
        """(total variation of pairs, -log p of each sequence)."""
        pairs = tokens[:, :-1] * self.vocab_size + tokens[:, 1:]
        found = torch.bincount(pairs.flatten(), minlength=self.vocab_size**2).float() / pairs.numel()
        nats = -self.first[tokens[:, 0]].log() - self.transitions[tokens[:, :-1], tokens[:, 1:]].log().sum(1)
        return float((found - self.pairs.flatten()).abs().sum()) / 2, nats

    def errors(self, tokens):
        """(total variation of pairs, nats per token above the entropy)."""
        pairs, nats = self.of_chain(tokens)
        return pairs, float(nats.mean()) / LENGTH - self.entropy


class EchoSource(MarkovSource):
    """A Markov chain of half the length, and each of its tokens again, half the length later, with the chance `kept`;
    otherwise another one, by the chain's frequencies. What depends on each other lies far apart."""

    def __init__(self, transitions, kept=0.9):
        super().__init__(transitions)
        self.echo = kept * torch.eye(self.vocab_size) + (1 - kept) * self.first
        surprise = -torch.xlogy(self.pairs, self.transitions).sum() * (LENGTH // 2 - 1)
        surprise += -torch.xlogy(self.first, self.first).sum()
        surprise += -torch.xlogy(self.first[:, None] * self.echo, self.echo).sum() * (LENGTH // 2)
        self.entropy = float(surprise) / LENGTH

    def sample(self, n, generator):
        first = super().sample(n, generator)[:, : LENGTH // 2]
        second = torch.multinomial(self.echo[first.flatten()], 1, generator=generator).reshape(first.shape)
        return torch.cat([first, second], 1)

    def clean(self, path, x_t, t):
        table = path.marginal(torch.arange(self.vocab_size)[:, None], t)[:, 0].float()
        first, second = table.T[x_t].split(LENGTH // 2, dim=1)
        of_echo = second @ self.echo.T  # what the second half says of the first
        around = self.around(first * of_echo)
        joint = torch.cat([around * first * of_echo, ((around * first) @ self.echo) * second], 1)
        return (joint / joint.sum(-1, keepdim=True)).log()

    def errors(self, tokens):
        first, second = tokens.split(LENGTH // 2, dim=1)
        pairs, excess = self.of_chain(first)
        nats = excess - self.echo[first, second].log().sum(1)
        return pairs, float(nats.mean()) / LENGTH - self.entropy


def of_text(text):
    """The chain of the pairs of characters in a text; every pair has at least a thousandth of a count in a row."""
    characters = {each: index for index, each in enumerate(sorted(set(text)))}
    ids = torch.tensor([characters[each] for each in text])
    counts = torch.bincount(ids[:-1] * len(characters) + ids[1:], minlength=len(characters) ** 2).double()
    counts = counts.reshape(len(characters), -1) + 0.05
    return MarkovSource(counts / counts.sum(1, keepdim=True))


def random_source(vocab_size, sharpness, seed):
    """Rows of a Dirichlet distribution, the sharper the less random."""
    torch.manual_seed(seed)
    alpha = torch.full((vocab_size,), 1 / sharpness)
    rows = torch.distributions.Dirichlet(alpha).sample((vocab_size,)) + 1e-4
    return MarkovSource(rows / rows.sum(1, keepdim=True))


def sources(data):
    """{name: (source, whether the rules were chosen on it)}"""

    def column(name):
        rows = load_dataset("parquet", data_files=f"{data}/{name}_train.parquet", split="train[:2000]")
        [text] = [key for key in rows.column_names if key in ("text", "smiles")]
        return "\n".join(rows[text])[:400_000]

    return {
        "random, 8 tokens": (random_source(8, 1.5, 0), True),
        "random, 32 tokens": (random_source(32, 16.0, 2), True),
        "echoes, 16 tokens": (EchoSource(random_source(16, 4.0, 3).transitions), False),
        "classics": (of_text(column("classics")), False),
        "SMILES": (of_text(column("qm9_smiles")), False),
    }


def run(source, process, options, evaluations, samples, seed):
    """(samples, mean evaluations of a sequence) with at most so many evaluations."""
    corrected = options.get("corrector") == "gibbs"
    scheduler = DiscreteScoreScheduler(source.vocab_size, process, **options)
    generator = torch.Generator().manual_seed(seed)
    x = scheduler.init_noise((samples, LENGTH), generator)
    scheduler.set_timesteps((evaluations + 1) // 2 if corrected else evaluations)
    used, stale = torch.zeros(samples), torch.ones(samples, dtype=torch.bool)
    for t in scheduler.timesteps:
        log_p0 = source.clean(scheduler.path, x, scheduler.path_time(t).clamp(0, 1))
        used += stale if process == "absorbing" else 1
        out = scheduler.step(log_p0, t, x, generator=generator)
        x, stale = out.prev_sample, out.changed
        if process == "absorbing" and not (x == scheduler.mask_token_id).any():
            break
    return x, float(used.mean())


def in_short(row):
    return f"{row['pairs']:.3f}{row['excess']:+.2f}"


def measure(arguments, name):
    """The table of one source."""
    torch.set_num_threads(1)
    source, chosen = sources(arguments.data)[name]
    own, _ = source.errors(source.sample(arguments.samples, torch.Generator().manual_seed(1)))
    table = {"chosen_on": chosen, "tokens": source.vocab_size, "entropy": source.entropy, "pairs_of_source": own}
    for process, samplers in SAMPLERS.items():
        for sampler, options in samplers.items():
            rows = {}
            for evaluations in STEPS:
                x, used = run(source, process, options, evaluations, arguments.samples, 0)
                pairs, excess = source.errors(x)
                rows[evaluations] = {"pairs": pairs, "excess": excess, "evaluations": used}
            table[f"{process}: {sampler}"] = rows
            print(f"{name:26} {process:10} {sampler:32}", *map(in_short, rows.values()), flush=True)
    return table


def picture(results, file):
    """Excess against evaluations, for the sources that were not compared first."""
    shown = [name for name, table in results.items() if not table["chosen_on"]]
    figure, rows = plt.subplots(2, len(shown), figsize=(4 * len(shown), 6.5), sharex=True, sharey=True)
    for process, axes in zip(SAMPLERS, rows, strict=True):
        for name, axis in zip(shown, axes, strict=True):
            for sampler in SAMPLERS[process]:
                row = results[name][f"{process}: {sampler}"]
                axis.plot(list(map(int, row)), [each["excess"] for each in row.values()], marker=".", label=sampler)
            axis.set(title=f"{name}, {process}", xscale="log")
            axis.set_yscale("symlog", linthresh=0.05)
            axis.set_xticks(STEPS, STEPS)
            axis.minorticks_off()
            axis.axhline(0, color="black", linewidth=0.5)
        axes[0].set_ylabel("nats per token above the entropy")
        axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in rows[-1]:
        axis.set_xlabel("evaluations")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def markdown(results):
    """The tables of benchmarks/README.md: pairs and excess, for the sources that were not compared first."""
    lines = []
    for name, table in results.items():
        if table["chosen_on"]:
            continue
        lines += [""] if lines else []
        lines += [
            f"| {name} (its own samples: {table['pairs_of_source']:.3f}) | {' | '.join(map(str, STEPS))} |",
            f"|---|{'---|' * len(STEPS)}",
        ]
        for process in SAMPLERS:
            for sampler in SAMPLERS[process]:
                cells = (f"{row['pairs']:.3f}, {row['excess']:+.2f}" for row in table[f"{process}: {sampler}"].values())
                lines.append(f"| {process}: {sampler} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--data", default="/work/shared/data")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    start, names = time.time(), list(sources(arguments.data))
    with ProcessPoolExecutor(arguments.workers) as executor:
        tables = executor.map(partial(measure, arguments), names)
        results = dict(zip(names, tables, strict=True))
    facts = {"samples": arguments.samples, "length": LENGTH, "seconds": round(time.time() - start)}
    facts |= {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
    Path(arguments.output).write_text(json.dumps({"facts": facts, "sources": results}, indent=1) + "\n")
    results = json.loads(Path(arguments.output).read_text())["sources"]
    picture(results, Path(arguments.output).with_suffix(".png"))
    print(markdown(results))


if __name__ == "__main__":
    main()
