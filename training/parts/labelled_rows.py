"""Rows of a dataset, whatever they hold: their columns, labels and files."""

import hashlib
import io
import os

import datasets
import fsspec
import huggingface_hub.constants
import pyarrow
from datasets import ClassLabel, Dataset

from score_sde.pipelines.wording import few

from .hashes import hash_of


def field(values, column):
    """What a mapping holds for a column: "json.label" is the field label of the column json. Raises LookupError or
    TypeError where there is none."""
    for name in [column] if column in values else column.split("."):
        values = values[name]
    return values


class LabelledRows:
    """What rows of a split have in common. A subclass sets `name`, `split`, `data`, `origin` and `label_column`.

    Attributes: `num_classes` and `id2label`, None without labels; `class_counts`, {name: rows} of the classes, None
    without labels or where only reading all of a stream could tell.
    """

    def check_columns(self, columns):
        """Raise ValueError for one of some columns, (what it holds, its name or None), that the data haven't."""
        or_else = {
            "label": ", or pass --label_column none",
            "array": ", or those of a table of times by --columns",
        }
        for kind, column in columns:
            try:
                _ = column and field(self.data.features, column)
            except (LookupError, TypeError):
                raise ValueError(
                    f"dataset {self.name!r} has no column {column!r}; it has {', '.join(self.data.column_names)}: "
                    f"name its {kind} column by --{kind}_column{or_else.get(kind, '')}"
                ) from None

    def read_labels(self, num_classes):
        """Look at the labels; `num_classes`, where it is known."""
        self.num_classes = self.id2label = self.class_counts = self.labels_hash = None
        if self.label_column is not None:
            feature = field(self.data.features, self.label_column)
            known = len(feature.names) if isinstance(feature, ClassLabel) else None
            if known and num_classes not in (None, known):
                raise ValueError(f"num_classes {num_classes}: dataset {self.name!r} has {known} classes")
            self.num_classes = known or num_classes
            found = self.count_labels() if isinstance(self.data, Dataset) else None
            if self.num_classes is None:
                raise ValueError(
                    f"the stream of dataset {self.name!r} doesn't say how many classes its column "
                    f"{self.label_column!r} has: pass --num_classes, or --label_column none"
                )
            names = feature.names if known else map(str, range(self.num_classes))
            self.id2label = dict(enumerate(names))
            if found:
                self.class_counts = {name: found.get(label, 0) for label, name in self.id2label.items()}

    def count_labels(self):
        """{label: rows}; sets `labels_hash`, and `num_classes` where it isn't known."""
        top = self.label_column if self.label_column in self.data.features else self.label_column.split(".")[0]
        table = self.data.select_columns([top]).flatten().with_format("arrow")[:]
        counts = {each["values"]: each["counts"] for each in table[self.label_column].value_counts().to_pylist()}
        wrong = [label for label in counts if not self.is_label(label)]
        if wrong:
            raise ValueError(
                f"label column {self.label_column!r} must hold integers from 0"
                + (f" to {self.num_classes - 1}" if self.num_classes else "")
                + f"; it has {wrong[:5]}"
            )
        if self.num_classes is None:
            if max(counts) >= len(self.data):
                raise ValueError(
                    f"label column {self.label_column!r} has {len(counts)} labels, but up to {max(counts)}: pass "
                    f"--num_classes if there are so many classes"
                )
            self.num_classes = max(counts) + 1
        labels = table[self.label_column].cast(pyarrow.int64()).to_numpy()
        self.labels_hash = hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
        return counts

    def is_label(self, label):
        return isinstance(label, int) and label >= 0 and (self.num_classes is None or label < self.num_classes)

    def file_of(self, value):
        """The open file of what the image column holds."""
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ValueError("the row has none")
        return io.BytesIO(value["bytes"]) if value["bytes"] is not None else self.open_file(value["path"])

    def open_file(self, path):
        """A file of the dataset, to be read. What is in the rows of a dataset may name any."""
        *_, source = path.split("::")  # of an archive, where it is
        if "://" in source:
            if not source.startswith((f"hf://datasets/{self.name}@", f"hf://datasets/{self.name}/")):
                raise ValueError(f"{path!r} is no file of the dataset")
            return fsspec.open(path, "rb").open()
        roots = [self.origin.root]
        if self.origin.root is None:  # of the Hub, what was downloaded
            caches = datasets.config
            roots = [caches.HF_DATASETS_CACHE, caches.DOWNLOADED_DATASETS_PATH, caches.EXTRACTED_DATASETS_PATH]
            roots.append(huggingface_hub.constants.HF_HUB_CACHE)
        roots = [os.path.abspath(root) for root in roots]
        path = os.path.abspath(os.path.join(roots[0], path))
        if not any(os.path.commonpath([path, root]) == root for root in roots):
            raise ValueError(f"{path!r} is no file of the dataset")
        if not os.path.isfile(path):
            raise ValueError(f"{path!r} is no file")
        return open(path, "rb")

    def row_facts(self):
        """What the rows are, for training.json: {"rows", "class_counts", "skipped_files"}; None where a stream doesn't
        say."""
        return {
            "rows": len(self.data) if isinstance(self.data, Dataset) else None,
            "class_counts": self.class_counts,
            "skipped_files": sum(map(len, self.origin.left_out.values())),
        }

    def fingerprint(self):
        """What tells these rows from others, here and on another machine: {"classes": names in order, "rows": a hash of
        their files' names and sizes and of the labels, "autoencoder": None}."""
        rows = {"files": list(self.origin.sizes.items()), "labels": self.labels_hash, "rows": self.row_facts()["rows"]}
        if not self.origin.sizes:  # on the Hub
            rows |= {"name": self.name, "split": self.split, "bytes": self.data.info.dataset_size}
        return fingerprint_of(self.id2label, rows)


def describe(name, dataset, what="images"):
    """One line on the rows of a dataset, which are `what`."""
    facts = dataset.row_facts()
    rows = f"a stream of {what}" if facts["rows"] is None else f"{facts['rows']:,} {what}"
    sizes = [f"{size} {count:,}" for size, count in facts.get("sizes", {}).items()]
    sizes = f"; heights and widths: {', '.join(sizes)}" if sizes else ""
    if dataset.id2label is None:
        return f"{name}: {rows}, read without classes{sizes}"
    counts = facts["class_counts"] or {}
    classes = [f"{label} {counts[label]:,}" if counts else label for label in dataset.id2label.values()]
    return f"{name}: {rows} of {len(classes)} classes: {few(classes, 20)}{sizes}"


def fingerprint_of(id2label, rows, autoencoder=None):
    """What tells data from others, as JSON; `rows` is hashed."""
    return {
        "classes": list(id2label.values()) if id2label else None,
        "rows": hash_of(rows),
        "autoencoder": autoencoder,
    }
