"""Rows of texts: their columns, and classes by a column of labels."""

import numpy as np
from datasets import ClassLabel, Value

from score_sde.pipelines.wording import few


def check_columns(config, features):
    """Raise ValueError where a column that a `TextDataConfig` names is not among those that a dataset has, {name:
    feature}, or holds no texts."""
    for kind, column in (("text", config.text_column), ("label", config.label_column)):
        if column is not None and column not in features:
            raise ValueError(
                f"dataset {config.dataset!r} has no column {column!r}; it has {', '.join(features)}: name its {kind} "
                f"column by --{kind}_column"
            )
    feature = features[config.text_column]
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        raise ValueError(f"dataset {config.dataset!r}: column {config.text_column!r} must hold texts, not {feature}")


def as_item(tokens, label=None):
    """A sequence of tokens (length,) as training takes it, with its label where there are classes."""
    return {"tokens": tokens} if label is None else {"tokens": tokens, "labels": int(label)}


class TextClasses:
    """Classes of texts, by a column of labels: whole numbers from 0, names, or bins of numbers.

    Args:
        values: all values of the column; feature: its `datasets` feature; bins: how many, 0 for none.

    Attributes: `id2label`, {number: name}.

    Raises ValueError for values that are no labels, and bins of too few different numbers.
    """

    def __init__(self, column, values, feature, bins=0):
        self.column, self.edges = column, None
        if any(value is None for value in values):
            raise ValueError(f"label column {column!r}: {sum(value is None for value in values):,} rows have no label")
        kinds = {bool if isinstance(value, bool) else type(value) for value in values}
        if bins:
            if not kinds <= {int, float} or not np.isfinite(np.asarray(values, dtype=float)).all():
                raise ValueError(f"label_bins {bins}: column {column!r} must hold finite numbers")
            self.edges = np.quantile(np.asarray(values, dtype=float), np.linspace(0, 1, bins + 1))
            if len(np.unique(self.edges)) <= bins or len(np.unique(self.bins_of(values))) < bins:
                raise ValueError(
                    f"label_bins {bins}: column {column!r} has so few different values, or so many of one, that some "
                    f"bins would be empty: pass fewer"
                )
            texts = [f"{edge:.4g}" for edge in self.edges]
            names = [f"{low} to {high}" for low, high in zip(texts, texts[1:], strict=False)]
        elif isinstance(feature, ClassLabel):
            names = feature.names
        elif kinds == {str}:
            names = sorted(set(values))
        elif kinds == {int} and min(values) >= 0 and max(values) < len(values):
            names = [str(number) for number in range(max(values) + 1)]
        else:
            remedy = ": part numbers into classes by --label_bins" if kinds <= {int, float} else ""
            raise ValueError(
                f"label column {column!r} must hold whole numbers from 0, or names; it has {few(map(repr, values), 5)}"
                f"{remedy}"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"label column {column!r}: the classes {few(names, 10)} are not all different")
        self.id2label = dict(enumerate(names))

    def bins_of(self, values):
        """The bin of each number; those beyond the ends are of the first and the last."""
        return np.searchsorted(self.edges[1:-1], values, side="right")

    def labels(self, values):
        """The number of each value's class, int64. Raises ValueError for a value that is of no class."""
        if self.edges is not None:
            return self.bins_of(values)
        numbers = {name: number for number, name in self.id2label.items()}
        found = [numbers.get(value) if isinstance(value, str) else value for value in values]
        wrong = [value for value, number in zip(values, found, strict=True) if number not in self.id2label]
        if wrong:
            raise ValueError(
                f"label column {self.column!r}: {len(wrong):,} rows are of no class that was trained on, such as "
                f"{few(map(repr, wrong))}"
            )
        return np.asarray(found, dtype=np.int64)
