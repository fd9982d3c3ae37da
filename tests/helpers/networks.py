"""Small networks with random weights everywhere."""

import torch

from score_sde import DiTModel, ScoreUNetModel


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


def small_dit(**overrides):
    config = {"sample_size": 8, "in_channels": 3, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return awake(DiTModel(**config | {"num_classes": 5} | overrides))
