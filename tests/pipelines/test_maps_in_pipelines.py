"""Flow maps, consistency models and learned guidance in pipelines: what networks are told, how often they are called,
what is refused."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiTPipeline, UNet2DModel
from diffusers.guiders import ClassifierFreeGuidance
from networks import awake
from test_guidance import make_classifier
from tiny import random_dit, seeded, stable_diffusion, tiny_pipeline

from score_sde import DiTModel, ScoreSDEInversePipeline, ScoreSDEScheduler, load_bundle, save_bundle
from score_sde.pipelines.operators import inpainting


def network(**options):
    return awake(
        DiTModel(4, 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3, **options).eval()
    )


def flow_pipeline(**scheduler):
    return tiny_pipeline(network=network(two_times=True), network_map="flow_map", **scheduler)


def told(model, name):
    """Where the values of a keyword of every later call are written to."""
    found = []
    model.register_forward_pre_hook(lambda _, __, given: found.append(given.get(name)), with_kwargs=True)
    return found


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_flow_map_is_told_where_to_lead(guidance_scale):
    pipe, noise = flow_pipeline(map_steps=3), torch.randn(2, 1, 4, 4, generator=seeded(0))
    ends, arguments = told(pipe.transformer, "timestep_to"), {"class_labels": [0, 2], "guidance_scale": guidance_scale}
    output = pipe(**arguments, latents=noise, output_type="latent")
    assert output.nfe == 3
    scheduler, x = pipe.scheduler, noise
    scheduler.set_timesteps(3)
    each = 2 if guidance_scale == 1 else 4
    assert torch.equal(torch.stack(ends), scheduler.timesteps_to[:, None].expand(3, each))
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        for t, to in zip(scheduler.timesteps, scheduler.timesteps_to, strict=True):
            towards, away = (
                pipe.transformer(x, t.expand(2), class_labels=each, timestep_to=to.expand(2)).sample
                for each in (labels, torch.full((2,), 3))
            )
            x = scheduler.step(away + guidance_scale * (towards - away), t, x).prev_sample
    assert (output.images - x).abs().max() < 1e-5


def test_a_consistency_model_is_not_told_where_to_lead():
    """As in its training, also where it began as a flow map and could be told."""
    pipe = tiny_pipeline(network=network(two_times=True), network_map="consistency")
    ends = told(pipe.transformer, "timestep_to")
    pipe(class_labels=[0], output_type="latent")
    assert ends == [None, None]


def test_times_are_told_in_float32():
    pipe = flow_pipeline()
    pipe.transformer.to(torch.bfloat16)
    ends = told(pipe.transformer, "timestep_to")
    pipe(class_labels=[0], output_type="latent")
    assert [each.dtype for each in ends] == [torch.float32] * 2


@pytest.mark.parametrize("network_map", ["flow_map", "consistency"])
def test_the_default_is_the_number_of_steps_of_the_checkpoint(network_map, tmp_path):
    pipe = tiny_pipeline(network=network(two_times=network_map == "flow_map"), network_map=network_map, map_steps=3)
    save_bundle(pipe, tmp_path / "bundle")
    opened = load_bundle(tmp_path / "bundle")
    opened.set_progress_bar_config(disable=True)
    for given, nfe in (({}, 3), ({"num_inference_steps": None}, 3), ({"num_inference_steps": 1}, 1)):
        assert opened(class_labels=[1], **given, output_type="latent").nfe == nfe
    assert tiny_pipeline()(class_labels=[1], output_type="latent").nfe == 50
    card = (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    assert f"It is a {network_map.replace('_', ' ')}" in card.replace("consistency model", "consistency")
    assert "made for 3 steps" in card


def test_from_an_image():
    pipe, image = flow_pipeline(), torch.full((1, 1, 4, 4), 0.5)
    ends = told(pipe.transformer, "timestep_to")
    assert pipe(class_labels=[1], image=image, strength=0.5, num_inference_steps=2, output_type="latent").nfe == 2
    assert ends[0] < 500 and ends[1] == pipe.scheduler.timestep(pipe.scheduler.t_min)


# --- consistency models in stock pipelines ------------------------------------------------------------------------


def by_hand(scheduler, model, x, generator, **conditions):
    scheduler.set_timesteps(2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, **conditions).sample, t, x, generator=generator).prev_sample
    return x


def test_a_consistency_model_runs_in_ddpm_pipelines():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(8, 1, 1, norm_num_groups=4, **blocks).eval()
    scheduler = ScoreSDEScheduler(prediction_type="v_prediction", network_map="consistency")
    pipe = DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(generator=seeded(0), num_inference_steps=2, output_type="np").images
    generator = seeded(0)
    x = by_hand(scheduler, unet, torch.randn(1, 1, 8, 8, generator=generator), generator)
    assert abs(images - (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()).max() < 1e-5


def test_a_consistency_model_runs_in_dit_and_stable_diffusion_pipelines():
    settings = {"sde_type": "discrete_vp", "network_map": "consistency"}
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4).eval()
    dit = awake(DiTModel(4, 2, 4, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=1000)).eval()
    pipe = DiTPipeline(transformer=dit, vae=vae, scheduler=ScoreSDEScheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe([3], num_inference_steps=2, generator=seeded(0)).images) == 1
    pipe = stable_diffusion(ScoreSDEScheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe("a cat", num_inference_steps=2, generator=seeded(seed), output_type="latent").images for seed in (0, 0, 1)
    ]
    assert torch.isfinite(images[0]).all() and torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_a_flow_map_in_a_stock_pipeline_is_refused():
    pipe = stable_diffusion(ScoreSDEScheduler(sde_type="discrete_vp", network_map="flow_map"))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="has not told its network, a flow map, where to lead"):
        pipe("a cat", num_inference_steps=2)


# --- what needs denoised samples ----------------------------------------------------------------------------------


def inverse(pipe, **arguments):
    operator = inpainting(torch.arange(16).reshape(1, 1, 4, 4) % 2 == 0)
    solver = ScoreSDEInversePipeline(**pipe.components)
    solver.set_progress_bar_config(disable=True)
    measurement = operator(torch.zeros(1, 1, 4, 4))
    return solver(operator, measurement, class_labels=[1], num_inference_steps=3, output_type="latent", **arguments)


NEEDS = {
    "classifier": lambda pipe: pipe(class_labels=[1], classifier=make_classifier()),
    "pigdm": lambda pipe: inverse(pipe),
    "dps": lambda pipe: inverse(pipe, method="dps"),
}
NEEDS_PATHS = {
    "adaptive": lambda pipe: pipe(
        class_labels=[1], num_inference_steps=None, rtol=0.1, output_type="latent", generator=seeded(0)
    ),
    "likelihood": lambda pipe: pipe.log_likelihood(torch.zeros(1, 1, 4, 4), class_labels=[1], steps=2),
    "encode": lambda pipe: pipe.encode(torch.zeros(1, 1, 4, 4), class_labels=[1]),
}


@pytest.mark.parametrize("what", [*NEEDS, *NEEDS_PATHS])
def test_what_needs_denoised_samples_is_refused_with_a_consistency_model(what):
    pipe = tiny_pipeline(network_map="consistency")
    with pytest.raises(ValueError, match="need.* denoised samples; a consistency model gives none"):
        (NEEDS | NEEDS_PATHS)[what](pipe)


@pytest.mark.parametrize("what", NEEDS)
def test_a_flow_map_is_an_ordinary_network_with_an_ordinary_predictor(what):
    pipe = flow_pipeline()
    with pytest.raises(ValueError, match="which a flow map gives where it is told its own time"):
        NEEDS[what](pipe)
    pipe.scheduler = ScoreSDEScheduler.from_config(pipe.scheduler.config, predictor="dpmpp_2m")
    NEEDS[what](pipe)


@pytest.mark.parametrize("what", NEEDS_PATHS)
def test_paths_of_a_flow_map_are_those_of_its_own_times(what):
    pipe, own = flow_pipeline(), tiny_pipeline()
    own.transformer = pipe.transformer
    found, expected = (NEEDS_PATHS[what](each) for each in (pipe, own))
    for name in ("images", "noise"):
        if hasattr(found, name):
            found, expected = getattr(found, name), getattr(expected, name)
    assert torch.equal(found, expected)


def test_a_consistency_model_fills_what_is_missing():
    pipe = tiny_pipeline(network_map="consistency")
    found = inverse(pipe, method="replacement")
    assert found.nfe == 3 and found.residual.max() < 1e-5


def test_a_network_that_cannot_be_told_is_no_flow_map():
    pipe = tiny_pipeline(network_map="flow_map")
    with pytest.raises(ValueError, match="this DiTModel cannot be told a second time"):
        pipe(class_labels=[1])


# --- learned guidance ---------------------------------------------------------------------------------------------


def calls(model):
    found = []
    model.register_forward_hook(lambda module, inputs, output: found.append(len(inputs[0])))
    return found


def test_one_scale_that_was_learned_is_the_only_one():
    pipe = tiny_pipeline(network=network(folded_guidance=1.5))
    arguments = {"class_labels": [0, 2], "num_inference_steps": 3, "output_type": "latent"}
    counted = calls(pipe.transformer)
    plain = pipe(**arguments, generator=seeded(0)).images
    assert torch.equal(plain, pipe(**arguments, guidance_scale=1.5, generator=seeded(0)).images)
    assert counted == [2] * 6
    with pytest.raises(ValueError, match=r"guidance_scale 3.0: this network has learned guidance with the scale 1.5"):
        pipe(**arguments, guidance_scale=3.0)


def test_a_scale_that_is_an_input_is_told():
    pipe = tiny_pipeline(network=network(guidance_embeds=True))
    arguments = {"class_labels": [0, 2], "num_inference_steps": 3, "output_type": "latent"}
    counted, scales = calls(pipe.transformer), told(pipe.transformer, "guidance")
    first, second = (pipe(**arguments, guidance_scale=w, generator=seeded(0)).images for w in (1.0, 4.0))
    assert counted == [2] * 6 and (first - second).abs().max() > 1e-3
    assert [each.tolist() for each in scales] == [[1.0, 1.0]] * 3 + [[4.0, 4.0]] * 3
    # and may be changed on the way
    del scales[:]
    pipe(**arguments, callback_on_step_end=lambda call, *_: setattr(call, "_guidance_scale", 2.0))
    assert [float(each[0]) for each in scales] == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("options", [{"folded_guidance": 1.5}, {"guidance_embeds": True}], ids=str)
@pytest.mark.parametrize("given", [{"guider": ClassifierFreeGuidance()}, {"weaker_network": random_dit()}], ids=str)
def test_no_other_guidance_goes_with_that_which_was_learned(options, given):
    pipe = tiny_pipeline(network=network(**options))
    with pytest.raises(ValueError, match=f"{next(iter(given))}: this network has learned its guidance"):
        pipe(class_labels=[1], **given)
