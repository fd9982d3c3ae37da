"""Sequences of tokens whose every noised distribution can be enumerated: a short Markov chain of few tokens.

source = MarkovSource(vocab_size=3, length=4)
source.sequences (N, L), source.probabilities (N,), source.entropy: the data, all of them; source.sample(n, generator)
source.clean(path, x_t, t): the exact log p(x0 | x_t) of every token, (B, L, V), what a perfect network says
source.marginal(path, t): the joint distribution of x_t over all_sequences(S, L), (S^L,)
source.network(scheduler): a perfectly trained network for any of the scheduler's prediction types, a ModelMixin of
    which pipelines ask device, dtype and config: network(tokens, timestep).sample (B, L, V)
counts(tokens, S): how often each of all_sequences(S, L) stands in tokens (B, L), for `agrees`
agrees(counts, probabilities): p-value of a chi-square test; assert agrees(...) > 1e-4 with a fixed seed
"""

import itertools

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from scipy.stats import chi2


def all_sequences(states, length):
    """Every sequence, (states^length, length), in the order of numbers with `states` digits."""
    return torch.tensor(list(itertools.product(range(states), repeat=length)))


def number_of(tokens, states):
    """The row of each sequence (B, L) in `all_sequences`: (B,)."""
    digits = states ** torch.arange(tokens.shape[1] - 1, -1, -1, device=tokens.device)
    return (tokens * digits).sum(1)


def counts(tokens, states):
    return torch.bincount(number_of(tokens, states), minlength=states ** tokens.shape[1])


def agrees(counts, probabilities):
    """The p-value of the chi-square test of counts (N,) against probabilities (N,); rare ones count as one."""
    expected = probabilities * counts.sum()
    if int(counts[probabilities == 0].sum()):
        return 0.0
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0
    return float(chi2.sf(float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1))


class MarkovSource:
    """Sequences of a random Markov chain, the same for the same arguments; all in float64. Its first token and its
    transitions are uneven, so that tokens depend on each other."""

    def __init__(self, vocab_size=3, length=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size, self.length = vocab_size, length
        chances = torch.rand(vocab_size + 1, vocab_size, generator=generator, dtype=torch.float64) ** 2 + 0.02
        chances = chances / chances.sum(1, keepdim=True)
        self.first, self.transitions = chances[0], chances[1:]
        self.sequences = all_sequences(vocab_size, length)
        steps = self.transitions[self.sequences[:, :-1], self.sequences[:, 1:]]
        self.probabilities = self.first[self.sequences[:, 0]] * steps.prod(1)
        self.entropy = float(-(self.probabilities * self.probabilities.log()).sum())

    def sample(self, n, generator):
        return self.sequences[torch.multinomial(self.probabilities, n, replacement=True, generator=generator)]

    def evidence(self, path, x_t, t):
        """q(x_t | x0) of each token for every x0: (B, L, V); t () or (B,)."""
        every = torch.arange(self.vocab_size).expand(len(x_t), -1)
        tables = path.marginal(every, torch.as_tensor(t, dtype=torch.float64).expand(len(x_t)))  # (B, V, S)
        return tables.gather(2, x_t[:, None].expand(-1, self.vocab_size, -1)).transpose(1, 2)

    def clean(self, path, x_t, t):
        """log p(x0 | x_t), by forward and backward sums along the chain."""
        evidence, length = self.evidence(path, x_t.cpu(), t), self.length
        forward, backward = [self.first * evidence[:, 0]], [torch.ones_like(evidence[:, 0])]
        for place in range(1, length):
            forward.append((forward[-1] @ self.transitions) * evidence[:, place])
            backward.append((backward[-1] * evidence[:, length - place]) @ self.transitions.T)
        joint = torch.stack(forward, 1) * torch.stack(backward[::-1], 1)
        return (joint / joint.sum(-1, keepdim=True)).log().to(x_t.device)

    def marginal(self, path, t):
        every = all_sequences(path.num_states, self.length)
        single = path.marginal(torch.arange(self.vocab_size)[:, None], t)[:, 0]  # (V, S)
        joint = torch.zeros(len(every), dtype=torch.float64)
        for sequence, probability in zip(self.sequences, self.probabilities, strict=True):
            joint += probability * single[sequence[None], every].prod(1)
        return joint

    def network(self, scheduler):
        network = ExactTokens(self.vocab_size, self.length)
        network.source, network.scheduler = self, scheduler
        return network


class ExactTokens(ModelMixin, ConfigMixin):
    """The network of `MarkovSource.network`; `calls` counts its evaluations."""

    @register_to_config
    def __init__(self, vocab_size=3, length=4, num_classes=None):
        super().__init__()
        # pipelines ask for a network's device and dtype
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.register_to_config(sample_size=(length,))
        self.calls = 0

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        self.calls += 1
        path, t = self.scheduler.path, torch.as_tensor(self.scheduler.path_time(timestep)).cpu()
        output = self.source.clean(path, hidden_states, t)
        if self.scheduler.config.prediction_type == "score":
            output = path.score(output, hidden_states, t)
        elif self.scheduler.config.prediction_type == "leave_one_out":
            output = path.leave_one_out(output, hidden_states, t)
        return UNet2DOutput(sample=output) if return_dict else (output,)
