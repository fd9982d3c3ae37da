"""What is added to a table of choices is named where users look: docstrings, help texts, README."""

import dataclasses
import re

import pytest
from places import ROOT

from score_sde import ScoreSDEScheduler
from score_sde.losses import TIME_DENSITIES, WEIGHTINGS
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES, TIME_GRIDS, TIME_INPUTS
from score_sde.schedulers.solvers import CORRECTORS, PREDICTORS, VARIANCES
from score_sde.training.train import NETWORKS, TrainConfig


README = (ROOT / "README.md").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("table", [SDE_TYPES, PREDICTIONS], ids=["paths", "predictions"])
def test_the_readme_names_every_choice(table):
    assert missing(table, README) == []
