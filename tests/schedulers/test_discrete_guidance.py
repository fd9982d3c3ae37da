"""Guidance over tokens against enumeration: powers of what exact sources, of a class and of all, make of a step."""

import pytest
import torch
from enumerable import MarkovSource, agrees, all_sequences, number_of

from score_sde import DiscreteScoreScheduler
from score_sde.schedulers.discrete_solvers import conditional, powers


VOCABULARY, LENGTH, SCALE, COUNT = 3, 3, 2.5, 30_000
ONE, OTHER = (MarkovSource(VOCABULARY, LENGTH, seed) for seed in (0, 1))


class Both:
    """The source of both classes, as likely as each other: without a class."""

    def marginal(self, path, t):
        return (ONE.marginal(path, t) + OTHER.marginal(path, t)) / 2

    def clean(self, path, x_t, t):
        shares = torch.stack([each.marginal(path, t)[number_of(x_t, path.num_states)] for each in (ONE, OTHER)])
        shares = (shares / shares.sum(0))[:, :, None, None]
        return (shares * torch.stack([each.clean(path, x_t, t).exp() for each in (ONE, OTHER)])).sum(0).log()


def told(scheduler, source, x_t, t):
    """What a perfect network says."""
    path, kind = scheduler.path, scheduler.config.prediction_type
    log_p0 = source.clean(path, x_t, t)
    return log_p0 if kind == "sample" else getattr(path, kind)(log_p0, x_t, t)


def reverse(path, source, x_t, t, s):
    """p(token at s | x_t) of each place (L, S), by Bayes' rule over all sequences at s."""
    states, every = path.num_states, all_sequences(path.num_states, LENGTH)
    r = path.transition(s, t)
    step = r * torch.eye(states, dtype=torch.float64) + (1 - r) * path.pi()
    joint = source.marginal(path, s) * step[every, x_t].prod(1)
    table = torch.stack([joint[every[:, place] == state].sum() for place in range(LENGTH) for state in range(states)])
    return table.reshape(LENGTH, states) / joint.sum()


def mixed(one, both):
    """The normed product of powers; of what is 0 in one, 0."""
    found = torch.where(one > 0, one**SCALE * both ** (1 - SCALE), 0.0)
    return found / found.sum(-1, keepdim=True)


def guided(scheduler, x_t, entry, steps=3, **options):
    """(t, s, tokens (COUNT, L)) that a step of the plan makes of x_t (L,) under guidance."""
    scheduler.set_timesteps(steps)
    timestep, stage = scheduler.timesteps[entry], scheduler._plan[entry]
    x_t = x_t.expand(COUNT, -1)
    one, both = (told(scheduler, each, x_t[:1], stage.t).expand(COUNT, -1, -1) for each in (ONE, Both()))
    options = {"generator": torch.Generator().manual_seed(entry), **options}
    output = scheduler.step(one, timestep, x_t, origin_output=both, guidance_scale=SCALE, **options)
    return stage.t, stage.s, output.prev_sample


def fits(tokens, expected):
    """The p-value of the least likely place."""
    states = expected.shape[1]
    return min(
        agrees(torch.bincount(tokens[:, place], minlength=states), expected[place].double()) for place in range(LENGTH)
    )


@pytest.mark.parametrize("predictor", ["ancestral", "tweedie"])
@pytest.mark.parametrize("prediction_type", ["sample", "leave_one_out", "score"])
def test_with_uniform_noise_the_step_is_a_power_of_that_of_the_process(prediction_type, predictor):
    scheduler = DiscreteScoreScheduler(
        VOCABULARY, process="uniform", prediction_type=prediction_type, predictor=predictor
    )
    path, x_t = scheduler.path, torch.tensor([2, 0, 1])
    for entry in (1, 2):  # in between, and the last, to clean tokens
        t, s, tokens = guided(scheduler, x_t, entry)
        one, both = (reverse(path, each, x_t, t, s) for each in (ONE, Both()))
        assert fits(tokens, mixed(one, both)) > 1e-4
        if s:
            # powers of clean tokens are another distribution
            clean = mixed(*(each.clean(path, x_t[None], t).exp()[0] for each in (ONE, Both())))
            other = path.posterior(clean.log()[None], x_t[None], t, s)[0]
            assert fits(tokens, other) < 1e-12


@pytest.mark.parametrize("predictor", ["ancestral", "tweedie", "tau_leaping", "first_hitting"])
@pytest.mark.parametrize("prediction_type", ["sample", "score"])
def test_with_absorbing_noise_clean_tokens_are_and_what_is_shown_stays_as_many(prediction_type, predictor):
    scheduler = DiscreteScoreScheduler(VOCABULARY, prediction_type=prediction_type, predictor=predictor)
    path, x_t = scheduler.path, torch.tensor([3, 1, 3])
    t, s, tokens = guided(scheduler, x_t, 2)
    clean = mixed(*(each.clean(path, x_t[None], t).exp()[0] for each in (ONE, Both())))
    assert s == 0 and fits(tokens, clean) > 1e-4
    if predictor == "first_hitting":  # whose steps show whole numbers of tokens
        return
    t, s, tokens = guided(scheduler, x_t, 1)
    share = (1 - path.alpha(s)) / (1 - path.alpha(t))
    if predictor == "tau_leaping":
        share = 1 - (t - s) * path.reveal_rate(t)
    expected = torch.cat([clean * (1 - share), share.expand(LENGTH, 1)], 1)
    expected[1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert fits(tokens, expected) > 1e-4


@pytest.mark.parametrize("prediction_type", ["sample", "score"])
def test_tau_leaping_takes_powers_of_rates(prediction_type):
    scheduler = DiscreteScoreScheduler(
        VOCABULARY, process="uniform", prediction_type=prediction_type, predictor="tau_leaping"
    )
    path, x_t = scheduler.path, torch.tensor([2, 0, 1])
    t, s, tokens = guided(scheduler, x_t, 5, steps=12)
    rates = []
    for source in (ONE, Both()):
        marginal, here = source.marginal(path, t), number_of(x_t[None], VOCABULARY)
        changed = x_t.repeat(LENGTH, VOCABULARY, 1)
        for place in range(LENGTH):
            changed[place, :, place] = torch.arange(VOCABULARY)
        ratios = marginal[number_of(changed.flatten(0, 1), VOCABULARY)].view(LENGTH, -1) / marginal[here]
        rates.append(path.rate(t) / VOCABULARY * ratios)
    jumps = (t - s) * rates[0] ** SCALE * rates[1] ** (1 - SCALE)
    own = torch.arange(VOCABULARY) == x_t[:, None]
    jumps = torch.where(own, 0.0, jumps)
    assert jumps.sum(1).max() < 1  # no clamping
    assert fits(tokens, torch.where(own, 1 - jumps.sum(1, keepdim=True), jumps)) > 1e-4


def test_gibbs_draws_from_powers_of_what_the_other_tokens_say():
    scheduler = DiscreteScoreScheduler(VOCABULARY, process="uniform", corrector="gibbs", predictor="ancestral")
    x_t, free = torch.tensor([2, 0, 1]), torch.tensor([False, True, False])
    t, s, tokens = guided(scheduler, x_t, 7, steps=6, free_mask=free)
    assert t == s  # a corrector's
    changed = x_t.repeat(VOCABULARY, 1)
    changed[:, 1] = torch.arange(VOCABULARY)
    own, both = (each.marginal(scheduler.path, t)[number_of(changed, VOCABULARY)] for each in (ONE, Both()))
    found = torch.bincount(tokens[:, 1], minlength=VOCABULARY)
    assert agrees(found, mixed(own / own.sum(), both / both.sum())) > 1e-4
    # powers of clean tokens are another distribution
    clean = mixed(*(each.clean(scheduler.path, x_t[None], t).exp()[0] for each in (ONE, Both())))
    assert agrees(found, conditional(scheduler.path, x_t[None], clean.log()[None], t).exp()[0, 1]) < 1e-12


@pytest.mark.parametrize("predictor", ["confidence", "entropy_bounded"])
def test_what_orders_positions_draws_powers_of_clean_tokens(predictor):
    scheduler = DiscreteScoreScheduler(VOCABULARY, process="uniform", predictor=predictor)
    x_t = torch.tensor([2, 0, 1])
    t, s, tokens = guided(scheduler, x_t, 2)
    expected = mixed(*(each.clean(scheduler.path, x_t[None], t).exp()[0] for each in (ONE, Both())))
    assert s == 0 and fits(tokens, expected) > 1e-4


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-5}])
def test_filters_are_those_of_guided_clean_tokens(options):
    """With one token left, the step is that of the process for this clean token."""
    scheduler = DiscreteScoreScheduler(VOCABULARY, process="uniform", predictor="ancestral")
    path, x_t = scheduler.path, torch.tensor([2, 0, 1])
    t, s, tokens = guided(scheduler, x_t, 1, **options)
    clean = mixed(*(each.clean(path, x_t[None], t).exp() for each in (ONE, Both())))
    certain = torch.nn.functional.one_hot(clean.argmax(-1), VOCABULARY).double().log()
    assert fits(tokens, path.posterior(certain, x_t[None], t, s)[0]) > 1e-4


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("predictor", ["ancestral", "tweedie", "tau_leaping", "confidence"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "temperature": 0.7}])
def test_at_scale_1_nothing_is_led_away_from(process, predictor, options):
    scheduler = DiscreteScoreScheduler(VOCABULARY, process=process, predictor=predictor)
    x_t = torch.tensor([[2, 0, 1], [1, 1, 2]] if process == "uniform" else [[3, 0, 3], [3, 3, 3]])
    outputs = []
    for guides in ({}, {"origin_output": torch.randn(2, 3, 3), "guidance_scale": 1.0}):
        scheduler.set_timesteps(4)
        output = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for timestep in scheduler.timesteps:
            x = scheduler.step(output, timestep, x_t, generator, **guides, **options).prev_sample
            outputs.append(x)
    assert all(torch.equal(a, b) for a, b in zip(outputs[:4], outputs[4:], strict=True))


def test_powers_of_distributions():
    p, origin = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.8, 0.0, 0.2]).log()
    found = powers(p, origin, 2.0).exp()
    assert found.isfinite().all() and found[2] == 0 and found[1] > 0.99  # which origin hasn't
    assert (powers(p, origin, 1.0).exp() - p.exp()).abs().max() < 1e-6
    assert (powers(p, p, 7.0).exp() - p.exp()).abs().max() < 1e-6


def test_guidance_that_cannot_be_is_refused():
    scheduler = DiscreteScoreScheduler(VOCABULARY)
    scheduler.set_timesteps(3)
    tokens, output = torch.tensor([[3, 1, 3]]), torch.zeros(1, 3, 3)
    with pytest.raises(ValueError, match="guidance_scale 2.0 needs origin_output"):
        scheduler.step(output, scheduler.timesteps[0], tokens, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"origin_output has shape \(1, 3, 4\)"):
        scheduler.step(output, scheduler.timesteps[0], tokens, origin_output=torch.zeros(1, 3, 4), guidance_scale=2.0)
