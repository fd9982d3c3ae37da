"""Densities of training times, weightings, and the denoising objectives that they make."""

import inspect
import math

import torch

from ..schedulers.checks import check_choice
from ..schedulers.paths import expand_all, expand_to, prediction, sent, shifted, target_coefficients


# --- densities over times -----------------------------------------------------------------------------------------


def uniform_times(scheduler, u):
    """t uniform in [t_min, t_max]."""
    return scheduler.t_min + (scheduler.t_max - scheduler.t_min) * u


def log_normal_times(scheduler, u, mean=-1.2, std=1.2):
    """log(sigma / alpha) normal with the mean and standard deviation of Karras et al. 2022 (Table 1), cut to
    [t_min, t_max]."""
    log_sigma = mean + std * 2**0.5 * torch.erfinv(2 * u - 1)
    return scheduler.path.t_from_half_log_snr(-log_sigma).clamp(scheduler.t_min, scheduler.t_max)


def logit_normal_times(scheduler, u, mean=0.0, std=1.0):
    """log(t / (1 - t)) normal (Esser et al. 2024, section 3.1), cut to [t_min, t_max]."""
    return torch.sigmoid(mean + std * 2**0.5 * torch.erfinv(2 * u - 1)).clamp(scheduler.t_min, scheduler.t_max)


def importance_times(scheduler, u):
    """Density proportional to g^2 / sigma^2 (Song et al. 2021b, section 4.2), which is uniform in log(alpha / sigma):
    its derivative by t is -g^2 / (2 sigma^2)."""
    first, last = _ends_of_half_log_snr(scheduler)
    return scheduler.path.t_from_half_log_snr(first + (last - first) * u)


def _ends_of_half_log_snr(scheduler):
    return scheduler.path.half_log_snr(torch.tensor([scheduler.t_min, scheduler.t_max], dtype=torch.float64))


def _half_rate(scheduler, t):
    """g^2 / (2 sigma^2)."""
    return scheduler.path.diffusion(t) ** 2 / (2 * scheduler.path.sigma(t) ** 2)


def level_times(scheduler, u):
    """Uniform over the num_train_timesteps noise levels of a chain: those of discrete_vp, else from t_min to t_max."""
    count = scheduler.config.num_train_timesteps
    index = (u * count).floor().clamp_max(count - 1)
    if scheduler.path.levels:
        return (index + 1) / scheduler.path.levels
    return scheduler.t_min + (scheduler.t_max - scheduler.t_min) * index / max(count - 1, 1)


# each maps uniform numbers in (0, 1), float64, to times
TIME_DENSITIES = {
    "uniform": uniform_times,
    "log_normal": log_normal_times,
    "logit_normal": logit_normal_times,
    "importance": importance_times,
    "levels": level_times,
}


def inverse_uniform(scheduler, t):
    return scheduler.t_max - scheduler.t_min


def inverse_importance(scheduler, t):
    first, last = _ends_of_half_log_snr(scheduler)
    return (first - last) / _half_rate(scheduler, t)


# 1 / p(t), for the weighting that needs it
INVERSE_DENSITIES = {"uniform": inverse_uniform, "importance": inverse_importance}

# those that a time shift moves: importance is uniform in lambda already, and levels are where they are
SHIFTED_DENSITIES = ("uniform", "log_normal", "logit_normal")


# --- weightings: w(t) of |x0 - x0_hat|^2, float64 -----------------------------------------------------------------


def _of_prediction(scheduler, prediction_type, t):
    row = prediction(scheduler.path, prediction_type, t, scheduler.config.sigma_data)
    return 1 / row.b**2


def output_weight(scheduler, t):
    """The squared error of the network's output, whatever it predicts."""
    return _of_prediction(scheduler, scheduler.parameterization.prediction_type, t)


def simple_weight(scheduler, t):
    """alpha^2 / sigma^2: the squared error of the noise, and of the score times sigma."""
    return _of_prediction(scheduler, "epsilon", t)


def velocity_weight(scheduler, t, least_time=0.0):
    """The squared error of the path's velocity; at times below least_time as much as there (JiT: 0.05), since an error
    of x0 becomes an unbounded one of the velocity."""
    return _of_prediction(scheduler, "flow_prediction", t.clamp_min(least_time))


def edm_weight(scheduler, t):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 of Karras et al. 2022 (Table 1), for any alpha."""
    return _of_prediction(scheduler, "edm", t)


def likelihood_weight(scheduler, t):
    """g^2 alpha^2 / (2 sigma^4): the expected loss is what noise adds to the bound on -log p (Song et al. 2021b,
    corollary 1), in nats per dimension, once the density of times is divided out (`INVERSE_DENSITIES`)."""
    return _half_rate(scheduler, t) * _of_prediction(scheduler, "epsilon", t)


def min_snr_weight(scheduler, t, gamma=5.0):
    """min(SNR, gamma) (Hang et al. 2023)."""
    return _of_prediction(scheduler, "epsilon", t).clamp_max(gamma)


def p2_weight(scheduler, t, gamma=1.0, k=1.0):
    """SNR / (k + SNR)^gamma (Choi et al. 2022)."""
    snr = _of_prediction(scheduler, "epsilon", t)
    return snr / (k + snr) ** gamma


def sample_weight(scheduler, t):
    """1."""
    return torch.ones_like(scheduler.path.alpha(t))


WEIGHTINGS = {
    "output": output_weight,
    "simple": simple_weight,
    "velocity": velocity_weight,
    "edm": edm_weight,
    "likelihood": likelihood_weight,
    "min_snr": min_snr_weight,
    "p2": p2_weight,
    "sample": sample_weight,
}


def check_row(kind, name, known, options):
    """Raise ValueError for a name that isn't one of a table's functions, and for options that it doesn't have."""
    check_choice(kind, name, known)
    parameters = inspect.signature(known[name]).parameters.values()
    allowed = [each.name for each in parameters if each.default is not inspect.Parameter.empty]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"{kind} {name!r} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}")


class Objective:
    """A density over times and a weighting, for the scheduler that will sample.

    Args:
        scheduler: a `ScoreSDEScheduler`; it owns the path and what the network's output means.
        time_density, weighting: names of `TIME_DENSITIES` and `WEIGHTINGS`.
        density_options, weighting_options: their numbers, {name: value}: mean and std of log_normal and logit_normal,
            gamma of min_snr, gamma and k of p2, least_time of velocity.
        shift_times: move the drawn times, too, by the `shift` that the scheduler's config has for its grids: lambda is
            lower by its logarithm (Esser et al. 2024, Eq. 23). What leaves [t_min, t_max] is cut to it.

    Raises ValueError for unknown names and options, for a likelihood of times that are not continuous, and for shifted
    times of a density, path or weighting that has none.
    """

    def __init__(
        self,
        scheduler,
        time_density="uniform",
        weighting="output",
        density_options=None,
        weighting_options=None,
        shift_times=False,
    ):
        self.scheduler = scheduler
        check_row("time_density", time_density, TIME_DENSITIES, density_options or {})
        check_row("weighting", weighting, WEIGHTINGS, weighting_options or {})
        if weighting == "likelihood" and time_density not in INVERSE_DENSITIES:
            raise ValueError(
                f"weighting 'likelihood' needs time_density {' or '.join(INVERSE_DENSITIES)}, not {time_density!r}"
            )
        self.time_density, self.density_options = time_density, density_options or {}
        self.weighting, self.weighting_options = weighting, weighting_options or {}
        self.shift = float(scheduler.config.shift) if shift_times else 1.0
        if shift_times:
            self.check_shift()

    def check_shift(self):
        path, config = self.scheduler.path, self.scheduler.config
        if float(path.alpha(1.0)) > 0:
            raise ValueError(
                f"shifted times need a path that ends in noise alone, such as linear or cosine_vp: on sde_type "
                f"{config.sde_type!r} there is no time of a lower signal-to-noise ratio than the last one's"
            )
        if config.use_dynamic_shifting:
            raise ValueError("shifted times need one shift, and with use_dynamic_shifting each trajectory has its own")
        if self.time_density not in SHIFTED_DENSITIES or self.weighting == "likelihood":
            raise ValueError(
                f"shifted times need time_density {', '.join(SHIFTED_DENSITIES)} and another weighting than "
                f"likelihood, not {self.time_density!r} and {self.weighting!r}"
            )

    def times(self, u):
        """Times (B,) from uniform numbers in (0, 1), float64 (B,)."""
        times = TIME_DENSITIES[self.time_density](self.scheduler, u, **self.density_options)
        if self.shift == 1:
            return times
        return shifted(self.scheduler.path, times, self.shift).clamp(self.scheduler.t_min, self.scheduler.t_max)

    def weight(self, t):
        """w(t) of the squared error of the denoised sample, float64, the shape of t."""
        weight = WEIGHTINGS[self.weighting](self.scheduler, t, **self.weighting_options)
        if self.weighting == "likelihood":
            weight = weight * INVERSE_DENSITIES[self.time_density](self.scheduler, t)
        return weight

    def __call__(self, network, x0, noise, t, conditions=None, mask=None):
        """The weighted squared error, (B,) float32, mean over the dimensions: see `denoising_loss`."""
        return denoising_loss(network, self.scheduler, x0, noise, t, conditions, self.weight(t), mask)


def denoising_loss(network, scheduler, x0, noise, t, conditions=None, weight=None, mask=None):
    """Denoising score matching: the weighted squared error of the denoised sample, mean over its dimensions.

    Args:
        network: called as network(x, timestep, **conditions).sample; a second half of channels is not trained.
        scheduler: the `ScoreSDEScheduler` that will sample; it owns the path and what the output means.
        x0: clean samples (B, C, ...). noise: standard normal, the same shape. t: path times (B,), best on the CPU, in
            float64.
        conditions: {keyword of the network's forward: tensor (B, ...)}; None for none.
        weight: of the squared error of x0, float64 (B,); None for that which makes it the squared error of the
            network's output.
        mask: which elements of x0 count, bool, of as many axes as x0 and of a shape that broadcasts to its; the mean is
            over those, 0 for a sample without any. None: all of them.

    Returns:
        (B,) float32 losses.

    Raises ValueError for a mask of another number of axes.
    """
    # an error in the output is b times as large in x0
    more = [] if weight is None else [weight * scheduler.parameterization.row(t).b ** 2]
    _, _, error_of_output, weights = _evaluate(network, scheduler, x0, noise, t, conditions, mask, more)
    losses = _mean(error_of_output.square(), mask)
    return losses if weight is None else weights[0] * losses


def _mean(values, mask):
    """The mean of each sample's elements, those that the mask counts; (B, ...) to (B,)."""
    if mask is None:
        return values.flatten(1).mean(1)
    counted = _masked(torch.ones_like(values), mask).flatten(1).sum(1)
    return _masked(values, mask).flatten(1).sum(1) / counted.clamp_min(1)


def _masked(values, mask):
    """0 where the mask doesn't count, which no gradient reaches."""
    if mask is None:
        return values
    if mask.ndim != values.ndim:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} doesn't fit samples of shape {tuple(values.shape)}: give it as many "
            f"axes, of length 1 where it is the same for all"
        )
    return values.masked_fill(~mask, 0)


def _evaluate(network, scheduler, x0, noise, t, conditions, mask, more=()):
    """(x_t, the network's output, the error of what it predicts, 0 where the mask doesn't count, `more`) at x_t.

    All that depends on t alone, such as the coefficients `more`, is worked out where t is, in float64, and goes to the
    device of x0 as one tensor; `more` comes back from there in at least float32, () or (B,) each.
    """
    path, parameterization = scheduler.path, scheduler.parameterization
    row, alpha, sigma = parameterization.row(t), path.alpha(t), path.sigma(t)
    of_t = [alpha, sigma, *target_coefficients(row, alpha, sigma), row.input_scale, scheduler.timestep(t), *more]
    table = sent(torch.stack(torch.broadcast_tensors(*of_t)), x0.device, torch.promote_types(x0.dtype, torch.float32))
    if scheduler.domain is None:
        alpha, sigma, target_x0, target_noise, input_scale = expand_all(table[:5].unbind(), x0)
        x_t, target = alpha * x0 + sigma * noise, target_x0 * x0 + target_noise * noise
    else:
        input_scale, x_t = None, scheduler.domain.perturb(x0, path.sigma(t), noise)
        # x0 is x_t + sigma^2 score there
        of_score = expand_to(path.sigma(t) ** 2 / row.b, x0)
        target = of_score * scheduler.domain.score(x_t, x0, path.sigma(t))
    model_input, timestep = parameterization.scaled(x_t, input_scale), table[5].float()
    output = network(model_input, timestep, **conditions or {}).sample
    error = _masked(output[:, : x0.shape[1]].float() - target.float(), mask)
    return x_t, output, error, table[6:].unbind()


# --- learned variance ---------------------------------------------------------------------------------------------


def hybrid_loss(network, scheduler, x0, noise, t, conditions=None, vlb_weight=0.001, discretized=True, mask=None):
    """The loss of iDDPM and DiT: the squared error of the output, plus `vlb_weight` times the variational bound of the
    whole chain (Nichol & Dhariwal 2021, Eq. 16), which trains the variance alone: the mean in it takes no gradient.

    Args:
        network, scheduler, x0, noise, conditions, mask: as for `denoising_loss`; the scheduler's path is a chain
            (discrete_vp) and the network's output has twice the channels of x0, the second half being the place of
            the log-variance between its bounds ("learned_range").
        t: levels of the chain, (n + 1) / N.
        vlb_weight: weight of the bound, in bits/dim, as in the original.
        discretized: x0 are pixels of 256 values in [-1, 1], whose bins the last step's likelihood counts; the original
            does so for latents, too.

    Returns:
        (B,) float32 losses.

    Raises ValueError for another path or an output without variance.
    """
    if not scheduler.path.levels:
        raise ValueError(f"hybrid_loss needs a chain: sde_type 'discrete_vp', not {scheduler.config.sde_type!r}")
    path, channels = scheduler.path, x0.shape[1]
    more = [scheduler.parameterization.row(t).b, *_vlb_coefficients(path, t)]
    x_t, output, error, (b, *coefficients) = _evaluate(network, scheduler, x0, noise, t, conditions, mask, more)
    if output.shape[1] != 2 * channels:
        raise ValueError(f"the network returns {output.shape[1]} channels; a learned variance needs {2 * channels}")
    denoised = x0.float() + expand_to(b, error) * error.detach()
    bound = _vlb_terms(coefficients, x0, x_t, denoised, output[:, channels:], discretized, mask)
    return _mean(error.square(), mask) + vlb_weight * path.levels / math.log(2) * bound


def vlb_terms(path, x0, x_t, denoised, variance, t, discretized=True, mask=None):
    """The term of level t of the variational bound on -log p(x0) (Ho et al. 2020, Eq. 5), in nats per dimension: for
    t = (n + 1) / N with n > 0 the divergence of the chain's posterior from the model's step, for n = 0 the negative
    log-likelihood of x0 by its last step.

    Args:
        path: a `DiscreteVPSDE`. x0, x_t, denoised: (B, C, ...). t: (B,).
        variance: (B, C, ...), -1 for the posterior's log-variance, 1 for the transition's ("learned_range").
        mask: as for `denoising_loss`.

    Returns:
        (B,) float32.
    """
    coefficients = sent(torch.stack(_vlb_coefficients(path, t)), x0.device, torch.float32).unbind()
    return _vlb_terms(coefficients, x0, x_t, denoised, variance, discretized, mask)


def _vlb_coefficients(path, t):
    """Of `vlb_terms` at t, () or (B,) each: the posterior's log-variance; how much more the mean of it and the
    transition's is; the posterior's c_x and c_0; and 1 for the first level."""
    level = (t * path.levels).round()
    first = level == 1
    # the first level's posterior has no width: the original takes the next one's
    shown = torch.where(first, torch.full_like(t, 2 / path.levels), t)
    _, _, small = path.posterior(shown, shown - 1 / path.levels)
    c_x, c_0, _ = path.posterior(t, (level - 1) / path.levels)
    _, large = path.transition((level - 1) / path.levels, t)
    return 2 * small.log(), (large / small).log(), c_x, c_0, first.to(c_x)


def _vlb_terms(coefficients, x0, x_t, denoised, variance, discretized, mask):
    *_, first = coefficients
    x0, x_t, denoised = x0.float(), x_t.float(), denoised.float()
    low, half, c_x, c_0, _ = expand_all(coefficients, x0)
    # above the posterior's log-variance
    more = torch.addcmul(half, half, variance.float())
    log_variance = low + more
    missed = c_0 * (x0 - denoised)
    divergence = (more + torch.expm1(-more) + missed.square() * torch.exp(-log_variance)) / 2
    mean = c_x * x_t + c_0 * denoised
    if discretized:
        likelihood = discretized_log_likelihood(x0, mean, log_variance / 2)
    else:
        likelihood = -((x0 - mean).square() * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi)) / 2
    return torch.where(first > 0, -_mean(likelihood, mask), _mean(divergence, mask))


def discretized_log_likelihood(x, mean, log_std):
    """log of the probability that a normal distribution gives to the bin of pixels x in [-1, 1], one of 256, the
    outermost open (Ho et al. 2020, Eq. 13); elementwise."""
    scale = torch.exp(-log_std)

    def cdf(value):
        return torch.special.ndtr((value - mean) * scale)

    upper = torch.where(x > 0.999, torch.ones_like(x), cdf(x + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), cdf(x - 1 / 255))
    return (upper - lower).clamp_min(1e-12).log()


# --- without the conditional score --------------------------------------------------------------------------------


def sliced_score_matching(network, scheduler, x_t, t, probes, conditions=None, mask=None):
    """Sliced score matching (Song et al. 2020, Eq. 8) of the network's score at x_t, with the exact norm (SSM-VR): it
    doesn't need to know the noise in x_t.

    Args:
        network, scheduler, conditions, mask: as for `denoising_loss`.
        x_t: noisy samples (B, C, ...). t: their times (B,). probes: random directions of unit covariance, (B, C, ...).

    Returns:
        (B,) float32: sigma^2 (v^T ds/dx v + |s|^2 / 2) per dimension, differentiable.
    """
    path, parameterization = scheduler.path, scheduler.parameterization
    x_t = x_t.detach().requires_grad_()
    row, variance = parameterization.row(t), path.sigma(t) ** 2
    # score = (alpha x0 - x_t) / sigma^2
    of_t = [*row, path.alpha(t), variance, scheduler.timestep(t)]
    table = sent(torch.stack(torch.broadcast_tensors(*of_t)), x_t.device, torch.promote_types(x_t.dtype, torch.float32))
    a, b, input_scale, alpha, expanded = expand_all(table[:5].unbind(), x_t)
    output = network(parameterization.scaled(x_t, input_scale), table[5].float(), **conditions or {}).sample
    denoised = a * x_t + b * output[:, : x_t.shape[1]]
    score = (alpha * denoised - x_t) / expanded
    probes = _masked(probes, mask)
    (slope,) = torch.autograd.grad((score * probes).sum(), x_t, create_graph=True)
    return table[4] * _mean(slope * probes + score.square() / 2, mask)
