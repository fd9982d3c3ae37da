"""What the losses of tokens take on a CPU, the network aside: the bound beside denoising score entropy, which for a
network that predicts tokens is the same number; forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/token_losses.py

A line for each process and vocabulary, 16 sequences of 128 tokens in float32: milliseconds of processor time, medians
of 7 in turn.
"""

import statistics
import time
from types import SimpleNamespace

import torch

from score_sde import DiscreteScoreScheduler
from score_sde.losses import DiscreteObjective


PREDICTIONS = {"absorbing": "sample", "uniform": "leave_one_out"}
VOCABULARIES = (65, 4096, 32768)
BATCH, LENGTH, REPEATS = 16, 128, 7


def seconds(objective, logits, *drawn):
    start = time.process_time()
    objective(lambda *_: SimpleNamespace(sample=logits), *drawn).mean().backward()
    return time.process_time() - start


def main():
    print("| process | vocabulary | bound, ms | score entropy, ms | score entropy / bound |\n|---|---|---|---|---|")
    for process, prediction_type in PREDICTIONS.items():
        for vocab_size in VOCABULARIES:
            scheduler = DiscreteScoreScheduler(vocab_size, process=process, prediction_type=prediction_type)
            objectives = [DiscreteObjective(scheduler, loss) for loss in ("elbo", "score_entropy")]
            logits = torch.randn(BATCH, LENGTH, vocab_size, requires_grad=True)
            tokens = torch.randint(vocab_size, (BATCH, LENGTH))
            drawn = tokens, torch.rand(BATCH, dtype=torch.float64), torch.rand(BATCH, LENGTH, dtype=torch.float64)
            rounds = [[seconds(each, logits, *drawn) for each in objectives] for _ in range(REPEATS + 1)]
            bound, entropy = (1e3 * statistics.median(each) for each in zip(*rounds[1:], strict=True))
            print(f"| {process} | {vocab_size:,} | {bound:.1f} | {entropy:.1f} | {entropy / bound:.2f} |")


if __name__ == "__main__":
    main()
