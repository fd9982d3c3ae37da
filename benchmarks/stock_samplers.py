"""diffusers' schedulers as samplers of any noise path, for comparison beside ours.

They all know one ODE, that of x / alpha in the noise level kappa = sigma / alpha, in some rescaled form. So a path is
given to them by its noise levels: as `trained_betas` to those of the variance-preserving form, as sigma_min and
sigma_max to those of the EDM form, and as flow sigmas on the straight path.
"""

import math
from typing import NamedTuple

import diffusers
import torch

from score_sde import LinearSDE


LEVELS = 1000
SPACINGS = {name: {"timestep_spacing": name} for name in ("linspace", "trailing", "leading")}
SIGMAS = {name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}


class Stock(NamedTuple):
    """One scheduler with one grid. `form` says what it calls a sample: "vp" (unit variance), "sigma" (x / alpha), "edm"
    (x / alpha, with a preconditioned network) or "flow"."""

    name: str
    make: type
    arguments: dict
    form: str
    evaluations: int = 1


def stock_samplers(path, shift=1.0):
    """Every scheduler of diffusers that can sample this path, with every grid that it offers; `shift` is of the grids
    on the straight path."""
    if isinstance(path, LinearSDE):
        return _flow_samplers(shift)
    kappa = torch.exp(-path.half_log_snr(torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS))
    alpha2 = torch.cat([torch.ones(1, dtype=torch.float64), 1 / (1 + kappa**2)])
    betas = {"trained_betas": (1 - alpha2[1:] / alpha2[:-1]).tolist(), "num_train_timesteps": LEVELS}
    found = []

    def add(name, make, grids, form="vp", evaluations=1, **arguments):
        for grid, chosen in grids.items():
            found.append(Stock(f"{name} {grid}", make, betas | arguments | chosen, form, evaluations))

    add("DDIM", diffusers.DDIMScheduler, SPACINGS, clip_sample=False)
    add("Euler", diffusers.EulerDiscreteScheduler, SPACINGS | SIGMAS, form="sigma")
    add("Heun", diffusers.HeunDiscreteScheduler, SPACINGS | SIGMAS, form="sigma", evaluations=2)
    for order in (2, 3):
        lu = {"lu": {"use_lu_lambdas": True}}
        add(f"DPM++ {order}M", diffusers.DPMSolverMultistepScheduler, SPACINGS | SIGMAS | lu, solver_order=order)
        add(
            f"DPM++ {order}S", diffusers.DPMSolverSinglestepScheduler, {"linspace": {}} | SIGMAS,
            solver_order=order, lower_order_final=True,
        )  # fmt: skip
        add(f"UniPC {order}", diffusers.UniPCMultistepScheduler, SPACINGS | SIGMAS, solver_order=order)
        add(f"DEIS {order}", diffusers.DEISMultistepScheduler, SPACINGS | SIGMAS, solver_order=order)
    add("SA-Solver", diffusers.SASolverScheduler, SPACINGS | SIGMAS, tau_func=lambda t: 0)
    for grid in ("karras", "exponential"):
        ends = {"sigma_min": float(kappa[0]), "sigma_max": float(kappa[-1]), "sigma_schedule": grid}
        found.append(Stock(f"EDM Euler {grid}", diffusers.EDMEulerScheduler, ends, "edm"))
        for order in (2, 3):
            arguments = ends | {"solver_order": order}
            found.append(
                Stock(f"EDM DPM++ {order}M {grid}", diffusers.EDMDPMSolverMultistepScheduler, arguments, "edm")
            )
    return found


def _flow_samplers(shift):
    euler, flow = (
        diffusers.FlowMatchEulerDiscreteScheduler,
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift},
    )
    found = [
        Stock(f"Flow Euler {grid}", euler, arguments | {"shift": shift}, "flow")
        for grid, arguments in ({f"shift {shift:g}": {}} | SIGMAS).items()
    ]
    found.append(Stock("Flow Heun", diffusers.FlowMatchHeunDiscreteScheduler, {"shift": shift}, "flow", 2))
    for order in (2, 3):
        for name, make in (
            (f"DPM++ {order}M", diffusers.DPMSolverMultistepScheduler),
            (f"UniPC {order}", diffusers.UniPCMultistepScheduler),
            (f"DEIS {order}", diffusers.DEISMultistepScheduler),
        ):
            found.append(Stock(f"{name} flow", make, flow | {"solver_order": order}, "flow"))
        found.append(
            Stock(
                f"DPM++ {order}S flow", diffusers.DPMSolverSinglestepScheduler,
                flow | {"solver_order": order, "lower_order_final": True}, "flow",
            )
        )  # fmt: skip
    found.append(Stock("SA-Solver flow", diffusers.SASolverScheduler, flow | {"tau_func": lambda t: 0}, "flow"))
    return found


def run_stock(sampler, path, denoise, noise, evaluations, **step_arguments):
    """The sample (the path's x at t = 0) that a stock scheduler reaches with at most this many evaluations.

    Args:
        denoise: f(x, t) -> the denoised sample, for x of the path at its time t.
        noise: standard normal, of the sample's shape.
    """
    scheduler = sampler.make(**sampler.arguments)
    # a second-order method of two evaluations a step needs one only in its last step
    scheduler.set_timesteps(evaluations if sampler.evaluations == 1 else (evaluations + 1) // 2)
    timesteps = scheduler.timesteps
    assert len(timesteps) <= evaluations
    x = noise if sampler.form in ("vp", "flow") else noise * float(scheduler.init_noise_sigma)
    for i, timestep in enumerate(timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        if sampler.make in (diffusers.DDIMScheduler, diffusers.DDPMScheduler):
            level = math.sqrt(1 / float(scheduler.alphas_cumprod[timestep]) - 1)
        else:
            level = float(scheduler.sigmas[i])
        if sampler.form == "flow":
            denoised = denoise(x, level)
            output = (x - denoised) / level
        else:
            t = float(path.t_from_half_log_snr(-math.log(level)))
            scale = 1 / math.sqrt(1 + level**2) if sampler.form == "vp" else 1.0
            denoised = denoise(x / scale * float(path.alpha(t)), t)
            output = (x / scale - denoised) / level
            if sampler.form == "edm":
                data = scheduler.config.sigma_data
                kept = data**2 / (level**2 + data**2)
                output = (denoised - kept * x) / (level * data / math.sqrt(level**2 + data**2))
        x = scheduler.step(output, timestep, x, **step_arguments).prev_sample
    return x
