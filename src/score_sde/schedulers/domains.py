r"""Domains: what differs from flat space where data are angles, lie in a box, or on a sphere.

On a domain the forward process dx = g dw is Brownian motion that stays there, and what was N(x0, sigma^2) is the heat
kernel K(x | x0, sigma) of variance sigma^2 (De Bortoli et al. 2022; Lou & Ermon 2023). For large sigma it is uniform.

(1)  score = grad log p_t, a tangent vector at x; that of the kernel is the target of denoising score matching
(2)  dx = -(1 + eta^2) / 2 g^2 score dt + eta g dw, backwards: reverse SDE (eta = 1), probability-flow ODE (eta = 0)

An angle is the line rolled up, the box [-1, 1] the line folded up (a mirror at each wall): their kernels are sums of
normal densities over the images of x0,

(3)  K = sum_m sum_delta N(delta + m P; 0, sigma^2) = 1/P sum_delta (1 + 2 sum_k e^(-(w k sigma)^2 / 2) cos(w k delta))

with w = 2 pi / P, the period P, 2 pi of an angle and 4 of the box, and delta = x - x0, in the box also x + x0 - 2. The
first is used below sigma = P / sqrt(2 pi), the second above: what 7 images or 3 cosines leave out is under 1e-15 of the
density. The sphere's kernel is in `sphere_kernel`.

Samples are (B, C, ...): of an angle or a box every number is a coordinate of its own; of the sphere S^(C - 1) every
vector along axis 1 is a point. Everything about kernels is worked out in float64 (float32 where the device has none).
"""

import math
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from .checks import check_choice, check_number
from .paths import as_time, expand_to, finest
from .sphere_kernel import LARGEST_N, heat_kernel, log_volume, radius


class Domain:
    """A region or manifold. Subclasses state `wrap`, `check`, `from_normal`, `kernel` and `log_volume`; one that is
    not the line rolled or folded up also the rest.

    Attributes:
        sigma_min, sigma_max: noise levels of the path unless told otherwise. At sigma_max the kernel is uniform to a
            total variation of 3e-6 for each angle, coordinate or point.
    """

    sigma_min = 0.01
    sigma_max = 5.0

    def wrap(self, x):
        """x (B, C, ...) of the space around as points of the domain; points of it stay what they are, on the sphere up
        to rounding."""
        raise NotImplementedError

    def check(self, x):
        """Raise ValueError for values (B, C, ...) that are not finite or outside of the domain, with what they seem to
        be."""
        raise NotImplementedError

    def from_normal(self, noise):
        """Uniform points for standard normal noise (B, C, ...), each a function of its own noise."""
        raise NotImplementedError

    def kernel(self, x, x0, sigma):
        """log K(x | x0, sigma), (B,), and its gradient by x, tangent vectors (B, C, ...), both float64.

        Args: x, x0: points of the domain, (B, C, ...). sigma: () or (B,).
        """
        raise NotImplementedError

    def log_kernel(self, x, x0, sigma):
        """log K(x | x0, sigma), (B,) float64."""
        return self.kernel(x, x0, sigma)[0]

    def score(self, x, x0, sigma):
        """grad log K(x | x0, sigma) by x, tangent vectors (B, C, ...) in the dtype of x."""
        return self.kernel(x, x0, sigma)[1].to(x.dtype)

    def log_volume(self, shape):
        """Logarithm of the volume of the domain of samples of a shape (B, C, ...)."""
        raise NotImplementedError

    def dimensions(self, shape):
        """Dimensions of the domain of samples of a shape (B, C, ...)."""
        return math.prod(shape[1:])

    def log_prior(self, x):
        """Log density of what sampling begins with at points x (B, C, ...), (B,)."""
        return torch.full((len(x),), -self.log_volume(x.shape), dtype=finest(x.device), device=x.device)

    def perturb(self, x0, sigma, noise=None, generator=None):
        """A draw from K(. | x0, sigma) for points x0 (B, C, ...), sigma () or (B,), and standard normal noise of the
        shape of x0, given or drawn from the generator."""
        return self.step(x0, expand_to(as_time(sigma), x0) * _noise_like(x0, noise, generator))

    def prior(self, shape, generator=None, device=None, dtype=torch.float32):
        """Uniform points (B, C, ...); with a list of generators, each draws its own."""
        return self.from_normal(randn_tensor(shape, generator=generator, device=device, dtype=dtype))

    def tangent(self, x, vectors):
        """The part of vectors (B, C, ...) that is tangent at points x."""
        return vectors

    def tangent_noise(self, x, generator=None):
        """Standard normal noise in the tangent space at points x (B, C, ...)."""
        return self.tangent(x, _noise_like(x, None, generator))

    def step(self, x, tangent):
        """The end of the geodesic from points x along tangent vectors, its length theirs (the exponential map); it goes
        around, and is reflected at walls."""
        return self.wrap(x + tangent)

    def transport(self, x, tangent, vectors):
        """Tangent vectors at points x, carried along the geodesic of `step` (parallel transport)."""
        return vectors

    def lifted(self, x, vectors):
        """Tangent vectors at the points wrap(x) as they are at x (B, C, ...), in the space around. With it a field here
        becomes one there, whose flow, wrapped, is the flow here, and whose divergence is that of the field here."""
        return vectors


def _noise_like(x, noise, generator):
    if noise is None:
        return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return noise.to(x)


def _fine(x):
    return x.to(finest(x.device))


def _uniform(noise):
    """Standard normal numbers as uniform ones in (0, 1), `finest`."""
    return torch.special.ndtr(_fine(noise))


def check_finite(name, x):
    """Raise ValueError unless values are finite floating-point numbers."""
    if not torch.is_floating_point(x) or not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"samples ({name}) must be finite floating-point numbers; got {x.dtype}, {bad} not finite")


# --- angles and boxes -------------------------------------------------------------------------------------------------


def _wrapped_normals(deltas, sigma, period):
    """(log p, d log p / dx) of the sum of wrapped normal densities, Eq. (3), at the differences `deltas`, a list of
    float64 tensors that rise with x, in one period around 0."""
    switch = period / math.sqrt(2 * math.pi)
    # images
    narrow = sigma.clamp_max(switch)[..., None]
    shifts = period * torch.arange(-3, 4, dtype=sigma.dtype, device=sigma.device)
    images = torch.cat([delta[..., None] + shifts for delta in deltas], dim=-1)
    exponents = -(images**2) / (2 * narrow**2)
    log_near = torch.logsumexp(exponents, -1) - (narrow[..., 0] * math.sqrt(2 * math.pi)).log()
    near = -(exponents.softmax(-1) * images).sum(-1) / narrow[..., 0] ** 2
    # cosines
    wide, ratio, slope = sigma.clamp_min(switch), 0.0, 0.0
    for k in (1, 2, 3):
        rate = 2 * math.pi * k / period
        weight = 2 * torch.exp(-(rate**2) * wide**2 / 2)
        ratio = ratio + weight * sum((rate * delta).cos() for delta in deltas)
        slope = slope - weight * rate * sum((rate * delta).sin() for delta in deltas)
    density = len(deltas) + ratio
    is_near = sigma < switch
    return (
        torch.where(is_near, log_near, density.log() - math.log(period)),
        torch.where(is_near, near, slope / density),
    )


class _Interval(Domain):
    """What torus and box share: every number is a coordinate of its own, whose kernel is a sum over images."""

    period: float

    def deltas(self, x, x0):
        """The differences to x0 and, where there are walls, to its mirror image."""
        raise NotImplementedError

    def kernel(self, x, x0, sigma):
        x, x0 = _fine(x), _fine(x0)
        around = [(delta + self.period / 2) % self.period - self.period / 2 for delta in self.deltas(x, x0)]
        log_density, slope = _wrapped_normals(around, expand_to(as_time(sigma), x), self.period)
        return log_density.flatten(1).sum(1), slope


class Torus(_Interval):
    """Angles in radians in [-pi, pi), each a circle of its own: a torus of any dimension."""

    name = "torus"
    period = 2 * math.pi

    def wrap(self, x):
        around = torch.remainder(x + math.pi, 2 * math.pi) - math.pi
        inside = torch.where((x >= -math.pi) & (x < math.pi), x, around)
        # rounding may give pi
        return torch.where(inside >= math.pi, inside - 2 * math.pi, inside)

    def check(self, x):
        check_finite(self.name, x)
        largest, lowest = float(x.abs().max()), float(x.min())
        if largest <= math.pi * (1 + 1e-3):
            return
        remedy = "wrap them: scheduler.domain.wrap(x)"
        if largest > 2 * math.pi * (1 + 1e-3):
            remedy = "they seem to be degrees: torch.deg2rad(x)" if largest <= 360 else "they seem to be no angles"
        raise ValueError(
            f"angles must be radians in [-pi, pi); got values from {lowest:g} to {float(x.max()):g}: {remedy}"
        )

    def from_normal(self, noise):
        return self.wrap((2 * math.pi * _uniform(noise) - math.pi).to(noise.dtype))

    def deltas(self, x, x0):
        return [x - x0]

    def log_volume(self, shape):
        return math.prod(shape[1:]) * math.log(2 * math.pi)


class Box(_Interval):
    """Numbers in [-1, 1], reflected at both ends."""

    name = "box"
    period = 4.0
    sigma_max = 3.2

    def wrap(self, x):
        return torch.where(x.abs() <= 1, x, 1 - (torch.remainder(x + 1, 4) - 2).abs())

    def _side(self, x):
        """1 where the line is folded onto the box as it is, -1 where as in a mirror."""
        return torch.where(torch.remainder(x + 1, 4) <= 2, 1.0, -1.0).to(x.dtype)

    def check(self, x):
        check_finite(self.name, x)
        low, high = float(x.min()), float(x.max())
        if not -1.001 <= low <= high <= 1.001:
            remedy = "they seem to be pixels: x / 127.5 - 1" if low >= 0 and 2 < high <= 255 else "scale them"
            raise ValueError(f"values in the box must lie in [-1, 1]; got values from {low:g} to {high:g}: {remedy}")

    def from_normal(self, noise):
        return self.wrap((2 * _uniform(noise) - 1).to(noise.dtype))

    def deltas(self, x, x0):
        return [x - x0, x + x0 - 2]

    def log_volume(self, shape):
        return math.prod(shape[1:]) * math.log(2)

    def transport(self, x, tangent, vectors):
        return self._side(x + tangent) * vectors

    def lifted(self, x, vectors):
        return self._side(x) * vectors


# --- spheres ----------------------------------------------------------------------------------------------------------


class Sphere(Domain):
    """Unit vectors along axis 1, (B, d, ...): points of S^(d - 1), for d from 2 to 16."""

    name = "sphere"

    def _n(self, x):
        """The dimension of the sphere of vectors x. Raises ValueError where its kernel is not known."""
        if not 1 <= x.shape[1] - 1 <= LARGEST_N:
            raise ValueError(
                f"points on a sphere are unit vectors along axis 1, of 2 to {LARGEST_N + 1} numbers; got shape "
                f"{tuple(x.shape)}"
            )
        return x.shape[1] - 1

    def wrap(self, x):
        return x / x.norm(dim=1, keepdim=True)

    def check(self, x):
        check_finite(self.name, x)
        self._n(x)
        length = x.norm(dim=1)
        if not ((length - 1).abs() < 1e-3).all():
            raise ValueError(
                f"points on the sphere must be vectors of length 1 along axis 1; got shape {tuple(x.shape)}, lengths "
                f"from {float(length.min()):g} to {float(length.max()):g}: divide them by their length; latitude and "
                f"longitude are no such vectors, but (cos lat cos lon, cos lat sin lon, sin lat) is"
            )

    def from_normal(self, noise):
        return noise / noise.norm(dim=1, keepdim=True)

    def tangent(self, x, vectors):
        return vectors - (vectors * x).sum(1, keepdim=True) * x

    def step(self, x, tangent):
        length = tangent.norm(dim=1, keepdim=True)
        # sin(length) / length, also at 0
        end = length.cos() * x + torch.sinc(length / math.pi) * tangent
        return end / end.norm(dim=1, keepdim=True)

    def transport(self, x, tangent, vectors):
        length = tangent.norm(dim=1, keepdim=True)
        direction = tangent / length.clamp_min(torch.finfo(x.dtype).tiny)
        along = (vectors * direction).sum(1, keepdim=True)
        return vectors + along * ((length.cos() - 1) * direction - length.sin() * x)

    def lifted(self, x, vectors):
        # constant along rays
        return self.tangent(x / x.norm(dim=1, keepdim=True), vectors)

    def perturb(self, x0, sigma, noise=None, generator=None):
        n, fine = self._n(x0), _fine(x0)
        normal = self.tangent(fine, _fine(_noise_like(x0, noise, generator)))
        r, sigma = normal.norm(dim=1), expand_to(as_time(sigma), fine).squeeze(1)
        # on a circle the end of a step says the same
        theta = sigma * r if n == 1 else radius(r, sigma.expand_as(r), n)
        direction = normal / r.clamp_min(torch.finfo(normal.dtype).tiny).unsqueeze(1)
        return self.step(fine, theta.unsqueeze(1) * direction).to(x0.dtype)

    def kernel(self, x, x0, sigma):
        x, x0 = _fine(x), _fine(x0)
        cosine = (x * x0).sum(1, keepdim=True)
        # away from x0, of length sin(theta)
        away = cosine * x - x0
        sine = away.norm(dim=1, keepdim=True)
        log_density, slope = heat_kernel(torch.atan2(sine, cosine), expand_to(as_time(sigma), x), self._n(x))
        return log_density.reshape(len(x), -1).sum(1), slope / sine.clamp_min(torch.finfo(x.dtype).tiny) * away

    def log_volume(self, shape):
        return math.prod(shape[2:]) * log_volume(shape[1] - 1)

    def dimensions(self, shape):
        return (shape[1] - 1) * math.prod(shape[2:])


# --- products ---------------------------------------------------------------------------------------------------------


class Flat(Domain):
    """Flat space, as a part of a product. Sampling begins with N(0, sigma_max^2)."""

    name = "flat"
    sigma_max = 50.0

    def wrap(self, x):
        return x

    def check(self, x):
        check_finite(self.name, x)

    def from_normal(self, noise):
        return self.sigma_max * noise

    def kernel(self, x, x0, sigma):
        difference = _fine(x0) - _fine(x)
        sigma = expand_to(as_time(sigma), difference)
        log_density = -((difference / sigma) ** 2) / 2 - sigma.log() - math.log(2 * math.pi) / 2
        return log_density.flatten(1).sum(1), difference / sigma**2

    def log_prior(self, x):
        return self.log_kernel(x, torch.zeros_like(x), self.sigma_max)


class Product(Domain):
    """Domains side by side along axis 1: the first so many entries are of the first, and so on.

    Args:
        parts: [(domain, number of entries of axis 1)].
    """

    name = "product"

    def __init__(self, parts: list[tuple[Domain, int]]):
        self.domains, self.counts = (list(each) for each in zip(*parts, strict=True))
        self.sigma_min = min(domain.sigma_min for domain in self.domains)
        self.sigma_max = max(domain.sigma_max for domain in self.domains)

    def _parts(self, *tensors):
        """(domain, its part of each tensor). Raises ValueError for another length of axis 1."""
        for tensor in tensors:
            if tensor.shape[1] != sum(self.counts):
                named = ", ".join(f"{each.name} {n}" for each, n in zip(self.domains, self.counts, strict=True))
                raise ValueError(
                    f"axis 1 of samples must hold {sum(self.counts)} numbers ({named}); got shape {tuple(tensor.shape)}"
                )
        return zip(self.domains, *(tensor.split(self.counts, dim=1) for tensor in tensors), strict=True)

    def _joined(self, method, *tensors):
        return torch.cat([getattr(domain, method)(*parts) for domain, *parts in self._parts(*tensors)], dim=1)

    def wrap(self, x):
        return self._joined("wrap", x)

    def check(self, x):
        for domain, part in self._parts(x):
            domain.check(part)

    def from_normal(self, noise):
        return self._joined("from_normal", noise)

    def perturb(self, x0, sigma, noise=None, generator=None):
        parts = self._parts(x0, _noise_like(x0, noise, generator))
        return torch.cat([domain.perturb(part, sigma, its) for domain, part, its in parts], dim=1)

    def kernel(self, x, x0, sigma):
        each = [domain.kernel(*points, sigma) for domain, *points in self._parts(x, x0)]
        log_densities, scores = zip(*each, strict=True)
        return sum(log_densities), torch.cat(scores, dim=1)

    def log_prior(self, x):
        return sum(domain.log_prior(part) for domain, part in self._parts(x))

    def dimensions(self, shape):
        parts = zip(self.domains, self.counts, strict=True)
        return sum(domain.dimensions((shape[0], count, *shape[2:])) for domain, count in parts)

    def tangent(self, x, vectors):
        return self._joined("tangent", x, vectors)

    def step(self, x, tangent):
        return self._joined("step", x, tangent)

    def transport(self, x, tangent, vectors):
        return self._joined("transport", x, tangent, vectors)

    def lifted(self, x, vectors):
        return self._joined("lifted", x, vectors)


DOMAINS: dict[str, Callable[[], Domain]] = {"torus": Torus, "box": Box, "sphere": Sphere}
# of products
PARTS: dict[str, Callable[[], Domain]] = {**DOMAINS, "flat": Flat}


def listed(domain):
    """A domain as a config holds it: a name, or of a product [[name, number of entries], ...], in an order that a file
    keeps.

    Raises ValueError for anything else.
    """
    if isinstance(domain, str):
        check_choice("domain", domain, DOMAINS)
        return domain
    parts = list(domain.items()) if isinstance(domain, dict) else domain
    if (
        not isinstance(parts, (list, tuple))
        or not parts
        or not all(isinstance(each, (list, tuple)) and len(each) == 2 for each in parts)
    ):
        raise ValueError(
            f"domain {domain!r} must be one of {', '.join(DOMAINS)}, or of a product the number of entries of axis 1 "
            f"by name, such as {{'torus': 2, 'flat': 1}}"
        )
    for name, count in parts:
        check_choice("domain", name, PARTS)
        check_number(f"number of entries of {name}", count, 1, 10**6, whole=True)
    return [list(each) for each in parts]


def build_domain(domain, sigma_max=None) -> Domain:
    """The domain of a config, as `listed` returns it; sigma_max of its path, unless it is the domain's own."""
    if isinstance(domain, str):
        return DOMAINS[domain]()
    product = Product([(PARTS[name](), count) for name, count in domain])
    for each in product.domains:
        if isinstance(each, Flat):
            each.sigma_max = sigma_max or product.sigma_max
    return product
