"""Training objectives against closed forms: weights, densities, bounds, and the minimiser of every one."""

import math

import pytest
import torch
from tiny import seeded
from torch.distributions import Normal, kl_divergence

from score_sde import ScoreSDEScheduler
from score_sde import losses as losses_module
from score_sde.losses import (
    TIME_DENSITIES,
    WEIGHTINGS,
    Objective,
    denoising_loss,
    discretized_log_likelihood,
    drop_conditions,
    hybrid_loss,
    sliced_score_matching,
    vlb_terms,
)
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES, expand_to, prediction


PATHS = list(SDE_TYPES)


class Output:
    def __init__(self, sample):
        self.sample = sample


def wrapped(denoise, scheduler, t):
    """A network in terms of what the scheduler takes its output for, from a function of x_t to x0."""
    row = prediction(scheduler.path, scheduler.config.prediction_type, t, scheduler.config.sigma_data)

    def network(scaled, timestep, class_labels=None):
        x_t = scaled / expand_to(row.input_scale, scaled)
        return Output((denoise(x_t) - expand_to(row.a, x_t) * x_t) / expand_to(row.b, x_t))

    return network


def draw(n=64, shape=(2, 3), seed=0):
    generator = seeded(seed)
    x0, noise = (torch.randn((n, *shape), generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, noise, torch.rand(n, generator=generator, dtype=torch.float64)


# --- weightings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde_type", PATHS)
def test_weights_are_those_of_the_papers(sde_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, sigma_data=0.6)
    path = scheduler.path
    t = torch.linspace(0.05, 0.9, 7, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    snr = (alpha / sigma) ** 2
    ratio = sigma / alpha
    expected = {
        "simple": snr,
        "edm": (ratio**2 + 0.36) / (0.6 * ratio) ** 2,
        "min_snr": torch.minimum(snr, torch.tensor(5.0)),
        "p2": snr / (1 + snr),
        "sample": torch.ones_like(t),
        "velocity": (path.alpha_prime(t) - path.sigma_prime(t) * alpha / sigma) ** 2,
        # g^2/2 of the squared error of the score, over the whole time
        "likelihood": path.diffusion(t) ** 2 / 2 * (alpha / sigma**2) ** 2 * (scheduler.t_max - scheduler.t_min),
        "output": snr,  # of epsilon
    }
    assert set(expected) == set(WEIGHTINGS)
    for weighting, weight in expected.items():
        assert torch.allclose(Objective(scheduler, weighting=weighting).weight(t), weight, rtol=1e-6), weighting
    options = {"gamma": 0.5, "k": 2.0}
    weight = Objective(scheduler, weighting="p2", weighting_options=options).weight(t)
    assert torch.allclose(weight, snr / (2 + snr) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize("least_time", [0.0, 0.05])
def test_the_clean_sample_with_the_weight_of_velocity_has_the_loss_of_its_velocity(least_time):
    """JiT's (Li & He 2025): x is predicted, v = (x_t - x) / max(t, 0.05) is what the error is of."""
    scheduler = ScoreSDEScheduler(sde_type="linear", prediction_type="sample")
    x0, noise, u = draw()
    options = {"density_options": {"mean": 0.8, "std": 0.8}, "weighting_options": {"least_time": least_time}}
    objective = Objective(scheduler, "logit_normal", "velocity", **options)
    t = torch.cat([objective.times(u[:-2]), torch.tensor([1e-3, 0.01], dtype=torch.float64)])
    x_t, predicted = scheduler.path.sample(x0, noise, t), draw(seed=1)[0]
    found = objective(lambda x, timestep: Output(predicted), x0, noise, t)
    divisor = expand_to(t.clamp_min(least_time), x0)
    velocities = (x_t - predicted) / divisor, (x_t - x0) / divisor
    expected = (velocities[0] - velocities[1]).square().flatten(1).mean(1)
    assert (found / expected - 1).abs().max() < 1e-5
    if least_time == 0:
        assert ((noise - x0) - velocities[1]).abs().max() < 1e-9


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "output"])
@pytest.mark.parametrize("sde_type", ["vp", "edm", "linear"])
def test_equivalent_choices_give_equal_gradients(weighting, sde_type):
    """One function from x_t to x0, learned as any of the prediction types: the weighting alone decides its gradient."""
    x0, noise, u = draw()
    gradients = []
    for prediction_type in PREDICTIONS:
        scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type=prediction_type, t_min=0.05, t_max=0.95)
        objective = Objective(scheduler, weighting=weighting)
        t = objective.times(u)
        matrix = torch.eye(3, dtype=torch.float64).requires_grad_()
        network = wrapped(lambda x, matrix=matrix: x @ matrix, scheduler, t)
        objective(network, x0, noise, t).double().mean().backward()
        gradients.append(matrix.grad)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).abs().max() < 1e-4 * gradients[0].abs().max()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_minimiser_is_the_exact_score(weighting):
    """Gaussian data: among linear denoisers the gradient vanishes at the exact one, at every time."""
    n, std = 100_000, 0.7
    scheduler = ScoreSDEScheduler(prediction_type="v_prediction")
    objective = Objective(scheduler, weighting=weighting)
    for time in (0.05, 0.2, 0.4):
        x0, noise, _ = draw(n, shape=(1,))
        t = torch.full((n,), time, dtype=torch.float64)
        gain = scheduler.path.alpha(t[0]) * scheduler.path.gaussian_gain(t[0], std)
        derivatives = []
        for factor in (1.0, 2.0):
            slope = (factor * gain).clone().requires_grad_()
            losses = objective(wrapped(lambda x, slope=slope: slope * x, scheduler, t), std * x0, noise, t)
            (derivative,) = torch.autograd.grad(losses.double().mean(), slope)
            derivatives.append(float(derivative))
        assert abs(derivatives[0]) < 0.05 * abs(derivatives[1])


@pytest.mark.parametrize("time_density", ["uniform", "importance"])
def test_the_likelihood_objective_is_the_bound(time_density):
    """Gaussian data and the exact score: 1/2 of the integral of g^2 (1 / sigma^2 - 1 / (alpha^2 s^2 + sigma^2))."""
    std, n = 0.7, 400_000
    scheduler = ScoreSDEScheduler(prediction_type="epsilon", t_min=1e-2)
    objective = Objective(scheduler, time_density, "likelihood")
    x0, noise, u = draw(n, shape=(1,))
    t = objective.times(u)
    path = scheduler.path

    def denoise(x):
        return expand_to(path.alpha(t) * path.gaussian_gain(t, std), x) * x

    losses = objective(wrapped(denoise, scheduler, t), std * x0, noise, t).double()
    grid = torch.linspace(1e-2, scheduler.t_max, 100_001, dtype=torch.float64)
    alpha, variance = path.alpha(grid), path.sigma(grid) ** 2
    exact = torch.trapezoid(path.diffusion(grid) ** 2 / 2 * (1 / variance - 1 / (alpha**2 * std**2 + variance)), grid)
    error = float(losses.std() / n**0.5)
    assert abs(float(losses.mean() - exact)) < 4 * error
    assert error < 0.02 * exact


def test_importance_sampling_lowers_the_variance_of_the_bound():
    spread = []
    for time_density in ("uniform", "importance"):
        scheduler = ScoreSDEScheduler(prediction_type="epsilon")
        objective = Objective(scheduler, time_density, "likelihood")
        x0, noise, u = draw(20_000, shape=(8,))
        t = objective.times(u)
        network = wrapped(lambda x: torch.zeros_like(x), scheduler, t)
        losses = objective(network, 0.5 * x0, noise, t).double()
        spread.append(float(losses.std() / losses.mean()))
    assert spread[1] < spread[0] / 2


# --- densities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde_type", PATHS)
def test_importance_times_have_their_density(sde_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type)
    path = scheduler.path
    # the quantile function inverts the distribution function of g^2 / sigma^2, integrated numerically
    t = Objective(scheduler, "importance").times(torch.linspace(0.3, 0.9, 4, dtype=torch.float64))
    ends = torch.tensor([scheduler.t_min, scheduler.t_max], dtype=torch.float64)

    def mass(first, last):
        grid = torch.exp(torch.linspace(math.log(first), math.log(last), 200_001, dtype=torch.float64))
        # the chain's path is smooth between its levels only
        return float(torch.trapezoid((path.diffusion(grid) / path.sigma(grid)) ** 2, grid))

    whole = mass(*ends.tolist())
    found = [mass(float(t[0]), float(each)) / whole for each in t[1:]]
    assert found == pytest.approx([0.2, 0.4, 0.6], abs=2e-3)


def test_logit_normal_and_level_times():
    u = torch.tensor([0.1587, 0.5, 0.8413], dtype=torch.float64)
    scheduler = ScoreSDEScheduler(sde_type="linear", prediction_type="flow_prediction")
    t = Objective(scheduler, "logit_normal", density_options={"mean": 0.5, "std": 2.0}).times(u)
    assert (t / (1 - t)).log() == pytest.approx([-1.5, 0.5, 2.5], abs=1e-3)
    chain = ScoreSDEScheduler(sde_type="discrete_vp", num_train_timesteps=10)
    levels = Objective(chain, "levels").times(torch.tensor([0.0, 0.05, 0.55, 0.999], dtype=torch.float64))
    assert levels.tolist() == [0.1, 0.1, 0.6, 1.0]
    assert chain.timestep(Objective(chain, "levels").times(u)) == pytest.approx([1, 5, 8])
    smld = ScoreSDEScheduler(sde_type="ve", num_train_timesteps=3, prediction_type="score")
    t = Objective(smld, "levels").times(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    # a geometric sequence of noise levels (Song & Ermon 2019)
    sigma = smld.path.sigma(t)
    assert float(sigma[1] / sigma[0]) == pytest.approx(float(sigma[2] / sigma[1]))
    # from the first to the last of its levels
    assert (float(t[0]), float(t[2])) == (smld.t_min, smld.t_max)


@pytest.mark.parametrize("time_density", TIME_DENSITIES)
@pytest.mark.parametrize("sde_type", PATHS)
def test_times_stay_within_their_bounds(time_density, sde_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type)
    t = Objective(scheduler, time_density).times(torch.tensor([2**-53, 0.5, 1 - 2**-53], dtype=torch.float64))
    assert (t >= scheduler.t_min - 1e-12).all() and (t <= scheduler.t_max + 1e-12).all()


LINEAR = {"sde_type": "linear", "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("shift", [0.25, 3.0])
@pytest.mark.parametrize("sde_type", ["linear", "cosine_vp"])
def test_shifted_times_have_the_distribution_of_the_closed_form(sde_type, shift):
    """P(t) is that of the time whose sigma / alpha is lower by the shift."""
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="v_prediction", shift=shift)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    path, t = scheduler.path, Objective(scheduler, shift_times=True).times(u)
    inside = (t > scheduler.t_min) & (t < scheduler.t_max)
    assert inside.sum() > 990
    ratio = (path.sigma(t) / path.alpha(t) / shift)[inside]
    if sde_type == "linear":
        before = ratio / (1 + ratio)
        sd3 = shift * before / (1 + (shift - 1) * before)  # Esser et al. 2024, Eq. 23
        assert (t[inside] - sd3).abs().max() < 1e-12
    else:
        before = path.t_from_half_log_snr(-ratio.log())
    probability = (before - scheduler.t_min) / (scheduler.t_max - scheduler.t_min)
    assert (probability - u[inside]).abs().max() < 1e-9


@pytest.mark.parametrize(("time_density", "name"), [("logit_normal", "mean"), ("log_normal", "mean")])
def test_a_shift_of_normal_times_moves_their_mean(time_density, name):
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    shifted = Objective(ScoreSDEScheduler(**LINEAR, shift=3.0), time_density, shift_times=True)
    plain = Objective(ScoreSDEScheduler(**LINEAR), time_density)
    mean = {"logit_normal": 0.0, "log_normal": -1.2}[time_density] + math.log(3)
    moved = Objective(ScoreSDEScheduler(**LINEAR), time_density, density_options={"mean": mean})
    assert (shifted.times(u) - moved.times(u)).abs().max() < 1e-12
    # the scheduler's shift alone is that of its grids
    assert torch.equal(Objective(ScoreSDEScheduler(**LINEAR, shift=3.0), time_density).times(u), plain.times(u))


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        ({"sde_type": "vp"}, {}, "a path that ends in noise alone, such as linear or cosine_vp: on sde_type 'vp'"),
        ({"sde_type": "ve", "prediction_type": "score", "domain": "torus"}, {}, "a path that ends in noise alone"),
        (LINEAR | {"use_dynamic_shifting": True}, {}, "need one shift, and with use_dynamic_shifting each trajectory"),
        (LINEAR, {"time_density": "importance"}, "need time_density uniform, log_normal, logit_normal"),
        (LINEAR, {"time_density": "levels"}, "not 'levels' and 'output'"),
        (LINEAR, {"weighting": "likelihood"}, "another weighting than likelihood, not 'uniform' and 'likelihood'"),
    ],
)
def test_shifts_without_a_meaning_are_refused(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(ScoreSDEScheduler(**scheduler), **arguments, shift_times=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time_density": "normal"}, "time_density 'normal' is unknown; choose one of uniform, log_normal"),
        ({"weighting": "snr"}, "weighting 'snr' is unknown; choose one of output, simple"),
        ({"weighting_options": {"gamma": 1}}, "weighting 'output' has no option gamma; it has none"),
        ({"density_options": {"mu": 1}, "time_density": "logit_normal"}, "no option mu; it has mean, std"),
        ({"weighting": "likelihood", "time_density": "log_normal"}, "needs time_density uniform or importance"),
    ],
)
def test_unknown_objectives_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(ScoreSDEScheduler(), **arguments)


# --- the variational bound ----------------------------------------------------------------------------------------


def test_the_bound_is_the_sum_of_divergences_by_hand():
    """Every term of a chain of 8 levels, from the formulas of Ho et al. 2020 and torch.distributions."""
    betas = torch.linspace(0.02, 0.3, 8, dtype=torch.float64)
    scheduler = ScoreSDEScheduler(sde_type="discrete_vp", num_train_timesteps=8, trained_betas=betas.tolist())
    alphas_cumprod = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    generator = seeded(0)
    x0 = (torch.randint(256, (8, 1, 2, 2), generator=generator) / 127.5 - 1).double()
    x0[0, 0, 0] = torch.tensor([-1.0, 1.0])
    noise, denoised, variance = (torch.randn(x0.shape, generator=generator, dtype=torch.float64) for _ in range(3))
    variance = variance.clamp(-1, 1)
    t = torch.arange(1, 9, dtype=torch.float64) / 8
    x_t = scheduler.path.sample(x0, noise, t)
    for discretized in (True, False):
        found = vlb_terms(scheduler.path, x0, x_t, denoised, variance, t, discretized)
        for n in range(8):
            c_0 = before[n].sqrt() * betas[n] / (1 - alphas_cumprod[n])
            c_x = (1 - betas[n]).sqrt() * (1 - before[n]) / (1 - alphas_cumprod[n])
            small = betas * (1 - before) / (1 - alphas_cumprod)
            low, high = small[max(n, 1)].log(), betas[n].log()
            std = torch.exp(((variance[n] + 1) / 2 * high + (1 - variance[n]) / 2 * low) / 2)
            step = Normal(c_0 * denoised[n] + c_x * x_t[n], std)
            if n:
                expected = kl_divergence(Normal(c_0 * x0[n] + c_x * x_t[n], small[n].sqrt()), step)
            elif discretized:
                upper = torch.where(x0[n] == 1, torch.ones(()).double(), step.cdf(x0[n] + 1 / 255))
                lower = torch.where(x0[n] == -1, torch.zeros(()).double(), step.cdf(x0[n] - 1 / 255))
                expected = -(upper - lower).clamp_min(1e-12).log()
            else:
                expected = -step.log_prob(x0[n])
            assert float(found[n]) == pytest.approx(float(expected.mean()), rel=1e-4), n


def test_the_hybrid_counts_the_bound_of_the_whole_chain_in_bits():
    """Nichol & Dhariwal 2021, Eq. 16: the term of one level stands for all, in bits per dimension."""
    scheduler = ScoreSDEScheduler(sde_type="discrete_vp", num_train_timesteps=10, prediction_type="epsilon")
    x0, noise, u = draw(32, shape=(2, 4, 4))
    x0, t = (x0 / 3).clamp(-1, 1), Objective(scheduler, "levels").times(u)
    output = torch.randn(32, 4, 4, 4, generator=seeded(1), dtype=torch.float64)

    def loss(weight):
        return hybrid_loss(lambda x, t: Output(output), scheduler, x0, noise, t, vlb_weight=weight)

    x_t = scheduler.path.sample(x0, noise, t)
    alpha, sigma = (expand_to(value, x0) for value in (scheduler.path.alpha(t), scheduler.path.sigma(t)))
    denoised = (x_t - sigma * output[:, :2]) / alpha
    bits = vlb_terms(scheduler.path, x0, x_t, denoised, output[:, 2:], t) / math.log(2)
    assert (loss(0.0) - (output[:, :2] - noise).square().mean((1, 2, 3))).abs().max() < 1e-5
    assert torch.allclose((loss(0.5) - loss(0.0)).double(), 0.5 * 10 * bits.double(), rtol=1e-3)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.05), (0.98, 0.3), (-2.0, 1.0)])
def test_the_bins_of_the_discretised_likelihood_cover_everything(mean, std):
    """256 bins, the outermost open: their probabilities add up to 1 wherever the mean is."""
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_std = torch.full_like(pixels, math.log(std))
    log_probability = discretized_log_likelihood(pixels, torch.full_like(pixels, mean), log_std)
    assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-6)
    inner = Normal(mean, std).cdf(pixels[1:-1] + 1 / 255) - Normal(mean, std).cdf(pixels[1:-1] - 1 / 255)
    assert torch.allclose(log_probability[1:-1].exp(), inner.clamp_min(1e-12), rtol=1e-6)


def test_the_docstrings_name_every_objective():
    """`training/train.py --help` points there."""
    for name in [*TIME_DENSITIES, *WEIGHTINGS]:
        assert name in losses_module.__doc__, name


def test_the_bound_of_the_hybrid_trains_the_variance_alone():
    scheduler = ScoreSDEScheduler(sde_type="discrete_vp", num_train_timesteps=10)
    x0, noise, u = draw(32, shape=(2, 4, 4))
    t = Objective(scheduler, "levels").times(u)
    gradients = {}
    for weight in (0.0, 0.001):
        output = torch.zeros(32, 4, 4, 4, dtype=torch.float64).requires_grad_()
        losses = hybrid_loss(lambda x, t, output=output: Output(output), scheduler, x0, noise, t, vlb_weight=weight)
        losses.sum().backward()
        gradients[weight] = output.grad
    assert torch.equal(gradients[0.0][:, :2], gradients[0.001][:, :2])
    assert gradients[0.0][:, 2:].abs().max() == 0
    assert gradients[0.001][:, 2:].abs().amax((1, 2, 3)).min() > 0
    with pytest.raises(ValueError, match="returns 2 channels; a learned variance needs 4"):
        hybrid_loss(lambda x, t: Output(x), scheduler, x0, noise, t)
    with pytest.raises(ValueError, match="needs a chain: sde_type 'discrete_vp', not 'vp'"):
        hybrid_loss(lambda x, t: Output(x), ScoreSDEScheduler(), x0, noise, t)


def test_sliced_score_matching_is_least_at_the_exact_score():
    """A linear score -c x of Gaussian data: the loss is sigma^2 (c^2 var / 2 - c), least at c = 1 / var."""
    n = 100_000
    scheduler = ScoreSDEScheduler(prediction_type="score")
    t = torch.full((n,), 0.4, dtype=torch.float64)
    x, probes, _ = draw(n, shape=(2,))
    std = 1.3
    for c in (0.3, 1 / std**2, 1.5):
        losses = sliced_score_matching(lambda x, t, c=c: Output(-c * x), scheduler, std * x, t, probes.sign())
        expected = float(scheduler.path.sigma(t[0])) ** 2 * (c**2 * std**2 / 2 - c)
        assert float(losses.mean()) == pytest.approx(expected, abs=0.02)


# --- conditions and masks -----------------------------------------------------------------------------------------


def test_conditions_reach_the_network_by_their_names():
    scheduler, seen = ScoreSDEScheduler(), {}
    x0, noise, t = draw(4)
    told = {"class_labels": torch.arange(4), "encoder_hidden_states": torch.randn(4, 2, 3)}

    def network(x, timestep, **conditions):
        seen.update(conditions)
        return Output(x)

    for evaluate in (Objective(scheduler), lambda *given: denoising_loss(network, scheduler, *given[1:])):
        seen.clear()
        evaluate(network, x0, noise, t, told)
        assert seen == told
    sliced_score_matching(network, scheduler, x0, t, noise, told)
    assert seen == told


def test_dropped_conditions_are_what_the_network_says():
    conditions = {
        "class_labels": torch.arange(3),
        "encoder_hidden_states": torch.ones(3, 2, 4),
        "size": torch.tensor([[8.0], [9.0], [10.0]]),
    }

    def null_conditions(conditions):
        """The size has none."""
        return {
            "class_labels": torch.full_like(conditions["class_labels"], 7),
            "encoder_hidden_states": torch.zeros_like(conditions["encoder_hidden_states"]),
        }

    found = drop_conditions(conditions, null_conditions, torch.tensor([True, False, True]))
    assert found["class_labels"].tolist() == [7, 1, 7] and found["class_labels"].dtype == torch.int64
    assert found["encoder_hidden_states"][:, 0, 0].tolist() == [0, 1, 0]
    assert torch.equal(found["size"], conditions["size"])


MASKED_LOSSES = {
    "denoising": lambda network, given, mask: Objective(ScoreSDEScheduler())(network, *given, mask=mask),
    "hybrid": lambda network, given, mask: hybrid_loss(
        network, ScoreSDEScheduler(sde_type="discrete_vp", num_train_timesteps=4), *given, vlb_weight=0.1, mask=mask
    ),
    "sliced": lambda network, given, mask: sliced_score_matching(
        network, ScoreSDEScheduler(prediction_type="score"), given[0], given[2], given[1], mask=mask
    ),
}


@pytest.mark.parametrize("name", MASKED_LOSSES)
def test_a_mask_leaves_the_loss_of_the_rest(name):
    """Of a network that acts on every element alone, the loss of padded samples is that of the samples."""
    lengths = [5, 3, 0]
    mask = torch.tensor([[i < length for i in range(5)] for length in lengths])[:, None]  # (B, 1, L)
    x0, noise, _ = draw(3, shape=(2, 5))
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def network(x, timestep):
        output = weight * (x - 0.3 * x**2)
        return Output(torch.cat([output, output.tanh()], dim=1) if name == "hybrid" else output)

    loss = MASKED_LOSSES[name]
    garbage = torch.where(mask, x0, torch.full_like(x0, 1e3))
    masked = loss(network, (garbage, noise, t), mask)
    for i, length in enumerate(lengths[:2]):
        given = (x0[i : i + 1, :, :length], noise[i : i + 1, :, :length], t[i : i + 1])
        assert masked[i].item() == pytest.approx(loss(network, given, None).item(), rel=1e-5)
    assert masked[2] == 0
    (slope,) = torch.autograd.grad(masked[2], weight)
    assert slope == 0
    with pytest.raises(ValueError, match=r"mask of shape \(3, 5\) doesn't fit samples of shape \(3, 2, 5\)"):
        loss(network, (x0, noise, t), mask[:, 0])


def test_probes_of_what_is_masked_do_not_count():
    """Of a network in which every element acts on every other."""
    x, probes, _ = draw(4, shape=(1, 5))
    t, mask = torch.full((4,), 0.4, dtype=torch.float64), (torch.arange(5) < 3)[None, None]
    matrix = torch.randn(5, 5, generator=seeded(1), dtype=torch.float64)
    scheduler = ScoreSDEScheduler(prediction_type="score")
    losses = [
        sliced_score_matching(lambda x, t: Output(x @ matrix), scheduler, x, t, each, mask=mask)
        for each in (probes, torch.where(mask, probes, -3 * probes))
    ]
    assert torch.equal(*losses)
