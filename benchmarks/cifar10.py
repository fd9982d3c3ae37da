"""CIFAR-10 in pixels: this package's U-Net and training beside the recipe of diffusers' train_unconditional.py, at
equal images seen and the same evaluation.

    python benchmarks/cifar10.py --train cifar10_train.parquet --test cifar10_test.parquet \\
        --classifier resnet56_cifar10.safetensors --statistics cifar10_resnet56_stats.npz --output benchmarks/cifar10

Ours is training/configs/cifar10/diffusion.yaml. The recipe is that script's defaults: DDPM's linear betas, epsilon,
AdamW with betas (0.95, 0.999) and weight decay 1e-6, learning rate 1e-4 with a cosine schedule and 500 steps of
warm-up, batches of 16, mirrored images, EMA with power 3/4; its own network has 114 million parameters, so the same
class in little, with more parameters and Gflops than ours. --recipe_learning_rate gives it another learning rate.

Both are measured by the Fréchet distance of samples to all training images in the 64 features of a ResNet-56 that
classifies CIFAR-10 (akamaster/pytorch_resnet_cifar10): no FID. A model that is already in RUNS is not trained again;
--models takes one of them, so that they can be trained side by side. Writes OUTPUT.json and, once both are there,
OUTPUT.png.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines import kinds


TRAINING = Path(__file__).resolve().parents[1] / "training"
from score_sde.training import train  # noqa: E402
from score_sde.training.parts.config import DataConfig  # noqa: E402
from score_sde.training.parts.data import ImageDataset  # noqa: E402
from score_sde.training.parts.metrics import Features, features_of, frechet_distance, moments  # noqa: E402
from score_sde.training.parts.options import parse  # noqa: E402
from score_sde.training.parts.samples import quantized  # noqa: E402


OURS = str(TRAINING / "configs/cifar10/diffusion.yaml")
PIPELINES = {"score_sde": ScoreSDEPipeline, "diffusers": DDPMPipeline}
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


def train_ours(options):
    """The folder of the pipeline of this package's recipe, and the seconds that its training took."""
    output = options.runs / "score_sde"
    if not (output / "pipeline").is_dir():
        steps = options.images // parse(train.TrainConfig, [OURS]).batch_size
        arguments = {"dataset": options.train, "output_dir": output, "max_train_steps": steps, "seed": options.seed}
        arguments["resume_from_checkpoint"] = "latest"
        train.main([OURS, *(str(part) for key, value in arguments.items() for part in (f"--{key}", value))])
    facts = json.loads((output / "pipeline/training.json").read_text())
    return output / "pipeline", facts["train_seconds"]


def train_recipe(options):
    """The folder of the pipeline of diffusers' recipe, and the seconds that its training took."""
    output = options.runs / f"diffusers-{options.recipe_learning_rate:g}"
    if not (output / "seconds.json").is_file():
        torch.manual_seed(options.seed)
        model = UNet2DModel(
            sample_size=32,
            block_out_channels=(32, 64, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
        scheduler, steps = DDPMScheduler(num_train_timesteps=1000), options.images // 16
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.recipe_learning_rate, betas=(0.95, 0.999), weight_decay=1e-6
        )
        lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=steps)
        ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
        loader = DataLoader(real_images(options.train, "train"), batch_size=16, shuffle=True)
        batches, started = iter(()), time.monotonic()
        for _ in tqdm(range(steps), desc="diffusers", unit="step"):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            clean = batch["images"]
            clean = torch.where(torch.rand(len(clean), 1, 1, 1) < 0.5, clean.flip(-1), clean)
            noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
            loss = F.mse_loss(model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
        seconds = time.monotonic() - started
        ema.copy_to(model.parameters())
        DDPMPipeline(model, scheduler).save_pretrained(output)
        (output / "seconds.json").write_text(json.dumps(seconds))
    return output, json.loads((output / "seconds.json").read_text())


def real_images(path, split):
    options = ["--dataset", str(path), "--label_column", "none", "--resolution", "32"]
    return ImageDataset(parse(DataConfig, options), split)


def draw(pipeline, scheduler, options):
    """Samples (N, 3, 32, 32) in [-1, 1] of a network by a scheduler; image i from the seed's and its number."""
    pipeline = ScoreSDEPipeline(scheduler, unet=pipeline.unet)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, options.samples, 100), desc="samples", unit="batch"):
        generators = [torch.Generator().manual_seed(options.seed + start + i) for i in range(100)]
        output = pipeline(batch_size=100, num_inference_steps=options.steps, generator=generators, output_type="pt")
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
    parser.add_argument("--images", type=int, default=48_000, help="training images seen (default: %(default)s)")
    parser.add_argument("--recipe_learning_rate", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="a multiple of 100 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="network evaluations a sample (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="the beginning of the names of what is written")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    found = {}
    if "score_sde" in options.models:
        found["score_sde"] = train_ours(options)
    if "diffusers" in options.models:
        found["diffusers"] = train_recipe(options)
    if len(found) < 2:
        return

    network = ResNet56Features(options.classifier)
    statistics = np.load(options.statistics)
    reference = torch.from_numpy(statistics["train_mu"]), torch.from_numpy(statistics["train_sigma"])
    test = torch.stack([row["images"] for row in Subset(real_images(options.test, "test"), range(options.samples))])
    rows = [{"images": "real test images", "distance": distance(network, test, reference)}]
    ours, recipe = (kind.from_pretrained(found[name][0]) for name, kind in PIPELINES.items())
    stock = DDIMScheduler.from_config(recipe.scheduler.config)
    grids = []
    for name, pipeline, scheduler in (
        ("score_sde", ours, ours.scheduler),
        ("diffusers", recipe, stock),
        ("diffusers", recipe, ScoreSDEScheduler.from_config(recipe.scheduler.config)),
    ):
        images = draw(pipeline, scheduler, options)
        grids.append(images[:32])
        rows.append(
            {
                "images": f"{name}, sampled by {type(scheduler).__name__}",
                "distance": distance(network, images, reference),
                "parameters": sum(each.numel() for each in pipeline.unet.parameters()),
                "train_seconds": found[name][1],
            }
        )
    print(f"| images | Fréchet distance, {options.samples:,} to the 50,000 of train | parameters | training, minutes |")
    print("|---|---|---|---|")
    for row in rows:
        facts = f"{row['parameters']:,} | {row['train_seconds'] / 60:.0f}" if "parameters" in row else " | "
        print(f"| {row['images']} | {row['distance']:.2f} | {facts} |")
    document = {key: vars(options)[key] for key in ("images", "recipe_learning_rate", "samples", "steps", "seed")}
    document |= {"features": network.name, "threads": torch.get_num_threads(), "rows": rows}
    Path(f"{options.output}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    images = torch.cat(grids)
    kind = kinds.Image(images.shape[1], tuple(images.shape[2:]), images.shape[1])
    kind.save_grid(kind.output(images), f"{options.output}.png", columns=16)


@torch.no_grad()
def distance(network, images, reference):
    return frechet_distance(*moments(features_of(network, quantized(images), 100)), *reference)


if __name__ == "__main__":
    main()
