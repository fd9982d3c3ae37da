"""The exact likelihood of points, in nats of the whole point: of angles in radians, of points of a sphere by its area,
of other numbers in the units of the data."""

import math

import torch

from .rounds import gathered, real_batches


# of more coordinates the trace is estimated: exact, it costs a backward pass for each
MOST_EXACT = 8


@torch.no_grad()
def point_nats(pipeline, dataset, count, config, accelerator, what=None):
    """(-log p of the first points of a `PointDataset` (count,), float64; their classes or None; network evaluations of
    the largest batch), given the classes where the network and the data have any.

    Args:
        config: with `batch_size`, `seed` and `tolerance` of the ODE.
        what: of a progress bar; None for none.
    """
    count, values, labels, nfe = min(count, len(dataset)), [], [], 0
    labelled = pipeline.num_classes is not None and dataset.labels is not None
    trace = "exact" if dataset.shape[0] <= MOST_EXACT else "rademacher"
    for own, batch, size in real_batches(dataset, count, config, accelerator, what):
        generators = None
        if trace != "exact":
            generators = [torch.Generator().manual_seed(config.seed + i) for i in own]
        found = pipeline.log_likelihood(
            samples=batch["images"],
            conditions={"class_labels": batch["labels"]} if labelled else {},
            trace=trace,
            generator=generators,
            rtol=config.tolerance,
            atol=config.tolerance,
        )
        values.append(gathered(-found.log_prob.double(), size, accelerator))
        if labelled:
            labels.append(gathered(batch["labels"], size, accelerator))
        nfe = max(nfe, found.nfe)
    change = log_units(dataset.coordinates)
    return torch.cat(values) + change, torch.cat(labels) if labelled else None, nfe


def log_units(coordinates):
    """The logarithm of how many times larger a volume is in the units of these nats than in those of a network: of the
    columns of a box and of flat space."""
    return sum(
        math.log(coordinates.scale_of(channel)[1])
        for name, _, channels in coordinates.parts
        if name in ("box", "flat")
        for channel in range(channels.start, channels.stop)
    )


def nats_in_words(coordinates):
    """What the nats of points are of."""
    words = {"torus": "angles in radians", "sphere": "points by the sphere's area"}
    parts = dict.fromkeys(words.get(name, "numbers in the units of the data") for name, _, _ in coordinates.parts)
    return " and ".join(parts)


def likelihood_metrics(nats, labels, id2label, coordinates, shared):
    """The measurements of a bundle of what `point_nats` found, of all points and of each class."""
    metrics = []
    groups = [("", nats)]
    if labels is not None and id2label:
        names = {int(label): name for label, name in id2label.items()}
        groups += [(f" of {names[label]}", nats[labels == label]) for label in sorted(set(labels.tolist()))]
    given = " given the class" if labels is not None else ""
    for name, values in groups:
        error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
        metric = {
            "name": f"negative log-likelihood{name}, nats",
            "value": round(float(values.mean()), 4),
            "n": len(values),
            "type": "nats",
            "explanation": f"exact likelihood{given} of {nats_in_words(coordinates)} by the probability-flow ODE"
            + (f", standard error {error:.4f} over points." if error else ", of one point."),
        }
        metrics.append(metric | ({"standard_error": round(error, 4)} if error else {}) | shared)
    return metrics
