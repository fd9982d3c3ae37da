"""Which choices of training pay, on little: each is trained for the same processor time, with three seeds.

    score-sde quick-start
    python benchmarks/vision_model.py efficientnet_lite0/model.safetensors runs/vision_model --size 128
    score-sde encode-latents quick_start/latents --vae runs/quick_start/autoencoder/vae --align_to runs/vision_model \
        --output_dir runs/training_choices/latents
    python benchmarks/training_choices.py --latents runs/training_choices/latents --align_to runs/vision_model \
        --data "fashion_mnist_{split}.parquet"
    python benchmarks/training_choices.py --report
    python benchmarks/training_choices.py --data "fashion_mnist_{split}.parquet" --measure runs/quick_start

The DiT of the quick start on its latents by AdamW, as its first version was trained, and with each of `LATENTS`
instead; how many steps there is time for is measured beforehand. Fréchet distances are those of 1,000 samples (20
evaluations, guidance 1.5) to the test images of the full Fashion-MNIST, in the features of a classifier of its 60,000
training images; those that are trained on are the 10,000 of them that the package holds. What is done isn't done again.
--measure prints how well the autoencoder of a quick start reconstructs test images, and its samples' distance.
"""

import argparse
import json
import os
import statistics
import sys

import matplotlib
import torch
from few_steps import Judge, opened, processor_seconds

from score_sde.pipelines.latents import encode_moments
from score_sde.pipelines.writing import write_json
from score_sde.training.parts.config import DataConfig
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.metrics import frechet_distance, moments
from score_sde.training.parts.samples import quantized


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


SECONDS = 120
SEEDS = (0, 1, 2)
COMMON = {"num_workers": 0, "mixed_precision": "bf16", "sample_num_images": 10, "checkpointing_steps": 100}
FAST = {"learning_rate": 2e-3}
STRAIGHT = FAST | {"sde_type": "linear", "prediction_type": "flow_prediction"}
LATENTS = {
    "AdamW": {},
    "AdamW, rate 2e-3": FAST,
    "Muon": {"optimizer": "muon", "learning_rate": 4e-3},
    "half of the tokens routed past": FAST | {"token_routing": 0.5},
    "straight path": STRAIGHT,
    "straight path, time shift of the dimension": STRAIGHT | {"time_shift": "dimension"},
    "REPA": FAST | {"align_block": 3},
    "iREPA": FAST | {"align_block": 3, "align_projection": "conv", "align_gamma": 0.6},
}


def command(arguments, name, output_dir, steps, seed):
    options = COMMON | {"optimizer": "adamw", "learning_rate": 1e-3} | LATENTS[name]
    options |= {"latents": arguments.latents, "output_dir": output_dir, "max_train_steps": steps, "seed": seed}
    options |= {"resume_from_checkpoint": "latest", "lr_warmup_steps": min(50, steps)}
    options |= {"align_to": arguments.align_to} if "align_block" in options else {}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "score_sde.cli", "train", "quick_start/diffusion", *words]


def measure_all(arguments):
    """Fill in what the output lacks, and write it after each part."""
    os.makedirs(arguments.models, exist_ok=True)
    results = {}
    if os.path.exists(arguments.output):
        with open(arguments.output, encoding="utf-8") as file:
            results = json.load(file)
    judge = Judge.of_fashion_mnist(arguments.models, arguments.data, "test")
    for name in arguments.only:
        folder = os.path.join(arguments.models, name)
        own = results.setdefault(name, {"options": LATENTS[name], "runs": {}})
        if "seconds_per_step" not in own:
            # a step more costs what it costs beyond the opening and the samples, which both have
            took = [processor_seconds(command(arguments, name, f"{folder}, {n} steps", n, 0)) for n in (5, 45)]
            own["seconds_per_step"] = round((took[1] - took[0]) / 40, 4)
            own["steps"] = round(SECONDS / own["seconds_per_step"])
            write_json(arguments.output, results)
    for seed in SEEDS:
        for name in arguments.only:
            own = results[name]
            if str(seed) in own["runs"]:
                continue
            folder = os.path.join(arguments.models, f"{name}, seed {seed}")
            seconds = processor_seconds(command(arguments, name, folder, own["steps"], seed))
            measured = judge.measure(opened(os.path.join(folder, "pipeline")), 20, 1.5, arguments.count)
            own["runs"][str(seed)] = {"processor_seconds": round(seconds, 1)} | measured
            write_json(arguments.output, results)
            print(name, seed, json.dumps(own["runs"][str(seed)]), flush=True)


@torch.no_grad()
def measure_run(arguments):
    """Print the figures of a quick start."""
    judge = Judge.of_fashion_mnist(arguments.models, arguments.data, "test")
    pipeline = opened(os.path.join(arguments.measure, "diffusion", "pipeline"))
    test = ImageDataset(DataConfig(dataset=arguments.data, image_channels=1), "test")
    images = torch.stack([test[i]["images"] for i in range(arguments.count)])
    decoded = [pipeline.vae.decode(encode_moments(pipeline.vae, part)[0]).sample for part in images.split(100)]
    decoded = torch.cat(decoded).clamp(-1, 1)
    features = [torch.cat([judge.features(part)[0] for part in x.split(500)]) for x in (images, quantized(decoded))]
    decibels = -10 * ((decoded - images) / 2).square().flatten(1).mean(1).log10()
    distance = frechet_distance(*moments(features[0]), *moments(features[1]))
    print(f"autoencoder: {decibels.mean():.2f} dB, distance {distance:.4f}")
    print(f"samples: {json.dumps(judge.measure(pipeline, 20, 1.5, arguments.count))}")


def report(arguments):
    with open(arguments.output, encoding="utf-8") as file:
        results = json.load(file)
    results = {name: results[name] for name in LATENTS if results.get(name, {}).get("runs")}
    distances = {name: [run["frechet_distance"] for run in own["runs"].values()] for name, own in results.items()}
    first = statistics.mean(distances[next(iter(LATENTS))])
    print("| | s a step | steps | Fréchet distance, by seed | mean | over the first's | class accuracy |")
    print("|---|---|---|---|---|---|---|")
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for row, (name, own) in enumerate(results.items()):
        each, mean = ", ".join(f"{distance:.3f}" for distance in distances[name]), statistics.mean(distances[name])
        accuracy = 100 * statistics.mean(run["accuracy"] for run in own["runs"].values())
        cells = [name, f"{own['seconds_per_step']:.2f}", f"{own['steps']:,}", each, f"{mean:.3f}"]
        print(f"| {' | '.join([*cells, f'{mean / first:.2f}', f'{accuracy:.1f} %'])} |")
        axes.plot(distances[name], [row] * len(distances[name]), "o", color="C0")
        axes.plot([mean], [row], "|", color="black", markersize=20)
    axes.set_yticks(range(len(distances)), list(distances))
    axes.invert_yaxis()
    axes.set(xlabel="Fréchet distance (classifier features); the bar is the mean", xlim=(0, None))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(os.path.splitext(arguments.output)[0] + ".png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", help="folder of the quick start's latents, encoded with --align_to")
    parser.add_argument("--align_to", help="folder of the vision model")
    parser.add_argument("--data", help="the full Fashion-MNIST, files of which {split} is train and test")
    parser.add_argument("--models", default="runs/training_choices")
    parser.add_argument("--output", default="benchmarks/training_choices.json")
    parser.add_argument("--count", type=int, default=1000, help="images of a measurement")
    parser.add_argument("--only", nargs="*", default=list(LATENTS), choices=LATENTS)
    parser.add_argument("--measure", help="output_dir of score-sde quick-start, whose figures are printed")
    parser.add_argument("--report", action="store_true", help="print the table and draw the picture")
    arguments = parser.parse_args()
    if arguments.report:
        return report(arguments)
    if arguments.measure and arguments.data:
        return measure_run(arguments)
    if not (arguments.latents and arguments.align_to and arguments.data):
        parser.error("--latents, --align_to and --data are needed")
    measure_all(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
