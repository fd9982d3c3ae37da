"""One to four evaluations: every method of `score-sde distill` on one teacher for the same processor time, beside the
teacher itself.

    score-sde quick-start
    python benchmarks/few_steps.py --run runs/quick_start --output benchmarks/few_steps.json
    python benchmarks/few_steps.py --report --output benchmarks/few_steps.json

Students are kept in --students, those of another time than the usual under a name of their own; what is done is not
done again, and a training that was stopped goes on. Distances are Fréchet distances in the features of the classifier
that `score-sde evaluate` trains, of images of the same seeds.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from score_sde import ScoreSDEScheduler, load_bundle
from score_sde.pipelines.writing import write_json
from score_sde.training.parts.classifier import EPOCHS, make_classifier, train_classifier
from score_sde.training.parts.config import DataConfig
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.metrics import ClassifierFeatures, frechet_distance, moments, precision_and_recall
from score_sde.training.parts.samples import draw, labels_of, quantized


STEPS = (1, 2, 4)
TEACHER_STEPS = (1, 2, 4, 10, 20, 50)
CALIBRATED = (2, 4, 10)
GUIDANCE = 1.5
SECONDS = 240  # of processor time, of each method
COMMON = {"learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 20, "adam_beta2": 0.99, "ema_decay": 0.99}
COMMON |= {"folded_guidance": GUIDANCE, "checkpointing_steps": 50, "checkpoints_total_limit": 1, "batch_size": 64}
COMMON |= {"sample_num_images": 100, "num_workers": 0, "logging_steps": 10, "mixed_precision": "bf16"}
# what was best of the few that were tried for each, in runs of a minute; of ect nothing else was
METHODS = {
    "flow_map": {},
    "mean_flow": {"time_density": "uniform"},
    "consistency": {"method_kwargs": "{first_levels: 16, last_levels: 16}"},
    "scm": {},
    "ect": {"learning_rate": 5e-4},
}


def command(teacher, arguments, method, output_dir, steps):
    options = COMMON | METHODS[method] | {"method": method, "output_dir": output_dir, "max_train_steps": steps}
    options |= {"teacher": teacher, "latents": os.path.join(arguments.run, "latents")}
    options |= {"resume_from_checkpoint": "latest"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "score_sde.cli", "distill", *words]


def processor_seconds(words):
    """Seconds of processor time that a command takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Judge:
    """Measures images of all classes in turn, by a classifier of the images of a dataset; distances are to those of one
    of its splits."""

    def __init__(self, folder, dataset="fashion_mnist_10k", split="train"):
        config, path = DataConfig(dataset=dataset, image_channels=1), os.path.join(folder, "judge.pt")
        if not os.path.exists(path):
            learned = ImageDataset(config, "train")
            learned.keep_images()
            network, real = train_classifier(learned, EPOCHS, 0, torch.device("cpu")), ImageDataset(config, split)
            features = ClassifierFeatures(network)
            with torch.no_grad():
                parts = [range(first, first + 500) for first in range(0, len(real), 500)]
                found = [features(torch.stack([real[i]["images"] for i in part]))[0] for part in parts]
            torch.save((network.state_dict(), torch.cat(found)), path)
        weights, self.real = torch.load(path)
        network = make_classifier(1, 10)
        network.load_state_dict(weights)
        self.features, self.moments = ClassifierFeatures(network.eval()), moments(self.real)

    @torch.no_grad()
    def measure(self, pipeline, steps, guidance_scale, count):
        features, right, began = [], [], time.process_time()
        for first in range(0, count, 100):
            numbers = range(first, first + 100)
            images, nfe = draw(pipeline, numbers, 0, guidance_scale, steps)
            found, logits = self.features(quantized(images))
            features.append(found)
            right.append(logits.argmax(1) == torch.tensor(labels_of(numbers, pipeline)))
        features = torch.cat(features)
        precision, recall = precision_and_recall(self.real, features)
        return {
            "steps": steps,
            "evaluations": nfe,
            "frechet_distance": round(frechet_distance(*moments(features), *self.moments), 4),
            "accuracy": round(float(torch.cat(right).float().mean()), 4),
            "precision": round(precision, 4),
            "recall": round(recall, 4),
            "n": count,
            "seconds": round(time.process_time() - began, 1),
        }


def opened(folder):
    pipeline = load_bundle(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_all(arguments):
    """Fill in what the output lacks, and write it after each part."""
    teacher = os.path.join(arguments.run, "diffusion", "pipeline")
    os.makedirs(arguments.students, exist_ok=True)
    results = {"guidance_scale": GUIDANCE, "teacher": {}, "students": {}}
    if os.path.exists(arguments.output):
        with open(arguments.output, encoding="utf-8") as file:
            results = json.load(file)
    judge, pipeline = Judge(arguments.students), opened(teacher)
    for method in arguments.method:
        name = method if arguments.seconds == SECONDS else f"{method}, {arguments.seconds:g} s"
        own = results["students"].setdefault(name, {"options": METHODS[method]})
        folder = os.path.join(arguments.students, name)
        if "seconds_per_step" not in own:
            took = [
                processor_seconds(command(teacher, arguments, method, f"{folder}_{steps}", steps)) for steps in (1, 7)
            ]
            own["seconds_per_step"] = round((took[1] - took[0]) / 6, 3)
            write_json(arguments.output, results)
        own["steps"] = round(arguments.seconds / own["seconds_per_step"])
        if not os.path.exists(os.path.join(folder, "pipeline", "model_index.json")):
            own["processor_seconds"] = round(
                processor_seconds(command(teacher, arguments, method, folder, own["steps"]))
            )
        student = opened(os.path.join(folder, "pipeline"))
        own["figures"] = [judge.measure(student, steps, GUIDANCE, arguments.count) for steps in STEPS]
        write_json(arguments.output, results)
        print(name, json.dumps(own), flush=True)
    for steps in TEACHER_STEPS if arguments.teacher else ():
        if f"auto {steps}" not in results["teacher"]:
            results["teacher"][f"auto {steps}"] = judge.measure(pipeline, steps, GUIDANCE, arguments.count)
            write_json(arguments.output, results)
    for steps in CALIBRATED if arguments.teacher else ():
        if f"calibrated {steps}" not in results["teacher"]:
            pipeline.scheduler = ScoreSDEScheduler.from_config(pipeline.scheduler.config)
            generator = torch.Generator().manual_seed(0)
            pipeline.scheduler.calibrate(
                pipeline, nfe=[steps], num_samples=16, guidance_scale=GUIDANCE, generator=generator
            )
            found = judge.measure(pipeline, steps, GUIDANCE, arguments.count)
            results["teacher"][f"calibrated {steps}"] = found
            write_json(arguments.output, results)


def rows_of(results):
    """(name, figures) of everything that was measured."""
    for name, figures in results["teacher"].items():
        yield f"teacher, {name.split()[0]}", figures
    for method, own in results["students"].items():
        for figures in own.get("figures", []):
            yield method, figures


def report(arguments):
    with open(arguments.output, encoding="utf-8") as file:
        results = json.load(file)
    columns = ("", "evaluations", "network passes", "Fréchet distance", "over the teacher's 20")
    print(f"| {' | '.join((*columns, 'class accuracy', 'precision', 'recall'))} |\n{8 * '|---'}|")
    reference = results["teacher"]["auto 20"]["frechet_distance"]
    for name, figures in rows_of(results):
        evaluations, distance = figures["evaluations"], figures["frechet_distance"]
        cells = [name, evaluations, evaluations * (2 if name.startswith("teacher") else 1), f"{distance:.3f}"]
        cells += [f"{distance / reference:.2f}", f"{100 * figures['accuracy']:.1f}%"]
        cells += [f"{figures[each]:.3f}" for each in ("precision", "recall")]
        print(f"| {' | '.join(map(str, cells))} |")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    curves = {}
    for name, figures in rows_of(results):
        curves.setdefault(name, []).append((figures["evaluations"], figures["frechet_distance"]))
    for name, points in curves.items():
        style = {"color": "black", "linestyle": "-" if "auto" in name else ":"} if "teacher" in name else {}
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name, **style)
    axes.axhline(reference, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="Fréchet distance (classifier features)")
    axes.set_xticks(TEACHER_STEPS, TEACHER_STEPS)
    axes.legend()
    figure.savefig(os.path.splitext(arguments.output)[0] + ".png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/quick_start", help="output_dir of score-sde quick-start")
    parser.add_argument("--students", default="runs/few_steps")
    parser.add_argument("--output", default="benchmarks/few_steps.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor time of each training")
    parser.add_argument("--count", type=int, default=1000, help="images of a measurement")
    parser.add_argument("--method", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--teacher", action="store_true", help="measure the teacher, too")
    parser.add_argument("--report", action="store_true", help="print the table and draw the picture")
    arguments = parser.parse_args()
    report(arguments) if arguments.report else measure_all(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
