"""Texts for training: documents that `sources` opens, tokenised once and cut into sequences of one length.

With packing, documents follow one another in a stream, each with the tokenizer's end mark behind it where it has one,
and sequences are cut from the stream wherever they fall. In every epoch the cuts are elsewhere, and no token comes
twice. Without, a row is a sequence: its tokens, filled up by an end mark and, behind it, what the tokenizer pads with,
or else more of them. Documents of different classes are never in one sequence.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.compute
import torch
import transformers
from datasets import Features, List, Value

from score_sde.pipelines.texts import filled_up, lacking_characters, unknown_parts
from score_sde.pipelines.wording import few, one_line, quoted, shortened, unknown

from .config import LoaderConfig, option
from .hashes import hash_of
from .seeds import mix_seeds
from .sources import open_texts
from .text_rows import TextClasses, as_item, check_columns
from .text_stream import TokenStream
from .tokenizers import TOKENIZERS, make_tokenizer


# what is done with texts that are longer than a sequence
LONG_TEXTS = ("refuse", "cut", "leave_out")
# tokenizers that are made of the texts
OF_TEXTS = ("characters", "bpe")
# documents that are tokenised at once
BATCH = 64


@dataclass
class TextDataConfig(LoaderConfig):
    dataset: str = option(
        "pride_and_prejudice",
        "Texts: pride_and_prejudice (inside the package), a .txt, .jsonl or .parquet file, several of them as a "
        "pattern or a folder (a {split} in the name is replaced by the split), or a dataset id on the Hub. With "
        "packing a .txt file is one document, else each of its lines is a text.",
        "data",
        common=True,
    )
    split: str = option("train", "Split of the dataset to use.", "data")
    text_column: str = option("text", "Column that holds the texts.", "data", common=True)
    label_column: str | None = option(
        None,
        "Column of class labels: whole numbers from 0, names, or with label_bins any numbers; none unless given.",
        "data",
        common=True,
    )
    label_bins: int = option(
        0, "Classes that a column of numbers is parted into, each with as many rows; 0 takes it as it is.", "data"
    )
    tokenizer: str = option(
        "characters",
        "characters (those of the data), bytes, bpe (byte pairs, learned from the data), or a fast tokenizer of "
        "transformers by its folder or Hub id, such as `score-sde tokenizer` makes.",
        "data",
        common=True,
    )
    vocab_size: int | None = option(None, "Tokens of a tokenizer of byte pairs that is made from the data.", "data")
    length: int = option(256, "Tokens of a sequence.", "data", common=True)
    packing: bool = option(
        True,
        "Cut sequences from documents that follow one another, with an end mark behind each; false: each row is a "
        "sequence, filled up by end marks.",
        "data",
        common=True,
    )
    long_texts: str = option(
        "refuse",
        "Without packing, texts that are longer than a sequence: refuse, cut, or leave_out.",
        "data",
    )
    streaming: bool = option(
        False,
        "Read the texts as they come, without a copy of them on disk and without their number, by a tokenizer that is "
        "there. The order then depends on the processes, num_workers and batch_size, which must be the same on resume; "
        "a resumed run reads past what it has seen.",
        "data",
    )
    shuffle_buffer: int = option(
        1000, "Texts, and sequences, of a stream, in each worker, among which the next is drawn.", "data"
    )

    def problems(self):
        yield from LoaderConfig.problems(self)
        if self.label_column == "none":
            self.label_column = None
        if self.length < 2:
            yield f"length {self.length} must be at least 2 tokens"
        if self.label_bins < 0 or self.label_bins == 1:
            yield f"label_bins {self.label_bins} must be at least 2, or 0"
        if self.label_bins and self.label_column is None:
            yield "label_bins need label_column, the numbers to part into classes"
        if (self.vocab_size is None) == (self.tokenizer == "bpe"):
            yield f"vocab_size {self.vocab_size}: tokenizer bpe needs it, and no other has it"
        if self.long_texts not in LONG_TEXTS:
            yield unknown("long_texts", self.long_texts, LONG_TEXTS)
        if self.packing and self.long_texts != "refuse":
            yield f"long_texts {self.long_texts!r}: with packing no text is too long, leave it out"
        yield from self.stream_problems()

    def stream_problems(self):
        given = getattr(self, "given", ())
        if self.shuffle_buffer < 1:
            yield f"shuffle_buffer {self.shuffle_buffer} must be at least 1"
        if "shuffle_buffer" in given and not self.streaming:
            yield "shuffle_buffer is of a stream, other data come in random order: leave it out, or pass streaming"
        begun = getattr(self, "init_from", None) is not None and "tokenizer" not in given
        if self.streaming and self.tokenizer in OF_TEXTS and not begun:
            yield (
                f"tokenizer {self.tokenizer!r} is made of all texts, which a stream doesn't know: pass bytes, or the "
                f"folder of one that `score-sde tokenizer` has made of some of them; or leave streaming out"
            )
        if self.streaming and self.label_bins:
            yield (
                f"label_bins {self.label_bins} part the numbers of all rows, which a stream doesn't know: leave it "
                f"out, or streaming"
            )


def open_tokenizer(name, texts=(), vocab_size=None):
    """A tokenizer that is made from texts, of one of the names `TOKENIZERS`, or a fast one of transformers from a
    folder or the Hub; no code of it is run. Raises ValueError for what is none."""
    if name in TOKENIZERS:
        return make_tokenizer(name, texts, vocab_size, end_mark=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library has no common class of errors
        raise ValueError(
            f"tokenizer {quoted(name)} cannot be opened: {shortened(one_line(error)).rstrip('.')}. Give "
            f"{' or '.join(TOKENIZERS)}, or a folder or Hub id of a fast tokenizer"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"tokenizer {quoted(name)}: a {type(tokenizer).__name__} is no fast tokenizer")
    return tokenizer


def tokenizer_hash(tokenizer):
    """What tells a tokenizer from others."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    own = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "split_special_tokens")}
    # what it is told at each call
    return hash_of(rules | {"truncation": None, "padding": None} | own)


class Texts:
    """The texts of a split, without those that are empty.

    Attributes: `data`, their rows; `labels`, the values of the label column, None without; `empty`, how many are left
    out.

    Raises ValueError for a column that is missing or holds no texts, and where all are empty.
    """

    def __init__(self, config, split=None):
        self.name, self.split, self.column = config.dataset, split or config.split, config.text_column
        self.data, self.origin = open_texts(self.name, self.split, lines=not config.packing)
        check_columns(config, self.data.features)
        column = self.data.select_columns([self.column]).with_format("arrow")[:].column(self.column)
        lengths = pyarrow.compute.fill_null(pyarrow.compute.utf8_length(column), 0).to_numpy()
        self.empty, self.characters = int((lengths == 0).sum()), int(lengths.sum())
        if not self.characters:
            raise ValueError(
                f"dataset {self.name!r}, split {self.split!r}: all of its {len(lengths):,} texts are empty"
            )
        if self.empty:
            self.data = self.data.select(np.flatnonzero(lengths))
        self.feature = self.data.features.get(config.label_column)
        self.labels = None if config.label_column is None else self.data[config.label_column][:]

    def __iter__(self):
        for rows in self.data.select_columns([self.column]).iter(batch_size=BATCH):
            yield from rows[self.column]

    def __len__(self):
        return len(self.data)

    def tokens(self, tokenizer):
        """(all tokens, one text after the other, int32; how many each text has, int64). They are kept where `datasets`
        keeps what it has read. Raises ValueError for characters that the tokenizer lacks."""
        self.check_characters(tokenizer)

        def encode(rows):
            found = tokenizer(rows[self.column], add_special_tokens=False, return_attention_mask=False, verbose=False)
            return {"tokens": found["input_ids"]}

        found = self.data.map(
            encode,
            batched=True,
            batch_size=BATCH,
            remove_columns=self.data.column_names,
            features=Features({"tokens": List(Value("int32"))}),
            new_fingerprint=hash_of([self.data._fingerprint, self.column, tokenizer_hash(tokenizer)])[:32],
            desc="tokens",
        )
        column = found.with_format("arrow")[:].column("tokens")
        tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
        lengths = pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)
        self.check_known(tokenizer, tokens, lengths)
        return tokens, lengths

    def check_known(self, tokenizer, tokens, lengths):
        """Raise ValueError where there are words that the tokenizer has no tokens for, with some of them."""
        if tokenizer.unk_token_id is None or not (unknown := tokens == tokenizer.unk_token_id).any():
            return
        where = np.repeat(np.arange(len(lengths)), lengths)[unknown]
        some = [self.data[int(row)][self.column] for row in np.unique(where)[:10]]
        named = few(map(repr, unknown_parts(tokenizer, some)), 10)
        raise ValueError(
            f"dataset {self.name!r}, split {self.split!r}: the tokenizer has no tokens for {int(unknown.sum()):,} "
            f"places, such as {named}. Take another tokenizer, such as bytes, or change the texts"
        )

    def check_characters(self, tokenizer):
        """Raise ValueError for characters that the tokenizer lacks, with how often they occur."""
        lacking = lacking_characters(tokenizer, self)
        if lacking:
            counts = {each: sum(text.count(each) for text in self) for each in lacking}
            named = [f"{character!r} {count:,} times" for character, count in counts.items()]
            raise ValueError(
                f"dataset {self.name!r}, split {self.split!r}: the tokenizer lacks {len(lacking)} of its characters: "
                f"{few(named, 10)}. Take another tokenizer, such as bytes, or change the texts"
            )


class TokenDataset(torch.utils.data.Dataset):
    """Sequences of tokens, {"tokens": (length,) int64, with classes also "labels"}.

    Args:
        texts: `Texts`; classes: `TextClasses`, None without.
        shift_seed: where packed sequences begin in an epoch is a function of it; None for the same in all.

    Attributes: `tokens`, all of them in memory, of 2 bytes where that is enough; `num_classes` and `id2label`, None
    without classes; `class_counts`, {name: texts}.

    Raises ValueError for data that are shorter than a sequence, texts that are longer (`long_texts`), texts of
    different lengths and a tokenizer without an end mark, and token ids beyond the tokenizer's.
    """

    knows_epochs = True
    most_workers = 2  # rows are copied, no more

    def __init__(self, config, texts, tokenizer, classes=None, shift_seed=None):
        self.length, self.packing, self.shift_seed = config.length, config.packing, shift_seed
        self.shape, self.vocab_size, self.name = (config.length,), len(tokenizer), f"dataset {texts.name!r}"
        self.name += f", split {texts.split!r}"
        self.texts, self.tokenizer, self.end = texts, tokenizer, tokenizer.eos_token_id
        self.id2label = None if classes is None else classes.id2label
        self.num_classes = None if classes is None else len(classes.id2label)
        labels = np.zeros(len(texts), dtype=np.int64) if classes is None else classes.labels(texts.labels)
        tokens, lengths = texts.tokens(tokenizer)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"{self.name}: the tokenizer makes ids up to {tokens.max()}, of {self.vocab_size} tokens")
        tokens = tokens.astype(np.int16 if self.vocab_size < 2**15 else np.int32)
        self.class_counts, self.too_long, self.unused = None, 0, 0
        (self.pack if self.packing else self.fill)(config, tokens, lengths, labels)

    def count_classes(self, labels):
        if self.num_classes is not None:
            counts = np.bincount(labels, minlength=self.num_classes).tolist()
            self.class_counts = dict(zip(self.id2label.values(), counts, strict=True))

    def pack(self, config, tokens, lengths, labels):
        if self.end is not None:
            tokens, lengths = np.insert(tokens, np.cumsum(lengths), self.end), lengths + 1
        self.count, self.rows = int(lengths.sum()), len(lengths)
        self.count_classes(labels)
        if self.num_classes is not None:
            # one stream of each class
            order, pieces = np.argsort(labels, kind="stable"), np.split(tokens, np.cumsum(lengths)[:-1])
            tokens = np.concatenate([pieces[number] for number in order])
        self.tokens = tokens
        self.labels = np.unique(labels)
        self.sizes = np.asarray([lengths[labels == label].sum() for label in self.labels])
        self.begins = np.cumsum(self.sizes) - self.sizes
        self.counts = self.sizes // self.length
        if not self.counts.all():
            short = [f"{size:,}" for size in self.sizes[self.counts == 0]]
            which = "" if self.num_classes is None else " of some of the classes"
            raise ValueError(
                f"length {self.length:,} is longer than {self.name}, which has {few(short)} tokens{which}: pass a "
                f"shorter length"
            )
        self.unused = int((self.sizes - self.counts * self.length).sum())
        # the streams take turns, so that the first sequences, which are measured, are of all classes
        streams = np.repeat(np.arange(len(self.counts)), self.counts)
        within = np.concatenate([np.arange(count) for count in self.counts])
        order = np.argsort((within + 0.5) / self.counts[streams], kind="stable")
        self.streams, self.within = streams[order], within[order]

    def fill(self, config, tokens, lengths, labels):
        long = lengths > self.length
        self.too_long = int(long.sum())
        if self.too_long and config.long_texts == "refuse":
            raise ValueError(
                f"{self.name}: {self.too_long:,} of {len(lengths):,} texts are longer than length {self.length}, the "
                f"longest {lengths.max():,} tokens: pass a greater length, or --long_texts cut or leave_out"
            )
        if self.end is None and (lengths < self.length).any():
            raise ValueError(
                f"{self.name}: {int((lengths < self.length).sum()):,} texts are shorter than length {self.length}, and "
                f"the tokenizer has no end mark to fill them up with: take one that has (an eos_token), or packing"
            )
        kept = np.full(len(lengths), True) if config.long_texts == "cut" else ~long
        if not kept.any():
            raise ValueError(f"{self.name}: all texts are longer than length {self.length}: pass a greater one")
        # of every token: its place in its text
        places = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens = tokens[np.repeat(kept, lengths) & (places < self.length)]
        lengths, self.labels = lengths[kept].clip(max=self.length), labels[kept]
        # an end mark counts where there is room for one
        self.count, self.rows = int((lengths + 1).clip(max=self.length).sum()), len(lengths)
        self.count_classes(self.labels)
        places = np.arange(self.length)
        # what is behind an empty text, so far behind each text
        filling = filled_up([], self.length, self.tokenizer) if self.end is not None else self.length * [0]
        self.tokens = np.asarray(filling, dtype=tokens.dtype)[(places - lengths[:, None]).clip(min=0)]
        self.tokens[places < lengths[:, None]] = tokens

    def __len__(self):
        return int(self.counts.sum()) if self.packing else len(self.tokens)

    def __getitem__(self, row):
        if row >= len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.__getitems__([row])[0]

    def __getitems__(self, keys):
        """Items for the keys of a `GlobalBatchSampler`."""
        epochs, rows = np.divmod(np.asarray(keys), len(self))
        if self.packing:
            stream = self.streams[rows]
            begins = self.within[rows] * self.length + self.shifts(epochs, stream)
            # around the end of a stream it goes on at its beginning
            places = (begins[:, None] + np.arange(self.length)) % self.sizes[stream][:, None]
            tokens, labels = self.tokens[self.begins[stream][:, None] + places], self.labels[stream]
        else:
            tokens, labels = self.tokens[rows], self.labels[rows]
        tokens = torch.from_numpy(tokens.astype(np.int64))
        labels = [None] * len(tokens) if self.num_classes is None else labels
        return [as_item(each, label) for each, label in zip(tokens, labels, strict=True)]

    def shifts(self, epochs, streams):
        """Where the first sequence of each stream begins in each epoch."""
        if self.shift_seed is None:
            return np.zeros(len(epochs), dtype=np.int64)
        drawn = {
            epoch: np.random.default_rng(mix_seeds(self.shift_seed, epoch)).integers(self.sizes)
            for epoch in np.unique(epochs).tolist()
        }
        return np.asarray([drawn[epoch][stream] for epoch, stream in zip(epochs.tolist(), streams, strict=True)])

    def counted(self, tokens):
        """How many tokens of sequences (B, L) count, (B,): of packed ones all, of others those up to the first end
        mark, with it."""
        if self.packing or self.end is None:
            return torch.full((len(tokens),), self.length)
        return ((tokens == self.end).cumsum(1).clamp_max(1) == 0).sum(1).add(1).clamp_max(self.length)

    def characters_of(self, tokens):
        """How many characters the texts of sequences (B, L) have, (B,), float64: of packed ones, whose ends part words,
        their share of all."""
        if self.packing:
            return torch.full((len(tokens),), self.length * self.texts.characters / self.count, dtype=torch.float64)
        kept = [row[:count] for row, count in zip(tokens.tolist(), self.counted(tokens).tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return torch.tensor([len(text) for text in texts], dtype=torch.float64)

    def row_facts(self):
        """What the texts are, for training.json."""
        return {
            "rows": self.rows,
            "class_counts": self.class_counts,
            "skipped_files": sum(map(len, self.texts.origin.left_out.values())),
            "empty_texts": self.texts.empty,
            "long_texts": self.too_long,
            "characters": self.texts.characters,
            "tokens": self.count,
            "sequences": len(self),
            "vocab_size": self.vocab_size,
        }

    def describe(self):
        """One line that says what the texts are."""
        facts, left = self.row_facts(), self.texts.origin.left_out
        parts = [
            f"{self.name}: {facts['rows']:,} {'documents' if self.packing else 'texts'} of {facts['characters']:,} "
            f"characters, {facts['tokens']:,} tokens of {self.vocab_size} different ones, {len(self):,} sequences of "
            f"{self.length}"
        ]
        if self.texts.empty:
            parts.append(f"{self.texts.empty:,} empty texts left out")
        if self.too_long:
            parts.append(f"{self.too_long:,} that are longer cut off or left out (--long_texts)")
        if self.unused:
            parts.append(f"{self.unused:,} tokens fill no sequence in an epoch")
        if self.id2label is not None:
            counts = [f"{name} {count:,}" for name, count in self.class_counts.items()]
            parts.append(f"{len(counts)} classes: {few(counts, 20)}")
        parts += [f"left out: {few(names)} ({reason})" for reason, names in left.items()]
        return "; ".join(parts)

    def fingerprint(self):
        """What tells these tokens from others, here and on another machine."""
        layout = [self.packing, self.length, self.end, self.labels.tolist()]
        return {
            "classes": None if self.id2label is None else list(self.id2label.values()),
            "rows": hash_of(
                [hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest(), str(self.tokens.dtype), layout]
            ),
        }


class TextData:
    """The data of a `TextDataConfig`: tokenizer, classes and sequences.

    Args:
        tokenizer: that of the pipeline that training starts from, None for that of the config.

    Attributes: `tokenizer`; `classes`, None without; `dataset`, a `TokenDataset` or a `TokenStream`.
    """

    def __init__(self, config, accelerator, tokenizer=None):
        self.config = config
        with accelerator.main_process_first():
            texts = None if config.streaming else Texts(config)
            self.tokenizer = tokenizer or open_tokenizer(config.tokenizer, texts, config.vocab_size)
            if tokenizer is not None and "tokenizer" in config.given:
                other = open_tokenizer(config.tokenizer, texts, config.vocab_size)
                if tokenizer_hash(other) != tokenizer_hash(tokenizer):
                    raise ValueError(
                        f"tokenizer {config.tokenizer!r}, of {len(other)} tokens, is another one than that of "
                        f"{config.init_from!r}, of {len(tokenizer)}, which its network knows: leave it out"
                    )
            if config.streaming:
                self.dataset = TokenStream(config, self.tokenizer)
                self.classes = self.dataset.classes
            else:
                self.classes = None
                if config.label_column is not None:
                    self.classes = TextClasses(config.label_column, texts.labels, texts.feature, config.label_bins)
                self.dataset = TokenDataset(config, texts, self.tokenizer, self.classes, config.seed)
        accelerator.print(self.dataset.describe())

    def split(self, name):
        """The sequences of another split, in the same classes."""
        return TokenDataset(self.config, Texts(self.config, name), self.tokenizer, self.classes)

    def fingerprint(self):
        return self.dataset.fingerprint() | {"tokenizer": tokenizer_hash(self.tokenizer)}
