"""How much is won by starting from weights? Models fine-tuned to classes that they have never seen, by all weights and
by LoRA adapters alone, beside the same networks trained on these from nothing: by one recipe, at equal images seen.

    python benchmarks/fine_tuning.py --clothing "clothing256_{split}.parquet" --vae taesd3 \\
        --efficientnet efficientnet_lite0/model.safetensors --output benchmarks/fine_tuning

- fashion_mnist: the quick start's DiT, trained on the first seven classes of Fashion-MNIST, on the last three.
- clothing128: the DiT of 128 px photographs in the latents of taesd3, trained on all classes but one, on that one. It
  is left out without --clothing.

LoRA leaves a network the classes that it has, so adapters for others are told no class; beside them stand all weights
trained so. On the way each is measured with its averaged weights: the loss on test images, the same noise and times for
every model, and the Fréchet distance of samples, without guidance, to the training images, in the features of a small
classifier of these, or of an EfficientNet-Lite0.

Every training is a process of its own, --workers of them at a time, whose output is in RUNS beside its folder. With
--seconds they stop in time. What is there already is not made again. OUTPUT.json, OUTPUT.png and OUTPUT.md, the tables,
are written after each; --pack FILE collects them with the records and a grid of samples of each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import matplotlib
import torch
from efficientnet import EfficientNetFeatures

from score_sde.pipelines.writing import whole_file
from score_sde.training import encode_latents, train, train_autoencoder
from score_sde.training.parts import validation
from score_sde.training.parts.run_folder import read_records


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


FASHION = Path(__file__).resolve().parents[1] / "src" / "score_sde" / "data" / "fashion_mnist" / "{split}.parquet"
# classes that the models to start from don't know
NEW = {"fashion_mnist": (7, 8, 9), "clothing128": (6,)}
NO_CLASS = {"class_conditional": "false"}
LORA = {"lora_rank": 16}
# name, what it starts from or not, more options
ARMS = {
    "fashion_mnist": {
        "from nothing": (False, {}),
        "from weights": (True, {}),
        "from weights, no class told": (True, NO_CLASS),
        "LoRA, no class told": (True, NO_CLASS | LORA),
    },
    "clothing128": {
        "from nothing": (False, NO_CLASS),
        "from weights": (True, NO_CLASS),
        "LoRA": (True, NO_CLASS | LORA),
    },
}
MEASURES = {"held_out_loss": "loss on test images", "frechet_distance": "Fréchet distance"}
RESUMED = {"resume_from_checkpoint": "latest"}
WRITING = threading.Lock()
CONFIG = {"fashion_mnist": "quick_start", "clothing128": "clothing128"}


def arguments_of(config, **options):
    return [config, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def write_classes(source, folder, labels):
    """Parquet files of the images of some classes, train and test; return their name as a pattern."""
    for split in ("train", "test"):
        path, own = folder / f"{split}.parquet", list(labels)
        if not path.exists():
            rows = datasets.Dataset.from_parquet(str(source).format(split=split))
            names = rows.features["label"].names
            # the files as they are
            rows = rows.cast_column("image", datasets.Image(decode=False))
            rows = rows.select([i for i, label in enumerate(rows["label"]) if label in own])
            columns = {"image": list(rows["image"]), "label": [own.index(label) for label in rows["label"]]}
            features = datasets.Features(
                image=datasets.Image(), label=datasets.ClassLabel(names=[names[each] for each in own])
            )
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                datasets.Dataset.from_dict(columns, features).to_parquet(temporary)
    return folder / "{split}.parquet"


def faster():
    return {"allow_tf32": "true"} if torch.cuda.is_available() else {}


def in_time(options, share=1):
    """What ends a training in a share of its seconds, some of which are for its start and its pipeline."""
    return {"max_train_seconds": max(1, share * options.seconds - 15)} if options.seconds else {}


def source_of(options, name):
    """(images, autoencoder, folder) of an experiment."""
    runs = Path(options.runs) / name
    if name == "fashion_mnist":
        return FASHION, runs / "autoencoder" / "vae", runs
    return options.clothing, options.vae, runs


def make_autoencoder(options, name):
    _, vae, _ = source_of(options, name)
    if not Path(vae).is_dir():
        given = {"output_dir": vae.parent, "max_train_steps": options.autoencoder_steps} | RESUMED | faster()
        train_autoencoder.main(arguments_of("quick_start/autoencoder", **given))


def encode_classes(options, name):
    """Make the latents of known and new classes."""
    source, vae, runs = source_of(options, name)
    every = range(len(datasets.Dataset.from_parquet(str(source).format(split="test")).features["label"].names))
    labels = {"known": [label for label in every if label not in NEW[name]], "new": NEW[name]}
    for which, own in labels.items():
        images = write_classes(source, runs / which, own)
        given = {"dataset": images, "vae": vae, "output_dir": runs / f"{which}_latents"}
        encode_latents.main(arguments_of(f"{CONFIG[name]}/latents", **given))


def train_source(options, name):
    """Train the model to start from: in half of the time that is left, or, with --prepare, in all of it."""
    _, _, runs = source_of(options, name)
    if (runs / "source" / "pipeline").is_dir():
        return
    steps = {"fashion_mnist": options.fashion_steps, "clothing128": options.clothing_steps}[name]
    given = {"latents": runs / "known_latents", "output_dir": runs / "source", "max_train_steps": steps, "seed": 1000}
    given |= RESUMED | faster() | in_time(options, 1 if options.prepare else 0.5)
    train.main(arguments_of(f"{CONFIG[name]}/diffusion", **given))


# one after the other, each in a process of its own
STAGES = {"autoencoder": make_autoencoder, "latents": encode_classes, "source": train_source}


def train_model(options, name, arm, seed):
    starts, more = ARMS[name][arm]
    runs, images = Path(options.runs) / name, options.images
    if name == "clothing128":
        # what the evaluation opens by its name
        validation.open_features = lambda _, device: EfficientNetFeatures(options.efficientnet, device, size=128)
    arguments = {
        "latents": runs / "new_latents",
        "output_dir": folder_of(options, name, arm, seed),
        "max_train_steps": options.steps,
        "lr_warmup_steps": min(50, options.steps // 4),
        "ema_decay": 0.99,
        "evaluation_steps": options.steps // options.points,
        "evaluation_images": images,
        "evaluation_features": "classifier" if name == "fashion_mnist" else "efficientnet",
        "checkpointing_steps": 0,
        "sample_num_images": 24,
        "sample_guidance_scale": 1,
        "seed": seed,
        "on_existing_run": "set_aside",
    }
    arguments |= ({"init_from": runs / "source" / "pipeline"} if starts else {}) | more | faster()
    train.main(arguments_of(f"{CONFIG[name]}/diffusion", **arguments | in_time(options)))


def folder_of(options, name, arm, seed):
    return Path(options.runs) / name / f"{arm.replace(', ', '_').replace(' ', '_')}-{seed}"


# --- processes ----------------------------------------------------------------------------------------------------


def in_a_process(options, ends, name, part):
    """Run a part of this script in a process; its output goes into a file. Returns whether it went well."""
    seconds = None if ends is None else ends - time.monotonic()
    own = ["--seconds", f"{seconds - 15:.0f}"] if seconds else []
    path = Path(options.runs) / name / f"{part.replace(', ', '_').replace(' ', '_').replace('/', '-')}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as log:
        arguments = [sys.executable, __file__, *options.own, *own, "--part", f"{name}/{part}"]
        environment = os.environ | {"TQDM_MININTERVAL": "10"}
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            status = "killed"
    print(f"{name}/{part}: {'done' if status == 0 else f'failed ({status}), see {path}'}", flush=True)
    return status == 0


def run_experiment(options, ends, name, pool):
    """Prepare in this thread, then hand every training to the pool."""
    if not all(in_a_process(options, ends, name, stage) for stage in STAGES) or options.prepare:
        return []
    return [
        pool.submit(train_and_write, options, ends, name, f"{arm}/{seed}")
        for seed in range(options.seeds)
        for arm in ARMS[name]
        if not (folder_of(options, name, arm, seed) / "pipeline").is_dir()
    ]


def train_and_write(options, ends, name, part):
    in_a_process(options, ends, name, part)
    with WRITING:
        try:
            write(options)
        except Exception:
            traceback.print_exc()


# --- what is written ----------------------------------------------------------------------------------------------


def found_so_far(options):
    """{experiment: {arm: [the measures of a run, ...]}}."""
    found = {}
    for name in options.experiments:
        for arm in ARMS[name]:
            records = [folder_of(options, name, arm, seed) / "evaluation.jsonl" for seed in range(options.seeds)]
            runs = [read_records(str(path)) for path in records if path.exists()]
            if runs := [run for run in runs if run]:
                found.setdefault(name, {})[arm] = runs
    return found


def summary(runs, measure):
    """[(images seen, mean over runs, standard deviation), ...], without runs that were cut short of the others."""
    runs = [run for run in runs if len(run) == max(map(len, runs))]
    return [
        (point[0]["images_seen"], statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for point in zip(*runs, strict=True)
        for values in [[each[measure] for each in point]]
    ]


def write(options):
    found = found_so_far(options)
    if not found:
        return
    document = {"options": {key: value for key, value in vars(options).items() if key != "own"}, "found": found}
    Path(f"{options.output}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(found, f"{options.output}.png")
    tables = "\n\n".join(table(name, arms) for name, arms in found.items())
    Path(f"{options.output}.md").write_text(tables + "\n", encoding="utf-8")
    if options.pack:
        pack(options)


def draw(found, path):
    figure, axes = pyplot.subplots(
        len(found), len(MEASURES), figsize=(11, 3.2 * len(found)), layout="constrained", squeeze=False
    )
    for row, (name, arms) in zip(axes, found.items(), strict=True):
        for axis, (measure, label) in zip(row, MEASURES.items(), strict=True):
            for arm, runs in arms.items():
                seen, means, spreads = zip(*summary(runs, measure), strict=True)
                axis.errorbar(seen, means, yerr=spreads, label=arm, marker="o", markersize=3, capsize=3)
            axis.set(xlabel="images seen", ylabel=label, yscale="log", title=name)
        row[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(name, arms):
    """Markdown: the measures of every arm, mean and standard deviation over seeds, by the images seen."""
    lines = [
        f"| {name}, images seen | {' | '.join(f'{label}, {arm}' for label in MEASURES.values() for arm in arms)} |",
        f"|---{'|---' * len(MEASURES) * len(arms)}|",
    ]
    columns = [summary(runs, measure) for measure in MEASURES for runs in arms.values()]
    for row in zip(*columns, strict=False):
        cells = [f"{mean:.3f} ± {spread:.3f}" for _, mean, spread in row]
        lines.append(f"| {row[0][0]:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pack(options):
    """Figures, records, samples and output of every run, in one archive."""
    runs = Path(options.runs)
    kept = [path for pattern in ("*/*.log", "*/*/evaluation.jsonl", "*/*/log.jsonl") for path in runs.glob(pattern)]
    kept += runs.glob("*/*/pipeline/samples.png")
    with tarfile.open(options.pack, "w:gz") as archive:
        for path in kept:
            archive.add(path, str(path.relative_to(runs)))
        for end in ("json", "png", "md"):
            archive.add(f"{options.output}.{end}", f"{Path(options.output).name}.{end}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", help="parquet files of clothing photographs, a pattern with {split}")
    parser.add_argument("--vae", help="folder of taesd3")
    parser.add_argument("--efficientnet", help="efficientnet_lite0/model.safetensors")
    parser.add_argument("--runs", default="runs/fine_tuning", help="folder for everything that is trained")
    parser.add_argument("--output", default="benchmarks/fine_tuning", help="without .json, .png and .md")
    parser.add_argument("--experiments", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seconds", type=float, help="in which all must be done")
    parser.add_argument("--prepare", action="store_true", help="only make what the trainings start from")
    parser.add_argument("--workers", type=int, help="trainings at a time; 1 on a CPU, 10 on a GPU unless given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--autoencoder_steps", type=int, default=900)
    parser.add_argument("--fashion_steps", type=int, default=1400, help="steps of the model of Fashion-MNIST")
    parser.add_argument("--clothing_steps", type=int, default=2500, help="steps of the model of photographs")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run on the new classes")
    parser.add_argument("--points", type=int, default=5, help="evaluations of a run")
    parser.add_argument("--images", type=int, default=600, help="images of an evaluation")
    parser.add_argument("--pack", help="archive to write")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.clothing:
        options.experiments = [name for name in options.experiments if name != "clothing128"]
    elif not (options.vae and options.efficientnet):
        parser.error("clothing needs --vae and --efficientnet")

    if options.part:
        name, part, *seed = options.part.split("/")
        return STAGES[part](options, name) if part in STAGES else train_model(options, name, part, int(*seed))
    options.own = sys.argv[1:]
    ends = None if options.seconds is None else time.monotonic() + options.seconds - 5
    workers = options.workers or (10 if torch.cuda.is_available() else 1)
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(len(options.experiments)) as of_experiments:
        if workers == 1:  # nothing side by side
            of_experiments = pool
        begun = [of_experiments.submit(run_experiment, options, ends, name, pool) for name in options.experiments]
        for training in [training for each in begun for training in each.result()]:
            training.result()
    write(options)
    if Path(f"{options.output}.md").exists():
        print(Path(f"{options.output}.md").read_text())


if __name__ == "__main__":
    main()
