"""mixed_precision auto: bfloat16 where it pays."""

import json

import pytest
import torch

from runs import train_tiny
from score_sde.training.parts import precision


def test_the_gain_is_a_measurement():
    assert 0.01 < precision.gain_of_bfloat16(rows=64, width=64) < 100


@pytest.mark.parametrize(("gain", "expected"), [(2.5, "bf16"), (0.4, "no")])
def test_it_is_used_where_it_pays_and_recorded(gain, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "gain_of_bfloat16", lambda: gain)
    weights = train_tiny(tmp_path / "auto", "--max_train_steps", 2, "--mixed_precision", "auto")
    said = f"mixed_precision {expected}: on this CPU matrix products in bfloat16 are {gain} times as fast as in float32"
    assert said in capsys.readouterr().out
    facts = json.loads((tmp_path / "auto" / "pipeline" / "training.json").read_text())
    assert facts["config"]["mixed_precision"] == expected
    given = train_tiny(tmp_path / "given", "--max_train_steps", 2, "--mixed_precision", expected)
    assert all(torch.equal(weights[name], given[name]) for name in given)
