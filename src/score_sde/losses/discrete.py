"""Objectives for noise on tokens: the evidence bound by the clean tokens' distribution or by the concrete score."""

import torch

from ..schedulers.checks import check_choice
from ..schedulers.paths import as_time, expand_to
from .denoising import inverse_uniform, uniform_times


# --- densities over times -----------------------------------------------------------------------------------------


def alpha_times(scheduler, u):
    """alpha uniform: as many tokens are noised at one time as at another."""
    first, last = scheduler.path.alpha(scheduler.t_min), scheduler.path.alpha(scheduler.t_max)
    return scheduler.path.t_from_alpha(first + (last - first) * u).clamp(scheduler.t_min, scheduler.t_max)


def inverse_alpha(scheduler, t):
    path = scheduler.path
    return (path.alpha(scheduler.t_min) - path.alpha(scheduler.t_max)) / path.fall(t)


def importance_times(scheduler, u):
    """log(1 - alpha) uniform: with absorbing noise every masked token has the same weight."""
    first, last = scheduler.path.log_noised(scheduler.t_min), scheduler.path.log_noised(scheduler.t_max)
    t = scheduler.path.t_from_alpha(-torch.expm1(first + (last - first) * u))
    return t.clamp(scheduler.t_min, scheduler.t_max)


def inverse_importance(scheduler, t):
    path = scheduler.path
    span = path.log_noised(scheduler.t_max) - path.log_noised(scheduler.t_min)
    return span * path.log_noised(t).exp() / path.fall(t)


# each maps uniform numbers in (0, 1), float64, to times
DISCRETE_TIME_DENSITIES = {"uniform": uniform_times, "alpha": alpha_times, "importance": importance_times}
DISCRETE_INVERSE_DENSITIES = {"uniform": inverse_uniform, "alpha": inverse_alpha, "importance": inverse_importance}


# --- objectives ---------------------------------------------------------------------------------------------------


def elbo(scheduler, output, tokens, x_t, t):
    """The bound by log p(x0 | x_t), whatever the network predicts."""
    return scheduler.path.elbo_rate(scheduler.clean_log_probs(output, x_t, t), tokens, x_t, t)


def score_entropy(scheduler, output, tokens, x_t, t):
    """Denoising score entropy of the network's ratios, which need not be of any distribution."""
    log_score = output
    if scheduler.config.prediction_type != "score":
        log_score = scheduler.path.score(scheduler.clean_log_probs(output, x_t, t), x_t, t)
    return scheduler.path.score_entropy_rate(log_score, tokens, x_t, t)


# each returns nats per unit of t, (B, L)
DISCRETE_LOSSES = {"elbo": elbo, "score_entropy": score_entropy}


class DiscreteObjective:
    """A density over times and a form of the bound, for the scheduler that will sample.

    Args:
        scheduler: a `DiscreteScoreScheduler`; it owns the path and what the network's output means.
        loss: elbo, the bound by the clean tokens' distribution (Sahoo et al. 2024; Schiff et al. 2025), or
            score_entropy, by the concrete score (Lou et al. 2024): the same for a network that predicts tokens.
        time_density: uniform; alpha, in which the survival is uniform; or importance, in which log(1 - alpha) is.

    Raises ValueError for unknown names.
    """

    def __init__(self, scheduler, loss="elbo", time_density="uniform"):
        check_choice("loss", loss, DISCRETE_LOSSES)
        check_choice("time_density", time_density, DISCRETE_TIME_DENSITIES)
        self.scheduler, self.loss, self.time_density = scheduler, loss, time_density

    def times(self, u):
        """Times (B,) from uniform numbers in (0, 1), float64 (B,)."""
        return DISCRETE_TIME_DENSITIES[self.time_density](self.scheduler, u)

    def weight(self, t):
        """1 / p(t): makes the expected loss the integral over t, whatever the density of times."""
        return as_time(DISCRETE_INVERSE_DENSITIES[self.time_density](self.scheduler, t))

    def __call__(self, network, tokens, t, uniforms, conditions=None, mask=None):
        """What the tokens add to the bound between t_min and t_max, estimated at one time: nats per token that counts,
        (B,); its expectation over t is that part of the bound. `likelihood_bound` has its ends, too.

        Args:
            network: called as network(tokens, timestep, **conditions).sample -> (B, L, V).
            tokens: clean (B, L), int64. t: path times (B,), best on the CPU, in float64.
            uniforms: (B, L) in [0, 1), float64: the draws of the noise.
            conditions: {keyword of the network's forward: tensor (B, ...)}; None for none.
            mask: which tokens count, bool (B, L); the others are given: they stay clean. None: all of them. A sample
                of which none counts has loss 0.

        Raises ValueError for uniforms or a mask of another shape, and, on the CPU, for token ids out of range.
        """
        for name, values in (("uniforms", uniforms), ("mask", mask)):
            if values is not None and values.shape != tokens.shape:
                raise ValueError(
                    f"{name} of shape {tuple(values.shape)} must be of that of tokens, {tuple(tokens.shape)}"
                )
        x_t = self.scheduler.path.corrupt(tokens, t, uniforms=uniforms)
        if mask is not None:
            x_t = torch.where(mask, x_t, tokens)
        timestep = self.scheduler.timesteps_beside(None if mask is None else ~mask, x_t, t)
        output = network(x_t, timestep, **conditions or {}).sample
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        rates = DISCRETE_LOSSES[self.loss](self.scheduler, output, tokens, x_t, t)
        counted = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        total = torch.where(counted, rates, 0.0).sum(1) / counted.sum(1).clamp_min(1)
        return expand_to(self.weight(t), total) * total
