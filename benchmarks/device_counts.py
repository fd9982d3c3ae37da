"""How much a GPU is told to do beside the network: kernels, transfers to it, and waits of the host for it, counted on a
pretended one (`tests/helpers/pretended_cuda.py` says how).

    python benchmarks/device_counts.py

One line for each path: the losses, up to the network's call and in all, without the backward pass; a call of the
denoiser at one time; a step of a sampler; an evaluation of the ODE of likelihoods (in equal steps, its gradient
included) and of encodings (adaptive). The network costs nothing.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import torch
from noise_work import denoiser_call, loss, of_encoding, of_likelihood, per_evaluation, trajectory
from pretended_cuda import PretendedCuda

from score_sde import ScoreSDEScheduler
from score_sde.schedulers.paths import SDE_TYPES


def triple(counts):
    return " / ".join(f"{count:.3g}" for count in counts)


def row(cuda, sde_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="v_prediction")
    before, whole = loss(cuda, scheduler)
    yield triple(before)
    yield triple(whole.counts)
    yield triple(loss(cuda, scheduler, "importance", "likelihood")[1].counts)
    yield triple(loss(cuda, scheduler, "levels", kind="hybrid")[1].counts) if scheduler.path.levels else ""
    yield triple(denoiser_call(cuda, scheduler, torch.tensor(0.3, dtype=torch.float64)).counts)
    _, work = trajectory(cuda, scheduler)
    yield triple(count / len(scheduler.timesteps) for count in work.counts)
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="sample")
    for solve in (of_likelihood, of_encoding):
        yield triple(per_evaluation(cuda, scheduler, solve))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(
        "| kernels / transfers / waits | before the network | loss | importance-sampled likelihood | hybrid loss "
        "| denoiser | sampler step | likelihood's ODE | encoding's ODE |\n" + "|---" * 9 + "|"
    )
    with PretendedCuda() as cuda:
        for sde_type in SDE_TYPES:
            print(f"| {sde_type} |", " | ".join(row(cuda, sde_type)), "|", flush=True)


if __name__ == "__main__":
    main()
