"""A reference run of video: two pieces of clothing of one kind that bounce about in a box, 16 frames of 32 x 32 pixels.

    python benchmarks/moving_fashion.py --data DATA --work WORK
    python benchmarks/moving_fashion.py --data DATA --work WORK --parts train --seconds 1500

DATA holds fashion_mnist_train.parquet and fashion_mnist_test.parquet; WORK gets the videos, the classifier and the
training run. Every part goes on where it was stopped; what a part has found stands in OUTPUT.json and isn't measured
again.

- data: the videos, made from a seed: each of two items of one class, 14 x 14 pixels, that begin anywhere and move on
  straight lines, 1 to 2.5 pixels a frame, until they meet an edge, which throws them back. Where they meet, the
  brighter pixel is seen. 8,000 of the training items, 2,000 of the test items.
- train: `score-sde train` by training/configs/moving_fashion, for as many seconds as are given.
- classifier: a small network that tells the class of a real video, whose features a Fréchet distance is measured in.
- measure: samples, of every class as many, beside real videos: Fréchet distance, the share that the classifier takes
  for what was asked for, and how frames differ from the next and from the last; the same of real training videos.
- report: the card's figures, PNG and GIF.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from torch import nn

from score_sde import load_bundle, save_bundle
from score_sde.pipelines.writing import write_json
from score_sde.sharing.bundles import add_metrics
from score_sde.sharing.facts import read_facts
from score_sde.training import train
from score_sde.training.parts.metrics import frechet_distance, moments
from score_sde.training.parts.provenance import provenance


FRAMES, SIDE, ITEM = 16, 32, 14
COUNTS = {"train": 8000, "test": 2000}
FRAME_RATE = 8


def read_items(data, split):
    """(items (N, ITEM, ITEM) float32, labels (N,), names) of Fashion-MNIST, half as large."""
    path = str(Path(data, f"fashion_mnist_{split}.parquet"))
    rows = load_dataset("parquet", data_files={split: path}, split=split).select(range(10000))
    images = np.stack([np.asarray(image) for image in rows["image"]]).astype(np.float32)
    items = images.reshape(-1, ITEM, 2, ITEM, 2).mean(axis=(2, 4))
    return items, np.asarray(rows["label"]), rows.features["label"].names


def bounced(places, room):
    """Places on a line, thrown back at 0 and at `room`."""
    places = np.mod(places, 2 * room)
    return np.where(places > room, 2 * room - places, places)


def make_videos(items, labels, count, seed):
    """(videos (count, FRAMES, SIDE, SIDE) uint8, labels (count,)), the classes in turn."""
    rng, videos = np.random.default_rng(seed), np.zeros((count, FRAMES, SIDE, SIDE), np.float32)
    of_class = [np.flatnonzero(labels == label) for label in range(10)]
    asked, times, room = np.arange(count) % 10, np.arange(FRAMES), SIDE - ITEM
    for video, label in zip(videos, asked, strict=True):
        for item in items[rng.choice(of_class[label], 2, replace=False)]:
            angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(1, 2.5)
            begin, velocity = rng.uniform(0, room, 2), speed * np.array([np.sin(angle), np.cos(angle)])
            places = bounced(begin + times[:, None] * velocity, room).round().astype(int)
            for frame, (y, x) in zip(video, places, strict=True):
                seen = frame[y : y + ITEM, x : x + ITEM]
                np.maximum(seen, item, out=seen)
    return videos.round().astype(np.uint8), asked


def make_data(options):
    for seed, (split, count) in enumerate(COUNTS.items()):
        path = options.work / f"moving_fashion_{split}.npz"
        if not path.exists():
            items, labels, names = read_items(options.data, split)
            videos, asked = make_videos(items, labels, count, seed)
            np.savez(path, video=videos, label=asked)
            (options.work / "names.json").write_text(json.dumps(names))
            print(f"{path}: {videos.shape}, mean {videos.mean():.1f}")


# --- training -----------------------------------------------------------------------------------------------------


def train_diffusion(options):
    run = options.work / "run"
    if (run / "pipeline").exists():
        return
    arguments = ["moving_fashion/diffusion", "--dataset", f"{options.work}/moving_fashion_{{split}}.npz"]
    arguments += ["--output_dir", str(run), "--max_train_seconds", str(options.seconds)]
    arguments += ["--resume_from_checkpoint", "latest"] if (run / "checkpoints").exists() else []
    train.main(arguments)


class VideoClassifier(nn.Module):
    """(videos (B, 1, FRAMES, SIDE, SIDE) in [-1, 1]) -> (features (B, 96), logits (B, 10))."""

    def __init__(self):
        super().__init__()
        channels = (1, 24, 48, 96)
        self.convolutions = nn.ModuleList(
            nn.Conv3d(before, after, 3, stride=2, padding=1)
            for before, after in zip(channels, channels[1:])  # noqa: B905
        )
        self.head = nn.Linear(channels[-1], 10)

    def forward(self, videos):
        for convolution in self.convolutions:
            videos = F.silu(convolution(videos))
        features = videos.mean(dim=(2, 3, 4))
        return features, self.head(features)


def read_videos(options, split):
    """(videos (N, 1, FRAMES, SIDE, SIDE) uint8, labels (N,))."""
    with np.load(options.work / f"moving_fashion_{split}.npz") as file:
        return torch.from_numpy(file["video"])[:, None], torch.from_numpy(file["label"])


def scaled(videos):
    return videos.float() / 127.5 - 1


def train_classifier(options):
    path = options.work / "classifier.safetensors"
    if path.exists():
        return
    torch.manual_seed(0)
    model, (videos, labels), count = VideoClassifier(), read_videos(options, "train"), 6
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=count * (len(videos) // 50))
    for epoch in range(count):
        right = 0
        for rows in torch.randperm(len(videos)).split(50):
            _, logits = model(scaled(videos[rows]))
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == labels[rows]).sum())
        print(f"classifier, epoch {epoch + 1}: {right / len(videos):.3f}", flush=True)
    save_file(model.state_dict(), path)


# --- what is measured -------------------------------------------------------------------------------------------------


def movement(videos):
    """How frames of videos (B, 1, F, H, W) in [0, 255] differ, mean absolute differences over all: from the next, from
    the last; and how much of the light of the first frame is there in the last."""
    videos = videos.float()
    light = videos.mean(dim=(1, 3, 4))
    return {
        "next frame": float((videos[:, :, 1:] - videos[:, :, :-1]).abs().mean()),
        "last frame": float((videos[:, :, -1] - videos[:, :, 0]).abs().mean()),
        "light": float((light[:, -1] / light[:, 0].clamp_min(1)).median()),
    }


@torch.no_grad()
def measured(model, videos, labels):
    """(features, {"accuracy", ...}) of videos uint8."""
    found = [model(scaled(part)) for part in videos.split(100)]
    features, logits = (torch.cat(each) for each in zip(*found, strict=True))
    return features, {"accuracy": float((logits.argmax(1) == labels).float().mean())} | movement(videos)


def drawn(pipeline, labels, options, **arguments):
    """Videos of these classes as bytes, a seed for each."""
    found = []
    for numbers in torch.arange(len(labels)).split(50):
        generators = [torch.Generator().manual_seed(int(number)) for number in numbers]
        output = pipeline(
            class_labels=labels[numbers], generator=generators, output_type="pt", num_inference_steps=options.steps,
            **arguments,
        )  # fmt: skip
        found.append((output.images.transpose(1, 2) * 255).round().to(torch.uint8))
    return torch.cat(found), output.nfe


def measure(options):
    path = options.output.with_suffix(".json")
    results = json.loads(path.read_text()) if path.exists() else {}
    model = VideoClassifier()
    model.load_state_dict(load_file(options.work / "classifier.safetensors"))
    videos, labels = read_videos(options, "train")
    real = moments(measured(model, videos, labels)[0])

    def add(name, videos, labels, **facts):
        features, found = measured(model, videos, labels)
        found["frechet distance"] = frechet_distance(*moments(features), *real)
        results[name] = {key: round(value, 4) for key, value in found.items()} | {"n": len(videos)} | facts
        write_json(path, results | {"provenance": provenance(torch.device("cpu"))})
        print(name, results[name], flush=True)

    test, asked = read_videos(options, "test")
    if "real test videos" not in results:
        add("real test videos", test, asked)
        add("real test videos, as many as samples", test[: options.count], asked[: options.count])
        # what a model that ignores time would do
        mixed = torch.Generator().manual_seed(0)
        order = torch.argsort(torch.rand(len(test), FRAMES, generator=mixed), dim=1)
        shuffled = torch.stack([video[:, frames] for video, frames in zip(test, order, strict=True)])
        add("real test videos, frames in any order", shuffled, asked)
    wanted, pipeline = torch.arange(options.count) % 10, load_bundle(options.work / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    for scale in (1.0, 1.5):
        name = f"samples, guidance {scale:g}"
        if name not in results:
            samples, nfe = drawn(pipeline, wanted, options, guidance_scale=scale)
            np.save(options.work / f"samples_{scale:g}.npy", samples.numpy())
            add(name, samples, wanted, num_inference_steps=options.steps, nfe=nfe, guidance_scale=scale, seed=0)


# --- what is shown ----------------------------------------------------------------------------------------------------


def report(options):
    results = json.loads(options.output.with_suffix(".json").read_text())
    names, folder = json.loads((options.work / "names.json").read_text()), options.work / "run" / "pipeline"
    pipeline, facts = load_bundle(folder), read_facts(folder)
    # arrays have no names of classes, but numbers
    if names != list(pipeline.config.id2label.values()):
        pipeline.register_to_config(id2label={str(label): name for label, name in enumerate(names)})
        pictures = options.work / "shown"
        pictures.mkdir(exist_ok=True)
        for picture in folder.glob("samples.*"):
            shutil.copy(picture, pictures)
        save_bundle(pipeline, folder, facts=facts, sample_grid=pictures / "samples.png")
    common = {"dataset": "moving Fashion-MNIST", "split": "train", "sampler": "auto"} | results["provenance"]
    metrics, floor = [], results["real test videos, as many as samples"]
    drawn_ones = [name for name in results if name.startswith("samples")]
    for name in drawn_ones:
        found = results[name]
        asked = {key: found[key] for key in ("n", "seed", "nfe", "num_inference_steps", "guidance_scale")}
        features = "a small video classifier trained on the real ones"
        explanation = f"in 96 features of {features}; of {floor['n']} real test videos {floor['frechet distance']:.2f}"
        metrics.append({"name": "Fréchet distance to the training videos", "value": round(found["frechet distance"], 2),
                        "type": "frechet_distance", "features": features, "explanation": explanation}
                       | asked | common)  # fmt: skip
        explanation = (
            f"share that the same classifier takes for the class asked for; of real test videos {floor['accuracy']:.1%}"
        )
        metrics.append({"name": "accuracy of the classes", "value": round(found["accuracy"], 3), "type": "accuracy",
                        "explanation": explanation} | asked | common)  # fmt: skip
    add_metrics(folder, metrics)

    # a column for each class: a real test video above a sample
    samples = torch.from_numpy(np.load(options.work / f"samples_{results[drawn_ones[-1]]['guidance_scale']:g}.npy"))
    shown = torch.cat([read_videos(options, "test")[0][:10], samples[:10]])
    pipeline.kind.save_grid(pipeline.kind.output(scaled(shown)), options.output.with_suffix(".png"), 10)
    rows = [
        ("| | n | Fréchet distance | accuracy | next frame | last frame | light kept |"),
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        if name != "provenance":
            values = [f"{found[key]:.2f}" for key in ("next frame", "last frame", "light")]
            rows.append(f"| {name} | {found['n']} | {found['frechet distance']:.2f} | {found['accuracy']:.1%} | "
                        + " | ".join(values) + " |")  # fmt: skip
    print("\n".join(rows))


PARTS = {
    "data": make_data,
    "train": train_diffusion,
    "classifier": train_classifier,
    "measure": measure,
    "report": report,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=int, default=1500, help="of the training")
    parser.add_argument("--count", type=int, default=500, help="samples to be measured")
    parser.add_argument("--steps", type=int, default=20, help="time steps of a sample")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
