"""Tokenizers of a few letters, and pipelines of tokens with exact and tiny networks."""

import torch
from enumerable import MarkovSource
from networks import awake
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from score_sde import DiscreteScoreScheduler, DiTModel, ScoreSDETextPipeline
from score_sde.training.parts.tokenizers import make_tokenizer


def letters(text="abc", **special):
    """A fast tokenizer whose tokens are these characters and, behind them, special ones: eos_token="<end>"."""
    tokens = [*text, *dict.fromkeys(special.values())]
    rules = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}))
    rules.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    rules.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=rules, split_special_tokens=True, **special)


def exact_pipeline(source=None, tokenizer=None, **scheduler_options):
    """A pipeline with the perfect network of a Markov source of the letters a, b, c, ..."""
    source = source or MarkovSource()
    scheduler = DiscreteScoreScheduler(source.vocab_size, **scheduler_options)
    pipeline = ScoreSDETextPipeline(
        scheduler, source.network(scheduler), tokenizer or letters("abcdefg"[: source.vocab_size])
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_text_pipeline(tokenizer=None, scheduler_options=None, **network_options):
    """A pipeline with a DiT of random weights, of the letters a to g and length 12."""
    tokenizer = tokenizer or letters("abcdefg")
    config = {"sample_size": (12,), "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_classes": None}
    torch.manual_seed(0)
    network = DiTModel(**{"vocab_size": len(tokenizer), "time_conditioning": False, **config, **network_options})
    scheduler = DiscreteScoreScheduler(len(tokenizer), **(scheduler_options or {}))
    pipeline = ScoreSDETextPipeline(scheduler, awake(network), tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def characters_pipeline(tokenizer=None, num_classes=None, id2label=None, **scheduler_options):
    """A pipeline with a DiT of random weights, of 11 characters and an end mark, and of length 12."""
    tokenizer = tokenizer or make_tokenizer("characters", ["\n !-abcdxyz"], end_mark=True)
    size = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "num_classes": num_classes}
    torch.manual_seed(0)
    network = DiTModel(sample_size=(12,), vocab_size=len(tokenizer), **size)
    scheduler = DiscreteScoreScheduler(len(tokenizer), **scheduler_options)
    pipeline = ScoreSDETextPipeline(scheduler, awake(network), tokenizer, id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def written(pipeline, seed=3, **arguments):
    """Texts in 4 steps, the same from the same weights."""
    arguments = {"batch_size": 2, "num_inference_steps": 4} | arguments
    return pipeline(**arguments, generator=torch.Generator().manual_seed(seed)).texts
