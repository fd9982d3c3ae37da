"""How much is won by starting from weights? The quick start's DiT on seven classes, fine-tuned to the three others,
beside the same network trained on these from nothing, by one recipe, at equal images seen.

    python benchmarks/fine_tuning.py --output benchmarks/fine_tuning

Trains in RUNS: the quick start's autoencoder, on images of all classes; its DiT on the first seven classes of
Fashion-MNIST; and for each seed a DiT on the last three from nothing, and one from those weights. On the way both are
measured with their averaged weights: the loss on test images, the same noise and times for every model, and the Fréchet
distance of samples to the training images, in the features of a small classifier of these. What is there already is not
made again. Writes OUTPUT.json and OUTPUT.png, and prints the table.
"""

import argparse
import json
import statistics
from pathlib import Path

import datasets
import matplotlib

from score_sde.training import encode_latents, train, train_autoencoder
from score_sde.training.parts.run_folder import read_records


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


DATA = Path(__file__).resolve().parents[1] / "src" / "score_sde" / "data" / "fashion_mnist"
# the classes that the model to start from knows; the others are new
KNOWN = 7
ARMS = {"from_nothing": "from nothing", "init_from": "from the model of other classes"}
MEASURES = {"held_out_loss": "loss on test images", "frechet_distance": "Fréchet distance"}


def run(main, *arguments):
    main([str(argument) for argument in arguments])


def write_classes(folder, labels):
    """Parquet files of the images of some classes, train and test; return their name as a pattern."""
    for split in ("train", "test"):
        path, own = folder / f"{split}.parquet", list(labels)
        if not path.exists():
            rows = datasets.Dataset.from_parquet(str(DATA / f"{split}.parquet"))
            names = rows.features["label"].names
            rows = rows.select([i for i, label in enumerate(rows["label"]) if label in own])
            columns = {"image": rows["image"], "label": [own.index(label) for label in rows["label"]]}
            features = datasets.Features(
                image=datasets.Image(), label=datasets.ClassLabel(names=[names[each] for each in own])
            )
            folder.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(columns, features).to_parquet(path)
    return folder / "{split}.parquet"


def prepare(options):
    """(the pipeline to start from, the latents of the new classes)."""
    runs, latents = Path(options.runs), {}
    vae = runs / "autoencoder" / "vae"
    if not vae.is_dir():
        arguments = ["--output_dir", vae.parent, "--max_train_steps", options.autoencoder_steps]
        run(train_autoencoder.main, "quick_start/autoencoder", *arguments, "--resume_from_checkpoint", "latest")
    for name, labels in (("known", range(KNOWN)), ("new", range(KNOWN, 10))):
        images, latents[name] = write_classes(runs / name, labels), runs / f"{name}_latents"
        arguments = ["--dataset", images, "--vae", vae, "--output_dir", latents[name]]
        run(encode_latents.main, "quick_start/latents", *arguments)
    if not (runs / "known_dit" / "pipeline").is_dir():
        arguments = ["--latents", latents["known"], "--output_dir", runs / "known_dit", "--ema_decay", 0.99]
        arguments += ["--max_train_steps", options.known_steps, "--resume_from_checkpoint", "latest"]
        run(train.main, "quick_start/diffusion", *arguments)
    return runs / "known_dit" / "pipeline", latents["new"]


def train_model(options, arm, seed, source, latents):
    """The measures of a run, [{"images_seen": ..., "held_out_loss": ..., "frechet_distance": ...}, ...]."""
    output = Path(options.runs) / f"{arm}-{seed}"
    if not (output / "pipeline").is_dir():
        arguments = {
            "latents": latents,
            "output_dir": output,
            "max_train_steps": options.steps,
            "ema_decay": 0.99,
            "evaluation_steps": options.steps // options.points,
            "evaluation_images": options.images,
            "evaluation_features": "classifier",
            "checkpointing_steps": 0,
            "sample_num_images": 24,
            "seed": seed,
        }
        arguments |= {"init_from": source} if arm == "init_from" else {}
        run(
            train.main,
            "quick_start/diffusion",
            *("--on_existing_run", "set_aside"),
            *(part for name, value in arguments.items() for part in (f"--{name}", value)),
        )
    return read_records(output / "evaluation.jsonl")


def summary(runs, measure):
    """[(images seen, mean over runs, standard deviation), ...]."""
    points = zip(*runs, strict=True)
    return [
        (point[0]["images_seen"], statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for point in points
        for values in [[each[measure] for each in point]]
    ]


def draw(found, path):
    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(9, 3.2), layout="constrained")
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for arm, name in ARMS.items():
            seen, means, spreads = zip(*summary(found[arm], measure), strict=True)
            axis.errorbar(seen, means, yerr=spreads, label=name, marker="o", capsize=3)
        axis.set(xlabel="images seen", ylabel=label, yscale="log")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/fine_tuning", help="folder for everything that is trained")
    parser.add_argument("--output", default="benchmarks/fine_tuning", help="without .json and .png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--autoencoder_steps", type=int, default=900)
    parser.add_argument("--known_steps", type=int, default=1400, help="steps of the model to start from")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run on the new classes")
    parser.add_argument("--points", type=int, default=5, help="evaluations of a run")
    parser.add_argument("--images", type=int, default=600, help="images of an evaluation")
    options = parser.parse_args()

    source, latents = prepare(options)
    found = {arm: [train_model(options, arm, seed, source, latents) for seed in range(options.seeds)] for arm in ARMS}
    Path(f"{options.output}.json").write_text(json.dumps({"options": vars(options)} | found, indent=2) + "\n")
    draw(found, f"{options.output}.png")
    names = [f"{label}, {name}" for label in MEASURES.values() for name in ARMS.values()]
    print(f"| images seen | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    columns = [summary(found[arm], measure) for measure in MEASURES for arm in ARMS]
    for row in zip(*columns, strict=True):
        cells = [f"{mean:.3f} ± {spread:.3f}" for _, mean, spread in row]
        print(f"| {row[0][0]:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
