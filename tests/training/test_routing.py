"""Token routing in training: who goes around, what is counted, and that nothing else changes."""

import json

import pytest
import torch
from networks import small_dit

from runs import equal, run, train_tiny
from score_sde.training import train
from score_sde.training.parts.flops import FlopCounter
from score_sde.training.parts.loop import Draws
from score_sde.training.parts.routing import Routed


DEEP = ["--network_kwargs", "{patch_size: 2, hidden_size: 16, num_layers: 3, num_attention_heads: 2}"]


class OneProcess:
    num_processes, process_index, device = 1, 0, torch.device("cpu")


class OfTwo(OneProcess):
    num_processes = 2

    def __init__(self, index):
        self.process_index = index


class Listener:
    def __call__(self, sample, timestep, kept_tokens=None):
        self.kept = kept_tokens


def drawn(accelerator, batch_size, micro_batch=0, micro_batches=1, share=0.5):
    draws = Draws(3, 128, accelerator, batch_size, micro_batch, micro_batches)
    heard = Listener()
    Routed(heard, (2, 2), share, draws)(torch.zeros(batch_size, 4, 8, 8), None)
    return heard.kept


def test_a_random_share_of_each_sample_is_kept_whatever_the_layout():
    whole = drawn(OneProcess, 64)
    assert whole.shape == (64, 8)
    assert (whole.diff(dim=1) > 0).all() and whole.min() == 0 and whole.max() == 15
    # each of 16 tokens is kept by about half of 64 samples, and no two samples keep the same
    counts = torch.bincount(whole.flatten(), minlength=16)
    assert ((counts - 32).abs() < 4 * (64 / 4) ** 0.5).all()
    assert len(whole.unique(dim=0)) == 64
    assert torch.equal(whole, torch.cat([drawn(OfTwo(i), 32) for i in range(2)]))
    assert torch.equal(whole, torch.cat([drawn(OneProcess, 32, i, 2) for i in range(2)]))
    assert drawn(OneProcess, 2, share=0.99).shape == (2, 1)


def flops(share):
    model = small_dit(num_layers=6, patch_size=1).train()
    counter = FlopCounter(model)
    network = counter.watching(model)
    if share:
        network = Routed(network, model.patch, share, Draws(0, 0, OneProcess, 2))
    network(torch.zeros(2, 3, 8, 8), torch.ones(2))
    return counter.flops


def test_the_operations_that_are_counted_are_those_of_the_tokens_that_are_left():
    """In three blocks of six: linear layers go with the tokens, attention with their square; backward takes twice as
    many."""
    tokens, left, width = 64, 32, 48
    of_token, of_pair = 2 * 12 * width**2, 2 * 2 * width
    saved = 3 * 3 * ((tokens - left) * of_token + (tokens**2 - left**2) * of_pair)
    assert flops(0.0) - flops(0.5) == pytest.approx(saved, rel=0.02)


def test_a_run_is_resumed_bit_for_bit_and_evaluated_with_all_tokens(tmp_path):
    options = [*DEEP, "--token_routing", 0.5, "--checkpointing_steps", 1, "--evaluation_steps", 1]
    options += ["--evaluation_images", 4]
    whole = train_tiny(tmp_path / "whole", *options, "--max_train_steps", 2)
    train_tiny(tmp_path / "parts", *options, "--max_train_steps", 1)
    more = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="token_routing was 0.5, is 0.25"):
        train_tiny(tmp_path / "parts", *options, *more, "--token_routing", 0.25)
    assert equal(whole, train_tiny(tmp_path / "parts", *options, *more))
    plain = train_tiny(tmp_path / "plain", *options, "--token_routing", 0, "--max_train_steps", 2)
    assert not equal(whole, plain)
    # a fresh network gives 0 with any tokens, and its first evaluation is the same
    held_out = [
        json.loads((tmp_path / name / "evaluation.jsonl").read_text().splitlines()[0])["held_out_loss"]
        for name in ("whole", "plain")
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=0.05)


def test_bfloat16_and_checkpointed_activations_go_around_too(tmp_path):
    options = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--token_routing", 0.5]
    train_tiny(tmp_path, *DEEP, *options, "--max_train_steps", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token_routing", "1"], "token_routing 1.0 must be at least 0 and below 1"),
        (
            ["--token_routing", "0.5", "--network", "unet", "--resolution", "32"],
            "token_routing needs a network of tokens, such as dit; a Scor",
        ),
        (["--token_routing", "0.5", "--network_kwargs", "{num_layers: 2}"], "needs a network of 3 blocks at least"),
        (["--token_routing", "0.5", "--network_kwargs", "{conditioning: in_context}"], "with conditioning adaln_zero"),
        (
            ["--token_routing", "0.5", "--method", "mean_flow"],
            "token_routing is of denoising, and not of method mean_f",
        ),
        (["--token_routing", "0.5", "--data_kind", "text"], "token_routing is an option for data of the kind image"),
    ],
)
def test_what_cannot_be_routed_is_refused_before_any_data_is_opened(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(train.main, *arguments, "--dataset", "does_not_exist.parquet")
    error = capsys.readouterr().err
    assert message in error and "does_not_exist" not in error
