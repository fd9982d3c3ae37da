"""What is added to a table of choices is named where users look: docstrings, help texts, the pages."""

import dataclasses
import re

import pytest
from places import ROOT

import score_sde
from score_sde import ScoreSDEScheduler
from score_sde.losses import DISCRETE_LOSSES, DISCRETE_TIME_DENSITIES, FEW_STEP_METHODS, TIME_DENSITIES, WEIGHTINGS
from score_sde.schedulers import discrete_solvers
from score_sde.schedulers.discrete_paths import DISCRETE_PREDICTIONS, NOISES
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES, TIME_GRIDS, TIME_INPUTS
from score_sde.schedulers.solvers import CORRECTORS, PREDICTORS, VARIANCES
from score_sde.training.parts.networks import NETWORKS
from score_sde.training.parts.optimizers import further_arguments, optimizers
from score_sde.training.train import TrainConfig


ARGUMENTS = {
    "sde_type": SDE_TYPES,
    "prediction_type": PREDICTIONS,
    "timestep_spacing": TIME_GRIDS,
    "variance_type": VARIANCES,
    "time_input": TIME_INPUTS,
    "corrector": CORRECTORS,
}
OPTIONS = {
    "sde_type": SDE_TYPES,
    "prediction_type": PREDICTIONS,
    "time_density": TIME_DENSITIES,
    "weighting": WEIGHTINGS,
    "network": NETWORKS,
    "method": FEW_STEP_METHODS,
    "optimizer": optimizers(),
}


def missing(table, text):
    return [choice for choice in table if choice not in re.findall(r"\w+", text)]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_docstring_of_the_scheduler_names_every_choice(name):
    of_name = re.search(rf"^ +{name}: (.*?)(?=^ +[\w, ]+: )", ScoreSDEScheduler.__doc__, re.MULTILINE | re.DOTALL)
    assert missing(ARGUMENTS[name], of_name[1]) == []


def test_its_table_of_samplers_names_every_predictor():
    named = set()
    for row in re.findall(r"^    \| ([\w, ]+) \|", ScoreSDEScheduler.__doc__, re.MULTILINE):
        first, *more = row.split(", ")
        named |= {first} | {first.rsplit("_", 1)[0] + each for each in more}
    assert named - {"predictor"} == {"auto", *PREDICTORS}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_help_of_training_names_every_choice(name):
    [text] = [field.metadata["help"] for field in dataclasses.fields(TrainConfig) if field.name == name]
    assert missing(OPTIONS[name], text) == []


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def rows(name, mark, column=0):
    """What stands in backquotes in a column of the table under a comment of a page."""
    table = re.search(rf"<!-- {mark} -->\n\n\|.*\n\|[-|]+\n((?:\|.*\n)+)", page(name))[1]
    return [each for row in table.splitlines() for each in re.findall(r"`(\w+)`", row.split("|")[column + 1])]


def test_the_table_of_a_page_has_every_row():
    assert sorted(rows("mathematics", "paths")) == sorted(SDE_TYPES)
    assert [SDE_TYPES[name] for name in ("vp", "linear")] == [score_sde.VPSDE, score_sde.LinearSDE]
    assert set(rows("mathematics", "paths", column=1)) < set(dir(score_sde))
    assert sorted(rows("mathematics", "predictions")) == sorted(PREDICTIONS)
    assert sorted(rows("mathematics", "noises")) == sorted(NOISES)
    assert sorted(rows("mathematics", "discrete predictions")) == sorted(DISCRETE_PREDICTIONS)
    assert set(rows("mathematics", "discrete objectives", column=1)) == set(DISCRETE_LOSSES)
    assert missing(DISCRETE_TIME_DENSITIES, page("mathematics")) == []
    assert sorted(rows("samplers", "predictors")) == sorted(["auto", *PREDICTORS])
    assert sorted(rows("samplers", "discrete predictors")) == sorted(["auto", *discrete_solvers.PREDICTORS])


def test_the_page_of_samplers_says_orders_and_evaluations_as_the_rows_have_them():
    stated = re.search(r"<!-- predictors -->\n\n.*\n.*\n((?:\|.*\n)+)", page("samplers"))[1]
    for row in stated.splitlines():
        names, _, orders, evaluations, _ = (cell.strip() for cell in row.strip("|").split("|"))
        names = re.findall(r"`(\w+)`", names)
        for i, name in enumerate(names):
            if name == "auto":
                continue
            order, evaluation = ([*map(int, cell.split(","))] if cell else [None] for cell in (orders, evaluations))
            assert PREDICTORS[name].order == order[min(i, len(order) - 1)], name
            assert PREDICTORS[name].evaluations == evaluation[min(i, len(evaluation) - 1)], name


def test_the_page_of_objectives_lists_what_there_is():
    for column, known in ((1, TIME_DENSITIES), (2, WEIGHTINGS), (3, PREDICTIONS)):
        assert set(rows("mathematics", "objectives", column)) - {"hybrid_loss"} <= known.keys()


@pytest.mark.parametrize("name", ["sde_type", "prediction_type", "time_density", "weighting"])
def test_the_page_of_training_lists_the_choices_of_its_options(name):
    [listed] = re.findall(rf"--{name}\s+(\w+\|[\w|]+)", page("train"))
    assert set(listed.split("|")) == set(OPTIONS[name])


def test_the_page_of_few_steps_lists_the_methods():
    assert sorted(rows("few_steps", "methods")) == sorted(FEW_STEP_METHODS)


def test_the_page_of_training_says_what_an_optimizer_can_be_told():
    stated = {
        row.split("`")[1]: re.findall(r"`(\w+)`", row.split("|")[3])
        for row in re.search(r"<!-- optimizers -->\n\n.*\n.*\n((?:\|.*\n)+)", page("train"))[1].splitlines()
    }
    assert stated == {name: further_arguments(found) for name, found in optimizers().items()}


@pytest.mark.parametrize("grid", TIME_GRIDS)
def test_the_page_of_samplers_names_every_grid(grid):
    assert f"`{grid}`" in page("samplers")
