"""Samplers of the reverse process over tokens: what a step makes of tokens (B, L) and probabilities of clean ones.

A predictor is a row of PREDICTORS. Its function is of one of two kinds, given the options that the row names:
    transition: (path, tokens, log_p0, t, s) -> probabilities (B, L, S) of each token at s, independent of each other;
    order: (log_p0, drawn, is_open, uniforms, number) -> priority (B, L): which of the open positions take their drawn
        clean token first, of which it will be `number` (B,); and which take it in any case, (B, L) or None.
A corrector changes tokens and leaves the time where it is. Every random choice is made from float64 uniforms on [0, 1):
with those of 32 bits an argmax over Gumbel noise loses the tail of the distribution (Zheng et al. 2024, Sec. 5).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .discrete_paths import at
from .paths import expand_to, finest


# --- draws ------------------------------------------------------------------------------------------------------------


def draw(probabilities, uniforms):
    """One of K by its probability: (..., K), which need not sum to 1, and float64 uniforms (...) -> indices (...).

    The distribution function is inverted, in float64: one number decides, and what has probability 2^-50 still occurs.
    """
    total = probabilities.to(uniforms.dtype).cumsum(-1)
    end = total[..., -1]
    # rounded, u times the end may be the end itself, which lies past the last of them
    place = torch.minimum(uniforms * end, torch.nextafter(end, torch.zeros_like(end)))
    return torch.searchsorted(total, place.unsqueeze(-1), right=True).squeeze(-1)


# what a smaller temperature above 0 is taken as: float32 would round it to 0, and tells no tokens apart by less
LEAST_TEMPERATURE = 1e-30


def tempered(log_p0, temperature):
    """Log-probabilities (..., V) at a temperature above 0, however small."""
    # of the likeliest 0, so that not all overflow
    below = log_p0 - log_p0.amax(-1, keepdim=True)
    return (below / max(temperature, LEAST_TEMPERATURE)).log_softmax(-1)


def filtered(log_p0, temperature=1.0, top_k=None, top_p=None):
    """Log-probabilities (..., V) at a temperature, of the top_k likeliest, of the fewest that together have top_p.

    Temperature 0 leaves the likeliest alone. The first filter is the temperature, then top_k, then top_p, as in
    transformers and diffusers.
    """
    if temperature == 0:
        likeliest = torch.full_like(log_p0, -math.inf)
        return likeliest.scatter(-1, log_p0.argmax(-1, keepdim=True), 0.0)
    if temperature != 1:
        log_p0 = tempered(log_p0, temperature)
    if top_k is not None and top_k < log_p0.shape[-1]:
        least = log_p0.topk(top_k, dim=-1).values[..., -1:]
        log_p0 = log_p0.masked_fill(log_p0 < least, -math.inf).log_softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, places = log_p0.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        left_out = (before >= top_p).scatter(-1, places, before >= top_p)
        log_p0 = log_p0.masked_fill(left_out, -math.inf).log_softmax(-1)
    return log_p0


# --- guidance ---------------------------------------------------------------------------------------------------------

# what is taken of a distribution that guidance leads away from, where it has nothing: rounding may have left it so
LEAST_LOG = -30.0


def powers(log_p, log_origin, scale):
    """log of p^scale p_origin^(1 - scale), normed over the last axis: the distribution under classifier-free guidance
    (Schiff et al. 2025). What p has not, the result has not."""
    mixed = scale * log_p + (1 - scale) * log_origin.clamp_min(LEAST_LOG)
    return torch.where(log_p == -math.inf, -math.inf, mixed).log_softmax(-1)


def filtered_alike(log_p0, kept, temperature):
    """`filtered` log-probabilities (..., V) at a temperature of those tokens alone that `kept`, log-probabilities that
    were, has left."""
    if temperature == 0:
        return kept
    return tempered(log_p0.masked_fill(kept == -math.inf, -math.inf), temperature)


# --- predictors: transitions ------------------------------------------------------------------------------------------


def ancestral(path, tokens, log_p0, t, s):
    """The exact posterior of each token at s, averaged over its clean one (Austin et al. 2021; Sahoo et al. 2024)."""
    return path.posterior(log_p0, tokens, t, s)


def tau_leaping(path, tokens, log_score, t, s):
    """Euler: the rates at t hold for the step (Campbell et al. 2022; Lou et al. 2024, Eq. 17). Where they would leave
    with more than certainty, they leave with certainty."""
    jumps = (t - s) * path.reverse_rates(log_score, tokens, t)
    jumps = torch.nn.functional.pad(jumps, (0, path.num_states - path.vocab_size))
    leaving = jumps.sum(-1, keepdim=True)
    return (jumps / leaving.clamp_min(1.0)).scatter(-1, tokens.unsqueeze(-1), (1 - leaving).clamp_min(0.0))


def tweedie(path, tokens, log_score, t, s):
    """SEDD's analytic step (Lou et al. 2024, Eq. 19): Bayes' rule with the ratios at s, which the inverse of the
    transition makes of those at t. Ratios of a distribution make it `ancestral`; those of a network need not be."""
    ratios = log_score.to(finest(tokens.device)).exp()
    ratios = torch.nn.functional.pad(ratios, (0, path.num_states - path.vocab_size))
    own = torch.arange(path.num_states, device=tokens.device) == tokens.unsqueeze(-1)
    ratios = torch.where(own, 1.0, ratios)
    r, pi = expand_to(path.transition(s, t), ratios), path.pi(tokens.device)
    ratios = (ratios - (1 - r) * pi * ratios.sum(-1, keepdim=True)).clamp_min(0) / r
    return ratios * (r * own + (1 - r) * pi[tokens].unsqueeze(-1))


def remasking(path, tokens, log_p0, t, s, eta):
    """`ancestral` on the absorbing process, where a shown token is masked again with the chance sigma = eta min(1,
    (1 - alpha_s) / alpha_t), which keeps the marginals (ReMDM, Wang et al. 2025, Eq. 6): errors can be mended."""
    alpha_t, alpha_s = path.alpha(t), path.alpha(s)
    sigma = eta * torch.clamp((1 - alpha_s) / alpha_t, max=1.0)
    shows = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    is_masked = (tokens == path.mask_token_id).unsqueeze(-1)
    chance = torch.where(is_masked, shows.to(log_p0), (1 - sigma).to(log_p0))
    return torch.cat([chance * log_p0.exp(), (1 - chance)], dim=-1)


# --- predictors: orders -----------------------------------------------------------------------------------------------


def first_hitting(log_p0, drawn, is_open, uniforms, number):
    """Uniformly random order, which is that of the process itself: exact where a step shows one token (Zheng et al.
    2024)."""
    return uniforms, None


def dilated(log_p0, drawn, is_open, uniforms, number):
    """Positions far from those that are known and from each other first, as tokens nearby depend on each other most
    (Luxembourg et al. 2025); the order knows nothing of what is drawn."""
    length = is_open.shape[1]
    places = torch.arange(length, device=is_open.device)
    before = torch.where(is_open, -length, places).cummax(-1).values
    behind = torch.where(is_open, 2 * length, places).flip(-1).cummin(-1).values.flip(-1)
    distance = torch.minimum(places - before, behind - places)
    priority = torch.full_like(uniforms, -length)
    for rank in range(int(number.max())):
        left = is_open & (distance > 0)
        # among equals at random
        farthest = torch.where(left, distance + uniforms, -1).argmax(-1, keepdim=True)
        # a sequence with fewer open positions than others show has none left
        ranked = torch.where(left.any(-1, keepdim=True), -float(rank), priority.gather(-1, farthest))
        priority.scatter_(-1, farthest, ranked)
        distance = torch.minimum(distance, (places - farthest).abs())
    return priority, None


def confidence(log_p0, drawn, is_open, uniforms, number):
    """The likeliest of the drawn tokens first (MaskGIT, Chang et al. 2022)."""
    return at(log_p0, drawn), None


def margin(log_p0, drawn, is_open, uniforms, number):
    """The largest margin between the two likeliest tokens first (Kim et al. 2025), whichever was drawn."""
    if log_p0.shape[-1] == 1:
        return torch.ones_like(uniforms), None
    first, second = log_p0.topk(2, dim=-1).values.exp().unbind(-1)
    return first - second, None


def entropy_bounded(log_p0, drawn, is_open, uniforms, number, entropy_bound=0.1):
    """The least entropy first, and as many as together have at most `entropy_bound` nats beside the largest of them,
    which bounds what is lost by drawing them independently (Ben-Hamu et al. 2025)."""
    entropy = -torch.xlogy(log_p0.exp(), log_p0.exp()).sum(-1)
    # in the order in which `shown` takes them, so that of equals it takes no other
    places = ranked(-entropy, is_open, uniforms)
    ordered = entropy.masked_fill(~is_open, math.inf).gather(-1, places)
    within = ordered.cumsum(-1) - ordered <= entropy_bound
    return -entropy, torch.zeros_like(within).scatter(-1, places, within)


def ranked(priority, is_open, uniforms):
    """The positions (B, L) from the highest priority on, equals in random order, those that are not open last."""
    mixed = uniforms.argsort(dim=-1)
    priority = priority.masked_fill(~is_open, -math.inf).gather(-1, mixed)
    return mixed.gather(-1, priority.argsort(dim=-1, descending=True, stable=True))


def shown(priority, is_open, quota, uniforms):
    """The `quota` (B,) open positions of highest priority, among equals at random: (B, L)."""
    return is_open & (ranked(priority, is_open, uniforms).argsort(dim=-1) < quota.unsqueeze(-1))


def quota(path, num_open, t, s):
    """How many of the open positions (B,) a step from t to s shows, so that what stays open is the process's share of
    them, rounded down, and nothing where the step leads to clean tokens, s = 0. With no more positions left than steps
    of equal survival, one after the other."""
    # alpha(0) may be below 1, and no later step would show what stays open
    left = (1 - path.alpha(s)) / (1 - path.alpha(t)) if s else 0.0
    # up to rounding
    return num_open - (num_open.to(finest(num_open.device)) * float(left) + 1e-9).floor().long()


# --- correctors -------------------------------------------------------------------------------------------------------


def conditional(path, tokens, log_p0, t):
    """Log-probabilities (B, L, V) of each token at t given all others: the concrete score, normalised. As the score is
    of the network, this is the leave-one-out denoiser with its noise."""
    return path.score(log_p0, tokens, t).log_softmax(-1)


def random(log_p, tokens):
    """No order: all positions alike, which leaves the distribution at t what it is, one position at a time."""
    return torch.zeros(tokens.shape, dtype=log_p.dtype, device=log_p.device)


def lowest_maxprob(log_p, tokens):
    return -log_p.amax(-1)


def lowest_current_prob(log_p, tokens):
    return -at(log_p, tokens)


def lowest_log_margin(log_p, tokens):
    others = log_p.scatter(-1, tokens.unsqueeze(-1), -math.inf).amax(-1)
    return lowest_current_prob(log_p, tokens) + others


# which positions `gibbs` draws anew, by diffusers' names: their scores, the highest first up to Gumbel noise
SELECTIONS = {
    "random": random,
    "lowest_log_margin": lowest_log_margin,
    "lowest_maxprob": lowest_maxprob,
    "lowest_current_prob": lowest_current_prob,
}


def gibbs(tokens, log_p, is_free, uniforms, *, k, selection, tau):
    """Draw k positions anew, each from its distribution given all others (leave-one-out; arXiv 2605.22765): tokens.

    log_p: `conditional`, or the `powers` of two. uniforms: (2, B, L).
    """
    gumbel = -torch.log(-torch.log(uniforms[0].clamp_min(1e-300)))
    keys = (SELECTIONS[selection](log_p, tokens) / tau + gumbel).masked_fill(~is_free, -math.inf)
    places = keys.topk(min(k, tokens.shape[1]), dim=-1).indices
    chosen = torch.zeros_like(is_free).scatter(-1, places, True) & is_free
    return torch.where(chosen, draw(log_p.exp(), uniforms[1]), tokens)


CORRECTORS = ("gibbs", "remasking")
REMASKING_ETA = 0.05


# --- rows -------------------------------------------------------------------------------------------------------------


class Predictor(NamedTuple):
    """A row of PREDICTORS.

    stage: the function, of one of the two kinds.
    is_order: the kind of the function.
    of_score: it takes the log concrete score instead of log_p0.
    processes: those that it is for.
    options: that `stage` takes by name.
    of_rates: guidance of uniform noise is of the rates that it takes, and not of the step that it makes of them.
    spacing: the grid of times where none is asked for.
    keeps: on the uniform process, positions once shown are no longer open.
    """

    stage: Callable
    is_order: bool = False
    of_score: bool = False
    of_rates: bool = False
    processes: tuple[str, ...] = ("absorbing", "uniform")
    options: tuple[str, ...] = ()
    spacing: str = "linspace"
    keeps: bool = True


PREDICTORS = {
    "ancestral": Predictor(ancestral),
    "tweedie": Predictor(tweedie, of_score=True),
    "tau_leaping": Predictor(tau_leaping, of_score=True, of_rates=True),
    "first_hitting": Predictor(first_hitting, is_order=True, processes=("absorbing",), spacing="survival"),
    "dilated": Predictor(dilated, is_order=True, processes=("absorbing",), spacing="survival"),
    "confidence": Predictor(confidence, is_order=True, spacing="survival"),
    "margin": Predictor(margin, is_order=True, processes=("absorbing",), spacing="survival"),
    "entropy_bounded": Predictor(
        entropy_bounded, is_order=True, options=("entropy_bound",), spacing="survival", keeps=False
    ),
}


# --- grids of times ---------------------------------------------------------------------------------------------------


def linspace(path, fractions, t_max):
    return t_max * fractions


def survival(path, fractions, t_max):
    alpha = path.alpha(t_max)
    return path.t_from_alpha(alpha + (path.alpha(0.0) - alpha) * (1 - fractions))


def cosine(path, fractions, t_max):
    return survival(path, torch.sin(fractions * math.pi / 2), t_max)


# {name: function of the path, the falling fractions of the way to the largest time, and that time}
SPACINGS = {"linspace": linspace, "survival": survival, "cosine": cosine}


def time_grid(path, spacing, n, t_max):
    """The n falling times, float64, from t_max on, at which a trajectory to clean tokens is evaluated."""
    times = SPACINGS[spacing](path, torch.linspace(1, 0, n + 1, dtype=torch.float64)[:-1], t_max)
    times[0] = t_max
    return times


# --- what predictor "auto" stands for ---------------------------------------------------------------------------------


# {process: key of PREDICTORS}, whatever the number of steps: the one of least error of those that fail on no source of
# benchmarks/README.md. dilated has far less on chains, and fails where tokens far apart depend on each other, as they
# do in texts that end at places of their own.
AUTOMATIC = {"absorbing": "first_hitting", "uniform": "ancestral"}
