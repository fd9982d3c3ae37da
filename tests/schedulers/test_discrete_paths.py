"""Noise on tokens against enumeration: every distribution of a short Markov chain of few tokens, and its score."""

import itertools
import math

import pytest
import torch
from enumerable import MarkovSource, agrees, all_sequences, counts, number_of
from numpy.polynomial.legendre import leggauss
from scipy.integrate import quad, solve_ivp
from scipy.linalg import expm
from tiny import seeded

from score_sde.schedulers.discrete_paths import (
    DISCRETE_PATHS,
    DISCRETE_PREDICTIONS,
    NOISES,
    draw_uniforms,
    likelihood_bound,
    times_of_bound,
)


def straight(t):
    return 1 - t


PROCESSES = list(DISCRETE_PATHS)
EVERY_NOISE = [*NOISES, straight]
ALPHABETS = [(2, 6), (3, 4), (4, 3)]


def exact(value):
    return torch.tensor(value, dtype=torch.float64)


def transition_matrix(path, s, t):
    r = path.transition(s, t)
    return r * torch.eye(path.num_states, dtype=torch.float64) + (1 - r) * path.pi()


def marginal_matrix(path, t):
    return path.marginal(torch.arange(path.vocab_size)[:, None], t)[:, 0]  # (V, S)


def known(tokens, vocab_size):
    """log p0 of tokens that are known."""
    return torch.nn.functional.one_hot(tokens, vocab_size).double().log()


def joint_of(source, path, t):
    """p(x0, x_t), (S^L, N), enumerated."""
    every, single = all_sequences(path.num_states, source.length), marginal_matrix(path, t)
    chances = [single[source.sequences[:, place]][:, every[:, place]] for place in range(source.length)]  # (N, S^L)
    return torch.stack(chances).prod(0).T * source.probabilities


def clean_of(source, path, t):
    """(x_t, p(x0 | x_t) of each token, p(x_t)) of every x_t that can be, enumerated."""
    joint = joint_of(source, path, t)
    possible = joint.sum(1) > 0
    weights = joint[possible] / joint[possible].sum(1, keepdim=True)
    tokens = torch.nn.functional.one_hot(source.sequences, source.vocab_size).double()
    return (
        all_sequences(path.num_states, source.length)[possible],
        torch.einsum("xn,nlv->xlv", weights, tokens),
        joint.sum(1)[possible],
    )


# --- survival -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", EVERY_NOISE)
def test_noise_falls_from_one_and_round_trips(noise):
    path = DISCRETE_PATHS["absorbing"](5, noise)
    t = torch.cat([exact([0, 1e-9, 1e-6]), torch.linspace(1e-3, path.t_max, 41, dtype=torch.float64)])
    alpha = path.alpha(t)
    assert float(alpha[0]) == 1 and float(path.alpha(1.0)) <= 1.001e-3
    assert (path.log_alpha(t).diff() < 0).all()
    assert (path.t_from_alpha(alpha) - t).abs().max() < 1e-7
    assert (path.log_alpha(t).exp() - alpha).abs().max() == 0


@pytest.mark.parametrize("noise", EVERY_NOISE)
def test_the_rate_is_the_derivative_of_log_alpha(noise):
    path = DISCRETE_PATHS["absorbing"](5, noise)
    t = torch.linspace(1e-4, path.t_max, 40, dtype=torch.float64)
    halfway = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(path.log_alpha(halfway).sum(), halfway)
    assert ((path.rate(t) + slope).abs() <= 1e-9 * slope.abs()).all()
    assert quad(lambda t: float(path.rate(t)), 0.1, 0.8)[0] == pytest.approx(-math.log(path.transition(0.1, 0.8)))


def test_noises_are_those_of_the_papers():
    t = exact(0.3)
    absorbing = DISCRETE_PATHS["absorbing"]
    assert float(absorbing(5).alpha(t)) == pytest.approx(1 - 0.999 * 0.3)
    assert float(absorbing(5, "polynomial", exponent=3, alpha_min=0).alpha(t)) == pytest.approx(1 - 0.3**3)
    assert float(absorbing(5, "cosine", alpha_min=0).alpha(t)) == pytest.approx(1 - math.cos(math.pi / 2 * 0.7))
    geometric = absorbing(5, "geometric", sigma_min=1e-3, sigma_max=10)
    assert float(geometric.alpha(t)) == pytest.approx(math.exp(-(1e-3**0.7 * 10**0.3 - 1e-3)))


def test_a_function_may_be_flat_at_its_ends():
    path = DISCRETE_PATHS["absorbing"](5, lambda t: 1 - t**8)
    t = exact([0.1, 0.5, 0.9])
    assert torch.allclose(path.rate(t), 8 * t**7 / (1 - t**8)) and torch.allclose(path.t_from_alpha(1 - t**8), t)


@pytest.mark.parametrize(
    ("noise", "options", "t_min"),
    [
        *((noise, {}, 1e-3) for noise in NOISES),
        ("polynomial", {"exponent": 1.0}, 1e-3),
        ("polynomial", {"exponent": 10.0}, 1e-3),
        ("geometric", {"sigma_min": 1.0, "sigma_max": 500.0}, 1e-3),
        ("polynomial", {"exponent": 0.5}, (1e-3 / 0.999) ** 2),
        ("polynomial", {"exponent": 0.1}, (1e-3 / 0.999) ** 10),
        (lambda t: 1 - t**0.25, {}, 1e-12),
        # rounds to 1 before
        (lambda t: 1 - t**8, {}, 10**-1.5),
    ],
)
def test_training_sees_the_process_from_its_beginning_on(noise, options, t_min):
    path = DISCRETE_PATHS["absorbing"](5, noise, **options)
    assert path.t_min == pytest.approx(t_min, rel=1e-4)
    assert float(path.alpha(path.t_min)) > 0.99 and float(path.log_noised(path.t_min)) > -math.inf


@pytest.mark.parametrize(("noise", "slope"), [("log_linear", 0.999), ("cosine", 0.999 * math.pi / 2)])
def test_both_ends_keep_their_digits(noise, slope):
    path = DISCRETE_PATHS["uniform"](5, noise)
    assert float(path.log_noised(1e-14)) == pytest.approx(math.log(slope * 1e-14), rel=1e-12)
    near = 1e-10 if noise == "log_linear" else 1e-5
    expected = 1e-3 + (slope * near if noise == "log_linear" else 2 * 0.999 * math.sin(near * math.pi / 4) ** 2)
    assert float(path.alpha(1 - near)) - 1e-3 == pytest.approx(expected - 1e-3, rel=1e-5)


@pytest.mark.parametrize("noise", EVERY_NOISE)
@pytest.mark.parametrize("length", [1, 100])
def test_the_times_of_the_bound_integrate(noise, length):
    """Any function of alpha has the same integral by these times, whatever the noise; early ones weigh little."""
    path = DISCRETE_PATHS["absorbing"](5, noise)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t, weight = times_of_bound(path, u, 0.01, 0.99, length)
    alpha, noised = path.alpha(exact([0.01, 0.99])), path.log_noised(t).exp()
    integral = (weight * path.fall(t) * path.alpha(t) ** 2).mean()
    assert float(integral) == pytest.approx(float((alpha[0] ** 3 - alpha[1] ** 3) / 3), rel=1e-4)
    assert t.min() >= 0.01 and t.max() <= 0.99
    density = 1 / (weight * path.fall(t)) / (1 + (length * noised) ** -0.5)
    assert (density / density[0] - 1).abs().max() < 1e-9


# --- the chain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", EVERY_NOISE)
@pytest.mark.parametrize("process", PROCESSES)
def test_transitions_compose_to_the_marginal(process, noise):
    path = DISCRETE_PATHS[process](4, noise)
    first, second = transition_matrix(path, 0.2, 0.5), transition_matrix(path, 0.5, 0.9)
    assert (first @ second - transition_matrix(path, 0.2, 0.9)).abs().max() < 1e-14
    assert (marginal_matrix(path, 0.2) @ first - marginal_matrix(path, 0.5)).abs().max() < 1e-14
    assert (marginal_matrix(path, 1.0).sum(1) - 1).abs().max() < 1e-14


@pytest.mark.parametrize("noise", EVERY_NOISE)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_marginal_is_the_exponential_of_the_rate_matrix(process, noise):
    path = DISCRETE_PATHS[process](4, noise)
    # rate matrices of all times commute
    generator = path.pi().expand(path.num_states, -1) - torch.eye(path.num_states)
    for t in (0.05, 0.5, 0.95):
        total = quad(lambda t: float(path.rate(t)), 0, t, limit=200)[0]
        expected = torch.as_tensor(expm(total * generator.numpy()))[:4]
        assert (marginal_matrix(path, t) - expected).abs().max() < 1e-8


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("vocab_size", [2, 3, 4])
def test_the_posterior_is_bayes_rule(process, vocab_size):
    path = DISCRETE_PATHS[process](vocab_size, "cosine")
    for s, t in [(0.0, 0.3), (0.2, 0.5), (0.6, 1.0), (0.3, 0.3 + 1e-9)]:
        joint = marginal_matrix(path, s)[:, :, None] * transition_matrix(path, s, t)  # x0, x_s, x_t
        of_t = joint.sum(1, keepdim=True)
        for x0, x_t in itertools.product(range(vocab_size), range(path.num_states)):
            if of_t[x0, 0, x_t] > 0:
                log_p0 = known(torch.tensor([[x0]]), vocab_size)
                posterior = path.posterior(log_p0, torch.tensor([[x_t]]), t, s)[0, 0]
                assert (posterior - joint[x0, :, x_t] / of_t[x0, 0, x_t]).abs().max() < 1e-13


@pytest.mark.parametrize("process", PROCESSES)
def test_times_per_sample_are_those_of_each(process):
    path, source = DISCRETE_PATHS[process](3), MarkovSource(3, 4)
    t, s = exact([0.3, 0.6, 0.9]), exact([0.1, 0.5, 0.2])
    x0 = source.sample(3, seeded(0))
    x_t = path.corrupt(x0, t, seeded(1))
    log_p0 = source.clean(path, x_t, t)
    together = {
        "score": path.score(log_p0, x_t, t).exp(),
        "posterior": path.posterior(log_p0, x_t, t, s),
        "marginal": path.marginal(x0, t),
        "elbo_rate": path.elbo_rate(log_p0, x0, x_t, t),
        "rates": path.reverse_rates(path.score(log_p0, x_t, t), x_t, t),
    }
    for row in range(3):
        one = slice(row, row + 1)
        alone = {
            "score": path.score(log_p0[one], x_t[one], t[row]).exp(),
            "posterior": path.posterior(log_p0[one], x_t[one], t[row], s[row]),
            "marginal": path.marginal(x0[one], t[row]),
            "elbo_rate": path.elbo_rate(log_p0[one], x0[one], x_t[one], t[row]),
            "rates": path.reverse_rates(path.score(log_p0[one], x_t[one], t[row]), x_t[one], t[row]),
        }
        for name, values in alone.items():
            assert (together[name][one] - values).abs().max() < 1e-14, name


@pytest.mark.parametrize("process", PROCESSES)
def test_draws_have_the_marginal_and_belong_to_their_sample(process):
    path, source = DISCRETE_PATHS[process](3, "cosine"), MarkovSource(3, 3)
    x_t = path.corrupt(source.sample(50_000, seeded(0)), 0.4, seeded(1))
    assert agrees(counts(x_t, path.num_states), source.marginal(path, 0.4)) > 1e-3
    prior = path.prior((50_000, 3), seeded(2))
    whole = torch.stack([path.pi()[all_sequences(path.num_states, 3)[:, place]] for place in range(3)]).prod(0)
    assert prior.dtype == torch.int64 and agrees(counts(prior, path.num_states), whole) > 1e-3

    x0 = source.sequences[:4]
    alone = [path.corrupt(x0[row : row + 1], 0.4, seeded(row)) for row in range(4)]
    assert torch.equal(path.corrupt(x0, 0.4, [seeded(row) for row in range(4)]), torch.cat(alone))
    assert torch.equal(path.prior((2, 5), [seeded(0), seeded(1)])[1:], path.prior((1, 5), seeded(1)))
    uniforms = draw_uniforms(x0.shape, seeded(3))
    assert uniforms.dtype == torch.float64
    assert torch.equal(path.corrupt(x0, 0.4, uniforms=uniforms), path.corrupt(x0, 0.4, seeded(3)))
    assert torch.equal(path.corrupt(x0, 0.0, uniforms=uniforms), x0)


# --- what a network says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "length"), ALPHABETS)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_source_knows_its_tokens(process, vocab_size, length):
    path, source = DISCRETE_PATHS[process](vocab_size), MarkovSource(vocab_size, length)
    assert float(source.probabilities.sum()) == pytest.approx(1)
    x_t, p0, probabilities = clean_of(source, path, 0.6)
    assert (source.clean(path, x_t, 0.6).exp() - p0).abs().max() < 1e-14
    every = source.marginal(path, 0.6)
    assert (every[number_of(x_t, path.num_states)] - probabilities).abs().max() < 1e-15


@pytest.mark.parametrize(("vocab_size", "length"), ALPHABETS)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_score_is_the_ratio_of_probabilities(process, vocab_size, length):
    path, source = DISCRETE_PATHS[process](vocab_size, "polynomial"), MarkovSource(vocab_size, length)
    for t in (1e-4, 0.3, 0.9):
        x_t, p0, _ = clean_of(source, path, t)
        probabilities = source.marginal(path, t)
        ratios = path.score(p0.log(), x_t, t).exp()
        for place, y in itertools.product(range(length), range(vocab_size)):
            other = x_t.clone()
            other[:, place] = y
            expected = probabilities[number_of(other, path.num_states)] / probabilities[number_of(x_t, path.num_states)]
            # from a token that is shown to another no reverse step leads
            leads = x_t[:, place] == path.mask_token_id if process == "absorbing" else slice(None)
            error = (ratios[:, place, y] / expected - 1)[leads].abs()
            assert error.max() < 1e-8
        # a probability of 1 - t / 3 hides its last digits
        assert (path.clean_from_score(ratios.log(), x_t, t).exp() - p0).abs().max() < 1e-9


@pytest.mark.parametrize("process", PROCESSES)
def test_every_prediction_type_says_the_same(process):
    path, source, t = DISCRETE_PATHS[process](3), MarkovSource(3, 4), 0.5
    x_t, p0, _ = clean_of(source, path, t)
    outputs = {
        "sample": p0.log() + 2.5,
        "leave_one_out": path.leave_one_out(p0.log(), x_t, t),
        "score": path.score(p0.log(), x_t, t),
    }
    assert set(outputs) == set(DISCRETE_PREDICTIONS)
    for name, output in outputs.items():
        assert (DISCRETE_PREDICTIONS[name](path, output, x_t, t).exp() - p0).abs().max() < 1e-10, name


def test_what_the_other_tokens_say():
    """p(x0 of one token | the other tokens of x_t), enumerated; Bayes' rule with the token itself gives all back."""
    path, source, t = DISCRETE_PATHS["uniform"](3), MarkovSource(3, 4), 0.4
    x_t, p0, _ = clean_of(source, path, t)
    log_o = path.leave_one_out(p0.log(), x_t, t)
    joint = joint_of(source, path, t)
    for place in range(4):
        # sum over the values of this place of x_t
        others = joint.reshape(3**place, 3, -1, len(source.sequences)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
        others = others.reshape(len(joint), -1)
        expected = torch.stack([others[:, source.sequences[:, place] == y].sum(1) for y in range(3)], 1)
        expected = expected / expected.sum(1, keepdim=True)
        assert (log_o[:, place].exp() - expected).abs().max() < 1e-13


def test_shown_tokens_stay():
    """The SUBS rules: MASK has no probability, a token that is shown all of it."""
    path = DISCRETE_PATHS["absorbing"](3)
    x_t = torch.tensor([[0, 3, 2, 3]])
    logits = torch.randn(1, 4, 3, generator=seeded(0))
    log_p0 = path.clean(logits, x_t)
    assert torch.equal(log_p0[0, [0, 2]].exp(), torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    assert torch.equal(log_p0[0, [1, 3]], torch.log_softmax(logits[0, [1, 3]], -1))
    posterior = path.posterior(log_p0, x_t, 0.5, 0.25)
    assert (posterior.sum(-1) - 1).abs().max() < 1e-6
    assert torch.equal(posterior[0, [0, 2], :3], log_p0[0, [0, 2]].exp()) and not posterior[0, [0, 2], 3].any()
    assert path.posterior(log_p0, x_t, 0.5, 0.0)[..., 3].abs().max() == 0


# --- the process backwards ----------------------------------------------------------------------------------------


def reverse_matrix(source, path, t):
    """Rates between all sequences (S^L, S^L), by the score of the exact network."""
    every, states = all_sequences(path.num_states, source.length), path.num_states
    rates = torch.zeros(len(every), len(every), dtype=torch.float64)
    log_p0 = source.clean(path, every, t)
    single = path.reverse_rates(path.score(log_p0, every, t), every, t)
    for place, y in itertools.product(range(source.length), range(source.vocab_size)):
        target = every.clone()
        target[:, place] = y
        rates[torch.arange(len(every)), number_of(target, states)] += single[:, place, y]
    return rates - torch.diag(rates.sum(1))


@pytest.mark.parametrize("noise", ["log_linear", "geometric"])
@pytest.mark.parametrize(("process", "alphabet"), [("absorbing", (2, 3)), ("uniform", (2, 4)), ("uniform", (3, 3))])
def test_the_exact_score_reverses_the_process(process, alphabet, noise):
    """The master equation of the reverse rates, on all sequences at once, from the noised distribution back."""
    path, source = DISCRETE_PATHS[process](alphabet[0], noise), MarkovSource(*alphabet)
    first, last = 0.98, 0.02

    def slope(time, p):
        return -(torch.as_tensor(p) @ reverse_matrix(source, path, time)).numpy()

    start = source.marginal(path, first)
    # one way only: times fall
    end = solve_ivp(slope, (first, last), start.numpy(), rtol=1e-7, atol=1e-10).y[:, -1]
    assert (torch.as_tensor(end) - source.marginal(path, last)).abs().max() < 1e-6


@pytest.mark.parametrize(("process", "alphabet"), [("absorbing", (2, 4)), ("uniform", (2, 6)), ("uniform", (3, 4))])
def test_small_steps_of_the_posterior_draw_the_source(process, alphabet):
    """From pure noise to data: the joint distribution over all sequences."""
    (vocab_size, length), n, generator = alphabet, 10_000, seeded(0)
    path, source = DISCRETE_PATHS[process](vocab_size), MarkovSource(vocab_size, length)
    tokens = path.prior((n, length), generator)
    times = torch.linspace(1, 0, 301, dtype=torch.float64)
    every = all_sequences(path.num_states, length)
    for t, s in itertools.pairwise(times):
        table = path.posterior(source.clean(path, every, t), every, t, s)
        chances = table[number_of(tokens, path.num_states)].cumsum(-1)
        drawn = torch.rand(n, length, 1, generator=generator, dtype=torch.float64) * chances[..., -1:]
        tokens = (drawn >= chances).sum(-1)
    assert agrees(counts(tokens, vocab_size), source.probabilities) > 1e-3


# --- the bound ----------------------------------------------------------------------------------------------------


def expected(source, path, t, rate):
    """The expectation over data and noise of rate(x0, x_t) -> (pairs, L), at one time."""
    joint = joint_of(source, path, t)  # (S^L, N)
    state, datum = (joint > 0).nonzero(as_tuple=True)
    every = all_sequences(path.num_states, source.length)
    return float((joint[state, datum] * rate(source.sequences[datum], every[state]).sum(1)).sum())


def integral(source, path, rate_at, points=24):
    """The integral from t_min to t_max of the expected rate, by Gauss-Legendre points in log(1 - alpha)."""
    nodes, weights = (torch.as_tensor(each) for each in leggauss(points))
    first, last = path.log_noised(path.t_min), path.log_noised(path.t_max)
    noised = (first + (last - first) * (nodes + 1) / 2).exp()
    times = path.t_from_alpha(1 - noised)
    weights = weights * (last - first) / 2 * noised / path.fall(times)
    return sum(float(w) * expected(source, path, t, rate_at(t)) for t, w in zip(times, weights, strict=True))


def bound(source, path, denoise):
    """The whole bound by exact sums: the integral and both ends."""
    first = exact(path.t_min)
    inside = integral(source, path, lambda t: lambda x0, x_t: path.elbo_rate(denoise(x_t, t), x0, x_t, t))
    at_first = expected(source, path, first, lambda x0, x_t: -denoise(x_t, first).gather(-1, x0[..., None]).squeeze(-1))
    ends = path.prior_gap(denoise, source.sequences, path.t_max).sum(1) @ source.probabilities
    return inside + at_first + float(ends)


def nearly(process, noise="log_linear"):
    """A path whose ends are close to data and to noise."""
    path = DISCRETE_PATHS[process](2, noise, **({} if noise == "geometric" else {"alpha_min": 1e-7}))
    path.t_min = 1e-6 if noise != "geometric" else 1e-3
    return path


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_bound_of_the_exact_network_is_the_entropy(process, noise):
    path, source = nearly(process, noise), MarkovSource(2, 3)
    nats = bound(source, path, lambda x_t, t: source.clean(path, x_t, t))
    assert -1e-6 < nats - source.entropy < 2e-4


@pytest.mark.parametrize("alpha_min", [1e-3, 0.01])
@pytest.mark.parametrize("t_min", [1e-3, 0.3])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_ends_complete_the_bound(process, t_min, alpha_min):
    """One token: nothing is lost where the path begins; where it ends, with uniform noise, what its last distribution
    has more than the prior."""
    path, source = DISCRETE_PATHS[process](3, alpha_min=alpha_min), MarkovSource(3, 1)
    path.t_min = t_min
    lost, last = 0.0, source.marginal(path, 1.0)
    if process == "uniform":
        lost = float((last * (last * 3).log()).sum())
    nats = bound(source, path, lambda x_t, t: source.clean(path, x_t, t))
    assert nats == pytest.approx(source.entropy + lost, abs=1e-8)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_bound_is_above_the_entropy_whatever_the_network_and_the_ends(process):
    source, other = MarkovSource(2, 3), MarkovSource(2, 3, seed=1)
    for t_min, alpha_min in [(1e-6, 1e-7), (0.1, 0.01), (0.5, 1e-3)]:
        path = DISCRETE_PATHS[process](2, alpha_min=alpha_min)
        path.t_min = t_min
        exact_bound = bound(source, path, lambda x_t, t, path=path: source.clean(path, x_t, t))
        wrong = bound(source, path, lambda x_t, t, path=path: other.clean(path, x_t, t))
        divergence = float((source.probabilities * (source.probabilities / other.probabilities).log()).sum())
        assert source.entropy - 1e-6 < exact_bound < wrong
        if t_min == 1e-6:
            # the cross entropy: the other source's own process draws the other source
            assert abs(wrong - source.entropy - divergence) < 2e-4


@pytest.mark.parametrize("process", PROCESSES)
def test_score_entropy_is_the_bound_in_other_words(process):
    path, source = DISCRETE_PATHS[process](3), MarkovSource(3, 3)
    x0 = source.sample(64, seeded(0))
    for t in (1e-3, 0.5, 1.0):
        x_t = path.corrupt(x0, t, seeded(1))
        log_p0 = path.clean(torch.randn(64, 3, 3, generator=seeded(2), dtype=torch.float64), x_t, t)
        by_score = path.score_entropy_rate(path.score(log_p0, x_t, t), x0, x_t, t)
        assert torch.allclose(by_score, path.elbo_rate(log_p0, x0, x_t, t), rtol=1e-9, atol=1e-12)
        assert (by_score >= 0).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_score_entropy_is_the_formula_of_the_paper(process):
    """Lou et al. 2024, theorem 3.4, term by term, for ratios of no distribution."""
    path, t = DISCRETE_PATHS[process](3), exact(0.4)
    x0 = torch.tensor([[0, 1, 2, 0]])
    x_t = torch.tensor([[3, 3, 2, 0]] if process == "absorbing" else [[1, 1, 0, 2]])
    log_score = torch.randn(1, 4, 3, generator=seeded(0), dtype=torch.float64)
    forward = float(path.rate(t)) * path.pi()
    q = marginal_matrix(path, t)
    for place in range(4):
        total, (clean, now) = 0.0, (int(x0[0, place]), int(x_t[0, place]))
        for y in set(range(3)) - {now}:
            s, true = log_score[0, place, y].exp(), q[clean, y] / q[clean, now]
            constant = true * (true.log() - 1) if true > 0 else 0.0
            total += forward[now] * (s - true * log_score[0, place, y] + constant)
        assert float(path.score_entropy_rate(log_score, x0, x_t, t)[0, place]) == pytest.approx(float(total), rel=1e-10)


def test_uniform_noise_has_the_bound_of_its_paper():
    """Schiff et al. 2025: the rate in terms of N alpha x + 1 - alpha, of the clean token and of the network's."""
    path, t, n = DISCRETE_PATHS["uniform"](5, "cosine"), exact(0.4), 5
    x0 = torch.randint(n, (1, 30), generator=seeded(0))
    x_t = path.corrupt(x0, t, seeded(1))
    log_o = torch.log_softmax(torch.randn(1, 30, n, generator=seeded(2), dtype=torch.float64), -1)
    alpha, beta = path.alpha(t), path.rate(t)
    clean, said = (n * alpha * x + 1 - alpha for x in (torch.nn.functional.one_hot(x0, n), log_o.exp()))
    at_clean, at_said = (x.gather(-1, x_t[..., None]) for x in (clean, said))
    logarithms = (clean / at_clean * (at_said * clean / (said * at_clean)).log()).sum(-1)
    expected = -beta / n * ((n / at_clean - n / at_said)[..., 0] - logarithms)
    rate = path.elbo_rate(path.clean(log_o, x_t, t), x0, x_t, t)
    assert (rate / expected - 1).abs().max() < 1e-10


@pytest.mark.parametrize("sure", [0, 15, 60])
@pytest.mark.parametrize("t", [1e-3, 0.5, 0.999])
def test_the_bound_of_a_large_alphabet_is_as_exact_in_float32(t, sure):
    """Of every kind of token: kept or replaced, foreseen by the network or not."""
    path, n = DISCRETE_PATHS["uniform"](4096), 4096
    x0 = torch.randint(n, (1, 200), generator=seeded(0))
    x_t = torch.where(torch.arange(200) % 2 == 0, x0, torch.randint(n, (1, 200), generator=seeded(1)))
    logits = torch.randn(1, 200, n, generator=seeded(2), dtype=torch.float64)
    logits[0, :100] += sure * torch.nn.functional.one_hot(x0[0, :100], n)
    exact = path.score_entropy_rate(path.score(path.clean(logits, x_t, t), x_t, t), x0, x_t, t)
    found = path.elbo_rate(path.clean(logits.float(), x_t, t), x0, x_t, t)
    assert found.dtype == torch.float32 and (exact >= 0).all()
    assert ((found - exact).abs() <= 1e-5 * exact + 1e-5 * exact.mean()).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_denoising_score_entropy_is_that_of_the_marginal_up_to_a_constant(process):
    """Theorem 3.4 of Lou et al. 2024: against the ratios of p_t, with the same minimiser, at every time."""
    path, source, t = DISCRETE_PATHS[process](2), MarkovSource(2, 3), exact(0.3)
    every = all_sequences(path.num_states, 3)
    p_t = source.marginal(path, t)
    true = path.score(source.clean(path, every, t), every, t)
    differences = []
    for seed in range(3):
        noise = torch.randn(*true.shape, generator=seeded(seed), dtype=torch.float64)
        # of a masked token, or any
        log_score = torch.where(true > -torch.inf, true + noise, true)
        denoising = expected(
            source,
            path,
            t,
            lambda x0, x_t, log_score=log_score: path.score_entropy_rate(
                log_score[number_of(x_t, path.num_states)], x0, x_t, t
            ),
        )
        excess = torch.where(true > -torch.inf, log_score - true, 0.0)
        own = torch.arange(2) == every.unsqueeze(-1)
        explicit = torch.where(own, 0.0, true.exp() * (excess.exp() - 1 - excess)).sum(-1)
        weight = (path.rate(t) * path.pi())[every]
        possible = p_t > 0
        differences.append(denoising - float((p_t[:, None] * weight * explicit)[possible].sum()))
    assert max(differences) - min(differences) < 1e-10 * abs(differences[0])


@pytest.mark.parametrize("given", [None, [True, False, False, True]])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_estimate_of_the_likelihood_is_the_bound(process, given):
    """Its mean over data and draws is the entropy, of what is not given."""
    path, source, n = DISCRETE_PATHS[process](2, "cosine", alpha_min=1e-6), MarkovSource(2, 4), 40_000
    x0, u = source.sample(n, seeded(0)), (torch.arange(n) + torch.rand(n, generator=seeded(1))) / n
    u = u[torch.randperm(n, generator=seeded(2))].double()
    entropy = source.entropy
    known_tokens = torch.tensor(given or [False] * 4)
    if given:
        of_given = source.probabilities.reshape(2, 2, 2, 2).sum((1, 2)).flatten()
        entropy += float((of_given * of_given.log()).sum())

    def denoise(x_t, t):
        # a token that is given is clean: its evidence is that of t = 0
        evidence = torch.where(
            known_tokens[:, None], source.evidence(path, x_t.clamp_max(1), 0.0), source.evidence(path, x_t, t)
        )
        joint = torch.ones(len(x_t), len(source.sequences), dtype=torch.float64) * source.probabilities
        for place in range(4):
            joint = joint * evidence[:, place, source.sequences[:, place]]
        joint = joint / joint.sum(1, keepdim=True)
        return torch.einsum("bn,nlv->blv", joint, torch.nn.functional.one_hot(source.sequences, 2).double()).log()

    mask = known_tokens.expand(n, 4) if given else None
    nats = likelihood_bound(path, denoise, x0, u, 1e-3, 1.0, seeded(3), mask)
    assert nats.shape == (n,) and nats.dtype == torch.float64
    assert abs(float(nats.mean()) - entropy) < 4 * float(nats.std()) / n**0.5


@pytest.mark.parametrize("noise", EVERY_NOISE)
@pytest.mark.parametrize("process", PROCESSES)
def test_everything_is_finite_at_both_ends(process, noise):
    """In float32, with gradients, for a network as sure as it can be."""
    path = DISCRETE_PATHS[process](50, noise)
    x0 = torch.randint(50, (8, 20), generator=seeded(0))
    for t in (1e-6, path.t_min, path.t_max):
        x_t = path.corrupt(x0, t, seeded(1))
        for scale in (0.0, 1.0, 100.0):
            logits = (scale * torch.randn(8, 20, 50, generator=seeded(2))).requires_grad_()
            for name, row in DISCRETE_PREDICTIONS.items():
                log_p0 = row(path, logits, x_t, t)
                assert ((log_p0.exp().sum(-1) - 1).abs() < 1e-5).all(), name
                loss = path.elbo_rate(log_p0, x0, x_t, t)
                entropy = path.score_entropy_rate(path.score(log_p0, x_t, t), x0, x_t, t)
                (gradient,) = torch.autograd.grad((loss + entropy).sum(), logits)
                assert torch.isfinite(loss).all() and torch.isfinite(gradient).all(), (name, t, scale)
                posterior = path.posterior(log_p0, x_t, t, t / 2)
                assert ((posterior.sum(-1) - 1).abs() < 1e-5).all() and (posterior >= 0).all()
                rates = path.reverse_rates(path.score(log_p0, x_t, t), x_t, t)
                assert torch.isfinite(rates).all() and (rates >= 0).all()


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1,), {}, "vocab_size 1 must be a whole number from 2"),
        ((2.0,), {}, "vocab_size 2.0 must be"),
        ((5, "linear"), {}, "noise 'linear' is unknown; choose one of log_linear, cosine, geometric, polynomial"),
        ((5, "cosine"), {"exponent": 2.0}, "noise 'cosine' has no option exponent; it has alpha_min"),
        ((5, straight), {"alpha_min": 0.0}, "noise a function has no option alpha_min; it has none"),
        ((5,), {"alpha_min": 0.5}, "alpha_min 0.5 must be a number from 0 to 0.01"),
        ((5,), {"alpha_min": math.nan}, "alpha_min nan must be"),
        ((5, "polynomial"), {"exponent": 0}, "exponent 0 must be"),
        ((5, "geometric"), {"sigma_max": 1.0}, "sigma_max 1.0 must be a number from 5"),
        ((5, lambda t: t), {}, "must have alpha.0. from 0.99 to 1 and alpha.1. from 0 to 0.01; it has 0 and 1"),
        ((5, lambda t: 1 - t / 2), {}, "it has 1 and 0.5"),
        ((5, lambda t: t * math.nan), {}, "it has nan and nan"),
        ((5, lambda t: 1 - 4 * t * (t - 0.5) ** 2), {}, "falls strictly"),
        ((5, lambda t: torch.where(t < 0.5, 1 - t, 0.5).clamp_max(2 - 2 * t)), {}, "falls strictly"),
        ((5, lambda t: (1 - t / 0.9).clamp(min=0)), {}, "alpha = 0 from t = 0.9 on, .* stretch it"),
        ((5, lambda t: 0.5), {}, "must be a function of a tensor of times that returns alpha, of the same shape"),
    ],
)
def test_what_cannot_be_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        DISCRETE_PATHS["absorbing"](*arguments, **options)


@pytest.mark.parametrize("process", PROCESSES)
def test_bad_tokens_and_times_are_refused(process):
    path = DISCRETE_PATHS[process](5)
    x0 = torch.tensor([[0, 4, 2]])
    for t in (-0.1, 1.1, math.nan, exact([0.5, 2.0])):
        with pytest.raises(ValueError, match="t must be from 0 .data. to 1 .noise."):
            path.alpha(t)
    for tokens, message in [
        (torch.tensor([[0, 5]]), "token ids must be from 0 to 4 .vocab_size 5.; got ids from 0 to 5"),
        (torch.tensor([[-1, 2]]), "got ids from -1 to 2"),
        (x0.float(), "tokens must be a tensor of int64 .B, L.; got torch.float32"),
        (x0[0], "tokens must be a tensor of int64"),
    ]:
        for work in (path.corrupt, path.marginal):
            with pytest.raises(ValueError, match=message):
                work(tokens, 0.5)
    with pytest.raises(ValueError, match="2 generators do not fit a batch of 1"):
        path.corrupt(x0, 0.5, [seeded(0), seeded(1)])
    with pytest.raises(ValueError, match="times of shape"):
        path.corrupt(x0, exact([0.5, 0.5]))
    with pytest.raises(ValueError, match="alpha must be from 0.001 to 1; got"):
        path.t_from_alpha(exact([0.5, 1.5]))
