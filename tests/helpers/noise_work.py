"""What a device is given to do by the noise mathematics alone, around networks that cost nothing: training, denoisers,
trajectories, ODEs. Run inside `PretendedCuda`; what is counted comes after a first run, which may keep tables there."""

from types import SimpleNamespace

import torch
from pretended_cuda import CUDA, generator

from score_sde.losses import Objective, hybrid_loss, sliced_score_matching
from score_sde.pipelines.adaptive import probability_flow
from score_sde.pipelines.likelihood import log_likelihood


def samples(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(CUDA)


def different_times(n=4):
    """Uniform numbers, one for each sample."""
    return (torch.arange(n, dtype=torch.float64) + 0.3) / n


class Echo:
    """A network that returns its input, with as many channels more where it learns a variance; `before` is what the
    device had been given to do at its last call, `calls` their number."""

    def __init__(self, work=None, channels=1):
        self.work, self.channels, self.before, self.calls = work, channels, (0, 0, 0), 0

    def __call__(self, x, timestep, **conditions):
        self.calls += 1
        if self.work is not None:
            self.before = self.work.counts
        return SimpleNamespace(sample=x if self.channels == 1 else x.repeat(1, 2, 1, 1))

    def output(self, x, timestep):
        return self(x, timestep).sample


def loss(cuda, scheduler, density="uniform", weighting="output", kind="denoising"):
    """(counts up to the network's call, the work of the whole loss) of a micro-step; kind: denoising, hybrid or
    sliced."""
    objective, x0, noise = Objective(scheduler, density, weighting), samples(4, 3, 8, 8), samples(4, 3, 8, 8, seed=1)
    for _ in range(2):
        with cuda.watched() as work:
            network, t = Echo(work, 2 if kind == "hybrid" else 1), objective.times(different_times())
            if kind == "hybrid":
                hybrid_loss(network, scheduler, x0, noise, t)
            elif kind == "sliced":
                sliced_score_matching(network, scheduler, x0, t, noise)
            else:
                objective(network, x0, noise, t)
    return network.before, work


def denoiser_call(cuda, scheduler, t):
    """The work of a denoiser at times t."""
    denoise, x = scheduler.denoiser(Echo().output), samples(4, 3, 8, 8)
    for _ in range(2):
        with cuda.watched() as work:
            denoise(x, t)
    return work


def steered_call(cuda, scheduler, steer, steps=4):
    """The work of a steered network at the second step of a planned trajectory."""
    scheduler.set_timesteps(steps, CUDA)
    network, x = scheduler.steered(Echo(channels=2).output, steer), samples(4, 3, 8, 8)
    for _ in range(2):
        with cuda.watched() as work:
            network(x, scheduler.timesteps[1].expand(len(x)))
    return work


def trajectory(cuda, scheduler, steps=10):
    """(the work of planning it, the work of all its steps)."""
    x, own = samples(4, 3, 8, 8), generator()
    with cuda.watched() as planning:
        scheduler.set_timesteps(steps, CUDA)
    with cuda.watched() as work:
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(x, timestep)
            x = scheduler.step(x, timestep, x, generator=own).prev_sample
    return planning, work


def of_likelihood(scheduler, x, network, steps):
    denoise, ends = scheduler.denoiser(network, limited=False), (scheduler.t_min, scheduler.t_max)
    log_likelihood(scheduler.path, denoise, x, *ends, 1.0, 1e-3, 1e-3, generator=generator(), steps=steps)


def of_encoding(scheduler, x, network, steps):
    """Adaptive; the more steps, the smaller the tolerance."""
    tolerance = 1e-2**steps
    denoise = scheduler.denoiser(lambda x, timesteps: 0.5 * network(x, timesteps), limited=False)
    probability_flow(scheduler.path, denoise, x, scheduler.t_min, scheduler.t_max, tolerance, tolerance)


def per_evaluation(cuda, scheduler, solve):
    """(kernels, transfers, waits) for each evaluation of an ODE: of more steps what fewer have not."""
    found = []
    for steps in (2, 1, 2):
        network, x = Echo(), samples(4, 1, 2, 2)
        with cuda.watched() as work:
            solve(scheduler, x, network.output, steps)
        found.append((*work.counts, network.calls))
    _, short, long = found
    *counts, calls = (more - less for more, less in zip(long, short, strict=True))
    return [count / calls for count in counts]
