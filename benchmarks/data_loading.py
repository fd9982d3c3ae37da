"""Images per second of the training data's loader, beside a loader as diffusers' training scripts have it.

    python benchmarks/data_loading.py --photographs clothing256_train.parquet --output benchmarks/data_loading.json

The peer is the loader of diffusers' train_unconditional.py: `datasets` with `set_transform`, its resize (shorter side,
bilinear there; Lanczos here, as ours), crop, and normalisation done by PIL and torch, since torchvision is no
dependency, and a shuffling DataLoader. The peer of the latents is what is common for them: one .npy file per row (as
fast-DiT has it), read by a map-style dataset. Both give the same batches of 64: float32 in [-1, 1] with labels.

Rounds of all loaders are interleaved; a speed is the median of the rounds, a ratio the median of the rounds' ratios.
Seconds are those of the wall clock with workers, and of CPU time without.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from score_sde.training.parts.batches import training_batches  # noqa: E402
from score_sde.training.parts.config import DataConfig  # noqa: E402
from score_sde.training.parts.data import ImageDataset  # noqa: E402
from score_sde.training.parts.latent_shards import LatentDataset, shard_path  # noqa: E402
from score_sde.training.parts.sources import open_split  # noqa: E402


BATCH_SIZE = 64
LATENTS = 4096


def peer_images(config):
    data, _ = open_split(config.dataset, config.split)
    mode = "L" if config.image_channels == 1 else "RGB"

    def transform(rows):
        images = []
        for image in rows["image"]:
            image, size = image.convert(mode), config.resolution
            scale = size / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
            left, top = [(side - size) // 2 for side in image.size]
            pixels = np.array(image.crop((left, top, left + size, top + size)))
            pixels = torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1).contiguous()
            images.append(pixels.float().div(255).sub(0.5).div(0.5))
        return {"images": images, "labels": rows["label"]}

    data.set_transform(transform)
    return data


class FilePerRow(torch.utils.data.Dataset):
    """Latents as one .npy file per row."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return LATENTS

    def __getitem__(self, row):
        mean, std = np.load(os.path.join(self.folder, f"{row}.npy"))
        return {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std), "labels": row % 10}


def write_latents(folder):
    """The same random moments of 4x32x32 latents in shards and as files; the folders of both."""
    shape, shard_size = (4, 32, 32), 2048
    shards, single = os.path.join(folder, "shards"), os.path.join(folder, "files")
    os.makedirs(shards), os.makedirs(single)
    generator = torch.Generator().manual_seed(0)
    for shard in range(LATENTS // shard_size):
        moments = torch.randn(2, shard_size, *shape, generator=generator)
        labels = torch.arange(shard_size) % 10
        save_file({"mean": moments[0], "std": moments[1], "labels": labels}, shard_path(shards, shard))
        for i in range(shard_size):
            np.save(os.path.join(single, f"{shard * shard_size + i}.npy"), moments[:, i].numpy())
    facts = {"rows": LATENTS, "shape": shape, "shard_size": shard_size, "num_shards": LATENTS // shard_size}
    with open(os.path.join(shards, "latents.json"), "w", encoding="utf-8") as file:
        json.dump(facts | {"num_classes": 10, "id2label": None, "both_flips": False}, file)
    return shards, single


def ours(dataset, num_workers):
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    config = SimpleNamespace(batch_size=BATCH_SIZE, num_workers=num_workers, seed=0)
    return training_batches(dataset, config, accelerator, {"images_seen": 0})


def peer(dataset, num_workers):
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH_SIZE, shuffle=True, drop_last=True, num_workers=num_workers
    )
    while True:
        yield from loader


def images_per_second(batches, seconds, clock):
    """Of a loader that has given its first batches: the rate over so many seconds of a clock."""
    for _ in range(3):
        next(batches)
    started, count = clock(), 0
    while clock() - started < seconds:
        count += len(next(batches)["labels"])
    return count / (clock() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", help="a parquet file of photographs with the columns image and label")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--output", help="a JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory() as folder:
        pairs = {}
        configs = {"Fashion-MNIST, 32 px": DataConfig(image_channels=1, resolution=32)}
        if args.photographs:
            configs["photographs, 256 px"] = DataConfig(dataset=args.photographs, resolution=256)
        for name, config in configs.items():
            pairs[name] = {"ours": ImageDataset(config), "peer": peer_images(config)}
        shards, single = write_latents(folder)
        pairs["latents, 4x32x32"] = {"ours": LatentDataset(shards), "peer": FilePerRow(single)}

        loaders, found = {"ours": ours, "peer": peer}, {}
        for i in range(args.rounds):
            for name, pair in pairs.items():
                for num_workers in (0, 2):
                    clock = time.perf_counter if num_workers else time.process_time
                    for who in (("ours", "peer"), ("peer", "ours"))[i % 2]:  # who comes first has colder memory
                        rate = images_per_second(loaders[who](pair[who], num_workers), args.seconds, clock)
                        found.setdefault((name, num_workers, who), []).append(rate)
    rows = []
    for (name, num_workers, who), rates in found.items():
        if who == "ours":
            other = found[name, num_workers, "peer"]
            speeds = {"ours": round(statistics.median(rates)), "peer": round(statistics.median(other))}
            ratio = statistics.median(own / their for own, their in zip(rates, other, strict=True))
            rows.append({"data": name, "num_workers": num_workers, **speeds, "ratio": round(ratio, 2)})
    for row in rows:
        print(row)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"command": " ".join(sys.argv), "cores": os.cpu_count(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
