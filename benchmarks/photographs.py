"""Are photographs of clothes recognised as their class? Runs of the DiT in latents at guidance scales, by a classifier
that learned from real photographs.

    python benchmarks/photographs.py --run "plain=runs/clothing128" "aligned (iREPA)=runs/clothing128_aligned" \\
        --photographs "clothing256_{split}.parquet" --efficientnet efficientnet_lite0/model.safetensors \\
        --output benchmarks/photographs.json

The judge is that of few_steps.py: distances in the first 64 principal components of an EfficientNet-Lite0's features,
classes by a linear classifier on all of them; its features of real photographs are kept in --features. Images have the
same seeds in every row, classes as often as the photographs have them. What stands in --output, which is written
after each row, is not measured again.
"""

import argparse
import os

from few_steps import Judge, opened

from score_sde.pipelines.writing import write_json
from score_sde.sharing.facts import read_json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", required=True, help="NAME=FOLDER, which holds diffusion/pipeline")
    parser.add_argument("--photographs", required=True, help="parquet files, {split} for train and test")
    parser.add_argument("--efficientnet", required=True, help="its weights")
    parser.add_argument("--features", default="runs/photographs", help="(default: %(default)s)")
    parser.add_argument("--guidance_scale", nargs="+", type=float, default=[1, 2, 4, 6], help="(default: 1 2 4 6)")
    parser.add_argument("--steps", type=int, default=20, help="evaluations (default: %(default)s)")
    parser.add_argument("--count", type=int, default=300, help="images a row, hundreds (default: %(default)s)")
    parser.add_argument("--output", required=True, help="the file of the figures")
    arguments = parser.parse_args()

    os.makedirs(arguments.features, exist_ok=True)
    judge = Judge.of_photographs(arguments.features, arguments.photographs, arguments.efficientnet)
    rows = read_json(arguments.output) or {}
    print("| run | guidance | Fréchet distance | recognised | precision | recall |\n|---|---|---|---|---|---|")
    for name, folder in (each.split("=", 1) for each in arguments.run):
        pipeline, own = opened(os.path.join(folder, "diffusion", "pipeline")), rows.setdefault(name, {})
        for scale in arguments.guidance_scale:
            if f"{scale:g}" not in own:
                own[f"{scale:g}"] = judge.measure(pipeline, arguments.steps, scale, arguments.count)
                write_json(arguments.output, rows)
            row = own[f"{scale:g}"]
            figures = f"{row['frechet_distance']:.0f} | {row['accuracy']:.1%}"
            print(f"| {name} | {scale:g} | {figures} | {row['precision']:.3f} | {row['recall']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
