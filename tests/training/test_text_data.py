"""Texts: where they are read from, how they are packed, their classes, and what is refused."""

import json

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from score_sde.training.parts.batches import GlobalBatchSampler
from score_sde.training.parts.text_data import TextData, TextDataConfig
from score_sde.training.parts.tokenizers import make_tokenizer


DOCUMENTS = ["the cat", "a dog sat", "", "the end of it all", "so"]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"text": text, "kind": "ab"[i % 2], "number": i / 3} for i, text in enumerate(DOCUMENTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_of(dataset, **options):
    config = TextDataConfig(dataset=str(dataset), **({"length": 4} | options))
    assert list(config.problems()) == []
    config.seed = 3
    return TextData(config, Accelerator(cpu=True))


def texts_of(data, rows, epoch=0):
    """What sequences hold as text, each end mark as |."""
    items = data.dataset.__getitems__([epoch * len(data.dataset) + row for row in rows])
    return ["".join(data.tokenizer.convert_ids_to_tokens(item["tokens"])).replace("<end>", "|") for item in items]


def test_packed_sequences_are_the_documents_one_after_the_other_with_an_end_mark_behind_each(jsonl):
    data = data_of(jsonl)
    stream = "".join(f"{text}|" for text in DOCUMENTS if text)
    data.dataset.shift_seed = None
    assert "".join(texts_of(data, range(len(data.dataset)))) == stream[: len(stream) // 4 * 4]
    assert (data.dataset.texts.empty, data.dataset.unused) == (1, len(stream) % 4)
    assert data.dataset.row_facts()["tokens"] == len(stream)
    assert "4 documents of 35 characters, 39 tokens of 15 different ones, 9 sequences of 4; 1 empty texts" in (
        data.dataset.describe()
    )


def test_every_epoch_is_cut_elsewhere_and_has_no_token_twice(tmp_path):
    text = "".join(chr(200 + i) for i in range(50))
    (tmp_path / "train.txt").write_text(text)
    data, cuts = data_of(tmp_path / "train.txt"), set()
    for epoch in range(8):
        found = "".join(texts_of(data, range(len(data.dataset)), epoch))
        assert len(found) == 48 == len(set(found))
        begin = (text + "|").index(found[0])
        assert found == ((text + "|") * 2)[begin : begin + 48]
        cuts.add(begin)
    assert len(cuts) > 3
    assert texts_of(data, [3], 2) == texts_of(data_of(tmp_path / "train.txt"), [3], 2)


def test_a_row_is_a_sequence_that_end_marks_fill_up(jsonl):
    data = data_of(jsonl, packing=False, length=18)
    assert texts_of(data, range(4)) == [text + "|" * (18 - len(text)) for text in DOCUMENTS if text]
    tokens = torch.stack([data.dataset[i]["tokens"] for i in range(4)])
    assert data.dataset.counted(tokens).tolist() == [8, 10, 18, 3]
    assert data.dataset.characters_of(tokens).tolist() == [7, 9, 17, 2]
    whole = data_of(jsonl, packing=False, length=17)
    assert texts_of(whole, [2]) == ["the end of it all"]  # no room for an end mark
    assert whole.dataset.counted(whole.dataset[2]["tokens"][None]).tolist() == [17]
    assert whole.dataset.row_facts()["tokens"] == 8 + 10 + 17 + 3


def test_texts_that_are_too_long_are_refused_cut_or_left_out(jsonl):
    with pytest.raises(
        ValueError, match="2 of 4 texts are longer than length 8, the longest 17 tokens: .*--long_texts"
    ):
        data_of(jsonl, packing=False, length=8)
    data = data_of(jsonl, packing=False, length=8, long_texts="cut")
    assert texts_of(data, range(4)) == ["the cat|", "a dog sa", "the end ", "so||||||"]
    data = data_of(jsonl, packing=False, length=8, long_texts="leave_out")
    assert texts_of(data, range(2)) == ["the cat|", "so||||||"]
    assert (len(data.dataset), data.dataset.row_facts()["long_texts"]) == (2, 2)


def test_sequences_of_classes_hold_one_class_each(jsonl):
    data = data_of(jsonl, label_column="kind", length=3)
    data.dataset.shift_seed = None
    assert data.dataset.id2label == {0: "a", 1: "b"}
    assert data.dataset.class_counts == {"a": 2, "b": 2}
    labels = [data.dataset[i]["labels"] for i in range(len(data.dataset))]
    streams = ["".join(np.asarray(texts_of(data, np.flatnonzero(np.equal(labels, label))))) for label in (0, 1)]
    assert streams[0] == "the cat|so|"[:9]
    assert streams[1] == "a dog sat|the end of it all|"[:27]


def test_the_first_sequences_are_of_all_classes_as_the_whole_is(tmp_path):
    texts, kinds = ["aaaa" * 30, "bb" * 30, "cccc"], ["x", "y", "z"]
    datasets.Dataset.from_dict({"text": texts, "kind": kinds}).to_parquet(tmp_path / "train.parquet")
    data = data_of(tmp_path / "train.parquet", label_column="kind").dataset
    labels = np.asarray([data[i]["labels"] for i in range(len(data))])
    assert np.bincount(labels).tolist() == [30, 15, 1]
    for count in (6, 15, 30):
        assert np.allclose(np.bincount(labels[:count], minlength=3)[:2] / count, [2 / 3, 1 / 3], atol=1 / count)


def test_bins_of_numbers_are_of_equal_size_and_the_same_for_held_out_rows(tmp_path):
    numbers = np.random.default_rng(0).permutation(100) / 10
    for split, values in (("train", numbers), ("test", [-5.0, 2.4, 2.6, 99.0])):
        datasets.Dataset.from_dict({"text": ["ab"] * len(values), "x": values}).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    data = data_of(tmp_path / "{split}.parquet", label_column="x", label_bins=4, packing=False)
    assert list(data.dataset.class_counts.values()) == [25, 25, 25, 25]
    assert data.dataset.id2label[1] == "2.475 to 4.95"
    assert [sum(number >= edge for edge in (2.475, 4.95, 7.425)) for number in numbers.tolist()] == [
        data.dataset[i]["labels"] for i in range(100)
    ]
    assert [item["labels"] for item in data.split("test").__getitems__(range(4))] == [0, 0, 1, 3]


@pytest.mark.parametrize("packing", [True, False])
def test_a_text_file_is_a_document_or_a_text_a_line(tmp_path, packing):
    for name in ("train_1.txt", "train_2.txt", "test.txt"):
        (tmp_path / name).write_text(f"in {name[-5]}est\nit says\n")
    data = data_of(tmp_path, packing=packing, length=8)
    assert data.dataset.row_facts()["rows"] == (2 if packing else 4)
    assert len(data.split("test").texts) == (1 if packing else 2)


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"streaming": True, "tokenizer": "bytes"}])
def test_marks_of_the_encoding_and_ends_of_lines_of_windows_are_none_of_the_text(tmp_path, options):
    (tmp_path / "train.txt").write_bytes("\ufeffit is\r\nit\ufeffwas\r\n".encode())
    data = data_of(tmp_path / "train.txt", length=6, **options)
    found = data.dataset.data if data.config.streaming else data.dataset.texts.data
    text = "\n".join(row["text"] for row in found).removesuffix("\n")
    assert text == "it is\nit\ufeffwas"  # one inside of a text stays


def test_tokenizers_that_differ_in_what_they_are_told_keep_other_tokens(jsonl, tmp_path):
    jsonl.write_text('{"text": "an <end> in it"}\n')
    counts, hashes = [], set()
    for split in (True, False):
        tokenizer = make_tokenizer("bytes", end_mark=True)
        tokenizer.split_special_tokens = split
        tokenizer.save_pretrained(tmp_path / str(split))
        data = data_of(jsonl, tokenizer=str(tmp_path / str(split)))
        counts.append(data.dataset.row_facts()["tokens"])
        hashes.add(data.fingerprint()["tokenizer"])
    assert counts == [15, 11] and len(hashes) == 2


def test_the_tokens_are_kept_in_two_bytes_and_are_the_same_by_any_tokenizer(jsonl, tmp_path):
    made = data_of(jsonl)
    made.tokenizer.save_pretrained(tmp_path / "tokenizer")
    opened = data_of(jsonl, tokenizer=str(tmp_path / "tokenizer"))
    assert made.fingerprint() == opened.fingerprint()
    assert made.dataset.tokens.dtype == np.int16
    bytes_of = data_of(jsonl, tokenizer="bytes")
    bytes_of.dataset.shift_seed = None
    assert len(bytes_of.tokenizer) == 257
    assert bytes(bytes_of.dataset[0]["tokens"].tolist()).decode() == "the "
    assert bytes_of.fingerprint() != made.fingerprint()
    assert data_of(jsonl, length=5).fingerprint() != made.fingerprint()


def test_the_order_depends_on_the_seed_and_the_position_alone(jsonl):
    data = data_of(jsonl)
    sampler = iter(GlobalBatchSampler(len(data.dataset), 4, 3, 0, 1))
    whole = [item["tokens"] for _ in range(6) for item in data.dataset.__getitems__(next(sampler))]
    sampler = iter(GlobalBatchSampler(len(data.dataset), 4, 3, 0, 1, images_seen=12))
    later = [item["tokens"] for _ in range(3) for item in data.dataset.__getitems__(next(sampler))]
    assert torch.equal(torch.stack(whole[12:]), torch.stack(later))


def test_what_is_no_data_is_refused_by_name(jsonl, tmp_path):
    letters = make_tokenizer("characters", ["abc defghi"], end_mark=True)
    letters.save_pretrained(tmp_path / "letters")
    endless = make_tokenizer("characters", DOCUMENTS)
    endless.save_pretrained(tmp_path / "endless")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n{"text": null}\n{"text": ""}\n')
    (tmp_path / "other.csv").write_text("a\n")
    (tmp_path / "latin.txt").write_text("caf\u00e9", encoding="latin-1")
    for dataset, options, message in [
        (jsonl, {"text_column": "words"}, "has no column 'words'; it has text, kind, number: name its text column"),
        (jsonl, {"label_column": "sort"}, "has no column 'sort'; .*name its label column by --label_column"),
        (jsonl, {"text_column": "number"}, "column 'number' must hold texts, not Value"),
        (jsonl, {"label_column": "number"}, "must hold whole numbers from 0, or names; .*--label_bins"),
        (jsonl, {"label_column": "kind", "label_bins": 2}, "label_bins 2: column 'kind' must hold finite numbers"),
        (
            jsonl,
            {"label_column": "number", "label_bins": 9},
            "label_bins 9: column .* has so few different values",
        ),
        (jsonl, {"length": 40}, "length 40 is longer than dataset .*, which has 39 tokens: pass a shorter length"),
        (
            jsonl,
            {"tokenizer": str(tmp_path / "letters")},
            "the tokenizer lacks 5 of its characters: 'l' 2 times, 'n' 1",
        ),
        (jsonl, {"tokenizer": str(tmp_path / "none")}, "tokenizer '.*none' cannot be opened: .*characters or"),
        (
            jsonl,
            {"tokenizer": str(tmp_path / "endless"), "packing": False, "length": 17},
            "3 texts are shorter than length 17, and the tokenizer has no end mark",
        ),
        (empty, {}, "all of its 3 texts are empty"),
        (tmp_path / "nothing.txt", {}, "nothing.txt' does not exist"),
        (tmp_path / "latin.txt", {}, "cannot be opened: its files must be written in UTF-8: .*0xe9"),
        (tmp_path / "letters", {}, "the folder holds no .parquet or .jsonl or .txt files, but .json"),
    ]:
        with pytest.raises(ValueError, match=message):
            data_of(dataset, **options)


def test_a_class_that_was_not_trained_on_is_refused(tmp_path):
    for split, kinds in (("train", "ab"), ("test", "ac")):
        rows = {"text": ["some"] * 2, "kind": list(kinds)}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
    data = data_of(tmp_path / "{split}.parquet", label_column="kind")
    with pytest.raises(
        ValueError, match="label column 'kind': 1 rows are of no class that was trained on, such as 'c'"
    ):
        data.split("test")


def test_options_that_contradict_are_refused():
    for options, message in [
        ({"length": 1}, "length 1 must be at least 2 tokens"),
        ({"label_bins": 3}, "label_bins need label_column"),
        ({"label_column": "x", "label_bins": 1}, "label_bins 1 must be at least 2, or 0"),
        (
            {"packing": False, "long_texts": "drop"},
            "long_texts 'drop' is unknown; choose one of refuse, cut, leave_out",
        ),
        ({"long_texts": "cut"}, "with packing no text is too long"),
        ({"tokenizer": "bpe"}, "vocab_size None: tokenizer bpe needs it"),
        ({"vocab_size": 300}, "vocab_size 300: tokenizer bpe needs it, and no other has it"),
    ]:
        [problem] = TextDataConfig(**options).problems()
        assert message in problem
