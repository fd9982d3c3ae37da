"""The arrows of the design: which folder may import what."""

import ast
import re
import sys

import diffusers.pipelines
import pytest
from places import ROOT

import score_sde


FIELD = {"torch", "diffusers", "huggingface_hub", "numpy", "PIL", "safetensors"}
OURS = {f"score_sde.{name}" for name in ("schedulers", "models", "losses", "pipelines", "sharing", "ema")}
# folder -> the packages that its files may import beside the standard library and FIELD, and the folders of ours
ALLOWED = {
    "src/score_sde": {"typer", "score_sde", "score_sde.training", *OURS},
    "src/score_sde/schedulers": set(),
    "src/score_sde/models": set(),
    "src/score_sde/losses": {"score_sde.schedulers"},
    "src/score_sde/sharing": {"gradio", "filelock", "jinja2", "peft", "score_sde", "transformers"}
    | OURS - {"score_sde.losses"},
    "src/score_sde/sharing/convert": OURS - {"score_sde.losses", "score_sde.ema"},
    "pipelines": {"torchdiffeq", "transformers"},
    "model_cards": set(),
    "training/parts": {"accelerate", "datasets", "filelock", "fsspec", "matplotlib", "onnxruntime", "psutil", "pyarrow"}
    | {"peft", "rdkit", "score_sde", "tokenizers", "torchdiffeq", "torchmetrics", "tqdm", "trackio", "transformers"}
    | {"av", "bitsandbytes", "soundfile", "yaml"}
    | OURS,
}
ALLOWED["training"] = ALLOWED["training/parts"] | {"score_sde.training"}


def imports(source, folder):
    """Packages that a source file imports anywhere, and of ours the folder: score_sde.schedulers."""
    package = ".".join(["score_sde", *folder.removeprefix("src/score_sde").strip("/").split("/")]).rstrip(".")
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            # of a package, what is imported may be a module
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "score_sde" else [module]
        for name in names:
            parts = name.split(".")
            if parts[0] != "score_sde":
                found.add(parts[0])
            elif f"{name}.".startswith(f"{package}.") and package != "score_sde":
                continue
            elif len(parts) > 1 and (parts[1] in FOLDERS or parts[1] == "ema"):
                found.add(".".join(parts[:2]))
            else:
                found.add("score_sde")
    return found


FOLDERS = {folder.removeprefix("src/score_sde/").split("/")[0] for folder in ALLOWED} - {"src"}


def wrong_arrows(source, folder):
    return imports(source, folder) - set(sys.stdlib_module_names) - FIELD - ALLOWED[folder]


FILES = [(folder, path) for folder in ALLOWED for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize(("folder", "path"), FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_no_file_imports_against_the_design(folder, path):
    assert wrong_arrows(path.read_text(encoding="utf-8"), folder) == set()


def test_every_folder_has_its_rule():
    every = {
        path for folder in ("src", "pipelines", "training", "model_cards") for path in (ROOT / folder).rglob("*.py")
    }
    assert {path.resolve() for path in every} == {path for _, path in FILES}


def test_a_wrong_arrow_is_seen():
    assert wrong_arrows("import math, torch\nfrom .solvers import plan", "src/score_sde/schedulers") == set()
    assert wrong_arrows("def f():\n    import scipy.linalg", "src/score_sde/schedulers") == {"scipy"}
    assert wrong_arrows("from ..losses import f", "src/score_sde/schedulers") == {"score_sde.losses"}
    assert wrong_arrows("from ..schedulers.paths import f", "src/score_sde/losses") == set()
    assert wrong_arrows("import score_sde.training.train", "src/score_sde/sharing") == {"score_sde.training"}
    assert wrong_arrows("from .. import training", "src/score_sde/sharing") == {"score_sde.training"}
    assert wrong_arrows("from score_sde import DiTModel", "pipelines") == {"score_sde"}
    assert wrong_arrows("from score_sde.training import train", "training/parts") == {"score_sde.training"}
    assert wrong_arrows("from score_sde.training.parts.loop import fit", "training") == set()
    assert wrong_arrows("from .loop import fit", "training/parts") == set()


@pytest.mark.parametrize(
    "name", sorted({cls.__module__ for cls in map(score_sde.__getattr__, score_sde.__all__) if isinstance(cls, type)})
)
def test_carried_code_is_found_by_diffusers(name):
    """diffusers copies the siblings that the entry file itself names, each by a line "from .name import ..."."""
    entry = ROOT / "src" / f"{name.replace('.', '/')}.py"
    assert not hasattr(diffusers.pipelines, entry.stem) and not hasattr(diffusers.pipelines, entry.parent.name)

    def siblings(path):
        found = {
            (node.level, node.module)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.level
        }
        assert all(level == 1 and "." not in module for level, module in found)
        return {module for _, module in found}

    named = set(re.findall(r"^from \.(\w+) import", entry.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named == siblings(entry)
    assert {sibling for each in named for sibling in siblings(entry.parent / f"{each}.py")} <= named
