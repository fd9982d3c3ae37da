"""Diffusers' own pipelines of consistency models with our scheduler: the images of their own schedulers, for all that
these pipelines pass; what is refused."""

import diffusers
import pytest
import stock_pipelines
import torch
from test_stock_steps import LATENTS

from score_sde import ScoreSDEScheduler


# of diffusers' own numpy code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LCM, FROM_IMAGE = "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"
CM = "ConsistencyModelPipeline"


def lcm(**arguments):
    return diffusers.LCMScheduler.from_config({"_class_name": "LCMScheduler"}, **LATENTS | arguments)


def of(stock, **arguments):
    return ScoreSDEScheduler.from_config({"_class_name": type(stock).__name__} | stock.config, **arguments)


def images(name, scheduler, steps=4, **call):
    """What a pipeline draws with a scheduler, pixels alone."""
    kind, case = stock_pipelines.pipelines()[name], stock_pipelines.case_of(name)
    case.call = case.call | call
    components = stock_pipelines.components_of(kind, case)
    return stock_pipelines.draw(kind, case, components, {"scheduler": scheduler}, steps)[:1]


def assert_same(name, stock, steps=4, predictor="consistency", **call):
    expected = images(name, stock, steps, **call)
    found = images(name, of(stock, predictor=predictor), steps, **call)
    # they say something
    assert expected[0].std() > 0.01
    assert stock_pipelines.difference(found, expected) < 1e-5


CALLS = [
    *({"steps": steps} for steps in (1, 2, 4, 8)),
    {"original_inference_steps": 25},
    {"original_inference_steps": 30, "steps": 8},
    {"original_inference_steps": 1000},
    {"timesteps": [999, 499, 99]},
]
OF_STRENGTH = [
    {"strength": 1.0},
    {"strength": 0.5, "steps": 8},
    {"strength": 0.58, "original_inference_steps": 50},
    {"strength": 0.3, "original_inference_steps": 25, "steps": 2},
    {"strength": 0.5, "timesteps": [999, 799, 499, 99]},
]


@pytest.mark.parametrize(
    ("name", "call"),
    [(LCM, call) for call in CALLS] + [(FROM_IMAGE, call) for call in CALLS + OF_STRENGTH],
    ids=str,
)
def test_latent_consistency_models_draw_the_stock_images(name, call):
    assert_same(name, lcm(), **call)


@pytest.mark.parametrize("arguments", [{"original_inference_steps": 20}, {"prediction_type": "v_prediction"}], ids=str)
@pytest.mark.parametrize("name", [LCM, FROM_IMAGE])
def test_the_configs_own_grid_and_prediction_draw_them_too(name, arguments):
    assert_same(name, lcm(**arguments))


def test_the_original_steps_that_are_asked_for_are_those_of_auto_too():
    assert_same(FROM_IMAGE, lcm(), predictor="auto", original_inference_steps=50, strength=0.6)


def test_auto_begins_at_the_noise_that_a_strength_means():
    stock = lcm()
    ours = of(stock, predictor="auto")
    for strength in (0.3, 0.58, 1.0):
        for scheduler in (stock, ours):
            scheduler.set_timesteps(4, strength=strength)
        assert ours.timesteps[0] == stock.timesteps[0]
        # then in the grid of its own
        assert ours.nfe == 4 and not torch.equal(ours.timesteps.round(), stock.timesteps.float())
    assert torch.isfinite(images(FROM_IMAGE, ours, strength=0.6)[0]).all()


@pytest.mark.parametrize(
    "call", [{"steps": 1}, {"steps": 2}, {"timesteps": [22, 0]}, {"timesteps": [39, 17, 3]}], ids=str
)
@pytest.mark.parametrize("label", [3, [3, 7], None])
def test_consistency_models_draw_the_stock_images(label, call):
    of_class = {"class_labels": label, "batch_size": len(label) if isinstance(label, list) else 1}
    assert_same(CM, diffusers.CMStochasticIterativeScheduler(), **of_class | call)


def test_consistency_models_without_classes_draw_them_too(monkeypatch):
    unconditional = stock_pipelines.COMPONENTS["UNet2DModel"]
    row = stock_pipelines.Case(components={"unet": unconditional}, call={"class_labels": None})
    monkeypatch.setattr(stock_pipelines, "CASES", [*stock_pipelines.CASES, (r"ConsistencyModel", row)])
    assert_same(CM, diffusers.CMStochasticIterativeScheduler(), 2)


def test_whole_timesteps_number_levels_and_others_are_told():
    stock = diffusers.CMStochasticIterativeScheduler()
    ours = of(stock, predictor="auto")
    for whole in ([22, 0], torch.tensor([22, 0])):
        for scheduler in (stock, ours):
            scheduler.set_timesteps(timesteps=whole)
        assert (ours.timesteps - stock.timesteps).abs().max() < 1e-3
    ours.set_timesteps(timesteps=[22.0, 0.0])
    assert ours.timesteps.tolist() == [22, 0]
    # what another network is told, which is no logarithm, is whole where it is
    chain = of(lcm(), timestep_spacing="karras_levels")
    chain.set_timesteps(timesteps=[999, 99])
    assert chain.timesteps.tolist() == [999, 99]


@pytest.mark.parametrize("numbers", [[40, 0], [0, 22], [22, -1], [1095, 22], [22, 22]])
def test_whole_timesteps_that_number_no_levels_are_refused(numbers):
    ours = of(diffusers.CMStochasticIterativeScheduler())
    with pytest.raises(ValueError, match="are whole, so that they number levels of noise.*at most 39.*pass floats"):
        ours.set_timesteps(timesteps=numbers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"original_inference_steps": 1001}, "original_inference_steps 1001 must be a whole number from 1 to 1000"),
        ({"strength": 1.5}, "strength 1.5 must be a number from 0 to 1"),
        ({"strength": 0.05}, "4 time steps are more than the 2 of 50 original_inference_steps at strength 0.05"),
        ({"original_inference_steps": 3}, "4 time steps are more than the 3 of 3 original_inference_steps: use fewer"),
        ({"strength": 0.5, "t_start": 0.5}, "go with num_inference_steps or timesteps alone"),
        ({"original_inference_steps": 25, "sigmas": [9.0, 1.0]}, "go with num_inference_steps or timesteps alone"),
        ({"timesteps": [999, 499, 99], "strength": 0.3}, "strength 0.3 leaves none of the 3 timesteps"),
        ({"timesteps": [999, 2]}, "timestep_scaling=10.0 of LCMScheduler has no counterpart at timestep 2, where it"),
        ({"original_inference_steps": 1000, "strength": 0.005}, "at timestep 1, where it mixes 0.0025 of the sample"),
    ],
)
def test_what_no_grid_of_original_steps_has_is_refused(call, message):
    steps = {} if {"timesteps", "sigmas"} & call.keys() else {"num_inference_steps": 4}
    with pytest.raises(ValueError, match=message):
        of(lcm()).set_timesteps(**steps | call)


@pytest.mark.parametrize("call", [{"original_inference_steps": 50}, {"strength": 0.8}, {"strength": 0.0}])
def test_original_steps_of_a_scheduler_that_has_none_are_refused(call):
    ours = ScoreSDEScheduler(network_map="consistency")
    with pytest.raises(ValueError, match=f"{next(iter(call))} .* is of a grid of original steps.*leave it out, or say"):
        ours.set_timesteps(4, **call)
    # no request
    ours.set_timesteps(4, original_inference_steps=None, strength=1.0)
    # and the remedy
    ScoreSDEScheduler.from_config(ours.config, original_inference_steps=50).set_timesteps(4, **{"strength": 0.8})


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
def test_a_strength_leaves_the_last_of_given_timesteps(strength):
    stock = lcm()
    ours = of(stock)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(timesteps=[999, 799, 499, 99], strength=strength)
    assert torch.equal(ours.timesteps, stock.timesteps)


def test_timesteps_that_the_training_did_not_have_are_named():
    ours = of(lcm(), predictor="auto")
    with pytest.warns(UserWarning, match=r"timesteps \[498.0\] are none of the 50 original_inference_steps"):
        ours.set_timesteps(timesteps=[999, 498, 99], original_inference_steps=50)
    assert ours.timesteps.tolist() == [999, 498, 99]
    assert ours._planned().predictor == "consistency"


def test_one_step_of_pixart_is_the_denoised_sample():
    """Which its pipeline takes from the second place of what `step` returns."""
    name = "PixArtAlphaPipeline"
    stock = diffusers.DDIMScheduler(set_alpha_to_one=True, clip_sample=False)
    expected = images(name, stock, 1)
    assert stock_pipelines.difference(images(name, of(stock, predictor="ddim"), 1), expected) < 1e-5
