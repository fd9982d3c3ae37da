"""How far the methods for inverse problems are from the exact posterior.

    python benchmarks/inverse.py --output benchmarks/inverse.json

Data with a correlated Gaussian distribution in 12 dimensions (tests/exact.py), whose posterior given a linear
measurement is known, with the exact denoised sample as the network: three measurements, two levels of noise. Prints for
every method and sampler how far the mean of the samples is from the posterior's, in its standard deviations (the
largest over the dimensions), and how far their covariance is, relative, in the Frobenius norm.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm.auto import tqdm

from score_sde import ScoreSDEInversePipeline, ScoreSDEScheduler
from score_sde.pipelines.operators import LinearOperator, colourisation, inpainting


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from exact import GaussianImages  # noqa: E402


DENSE = torch.randn(12, 4, generator=torch.Generator().manual_seed(8)) / 3
PROBLEMS = {
    "colourisation": colourisation(),
    "inpainting": inpainting([[1, 0], [0, 1]]),
    "dense": LinearOperator(lambda x: x.flatten(1) @ DENSE.to(x)),
}
NOISE = (0.01, 0.1)
ANCESTRAL = {"predictor": "ancestral"}
SONG = {"predictor": "reverse_diffusion", "corrector": "langevin", "corrector_position": "before"}
# name, settings of the scheduler, arguments of the pipeline
METHODS = [
    ("pigdm, auto, 50", {}, {"method": "pigdm", "num_inference_steps": 50}),
    (
        "pigdm without its weight, auto, 50",
        {},
        {"method": "pigdm", "num_inference_steps": 50, "adaptive_weight": False},
    ),
    ("pigdm, ancestral, 1000", ANCESTRAL, {"method": "pigdm", "num_inference_steps": 1000}),
    ("tmpd, auto, 50", {}, {"method": "tmpd", "num_inference_steps": 50, "cg_steps": 12}),
    ("tmpd, ancestral, 1000", ANCESTRAL, {"method": "tmpd", "num_inference_steps": 1000, "cg_steps": 12}),
    *(
        (
            f"dps, step {size:g}, ancestral, 1000",
            ANCESTRAL,
            {"method": "dps", "num_inference_steps": 1000, "step_size": size},
        )
        for size in (1.0, 0.3, 0.1, 0.03)
    ),
    ("replacement, auto, 50", {}, {"method": "replacement", "num_inference_steps": 50}),
    ("replacement, ancestral, 1000", ANCESTRAL, {"method": "replacement", "num_inference_steps": 1000}),
    ("replacement, Song's PC, 1000", SONG, {"method": "replacement", "num_inference_steps": 1000}),
    ("repaint 10 x 10, ancestral, 250", ANCESTRAL, {"method": "repaint", "num_inference_steps": 250}),
]


def measure(scheduler, arguments, problem, noise_std, samples, sde_type):
    """(distance of the mean, of the covariance, network evaluations)."""
    network = GaussianImages()
    y, *posterior = network.measure(PROBLEMS[problem], noise_std)
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="sample", **scheduler)
    pipeline = ScoreSDEInversePipeline(scheduler, unet=network)
    network.scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"batch_size": samples, "generator": torch.Generator().manual_seed(0), **arguments}
    output = pipeline(PROBLEMS[problem], y, noise_std=noise_std, output_type="latent", **arguments)
    return *network.distance(output.images, *posterior), output.nfe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--sde_type", default="vp", help="noise path (default: %(default)s)")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    begin, found = time.perf_counter(), {}
    for name, scheduler, arguments in tqdm(METHODS):
        found[name] = {
            f"{problem}, noise {noise_std:g}": measure(
                scheduler, arguments, problem, noise_std, options.samples, options.sde_type
            )
            for noise_std in NOISE
            for problem in PROBLEMS
        }
    cells = list(next(iter(found.values())))
    print(f"| method, sampler, steps | NFE | {' | '.join(cells)} |")
    print("|---|---|" + "---|" * len(cells))
    for name, figures in found.items():
        values = " | ".join(f"{figures[cell][0]:.2f}, {figures[cell][1]:.2f}" for cell in cells)
        print(f"| {name} | {figures[cells[0]][2]} | {values} |")
    exact = (3 / options.samples**0.5, (12 / options.samples) ** 0.5)
    print(f"\nexact samples would show about {exact[0]:.2f}, {exact[1]:.2f}; {time.perf_counter() - begin:.0f} s")
    if options.output:
        document = {"samples": options.samples, "sde_type": options.sde_type, "mean, covariance, nfe": found}
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
