"""In the stock pipelines of Stable Diffusion, text to image and image to image, with tiny random components."""

import diffusers
import pytest
import torch
from exact import TOLERANCE
from tiny import text_unet
from transformers import CLIPTextConfig, CLIPTextModel

from score_sde import ScoreSDEScheduler


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="module")
def components():
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=100
    )
    unet = text_unet()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}
    absent = {"tokenizer": None, "safety_checker": None, "feature_extractor": None, "image_encoder": None}
    return {name: part.eval() for name, part in parts.items()} | absent


def embeddings(n=1):
    return torch.randn(n, 7, 16, generator=torch.Generator().manual_seed(5))


def draw(kind, components, scheduler, **arguments):
    """Images, and the number of network calls that they took."""
    pipeline = kind(**components, scheduler=scheduler, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    dtype, calls = components["unet"].dtype, []
    hook = components["unet"].register_forward_hook(lambda *_: calls.append(1))
    if kind is diffusers.StableDiffusionImg2ImgPipeline:
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        arguments = {"image": image.to(dtype), "strength": 0.6} | arguments
    images = pipeline(
        prompt_embeds=embeddings().to(dtype),
        negative_prompt_embeds=-embeddings().to(dtype),
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **arguments,
    ).images
    hook.remove()
    assert torch.isfinite(images).all()
    return images, len(calls)


KINDS = [diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline]
SAME = [
    (diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True), "ddim"),
    (diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"), "ddim"),
    (diffusers.HeunDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"), "heun"),
    (diffusers.DPMSolverMultistepScheduler(**SCHEDULE), "dpmpp_2m"),
    (diffusers.UniPCMultistepScheduler(**SCHEDULE), "unipc_2"),
    (diffusers.UniPCMultistepScheduler(**SCHEDULE, solver_order=3), "unipc_3"),
]


@pytest.mark.parametrize("kind", KINDS, ids=["text", "image"])
@pytest.mark.parametrize(("stock", "predictor"), SAME, ids=[f"{type(s).__name__}-{p}" for s, p in SAME])
def test_the_same_method_draws_the_same_image(components, kind, stock, predictor):
    ours = ScoreSDEScheduler.from_config(stock.config, predictor=predictor)
    (expected, calls), (found, our_calls) = (
        draw(kind, components, scheduler, num_inference_steps=10) for scheduler in (stock, ours)
    )
    assert calls == our_calls
    assert expected.std() > 0.01
    assert (expected - found).abs().max() < 2 * TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"predictor": "rk4"},
        {"predictor": "dpmpp_3s", "timestep_spacing": "karras"},
        {"predictor": "reverse_diffusion", "corrector": "langevin"},
        {"predictor": "heun", "corrector": "annealed_langevin", "corrector_steps": 2},
        {"predictor": "ancestral", "corrector": "langevin", "corrector_position": "before"},
        {"predictor": "heun", "s_churn": 5.0},
        {"predictor": "dpmpp_3m", "eta": 1.0},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "auto",
)
def test_every_kind_of_sampler_runs_with_its_number_of_calls(components, settings):
    scheduler = ScoreSDEScheduler.from_config(diffusers.PNDMScheduler(**SCHEDULE).config, **settings)
    _, calls = draw(diffusers.StableDiffusionPipeline, components, scheduler, num_inference_steps=5)
    assert calls == scheduler.nfe
    # half of the steps, whole ones
    _, fewer = draw(
        diffusers.StableDiffusionImg2ImgPipeline, components, scheduler, num_inference_steps=10, strength=0.5
    )
    assert fewer == scheduler.nfe - 5 * scheduler.order


def test_own_timesteps_and_sigmas_go_through_the_pipeline(components):
    scheduler = ScoreSDEScheduler.from_config(diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False).config)
    for given in ({"timesteps": [900.0, 600.0, 250.5, 40.0]}, {"sigmas": [12.0, 3.0, 0.8, 0.1]}):
        _, calls = draw(diffusers.StableDiffusionPipeline, components, scheduler, **given)
        assert calls == 4
    scheduler.set_timesteps(timesteps=[900.0, 600.0, 250.5, 40.0])
    assert scheduler.timesteps.tolist() == [900.0, 600.0, 250.5, 40.0]


def test_eta_of_the_pipeline_is_the_trajectorys(components):
    """And 0, its default, leaves the scheduler's own."""
    stock = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False)
    kind, call = diffusers.StableDiffusionPipeline, {"num_inference_steps": 4, "height": 16, "width": 16}

    def images(scheduler, **arguments):
        return draw(kind, components, scheduler, **call, **arguments)[0]

    expected = images(stock, eta=0.5)
    assert (
        images(ScoreSDEScheduler.from_config(stock.config, predictor="ddim"), eta=0.5) - expected
    ).abs().max() < 1e-5
    own = ScoreSDEScheduler.from_config(stock.config, predictor="ddim", eta=0.5)
    assert (images(own) - expected).abs().max() < 1e-5
    assert (images(stock) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="predictor 'euler' takes no eta .got 0.5.; those that do: "):
        images(ScoreSDEScheduler.from_config(stock.config, predictor="euler"), eta=0.5)


def test_an_image_that_no_step_is_left_for_is_refused(components):
    scheduler = ScoreSDEScheduler.from_config(diffusers.DDIMScheduler(**SCHEDULE).config)
    for arguments in ({"strength": 0.1, "num_inference_steps": 5}, {"strength": 0.0, "num_inference_steps": 5}):
        with pytest.raises(ValueError, match="strength times num_inference_steps must be at least 1"):
            draw(diffusers.StableDiffusionImg2ImgPipeline, components, scheduler, **arguments)


def fitted_in_a_call(components, kind=diffusers.StableDiffusionPipeline, settings=None, **arguments):
    """A scheduler whose times were fitted in a call of a pipeline, the errors, and the sizes and times of all network
    evaluations."""
    scheduler = ScoreSDEScheduler.from_config(diffusers.PNDMScheduler(**SCHEDULE).config, **settings or {})
    pipeline = kind(**components, scheduler=scheduler, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True, leave=False)
    seen, index = [], pipeline.config.scheduler
    hook = components["unet"].register_forward_hook(lambda _, given, output: seen.append(float(given[1])))
    call = {"prompt_embeds": embeddings(2), "negative_prompt_embeds": -embeddings(2), "guidance_scale": 3.0}
    try:
        errors = scheduler.calibrate(
            pipeline,
            4,
            call=call | {"generator": torch.Generator().manual_seed(0)} | arguments,
            reference_steps=20,
            sweeps=2,
        )
    finally:
        hook.remove()
        assert pipeline.scheduler is scheduler
        assert pipeline.config.scheduler == index
        assert pipeline._progress_bar_config == {"disable": True, "leave": False}
    return scheduler, errors, seen


def test_times_are_fitted_in_a_call_as_to_its_guided_network(components):
    scheduler, errors, seen = fitted_in_a_call(components)
    predictor, times, made_with = scheduler.config.calibration["4"]
    # and two that find out whether the network depends on the number of the step
    assert len(seen) == made_with["evaluations"] + 2
    assert made_with["guidance_scale"] == 3.0
    assert errors[4][1] < errors[4][0]

    by_hand = ScoreSDEScheduler.from_config(diffusers.PNDMScheduler(**SCHEDULE).config)
    states = torch.cat([-embeddings(2), embeddings(2)])

    def guided(x, timesteps):
        without, given = components["unet"](torch.cat([x, x]), timesteps[0], states).sample.chunk(2)
        return without + 3.0 * (given - without)

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = by_hand.calibrate(guided, 4, noise=noise, reference_steps=20, sweeps=2)
    assert by_hand.config.calibration["4"][0] == predictor
    assert by_hand.config.calibration["4"][1] == pytest.approx(times, rel=1e-6)
    assert errors[4] == pytest.approx(expected[4], rel=1e-3)

    # the next call takes them
    steps = []
    draw(
        diffusers.StableDiffusionPipeline,
        components,
        scheduler,
        num_inference_steps=4,
        callback_on_step_end=lambda pipeline, i, t, tensors: steps.append(float(t)) or {},
    )
    assert steps == pytest.approx([1000 * t - 1 for t in times], rel=1e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "edm"])
def test_times_are_fitted_for_every_prediction(components, prediction_type):
    _, errors, _ = fitted_in_a_call(components, settings={"prediction_type": prediction_type})
    assert errors[4][1] < errors[4][0]


def test_times_are_fitted_in_half_precision(components):
    try:
        for name in ("unet", "text_encoder"):
            components[name].bfloat16()
        _, errors, _ = fitted_in_a_call(components)
        assert errors[4][1] <= errors[4][0]
    finally:
        for name in ("unet", "text_encoder"):
            components[name].float()


def interval(pipeline, i, t, tensors):
    pipeline._guidance_scale = 3.0 if i < 30 else 1.5
    return {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 4}, "call has num_inference_steps=4: leave it out"),
        ({"timesteps": [900.0, 100.0]}, "call has timesteps="),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(2, 4, 8, 8)}}, "changes samples or times between"),
        ({"callback_on_step_end": interval}, "depends on the number of the step"),
    ],
    ids=["number", "times", "latents", "interval"],
)
def test_calls_that_cannot_be_searched_are_refused(components, arguments, message):
    with pytest.raises(ValueError, match=message):
        fitted_in_a_call(components, **arguments)


def test_times_are_not_fitted_from_an_image_on(components):
    image = {"image": torch.rand(2, 3, 16, 16), "strength": 0.6}
    with pytest.raises(ValueError, match="leave out what cuts them, such as strength"):
        fitted_in_a_call(components, diffusers.StableDiffusionImg2ImgPipeline, **image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"predictor": "ancestral", "corrector": "langevin"}])
def test_half_precision(components, dtype, settings):
    parts = {name: part.to(dtype) if part is not None else None for name, part in components.items()}
    scheduler = ScoreSDEScheduler.from_config(diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False).config, **settings)
    try:
        images, _ = draw(diffusers.StableDiffusionPipeline, parts, scheduler, num_inference_steps=4)
        assert images.dtype == dtype
    finally:
        for part in components.values():
            if part is not None:
                part.float()
