"""Exact log-likelihoods by the probability-flow ODE (Song et al. 2021, section 4.3 and appendix D.2), and its codes."""

import math
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from .adaptive import check_finite, in_float64, integrate
from .wording import check_choice


TRACES = ("rademacher", "gaussian", "exact")
DEQUANTIZATIONS = ("uniform", "truncated_normal")
# half the distance of neighbouring pixels n / 127.5 - 1
HALF_BIN = 1 / 255


@dataclass
class Likelihood:
    """Log-likelihoods of B samples with D dimensions.

    log_prob: natural logarithm of the density of each sample, (B,), at the smallest time of the path.
    probe_error: standard error of each log_prob over the probes, (B,): 0 for an exact trace, nan for a single probe.
    dimensions: D.
    noise: what the samples are encoded as: the ODE's solution at the largest time, in units of the prior's standard
        deviation, (B, ...); on a domain, points of it.
    nfe: number of network evaluations.
    entropy: of the noise that made samples of whole numbers, in nats per dimension; None where they were given as they
        are.
    """

    log_prob: torch.Tensor
    probe_error: torch.Tensor
    dimensions: int
    noise: torch.Tensor
    nfe: int
    entropy: float | None = None

    def nats_per_dim(self):
        """Negative log-likelihood per dimension in nats, (B,)."""
        return -self.log_prob / self.dimensions

    def bits_per_dim(self, levels=256, width=2.0):
        """Negative log-likelihood of the whole numbers 0 to levels - 1 from which the samples were made, in bits per
        dimension, (B,): samples are (number + a uniform draw from [0, 1)) width / levels, up to a shift, such as 256
        levels over [-1, 1], or made by noise of another known `entropy`. By Jensen's inequality it is an upper bound
        (Theis et al. 2016)."""
        entropy = math.log(width / levels) if self.entropy is None else self.entropy
        return (self.nats_per_dim() - entropy) / math.log(2)


def dequantize(images, generator=None):
    """Whole numbers 0 to 255 (B, ...) as samples in [-1, 1], float32, on their device: each with a uniform draw from
    [0, 1) added, from a generator of any device."""
    device = images.device if generator is None else generator.device
    noise = torch.rand(images.shape, generator=generator, device=device).to(images.device)
    return (images + noise) / 128 - 1


def truncated_normal(images, alpha, sigma, generator=None):
    """Pixels n / 127.5 - 1 (B, ...) as samples alpha x0 + sigma z of the time of this alpha and sigma, as the network
    knows them, but with z cut to what stays in the bin of its n, alpha (x0 - HALF_BIN) to alpha (x0 + HALF_BIN) (Zheng
    et al. 2023, section 3); of their dtype, on their device, from a generator of any device."""
    tau, device = alpha * HALF_BIN / sigma, images.device if generator is None else generator.device
    u = torch.rand(images.shape, generator=generator, device=device, dtype=torch.float64)
    # the inverse of the distribution function; of a wide bin it is rounded to infinity
    z = math.sqrt(2) * torch.erfinv((2 * u - 1) * math.erf(tau / math.sqrt(2)))
    return alpha * images + (sigma * z.clamp(-tau, tau)).to(images)


def truncated_normal_entropy(alpha, sigma):
    """That of the noise of `truncated_normal`, in nats per dimension."""
    tau = alpha * HALF_BIN / sigma
    mass = math.erf(tau / math.sqrt(2))
    lost = tau * math.exp(-(tau**2) / 2) / math.sqrt(2 * math.pi) / mass
    return math.log(math.sqrt(2 * math.pi * math.e) * sigma * mass) - lost


def dequantized(images, dequantization, path, t_min, generator=None):
    """(samples of t_min, entropy of their noise in nats per dimension) of pixels n / 127.5 - 1 (B, ...), by
    `dequantize` or `truncated_normal`; with a list of generators, each draws its sample's. Raises ValueError for an
    unknown name and for images that hold other numbers."""
    check_choice("dequantization", dequantization, DEQUANTIZATIONS)
    numbers = ((images + 1) * 127.5).round()
    if not (images - (numbers / 127.5 - 1)).abs().max() < HALF_BIN / 100:
        raise ValueError(
            f"dequantization {dequantization!r} is of whole numbers n from 0 to 255 as n / 127.5 - 1, and these images "
            f"hold others: leave it out"
        )
    each = isinstance(generator, list)
    rows = list(zip(numbers, generator, strict=True)) if each else [(numbers, generator)]
    if dequantization == "uniform":
        found, entropy = [dequantize(*row) for row in rows], -math.log(128)
    else:
        at = float(path.alpha(t_min)), float(path.sigma(t_min))
        found = [truncated_normal(row / 127.5 - 1, *at, own) for row, own in rows]
        entropy = truncated_normal_entropy(*at)
    return torch.stack(found) if each else found[0], entropy


def slerp(a, b, share):
    """Spherical interpolation between codes (B, ...): a at share 0, b at share 1. Every sample keeps the length between
    those of its two ends, as Gaussian noise does."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b)[:, None].clamp(-1, 1)
    angle = cosine.acos().clamp_min(1e-6)
    weight_a, weight_b = ((part * angle).sin() / angle.sin() for part in (1 - share, share))
    return (weight_a * flat_a + weight_b * flat_b).reshape(a.shape)


def log_likelihood(
    path,
    denoise,
    x,
    t_min,
    t_max,
    prior_std,
    rtol,
    atol,
    trace="rademacher",
    num_probes=1,
    generator=None,
    steps=None,
    domain=None,
):
    """The log-density of samples under the model's probability-flow ODE, as a `Likelihood`.

    The ODE carries x from t_min to t_max, where the density is the prior's; on the way log p changes by the integral of
    the divergence of the ODE's velocity, whose trace is estimated as probe . J probe with probes that stay the same
    along the trajectory (Skilling 1989; Hutchinson 1990; Grathwohl et al. 2019), or summed up exactly.

    Args:
        denoise: f(x, t) -> denoised samples, differentiable in x.
        x: samples (B, ...) as of time t_min: data, in the units of the model.
        prior_std: standard deviation of the noise that sampling starts from at t_max.
        trace: rademacher, gaussian, or exact, which costs a backward pass for every dimension.
        num_probes: number of probes; each costs a backward pass.
        generator: source of the probes; with a list of one per sample, they depend on its own seed only.
        rtol, atol: tolerances of the ODE's solution, for x as for the log-density per dimension.
        steps: instead of these, number of RK4 steps of four evaluations each, for a known cost.
        domain: where samples live, which has a prior of its own; None for flat space. On the space around it, on which
            the ODE runs, the denoised samples are x + sigma^2 score, as a scheduler's `denoiser` returns them.

    Raises ValueError for an unknown trace or a number below 1, and FloatingPointError where the network's output is not
    finite.
    """
    check_choice("trace", trace, TRACES)
    if num_probes < 1 or (steps is not None and steps < 1):
        raise ValueError(f"num_probes {num_probes} and steps {steps} must be at least 1")
    dimensions, nfe = x[0].numel(), 0
    if trace == "exact":
        # one probe for every dimension, the same for all samples
        basis = torch.eye(dimensions, device=x.device, dtype=x.dtype)
        probes = [row.reshape(1, *x.shape[1:]).expand_as(x) for row in basis]
    else:
        shape = (len(x), num_probes, *x.shape[1:])
        drawn = randn_tensor(shape, generator=generator, device=x.device, dtype=x.dtype).transpose(0, 1)
        probes = list(drawn.sign() if trace == "rademacher" else drawn)

    def slope(time, x, _):
        nonlocal nfe
        nfe += 1
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            denoised = denoise(at, time)
            along = [
                torch.autograd.grad(denoised, at, probe, retain_graph=i + 1 < len(probes))[0]
                for i, probe in enumerate(probes)
            ]
        check_finite(denoised, time)
        traces = torch.stack([(g * p).flatten(1).sum(1) for g, p in zip(along, probes, strict=True)], dim=1)
        if trace == "exact":
            traces = traces.sum(1, keepdim=True)
        # the trace of the slope's derivative by y = x / c, per dimension, so that the tolerance is
        c = path.expand_to(path.straight_coordinates(time, slope=1.0)[0], x.flatten(1))
        divergence = c * path.straight_velocity(torch.ones_like(traces), traces / dimensions, time, slope=1.0)
        return path.straight_velocity(x, denoised.detach(), time, slope=1.0), divergence

    gained = torch.zeros(len(x), 1 if trace == "exact" else num_probes, device=x.device, dtype=x.dtype)
    noise, gained = integrate(path, slope, x, t_min, t_max, rtol, atol, (gained,), steps)
    (c_min, _), (c_max, _) = (path.straight_coordinates(t, slope=1.0) for t in (t_min, t_max))
    if domain is None:
        noise = noise / prior_std
        prior = -in_float64(noise.flatten(1)).pow(2).sum(1) / 2
        prior = prior - dimensions * math.log((2 * math.pi) ** 0.5 * prior_std)
    else:
        noise = domain.wrap(noise)
        prior = in_float64(domain.log_prior(noise))
    # from the density of y = x / c to that of x, at both ends
    change = float((c_max / c_min).log())
    each = prior[:, None] + dimensions * (in_float64(gained) + change)
    if trace == "exact":
        error = torch.zeros_like(prior)
    else:
        error = each.std(1) / num_probes**0.5 if num_probes > 1 else torch.full_like(prior, math.nan)
    dimensions = dimensions if domain is None else domain.dimensions(x.shape)
    return Likelihood(each.mean(1), error, dimensions, noise, nfe)
