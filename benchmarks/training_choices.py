"""Which choices of training pay, on little: each is trained for the same processor time, with three seeds.

    score-sde quick-start
    python benchmarks/training_choices.py --run runs/quick_start --data "fashion_mnist_{split}.parquet"
    python benchmarks/training_choices.py --report

The DiT of the quick start on its latents, with and without each of `LATENTS`; one on pixels, with each of `PIXELS`.
What is trained is the first of its table with the options of the choice added; how many steps there is time for is
measured beforehand, for all of a table in turn. Fréchet distances are those of 2,000 samples (20 evaluations, guidance
1.5) to the test images of the full Fashion-MNIST, in the features of a classifier of its 60,000 training images; those
that are trained on see the 10,000 of them that the package holds. What is done isn't done again.
"""

import argparse
import json
import os
import statistics
import sys

import matplotlib
import torch
from few_steps import Judge, opened, processor_seconds

from score_sde.pipelines.writing import write_json


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


SECONDS = 150
SEEDS = (0, 1, 2)
COMMON = {"num_workers": 0, "mixed_precision": "bf16", "sample_num_images": 10, "checkpointing_steps": 100}
MUON = {"optimizer": "muon", "learning_rate": 2e-3}
LATENTS = {
    "AdamW": {},
    "Muon": MUON,
}
PIXELS = {}


def command(arguments, options, output_dir, steps, seed):
    options = COMMON | options | {"output_dir": output_dir, "max_train_steps": steps, "seed": seed}
    options |= {"resume_from_checkpoint": "latest", "lr_warmup_steps": min(50, steps)}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "score_sde.cli", "train", "quick_start/diffusion", *words]


def tables(arguments):
    """{table: {choice: all of its options}}."""
    latents = {"latents": os.path.join(arguments.run, "latents")}
    pixels = {"dataset": "fashion_mnist_10k", "image_channels": 1}
    return {
        "latents": {name: latents | options for name, options in LATENTS.items()},
        "pixels": {name: pixels | options for name, options in PIXELS.items()},
    }


def measure_all(arguments):
    """Fill in what the output lacks, and write it after each part."""
    os.makedirs(arguments.models, exist_ok=True)
    results = {"seconds": SECONDS, "count": arguments.count}
    if os.path.exists(arguments.output):
        with open(arguments.output, encoding="utf-8") as file:
            results = json.load(file)
    judge = Judge(arguments.models, arguments.data, "test")
    for table, choices in tables(arguments).items():
        found = results.setdefault(table, {})
        for name, options in choices.items():
            folder = os.path.join(arguments.models, f"{table}_{name}")
            own = found.setdefault(name, {"options": {key: options[key] for key in options if key != "latents"}})
            if "seconds_per_step" not in own:
                # a step more costs what it costs beyond the opening and the samples, which both have
                took = [processor_seconds(command(arguments, options, f"{folder}_{n}", n, 0)) for n in (5, 45)]
                own |= {"seconds_per_step": round((took[1] - took[0]) / 40, 4), "runs": {}}
                own["steps"] = round(SECONDS / own["seconds_per_step"])
                write_json(arguments.output, results)
    for seed in SEEDS:
        for table, choices in tables(arguments).items():
            for name, options in choices.items():
                own = results[table][name]
                if str(seed) in own["runs"]:
                    continue
                folder = os.path.join(arguments.models, f"{table}_{name}_seed_{seed}")
                seconds = processor_seconds(command(arguments, options, folder, own["steps"], seed))
                pipeline = opened(os.path.join(folder, "pipeline"))
                measured = judge.measure(pipeline, 20, 1.5, arguments.count)
                own["runs"][str(seed)] = {"processor_seconds": round(seconds, 1)} | measured
                write_json(arguments.output, results)
                print(table, name, seed, json.dumps(own["runs"][str(seed)]), flush=True)


def report(arguments):
    with open(arguments.output, encoding="utf-8") as file:
        results = json.load(file)
    parts = {table: results[table] for table in ("latents", "pixels") if results.get(table)}
    figure, panels = plt.subplots(1, len(parts), figsize=(5 * len(parts), 4), layout="constrained", squeeze=False)
    for axes, (table, choices) in zip(panels[0], parts.items(), strict=True):
        print(f"\n| {table} | steps | Fréchet distance, three seeds | mean | over the first's | class accuracy |")
        print("|---|---|---|---|---|---|")
        choices = {name: own for name, own in choices.items() if own["runs"]}
        distances = {name: [run["frechet_distance"] for run in own["runs"].values()] for name, own in choices.items()}
        first = statistics.mean(next(iter(distances.values())))
        for name, own in choices.items():
            mean = statistics.mean(distances[name])
            accuracy = statistics.mean(run["accuracy"] for run in own["runs"].values())
            each = ", ".join(f"{distance:.3f}" for distance in distances[name])
            print(f"| {name} | {own['steps']:,} | {each} | {mean:.3f} | {mean / first:.2f} | {100 * accuracy:.1f} % |")
        for row, values in enumerate(distances.values()):
            axes.plot(values, [row] * len(values), "o", color="C0")
            axes.plot([statistics.mean(values)], [row], "|", color="black", markersize=20)
        axes.set_yticks(range(len(distances)), distances)
        axes.invert_yaxis()
        axes.set(title=table, xlabel="Fréchet distance (classifier features)", xlim=(0, None))
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(os.path.splitext(arguments.output)[0] + ".png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/quick_start", help="output_dir of score-sde quick-start")
    parser.add_argument("--data", help="the full Fashion-MNIST, files of which {split} is train and test")
    parser.add_argument("--models", default="runs/training_choices")
    parser.add_argument("--output", default="benchmarks/training_choices.json")
    parser.add_argument("--count", type=int, default=2000, help="images of a measurement")
    parser.add_argument("--report", action="store_true", help="print the tables and draw the picture")
    arguments = parser.parse_args()
    if arguments.report:
        return report(arguments)
    if not arguments.data:
        parser.error("--data is needed")
    measure_all(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
