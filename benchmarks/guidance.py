"""Classes by classifier guidance, classifier-free guidance (in an interval, too) and auto-guidance, on one model.

    python benchmarks/guidance.py --pipeline runs/quick_start/diffusion/pipeline \
        --classifier runs/quick_start/classifier/classifier --weaker runs/quick_start/weaker/pipeline \
        --output benchmarks/guidance.json

For every kind and scale, the share of samples that a classifier of clean images, trained on real ones, recognises as
the class asked for; and their variety: the mean distance of two samples of a class, as a multiple of that of real
test images. For classifier guidance the network itself is not told the class.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from datasets import disable_progress_bars
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.utils import logging

from score_sde import NoiseConditionalClassifier, load_bundle


TRAINING = Path(__file__).resolve().parents[1] / "training"
from score_sde.training.evaluate import EvaluateConfig, image_shape  # noqa: E402
from score_sde.training.parts.classifier import accuracy, train_classifier  # noqa: E402
from score_sde.training.parts.data import ImageDataset  # noqa: E402
from score_sde.training.parts.options import parse  # noqa: E402
from score_sde.training.parts.real_images import complete  # noqa: E402


def variety(images, labels):
    """Mean distance of two images of the same class."""
    found = []
    for label in labels.unique():
        own = images[labels == label].flatten(1)
        found.append(torch.pdist(own).mean())
    return float(torch.stack(found).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder of a class-conditional bundle")
    parser.add_argument("--classifier", required=True, help="folder of a NoiseConditionalClassifier of its samples")
    parser.add_argument("--weaker", required=True, help="folder of a bundle with a weaker network")
    parser.add_argument("--config", default=str(TRAINING / "configs/quick_start/evaluation.yaml"), help="the data")
    parser.add_argument("--samples", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()

    config = parse(EvaluateConfig, [options.config, "--pipeline", options.pipeline])
    pipeline, weaker = load_bundle(options.pipeline), load_bundle(options.weaker).denoiser
    pipeline.set_progress_bar_config(disable=True)
    classifier = NoiseConditionalClassifier.from_pretrained(options.classifier)
    config = complete(config, image_shape(pipeline))
    judge = train_classifier(ImageDataset(config), config.classifier_epochs, config.seed, torch.device("cpu"))

    test = ImageDataset(config, split=config.test_split)
    rows = [test[i] for i in range(min(1000, len(test)))]
    real_labels = torch.tensor([row["labels"] for row in rows])
    real_variety = variety(torch.stack([row["images"] for row in rows]), real_labels)

    kinds = {"no guidance": {}}
    for scale in (1, 2, 4, 8):
        arguments = {"classifier": classifier, "classifier_scale": scale, "guidance_scale": 0.0}
        kinds[f"classifier guidance, {scale}"] = arguments
    for scale in (1.5, 2, 3, 5):
        kinds[f"classifier-free guidance, {scale:g}"] = {"guidance_scale": scale}
    for scale in (2, 3, 5):
        guider = ClassifierFreeGuidance(guidance_scale=scale, start=0.2, stop=0.8)
        kinds[f"classifier-free guidance, {scale:g}, from 0.2 to 0.8 of the steps"] = {"guider": guider}
    for scale in (1.5, 2, 3):
        kinds[f"auto-guidance, {scale:g}"] = {"guidance_scale": scale, "weaker_network": weaker}

    labels = torch.arange(options.samples) % pipeline.num_classes
    found = {}
    print("| guidance, scale | recognised | variety | s |\n|---|---|---|---|", flush=True)
    for name, arguments in kinds.items():
        begin = time.perf_counter()
        images = pipeline(
            class_labels=labels,
            num_inference_steps=options.steps,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="pt",
            **arguments,
        ).images
        seconds = time.perf_counter() - begin
        images = images * 2 - 1
        found[name] = (accuracy(judge, images, labels), variety(images, labels) / real_variety, seconds)
        print(f"| {name} | {found[name][0]:.1%} | {found[name][1]:.2f} | {seconds:.1f} |", flush=True)
    if options.output:
        document = {"samples": options.samples, "steps": options.steps, "accuracy, variety, seconds": found}
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
