"""Small networks with random weights everywhere."""

import torch

from score_sde import DiTModel, ScoreUNetModel
from score_sde.models.transformer_score_dit import CONDITIONINGS
from score_sde.models.unet_score import UNETS


def awake(model):
    """Random weights everywhere, so that nothing is hidden behind a zero-initialised layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def tiny_dit(**overrides):
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_classes": 5,
    }
    torch.manual_seed(0)
    return awake(DiTModel(**(config | overrides)))


def tiny_unet(**overrides):
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_resolutions": (4,),
        "dropout": 0.0,
        "num_classes": 5,
    }
    torch.manual_seed(0)
    return awake(ScoreUNetModel(**(config | overrides)))


def tiny_ncsnpp(**overrides):
    """NCSN++, with its pyramids of images on the way down and up."""
    config = UNETS["NCSN++"] | {"progressive_input": "input_skip", "progressive_output": "output_skip"}
    config["scale_by_sigma"] = False  # outputs of one size at all times
    return tiny_unet(**config | overrides)


def tiny_adm(**overrides):
    return tiny_unet(
        architecture="adm",
        block_out_channels=(32, 64),
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
        **overrides,
    )


def small_dit(**overrides):
    config = {"sample_size": 8, "in_channels": 3, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return awake(DiTModel(**config | {"num_classes": 5} | overrides))


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(model, batch=2, size=None, run=None, **arguments):
    """The output for random inputs of the model's own kind, on its device and in its dtype; of `run`, such as the
    compiled model, in its place."""
    config, device, dtype = model.config, model.device, model.dtype
    axes = len(getattr(model, "patch", (1, 1)))
    size = size or ((config.sample_size,) * axes if isinstance(config.sample_size, int) else config.sample_size)
    if config.cross_attention_dim is not None:
        arguments.setdefault("encoder_hidden_states", randn(8, 6, config.cross_attention_dim, seed=2)[:batch])
    if config.pooled_projection_dim is not None:
        arguments.setdefault("pooled_projections", randn(8, config.pooled_projection_dim, seed=4)[:batch])
    if config.num_classes is not None:
        arguments.setdefault("class_labels", torch.arange(batch) % config.num_classes)
    arguments.setdefault("timestep", torch.linspace(30.5, 900.25, 8)[:batch])
    for name, value in arguments.items():
        if torch.is_tensor(value):
            # whole numbers stay what they are, and times float32
            in_dtype = value.is_floating_point() and name != "timestep"
            arguments[name] = value.to(device, dtype if in_dtype else value.dtype)
    # the first samples are the same in every batch
    x = randn(8, config.in_channels, *size)[:batch].to(device, dtype)
    return (model if run is None else run)(x, **arguments).sample


DIT_OPTIONS = [
    *({"conditioning": conditioning} for conditioning in CONDITIONINGS),
    *({"conditioning": conditioning, "cross_attention_dim": 7} for conditioning in CONDITIONINGS),
    {"shared_adaln": True, "cross_attention_dim": 7, "pooled_projection_dim": 5, "qk_norm": True},
    {"conditioning": "in_context", "pooled_projection_dim": 5},
    {"conditioning": "in_context", "num_classes": None},
    {"shared_adaln": True},
    {"shared_adaln": True, "conditioning": "adaln"},
    {"qk_norm": True},
    {"swiglu": True},
    {"position_embedding": "rotary"},
    {"position_embedding": "rotary", "conditioning": "in_context", "cross_attention_dim": 7},
    {"frequency_shift": 1.0},
    {"sample_size": (8, 12), "patch_size": (2, 4)},
    {"sample_size": 32, "patch_size": (4,), "position_embedding": "rotary"},
    {"sample_size": (4, 8, 8), "patch_size": (2, 2, 4)},
    {"sample_size": (4, 8, 8), "hidden_size": 48, "position_embedding": "rotary"},
    {"patch_bottleneck": 5, "swiglu": True, "qk_norm": True, "position_embedding": "rotary"},
    {"head_hidden_size": 64},
    {"head_hidden_size": 96, "head_num_layers": 1, "head_num_attention_heads": 6, "position_embedding": "rotary"}
    | {"shared_adaln": True, "cross_attention_dim": 7, "swiglu": True, "qk_norm": True},
]
