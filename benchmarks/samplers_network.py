"""Samplers on a trained network: the model of the quick start, or any other bundle, beside diffusers' samplers.

    python benchmarks/samplers_network.py --pipeline runs/quick_start/diffusion/pipeline \
        --guidance_scale 1.5 --output benchmarks/samplers_network

For every number of network evaluations, the error of a sample is the root mean square distance per dimension of its
latent from where 500 steps along the same model's own probability-flow ODE lead from the same noise, and the accuracy
is that of a small classifier, trained on real images, against the classes asked for. Of diffusers' samplers those
compete that were best somewhere in samplers.py, and the usual ones. Prints a table, writes all figures (.json) and a
plot (.png). In a bundle as samplers.json (--output FOLDER/samplers), they stand on its card once that is written anew:
`score-sde card FOLDER`.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import diffusers
import matplotlib
import torch
from datasets import disable_progress_bars
from diffusers.utils import logging
from tqdm.auto import tqdm

from score_sde import ScoreSDEScheduler, load_bundle
from stock_samplers import run_stock, stock_samplers


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


TRAINING = Path(__file__).resolve().parents[1] / "training"
from score_sde.training.evaluate import EvaluateConfig, image_shape  # noqa: E402
from score_sde.training.parts.classifier import accuracy, train_classifier  # noqa: E402
from score_sde.training.parts.data import ImageDataset  # noqa: E402
from score_sde.training.parts.options import parse  # noqa: E402
from score_sde.training.parts.provenance import provenance  # noqa: E402
from score_sde.training.parts.real_images import complete  # noqa: E402


EVALUATIONS = (5, 6, 8, 10, 15, 20, 30, 50)
STOCK = ["DDIM trailing", "Euler linspace", "Heun karras", "SA-Solver leading"]
STOCK += [f"DPM++ 2M {grid}" for grid in ("linspace", "trailing", "karras", "exponential")]
STOCK += [f"{name} {grid}" for name in ("UniPC 2", "UniPC 3", "DEIS 3") for grid in ("linspace", "exponential")]
# drawn with their names; the others are grey
NAMED = ("DDIM trailing", "DPM++ 2M trailing", "DPM++ 2M karras", "UniPC 2 linspace", "DEIS 3 exponential")


@torch.no_grad()
def measure(pipeline, labels, guidance_scale, classifier, seed):
    """{sampler: {evaluations: (median error, root mean square error, accuracy)}}, and the accuracy of the reference."""
    scheduler = ScoreSDEScheduler.from_config(pipeline.scheduler.config, predictor="auto")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pipeline.sample_shape(len(labels)), generator=generator)
    network = pipeline.guided_network(len(labels), labels, guidance_scale)
    denoise, targets = scheduler.denoiser(network), torch.tensor(labels)

    def ours(scheduler, steps):
        scheduler.set_timesteps(steps, guidance_scale=guidance_scale)
        x = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)))
            x = scheduler.step(output, timestep, x).prev_sample
        return x

    def judge(x):
        return accuracy(classifier, pipeline.decode(x).clamp(-1, 1), targets)

    reference = ours(scheduler, 500)

    def figures(x):
        distance = (x - reference).flatten(1).pow(2).mean(1)
        return [distance.median().sqrt().item(), distance.mean().sqrt().item(), judge(x)]

    found = {"auto": {n: figures(ours(scheduler, n)) for n in EVALUATIONS}}
    pipeline.scheduler, few = scheduler, [n for n in EVALUATIONS if n <= 10]
    begin = time.perf_counter()
    scheduler.calibrate(pipeline, few, guidance_scale=guidance_scale, generator=generator)
    print(f"times for {few} evaluations fitted in {time.perf_counter() - begin:.0f} s", flush=True)
    found["calibrated"] = {n: figures(ours(scheduler, n)) for n in few}
    for sampler in tqdm([each for each in stock_samplers(scheduler.path) if each.name in STOCK]):
        found[sampler.name] = {
            n: figures(run_stock(sampler, scheduler.path, denoise, noise, n).float()) for n in EVALUATIONS
        }
    return found, judge(reference)


def report(found, reference_accuracy):
    lines = [
        "| evaluations | auto | calibrated | best of diffusers' | auto / best | accuracy: auto | calibrated | "
        "DPM++ 2M trailing | UniPC 2 linspace |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for n in EVALUATIONS:
        best, name = min((figures[n][0], name) for name, figures in found.items() if name in STOCK)
        calibrated = found["calibrated"].get(n)
        lines.append(
            f"| {n} | {found['auto'][n][0]:.4f} | {'' if calibrated is None else f'{calibrated[0]:.4f}'} "
            f"| {best:.4f} {name} | {found['auto'][n][0] / best:.2f} | {found['auto'][n][2]:.1%} "
            f"| {'' if calibrated is None else f'{calibrated[2]:.1%}'} "
            f"| {found['DPM++ 2M trailing'][n][2]:.1%} | {found['UniPC 2 linspace'][n][2]:.1%} |"
        )
    return "\n".join([*lines, f"\n500 steps: accuracy {reference_accuracy:.1%}"])


def plot(found, reference_accuracy, guidance_scale, file):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    for name, figures in found.items():
        ours, named = name in ("auto", "calibrated"), name in NAMED
        style = {"linewidth": 2.5, "marker": "o"} if ours else {"linewidth": 1.2, "marker": "."}
        if not ours and not named:
            style |= {"color": "0.8", "zorder": 0}
        label = f"score_sde {name}" if ours else f"diffusers {name}" if named else None
        left.plot(list(figures), [value[0] for value in figures.values()], label=label, **style)
        right.plot(list(figures), [100 * value[2] for value in figures.values()], label=label, **style)
    right.axhline(100 * reference_accuracy, color="black", linewidth=0.8, linestyle="--", label="500 steps")
    left.set(yscale="log", ylabel="median error of the latent (rms per dimension)")
    right.set(ylabel="recognised as the class asked for, %")
    for axes in (left, right):
        axes.set(xscale="log", xticks=EVALUATIONS, xticklabels=EVALUATIONS, xlabel="network evaluations")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"Samplers on the model of the quick start, guidance scale {guidance_scale:g}")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder of a class-conditional bundle")
    parser.add_argument("--config", default=str(TRAINING / "configs/quick_start/evaluation.yaml"), help="its data")
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="where .json and .png are written, without the ending")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()

    config = parse(EvaluateConfig, [options.config, "--pipeline", options.pipeline])
    pipeline, device = load_bundle(options.pipeline), torch.device("cpu")
    config = complete(config, image_shape(pipeline))
    classifier = train_classifier(ImageDataset(config), config.classifier_epochs, config.seed, device)
    labels = [i % pipeline.num_classes for i in range(options.samples)]
    found, reference_accuracy = measure(pipeline, labels, options.guidance_scale, classifier, options.seed)
    print(report(found, reference_accuracy))
    plot(found, reference_accuracy, options.guidance_scale, f"{options.output}.png")
    document = {
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers)},
        "guidance_scale": options.guidance_scale,
        "samples": options.samples,
        "accuracy of 500 steps": reference_accuracy,
        "median error, rms error, accuracy": found,
    } | provenance(device)
    Path(f"{options.output}.json").write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
