"""Objectives for noise on tokens against the exact bound of an enumerable source."""

from types import SimpleNamespace

import pytest
import torch
from enumerable import MarkovSource, all_sequences, number_of
from numpy.polynomial.legendre import leggauss
from tiny import seeded

from score_sde import DiscreteScoreScheduler
from score_sde.losses import (
    DISCRETE_INVERSE_DENSITIES,
    DISCRETE_LOSSES,
    DISCRETE_TIME_DENSITIES,
    DiscreteObjective,
    drop_conditions,
)
from score_sde.schedulers.discrete_paths import DISCRETE_PATHS, DISCRETE_PREDICTIONS, NOISES, draw_uniforms


PROCESSES = list(DISCRETE_PATHS)
N = 40_000


class Output:
    def __init__(self, sample):
        self.sample = sample


class Table:
    """A network that says the same logits whatever it is shown, and keeps what it was shown."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, tokens, timestep, class_labels=None):
        self.tokens, self.timestep, self.class_labels = tokens, timestep, class_labels
        return Output(self.logits.expand(len(tokens), -1, -1))


def batch(source, objective, n=N, seed=0):
    generator = seeded(seed)
    tokens, uniforms = source.sample(n, generator), draw_uniforms((n, source.length), generator)
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    return tokens, objective.times(u), uniforms


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("time_density", DISCRETE_TIME_DENSITIES)
def test_densities_are_those_that_their_weights_divide_out(time_density, noise):
    """u is the distribution function of the times: dt / du = 1 / p(t), and the ends are t_min and t_max."""
    objective = DiscreteObjective(DiscreteScoreScheduler(5, noise=noise), time_density=time_density)
    u = torch.linspace(0.001, 0.999, 300, dtype=torch.float64)
    slope = (objective.times(u + 1e-6) - objective.times(u - 1e-6)) / 2e-6
    weight = objective.weight(objective.times(u)) * torch.ones_like(u)
    assert (slope / weight - 1).abs().max() < 1e-4
    ends = objective.times(torch.tensor([2**-53, 1 - 2**-53], dtype=torch.float64)).sort()[0]
    assert (ends - torch.tensor([objective.scheduler.t_min, objective.scheduler.t_max])).abs().max() < 1e-6
    assert set(DISCRETE_INVERSE_DENSITIES) == set(DISCRETE_TIME_DENSITIES)


@pytest.mark.parametrize("time_density", DISCRETE_TIME_DENSITIES)
@pytest.mark.parametrize("loss", DISCRETE_LOSSES)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_expected_loss_is_the_bound(process, loss, time_density):
    """With the exact network: the entropy per token, less what the ends of the path hold back."""
    source = MarkovSource(2, 4)
    for prediction_type in DISCRETE_PREDICTIONS:
        scheduler = DiscreteScoreScheduler(2, process, prediction_type=prediction_type)
        objective = DiscreteObjective(scheduler, loss, time_density)
        losses = objective(source.network(scheduler), *batch(source, objective))
        assert losses.shape == (N,)
        # the ends, before t_min and after t_max, hold back less than 0.01
        error = abs(float(losses.mean()) - source.entropy / 4)
        assert error < 4 * float(losses.std()) / N**0.5 + 0.01, prediction_type


@pytest.mark.parametrize("prediction_type", ["sample", "leave_one_out"])
@pytest.mark.parametrize("process", PROCESSES)
def test_both_losses_are_one_for_predicted_tokens(process, prediction_type):
    source = MarkovSource(3, 4)
    scheduler = DiscreteScoreScheduler(3, process, prediction_type=prediction_type)
    network = Table(torch.randn(1, 4, 3, generator=seeded(0), dtype=torch.float64))
    elbo, entropy = (DiscreteObjective(scheduler, loss) for loss in ("elbo", "score_entropy"))
    drawn = batch(source, elbo, 100)
    assert torch.allclose(elbo(network, *drawn), entropy(network, *drawn), rtol=1e-8)


def test_absorbing_noise_weighs_the_cross_entropy_of_masked_tokens():
    """Sahoo et al. 2024, for the log-linear noise: 1 / t."""
    scheduler = DiscreteScoreScheduler(3, alpha_min=0.0)
    logits = torch.randn(1, 4, 3, generator=seeded(0), dtype=torch.float64)
    network, objective = Table(logits), DiscreteObjective(scheduler)
    tokens, t, uniforms = (
        torch.tensor([[0, 1, 2, 1]]),
        torch.tensor([0.25]).double(),
        torch.tensor([[0.1, 0.8, 0.7, 0.9]]),
    )
    loss = objective(network, tokens, t, uniforms.double())
    assert network.tokens.tolist() == [[0, 3, 2, 3]]
    assert network.timestep.dtype == torch.float32 and network.timestep.tolist() == [250.0]
    cross_entropy = -torch.log_softmax(logits, -1)[0, [1, 3], [1, 1]].sum()
    assert float(loss) == pytest.approx(float(cross_entropy) / 0.25 / 4 * (scheduler.t_max - scheduler.t_min))


def test_the_score_of_no_distribution_costs_more():
    """Ratios that are all twice too large: the same tokens, and rates that are wrong."""
    source, scheduler = MarkovSource(3, 4), DiscreteScoreScheduler(3, prediction_type="score")
    exact = source.network(scheduler)
    elbo, entropy = (DiscreteObjective(scheduler, loss) for loss in ("elbo", "score_entropy"))
    tokens, t, uniforms = batch(source, elbo, 100)

    def louder(x_t, timestep):
        return Output(exact(x_t, timestep).sample + 2.0)

    assert torch.allclose(elbo(louder, tokens, t, uniforms), elbo(exact, tokens, t, uniforms))
    assert torch.allclose(entropy(exact, tokens, t, uniforms), elbo(exact, tokens, t, uniforms))
    is_noised = entropy(exact, tokens, t, uniforms) > 0
    assert (entropy(louder, tokens, t, uniforms) > entropy(exact, tokens, t, uniforms))[is_noised].all()


@pytest.mark.parametrize("loss", DISCRETE_LOSSES)
@pytest.mark.parametrize("prediction_type", DISCRETE_PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_minimiser_is_the_exact_network(process, prediction_type, loss):
    """A table of outputs for every x_t: its gradient vanishes where they are exact."""
    source, scheduler = MarkovSource(2, 2), DiscreteScoreScheduler(2, process, prediction_type=prediction_type)
    objective, path = DiscreteObjective(scheduler, loss), scheduler.path
    tokens, _, uniforms = batch(source, objective)
    states, t = all_sequences(path.num_states, 2), torch.full((N,), 0.5, dtype=torch.float64)
    exact = source.network(scheduler)(states, scheduler.timestep(t[: len(states)])).sample
    # of tokens that are shown nothing is asked
    exact = torch.where(exact > -torch.inf, exact, 0.0)
    off, norms = torch.randn(exact.shape, generator=seeded(0), dtype=torch.float64), []
    for scale in (0.0, 0.5):
        table = (exact + scale * off).requires_grad_()
        losses = objective(
            lambda x_t, _, table=table: Output(table[number_of(x_t, path.num_states)]), tokens, t, uniforms
        )
        norms.append(float(torch.autograd.grad(losses.mean(), table)[0].norm()))
    assert norms[0] < 0.05 * norms[1]


def test_what_is_given_stays_clean_and_does_not_count():
    scheduler = DiscreteScoreScheduler(3)
    objective, network = DiscreteObjective(scheduler), Table(torch.randn(1, 4, 3, generator=seeded(0)))
    tokens, t, uniforms = batch(MarkovSource(3, 4), objective, 8)
    mask = torch.tensor([[True, True, False, False]]).expand(8, 4).clone()
    mask[0] = False
    uniforms[:] = 0.9999
    loss = objective(network, tokens, t, uniforms, mask=mask)
    assert torch.equal(network.tokens[1:, 2:], tokens[1:, 2:]) and (network.tokens[1:, :2] == 3).all()
    whole = objective(network, tokens, t, uniforms)
    cross_entropy = -torch.log_softmax(network.logits, -1).expand(8, -1, -1).gather(2, tokens[..., None])[..., 0]
    ratio = cross_entropy[:, :2].mean(1) / cross_entropy.mean(1)
    assert torch.allclose(loss[1:], (whole * ratio)[1:], rtol=1e-5) and float(loss[0]) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, [500.0, 250.0]),
        ({"prediction_type": "score"}, [500.0, 500.0]),
        ({"process": "uniform"}, [500.0, 500.0]),
    ],
)
def test_beside_given_tokens_a_network_is_told_what_sampling_tells_it(options, told):
    scheduler = DiscreteScoreScheduler(3, noise=lambda t: 1 - 0.999 * t, **options)
    seen = []

    def network(tokens, timestep):
        seen.append(timestep)
        return SimpleNamespace(sample=torch.zeros(*tokens.shape, 3))

    mask = torch.tensor([4 * [True], [True, True, False, False]])
    tokens, uniforms = torch.zeros(2, 4, dtype=torch.long), torch.tensor([0.1, 0.9, 0.9, 0.1]).double().expand(2, 4)
    DiscreteObjective(scheduler)(network, tokens, torch.full((2,), 0.5).double(), uniforms, mask=mask)
    assert seen[0].tolist() == pytest.approx(told, rel=2e-3)


def test_conditions_go_to_the_network_and_are_dropped_as_others_are():
    scheduler = DiscreteScoreScheduler(3)
    objective, network = DiscreteObjective(scheduler), Table(torch.zeros(1, 4, 3))
    tokens, t, uniforms = batch(MarkovSource(3, 4), objective, 3)
    conditions = drop_conditions(
        {"class_labels": torch.tensor([0, 1, 2])},
        lambda given: {"class_labels": torch.full_like(given["class_labels"], 9)},
        torch.tensor([True, False, True]),
    )
    objective(network, tokens, t, uniforms, conditions)
    assert network.class_labels.tolist() == [9, 1, 9]


def test_half_precision_is_summed_in_float32():
    scheduler = DiscreteScoreScheduler(3)
    objective, logits = DiscreteObjective(scheduler), torch.randn(1, 4, 3, generator=seeded(0)).half()
    drawn = batch(MarkovSource(3, 4), objective, 8)
    loss = objective(Table(logits), *drawn)
    assert loss.dtype == torch.float32 and torch.equal(loss, objective(Table(logits.float()), *drawn))


def test_what_cannot_be_is_refused():
    scheduler = DiscreteScoreScheduler(3)
    with pytest.raises(ValueError, match="loss 'mse' is unknown; choose one of elbo, score_entropy"):
        DiscreteObjective(scheduler, loss="mse")
    with pytest.raises(
        ValueError, match="time_density 'log_normal' is unknown; choose one of uniform, alpha, importance"
    ):
        DiscreteObjective(scheduler, time_density="log_normal")
    objective, network = DiscreteObjective(scheduler), Table(torch.zeros(1, 4, 3))
    tokens, t, uniforms = batch(MarkovSource(3, 4), objective, 2)
    with pytest.raises(ValueError, match=r"uniforms of shape \(4,\) must be of that of tokens, \(2, 4\)"):
        objective(network, tokens, t, uniforms[0])
    with pytest.raises(ValueError, match=r"mask of shape \(2, 1\) must be of that of tokens"):
        objective(network, tokens, t, uniforms, mask=torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="token ids must be from 0 to 2"):
        objective(network, tokens + 3, t, uniforms)


@pytest.mark.parametrize(("prediction_type", "best"), [("sample", 2.7666), ("leave_one_out", 1.9513)])
def test_the_best_bound_of_a_network_that_is_not_told_the_time(prediction_type, best):
    """A table of outputs for every x_t, the same at all times, where the exact bound is least, with uniform noise."""
    source, path = MarkovSource(3, 2), DISCRETE_PATHS["uniform"](3)
    every, read = all_sequences(3, 2), DISCRETE_PREDICTIONS[prediction_type]
    x0, x_t = source.sequences.repeat_interleave(9, 0), every.repeat(9, 1)
    nodes, weights = (torch.as_tensor(each) for each in leggauss(16))
    first, last = path.log_noised(path.t_min), path.log_noised(path.t_max)
    noised = (first + (last - first) * (nodes + 1) / 2).exp()
    times = path.t_from_alpha(1 - noised)
    weights = weights * (last - first) / 2 * noised / path.fall(times)

    def chances(t):
        return source.probabilities.repeat_interleave(9) * path.marginal(x0, t).gather(2, x_t[..., None]).prod(1)[:, 0]

    joints = [chances(t) for t in times]
    ends = float(path.prior_gap(None, source.sequences, 1.0).sum(1) @ source.probabilities)
    table = torch.zeros(9, 2, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=60, line_search_fn="strong_wolfe")

    def bound():
        optimizer.zero_grad()
        output = table[number_of(x_t, 3)]
        log_p0 = read(path, output, x_t, path.t_min)
        total = ends - chances(path.t_min) @ log_p0.gather(2, x0[..., None]).sum((1, 2))
        for t, weight, joint in zip(times, weights, joints, strict=True):
            total = total + weight * (joint @ path.elbo_rate(read(path, output, x_t, t), x0, x_t, t).sum(1))
        total.backward()
        return total

    optimizer.step(bound)
    assert source.entropy == pytest.approx(1.9374, abs=1e-4) and float(bound().detach()) == pytest.approx(
        best, abs=1e-3
    )
