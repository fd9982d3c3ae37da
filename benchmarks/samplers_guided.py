"""Our `auto` beside all of diffusers' samplers under classifier-free guidance, on exact class-conditional scores.

    python benchmarks/samplers_guided.py --output benchmarks/samplers_guided.json

Targets: mixtures of Gaussians with classes: anisotropic ones of 64 dimensions, Fashion-MNIST images smoothed by a
Gaussian, and latent-like ones of 4 x 16 x 16 numbers, whose covariances are of low rank and smooth in space, plus a
diagonal. Their denoised samples, of a class and of all, are known, and so is the guided field D + w (D_class - D). The
error of a sample is its root mean square distance per dimension from where that field's own ODE leads from the same
noise (300 steps of rk4; the file has the distance from 150 steps). A sample has diverged when its error is above three
times the size of where the ODE leads, or not finite.

Stock samplers: every scheduler of diffusers with every grid, as in samplers.py, at the same number of evaluations.
`--targets chosen` takes the targets by which the rules of "auto" were chosen, "shown" others. `--stock` reads the stock
samplers' errors from a file that an earlier run wrote, instead of measuring them. "auto" is measured twice: told the
scale, as by pipelines of this package, and untold, as by stock pipelines. Untold it also stands beside the usual pick:
DPM++ 2M, on Karras' grid where it has one, at 25 evaluations and scale 7.5.

`--perturbed` measures networks with errors instead, beside some stock samplers: the noise predicted for the class and
for all, each rounded to bfloat16 or float16, or each at the nearest of 1,000 whole timesteps (against the exact field's
ends); the guided denoised sample clipped to [-1, 1], or dynamically thresholded (against the ends of the field that is
clipped so); or each with a smooth error of 5 % of its own (against the ends of the field with these errors).
`--errors` chooses among them.
"""

import argparse
import json
import math
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import diffusers
import torch
from datasets import load_dataset
from samplers import ours, quiet

import score_sde
from score_sde import ScoreSDEScheduler
from score_sde.schedulers.parameterization import threshold
from score_sde.schedulers.solvers import automatic
from stock_samplers import run_stock, stock_samplers


EVALUATIONS = (5, 6, 8, 10, 15, 20, 30, 50)
SCALES = (1.0, 2.0, 4.0, 7.5, 12.0)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PATHS = {
    "sd": {"sde_type": "discrete_vp"} | STABLE_DIFFUSION,
    "edm": {"sde_type": "edm"},
    "flow": {"sde_type": "linear"},
    "flow, shift 3": {"sde_type": "linear", "shift": 3.0},
}
USUAL = {"evaluations": 25, "scale": 7.5, "samplers": ("DPM++ 2M karras", "DPM++ 2M flow")}

PERTURBATIONS = ("none", "bfloat16", "float16", "whole timesteps", "clipped", "thresholded", "5 % smooth")
# what is no field that an ODE could follow
ROUNDING = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PERTURBED_EVALUATIONS, PERTURBED_SCALES = (8, 15, 25, 50), (2.0, 7.5)
BESIDE = ("DPM++ 2M karras", "DEIS 2 karras", "UniPC 2 exponential", "Euler linspace")


class ClassMixture:
    """A mixture of Gaussians with covariances diag(variances) + F F^T, each of one class.

    Args:
        means: (K, D). variances: of all, (D,); or, without factors, of each, (K, D).
        factors: F of each, (K, D, R), or None.
        classes: of each Gaussian, (K,).
        dimensions: of what the D coordinates stand for. noise: f(samples, generator), in these coordinates.
    """

    def __init__(self, means, variances, classes, factors=None, dimensions=None, noise=None):
        self.means, self.variances, self.classes, self.factors = means, variances, classes, factors
        self.dimensions = dimensions or means.shape[1]
        self.noise = noise or self.standard_normal
        if factors is not None:
            self.stacked = factors.transpose(1, 2).flatten(0, 1)  # (K R, D)

    def standard_normal(self, samples, generator):
        return torch.randn(samples, self.dimensions, generator=generator, dtype=torch.float64)

    def denoised(self, x, alpha, sigma, labels, scale):
        """D + scale (D_class - D) for samples x (B, D) with labels and scales (B,)."""
        total = alpha**2 * self.variances + sigma**2
        gain = alpha * self.variances / total
        if self.variances.ndim == 2:
            means = alpha * self.means
            squares = (x**2) @ (1 / total).T - 2 * x @ (means / total).T + (means**2 / total).sum(1)
            share = self.guided_share(squares + total.log().sum(1), labels, scale)
            return share @ (self.means - gain * self.means * alpha) + x * (share @ gain)
        squares = alpha**2 * (self.means**2 / total).sum(1) - 2 * alpha * x @ (self.means / total).T
        if self.factors is None:
            share = self.guided_share(squares, labels, scale)
            return gain * x + (1 - alpha * gain) * (share @ self.means)
        k, d, r = self.factors.shape
        scaled = self.stacked / total  # F^T A^-1, of all
        inner = torch.eye(r).to(x) + alpha**2 * torch.einsum("krd,kds->krs", scaled.view(k, r, d), self.factors)
        left = (x @ scaled.T).view(-1, k, r) - alpha * torch.einsum("krd,kd->kr", scaled.view(k, r, d), self.means)
        inside = torch.einsum("krs,bks->bkr", torch.linalg.inv(inner), left)
        squares = squares - alpha**2 * (left * inside).sum(2)
        share = self.guided_share(squares + torch.logdet(inner), labels, scale)
        inside = (share[:, :, None] * inside).flatten(1)
        return gain * x + (1 - alpha * gain) * (share @ self.means + alpha * inside @ self.stacked)

    def guided_share(self, doubled, labels, scale):
        """Weights (B, K) of the Gaussians' own denoised samples, from -2 log density up to what all have in common."""
        of_class = self.classes == labels[:, None]
        of_all = torch.softmax(-doubled / 2, dim=1)
        of_its = torch.softmax(torch.where(of_class, -doubled / 2, -math.inf), dim=1)
        return of_all + scale[:, None] * (of_its - of_all)


def anisotropic(seed, components=3, spread=0.8, largest=0.5, classes=10, dimensions=64):
    generator = torch.Generator().manual_seed(seed)
    number = classes * components
    centers = torch.randn(classes, 1, dimensions, generator=generator, dtype=torch.float64)
    around = torch.randn(classes, components, dimensions, generator=generator, dtype=torch.float64)
    means = spread * (0.7 * centers + 0.7 * around).flatten(0, 1)
    variances = torch.linspace(math.log(0.001), math.log(largest), dimensions, dtype=torch.float64).exp()
    variances = torch.stack([variances[torch.randperm(dimensions, generator=generator)] for _ in range(number)])
    return ClassMixture(means, variances, torch.arange(classes).repeat_interleave(components))


def images(split, seed, size, std, number=300):
    file = Path(score_sde.__file__).parent / "data" / "fashion_mnist" / f"{split}.parquet"
    data = load_dataset("parquet", data_files=str(file), split="train").with_format("torch")
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:number]
    rows = [data[int(i)] for i in chosen]
    pixels = torch.stack([row["image"].reshape(1, 28, 28) for row in rows]).double() / 127.5 - 1
    means = torch.nn.functional.interpolate(pixels, size=(size, size), mode="area").flatten(1)
    variances = torch.full((means.shape[1],), std**2, dtype=torch.float64)
    return ClassMixture(means, variances, torch.tensor([int(row["label"]) for row in rows]))


def latents(seed, rank=6, components=2, between=0.4, rest=0.3, classes=8, channels=4, size=16, waves=6):
    """Smooth patterns: cosines in space, weighted by one over their frequency, in random mixtures of the channels.

    The coordinates are those of the cosines. What is orthogonal to them in a channel is normally distributed and keeps
    its direction on every trajectory: one coordinate, which begins as the norm of all of it.
    """
    generator = torch.Generator().manual_seed(seed)
    number, inside, dimensions = classes * components, channels * waves**2, channels * size**2
    frequency = torch.arange(float(waves), dtype=torch.float64)
    weight = 1 / (1 + frequency[:, None] ** 2 + frequency**2).sqrt()

    def patterns(*shape):
        """Of mean square 1 per dimension."""
        made = torch.randn(*shape, channels, waves, waves, generator=generator, dtype=torch.float64) * weight
        made = made.flatten(-3)
        made = made / made.norm(dim=-1, keepdim=True) * math.sqrt(dimensions)
        return torch.nn.functional.pad(made, (0, channels))

    means = between * (patterns(classes, 1) + 0.7 * patterns(classes, components)).flatten(0, 1)
    strength = torch.linspace(1, 0.2, rank, dtype=torch.float64)
    factors = (0.8 * strength / strength.norm())[:, None] * patterns(number, rank)
    variances = rest**2 * (0.5 + torch.rand(channels, generator=generator, dtype=torch.float64))
    variances = torch.cat([variances.repeat_interleave(waves**2), variances])
    classes = torch.arange(classes).repeat_interleave(components)

    def noise(samples, generator):
        made = torch.randn(samples, dimensions, generator=generator, dtype=torch.float64)
        others = made[:, inside:].view(samples, channels, -1).norm(dim=2)
        return torch.cat([made[:, :inside], others], dim=1)

    return ClassMixture(means, variances, classes, factors.transpose(1, 2).contiguous(), dimensions, noise)


CHOSEN = {
    "mixture A": lambda: anisotropic(11),
    "mixture B": lambda: anisotropic(12, components=6, spread=0.5, largest=0.3),
    "images A": lambda: images("train", 13, 10, 0.1),
    "latents A": lambda: latents(14),
    "latents B": lambda: latents(15, rank=10, between=0.2, rest=0.15, classes=12),
}
SHOWN = {
    "mixture": lambda: anisotropic(31, components=4, spread=0.65),
    "images": lambda: images("test", 32, 12, 0.07),
    "latents": lambda: latents(33, rank=8, between=0.3, rest=0.2, classes=10),
}
TARGETS = CHOSEN | SHOWN


class Trial:
    """One target on one path, with noise, labels and scales: a batch of `samples` for each of SCALES, whose exact ends
    are known. `error` is one of PERTURBATIONS."""

    def __init__(self, path_name, target_name, samples, reference_steps=300, error="none"):
        self.error = "none" if error in ROUNDING or error == "whole timesteps" else error
        self.target = TARGETS[target_name]()
        self.settings = PATHS[path_name]
        self.path = ScoreSDEScheduler(**self.settings).path
        generator = torch.Generator().manual_seed(5)
        noise = self.target.noise(samples, generator)
        labels = self.target.classes[torch.randint(len(self.target.classes), (samples,), generator=generator)]
        self.samples, self.noise, self.labels = samples, noise.repeat(len(SCALES), 1), labels.repeat(len(SCALES))
        self.scales = torch.tensor(SCALES, dtype=torch.float64).repeat_interleave(samples)
        # to clean data: below the least noise that the stock samplers know
        reference = {"predictor": "rk4", "timestep_spacing": "logistic", "prediction_type": "sample", "t_min": 1e-6}
        reference = ScoreSDEScheduler(**self.settings | {"shift": 1.0} | reference)
        self.exact = ours(reference, self.denoise, self.noise, reference_steps)
        coarser = ours(reference, self.denoise, self.noise, reference_steps // 2)
        self.uncertainty = self.figures(coarser)
        self.error = error

    def denoise(self, x, t):
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        if self.error in ("none", "clipped", "thresholded"):
            denoised = self.target.denoised(x, alpha, sigma, self.labels, self.scales)
            if self.error == "thresholded":
                return threshold(denoised, 0.995, 100.0)
            return denoised if self.error == "none" else denoised.clamp(-1, 1)
        if self.error == "whole timesteps":
            # the noise that the network sees at another time, for the sample as it is
            told = max(round(1000 * float(t)), 1) / 1000
            alpha_told, sigma_told = float(self.path.alpha(told)), float(self.path.sigma(told))
            denoised = self.target.denoised(x, alpha_told, sigma_told, self.labels, self.scales)
            return (x - sigma / sigma_told * (x - alpha_told * denoised)) / alpha
        of_all, of_its = (self.with_error(x, alpha, sigma, which) for which in (0, 1))
        return of_all + self.scales[:, None] * (of_its - of_all)

    def with_error(self, x, alpha, sigma, which):
        """The denoised sample of a network that predicts the noise, of all (0) or of the class (1)."""
        scale = torch.full_like(self.scales, which)
        noise = (x - alpha * self.target.denoised(x, alpha, sigma, self.labels, scale)) / sigma
        if self.error in ROUNDING:
            noise = noise.to(ROUNDING[self.error]).double()
        else:
            generator = torch.Generator().manual_seed(which)
            weight = torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=x.dtype) / x.shape[1] ** 0.5
            phase = 3 * torch.randn(x.shape[1], generator=generator, dtype=x.dtype) + math.log(sigma / alpha)
            noise = noise + 0.05 * math.sqrt(2) * torch.sin(x / math.hypot(alpha, sigma) @ weight + phase)
        return (x - sigma * noise) / alpha

    def ours(self, scheduler, n, guidance_scale):
        return ours(scheduler, self.denoise, self.noise, n, guidance_scale=guidance_scale)

    def figures(self, x):
        """[(median, root mean square, diverged samples) for each scale]."""
        dimensions = self.target.dimensions
        distance = (x - self.exact).pow(2).sum(1).view(len(SCALES), -1) / dimensions
        size = self.exact.pow(2).sum(1).view(len(SCALES), -1).mean(1, keepdim=True) / dimensions
        diverged = ~(distance < 9 * size)
        distance = distance.nan_to_num(math.inf, math.inf)
        rows = zip(distance.median(1).values.sqrt(), distance.mean(1).sqrt(), diverged.sum(1), strict=True)
        return [(float(f"{a:.4g}"), float(f"{b:.4g}"), int(c)) for a, b, c in rows]


def measure_stock(job):
    """{sampler: {evaluations: figures}} of all stock samplers of one trial; and what failed."""
    quiet()
    trial, found, failures = Trial(*job), {}, {}
    for sampler in stock_samplers(trial.path, trial.settings.get("shift", 1.0)):
        found[sampler.name] = {}
        for n in EVALUATIONS:
            try:
                x = run_stock(sampler, trial.path, trial.denoise, trial.noise, n)
                found[sampler.name][n] = trial.figures(x)
            except (ValueError, IndexError, RuntimeError, AssertionError) as error:
                failures[f"{sampler.name}, {n}"] = f"{type(error).__name__}: {error}"[:100]
    return found, trial.uncertainty, failures


def measure_auto(job):
    """{"told": ..., "untold": {evaluations: figures}} of our default, told the guidance scale or not; and "usual": the
    figures of it, untold, and of the usual pick at one number of evaluations and scale."""
    quiet()
    trial, scheduler = Trial(*job), ScoreSDEScheduler(**PATHS[job[0]], prediction_type="sample")
    untold = {n: trial.figures(trial.ours(scheduler, n, None)) for n in EVALUATIONS}
    told = {}
    for n in EVALUATIONS:
        # the scale of a trajectory is one number; those of one rule are run together
        rules = [automatic(n, scale, -float(trial.path.half_log_snr(1.0))) for scale in SCALES]
        ran = {rule: trial.figures(trial.ours(scheduler, n, SCALES[rules.index(rule)])) for rule in set(rules)}
        told[n] = [ran[rule][i] for i, rule in enumerate(rules)]
    n, i = USUAL["evaluations"], SCALES.index(USUAL["scale"])
    samplers = stock_samplers(trial.path, trial.settings.get("shift", 1.0))
    [pick] = [sampler for sampler in samplers if sampler.name in USUAL["samplers"]]
    ends = {
        "auto": trial.ours(scheduler, n, None),
        pick.name: run_stock(pick, trial.path, trial.denoise, trial.noise, n),
    }
    return {"told": told, "untold": untold, "usual": {name: trial.figures(x)[i] for name, x in ends.items()}}


def measure_perturbed(path, target, samples, errors):
    """{error: {sampler: {evaluations: figures}}} of our default, untold, and of BESIDE."""
    quiet()
    found = {}
    for error in errors:
        trial = Trial(path, target, samples, 100, error)
        scheduler = ScoreSDEScheduler(**PATHS[path], prediction_type="sample")
        found[error] = {"auto": {n: trial.figures(trial.ours(scheduler, n, None)) for n in PERTURBED_EVALUATIONS}}
        for sampler in stock_samplers(trial.path):
            if sampler.name in BESIDE:
                found[error][sampler.name] = {
                    n: trial.figures(run_stock(sampler, trial.path, trial.denoise, trial.noise, n))
                    for n in PERTURBED_EVALUATIONS
                }
    return found


def report_perturbed(found):
    """Medians, root mean squares and diverged samples at each of PERTURBED_SCALES."""
    lines = []
    for scale in PERTURBED_SCALES:
        heads = " | ".join(f"{n} evaluations" for n in PERTURBED_EVALUATIONS)
        lines += [
            f"\nscale {scale:g}\n",
            f"| error, sampler | {heads} |",
            "|---|" + "---|" * len(PERTURBED_EVALUATIONS),
        ]
        for error, samplers in found.items():
            for name, figures in samplers.items():
                cells = (figures[n][SCALES.index(scale)] for n in PERTURBED_EVALUATIONS)
                cells = (f"{a:.3f}, {b:.3f}" + (f" ({c})" if c else "") for a, b, c in cells)
                lines.append(f"| {error}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def geometric_mean(values):
    return math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))


def report(stock, auto):
    """Ratios of auto to the best single stock sampler, by geometric means over the targets, on each path."""
    lines, paths = [], dict.fromkeys(path for path, _ in auto)
    for who in ("told", "untold"):
        for path in paths:
            targets = [target for its, target in auto if its == path]
            lines += [
                f"\n{path}, auto {who} the scale: {', '.join(targets)}\n",
                "| evaluations | " + " | ".join(f"scale {scale:g}" for scale in SCALES) + " | diverged |",
                "|---|" + "---|" * (len(SCALES) + 1),
            ]
            for n in EVALUATIONS:
                cells, diverged = [], 0
                for i in range(len(SCALES)):
                    pair = []
                    for figure in (0, 1):
                        its = geometric_mean([auto[path, target][who][n][i][figure] for target in targets])
                        best = min(
                            geometric_mean([stock[path, target][name][n][i][figure] for target in targets])
                            for name in stock[path, targets[0]]
                            if all(n in stock[path, target][name] for target in targets)
                        )
                        pair.append(f"{its / best:.2f}")
                    cells.append(", ".join(pair))
                    diverged += sum(auto[path, target][who][n][i][2] for target in targets)
                lines.append(f"| {n} | " + " | ".join(cells) + f" | {diverged} |")
    lines += [f"\nat {USUAL['evaluations']} evaluations and scale {USUAL['scale']}: median, rms, diverged"]
    lines += [f"{path}, {target}: {found['usual']}" for (path, target), found in auto.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
    )
    parser.add_argument("--samples", type=int, default=40, help="trajectories per scale (default: %(default)s)")
    parser.add_argument("--targets", choices=("chosen", "shown"), default="shown", help="(default: %(default)s)")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="(default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    parser.add_argument("--perturbed", action="store_true", help="on Stable Diffusion's betas, the first target")
    parser.add_argument(
        "--errors", nargs="+", choices=PERTURBATIONS, default=list(PERTURBATIONS), help="(default: all)"
    )
    parser.add_argument("--stock", type=Path, help="JSON file of an earlier run")
    parser.add_argument("--output", type=Path, help="JSON file to write machine, versions and all errors to")
    options = parser.parse_args()

    begin = time.perf_counter()
    targets = CHOSEN if options.targets == "chosen" else SHOWN
    if options.perturbed:
        print(report_perturbed(measure_perturbed("sd", next(iter(targets)), options.samples, options.errors)))
        return
    jobs = [(path, target, options.samples) for path in options.paths for target in targets]
    stock, uncertainty, failures = {}, {}, {}
    with ProcessPoolExecutor(options.processes) as pool:
        if options.stock:
            known = json.loads(options.stock.read_text(encoding="utf-8"))
            uncertainty, failures = known["uncertainty"], known["failures"]
            for path, target, _ in jobs:
                found = known["stock"].get(f"{path} | {target}")
                if found is not None:
                    stock[path, target] = {name: {int(n): v for n, v in of.items()} for name, of in found.items()}
            jobs = [job for job in jobs if job[:2] in stock]
        else:
            for (path, target, _), found in zip(jobs, pool.map(measure_stock, jobs), strict=True):
                name = f"{path} | {target}"
                stock[path, target], uncertainty[name], failures[name] = found
        auto = {job[:2]: found for job, found in zip(jobs, pool.map(measure_auto, jobs), strict=True)}
    print(report(stock, auto))
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s on {options.processes} cores")
    if options.output:
        document = {
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, score_sde)},
            "samples": options.samples,
            "seconds": round(seconds),
            "median, rms, diverged by scale": {f"{path} | {target}": found for (path, target), found in auto.items()},
            "stock": {f"{path} | {target}": found for (path, target), found in stock.items()},
            "uncertainty": uncertainty,
            "failures": failures,
        }
        options.output.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
