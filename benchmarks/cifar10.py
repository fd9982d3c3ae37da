"""CIFAR-10 in pixels: this package's U-Net and training beside the recipe of diffusers' train_unconditional.py, at
equal processor time and the same evaluation.

    OMP_NUM_THREADS=1 python benchmarks/cifar10.py --train cifar10_train.parquet --test cifar10_test.parquet \\
        --classifier resnet56_cifar10.safetensors --statistics cifar10_resnet56_stats.npz --output benchmarks/cifar10

Ours is training/configs/cifar10/diffusion.yaml, trained with each of --optimizers. The recipe is that script's
defaults: DDPM's linear betas, epsilon, AdamW with betas (0.95, 0.999) and weight decay 1e-6, a cosine schedule with 500
steps of warm-up, batches of 16, mirrored images, EMA with power 3/4; its own network has 114 million parameters, so the
same class in little, with more parameters and Gflops than ours. Its learning rate is 1e-4, which is for longer runs: it
is trained with each of --recipe_learning_rates, and has bfloat16 where ours has.

All are measured by the Fréchet distance of samples to all training images in the 64 features of a ResNet-56 that
classifies CIFAR-10 (akamaster/pytorch_resnet_cifar10), no FID; the best of ours and of the recipe by bits/dim, too. A
model that is already in RUNS is not trained again, nor measured what stands in OUTPUT.json; --models takes one of them,
so that they can be trained side by side. Writes OUTPUT.json and, once all are there, OUTPUT.png.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines import kinds
from score_sde.pipelines.writing import write_json
from score_sde.sharing.facts import read_json


TRAINING = Path(__file__).resolve().parents[1] / "training"
from score_sde.training import train  # noqa: E402
from score_sde.training.parts.config import DataConfig  # noqa: E402
from score_sde.training.parts.data import ImageDataset  # noqa: E402
from score_sde.training.parts.metrics import Features, features_of, frechet_distance, moments  # noqa: E402
from score_sde.training.parts.options import parse  # noqa: E402
from score_sde.training.parts.precision import automatic_precision  # noqa: E402
from score_sde.training.parts.samples import quantized  # noqa: E402


OURS = str(TRAINING / "configs/cifar10/diffusion.yaml")
# of the recipe
BATCH, WARMUP = 16, 500
DTYPES = {"bf16": "bfloat16", "no": "float32"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ResNet56Features(Features):
    """The pooled features (N, 64) and the logits (N, 10) of a ResNet-56 for CIFAR-10 (He et al. 2016, section 4.2),
    from its weights."""

    name, logits = "ResNet-56 of CIFAR-10", True

    def __init__(self, path, device="cpu"):
        self.weights = load_file(path, device=str(device))
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def convolve(self, x, convolution, norm, stride=1):
        w = self.weights
        x = F.conv2d(x, w[f"{convolution}.weight"], stride=stride, padding=1)
        mean, variance, weight, bias = (w[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, weight, bias)

    def __call__(self, images):
        x = self.convolve((images / 2 + 0.5 - self.mean) / self.std, "conv1", "bn1").relu()
        for layer in range(1, 4):
            for block in range(9):
                stride, name = (2 if layer > 1 and block == 0 else 1), f"layer{layer}.{block}"
                inner = self.convolve(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
                inner = self.convolve(inner, f"{name}.conv2", f"{name}.bn2")
                if stride == 2:
                    x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
                x = (x + inner).relu()
        features = x.mean((2, 3))
        return features, F.linear(features, self.weights["linear.weight"], self.weights["linear.bias"])


def optimizer_and_rate(text):
    name, separator, rate = text.partition(":")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} must be an optimizer and its learning rate: muon:2e-3")
    return name, float(rate)


def train_ours(options, optimizer, rate):
    """The folder of the pipeline of this package's recipe by an optimizer, and facts of its training."""
    output = options.runs / f"score_sde-{optimizer}-{rate:g}"
    if not (output / "pipeline").is_dir():
        arguments = {"dataset": options.train, "output_dir": output, "max_train_seconds": options.seconds}
        # as many steps as there is time for
        arguments |= {"max_train_steps": 1_000_000, "seed": options.seed, "resume_from_checkpoint": "latest"}
        arguments |= {"optimizer": optimizer, "learning_rate": rate}
        train.main([OURS, *(str(part) for key, value in arguments.items() for part in (f"--{key}", value))])
    facts = json.loads((output / "pipeline/training.json").read_text())
    return output / "pipeline", {
        "steps": facts["steps"],
        "images_seen": facts["images_seen"],
        "seconds": facts["train_seconds"],
        "dtype": DTYPES[facts["config"]["mixed_precision"]],
    }


def train_recipe(options, rate):
    """The folder of the pipeline of diffusers' recipe at a learning rate, and facts of its training."""
    output = options.runs / f"diffusers-{rate:g}"
    if not (output / "facts.json").is_file():
        torch.manual_seed(options.seed)
        model = UNet2DModel(
            sample_size=32,
            block_out_channels=(32, 64, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
        precision = automatic_precision()
        scheduler = DDPMScheduler(num_train_timesteps=1000)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.95, 0.999), weight_decay=1e-6)
        ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
        loader = DataLoader(real_images(options.train, "train"), batch_size=BATCH, shuffle=True)
        batches, step, began = iter(()), 0, time.process_time()
        with tqdm(desc=f"diffusers, rate {rate:g}", unit="step") as bar:
            while (share := (time.process_time() - began) / options.seconds) < 1:
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1, step / WARMUP) * (1 + math.cos(math.pi * share)) / 2
                batch = next(batches, None)
                if batch is None:
                    batches = iter(loader)
                    batch = next(batches)
                clean = batch["images"]
                clean = torch.where(torch.rand(len(clean), 1, 1, 1) < 0.5, clean.flip(-1), clean)
                noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                    predicted = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
                F.mse_loss(predicted.float(), noise).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                ema.step(model.parameters())
                step += 1
                bar.update()
        seconds = time.process_time() - began
        ema.copy_to(model.parameters())
        DDPMPipeline(model, scheduler).save_pretrained(output)
        facts = {"steps": step, "images_seen": step * BATCH, "seconds": seconds, "dtype": DTYPES[precision]}
        (output / "facts.json").write_text(json.dumps(facts))
    return output, json.loads((output / "facts.json").read_text())


def real_images(path, split):
    options = ["--dataset", str(path), "--label_column", "none", "--resolution", "32"]
    return ImageDataset(parse(DataConfig, options), split)


def draw(pipeline, options, numbers):
    """Samples (N, 3, 32, 32) in [-1, 1] of a pipeline, image i from the seed's and its number."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(numbers), 100), desc="samples", unit="batch"):
        generators = [torch.Generator().manual_seed(options.seed + number) for number in numbers[start : start + 100]]
        output = pipeline(
            batch_size=len(generators), num_inference_steps=options.steps, generator=generators, output_type="pt"
        )
        images.append(output.images * 2 - 1)
    return torch.cat(images)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="parquet file of the training images")
    parser.add_argument("--test", required=True, help="parquet file of the test images")
    parser.add_argument("--classifier", required=True, help="resnet56_cifar10.safetensors")
    parser.add_argument("--statistics", required=True, help="its mean and covariance of the training images, .npz")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"), help="(default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=["score_sde", "diffusers"], default=["score_sde", "diffusers"])
    parser.add_argument("--seconds", type=float, default=1200, help="of each training (default: %(default)s)")
    parser.add_argument(
        "--optimizers",
        type=optimizer_and_rate,
        nargs="+",
        default=[("adamw", 1e-3), ("adamw", 3e-3), ("muon", 2e-3)],
        metavar="OPTIMIZER:RATE",
        help="of ours (default: adamw:1e-3 adamw:3e-3 muon:2e-3)",
    )
    parser.add_argument(
        "--recipe_learning_rates",
        type=float,
        nargs="+",
        default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        help="(default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=2000, help="a multiple of 100 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="network evaluations a sample (default: %(default)s)")
    parser.add_argument("--likelihood", type=int, default=100, help="test images for bits/dim (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="the beginning of the names of what is written")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    ours, recipes = {}, {}
    if "score_sde" in options.models:
        ours = {
            f"score_sde, {name}, rate {rate:g}": train_ours(options, name, rate) for name, rate in options.optimizers
        }
    if "diffusers" in options.models:
        recipes = {f"diffusers, rate {rate:g}": train_recipe(options, rate) for rate in options.recipe_learning_rates}
    if len(options.models) < 2:
        return

    judge = ResNet56Features(options.classifier)
    statistics = np.load(options.statistics)
    reference = torch.from_numpy(statistics["train_mu"]), torch.from_numpy(statistics["train_sigma"])
    test = torch.stack([row["images"] for row in Subset(real_images(options.test, "test"), range(options.samples))])
    path = f"{options.output}.json"
    rows = (read_json(path) or {"rows": {}})["rows"]
    settings = {key: vars(options)[key] for key in ("seconds", "samples", "steps", "likelihood", "seed")}

    def once(name, figure, measured):
        """A row with what `measured`() finds, unless this figure of it is there."""
        row = rows.setdefault(name, {})
        if figure not in row:
            row |= measured()
            document = settings | {"features": judge.name, "threads": torch.get_num_threads(), "rows": rows}
            write_json(path, document)
        return row[figure]

    def measure(name, facts, pipeline):
        """The distance of what a pipeline draws, in a row with facts of its training."""
        facts = facts | {"parameters": sum(each.numel() for each in pipeline.unet.parameters())}
        images = functools.partial(draw, pipeline, options, range(options.samples))
        return once(name, "distance", lambda: facts | {"distance": distance(judge, images(), reference)})

    once("real test images", "distance", lambda: {"distance": distance(judge, test, reference)})
    pipelines = {name: ScoreSDEPipeline.from_pretrained(folder) for name, (folder, _) in ours.items()}
    best_of_ours = min(ours, key=lambda name: measure(name, ours[name][1], pipelines[name]))
    stock = {}
    for name, (folder, _) in recipes.items():
        recipe = DDPMPipeline.from_pretrained(folder)
        stock[name] = ScoreSDEPipeline(DDIMScheduler.from_config(recipe.scheduler.config), unet=recipe.unet)
    best = min(recipes, key=lambda name: measure(f"{name}, by DDIMScheduler", recipes[name][1], stock[name]))
    by_ours = f"{best}, by ScoreSDEScheduler"
    scheduler = ScoreSDEScheduler.from_config(stock[best].scheduler.config)
    pipelines[by_ours] = ScoreSDEPipeline(scheduler, unet=stock[best].unet)
    measure(by_ours, recipes[best][1], pipelines[by_ours])
    for name in (best_of_ours, by_ours):
        if options.likelihood:
            measured = functools.partial(bits_per_dim, pipelines[name], test[: options.likelihood], options)
            once(name, "bits_per_dim", measured)

    print("| images | Fréchet distance to the 50,000 of train | bits/dim | images seen | seconds of training |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        bits = f"{row['bits_per_dim']:.3f} ± {row['bits_per_dim_error']:.3f}" if "bits_per_dim" in row else ""
        facts = f"{row['images_seen']:,} | {row['seconds']:,.0f}" if "seconds" in row else " | "
        print(f"| {name} | {row['distance']:.2f} | {bits} | {facts} |")
    shown = (pipelines[best_of_ours], stock[best], pipelines[by_ours])
    images = torch.cat([draw(each, options, range(32)) for each in shown])
    kind = kinds.Image(images.shape[1], tuple(images.shape[2:]), images.shape[1])
    kind.save_grid(kind.output(images), f"{options.output}.png", columns=16)


def bits_per_dim(pipeline, images, options):
    """Of whole numbers, uniformly dequantised, with the standard error over images."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(options.seed)
    found = pipeline.log_likelihood(
        images=images, dequantization="uniform", rtol=1e-4, atol=1e-4, generator=generator
    ).bits_per_dim()
    return {"bits_per_dim": found.mean().item(), "bits_per_dim_error": (found.std() / len(found) ** 0.5).item()}


@torch.no_grad()
def distance(network, images, reference):
    return frechet_distance(*moments(features_of(network, quantized(images), 100)), *reference)


if __name__ == "__main__":
    main()
