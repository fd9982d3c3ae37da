"""Configs of stock schedulers: every key of every class of the installed diffusers is honoured, or refused by name."""

import ast
import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import schedulers

from score_sde import ScoreSDEScheduler
from score_sde.schedulers.stock_configs import (
    ACCEPTED,
    BOUNDARY,
    CLIP_OF_CM,
    CUT,
    EDM,
    FLOW,
    FLOW_MATCHING,
    GRIDS,
    MAPS,
    NEUTRAL,
    NOISE_OF_CM,
    OF_CM,
    OF_EDM,
    ORIGINAL,
    READ_BY_PIPELINES,
    REFUSED,
    SAME,
    SCORE_SDE,
    SOLVER,
    TAKEN,
    VALUES,
)


def signatures():
    """{scheduler class: its arguments}, read from the sources: what some need is not installed."""
    found = {}
    for path in Path(schedulers.__file__).parent.rglob("scheduling_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Scheduler"):
                for part in node.body:
                    if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                        found[node.name] = [each.arg for each in part.args.args if each.arg != "self"]
    return found


# of diffusers' own numpy code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SIGNATURES = signatures()
INSTALLED = [name for name in ACCEPTED if "args" not in inspect.signature(getattr(schedulers, name)).parameters]


def test_every_class_is_taken_or_refused():
    """A new class may mean something else by the keys of others: read it, and give it a row."""
    classes = {name for name in dir(schedulers) if name.endswith("Scheduler")}
    assert classes == {*TAKEN, *REFUSED}
    assert set(SIGNATURES) <= classes
    assert not set(TAKEN) & set(REFUSED)


@pytest.mark.parametrize("name", TAKEN)
def test_every_key_has_its_row(name):
    """A key that a newer diffusers brings: find out what it changes, and give it a row."""
    if name in SCORE_SDE:
        assert set(SIGNATURES[name]) == set(SCORE_SDE[name][1])
    elif name in EDM:
        assert set(SIGNATURES[name]) <= {*OF_EDM, *SOLVER, "sigma_schedule"}
    elif name in FLOW_MATCHING:
        assert set(SIGNATURES[name]) <= {*FLOW, *READ_BY_PIPELINES, *GRIDS, *SOLVER, "eta", "s_noise"}
    elif name in ACCEPTED:
        rows = [*SAME, *VALUES, *GRIDS, *NEUTRAL, *SOLVER, CUT]
        assert len(set(rows)) == len(rows)
        assert set(SIGNATURES[name]) <= set(rows)
    elif name in MAPS:
        assert set(SIGNATURES[name]) <= {*SAME, *VALUES, *SOLVER, *FLOW, *OF_CM} | {
            *(ORIGINAL, BOUNDARY, CLIP_OF_CM, NOISE_OF_CM)
        }
    else:
        assert set(SIGNATURES[name]) == {"scaler", "s"}


def assert_same_levels(stock, ours):
    levels = torch.arange(len(ours))
    t = ours.path_time(levels)
    assert len(ours) == len(stock.alphas_cumprod)
    assert (ours.path.alpha(t) ** 2 - stock.alphas_cumprod.double()).abs().max() < 1e-6
    assert (ours.path.sigma(t) ** 2 - (1 - stock.alphas_cumprod.double())).abs().max() < 1e-6


def assert_same_times(stock, ours, n=8):
    """The same times of evaluation and noise levels, without those that the stock scheduler has inside its steps."""
    ours = ScoreSDEScheduler.from_config(ours.config, predictor="ddim")
    ours.set_timesteps(n)
    stock.set_timesteps(n)
    two = "KDPM2" in type(stock).__name__ or "SDE" in type(stock).__name__
    times = stock.timesteps.double()[:: 2 if two else 1].unique().flip(0)
    assert len(times) == len(ours.timesteps)
    # some are rounded or cut there, others interpolated between levels in another way
    is_in_sigma = any(stock.config.get(flag) for flag in GRIDS)
    assert (times - ours.timesteps).abs().max() <= (1.001 if is_in_sigma else 0.02 if times.frac().any() else 0)
    if hasattr(stock, "sigmas") and not two:
        sigmas = stock.sigmas.double().unique().flip(0)
        # theirs are differences of float32 near 1
        assert (ours.sigmas[:n] / sigmas[:n] - 1).abs().max() < 2e-4


def build(name, **arguments):
    if name == "PNDMScheduler":
        # without the evaluations inside its first steps
        arguments = {"skip_prk_steps": True} | arguments
    return getattr(schedulers, name)(**arguments)


@pytest.mark.parametrize("name", INSTALLED)
def test_the_default_config_gives_the_stock_path_and_times(name, tmp_path):
    stock = build(name)
    stock.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    # what an old file lacks has the default of its class
    for config in (stock.config, saved, {"_class_name": name}):
        ours = ScoreSDEScheduler.from_config(config)
        assert_same_levels(stock, ours)
        assert_same_times(stock, ours)


OTHER = {
    "num_train_timesteps": [500],
    "beta_start": [5e-4],
    "beta_end": [0.015],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"],
    "trained_betas": [torch.linspace(1e-3, 0.03, 1000).tolist()],
    "rescale_betas_zero_snr": [True],
    "snr_shift_scale": [1.0, 2.0],
    "steps_offset": [1],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_lu_lambdas": [True],
    "use_beta_sigmas": [True],
    "use_flow_sigmas": [True],
    "flow_shift": [3.0],
    "shift_terminal": [0.1],
    "use_dynamic_shifting": [True],
    "interpolation_type": ["log_linear"],
    "timestep_type": ["continuous"],
    "time_shift_type": ["linear"],
    "lambda_min_clipped": [-5.1],
    "sigma_min": [0.1],
    "sigma_max": [20.0],
    "prediction_type": ["sample", "original_sample", "v_prediction", "flow_prediction"],
    "variance_type": [None, "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
    "clip_sample": [True, False],
    "clip_sample_range": [2.0],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [2.0],
}


LEVELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "snr_shift_scale")
LEVELS += ("rescale_betas_zero_snr",)
TIMES = ("num_train_timesteps", "steps_offset", "timestep_spacing", "lambda_min_clipped", *GRIDS)


def test_every_key_that_counts_is_tried():
    assert set(OTHER) == {*SAME, *VALUES, *GRIDS, *NEUTRAL, CUT}


@pytest.mark.parametrize("key", OTHER)
def test_other_values_are_honoured_or_refused_by_name(key):
    tried = honoured = 0
    for name in INSTALLED:
        if key not in SIGNATURES[name]:
            continue
        for value in OTHER[key]:
            try:
                stock = build(name, **{"use_flow_sigmas": True} if key == "shift_terminal" else {}, **{key: value})
            except (ValueError, NotImplementedError):
                # it has no such value itself
                continue
            tried += 1
            try:
                ours = ScoreSDEScheduler.from_config(stock.config)
            except ValueError as error:
                assert key in str(error) or key == "shift_terminal"
                continue
            honoured += 1
            if stock.config.get("use_flow_sigmas"):
                assert ours.config.sde_type == "linear"
                continue
            if key in LEVELS:
                assert_same_levels(stock, ours)
            if key in TIMES:
                assert_same_times(stock, ours)
            elif key in ours.config and key != "clip_sample":
                assert ours.config[key] == value
    assert tried
    # the straight path: test_flow_matching
    assert bool(honoured) == (key not in NEUTRAL or key == "shift_terminal")


@pytest.mark.parametrize("flag", [flag for flag in GRIDS if flag != "use_lu_lambdas"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_grids_of_sigma_reach_as_far_as_the_stock_ones(spacing, flag):
    """Those of Euler end where its timestep_spacing does, those of DPM-Solver at the ends of the chain."""
    arguments = {flag: True, "timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler):
        stock = kind(**arguments)
        assert_same_times(stock, ScoreSDEScheduler.from_config(stock.config))


def test_grids_of_sigma_between_given_ends():
    ends = {"sigma_min": 0.1, "sigma_max": 20.0}
    stock = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **ends)
    ours = ScoreSDEScheduler.from_config(stock.config)
    assert_same_times(stock, ours)
    # without such a grid they have no effect there
    ScoreSDEScheduler.from_config(diffusers.EulerDiscreteScheduler(sigma_max=700.0).config)
    stock = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, sigma_max=700.0)
    with pytest.raises(ValueError, match="sigma_max 700.0 is none of the chain's levels, from 0.01 to 157"):
        ScoreSDEScheduler.from_config(stock.config)


def test_log_linear_levels_have_their_own_times():
    """Stock tells the network the times of linspace at them; and it stops at the last of n + 1."""
    stock = diffusers.EulerDiscreteScheduler(interpolation_type="log_linear")
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    for scheduler in (stock, ours):
        scheduler.set_timesteps(9)
    assert (ours.sigmas[:-1] / stock.sigmas[:9] - 1).abs().max() < 1e-4


def test_a_smallest_lambda_is_a_largest_time():
    arguments = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    stock = diffusers.DPMSolverMultistepScheduler(**arguments)
    ours = ScoreSDEScheduler.from_config(stock.config)
    assert_same_times(stock, ours)
    assert ours.t_max < 1
    stock = diffusers.DPMSolverMultistepScheduler(**arguments, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="lambda_min_clipped=-5.1 of DPM.* has no counterpart with .*'trailing'"):
        ScoreSDEScheduler.from_config(stock.config)


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "UnCLIPScheduler", "EulerDiscreteScheduler", "CogVideoXDDIMScheduler"]
)
def test_denoised_samples_are_clipped_where_stock_clips(name, clip_sample):
    """CogVideoX has the key and does not clip; Euler may hold it from another scheduler's config."""
    stock = getattr(schedulers, name).from_config({"prediction_type": "sample", "clip_sample": clip_sample})
    ours = ScoreSDEScheduler.from_config({"_class_name": name} | stock.config, predictor="ddim")
    x0, ends = 3 * torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4), []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
        timestep = scheduler.timesteps[0]
        x = scheduler.scale_model_input(torch.zeros_like(x0), timestep)
        ends.append(scheduler.step(x0, timestep, x).pred_original_sample)
    assert torch.equal(*ends)


def test_cogvideox_has_its_shifted_levels():
    ours = ScoreSDEScheduler.from_config(diffusers.CogVideoXDDIMScheduler().config)
    assert float(ours.path.alpha(ours.path_time(499))) == pytest.approx(0.337, abs=5e-4)
    # and it stays on them
    again = ScoreSDEScheduler.from_config(ours.config, predictor="heun")
    assert float(again.path.alpha(again.path_time(499))) == pytest.approx(0.337, abs=5e-4)


def test_score_sde_vp_takes_the_stock_step():
    stock = schedulers.ScoreSdeVpScheduler(beta_max=15.0, sampling_eps=1e-2)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler_maruyama")
    stock.set_timesteps(50)
    ours.set_timesteps(50)
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-6
    # its steps are 1 / n, from the noise that the network predicts
    ours.set_timesteps(timesteps=[0.5, 0.5 - 1 / 50])
    x, output = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    theirs, _ = stock.step_pred(output, x, torch.tensor(0.5), generator=generators[0])
    mine = ours.step(output, ours.timesteps[0], x, generator=generators[1]).prev_sample
    assert (theirs - mine).abs().max() < 1e-5


@pytest.mark.parametrize("key", ["beta_schedule", "beta_start", "beta_end", "clip_sample"])
def test_no_value_is_not_our_default(key):
    with pytest.raises(ValueError, match=f"{key}=None of DDPMScheduler has no meaning"):
        ScoreSDEScheduler.from_config({"_class_name": "DDPMScheduler", key: None})


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED)
def test_what_means_something_else_is_refused_by_name(name, reason):
    with pytest.raises(ValueError) as error:
        ScoreSDEScheduler.from_config({"_class_name": name})
    assert f"{name} has no counterpart here: {reason}" in str(error.value)


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "RePaintScheduler", "FlowMatchLCMScheduler"])
def test_what_means_something_else_is_refused_in_memory(name):
    """There a config doesn't name its class."""
    with pytest.raises(ValueError, match="has no counterpart here"):
        ScoreSDEScheduler.from_config(getattr(schedulers, name)().config)


def test_two_classes_of_the_same_keys_must_be_named():
    with pytest.raises(ValueError, match="LCMScheduler and TCDScheduler have the same keys"):
        ScoreSDEScheduler.from_config(diffusers.TCDScheduler().config)


def test_noise_of_another_size_between_steps_is_refused():
    with pytest.raises(ValueError, match="s_noise=1.01 of CMStochasticIterativeScheduler has no"):
        ScoreSDEScheduler.from_config({"_class_name": "CMStochasticIterativeScheduler", "s_noise": 1.01})


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="no noise path is known for the config of OtherScheduler"):
        ScoreSDEScheduler.from_config({"_class_name": "OtherScheduler"})


def test_a_key_from_the_future_is_refused():
    config = dict(diffusers.DDIMScheduler().config)
    with pytest.raises(ValueError, match="warp=2.0 of DDIM.*Scheduler has no known meaning"):
        ScoreSDEScheduler.from_config(config | {"warp": 2.0})
    # what a file holds beside its class's keys, its class ignores too
    ScoreSDEScheduler.from_config(config | {"_class_name": "DDIMScheduler", "warp": 2.0})


def test_a_stock_key_that_was_changed_on_the_way_counts():
    ours = ScoreSDEScheduler.from_config(diffusers.UniPCMultistepScheduler().config)
    flow = diffusers.UniPCMultistepScheduler.from_config(ours.config, use_flow_sigmas=True)
    with pytest.raises(ValueError, match="use_flow_sigmas=True has no counterpart.*sde_type='linear'"):
        ScoreSDEScheduler.from_config(flow.config)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_scheduler_made_from_another_ones_config_is_what_it_became(mixed):
    """In memory a config doesn't name its class, and keeps keys of the one before."""
    before = diffusers.DDIMScheduler(clip_sample=mixed, thresholding=mixed, beta_schedule="scaled_linear")
    stock = diffusers.DPMSolverMultistepScheduler.from_config(before.config, timestep_spacing="linspace")
    ours = ScoreSDEScheduler.from_config(stock.config)
    assert_same_levels(stock, ours)
    assert_same_times(stock, ours)
    assert not ours.config.clip_sample
    assert ours.config.thresholding == mixed


CHAIN = {"sde_type": "discrete_vp"}
MORE = {"beta_end": 0.01, "timestep_spacing": "trailing", "prediction_type": "sample", "num_train_timesteps": 500}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("arguments", [CHAIN, CHAIN | MORE], ids=["chain", "more"])
def test_the_way_to_a_stock_scheduler_and_back(arguments, saved, tmp_path):
    """What is left at its default counts as given: on the way it neither changes nor is lost."""
    ours = ScoreSDEScheduler(**arguments)
    # from a file EDMEuler, which is on another path, takes its own sigma_min and sigma_max
    for name in sorted({*ours._compatibles} & {*INSTALLED, *([] if saved else ["EDMEulerScheduler"])}):
        config = ours.config
        if saved:
            ours.save_pretrained(tmp_path)
            config = ScoreSDEScheduler.load_config(tmp_path)
        stock = getattr(schedulers, name).from_config(config)
        if name != "EDMEulerScheduler":
            assert_same_levels(stock, ours)
            assert stock.config.prediction_type == ours.config.prediction_type
            assert not stock.config.get("clip_sample")
        config = stock.config
        if saved:
            stock.save_pretrained(tmp_path)
            config = type(stock).load_config(tmp_path)
        back = ScoreSDEScheduler.from_config(config)
        assert {key: back.config[key] for key in ours.config if key[0] != "_"} == {
            key: value for key, value in ours.config.items() if key[0] != "_"
        }


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("sde_type", ["vp", "subvp", "ve", "cosine_vp", "edm", "linear"])
def test_another_path_never_becomes_the_betas_of_a_stock_scheduler(sde_type, saved, tmp_path):
    ours = ScoreSDEScheduler(sde_type=sde_type)
    config = ours.config
    if saved:
        ours.save_pretrained(tmp_path)
        config = ScoreSDEScheduler.load_config(tmp_path)
    for name in INSTALLED:
        # UnCLIP has the message of its own
        with pytest.raises((NotImplementedError, ValueError), match=f"sde_type={sde_type} is not|UnCLIP"):
            getattr(schedulers, name).from_config(config)
    # and is another path here only where it is asked for
    assert ScoreSDEScheduler.from_config(config).config.sde_type == sde_type
    assert ScoreSDEScheduler.from_config(config, sde_type="discrete_vp").config.beta_schedule == "linear"


@pytest.mark.parametrize("saved", [False, True])
def test_keywords_that_do_not_exist_are_refused(saved, tmp_path):
    for source in (diffusers.DDPMScheduler(), ScoreSDEScheduler()):
        source.save_pretrained(tmp_path)

        def build(source=source, **arguments):
            return (
                ScoreSDEScheduler.from_pretrained(tmp_path, **arguments)
                if saved
                else ScoreSDEScheduler.from_config(source.config, **arguments)
            )

        with pytest.raises(
            ValueError, match="'preditor' is no argument of ScoreSDEScheduler; the nearest is 'predictor'"
        ):
            build(preditor="heun")
        assert build(predictor="heun").config.predictor == "heun"
        _, unused = build(preditor="heun", return_unused_kwargs=True)
        assert unused["preditor"] == "heun"
