"""Times fitted to a guided field (`ScoreSDEScheduler.calibrate`) beside `auto`, all of diffusers' samplers and a
published timetable.

    python benchmarks/calibration.py --output benchmarks/calibration.json

The targets of samplers.py with classes: the mixture's components in pairs, the images by their labels. The denoised
samples of a class and of all are known, so is the guided field D + scale (D_class - D). The error of a sample is its
root mean square distance per dimension from where many steps of that field's ODE lead from the same noise, ending as
diffusers' schedulers do with the denoised sample at the least noise. Times are fitted to 16 trajectories of other noise
and other classes under one guidance scale, and used under that one and others. The timetable is Align Your Steps
(Sabour et al. 2024), as diffusers has it for Stable Diffusion, in 10 steps.
"""

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from datasets import load_dataset
from diffusers.schedulers import AysSchedules
from samplers import Mixture, gaussian_mixture, ours, quiet, smoothed_images

import score_sde
from score_sde import ScoreSDEScheduler
from stock_samplers import run_stock, stock_samplers


EVALUATIONS = (5, 8, 10)
SCALES = (1.0, 4.0, 7.5, 12.0)
FITTED_AT = (1.0, 7.5)
FITTED_TO = 16
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PATHS = {"sd": {"sde_type": "discrete_vp"} | STABLE_DIFFUSION, "flow": {"sde_type": "linear"}}


class ClassMixture(Mixture):
    """A mixture whose components are each of one class, (K,)."""

    def __init__(self, mixture, classes):
        super().__init__(mixture.weights, mixture.means, mixture.variances)
        self.classes = classes

    def guided(self, x, alpha, sigma, labels, scales):
        """D + scale (D_class - D) for samples (B, D), with labels and scales (B,)."""
        variances, means = alpha**2 * self.variances + sigma**2, alpha * self.means
        squares = (x**2) @ (1 / variances).T - 2 * x @ (means / variances).T + (means**2 / variances).sum(1)
        logits = self.weights.log() - (squares + variances.log().sum(1)) / 2
        of_all = torch.softmax(logits, dim=1)
        of_class = torch.softmax(torch.where(self.classes == labels[:, None], logits, -math.inf), dim=1)
        share = of_all + scales[:, None] * (of_class - of_all)
        gains = alpha * self.variances / variances
        return share @ (self.means - gains * means) + x * (share @ gains)


def mixture():
    return ClassMixture(gaussian_mixture(), torch.arange(20) // 2)


def images():
    file = Path(score_sde.__file__).parent / "data" / "fashion_mnist" / "test.parquet"
    labels = load_dataset("parquet", data_files=str(file), split="train")["label"]
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(6))[:300]
    return ClassMixture(smoothed_images(), torch.tensor(labels)[chosen])


TARGETS = {"mixture": mixture, "images": images}


def draw(target, path, samples, scales, seed):
    """Noise for every scale, and the guided field f(x, t) of random classes."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, target.means.shape[1], generator=generator, dtype=torch.float64).repeat(len(scales), 1)
    labels = target.classes[torch.randint(len(target.classes), (samples,), generator=generator)].repeat(len(scales))
    each = torch.tensor(scales, dtype=torch.float64).repeat_interleave(samples)
    return noise, lambda x, t: target.guided(x, float(path.alpha(t)), float(path.sigma(t)), labels, each)


def figures(x, exact):
    """[(median, root mean square) for each of SCALES]."""
    distance = (x - exact).pow(2).mean(1).view(len(SCALES), -1).nan_to_num(math.inf, math.inf)
    rows = zip(distance.median(1).values.sqrt().tolist(), distance.mean(1).sqrt().tolist(), strict=True)
    return [tuple(float(f"{value:.3g}") for value in row) for row in rows]


def fitted(target, settings, scale):
    """A scheduler calibrated at this guidance scale, by other noise and classes; and the seconds it took."""
    scheduler = ScoreSDEScheduler(prediction_type="sample", **settings)
    noise, denoise = draw(target, scheduler.path, FITTED_TO, [scale], seed=77)
    begin = time.perf_counter()
    scheduler.calibrate(
        lambda x, timesteps: denoise(x, scheduler.path_time(timesteps[0])), list(EVALUATIONS), noise=noise
    )
    return scheduler, time.perf_counter() - begin


def compare(job):
    """{sampler: {evaluations: [(median, root mean square) for each of SCALES]}} on one path and target."""
    path_name, target_name, samples = job
    quiet()
    target, settings = TARGETS[target_name](), {"prediction_type": "sample"} | PATHS[path_name]
    path = ScoreSDEScheduler(**settings).path
    noise, denoise = draw(target, path, samples, SCALES, seed=5)
    exact = ours(ScoreSDEScheduler(**settings, predictor="rk4", timestep_spacing="logistic"), denoise, noise, 200)
    found = {}
    for sampler in stock_samplers(path):
        found[sampler.name] = {}
        for n in EVALUATIONS:
            try:
                found[sampler.name][n] = figures(run_stock(sampler, path, denoise, noise, n), exact)
            except (ValueError, IndexError, RuntimeError, AssertionError):
                continue
    auto = ScoreSDEScheduler(**settings)
    found["auto"] = {n: figures(ours(auto, denoise, noise, n, guidance_scale=None), exact) for n in EVALUATIONS}
    for scale in FITTED_AT:
        scheduler, seconds = fitted(target, PATHS[path_name], scale)
        found[f"fitted at {scale:g}"] = {n: figures(ours(scheduler, denoise, noise, n), exact) for n in EVALUATIONS}
        spent = [made_with["evaluations"] for _, _, made_with in scheduler.config.calibration.values()]
        found[f"cost at {scale:g}"] = {"seconds": round(seconds, 1), "evaluations": spent}
    if path_name == "sd":
        for name, predictor in (("AYS, DPM++ 2M", "dpmpp_2m"), ("AYS, UniPC 2", "unipc_2")):
            scheduler = ScoreSDEScheduler(**settings, predictor=predictor)
            scheduler.set_timesteps(timesteps=AysSchedules["StableDiffusionTimesteps"])
            x = noise * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                x = scheduler.step(denoise(x, scheduler.path_time(timestep)), timestep, x).prev_sample
            found[name] = {10: figures(x, exact)}
    return f"{path_name}, {target_name}", found


def report(results):
    lines = []
    for cell, found in results.items():
        stock = [name for name in found if not name.startswith(("auto", "fitted", "cost", "AYS"))]
        named = [name for name in ("DPM++ 2M karras", "AYS, DPM++ 2M", "AYS, UniPC 2") if name in found]
        columns = ["auto", *(f"fitted at {scale:g}" for scale in FITTED_AT), *named]
        lines += [f"\n{cell}:\n", "| evaluations | scale | best of diffusers' | " + " | ".join(columns) + " |"]
        lines.append("|" + "---|" * (3 + len(columns)))
        for n in EVALUATIONS:
            for i, scale in enumerate(SCALES):
                best = [min((found[name][n][i][k], name) for name in stock if n in found[name]) for k in (0, 1)]
                cells = [f"{best[0][0]:.3g} ({best[0][1]}), {best[1][0]:.3g}"]
                cells += ["{:.3g}, {:.3g}".format(*found[name][n][i]) if n in found[name] else "" for name in columns]
                lines.append(f"| {n} | {scale:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(description, compare, report, jobs, samples, of_what):
    """Run the jobs that the command line asks for, print their tables, and write all that was found.

    Args:
        compare: job -> (cell, found). report: {cell: found} -> text.
        jobs: (targets, samples) -> jobs. samples, of_what: how many by default, and what they are.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=samples, help=f"{of_what} (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="(default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write all figures to")
    options, results = parser.parse_args(), {}
    with ProcessPoolExecutor(options.processes) as pool:
        for cell, found in pool.map(compare, jobs(options.targets, options.samples)):
            results[cell] = found
            print(report({cell: found}), flush=True)
    if options.output:
        options.output.write_text(json.dumps(results) + "\n", encoding="utf-8")


def jobs(targets, samples):
    return [(path, target, samples) for target in targets for path in PATHS]


if __name__ == "__main__":
    run(__doc__, compare, report, jobs, 48, "trajectories per scale")
