"""Encode a dataset into moments of latents, in shards, once before training.

    score-sde encode-latents --vae runs/vae --dataset fashion_mnist_10k --output_dir runs/latents

Writes moments-00000.safetensors, ... with tensors mean and std (rows, channels, height, width), in the autoencoder's
own units, and labels (rows,), with --both_flips also mean_flipped and std_flipped, of the mirror images; with captions
caption_embeds (rows, captions, tokens, width), caption_mask (rows, captions, tokens) and caption_count (rows,); with
condition images condition_mean, and condition_mean_flipped, as of the images; with --align_to features, and
features_flipped, (rows, channels, height, width) in bfloat16; and latents.json, which says what they are and, in the
end, has their statistics per channel: the mean, and the standard deviations of the posteriors' means (std_of_means) and
of samples from the posteriors (std). Several processes share the shards. When it was stopped, run the same command
again: whole shards stay. `LatentDataset` in data.py reads the folder.

With --aspect_ratio_buckets the rows are put in order by size, and every shard is of one: latents.json lists them as
buckets, with height, width, shape and rows of each.
"""

import json
import os
import sys
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from score_sde.pipelines.latents import encode_moments
from score_sde.pipelines.writing import whole_file, write_json
from score_sde.training.parts.alignment import AlignToConfig, VisionModel
from score_sde.training.parts.buckets import BucketConfig
from score_sde.training.parts.captions import CaptionConfig, CaptionEncoder
from score_sde.training.parts.config import DataConfig, PrecisionConfig, option
from score_sde.training.parts.cores import loading_processes, warn_of_busy_cores
from score_sde.training.parts.data import ImageDataset
from score_sde.training.parts.image_conditions import ImageConditionConfig
from score_sde.training.parts.latent_shards import (
    check_shard,
    open_shard,
    read_latents_json,
    shard_layout,
    shard_path,
    shard_record,
)
from score_sde.training.parts.latents import fingerprint, latent_shape, latent_statistics, load_vae
from score_sde.training.parts.options import WORK_BEGUN, one_line_errors, parse
from score_sde.training.parts.precision import choose_kernels, frozen
from score_sde.training.parts.signal_data import AudioDataConfig, VideoDataConfig
from score_sde.training.parts.signal_rows import SoundRows, VideoRows
from score_sde.training.parts.sources import IMAGES, on_hub
from score_sde.training.parts.workers import DataLoader


@dataclass
class EncodeOptions(PrecisionConfig):
    """What all kinds of data have."""

    configs = "latents"
    precisions = ("no", "bf16")

    vae: str = option("", "Autoencoder in diffusers format: a folder or Hub id.", "data", common=True)
    output_dir: str = option("runs/latents", "Folder for the shards.", "run", common=True)
    shard_size: int = option(2048, "Rows per shard.", "data")
    batch_size: int = option(64, "Rows encoded at once.", "optimisation", common=True)
    mixed_precision: str | None = option(
        None,
        "no, or bf16 for the autoencoder and what else encodes, faster where a device has it: latents differ by 0.5 to "
        "1 % of their standard deviation (with TAESD 0.03 to 0.05 dB). Unless given that of `accelerate launch`.",
        "speed and memory",
    )

    allow_tf32: bool = option(
        False, "Let matrix products and convolutions of float32 round to TF32, on a GPU.", "speed and memory"
    )

    def encode_problems(self):
        yield from self.precision_problems()
        if not self.vae:
            yield "vae is missing: the folder or Hub id of an autoencoder"
        if self.shard_size < 1 or self.batch_size < 1:
            yield f"shard_size {self.shard_size} and batch_size {self.batch_size} must be at least 1"


class NumberedSignals:
    """Rows with their numbers, {"row": ...}, as `NumberedRows`."""

    # all are of one size, and none is skipped
    buckets = None

    @property
    def sizes(self):
        return [self.shape[1:]]

    def item(self, row, number, epoch):
        return super().item(row, number, epoch) | {"row": number}

    def source_of(self, rows):
        return self.fingerprint()["rows"]

    def is_readable(self, row):
        return False


class NumberedSounds(NumberedSignals, SoundRows):
    pass


class NumberedVideos(NumberedSignals, VideoRows):
    pass


@dataclass
class SignalEncodeConfig(EncodeOptions):
    # what only images have
    sizes = first_size = align_to = None
    reads_captions = both_flips = False

    def problems(self):
        yield from self.data_problems()
        yield from self.encode_problems()
        if self.crop != "start":
            yield "crop random: a row is encoded once, pass start"

    def open_numbered(self, reader):
        return self.rows(self)

    def make_condition(self, *_):
        return None

    def facts(self, dataset):
        facts = {"dataset": self.dataset, "split": self.split, "data_kind": self.data_kind}
        return facts | {"units": dataset.units, "data_shape": list(dataset.shape)}


@dataclass
class AudioEncodeConfig(SignalEncodeConfig, AudioDataConfig):
    """Encode sound into moments of latents, in shards, once before training."""

    rows = NumberedSounds
    data_kind: str = option("audio", "audio, or another kind, which has other options.", "data", common=True)


@dataclass
class VideoEncodeConfig(SignalEncodeConfig, VideoDataConfig):
    """Encode videos into moments of latents, in shards, once before training."""

    rows = NumberedVideos
    data_kind: str = option("video", "video, or another kind, which has other options.", "data", common=True)


@dataclass
class EncodeConfig(EncodeOptions, DataConfig, CaptionConfig, ImageConditionConfig, AlignToConfig, BucketConfig):
    """Encode a dataset into moments of latents, in shards, once before training."""

    other_kinds = {"audio": AudioEncodeConfig, "video": VideoEncodeConfig}
    files = IMAGES

    data_kind: str = option("image", "image, audio or video, which have other options.", "data", common=True)
    both_flips: bool = option(
        False, "Encode the mirror images, too: training on the latents may then --random_flip.", "data"
    )

    @staticmethod
    def stated_kind(stated):
        """The kind of data that a command line is for; `stated`(option) is what it says for an option, or None."""
        return stated("data_kind") or EncodeConfig.data_kind

    def problems(self):
        yield from DataConfig.problems(self)
        yield from self.caption_problems()
        yield from self.encode_problems()
        yield from self.condition_problems()
        yield from self.bucket_problems()
        if self.reads_captions != (self.text_encoder is not None):
            yield "caption_column and text_encoder belong together: pass both or neither"
        elif not self.reads_captions and (self.max_caption_tokens or self.caption_layers):
            yield "max_caption_tokens and caption_layers need captions: pass caption_column and text_encoder"

    def open_numbered(self, reader):
        pairs = self.paired_column(self.image_channels)
        return NumberedRows(self, captions=reader, condition=pairs, sizes=self.sizes, first_size=self.first_size)

    def facts(self, dataset):
        return {
            "dataset": self.dataset,
            "split": self.split,
            "resolution": None if self.sizes else self.resolution,
            "background": self.background,
        }


class NumberedRows(ImageDataset):
    """Images with the number of the row that each is really of, {"row": ...}: the next one for what is skipped."""

    def __getitems__(self, keys):
        return [item | {"row": row} for item, row in self.items_and_rows(keys)]


def main(argv=None):
    config = parse(EncodeConfig, sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    warn_of_busy_cores(accelerator)
    choose_kernels(config, accelerator)
    captions = reader = None
    if config.reads_captions:
        captions = CaptionEncoder(config.text_encoder, config.given_settings())
        reader = captions.reader(config.caption_column, seed=None)
    with accelerator.main_process_first():
        dataset = config.open_numbered(reader)
    accelerator.print(dataset.describe())
    vae = load_vae(config.vae)
    vae_fingerprint = fingerprint(vae)
    vae.to(accelerator.device)
    shapes = [list(latent_shape(vae, (dataset.shape[0], *size))) for size in dataset.sizes]
    condition = config.make_condition(dataset.shape[0], dataset.sizes, vae, shapes[0][0])
    facts = config.facts(dataset) | {
        "rows": len(dataset),
        "num_classes": dataset.num_classes,
        "id2label": {str(label): name for label, name in dataset.id2label.items()} if dataset.id2label else None,
        "vae": os.path.abspath(config.vae) if os.path.isdir(config.vae) else config.vae,
        "vae_fingerprint": vae_fingerprint,
        "both_flips": config.both_flips,
        "mixed_precision": config.mixed_precision,
        "shape": shapes[0],
        "shard_size": config.shard_size,
    }
    if config.sizes:
        counts = [len(dataset)] if dataset.buckets is None else map(len, dataset.buckets)
        facts["buckets"] = [
            {"height": height, "width": width, "shape": shape, "rows": count}
            for (height, width), shape, count in zip(dataset.sizes, shapes, counts, strict=True)
        ]
    order = (
        range(len(dataset)) if dataset.buckets is None else [row for rows in dataset.buckets for row in rows.tolist()]
    )
    rows_of_shards = [order[first : first + count] for first, count, _ in shard_layout(facts)]
    num_shards = facts["num_shards"] = len(rows_of_shards)
    if captions is not None:
        captions.text_encoder.to(accelerator.device)
        words = captions.facts() | reader.facts | {"column": config.caption_column, "hash": reader.hash}
        facts["captions"] = words | {"width": captions.width, "examples": reader.examples}
    if condition is not None:
        facts["condition"] = condition.facts()
    vision = VisionModel(config.align_to).to(accelerator.device) if config.align_to else None
    if vision is not None:
        facts["features"] = vision.facts()
    index = os.path.join(config.output_dir, "latents.json")
    before = read_latents_json(config.output_dir) if os.path.isfile(index) else None
    changed = [
        f"{key} was {before[key]!r}, is {facts[key]!r}"
        for key in facts
        if before and before.get(key, facts[key]) != facts[key]
    ]
    optional = {"captions": "captions", "condition": "condition images", "buckets": "aspect_ratio_buckets"}
    optional |= {"features": "features to align to"}
    for name, what in optional.items():
        if before and (name in before) != (name in facts):
            changed.append(f"{what} were {'there' if name in before else 'not there'}")
    if changed:
        raise ValueError(f"{config.output_dir!r} holds other latents ({'; '.join(changed)}): choose another output_dir")
    facts["dataset_on_hub"] = on_hub(config.dataset, config.files)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and before is None:
        os.makedirs(config.output_dir, exist_ok=True)
        write_json(index, facts)
    accelerator.wait_for_everyone()

    own = range(accelerator.process_index, num_shards, accelerator.num_processes)
    recorded = facts | (before or {})
    missing = [
        shard for shard in own if not is_done(config.output_dir, shard, recorded, dataset, rows_of_shards[shard])
    ]
    batches = {shard: in_batches(rows_of_shards[shard], config.batch_size) for shard in missing}
    workers = loading_processes(config, accelerator, dataset)
    in_turn = [rows for shard in missing for rows in batches[shard]]
    loader = iter(DataLoader(dataset, workers, accelerator, batch_sampler=in_turn))
    WORK_BEGUN.set()
    for shard in tqdm(missing, desc="encoding", unit="shard", disable=not accelerator.is_main_process):
        rows = rows_of_shards[shard]
        path = shard_path(config.output_dir, shard)
        source = dataset.source_of(rows)
        encode_shard(vae, islice(loader, len(batches[shard])), rows, path, config, source, captions, condition, vision)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        paths = [shard_path(config.output_dir, shard) for shard in range(num_shards)]
        facts |= {name: value for name, value in dataset.row_facts().items() if name not in ("rows", "sizes")}
        facts["skipped_rows"] = [row for path in paths for row in shard_origin(path)["skipped_rows"]]
        facts["shards"] = [shard_record(path) for path in paths]
        facts["statistics"] = latent_statistics(
            (tensors[f"mean{kind}"], tensors[f"std{kind}"])
            for tensors in (open_shard(config.output_dir, shard) for shard in range(num_shards))
            for kind in ("", "_flipped")[: 1 + config.both_flips]
        )
        write_json(index, facts)
        words = ", ".join(dict.fromkeys(str(tuple(shape)) for shape in shapes))
        print(f"{len(dataset)} latents of shape {words}: {config.output_dir}")


def shard_origin(path):
    """What a shard was made from: {"source": what `ImageDataset.source_of` gave, "skipped_rows": rows in whose place
    the next one was encoded}. A shard from before this was recorded has {}."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("origin", "{}"))


def is_done(folder, shard, facts, dataset, rows):
    """Whether a shard of these rows needs no work: it is whole, its images are what they were, and what was skipped
    still must be."""
    try:
        check_shard(folder, shard, facts)
    except ValueError:
        return False
    origin = shard_origin(shard_path(folder, shard))
    if origin.get("source") != dataset.source_of(rows):
        return False
    return not any(dataset.is_readable(row) for row in origin["skipped_rows"])


def in_batches(rows, batch_size):
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@torch.no_grad()
def encode_shard(vae, batches, rows, path, config, source, captions=None, condition=None, vision=None):
    """Write the moments of some batches of images, which are to be of these rows, their captions and condition images,
    encoded, and their features."""
    parts, taken = {}, []
    for batch in batches:
        taken += batch["row"].tolist()
        images = batch["images"].to(vae.device, non_blocking=True)
        found = {"labels": batch["labels"]} if "labels" in batch else {}
        shown = None if condition is None else condition.pixels(batch).to(vae.device)
        with frozen(vae.device, config.mixed_precision):
            found["mean"], found["std"] = encode_moments(vae, images)
            if config.both_flips:
                found["mean_flipped"], found["std_flipped"] = encode_moments(vae, images.flip(-1))
            found |= {name: values.float() for name, values in found.items() if name != "labels"}
            if condition is not None:
                found["condition_mean"] = condition.encoded(shown)
                if config.both_flips:
                    found["condition_mean_flipped"] = condition.encoded(shown.flip(-1))
            if vision is not None:
                found["features"] = vision.features(images).bfloat16()
                if config.both_flips:
                    found["features_flipped"] = vision.features(images.flip(-1)).bfloat16()
            if captions is not None:
                found |= captions.encoded(*(batch[name].to(vae.device) for name in ("caption_ids", "caption_mask")))
                found["caption_count"] = batch["caption_count"]
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
    skipped = [row for row, other in zip(rows, taken, strict=True) if row != other]
    # one entry: the order of several is not always the same
    origin = {"origin": json.dumps({"source": source, "skipped_rows": skipped})}
    with whole_file(path) as temporary:
        save_file({name: torch.cat(values).contiguous() for name, values in parts.items()}, temporary, origin)


if __name__ == "__main__":
    with one_line_errors():
        main()
