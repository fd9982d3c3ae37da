"""Captions of images: read from a column of the dataset, encoded by a text encoder of transformers on the way or once
with the latents."""

import os
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from score_sde.pipelines.prompts import (
    PROMPT_SETTINGS,
    check_prompt_settings,
    encode,
    encoder_width,
    fingerprint,
    lengths,
    open_text_encoder,
    tokenize,
)
from score_sde.schedulers.paths import moved

from .config import option
from .hashes import hash_of


# captions of a dataset that grids are drawn for
EXAMPLES = 64


@dataclass
class CaptionConfig:
    given: ClassVar[frozenset[str]]

    caption_column: str | None = option(
        None,
        "Column that holds captions, a text or a list of texts, of which one is drawn each time; 'none' for latents "
        "that have captions, to train without.",
        "captions",
        common=True,
    )
    text_encoder: str | None = option(
        None,
        "Text encoder of transformers with its tokenizer, a folder or Hub id: of CLIP, T5, BERT, Qwen, ... With "
        "latents that have captions, it is the one that those were encoded by, unless given.",
        "captions",
        common=True,
    )
    max_caption_tokens: int | None = option(
        None, f"Tokens of a caption, {PROMPT_SETTINGS['max_tokens']} unless given; longer ones are cut off.", "captions"
    )
    caption_layers: list[int] = option(
        [],
        "Hidden states of the encoder that the network is told, one behind the other; the last unless given, -1.",
        "captions",
    )

    def caption_problems(self):
        try:
            check_prompt_settings(self.given_settings())
        except ValueError as error:
            yield str(error).replace("prompt_settings: max_tokens", "max_caption_tokens")

    def given_settings(self):
        """The settings of `pipelines.prompts` that the options give."""
        given = {"max_tokens": self.max_caption_tokens, "layers": self.caption_layers or None}
        return {name: value for name, value in given.items() if value is not None}

    def given_without_captions(self):
        """Options that mean nothing without captions, and are given, in words; "" for none."""
        own = {each.name for each in fields(self) if each.metadata["group"] == "captions"} - {"caption_column"}
        return ", ".join(sorted(own & self.given))

    @property
    def reads_captions(self):
        return self.caption_column not in (None, "none")


class CaptionReader:
    """What a dataset does with the captions of its rows.

    Args:
        column: their column.
        tokenizer, max_tokens: as `prompts.tokenize` takes them.
        seed: which caption of several is drawn is a function of it and of the row's key; None for all of them.

    Attributes, once the dataset was counted: `facts` {"captions", "truncated", "longest", "empty", "per_row"}, numbers;
    `hash` of all of them; `examples`, the first ones.
    """

    def __init__(self, column, tokenizer, max_tokens, seed=0):
        self.column, self.tokenizer, self.max_tokens, self.seed = column, tokenizer, max_tokens, seed
        self.facts, self.hash, self.examples = {}, None, []

    def texts(self, value):
        """The captions of a row, at least one, which may be empty. Raises ValueError for what are none."""
        texts = value if isinstance(value, list) else [value]
        texts = ["" if text is None else text for text in texts] or [""]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"caption column {self.column!r} must hold texts, or lists of texts; it has {value!r:.100}"
            )
        return [text for text in texts if text.strip()] or [""]

    def count(self, values):
        """Look at the captions of all rows, an iterable. Raises ValueError where all are empty, or are no texts."""
        found = [self.texts(value) for value in values]
        texts = [text for row in found for text in row]
        tokens = lengths(self.tokenizer, texts)
        self.facts = {
            "captions": sum(bool(text) for text in texts),
            "truncated": sum(n > self.max_tokens for n in tokens),
            "longest": max(tokens, default=0),
            "empty": sum(not text for text in texts),
            "per_row": max(map(len, found), default=1),
        }
        if not self.facts["captions"]:
            raise ValueError(f"caption column {self.column!r} holds no captions: all {len(found)} are empty")
        self.hash = hash_of(found)
        self.examples = [row[0] for row in found[: 4 * EXAMPLES] if row[0]][:EXAMPLES]

    def describe(self):
        """What was counted, in words."""
        facts = self.facts
        parts = [f"{facts['captions']:,} captions of up to {facts['longest']} tokens"]
        if facts["truncated"]:
            parts.append(f"{facts['truncated']:,} cut off after {self.max_tokens} tokens (--max_caption_tokens)")
        if facts["empty"]:
            parts.append(f"{facts['empty']:,} rows without, which are learned as none")
        return ", ".join(parts)

    def item(self, value, key):
        """What a batch holds of the captions of a row: {"caption_ids", "caption_mask"}, of one (max_tokens,), or of all
        (per_row, max_tokens), beside "caption_count"."""
        texts = self.texts(value)
        if self.seed is None:
            count = len(texts)
            ids, mask = tokenize(self.tokenizer, texts + [""] * (self.facts["per_row"] - count), self.max_tokens)
            return {"caption_ids": ids, "caption_mask": mask, "caption_count": count}
        drawn = np.random.default_rng((self.seed, *key)).integers(len(texts)) if len(texts) > 1 else 0
        ids, mask = tokenize(self.tokenizer, [texts[drawn]], self.max_tokens)
        return {"caption_ids": ids[0], "caption_mask": mask[0]}


class CaptionEncoder:
    """A text encoder and how it is used.

    Args:
        source: a folder or Hub id.
        settings: those of `prompts.PROMPT_SETTINGS` that differ.
        opened: (text encoder, tokenizer) that were opened already.

    Attributes: `text_encoder`, `tokenizer`; `settings`, all of them; `fingerprint`; `width` of what is made of a
    caption. Raises ValueError for what is no text encoder, or doesn't take so many tokens or have these layers.
    """

    def __init__(self, source, settings, opened=None):
        self.source, self.settings = source, PROMPT_SETTINGS | settings
        self.text_encoder, self.tokenizer = opened or open_text_encoder(source)
        try:
            self.width = encoder_width(self.text_encoder, self.settings)
        except ValueError as error:
            raise ValueError(
                f"text_encoder {source!r}: {error}; --max_caption_tokens and --caption_layers say what is taken of it"
            ) from error

    @cached_property
    def fingerprint(self):
        return fingerprint(self.text_encoder, self.tokenizer)

    @property
    def names(self):
        """Of the conditions that it makes."""
        return ["encoder_hidden_states", "encoder_attention_mask"] + ["pooled_projections"] * self.settings["pooled"]

    def arguments(self):
        """Arguments of a network's class for these conditions."""
        return {"cross_attention_dim": self.width} | (
            {"pooled_projection_dim": self.width} if self.settings["pooled"] else {}
        )

    def reader(self, column, seed=0):
        return CaptionReader(column, self.tokenizer, self.settings["max_tokens"], seed)

    def facts(self):
        """What latents.json, or training.json, says of it."""
        local = os.path.isdir(self.source)
        return {
            "text_encoder": os.path.abspath(self.source) if local else self.source,
            "text_encoder_class": type(self.text_encoder).__name__,
            "text_encoder_fingerprint": self.fingerprint,
            "max_tokens": self.settings["max_tokens"],
            "layers": list(self.settings["layers"]),
        }

    def encoded(self, ids, mask):
        """{"caption_embeds", "caption_mask"} of captions (..., max_tokens), as shards of latents hold them."""
        told = encode(self.text_encoder, ids.flatten(0, -2), mask.flatten(0, -2), self.settings | {"pooled": False})
        return {
            # of the range of float32, which deep layers need
            "caption_embeds": told["encoder_hidden_states"].unflatten(0, ids.shape[:-1]).bfloat16(),
            "caption_mask": told["encoder_attention_mask"].unflatten(0, ids.shape[:-1]),
        }

    def conditions(self, batch, draws):
        """What a network is told of a batch, {keyword of its forward: tensor (B, ...)}, float32: of captions that were
        read, or of those that were encoded before, (B, per_row, ...), one of each drawn."""
        if "caption_ids" in batch:
            return encode(self.text_encoder, batch["caption_ids"], batch["caption_mask"], self.settings)
        embeds, mask = batch["caption_embeds"], batch["caption_mask"]
        drawn = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
        if embeds.shape[1] > 1:
            drawn = (moved(draws.uniform(), embeds.device, torch.float32) * batch["caption_count"]).long()
            drawn = drawn.minimum(batch["caption_count"] - 1)
        rows = torch.arange(len(embeds), device=embeds.device)
        told = {"encoder_hidden_states": embeds[rows, drawn].float(), "encoder_attention_mask": mask[rows, drawn]}
        if self.settings["pooled"]:
            counted = told["encoder_attention_mask"].sum(1, keepdim=True)
            told["pooled_projections"] = told["encoder_hidden_states"].sum(1) / counted
        return told


def encoder_of_latents(facts, config, where):
    """The `CaptionEncoder` that the captions in latents were encoded by.

    Args:
        facts: "captions" of latents.json.
        config: a `CaptionConfig`, which may say where it is now, and whose settings must be those of the latents.
        where: the latents, for messages.
    """
    given = {"max_caption_tokens": config.max_caption_tokens, "caption_layers": config.caption_layers or None}
    own = {"max_caption_tokens": facts["max_tokens"], "caption_layers": facts["layers"]}
    for name, value in given.items():
        if value not in (None, own[name]):
            raise ValueError(f"{name} {value}: the captions in latents {where!r} were encoded with {own[name]}")
    if config.caption_column not in (None, facts["column"]):
        raise ValueError(
            f"caption_column {config.caption_column!r}: the captions in latents {where!r} are those of "
            f"{facts['column']!r}"
        )
    source = config.text_encoder or facts["text_encoder"]
    if source is None:
        raise ValueError(
            f"latents {where!r} don't say where the text encoder of their captions is: pass --text_encoder with it"
        )
    captions = CaptionEncoder(source, {"max_tokens": facts["max_tokens"], "layers": facts["layers"]})
    if captions.fingerprint != facts["text_encoder_fingerprint"]:
        raise ValueError(
            f"the captions in latents {where!r} were encoded by another text encoder than the one that is now in "
            f"{source!r}: encode them anew, or pass --text_encoder with the one they are from"
        )
    return captions
