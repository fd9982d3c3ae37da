"""The code style that every change must pass."""

import subprocess
import sys

import pytest
from places import ROOT


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(arguments):
    pytest.importorskip("ruff")
    result = subprocess.run([sys.executable, "-m", "ruff", *arguments, str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("pattern", ["*.md", "docs/*.md", "model_cards/*/*.md", "benchmarks/*.md", "*.yml", "*.toml"])
def test_no_page_holds_what_a_merge_left(pattern):
    for path in ROOT.glob(pattern):
        left = [
            line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("<<<<<<<", ">>>>>>>"))
        ]
        assert not left, path
