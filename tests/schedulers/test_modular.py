"""Modular Diffusers with our scheduler as a component, and its guiders: the same as with the stock one."""

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks
from tiny import flux_transformer

from score_sde import ScoreSDEScheduler


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux():
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, shift_factor=0.1)
    given = {"prompt_embeds": noise(1, 6, 32), "pooled_prompt_embeds": noise(1, 32), "height": 16, "width": 16}
    return FluxAutoBlocks(), {"transformer": flux_transformer(), "vae": vae}, given, "images"


def wan():
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    given = {"prompt_embeds": noise(1, 6, 32), "negative_prompt_embeds": noise(1, 6, 32, seed=1)}
    given |= {"height": 16, "width": 16, "num_frames": 5}
    return WanBlocks(), {"transformer": transformer, "vae": vae, "guider": guider}, given, "videos"


@pytest.mark.parametrize("make", [flux, wan])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_modular_pipelines_draw_the_same_with_our_scheduler(make, shift):
    torch.manual_seed(0)
    blocks, components, given, output = make()
    # no text: its embeddings are given
    del blocks.sub_blocks["text_encoder"]
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)

    def draw(scheduler):
        pipe = blocks.init_pipeline()
        pipe.update_components(scheduler=scheduler, **components)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        return pipe(**given, num_inference_steps=5, generator=generator, output_type="pt", output=output)

    expected = draw(stock)
    found = draw(ScoreSDEScheduler.from_config(stock.config, predictor="euler"))
    expected, found = (torch.as_tensor(each[0] if isinstance(each, list) else each) for each in (expected, found))
    assert expected.std() > 0.01
    assert (expected - found).abs().max() < 1e-6
    assert not torch.equal(expected, draw(ScoreSDEScheduler.from_config(stock.config))[0])
