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
instead; and on the images themselves, in patches of 8 x 8, with each of `PIXELS`. How many steps there is time for is
measured beforehand. Fréchet distances are those of 1,000 samples (20 evaluations, guidance 1.5) to the test images of
the full Fashion-MNIST, in the features of a classifier of its 60,000 training images; those that are trained on are the
10,000 of them that the package holds. What is done isn't done again.
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
# of the images themselves, as many tokens as of the latents
LARGE_PATCHES = {"patch_size": 8, "hidden_size": 256, "num_layers": 6, "num_attention_heads": 4}
VELOCITY = STRAIGHT | {"dataset": "fashion_mnist_10k", "image_channels": 1, "network_kwargs": LARGE_PATCHES}
VELOCITY |= {"time_density": "logit_normal", "time_density_kwargs": {"mean": 0.8, "std": 0.8}}
SAMPLE = VELOCITY | {"prediction_type": "sample", "weighting": "velocity", "weighting_kwargs": {"least_time": 0.05}}
NARROW = {"network_kwargs": LARGE_PATCHES | {"patch_bottleneck": 16}}
PIXELS = {
    "pixels, velocity": VELOCITY,
    "pixels, clean sample": SAMPLE,
    "pixels, clean sample, narrow embedding (JiT)": SAMPLE | NARROW,
}
GROUPS = LATENTS, PIXELS
CHOICES = LATENTS | PIXELS


def command(arguments, name, output_dir, steps, seed):
    options = COMMON | {"optimizer": "adamw", "learning_rate": 1e-3} | CHOICES[name]
    options |= {"output_dir": output_dir, "max_train_steps": steps, "seed": seed}
    options |= {"resume_from_checkpoint": "latest", "lr_warmup_steps": min(50, steps)}
    options |= {"latents": arguments.latents} if "dataset" not in options else {}
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
        own = results.setdefault(name, {"options": CHOICES[name], "runs": {}})
        if "seconds_per_step" not in own:
            # a step more costs what it costs beyond the opening and the samples, which both have; what else the machine
            # does may make one dearer
            few, many = (
                min(processor_seconds(command(arguments, name, f"{folder}, {n} steps, {i}", n, 0)) for i in range(3))
                for n in (5, 65)
            )
            own["seconds_per_step"] = round((many - few) / 60, 4)
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
    tables = [{name: results[name] for name in names if results.get(name, {}).get("runs")} for names in GROUPS]
    tables = [table for table in tables if table]
    figure, all_axes = plt.subplots(
        nrows=len(tables),
        figsize=(8, 1 + 0.35 * sum(map(len, tables)) + 0.4 * len(tables)),
        height_ratios=[len(table) for table in tables],
        layout="constrained",
        squeeze=False,
    )
    for axes, table in zip(all_axes.flat, tables, strict=True):
        distances = {name: [run["frechet_distance"] for run in own["runs"].values()] for name, own in table.items()}
        means = {name: statistics.mean(each) for name, each in distances.items()}
        first = means[next(iter(table))]
        print("| | steps | processor s | Fréchet distance, by seed | mean | over the first's | class accuracy |")
        print("|---|---|---|---|---|---|---|")
        for row, (name, own) in enumerate(table.items()):
            each = ", ".join(f"{distance:.3f}" for distance in distances[name])
            accuracy = 100 * statistics.mean(run["accuracy"] for run in own["runs"].values())
            seconds = statistics.mean(run["processor_seconds"] for run in own["runs"].values())
            cells = [name, f"{own['steps']:,}", f"{seconds:.0f}", each, f"{means[name]:.3f}"]
            print(f"| {' | '.join([*cells, f'{means[name] / first:.2f}', f'{accuracy:.1f} %'])} |")
            axes.plot(distances[name], [row] * len(distances[name]), "o", color="C0")
            axes.plot([means[name]], [row], "|", color="black", markersize=20)
        axes.set_yticks(range(len(table)), list(table))
        axes.invert_yaxis()
        axes.set_xlim(0, None)
        axes.grid(axis="x", alpha=0.3)
        print()
    axes.set_xlabel("Fréchet distance (classifier features); the bar is the mean")
    figure.savefig(os.path.splitext(arguments.output)[0] + ".png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", help="folder of the quick start's latents, encoded with --align_to")
    parser.add_argument("--align_to", help="folder of the vision model")
    parser.add_argument("--data", help="the full Fashion-MNIST, files of which {split} is train and test")
    parser.add_argument("--models", default="runs/training_choices")
    parser.add_argument("--output", default="benchmarks/training_choices.json")
    parser.add_argument("--count", type=int, default=1000, help="images of a measurement")
    parser.add_argument("--only", nargs="*", default=list(CHOICES), choices=CHOICES)
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
