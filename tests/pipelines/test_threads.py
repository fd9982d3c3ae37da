"""Calls in several threads on one pipeline, bit for bit what they give one after another."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from tiny import latents, random_dit, seeded, stable_diffusion, tiny_pipeline

from score_sde import ScoreSDEInversePipeline, ScoreSDEScheduler
from score_sde.pipelines.operators import super_resolution


def in_threads(calls):
    """The results of all calls, which begin at the same moment."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def assert_the_same(calls):
    together, alone = in_threads(calls), [call() for call in calls]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


SCHEDULERS = {
    "auto": {},
    "heun": {"predictor": "heun"},
    "adams_4": {"predictor": "adams_4"},
    "langevin": {"predictor": "ancestral", "corrector": "langevin"},
    "UniPC": diffusers.UniPCMultistepScheduler(prediction_type="v_prediction"),
    "PNDM": diffusers.PNDMScheduler(prediction_type="v_prediction"),
    "DPMSolverMultistep": diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_threads_draw_what_one_draws(name):
    """Of other lengths, classes, guidance and seeds, each with a callback that changes its own guidance."""
    pipeline = tiny_pipeline()
    if isinstance(SCHEDULERS[name], dict):
        pipeline.scheduler = ScoreSDEScheduler(prediction_type="v_prediction", **SCHEDULERS[name])
    else:
        pipeline.scheduler = SCHEDULERS[name]
    # diffusers notes the class in the config of what is printed: before the comparison, not in it
    str(pipeline.scheduler)
    before = {key: str(value) for key, value in vars(pipeline.scheduler).items()}

    def call(i):
        def callback(view, step, timestep, tensors):
            view._guidance_scale = 1.0 + i * step
            view._interrupt = i == 3 and step == 2

        return pipeline(
            class_labels=[i % 3],
            guidance_scale=1.0 + i,
            num_inference_steps=5 + i,
            generator=seeded(i),
            output_type="latent",
            callback_on_step_end=callback,
        ).images

    assert_the_same([lambda i=i: call(i) for i in range(4)])
    assert {key: str(value) for key, value in vars(pipeline.scheduler).items()} == before


def test_threads_share_a_guider():
    pipeline, guider = tiny_pipeline(), ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.7)

    def call(i):
        return pipeline(
            class_labels=[i], guider=guider, num_inference_steps=4 + i, generator=seeded(i), output_type="latent"
        ).images

    assert_the_same([lambda i=i: call(i) for i in range(3)])


def test_threads_encode_edit_and_measure_on_one_pipeline():
    pipeline = tiny_pipeline(network=random_dit(in_channels=2))
    image = latents().clamp(-1, 1) / 2 + 0.5
    assert_the_same(
        [
            lambda: pipeline.encode(samples=latents(), rtol=1e-2, atol=1e-2),
            lambda: pipeline.log_likelihood(samples=latents(), steps=3, generator=seeded(0)).log_prob,
            lambda: pipeline(image=image, num_inference_steps=4, generator=seeded(1), output_type="latent").images,
            lambda: pipeline(batch_size=2, num_inference_steps=7, generator=seeded(1), output_type="latent").images,
        ]
    )


def test_threads_solve_inverse_problems_on_one_pipeline():
    pipeline, operator = tiny_pipeline(ScoreSDEInversePipeline, predictor="ancestral"), super_resolution(2)
    y = operator(torch.rand(1, 1, 4, 4, generator=seeded(1)))

    def call(method, steps):
        return pipeline(
            operator, y, method=method, num_inference_steps=steps, generator=seeded(0), output_type="latent"
        ).images

    assert_the_same([lambda m=m: call(*m) for m in (("repaint", 12), ("dps", 5), ("pigdm", 6), ("repaint", 15))])


def test_another_scheduler_set_during_a_call_is_for_the_next():
    pipeline, other = tiny_pipeline(), ScoreSDEScheduler(prediction_type="v_prediction", sde_type="linear")

    def change(view, step, timestep, tensors):
        pipeline.scheduler = other

    arguments = {"class_labels": [1], "num_inference_steps": 5, "output_type": "latent"}
    alone = pipeline(generator=seeded(0), **arguments).images
    assert torch.equal(pipeline(generator=seeded(0), callback_on_step_end=change, **arguments).images, alone)
    assert not torch.equal(pipeline(generator=seeded(0), **arguments).images, alone)


# --- stock pipelines --------------------------------------------------------------------------------------------------


def embedded(pipeline):
    """The prompt's embeddings: text encoders of transformers are not for several threads at once."""
    names = ("prompt_embeds", "negative_prompt_embeds")
    return dict(zip(names, pipeline.encode_prompt("a dog", "cpu", 1, True), strict=True))


def draw_text(pipeline, steps, prompt, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        **prompt,
        height=16,
        width=16,
        num_inference_steps=steps,
        generator=seeded(steps),
        output_type="latent",
        **arguments,
    ).images


OF_ITS_OWN = {"from_config": lambda scheduler: type(scheduler).from_config(scheduler.config), "copy": copy.deepcopy}


@pytest.mark.parametrize("own", OF_ITS_OWN)
def test_threads_share_the_networks_of_a_stock_pipeline_by_a_scheduler_for_each(own):
    pipeline = stable_diffusion(ScoreSDEScheduler.from_config(diffusers.DDIMScheduler().config))

    # before the threads begin: from_pipe touches the networks
    views = [pipeline.from_pipe(pipeline, scheduler=OF_ITS_OWN[own](pipeline.scheduler)) for _ in range(3)]
    assert all(view.unet is pipeline.unet for view in views)
    prompt = embedded(pipeline)
    assert_the_same([lambda i=i: draw_text(views[i], 4 + i, prompt, guidance_scale=1.0 + i) for i in range(3)])


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "DDIM"])
def test_two_calls_of_a_stock_pipeline_at_once_need_two_schedulers(stock):
    """Stock pipelines keep where they are in the scheduler: a call in the midst of another, as of a second thread."""
    scheduler = diffusers.DDIMScheduler()
    pipeline = stable_diffusion(scheduler if stock else ScoreSDEScheduler.from_config(scheduler.config))
    prompt = embedded(pipeline)

    def another(pipeline, step, timestep, tensors, scheduler):
        if step == 1:
            draw_text(pipeline.from_pipe(pipeline, scheduler=scheduler), 3, prompt)
        return {}

    def while_another_draws(scheduler):
        return draw_text(pipeline, 6, prompt, callback_on_step_end=lambda *now: another(*now, scheduler))

    alone = draw_text(pipeline, 6, prompt)
    assert torch.equal(while_another_draws(copy.deepcopy(pipeline.scheduler)), alone)
    try:
        mixed = while_another_draws(pipeline.scheduler)
    except (IndexError, ValueError):
        return
    assert not torch.equal(mixed, alone)
