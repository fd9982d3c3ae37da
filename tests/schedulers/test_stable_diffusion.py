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
