"""Attention of a DiT in training on a CPU: torch's fused kernel beside `explicit_attention`, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/attention.py

A line for each dtype and shape (batch, tokens, heads, size of a head): milliseconds of processor time, medians of 7 in
turn.
"""

import statistics
import time

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from score_sde.models.transformer_score_dit import explicit_attention


SHAPES = ((64, 16, 4, 64), (64, 35, 4, 32), (64, 64, 4, 64), (16, 256, 6, 64), (8, 512, 6, 64), (4, 1024, 6, 64))
REPEATS = 7


def seconds(function, tokens):
    start = time.process_time()
    function(*tokens).backward(tokens[0].detach())
    return time.process_time() - start


def main():
    print("| dtype | batch, tokens, heads, size | fused, ms | explicit, ms | fused / explicit |\n|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            tokens = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            rounds = [
                [seconds(function, tokens) for function in (dispatch_attention_fn, explicit_attention)]
                for _ in range(REPEATS + 1)
            ]
            fused, explicit = (1e3 * statistics.median(each) for each in zip(*rounds[1:], strict=True))
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {', '.join(map(str, shape))} | {fused:.1f} | {explicit:.1f} | {fused / explicit:.2f} |")


if __name__ == "__main__":
    main()
