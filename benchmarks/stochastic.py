"""Stochastic samplers beside diffusers' under classifier-free guidance, on exact scores.

    python benchmarks/stochastic.py --output benchmarks/stochastic.json

The targets of calibration.py on the noise levels of Stable Diffusion. The reference is a set of samples of the guided
field's reverse SDE in 1,000 steps (`dpmpp_2m`, eta 1), for the same classes as every sampler's. The figure is the
sliced Wasserstein-2 distance to it; "reference" is that of another such set, which is what a perfect sampler has.
"""

import diffusers
import torch
from calibration import PATHS, TARGETS, draw, run
from samplers import ours, quiet, sliced_wasserstein

from score_sde import ScoreSDEScheduler
from stock_samplers import Stock, run_stock, stock_samplers


EVALUATIONS = (20, 30, 50, 100)
SCALES = (1.0, 4.0, 7.5)
OURS = {
    **{
        f"{predictor}, eta 1, {grid}": {"predictor": predictor, "eta": 1.0, "timestep_spacing": grid}
        for predictor in ("dpmpp_2m", "dpmpp_3m", "dpmpp_3b", "unipc_2", "unipc_3")
        for grid in ("karras", "logistic", "log_snr")
    },
    "dpmpp_2m, eta 0.5, karras": {"predictor": "dpmpp_2m", "eta": 0.5, "timestep_spacing": "karras"},
    "dpmpp_2s, eta 1, karras": {"predictor": "dpmpp_2s", "eta": 1.0, "timestep_spacing": "karras"},
    "ancestral": {"predictor": "ancestral"},
    "heun, s_churn 20": {
        "predictor": "heun", "s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 50.0, "timestep_spacing": "karras",
    },
}  # fmt: skip
GRIDS = {"linspace": {}, "karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}


def stock(path):
    """SDE-DPM++ 2M, SA-Solver and Euler ancestral with their grids, on the path's levels."""
    betas = {name: stock_samplers(path)[0].arguments[name] for name in ("trained_betas", "num_train_timesteps")}
    sde = {"algorithm_type": "sde-dpmsolver++"}
    for grid, flags in GRIDS.items():
        yield Stock(f"SDE-DPM++ 2M {grid}", diffusers.DPMSolverMultistepScheduler, betas | sde | flags, "vp")
        yield Stock(f"SA-Solver {grid}", diffusers.SASolverScheduler, betas | flags, "vp")
    yield Stock("Euler ancestral", diffusers.EulerAncestralDiscreteScheduler, betas, "sigma")


def compare(job):
    """{sampler: {evaluations: distance}} on one target under one scale."""
    target_name, scale, samples = job
    quiet()
    target, settings = TARGETS[target_name](), {"prediction_type": "sample"} | PATHS["sd"]
    path = ScoreSDEScheduler(**settings).path
    noise, denoise = draw(target, path, samples, [scale], seed=5)

    def sampled(seed, evaluations, **chosen):
        scheduler, generator = ScoreSDEScheduler(**settings, **chosen), torch.Generator().manual_seed(seed)
        begun = torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
        return ours(scheduler, denoise, begun, (evaluations - 1) // scheduler.order + 1, generator)

    fine = {"predictor": "dpmpp_2m", "eta": 1.0, "timestep_spacing": "log_snr"}
    reference = sampled(1, 1000, **fine)
    found = {"reference": {1000: sliced_wasserstein(sampled(2, 1000, **fine), reference)}}
    for name, chosen in OURS.items():
        found[f"score_sde {name}"] = {n: sliced_wasserstein(sampled(3, n, **chosen), reference) for n in EVALUATIONS}
    for sampler in stock(path):
        found[f"diffusers {sampler.name}"] = {}
        for n in EVALUATIONS:
            generator = torch.Generator().manual_seed(3)
            begun = torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
            x = run_stock(sampler, path, denoise, begun, n, generator=generator)
            found[f"diffusers {sampler.name}"][n] = sliced_wasserstein(x, reference)
    return f"{target_name}, scale {scale:g}", found


def report(results):
    lines = []
    for cell, found in results.items():
        lines += [
            f"\n{cell} (reference: {found['reference'][1000]:.4f}):\n",
            "| sampler | " + " | ".join(f"{n} evaluations" for n in EVALUATIONS) + " |",
            "|---|" + "---|" * len(EVALUATIONS),
        ]
        for name, each in found.items():
            if name != "reference":
                lines.append(f"| {name} | " + " | ".join(f"{each[n]:.4f}" for n in EVALUATIONS) + " |")
    return "\n".join(lines)


def jobs(targets, samples):
    return [(target, scale, samples) for target in targets for scale in SCALES]


if __name__ == "__main__":
    run(__doc__, compare, report, jobs, 2000, "of each sampler")
