"""Texts as they come: the sequences of a stream, where it goes on, and what it cannot be."""

import itertools
import json
import re

import datasets
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_text_data import data_of
from test_text_runs import SETTINGS, WEIGHTS
from words import WORDS, tiny_tokenizer

from runs import equal, run
from score_sde.training import evaluate, train
from score_sde.training.parts import text_stream
from score_sde.training.parts.batches import training_batches
from score_sde.training.parts.options import parse
from score_sde.training.parts.sources import Origin
from score_sde.training.parts.text_data import TextData, TextDataConfig
from score_sde.training.parts.tokenizers import make_tokenizer
from score_sde.training.train import TrainConfig


DOCUMENTS = ["the cat", "a dog sat", "", "the end of it all", "so", "it ends"]


@pytest.fixture
def files(tmp_path):
    """The pattern of two files of texts. (Streams of parquet files sleep for seconds when they are closed.)"""
    for number in range(2):
        rows = "".join(json.dumps({"text": row}) + "\n" for row in DOCUMENTS[3 * number :][:3])
        (tmp_path / f"train-{number}.jsonl").write_text(rows)
        (tmp_path / f"test-{number}.jsonl").write_text(rows)
    return tmp_path / "{split}-*.jsonl"


def stream(files, **options):
    settings = {"length": 8, "streaming": True, "tokenizer": "bytes", "shuffle_buffer": 3, "batch_size": 2}
    batch_size = settings.pop("batch_size")
    config = TextDataConfig(dataset=str(files), **(settings | options))
    assert list(config.problems()) == []
    config.seed, config.batch_size = 3, batch_size
    return TextData(config, Accelerator(cpu=True))


def taken(data, count):
    return list(itertools.islice(data.dataset, count))


def spelled(data, items):
    end = data.tokenizer.eos_token_id
    return ["".join("|" if token == end else chr(token) for token in item["tokens"].tolist()) for item in items]


def test_packed_sequences_are_all_documents_one_after_the_other_and_what_is_left_begins_the_next_pass(files):
    data = stream(files, shuffle_buffer=1, length=9)
    whole = "".join(spelled(data, taken(data, 12)))
    documents = [each for each in DOCUMENTS if each]
    size = sum(len(each) + 1 for each in documents)
    passes = [whole[:size], whole[size : 2 * size]]
    assert 2 * size <= len(whole)
    assert [sorted(each.split("|")[:-1]) for each in passes] == [sorted(documents)] * 2


def test_rows_are_sequences_of_their_own_in_another_order_every_pass(files):
    data, rows = stream(files, packing=False, length=20), [each for each in DOCUMENTS if each]
    found = spelled(data, taken(data, 60))
    assert {each.rstrip("|") for each in found} == set(rows) and all(each[len(each.rstrip("|")) :] for each in found)
    assert max(found.count(each) for each in set(found)) - min(found.count(each) for each in set(found)) <= 2
    assert len({tuple(found[i : i + 5]) for i in range(0, 60, 5)}) > 6
    cut = stream(files, packing=False, length=4, long_texts="cut")
    assert {each.rstrip("|") for each in spelled(cut, taken(cut, 40))} == {each[:4] for each in rows}
    short = stream(files, packing=False, length=7, long_texts="leave_out")
    assert {each.rstrip("|") for each in spelled(short, taken(short, 40))} == {"the cat", "so", "it ends"}


def test_sequences_of_a_class_are_of_its_texts_alone(monkeypatch):
    def rows(numbers):
        for number in numbers:
            yield {"text": DOCUMENTS[number], "kind": len(DOCUMENTS[number]) % 2}

    features = datasets.Features({"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["a", "b"])})
    numbers = {"numbers": list(range(len(DOCUMENTS)))}
    data = datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs=numbers)
    monkeypatch.setattr(text_stream, "open_texts", lambda *_, **__: (data, Origin()))
    data = stream("a dataset", label_column="kind", length=6)
    assert data.classes.id2label == {0: "a", 1: "b"}
    items = taken(data, 40)
    for item, text in zip(items, spelled(data, items), strict=True):
        own = [each for each in DOCUMENTS if each and len(each) % 2 == item["labels"]]
        assert all(any(part in each for each in own) for part in text.split("|")), text
    assert {item["labels"] for item in items} == {0, 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_exactly_where_it_was(files, workers):
    def batches(count, seen=0, rank=0, world_size=1):
        data = stream(files)
        config, accelerator = data.config, Accelerator(cpu=True)
        config.num_workers, config.batch_size, config.gradient_accumulation_steps = workers, 2, 1
        place = type("Place", (), {"process_index": rank, "num_processes": world_size, "device": accelerator.device})
        loader = training_batches(data.dataset, config, place, {"images_seen": 2 * seen * world_size})
        return [each["tokens"] for each in itertools.islice(loader, count)]

    whole = batches(9)
    for seen in (1, 4):
        assert all(torch.equal(*pair) for pair in zip(batches(9 - seen, seen), whole[seen:], strict=True))
    # two processes read other parts
    parts = [torch.cat(batches(4, rank=rank, world_size=2)) for rank in range(2)]
    assert not torch.equal(*parts)


def test_training_on_a_stream_resumes_bit_for_bit_and_is_measured(files, tmp_path):
    options = [*SETTINGS, "--dataset", files, "--streaming", "--tokenizer", "bytes", "--shuffle_buffer", 3]
    options += ["--checkpointing_steps", 2, "--evaluation_steps", 2]
    options += ["--evaluation_split", "test", "--length", 4]
    more = ["--max_train_steps", 4]
    run(train.main, *options, *more, "--output_dir", tmp_path / "whole")
    run(train.main, *options, "--output_dir", tmp_path / "parts")
    run(train.main, *options, *more, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest")
    assert equal(*(load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts")))
    folder = tmp_path / "parts" / "pipeline"
    facts = json.loads((folder / "training.json").read_text())
    assert (facts["rows"], facts["images_seen"], facts["vocab_size"]) == (None, 16, 257)
    with pytest.raises(ValueError, match="a stream goes on only as it was begun, with .*'batch_size': 4"):
        run(
            train.main,
            *[*options, *more, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"],
            *["--batch_size", 2, "--max_train_steps", 6],
        )
    run(evaluate.main, "--pipeline", folder, "--likelihood", 4, "--num_texts", 0, "--num_times", 1)
    assert "bits/character" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("column", "was", "other"), [("label", "kind", "sort"), ("text", "text", "title")])
def test_another_column_of_a_stream_is_other_data(tmp_path, monkeypatch, column, was, other):
    """Of the same classes, so that nothing but its name tells it from the one before."""
    kinds = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({each: datasets.Value("string") for each in ("text", "title")})
    features |= dict.fromkeys(("kind", "sort"), kinds)
    rows = {"text": ["abcdefgh"] * 4, "title": ["hgfedcba"] * 4, "kind": [0, 1, 0, 1], "sort": [1, 1, 0, 0]}
    data = datasets.Dataset.from_dict(rows, datasets.Features(features)).to_iterable_dataset()
    monkeypatch.setattr(text_stream, "open_texts", lambda *_, **__: (data, Origin(sizes={"train.jsonl": 9})))
    options = [*SETTINGS, "--dataset", "rows", "--streaming", "--shuffle_buffer", 3, "--tokenizer", "bytes"]
    options += ["--label_column", "kind", "--checkpointing_steps", 1, "--output_dir", tmp_path]
    run(train.main, *options, "--max_train_steps", 1)
    options += ["--max_train_steps", 2, "--resume_from_checkpoint", "latest", f"--{column}_column", other]
    with pytest.raises(ValueError, match=f"trained on other data: .*{column}_column was '{was}', is '{other}'"):
        run(train.main, *options)
    run(train.main, *options, "--allow_other_data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "tokenizer 'characters' is made of all texts, which a stream doesn't know: pass bytes, or the folder"),
        (["--tokenizer", "bpe", "--vocab_size", 300], "tokenizer 'bpe' is made of all texts"),
        (["--label_column", "kind", "--label_bins", 2], "label_bins 2 part the numbers of all rows"),
        (["--shuffle_buffer", 0], "shuffle_buffer 0 must be at least 1"),
        (["--streaming", "false", "--shuffle_buffer", 5], "shuffle_buffer is of a stream"),
    ],
)
def test_options_that_a_stream_has_not_are_refused(files, options, message, capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, [*map(str, ["--data_kind", "text", "--dataset", files, "--streaming", *options])])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            ["ab"],
            {"text_column": "words"},
            "has no column 'words'; it has text, kind: name its text column by --text_column",
        ),
        (["ab"], {"label_column": "kind"}, "doesn't say which classes its column 'kind' has.*: leave streaming out"),
        (["a" * 30], {"packing": False}, "row 0 of the stream .* has 30 tokens, more than length 8"),
        (80 * ["ab"] + ["a" * 30], {"packing": False}, "row [678]\\d of pass 0 .* has 30 tokens, more than length 8"),
        (["a" * 30], {"packing": False, "long_texts": "leave_out"}, "found no text of at most 8 tokens in dataset"),
        (["", None], {}, "dataset '.*', split 'train': all of its texts are empty"),
        (
            ["ab", "\u00e9"],
            {"tokenizer": "letters"},
            "row [01] of the stream .*: the tokenizer lacks '\u00e9': take",
        ),
        ([1, 2], {}, "column 'text' must hold texts, not Value\\('int64'\\)"),
    ],
)
def test_rows_that_cannot_be_are_named(rows, options, message, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": row, "kind": "a"}) + "\n" for row in rows))
    if options.get("tokenizer") == "letters":
        make_tokenizer("characters", ["abc"], end_mark=True).save_pretrained(tmp_path / "letters")
        options = {"tokenizer": str(tmp_path / "letters")}
    with pytest.raises(ValueError) as error:
        taken(stream(path, **options), 100)
    assert re.search(message, str(error.value)), error.value


def test_words_that_are_unknown_are_named_and_known_words_need_no_letters(tmp_path):
    tiny_tokenizer(special=False).save_pretrained(tmp_path / "words")
    options = {"tokenizer": str(tmp_path / "words"), "packing": False}
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a red hat"}\n')
    expected = [4, 7, WORDS.split().index("hat") + 4, 3, 0, 0, 0, 0]
    assert next(iter(stream(path, **options).dataset))["tokens"].tolist() == expected
    assert data_of(path, length=8, **options).dataset[0]["tokens"].tolist() == expected
    path.write_text('{"text": "a red hat"}\n{"text": "a redhat with dots"}\n')
    with pytest.raises(ValueError, match="row 1 of the stream .*: the tokenizer has no tokens for 'redhat': take"):
        stream(path, **options)
    with pytest.raises(ValueError, match="the tokenizer has no tokens for 1 places, such as 'redhat'. Take another"):
        data_of(path, length=8, **options)
