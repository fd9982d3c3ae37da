"""The autoregressive baseline of the benchmarks: what it is told, and that its figures are exact."""

import math
from types import SimpleNamespace

import torch
from autoregressive import NextToken, counted, likelihood, with_full_context


NETWORK = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}


def network(length):
    torch.manual_seed(0)
    return NextToken(5, length, NETWORK).eval().requires_grad_(False)


def test_a_token_is_told_those_before_it_alone():
    model, tokens = network(6), torch.tensor([[0, 1, 2, 3, 4, 0]])
    before = model.nats(tokens)
    changed = tokens.clone()
    changed[0, 3] = 1
    after = model.nats(changed)
    assert torch.equal(before[0, :3], after[0, :3])
    assert (before[0, 4:] - after[0, 4:]).abs().min() > 1e-6
    # a distribution over the tokens, without the one that begins
    assert model(tokens).shape == (1, 6, 5)


def test_samples_follow_the_model():
    model = network(2)
    logits = model(torch.zeros(1, 2, dtype=torch.int64))[0, 0]
    # the second token may be the end, behind which only ends follow
    drawn = model.sample(4000, length=2, end=4, seed=0)
    shares = torch.bincount(drawn[:, 0], minlength=5) / 4000
    assert (shares - logits.softmax(0)).abs().max() < 0.03
    assert (drawn[drawn[:, 0] == 4, 1] == 4).all() and drawn.max() <= 4


class Rows:
    """Four sequences of four tokens, the second one filled up by ends (4)."""

    def __init__(self):
        self.rows = torch.tensor([[0, 1, 2, 3], [1, 4, 4, 4], [2, 2, 2, 2], [3, 0, 4, 4]])

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, numbers):
        return [{"tokens": self.rows[i]} for i in numbers]

    def counted(self, tokens):
        return ((tokens == 4).cumsum(1) == 0).sum(1).add(1).clamp_max(4)

    def characters_of(self, tokens):
        return (tokens != 4).sum(1)


def test_the_likelihood_is_of_what_counts():
    model, data = network(4), Rows()
    assert counted(data, data.rows).sum(1).tolist() == [4, 2, 4, 3]
    nats = model.nats(data.rows)
    total = float(nats[0].sum() + nats[1, :2].sum() + nats[2].sum() + nats[3, :3].sum())
    found = likelihood(model, data, 10, batch_size=3)
    assert abs(found["nats_per_token"] - total / 13) < 1e-6
    assert abs(found["bits_per_character"] - total / math.log(2) / 11) < 1e-6


def test_full_context_is_at_least_half_a_sequence():
    model, tokens = network(4), torch.randint(5, (10,), generator=torch.Generator().manual_seed(0))
    # windows of four begin at 0, 2, 4 and 6
    expected = model.nats(tokens[None, :4])[0].sum()
    for begin in (2, 4, 6):
        expected += model.nats(tokens[None, begin : begin + 4])[0, 2:].sum()
    data = SimpleNamespace(tokens=tokens.numpy(), length=4, count=10, texts=SimpleNamespace(characters=20))
    found = with_full_context(model, data, batch_size=2)
    assert abs(found - float(expected) / math.log(2) / 20) < 1e-6
