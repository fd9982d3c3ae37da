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
from score_sde.pipelines.writing import write_json
from score_sde.sharing.model_card import write_card
from score_sde.training import train
from score_sde.training.parts.point_data import PointDataset, Table
from score_sde.training.parts.point_likelihood import nats_in_words, point_nats
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
# of shared/data/README.md: kernel densities on test places that are not in train
NEW_PLACES = {"earthquake": -0.073, "fire": -1.578, "volcano": 6.76}
# the Riemannian score-based model of De Bortoli et al. 2022
PUBLISHED = {"earthquake": -0.19, "fire": -1.33, "volcano": -4.92}


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


def kernel_density(name, folder, data, kind, seed=0):
    """Nats of the same test points by a von Mises (-Fisher) kernel density on train, its concentration chosen on a
    tenth of train, with 0.1 % of the uniform density mixed in, as shared/data/README.md has them."""

    def points(split):
        table = table_of(name, folder, data, split)
        rows = torch.from_numpy(np.radians(table.values[np.array(table.labels) == kind]))
        if name == "earth_events":
            (latitude, longitude), across = rows.unbind(1), rows[:, 0].cos()
            return torch.stack([across * longitude.cos(), across * longitude.sin(), latitude.sin()], dim=1)
        # cos(a - b) = cos a cos b + sin a sin b
        return torch.cat([rows.cos(), rows.sin()], dim=1)

    whole, test = points("train"), points("test")[: MOST_OF_SIX if name == "sidechains" else MOST]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    held_out, train_ = whole[order[: len(whole) // 10]], whole[order[len(whole) // 10 :]]
    angles = 0 if name == "earth_events" else whole.shape[1] // 2
    uniform = angles * math.log(2 * math.pi) if angles else math.log(4 * math.pi)

    def nats(points, centres, kappa):
        # of exp(kappa (cosines - their largest sum))
        log_norm = math.log(2 * math.pi / kappa) + math.log(-math.expm1(-2 * kappa))
        if angles:
            log_norm = angles * math.log(2 * math.pi * float(torch.special.i0e(torch.tensor(float(kappa)))))
        there, largest, found = kappa * centres.float().T, kappa * (angles or 1), []
        for part in points.float().split(500):
            found.append(torch.logsumexp(part @ there - largest, 1).double())
        log_density = torch.cat(found) - math.log(len(centres)) - log_norm
        floor = torch.tensor(math.log(0.001) - uniform, dtype=torch.float64)
        return -torch.logaddexp(log_density + math.log(0.999), floor).numpy()

    kappas = [20, 40, 60, 80, 120, 160, 320, 640, 1280, 2560, 10_000, 40_000]
    best = min(kappas, key=lambda kappa: nats(held_out[:2000], train_, kappa).mean())
    return summary(nats(test, whole, best)) | {"concentration": best, "uniform": round(uniform, 4)}


def report():
    """The tables of manifolds.json."""
    results = read(RESULTS)
    lines = [
        "| test points, nats | n | uniform | kernel density | published | on the domain | flat, ignoring it |",
        "|" + "---|" * 7,
    ]

    def cell(found):
        return f"{found['nats']:.3f} ± {found['standard_error']:.3f}" if found else ""

    for name in ("torsions", "sidechains", "earth_events"):
        own, flat = results.get(name, {}), results.get(f"{name}_flat", {}).get("nats", {})
        for kind, density in own.get("kernel_density", {}).items():
            published = f"{PUBLISHED[kind]:.2f}" if name == "earth_events" else ""
            title = f"{kind}, 6 angles" if name == "sidechains" else kind
            lines.append(
                f"| {title} | {own['nats'][kind]['n']} | {density['uniform']:.3f} | "
                f"{cell(density)} | {published} | {cell(own['nats'][kind])} | {cell(flat.get(kind))} |"
            )
        for kind, found in own.get("nats", {}).get("new places", {}).items():
            theirs = flat.get("new places", {}).get(kind)
            lines.append(
                f"| {kind}, new places | {found['n']} | 2.531 | {NEW_PLACES[kind]:.3f} (of all) | | {cell(found)} | "
                f"{cell(theirs)} |"
            )
    print("\n".join(lines))
    for name, each in results.items():
        print(
            f"\n{name}: {each['steps']:,} steps in {each['train_seconds']:,} s, {each['parameters']:,} parameters; "
            f"{each['outside']:.1%} of samples outside; {each['machine']}, code {each['commit']}"
        )


def cards(runs):
    """The small files of the runs on domains as model_cards/, with the figures of manifolds.json."""
    for name in ("torsions", "earth_events", "sidechains"):
        folder, target, found = runs / name / "pipeline", HERE.parent / "model_cards" / name, read(RESULTS)[name]
        for path in [
            "model_index.json",
            "training.json",
            "samples.png",
            "transformer/config.json",
            "scheduler/scheduler_config.json",
        ]:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / path, target / path)
        space = load_bundle(str(folder)).kind.coordinates
        shared = {key: found[key] for key in ("command", "commit", "machine")}
        shared |= {"dataset": f"{RUNS[name][1]}_{{split}}.parquet", "split": "test", "type": "nats", "seed": 0}
        what = f"exact likelihood given the class of {nats_in_words(space)} by the probability-flow ODE"
        groups = [(kind, each) for kind, each in found["nats"].items() if isinstance(each, dict) and "nats" in each]
        groups += [(f"{kind} on new places", each) for kind, each in found["nats"].get("new places", {}).items()]
        metrics = [
            {
                "name": f"negative log-likelihood of {kind}, nats",
                "value": each["nats"],
                "standard_error": each["standard_error"],
                "n": each["n"],
                "nfe": found["nats"]["nfe"],
                "explanation": f"{what}, standard error {each['standard_error']:.4f} over points.",
            }
            | shared
            for kind, each in groups
        ]
        write_json(str(target / "metrics.json"), metrics)
        write_card(str(target))


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
        if not name.endswith("_flat"):
            kinds = load_bundle(str(folder)).config.id2label.values()
            found["kernel_density"] = {kind: kernel_density(name, folder, options.data, kind) for kind in kinds}
        facts = read(folder / "training.json")
        found |= {key: facts[key] for key in ("steps", "train_seconds", "parameters", "final_loss")}
        keep(name, found | {"measured_seconds": round(time.monotonic() - began)} | provenance(torch.device("cpu")))
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


if __name__ == "__main__":
    main()
