"""Flow maps against the exact ones of Gaussian data, on every path: the map is where every objective's error vanishes,
and a few steps of it give the data."""

import logging

import pytest
import torch
from exact import GAUSSIAN
from networks import awake, tiny_dit, tiny_unet
from test_losses import Output
from tiny import seeded

from score_sde import ScoreSDEScheduler
from score_sde.losses import (
    composed_loss,
    continuous_loss,
    few_step,
    flow_map,
    guided,
    mean_velocity,
    mean_velocity_and_slope,
    mean_velocity_and_wide_slope,
    tuning_times,
    working_derivative,
)
from score_sde.losses.few_step import straight_sample
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES, expand_to


KINDS = [(sde_type, "flow_prediction") for sde_type in SDE_TYPES] + [("vp", each) for each in PREDICTIONS]
every_kind = pytest.mark.parametrize(("sde_type", "prediction_type"), KINDS)


def velocity(path, x, t):
    """dy/du of the ODE of `GAUSSIAN`, times (B, 1)."""
    mean, variance = GAUSSIAN.noised(path, t)
    denoised = GAUSSIAN.means + path.alpha(t) * GAUSSIAN.variances / variance * (x - mean)
    return path.straight_velocity(x, denoised, t.flatten(), 1.0)


def exact_map(scheduler, end=None, more=0.0):
    """The network whose map is the exact one of `GAUSSIAN`, to the time that it is told, or to `end`; its mean velocity
    is larger by `more`. Not told any, it leads nowhere: an ordinary network."""
    path = scheduler.path

    def network(scaled, timestep, timestep_to=None):
        t = scheduler.path_time(timestep)
        row = scheduler.parameterization.row(t)
        x = scaled / expand_to(row.input_scale, scaled)
        s = scheduler.path_time(timestep_to) if timestep_to is not None else end
        (c, u), t_ = path.straight_coordinates(t, 1.0), t.reshape(-1, 1)
        if s is None:
            mean = velocity(path, x, t_)
        else:
            c_end, u_end = path.straight_coordinates(s, 1.0)
            moved = GAUSSIAN.flow(x, path, t_, s.reshape(-1, 1)) / c_end.reshape(-1, 1)
            mean = (moved - x / c.reshape(-1, 1)) / (u_end - u).reshape(-1, 1)
        # U = (x - c D) / sigma
        mapped = (x - path.sigma(t_) * (mean + more)) / c.reshape(-1, 1)
        return Output((mapped - expand_to(row.a, x) * x) / expand_to(row.b, x))

    return network


def case(sde_type, prediction_type="flow_prediction", n=64):
    """(scheduler, x0, noise, x_t, y_t, t, s) for samples of `GAUSSIAN`."""
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type=prediction_type)
    generator = seeded(0)
    x0 = GAUSSIAN.sample(n, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    s, t = torch.rand(2, n, generator=generator, dtype=torch.float64).sort(0).values * 0.5 + 0.2
    t = t + 0.1
    x = scheduler.path.sample(x0, noise, t)
    return scheduler, x0, noise, x, straight_sample(scheduler, x, t), t, s


@every_kind
def test_the_exact_map_has_no_error(sde_type, prediction_type):
    scheduler, _, _, x, y, t, s = case(sde_type, prediction_type)
    exact, v = exact_map(scheduler), velocity(scheduler.path, x, t.unsqueeze(1))
    assert (mean_velocity(exact, scheduler, y, t) - v).abs().max() < 1e-3 * v.abs().max()
    assert (continuous_loss(exact, scheduler, y, v, t, s) < 1e-6 * v.square().mean()).all()
    assert (composed_loss(exact, scheduler, y, t, (t + s) / 2, s) < 1e-6 * v.square().mean()).all()
    # nor, up to the length of Euler's step, by the velocity
    assert composed_loss(exact, scheduler, y, t, t - 1e-3, s, v).mean() < 1e-4 * v.square().mean()
    # and another map has one
    other = exact_map(scheduler, more=0.1)
    assert continuous_loss(other, scheduler, y, v, t, s).min() > 0.009
    # whose derivative is left out first
    first = continuous_loss(exact, scheduler, y, v, t, s, warmup=0.0)
    denoising = (mean_velocity(exact, scheduler, y, t, s) - v).square().mean(1)
    assert torch.allclose(first.double(), denoising, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_no_step_from_the_exact_map_is_downhill_by_the_velocity_of_the_data(sde_type):
    scheduler, x0, noise, _, y, t, s = case(sde_type, n=20_000)
    s = torch.full_like(s, 0.25)
    t = torch.full_like(t, 0.7)
    x = scheduler.path.sample(x0, noise, t)
    more = torch.zeros(len(x), 1, dtype=torch.float64, requires_grad=True)
    network = exact_map(scheduler, s, more)
    y = straight_sample(scheduler, x, t)
    continuous_loss(network, scheduler, y, noise - x0, t, s, told=False).sum().backward()
    # of a constant, and of what is linear in the sample
    for direction in (torch.ones_like(t), y[:, 1] - y[:, 1].mean()):
        gradient = more.grad[:, 0] * direction
        assert gradient.mean().abs() < 5 * gradient.std() / len(gradient) ** 0.5


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_few_steps_of_the_exact_map_give_the_distribution(sde_type, steps):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="flow_prediction")
    path, network = scheduler.path, exact_map(scheduler)
    times = torch.linspace(0.99, 0.01, steps + 1, dtype=torch.float64)
    # normal samples of exactly these moments
    grid = torch.randn(2000, 4, generator=seeded(0), dtype=torch.float64)
    grid = (grid - grid.mean(0)) / grid.std(0)
    mean, variance = GAUSSIAN.noised(path, times[0])
    x = mean + variance.sqrt() * grid
    for t, s in zip(times, times[1:], strict=False):
        x = flow_map(network, scheduler, x, t.expand(len(x)), s.expand(len(x)))
    mean, variance = GAUSSIAN.noised(path, times[-1])
    assert ((x.mean(0) - mean).abs() < 2e-3 * variance.sqrt()).all()
    assert (x.var(0) / variance - 1).abs().max() < 5e-3


def test_derivatives_agree_and_what_has_none_is_said(caplog):
    scheduler = ScoreSDEScheduler(sde_type="linear", prediction_type="flow_prediction")
    generator, t, s = seeded(1), torch.tensor([0.3, 0.8]), torch.tensor([0.1, 0.2])
    y, v = torch.randn(2, 2, 3, 8, 8, generator=generator)
    with caplog.at_level(logging.INFO):
        dit, unet = (awake(build(num_classes=None).with_two_times()) for build in (tiny_dit, tiny_unet))
        arguments = scheduler, y, t, s, v
        assert working_derivative(dit, *arguments) == "jvp"
        assert working_derivative(unet, *arguments) == "finite_difference"
    assert "by torch.func.jvp" in caplog.text and "torch.func.jvp fails, " in caplog.text
    (value, exact), (again, difference) = (
        mean_velocity_and_slope(dit, *arguments, derivative=each) for each in ("jvp", "finite_difference")
    )
    assert (value - again).abs().max() < 1e-4
    assert (exact - difference).abs().max() < 0.02 * exact.abs().max()
    assert value.requires_grad and not exact.requires_grad and not difference.requires_grad


@every_kind
def test_wide_differences_are_of_second_order(sde_type, prediction_type, monkeypatch):
    monkeypatch.setattr(few_step, "LEAST_DIFFERENCE", 0)
    scheduler, _, _, x, y, t, s = case(sde_type, prediction_type)
    exact, v = exact_map(scheduler), velocity(scheduler.path, x, t.unsqueeze(1))
    arguments = exact, scheduler, y, t, torch.full_like(t, 0.05), v
    _, slope = mean_velocity_and_slope(*arguments)
    wide = [mean_velocity_and_wide_slope(*arguments, step=step)[1] for step in (0.6, 0.3)]
    coarse, fine = ((each - slope).abs().max() for each in wide)
    assert fine < 0.05 * slope.abs().max() and coarse > 3 * fine


def test_wide_differences_of_a_rounded_map_near_noise():
    """A map that is known to 0.4 %, as bfloat16 has it, where 0.5 of log(sigma / alpha) is 0.005 of u."""
    scheduler, _, noise, _, _, _, _ = case("vp", n=256)
    t, s = (torch.full((256,), each, dtype=torch.float64) for each in (0.98, 0.3))
    y, direction = noise, torch.zeros_like(noise)
    exact = exact_map(scheduler)

    def rounded(scaled, timestep, timestep_to=None):
        return Output(exact(scaled, timestep, timestep_to).sample.bfloat16().double())

    arguments = scheduler, y, t, s, direction
    _, wide = mean_velocity_and_wide_slope(rounded, *arguments)
    _, slope = mean_velocity_and_slope(exact, *arguments)
    assert (wide - slope).square().mean() < 0.2**2 * slope.square().mean()


def test_wide_differences_average_what_an_embedding_makes_between_times():
    """Of a map whose velocity has ripples of 1 % along the time steps the derivative is theirs, a wide difference the
    map's; both end at the times that are sampled, and at a map's own end, where no time is left, are finite."""
    scheduler, _, _, x, y, t, s = case("vp")
    exact, v = exact_map(scheduler), velocity(scheduler.path, x, t.unsqueeze(1))
    asked = []

    def rippled(scaled, timestep, timestep_to=None):
        asked.append(scheduler.path_time(timestep))
        # of the exact map the mean velocity of no way is 0 / 0
        end = timestep_to if timestep_to[0] < timestep[0] else None
        return Output(exact(scaled, timestep, end).sample + 0.01 * torch.sin(timestep)[:, None])

    arguments = scheduler, y, t, s - 0.1, v
    _, slope = mean_velocity_and_slope(exact, *arguments)
    far, near = (
        each(rippled, *arguments)[1] - slope for each in (mean_velocity_and_slope, mean_velocity_and_wide_slope)
    )
    assert far.square().mean() > 20 * near.square().mean()
    t, s = (torch.full_like(t, each) for each in (scheduler.t_max, scheduler.t_max))
    _, none = mean_velocity_and_wide_slope(rippled, scheduler, y, t, s, v)
    assert torch.isfinite(none).all() and max(each.max() for each in asked) <= scheduler.t_max


def test_guidance_of_velocities_leaves_those_of_scale_one():
    v, without = torch.randn(2, 2, 4, generator=seeded(0))
    mixed = guided(v, without, torch.tensor([1.0, 3.0]))
    assert torch.allclose(mixed[0], v[0]) and torch.allclose(mixed[1], 3 * v[1] - 2 * without[1])


def test_times_of_tuning_begin_at_clean_data_and_close_in():
    scheduler = ScoreSDEScheduler(sde_type="edm", prediction_type="edm")
    t = torch.tensor([0.001, 0.01, 0.5], dtype=torch.float64)
    assert (tuning_times(scheduler, t, 0) == scheduler.t_min).all()
    later = [tuning_times(scheduler, t, stage, q=2) for stage in (4, 8, 12)]
    assert all((now > before).all() for before, now in zip(later, later[1:], strict=False))
    level = 80 * t
    assert torch.allclose(later[2] / t, 1 - (1 + 8 * torch.sigmoid(-level)) / 2**12, rtol=1e-9)


@pytest.mark.parametrize("call", [continuous_loss, composed_loss])
def test_unknown_weights_are_refused(call):
    scheduler, x0, noise, _, y, t, s = case("vp")
    arguments = (noise - x0, t, s) if call is continuous_loss else (t, s, s)
    with pytest.raises(ValueError, match="error_weight 'huber' is unknown"):
        call(exact_map(scheduler), scheduler, y, *arguments, error_weight="huber")


def test_a_map_that_is_not_told_where_to_has_no_first_leg():
    scheduler, _, _, _, y, t, s = case("vp")
    with pytest.raises(ValueError, match="has no first leg"):
        composed_loss(exact_map(scheduler), scheduler, y, t, s, s, told=False)
