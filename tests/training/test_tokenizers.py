"""Tokenizers that are made from the data."""

import os

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from score_sde.training import tokenizer as command
from score_sde.training.parts.tokenizers import END, make_tokenizer


TEXTS = [
    "To be, or not to be: 's n't .\n\tthat is the question. " * 8,
    "C#N c1ccc<e>nd (C=O)",
    "  two  spaces \r\n\n",
    "\0",
    "",
]
STRANGE = [
    "naïve café",
    "日本語 \N{GRINNING FACE}",
    "e\N{COMBINING ACUTE ACCENT}",
    "\N{NO-BREAK SPACE}\N{ZERO WIDTH SPACE}",
]
KINDS = {"bytes": {}, "characters": {}, "bpe": {"vocab_size": 270}}


@pytest.fixture(params=[(kind, end_mark) for kind in KINDS for end_mark in (False, True)], ids=str)
def made(request):
    kind, end_mark = request.param
    return kind, end_mark, make_tokenizer(kind, TEXTS + STRANGE, end_mark=end_mark, **KINDS[kind])


@pytest.mark.parametrize("opener", [None, AutoTokenizer, PreTrainedTokenizerFast])
def test_what_is_decoded_is_the_text(made, opener, tmp_path):
    kind, end_mark, tokenizer = made
    if opener:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = opener.from_pretrained(tmp_path)
    # the end mark, written out, is five letters
    for text in [*TEXTS, *STRANGE, END, f"a{END}", " ", "\n", " 's n't ., ."]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
        assert all(0 <= number < len(tokenizer) - end_mark for number in ids)
        if kind != "bpe":
            assert len(ids) == len(text.encode() if kind == "bytes" else text)


def test_every_token_is_one_of_the_vocabulary(made):
    kind, end_mark, tokenizer = made
    characters = len(set("".join(TEXTS + STRANGE)))
    assert len(tokenizer) == {"bytes": 256 + end_mark, "characters": characters + end_mark, "bpe": 270}[kind]
    assert sorted(tokenizer.get_vocab().values()) == [*range(len(tokenizer))]
    last = len(tokenizer) - 1 if end_mark else None
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == last
    if end_mark:
        padded = tokenizer(["be", ""], padding="max_length", max_length=4).input_ids
        assert padded[1] == [last] * 4 and tokenizer.decode(padded[0], skip_special_tokens=True) == "be"


def test_the_number_of_a_byte_is_its_value():
    tokenizer = make_tokenizer("bytes")
    assert tokenizer("é\n").input_ids == [*"é\n".encode()]
    assert [bytes(tokenizer(chr(code)).input_ids) for code in range(128)] == [bytes([code]) for code in range(128)]
    # half a character is shown as none
    assert tokenizer.decode([65, 0xC3]) == "A\N{REPLACEMENT CHARACTER}"


def test_the_numbers_of_characters_are_in_their_order():
    tokenizer = make_tokenizer("characters", ["cab", "a b"], end_mark=True)
    assert tokenizer("a cb").input_ids == [1, 0, 3, 2] and len(tokenizer) == 5
    with pytest.raises(Exception, match="Missing"):
        tokenizer("d")


def test_byte_pairs_are_those_of_the_texts():
    tokenizer = make_tokenizer("bpe", ["ab ab ab abc"], vocab_size=258)
    assert len(tokenizer("ab").input_ids) == 1 and len(tokenizer("ba").input_ids) == 2


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("letters", {}, "tokenizer 'letters' is unknown; choose one of bytes, characters, bpe"),
        ("bytes", {"vocab_size": 300}, "vocab_size 300: a tokenizer of bytes has 256"),
        ("bpe", {}, "vocab_size None: a tokenizer of byte pairs needs"),
        ("bpe", {"vocab_size": 257, "end_mark": True}, "at least 258"),
        ("bpe", {"vocab_size": 10_000}, "pairs for .* tokens alone: take fewer, or more text"),
        ("characters", {"texts": ["", ""]}, "there is no text"),
        ("characters", {"texts": []}, "there is no text"),
        ("characters", {"texts": ["abc"], "vocab_size": 3, "end_mark": True}, "3 different characters, more than 2"),
        ("characters", {"texts": [chr(0x4E00 + i) for i in range(1001)]}, "1,001 different .* more than 1,000"),
    ],
)
def test_what_cannot_be_made_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer(kind, **{"texts": TEXTS} | options)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def molecules(tmp_path):
    Dataset.from_dict({"smiles": ["CCO", "c1ccccc1", ""], "qed": [0.1, 0.2, 0.3]}).to_parquet(tmp_path / "qm.parquet")
    (tmp_path / "poem.txt").write_text("ab\nba\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        (["characters", "qm.parquet", "--text_column", "smiles"], [*"1COc", END]),
        (["characters", "poem.txt", "--no_end"], ["\n", "a", "b"]),
        (["characters", "poem.txt", "--no_end", "--lines"], ["a", "b"]),
    ],
)
def test_the_command_makes_a_folder_that_opens(molecules, monkeypatch, arguments, tokens, capsys):
    monkeypatch.chdir(molecules)
    command.main([arguments[0], arguments[1], "made", *arguments[2:]])
    tokenizer = AutoTokenizer.from_pretrained("made")
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == tokens
    assert f"{len(tokens)} tokens, {END if END in tokens else 'no end mark'}, of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["characters", "qm.parquet", "made"], "has no column 'text'; it has smiles, qed"),
        (["characters", "qm.parquet", "made", "--text_column", "qed"], "column 'qed' must hold texts"),
        (["characters", "empty.txt", "made"], "empty"),
        (["characters", "none.txt", "made"], "the file 'none.txt' does not exist"),
        (["characters", "poem.txt", "made", "--vocab_size", "2"], "3 different characters, more than 1"),
        (["bpe", "poem.txt", "made"], "a tokenizer of byte pairs needs the number of its tokens"),
        (["letters", "poem.txt", "made"], "invalid choice: 'letters'"),
        (["bytes", "poem.txt", "."], "folder '.' exists"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(molecules, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(molecules)
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not os.path.exists("made")
