"""Tiny random pipelines in folders, with all that diffusers' training examples open of one: 64 x 64 pixels, latents of
8 x 8, texts of letters."""

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    KandinskyV22CombinedPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


LETTERS = [chr(ord("a") + i) for i in range(26)]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | {
    "steps_offset": 1,
    "clip_sample": False,
}
WIDTH = 16


def tokenizer():
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def text_encoder(kind=CLIPTextModel, act="quick_gelu"):
    return kind(
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=54,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
            projection_dim=WIDTH,
            hidden_act=act,
        )
    )


def t5():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    config = T5Config(vocab_size=200, d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    return T5EncoderModel(config), T5Tokenizer(vocab=pieces)


def vae(latent_channels=4, quant=True):
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        shift_factor=0.1,
        scaling_factor=1.0,
    )


def unet(**more):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{"cross_attention_dim": WIDTH} | more,
    )


def stable_diffusion(folder):
    torch.manual_seed(0)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(
        vae(), text_encoder(), tokenizer(), unet(), DDPMScheduler(**BETAS), **absent
    ).save_pretrained(folder)


def stable_diffusion_xl(folder):
    torch.manual_seed(0)
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": 1}
    StableDiffusionXLPipeline(
        vae(),
        text_encoder(),
        text_encoder(CLIPTextModelWithProjection, "gelu"),
        tokenizer(),
        tokenizer(),
        unet(cross_attention_dim=2 * WIDTH, projection_class_embeddings_input_dim=6 * 8 + WIDTH, **more),
        DDPMScheduler(**BETAS),
    ).save_pretrained(folder)


def sd3(folder):
    torch.manual_seed(0)
    encoder, words = t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        # more than a ControlNet copies
        num_layers=13,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=96,
    )
    clips = [text_encoder(CLIPTextModelWithProjection), tokenizer()]
    again = [text_encoder(CLIPTextModelWithProjection, "gelu"), tokenizer()]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    StableDiffusion3Pipeline(transformer, scheduler, vae(quant=False), *clips, *again, encoder, words).save_pretrained(
        folder
    )


def flux(folder):
    torch.manual_seed(0)
    encoder, words = t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    FluxPipeline(scheduler, vae(quant=False), text_encoder(), tokenizer(), encoder, words, transformer).save_pretrained(
        folder
    )


def image_encoder():
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_attention_heads=2,
            num_hidden_layers=1,
            image_size=32,
            patch_size=8,
            projection_dim=WIDTH,
        )
    )


def prior_components():
    """Kandinsky's prior."""
    torch.manual_seed(0)
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1, num_embeddings=77
    )
    # divides embeddings; 0 before it is trained
    torch.nn.init.ones_(prior.clip_std)
    processor = CLIPImageProcessor(crop_size=32, size=32)
    return {
        "prior": prior,
        "image_encoder": image_encoder(),
        "text_encoder": text_encoder(CLIPTextModelWithProjection),
        "tokenizer": tokenizer(),
        "scheduler": UnCLIPScheduler(prediction_type="sample"),
        "image_processor": processor,
    }


def kandinsky_prior(folder):
    KandinskyV22PriorPipeline(**prior_components()).save_pretrained(folder)


def kandinsky_decoder(folder):
    torch.manual_seed(0)
    movq = VQModel(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("AttnUpDecoderBlock2D",) * 4,
        latent_channels=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
        norm_num_groups=32,
        norm_type="spatial",
    )
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="image",
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=WIDTH,
        resnet_time_scale_shift="scale_shift",
    )
    prior = {f"prior_{name}": component for name, component in prior_components().items()}
    KandinskyV22CombinedPipeline(network, DDPMScheduler(**BETAS), movq, **prior).save_pretrained(folder)
