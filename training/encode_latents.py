"""Encode a dataset into moments of latents, in shards, once before training.

    accelerate launch training/encode_latents.py --vae runs/vae --dataset fashion_mnist_10k --output_dir runs/latents

Writes moments-00000.safetensors, ... with tensors mean and std (rows, channels, height, width), in the autoencoder's
own units, and labels (rows,); and latents.json, which says what they are. Several processes share the shards. When it
was stopped, run the same command again: whole shards stay. `LatentDataset` in data.py reads the folder.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from config import DataConfig, option, parse
from data import ImageDataset, on_hub
from diffusers import AutoModel
from safetensors.torch import save_file
from tqdm.auto import tqdm

from score_sde.pipelines.latents import encode_moments


@dataclass
class EncodeConfig(DataConfig):
    """Encode a dataset into moments of latents, in shards, once before training."""

    vae: str = option("", "Autoencoder in diffusers format: a folder or Hub id.")
    output_dir: str = option("runs/latents", "Folder for the shards.")
    shard_size: int = option(2048, "Rows per shard.")
    batch_size: int = option(64, "Images encoded at once.")

    def problems(self):
        yield from super().problems()
        if not self.vae:
            yield "vae is missing: the folder or Hub id of an autoencoder"
        if self.shard_size < 1 or self.batch_size < 1:
            yield f"shard_size {self.shard_size} and batch_size {self.batch_size} must be at least 1"


def load_vae(path):
    """An autoencoder of diffusers from a folder or Hub id, for inference, in float32."""
    vae = AutoModel.from_pretrained(path, dtype=torch.float32)
    return vae.eval().requires_grad_(False)


def fingerprint(vae):
    """A hash of the autoencoder's weights, to tell one from another under the same path."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(argv=None):
    config = parse(EncodeConfig, sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with accelerator.main_process_first():
        dataset = ImageDataset(config)
    vae = load_vae(config.vae)
    vae_fingerprint = fingerprint(vae)
    vae.to(accelerator.device)
    mean, _ = encode_moments(vae, dataset[0]["images"][None].to(accelerator.device))
    num_shards = -(-len(dataset) // config.shard_size)
    facts = {
        "dataset": config.dataset,
        "split": config.split,
        "resolution": config.resolution,
        "rows": len(dataset),
        "num_classes": dataset.num_classes,
        "id2label": {str(label): name for label, name in dataset.id2label.items()} if dataset.id2label else None,
        "vae": os.path.abspath(config.vae) if os.path.isdir(config.vae) else config.vae,
        "vae_fingerprint": vae_fingerprint,
        "shape": list(mean.shape[1:]),
        "shard_size": config.shard_size,
        "num_shards": num_shards,
    }
    index = os.path.join(config.output_dir, "latents.json")
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            before = json.load(file)
        changed = [
            f"{key} was {before.get(key)!r}, is {facts[key]!r}" for key in facts if before.get(key) != facts[key]
        ]
        if changed:
            raise ValueError(
                f"{config.output_dir!r} holds other latents ({'; '.join(changed)}): choose another output_dir"
            )
    facts["dataset_on_hub"] = on_hub(config.dataset)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.makedirs(config.output_dir, exist_ok=True)
        with open(index + ".partial", "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=2)
        os.replace(index + ".partial", index)
    accelerator.wait_for_everyone()

    own = range(accelerator.process_index, num_shards, accelerator.num_processes)
    bar = tqdm(total=len(own), desc="encoding", unit="shard", disable=not accelerator.is_main_process)
    for shard in own:
        path = os.path.join(config.output_dir, f"moments-{shard:05d}.safetensors")
        if not os.path.isfile(path):
            rows = range(shard * config.shard_size, min((shard + 1) * config.shard_size, len(dataset)))
            encode_shard(vae, dataset, rows, path, config, accelerator.device)
        bar.update()
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{len(dataset)} latents of shape {tuple(facts['shape'])}: {config.output_dir}")


@torch.no_grad()
def encode_shard(vae, dataset, rows, path, config, device):
    subset = torch.utils.data.Subset(dataset, rows)
    loader = torch.utils.data.DataLoader(subset, batch_size=config.batch_size, num_workers=config.num_workers)
    parts = {"mean": [], "std": [], "labels": []}
    for batch in loader:
        mean, std = encode_moments(vae, batch["images"].to(device))
        parts["mean"].append(mean.float().cpu())
        parts["std"].append(std.float().cpu())
        if "labels" in batch:
            parts["labels"].append(batch["labels"])
    save_file({name: torch.cat(values).contiguous() for name, values in parts.items() if values}, path + ".partial")
    os.replace(path + ".partial", path)


if __name__ == "__main__":
    main()
