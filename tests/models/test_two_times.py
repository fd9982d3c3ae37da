"""Networks that are told a second time, or a guidance scale: what they give before they have learned it, and that they
can."""

import pytest
import torch
from networks import awake, call, tiny_dit, tiny_ncsnpp, tiny_unet

from score_sde import DiTModel


MODELS = [
    pytest.param(build, options, id=f"{build.__name__}-{'-'.join(map(str, options.values()))}")
    for build, options in [
        (tiny_dit, {}),
        (tiny_dit, {"conditioning": "in_context", "cross_attention_dim": 7}),
        (tiny_dit, {"shared_adaln": True, "pooled_projection_dim": 5, "frequency_shift": 1.0, "num_classes": None}),
        (tiny_unet, {"num_classes": None}),
        (tiny_ncsnpp, {}),
    ]
]
TO = torch.tensor([3.0, 400.5])


@pytest.mark.parametrize(("build", "options"), MODELS)
def test_any_checkpoint_opens_with_two_times_and_gives_its_old_output(build, options, tmp_path):
    build(**options).save_pretrained(tmp_path)
    old = build(**options)
    new = type(old).from_pretrained(tmp_path).eval().with_two_times()
    expected = call(old)
    for told in ({}, {"timestep_to": TO}, {"timestep_to": 7.0}):
        assert torch.equal(call(new, **told), expected)
    # and itself opens again
    new.save_pretrained(tmp_path / "new")
    again = type(old).from_pretrained(tmp_path / "new").eval()
    assert again.config.two_times and torch.equal(call(again, timestep_to=TO), expected)


@pytest.mark.parametrize(("build", "options"), MODELS)
def test_the_second_time_is_learned(build, options):
    model = build(**options).with_two_times()
    call(model, timestep_to=TO).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.time_to_embed[2].parameters())
    # once it is, the output depends on it, sample by sample, and without it the map leads nowhere
    awake(model)
    told = call(model, timestep_to=TO)
    assert (told - call(model, timestep_to=TO.flip(0))).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert torch.equal(call(model, timestep=TO), call(model, timestep=TO, timestep_to=TO))


def test_a_fresh_model_of_two_times_is_as_zero_as_any():
    model = DiTModel(8, 2, 3, hidden_size=16, num_layers=1, num_attention_heads=2, two_times=True)
    assert not call(model, timestep_to=TO).any() and model.time_to_embed[0].weight.std() > 0.01


@pytest.mark.parametrize("build", [tiny_dit, tiny_unet])
def test_a_second_time_where_there_is_none_is_refused(build):
    with pytest.raises(ValueError, match="timestep_to was given to a model without two_times"):
        call(build(), timestep_to=TO)


@pytest.mark.parametrize("options", [{"vocab_size": 7, "sample_size": (4,)}, {"time_conditioning": False}])
def test_networks_without_a_time_of_this_kind_cannot_be_told_two(options):
    with pytest.raises(ValueError, match="two_times needs time_conditioning and no vocab_size"):
        DiTModel(hidden_size=32, num_layers=1, num_attention_heads=2, two_times=True, **options)


def test_a_second_time_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"timestep_to has shape \(3,\); it must be a number or have shape \(2,\)"):
        call(tiny_unet().with_two_times(), timestep_to=torch.zeros(3))


def test_weights_keep_their_dtype():
    model = tiny_ncsnpp().to(torch.bfloat16)
    model.fourier.float()
    new = model.with_two_times()
    assert {name: value.dtype for name, value in model.state_dict().items()}.items() <= {
        name: value.dtype for name, value in new.state_dict().items()
    }.items()
    assert new.time_to_embed[0].weight.dtype == torch.bfloat16


# --- guidance -----------------------------------------------------------------------------------------------------

SCALES = torch.tensor([1.5, 7.0])


@pytest.mark.parametrize(("build", "options"), MODELS)
def test_any_checkpoint_opens_with_guidance_and_learns_it(build, options, tmp_path):
    build(**options).save_pretrained(tmp_path)
    old = build(**options)
    model = type(old).from_pretrained(tmp_path).eval().with_two_times().with_guidance_embeds()
    for told in ({}, {"guidance": SCALES}, {"guidance": 3.0, "timestep_to": TO}):
        assert torch.equal(call(model, **told), call(old))
    call(model, guidance=SCALES).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.guidance_embed[2].parameters())
    awake(model)
    told = call(model, guidance=SCALES)
    assert (told - call(model, guidance=SCALES.flip(0))).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert torch.equal(call(model), call(model, guidance=1.0))


@pytest.mark.parametrize("build", [tiny_dit, tiny_unet])
def test_learned_guidance_that_contradicts_is_refused(build):
    with pytest.raises(ValueError, match="guidance was given to a model without guidance_embeds"):
        call(build(), guidance=SCALES)
    with pytest.raises(ValueError, match="folded_guidance 2.0 contradicts guidance_embeds"):
        build(folded_guidance=2.0, guidance_embeds=True)
    for value in (float("nan"), "2", True):
        with pytest.raises(ValueError, match="folded_guidance .* must be a finite number"):
            build(folded_guidance=value)
    # it changes nothing in the network
    assert torch.equal(call(build(folded_guidance=2.0)), call(build()))


def test_tokens_have_no_learned_guidance():
    with pytest.raises(ValueError, match="guidance_embeds needs time_conditioning and no vocab_size"):
        DiTModel(hidden_size=32, num_layers=1, num_attention_heads=2, guidance_embeds=True, vocab_size=7, sample_size=4)
