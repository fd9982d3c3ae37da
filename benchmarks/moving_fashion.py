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
from pathlib import Path

import numpy as np
from datasets import load_dataset


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


PARTS = {"data": make_data}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=int, default=1500, help="of the training")
    parser.add_argument("--count", type=int, default=500, help="samples to be measured")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
