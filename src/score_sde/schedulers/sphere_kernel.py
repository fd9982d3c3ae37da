r"""The heat kernel of the sphere S^n: its density, its slope, and its radius.

Brownian motion of variance tau = sigma^2 from a point has at the angle theta from it, with m = (n - 1) / 2, the density

(1)  p = 1 / |S^n| sum_l N(l) R_l(cos theta) e^(-l (l + n - 1) tau / 2)
     R_l the Gegenbauer polynomials of index m with R_l(1) = 1 (Legendre for n = 2, cosines for n = 1), N(l) the number
     of spherical harmonics of degree l;
(2)  p = (2 pi tau)^(-n/2) e^(-theta^2 / (2 tau)) (theta / sin theta)^m sum_k a_k(theta) tau^k
     (Minakshisundaram & Pleijel 1949), where a_0 = 1 and theta a_k' + k a_k = (a_{k-1}'' + 2 m / theta a_{k-1}' +
     Q a_{k-1}) / 2 with Q = m^2 - m (m - 1) (1 / sin^2 theta - 1 / theta^2): power series in theta^2.

(1) is used above SWITCH, (2) below it. The rest of (1) after DEGREES is under 1e-12 of p(0); of (2), whose series is
asymptotic, ORDERS are used, up to the angle FARTHEST; beyond, where p is less than 1e-11 of p(0), the last two factors
stay what they are there. At SWITCH, out to sigma (sqrt(n) + 3.5), where all but 1e-3 of a normal vector lies, the two
differ by less than 1e-6 in log p, for n up to 9 by less than 1e-8.
"""

import math
from functools import lru_cache

import torch


SWITCH = 0.35
DEGREES = 28
ORDERS, POWERS = 14, 60
FARTHEST = 2.6
# of S^n: beyond, neither sum has enough digits left
LARGEST_N = 15


def log_volume(n):
    """log |S^n|, the area of the unit sphere in n + 1 dimensions."""
    return math.log(2) + (n + 1) / 2 * math.log(math.pi) - math.lgamma((n + 1) / 2)


def heat_kernel(theta, sigma, n):
    """(log p, d log p / d theta) at angles theta in [0, pi] for sigma > 0, float64 tensors that broadcast."""
    near, far = _expansion(theta, sigma.clamp_max(SWITCH), n), _series(theta, sigma.clamp_min(SWITCH), n)
    return tuple(torch.where(sigma < SWITCH, *each) for each in zip(near, far, strict=True))


def _series(theta, sigma, n):
    """`heat_kernel` by (1)."""
    cosine, tau = theta.cos(), sigma**2
    before, here = torch.ones_like(theta), cosine
    slope_before, slope_here = torch.zeros_like(theta), torch.ones_like(theta)
    density, slope = torch.ones_like(theta), torch.zeros_like(theta)
    for degree in range(1, DEGREES):
        count = (2 * degree + n - 1) * math.exp(math.lgamma(degree + n - 1) - math.lgamma(degree + 1) - math.lgamma(n))
        weight = count * torch.exp(-degree * (degree + n - 1) * tau / 2)
        density, slope = density + weight * here, slope + weight * slope_here
        # of R_l and of its derivative by the cosine
        after = ((2 * degree + n - 1) * cosine * here - degree * before) / (degree + n - 1)
        slope_after = ((2 * degree + n - 1) * (here + cosine * slope_here) - degree * slope_before) / (degree + n - 1)
        before, here, slope_before, slope_here = here, after, slope_here, slope_after
    # where rounding has eaten it
    density = density.clamp_min(1e-15)
    return density.log() - log_volume(n), -theta.sin() * slope / density


def _expansion(theta, sigma, n):
    """`heat_kernel` by (2)."""
    theta, sigma = torch.broadcast_tensors(theta, sigma)
    tau, m = sigma**2, (n - 1) / 2
    inner = theta.clamp(1e-6, FARTHEST)
    z = (inner / math.pi).square()
    orders = torch.arange(ORDERS, dtype=theta.dtype, device=theta.device)
    # of the power series in z that the sum over the orders is, by Horner's rule with its derivative
    coefficients = torch.tensordot(_coefficients(n).to(theta).T, tau ** orders.reshape(-1, *[1] * tau.ndim), dims=1)
    factor, steepness = torch.zeros_like(z), torch.zeros_like(z)
    for coefficient in coefficients.flip(0):
        factor, steepness = factor * z + coefficient, steepness * z + factor
    steepness = steepness * 2 * inner / math.pi**2
    log_density = -n / 2 * torch.log(2 * math.pi * tau) - theta**2 / (2 * tau) + factor.log()
    bend = steepness / factor + m * (1 / inner - 1 / inner.tan())
    return log_density + m * (inner / inner.sin()).log(), -theta / tau + torch.where(theta > FARTHEST, 0.0, bend)


@lru_cache
def _coefficients(n):
    """Those of (theta / pi)^(2 j) in a_k of (2): (ORDERS, POWERS)."""
    m, length = (n - 1) / 2, POWERS + ORDERS
    j = torch.arange(length, dtype=torch.float64)
    # 1 / sin^2 - 1 / theta^2 = sum_j 2 (2 j + 1) zeta(2 j + 2) theta^(2 j) / pi^(2 j + 2)
    q = -m * (m - 1) * 2 * (2 * j + 1) * torch.special.zeta(2 * j + 2, torch.ones_like(j)) / math.pi**2
    q[0] += m**2
    row = torch.zeros_like(j)
    row[0], rows = 1.0, []
    for k in range(1, ORDERS + 1):
        rows.append(row[:POWERS])
        curved = (2 * j[:-1] + 2) * (2 * j[:-1] + 1 + 2 * m) * row[1:] / math.pi**2
        product = torch.stack([(q[: i + 1] * row[: i + 1].flip(0)).sum() for i in range(len(row) - 1)])
        row, j = (curved + product) / (2 * (2 * j[:-1] + k)), j[:-1]
    return torch.stack(rows)


# --- the radius -------------------------------------------------------------------------------------------------------

# A table of theta / (sigma r) at multiples of r and sigma, between which it is interpolated. At the last sigma the
# kernel is uniform, and a larger r is as likely as 1e-20.
RADII, LARGEST_R = 160, 12.0
LEVELS, LARGEST_SIGMA = 240, 6.0
# angles at which the distribution is worked out, for the table
ANGLES = 512


def radius(r, sigma, n):
    """The angle theta of a draw from the heat kernel on S^n, for the radius r of a standard normal vector in n
    dimensions: the increasing function that makes the one distribution of the other. Float64 tensors of one shape."""
    r, sigma = r.clamp_max(LARGEST_R), sigma.clamp_max(LARGEST_SIGMA)
    table, ratio = _ratios(n).to(r), torch.zeros_like(r)
    for i, of_r in _cubic(r / LARGEST_R * RADII, RADII):
        for j, of_sigma in _cubic(sigma / LARGEST_SIGMA * LEVELS, LEVELS):
            ratio = ratio + of_r * of_sigma * table[j, i]
    return (ratio * sigma * r).clamp(0, math.pi)


def _cubic(place, last):
    """(index, weight) of the four places of 0 .. last around each, for a cubic."""
    first = (place.floor().long() - 1).clamp(0, last - 3)
    x = place - first
    for i in range(4):
        weight = torch.ones_like(x)
        for other in {0, 1, 2, 3} - {i}:
            weight = weight * (x - other) / (i - other)
        yield first + i, weight


@lru_cache
def _ratios(n):
    """The table (LEVELS + 1, RADII + 1)."""
    sigma = torch.arange(1, LEVELS + 1, dtype=torch.float64)[:, None] * (LARGEST_SIGMA / LEVELS)
    r = torch.arange(1, RADII + 1, dtype=torch.float64) * (LARGEST_R / RADII)
    # with Simpson's rule between them
    share = torch.linspace(0, 1, 2 * ANGLES + 1, dtype=torch.float64) ** 2
    theta, near = share * (sigma * (LARGEST_R + 2)).clamp_max(math.pi), int((sigma < SWITCH).sum())
    log_density = torch.cat([_expansion(theta[:near], sigma[:near], n)[0], _series(theta[near:], sigma[near:], n)[0]])
    density = theta.sin().abs() ** (n - 1) * torch.exp(log_density + log_volume(n - 1))
    steps = theta.diff()
    left, right = steps[:, ::2], steps[:, 1::2]
    begin, middle, end = density[:, :-1:2], density[:, 1::2], density[:, 2::2]
    width = left + right
    mass = width / 6 * ((2 - right / left) * begin + width**2 / (left * right) * middle + (2 - left / right) * end)
    below, above = mass.cumsum(1)[:, :-1], mass.flip(1).cumsum(1).flip(1)[:, 1:]
    angles, density = theta[:, 2:-1:2], density[:, 2:-1:2]
    # the logit of the distribution is smooth at both ends
    logit, slope = (below / above).log(), 1 / (density / below + density / above)
    half = torch.full_like(r, n / 2)
    wanted = (torch.special.gammainc(half, r**2 / 2) / torch.special.gammaincc(half, r**2 / 2)).log()
    wanted = wanted.expand(LEVELS, -1).contiguous()
    after = torch.searchsorted(logit, wanted).clamp(1, ANGLES - 2)
    begin, end = ([each.gather(1, place) for each in (logit, angles, slope)] for place in (after - 1, after))
    width = end[0] - begin[0]
    x = ((wanted - begin[0]) / width).clamp(0, 1)
    angle = (
        (1 + 2 * x) * (1 - x) ** 2 * begin[1]
        + x**2 * (3 - 2 * x) * end[1]
        + width * x * (1 - x) * ((1 - x) * begin[2] - x * end[2])
    )
    ratios = angle / (sigma * r)
    # an even function of r, and 1 for sigma = 0
    ratios = torch.cat([(4 * ratios[:, :1] - ratios[:, 1:2]) / 3, ratios], dim=1)
    return torch.cat([torch.ones(1, RADII + 1, dtype=torch.float64), ratios])
