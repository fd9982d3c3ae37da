"""Are photographs of clothes recognised as their class? Runs of the DiT in latents at guidance scales, by a classifier
that learned from real photographs.

    python benchmarks/photographs.py --run "plain=runs/clothing128" "aligned (iREPA)=runs/clothing128_aligned" \\
        --photographs "clothing256_{split}.parquet" --efficientnet efficientnet_lite0/model.safetensors \\
        --output benchmarks/photographs

The judge is that of few_steps.py: distances in the first 64 principal components of an EfficientNet-Lite0's features,
classes by a linear classifier on all of them; its features of real photographs are kept in --features. Images have the
same seeds in every row, classes as often as the photographs have them. Writes OUTPUT.json after each row, and isn't
measuring again what stands there, and OUTPUT.png: the last run at its best guidance, a class in each column.
"""

import argparse
import json
import os
from pathlib import Path

from few_steps import Judge, opened

from score_sde.pipelines.kinds import Image
from score_sde.pipelines.writing import write_json
from score_sde.training.parts.samples import draw


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", required=True, help="NAME=FOLDER, which holds diffusion/pipeline")
    parser.add_argument("--photographs", required=True, help="parquet files, {split} for train and test")
    parser.add_argument("--efficientnet", required=True, help="its weights")
    parser.add_argument("--features", default="runs/photographs", help="(default: %(default)s)")
    parser.add_argument("--guidance_scale", nargs="+", type=float, default=[1, 2, 4, 6], help="(default: 1 2 4 6)")
    parser.add_argument("--steps", type=int, default=20, help="evaluations (default: %(default)s)")
    parser.add_argument("--count", type=int, default=300, help="images a row, hundreds (default: %(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="the beginning of the names of what is written")
    arguments = parser.parse_args()

    os.makedirs(arguments.features, exist_ok=True)
    judge = Judge.of_photographs(arguments.features, arguments.photographs, arguments.efficientnet)
    path = arguments.output.with_suffix(".json")
    rows = json.loads(path.read_text()) if path.exists() else {}
    print("| run | guidance | Fréchet distance | recognised | precision | recall |\n|---|---|---|---|---|---|")
    for name, folder in (each.split("=", 1) for each in arguments.run):
        pipeline, own = opened(os.path.join(folder, "diffusion", "pipeline")), rows.setdefault(name, {})
        for scale in arguments.guidance_scale:
            if f"{scale:g}" not in own:
                own[f"{scale:g}"] = judge.measure(pipeline, arguments.steps, scale, arguments.count)
                write_json(str(path), rows)
            row = own[f"{scale:g}"]
            figures = f"{row['frechet_distance']:.0f} | {row['accuracy']:.1%}"
            print(f"| {name} | {scale:g} | {figures} | {row['precision']:.3f} | {row['recall']:.3f} |", flush=True)
    best = max(arguments.guidance_scale, key=lambda scale: own[f"{scale:g}"]["accuracy"])
    classes = len(pipeline.config.id2label)
    labels = list(range(classes))
    images, _ = draw(pipeline, range(6 * classes), 0, best, arguments.steps, labels=labels)
    kind = Image(images.shape[1], tuple(images.shape[2:]), images.shape[1])
    kind.save_grid(kind.output(images), str(arguments.output.with_suffix(".png")), columns=classes)


if __name__ == "__main__":
    main()
