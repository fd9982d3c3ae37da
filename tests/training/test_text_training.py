"""Training on tokens: what is learned, and that a run goes on as if it had never stopped."""

import json
import math

import datasets
import pytest
import torch
from enumerable import MarkovSource

from runs import equal
from score_sde.training.parts.loop import fit, make_accelerator
from score_sde.training.parts.options import parse
from score_sde.training.parts.run_folder import open_run
from score_sde.training.parts.text_task import TextTask
from score_sde.training.train import TrainConfig


TINY = "{hidden_size: 16, num_layers: 1, num_attention_heads: 2}"
LETTERS = "abc"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(a Markov source of 3 letters and 5 places, the folder of texts that are drawn from it)."""
    folder, source = tmp_path_factory.mktemp("source"), MarkovSource(vocab_size=3, length=5)
    for seed, (split, count) in enumerate([("train", 4000), ("validation", 2000)]):
        rows = source.sample(count, torch.Generator().manual_seed(seed)).tolist()
        texts = ["".join(LETTERS[token] for token in row) for row in rows]
        kinds = [text[0] for text in texts]
        datasets.Dataset.from_dict({"text": texts, "kind": kinds}).to_parquet(folder / f"{split}.parquet")
    return source, folder


def config_of(source, output_dir, *options):
    _, folder = source
    settings = ["--data_kind", "text", "--dataset", folder / "{split}.parquet", "--packing", "false", "--length", 5]
    settings += ["--network_kwargs", TINY, "--batch_size", 8, "--lr_warmup_steps", 0, "--learning_rate", "1e-2"]
    settings += ["--checkpointing_steps", 2, "--max_train_steps", 4, "--output_dir", output_dir]
    return parse(TrainConfig, [str(each) for each in (*settings, *options)])


def trained(source, output_dir, *options):
    """(the task, its network of averaged weights, the facts of the run)."""
    config = config_of(source, output_dir, *options)
    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        task = TextTask(config, accelerator)
        network, facts = fit(config, accelerator, run, task)
    return task, network, facts


@pytest.mark.parametrize(
    "options", [(), ("--label_column", "kind", "--process", "uniform", "--mixed_precision", "bf16")]
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(source, tmp_path, options):
    _, whole, _ = trained(source, tmp_path / "whole", *options)
    trained(source, tmp_path / "parts", *options, "--max_train_steps", 2)
    more = ["--resume_from_checkpoint", "latest"]
    _, parts, _ = trained(source, tmp_path / "parts", *options, *more)
    assert equal(whole.state_dict(), parts.state_dict())
    with pytest.raises(ValueError, match="was trained on other data: rows was '"):
        trained(source, tmp_path / "parts", *options, *more, "--split", "validation")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--process", "uniform"), "process was 'absorbing', is 'uniform'"),
        (("--loss", "score_entropy"), "loss was 'elbo', is 'score_entropy'"),
        (("--tokenizer", "bytes"), "tokenizer was '\\w+', is '\\w+'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(source, tmp_path, option, message):
    trained(source, tmp_path, "--max_train_steps", 2)
    with pytest.raises(ValueError, match=message):
        trained(source, tmp_path, *option, "--resume_from_checkpoint", "latest")


def test_micro_batches_share_a_step_as_one_batch_would(source, tmp_path):
    _, whole, _ = trained(source, tmp_path / "whole")
    halves = ["--batch_size", 4, "--gradient_accumulation_steps", 2]
    _, parts, _ = trained(source, tmp_path / "halves", *halves)
    assert max((a - b).abs().max() for a, b in zip(whole.parameters(), parts.parameters(), strict=True)) < 1e-5


def test_the_evaluation_bounds_the_entropy_of_held_out_texts(source, tmp_path):
    """A network that was trained for 2 steps: the bound is above the entropy, and nearly that of chance."""
    markov, _ = source
    options = ["--evaluation_steps", 1, "--evaluation_texts", 600, "--learning_rate", "1e-9"]
    task, _, _ = trained(source, tmp_path, *options, "--max_train_steps", 1)
    [line] = [json.loads(each) for each in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    nats = 5 * line["held_out_loss"]
    error = 5 * task.measured["nats_per_token_error"]
    assert markov.entropy < nats
    # a fresh network says that all 4 tokens are as likely
    assert abs(nats - 5 * math.log(4)) < 4 * error + 1e-3
    assert line["bits_per_token"] == pytest.approx(line["held_out_loss"] / math.log(2))
    assert line["bits_per_character"] == pytest.approx(line["bits_per_token"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--process", "uniform"),
        ("--prediction_type", "score", "--loss", "score_entropy"),
        ("--label_column", "kind"),
    ],
)
def test_a_network_learns_the_source(source, tmp_path, options):
    """The bound reaches the entropy, of texts with their class given the class, to 0.05 nats of about 4."""
    markov, _ = source
    more = ["--network_kwargs", "{hidden_size: 32, num_layers: 2, num_attention_heads: 2, class_dropout_prob: 0}"]
    more += ["--batch_size", 128, "--max_train_steps", 800, "--lr_scheduler", "cosine", "--checkpointing_steps", 0]
    more += ["--evaluation_steps", 800, "--evaluation_texts", 2000, "--ema_decay", 0.99, "--learning_rate", "4e-3"]
    task, _, _ = trained(source, tmp_path, *options, *more)
    nats, error = (5 * task.measured[name] for name in ("nats_per_token", "nats_per_token_error"))
    entropy = markov.entropy
    if "--label_column" in options:
        entropy += float((markov.first * markov.first.log()).sum())
    assert entropy - 4 * error < nats < entropy + 4 * error + 0.05
