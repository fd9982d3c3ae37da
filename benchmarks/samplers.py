"""Our samplers beside all of diffusers' on data whose exact probability-flow map is known.

    python benchmarks/samplers.py --output benchmarks/samplers.json

Targets: a 64-dimensional anisotropic Gaussian mixture, and Fashion-MNIST test images (12 x 12) smoothed by a Gaussian.
None of them was used to choose the rules of predictor "auto". For every path and number of network evaluations, every
scheduler of diffusers with every grid that it offers competes; the error of a sample is its root mean square distance
per dimension from where the exact probability-flow ODE leads from the same noise. The median and the root mean square
over the samples are reported beside those of the best of diffusers' (a different one for either figure, and for every
number of evaluations). "calibrated" has its times fitted on other noise of the same target. `--known` reads everything
but auto's errors from a file that an earlier run wrote, instead of measuring it.

Stochastic samplers: sliced Wasserstein-2 distance to the data, beside that between two sets of data.
"""

import argparse
import json
import math
import os
import platform
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import diffusers
import torch
from datasets import disable_progress_bars, load_dataset
from diffusers.utils import logging

import score_sde
from score_sde import DiscreteVPSDE, ScoreSDEScheduler
from stock_samplers import Stock, run_stock, stock_samplers


EVALUATIONS = (5, 6, 8, 10, 15, 20, 30, 50)
CALIBRATED = (5, 6, 8, 10)
PATHS = {"vp": {"sde_type": "discrete_vp"}, "ve": {"sde_type": "ve"}, "linear": {"sde_type": "linear"}}
STOCHASTIC_EVALUATIONS = (20, 50, 100, 200)


class Mixture:
    """A mixture of axis-aligned Gaussians: weights (K,), means and variances (K, D)."""

    def __init__(self, weights, means, variances):
        self.weights, self.means, self.variances = weights, means, variances

    def sample(self, n, generator):
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.variances[which].sqrt() * noise

    def denoised(self, x, alpha, sigma):
        """E[x0 | x_t], exactly."""
        variances = alpha**2 * self.variances + sigma**2
        means = alpha * self.means
        squares = (x**2) @ (1 / variances).T - 2 * x @ (means / variances).T + (means**2 / variances).sum(1)
        share = torch.softmax(self.weights.log() - (squares + variances.log().sum(1)) / 2, dim=1)
        gains = alpha * self.variances / variances
        return share @ (self.means - gains * means) + x * (share @ gains)


def gaussian_mixture():
    generator = torch.Generator().manual_seed(2)
    components, dimensions = 20, 64
    weights = torch.rand(components, generator=generator, dtype=torch.float64) + 0.3
    means = 0.8 * torch.randn(components, dimensions, generator=generator, dtype=torch.float64)
    spread = torch.linspace(math.log(0.001), math.log(0.5), dimensions, dtype=torch.float64).exp()
    variances = torch.stack([spread[torch.randperm(dimensions, generator=generator)] for _ in range(components)])
    return Mixture(weights / weights.sum(), means, variances)


def smoothed_images(number=300, size=12, std=0.07):
    file = Path(score_sde.__file__).parent / "data" / "fashion_mnist" / "test.parquet"
    images = load_dataset("parquet", data_files=str(file), split="train").with_format("torch")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(6))[:number]
    pixels = torch.stack([images[int(i)]["image"].reshape(1, 28, 28) for i in chosen]).double() / 127.5 - 1
    means = torch.nn.functional.interpolate(pixels, size=(size, size), mode="area").flatten(1)
    return Mixture(torch.full((number,), 1 / number, dtype=torch.float64), means, torch.full_like(means, std**2))


TARGETS = {"mixture": gaussian_mixture, "images": smoothed_images}


def ours(scheduler, denoise, noise, evaluations, generator=None, guidance_scale=1.0):
    """Run a scheduler of ours, with exact times instead of the float32 ones that networks receive."""
    scheduler.set_timesteps(evaluations, guidance_scale=guidance_scale)
    x = noise * scheduler.init_noise_sigma
    for timestep, stage in zip(scheduler.timesteps, scheduler._planned().stages, strict=True):
        x = scheduler.step(denoise(x, stage.t_eval), timestep, x, generator=generator).prev_sample
    return x


def errors(x, exact):
    distance = (x - exact).pow(2).mean(1)
    return tuple(float(f"{value:.4g}") for value in (distance.median().sqrt(), distance.mean().sqrt()))


def quiet():
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def compare(job):
    """Errors of every sampler on one path and target: {sampler: {evaluations: (median, root mean square)}}; all but
    those of auto may be known."""
    path_name, target_name, samples, known = job
    quiet()
    target, scheduler = TARGETS[target_name](), ScoreSDEScheduler(prediction_type="sample", **PATHS[path_name])
    path = scheduler.path

    def denoise(x, t):
        return target.denoised(x, path.alpha(t), path.sigma(t))

    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(samples, target.means.shape[1], generator=generator, dtype=torch.float64)
    exact = ours(scheduler, denoise, noise, 1000)
    auto = {n: errors(ours(scheduler, denoise, noise, n), exact) for n in EVALUATIONS}
    if known:
        return path_name, target_name, known | {"auto": auto}, {}
    found, failures = {}, {}
    for sampler in stock_samplers(path):
        found[sampler.name] = {}
        for n in EVALUATIONS:
            try:
                found[sampler.name][n] = errors(run_stock(sampler, path, denoise, noise, n), exact)
            except (ValueError, IndexError, RuntimeError) as error:
                failures[sampler.name] = f"{type(error).__name__}: {error}"[:200]
    found["auto"] = auto
    found["exact"] = {1000: errors(ours(scheduler, denoise, noise, 500), exact)}
    other = torch.randn(32, noise.shape[1], generator=generator, dtype=torch.float64)
    scheduler.calibrate(
        lambda x, timesteps: denoise(x, scheduler.path_time(timesteps[0])), list(CALIBRATED), noise=other
    )
    found["calibrated"] = {n: errors(ours(scheduler, denoise, noise, n), exact) for n in CALIBRATED}
    return path_name, target_name, found, failures


def sliced_wasserstein(x, y, directions=256):
    """Sliced Wasserstein-2 distance between two sets of samples of the same size."""
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(x.shape[1], directions, generator=generator, dtype=x.dtype)
    along = along / along.norm(dim=0)
    return float(((x @ along).sort(dim=0).values - (y @ along).sort(dim=0).values).pow(2).mean().sqrt())


OUR_STOCHASTIC = {
    "ancestral": {"predictor": "ancestral"},
    "euler_maruyama": {"predictor": "euler_maruyama"},
    "reverse_diffusion": {"predictor": "reverse_diffusion"},
    "dpmpp_2m, eta 1": {"predictor": "dpmpp_2m", "eta": 1.0, "timestep_spacing": "logistic"},
    "heun, s_churn 20": {
        "predictor": "heun", "s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 50.0, "timestep_spacing": "karras",
    },
    "reverse_diffusion + langevin (Song's PC)": {
        "predictor": "reverse_diffusion", "corrector": "langevin", "corrector_position": "before",
    },
}  # fmt: skip


def compare_stochastic(job):
    """Sliced Wasserstein-2 distances of stochastic samplers to the data, on the noise levels of DDPM."""
    target_name, samples = job
    quiet()
    target, generator = TARGETS[target_name](), torch.Generator().manual_seed(7)
    data, others = (target.sample(samples, generator) for _ in range(2))
    noise = torch.randn(samples, target.means.shape[1], generator=generator, dtype=torch.float64)
    found, path = {"data": sliced_wasserstein(others, data)}, DiscreteVPSDE.from_beta_schedule()

    def denoise(x, t):
        return target.denoised(x, path.alpha(t), path.sigma(t))

    for name, settings in OUR_STOCHASTIC.items():
        found[f"score_sde {name}"] = {}
        for n in STOCHASTIC_EVALUATIONS:
            scheduler = ScoreSDEScheduler(sde_type="discrete_vp", prediction_type="sample", **settings)
            # as many steps as the evaluations allow
            steps = (n - 1) // scheduler.order + 1 if settings.get("corrector") is None else n // scheduler.order
            x = ours(scheduler, denoise, noise, steps, generator)
            found[f"score_sde {name}"][n] = sliced_wasserstein(x, data)
    stock = [
        Stock("DDPM", diffusers.DDPMScheduler, {"clip_sample": False}, "vp"),
        Stock("Euler ancestral", diffusers.EulerAncestralDiscreteScheduler, {}, "sigma"),
        Stock("SDE-DPM++ 2M karras", diffusers.DPMSolverMultistepScheduler,
              {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, "vp"),
        Stock("SA-Solver", diffusers.SASolverScheduler, {}, "vp"),
    ]  # fmt: skip
    for sampler in stock:
        found[f"diffusers {sampler.name}"] = {}
        for n in STOCHASTIC_EVALUATIONS:
            x = run_stock(sampler, path, denoise, noise, n, generator=generator)
            found[f"diffusers {sampler.name}"][n] = sliced_wasserstein(x, data)
    return target_name, found


def by_number(found):
    """{sampler: {evaluations: figures}} with the numbers that JSON has as strings."""
    return {
        name: {int(n): v for n, v in each.items()} if isinstance(each, dict) else each for name, each in found.items()
    }


def best_stock(found, n, figure):
    """(error, sampler) of the best of diffusers' at this number of evaluations."""
    stock = {name: figures for name, figures in found.items() if name not in ("auto", "calibrated", "exact")}
    return min((v[n][figure], name) for name, v in stock.items() if n in v and math.isfinite(v[n][figure]))


def report(results, stochastic):
    lines, ratios = [], {"auto": [], "calibrated": []}
    for (path_name, target_name), found in results.items():
        lines += [
            f"\n{path_name}, {target_name}:\n",
            "| evaluations | diffusers' best median | auto | calibrated | diffusers' best rms | auto | calibrated |",
            "|---|---|---|---|---|---|---|",
        ]
        for n in EVALUATIONS:
            cells = [str(n)]
            for figure in (0, 1):
                best, name = best_stock(found, n, figure)
                cells.append(f"{best:.1e} {name}")
                for sampler in ("auto", "calibrated"):
                    value = found[sampler].get(n)
                    cells.append("" if value is None else f"{value[figure] / best:.2f}")
                    if value is not None:
                        ratios[sampler].append((n, figure, value[figure] / best))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append(f"\n(error of the exact solution: {found['exact'][1000][0]:.0e}, {found['exact'][1000][1]:.0e})")
    lines.append("")
    for sampler, most in (("auto", 50), ("auto", 20), ("calibrated", 10)):
        for figure, name in enumerate(("median", "rms")):
            chosen = [ratio for n, which, ratio in ratios[sampler] if which == figure and n <= most]
            lines.append(
                f"{sampler}, up to {most} evaluations, {name}: {sum(r <= 1 for r in chosen)} of {len(chosen)} cells "
                f"at or below the best of diffusers', {sum(r <= 0.7 for r in chosen)} at or below 0.7 of it, "
                f"largest {max(chosen):.2f}"
            )
    for target_name, found in stochastic.items():
        lines += [
            f"\nStochastic, vp, {target_name}: sliced Wasserstein-2 distance (between two sets of data: "
            f"{found['data']:.4f})\n",
            "| sampler | " + " | ".join(f"{n} evaluations" for n in STOCHASTIC_EVALUATIONS) + " |",
            "|---|" + "---|" * len(STOCHASTIC_EVALUATIONS),
        ]
        for name, figures in found.items():
            if name != "data":
                lines.append(f"| {name} | " + " | ".join(f"{figures[n]:.4f}" for n in STOCHASTIC_EVALUATIONS) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
    )
    parser.add_argument("--samples", type=int, default=192, help="trajectories per sampler (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    parser.add_argument("--known", type=Path, help="JSON file of an earlier run")
    parser.add_argument("--output", type=Path, help="JSON file to write machine, versions and all errors to")
    options = parser.parse_args()

    begin = time.perf_counter()
    earlier, known = {}, {}
    if options.known:
        earlier = json.loads(options.known.read_text(encoding="utf-8"))
        for cell, of in earlier["errors"].items():
            known[cell] = by_number(of)
    jobs = [
        (path, target, options.samples, known.get(f"{path}, {target}"))
        for target in reversed(TARGETS)
        for path in PATHS
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        deterministic = pool.map(compare, jobs)
        if options.known:
            stochastic = {
                target: {
                    name: of if name == "data" else {int(n): v for n, v in of.items()} for name, of in each.items()
                }
                for target, each in earlier["sliced_wasserstein"].items()
            }
        else:
            stochastic = dict(pool.map(compare_stochastic, [(target, 10 * options.samples) for target in TARGETS]))
        results, failures = {}, {}
        for path, target, found, failed in deterministic:
            results[path, target], failures[f"{path}, {target}"] = found, failed
    print(report(dict(sorted(results.items(), reverse=True)), stochastic))
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s on {options.processes} cores; failed: {failures}")
    if options.output:
        document = {
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, score_sde)},
            "samples": options.samples,
            "seconds": round(seconds),
            "errors": {f"{path}, {target}": found for (path, target), found in results.items()},
            "sliced_wasserstein": stochastic,
            "failures": failures,
        }
        options.output.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
