"""Tiny random components of the pipelines with U-Nets, for `stock_pipelines.py`: by class, and by pipeline."""

import diffusers
import torch
import transformers
from diffusers.models.attention_processor import AttnAddedKVProcessor
from tiny_cases import Case, picture, video


CHARACTERS = [chr(code) for code in range(33, 127)]
TEXT = 32  # width of all text and image embeddings
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer():
    tokens = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(each + "</w>" for each in CHARACTERS)]
    vocabulary = {token: position for position, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip_text_config(**changes):
    sizes = {"hidden_size": TEXT, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    tokens = {"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return transformers.CLIPTextConfig(**(sizes | tokens | {"projection_dim": TEXT} | changes))


def clip_vision_config(**changes):
    sizes = {"hidden_size": TEXT, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return transformers.CLIPVisionConfig(
        **(sizes | {"image_size": 32, "patch_size": 8, "projection_dim": TEXT} | changes)
    )


def clip_image_processor():
    return transformers.CLIPImageProcessorPil(crop_size=32, size=32)


def unet(**changes):
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**(config | changes))


# of Stable Diffusion XL: two text encoders, sizes and crops
XL = {
    "cross_attention_dim": 2 * TEXT,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT,
    "use_linear_projection": True,
}


def vae(**changes):
    config = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 32,
    }
    return diffusers.AutoencoderKL(**(config | changes))


def vq(**changes):
    config = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "num_vq_embeddings": 12,
    }
    return diffusers.VQModel(**(config | changes))


def unconditional_unet(**changes):
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DModel(**(config | changes))


def class_unet():
    return unconditional_unet(num_class_embeds=10)


def lcm_scheduler():
    # as from_pretrained gives it: its config says whose it is, since TCD's has the same keys
    return diffusers.LCMScheduler.from_config({"_class_name": "LCMScheduler"})


def controlnet(**changes):
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "conditioning_embedding_out_channels": (4, 8),
    }
    return stirred(diffusers.ControlNetModel(**(config | changes)))


def xs_adapter(**changes):
    return stirred(
        diffusers.ControlNetXSAdapter.from_unet(
            unet(layers_per_block=2, **changes), size_ratio=0.5, conditioning_embedding_out_channels=(4, 8)
        )
    )


def stirred(model):
    """The model with random weights where its own are zero at first, so that it does something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


# of pixels and image embeddings: Kandinsky, UnCLIP, DeepFloyd IF
SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}
KANDINSKY = SIMPLE | {"in_channels": 4, "out_channels": 8, "encoder_hid_dim": TEXT}
IF = SIMPLE | {"in_channels": 3, "out_channels": 6, "encoder_hid_dim": TEXT, "sample_size": 32, "act_fn": "gelu"}
IF |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 2, "cross_attention_norm": "group_norm"}
IF_SUPER = IF | {"in_channels": 6, "class_embed_type": "timestep"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def movq():
    return vq(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),  # the spatial norm has 32 groups
        norm_num_groups=8,
        norm_type="spatial",
        latent_channels=4,
        vq_embed_dim=4,
    )


def prior(**changes):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "embedding_dim": TEXT, "num_layers": 1}
    return stirred(diffusers.PriorTransformer(**(sizes | changes)))


def if_scheduler():
    return diffusers.DDPMScheduler(
        **COSINE,
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.0,
        variance_type="learned_range",
    )


def if_network(config):
    network = unet(**config)
    network.set_attn_processor(AttnAddedKVProcessor())
    return network


def kandinsky_text_encoder():
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    sizes = {"hidden_size": TEXT, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return MultilingualCLIP(
        MCLIPConfig(numDims=TEXT, transformerDimensions=TEXT, vocab_size=200, max_position_embeddings=128, **sizes)
    )


def unigram_tokenizer(kind, **options):
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    return kind(vocab=pieces + [(each, -2.0) for each in CHARACTERS] + [("<mask>", 0.0)], **options)


def byte_tokenizer(kind, **options):
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>", "Ġ", *CHARACTERS]
    return kind(vocab={token: position for position, token in enumerate(tokens)}, merges=[], **options)


def clap_config():
    text = {"hidden_size": TEXT, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    audio = {"spec_size": 8, "window_size": 4, "num_mel_bins": 8, "intermediate_size": 16, "depths": [1, 1]}
    audio |= {"num_attention_heads": [1, 1], "num_hidden_layers": 1, "hidden_size": 16, "patch_size": 2}
    audio |= {"patch_stride": 2, "patch_embed_input_channels": 4, "patch_embeds_hidden_size": 8}
    return transformers.ClapConfig(
        text_config=text | {"vocab_size": 200, "pad_token_id": 1, "projection_dim": TEXT},
        audio_config=audio | {"projection_dim": TEXT},
        projection_dim=TEXT,
    )


def vocoder():
    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16000,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
    )


def language_model():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=200, n_positions=99)
    )
    model.config.max_new_tokens = 8
    return model


def roberta_series():
    from diffusers.pipelines.deprecated.alt_diffusion import modeling_roberta_series as alt

    sizes = {"hidden_size": TEXT, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = alt.RobertaSeriesConfig(project_dim=TEXT, vocab_size=200, max_position_embeddings=128, **sizes)
    return alt.RobertaSeriesModelWithTransformation(config)


def cascade_prior():
    return diffusers.models.StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_image_in_channels=TEXT,
        switch_level=(False,),
        clip_text_in_channels=TEXT,
        clip_text_pooled_in_channels=TEXT,
    )


def cascade_decoder():
    return diffusers.models.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock"),) * 2,
        switch_level=None,
        clip_text_pooled_in_channels=TEXT,
        dropout=(0.0, 0.0),
    )


def ldm_bert():
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    sizes = {"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "head_dim": 16, "d_model": TEXT}
    return LDMBertModel(LDMBertConfig(vocab_size=200, max_position_embeddings=77, **sizes))


def example_encoder():
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder

    return PaintByExampleImageEncoder(clip_vision_config(), proj_size=TEXT)


def latent_upscaler():
    return unet(
        act_fn="gelu",
        norm_num_groups=None,
        block_out_channels=(32, 32, 64, 64),
        time_cond_proj_dim=160,
        conv_in_kernel=1,
        conv_out_kernel=1,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        attention_head_dim=8,
        in_channels=8,
        out_channels=5,
        mid_block_type=None,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )


def embedding(seed=0):
    return torch.randn(1, TEXT, generator=torch.Generator().manual_seed(seed))


def pixels(size=32, channels=3, seed=0):
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(seed))


# by the name of the class in the type hint: a function that makes one, or None
COMPONENTS = {
    "CLIPTokenizer": clip_tokenizer,
    "CLIPTextModel": lambda: transformers.CLIPTextModel(clip_text_config()),
    "CLIPTextModelWithProjection": lambda: transformers.CLIPTextModelWithProjection(clip_text_config()),
    "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionModelWithProjection(clip_vision_config()),
    "CLIPVisionModel": lambda: transformers.CLIPVisionModel(clip_vision_config()),
    "CLIPImageProcessorPil": clip_image_processor,
    "StableDiffusionSafetyChecker": None,
    "SafeStableDiffusionSafetyChecker": None,
    "IFSafetyChecker": None,
    "IFWatermarker": None,
    "AutoencoderKL": vae,
    "AutoencoderKLTemporalDecoder": lambda: diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    ),
    "VQModel": vq,
    "PaellaVQModel": lambda: _wuerstchen().PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2),
    "UNet2DConditionModel": unet,
    "UNet2DModel": unconditional_unet,
    "UNet1DModel": lambda: diffusers.UNet1DModel(
        block_out_channels=(32, 32, 64),
        extra_in_channels=64,
        sample_size=512,
        sample_rate=16_000,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    ),
    "UNet3DConditionModel": lambda: diffusers.UNet3DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=4,
    ),
    "I2VGenXLUNet": lambda: diffusers.I2VGenXLUNet(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        num_attention_heads=4,
        norm_num_groups=2,
    ),
    "UNetSpatioTemporalConditionModel": lambda: diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    ),
    "Kandinsky3UNet": lambda: diffusers.Kandinsky3UNet(
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=4,
        encoder_hid_dim=TEXT,
    ),
    "ControlNetModel": controlnet,
    "ControlNetUnionModel": lambda: stirred(
        diffusers.ControlNetUnionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
            conditioning_embedding_out_channels=(4, 8),
            num_trans_channel=8,
            num_trans_head=2,
            num_proj_channel=8,
            **XL,
        )
    ),
    "SparseControlNetModel": lambda: stirred(
        diffusers.SparseControlNetModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            cross_attention_dim=TEXT,
            conditioning_channels=3,
            conditioning_embedding_out_channels=(4, 8),
            norm_num_groups=4,
            use_simplified_condition_embedding=False,
        )
    ),
    "MotionAdapter": lambda: diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    ),
    "T2IAdapter": lambda: diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2),
    "DPTForDepthEstimation": None,
    "DPTImageProcessorPil": lambda: transformers.DPTImageProcessorPil(size={"height": 32, "width": 32}),
    "PriorTransformer": prior,
    "UniDiffuserModel": lambda: _unidiffuser().UniDiffuserModel(
        text_dim=TEXT,
        clip_img_dim=TEXT,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu",
        num_embeds_ada_norm=1000,
        use_patch_pos_embed=True,
    ),
    "UniDiffuserTextDecoder": lambda: _unidiffuser().UniDiffuserTextDecoder(
        prefix_length=77,
        prefix_inner_dim=TEXT,
        prefix_hidden_dim=TEXT,
        vocab_size=200,
        n_embd=TEXT,
        n_layer=1,
        n_head=2,
    ),
    "UNetFlatConditionModel": lambda: _versatile().UNetFlatConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlockFlat", "DownBlockFlat"),
        up_block_types=("UpBlockFlat", "CrossAttnUpBlockFlat"),
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=4,
    ),
    "RobertaSeriesModelWithTransformation": roberta_series,
    "PaintByExampleImageEncoder": example_encoder,
    "StableCascadeUNet": cascade_decoder,
    "CLIPImageProjection": lambda: _stable_diffusion().CLIPImageProjection(hidden_size=TEXT),
    "MultilingualCLIP": kandinsky_text_encoder,
    "XLMRobertaTokenizer": lambda: unigram_tokenizer(transformers.XLMRobertaTokenizer, model_max_length=77),
    "RobertaTokenizer": lambda: byte_tokenizer(transformers.RobertaTokenizer, model_max_length=77),
    "GPT2Tokenizer": lambda: byte_tokenizer(transformers.GPT2Tokenizer, model_max_length=77),
    "ClapModel": lambda: transformers.ClapModel(clap_config()),
    "ClapTextModelWithProjection": lambda: transformers.ClapTextModelWithProjection(clap_config().text_config),
    "ClapFeatureExtractor": transformers.ClapFeatureExtractor,
    "GPT2LMHeadModel": language_model,
    "AudioLDM2ProjectionModel": lambda: diffusers.AudioLDM2ProjectionModel(
        text_encoder_dim=TEXT, text_encoder_1_dim=32, langauge_model_dim=16
    ),
    "AudioLDM2UNet2DConditionModel": lambda: diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=([None, 16, 32], [None, 16, 32]),
        attention_head_dim=4,
    ),
    "SpeechT5HifiGan": vocoder,
    "UnCLIPTextProjModel": lambda: _unclip().UnCLIPTextProjModel(
        clip_embeddings_dim=TEXT, time_embed_dim=32, cross_attention_dim=TEXT
    ),
    "StableUnCLIPImageNormalizer": lambda: _stable_diffusion().StableUnCLIPImageNormalizer(embedding_dim=TEXT),
    "WuerstchenPrior": lambda: _wuerstchen().WuerstchenPrior(c_in=2, c=8, depth=2, c_cond=TEXT, c_r=8, nhead=2),
    "WuerstchenDiffNeXt": lambda: _wuerstchen().WuerstchenDiffNeXt(
        c_cond=TEXT, c_hidden=[32], nhead=[-1], blocks=[1], level_config=["CT"], clip_embd=TEXT, inject_effnet=[False]
    ),
    "ShapERenderer": lambda: _shap_e().ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=16, d_hidden=8, n_output=12
    ),
    "KarrasDiffusionSchedulers": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
    "SchedulerMixin": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
    "DDIMScheduler": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
    "EulerDiscreteScheduler": lambda: diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
    "PNDMScheduler": lambda: diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
}


def _wuerstchen():
    from diffusers.pipelines.deprecated import wuerstchen

    return wuerstchen


def _unidiffuser():
    from diffusers.pipelines.deprecated import unidiffuser

    return unidiffuser


def _versatile():
    from diffusers.pipelines.deprecated.versatile_diffusion import modeling_text_unet

    return modeling_text_unet


def _unclip():
    from diffusers.pipelines.deprecated import unclip

    return unclip


def _shap_e():
    from diffusers.pipelines import shap_e

    return shap_e


def _stable_diffusion():
    from diffusers.pipelines import stable_diffusion

    return stable_diffusion


EMBEDS = {"image_embeds": embedding, "negative_image_embeds": lambda: embedding(1)}
HINT = {"hint": lambda: pixels(256, seed=2)}
WHOLE = "indexes alphas_cumprod by timesteps, which must be whole; those of auto are not"
MANY_FRAMES = {"conditioning_frames": video}

# (regular expression for the name of the pipeline without "Pipeline", what it needs beside); later rows win
CASES: list[tuple[str, Case]] = [
    # Stable Diffusion and Stable Diffusion XL
    (r".*(StableDiffusionXL|SDXL).*", Case(components={"unet": lambda: unet(**XL)})),
    (r"StableDiffusionXLControlNet(?!Union|XS).*", Case(components={"controlnet": lambda: controlnet(**XL)})),
    (r"StableDiffusionXLControlNetUnion.*", Case(call={"control_mode": [0], "control_image": lambda: [picture()]})),
    (r".*InstructPix2Pix", Case(components={"unet": lambda: unet(in_channels=8)})),
    (r"StableDiffusionXLInstructPix2Pix", Case(components={"unet": lambda: unet(**XL, in_channels=8)})),
    (
        r"StableDiffusionDepth2Img",
        Case(components={"unet": lambda: unet(in_channels=5)}, call={"depth_map": lambda: pixels(32, 1)[0]}),
    ),
    (
        r"StableDiffusionUpscale",
        Case(
            components={
                "unet": lambda: unet(in_channels=7, num_class_embeds=1000),
                "low_res_scheduler": lambda: diffusers.DDPMScheduler(**COSINE),
                "scheduler": lambda: diffusers.DDIMScheduler(
                    **SCHEDULE, clip_sample=False, prediction_type="v_prediction"
                ),
            },
            call={"image": lambda: picture(16), "noise_level": 20},
        ),
    ),
    (
        r"StableDiffusionLatentUpscale",
        Case(
            components={
                "unet": latent_upscaler,
                "scheduler": lambda: diffusers.EulerDiscreteScheduler(
                    prediction_type="sample", timestep_spacing="trailing"
                ),
            },
            call={"image": lambda: pixels(16, 4)},
        ),
    ),
    (r"(StableDiffusionImageVariation|.*Adapter)", Case(without=("prompt",))),
    (r".*Adapter", Case(call={"prompt": "a cat"})),
    (
        r"StableUnCLIP.*",
        Case(
            components={
                "unet": lambda: unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * TEXT),
                "image_noising_scheduler": lambda: diffusers.DDPMScheduler(**COSINE),
                "prior_scheduler": lambda: diffusers.DDPMScheduler(
                    **COSINE,
                    variance_type="fixed_small_log",
                    prediction_type="sample",
                    clip_sample=True,
                    clip_sample_range=5.0,
                ),
                "scheduler": lambda: diffusers.DDIMScheduler(
                    **SCHEDULE, clip_sample=False, prediction_type="v_prediction"
                ),
            }
        ),
    ),
    (r"StableDiffusionGLIGEN.*", Case(components={"unet": lambda: unet(attention_type="gated")})),
    (
        r"StableDiffusionGLIGEN",
        Case(call={"gligen_phrases": ["a dog"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.8]]}),
    ),
    (
        r"StableDiffusionGLIGENTextImage",
        Case(
            components={
                "unet": lambda: unet(attention_type="gated-text-image"),
                "processor": lambda: transformers.CLIPProcessor(clip_image_processor(), clip_tokenizer()),
            },
            call={"gligen_phrases": ["a dog"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.8]]},
        ),
    ),
    (
        r"StableDiffusionDiffEdit",
        Case(call={"image_latents": lambda steps: torch.randn(steps * 8 // 10, 4, 32, 32)}),
    ),
    (
        r"StableDiffusionPix2PixZero",
        Case(
            components={"caption_generator": None, "caption_processor": None},
            call={each: lambda: torch.randn(1, 77, TEXT) for each in ("source_embeds", "target_embeds")},
        ),
    ),
    (
        r"LDMTextToImage",
        Case(components={"bert": ldm_bert, "vqvae": vae, "unet": unet, "tokenizer": clip_tokenizer}),
    ),
    (r"StableDiffusionAttendAndExcite", Case(call={"token_indices": [1], "max_iter_to_alter": 2})),
    (r"CycleDiffusion", Case(reason="takes DDIM's own noise out of two images, step by step")),
    (
        r"StableDiffusionLDM3D",
        Case(components={"vae": lambda: vae(in_channels=6, out_channels=6)}, call={"output_type": "np"}),
    ),
    (r"TextToVideoZero.*", Case(call={"t0": 6, "t1": 8}, auto=WHOLE)),
    (r"StableDiffusionSAG", Case(auto=WHOLE)),
    # consistency models
    (r".*ConsistencyModel.*", Case(auto="a consistency model, whose samples of more steps have no limit")),
    (r"ConsistencyModel", Case(components={"unet": class_unet}, call={"class_labels": [3]})),
    (
        r"LatentConsistencyModel.*",
        Case(components={"unet": lambda: unet(time_cond_proj_dim=8), "scheduler": lcm_scheduler}),
    ),
    (r"UniDiffuser", Case(without=("image",))),
    (
        r"BlipDiffusion.*",
        Case(reason="no tiny components: its text encoder and Q-Former are part of the pipeline's code"),
    ),
    (r"VersatileDiffusionDualGuided", Case(reason="fails with every scheduler of this version of diffusers")),
    (r"VersatileDiffusion", Case(reason="only makes the other pipelines of Versatile Diffusion")),
    (r"ScoreSdeVe", Case(reason="calls step_pred and step_correct, of its own scheduler")),
    (r"StableDiffusionParadigms", Case(reason="fails with every scheduler of this version of diffusers")),
    (r"MusicLDM", Case(reason="fails with every scheduler and the installed transformers")),
    (r"DanceDiffusion", Case(reason="sets times between 0 and 1 that only IPNDMScheduler takes")),
    (r"StableDiffusionLatentUpscale", Case(reason="computes in the coordinates of EulerDiscreteScheduler itself")),
    (
        r"StableDiffusion(XL)?ControlNetXS",
        Case(components={"unet": lambda: unet(layers_per_block=2), "controlnet": lambda: xs_adapter()}),
    ),
    (
        r"StableDiffusionXLControlNetXS",
        Case(components={"unet": lambda: unet(layers_per_block=2, **XL), "controlnet": lambda: xs_adapter(**XL)}),
    ),
    (r"I2VGenXL", Case(call={"clip_skip": None})),
    (r"LEdits.*", Case(reason="accepts no scheduler but DDIM and DPM-Solver, whose steps it writes anew")),
    (r"Marigold.*", Case(components={"unet": lambda: unet(in_channels=8)}, without=("num_inference_steps",))),
    (r"MarigoldIntrinsics", Case(components={"unet": lambda: unet(in_channels=12, out_channels=8)}, call={})),
    (r"Marigold.*", Case(call={"processing_resolution": 0, "ensemble_size": 1})),
    (r"(PaintByExample|PIA)", Case(components={"unet": lambda: unet(in_channels=9)})),
    (r"PaintByExample", Case(without=("prompt",), call={"example_image": picture})),
    # video
    (r"AnimateDiff.*ControlNet|AnimateDiffSparse.*", Case(call=MANY_FRAMES)),
    (r"AnimateDiffSparse.*", Case(call={"controlnet_frame_indices": list(range(5))})),
    (r"AnimateDiffVideoToVideo.*", Case(call={"video": video})),
    (
        r"StableVideoDiffusion",
        Case(
            components={
                "image_encoder": lambda: transformers.CLIPVisionModelWithProjection(
                    clip_vision_config(image_size=224, patch_size=56)
                ),
                "scheduler": lambda: diffusers.EulerDiscreteScheduler(
                    **SCHEDULE,
                    prediction_type="v_prediction",
                    sigma_min=0.002,
                    sigma_max=700.0,
                    timestep_type="continuous",
                    timestep_spacing="leading",
                    steps_offset=1,
                    use_karras_sigmas=True,
                ),
            }
        ),
    ),
    # Kandinsky
    (r"Kandinsky.*", Case(components={"movq": movq})),
    (
        r"Kandinsky.*Prior.*|Kandinsky.*Combined",
        Case(
            components=dict.fromkeys(("prior", "prior_prior"), prior)
            | {
                each: lambda: diffusers.UnCLIPScheduler(
                    variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
                )
                for each in ("prior_scheduler",)
            }
        ),
    ),
    (
        r"Kandinsky.*Prior.*",
        Case(
            components={
                "scheduler": lambda: diffusers.UnCLIPScheduler(
                    variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
                )
            },
            without=("output_type", "image"),
        ),
    ),
    (r"KandinskyV22PriorEmb2Emb", Case(call={"image": embedding})),
    (
        r"Kandinsky(Img2Img|Inpaint|)(Combined)?",
        Case(
            components={
                "unet": lambda: unet(
                    **KANDINSKY, addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj"
                )
            }
        ),
    ),
    (
        r"KandinskyInpaint(Combined)?",
        Case(
            components={
                "unet": lambda: unet(
                    **(KANDINSKY | {"in_channels": 9}),
                    addition_embed_type="text_image",
                    encoder_hid_dim_type="text_image_proj",
                )
            }
        ),
    ),
    (
        r"KandinskyV22.*",
        Case(
            components={
                "unet": lambda: unet(**KANDINSKY, addition_embed_type="image", encoder_hid_dim_type="image_proj")
            }
        ),
    ),
    (
        r"KandinskyV22Inpaint(Combined)?",
        Case(
            components={
                "unet": lambda: unet(
                    **(KANDINSKY | {"in_channels": 9}), addition_embed_type="image", encoder_hid_dim_type="image_proj"
                )
            }
        ),
    ),
    (
        r"KandinskyV22Controlnet.*",
        Case(
            components={
                "unet": lambda: unet(
                    **(KANDINSKY | {"in_channels": 8}),
                    addition_embed_type="image_hint",
                    encoder_hid_dim_type="image_proj",
                )
            },
            call=HINT,
        ),
    ),
    (r"Kandinsky(V22)?(Img2Img|Inpaint|Controlnet|ControlnetImg2Img|)", Case(call=EMBEDS)),
    (r"Kandinsky((?!Prior).)*", Case(call={"height": 64, "width": 64})),
    (r"Kandinsky3.*", Case(components={"scheduler": lambda: diffusers.DDPMScheduler(**COSINE)})),
    # UnCLIP, Wuerstchen, Stable Cascade, Shap-E
    (r"StableCascade(Prior|Combined)", Case(components={"prior": cascade_prior, "prior_prior": cascade_prior})),
    (
        r"StableCascadePrior",
        Case(without=("output_type", "images"), components={"image_encoder": None, "feature_extractor": None}),
    ),
    (r"StableCascadeDecoder", Case(call={"image_embeddings": lambda: torch.randn(1, 16, 4, 4)})),
    (r"StableCascadeCombined", Case(without=("images",))),
    (r"WuerstchenPrior", Case(without=("output_type",))),
    (r"WuerstchenDecoder", Case(call={"image_embeddings": lambda: torch.randn(1, 16, 4, 4)})),
    (r"StableCascade.*", Case(reason="tells its network another time unless the scheduler's class is Wuerstchen's")),
    (r"Wuerstchen.*|StableCascade.*", Case(call={"height": 128, "width": 128})),
    (r"WuerstchenDecoder|StableCascadeDecoder", Case(call={}, without=("height", "width"))),
    (
        r"UnCLIP.*",
        Case(
            components={
                "decoder": lambda: unet(
                    **(SIMPLE | {"in_channels": 3, "out_channels": 6}), class_embed_type="identity", sample_size=16
                ),
                "super_res_first": lambda: unconditional_unet(
                    sample_size=32,
                    in_channels=6,
                    out_channels=3,
                    down_block_types=("ResnetDownsampleBlock2D",) * 2,
                    up_block_types=("ResnetUpsampleBlock2D",) * 2,
                ),
                "super_res_last": lambda: unconditional_unet(
                    sample_size=32,
                    in_channels=6,
                    out_channels=3,
                    down_block_types=("ResnetDownsampleBlock2D",) * 2,
                    up_block_types=("ResnetUpsampleBlock2D",) * 2,
                ),
                "prior_scheduler": lambda: diffusers.UnCLIPScheduler(
                    variance_type="fixed_small_log", prediction_type="sample"
                ),
                "decoder_scheduler": lambda: diffusers.UnCLIPScheduler(
                    variance_type="learned_range", prediction_type="epsilon"
                ),
                "super_res_scheduler": lambda: diffusers.UnCLIPScheduler(
                    variance_type="fixed_small_log", prediction_type="epsilon"
                ),
            }
        ),
    ),
    (
        r"ShapE.*",
        Case(
            components={
                "prior": lambda: prior(
                    attention_head_dim=8,
                    embedding_dim=16,
                    embedding_proj_dim=TEXT,
                    time_embed_dim=64,
                    num_embeddings=32,
                    clip_embed_dim=32,
                    additional_embeddings=0,
                    time_embed_act_fn="gelu",
                    norm_in_type="layer",
                    encoder_hid_proj_type=None,
                    added_emb_type=None,
                ),
                "scheduler": lambda: diffusers.HeunDiscreteScheduler(
                    beta_schedule="exp",
                    num_train_timesteps=1024,
                    prediction_type="sample",
                    use_karras_sigmas=True,
                    clip_sample=True,
                    clip_sample_range=1.0,
                ),
            },
            call={"output_type": "latent"},
        ),
    ),
    # DeepFloyd IF
    (r"IF.*", Case(components={"unet": lambda: if_network(IF), "scheduler": if_scheduler})),
    (
        r"IF.*SuperResolution",
        Case(
            components={
                "unet": lambda: if_network(IF_SUPER),
                "image_noising_scheduler": lambda: diffusers.DDPMScheduler(**COSINE),
            },
            call={"image": lambda: pixels(16)},
        ),
    ),
    (r"IF(Img2Img|Inpainting)SuperResolution", Case(call={"original_image": pixels})),
    # unconditional and audio
    (
        r"LDMSuperResolution",
        Case(
            components={
                "unet": lambda: unconditional_unet(in_channels=6, out_channels=3),
                "vqvae": lambda: vq(latent_channels=3),
            }
        ),
    ),
    (r"LDM", Case(components={"unet": unconditional_unet, "vqvae": lambda: vq(latent_channels=3)})),
    (r"(DDPM|DDIM|PNDM|LDM)", Case(call={"output_type": "np"})),
    (
        r"AudioLDM.*|MusicLDM",
        Case(
            components={"vae": lambda: vae(in_channels=1, out_channels=1)},
            call={"output_type": "pt", "audio_length_in_s": 0.032},
        ),
    ),
    (
        r"AudioLDM|MusicLDM",
        Case(
            components={
                "unet": lambda: unet(
                    cross_attention_dim=(8, 16),
                    class_embed_type="simple_projection",
                    projection_class_embeddings_input_dim=TEXT,
                    class_embeddings_concat=True,
                )
            }
        ),
    ),
]
