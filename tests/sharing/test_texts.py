"""Models of texts as bundles: saved, opened with the package and without, on the Hub; their card and facts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import WITHOUT_PACKAGE
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from texts import characters_pipeline, written

from score_sde import DiscreteScoreScheduler, ScoreSDETextPipeline, load_bundle, save_bundle
from score_sde.sharing import info
from score_sde.sharing.hub import verify
from score_sde.sharing.pushed_files import files_to_push


NAMES = {0: "prose", 1: "verse"}
# what a run of training knows
FACTS = {
    **{"data_kind": "text", "dataset": "books", "split": "train", "rows": 3, "characters": 900, "tokens": 903},
    **{"length": 12, "packing": True, "tokenizer": "characters", "images_seen": 100, "vocab_size": 12},
    "samples": {"texts": ["a b\n c", "``` x"], "num_inference_steps": 4, "network_evaluations": 4},
}
METRIC = {
    **{"name": "negative log-likelihood, at most, bits/character", "value": 2.5, "standard_error": 0.01, "n": 10},
    **{"seed": 0, "dataset": "books", "split": "test", "command": "score-sde evaluate", "type": "bits_per_character"},
}


@pytest.fixture(scope="module")
def pipeline():
    return characters_pipeline(num_classes=2, id2label=NAMES)


@pytest.fixture(scope="module")
def bundle(pipeline, tmp_path_factory):
    return Path(save_bundle(pipeline, tmp_path_factory.mktemp("texts") / "bundle", FACTS, [METRIC]))


CALL = {"class_labels": ["verse", "prose"], "prompt": "ab"}


def test_it_opens_with_the_installed_classes(pipeline, bundle):
    expected = written(pipeline, **CALL)
    for opened in (load_bundle(bundle), ScoreSDETextPipeline.from_pretrained(bundle)):
        assert type(opened) is ScoreSDETextPipeline and type(opened.scheduler) is DiscreteScoreScheduler
        opened.set_progress_bar_config(disable=True)
        assert written(opened, **CALL) == expected
        assert opened.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
    # it can be saved again
    again = load_bundle(save_bundle(opened, bundle.parent / "again"))
    again.set_progress_bar_config(disable=True)
    assert written(again, **CALL) == expected


LOAD = f"""{WITHOUT_PACKAGE}
import tempfile
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
arguments = dict(batch_size=2, num_inference_steps=4) | json.loads(sys.argv[2])
texts = pipeline(**arguments, generator=torch.Generator().manual_seed(3)).texts
folder = tempfile.mkdtemp()
pipeline.save_pretrained(folder)
again = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
again.set_progress_bar_config(disable=True)
assert again(**arguments, generator=torch.Generator().manual_seed(3)).texts == texts
print(json.dumps([texts, type(pipeline).__module__.split(".")[0], type(again).__name__]))
"""


def test_it_opens_by_its_own_code_where_the_package_is_not_and_is_saved_again(pipeline, bundle, tmp_path):
    command = [sys.executable, "-c", LOAD, bundle]
    environment = dict(os.environ, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    result = subprocess.run(
        [*map(str, command), json.dumps(CALL)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == [
        written(pipeline, **CALL), "diffusers_modules", "ScoreSDETextPipeline"
    ]  # fmt: skip


PUSH_AND_OPEN = """
import json, sys
import score_sde
from score_sde.sharing.hub import verify
folder, = sys.argv[1:]
address = score_sde.push_to_hub(folder, "me/texts")
opened = score_sde.load_bundle("me/texts")
score_sde.push_to_hub(opened, "me/again")
assert not any("diffusers_modules" in name for name in sys.modules)
print(json.dumps([address, type(opened).__name__, sorted({*verify("me/texts").values()})]))
"""


@pytest.mark.slow
def test_it_goes_to_the_hub_and_comes_back(local_hub, pipeline, bundle, tmp_path):
    result = local_hub.run(PUSH_AND_OPEN, bundle, token="hf_writer")
    assert result.returncode == 0, result.stderr
    address, name, verdicts = json.loads(result.stdout.splitlines()[-1])
    assert address.startswith(f"{local_hub.url}/me/texts/commit/")
    assert name == "ScoreSDETextPipeline" and verdicts == ["same"]
    files = local_hub.files("me/texts")
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "README.md"} <= set(files)
    assert b"me/again" in local_hub.files("me/again")["README.md"]
    result = local_hub.run(LOAD, "me/texts", json.dumps(CALL))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])[0] == written(pipeline, **CALL)


def test_its_code_is_this_release_s(bundle):
    assert {*verify(bundle).values()} == {"same"}
    names = files_to_push(str(bundle))
    assert sum(name.startswith("pipeline_score_sde_text_") for name in names) == 1
    assert any(name.startswith("scheduler/scheduling_discrete_score_") for name in names)
    assert "tokenizer/tokenizer.json" in names


def test_info_says_what_it_is(bundle):
    found = info.describe(bundle)
    assert found["tokens"] == {
        **{"process": "absorbing", "noise": "log_linear", "vocab_size": 12, "length": 12},
        "tokenizer": "characters",
    }
    assert "path" not in found and found["prediction"] == "sample" and set(found["sampler"]) <= {"corrector_steps"}
    text = info.as_text(found)
    for line in (
        "process +absorbing, log_linear noise",
        "vocabulary +12 characters",
        "length +12 tokens",
        "classes +2: prose, verse",
        "training texts +3",
        "tokens seen +1,200",
        "measured +negative .*: 2.5 .standard_error 0.01, n 10",
    ):
        assert re.search(f"^{line}", text, re.MULTILINE), line


@pytest.mark.parametrize(("kind", "words"), [("bytes", "bytes"), ("bpe", "byte pairs")])
def test_info_knows_what_tokens_are(kind, words, tmp_path):
    from score_sde.training.parts.tokenizers import make_tokenizer

    tokenizer = make_tokenizer(kind, ["ab abc abcd " * 9], **({"vocab_size": 260} if kind == "bpe" else {}))
    pipeline = characters_pipeline(tokenizer=tokenizer, process="uniform", noise="cosine")
    found = info.describe(save_bundle(pipeline, tmp_path / "bundle"))["tokens"]
    assert (found["tokenizer"], found["vocab_size"]) == (words, len(tokenizer))
    assert (found["process"], found["noise"]) == ("uniform", "cosine")


def test_the_card_says_what_the_files_know(bundle):
    card = ModelCard.load(bundle / "README.md")
    assert card.data.pipeline_tag == "text-generation" and "discrete-diffusion" in card.data.tags
    assert card.data.eval_results[0].metric_value == 2.5
    text = card.text
    for line in (
        "A class-conditional model of texts by score-based diffusion over tokens: `DiTModel`; `absorbing` process with "
        "`log_linear` noise, the network predicts `sample`.",
        "Texts of 12 tokens, of 12 that there are (characters).",
        "| negative log-likelihood, at most, bits/character | 2.5 ± 0.01 | 10 | books, test |",
        "| training texts | 3 |",
        "| tokens seen | 1,200 |",
        "| sequences seen | 100 |",
        "of the classes prose, verse",
        "Figures of bits are upper bounds",
    ):
        assert line in text, line
    fences = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]
    assert [fence.content for fence in fences[:2]] == ["a b\n c\n", "``` x\n"]
    assert 'texts = pipe(class_labels=["prose", "verse"]' in fences[2].content
    assert "ScoreSDETextPipeline.from_pretrained" in fences[3].content and "image" not in text.replace("images", "")


def test_a_card_without_facts_says_so(tmp_path):
    text = Path(save_bundle(characters_pipeline(), tmp_path / "bundle"), "README.md").read_text()
    assert "An unconditional model of texts" in text and "How good its texts are was not measured." in text
    assert "## Samples" not in text and "## Measured" not in text and "## Training" not in text
    assert "pipe(batch_size=4).texts" in text


def test_a_picture_of_samples_stands_on_the_card(pipeline, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    folder = save_bundle(pipeline, tmp_path / "bundle", FACTS, sample_grid=tmp_path / "grid.png")
    assert "![samples](samples.png)" in Path(folder, "README.md").read_text()
    assert "samples.png" in files_to_push(folder)
