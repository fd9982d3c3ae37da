"""Pipelines around a small random network, for tests of what pipelines do with any network."""

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_dit(sample_size=4, in_channels=1, num_classes=3, seed=0, std=0.05):
    """A DiT of one block whose output depends on everything that goes in; the smaller its weights, the smoother."""
    torch.manual_seed(seed)
    model = DiTModel(
        sample_size, 2, in_channels, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=num_classes
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def tiny_vae(channels=1, latent_channels=3):
    """A random autoencoder of half the size, with statistics of its latents in its config."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
        latents_mean=[0.5, -1.0, 2.0],
        latents_std=[2.0, 0.5, 1.0],
        scaling_factor=0.8,
    ).eval()


def tiny_pipeline(pipeline_class=ScoreSDEPipeline, network=None, **scheduler):
    """A silent pipeline of pixels around `random_dit`, or another transformer, that predicts v."""
    pipeline = pipeline_class(
        ScoreSDEScheduler(prediction_type="v_prediction", **scheduler), transformer=network or random_dit()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latent_pipeline():
    """Of two models, a network in the latent space of an autoencoder."""
    return ScoreSDEPipeline(ScoreSDEScheduler(), vae=tiny_vae(), transformer=random_dit(in_channels=3))


def draw(pipeline):
    """One image of class 1 in 3 steps, as a tensor; the same from the same weights."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(class_labels=[1], num_inference_steps=3, generator=seeded(3), output_type="pt").images


def latents(n=2):
    """(n, 2, 4, 4), the size of data."""
    return 0.5 * torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def text_unet():
    """Stable Diffusion's network, of 8 x 8 latents and text of width 16."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def flux_transformer():
    """FLUX's network, of latents of one channel and text of width 32."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def letter_tokenizer():
    """CLIP's, of single letters: 54 tokens, 12 for a text."""
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=12)


def stable_diffusion(scheduler):
    """A stock pipeline with all that it needs to be saved and opened again: 16 x 16 pixels from a text."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=54,
        max_position_embeddings=12,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=letter_tokenizer(),
        unet=text_unet().eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
