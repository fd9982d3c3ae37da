"""Does a DiT get better with Gflops? Depths, widths, patch sizes and conditionings at equal images seen.

    python training/quick_start.py     # the autoencoder and the latents
    python benchmarks/scaling.py --latents runs/quick_start/latents --output benchmarks/scaling

Trains tiny DiTs on the latents with one recipe, and measures each with its averaged weights: the loss on test images,
the same noise and times for every model, and samples without guidance: their Fréchet distance to the test images, in
the features of a classifier that was trained on the training images, and the share that it recognises as the class
asked for. Models that are already in RUNS are not trained again. Writes OUTPUT.json and OUTPUT.png, and prints
the table.
"""

import argparse
import json
import warnings
from pathlib import Path

import matplotlib
import torch
from datasets import disable_progress_bars
from diffusers.utils import logging
from dit_gflops import gflops

from score_sde import load_bundle
from score_sde.losses import denoising_loss, uniform_times


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


TRAINING = Path(__file__).resolve().parents[1] / "training"
from score_sde.training import train  # noqa: E402
from score_sde.training.evaluate import EvaluateConfig, image_shape  # noqa: E402
from score_sde.training.parts.classifier import accuracy, train_classifier  # noqa: E402
from score_sde.training.parts.data import ImageDataset  # noqa: E402
from score_sde.training.parts.metrics import ClassifierFeatures, features_of, frechet_distance, moments  # noqa: E402
from score_sde.training.parts.options import parse  # noqa: E402
from score_sde.training.parts.real_images import complete  # noqa: E402


PATCHES = (4, 2, 1)
# (depth, width) of every patch size
SIZES = [(2, 128), (4, 128), (8, 128), (4, 64), (4, 256)]
HEAD = 32
CONDITIONINGS = ("adaln", "cross_attention", "in_context")
GRID = [(*size, patch, "adaln_zero") for patch in PATCHES for size in SIZES]
GRID += [(4, 128, 2, conditioning) for conditioning in CONDITIONINGS]


def train_model(options, depth, width, patch, conditioning):
    """The folder of a trained pipeline."""
    output = Path(options.runs) / f"depth{depth}-width{width}-patch{patch}-{conditioning}"
    if not (output / "pipeline").is_dir():
        network = {"patch_size": patch, "hidden_size": width, "num_layers": depth, "num_attention_heads": width // HEAD}
        arguments = {
            "latents": options.latents,
            "output_dir": output,
            "network_kwargs": json.dumps(network | {"conditioning": conditioning}),
            "max_train_steps": options.steps,
            "batch_size": options.batch,
            "checkpointing_steps": 0,
            "logging_steps": options.steps,
            "seed": options.seed,
        }
        recipe = str(TRAINING / "configs/quick_start/diffusion.yaml")
        train.main([recipe, *(str(part) for key, value in arguments.items() for part in (f"--{key}", value))])
    return output / "pipeline"


@torch.no_grad()
def test_loss(pipeline, latents, labels):
    """Mean loss of the network, the objective of training without label dropout, the same draws for every model."""
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for x0, label in zip(latents.split(250), labels.split(250), strict=True):
        noise = torch.randn(x0.shape, generator=generator)
        times = (torch.randperm(len(x0), generator=generator) + 0.5).double() / len(x0)
        t = uniform_times(pipeline.scheduler, times)
        total += float(
            denoising_loss(pipeline.denoiser, pipeline.scheduler, x0, noise, t, {"class_labels": label}).sum()
        )
    return total / len(latents)


def measure(pipeline, judge, real, latents, labels, options):
    """Loss on test images, and the distance and accuracy of as many samples."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(options.seed)
    asked = (torch.arange(options.samples) % pipeline.num_classes).tolist()
    images = []
    for start in range(0, len(asked), 250):
        part = asked[start : start + 250]
        output = pipeline(class_labels=part, num_inference_steps=20, generator=generator, output_type="pt")
        images.append(output.images * 2 - 1)
    images = torch.cat(images)
    return {
        "loss": test_loss(pipeline, latents, labels),
        "distance": frechet_distance(*moments(features_of(ClassifierFeatures(judge), images, 250)), *real),
        "recognised": accuracy(judge, images, torch.tensor(asked)),
    }


def draw(found, path):
    """Loss and distance against Gflops."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, key, label in zip(axes, ("loss", "distance"), ("loss on test images", "Fréchet distance"), strict=True):
        for patch, colour in zip(PATCHES, ("C0", "C1", "C2"), strict=True):
            rows = [row for row in found if row["patch"] == patch and row["conditioning"] == "adaln_zero"]
            axis.scatter([row["gflops"] for row in rows], [row[key] for row in rows], c=colour, label=f"patch {patch}")
            for row in rows:
                axis.annotate(
                    f"{row['depth']}x{row['width']}",
                    (row["gflops"], row[key]),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=7,
                )
        for conditioning, marker in zip(CONDITIONINGS, "x+^", strict=True):
            rows = [row for row in found if row["conditioning"] == conditioning]
            where = [row["gflops"] for row in rows], [row[key] for row in rows]
            axis.scatter(*where, c="black", marker=marker, label=conditioning)
        axis.set(xlabel="Gflops of a forward pass", ylabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", required=True, help="folder of training/encode_latents.py, of the quick start")
    parser.add_argument("--runs", default="runs/scaling", help="folder for the trained models (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images of a step (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="the beginning of the names of what is written")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()

    folders = [train_model(options, *point) for point in GRID]
    recipe = str(TRAINING / "configs/quick_start/evaluation.yaml")
    config = parse(EvaluateConfig, [recipe, "--pipeline", str(folders[0])])
    config = complete(config, image_shape(load_bundle(folders[0])))
    judge = train_classifier(ImageDataset(config), config.classifier_epochs, config.seed, torch.device("cpu"))
    test = ImageDataset(config, split=config.test_split)
    rows = [test[i] for i in range(len(test))]
    images, labels = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("images", "labels"))
    real = moments(features_of(ClassifierFeatures(judge), images, 250))
    latents = load_bundle(folders[0]).to_latents(images)

    found = []
    print("| depth x width | patch | conditioning | Gflops | parameters, millions | loss | distance | recognised |")
    print("|---|---|---|---|---|---|---|---|")
    for (depth, width, patch, conditioning), folder in zip(GRID, folders, strict=True):
        pipeline = load_bundle(folder)
        row = {"depth": depth, "width": width, "patch": patch, "conditioning": conditioning}
        row["gflops"] = gflops(pipeline.denoiser)
        row["parameters"] = sum(parameter.numel() for parameter in pipeline.denoiser.parameters())
        found.append(row | measure(pipeline, judge, real, latents, labels, options))
        row = found[-1]
        print(
            f"| {depth} x {width} | {patch} | {conditioning} | {row['gflops']:.4f} | {row['parameters'] / 1e6:.2f} "
            f"| {row['loss']:.4f} | {row['distance']:.2f} | {row['recognised']:.1%} |",
            flush=True,
        )
    document = {"steps": options.steps, "batch": options.batch, "samples": options.samples, "models": found}
    Path(f"{options.output}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(found, f"{options.output}.png")


if __name__ == "__main__":
    main()
