"""Networks that are the exact map of the probability-flow ODE, of any path and prediction."""

import torch
from exact import GaussianMixture

from score_sde.schedulers.paths import expand_to


# in one dimension
TWO_PEAKS = GaussianMixture([0.6, 0.4], [[-1.0], [0.7]], [[0.04], [0.2]])


def distribution(mixture, path, x, t):
    """The distribution function of x_t, of a mixture in one dimension, at x (B, 1), t (B, 1)."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    stds = (alpha**2 * mixture.variances.T + sigma**2).sqrt()  # (B, K)
    shares = torch.special.ndtr((x - alpha * mixture.means.T) / stds)
    return (mixture.weights * shares).sum(1, keepdim=True)


def quantile(mixture, path, share, t):
    """The inverse of `distribution`, by bisection."""
    low, high = torch.full_like(share, -500.0), torch.full_like(share, 500.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = distribution(mixture, path, middle, t) < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def quantile_flow(mixture):
    """The map x_t -> x_s of a mixture in one dimension: what grows with x and turns one distribution into the other."""

    def flow(x, path, t, s):
        # one time for all
        return quantile(mixture, path, distribution(mixture, path, x, t[:1]), s[:1])

    return flow


def map_network(scheduler, flow, denoised, end=None):
    """f(input, timestep, timestep_to=None) -> output of the network whose map is `flow(x, path, t, s)`, t and s (B, 1),
    to the time that it is told, or to `end`; told its own time, or none, its denoised sample is `denoised(x, path, t)`
    for one t of all."""
    path = scheduler.path

    def network(scaled, timestep, timestep_to=None):
        t = scheduler.path_time(timestep)
        row = scheduler.parameterization.row(t)
        x = scaled / expand_to(row.input_scale, scaled)
        s = t if timestep_to is None else scheduler.path_time(timestep_to)
        s = s if end is None else torch.full_like(t, end)
        if torch.equal(s, t):
            mapped = denoised(x, path, t[0])
        else:
            # of a straight line through x_t and x_s
            of_x, of_x0, _ = path.posterior(t, s, 0.0)
            end_of_map = flow(x, path, t.reshape(-1, 1), s.reshape(-1, 1))
            mapped = (end_of_map - expand_to(of_x, x) * x) / expand_to(of_x0, x)
        return (mapped - expand_to(row.a, x) * x) / expand_to(row.b, x)

    return network
