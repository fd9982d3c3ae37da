"""One to four evaluations: every method of `score-sde distill` on one teacher for the same processor time, beside the
teacher itself.

    score-sde quick-start
    python benchmarks/few_steps.py --run runs/quick_start --output benchmarks/few_steps.json
    python benchmarks/few_steps.py --report --output benchmarks/few_steps.json

--run is any run of a DiT in latents, its folders called as the quick start calls them. That of clothing128 is measured
beside its photographs, with

    --photographs "clothing256_{split}.parquet" --efficientnet efficientnet_lite0/model.safetensors

Students are kept in --students, those of another time than the usual under a name of their own; what is done is not
done again, and a training that was stopped goes on. Distances are Fréchet distances of images of the same seeds, in the
features of the classifier that `score-sde evaluate` trains; of photographs, in the first 64 principal components of an
EfficientNet-Lite0's features, from all of which a linear classifier tells the classes.
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
from efficientnet import EfficientNetFeatures, linear_classifier

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
SECONDS = 240  # of processor time, of each method
COMPONENTS = 64  # of the features of photographs
COMMON = {"learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 20, "adam_beta2": 0.99, "ema_decay": 0.99}
COMMON |= {"checkpointing_steps": 50, "checkpoints_total_limit": 1}
COMMON |= {"sample_num_images": 100, "num_workers": 0, "logging_steps": 10, "mixed_precision": "bf16"}
# what was best of the few that were tried for each, in runs of a minute; of ect nothing else was
METHODS = {
    "flow_map": {},
    "mean_flow": {"time_density": "uniform", "method_kwargs": "{moving: 0.75, power: 0.5}"},
    "consistency": {"method_kwargs": "{first_levels: 16, last_levels: 16}"},
    "scm": {},
    "ect": {"learning_rate": 5e-4},
}


def command(teacher, arguments, method, output_dir, steps):
    options = COMMON | METHODS[method] | {"method": method, "output_dir": output_dir, "max_train_steps": steps}
    options |= {"teacher": teacher, "latents": os.path.join(arguments.run, "latents")}
    options |= {"folded_guidance": arguments.guidance_scale, "batch_size": arguments.batch_size}
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
    """Measures images by the features of a network, beside real ones.

    Args:
        features: f(images (N, C, H, W) in [-1, 1]) -> (features (N, D), logits of the classes).
        real: features of real images.
        labels: classes that are drawn, again and again; None for all in turn.
    """

    def __init__(self, features, real, labels=None):
        self.features, self.real, self.labels, self.moments = features, real, labels, moments(real)

    @classmethod
    def of_fashion_mnist(cls, folder, dataset="fashion_mnist_10k", split="train"):
        """By a classifier of the training images of a dataset, kept in a folder; distances are to one of its splits."""
        config, path = DataConfig(dataset=dataset, image_channels=1), os.path.join(folder, "judge.pt")
        if not os.path.exists(path):
            learned = ImageDataset(config, "train")
            learned.keep_images()
            network = train_classifier(learned, EPOCHS, 0, torch.device("cpu"))
            real = features_of(ClassifierFeatures(network), ImageDataset(config, split))
            torch.save((network.state_dict(), real), path)
        weights, real = torch.load(path)
        network = make_classifier(1, 10)
        network.load_state_dict(weights)
        return cls(ClassifierFeatures(network.eval()), real)

    @classmethod
    def of_photographs(cls, folder, photographs, efficientnet):
        """By an EfficientNet-Lite0; distances are to the training photographs, and classes drawn as often as they have
        them."""
        network, path = EfficientNetFeatures(efficientnet, "cpu", size=128), os.path.join(folder, "photographs.pt")
        if not os.path.exists(path):
            found = {}
            for split in ("train", "test"):
                data = ImageDataset(DataConfig(dataset=photographs.format(split=split), resolution=128))
                labels = torch.tensor([data[i]["labels"] for i in range(len(data))])
                found[split] = features_of(network, data), labels
            torch.save(found, path)
        found = torch.load(path)
        real, labels = found["train"]
        centre = real.mean(0)
        components = torch.linalg.svd(real - centre, full_matrices=False).Vh[:COMPONENTS].T

        def project(features):
            return (features - centre) @ components

        classify = linear_classifier(real, labels, int(labels.max()) + 1)

        def features(images):
            found, _ = network(images)
            return project(found), classify(found)

        of_test, test_labels = found["test"]
        right = (classify(of_test).argmax(1) == test_labels).float().mean()
        floor = frechet_distance(*moments(project(of_test)), *moments(project(real)))
        print(f"{len(of_test)} test photographs: Fréchet distance {floor:.2f}, recognised {right:.1%}", flush=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return cls(features, project(real), labels[order].tolist())

    @torch.no_grad()
    def measure(self, pipeline, steps, guidance_scale, count):
        features, right, began = [], [], time.process_time()
        for first in range(0, count, 100):
            numbers = range(first, first + 100)
            images, nfe = draw(pipeline, numbers, 0, guidance_scale, steps, labels=self.labels)
            found, logits = self.features(quantized(images))
            features.append(found)
            right.append(logits.argmax(1) == torch.tensor(labels_of(numbers, pipeline, self.labels)))
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


@torch.no_grad()
def features_of(network, data):
    """Of all images of an `ImageDataset`, (N, D)."""
    parts = [range(first, min(first + 100, len(data))) for first in range(0, len(data), 100)]
    return torch.cat([network(torch.stack([data[i]["images"] for i in part]))[0] for part in parts])


def opened(folder):
    pipeline = load_bundle(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_judge(arguments):
    if arguments.photographs:
        return Judge.of_photographs(arguments.students, arguments.photographs, arguments.efficientnet)
    return Judge.of_fashion_mnist(arguments.students)


def measure_all(arguments):
    """Fill in what the output lacks, and write it after each part."""
    teacher = os.path.join(arguments.run, "diffusion", "pipeline")
    os.makedirs(arguments.students, exist_ok=True)
    results = {"guidance_scale": arguments.guidance_scale, "teacher": {}, "students": {}}
    if os.path.exists(arguments.output):
        with open(arguments.output, encoding="utf-8") as file:
            results = json.load(file)
    judge, pipeline = open_judge(arguments), opened(teacher)
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
        own["figures"] = [judge.measure(student, steps, arguments.guidance_scale, arguments.count) for steps in STEPS]
        write_json(arguments.output, results)
        print(name, json.dumps(own), flush=True)
    for steps in TEACHER_STEPS if arguments.teacher else ():
        if f"auto {steps}" not in results["teacher"]:
            results["teacher"][f"auto {steps}"] = judge.measure(
                pipeline, steps, arguments.guidance_scale, arguments.count
            )
            write_json(arguments.output, results)
    for steps in CALIBRATED if arguments.teacher else ():
        if f"calibrated {steps}" not in results["teacher"]:
            pipeline.scheduler = ScoreSDEScheduler.from_config(pipeline.scheduler.config)
            generator = torch.Generator().manual_seed(0)
            pipeline.scheduler.calibrate(
                pipeline, nfe=[steps], num_samples=16, guidance_scale=arguments.guidance_scale, generator=generator
            )
            found = judge.measure(pipeline, steps, arguments.guidance_scale, arguments.count)
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
        passes = evaluations * (2 if name.startswith("teacher") else 1)
        cells = [name, evaluations, passes, f"{distance:.{3 if distance < 10 else 0}f}"]
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
    axes.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="Fréchet distance")
    axes.set_xticks(TEACHER_STEPS, TEACHER_STEPS)
    axes.legend()
    figure.savefig(os.path.splitext(arguments.output)[0] + ".png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/quick_start", help="output_dir of score-sde quick-start")
    parser.add_argument("--students", default="runs/few_steps")
    parser.add_argument("--output", default="benchmarks/few_steps.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor time of each training")
    parser.add_argument("--batch_size", type=int, default=64, help="of each training")
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--photographs", help="parquet files of photographs and classes, {split} for train and test")
    parser.add_argument("--efficientnet", help="its weights, for photographs")
    parser.add_argument("--count", type=int, default=1000, help="images of a measurement")
    parser.add_argument("--method", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--teacher", action="store_true", help="measure the teacher, too")
    parser.add_argument("--report", action="store_true", help="print the table and draw the picture")
    arguments = parser.parse_args()
    report(arguments) if arguments.report else measure_all(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
