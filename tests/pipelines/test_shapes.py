"""Images of other heights and widths than a network's own."""

import diffusers
import pytest
import torch
from tiny import latent_pipeline, random_dit, seeded, tiny_pipeline

from score_sde import DiTModel, ScoreSDEInversePipeline, ScoreSDEPipeline, ScoreSDEScheduler, ScoreUNetModel
from score_sde.pipelines.operators import LinearOperator


def unet_pipeline(**sizes):
    torch.manual_seed(0)
    unet = ScoreUNetModel(
        in_channels=1, block_out_channels=(8, 8), layers_per_block=1, attention_resolutions=(), **sizes
    )
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return quiet(ScoreSDEPipeline(ScoreSDEScheduler(), unet=unet.eval()))


def stock_pipeline():
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )
    return quiet(ScoreSDEPipeline(ScoreSDEScheduler(), transformer=network.eval()))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINES = {
    "pixels": tiny_pipeline,
    "latents": lambda: quiet(latent_pipeline()),
    "U-Net": lambda: unet_pipeline(sample_size=4),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_images_of_a_height_and_width(kind):
    """They come from noise of that size alone, which is theirs; the default stays the network's own size."""
    pipeline = PIPELINES[kind]()
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    factor, (channels, *own) = 1 if pipeline.vae is None else 2, pipeline.sample_shape(1)[1:]
    images = pipeline(height=8 * factor, width=6 * factor, generator=seeded(0), batch_size=2, **arguments).images
    assert images.shape == (2, 1, 8 * factor, 6 * factor)
    noise = torch.randn(2, channels, 8, 6, generator=seeded(0))
    assert torch.equal(pipeline(height=8 * factor, width=6 * factor, latents=noise, **arguments).images, images)
    # one side alone; and nothing of it stays
    assert pipeline(width=6 * factor, **arguments).images.shape[2:] == (own[0] * factor, 6 * factor)
    assert pipeline(**arguments).images.shape[2:] == (own[0] * factor, own[1] * factor)
    assert torch.equal(
        pipeline(generator=seeded(0), **arguments).images,
        pipeline(generator=seeded(0), height=own[0] * factor, **arguments).images,
    )
    # an image to begin with is of that size, too
    again = pipeline(image=images, strength=0.1, height=8 * factor, width=6 * factor, **arguments).images
    assert again.shape == images.shape
    with pytest.raises(ValueError, match="resize the images from .* or say their height and width"):
        pipeline(image=images, **arguments)


def test_a_square_network_is_one_of_patches_everywhere():
    """Where a network sees each patch alone, and positions are left out, a wide image is what its halves are."""
    network = random_dit(num_classes=None)
    network.sincos_table.zero_()
    network.position_table = lambda kind, grid, *_: torch.zeros(grid[0] * grid[1], 16)
    for block in network.blocks:
        torch.nn.init.zeros_(block.attn.to_out[0].weight)
    pipeline, noise = tiny_pipeline(network=network), torch.randn(1, 1, 4, 8, generator=seeded(0))
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    wide = pipeline(latents=noise, width=8, **arguments).images
    halves = [pipeline(latents=half, **arguments).images for half in noise.split(4, dim=3)]
    assert (wide - torch.cat(halves, dim=3)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("pixels", {"height": 7}, "height 7 must be a multiple of 2 pixels: use 6 or 8$"),
        ("pixels", {"width": 0}, "width 0 must be a multiple of 2 pixels: use 2$"),
        ("pixels", {"width": -4}, "width -4 must be"),
        ("pixels", {"height": 8.0}, "height 8.0 must be a multiple of 2 pixels: use 4$"),
        ("pixels", {"height": "8"}, "height '8' must be"),
        (
            "latents",
            {"height": 10},
            "height 10 must be a multiple of 4 pixels, 2 of the autoencoder times 2 .*use 8 or 12",
        ),
        ("U-Net", {"width": 9}, "width 9 must be a multiple of 2 pixels: use 8 or 10"),
        (
            "pixels",
            {"height": 8, "latents": torch.zeros(1, 1, 4, 4)},
            "latents has shape .* this model needs .1, 1, 8, 4.",
        ),
        ("pixels", {"latents": torch.zeros(1, 1, 8, 4)}, "or the height and width that they are for"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_any_work(kind, arguments, message):
    pipeline = PIPELINES[kind]()
    pipeline.denoiser.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_stock_networks():
    """diffusers' DiT takes any number of tokens for a square."""
    pipeline, arguments = stock_pipeline(), {"class_labels": [1], "num_inference_steps": 2, "output_type": "latent"}
    assert pipeline(height=12, width=12, **arguments).images.shape == (1, 3, 12, 12)
    with pytest.raises(ValueError, match="DiTTransformer2DModel makes squares alone, not height 16 and width 4"):
        pipeline(height=16, width=4, **arguments)
    stock = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    pipeline = quiet(ScoreSDEPipeline(ScoreSDEScheduler(), unet=stock.eval()))
    assert pipeline(height=4, width=6, num_inference_steps=1, output_type="pt").images.shape == (1, 1, 4, 6)
    with pytest.raises(ValueError, match="height 5 must be a multiple of 2 pixels: use 4 or 6"):
        pipeline(height=5)


def test_a_network_that_was_made_for_a_rectangle():
    pipeline = unet_pipeline(sample_size=(4, 6))
    assert pipeline(num_inference_steps=1, output_type="pt").images.shape == (1, 1, 4, 6)
    for sample_size, message in (
        ((4, 5), "multiple of 2"),
        ((4, 0), "sample_size 0"),
        ((4, 4, 4), "a height and a width"),
    ):
        with pytest.raises(ValueError, match=message):
            unet_pipeline(sample_size=sample_size)


def test_signals_have_neither():
    network = DiTModel((8,), (2,), 2, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=None)
    pipeline = tiny_pipeline(network=network)
    with pytest.raises(ValueError, match=r"height 8 is of images; this model makes signals of size \(8,\)"):
        pipeline(height=8)


def test_the_way_back_takes_images_of_any_size():
    """Encodings are of the images' size, and lead back to them."""
    pytest.importorskip("torchdiffeq")
    pipeline = tiny_pipeline(network=random_dit(num_classes=None), denoise_final=False)
    images = torch.rand(1, 1, 8, 6, generator=seeded(0)) - 0.5
    noise = pipeline.encode(images)
    again = pipeline(
        latents=noise, height=8, width=6, num_inference_steps=None, rtol=1e-6, atol=1e-6, output_type="latent"
    ).images
    assert noise.shape == images.shape and (again - images).abs().max() < 1e-3
    assert pipeline.log_likelihood(images).log_prob.shape == (1,)
    with pytest.raises(ValueError, match="height 7 must be a multiple of 2"):
        pipeline.encode(torch.zeros(1, 1, 7, 6))
    latent = quiet(latent_pipeline())
    images = torch.rand(1, 1, 8, 12, generator=seeded(0)) - 0.5
    assert (
        latent.encode(images, class_labels=[1]).shape
        == latent.encode(samples=latent.to_latents(images), class_labels=[1]).shape
        == (1, 3, 4, 6)
    )


def test_inverse_problems_of_another_size():
    pipeline = tiny_pipeline(ScoreSDEInversePipeline, network=random_dit(num_classes=None))
    operator, images = (
        LinearOperator(lambda x: x[..., :4], lambda y: torch.nn.functional.pad(y, (0, 2))),
        torch.rand(1, 1, 8, 6) - 0.5,
    )
    found = pipeline(operator, operator(images), height=8, width=6, num_inference_steps=5, output_type="pt")
    assert found.images.shape == images.shape and found.residual.shape == (1,)
    with pytest.raises(ValueError, match="width 5 must be a multiple of 2"):
        pipeline(operator, operator(images), height=8, width=5)
