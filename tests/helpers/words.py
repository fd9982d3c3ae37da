"""Tiny text encoders of transformers with random weights, a tokenizer of some words, and pipelines that follow them."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from score_sde import DiTModel, ScoreSDEPipeline, ScoreSDEScheduler


WORDS = "a an the red green blue shirt dress bag hat with of dots trouser pullover coat sandal sneaker ankle boot t top"
WIDTH = 16
SETTINGS = {"max_tokens": 8}


def tiny_tokenizer(special=True):
    """Words by numbers, between a first and a last token that are special."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]"
    )


SIZE = {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
LONG = SIZE | {"intermediate_size": 24, "max_position_embeddings": 32}
T5 = {"vocab_size": 64, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {"vocab_size": 64, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 1, "max_position_embeddings": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
# family: (class, config)
ENCODERS = {
    "bert": (transformers.BertModel, transformers.BertConfig(**LONG)),
    "clip": (transformers.CLIPTextModel, transformers.CLIPTextConfig(**LONG, projection_dim=WIDTH, eos_token_id=3)),
    "t5": (transformers.T5EncoderModel, transformers.T5Config(**T5)),
    "t5 with its decoder": (transformers.T5Model, transformers.T5Config(**T5)),
    "bart": (transformers.BartModel, transformers.BartConfig(**BART)),
    "qwen": (transformers.Qwen3Model, transformers.Qwen3Config(**LONG, head_dim=8, num_key_value_heads=1)),
}


def tiny_encoder(family="bert"):
    model, config = ENCODERS[family]
    torch.manual_seed(0)
    encoder = model(config).eval()
    for parameter in encoder.parameters():  # so that words differ
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return encoder


def save_encoder(folder, family="bert"):
    """A folder as people publish an encoder with its tokenizer."""
    tiny_encoder(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def worded_network(**options):
    torch.manual_seed(0)
    config = {"num_classes": None, "cross_attention_dim": WIDTH} | options
    model = DiTModel(4, 2, 1, 16, 1, 2, **config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def prompt_pipeline(network=None, encoder=True, settings=SETTINGS, pipeline_class=ScoreSDEPipeline):
    """A silent pipeline that follows words."""
    words = {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer()} if encoder else {}
    pipeline = pipeline_class(
        ScoreSDEScheduler(prediction_type="v_prediction"),
        transformer=network or worded_network(),
        prompt_settings=settings,
        **words,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
