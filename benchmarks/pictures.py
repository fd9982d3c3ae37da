"""Pictures of what one model can do: inpainting, colourisation, super-resolution, deblurring, and interpolations.

    python benchmarks/pictures.py --pipeline runs/clothing32/pipeline --dataset clothing256_test.parquet --split train \
        --output benchmarks/pictures_clothing

Writes OUTPUT_inverse.png, the reconstructions of test images by several methods below the measurements,
OUTPUT_interpolation.png, and prints the mean PSNR of the reconstructions, the residual of the measurement, network
evaluations and seconds. The measurements have noise of standard deviation 0.02. A latent model is measured through its
decoder, by dps alone.
"""

import argparse
import time
import warnings

import matplotlib
import torch
import torch.nn.functional as F

from score_sde import ScoreSDEInversePipeline, ScoreSDEScheduler, load_bundle
from score_sde.pipelines.likelihood import slerp
from score_sde.pipelines.operators import colourisation, deblurring, inpainting, super_resolution


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from score_sde.training.parts.config import DataConfig  # noqa: E402
from score_sde.training.parts.data import ImageDataset  # noqa: E402


NOISE_STD = 0.02
# a grid that suits every noise path
ANCESTRAL = {"predictor": "ancestral", "timestep_spacing": "karras"}
SONG = {
    "predictor": "reverse_diffusion",
    "corrector": "langevin",
    "corrector_position": "before",
    "timestep_spacing": "karras",
}
# label, settings of the scheduler, arguments of the pipeline
METHODS = [
    ("pigdm, 50 steps", {}, {"method": "pigdm", "num_inference_steps": 50}),
    ("tmpd, 50 steps", {}, {"method": "tmpd", "num_inference_steps": 50, "cg_steps": 3}),
    ("dps, 300 steps", ANCESTRAL, {"method": "dps", "num_inference_steps": 300}),
    ("replacement, PC 250 steps", SONG, {"method": "replacement", "num_inference_steps": 250}),
    (
        "repaint, 100 steps, 10 x 5",
        ANCESTRAL,
        {"method": "repaint", "num_inference_steps": 100, "resamplings": 5},
    ),
]


def measurements(shape):
    """{name: (operator, those of METHODS that are drawn)} for images of this shape (C, H, W)."""
    channels, height, width = shape
    mask = torch.ones(height, width, dtype=torch.bool)
    mask[height // 4 : -height // 4, width // 4 : -width // 4] = False
    found = {"inpainting": inpainting(mask), "super-resolution 4x": super_resolution(4)}
    found["deblurring"] = deblurring(1.5)
    return ({"colourisation": colourisation(channels)} if channels == 3 else {}) | found


def visible(measurement, shape):
    """A measurement as images (B, 3, H, W) in [0, 1]."""
    images = F.interpolate(measurement, shape[1:], mode="nearest")
    return (images.expand(-1, 3, -1, -1) / 2 + 0.5).clamp(0, 1)


def draw(rows, path, title):
    """Rows of (label, images (B, C, H, W) in [0, 1]) as a PNG."""
    count = max(len(images) for _, images in rows)
    width, height = 1.1 * count + 2.2, 1.1 * len(rows) + 0.4
    figure, axes = pyplot.subplots(len(rows), count, figsize=(width, height), squeeze=False)
    for (label, images), line in zip(rows, axes, strict=True):
        for image, place in zip(images, line, strict=False):
            place.imshow(image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
        for place in line:
            place.set_axis_off()
        line[0].text(-0.1, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=11, y=1 - 0.2 / height, va="center")
    figure.subplots_adjust(left=2.1 / width, right=0.995, bottom=0.005, top=1 - 0.4 / height, wspace=0.04, hspace=0.04)
    figure.savefig(path, dpi=90)
    print(path)


def reconstructions(pipeline, images, seed):
    """The rows of the picture of inverse problems; prints their figures."""
    solver, rows = ScoreSDEInversePipeline(**pipeline.components), [("test images", images / 2 + 0.5)]
    solver.set_progress_bar_config(disable=True)
    config, shape = pipeline.scheduler.config, images.shape[1:]
    print("| measurement | method | PSNR, dB | residual | NFE | s |\n|---|---|---|---|---|---|")
    for problem, operator in measurements(shape).items():
        y = operator(images)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        # inside the mask, or of the measurement's shape
        y = y + NOISE_STD * (
            operator(noise) if problem == "inpainting" else noise[:, : y.shape[1], : y.shape[2], : y.shape[3]]
        )
        rows.append((problem, visible(y, shape)))
        for label, settings, arguments in METHODS:
            latent_only = pipeline.vae is not None and arguments["method"] != "dps"
            # the pseudo-inverse of a blur amplifies the noise of the measurement
            amplifies = problem == "deblurring" and arguments["method"] in ("replacement", "repaint")
            if latent_only or amplifies:
                continue
            solver.scheduler = ScoreSDEScheduler.from_config(config, **settings)
            begin = time.perf_counter()
            output = solver(
                operator,
                y,
                noise_std=NOISE_STD,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
                **arguments,
            )
            seconds = time.perf_counter() - begin
            error = (output.images - (images / 2 + 0.5)).square().flatten(1).mean(1)
            psnr, residual = float((-10 * error.log10()).mean()), float(output.residual.mean())
            print(f"| {problem} | {label} | {psnr:.1f} | {residual:.3f} | {output.nfe} | {seconds:.0f} |", flush=True)
            rows.append((label, output.images))
    return rows


def interpolations(pipeline, images, columns):
    """Rows from one test image to another through their codes, and one image by its code at other temperatures."""
    pipeline.set_progress_bar_config(disable=True)
    labels = None
    if pipeline.num_classes is not None and pipeline.null_label is None:
        labels = [0] * len(images)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    codes = pipeline.encode(images=images, class_labels=labels, **tolerance)

    def decoded(codes):
        own = None if labels is None else [0] * len(codes)
        return pipeline(latents=codes, class_labels=own, num_inference_steps=None, output_type="pt", **tolerance).images

    shares = torch.linspace(0, 1, columns).tolist()
    rows = []
    for first, second in zip(range(0, len(images), 2), range(1, len(images), 2), strict=False):
        between = torch.cat([slerp(codes[first : first + 1], codes[second : second + 1], share) for share in shares])
        rows.append((f"images {first} to {second}", decoded(between)))
    temperatures = torch.linspace(0.85, 1.15, columns)
    rows.append(("code x 0.85 to 1.15", decoded(temperatures.reshape(-1, 1, 1, 1) * codes[:1])))
    round_trip = (decoded(codes) * 2 - 1 - pipeline.decode(pipeline.to_latents(images)).clamp(-1, 1)).abs()
    print(f"round trip through the codes: mean {float(round_trip.mean()):.4f}, largest {float(round_trip.max()):.3f}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder of a bundle")
    parser.add_argument("--dataset", default="fashion_mnist_10k", help="test images (default: %(default)s)")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--title", default="", help="the beginning of the titles of the pictures")
    parser.add_argument("--output", required=True, help="where the PNG files are written, the beginning of their names")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    pipeline = load_bundle(options.pipeline)
    with torch.no_grad():
        shape = pipeline.decode(torch.zeros(pipeline.sample_shape(1))).shape[1:]
    config = DataConfig(dataset=options.dataset, split=options.split, resolution=shape[1], image_channels=shape[0])
    data = ImageDataset(config)
    every = len(data) // options.images
    images = torch.stack([data[i * every]["images"] for i in range(options.images)])
    with torch.no_grad():
        rows = interpolations(pipeline, images, columns=9)
        draw(rows, f"{options.output}_interpolation.png", f"{options.title}interpolation of encodings (slerp)")
        rows = reconstructions(pipeline, images, options.seed)
    title = f"{options.title}measurements with noise {NOISE_STD:g}, and samples given them"
    draw(rows, f"{options.output}_inverse.png", title)


if __name__ == "__main__":
    main()
