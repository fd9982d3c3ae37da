"""The arrows of the design: which file may import what."""

import ast
import re
import sys
from pathlib import Path

import diffusers.pipelines
import pytest


ROOT = Path(__file__).resolve().parents[1]
FIELD = {"torch", "diffusers"}
TRAINING = {path.stem for path in (ROOT / "training").glob("*.py")}

# file -> the packages, and the siblings (with a dot) that it may import beside the standard library
ALLOWED = {
    "src/score_sde/paths.py": {"torch"},
    "src/score_sde/solvers.py": {"torch", ".paths"},
    "src/score_sde/calibration.py": {"torch", ".solvers"},
    "src/score_sde/scheduling_score_sde.py": FIELD | {".paths", ".solvers", ".calibration", ".stock_configs"},
    "src/score_sde/stock_configs.py": {"diffusers"},
    "src/score_sde/transformer_score_dit.py": FIELD,
    "src/score_sde/unet_score.py": FIELD,
    "src/score_sde/noise_conditional_classifier.py": FIELD,
    "src/score_sde/losses.py": {"torch", ".paths"},
    "src/score_sde/ema.py": FIELD,
    "src/score_sde/hub.py": FIELD
    | {"filelock", "huggingface_hub", ".__version__", ".pipelines", ".model_card", ".bundle_checks", ".bundle_code"},
    "src/score_sde/bundle_checks.py": FIELD | {"safetensors", ".pipelines"},
    "src/score_sde/bundle_code.py": {".bundle_checks", ".pipelines"},
    "src/score_sde/convert.py": FIELD
    | {"huggingface_hub", "safetensors", ".hub", ".bundle_checks", ".model_card", ".pipelines", ".scheduling_score_sde"}
    | {".transformer_score_dit", ".unet_score"},
    "src/score_sde/model_card.py": {"huggingface_hub", "jinja2", ".__version__", ".pipelines"},
    "src/score_sde/space.py": {"huggingface_hub", ".hub", ".model_card", ".pipelines", ".space_app"},
    "src/score_sde/space_app.py": FIELD | {"gradio", "PIL"},
    "src/score_sde/__init__.py": set(),
    "pipelines/*.py": FIELD
    | {"huggingface_hub", "numpy", "PIL", "torchdiffeq"}
    | {f".{path.stem}" for path in (ROOT / "pipelines").glob("*.py")},
    "model_cards/*.py": set(),
    "training/*.py": FIELD
    | {"accelerate", "datasets", "filelock", "fsspec", "huggingface_hub", "numpy", "onnxruntime", "PIL", "pyarrow"}
    | {"psutil", "safetensors", "score_sde", "torchdiffeq", "torchmetrics", "tqdm", "transformers", "yaml"}
    | TRAINING,
    "benchmarks/*.py": FIELD
    | {"datasets", "dit_gflops", "exact", "matplotlib", "numpy", "PIL", "safetensors", "score_sde", "stock_samplers"}
    | {"tqdm"}
    | TRAINING,
}
# what is copied into a bundle: the file that diffusers is told of, from which it finds the others
CARRIED = [
    "src/score_sde/scheduling_score_sde.py",
    "src/score_sde/transformer_score_dit.py",
    "src/score_sde/unet_score.py",
    "pipelines/pipeline_score_sde.py",
    "pipelines/pipeline_score_sde_inverse.py",
]


def imports(source):
    """Top-level packages, and siblings as ".name", that a source file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "imports from the parent package do not work in a bundle"
            # "from . import x" names the sibling x
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {"." * node.level + name.split(".")[0] for name in names}
    return found


def wrong_arrows(source, allowed):
    return imports(source) - set(sys.stdlib_module_names) - allowed


FILES = [(path, allowed) for pattern, allowed in ALLOWED.items() for path in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize(("path", "allowed"), FILES, ids=[str(path.relative_to(ROOT)) for path, _ in FILES])
def test_no_file_imports_against_the_design(path, allowed):
    assert wrong_arrows(path.read_text(encoding="utf-8"), allowed) == set()


def test_every_file_has_its_rule():
    folders = ("src/score_sde", "pipelines", "training", "model_cards", "benchmarks")
    every = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert every == {path for path, _ in FILES}


def test_a_wrong_arrow_is_seen():
    allowed = ALLOWED["src/score_sde/paths.py"]
    assert wrong_arrows("import math, torch\nfrom typing import NamedTuple", allowed) == set()
    assert wrong_arrows("def f():\n    from .solvers import plan", allowed) == {".solvers"}
    assert wrong_arrows("from . import solvers, losses", allowed) == {".solvers", ".losses"}
    assert wrong_arrows("import training.loop as loop", ALLOWED["src/score_sde/hub.py"]) == {"training"}
    assert wrong_arrows("from score_sde import paths", ALLOWED["pipelines/*.py"]) == {"score_sde"}
    assert wrong_arrows("from tests import exact", ALLOWED["training/*.py"]) == {"tests"}
    assert wrong_arrows("import numpy.linalg", allowed) == {"numpy"}
    assert wrong_arrows("from diffusers import ModelMixin", allowed) == {"diffusers"}


@pytest.mark.parametrize("name", CARRIED)
def test_carried_code_is_found_by_diffusers(name):
    """diffusers copies the siblings that the entry file itself names, each by a line "from .name import ..."."""
    entry = ROOT / name
    assert not hasattr(diffusers.pipelines, entry.stem)
    named = set(re.findall(r"^from \.(\w+) import", entry.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {f".{sibling}" for sibling in named} == {each for each in imports(entry.read_text()) if each[0] == "."}
    needed = {sibling for each in named for sibling in imports((entry.parent / f"{each}.py").read_text())}
    assert {sibling for sibling in needed if sibling.startswith(".")} <= {f".{sibling}" for sibling in named}
