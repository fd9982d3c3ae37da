"""What README and the pages show runs: Python blocks and the notebooks' cells, one page after the other; what they say
exists does; the site builds.

A comment before a block says what is special about it: `<!-- trains -->` runs among the slow tests, `<!-- needs the Hub
-->` can't run here and is only compiled, `<!-- name.py -->` is a file, which later blocks import.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from unittest import mock
from urllib.parse import urlparse

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from places import ROOT
from typer.core import TyperCommand

import score_sde
from score_sde import __version__, cli
from score_sde.losses.denoising import TIME_DENSITIES, WEIGHTINGS
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES
from score_sde.schedulers.solvers import PREDICTORS
from score_sde.training.parts.launching import split_arguments
from score_sde.training.parts.options import parse


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
REPOSITORY = "https://github.com/score-sde/score-sde"
RAW = "https://raw.githubusercontent.com/score-sde/score-sde/main/"
# what an example may add rows to
TABLES = (SDE_TYPES, PREDICTIONS, PREDICTORS, TIME_DENSITIES, WEIGHTINGS)


def blocks(page, language):
    """(line of the page, code, the comment before it or "") of a page's blocks in a language."""
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "fence" and token.info.strip() == language:
            comment = before.content.strip() if before is not None and before.type == "html_block" else ""
            yield token.map[0] + 2, token.content, comment.removeprefix("<!--").removesuffix("-->").strip()


def with_python(slow):
    """Pages that have blocks to run; `slow`: those with a block that trains."""
    return [page for page in PAGES if any((mark == "trains") >= slow for *_, mark in blocks(page, "python"))]


def run(source, line, code, names):
    """Errors say the line of the page."""
    exec(compile("\n" * (line - 1) + code, str(source), "exec"), names)


def run_page(page, marks):
    names = {"__name__": page.stem}
    for line, code, mark in blocks(page, "python"):
        if mark.endswith(".py"):
            Path(mark).write_text(code, encoding="utf-8")
        elif mark in marks:
            run(page, line, code, names)


@pytest.fixture
def apart(workplace, monkeypatch):
    """What a page adds to tables and imports from its files stays on the page."""
    monkeypatch.syspath_prepend(workplace)
    modules = set(sys.modules)
    copies = [dict(table) for table in TABLES]
    yield
    for table, copy in zip(TABLES, copies, strict=True):
        table.clear()
        table.update(copy)
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == workplace:
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", with_python(slow=False), ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(page, apart):
    run_page(page, marks=("",))


@pytest.mark.slow
@pytest.mark.parametrize("page", with_python(slow=True), ids=lambda page: page.stem)
def test_they_run_with_those_that_train(page, apart):
    run_page(page, marks=("", "trains"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_other_mark_hides_a_block(page):
    for line, code, mark in blocks(page, "python"):
        assert mark in ("", "trains", "needs the Hub") or mark.endswith(".py"), line
        compile(code, str(page), "exec")


def cells(notebook):
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_from_an_empty_folder(notebook, tmp_path):
    """In a process of its own, as a kernel is, whose display shows nothing."""
    code = "\n\n".join("".join(cell["source"]) for cell in cells(notebook))
    script = tmp_path / "notebook.py"
    script.write_text("def display(*_):\n    pass\n\n\n" + code, encoding="utf-8")
    ended = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_holds_no_outputs(notebook):
    assert cells(notebook)
    for cell in cells(notebook):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), notebook.name, "exec")


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(page):
    """Command lines `score-sde ...` of a page's shell blocks."""
    for _, code, _ in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "score-sde":
                yield words[1:]


class Read(Exception):
    """A command line was read to its end."""


def read(argv):
    """Read a command line as the command does, and do nothing. Raises SystemExit, or an error of the options."""
    if argv[0] in cli.LAUNCHED:
        module, config_class = cli.LAUNCHED[argv[0]]
        config_class = getattr(import_module(f"score_sde.training.{module}"), config_class)
        own, launching = split_arguments(config_class, argv[1:])
        launch_command_parser().parse_args([*launching, "script"])
        if "--list" not in own:
            parse(config_class, own)
        return
    if argv[0] in cli.HELP:

        def parse_args(parser, arguments=None, namespace=None, original=ArgumentParser.parse_args):
            original(parser, arguments, namespace)
            raise Read

        with mock.patch.object(ArgumentParser, "parse_args", parse_args), pytest.raises(Read):
            import_module(f"score_sde.training.{argv[0].replace('-', '_')}").main(argv[1:])
        return
    with mock.patch.object(TyperCommand, "invoke", lambda *_: None), pytest.raises(SystemExit) as exit:
        cli.main(argv)
    if exit.value.code:
        raise exit.value


COMMANDS = {f"{page.stem}: {' '.join(argv)}": argv for page in PAGES for argv in commands(page)}


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_a_command_of_a_page_is_one(argv, workplace):
    read(argv)


def test_a_command_that_is_none_is_refused(workplace):
    for line in (
        "train --learning_rat 1",
        "sample folder --step 3",
        "plots folder",
        "convert dit a",
        "quick-start --now",
    ):
        with pytest.raises(SystemExit):
            read(line.split())


# --- what they name ---------------------------------------------------------------------------------------------------


def links(text):
    """Targets of links and pictures, Markdown's and HTML's."""
    outside_of_blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", outside_of_blocks)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_what_a_page_links_to_in_the_project_is_there(page):
    for target in ("".join(each) for each in links(page.read_text(encoding="utf-8"))):
        if target.startswith((REPOSITORY + "/", RAW)):
            path = re.sub(r"^(tree|blob)/main/", "", target.removeprefix(RAW).removeprefix(REPOSITORY + "/"))
            assert path.startswith("issues") or (ROOT / path).exists(), target
        elif not urlparse(target).scheme and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"`((?:src|tests|training|pipelines|benchmarks|docs)/[\w/.-]+)`", page.read_text(encoding="utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^::: score_sde\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert set(score_sde.__all__) <= set(listed)


def test_the_address_of_the_project_is_one():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == REPOSITORY
    assert re.search(r"^repo_url: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)[1] == REPOSITORY
    urls = re.search(r"\[project.urls\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    assert all(url.startswith(REPOSITORY) for url in re.findall(r'"(.*)"', urls))


def test_the_readme_shows_the_two_commands_on_one_screen_and_pictures_by_absolute_links():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 7000
    for mark in ("main job", "tests"):
        [line] = re.search(rf"<!-- {mark} -->\n```bash\n(.*?)```", text, re.DOTALL)[1].splitlines()
        assert line.startswith("python3 -m venv ")
    pictures = re.findall(r"!\[[^]]*\]\((\S+)\)", text)
    assert pictures and all(target.startswith(RAW) for target in pictures)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= citation.keys()
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    [of_hook] = re.findall(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert f"ruff=={of_hook}\n" in (ROOT / "constraints.txt").read_text()


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Pages left out of the navigation, links, anchors and names of the reference that don't exist are warnings."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    shown = {path.relative_to(tmp_path / "site").as_posix() for path in Path(tmp_path / "site").rglob("*.*")}
    assert {"model_cards/quick_start/samples.png", "benchmarks/samplers_network.png"} <= shown
    assert {"model_cards/moving_fashion/samples.gif", "model_cards/spoken_digits/samples_15.wav"} <= shown
    assert "log_likelihood" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
