"""`--time_shift`: one shift for the times that are trained and those of sampling."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from runs import TINY_RUN, equal, forget_runs, run, train_tiny
from score_sde import ScoreSDEScheduler, load_bundle
from score_sde.training import evaluate, train


FLOW = ["--sde_type", "linear", "--prediction_type", "flow_prediction", "--time_density", "logit_normal"]


def scheduler_of(folder):
    return load_bundle(folder / "pipeline").scheduler


@pytest.mark.parametrize(("time_shift", "shift"), [("3", 3.0), ("dimension", (8 * 8 / 4096) ** 0.5)])
def test_the_trained_scheduler_has_it_and_stock_flow_matching_the_same_grid(time_shift, shift, tmp_path):
    train_tiny(tmp_path, *FLOW, "--max_train_steps", 1, "--time_shift", time_shift)
    ours = scheduler_of(tmp_path)
    assert ours.config.shift == pytest.approx(shift)
    stock = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert stock.config.shift == ours.config.shift
    ours = ScoreSDEScheduler.from_config(ours.config, predictor="euler")
    levels = np.linspace(1, 1 / 7, 7)
    stock.set_timesteps(sigmas=levels)
    ours.set_timesteps(sigmas=levels)
    assert (stock.sigmas - ours.sigmas).abs().max() < 1e-6
    # SD3's, of the levels
    assert ours.sigmas[:7].tolist() == pytest.approx((shift * levels / (1 + (shift - 1) * levels)).tolist(), rel=1e-5)


def objective_of(output_dir, *arguments):
    """The times that a run of these options draws."""
    forget_runs()
    config = train.parse(train.TrainConfig, [*map(str, TINY_RUN), *arguments, "--output_dir", str(output_dir)])
    return config.make_objective(config.make_scheduler((1, 8, 8)))


def test_the_times_of_training_are_shifted_as_sampling_is(tmp_path):
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    plain = objective_of(tmp_path, *FLOW).times(u)
    by_dimension = objective_of(tmp_path, *FLOW, "--time_shift", "dimension").times(u)
    assert (by_dimension - plain / 8 / (1 + (1 / 8 - 1) * plain)).abs().max() < 1e-12
    alone = objective_of(tmp_path, *FLOW, "--scheduler_kwargs", "{shift: 3}").times(u)
    assert torch.equal(alone, plain)


def test_a_resumed_run_keeps_it_and_goes_on_bit_for_bit(tmp_path):
    options = [*FLOW, "--time_shift", "3", "--checkpointing_steps", 1]
    whole = train_tiny(tmp_path / "whole", *options, "--max_train_steps", 2)
    train_tiny(tmp_path / "parts", *options, "--max_train_steps", 1)
    more = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="time_shift was '3', is '2'"):
        train_tiny(tmp_path / "parts", *options, *more, "--time_shift", "2")
    assert equal(whole, train_tiny(tmp_path / "parts", *options, *more))


def test_what_it_is_started_from_gives_its_shift_to_sampling_and_time_shift_replaces_it(tmp_path):
    train_tiny(tmp_path / "source", *FLOW, "--max_train_steps", 1, "--time_shift", "3")
    start = [*TINY_RUN, "--init_from", tmp_path / "source" / "pipeline", "--max_train_steps", 1]
    for name, more, shift in (("kept", [], 3.0), ("replaced", ["--time_shift", "2"], 2.0)):
        options = [*start, "--output_dir", tmp_path / name, "--checkpointing_steps", 1, *more]
        run(train.main, *options)
        assert scheduler_of(tmp_path / name).config.shift == shift
        # a resumed run needs the source no more, and knows which it was
        run(train.main, *options, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
        assert scheduler_of(tmp_path / name).config.shift == shift
        facts = json.loads((tmp_path / name / "pipeline" / "training.json").read_text())
        assert facts["config"]["time_shift"] == (more[1] if more else None)


def test_evaluate_measures_the_loss_at_the_times_of_training(tmp_path):
    train_tiny(tmp_path, *FLOW, "--max_train_steps", 1, "--time_shift", "9")
    folder, found = tmp_path / "pipeline", []
    facts = json.loads((folder / "training.json").read_text())
    for time_shift in ("9", None):
        facts["config"]["time_shift"] = time_shift
        (folder / "training.json").write_text(json.dumps(facts))
        test = dataclasses.make_dataclass("Test", ["captions", "label_column"])(None, "label")
        config = dataclasses.make_dataclass("Config", ["pipeline"])(str(folder))
        found.append(evaluate.loss_on(test, load_bundle(folder), config).objective.shift)
    assert found == [9.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*FLOW, "--time_shift", "0"], "time_shift '0' must be a positive number, or dimension"),
        ([*FLOW, "--time_shift", "much"], "time_shift 'much' must be a positive number, or dimension"),
        ([*FLOW, "--time_shift", "nan"], "time_shift 'nan' must be a positive number, or dimension"),
        (["--time_shift", "3"], "shifted times need a path that ends in noise alone, such as linear or cosine_vp"),
        (["--time_shift", "dimension"], "shifted times need a path that ends in noise alone"),
        ([*FLOW, "--time_shift", "3", "--scheduler_kwargs", "{shift: 2}"], "shift in scheduler_kwargs is that of samp"),
        ([*FLOW, "--time_shift", "3", "--method", "mean_flow"], "time_shift is of denoising; method mean_flow draws"),
        (["--data_kind", "text", "--time_shift", "3"], "time_shift is an option for data of the kind image"),
        (["--domain", "torus", "--columns", "a", "--time_shift", "3"], "time_shift 3 is of images and signals"),
    ],
)
def test_what_has_no_shift_is_refused_before_any_data_is_opened(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(train.main, *arguments, "--dataset", "does_not_exist.parquet")
    error = capsys.readouterr().err
    assert message in error and "does_not_exist" not in error
