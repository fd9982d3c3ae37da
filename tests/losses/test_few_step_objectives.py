"""Each published objective of few steps: its times, and that it leads a network to the known map of Gaussian data, from
a teacher and from the data alone."""

import math

import pytest
import torch
from exact import GAUSSIAN
from test_losses import Output
from tiny import seeded

from score_sde import ScoreSDEScheduler
from score_sde.losses import FEW_STEP_METHODS, flow_map, heun_velocity, mean_velocity, straight_sample
from score_sde.losses.few_step import place
from score_sde.schedulers.paths import SDE_TYPES, expand_to


METHODS = list(FEW_STEP_METHODS)
LABELS = torch.tensor([0, 1])


class Maps(torch.nn.Module):
    """A small network for samples of `GAUSSIAN`: beside a denoiser, what a sample and its times add."""

    def __init__(self, denoiser, scheduler):
        super().__init__()
        torch.manual_seed(0)
        self.denoiser, self.scheduler = denoiser, scheduler
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8)
        )
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, timestep, timestep_to=None, guidance=None):
        told = [timestep, timestep if timestep_to is None else timestep_to]
        gain, more = self.layers(torch.stack(told, 1).float() / 500 - 1).chunk(2, 1)
        return Output(self.denoiser(x, timestep).float() + gain * x + more)


def case(sde_type="linear"):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="flow_prediction", t_min=0.01, t_max=0.99)
    denoiser = GAUSSIAN.network(scheduler)

    def exact(x, timestep):
        return denoiser(x.double(), timestep.double()[:, None]).to(x.dtype)

    def teacher(x, timestep):
        return Output(exact(x, timestep))

    return scheduler, exact, teacher


def numbers(n, generator):
    return torch.rand(3, n, generator=generator, dtype=torch.float64).clamp_min(2**-53)


def errors(network, scheduler, told):
    """Root mean squares of the errors of the map in one step and in two, in standard deviations of the data."""
    path, found = scheduler.path, []
    grid = torch.randn(500, 4, generator=seeded(9), dtype=torch.float64)
    for steps in (1, 2):
        u = torch.linspace(
            float(place(scheduler, scheduler.t_max)), float(place(scheduler, scheduler.t_min)), steps + 1
        )
        times = path.t_from_straight(u.double(), 1.0).clamp(scheduler.t_min, scheduler.t_max)
        mean, variance = GAUSSIAN.noised(path, times[0])
        x = begin = (mean + variance.sqrt() * grid).float()
        if not told:
            # from each of the times
            mean, variance = GAUSSIAN.noised(path, times[-2])
            x = begin = (mean + variance.sqrt() * grid).float()
            times = times[-2:]
        for t, s in zip(times, times[1:], strict=False):
            with torch.no_grad():
                x = flow_map(network, scheduler, x, t.expand(len(x)), s.expand(len(x)), told=told)
        wanted = GAUSSIAN.flow(begin.double(), path, times[0], times[-1])
        found.append(float(((x - wanted) / GAUSSIAN.variances.sqrt()).square().mean().sqrt()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_reaches_the_known_map(method, taught):
    scheduler, exact, teacher = case()
    uniform = {"time_density": "uniform"}
    objective = FEW_STEP_METHODS[method](scheduler, teacher if taught else None, **uniform)
    network = Maps(exact, scheduler)
    before = errors(network, scheduler, objective.told)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    generator, steps = seeded(1), 500
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x0 = GAUSSIAN.sample(256, generator).float()
        noise, drawn = (
            torch.randn(x0.shape, generator=generator),
            objective.draw(*numbers(256, generator), step / steps),
        )
        objective(network, x0, noise, drawn, progress=step / steps).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    after = errors(network, scheduler, objective.told)
    print(method, taught, before, after)
    assert all(new < 0.25 * old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_times_are_in_order_and_losses_are_numbers_on_every_path(method, sde_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="v_prediction")
    denoiser = GAUSSIAN.network(scheduler)

    def teacher(x, timestep, timestep_to=None):
        return Output(denoiser(x.double(), timestep.double()[:, None]).to(x.dtype))

    objective, generator = FEW_STEP_METHODS[method](scheduler, teacher), seeded(0)
    x0 = GAUSSIAN.sample(500, generator).float()
    for progress in (0.0, 0.5, 1.0):
        drawn = objective.draw(*numbers(500, generator), progress)
        assert (scheduler.t_min <= drawn.s).all() and (drawn.t <= scheduler.t_max).all()
        assert (drawn.s <= drawn.middle).all() and (drawn.middle <= drawn.t).all() and drawn.scale is None
        losses = objective(teacher, x0, torch.randn(x0.shape, generator=generator), drawn, progress=progress)
        assert losses.shape == (500,) and torch.isfinite(losses).all()


def test_times_of_the_methods():
    scheduler, _, teacher = case()
    u, v, w = numbers(10_000, seeded(0))
    flow = FEW_STEP_METHODS["mean_flow"](scheduler, options={"moving": 0.25}).draw(u, v, w)
    assert abs(float((flow.s < flow.t).double().mean()) - 0.25) < 0.02
    # as many levels as at the end, four doublings before, and of a teacher always the same
    training = FEW_STEP_METHODS["consistency"](scheduler, options={"first_levels": 10, "last_levels": 160})
    assert [len(training.levels(progress)) - 1 for progress in (0, 0.3, 0.99, 1)] == [10, 20, 160, 160]
    assert len(FEW_STEP_METHODS["consistency"](scheduler, teacher).levels(0)) == 41
    drawn = training.draw(u, v, w, 0.5)
    grid = training.levels(0.5)
    assert torch.isin(drawn.t, grid).all() and (grid[torch.searchsorted(grid, drawn.t) - 1] == drawn.middle).all()
    # the probability of a level is that of the noise levels between it and the one before (Song & Dhariwal 2024)
    index = torch.searchsorted(grid, drawn.t)
    normal = torch.distributions.Normal(-1.1, 2.0)
    edges = normal.cdf(-scheduler.path.half_log_snr(grid).float())
    shares = torch.bincount(index, minlength=len(grid)).double()[3:-1] / len(u)
    assert (shares - edges.diff()[2:-1]).abs().max() < 0.02
    # whole ways, halves, quarters: in the middle is half of the way in u
    flow = FEW_STEP_METHODS["flow_map"](scheduler, teacher, options={"moving": 0.9, "levels": 3}).draw(u, v, w)
    begin, middle, end = (place(scheduler, each) for each in flow[:3])
    lengths = (begin - end)[begin > end] / (place(scheduler, 0.99) - place(scheduler, 0.01))
    assert set(lengths.mul(4).round(decimals=6).tolist()) == {1.0, 2.0, 4.0}
    assert torch.allclose(middle, (begin + end) / 2)


def test_heun_s_step_is_of_second_order():
    scheduler, _, teacher = case()
    x0, generator = GAUSSIAN.sample(64, seeded(0)), seeded(1)
    t = torch.full((64,), 0.7, dtype=torch.float64)
    x = scheduler.path.sample(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), t)
    y, found = straight_sample(scheduler, x, t), []
    for step in (0.1, 0.05):
        mean = heun_velocity(lambda y, t: mean_velocity(teacher, scheduler, y, t), scheduler, y, t, t - step)
        wanted = GAUSSIAN.flow(x, scheduler.path, t[:, None], t[:, None] - step)
        wanted = (straight_sample(scheduler, wanted, t - step) - y) / -step
        found.append(float((mean - wanted).abs().max()))
    assert 3 < found[0] / found[1] < 5


class Labelled:
    """A network whose mean velocity is its label, 0 standing for none, and what it was told of guidance."""

    def __init__(self, scheduler):
        self.scheduler, self.guidance = scheduler, []

    def __call__(self, x, timestep, timestep_to=None, class_labels=None, guidance=None):
        self.guidance.append(guidance)
        row = self.scheduler.parameterization.row(self.scheduler.path_time(timestep))
        t = self.scheduler.path_time(timestep)
        # U = (x - c D) / sigma
        wanted = expand_to(class_labels.double(), x).expand_as(x)
        c, sigma = self.scheduler.path.straight_coordinates(t, 1.0)[0], self.scheduler.path.sigma(t)
        mapped = (x - expand_to(sigma, x) * wanted) / expand_to(c, x)
        return Output((mapped - expand_to(row.a, x) * x) / expand_to(row.b, x))


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_guidance_is_folded_in_where_conditions_were_not_dropped(kappa):
    scheduler, *_ = case()
    own = Labelled(scheduler)
    options = {"null_of": lambda conditions: {"class_labels": torch.zeros_like(conditions["class_labels"])}}
    flow = FEW_STEP_METHODS["mean_flow"](scheduler, guidance=3.0, options={"kappa": kappa}, **options)
    u, v, w = numbers(4, seeded(0))
    drawn = flow.draw(u, v, w)
    y, v = torch.randn(2, 4, 3, generator=seeded(1), dtype=torch.float64)
    labels = {"class_labels": torch.tensor([2, 2, 0, 0])}
    found = flow.of_data(own, y, v, drawn, labels, torch.tensor([False, False, True, True]), kappa)
    # omega v + kappa u(c) + (1 - omega - kappa) u, omega = (1 - kappa) 3
    omega = (1 - kappa) * 3
    assert torch.allclose(found[:2], omega * v[:2] + kappa * 2, atol=1e-4) and torch.equal(found[2:], v[2:])
    # of a teacher: u + 3 (u(c) - u)
    taught = FEW_STEP_METHODS["flow_map"](scheduler, own, guidance=3.0, **options)
    found = taught.of_teacher(y, drawn.t, labels, drawn.scale)
    assert torch.allclose(found[:2], torch.full_like(y[:2], 6.0), atol=1e-4) and found[2:].abs().max() < 1e-4


def test_a_scale_that_is_drawn_is_told():
    scheduler, *_ = case()
    own = Labelled(scheduler)
    options = {"null_of": lambda conditions: {"class_labels": torch.zeros_like(conditions["class_labels"])}}
    flow = FEW_STEP_METHODS["flow_map"](scheduler, own, guidance=(1.0, 4.0), **options)
    drawn = flow.draw(*numbers(100, seeded(0)))
    assert 1 <= drawn.scale.min() < 1.2 and 3.8 < drawn.scale.max() <= 4
    x0, noise = torch.randn(2, 100, 3, generator=seeded(1), dtype=torch.float64)
    flow(own, x0, noise, drawn, {"class_labels": torch.ones(100, dtype=torch.long)})
    # the teacher isn't, the network is
    assert own.guidance[0] is None and torch.equal(own.guidance[-1], drawn.scale.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"kapa": 1}}, "mean_flow has no number kapa; it has moving, kappa"),
        ({"time_density": "cauchy"}, "time_density 'cauchy' is unknown"),
        ({"density_options": {"width": 1}}, "time_density 'log_normal' has no option width"),
    ],
)
def test_unknown_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FEW_STEP_METHODS["mean_flow"](ScoreSDEScheduler(), **options)


def test_guidance_without_a_teacher_needs_a_network_that_is_a_flow_map():
    with pytest.raises(ValueError, match="guidance 2.0 needs the ODE's velocity without conditions: a teacher"):
        FEW_STEP_METHODS["scm"](ScoreSDEScheduler(), guidance=2.0)
    assert math.isclose(FEW_STEP_METHODS["mean_flow"](ScoreSDEScheduler(), guidance=2.0).guidance, 2.0)
