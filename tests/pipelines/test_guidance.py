"""Guidance: by a scale, by diffusers' guiders in an interval, by a weaker network, and by a classifier."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FirstBlockCacheConfig
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import ClassifierFreeGuidance, TangentialClassifierFreeGuidance
from exact import MIXTURE, GaussianMixture
from tiny import random_dit, tiny_pipeline

from score_sde import DiTModel, NoiseConditionalClassifier, ScoreSDEScheduler
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES
from score_sde.schedulers.solvers import PREDICTORS


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


@pytest.mark.parametrize(
    "predictor", ["auto", *(name for name, row in PREDICTORS.items() if name != "none" and not row.maps)]
)
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
    weak = random_dit(seed=1)
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
    pipeline = tiny_pipeline(network=random_dit(num_classes=None))
    weak = random_dit(num_classes=None, seed=1)
    arguments = {"class_labels": None, "batch_size": 2}
    guided = draw(pipeline, weaker_network=weak, guidance_scale=2.0, **arguments)
    assert (guided - draw(pipeline, **arguments)).abs().max() > 1e-3
    adaptive = draw(pipeline, weaker_network=weak, guidance_scale=2.0, **arguments | {"num_inference_steps": None})
    assert (guided - adaptive).abs().max() < 0.3


# --- classifier guidance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_exact_classifier_makes_the_exact_conditional_model(sde_type, prediction_type):
    """Bayes' rule on a mixture: its score plus the gradient of log p(component | x_t) is the component's own score."""
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type=prediction_type)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    components = torch.tensor([0, 1, 2, 0, 1, 2])

    def steer(x, t, denoise):
        noisy = x.detach().requires_grad_()
        means, variances = MIXTURE.noised(scheduler.path, t[0])
        squares = (noisy[:, None] - means) ** 2 / variances + variances.log()
        shares = torch.log_softmax(MIXTURE.weights.log() - squares.sum(-1) / 2, dim=1)
        [gradient] = torch.autograd.grad(shares[range(6), components].sum(), noisy)
        return scheduler.path.add_to_score(denoise(x, t), gradient, t)

    def perfect(data):
        network = data.network(scheduler)
        return lambda model_input, timesteps: network(model_input, timesteps[0])

    of_component = [
        perfect(GaussianMixture([1.0], MIXTURE.means[k : k + 1], MIXTURE.variances[k : k + 1])) for k in range(3)
    ]
    for t in (0.05, 0.5, 0.95):
        timesteps = scheduler.timestep(torch.tensor(t)).expand(6)
        guided = scheduler.steered(perfect(MIXTURE), steer)(x, timesteps)
        exact = torch.stack([of_component[k](x, timesteps)[i] for i, k in enumerate(components)])
        assert (guided - exact).abs().max() < 1e-5 * (1 + exact.abs().max())


def make_classifier(num_classes=3):
    torch.manual_seed(5)
    return NoiseConditionalClassifier(4, 1, num_classes, block_out_channels=(16, 16), norm_num_groups=4).eval()


class Brightness:
    """A classifier of dark (0), grey (1) and bright (2) samples, the less sure the more noise there is."""

    config, dtype = FrozenDict(num_classes=3), torch.float32

    def __call__(self, sample, half_log_snr):
        signal = torch.sigmoid(2 * half_log_snr).sqrt() * sample.mean((1, 2, 3))
        return SimpleNamespace(logits=signal[:, None] * torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    "predictor", ["auto", *(name for name, row in PREDICTORS.items() if name != "none" and not row.maps)]
)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_every_sampler_follows_a_classifier(predictor, num_classes):
    pipeline = tiny_pipeline(network=random_dit(num_classes=num_classes), predictor=predictor, corrector="langevin")

    def brightness(**arguments):
        return draw(pipeline, num_inference_steps=8, **arguments).mean((1, 2, 3))

    # with a class table: the network itself is not told
    scale = 1.0 if num_classes is None else 0.0
    guided = brightness(class_labels=[0, 1, 2], classifier=Brightness(), classifier_scale=3.0, guidance_scale=scale)
    without = brightness(class_labels=None, batch_size=3)
    assert guided[0] < without[0] - 0.05
    assert guided[2] > without[2] + 0.05


def test_a_classifier_of_scale_0_changes_nothing_and_a_learned_variance_stays():
    model = DiTModel(4, 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3, learn_sigma=True)
    pipeline = tiny_pipeline(network=model.eval(), predictor="ancestral", variance_type="learned_range")
    plain = draw(pipeline)
    steered = draw(pipeline, classifier=make_classifier(), classifier_scale=0.0)
    assert (plain - steered).abs().max() < 1e-4


def test_feature_caches_keep_the_two_predictions_apart(pipeline):
    """With a threshold that is always met, every step but the first reuses what the blocks after the first added."""
    pipeline = tiny_pipeline(network=DiTModel(4, 2, 1, 16, 3, 2, num_classes=3).eval())
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for guidance, calls in (({"guidance_scale": 2.0}, 1), ({"guider": ClassifierFreeGuidance(guidance_scale=2.0)}, 2)):
        runs = []
        handle = pipeline.transformer.blocks[2].ff.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        assert torch.isfinite(draw(pipeline, **guidance)).all()
        assert len(runs) == calls
        handle.remove()
        pipeline.transformer._reset_stateful_cache()


def test_guidance_scale_0_asks_the_network_without_a_class(pipeline):
    calls = count_calls(pipeline.transformer)
    without = draw(pipeline, guidance_scale=0.0)
    assert calls == [2] * 10
    assert torch.equal(without, draw(pipeline, class_labels=None, batch_size=2))


def test_adaptive_solvers_follow_a_classifier_too(pipeline):
    arguments = {"classifier": make_classifier(), "classifier_scale": 3.0}
    adaptive = draw(pipeline, num_inference_steps=None, rtol=1e-4, atol=1e-4, **arguments)
    assert (adaptive - draw(pipeline, num_inference_steps=100, **arguments)).abs().max() < 0.02


def test_a_classifier_is_saved_and_refuses_other_shapes(tmp_path):
    classifier = make_classifier()
    classifier.save_pretrained(tmp_path)
    again = NoiseConditionalClassifier.from_pretrained(tmp_path)
    x, half_log_snr = torch.randn(2, 1, 4, 4), torch.tensor([0.5, -2.0])
    assert torch.equal(again(x, half_log_snr).logits, classifier(x, half_log_snr, return_dict=False)[0])
    # the noise level matters
    assert (classifier(x, half_log_snr + 1).logits - classifier(x, half_log_snr).logits).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"sample must be \(B, 1, H, W\); got \(2, 3, 4, 4\)"):
        classifier(torch.zeros(2, 3, 4, 4), half_log_snr)
    with pytest.raises(ValueError, match="norm_num_groups 7 must divide block_out_channels"):
        NoiseConditionalClassifier(norm_num_groups=7)


def test_stock_schedulers_have_no_path_for_a_classifier(pipeline):
    pipeline.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="a classifier needs a ScoreSDEScheduler, not a DDIMScheduler"):
        draw(pipeline, classifier=make_classifier())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 2.0, "guider": True}, "guidance_scale 2.0 and a guider were given"),
        ({"guider": True, "class_labels": None}, "needs class_labels"),
        ({"guider": True, "num_inference_steps": None}, "a guider counts steps"),
        ({"classifier": 3, "class_labels": None, "batch_size": 1}, "a classifier needs class_labels to lead to"),
        ({"classifier": 4}, "the classifier has 4 classes, the network 3"),
        ({"weaker_network": True}, "weaker_network needs a guidance_scale other than 1, or a guider"),
    ],
)
def test_contradictions_are_refused(pipeline, arguments, message):
    if "guider" in arguments:
        arguments["guider"] = ClassifierFreeGuidance(guidance_scale=2.0)
    if "classifier" in arguments:
        arguments["classifier"] = make_classifier(arguments["classifier"])
    if "weaker_network" in arguments:
        arguments["weaker_network"] = random_dit(seed=1)
    with pytest.raises(ValueError, match=message):
        draw(pipeline, **arguments)
