"""Conditions by name: what the network is told, what guidance leads away from, and what callbacks change."""

import pytest
import torch
from tiny import seeded, tiny_pipeline

from score_sde import DiTModel, ScoreSDEInversePipeline, ScoreSDEScheduler
from score_sde.pipelines.operators import super_resolution


WORDS = torch.randn(2, 3, 6, generator=seeded(1))


def worded_dit(num_classes=3):
    """A DiT that is told a sequence beside the class, or alone."""
    torch.manual_seed(0)
    model = DiTModel(4, 2, 1, 16, 1, 2, num_classes=num_classes, conditioning="cross_attention", cross_attention_dim=6)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def draw(pipeline, **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded(0)} | arguments
    return pipeline(**arguments).images


def by_hand(network, scale, told, away):
    """Samples of guidance from one set of the network's arguments to another."""
    scheduler, x = ScoreSDEScheduler(prediction_type="v_prediction"), torch.randn(2, 1, 4, 4, generator=seeded(0))
    scheduler.set_timesteps(3, guidance_scale=scale)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            origin, output = (network(x, timestep, **each).sample for each in (away, told))
            x = scheduler.step(origin + scale * (output - origin), timestep, x).prev_sample
    return x


@pytest.mark.parametrize("labels", [None, [2, 0]])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_sequence_is_guided_as_labels_are(labels, scale):
    network = worded_dit(num_classes=labels and 3)
    told = {"encoder_hidden_states": WORDS, "encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    away = told | {"encoder_hidden_states": torch.zeros_like(WORDS)}
    away["encoder_attention_mask"] = torch.tensor([[1, 0, 0], [1, 0, 0]])
    found = draw(
        tiny_pipeline(network=network), batch_size=2, class_labels=labels, conditions=told, guidance_scale=scale
    )
    if labels:
        told, away = told | {"class_labels": torch.tensor(labels)}, away | {"class_labels": torch.tensor([3, 3])}
    assert (found - by_hand(network, scale, told, away)).abs().max() < 1e-4
    assert (found - by_hand(network, 4 - scale, told, away)).abs().max() > 1e-2


def test_one_condition_is_for_all_samples_and_labels_may_be_among_them():
    pipeline = tiny_pipeline(network=worded_dit())
    both = {"encoder_hidden_states": WORDS[:1].expand(2, -1, -1), "class_labels": [1, 1]}
    found = draw(pipeline, class_labels=1, conditions={"encoder_hidden_states": WORDS[:1]}, batch_size=2)
    assert torch.equal(found, draw(pipeline, conditions=both))


def test_encodings_likelihoods_and_measurements_are_told_too():
    network = worded_dit(num_classes=None)
    pipeline, solver = tiny_pipeline(network=network), tiny_pipeline(ScoreSDEInversePipeline, network)
    x, told = 0.1 * torch.randn(2, 1, 4, 4, generator=seeded(2)), {"encoder_hidden_states": WORDS}

    def measure(words):
        conditions, tolerance = {"encoder_hidden_states": words}, {"rtol": 1e-4, "atol": 1e-4}
        image = solver(
            super_resolution(2), torch.zeros(2, 1, 2, 2), conditions=conditions, num_inference_steps=3,
            generator=seeded(0), output_type="latent",
        ).images  # fmt: skip
        code = pipeline.encode(samples=x, conditions=conditions, **tolerance)
        return image, code, pipeline.log_likelihood(samples=x, conditions=conditions, trace="exact", steps=4).log_prob

    for found, other in zip(measure(WORDS), measure(WORDS[:1]), strict=True):
        # of the first sample nothing changed, of the second the words
        assert (found[0] - other[0]).abs().max() < 1e-3 and (found[1] - other[1]).abs().max() > 2e-3
    code = pipeline.encode(samples=x, conditions=told)
    tolerance = {"num_inference_steps": None, "rtol": 1e-4, "atol": 1e-4}
    pipeline.scheduler = ScoreSDEScheduler.from_config(pipeline.scheduler.config, denoise_final=False)
    assert (draw(pipeline, latents=code, conditions=told, **tolerance) - x).abs().max() < 1e-3


def test_callbacks_change_any_condition():
    pipeline, words = tiny_pipeline(network=worded_dit()), torch.zeros(2, 2, 3, 6)

    def callback(pipe, step, timestep, tensors):
        assert [len(value) for value in tensors.values()] == [2, 2, 2]
        assert torch.equal(tensors["class_labels"], tensors["prompt_embeds"])
        return {"encoder_hidden_states": words, "class_labels": tensors["class_labels"].fill_(1)}

    names = ["encoder_hidden_states", "class_labels", "prompt_embeds"]
    arguments = {"class_labels": [0, 2], "conditions": {"encoder_hidden_states": WORDS}, "num_inference_steps": 1}
    first = draw(pipeline, **arguments)
    arguments |= {"num_inference_steps": 2, "callback_on_step_end_tensor_inputs": names}
    changed = draw(pipeline, callback_on_step_end=callback, **arguments)
    scheduler, x = ScoreSDEScheduler(prediction_type="v_prediction"), torch.randn(2, 1, 4, 4, generator=seeded(0))
    scheduler.set_timesteps(2, guidance_scale=1.0)
    for timestep, labels, told in zip(scheduler.timesteps, ([0, 2], [1, 1]), (WORDS, words[0]), strict=True):
        with torch.no_grad():
            output = pipeline.transformer(x, timestep, torch.tensor(labels), told).sample
        x = scheduler.step(output, timestep, x).prev_sample
    assert (changed - x).abs().max() < 1e-4 and first.shape == x.shape


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1], "callback_on_step_end returned a list: return a dict of the tensors that it changed"),
        (torch.zeros(1), "callback_on_step_end returned a Tensor"),
        ({"noise": 1}, "callback_on_step_end returned 'noise', which is none of latents, class_labels"),
    ],
)
def test_what_a_callback_may_not_return(returned, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline(), class_labels=[1], callback_on_step_end=lambda *_: returned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditions": {"words": WORDS}}, "this DiTModel takes no words, but hidden_states, timestep, class_labels"),
        ({"conditions": {"encoder_hidden_states": [1]}}, r"encoder_hidden_states must be a tensor .*, not \[1\]"),
        ({"conditions": {"encoder_hidden_states": WORDS}, "batch_size": 3}, "has 2 elements for 3 samples"),
        ({"conditions": {"encoder_hidden_states": WORDS}, "class_labels": [1, 1, 1]}, "2 elements for 3 samples"),
        ({"conditions": {"class_labels": [1]}, "class_labels": [1]}, "class_labels were given twice"),
        ({"conditions": {"class_labels": [7]}}, "class label 7 is out of range"),
    ],
)
def test_conditions_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline(network=worded_dit()), **arguments)
