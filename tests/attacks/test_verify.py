"""`verify` calls nothing "same" that is not this release's code, and names whatever
`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` would run: one row per attack. None of it is run."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from bundles import edit
from commands import score_sde
from places import ROOT
from tiny import tiny_pipeline

from score_sde import save_bundle
from score_sde.sharing.bundle_code import LARGEST_SOURCE
from score_sde.sharing.hub import verify


EVIL = "class DiTModel:\n    pass\n"
INDEX = "model_index.json"


@pytest.fixture(scope="session")
def sound_bundle(tmp_path_factory):
    return Path(save_bundle(tiny_pipeline(), tmp_path_factory.mktemp("sound") / "bundle"))


@pytest.fixture
def bundle(sound_bundle, tmp_path):
    (tmp_path / "evil.py").write_text(EVIL)
    return Path(shutil.copytree(sound_bundle, tmp_path / "bundle"))


def carried(folder, pattern):
    [path] = folder.glob(pattern)
    return path


def write(folder, file, content=EVIL):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)


def rewrite(folder, pattern, change):
    path = carried(folder, pattern)
    path.write_bytes(change(path.read_bytes()))


def link(folder, pattern):
    path = carried(folder, pattern)
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def other_stamp(folder, pattern):
    """A file that is this release's, under a stamp of which the others know nothing."""
    path = carried(folder, pattern)
    path.rename(path.with_name(re.sub("_[0-9a-f]{10}", "_0123456789", path.name)))


def pipe(folder, pattern):
    path = carried(folder, pattern)
    path.unlink()
    os.mkfifo(path)


def config(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def component(library, class_name, name="transformer"):
    return lambda folder: edit(folder / INDEX, **{name: [library, class_name]})


# attack -> {what is named: verdict}; names without their stamps
ATTACKS = {
    "pipeline outside": (
        lambda folder: edit(folder / INDEX, _class_name=["../evil", "ScoreSDEPipeline"]),
        {".": "outside"},
    ),
    "pipeline at an absolute path": (
        lambda folder: edit(folder / INDEX, _class_name=[str(folder.parent / "evil"), "ScoreSDEPipeline"]),
        {".": "outside"},
    ),
    "pipeline in a subfolder": (
        lambda folder: (
            write(folder, "x/evil.py"),
            edit(folder / INDEX, _class_name=["x/evil", "ScoreSDEPipeline"]),
        ),
        {".": "outside", "x/evil.py": "unknown"},
    ),
    "pipeline of another file": (
        lambda folder: (
            write(folder, "evil.py"),
            edit(folder / INDEX, _class_name=["evil", "ScoreSDEPipeline"]),
        ),
        {"evil.py": "unknown"},
    ),
    "network outside": (component("../../evil", "DiTModel"), {"transformer": "outside"}),
    "network at an absolute path": (component("/evil", "DiTModel"), {"transformer": "outside"}),
    "component outside": (component("evil", "DiTModel", "../unet"), {"../unet": "outside"}),
    "component absolute": (component("evil", "DiTModel", "/unet"), {"/unet": "outside"}),
    "network of another file": (
        lambda folder: (write(folder, "transformer/evil.py"), component("evil", "DiTModel")(folder)),
        {"transformer/evil.py": "unknown"},
    ),
    "network of an absent file": (component("evil", "DiTModel"), {"transformer/evil.py": "missing"}),
    "a class that is none of ours": (component("evil", "Evil", "unet"), {"unet/evil.py": "unknown"}),
    "a module as a class": (
        component("diffusers", "utils"),
        {"transformer": "unknown", "transformer/transformer_score_dit.py": "unknown"},
    ),
    "a tokenizer": (component("transformers", "LayoutLMv2Processor", "tokenizer"), {"tokenizer": "unknown"}),
    "a processor as vae": (component("transformers", "LayoutLMv2Processor", "vae"), {"vae": "unknown"}),
    "a component of three": (
        lambda folder: edit(folder / INDEX, vae=["a", "b", "c"]),
        {"vae/a.py": "unknown"},
    ),
    "a component of numbers": (lambda folder: edit(folder / INDEX, vae=[1, 2]), {"vae": "outside"}),
    "auto_map of the network": (
        lambda folder: config(folder, "transformer/config.json", auto_map={"AutoModel": "you/other--evil.DiTModel"}),
        {"transformer/config.json": "unknown"},
    ),
    "auto_map of a tokenizer": (
        lambda folder: config(
            folder, "transformer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}
        ),
        {"transformer/tokenizer_config.json": "unknown"},
    ),
    "a config that cannot be read": (
        lambda folder: (folder / "transformer" / "config.json").write_bytes(b" " * (2**24 + 1)),
        {"transformer/config.json": "unknown"},
    ),
    "None.py": (lambda folder: write(folder, "None.py"), {"None.py": "unknown"}),
    "a file like diffusers": (lambda folder: write(folder, "vae/diffusers.py"), {"vae/diffusers.py": "unknown"}),
    "a file deep below": (
        lambda folder: ((folder / "vae" / "x").mkdir(parents=True), write(folder, "vae/x/evil.py")),
        {"vae/x/evil.py": "unknown"},
    ),
    "a linked file": (lambda folder: link(folder, "scheduler/paths_*.py"), {"scheduler/paths.py": "outside"}),
    "a linked folder": (lambda folder: link(folder, "scheduler"), {"scheduler": "outside"}),
    "a linked config": (lambda folder: link(folder, "transformer/config.json"), {"transformer/config.json": "outside"}),
    "a pipe": (lambda folder: pipe(folder, "scheduler/paths_*.py"), {"scheduler/paths.py": "outside"}),
    "a folder like a file": (lambda folder: (folder / "x.py").mkdir(), {}),
    "changed": (
        lambda folder: rewrite(folder, "scheduler/paths_*.py", lambda code: code.replace(b"exp()", b"exp() * 2")),
        {"scheduler/paths.py": "differs"},
    ),
    "one byte more": (
        lambda folder: rewrite(folder, "bundling_*.py", lambda code: code + b"#"),
        {"bundling.py": "differs"},
    ),
    "another encoding": (
        lambda folder: rewrite(folder, "bundling_*.py", lambda code: b"# coding: utf-7\n" + code),
        {"bundling.py": "differs"},
    ),
    "bytes that are no text": (
        lambda folder: rewrite(folder, "bundling_*.py", lambda code: code + b"# \xff\n"),
        {"bundling.py": "differs"},
    ),
    "wide characters": (
        lambda folder: rewrite(folder, "bundling_*.py", lambda code: code.decode().encode("utf-16")),
        {"bundling.py": "differs"},
    ),
    "an enormous file": (
        lambda folder: rewrite(folder, "bundling_*.py", lambda code: code + b"\n" * LARGEST_SOURCE),
        {"bundling.py": "differs"},
    ),
    "an import of another sibling": (
        lambda folder: rewrite(
            folder, "pipeline_score_sde_*.py", lambda code: re.sub(rb"from \.bundling_\w+", b"from .evil", code)
        ),
        {"pipeline_score_sde.py": "differs"},
    ),
    "a sibling of another stamp": (
        lambda folder: other_stamp(folder, "bundling_*.py"),
        {"bundling.py": "missing"},
    ),
    "a second file of the same name": (
        lambda folder: write(folder, "bundling_0123456789.py"),
        {"bundling.py": "differs"},
    ),
    "a file gone": (lambda folder: carried(folder, "likelihood_*.py").unlink(), {"likelihood.py": "missing"}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_everything_that_would_run_is_named(bundle, attack):
    make, expected = ATTACKS[attack]
    assert set(verify(bundle).values()) == {"same"}
    make(bundle)
    others = {path: verdict for path, verdict in verify(bundle).items() if verdict != "same"}
    named = {re.sub(r"_[0-9a-f]{10}\.py$", ".py", path): verdict for path, verdict in others.items()}
    # what lay in a folder is missing, too
    missing = {path for path, verdict in named.items() if verdict == "missing"} - expected.keys()
    assert not missing or attack == "a linked folder"
    assert {path: verdict for path, verdict in named.items() if path not in missing} == expected


def test_names_are_printed_without_what_a_terminal_obeys(bundle, capsys):
    write(bundle, "x\x1b[2K\rsame     y\n.py")
    assert score_sde("verify", bundle) == 1
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\r" not in output
    assert "unknown  x\\x1b[2K\\rsame     y\\n.py\n" in output


@pytest.mark.parametrize(
    "name",
    [
        "cifar10",
        "cifar10_one_gpu",
        "classics",
        "clothing128",
        "emoji64",
        "fashion_mnist",
        "qm9",
        "quick_start",
        "torsions",
        "sidechains",
        "earth_events",
        "moving_fashion",
        "spoken_digits",
    ],
)
def test_folders_without_code_say_what_is_missing(name):
    folder = ROOT / "model_cards" / name
    assert set(verify(folder).values()) == {"missing"}
