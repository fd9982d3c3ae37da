"""Photographs of clothing enlarged four times, and coloured, by a network that sees the small or grey picture beside
the sample, next to what needs no such training: bicubic interpolation, or the grey picture itself, and pigdm with a
model of such photographs alone.

    python benchmarks/image_conditions.py --data FOLDER --output runs/image_conditions --seconds 360
    python benchmarks/image_conditions.py --report runs/image_conditions    # the table, from result.json

FOLDER holds clothing256/train.parquet and test.parquet, and efficientnet_lite0/model.safetensors. Trains, one after
another, the configurations clothing64/super_resolution, diffusion and colourisation at 64 x 64 pixels, each for its
share of the time, and measures on the test photographs: PSNR (the mean over images, in dB), the residual (root mean
square of the measurement's difference, images in [-1, 1]), the Fréchet distance to the true photographs in the pooled
features of an EfficientNet-Lite0, and the seconds for all of them. Writes OUTPUT/result.json as it goes along,
tracebacks, too, super_resolution.png and colourisation.png (in rows: what is given, the truth, and each method), and
into --pack FOLDER one archive of all but weights. What is trained already is not trained again. --small is for a core
or two: 32 x 32 pixels, from 8 x 8, and U-Nets of half a million parameters, the same number of steps each where the
time is enough (--train_steps). --little is a rehearsal on any machine with tiny networks.
"""

import argparse
import json
import re
import tarfile
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from efficientnet import EfficientNetFeatures
from reference_work import LITTLE, OPENING, save_grid
from work import Work

from score_sde import ScoreSDEInversePipeline, ScoreSDEPipeline
from score_sde.pipelines.image_conditions import Measurement
from score_sde.training import train
from score_sde.training.parts.config import DataConfig
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.metrics import Moments, frechet_distance
from score_sde.training.parts.options import parse
from score_sde.training.parts.provenance import provenance
from score_sde.training.parts.samples import quantized


# name of a task: (its measurement, what needs no training and its name)
TASKS = {
    "super_resolution": (
        "downsample:4",
        "bicubic",
        lambda y: F.interpolate(y, scale_factor=4, mode="bicubic", align_corners=False),
    ),
    "colourisation": ("grayscale", "grey", lambda y: y.expand(-1, 3, -1, -1)),
}
# seconds that all measurements of a task may take; and packing
MEASURING = 40
PACKING = 5
SHOWN = 12
TINY_UNET = "{block_out_channels: [16, 16, 16], layers_per_block: 1, attention_resolutions: [16]}"
SMALL_UNET = (
    "{block_out_channels: [24, 48, 48], layers_per_block: 1, attention_resolutions: [8], resnet_time_scale_shift: "
    "scale_shift, class_dropout_prob: 0}"
)
SMALL = ["--resolution", "32", "--batch_size", "16", "--learning_rate", "1e-3", "--lr_warmup_steps", "20"]
SMALL += ["--ema_decay", "0.99", "--mixed_precision", "no", "--sample_num_images", "8", "--network_kwargs", SMALL_UNET]
LITTLE_SAMPLES = ["--sample_num_images", "4", "--sample_num_inference_steps", "2", "--network_kwargs", TINY_UNET]


def train_models(work, names, ends):
    """Train what isn't yet, each for an equal share of the time until `ends`."""
    waiting = [name for name in names if not is_trained(work, name)]
    for i, name in enumerate(waiting):
        until = time.monotonic() + (ends - time.monotonic()) / (len(waiting) - i)
        with work.part(f"training_{name}"):
            work.needs(3)
            train_model(work, name, until)


def train_model(work, name, until):
    """Train by a configuration, its steps or those that there is time for, `until` a time."""
    output, seconds = work.folder / name, max(1, until - OPENING - time.monotonic())
    arguments = [f"clothing64/{name}", "--dataset", work.data / "clothing256" / "train.parquet", "--output_dir", output]
    arguments += ["--on_existing_run", "set_aside", "--seed", work.options.seed, "--max_train_seconds", seconds]
    steps = work.options.train_steps
    arguments += [] if steps is None else ["--max_train_steps", steps, "--checkpointing_steps", steps]
    arguments += SMALL if work.options.small else []
    arguments += [*LITTLE, *LITTLE_SAMPLES] if work.options.little else []
    train.main(list(map(str, arguments)))
    work.write(**{f"log_of_{name}": work.speed(name)})


def is_trained(work, name):
    return (work.folder / name / "pipeline" / "model_index.json").is_file()


class Judge:
    """The test photographs and how well others resemble them."""

    def __init__(self, work, device):
        config = parse(
            DataConfig,
            ["--dataset", str(work.data / "clothing256" / "test.parquet"), "--split", "train"]
            + ["--resolution", "32" if work.options.small else "64"],
        )
        self.device, count = device, 6 if work.options.little else work.options.photographs
        self.truth = self.read(config, count)
        self.network = EfficientNetFeatures(work.data / "efficientnet_lite0" / "model.safetensors", device)
        # kept in half precision
        self.network.weights = {name: x.float() for name, x in self.network.weights.items()}
        self.of_truth = self.moments(self.truth)
        config.dataset = str(work.data / "clothing256" / "train.parquet")
        # as far as other photographs are, as many
        self.floor = frechet_distance(*self.moments(self.read(config, len(self.truth))), *self.of_truth)
        work.write(frechet_distance_of_training_photographs=self.floor, photographs=len(self.truth))

    def read(self, config, count):
        data = ImageDataset(config)
        return torch.stack([data[i]["images"] for i in range(count or len(data))]).to(self.device)

    @torch.no_grad()
    def moments(self, images):
        found = Moments()
        for part in images.split(128):
            found.add(self.network(part)[0].float())
        return found.result()

    def figures(self, images, y, operator):
        """Of images (N, 3, H, W) in [-1, 1] that are to have the measurement y."""
        errors = ((images - self.truth) / 2).square().mean((1, 2, 3))
        return {
            "psnr": float((-10 * errors.log10()).mean()),
            "residual": float((operator(images) - y).square().mean().sqrt()),
            "frechet_distance": frechet_distance(*self.moments(images), *self.of_truth),
        }


def drawn(call, count, batch_size, seed):
    """(images (N, 3, H, W) in [-1, 1] as 8 bits have them, seconds, network evaluations) of f(rows, generators)."""
    begin, images, nfe = time.perf_counter(), [], 0
    for start in range(0, count, batch_size):
        rows = slice(start, min(start + batch_size, count))
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(rows.start, rows.stop)]
        output = call(rows, generators)
        images.append(output.images.float().cpu() * 2 - 1)
        nfe = output.nfe
    return quantized(torch.cat(images)), time.perf_counter() - begin, nfe


def measure(work, judge, task):
    """The figures of all methods for a task, and their picture."""
    name, plain_name, plain = TASKS[task]
    measurement, options = Measurement(name), work.options
    # as a picture of 8 bits has it
    y = quantized(measurement.operator(judge.truth))
    count, pictures, figures = len(y), {}, {}
    steps, batch_size = (2, 3) if options.little else (options.steps, options.batch_size)

    def add(method, images, seconds, **facts):
        images = images.to(judge.device)
        found = judge.figures(images, y, measurement.operator)
        figures[method] = found | {"seconds": round(seconds, 2), "images": count} | facts
        pictures[method] = images[:SHOWN]
        work.write(**{task: figures})
        print(f"{task}, {method}: {figures[method]}", flush=True)
        rows = [measurement(judge.truth)[:SHOWN].expand(-1, 3, -1, -1), judge.truth[:SHOWN], *pictures.values()]
        save_grid(torch.cat(rows), work.folder / f"{task}.png", columns=len(rows[0]))

    begin = time.perf_counter()
    images = quantized(plain(y).clamp(-1, 1))
    add(plain_name, images, time.perf_counter() - begin, nfe=0)

    if is_trained(work, task):
        with work.part(f"{task}_by_condition"):
            work.needs(3)
            pipeline = opened(ScoreSDEPipeline, work, task, judge.device)

            def by_condition(rows, generators):
                seen = (y[rows] / 2 + 0.5).clamp(0, 1)
                return pipeline(condition_image=seen, num_inference_steps=steps, generator=generators, output_type="pt")

            images, seconds, nfe = drawn(by_condition, count, batch_size, options.seed)
            add("ours", images, seconds, nfe=nfe)
            several = [images]
            while len(several) < (2 if options.little else options.samples) and work.left() > options.measuring / 2:
                images, more, _ = drawn(by_condition, count, batch_size, options.seed + len(several) * count)
                several.append(images)
                seconds += more
            mean = quantized(torch.stack(several).mean(0))
            add(f"ours, mean of {len(several)}", mean, seconds, nfe=nfe * len(several))

    if is_trained(work, "diffusion"):
        with work.part(f"{task}_by_pigdm"):
            work.needs(3)
            inverse = opened(ScoreSDEInversePipeline, work, "diffusion", judge.device)
            arguments = {"method": "pigdm", "num_inference_steps": 2 if options.little else options.pigdm_steps}

            def by_pigdm(rows, generators):
                return inverse(measurement.operator, y[rows], generator=generators, output_type="pt", **arguments)

            images, seconds, nfe = drawn(by_pigdm, count, batch_size, options.seed)
            add("pigdm", images, seconds, nfe=nfe)


def opened(pipeline_class, work, name, device):
    pipeline = pipeline_class.from_pretrained(work.folder / name / "pipeline").to(device)
    pipeline.denoiser.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def report(folder):
    """The table of what was measured."""
    facts = json.loads((folder / "result.json").read_text())
    print("| | PSNR, dB | residual | Fréchet distance | network evaluations | seconds |\n|---|---|---|---|---|---|")
    for task in TASKS:
        for method, found in facts.get(task, {}).items():
            figures = f"{found['psnr']:.2f} | {found['residual']:.4f} | {found['frechet_distance']:.1f}"
            print(f"| {task}, {method} | {figures} | {found['nfe']} | {found['seconds']:.1f} |")
    if "frechet_distance_of_training_photographs" in facts:
        floor, count = facts["frechet_distance_of_training_photographs"], facts["photographs"]
        print(f"\nFréchet distance of {count} training photographs: {floor:.1f}; failed: {list(facts['failed'])}")


def pack(folder, into):
    """One archive of all but weights and checkpoints."""
    into.mkdir(parents=True, exist_ok=True)

    def small(entry):
        left_out = r"/(checkpoints|set_aside-\d+)(/|$)|\.(safetensors|parquet|partial|lock|py)$"
        return None if re.search(left_out, entry.name) else entry

    with tarfile.open(into / "image_conditions.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname="image_conditions", filter=small)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data")
    parser.add_argument("--report", type=Path, metavar="OUTPUT", help="print the table of what was measured there")
    parser.add_argument("--output", type=Path, default=Path("runs/image_conditions"), help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=360, help="of the whole command (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="time steps by condition (default: %(default)s)")
    parser.add_argument("--pigdm_steps", type=int, default=50, help="time steps of pigdm (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="of the mean of several (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=124, help="of sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--photographs", type=int, help="of the test split, the first ones (default: all)")
    parser.add_argument("--train_steps", type=int, help="of every training (default: those of the time)")
    parser.add_argument("--measuring", type=float, default=MEASURING, help="seconds of a task (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small pictures and networks, for a core or two")
    parser.add_argument("--little", action="store_true", help="a rehearsal with tiny networks")
    parser.add_argument("--pack", type=Path, help="folder for one archive of the results")
    options = parser.parse_args()
    if options.report:
        report(options.report)
        return
    if options.data is None:
        parser.error("--data is missing: the folder of the data")

    # of the process, whose imports take time, too
    seconds = options.seconds - PACKING - (time.time() - psutil.Process().create_time())
    work = Work("image_conditions", options, options.data, seconds)
    device = Accelerator(cpu=not torch.accelerator.is_available()).device
    torch.set_float32_matmul_precision("high")
    work.write(options={name: str(value) for name, value in vars(options).items()}, **provenance(device))
    judge = None
    with work.part("photographs"):
        judge = Judge(work, device)
    # what is measured of a task takes time before the next is trained
    measuring = 3 if options.little else options.measuring
    both = ("super_resolution", "diffusion")
    third = (work.left() - 2 * measuring) / 3
    train_models(work, both, time.monotonic() + 2 * third)
    for task in TASKS:
        if task not in both:
            train_models(work, (task,), work.ends - measuring)
        if judge is not None:
            with work.part(task):
                work.needs(3)
                measure(work, judge, task)
    work.write(done=True)
    if options.pack:
        pack(options.output, options.pack)
    report(options.output)


if __name__ == "__main__":
    main()
