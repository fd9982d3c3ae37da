"""What is committed of the reference runs (reference_runs.py --report): model_cards/NAME_one_gpu, reference_runs.json,
and reference_runs.md with the pictures beside it."""

import json
import shutil
from pathlib import Path

from score_sde.sharing.model_card import write_card


ROOT = Path(__file__).resolve().parents[1]
CARD = ("README.md", "model_index.json", "training.json", "metrics.json", "samples.png", "*/*config.json")
TITLES = {
    "cifar10": "CIFAR-10 in pixels, by class",
    "clothing128": "Photographs of clothes at 128 px, by class",
    "fashion_mnist": "Fashion-MNIST in pixels, by likelihood",
    "quick_start": "The quick start's networks, longer",
}
COLUMNS = {
    "Fréchet distance": ("Fréchet distance", 2),
    "kid": ("KID", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "accuracy": ("recognised", 3),
}
PICTURES = {
    "samples": "Samples with guidance, a class in each column",
    "nearest": "Samples, left, and the training images nearest to them",
    "curves": "Curves of the training",
}


def report(folder):
    """Write what is committed of the runs in a folder: cards, pictures, figures and a page of them."""
    benchmarks, results = ROOT / "benchmarks", json.loads((folder / "reference_runs.json").read_text())
    page = ["# Reference runs of one GPU\n", f"```bash\n{results['command']}\n```\n"]
    machine = " and ".join({f"{each['device']}, torch {each['torch']}" for each in results["runs"].values()})
    page += [f"Machine: {machine}. All of it in {results['seconds']:.0f} s. {results.get('beside', '')}\n"]
    for name, facts in results["runs"].items():
        pipeline = folder / name / "run/pipeline"
        if not (pipeline / "training.json").is_file():
            continue
        training = json.loads((pipeline / "training.json").read_text())
        page += [f"## {TITLES[name]}\n", training_line(training, facts), *figures(facts)]
        if name != "quick_start":
            card = ROOT / "model_cards" / f"{name}_one_gpu"
            for path in (path for pattern in CARD for path in sorted(pipeline.glob(pattern))):
                target = card / path.relative_to(pipeline)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            write_card(str(card))
            page += [f"[Card](../model_cards/{card.name}/README.md).\n"]
        for picture, words in (
            ("samples_1.5", "samples"),
            ("samples_2", "samples"),
            ("nearest", "nearest"),
            ("curves", "curves"),
        ):
            path = folder / name / f"{picture}.png"
            if path.is_file() and not (picture == "samples_2" and name == "cifar10"):
                shutil.copyfile(path, benchmarks / f"reference_runs_{name}_{words}.png")
                page += [f"![{PICTURES[words]}](reference_runs_{name}_{words}.png)\n"]
    (benchmarks / "reference_runs.md").write_text("\n".join(page), encoding="utf-8")
    for facts in results["runs"].values():
        facts.pop("speed", None)
        shared = ("dataset", "dataset_on_hub", "command", "commit", "machine", "resolution", "image_channels", "seed")
        facts["metrics"] = [
            {key: value for key, value in metric.items() if key not in shared} for metric in facts.get("metrics", [])
        ]
    (benchmarks / "reference_runs.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def training_line(training, facts):
    seen, rows, seconds = training["images_seen"], training.get("rows"), training["train_seconds"]
    passes = f" ({seen / rows:.1f} passes over {rows:,})" if rows else ""
    speed = facts.get("speed", {}).get("medians", {})
    pace = f", {speed['images_per_second']:,.0f} images/s" if speed else ""
    return (
        f"{training['parameters'] / 1e6:.1f} million parameters; {training['steps']:,} steps, {seen:,} images{passes} "
        f"in {seconds:.0f} s{pace}{'' if facts.get('compiled') else ', not compiled'}.\n"
    )


def figures(facts):
    """The lines of a run's figures: a table by guidance, and what isn't of samples."""
    lines, rows = [], {}
    for metric in facts.get("metrics", []):
        if metric["type"] == "accuracy" and "guidance_scale" not in metric:
            real = f"{metric['name']}: {metric['value']:.3f} of {metric['n']:,}."
        elif "guidance_scale" in metric:
            rows.setdefault(metric["guidance_scale"], {"n": metric["n"], "nfe": metric["nfe"]})[metric["type"]] = metric
        else:
            lines += [f"{metric['name']}: {metric['value']} ({metric['n']} images; {metric['explanation']})\n"]
    if rows:
        lines += ["| guidance | samples | evaluations | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
        lines += ["|---" * (3 + len(COLUMNS)) + "|"]
        for scale, row in rows.items():
            cells = [f"{row[key]['value']:.{digits}f}" if key in row else "" for key, (_, digits) in COLUMNS.items()]
            lines += [f"| {scale:g} | {row['n']:,} | {row['nfe']} | " + " | ".join(cells) + " |"]
        lines += [f"\n{next(iter(row['Fréchet distance'] for row in rows.values()))['features']}. {real}\n"]
    for key, words in (("training_psnr_db", "training"), ("test_psnr_db", "test")):
        if key in facts:
            lines += [f"Autoencoder: {facts[key]:.1f} dB PSNR on {words} images.\n"]
    if "nearest" in facts:
        medians = facts["nearest"]["median_distance_to_nearest"]
        lines += [
            f"Median distance in these features to the nearest training image: {medians['of_samples']:.3f} of samples "
            f"(guidance as in the picture), {medians['among_real']:.3f} of training images from one another.\n"
        ]
    return lines
