"""From a stock scheduler to ours and back: the same config, times and steps, for every class and every argument."""

import inspect

import pytest
import torch
from diffusers import schedulers

from score_sde import DiscreteScoreScheduler, ScoreSDEScheduler
from score_sde.schedulers.stock_configs import TAKEN


# of diffusers' own numpy code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LEVELS = {
    "num_train_timesteps": [500],
    "beta_start": [5e-4],
    "beta_end": [0.015],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"],
    "trained_betas": [torch.linspace(1e-3, 0.03, 1000).tolist()],
    "rescale_betas_zero_snr": [True],
    "snr_shift_scale": [1.0, 2.0],
    "lambda_min_clipped": [-2.0],
    "beta_min": [0.2],
    "beta_max": [15.0],
    "scaler": [2.0],
    "s": [0.01],
    "sampling_eps": [1e-2],
}
GRIDS = {
    "steps_offset": [1],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_lu_lambdas": [True],
    "use_beta_sigmas": [True],
    "interpolation_type": ["log_linear"],
    "timestep_type": ["continuous"],
    "sigma_min": [0.1],
    "sigma_max": [20.0],
    "sigma_schedule": ["karras", "exponential"],
    "rho": [5.0],
    "sigma_data": [0.7],
}
FLOW = {
    "use_flow_sigmas": [True],
    "shift": [3.0],
    "shift_terminal": [0.1],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear"],
    "invert_sigmas": [True],
    "base_shift": [0.3],
    "max_shift": [1.0],
    "base_image_seq_len": [64],
    "max_image_seq_len": [99],
    "stochastic_sampling": [True],
}
NETWORK = {
    "prediction_type": ["epsilon", "sample", "original_sample", "v_prediction"],
    "variance_type": [None, "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
    "clip_sample": [True, False],
    "clip_sample_range": [2.0],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [2.0],
}
SOLVERS = {
    "solver_order": [1, 3],
    "solver_type": ["heun", "bh1"],
    "algorithm_type": ["sde-dpmsolver++"],
    "lower_order_final": [True, False],
    "euler_at_final": [True],
    "final_sigmas_type": ["sigma_min"],
    "set_alpha_to_one": [True, False],
    "skip_prk_steps": [True],
    "predict_x0": [False],
    "disable_corrector": [[0]],
    "predictor_order": [1],
    "corrector_order": [1],
    "noise_sampler_seed": [3],
    "snr": [0.2],
    "correct_steps": [2],
    "original_inference_steps": [25],
    "timestep_scaling": [5.0],
    "clip_denoised": [False],
}
VALUES = LEVELS | GRIDS | FLOW | NETWORK | SOLVERS
# neither is a number or a name; the others are refused, for other values than 1
WITHOUT = {"solver_p", "tau_func", "eta", "s_noise", "flow_shift"}
# more than one at once
TOGETHER = [
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    (
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
        | {"sigma_min": 0.002, "sigma_max": 700.0, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"},
    ),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0}),
    *(
        (name, {"use_flow_sigmas": True, "flow_shift": 3.0, "beta_end": 0.015, "timestep_spacing": "trailing"})
        for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "SASolverScheduler")
    ),
    (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_karras_sigmas": True, "sigma_max": 200.0},
    ),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "shift_terminal": 0.1, "use_dynamic_shifting": True}),
]


def arguments_of(name):
    return [key for key in inspect.signature(getattr(schedulers, name).__init__).parameters if key != "self"]


def variations(name):
    """The default scheduler, and those with one argument away from it that the class takes by itself."""
    yield {}
    for key in arguments_of(name):
        for value in VALUES.get(key, ()):
            yield {key: value}


def build(name, arguments):
    """The stock scheduler; None where it refuses the arguments itself."""
    try:
        return getattr(schedulers, name)(**arguments)
    except (ValueError, NotImplementedError, KeyError):
        return None
    except ImportError:
        pytest.skip(f"{name} needs what is not installed")


def way_back(stock, folder):
    """The stock scheduler again, from our config in memory and from a file; none where ours refuses."""
    name = type(stock).__name__
    try:
        ours = ScoreSDEScheduler.from_config({"_class_name": name} | stock.config)
    except ValueError:
        return []
    ours.save_pretrained(folder)
    opened = ScoreSDEScheduler.from_pretrained(folder)
    assert [opened.timestep(t) for t in (0.25, 1.0)] == [ours.timestep(t) for t in (0.25, 1.0)]
    assert opened.config.prediction_type == ours.config.prediction_type
    return [type(stock).from_config(config) for config in (ours.config, ScoreSDEScheduler.load_config(folder))]


def facts(scheduler, n=6):
    """What a trajectory of a scheduler is: its config, times and levels."""
    config = {key: value for key, value in scheduler.config.items() if key in arguments_of(type(scheduler).__name__)}
    mu = {"mu": 0.5} if config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(n, **mu)
    sigmas = getattr(scheduler, "sigmas", None)
    # as text, in which nan equals nan
    return config, str(scheduler.timesteps.tolist()), str(None if sigmas is None else sigmas.tolist())


# whose set_timesteps is slow
SLOW = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TAKEN])
def test_every_argument_comes_back(name, tmp_path):
    build(name, {})  # skips where it can't be
    assert set(arguments_of(name)) - WITHOUT <= set(VALUES)
    taken = 0
    for arguments in variations(name):
        stock = build(name, arguments)
        if stock is not None:
            found = way_back(stock, tmp_path)
            taken += len(found)
            expected = facts(stock)
            assert all(facts(back) == expected for back in found), arguments
    assert taken


@pytest.mark.parametrize(("name", "arguments"), TOGETHER, ids=lambda value: value if isinstance(value, str) else None)
def test_several_arguments_come_back(name, arguments, tmp_path):
    stock = build(name, arguments)
    found, expected = way_back(stock, tmp_path), facts(stock)
    assert len(found) == 2
    assert all(facts(back) == expected for back in found)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_the_step_comes_back(name, tmp_path):
    stock = build(name, {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"})
    x, output = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ends = []
    for scheduler in (stock, *way_back(stock, tmp_path)):
        scheduler.set_timesteps(5)
        timestep = scheduler.timesteps[0]
        ends.append(scheduler.step(output, timestep, scheduler.scale_model_input(x, timestep)).prev_sample)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_all_compatible_classes_in_turn_change_nothing():
    """Each adds keys of its own, none of which is an argument of ours."""
    ours = ScoreSDEScheduler(sde_type="discrete_vp", beta_schedule="scaled_linear", beta_end=0.012)
    for kind in ours.compatibles:
        try:
            config = kind.from_config(ours.config).config
        except ImportError:
            continue
        again = ScoreSDEScheduler.from_config(config)
        assert {key: again.config[key] for key in ours.config} == dict(ours.config)
        gained = again.config.keys() - ours.config.keys()
        assert not gained & inspect.signature(ScoreSDEScheduler).parameters.keys()


def test_a_saved_scheduler_has_the_config_that_was_saved(tmp_path):
    ours = ScoreSDEScheduler(sde_type="discrete_vp")
    ours.save_pretrained(tmp_path)
    opened = ScoreSDEScheduler.from_pretrained(tmp_path)
    assert opened.config == {key: value for key, value in ours.config.items() if key != "_use_default_values"}


def test_the_number_of_levels_is_that_of_trained_betas(tmp_path):
    betas = torch.tensor([0.1, 0.3]).numpy()
    ours = ScoreSDEScheduler(sde_type="discrete_vp", trained_betas=betas)
    assert (len(ours), ours.config.num_train_timesteps) == (2, 2)
    ours.save_pretrained(tmp_path)
    assert ScoreSDEScheduler.from_pretrained(tmp_path).betas.tolist() == ours.betas.tolist() == betas.tolist()


@pytest.mark.parametrize(
    ("kind", "given"),
    [(ScoreSDEScheduler, (500, "ve", "score", "euler")), (DiscreteScoreScheduler, (5, "uniform", "cosine"))],
)
def test_what_is_given_by_position_comes_back(kind, given):
    ours = kind(*given)
    again = kind.from_config(ours.config)
    names = list(inspect.signature(kind).parameters)[: len(given)]
    assert tuple(again.config[name] for name in names) == given
    assert again.config == ours.config
