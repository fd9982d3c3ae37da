"""How much a GPU is told to do beside the network, counted on a pretended one: kernels, transfers and waits of the host.

    python benchmarks/device_counts.py

One line for each path: a micro-step of training up to the network's call and in all (without the backward pass), by
objective; a call of the denoiser; a step of a sampler; an evaluation of the probability-flow ODE. The network returns
its input, or that twice where it has a learned variance: none of its work is counted. `tests/helpers/pretended_cuda.py`
says what counts.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace


sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import torch
from pretended_cuda import CUDA, PretendedCuda, Work, generator

from score_sde import ScoreSDEScheduler
from score_sde.losses import Objective, hybrid_loss
from score_sde.pipelines.adaptive import reverse_sde
from score_sde.pipelines.likelihood import log_likelihood
from score_sde.schedulers.paths import SDE_TYPES


def samples(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(CUDA)


class Echo:
    """A network that returns its input, and remembers what had been done before its last call."""

    def __init__(self, work=None, channels=1):
        self.work, self.before, self.channels, self.calls = work, (0, 0, 0), channels, 0

    def __call__(self, x, timestep, **conditions):
        self.calls += 1
        if self.work is not None:
            self.before = self.work.counts
        return SimpleNamespace(sample=x if self.channels == 1 else torch.cat([x, x], dim=1))


def training_step(cuda, scheduler, density="uniform", weighting="output", hybrid=False):
    """(counts up to the network's call, counts of the whole loss) of the second micro-step."""
    objective, u = Objective(scheduler, density, weighting), (torch.arange(4, dtype=torch.float64) + 0.3) / 4
    x0, noise = samples(4, 3, 8, 8), samples(4, 3, 8, 8)
    for _ in range(2):
        with cuda.watched() as work:
            network = Echo(work, 2 if hybrid else 1)
            t = objective.times(u)
            if hybrid:
                hybrid_loss(network, scheduler, x0, noise, t)
            else:
                objective(network, x0, noise, t)
    return network.before, work


def denoiser_call(cuda, scheduler, t):
    """The work of the second call of a denoiser at time t."""
    denoise, x = scheduler.denoiser(lambda x, timestep: x), samples(4, 3, 8, 8)
    for _ in range(2):
        with cuda.watched() as work:
            denoise(x, t)
    return work


def sampler(cuda, scheduler, steps=10):
    """(the work of set_timesteps, that of all steps) of a trajectory, and the number of steps."""
    x, own = samples(4, 3, 8, 8), generator()
    with cuda.watched() as planning:
        scheduler.set_timesteps(steps, CUDA)
    with cuda.watched() as work:
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(x, timestep)
            x = scheduler.step(x, timestep, x, generator=own).prev_sample
    return planning, work, len(scheduler.timesteps)


def per_call(cuda, solve):
    """The counts of what f(network) does for each call of the network: the difference of two runs of its lengths."""
    found = []
    for length in (2, 3):
        with cuda.watched() as work:
            network = Echo()
            solve(lambda x, timestep: network(x, timestep).sample, length)
        found.append((*work.counts, network.calls))
    *counts, calls = (after - before for before, after in zip(*found, strict=True))
    return [count / calls for count in counts]


def likelihood(scheduler):
    def solve(network, steps):
        denoise = scheduler.denoiser(network, limited=False)
        ends = scheduler.t_min, scheduler.t_max
        log_likelihood(
            scheduler.path, denoise, samples(4, 1, 2, 2), *ends, 1.0, 1e-3, 1e-3, steps=steps, generator=generator()
        )

    return solve


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(
        "| path | before the network: plain | likelihood, importance | log-normal, edm | hybrid | denoiser call |"
        " ODE evaluation | sampler step |\n" + "|---" * 8 + "|"
    )
    for sde_type in SDE_TYPES:
        with PretendedCuda() as cuda:
            scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="v_prediction")
            cells = []
            for density, weighting in (("uniform", "output"), ("importance", "likelihood"), ("log_normal", "edm")):
                before, work = training_step(cuda, scheduler, density, weighting)
                cells.append(f"{before} of {work.counts}")
            if sde_type == "discrete_vp":
                before, work = training_step(cuda, scheduler, "levels", hybrid=True)
                cells.append(f"{before} of {work.counts}")
            else:
                cells.append("")
            cells.append(denoiser_call(cuda, scheduler, torch.tensor(0.3)).counts)
            cells.append(per_call(cuda, likelihood(scheduler)))
            planning, work, n = sampler(cuda, scheduler)
            cells.append(f"{planning.counts}, {[c / n for c in work.counts]}")
        print("|", " | ".join([sde_type, *map(str, cells)]), "|", flush=True)


if __name__ == "__main__":
    main()
