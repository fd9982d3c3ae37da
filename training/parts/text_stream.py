"""Texts for training as they come: tokenised on the way, without a copy on disk and without their number."""

import itertools

import numpy as np
import pyarrow
import torch
from datasets import ClassLabel, Features

from score_sde.pipelines.texts import filled_up, lacking_characters, unknown_parts
from score_sde.pipelines.wording import few

from .hashes import hash_of
from .seeds import mix_seeds
from .sources import open_texts
from .streams import Stream
from .text_rows import TextClasses, as_item, check_columns


# texts that are read before work begins
CHECKED = 64


class TokenStream(Stream):
    """Sequences of tokens as those of `TokenDataset`, endlessly: each process, and each of its workers, reads its own
    part of the files. Texts come in another order in every pass, and the next sequence is drawn from a buffer.

    With packing, what is left of a pass begins the next one; documents of each class follow one another.

    The order is a function of the seed, the number of processes and the number of workers. `begin` says which part
    this process reads and where.

    Attributes: `data`, an `IterableDataset` of datasets; `num_classes` and `id2label`, None without classes.

    Raises ValueError for columns that are missing or hold no texts, and classes that the stream doesn't name.
    """

    def __init__(self, config, tokenizer):
        self.name, self.split, self.length, self.packing = config.dataset, config.split, config.length, config.packing
        self.column, self.label_column, self.long_texts = config.text_column, config.label_column, config.long_texts
        self.seed, self.shuffle_buffer, self.shape = config.seed, config.shuffle_buffer, (config.length,)
        self.tokenizer, self.vocab_size, self.end = tokenizer, len(tokenizer), tokenizer.eos_token_id
        self.data, self.origin = open_texts(self.name, self.split, lines=not self.packing, streaming=True)
        features = self.features()
        check_columns(config, features)
        self.classes = self.id2label = self.num_classes = None
        if self.label_column is not None:
            if not isinstance(features[self.label_column], ClassLabel):
                raise ValueError(
                    f"the stream of dataset {self.name!r} doesn't say which classes its column {self.label_column!r} "
                    f"has, as a ClassLabel of datasets does: leave streaming out, or label_column"
                )
            self.classes = TextClasses(self.label_column, [], features[self.label_column])
            self.id2label, self.num_classes = self.classes.id2label, len(self.classes.id2label)
        self.known = set()
        self.begin(rank=0, world_size=1, given=0)
        self.check_first()

    def check_first(self):
        """Raise ValueError for what is wrong with the first texts, before work begins, and where there are none."""
        where, number = "the stream", -1
        for number, (text, _) in enumerate(itertools.islice(self.texts(0, where), CHECKED)):
            place = f"row {number} of {where} of dataset {self.name!r}"
            tokens = self.encode(text, place)
            if not self.packing:
                self.fill(tokens, place)
        if number < 0:
            raise ValueError(f"dataset {self.name!r}, split {self.split!r}: all of its texts are empty")

    def features(self):
        """The features of the columns; of files that don't say, by their first row."""
        if self.data.features is not None:
            return self.data.features
        try:
            row = next(iter(self.data), None)
        except Exception as error:  # every reader has its own
            raise ValueError(f"dataset {self.name!r}, split {self.split!r}, cannot be read: {error}") from None
        if row is None:
            raise ValueError(f"split {self.split!r} of dataset {self.name!r} is empty")
        return Features.from_arrow_schema(pyarrow.Table.from_pylist([row]).schema)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        for number, (tokens, label) in enumerate(self.shuffled(worker)):
            if number >= self.given:
                yield as_item(torch.from_numpy(tokens), None if self.classes is None else label)

    def shuffled(self, worker):
        """The sequences in another order: the next is always one of a buffer."""
        generator, buffer = np.random.default_rng(mix_seeds(self.seed, self.rank, worker)), []
        for sequence in self.sequences(worker):
            if len(buffer) < self.shuffle_buffer:
                buffer.append(sequence)
                continue
            place = int(generator.integers(len(buffer)))
            yield buffer[place]
            buffer[place] = sequence

    def sequences(self, worker):
        """(tokens (length,) int64, label) of all passes, in the order of the texts."""
        left: dict[int, list[int]] = {}  # of each class, what fills no sequence yet
        for epoch in itertools.count():
            where, found = f"pass {epoch} of worker {worker} in process {self.rank}", 0
            for number, (text, label) in enumerate(self.texts(epoch, where)):
                place = f"row {number} of {where} of dataset {self.name!r}"
                tokens = self.encode(text, place)
                found += len(tokens) if self.packing else 0
                if self.packing:
                    run = left.setdefault(label, [])
                    run += tokens if self.end is None else [*tokens, self.end]
                    whole = len(run) // self.length * self.length
                    for begin in range(0, whole, self.length):
                        yield np.asarray(run[begin : begin + self.length], dtype=np.int64), label
                    del run[:whole]
                elif (tokens := self.fill(tokens, place)) is not None:
                    found += 1
                    yield np.asarray(tokens, dtype=np.int64), label
            if not found:
                raise ValueError(
                    f"{where} found no text{'' if self.packing else f' of at most {self.length} tokens'} in dataset "
                    f"{self.name!r}, split {self.split!r}: use fewer processes or num_workers, or other texts"
                )

    def texts(self, epoch, where):
        """(text, label) of the rows of a pass, but for those without text."""
        rows = iter(self.rows(epoch))
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # every reader has its own
                raise ValueError(
                    f"dataset {self.name!r} cannot be read on at row {number} of {where}: {error}"
                ) from error
            if row is None:
                return
            text = row[self.column]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"row {number} of {where} of dataset {self.name!r} holds {type(text).__name__}, no text"
                )
            if text:
                yield text, 0 if self.classes is None else int(self.classes.labels([row[self.label_column]])[0])

    def encode(self, text, where):
        """The tokens of a text, a list. Raises ValueError for characters that the tokenizer lacks."""
        if new := set(text) - self.known:
            if lacking := lacking_characters(self.tokenizer, ["".join(new)]):
                raise ValueError(
                    f"{where}: the tokenizer lacks {few(map(repr, lacking), 10)}: take another one, such as bytes, or "
                    f"change the texts"
                )
            self.known |= new
        tokens = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in tokens:
            named = few(map(repr, unknown_parts(self.tokenizer, [text])), 10)
            raise ValueError(
                f"{where}: the tokenizer has no tokens for {named}: take another one, such as bytes, or change the "
                f"texts"
            )
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise ValueError(f"{where}: the tokenizer makes ids up to {max(tokens)}, of {self.vocab_size} tokens")
        return tokens

    def fill(self, tokens, where):
        """The tokens of a text as one sequence, None where it is left out. Raises ValueError for one that is longer, or
        shorter without an end mark."""
        if len(tokens) > self.length:
            if self.long_texts == "refuse":
                raise ValueError(
                    f"{where} has {len(tokens):,} tokens, more than length {self.length}: pass a greater length, or "
                    f"--long_texts cut or leave_out"
                )
            return tokens[: self.length] if self.long_texts == "cut" else None
        if self.end is None and len(tokens) < self.length:
            raise ValueError(
                f"{where} has {len(tokens):,} tokens, fewer than length {self.length}, and the tokenizer has no end "
                f"mark to fill it up with: take one that has (an eos_token), or packing"
            )
        return filled_up(tokens, self.length, self.tokenizer)

    def row_facts(self):
        """As `TokenDataset.row_facts`, of what a stream knows."""
        left_out = sum(map(len, self.origin.left_out.values()))
        return {"rows": None, "class_counts": None, "skipped_files": left_out, "vocab_size": self.vocab_size}

    def describe(self):
        """One line that says what the texts are."""
        what = "documents" if self.packing else "texts"
        classes = "" if self.id2label is None else f"; {self.num_classes} classes: {few(self.id2label.values(), 20)}"
        left = "".join(f"; left out: {few(names)} ({reason})" for reason, names in self.origin.left_out.items())
        return (
            f"dataset {self.name!r}, split {self.split!r}: a stream of {what}, of {self.vocab_size} different tokens, "
            f"in sequences of {self.length}{classes}{left}"
        )

    def fingerprint(self):
        """What tells these tokens from others, here and on another machine, as far as a stream knows."""
        rows = {"files": list(self.origin.sizes.items()), "column": self.column, "layout": [self.packing, self.length]}
        if not self.origin.sizes:  # on the Hub
            rows |= {"name": self.name, "split": self.split, "bytes": self.data.info.dataset_size}
        return {"classes": None if self.id2label is None else list(self.id2label.values()), "rows": hash_of(rows)}
