"""Samplers of tokens against sources whose every distribution is enumerated."""

import math

import pytest
import torch
from enumerable import MarkovSource, agrees, all_sequences, counts
from transformers import TopKLogitsWarper, TopPLogitsWarper

from score_sde import DiscreteScoreScheduler
from score_sde.schedulers.discrete_paths import AbsorbingPath, UniformPath, draw_uniforms
from score_sde.schedulers.discrete_solvers import (
    PREDICTORS,
    SELECTIONS,
    SPACINGS,
    conditional,
    dilated,
    draw,
    entropy_bounded,
    filtered,
    filtered_alike,
    gibbs,
    margin,
    quota,
    remasking,
    shown,
    time_grid,
    tweedie,
)


SOURCE = MarkovSource(vocab_size=3, length=3)
TRANSITIONS = [(name, process) for name, row in PREDICTORS.items() if not row.is_order for process in row.processes]
PATHS = {"absorbing": AbsorbingPath(3), "uniform": UniformPath(3)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pushed(path, source, stage, times, of_score=False):
    """The joint distribution over all sequences of states after steps along `times`, then to clean tokens, by the
    matrices of the steps: nothing is drawn."""
    every = all_sequences(path.num_states, source.length)
    now = torch.ones(len(every), dtype=torch.float64)
    if path.mask_token_id is None:
        now /= len(every)
    else:
        now[:-1] = 0.0
    for t, s in zip(times, [*times[1:], 0.0], strict=True):
        said = log_p0 = source.clean(path, every, t)
        if of_score:
            said = path.score(log_p0, every, t)
        each = stage(path, every, said, t, s) if s else torch.nn.functional.pad(log_p0.exp(), (0, 1))
        each = each / each.sum(-1, keepdim=True)
        step = torch.stack([each[:, place, every[:, place]] for place in range(source.length)]).prod(0)
        now = now @ step
    return now


def at_data(path, distribution, source):
    """The part of a distribution over sequences of states that is on clean tokens, as the source orders them."""
    return distribution[(all_sequences(path.num_states, source.length) < path.vocab_size).all(1)]


@pytest.mark.parametrize(("name", "process"), TRANSITIONS)
def test_transitions_converge_to_the_data(name, process):
    path, row = PATHS[process], PREDICTORS[name]
    errors = []
    for n in (8, 16, 32):
        times = time_grid(path, "linspace", n, path.t_max).tolist()
        result = at_data(path, pushed(path, SOURCE, row.stage, times, row.of_score), SOURCE)
        assert abs(float(result.sum()) - 1) < 1e-9
        errors.append(float((result - SOURCE.probabilities).abs().sum()) / 2)
    # of first order: what is lost is that tokens are drawn independently within a step
    assert errors[2] < 0.03 and errors[2] < 0.62 * errors[1] < 0.4 * errors[0], errors


@pytest.mark.parametrize("process", PATHS)
def test_tweedie_is_the_posterior_for_ratios_of_a_distribution(process):
    path, every = PATHS[process], all_sequences(PATHS[process].num_states, 3)
    log_p0 = SOURCE.clean(path, every, 0.6)
    step = tweedie(path, every, path.score(log_p0, every, 0.6), 0.6, 0.25)
    assert (step - path.posterior(log_p0, every, 0.6, 0.25)).abs().max() < 1e-12
    # and otherwise what the matrix exponential of the rates makes of the ratios
    ratios = torch.rand(len(every), 3, 3, generator=seeded(0), dtype=torch.float64) + 0.3
    states = torch.arange(path.num_states)
    own = torch.nn.functional.one_hot(states, path.num_states).double()
    transition = path.transition(0.25, 0.6) * own + (1 - path.transition(0.25, 0.6)) * path.pi()
    of_all = torch.nn.functional.pad(ratios, (0, path.num_states - 3))
    of_all = torch.where(states == every.unsqueeze(-1), 1.0, of_all)
    expected = (of_all @ torch.linalg.inv(transition)).clamp_min(0) * transition[:, every].movedim(0, -1)
    assert (tweedie(path, every, ratios.log(), 0.6, 0.25) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_remasking_keeps_every_marginal(eta):
    path, source = PATHS["absorbing"], MarkovSource(vocab_size=3, length=1)
    every = all_sequences(4, 1)
    now = source.marginal(path, 0.9)
    for t, s in [(0.9, 0.7), (0.7, 0.4), (0.4, 0.1)]:
        step = remasking(path, every, source.clean(path, every, t), t, s, eta)[:, 0]
        assert (step.sum(-1) - 1).abs().max() < 1e-12
        if eta == 0:
            assert (step - path.posterior(source.clean(path, every, t), every, t, s)[:, 0]).abs().max() < 1e-12
        now = now @ step
        assert (now - source.marginal(path, s)).abs().max() < 1e-12
    # shown tokens do become masks
    assert float(step[0, 3]) == pytest.approx(eta * min(1.0, float((1 - path.alpha(0.1)) / path.alpha(0.4))))


def sampled(scheduler, source, n, num_steps, seed=0, **step):
    network = source.network(scheduler)
    generator = seeded(seed)
    x = scheduler.init_noise((n, source.length), generator)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x, generator=generator, **step).prev_sample
    return x


@pytest.mark.parametrize("options", [{}, {"entropy_bound": 0.0}, {"noise": "geometric"}, {"noise": "cosine"}])
@pytest.mark.parametrize("name", ["first_hitting", "dilated", "margin", "entropy_bounded"])
def test_orders_that_no_draw_decides_are_exact_one_at_a_time(name, options):
    if ("entropy_bound" in options) != (name == "entropy_bounded"):
        pytest.skip("another predictor's option")
    source = MarkovSource(vocab_size=3, length=4)
    x = sampled(DiscreteScoreScheduler(3, predictor=name, **options), source, 20000, 4)
    assert agrees(counts(x, 3), source.probabilities) > 1e-3


@pytest.mark.parametrize("options", [{"entropy_bound": 0.0}, {"entropy_bound": 0.1}, {}, {"predictor": "margin"}])
def test_a_bound_on_the_entropy_costs_what_it_allows_whatever_the_steps(options):
    """Two tokens that are always equal, and of little entropy each, which the default bound lets show at once."""
    rare = 0.02
    joint = torch.tensor([1 - rare, 0.0, 0.0, rare], dtype=torch.float64)
    independent = torch.tensor([(1 - rare) ** 2, rare * (1 - rare), rare * (1 - rare), rare**2], dtype=torch.float64)
    scheduler = DiscreteScoreScheduler(2, **{"predictor": "entropy_bounded"} | options)
    x, generator = scheduler.init_noise((20000, 2)), seeded(0)
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        other = x.flip(1)
        said = torch.tensor([[1 - rare, rare], [1.0, 0.0], [0.0, 1.0]])[torch.where(other == 2, 0, other + 1)]
        x = scheduler.step(said.log(), t, x, generator=generator).prev_sample
    is_exact = options.get("entropy_bound") == 0 or "predictor" in options
    assert agrees(counts(x, 2), joint if is_exact else independent) > 1e-3
    # what is lost is at most the bound
    assert float((joint * (joint / independent).log()).nansum()) < 0.1


def test_fewer_steps_are_not_exact_and_the_test_sees_it():
    source = MarkovSource(vocab_size=3, length=4)
    x = sampled(DiscreteScoreScheduler(3, predictor="first_hitting"), source, 20000, 2)
    assert agrees(counts(x, 3), source.probabilities) < 1e-9


@pytest.mark.parametrize("prediction_type", ["sample", "score", "leave_one_out"])
@pytest.mark.parametrize(("name", "process"), TRANSITIONS)
def test_the_scheduler_draws_what_the_matrices_say(name, process, prediction_type):
    scheduler = DiscreteScoreScheduler(3, process, prediction_type=prediction_type, predictor=name)
    path, row = scheduler.path, PREDICTORS[name]
    x = sampled(scheduler, SOURCE, 20000, 3)
    times = time_grid(path, "linspace", 3, path.t_max).tolist()
    expected = at_data(path, pushed(path, SOURCE, row.stage, times, row.of_score), SOURCE)
    assert agrees(counts(x, 3), expected) > 1e-3


def test_confidence_shows_the_likeliest_drawn_token_first():
    """For two positions by hand: which is shown follows from the two drawn tokens."""
    log_p0 = torch.tensor([[[0.7, 0.3], [0.6, 0.4]]]).log()
    scheduler = DiscreteScoreScheduler(2, predictor="confidence")
    scheduler.set_timesteps(2)
    masks = torch.full((20000, 2), 2)
    x = scheduler.step(log_p0.expand(20000, 2, 2), scheduler.timesteps[0], masks, generator=seeded(0)).prev_sample
    # (shown token, mask) or (mask, shown token), of states 0, 1, mask
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 2] = 0.7
    expected[2, 0] = 0.3 * 0.6
    expected[2, 1] = 0.3 * 0.4
    assert agrees(counts(x, 3), expected.flatten()) > 1e-3


def test_entropy_bounded_shows_as_many_as_the_bound_allows():
    spread = torch.tensor([0.0, 1.0, 2.0, 20.0, 3.0])
    log_p0 = torch.stack([spread, torch.zeros(5)], -1).log_softmax(-1)[None]
    entropy = torch.distributions.Categorical(logits=log_p0).entropy()[0]  # least: 3, 4, 2, 1, 0
    is_open = torch.tensor([[True, True, True, False, True]])
    for bound, expected in [(0.0, {4}), (float(entropy[4]) + 1e-6, {4, 2}), (1e3, {4, 2, 1, 0})]:
        uniforms = draw_uniforms((1, 5), seeded(0))
        priority, at_once = entropy_bounded(log_p0, None, is_open, uniforms, None, entropy_bound=bound)
        assert set((at_once & is_open)[0].nonzero().flatten().tolist()) == expected
    assert priority.argmax() == 3
    assert shown(priority, is_open, torch.tensor([2]), uniforms)[0].nonzero().tolist() == [[2], [4]]


def test_of_positions_of_equal_entropy_the_bound_allows_the_one_that_is_shown():
    """As of networks with rotary positions all are in the beginning."""
    log_p0, is_open = torch.zeros(500, 6, 3).log_softmax(-1), torch.ones(500, 6, dtype=torch.bool)
    uniforms = draw_uniforms((500, 6), seeded(0))
    for bound, number in [(0.0, 1), (2.3 * math.log(3), 3)]:
        priority, at_once = entropy_bounded(log_p0, None, is_open, uniforms, None, entropy_bound=bound)
        first = shown(priority, is_open, torch.ones(500).long(), uniforms)
        assert (at_once.sum(1) == number).all() and (at_once & first).any(1).all()
        assert agrees(first.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64)) > 1e-3


def test_equal_positions_are_shown_in_random_order():
    is_open = torch.tensor([True, True, False, True]).expand(9000, 4)
    priority = torch.tensor([1.0, 1.0, 2.0, 0.5]).expand(9000, 4)
    first = shown(priority, is_open, torch.ones(9000).long(), draw_uniforms((9000, 4), seeded(0)))
    assert agrees(first.sum(0), torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)) > 1e-3


def test_dilated_shows_what_is_far_from_all_that_is_known():
    is_open = torch.tensor([[True] * 9, [False, *[True] * 7, False]])
    number = torch.tensor([3, 3])
    for seed in range(5):
        uniforms = draw_uniforms((2, 9), seeded(seed))
        priority, _ = dilated(None, None, is_open, uniforms, number)
        first = shown(priority, is_open, number, uniforms)
        # between two known ends: the middle, then the middles of the halves
        assert first[1].nonzero().flatten().tolist() == [2, 4, 6]
        assert int(first[0].nonzero().flatten().diff().min()) > 1


def test_which_positions_dilated_shows_depends_on_no_other_sequence():
    """Beside a sequence that shows more positions than another has open."""
    is_open = torch.zeros(2, 20, dtype=torch.bool)
    is_open[0, [0, 5, 9]], is_open[1] = True, True
    number = torch.tensor([1, 12])
    for seed in range(20):
        uniforms = draw_uniforms((2, 20), seeded(seed))
        together, alone = (
            shown(dilated(None, None, is_open[:n], uniforms[:n], number[:n])[0], is_open[:n], number[:n], uniforms[:n])
            for n in (2, 1)
        )
        assert torch.equal(together[0], alone[0])


def test_margin_is_of_the_two_likeliest():
    log_p0 = torch.tensor([[[0.5, 0.45, 0.05], [0.4, 0.2, 0.4], [0.4, 0.3, 0.3]]]).log()
    assert (
        margin(log_p0, None, None, torch.zeros(1, 3), None)[0] - torch.tensor([[0.05, 0.0, 0.1]])
    ).abs().max() < 1e-6


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("noise", ["log_linear", "geometric", "cosine", "polynomial"])
def test_grids_fall_from_the_largest_time(noise, spacing):
    path = AbsorbingPath(3, noise)
    times = time_grid(path, spacing, 7, 1.0)
    assert times[0] == 1 and (times.diff() < 0).all() and times[-1] > 0
    if spacing == "survival":
        assert ((1 - path.alpha(times)).diff().diff().abs() < 1e-9).all()
    if spacing == "cosine":
        share = (1 - path.alpha(times)) / (1 - path.alpha(1.0))
        assert (share - torch.cos(torch.arange(7).double() / 7 * math.pi / 2)).abs().max() < 1e-9


@pytest.mark.parametrize("noise", ["log_linear", "geometric", "cosine", "polynomial"])
def test_no_more_positions_than_steps_go_one_at_a_time(noise):
    path = AbsorbingPath(3, noise)
    for n in (1, 4, 5, 16, 100):
        for length in (1, 4, 5, 16, 40):
            left, taken = torch.tensor([length]), []
            times = [*time_grid(path, "survival", n, 1.0).tolist(), 0.0]
            for t, s in zip(times, times[1:], strict=False):
                taken.append(int(quota(path, left, t, s)))
                left = left - taken[-1]
            # as diffusers' BlockRefinementScheduler: evenly, the first ones take what is left over
            expected = [length // n + (step < length % n) for step in range(n)]
            assert taken == expected


def test_positions_are_counted_in_more_digits_than_float32_has():
    half = quota(AbsorbingPath(3, alpha_min=0.0), torch.tensor([2**24 + 3]), 0.5, 0.25)
    assert int(half) == 2**23 + 2


@pytest.mark.parametrize("selection", SELECTIONS)
def test_gibbs_draws_from_the_distribution_given_all_others(selection):
    path, source = PATHS["uniform"], SOURCE
    every, joint = all_sequences(3, 3), source.marginal(PATHS["uniform"], 0.4)
    table = joint.reshape(3, 3, 3)
    log_p = conditional(path, every, source.clean(path, every, 0.4), 0.4)
    for place in range(3):
        expected = table.movedim(place, -1) / table.sum(place).unsqueeze(-1)
        others = [each for each in range(3) if each != place]
        found = expected[every[:, others[0]], every[:, others[1]]]
        assert (log_p[:, place].exp() - found).abs().max() < 1e-9
    # what is drawn anew changes nothing but one free position
    x = every[torch.multinomial(joint, 20000, replacement=True, generator=seeded(0))]
    free = torch.tensor([True, True, False]).expand(len(x), 3)
    uniforms = draw_uniforms((2, len(x), 3), seeded(1))
    log_p = conditional(path, x, source.clean(path, x, 0.4), 0.4)
    after = gibbs(x, log_p, free, uniforms, k=1, selection=selection, tau=1.0)
    assert torch.equal(after[:, 2], x[:, 2]) and int((after != x).sum(1).max()) == 1
    if selection == "random":
        assert agrees(counts(after, 3), joint) > 1e-3


def test_gibbs_between_steps_brings_the_distribution_nearer():
    source, errors = MarkovSource(vocab_size=3, length=4), {}
    for steps in (0, 8):
        options = {"corrector": "gibbs", "corrector_steps": steps} if steps else {}
        x = sampled(DiscreteScoreScheduler(3, "uniform", predictor="ancestral", **options), source, 6000, 3)
        errors[steps] = float((counts(x, 3) / len(x) - source.probabilities).abs().sum()) / 2
    assert errors[8] < 0.8 * errors[0]


# --- draws ------------------------------------------------------------------------------------------------------------


def test_draws_have_their_probabilities():
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0, 0.0])
    tokens = draw(weights.expand(30000, 6), draw_uniforms((30000,), seeded(0)))
    assert agrees(torch.bincount(tokens, minlength=6), weights.double() / 6) > 1e-3
    # at the ends of the uniforms, no token without probability
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(weights.expand(2, 6), ends).tolist() == [1, 4]


def test_a_float32_gumbel_draw_loses_the_tail_and_ours_does_not():
    """One of V likely tokens or, with nearly all probability, the mask, as in a small step of ancestral sampling. Of
    the V equal tokens only the largest Gumbel number matters; over the numbers k 2^-24 that torch.rand returns in
    float32 its distribution is exact (Zheng et al. 2024, Sec. 5)."""
    chance, vocab_size, cells = 1e-3, 2**17, 2**24
    # with 2^17 of them it is hardly ever below these
    k = torch.arange(cells - 2**15, cells, dtype=torch.float64)
    # the chance that the largest of V numbers is k 2^-24
    largest = ((k + 1) / cells) ** vocab_size - (k / cells) ** vocab_size
    # the mask loses where its Gumbel number is below this, of which the chance is exp(-exp(-below))
    below = -torch.log(-torch.log(k / cells)) + math.log(chance / vocab_size) - math.log1p(-chance)
    seen = float((largest * torch.exp(-torch.exp(-below))).sum())
    assert seen < 0.05 * chance

    # ours: float64 uniforms on either side of a token's end, which float32 cannot tell apart, and the share of uniforms
    # that show a token
    probabilities = torch.full((vocab_size + 1,), chance / vocab_size, dtype=torch.float64)
    probabilities[-1] = 1 - chance
    uniforms = torch.tensor([0.5, 1.5, 99.5], dtype=torch.float64) * chance / vocab_size
    assert draw(probabilities.expand(3, -1), uniforms).tolist() == [0, 1, 99]
    uniforms = torch.tensor([chance * (1 - 1e-9), chance * (1 + 1e-9)], dtype=torch.float64)
    assert draw(probabilities.expand(2, -1), uniforms).tolist() == [vocab_size - 1, vocab_size]


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}, {"top_p": 0.05}, {"top_k": 5, "top_p": 0.7}])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_filters_are_those_of_transformers(temperature, options):
    logits = torch.randn(4, 5, 9, generator=seeded(0), dtype=torch.float64)
    expected = logits.reshape(20, 9) / temperature
    if "top_k" in options:
        expected = TopKLogitsWarper(options["top_k"])(None, expected)
    if "top_p" in options:
        expected = TopPLogitsWarper(options["top_p"])(None, expected)
    found = filtered(logits.log_softmax(-1), temperature, **options).reshape(20, 9)
    assert (found.exp() - expected.softmax(-1)).abs().max() < 1e-9


@pytest.mark.parametrize("temperature", [1e-12, 1e-39, 1e-50, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_temperatures_take_the_likeliest(temperature, dtype):
    log_p0 = torch.tensor([[0.2, 0.5, 0.3], [0.45, 0.1, 0.45], [0.0, 0.0, 1.0]], dtype=dtype).log()
    expected = [[0, 1, 0], [0.5, 0, 0.5], [0, 0, 1]]
    assert filtered(log_p0, temperature).exp().tolist() == expected
    # of the tokens that are left, of which none need be the likeliest
    kept = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=dtype).log()
    assert filtered_alike(log_p0, kept, temperature).exp().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]


def test_filters_leave_certain_tokens_alone_and_temperature_0_takes_the_likeliest():
    log_p0 = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]]).log()
    assert filtered(log_p0, 0).exp().tolist() == [[0, 1, 0], [0, 0, 1]]
    for options in ({"temperature": 0.3}, {"top_k": 1}, {"top_p": 0.1}, {"temperature": 3.0, "top_k": 2}):
        assert filtered(log_p0, **options)[1].exp().tolist() == [0, 0, 1]
    assert torch.equal(filtered(log_p0), log_p0)
