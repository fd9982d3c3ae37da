"""The baseline of token diffusion: an autoregressive transformer of the same size, trained on the same sequences by the
same loop, with the same optimizer, averaged weights, steps and tokens.

    python benchmarks/autoregressive.py qm9/absorbing --dataset "qm9_smiles_{split}.parquet" --output_dir runs/qm9_ar

Every option is that of `score-sde train --data_kind text`, so that one configuration is of both; `process`, `noise` and
what else is of diffusion goes unused, and so do classes. The network is transformers' LlamaForCausalLM with the layers,
width and heads of network_kwargs; its SwiGLU has as many parameters as an MLP of four times the width. It is given one
further token, which begins a sequence.

Writes output_dir/model, and output_dir/autoregressive.json with bits per character of the test split, exact up to the
arithmetic: of the same sequences as the bound of diffusion, each of which begins without context, and, of packed text,
with full context: windows of the sequence's length that begin half a length apart, of which the second half counts.
"""

import json
import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from score_sde.training.parts.loop import fit, make_accelerator, save_model
from score_sde.training.parts.options import mapping, one_line_errors, parse
from score_sde.training.parts.run_folder import open_run
from score_sde.training.parts.tasks import Task
from score_sde.training.parts.text_data import TextData
from score_sde.training.parts.text_task import TextTrainConfig


@dataclass
class AutoregressiveConfig(TextTrainConfig):
    """Train an autoregressive transformer on tokens."""


class NextToken(nn.Module):
    """Logits (B, L, V) of each token of sequences (B, L), given those before it."""

    def __init__(self, vocab_size, length, network_kwargs):
        super().__init__()
        width, heads = network_kwargs["hidden_size"], network_kwargs["num_attention_heads"]
        self.begin = vocab_size
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size + 1,
                hidden_size=width,
                num_hidden_layers=network_kwargs["num_layers"],
                num_attention_heads=heads,
                intermediate_size=round(8 * width / 3),
                max_position_embeddings=length + 1,
                bos_token_id=vocab_size,
                eos_token_id=None,
            )
        )

    @property
    def config(self):
        return self.llama.config

    def forward(self, tokens):
        shifted = torch.cat([torch.full_like(tokens[:, :1], self.begin), tokens[:, :-1]], dim=1)
        return self.llama(shifted, use_cache=False).logits[..., : self.begin]

    def nats(self, tokens):
        """Of each token (B, L)."""
        return F.cross_entropy(self(tokens).float().transpose(1, 2), tokens, reduction="none")

    @torch.no_grad()
    def sample(self, count, length, end, seed=0, batch_size=500):
        """Draw tokens (count, length), filled up by `end` behind the first."""
        torch.manual_seed(seed)
        # what begins a sequence is never drawn
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "suppress_tokens": [self.begin]}
        settings |= {"eos_token_id": end, "pad_token_id": self.begin if end is None else end}
        rows = []
        for start in range(0, count, batch_size):
            prompt = torch.full((min(batch_size, count - start), 1), self.begin)
            drawn = self.llama.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, 1:]
            rows.append(F.pad(drawn, (0, length - drawn.shape[1]), value=end))
        return torch.cat(rows)


class AutoregressiveTask(Task):
    """An autoregressive transformer on the sequences of an `AutoregressiveConfig`."""

    samples_suffix, unit = ".txt", "texts"

    def __init__(self, config, accelerator):
        self.config, self.data = config, TextData(config, accelerator)
        vocab_size = len(self.data.tokenizer)
        network = NextToken(vocab_size, config.length, mapping("network_kwargs", config.network_kwargs))
        super().__init__(network, self.data.dataset, self.data.fingerprint())
        self.evaluation_steps, self.held_out = config.evaluation_steps, None
        if config.evaluation_steps:
            self.held_out = self.data.split(config.evaluation_split)

    def compute_loss(self, state, batch, draws):
        nats = F.cross_entropy(state.model(batch["tokens"]).float().transpose(1, 2), batch["tokens"], reduction="none")
        counts = counted(self.dataset, batch["tokens"])
        return (nats * counts).sum() / counts.sum(), {}

    def evaluate(self, network):
        found = likelihood(network, self.held_out, self.config.evaluation_texts)
        return {"held_out_loss": found["nats_per_token"], "bits_per_character": found["bits_per_character"]}


@torch.no_grad()
def likelihood(network, dataset, count, batch_size=64):
    """What the first sequences of a `TokenDataset` need, each without context: nats per token, bits per character."""
    nats = tokens = characters = 0.0
    for rows in torch.arange(min(count, len(dataset))).split(batch_size):
        batch = torch.stack([each["tokens"] for each in dataset.__getitems__(rows.tolist())])
        nats += float((network.nats(batch).double() * counted(dataset, batch)).sum())
        tokens += int(dataset.counted(batch).sum())
        characters += float(dataset.characters_of(batch).sum())
    bits = nats / math.log(2)
    return {"nats_per_token": nats / tokens, "bits_per_token": bits / tokens, "bits_per_character": bits / characters}


def counted(dataset, tokens):
    """Which tokens of sequences (B, L) count: not those that only fill them up."""
    return torch.arange(tokens.shape[1]) < dataset.counted(tokens)[:, None]


@torch.no_grad()
def with_full_context(network, dataset, batch_size=64):
    """Bits per character of a packed stream of tokens, each but the first half a sequence given at least half a
    sequence before it."""
    half, tokens = dataset.length // 2, torch.from_numpy(dataset.tokens.astype(np.int64))
    windows = tokens.unfold(0, 2 * half, half)
    nats = network.nats(windows[:1]).double()[:, :half].sum()
    for part in windows.split(batch_size):
        nats += network.nats(part).double()[:, half:].sum()
    return float(nats) / math.log(2) / (half * (len(windows) + 1)) * dataset.count / dataset.texts.characters


def main(argv=None):
    config = parse(AutoregressiveConfig, sys.argv[1:] if argv is None else argv)
    config.label_column = None
    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        task = AutoregressiveTask(config, accelerator)
        network, facts = fit(config, accelerator, run, task)
        network.eval()
        print(f"model: {save_model(network.llama, os.path.join(config.output_dir, 'model'), facts)}")
        test = task.data.split("test")
        found = {"test": likelihood(network, test, len(test)) | {"sequences": len(test)}}
        if config.packing:
            found["bits_per_character_with_full_context"] = with_full_context(network, test)
        found |= {key: facts[key] for key in ("steps", "images_seen", "train_seconds", "parameters")}
        with open(os.path.join(config.output_dir, "autoregressive.json"), "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        main()
