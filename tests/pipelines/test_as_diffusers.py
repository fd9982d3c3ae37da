"""What diffusers' own test suite asks of every pipeline, beside what other files here hold."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from diffusers.callbacks import PipelineCallback
from tiny import latent_pipeline, random_dit, seeded, tiny_pipeline, tiny_vae

from score_sde import ScoreSDEInversePipeline, ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines.operators import super_resolution


ONE_BLOCK = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
ONE_BLOCK |= {"attention_head_dim": 4}


def test_components_are_those_of_the_constructor():
    pipeline = tiny_pipeline()
    assert pipeline.components.keys() == {"scheduler", "transformer", "unet", "vae", "text_encoder", "tokenizer"}
    pipeline.register_to_config(id2label={"0": "shirt"})
    # the other pipeline around the same networks; names of classes are no component
    other = ScoreSDEInversePipeline(**pipeline.components, id2label=pipeline.config.id2label)
    assert all(component is pipeline.components[name] for name, component in other.components.items())
    assert other.label_ids("shirt") == [0]


def test_a_pipeline_of_a_pipeline_shares_its_components_and_knows_what_it_knew():
    first = latent_pipeline()
    first.transformer.to(torch.bfloat16)
    first.register_to_config(id2label={"0": "shirt"}, prompt_settings={"max_tokens": 8})
    scheduler = ScoreSDEScheduler(predictor="heun")
    for kind, given in ((ScoreSDEPipeline, {}), (ScoreSDEInversePipeline, {"scheduler": scheduler})):
        other = kind.from_pipe(first, **given)
        assert type(other) is kind and other.config.id2label == {"0": "shirt"}
        assert other.prompt_settings["max_tokens"] == 8
        expected = first.components | given
        assert all(each is expected[name] for name, each in other.components.items())
    assert first.transformer.dtype == torch.bfloat16 and first.vae.dtype == torch.float32  # untouched
    assert ScoreSDEPipeline.from_pipe(first, dtype=torch.float32).transformer.dtype == torch.float32
    # a stock one
    unet = UNet2DModel(8, 1, 1, block_out_channels=(4,), layers_per_block=1, norm_num_groups=4, **ONE_BLOCK)
    stock = DDPMPipeline(unet, DDIMScheduler())
    made = ScoreSDEPipeline.from_pipe(stock, scheduler=ScoreSDEScheduler.from_config(stock.scheduler.config))
    assert made.unet is unet and draw_of(made).shape == (1, 1, 8, 8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'schedule'"):
        ScoreSDEPipeline.from_pipe(stock, schedule=scheduler)


def draw_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(num_inference_steps=2, output_type="pt").images


def increase_guidance(pipe, step, timestep, tensors):
    assert pipe.do_classifier_free_guidance and not pipe.interrupt
    pipe._guidance_scale += 1.0
    return tensors


def test_what_callbacks_read_can_be_read_after_the_call():
    pipeline = tiny_pipeline()
    pipeline(class_labels=[1], guidance_scale=2.0, num_inference_steps=3, callback_on_step_end=increase_guidance)
    assert (pipeline.num_timesteps, pipeline.guidance_scale) == (3, 5.0)
    solver = tiny_pipeline(ScoreSDEInversePipeline)
    solver(super_resolution(2), torch.zeros(1, 1, 2, 2), num_inference_steps=4)
    assert (solver.num_timesteps, solver.guidance_scale, solver.do_classifier_free_guidance) == (4, 1.0, False)


@pytest.mark.parametrize("names", [["latents"], ["latents", "prompt_embeds", "class_labels"], []])
def test_callbacks_get_what_they_ask_for_and_no_more(names):
    seen = []

    class Watch(PipelineCallback):
        tensor_inputs = names

        def callback_fn(self, pipeline, step, timestep, tensors):
            seen.append(set(tensors))
            # what was given is not changed by a callback that changes nothing
            return tensors

    pipeline, arguments = tiny_pipeline(), {"class_labels": [1], "num_inference_steps": 2, "output_type": "latent"}
    watched = pipeline(generator=seeded(0), callback_on_step_end=Watch(), **arguments).images
    assert seen == [set(names)] * 2
    assert torch.equal(watched, pipeline(generator=seeded(0), **arguments).images)


def test_a_missing_variant_is_named_as_diffusers_names_it(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        ScoreSDEPipeline.from_pretrained(tmp_path, variant="fp16")


def test_dtypes_by_component(tmp_path):
    pipeline = tiny_pipeline(network=random_dit(in_channels=3))
    pipeline.vae = tiny_vae()
    pipeline.save_pretrained(tmp_path)
    for types, expected in (
        ({"transformer": torch.bfloat16}, (torch.bfloat16, torch.float32)),
        ({"vae": torch.float16, "default": torch.bfloat16}, (torch.bfloat16, torch.float16)),
    ):
        opened = ScoreSDEPipeline.from_pretrained(tmp_path, dtype=types)
        assert (opened.transformer.dtype, opened.vae.dtype) == expected
    for wrong, message in (
        ({"transformer": "half"}, "dtype: 'half' is no torch.dtype"),
        ("bf16", "dtype: 'bf16' is no torch.dtype"),
        ({"text": torch.float16}, "dtype: 'text' is no component; choose from default, .*, transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            ScoreSDEPipeline.from_pretrained(tmp_path, dtype=wrong)


def test_without_its_optional_components_a_pipeline_says_what_is_missing():
    pipeline = tiny_pipeline()
    for name in pipeline._optional_components:
        setattr(pipeline, name, None)
    for use in (lambda: pipeline(class_labels=[1]), lambda: pipeline.num_classes, lambda: pipeline.kind):
        with pytest.raises(ValueError, match="this pipeline holds no network: set its transformer or its unet"):
            use()
