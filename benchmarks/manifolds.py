"""Reference runs on points: angles of proteins on tori, events on the globe, and flat models that ignore the domain.

    python benchmarks/manifolds.py --data shared/data --runs runs/manifolds
    python benchmarks/manifolds.py --report                   # the tables of manifolds.json
    python benchmarks/manifolds.py --cards --runs runs/manifolds   # model_cards/ from the runs, without weights

A run that was stopped goes on; one that is whole in manifolds.json is not done again. Figures are exact negative
log-likelihoods of test points in nats: of angles in radians, of points of the sphere by its area.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator

from score_sde import load_bundle
from score_sde.training import train
from score_sde.training.parts.point_data import PointDataset, Table
from score_sde.training.parts.point_likelihood import point_nats
from score_sde.training.parts.provenance import provenance


HERE = Path(__file__).resolve().parent
RESULTS = HERE / "manifolds.json"
# test points of a class that are measured, from the first; of more angles the exact trace costs more
MOST, MOST_OF_SIX = 1000, 300
FLAT = ["--domain", "flat", "--units", "none"]
# name: (config, files, options)
RUNS = {
    "torsions": ("torsions/diffusion", "backbone_torsions", []),
    "torsions_flat": ("torsions/diffusion", "backbone_torsions", FLAT),
    "earth_events": ("earth_events/diffusion", "earth_events", []),
    "earth_events_flat": ("earth_events/diffusion", "earth_events", FLAT),
    "sidechains": ("sidechains/diffusion", "sidechain_torsions", []),
}
# of shared/data/README.md, test: von Mises (-Fisher) kernel densities, and the Riemannian score-based model of De
# Bortoli et al. 2022
KERNELS = {
    "torsions": {"general": 1.260, "glycine": 2.074, "proline": 0.648, "pre-proline": 1.484},
    "earth_events": {"earthquake": -0.274, "fire": -1.580, "volcano": -4.453},
    "earth_events, new places": {"earthquake": -0.073, "fire": -1.578, "volcano": 6.76},
}
PUBLISHED = {"earthquake": -0.19, "fire": -1.33, "volcano": -4.92}
UNIFORM = {"torsions": 2 * math.log(2 * math.pi), "earth_events": math.log(4 * math.pi)}


def read(path):
    return json.loads(path.read_text()) if path.is_file() else {}


def keep(name, found):
    results = read(RESULTS) | {name: found}
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


def train_run(name, data, runs):
    """Train, or go on; the pipeline folder."""
    config, files, options = RUNS[name]
    folder = runs / name
    pipeline = folder / "pipeline"
    if not (pipeline / "model_index.json").is_file():
        resumed = ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoints/step-*")) else []
        again = ["--on_existing_run", "set_aside"] if folder.is_dir() and not resumed else []
        arguments = [config, "--dataset", data / f"{files}_{{split}}.parquet", "--output_dir", folder]
        train.main([str(each) for each in (*arguments, *options, *resumed, *again)])
    return pipeline


def table_of(name, folder, data, split="test"):
    """The rows of a split as the run of a pipeline reads them."""
    trained = read(folder / "training.json")["config"]
    config = {key: trained[key] for key in ("columns", "label_column", "missing")}
    return Table(SimpleNamespace(dataset=str(data / f"{RUNS[name][1]}_{{split}}.parquet"), split=split, **config))


def measure(name, folder, data):
    """{class: {"nats", "standard_error", "n"}} of test points, up to MOST of each class, and where there are such of
    those on new places."""
    pipeline = load_bundle(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    most = MOST_OF_SIX if name == "sidechains" else MOST
    table, names = table_of(name, folder, data), {int(label): each for label, each in pipeline.config.id2label.items()}
    rows = [i for each in names.values() for i in [i for i, own in enumerate(table.labels) if own == each][:most]]
    table.values, table.labels = table.values[rows], [table.labels[row] for row in rows]
    numbers = {each: label for label, each in names.items()}
    classes = SimpleNamespace(id2label=names, labels=lambda values: np.array([numbers[each] for each in values]))
    dataset = PointDataset(table, pipeline.kind.coordinates, classes)
    settings = SimpleNamespace(batch_size=1000, seed=0, tolerance=1e-3, num_workers=0)
    nats, _, nfe = point_nats(pipeline, dataset, len(dataset), settings, Accelerator(cpu=True), "likelihood")
    nats, labels = nats.numpy() + by_the_domain(name, table.values), np.array(table.labels)
    found = {"nfe": nfe} | {each: summary(nats[labels == each]) for each in names.values()}
    if name.startswith("earth_events"):
        seen = set(rows_of(table_of(name, folder, data, "train")))
        new = np.array([each not in seen for each in rows_of(table)])
        found["new places"] = {each: summary(nats[new & (labels == each)]) for each in names.values()}
    return found


def by_the_domain(name, values):
    """What makes nats of a flat model, in the units of its columns, those of the domain that it ignores."""
    turn = math.log(180 / math.pi)
    if name == "torsions_flat":
        return -2 * turn
    if name == "earth_events_flat":
        # an area of latitude and longitude is cos(latitude) as large on the sphere
        return -2 * turn + np.log(np.cos(np.radians(values[:, 0])).clip(1e-6))
    return 0.0


def rows_of(table):
    return [(*values, label) for values, label in zip(table.values.tolist(), table.labels, strict=True)]


def summary(nats):
    return {"nats": round(float(nats.mean()), 4), "standard_error": round(float(nats.std() / len(nats) ** 0.5), 4)} | {
        "n": len(nats)
    }


def pictures(name, folder, data):
    """A picture of test data and samples by class, and how many samples lie where the domain has no points."""
    pipeline = load_bundle(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    names = list(pipeline.config.id2label.values())
    count = 1000
    values, labels = [], [each for each in names for _ in range(count)]
    for i, each in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        output = pipeline(batch_size=count, class_labels=[each] * count, num_inference_steps=50, generator=generator)
        values.append(output.images)
    values, table = np.concatenate(values), table_of(name, folder, data)
    shown = HERE / f"manifolds_{name}.png"
    pipeline.kind.save_grid(values, shown, captions=labels, data=table.values, data_captions=table.labels)
    columns = table.values.shape[1]
    limits = [180.0, 180.0] if name.startswith("torsions") else [90.0, 180.0]
    outside = (np.abs(values[:, :2]) > np.array(limits) + 1e-3).any(1).mean() if columns == 2 else 0.0
    return {"outside": round(float(outside), 4), "network_evaluations": output.nfe}


def kernel_density(folder, data, kind, seed=0):
    """Test nats of a von Mises kernel density on train, with its concentration chosen on a tenth of train and 0.1 % of
    the uniform density mixed in, as shared/data/README.md has them."""

    def angles(split):
        table = table_of("sidechains", folder, data, split)
        return torch.from_numpy(np.radians(table.values[np.array(table.labels) == kind])).float()

    whole, test = angles("train"), angles("test")
    columns = whole.shape[1]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    held_out, train_ = whole[order[: len(whole) // 10]], whole[order[len(whole) // 10 :]]
    uniform = columns * math.log(2 * math.pi)

    def nats(points, centres, kappa):
        # log sum over centres of exp(kappa sum cos(difference)), by cos(a - b) = cos a cos b + sin a sin b
        log_norm = columns * (math.log(2 * math.pi) + math.log(float(torch.special.i0e(torch.tensor(kappa)))) + kappa)
        there = torch.cat([centres.cos(), centres.sin()], dim=1)
        found = []
        for part in points.split(500):
            here = torch.cat([part.cos(), part.sin()], dim=1)
            found.append(torch.logsumexp(kappa * (here @ there.T), 1) - math.log(len(centres)) - log_norm)
        mixed = torch.logaddexp(torch.cat(found) + math.log(0.999), torch.tensor(math.log(0.001) - uniform))
        return -mixed.double().numpy()

    kappas = [10, 20, 40, 60, 80, 120, 160]
    best = min(kappas, key=lambda kappa: nats(held_out, train_, kappa).mean())
    return summary(nats(test, whole, best)) | {"concentration": best, "uniform": round(uniform, 4)}


def report():
    results = read(RESULTS)
    lines = [
        "| test points, nats | n | uniform | kernel density | published | on the domain | flat |",
        "|" + "---|" * 7,
    ]

    def cell(found, *keys):
        for key in keys:
            found = (found or {}).get(key)
        return f"{found['nats']:.3f} ± {found['standard_error']:.3f}" if found else ""

    for name in ("torsions", "earth_events"):
        own, flat = results.get(name, {}).get("nats"), results.get(f"{name}_flat", {}).get("nats")
        for title, keys in ((name, ()), (f"{name}, new places", ("new places",))):
            for kind, density in KERNELS.get(title, {}).items():
                where = own or {}
                for key in keys:
                    where = where.get(key, {})
                published = f"{PUBLISHED[kind]:.2f}" if title == "earth_events" else ""
                lines.append(
                    f"| {kind}{', new places' if keys else ''} | {where.get(kind, {}).get('n', '')} | "
                    f"{UNIFORM[name]:.3f} | {density:.3f} | {published} | {cell(own, *keys, kind)} | "
                    f"{cell(flat, *keys, kind)} |"
                )
    side = results.get("sidechains", {})
    for kind, density in side.get("kernel_density", {}).items():
        lines.append(
            f"| {kind}, 6 angles | {density['n']} | {density['uniform']:.3f} | {density['nats']:.3f} | | "
            f"{cell(side.get('nats'), kind)} | |"
        )
    print("\n".join(lines))
    for name, each in results.items():
        print(
            f"\n{name}: {each['steps']:,} steps in {each['train_seconds']:,} s, {each['parameters']:,} parameters; "
            f"{each['outside']:.1%} of samples outside; {each['machine']}, code {each['commit']}"
        )


def cards(runs):
    """The small files of the runs on domains as model_cards/."""
    for name in ("torsions", "earth_events", "sidechains"):
        folder, target = runs / name / "pipeline", HERE.parent / "model_cards" / name
        for path in ("README.md", "model_index.json", "training.json", "metrics.json", "samples.png"):
            if (folder / path).is_file():
                target.mkdir(exist_ok=True)
                shutil.copy(folder / path, target / path)
        for path in ("transformer/config.json", "scheduler/scheduler_config.json"):
            if (folder / path).is_file():
                (target / path).parent.mkdir(exist_ok=True)
                shutil.copy(folder / path, target / path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the parquet files of shared/data")
    parser.add_argument("--runs", type=Path, default=Path("runs/manifolds"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--cards", action="store_true")
    options = parser.parse_args()
    if options.report:
        report()
        return
    if options.cards:
        cards(options.runs)
        return
    for name in options.only:
        if name in read(RESULTS):
            continue
        folder, began = train_run(name, options.data, options.runs), time.monotonic()
        found = {"nats": measure(name, folder, options.data)} | pictures(name, folder, options.data)
        if name == "sidechains":
            found["kernel_density"] = {kind: kernel_density(folder, options.data, kind) for kind in ("ARG", "LYS")}
        facts = read(folder / "training.json")
        found |= {key: facts[key] for key in ("steps", "train_seconds", "parameters", "final_loss")}
        keep(name, found | {"measured_seconds": round(time.monotonic() - began)} | provenance(torch.device("cpu")))
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


if __name__ == "__main__":
    main()
