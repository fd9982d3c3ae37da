"""Solvers that choose their own steps, for `num_inference_steps=None`.

They need the network whenever they like, so they stand outside the scheduler's plan and its `step`.
"""

import torch
from diffusers.utils.torch_utils import randn_tensor


def rms(x):
    """Root mean square of every sample, (B,)."""
    return x.flatten(1).pow(2).mean(1).sqrt()


def probability_flow(path, denoise, x, t, s, rtol, atol):
    """Follow the probability-flow ODE from time t to s by Dormand-Prince 5(4) of torchdiffeq.

    It runs in the coordinates y = x / (alpha + sigma), u = sigma / (alpha + sigma), where data and noise have the same
    scale; the error that is held under atol + rtol |y| is that of the worst sample.

    Args:
        denoise: f(x, t) -> denoised samples.
        x: samples at t, (B, ...).

    Returns the samples at s. Raises ImportError without torchdiffeq.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "num_inference_steps=None with an ODE needs torchdiffeq: pip install torchdiffeq (or score-sde[adaptive])"
        ) from error

    def slope(u, y):
        time = path.t_from_straight(u, slope=1.0)
        c, _ = path.straight_coordinates(time, slope=1.0)
        c = c.to(y.dtype)
        return (c * y - c * denoise(c * y, time)) / path.sigma(time).to(y.dtype)

    (c_t, u_t), (c_s, u_s) = (path.straight_coordinates(time, slope=1.0) for time in (t, s))
    ends = torch.stack([u_t, u_s]).to(x.device)
    y = x / c_t.to(x.device, x.dtype)
    # without step_t it would step past the end, where u < 0 may be no level of the path, and interpolate
    options = {"norm": lambda y: _worst(y, x), "step_t": ends[1:]}
    y = odeint(slope, y, ends, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]
    return y * c_s.to(x.device, x.dtype)


def _worst(y, like):
    """torchdiffeq measures states, and also numbers, by this."""
    return rms(y.reshape(like.shape)).max() if y.numel() == like.numel() else y.abs().max()


def reverse_sde(path, denoise, x, t, s, rtol, atol, generator=None, first_step=0.01, safety=0.9, power=0.9):
    """Follow the reverse SDE from time t to s by the adaptive solver of Jolicoeur-Martineau et al. 2021 (algorithm 1):
    Euler-Maruyama against stochastic improved Euler, every sample with its own steps.

    Args:
        denoise: f(x, t) -> denoised samples, for one time per sample.
        x: samples at t, (B, ...).
        rtol, atol: of the difference between the two methods; the paper's are 0.02 and one grey level, 2 / 256.

    Returns the samples at s.
    """

    def expand(value):
        return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    def half_step(at, time, noise, size):
        drift = path.reverse_drift(at, denoise(at, time), time, eta=1.0)
        return expand(path.diffusion(time) * size.sqrt()) * noise - expand(size) * drift

    times = torch.full((len(x),), float(t), dtype=torch.float64, device=x.device)
    sizes = torch.full_like(times, first_step).clamp_max(float(t) - float(s))
    before = x
    while True:
        active = times > s
        if not active.any():
            return x
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        # samples that have arrived stand still
        sizes = torch.where(active, torch.minimum(sizes, times - s), 0.0)
        euler = x + half_step(x, times, noise, sizes)
        improved = (euler + x + half_step(euler, times - sizes, noise, sizes)) / 2
        tolerance = torch.maximum(torch.full_like(x, atol), rtol * torch.maximum(euler.abs(), before.abs()))
        error = rms((euler - improved) / tolerance).double()
        if not torch.isfinite(error).all():
            raise FloatingPointError(f"the network returned a value that is not finite near t = {times.max():g}")
        accepted = active & (error <= 1)
        x = torch.where(expand(accepted).bool(), improved, x)
        before = torch.where(expand(accepted).bool(), euler, before)
        times = torch.where(accepted, times - sizes, times)
        # what rounding leaves of the last step is none
        times = torch.where(times - s < 1e-9, torch.full_like(times, float(s)), times)
        sizes = torch.where(active, safety * sizes * error.clamp_min(1e-9) ** -power, sizes)
