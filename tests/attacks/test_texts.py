"""A bundle of a model of texts brings no code and no other files by its tokenizer, and its parts are of one vocabulary:
one row per attack."""

import json
import shutil
from pathlib import Path

import pytest
from attacked import attacked_copy, config, write
from bundles import edit
from texts import characters_pipeline
from tiny import tiny_pipeline

from score_sde import ScoreSDEPipeline, ScoreSDETextPipeline, load_bundle, save_bundle
from score_sde.sharing.bundle_code import compare_code


@pytest.fixture(scope="session")
def sound_bundle(tmp_path_factory):
    return Path(save_bundle(characters_pipeline(), tmp_path_factory.mktemp("sound") / "bundle"))


@pytest.fixture
def bundle(sound_bundle, tmp_path, monkeypatch):
    with attacked_copy(sound_bundle, tmp_path, monkeypatch) as copy:
        yield copy


def rules(change):
    """Change what tokenizer.json holds."""

    def attack(folder):
        path = folder / "tokenizer" / "tokenizer.json"
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return attack


def renumber(found):
    vocabulary = found["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 10**6


def continuous(folder):
    shutil.rmtree(folder / "scheduler")
    tiny_pipeline().scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["scheduling_score_sde", "ScoreSDEScheduler"])


def network_of_images(folder):
    shutil.rmtree(folder / "transformer")
    tiny_pipeline().transformer.save_pretrained(folder / "transformer")


NET, SCHEDULER, INDEX = "transformer/config.json", "scheduler/scheduler_config.json", "model_index.json"
TOKENIZER = "tokenizer/tokenizer_config.json"
ATTACKS = {
    # code
    "code of a tokenizer": (write("tokenizer/evil.py", "open('TRACE', 'w')"), "evil.py has no place in a bundle"),
    "remote code of a tokenizer": (config(TOKENIZER, auto_map={"AutoTokenizer": ["evil.Evil", None]}), "auto_map"),
    "remote code of the network": (config(NET, auto_map={"AutoModel": "evil.Evil"}), "auto_map .* is not allowed"),
    "remote code of the scheduler": (config(SCHEDULER, auto_map={"x": "evil.Evil"}), "auto_map .* is not allowed"),
    "a tokenizer of no known class": (config(INDEX, tokenizer=["transformers", "EvilTokenizer"]), "a fast tokenizer"),
    "a tokenizer of another library": (config(INDEX, tokenizer=["evil", "Evil"]), "component 'tokenizer' is a Evil"),
    "a slow tokenizer": (config(INDEX, tokenizer=["transformers", "ByT5Tokenizer"]), "a fast tokenizer of transfo"),
    "an automatic tokenizer": (config(INDEX, tokenizer=["transformers", "AutoTokenizer"]), "a fast tokenizer of"),
    # files
    "rules of sentencepiece": (write("tokenizer/spiece.model", "x"), "spiece.model has no place in a bundle"),
    "a pickle": (write("tokenizer/tokenizer.pkl", "x"), "tokenizer.pkl has no place in a bundle"),
    "another file": (config(TOKENIZER, vocab_file="/etc/passwd"), "'vocab_file' '/etc/passwd' is not allowed"),
    "no rules": (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json"),
    "rules that are none": (write("tokenizer/tokenizer.json", "{}"), "tokenizer"),
    "no tokenizer": (config(INDEX, tokenizer=[None, None]), "there is no tokenizer, which a ScoreSDETextPipeline"),
    # vocabularies
    "a token more": (rules(lambda found: found["model"]["vocab"].update(evil=99)), "different vocab|are not 0 to"),
    "a number far away": (rules(renumber), "the numbers of its [0-9]+ tokens are not 0 to"),
    "a mark more": (
        rules(
            lambda found: found["added_tokens"].append(
                {"id": 12, "content": "<mask>", "single_word": False, "lstrip": False, "rstrip": False}
                | {"normalized": False, "special": True}
            )
        ),
        "of different vocabularies: the transformer's 12, the scheduler's 12, the tokenizer's 13",
    ),
    "a scheduler of other tokens": (config(SCHEDULER, vocab_size=13), "the transformer's 12, the scheduler's 13"),
    "a network of other tokens": (config(NET, vocab_size=11), "transformer are not those of its config|larger"),
    "a vocabulary out of bounds": (config(NET, vocab_size=10**12), "is more than the 1,000,000 that there can be"),
    "a scheduler of many tokens": (
        config(SCHEDULER, vocab_size=10**9),
        "the transformer's 12, the scheduler's 1000000000",
    ),
    "numbers of the scheduler": (config(SCHEDULER, corrector_k=10**7), "corrector_k 10,000,000 is more than the"),
    "a vocabulary that is no number": (config(SCHEDULER, vocab_size="many"), "vocab_size 'many' must be of type int"),
    "a process that there isn't": (config(SCHEDULER, process="evil"), "scheduler_config.json: process 'evil'"),
    "noise that there isn't": (config(SCHEDULER, noise="evil"), "scheduler_config.json: .*noise.*'evil'"),
    # of another kind
    "a continuous scheduler": (continuous, "cannot draw by a ScoreSDEScheduler, whose steps are of another kind"),
    "a network of images": (network_of_images, "vocab_size None is of a network of other data"),
    "a pipeline of images": (config(INDEX, _class_name=["pipeline_score_sde", "ScoreSDEPipeline"]), "cannot draw by a"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_by_name(bundle, attack):
    make, message = ATTACKS[attack]
    make(bundle)
    with pytest.raises(ValueError, match=message) as error:
        load_bundle(bundle)
    assert len(str(error.value)) < 2000


def test_a_network_of_tokens_is_none_of_images(bundle):
    """Nor is it by the scheduler of images."""
    edit(bundle / INDEX, _class_name=["pipeline_score_sde", "ScoreSDEPipeline"])
    continuous(bundle)
    with pytest.raises(ValueError, match="vocab_size 12 is of a network of tokens, with which this pipeline cannot"):
        load_bundle(bundle)
    with pytest.raises(ValueError, match="holds a ScoreSDEPipeline: open it with that class"):
        ScoreSDETextPipeline.from_pretrained(bundle)


def test_a_sound_bundle_opens(bundle):
    assert type(load_bundle(bundle)) is type(ScoreSDETextPipeline.from_pretrained(bundle)) is ScoreSDETextPipeline
    with pytest.raises(ValueError, match="holds a ScoreSDETextPipeline: open it with that class"):
        ScoreSDEPipeline.from_pretrained(bundle)
    assert set(compare_code(str(bundle), ScoreSDETextPipeline).values()) == {"same"}
