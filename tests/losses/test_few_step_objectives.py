"""Each published objective of few steps: its times, and that it leads to the known map of Gaussian data, by a teacher
and by the data alone."""

import math

import pytest
import torch
from exact import GAUSSIAN
from test_few_step import exact_map
from test_losses import Output
from tiny import seeded

from score_sde import ScoreSDEScheduler
from score_sde.losses import FEW_STEP_METHODS, heun_velocity, mean_velocity, straight_sample
from score_sde.losses.few_step import place
from score_sde.schedulers.paths import SDE_TYPES, expand_to


METHODS = list(FEW_STEP_METHODS)


def case(sde_type="linear"):
    """(a scheduler, a perfect teacher of `GAUSSIAN`)."""
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="flow_prediction", t_min=0.01, t_max=0.99)
    return scheduler, exact_map(scheduler)


def numbers(n, generator):
    return torch.rand(3, n, generator=generator, dtype=torch.float64).clamp_min(2**-53)


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_leads_to_the_known_map(method, taught):
    """Downhill from a map that is off by a constant, or by a share of the sample, is towards the exact one, where no
    direction is downhill."""
    scheduler, teacher = case()
    # of 40 levels the error of Heun's step shows
    options = {"first_levels": 500, "last_levels": 500} if method == "consistency" else {}
    taught = teacher if taught else None
    objective = FEW_STEP_METHODS[method](scheduler, taught, time_density="uniform", options=options)
    generator, n = seeded(1), 10_000
    x0 = GAUSSIAN.sample(n, generator)
    noise, drawn = (
        torch.randn(x0.shape, generator=generator, dtype=torch.float64),
        objective.draw(*numbers(n, generator)),
    )
    end = None if objective.told else torch.tensor(scheduler.t_min, dtype=torch.float64)

    def slopes(constant, gain):
        changes = torch.tensor([constant, gain], dtype=torch.float64, requires_grad=True)
        exact, velocity = exact_map(scheduler, end), exact_map(scheduler)

        def network(x, timestep, timestep_to=None):
            found = exact(x, timestep, timestep_to).sample
            if timestep_to is not None:
                # at its own time a flow map is the ODE's velocity, and the exact one is 0 / 0
                found = torch.where((timestep == timestep_to)[:, None], velocity(x, timestep).sample, found)
            return Output(found + changes[0] + changes[1] * x)

        losses = objective(network, x0, noise, drawn)
        return torch.autograd.grad(losses.double().mean(), changes)[0]

    there, by_constant, by_gain = slopes(0.0, 0.0), slopes(0.2, 0.0)[0], slopes(0.0, 0.2)[1]
    assert by_constant > 0 and by_gain > 0
    assert there[0].abs() < 0.1 * by_constant and there[1].abs() < 0.1 * by_gain


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_times_are_in_order_and_losses_are_numbers_on_every_path(method, sde_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="v_prediction")
    teacher = exact_map(scheduler)
    objective, generator = FEW_STEP_METHODS[method](scheduler, teacher), seeded(0)
    x0 = GAUSSIAN.sample(500, generator).float()
    for progress in (0.0, 0.5, 1.0):
        drawn = objective.draw(*numbers(500, generator), progress)
        assert (scheduler.t_min <= drawn.s).all() and (drawn.t <= scheduler.t_max).all()
        assert (drawn.s <= drawn.middle).all() and (drawn.middle <= drawn.t).all() and drawn.scale is None
        network = lambda x, timestep, timestep_to=None: teacher(x, timestep)  # noqa: E731
        losses = objective(network, x0, torch.randn(x0.shape, generator=generator), drawn, progress=progress)
        assert losses.shape == (500,) and torch.isfinite(losses).all()


def test_times_of_the_methods():
    scheduler, teacher = case()
    u, v, w = numbers(10_000, seeded(0))
    flow = FEW_STEP_METHODS["mean_flow"](scheduler, options={"moving": 0.25}).draw(u, v, w)
    assert abs(float((flow.s < flow.t).double().mean()) - 0.25) < 0.02
    # as many levels as at the end, four doublings before, and of a teacher always the same
    training = FEW_STEP_METHODS["consistency"](scheduler, options={"first_levels": 10, "last_levels": 160})
    assert [len(training.levels(progress)) - 1 for progress in (0, 0.3, 0.99, 1)] == [10, 20, 160, 160]
    assert len(FEW_STEP_METHODS["consistency"](scheduler, teacher).levels(0)) == 41
    # that is no doubling is reached, too
    uneven = FEW_STEP_METHODS["consistency"](scheduler, options={"first_levels": 10, "last_levels": 100})
    assert [len(uneven.levels(progress)) - 1 for progress in (0, 0.3, 0.5, 0.7, 0.9)] == [10, 20, 40, 80, 100]
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
    scheduler, teacher = case()
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
    scheduler, _ = case()
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
    scheduler, _ = case()
    own = Labelled(scheduler)
    options = {"null_of": lambda conditions: {"class_labels": torch.zeros_like(conditions["class_labels"])}}
    flow = FEW_STEP_METHODS["flow_map"](scheduler, own, guidance=(1.0, 4.0), **options)
    drawn = flow.draw(*numbers(100, seeded(0)))
    assert 1 <= drawn.scale.min() < 1.2 and 3.8 < drawn.scale.max() <= 4
    x0, noise = torch.randn(2, 100, 3, generator=seeded(1), dtype=torch.float64)
    flow(own, x0, noise, drawn, {"class_labels": torch.ones(100, dtype=torch.long)})
    # the teacher isn't, the network is
    assert own.guidance[0] is None and torch.equal(own.guidance[-1], drawn.scale.float())


def test_a_scale_that_is_drawn_is_told_where_the_network_guides_itself():
    """At a scale that is none of the range, such as 1, which none that is told means, it was never trained; and what
    kappa mixes in is guided by the same scale."""
    scheduler, _ = case()
    own = Labelled(scheduler)
    options = {"null_of": lambda conditions: {"class_labels": torch.zeros_like(conditions["class_labels"])}}
    flow = FEW_STEP_METHODS["mean_flow"](scheduler, guidance=(2.0, 4.0), options={"kappa": 0.5}, **options)
    drawn = flow.draw(*numbers(4, seeded(0)))
    y, v = torch.randn(2, 4, 3, generator=seeded(1), dtype=torch.float64)
    flow.of_data(own, y, v, drawn, {"class_labels": torch.ones(4, dtype=torch.long)}, None, own=0.5)
    assert len(own.guidance) == 2 and all(torch.equal(each, drawn.scale.float()) for each in own.guidance)


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


@pytest.mark.parametrize(
    ("method", "name", "values"),
    [
        ("mean_flow", "moving", [-1, 1.5, "all"]),
        ("mean_flow", "power", [-1]),
        ("flow_map", "levels", [0, 2.5]),
        ("scm", "warmup", [-0.1, "abc", math.nan]),
        ("ect", "stages", [0, 1.5]),
        ("consistency", "first_levels", [1, 10.5]),
    ],
)
def test_numbers_out_of_range_are_refused(method, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} of {method} {value!r} must be a"):
            FEW_STEP_METHODS[method](ScoreSDEScheduler(), options={name: value})
    with pytest.raises(ValueError, match="first_levels 20 must be at most last_levels 10"):
        FEW_STEP_METHODS["consistency"](ScoreSDEScheduler(), options={"first_levels": 20, "last_levels": 10})


@pytest.mark.parametrize("given", [{}, {"teacher": object(), "guidance": 2.0}])
def test_kappa_without_effect_is_refused(given):
    with pytest.raises(ValueError, match=r"kappa 0.5 is the share of the network's own velocity in a guided one"):
        FEW_STEP_METHODS["mean_flow"](ScoreSDEScheduler(), options={"kappa": 0.5}, **given)
