"""Attacks on cards: whatever a field holds, the card has the same parts, and shows the field as text."""

import ast
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from places import ROOT
from texts import characters_pipeline
from tiny import tiny_pipeline

from score_sde import save_bundle
from score_sde.sharing.bundles import add_metrics
from score_sde.sharing.model_card import write_card
from score_sde.training import share_latents


FACTS = ROOT / "model_cards" / "quick_start"
PAYLOADS = [
    "a | b |\n| evil | 1 | 2 | 3 | 4 | 5 | 6 | 7 |",
    "a\\| b \\\\| c \\",
    "cat\n\n## Evil\n\n- item",
    "![x](https://a/x.png) [y](javascript:z) <img src=x onerror=y> <!-- &lt; https://a.b",
    "`a` ``b`` ```\n```python\nimport os\n```",
    "`",
    "**a** _b_ __c__ ~~d~~ $e$ *",
    "{{ 7 * 7 }} {% include 'x' %}",
    "\ud800 \u202eabc\u2066 \x00\x1b[31m \u2028 \x85",
    *("# a", "- a", "+ a", "1. a", "2) a", "> a", "---", "===", "    a", "| a", ": a", "~~~", "```", "<a>", "[a]: b"),
]
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def parts(text):
    """What a Markdown text is made of, with its inline parts, and without what stands in them."""
    tokens = MARKDOWN.parse(text)
    flat = [each for token in tokens for each in (token, *(token.children or ()))]
    return [(token.type, token.tag, len(token.content) if token.type == "fence" else 0) for token in flat]


def shown(text):
    """The words that a reader sees."""
    tokens = [child for token in MARKDOWN.parse(text) for child in token.children or ()]
    return "".join(token.content for token in tokens)


def seen(value):
    """How a value is shown: in one line, without what cannot be written and what turns the direction."""
    line = " ".join(value.encode("utf-8", "replace").decode().split())
    return re.sub("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", line)


def change(folder, name, edit):
    path = folder / name
    value = json.loads(path.read_text()) if path.exists() else {}
    edit(value)
    path.write_text(json.dumps(value))


def metric(key):
    return "metrics.json", lambda value, payload: value[0].update({key: payload})


def fact(*keys):
    def edit(value, payload):
        for key in keys[:-1]:
            value = value.setdefault(key, {})
        value[keys[-1]] = payload

    return "training.json", edit


FIELDS = {
    "a metric's name": metric("name"),
    "its dataset": metric("dataset"),
    "its split": metric("split"),
    "its sampler": metric("sampler"),
    "its explanation": metric("explanation"),
    "its command": metric("command"),
    "its machine": metric("machine"),
    "a class": ("model_index.json", lambda value, payload: value["id2label"].update({"3": payload})),
    "the name": fact("model_name"),
    "the data": fact("dataset"),
    "the machine": fact("machine"),
    "the command": fact("command"),
    "the run": fact("run_id"),
    "the weighting": fact("config", "weighting"),
    "a class that was counted": ("training.json", lambda value, payload: value.update(class_counts={payload: 3})),
    "where it is from": fact("converted_from"),
    "the sampler": ("scheduler/scheduler_config.json", lambda value, payload: value.update(predictor=payload)),
    "the path": ("scheduler/scheduler_config.json", lambda value, payload: value.update(sde_type=payload)),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_shown_and_nothing_else(tmp_path, field):
    name, edit = FIELDS[field]
    folder = Path(shutil.copytree(FACTS, tmp_path / "card"))

    def card_with(value):
        change(folder, name, lambda facts: edit(facts, value))
        write_card(folder)
        _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        return yaml.safe_load(head), text

    head, text = card_with("benign")
    # what begins a line in one place begins none in another
    for payload in PAYLOADS if field in ("a metric's name", "its explanation", "the name", "a class") else PAYLOADS[:9]:
        if "dataset" in field or field == "the data":
            payload = re.sub(r"[/\\]", "", payload)  # of a path, the last part is shown
        found_head, found = card_with(payload)
        assert parts(found) == parts(text), payload
        assert seen(payload) in shown(found), payload
        assert found_head.keys() == head.keys()
        results = found_head["model-index"][0]["results"]
        assert [len(each["metrics"]) for each in results] == [1, 1]


@pytest.mark.parametrize("label", ['"); import os #', "```\n```", "é", "\ud800", "a\\", "\u2028", "\u202e", "'"])
def test_code_on_a_card_is_python_that_says_the_class(tmp_path, label):
    folder = Path(shutil.copytree(FACTS, tmp_path / "card"))
    change(folder, "model_index.json", lambda index: index["id2label"].update({"0": label}))
    write_card(folder)
    blocks = [token.content for token in MARKDOWN.parse((folder / "README.md").read_text()) if token.type == "fence"]
    assert len(blocks) == 2
    _, _, images = ast.parse(blocks[0]).body
    [labels] = [each.value for each in images.value.value.keywords if each.arg == "class_labels"]
    assert ast.literal_eval(labels)[0] == label.encode("utf-8", "replace").decode()
    # a letter stands there as it is
    assert label != "é" or "é" in blocks[0]


@pytest.mark.parametrize("repo_id", ['me/x")\nimport os\n("', "me/x y", "me//x", "path/or/repo", 5, "x" * 10**6])
@pytest.mark.parametrize("given", [True, False])
def test_a_repo_id_that_is_none_is_refused(tmp_path, repo_id, given):
    folder = Path(shutil.copytree(FACTS, tmp_path / "card"))
    if not given:
        change(folder, "training.json", lambda facts: facts.update(repo_id=repo_id))
    with pytest.raises(ValueError, match="repo id .*must be like somebody/model") as error:
        write_card(folder, *[repo_id] * given)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("training.json", "[1]", "training.json: .1. must be a dict"),
        ("training.json", "{", "training.json is no JSON"),
        ("training.json", "[" * 100_000, "training.json is no JSON"),
        ("training.json", '{"config": 5}', "config 5 must be of type dict"),
        ("training.json", '{"rows": "many"}', "rows 'many' must be of type int"),
        ("training.json", '{"samples": true}', "samples True must be of type dict"),
        ("training.json", '{"final_loss": "low"}', "final_loss 'low' must be of type int | float"),
        ("training.json", '{"license": ["mit"]}', "license .'mit'. must be an identifier of the Hub"),
        ("training.json", json.dumps({"rows": "x" * 10**7}), "must be of type int"),
        ("metrics.json", '{"a": 1}', "metrics {'a': 1} must be a list of dicts"),
        ("metrics.json", "[1]", "must be a list of dicts"),
        ("metrics.json", json.dumps([{"name": "x" * 10**7}]), "lacks value, n, seed"),
        ("samplers.json", '{"a": 1}', "samplers.json .* is none of benchmarks/samplers_network.py"),
        ("model_index.json", '{"_class_name": "X\\n# y"}', "names no class"),
        ("model_index.json", '{"_class_name": "X", "transformer": ["a", "`x`"]}', "transformer .* names no class"),
        ("model_index.json", '{"_class_name": "X"}', "names no network"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_facts_of_wrong_kinds_are_named(tmp_path, name, content, message):
    folder = Path(shutil.copytree(FACTS, tmp_path / "card"))
    (folder / name).write_text(content)
    before = (folder / "README.md").read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        write_card(folder)
    assert len(str(error.value)) < 1000
    assert (folder / "README.md").read_bytes() == before and not list(folder.glob(".*"))


def test_a_class_name_that_is_no_text_fails_no_run(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.register_to_config(id2label={"0": "\ud800", "1": os.fsdecode(b"\xff"), "2": "owl"})
    folder = save_bundle(pipeline, tmp_path / "bundle", {"class_counts": {"\ud800": 2}, "dataset": "\udcff"})
    assert "of the classes ?, ?, owl" in Path(folder, "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("payload", PAYLOADS[:8])
def test_the_card_of_latents_likewise(payload):
    facts = {"dataset": "photos", "split": "train", "resolution": 64, "rows": 1000, "num_classes": 2, "vae": "me/vae"}
    facts |= {"vae_fingerprint": "0123", "shape": [4, 8, 8], "shard_size": 2048, "num_shards": 1}
    benign = facts | {"id2label": {"0": "cat"}}
    payload = re.sub(r"[/\\]", "", payload)
    evil = dict.fromkeys(("dataset", "split", "vae", "vae_fingerprint"), payload) | {"id2label": {"0": payload}}
    text = share_latents.latents_card(facts | evil, "me/latents").text
    assert parts(text) == parts(share_latents.latents_card(benign, "me/latents").text)
    assert shown(text).count(seen(payload)) == 7


def test_measurements_at_once_all_arrive(tmp_path):
    folder = Path(shutil.copytree(FACTS, tmp_path / "card"))
    known = json.loads((folder / "metrics.json").read_text())
    errors = []

    def add(number):
        try:
            for i in range(5):
                add_metrics(folder, [known[0] | {"name": f"metric {number} {i}"}])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    names = {metric["name"] for metric in json.loads((folder / "metrics.json").read_text())}
    assert names == {metric["name"] for metric in known} | {f"metric {n} {i}" for n in range(4) for i in range(5)}
    text = (folder / "README.md").read_text()
    assert all(f"| {name} |" in text for name in names)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in FACTS.iterdir())


# --- of texts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory):
    facts = {"data_kind": "text", "dataset": "books", "samples": {"texts": ["benign"], "num_inference_steps": 4}}
    metric = {"name": "bits", "value": 2.0, "n": 9, "seed": 0, "dataset": "books", "split": "test", "command": "m"}
    pipeline = characters_pipeline(num_classes=2, id2label={0: "a", 1: "b"})
    return save_bundle(pipeline, tmp_path_factory.mktemp("texts") / "bundle", facts, [metric])


TEXT_FIELDS = {
    "the tokenizer": fact("tokenizer"),
    "the temperature": fact("samples", "temperature"),
    "the sampler of samples": fact("samples", "predictor"),
    "a standard error": metric("standard_error"),
    "the process": ("scheduler/scheduler_config.json", lambda value, payload: value.update(process=payload)),
    "the noise": ("scheduler/scheduler_config.json", lambda value, payload: value.update(noise=payload)),
    "the vocabulary": ("transformer/config.json", lambda value, payload: value.update(vocab_size=payload)),
    "the length": ("transformer/config.json", lambda value, payload: value.update(sample_size=[payload])),
}


@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_a_field_of_a_card_of_texts_is_shown_and_nothing_else(tmp_path, of_texts, field):
    name, edit = TEXT_FIELDS[field]
    folder = Path(shutil.copytree(of_texts, tmp_path / "card"))

    def card_with(value):
        change(folder, name, lambda facts: edit(facts, value))
        write_card(folder)
        return (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]

    text = card_with("benign")
    for payload in PAYLOADS[:9]:
        found = card_with(payload)
        assert parts(found) == parts(text), payload
        assert seen(payload) in shown(found), payload


@pytest.mark.parametrize("sample", [*PAYLOADS, "```\n# a\n````\n~~~", "a\r\n```\n# Evil", "\n\n```", "````` x"])
def test_a_sample_of_a_card_of_texts_is_one_block_of_code(tmp_path, of_texts, sample):
    folder = Path(shutil.copytree(of_texts, tmp_path / "card"))
    change(folder, "training.json", lambda facts: facts["samples"].update(texts=[sample, "after"]))
    write_card(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    fences = [token for token in MARKDOWN.parse(text.split("---\n", 2)[2]) if token.type == "fence"]
    assert len(fences) == 4 and fences[1].content == "after\n"
    shown_lines = fences[0].content.removesuffix("\n").split("\n")
    assert len(shown_lines) == len(sample.split("\n"))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", fences[0].content)
    words = re.findall(r"[A-Za-z]+", re.sub("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", " ", sample))
    assert all(word in fences[0].content for word in words)


@pytest.mark.parametrize("texts", [5, "abc", {"a": 1}, [["a"]], ["a", None]])
def test_samples_that_are_no_texts_are_named(tmp_path, of_texts, texts):
    folder = Path(shutil.copytree(of_texts, tmp_path / "card"))
    change(folder, "training.json", lambda facts: facts["samples"].update(texts=texts))
    with pytest.raises(ValueError, match="training.json: samples.texts .* must be a list of texts"):
        write_card(folder)
