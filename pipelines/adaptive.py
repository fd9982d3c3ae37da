"""Solvers that choose their own steps, for `num_inference_steps=None`.

They need the network whenever they like, so they stand outside the scheduler's plan and its `step`.
"""

from functools import partial

import torch
from diffusers.utils.torch_utils import randn_tensor


# Apple's GPUs
WITHOUT_FLOAT64 = {"mps"}


def widest(device):
    """float64, or float32 on a device without."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def in_float64(x):
    """A tensor in float64, where its device has that, else on the CPU."""
    return (x.cpu() if widest(x.device) == torch.float32 else x).double()


def rms(x):
    """Root mean square of every sample, (B,)."""
    return x.flatten(1).pow(2).mean(1).sqrt()


def check_finite(output, t):
    """Raise FloatingPointError where a network's output at time t is not finite."""
    if not torch.isfinite(output).all():
        raise FloatingPointError(f"the network's output is not finite near t = {float(torch.as_tensor(t).max()):g}")


def probability_flow(path, denoise, x, t, s, rtol, atol):
    """Follow the probability-flow ODE from time t to s, down to data or up to noise, by Dormand-Prince 5(4) of
    torchdiffeq.

    It runs in the coordinates y = x / (alpha + sigma), u = sigma / (alpha + sigma), where data and noise have the same
    scale; the error that is held under atol + rtol |y| is that of the worst sample.

    Args:
        denoise: f(x, t) -> denoised samples.
        x: samples at t, (B, ...).

    Returns the samples at s. Raises ImportError without torchdiffeq, and FloatingPointError where the network's output
    is not finite.
    """

    def slope(time, x):
        denoised = denoise(x, time)
        check_finite(denoised, time)
        return path.straight_velocity(x, denoised, time, slope=1.0)

    return integrate(path, slope, x, t, s, rtol, atol)


def integrate(path, slope, x, t, s, rtol, atol, others=(), steps=None):
    """Integrate the ODE dy/du = slope(t, x) of the coordinates of `probability_flow`, and those of other states beside
    it: slope(t, x, *others) then returns the derivatives of all; t is on the CPU, float64. With a number of steps, by
    RK4 in as many equal parts of u, instead of adaptively. Returns x, or a tuple of all, at s."""

    def derivative(u, state):
        # on the host: of one number nothing has to be sent
        time, (y, *rest) = path.t_from_straight(u.cpu().double(), slope=1.0), state
        c, _ = path.straight_coordinates(time, slope=1.0)
        changes = slope(time, path.expand_to(c, x) * y, *rest)
        return changes if others else (changes,)

    (c_t, u_t), (c_s, u_s) = (path.straight_coordinates(time, slope=1.0) for time in (t, s))
    c_t, c_s = path.expand_to(c_t, x), path.expand_to(c_s, x)
    solve = partial(in_equal_steps, steps=steps) if steps else partial(adaptively, rtol=rtol, atol=atol)
    y, *rest = solve(derivative, (x / c_t, *others), u_t, u_s)
    return (y * c_s, *rest) if others else y * c_s


def in_equal_steps(derivative, state, u, end, steps):
    """The state at `end`, by the 3/8 rule (Kutta 1901)."""
    stops = torch.linspace(0, 1, steps + 1, dtype=u.dtype) * (end - u) + u
    for u, after in zip(stops, stops[1:], strict=False):
        h = float(after - u)
        k1 = derivative(u, state)
        k2 = derivative(u + h / 3, [y + h / 3 * a for y, a in zip(state, k1, strict=True)])
        k3 = derivative(u + h * 2 / 3, [y + h * (b - a / 3) for y, a, b in zip(state, k1, k2, strict=True)])
        k4 = derivative(after, [y + h * (a - b + c) for y, a, b, c in zip(state, k1, k2, k3, strict=True)])
        slopes = zip(state, k1, k2, k3, k4, strict=True)
        state = [y + h / 8 * (a + 3 * (b + c) + d) for y, a, b, c, d in slopes]
    return state


def adaptively(derivative, state, u, end, rtol, atol):
    """The state at `end`, by torchdiffeq's Dormand-Prince 5(4). Raises ImportError without torchdiffeq."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "solving an ODE adaptively needs torchdiffeq: pip install torchdiffeq (or score-sde[adaptive])"
        ) from error

    def worst(state):
        # torchdiffeq measures by this what has the form of the state, and numbers
        return max(rms(each).max() for each in state) if isinstance(state, tuple) else state.abs().max()

    device = state[0].device
    stops = torch.stack([u, end]).to(device, widest(device))
    # without step_t it would step past the end, where u < 0 may be no level of the path, and interpolate
    options = {"norm": worst, "step_t": stops[1:], "dtype": stops.dtype}
    ends = odeint(derivative, state, stops, rtol=rtol, atol=atol, method="dopri5", options=options)
    return [each[-1] for each in ends]


class BrownianSteps:
    """Increments of Brownian motions, one per sample, over steps of each sample's own length.

    The increment of a step that was rejected is not forgotten, which would favour some noise and bias the samples: the
    shorter steps that follow are drawn given it (Rackauckas & Nie 2017, RSwM1).

    Args:
        like: states (B, ...).
        expand_to: f(value (B,), states) -> the value shaped to go with states: a path's.
    """

    def __init__(self, like, expand_to):
        self.expand_to = expand_to
        self.lengths, self.increments = [], []
        self.depth = torch.zeros(len(like), dtype=torch.long, device=like.device)

    def draw(self, lengths, noise):
        """(lengths, increments) of the next steps, from standard normal noise: the lengths asked for (B,), or less
        where a part of a rejected step ends before."""
        known_length, known = torch.full_like(lengths, torch.inf), torch.zeros_like(noise)
        for k, (length, increment) in enumerate(zip(self.lengths, self.increments, strict=True)):
            top = self.depth == k + 1
            known_length = torch.where(top, length, known_length)
            known = torch.where(self.expand_to(top, noise).bool(), increment, known)
        lengths = torch.minimum(lengths, known_length)
        # Brownian bridge; without an end that is known, 1 - share is 1
        share = lengths / known_length
        std = (lengths * (1 - share)).sqrt()
        drawn = self.expand_to(share, noise) * known + self.expand_to(std, noise) * noise
        rest = known_length - lengths
        for k in range(len(self.lengths)):
            top = self.depth == k + 1
            self.lengths[k] = torch.where(top, rest, self.lengths[k])
            self.increments[k] = torch.where(self.expand_to(top, noise).bool(), known - drawn, self.increments[k])
        self.depth = self.depth - ((self.depth > 0) & (rest <= 1e-12)).long()
        return lengths, drawn

    def reject(self, rejected, lengths, increments):
        """Take back the steps of some samples: `rejected` (B,)."""
        if bool((rejected & (self.depth == len(self.lengths))).any()):
            self.lengths.append(torch.zeros_like(lengths))
            self.increments.append(torch.zeros_like(increments))
        for k in range(len(self.lengths)):
            here = rejected & (self.depth == k)
            self.lengths[k] = torch.where(here, lengths, self.lengths[k])
            self.increments[k] = torch.where(self.expand_to(here, increments).bool(), increments, self.increments[k])
        self.depth = self.depth + rejected.long()


def reverse_sde(path, denoise, x, t, s, rtol, atol, generator=None, first_step=0.01, safety=0.9, power=0.9):
    """Follow the reverse SDE from time t to s by the adaptive solver of Jolicoeur-Martineau et al. 2021 (algorithm 1):
    Euler-Maruyama against stochastic improved Euler, every sample with its own steps. Other than there, a rejected step
    does not draw its noise anew, see `BrownianSteps`.

    Args:
        denoise: f(x, t) -> denoised samples, for one time per sample.
        x: samples at t, (B, ...).
        rtol, atol: of the difference between the two methods; the paper's are 0.02 and one grey level, 2 / 256.

    Returns the samples at s. Raises FloatingPointError when the network's output is not finite.
    """

    def change(at, times, lengths, increments):
        drift = path.reverse_drift(at, denoise(at, times), times, eta=1.0)
        return path.expand_to(path.diffusion(times), x) * increments - path.expand_to(lengths, x) * drift

    times = torch.full((len(x),), float(t), dtype=widest(x.device), device=x.device)
    lengths = torch.full_like(times, first_step)
    before, steps = x, BrownianSteps(x, path.expand_to)
    while bool((times > s).any()):
        # samples that have arrived stand still
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        lengths, increments = steps.draw(torch.minimum(lengths, times - s), noise)
        euler = x + change(x, times, lengths, increments)
        improved = (x + euler + change(euler, times - lengths, lengths, increments)) / 2
        tolerance = torch.maximum(torch.full_like(x, atol), rtol * torch.maximum(euler.abs(), before.abs()))
        error = rms((euler - improved) / tolerance).to(times.dtype)
        check_finite(error, times)
        accepted = error <= 1
        steps.reject(~accepted, lengths, increments)
        moves = path.expand_to(accepted, x).bool()
        x, before = torch.where(moves, improved, x), torch.where(moves, euler, before)
        times = torch.where(accepted, times - lengths, times)
        # what rounding leaves of the last step is none
        times = torch.where(times - s < 1e-9, torch.full_like(times, float(s)), times)
        lengths = safety * lengths.clamp_min(1e-9) * error.clamp_min(1e-6) ** -power
    return x
