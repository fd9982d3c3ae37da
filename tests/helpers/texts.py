"""A pipeline of texts around a small random network."""

import torch

from score_sde import DiscreteScoreScheduler, DiTModel, ScoreSDETextPipeline
from score_sde.training.parts.tokenizers import make_tokenizer


ALPHABET = "\n !-abcdxyz"


def text_pipeline(length=12, num_classes=None, id2label=None, tokenizer=None, **scheduler):
    """Silent, of the 11 characters of `ALPHABET` and an end mark unless a tokenizer is given."""
    tokenizer = tokenizer or make_tokenizer("characters", [ALPHABET], end_mark=True)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    network = DiTModel(sample_size=(length,), vocab_size=len(tokenizer), num_classes=num_classes, **size)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipeline = ScoreSDETextPipeline(
        DiscreteScoreScheduler(len(tokenizer), **scheduler),
        transformer=network.eval(),
        tokenizer=tokenizer,
        id2label=id2label,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def written(pipeline, seed=3, **arguments):
    """Texts in 4 steps, the same from the same weights."""
    arguments = {"batch_size": 2, "num_inference_steps": 4} | arguments
    return pipeline(**arguments, generator=torch.Generator().manual_seed(seed)).texts
