"""Networks that map along the ODE: exact maps give the exact distribution in a few steps, on every path; what they are
told; the stock schedulers' steps; what is refused."""

import json

import pytest
import torch
from diffusers import schedulers
from exact import TOLERANCE
from maps import TWO_PEAKS, distribution, map_network, quantile, quantile_flow
from test_stock_steps import LATENTS, assert_close, both, network, noise
from tiny import seeded

from score_sde import ScoreSDEScheduler
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES


# of diffusers' own numpy code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KINDS = [(sde_type, "flow_prediction") for sde_type in SDE_TYPES] + [("vp", each) for each in PREDICTIONS]


def sample(scheduler, exact, x, steps, generator=None):
    """From x_(t_max) to the end of a trajectory."""
    scheduler.set_timesteps(steps)
    told = scheduler.timesteps_to.double()
    assert scheduler.nfe == steps == len(told)
    for timestep, to in zip(scheduler.timesteps.double(), told, strict=True):
        output = exact(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)), to.expand(len(x)))
        x = scheduler.step(output, timestep, x, generator=generator).prev_sample
    return x


def of_two_peaks(**arguments):
    """(scheduler, exact network, shares (B, 1), samples of these shares at t_max)."""
    scheduler = ScoreSDEScheduler(**arguments)
    end = scheduler.t_min if arguments["network_map"] == "consistency" else None
    exact = map_network(scheduler, quantile_flow(TWO_PEAKS), TWO_PEAKS.denoised, end)
    shares = ((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000).unsqueeze(1)
    t = torch.full((1, 1), scheduler.t_max, dtype=torch.float64)
    return scheduler, exact, shares, quantile(TWO_PEAKS, scheduler.path, shares, t)


@pytest.mark.parametrize(("sde_type", "prediction_type"), KINDS)
def test_steps_of_the_exact_flow_map_are_exact(sde_type, prediction_type):
    scheduler, exact, shares, x = of_two_peaks(
        sde_type=sde_type, prediction_type=prediction_type, network_map="flow_map", denoise_final=False
    )
    expected = quantile(TWO_PEAKS, scheduler.path, shares, torch.full((1, 1), scheduler.t_min, dtype=torch.float64))
    for steps in (1, 2, 4):
        # times are told in float32
        assert (sample(scheduler, exact, x, steps) - expected).abs().max() < 2e-3
    # and of an ordinary network a step is not
    scheduler.set_timesteps(1)
    assert scheduler.timesteps_to is not None
    own = exact(scheduler.scale_model_input(x, scheduler.timesteps[0]), scheduler.timesteps[:1].double().expand(len(x)))
    assert (scheduler.step(own, scheduler.timesteps[0], x).prev_sample - expected).abs().max() > 0.1


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize(
    ("network_map", "options"),
    [
        ("consistency", {}),
        ("flow_map", {"predictor": "consistency"}),
        ("flow_map", {"predictor": "flow_map", "predictor_kwargs": {"gamma": 0.5}}),
    ],
)
def test_renoised_samples_have_the_distribution(sde_type, network_map, options):
    grid = {"timestep_spacing": "straight"}
    scheduler, exact, shares, x = of_two_peaks(
        sde_type=sde_type, prediction_type="sample", network_map=network_map, denoise_final=False, **grid | options
    )
    for steps in (1, 2, 4):
        found = sample(scheduler, exact, x, steps, seeded(0))
        end = torch.full((1, 1), scheduler.t_min, dtype=torch.float64)
        reached = distribution(TWO_PEAKS, scheduler.path, found, end).flatten()
        places = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
        # Kolmogorov's bound of 2,000 samples, at a level of 1 %
        assert (reached.sort().values - places).abs().max() < (0.0364 if steps > 1 else 2e-3)


@pytest.mark.parametrize("network_map", ["flow_map", "consistency"])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_clean_data_are_as_near_as_the_smallest_time(sde_type, network_map):
    scheduler, exact, shares, x = of_two_peaks(sde_type=sde_type, prediction_type="sample", network_map=network_map)
    found = sample(scheduler, exact, x, 1)
    expected = quantile(TWO_PEAKS, scheduler.path, shares, torch.full((1, 1), 1e-9, dtype=torch.float64))
    _, least = scheduler.path.straight_coordinates(scheduler.t_min, 1.0)
    assert (found - expected).abs().max() < 2 * float(least) * expected.abs().max()


def test_a_flow_map_that_is_told_its_own_time_is_an_ordinary_network():
    scheduler = ScoreSDEScheduler(
        prediction_type="v_prediction", network_map="flow_map", predictor="heun", corrector="langevin"
    )
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.timesteps_to, scheduler.timesteps)
    ordinary = ScoreSDEScheduler(prediction_type="v_prediction", predictor="heun", corrector="langevin")
    ordinary.set_timesteps(5)
    assert ordinary.timesteps_to is None
    for each in (ordinary, scheduler):
        each.step(noise(), each.timesteps[0], noise(1))
    assert [stage.coefficients for stage in ordinary._trajectory.stages] == [
        stage.coefficients for stage in scheduler._trajectory.stages
    ]


def test_what_networks_are_told():
    flow = ScoreSDEScheduler(sde_type="linear", network_map="flow_map", prediction_type="flow_prediction")
    flow.set_timesteps(4)
    assert torch.equal(flow.timesteps_to[:-1], flow.timesteps[1:]) and flow.timesteps_to[-1] == 1.0
    # equal steps, and a last one as long
    steps = flow.timesteps - flow.timesteps_to
    assert (steps - steps[0]).abs().max() < 1e-3
    model = ScoreSDEScheduler.from_config(flow.config, network_map="consistency")
    model.set_timesteps(4)
    assert torch.equal(model.timesteps, flow.timesteps) and (model.timesteps_to == 1.0).all()
    # from an image with its noise
    flow.set_timesteps(2, t_start=0.5)
    assert torch.equal(flow.timesteps_to[:1], flow.timesteps[1:]) and flow.timesteps[0] == 500
    flow.set_timesteps(sigmas=[0.9, 0.3])
    assert (flow.timesteps_to - torch.tensor([300.0, 1.0])).abs().max() < 1e-3


def test_a_flow_map_that_is_not_told_is_refused():
    scheduler = ScoreSDEScheduler(prediction_type="v_prediction", network_map="flow_map")
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="has not told its network, a flow map, where to lead"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(1))
    # a consistency model leads to one time
    scheduler = ScoreSDEScheduler(prediction_type="v_prediction", network_map="consistency")
    scheduler.set_timesteps(2)
    scheduler.step(noise(), scheduler.timesteps[0], noise(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network_map": "shortcut"}, "network_map 'shortcut' is unknown; choose one of None, flow_map, consistency"),
        ({"predictor": "flow_map"}, "predictor 'flow_map' is for a network that maps along the ODE"),
        ({"map_steps": 2}, "map_steps 2 is for a network that maps"),
        ({"network_map": "consistency", "predictor": "ddim"}, "predictor 'ddim' needs a network of denoised samples"),
        ({"network_map": "consistency", "corrector": "langevin"}, "corrector 'langevin' needs a score"),
        ({"network_map": "flow_map", "calibration": {"1": ["ddim", [1.0]]}}, "calibration is of a denoiser's ODE"),
        ({"original_inference_steps": 1001}, "original_inference_steps 1001 must be at most num_train_timesteps 1000"),
    ],
)
def test_what_contradicts_the_network_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreSDEScheduler(**arguments)


def test_times_are_not_fitted_to_maps():
    scheduler = ScoreSDEScheduler(network_map="consistency")
    with pytest.raises(ValueError, match="network_map='consistency'"):
        scheduler.calibrate(network, 4, noise=noise())


def test_ordinary_configs_are_what_they_were(tmp_path):
    ScoreSDEScheduler().save_pretrained(tmp_path / "old")
    saved = json.loads((tmp_path / "old" / "scheduler_config.json").read_text())
    assert not {"network_map", "map_steps", "original_inference_steps"} & saved.keys()
    ours = ScoreSDEScheduler(network_map="flow_map")
    ours.save_pretrained(tmp_path / "new")
    opened = ScoreSDEScheduler.from_pretrained(tmp_path / "new")
    assert (opened.config.network_map, opened.config.map_steps) == ("flow_map", 2)


# --- stock schedulers ---------------------------------------------------------------------------------------------

STOCK = [
    *(("LCMScheduler", LATENTS | {"prediction_type": kind}) for kind in ("epsilon", "sample", "v_prediction")),
    ("LCMScheduler", LATENTS | {"original_inference_steps": 25, "clip_sample": True, "clip_sample_range": 0.5}),
    *(("LCMScheduler", LATENTS | {"original_inference_steps": original}) for original in (30, 600, 1000)),
    ("LCMScheduler", LATENTS | {"thresholding": True, "dynamic_thresholding_ratio": 0.5}),
    *(("TCDScheduler", LATENTS | {"prediction_type": kind}) for kind in ("epsilon", "sample", "v_prediction")),
    ("TCDScheduler", LATENTS | {"clip_sample": True}),
    ("CMStochasticIterativeScheduler", {}),
    ("CMStochasticIterativeScheduler", {"clip_denoised": False, "num_train_timesteps": 151, "sigma_data": 0.7}),
    ("CMStochasticIterativeScheduler", {"clip_denoised": False, "rho": 3.0, "sigma_min": 0.1}),
    ("FlowMapEulerDiscreteScheduler", {}),
    ("FlowMapEulerDiscreteScheduler", {"shift": 3.0, "num_train_timesteps": 500}),
]


def follow(scheduler, steps):
    """Every sample of a trajectory of a stock scheduler, or of one of its config; along the times that it has without
    `steps`."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    _, generator = getattr(scheduler, "timesteps_to", None), seeded(1)
    x, found = noise() * float(getattr(scheduler, "init_noise_sigma", 1.0)), []
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        drawn = {} if "FlowMap" in type(scheduler).__name__ else {"generator": generator}
        x = scheduler.step(output, timestep, x, **drawn).prev_sample
        found.append(x)
    return found


@pytest.mark.parametrize(("name", "arguments"), STOCK, ids=lambda value: value if isinstance(value, str) else None)
def test_the_steps_are_the_stock_ones(name, arguments):
    stock, ours = both(name, arguments)
    for steps in (1, 2, 4, 7):
        expected, found = follow(stock, steps), follow(ours, steps)
        assert (stock.timesteps - ours.timesteps).abs().max() < 1e-3
        for each, own in zip(expected, found, strict=True):
            assert_close(each, own.to(each.dtype), TOLERANCE)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("TCDScheduler", {"timesteps": [999, 499, 99]}),
        ("TCDScheduler", {"timesteps": [999]}),
        ("LCMScheduler", {"timesteps": [999, 499, 99]}),
        ("CMStochasticIterativeScheduler", {"timesteps": [22, 0]}),
    ],
)
def test_all_times_that_are_given_are_evaluated_as_in_stock(name, given):
    """Those of TCD and of consistency models, which end with noise, too."""
    stock, ours = both(name, {} if name.startswith("CM") else LATENTS)
    stock.set_timesteps(**given)
    ours.set_timesteps(timesteps=stock.timesteps)
    assert (ours.nfe, ours.num_inference_steps) == (len(given["timesteps"]), len(given["timesteps"]))
    assert_close(follow(stock, None)[-1], follow(ours, None)[-1], TOLERANCE)


def test_given_noise_levels_may_end_with_none_whatever_the_last_step():
    ours = ScoreSDEScheduler(sde_type="linear", predictor="ddim", denoise_final=False)
    for sigmas in ([0.9, 0.3], [0.9, 0.3, 0.0], [0.9, 0.3, ours.t_min]):
        ours.set_timesteps(sigmas=sigmas)
        assert ours.nfe == 2 and ours.timesteps.tolist() == pytest.approx([900, 300])


def test_a_stock_flow_map_is_told_what_it_was():
    stock, ours = both("FlowMapEulerDiscreteScheduler", {"shift": 3.0})
    for scheduler in (stock, ours):
        scheduler.set_timesteps(4)
    assert (ours.timesteps_to - 1000 * stock.sigmas[1:]).abs().max() < 1e-3


def test_a_flow_map_of_our_own_is_one_of_diffusers():
    """On the linear path the configs mean the same."""
    ours = ScoreSDEScheduler(sde_type="linear", prediction_type="flow_prediction", network_map="flow_map", shift=2.0)
    stock = schedulers.FlowMapEulerDiscreteScheduler.from_config(ours.config)
    for each, own in zip(follow(stock, 3), follow(ours, 3), strict=True):
        # to t_min, less than to 0
        assert_close(each, own.to(each.dtype), 5e-3)
