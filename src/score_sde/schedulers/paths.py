r"""All noise mathematics of the package: every formula stands here once, and everything else derives from it.

Time t runs over [0, 1], 0 = data, 1 = noise; s < t throughout. A path owns alpha(t) and sigma(t):

(1)  x_t = alpha(t) x0 + sigma(t) noise,  noise ~ N(0, I)                                        (marginal)

It is the solution of the forward SDE dx = f x dt + g dw (Song et al. 2021, Eq. 5) with

(2)  f = alpha' / alpha,   g^2 = (sigma^2)' - 2 f sigma^2                                        (drift, diffusion)
(3)  lambda = log(alpha / sigma), half the log signal-to-noise ratio; it falls strictly with t   (half_log_snr)
(4)  x_t = A x_s + B z,  A = alpha_t / alpha_s,  B^2 = sigma_t^2 (1 - exp(2 (lambda_t - lambda_s)))   (transition)
(5)  x_s | x_t, x0 ~ N(c_x x_t + c_0 x0, std^2),  std = eta sigma_s sqrt(1 - exp(2 (lambda_t - lambda_s))),
     c_x = sqrt(sigma_s^2 - std^2) / sigma_t,  c_0 = alpha_s - c_x alpha_t                       (posterior)
     With eta = 1 this is Bayes' rule for (1) and (4), the DDPM posterior (Ho et al. 2020, Eq. 7); any eta in [0, 1]
     keeps the marginals (DDIM, Song et al. 2021b, Eq. 12).

A network output F means a denoised sample through one row of two coefficients, evaluated at t:

(6)  x0 = a x_t + b F,   and so   noise = (x_t - alpha x0) / sigma,   score = -noise / sigma
(7)  F = ((1 - a alpha) / b) x0 - (a sigma / b) noise is the training target; an error in F is an error in x0 times b.

The probability-flow ODE and the reverse SDEs share their marginals (Song et al. 2021, Eq. 6 and 13):

(8)  dx/dt = velocity - eta^2/2 g^2 score + eta g dw,   velocity = alpha' x0 + sigma' noise = f x - g^2/2 score

eta = 0 is the ODE, eta = 1 the reverse SDE. In the coordinates y = x / c, u = sigma / c with c = alpha + k sigma the
ODE's solution for a constant denoised sample is a straight line, for any k:

(9)  dy/du = (x - c x0) / sigma

k = 0 is the frame of Karras et al. 2022 (Eq. 4); k = 1 stays finite where alpha = 0.

What is known about x_t beside the model (a class, a measurement y) adds to the score by Bayes' rule, and so to the
denoised sample:

(10) score(x | y) = score(x) + grad log p(y | x),   x0(x | y) = x0 + sigma^2 / alpha grad log p(y | x)

Numbers: times are floats or tensors of any shape on any device; what a path returns about them is a float64 tensor
(float32 where the device has no float64). States (images, latents) keep their own dtype.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .checks import check_choice


# Apple's GPUs
WITHOUT_FLOAT64 = {"mps"}


def finest(device):
    """float64, or on devices without it float32."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def as_time(t):
    """A float or tensor as a float64 tensor on its device (float32 on devices without float64)."""
    if not torch.is_tensor(t):
        return torch.tensor(t, dtype=torch.float64)
    return t.to(finest(t.device))


def expand_to(coefficient, x):
    """A coefficient per sample, shape () or (B,), shaped to multiply `x` of shape (B, ...), in the dtype of `x`; on its
    device, but for one number on the host, which no kernel waits for.

    Raises ValueError when the coefficient is neither a single number nor one per sample.
    """
    if coefficient.ndim > 1 or (coefficient.ndim == 1 and coefficient.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"times of shape {tuple(coefficient.shape)} do not fit a batch of shape {tuple(x.shape)}: "
            f"pass one time, or one per sample"
        )
    if x.device.type != "cpu" and is_one(coefficient):
        # an argument of the kernels
        return coefficient.reshape(-1)[0].to(x.dtype)
    return sent(coefficient, x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def expand_all(coefficients, x):
    """`expand_to` of several coefficients, which go from the host to another device as one tensor."""
    if x.device.type != "cpu" and coefficients[0].device.type == "cpu":
        coefficients = torch.stack(torch.broadcast_tensors(*coefficients))
        if coefficients.ndim == 2 and not is_one(coefficients):
            coefficients = sent(coefficients, x.device, x.dtype)
    return [expand_to(each, x) for each in coefficients]


def is_one(numbers):
    """Whether the host knows that numbers, () or (..., B), are the same for all of a batch."""
    if numbers.device.type != "cpu" or not numbers.is_floating_point():
        return False
    return numbers.ndim == 0 or bool((numbers == numbers[..., :1]).all())


def sent(numbers, device, dtype):
    """Numbers on a device, for whose work nobody waits."""
    numbers = numbers.to(dtype)
    if device.type == "cuda" and numbers.device.type == "cpu":
        # which the device reads by itself
        numbers = numbers.pin_memory()
    return moved(numbers, device)


def moved(tensor, device, dtype=None):
    """A tensor on a device, for whose work nobody waits."""
    # an Apple GPU would read memory that may be another's by then
    return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type != "mps")


class Path:
    """A noise path alpha(t), sigma(t). Subclasses state `alpha`, `alpha_prime`, `sigma`, `variance_prime` and
    `t_from_half_log_snr`; everything else derives from these.

    Attributes:
        t_min: the smallest time that training and sampling use unless told otherwise.
        t_max: the largest time at which every formula is finite: 1, or a little less where alpha(1) = 0.
        prior_std: standard deviation of the distribution that sampling starts from, at t = 1.
        straight: k of the coordinates (9) in which multi-stage ODE solvers work.
        levels: number of discrete noise levels, at t = 1/levels, 2/levels, ..., 1; None for a continuous path.
        betas: of the chain that these levels are of; None for a continuous path.
        time_input, time_offset: how a network of this path is told the time, unless configured: see `network_time`.
    """

    t_min = 1e-3
    t_max = 1.0
    prior_std = 1.0
    straight = 0.0
    levels: int | None = None
    betas: torch.Tensor | None = None
    time_input = "t"
    time_offset = 0.0
    # for code that has a path and cannot import this file, such as pipelines in a bundle
    expand_to = staticmethod(expand_to)

    def alpha(self, t):
        raise NotImplementedError

    def alpha_prime(self, t):
        raise NotImplementedError

    def sigma(self, t):
        raise NotImplementedError

    def variance_prime(self, t):
        """d sigma^2 / dt: finite at t = 0, where d sigma / dt may not be."""
        raise NotImplementedError

    def t_from_half_log_snr(self, half_log_snr):
        """The inverse of `half_log_snr`: the time at which log(alpha / sigma) has this value."""
        raise NotImplementedError

    def sigma_prime(self, t):
        return self.variance_prime(t) / (2 * self.sigma(t))

    def drift(self, t):
        """f(t) of the forward SDE dx = f x dt + g dw, Eq. (2)."""
        return self.alpha_prime(t) / self.alpha(t)

    def diffusion(self, t):
        """g(t) of the forward SDE, Eq. (2)."""
        return (self.variance_prime(t) - 2 * self.drift(t) * self.sigma(t) ** 2).clamp_min(0).sqrt()

    def half_log_snr(self, t):
        """log(alpha / sigma): half the logarithm of the signal-to-noise ratio, Eq. (3)."""
        return self.alpha(t).log() - self.sigma(t).log()

    def sample(self, x0, noise, t):
        """Draw x_t given x0 (B, ...), standard normal noise of the same shape, and t of shape () or (B,), Eq. (1)."""
        alpha, sigma = expand_all((self.alpha(t), self.sigma(t)), x0)
        return alpha * x0 + sigma * noise

    def transition(self, s, t):
        """(A, B) of x_t = A x_s + B z for s < t, Eq. (4)."""
        return self.alpha(t) / self.alpha(s), self.sigma(t) * self._variance_gain(s, t).sqrt()

    def posterior(self, t, s, eta=1.0):
        """(c_x, c_0, std) of x_s given x_t and x0 for s < t, Eq. (5); eta in [0, 1] scales the noise."""
        gain = self._variance_gain(s, t)
        c_x = self.sigma(s) / self.sigma(t) * (1 - eta**2 * gain).clamp_min(0).sqrt()
        return c_x, self.alpha(s) - c_x * self.alpha(t), eta * self.sigma(s) * gain.sqrt()

    def reverse_coefficients(self, t, eta=0.0):
        """(of_x, of_x0) of the reverse drift dx/dt = of_x x + of_x0 x0 of Eq. (8), with noise eta g."""
        of_x = self.sigma_prime(t) / self.sigma(t)
        if eta:
            # -score = x / sigma^2 - alpha / sigma^2 x0
            of_x = of_x + eta**2 * self.diffusion(t) ** 2 / (2 * self.sigma(t) ** 2)
        return of_x, self.alpha_prime(t) - of_x * self.alpha(t)

    def reverse_drift(self, x, denoised, t, eta=0.0):
        """dx/dt of Eq. (8) without its noise, given the denoised sample: the velocity of the ODE for eta = 0, the drift
        of the reverse SDE for 1; t of shape () or (B,)."""
        of_x, of_x0 = expand_all(self.reverse_coefficients(t, eta), x)
        return of_x * x + of_x0 * denoised

    def straight_coordinates(self, t, slope=None):
        """(c, u) of the coordinates (9) in which the ODE's solution for a constant denoised sample is straight; `slope`
        is their k, None for the path's own."""
        sigma = self.sigma(t)
        c = self.alpha(t) + (self.straight if slope is None else slope) * sigma
        return c, sigma / c

    def straight_velocity(self, x, denoised, t, slope=None):
        """dy/du of Eq. (9), shape of x (B, ...), given the denoised sample; t of shape () or (B,)."""
        c, sigma = expand_all((self.straight_coordinates(t, slope)[0], self.sigma(t)), x)
        return (x - c * denoised) / sigma

    def t_from_straight(self, u, slope=None):
        """The time at which the coordinate u of (9) has this value."""
        slope = self.straight if slope is None else slope
        return self.t_from_half_log_snr((1 - slope * u).log() - u.log())

    def add_to_score(self, denoised, gradient, t):
        """The denoised sample (B, ...) when `gradient`, of the same shape, is added to the score, Eq. (10); t of shape
        () or (B,). Where alpha = 0, x_t says nothing about x0, and nothing is added."""
        alpha = self.alpha(t)
        gain = torch.where(alpha > 0, self.sigma(t) ** 2 / alpha, 0.0)
        return denoised + expand_to(gain, denoised) * gradient

    def gaussian_gain(self, t, data_std):
        """k of E[x0 | x_t] = alpha k x_t and Var[x0 | x_t] = sigma^2 k, for Gaussian data of mean 0 with this standard
        deviation in every dimension."""
        return data_std**2 / (self.alpha(t) ** 2 * data_std**2 + self.sigma(t) ** 2)

    def unit_variance(self, x, t):
        """x_t / sqrt(alpha^2 + sigma^2), of unit variance for data of unit variance: with lambda, the same for every
        path."""
        return x * expand_to((self.alpha(t) ** 2 + self.sigma(t) ** 2).rsqrt(), x)

    def _variance_gain(self, s, t):
        """1 - exp(2 (lambda_t - lambda_s)), in [0, 1]: the share of sigma_t^2 that was added between s and t."""
        return -torch.expm1(2 * (self.half_log_snr(t) - self.half_log_snr(s)))


class _VariancePreserving(Path):
    """Paths with sigma^2 = 1 - alpha^2, given by `log_alpha`, its derivative, and the inverse of `log_alpha`."""

    def alpha(self, t):
        return self.log_alpha(t).exp()

    def alpha_prime(self, t):
        return self.log_alpha_prime(t) * self.alpha(t)

    def sigma(self, t):
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def variance_prime(self, t):
        return -2 * self.alpha(t) * self.alpha_prime(t)

    def t_from_half_log_snr(self, half_log_snr):
        return self._t_from_log_alpha(-torch.nn.functional.softplus(-2 * as_time(half_log_snr)) / 2)


class VPSDE(_VariancePreserving):
    """Variance-preserving SDE with a linear beta(t) (Song et al. 2021, Eq. 33; appendix C)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 < beta_min < beta_max:
            raise ValueError(f"0 < beta_min < beta_max is needed; got beta_min={beta_min}, beta_max={beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_alpha(self, t):
        t = as_time(t)
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def log_alpha_prime(self, t):
        return -(self.beta_min + as_time(t) * (self.beta_max - self.beta_min)) / 2

    def _t_from_log_alpha(self, log_alpha):
        linear, quadratic = self.beta_min / 2, (self.beta_max - self.beta_min) / 4
        return -2 * log_alpha / (linear + (linear**2 - 4 * quadratic * log_alpha).sqrt())


class SubVPSDE(VPSDE):
    """Sub-VP SDE: the alpha of `VPSDE`, sigma = 1 - alpha^2 (Song et al. 2021, Eq. 34-35)."""

    def sigma(self, t):
        return -torch.expm1(2 * self.log_alpha(t))

    def variance_prime(self, t):
        return 2 * self.sigma(t) * super().variance_prime(t)

    def t_from_half_log_snr(self, half_log_snr):
        # alpha / (1 - alpha^2) = exp(lambda), solved for log alpha
        return self._t_from_log_alpha(-torch.asinh(torch.exp(-as_time(half_log_snr)) / 2))


class CosineVPSDE(_VariancePreserving):
    """Cosine schedule, alpha(t) = cos(angle(t)) / cos(angle(0)), angle(t) = (t + offset) / (1 + offset) pi/2
    (Nichol & Dhariwal 2021, Eq. 17). alpha(1) = 0 exactly."""

    t_max = 0.999
    straight = 1.0

    def __init__(self, offset: float = 0.008):
        if offset <= 0:
            raise ValueError(f"offset must be positive; got {offset}")
        self.rate = math.pi / 2 / (1 + offset)
        self.angle_0 = self.rate * offset

    def alpha(self, t):
        # sin of the angle left to pi/2: exactly 0 at t = 1
        return torch.sin(self.rate * (1 - as_time(t))) / math.cos(self.angle_0)

    def alpha_prime(self, t):
        return -self.rate * torch.cos(self.rate * (1 - as_time(t))) / math.cos(self.angle_0)

    def sigma(self, t):
        # sin(x - y) sin(x + y) = cos(y)^2 - cos(x)^2, without its cancellation at t = 0
        turned = self.rate * as_time(t)
        return (torch.sin(turned) * torch.sin(turned + 2 * self.angle_0)).sqrt() / math.cos(self.angle_0)

    def t_from_half_log_snr(self, half_log_snr):
        alpha2, sigma2 = torch.sigmoid(2 * as_time(half_log_snr)), torch.sigmoid(-2 * as_time(half_log_snr))
        cos0, sin0 = math.cos(self.angle_0), math.sin(self.angle_0)
        angle = torch.atan2((sin0**2 + sigma2 * cos0**2).sqrt(), alpha2.sqrt() * cos0)
        return (angle - self.angle_0) / self.rate


def _linear_betas(n, start, end):
    return torch.linspace(start, end, n, dtype=torch.float64)


def _scaled_linear_betas(n, start, end):
    return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2


def _cosine_betas(n, start, end):
    alpha2 = CosineVPSDE().alpha(torch.arange(n + 1, dtype=torch.float64) / n) ** 2
    return (1 - alpha2[1:] / alpha2[:-1]).clamp_max(0.999)


def _sigmoid_betas(n, start, end):
    # GeoDiff (Xu et al. 2022)
    return torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64)) * (end - start) + start


def _exponential_betas(n, start, end):
    return torch.full((n,), -math.expm1(-12 / n), dtype=torch.float64)


def _laplace_betas(n, start, end):
    # a Laplace distribution of log SNR (Hang et al. 2024), of which diffusers takes the root twice
    t = torch.arange(n + 1, dtype=torch.float64) / n
    side = torch.where(t <= 0.5, 1.0, -1.0)
    alpha2 = torch.sigmoid(-side / 2 * torch.log(1 - 2 * (0.5 - t).abs() + 1e-6)).sqrt()
    return (1 - alpha2[1:] / alpha2[:-1]).clamp_max(0.999)


def wuerstchen_betas(n, start=None, end=None, offset=0.008, scaler=1.0):
    """Those of Wuerstchen's cosine path (Pernias et al. 2024) at n times: alpha^2 is kept between 1e-4 and 0.9999, and
    time is warped for a scaler other than 1."""
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    warped = 1 - (1 - t) ** scaler if scaler > 1 else t**scaler
    alpha2 = (CosineVPSDE(offset).alpha(warped) ** 2).clamp(1e-4, 0.9999)
    # levels fall strictly, also where they are kept
    return (1 - alpha2 / torch.cat([torch.ones(1).to(alpha2), alpha2[:-1]])).clamp_min(1e-12)


# of the stock schedulers of diffusers: (number of levels, beta_start, beta_end) -> betas
BETA_SCHEDULES = {
    "linear": _linear_betas,
    "scaled_linear": _scaled_linear_betas,
    "squaredcos_cap_v2": _cosine_betas,
    "sigmoid": _sigmoid_betas,
    "exp": _exponential_betas,
    "laplace": _laplace_betas,
    "wuerstchen": wuerstchen_betas,
}


class DiscreteVPSDE(_VariancePreserving):
    """The DDPM chain of N betas (Ho et al. 2020) as a continuous path through its N noise levels: level n = 0..N-1 of
    the chain is t = (n + 1) / N, with alpha^2 = prod_{i <= n} (1 - beta_i), and t = 0 is clean data.

    Between the levels log alpha is a monotone cubic (Fritsch & Carlson 1980), so the path is continuously
    differentiable and invertible. Where the last level has no signal, a last beta of 1, alpha falls to 0 in the last
    segment as 1 - x does, x in [0, 1] the position in it: there log alpha is a cubic plus log(1 - x).

    Args:
        betas: N >= 2 numbers in (0, 1), or N >= 3 of which the last is 1.
    """

    time_offset = -1.0

    def __init__(self, betas):
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        self._ends_in_noise = betas.ndim == 1 and len(betas) > 2 and bool(betas[-1] == 1)
        inside = betas[:-1] if self._ends_in_noise else betas
        if betas.ndim != 1 or len(betas) < 2 or not ((inside > 0) & (inside < 1)).all():
            values = f", with values from {betas.min():g} to {betas.max():g}" if betas.numel() else ""
            raise ValueError(
                f"betas must be at least two numbers in (0, 1), of more the last may be 1; got shape "
                f"{tuple(betas.shape)}{values}"
            )
        self.betas, self.levels = betas, len(betas)
        self.t_min = 1 / self.levels
        knots = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-inside).cumsum(0) / 2])
        # of the cubic, per segment
        slopes = _monotone_slopes(knots * self.levels) / self.levels
        begins, ends = slopes[:-1], slopes[1:]
        if self._ends_in_noise:
            self.t_max, self.straight = 1 - 1 / self.levels, 1.0
            # with the slope -1 of log(1 - x) that of the segment before; steeper ones would not fall everywhere
            rest = (slopes[-1:] + 1).clamp_min(-8)
            knots, begins, ends = (torch.cat(pair) for pair in ((knots, knots[-1:]), (begins, rest), (ends, -rest)))
        self._knots, self._slopes = knots, (begins, ends)
        self._tables: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}

    @classmethod
    def from_beta_schedule(
        cls,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas=None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        exact_zero_snr: bool = False,
    ):
        """The path of a stock diffusers scheduler: the same arguments give the same noise levels.

        `snr_shift_scale` divides the signal-to-noise ratio of every level, as CogVideoX does. `rescale_betas_zero_snr`
        shifts the last level to (almost) no signal (Lin et al. 2023, algorithm 1); as in diffusers' Euler and
        DPM-Solver schedulers, its alpha^2 is 2^-24 instead of 0; or a quarter of the level's before it, where
        that is no more than this. With `exact_zero_snr` it is 0, as in diffusers' DDIM and DDPM. Raises ValueError for
        an unknown schedule, and for `exact_zero_snr` without the shift.
        """
        if exact_zero_snr and not rescale_betas_zero_snr:
            raise ValueError("exact_zero_snr=True needs rescale_betas_zero_snr=True: pass both, or neither")
        n = num_train_timesteps
        if trained_betas is not None:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64)
        else:
            check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
            betas = BETA_SCHEDULES[beta_schedule](n, beta_start, beta_end)
        if rescale_betas_zero_snr or snr_shift_scale != 1:
            alpha2 = (1 - betas).cumprod(0)
            alpha = (alpha2 / (snr_shift_scale + (1 - snr_shift_scale) * alpha2)).sqrt()
            if rescale_betas_zero_snr:
                alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
                tiny = 2.0**-12 if alpha[-2] > 2.0**-12 else alpha[-2] / 2
                alpha[-1] = 0.0 if exact_zero_snr else tiny
            betas = 1 - torch.cat([alpha[:1], alpha[1:] / alpha[:-1]]) ** 2
        return cls(betas)

    def log_alpha(self, t):
        log_alpha = _cubic(*self._segment(as_time(t)))
        return log_alpha + self._left(t).log() if self._ends_in_noise else log_alpha

    def log_alpha_prime(self, t):
        slope = self._cubic_prime(t)
        return slope - self._is_last(t) * self.levels / self._left(t) if self._ends_in_noise else slope

    def alpha_prime(self, t):
        if not self._ends_in_noise:
            return super().alpha_prime(t)
        # finite where log alpha is not
        rest = _cubic(*self._segment(as_time(t))).exp()
        return rest * (self._cubic_prime(t) * self._left(t) - self._is_last(t) * self.levels)

    def _cubic_prime(self, t):
        left, right, slope_left, slope_right, x = self._segment(as_time(t))
        rise = right - left
        cubic = 3 * x * (slope_left + slope_right - 2 * rise)
        return self.levels * (slope_left + x * (2 * (3 * rise - 2 * slope_left - slope_right) + cubic))

    def _is_last(self, t):
        """1 in the last segment, 0 before it."""
        t = as_time(t)
        return (t * self.levels >= self.levels - 1).to(t.dtype)

    def _left(self, t):
        """1 - x in the last segment, 1 before it."""
        return (self.levels - as_time(t) * self.levels).clamp(0, 1)

    def _segment(self, t):
        """Ends, end slopes (per segment) and position in [0, 1] of the segment that holds t."""
        index = (t * self.levels).floor().clamp(0, self.levels - 1).long()
        return *self._ends(index, t.dtype), t * self.levels - index

    def _ends(self, index, dtype):
        knots, begins, ends = self._table(index.device, dtype)
        # an index of one number would be read by the host
        return knots.take(index), knots.take(index + 1), begins.take(index), ends.take(index)

    def _table(self, device, dtype):
        """The knots and the slopes per segment, which are sent to a device once."""
        if (device, dtype) not in self._tables:
            self._tables[device, dtype] = [each.to(device, dtype) for each in (self._knots, *self._slopes)]
        return self._tables[device, dtype]

    def _t_from_log_alpha(self, log_alpha):
        # bisection inside the segment: log_alpha(t) is monotone, and 60 halvings exhaust float64
        knots, *_ = self._table(log_alpha.device, log_alpha.dtype)
        index = torch.searchsorted(-knots, -log_alpha.contiguous(), right=True) - 1
        index = index.clamp(0, self.levels - 1)
        ends = self._ends(index, log_alpha.dtype)
        low, width = torch.zeros_like(log_alpha), 1.0
        falls = (index == self.levels - 1).to(low) if self._ends_in_noise else torch.zeros_like(low)
        for _ in range(60):
            width /= 2
            reached = _cubic(*ends, low + width) + torch.log1p(-falls * (low + width))
            low = torch.where(reached > log_alpha, low + width, low)
        return (index + low) / self.levels


def _cubic(left, right, slope_left, slope_right, x):
    """The cubic from left to right, with these slopes there, at x in [0, 1]."""
    rise = right - left
    return left + x * (
        slope_left + x * (3 * rise - 2 * slope_left - slope_right + x * (slope_left + slope_right - 2 * rise))
    )


def _monotone_slopes(values):
    """Slopes d value / d t at knots t = 0, 1/N, ..., 1 for a monotone cubic; `values` are N times the knot values.

    Harmonic means inside, one-sided three-point slopes at the ends, limited so that the cubic stays monotone
    (Fritsch & Carlson 1980; Fritsch & Butland 1984).
    """
    secants = values.diff()
    inner = 2 * secants[1:] * secants[:-1] / (secants[1:] + secants[:-1])

    def end(first, second):
        # same sign as the secant, at most three times as steep
        slope = (3 * first - second) / 2
        return torch.where(
            slope * first <= 0, 0.1 * first, torch.where(slope.abs() > 3 * first.abs(), 3 * first, slope)
        )

    return torch.cat([end(secants[0], secants[1])[None], inner, end(secants[-1], secants[-2])[None]])


class VESDE(Path):
    """Variance-exploding SDE, alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, Eq. 30-31).

    Convention at t = 0: sigma(0) = sigma_min, as in the original code, so t = 0 is data with noise sigma_min, and
    clean data is reached by a final denoising.
    """

    t_min = 1e-5

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed; got sigma_min={sigma_min}, sigma_max={sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.prior_std = sigma_max
        self.rate = math.log(sigma_max / sigma_min)

    def alpha(self, t):
        return torch.ones_like(as_time(t))

    def alpha_prime(self, t):
        return torch.zeros_like(as_time(t))

    def sigma(self, t):
        return self.sigma_min * torch.exp(self.rate * as_time(t))

    def variance_prime(self, t):
        return 2 * self.rate * self.sigma(t) ** 2

    def t_from_half_log_snr(self, half_log_snr):
        return (-as_time(half_log_snr) - math.log(self.sigma_min)) / self.rate


class EDMSDE(Path):
    """The path of Karras et al. 2022: alpha = 1, sigma = t in units of the largest noise, sigma(t) = sigma_max t.

    `sigma_min` is the smallest noise that is trained and sampled: t_min = sigma_min / sigma_max.
    """

    time_input = "log_sigma"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed; got sigma_min={sigma_min}, sigma_max={sigma_max}")
        self.sigma_max = sigma_max
        self.prior_std = sigma_max
        self.t_min = sigma_min / sigma_max

    def alpha(self, t):
        return torch.ones_like(as_time(t))

    def alpha_prime(self, t):
        return torch.zeros_like(as_time(t))

    def sigma(self, t):
        return self.sigma_max * as_time(t)

    def variance_prime(self, t):
        return 2 * self.sigma_max**2 * as_time(t)

    def t_from_half_log_snr(self, half_log_snr):
        return torch.exp(-as_time(half_log_snr)) / self.sigma_max


class LinearSDE(Path):
    """The straight path of flow matching, alpha = 1 - t, sigma = t (Lipman et al. 2023; SiT, Ma et al. 2024)."""

    t_max = 0.999
    straight = 1.0

    def alpha(self, t):
        return 1 - as_time(t)

    def alpha_prime(self, t):
        return -torch.ones_like(as_time(t))

    def sigma(self, t):
        return as_time(t).clone()

    def variance_prime(self, t):
        return 2 * as_time(t)

    def t_from_half_log_snr(self, half_log_snr):
        return torch.sigmoid(-as_time(half_log_snr))


SDE_TYPES: dict[str, Callable[..., Path]] = {
    "vp": VPSDE,
    "subvp": SubVPSDE,
    "ve": VESDE,
    "cosine_vp": CosineVPSDE,
    "discrete_vp": DiscreteVPSDE.from_beta_schedule,
    "edm": EDMSDE,
    "linear": LinearSDE,
}


def build_path(sde_type, config) -> Path:
    """The path of this type with the parameters that `config` holds, a mapping that may hold others too; None and False
    stand for the path's own defaults.

    Raises ValueError for a parameter that only other paths have, and for values that fit no path.
    """
    build = SDE_TYPES[sde_type]
    allowed = inspect.signature(build).parameters
    of_paths = {name for other in SDE_TYPES.values() for name in inspect.signature(other).parameters}
    given = {
        name: config[name]
        for name in of_paths & config.keys()
        if config[name] is not None and config[name] is not False
    }
    unknown = given.keys() - allowed.keys() - {"num_train_timesteps"}
    if unknown:
        raise ValueError(
            f"sde_type {sde_type!r} has no parameter {', '.join(sorted(unknown))}; it has {', '.join(allowed)}"
        )
    path = build(**{name: value for name, value in given.items() if name in allowed})
    if path.levels not in (None, config["num_train_timesteps"]):
        raise ValueError(
            f"trained_betas holds {path.levels} levels, num_train_timesteps is {config['num_train_timesteps']}"
        )
    return path


# --- what a network predicts ------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """One row at given times: x0 = a x_t + b F(input_scale x_t), Eq. (6); float64 tensors of the times' shape."""

    a: torch.Tensor
    b: torch.Tensor
    input_scale: torch.Tensor


def _epsilon(path, t, sigma_data):
    return 1 / path.alpha(t), -path.sigma(t) / path.alpha(t)


def _sample(path, t, sigma_data):
    return torch.zeros_like(path.alpha(t)), torch.ones_like(path.alpha(t))


def _score(path, t, sigma_data):
    return 1 / path.alpha(t), path.sigma(t) ** 2 / path.alpha(t)


def _v_prediction(path, t, sigma_data):
    # v = alpha noise - sigma x0 (Salimans & Ho 2022)
    alpha, sigma = path.alpha(t), path.sigma(t)
    norm = alpha**2 + sigma**2
    return alpha / norm, -sigma / norm


def _flow_prediction(path, t, sigma_data):
    # F = alpha' x0 + sigma' noise (Lipman et al. 2023)
    alpha, sigma, alpha_prime, sigma_prime = path.alpha(t), path.sigma(t), path.alpha_prime(t), path.sigma_prime(t)
    norm = sigma_prime * alpha - sigma * alpha_prime
    return sigma_prime / norm, -sigma / norm


def _edm(path, t, sigma_data):
    # c_skip and c_out of Karras et al. 2022, Table 1, for any alpha
    gain = path.gaussian_gain(t, sigma_data)
    return path.alpha(t) * gain, path.sigma(t) * gain.sqrt()


def _negative(row):
    """The row of the same output with the other sign."""

    def negative(path, t, sigma_data):
        a, b = row(path, t, sigma_data)
        return a, -b

    return negative


def _edm_consistency(path, t, sigma_data):
    # c_skip and c_out of Song et al. 2023, appendix C, are those of the sample at t_min to which this one leads
    kappa, least = (torch.exp(-path.half_log_snr(each)) for each in (as_time(t), path.t_min))
    beyond = kappa - least
    skip = (sigma_data**2 - least * beyond) / (beyond**2 + sigma_data**2)
    return skip / path.alpha(t), _edm(path, t, sigma_data)[1]


# those of a network whose input is scaled
SCALED_INPUT = ("edm", "edm_v_prediction", "edm_consistency")
PREDICTIONS = {
    "epsilon": _epsilon,
    "sample": _sample,
    # its old name in diffusers
    "original_sample": _sample,
    "score": _score,
    "v_prediction": _v_prediction,
    "flow_prediction": _flow_prediction,
    # from noise to data: of Mochi and OmniGen
    "inverted_flow_prediction": _negative(_flow_prediction),
    "edm": _edm,
    # of diffusers' EDM schedulers and SVD
    "edm_v_prediction": _negative(_edm),
    "edm_consistency": _edm_consistency,
}


def prediction(path, prediction_type, t, sigma_data=0.5):
    """The row of a prediction type at times t, as a `Prediction`.

    Args:
        prediction_type: epsilon (the noise), sample or original_sample (x0), score, v_prediction, flow_prediction (the
            velocity), inverted_flow_prediction (its negative), edm: the preconditioned output of Karras et al. 2022,
            whose input is scaled to unit variance, edm_v_prediction, its negative, or edm_consistency: the same of the
            consistency models of Song et al. 2023, which change nothing at t_min.
        sigma_data: standard deviation of the data, used by edm only.
    """
    a, b = PREDICTIONS[prediction_type](path, t, sigma_data)
    input_scale = torch.ones_like(a)
    if prediction_type in SCALED_INPUT:
        input_scale = (path.alpha(t) ** 2 * sigma_data**2 + path.sigma(t) ** 2).rsqrt()
    return Prediction(a, b, input_scale)


def training_target(path, prediction_type, x0, noise, t, sigma_data=0.5):
    """What the network should output at x_t = path.sample(x0, noise, t), Eq. (7): shape and dtype of x0."""
    row = prediction(path, prediction_type, t, sigma_data)
    c_x0, c_noise = expand_all(target_coefficients(row, path.alpha(t), path.sigma(t)), x0)
    return c_x0 * x0 + c_noise * noise


def target_coefficients(row, alpha, sigma):
    """Those of x0 and of the noise in Eq. (7), for a `Prediction` where alpha and sigma have these values."""
    return (1 - row.a * alpha) / row.b, -row.a * sigma / row.b


# --- how a network is told the time -----------------------------------------------------------------------------------


TIME_INPUTS = ("t", "sigma", "log_sigma", "atan_sigma")


def network_time(path, t, time_input, scale, offset):
    """The number that the network receives at path time t: scale * q + offset, float64.

    q is t; or sigma, the noise of x_t / alpha (for alpha = 1 the path's own sigma, as NCSN++ receives it); or its
    natural logarithm (Karras et al. 2022 receive log(sigma) / 4) or arc tangent (Stable Audio receives 2 / pi of it).
    """
    if time_input == "t":
        return scale * as_time(t) + offset
    log_sigma = -path.half_log_snr(t)
    if time_input == "log_sigma":
        return scale * log_sigma + offset
    return scale * (log_sigma.exp() if time_input == "sigma" else log_sigma.exp().atan()) + offset


def path_time(path, timestep, time_input, scale, offset):
    """The inverse of `network_time`: path time in [0, 1], float64."""
    value = (as_time(timestep) - offset) / scale
    if time_input == "t":
        return value
    if time_input == "atan_sigma":
        value = value.tan()
    return path.t_from_half_log_snr(-(value if time_input == "log_sigma" else value.log()))


# --- time grids -------------------------------------------------------------------------------------------------------

# Each takes (path, n, t_min, t_max, and options by name) and returns n falling times of network evaluations; the step
# after the last one leads to the end of the trajectory. The option `levels` is the number of training time steps, in
# which diffusers' grids count; a discrete path is evaluated at whole levels by these.


def _whole(path, level):
    return level.round() if path.levels else level


def _linspace(path, n, t_min, t_max, *, levels, open_end=False, whole_levels=True, **_):
    # diffusers counts levels from 0: rounding there, not at t * levels, makes ties fall the same way
    level = torch.linspace(t_max * levels - 1, t_min * levels - 1, n + open_end, dtype=torch.float64)[:n]
    if whole_levels or not path.levels:
        return (_whole(path, level) + 1) / levels
    # between two levels their sigma / alpha, on the line between them
    lower, upper = (torch.exp(-path.half_log_snr((end + 1) / levels)) for end in (level.floor(), level.ceil()))
    sigma = torch.lerp(lower, upper, level.frac())
    return torch.where(level.frac() > 0, path.t_from_half_log_snr(-sigma.log()), (level + 1) / levels)


def _leading(path, n, t_min, t_max, *, levels, offset=0, open_end=False, **_):
    level = torch.arange(n + open_end - 1, -1, -1, dtype=torch.float64)[:n] * (levels // (n + open_end)) + offset
    return (level + 1) / levels


def _trailing(path, n, t_min, t_max, *, levels, **_):
    level = t_max * levels * (1 - torch.arange(n, dtype=torch.float64) / n)
    return _whole(path, level) / levels


def _to_zero(path, n, t_min, t_max, **_):
    return t_max * (1 - torch.arange(n, dtype=torch.float64) / n)


def _uniform(path, n, t_min, t_max, **_):
    return torch.linspace(t_max, t_min, n, dtype=torch.float64)


def _quadratic(path, n, t_min, t_max, **_):
    return torch.linspace(t_max**0.5, t_min**0.5, n, dtype=torch.float64) ** 2


# in u = sigma / (alpha + slope sigma) of (9): for slope 0 the noise level of x / alpha, for 1 on the linear path sigma


def _ends(path, t_min, t_max, slope):
    return [float(path.straight_coordinates(t, slope)[1]) for t in (t_max, t_min)]


def _karras(path, n, t_min, t_max, *, rho=7.0, slope=0.0, **_):
    # Karras et al. 2022, Eq. 5
    ends = [u ** (1 / rho) for u in _ends(path, t_min, t_max, slope)]
    return path.t_from_straight(torch.linspace(*ends, n, dtype=torch.float64) ** rho, slope)


def _log_snr(path, n, t_min, t_max, *, slope=0.0, **_):
    ends = [math.log(u) for u in _ends(path, t_min, t_max, slope)]
    return path.t_from_straight(torch.linspace(*ends, n, dtype=torch.float64).exp(), slope)


def _straight(path, n, t_min, t_max, *, to_data=True, **_):
    # equal steps of a flow map, the last of which leads to t_min
    ends = _ends(path, t_min, t_max, 1.0)
    return path.t_from_straight(torch.linspace(*ends, n + to_data, dtype=torch.float64)[:n], 1.0)


def karras_level_times(path, numbers, t_min, t_max, levels, rho=7.0):
    """The times of levels of karras by their numbers, 0 at t_max to levels - 1 at t_min, float64."""
    begin, end = (u ** (1 / rho) for u in _ends(path, t_min, t_max, 0.0))
    share = numbers.to(torch.float64) / max(levels - 1, 1)
    return path.t_from_straight((begin + share * (end - begin)) ** rho, 0.0)


def _karras_levels(path, n, t_min, t_max, *, levels, rho=7.0, to_data=True, **_):
    # of the levels of karras every so many, as diffusers' CMStochasticIterativeScheduler has them
    steps = n if to_data else n - 1
    times = karras_level_times(path, torch.arange(steps) * (levels // steps), t_min, t_max, levels, rho)
    return times if to_data else torch.cat([times, torch.full((1,), t_min).to(times)])


def _skipping(path, n, t_min, t_max, *, levels, original=None, strength=1.0, to_data=True, **_):
    # of the first of `original` equal steps every so many, as diffusers' LCM and TCD schedulers have them
    steps, original = n if to_data else n - 1, original or levels
    size = levels // original
    most = min(int(t_max * levels / size + 1e-9), int(original * strength))
    if steps > most:
        share = f" at strength {strength:g}" if strength < 1 else ""
        raise ValueError(
            f"{steps} time steps are more than the {most} of {original} original_inference_steps{share}: use fewer, or "
            f"more of the original ones"
        )
    times = (most - (torch.arange(steps, dtype=torch.float64) * (most / steps)).floor()) * size / levels
    return times if to_data else torch.cat([times, torch.full((1,), t_min).to(times)])


def _beta_sigmas(path, n, t_min, t_max, *, slope=0.0, **_):
    first, last = _ends(path, t_min, t_max, slope)
    share = _beta_quantile(torch.linspace(1, 0, n, dtype=torch.float64), 0.6)
    return path.t_from_straight(last + (first - last) * share, slope)


def _logistic(path, n, t_min, t_max, *, center=0.4, width=1.2, tail=0.5, **_):
    # n - 1 equal shares of the logistic distribution of lambda, and a last one, `tail` times as large, to clean data
    first, last = (torch.sigmoid((path.half_log_snr(as_time(t)) - center) / width) for t in (t_max, t_min))
    last = torch.minimum(last, first + (1 - first) * (n - 1) / (n - 1 + tail))
    share = first + (last - first) * torch.linspace(0, 1, n, dtype=torch.float64)
    return path.t_from_half_log_snr(center + width * torch.logit(share))


def _beta(path, n, t_min, t_max, *, levels, **_):
    # quantiles of Beta(0.6, 0.6), dense at both ends (Lee et al. 2024)
    return t_min + (t_max - t_min) * _beta_quantile(torch.linspace(1, 0, n, dtype=torch.float64), 0.6)


def _beta_quantile(share, concentration, points=4096):
    """The inverse of the distribution function of Beta(concentration, concentration)."""
    # in v = x^concentration the density (1 - x)^(concentration - 1) has no singularity up to the median
    v = torch.linspace(0, 0.5**concentration, points + 1, dtype=torch.float64)
    mass = torch.cumulative_trapezoid((1 - v ** (1 / concentration)) ** (concentration - 1), v)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), mass / (2 * mass[-1])])
    lower = torch.minimum(share, 1 - share)
    right = torch.searchsorted(mass, lower).clamp(1, points)
    inside = (lower - mass[right - 1]) / (mass[right] - mass[right - 1])
    quantile = torch.lerp(v[right - 1], v[right], inside) ** (1 / concentration)
    return torch.where(share > 0.5, 1 - quantile, quantile)


TIME_GRIDS: dict[str, Callable[..., torch.Tensor]] = {
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
    "to_zero": _to_zero,
    "uniform": _uniform,
    "quadratic": _quadratic,
    "karras": _karras,
    "log_snr": _log_snr,
    "logistic": _logistic,
    "beta": _beta,
    "beta_sigmas": _beta_sigmas,
    "straight": _straight,
    "karras_levels": _karras_levels,
    "skipping": _skipping,
}


def shifted(path, times, shift):
    """The times at which lambda is lower by log(shift), on the linear path shift sigma / (1 + (shift - 1) sigma) (Esser
    et al. 2024, Eq. 23). With shift > 1 a grid has more times at much noise; the path stays what it is."""
    if shift == 1:
        return times
    moved_times = path.t_from_half_log_snr(path.half_log_snr(times) - math.log(shift))
    return torch.where(times >= 1, times, moved_times)


def time_grid(path, spacing, n, t_min, t_max, *, levels, **options):
    """n strictly falling times in (0, 1] at which the network is evaluated, a float64 tensor.

    Args:
        spacing: linspace (uniform in t from t_max to t_min), leading and trailing: as in diffusers, in whole levels on
            a discrete path; to_zero (equal steps from t_max to 0), uniform (in t), quadratic (uniform in sqrt(t)),
            karras, log_snr (uniform in lambda), logistic (equal shares of a logistic distribution of lambda; where it
            ends depends on n), beta (quantiles of Beta(0.6, 0.6) in t), beta_sigmas (the same in sigma / alpha),
            straight (equal steps of sigma / (alpha + sigma), the last of which leads to t_min), karras_levels (of
            `levels` levels of karras every so many), or skipping (of the first int(original * strength) of `original`
            equal steps every so many).
        levels: number of training time steps, in which leading, trailing and linspace count.
        offset: added to the levels of leading (diffusers' steps_offset).
        open_end: linspace and leading are those of n + 1 levels without the last.
        whole_levels: linspace is rounded to whole levels on a discrete path; otherwise sigma / alpha is interpolated
            between levels.
        slope: karras, log_snr and beta_sigmas are grids of sigma / (alpha + slope sigma).
        rho: exponent of karras and karras_levels.
        original, strength: of skipping.
        to_data: straight, karras_levels and skipping have n evaluations; otherwise the last of the n times is t_min,
            where a trajectory ends without one.
        center, width, tail: of logistic; `tail` is the share of lambda that is left to the last step, to clean data,
            in units of the other steps' shares.

    Raises ValueError when the grid does not fall strictly inside (0, 1], naming n and the spacing.
    """
    times = TIME_GRIDS[spacing](path, n, t_min, t_max, levels=levels, **options)
    # a curved grid passes through its ends only up to rounding
    times = torch.where((times - t_max).abs() < 1e-9, t_max, times)
    if not (torch.isfinite(times).all() and (times.diff() < 0).all() and times[-1] > 0 and times[0] <= 1):
        raise ValueError(
            f"{n} time steps with timestep_spacing {spacing!r} do not fall strictly from {t_max:g} to {t_min:g} "
            f"({levels} training time steps): use fewer steps, or another spacing"
        )
    return times
