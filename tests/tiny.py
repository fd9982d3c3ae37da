"""Pipelines around a small random network, for tests of what pipelines do with any network."""

import torch

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler


def tiny_dit(sample_size=4, in_channels=1, num_classes=3, seed=0, std=0.05):
    """A DiT of one block whose output depends on everything that goes in; the smaller its weights, the smoother."""
    torch.manual_seed(seed)
    model = DiTModel(
        sample_size, 2, in_channels, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=num_classes
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def tiny_pipeline(pipeline_class=ScoreSDEPipeline, network=None, **scheduler):
    """A silent pipeline of pixels around `tiny_dit`, or another transformer, that predicts v."""
    pipeline = pipeline_class(
        ScoreSDEScheduler(prediction_type="v_prediction", **scheduler), transformer=network or tiny_dit()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
