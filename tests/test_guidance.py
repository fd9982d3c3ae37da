"""Guidance: by a scale, by diffusers' guiders in an interval, and by a weaker network."""

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance, TangentialClassifierFreeGuidance
from tiny import tiny_dit, tiny_pipeline

from score_sde import ScoreSDEScheduler
from score_sde.solvers import PREDICTORS


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def draw(pipeline, **arguments):
    arguments = {"class_labels": [0, 2], "num_inference_steps": 10} | arguments
    return pipeline(generator=torch.Generator().manual_seed(0), output_type="latent", **arguments).images


def count_calls(network):
    calls = []
    network.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize("predictor", ["auto", *(name for name in PREDICTORS if name != "none")])
def test_a_guider_does_what_the_scale_does(pipeline, predictor):
    pipeline.scheduler = ScoreSDEScheduler(prediction_type="v_prediction", predictor=predictor, corrector="langevin")
    by_scale = draw(pipeline, guidance_scale=3.0, num_inference_steps=5)
    by_guider = draw(pipeline, guider=ClassifierFreeGuidance(guidance_scale=3.0), num_inference_steps=5)
    assert (by_scale - by_guider).abs().max() < 1e-4
    assert (by_scale - draw(pipeline, num_inference_steps=5)).abs().max() > 1e-3


def test_guidance_in_an_interval(pipeline):
    calls = count_calls(pipeline.transformer)
    part = draw(pipeline, guider=ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.7))
    # 10 evaluations, 5 of them with a second one without a class
    assert len(calls) == 15
    assert (part - draw(pipeline, guidance_scale=3.0)).abs().max() > 1e-3
    assert (part - draw(pipeline)).abs().max() > 1e-3
    # by hand
    scheduler, x = pipeline.scheduler, torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            network = pipeline.guided_network(2, [0, 2], 3.0 if 2 <= i < 7 else 1.0)
            x = scheduler.step(network(x, timestep.expand(2)), timestep, x).prev_sample
    assert (part - x).abs().max() < 1e-4


def test_other_guiders_fit(pipeline):
    assert torch.isfinite(draw(pipeline, guider=TangentialClassifierFreeGuidance(guidance_scale=2.0))).all()


@pytest.mark.parametrize("by_guider", [False, True])
def test_auto_guidance_leads_away_from_a_weaker_network(pipeline, by_guider):
    weak = tiny_dit(seed=1)
    calls, weak_calls = count_calls(pipeline.transformer), count_calls(weak)
    arguments = {"guider": ClassifierFreeGuidance(guidance_scale=2.0)} if by_guider else {"guidance_scale": 2.0}
    found = draw(pipeline, weaker_network=weak, **arguments)
    assert calls == weak_calls == [2] * 10
    scheduler, x = pipeline.scheduler, torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(10)
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            good, bad = (
                each(x, timestep.expand(2), class_labels=labels).sample for each in (pipeline.transformer, weak)
            )
            x = scheduler.step(2 * good - bad, timestep, x).prev_sample
    assert (found - x).abs().max() < 1e-4


def test_auto_guidance_needs_no_classes():
    pipeline = tiny_pipeline(network=tiny_dit(num_classes=None))
    weak = tiny_dit(num_classes=None, seed=1)
    arguments = {"class_labels": None, "batch_size": 2}
    guided = draw(pipeline, weaker_network=weak, guidance_scale=2.0, **arguments)
    assert (guided - draw(pipeline, **arguments)).abs().max() > 1e-3
    adaptive = draw(pipeline, weaker_network=weak, guidance_scale=2.0, **arguments | {"num_inference_steps": None})
    assert (guided - adaptive).abs().max() < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 2.0, "guider": True}, "guidance_scale 2.0 and a guider were given"),
        ({"guider": True, "class_labels": None}, "needs class_labels"),
        ({"guider": True, "num_inference_steps": None}, "a guider counts steps"),
        ({"weaker_network": True}, "weaker_network needs a guidance_scale other than 1, or a guider"),
    ],
)
def test_contradictions_are_refused(pipeline, arguments, message):
    if "guider" in arguments:
        arguments["guider"] = ClassifierFreeGuidance(guidance_scale=2.0)
    if "weaker_network" in arguments:
        arguments["weaker_network"] = tiny_dit(seed=1)
    with pytest.raises(ValueError, match=message):
        draw(pipeline, **arguments)
