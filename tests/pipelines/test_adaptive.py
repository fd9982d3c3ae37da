"""Adaptive solvers: tolerances kept on exact scores, and through the pipeline."""

import pytest
import torch
from exact import GAUSSIAN, MIXTURE
from tiny import tiny_pipeline

from score_sde import ScoreSDEScheduler
from score_sde.pipelines.adaptive import BrownianSteps, in_equal_steps, probability_flow, reverse_sde
from score_sde.schedulers.paths import EDMSDE, VESDE, VPSDE, CosineVPSDE, LinearSDE


PATHS = [VPSDE(), VESDE(), CosineVPSDE(), EDMSDE(), LinearSDE()]


def ends(path):
    return path.t_max, path.t_min


def noise(path, n, dimensions, dtype=torch.float64):
    return path.prior_std * torch.randn(n, dimensions, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_the_ode_follows_the_exact_flow(path, tolerance):
    (t, s), x = ends(path), noise(path, 16, 4)
    solved = probability_flow(path, lambda x, t: GAUSSIAN.denoised(x, path, t), x, t, s, tolerance, tolerance)
    assert (solved - GAUSSIAN.flow(x, path, t, s)).abs().max() < 10 * tolerance


def test_a_smaller_tolerance_costs_more():
    path, calls = VPSDE(), []
    (t, s), x = ends(path), noise(path, 16, 2, torch.float32)

    def denoise(x, t):
        calls[-1] += 1
        return MIXTURE.denoised(x.double(), path, t).float()

    for tolerance in (1e-2, 1e-4):
        calls.append(0)
        assert probability_flow(path, denoise, x, t, s, tolerance, tolerance).dtype == torch.float32
    assert 10 < calls[0] < calls[1]


@pytest.mark.parametrize("path", [VPSDE(), VESDE()], ids=["vp", "ve"])
def test_the_sde_reaches_the_exact_moments(path):
    (t, s), x = ends(path), noise(path, 4000, 4)
    generator = torch.Generator().manual_seed(1)
    calls = 0

    def exact(x, t):
        nonlocal calls
        calls += 1
        # every sample has a time of its own
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        mean, variance = GAUSSIAN.means, GAUSSIAN.variances
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

    solved = reverse_sde(path, exact, x, t, s, rtol=0.01, atol=0.01, generator=generator)
    mean, variance = GAUSSIAN.noised(path, s)
    assert 20 < calls < 3000
    assert ((solved.mean(0) - mean).abs() < 5 * (variance / 4000).sqrt() + 0.01).all()
    assert (solved.var(0) / variance - 1).abs().max() < 0.12


def test_the_sde_stops_at_a_broken_network():
    (t, s), x = ends(VPSDE()), noise(VPSDE(), 2, 4)
    with pytest.raises(FloatingPointError, match="not finite near t = 1"):
        reverse_sde(VPSDE(), lambda x, t: x * float("nan"), x, t, s, 0.01, 0.01)


@pytest.mark.parametrize("which", ["rtol", "atol"])
def test_the_ode_is_held_to_both_tolerances(which):
    """The error may be atol + rtol |y|: the larger of the two decides how often the network is asked."""
    path = VPSDE()
    (t, s), x, calls = ends(path), noise(path, 16, 2), []

    def denoise(x, t):
        calls[-1] += 1
        return MIXTURE.denoised(x, path, t)

    for tolerances in ({"rtol": 1e-7, "atol": 1e-7}, {"rtol": 1e-7, "atol": 1e-7} | {which: 1e-3}):
        calls.append(0)
        probability_flow(path, denoise, x, t, s, **tolerances)
    assert calls[1] < calls[0] / 2


@pytest.mark.parametrize(
    ("before", "euler", "rtol", "atol", "accepted"),
    [
        (1e4, 0.0, 0.02, 1e-3, True),
        (0.0, 1e4, 0.02, 1e-3, True),
        (0.0, 0.0, 1e-9, 200.0, True),
        (1e4, 1e4, 0.009, 1e-3, False),
        (0.0, 0.0, 1e-9, 90.0, False),
    ],
)
def test_a_step_of_the_sde_is_held_to_the_larger_tolerance(before, euler, rtol, atol, accepted):
    """A single step from `before` whose Euler end is `euler` and whose improved one lies 100 from it is taken where
    100 <= max(atol, rtol max(|euler|, |before|)) (Jolicoeur-Martineau et al. 2021, algorithm 1)."""
    path, t, h, calls = VPSDE(), 0.5, 0.01, 0
    x = torch.full((1, 3), before, dtype=torch.float64)

    def reaching(end, at, time):
        """The denoised sample by which an Euler step from x with the drift at (`at`, time) ends there."""
        zero, one = (path.reverse_drift(at, torch.full_like(at, d), time, eta=1.0) for d in (0.0, 1.0))
        return ((x - end) / h - zero) / (one - zero)

    def denoise(at, time):
        nonlocal calls
        calls += 1
        if calls == 1:
            return reaching(torch.full_like(x, euler), at, time)
        if calls == 2:
            # improved = (x + euler + change) / 2
            return reaching(2 * torch.full_like(x, euler + 100) - euler, at, time)
        raise StopIteration

    arguments = {"rtol": rtol, "atol": atol, "generator": torch.Generator().manual_seed(0), "first_step": h}
    if accepted:
        reached = reverse_sde(path, denoise, x, t, t - h, **arguments)
        assert (reached - euler - 100).abs().max() < 1
        assert calls == 2
    else:
        with pytest.raises(StopIteration):
            reverse_sde(path, denoise, x, t, t - h, **arguments)


def test_rejected_steps_are_divided_by_brownian_bridges():
    """The parts of a rejected step add up to it, also of one rejected among them; each is normal given the whole, with
    the variance length (1 - share) (Rackauckas & Nie 2017, RSwM1). The other sample's steps are its own."""
    steps, generator = BrownianSteps(torch.zeros(2, 3), VPSDE.expand_to), torch.Generator().manual_seed(0)

    def draw(length, other, expected, known=None):
        noise = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        lengths, increments = steps.draw(torch.tensor([length, other], dtype=torch.float64), noise)
        assert lengths.tolist() == pytest.approx([expected, other])
        assert torch.allclose(increments[1], other**0.5 * noise[1])
        if known is None:
            assert torch.allclose(increments[0], expected**0.5 * noise[0])
        else:
            whole, end = known
            share = expected / whole
            assert torch.allclose(increments[0], share * end + (expected * (1 - share)) ** 0.5 * noise[0], atol=1e-7)
        return lengths, increments

    def reject(drawn):
        steps.reject(torch.tensor([True, False]), *drawn)
        return drawn[1][0]

    whole = reject(draw(1.0, 0.2, 1.0))
    part = reject(draw(0.4, 0.3, 0.4, (1.0, whole)))
    first = draw(0.1, 0.1, 0.1, (0.4, part))[1][0]
    second = draw(0.7, 0.2, 0.3, (0.3, part - first))[1][0]
    assert torch.allclose(first + second, part)
    rest = reject(draw(5.0, 0.4, 0.6, (0.6, whole - part)))
    assert torch.allclose(part + rest, whole)
    first = draw(0.5, 0.1, 0.5, (0.6, rest))[1][0]
    draw(0.5, 0.1, 0.1, (0.1, rest - first))
    draw(0.5, 0.1, 0.5)


# --- the pipeline -------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def call(pipeline, **arguments):
    return pipeline(class_labels=[0, 2], generator=torch.Generator().manual_seed(0), output_type="latent", **arguments)


@pytest.mark.parametrize("adaptive_solver", ["ode", "sde"])
def test_the_pipeline_leaves_the_steps_to_the_solver(pipeline, adaptive_solver):
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    pipeline.transformer.register_forward_hook(count)
    arguments = {"adaptive_solver": adaptive_solver, "rtol": 0.02, "atol": 0.02, "guidance_scale": 2.0}
    output = call(pipeline, num_inference_steps=None, **arguments)
    assert output.nfe == calls > 10
    assert torch.isfinite(output.images).all()
    assert torch.equal(call(pipeline, num_inference_steps=None, **arguments).images, output.images)


def test_the_adaptive_ode_agrees_with_many_steps(pipeline):
    pipeline.scheduler = ScoreSDEScheduler.from_config(pipeline.scheduler.config, predictor="rk4")
    fine = call(pipeline, num_inference_steps=200)
    adaptive = call(pipeline, num_inference_steps=None, rtol=1e-5, atol=1e-5)
    assert (fine.images - adaptive.images).abs().max() < 2e-3
    assert fine.nfe == 4 * 199 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": None, "adaptive_solver": "rk"}, "adaptive_solver 'rk' is unknown; choose one of ode"),
        ({"num_inference_steps": None, "rtol": 0.0}, "rtol=0.0 and atol=None must be positive"),
        ({"num_inference_steps": 5, "rtol": 1e-3}, "rtol=0.001, atol=None are for adaptive solvers"),
    ],
)
def test_wrong_arguments_are_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(pipeline, **arguments)


def test_stock_schedulers_are_refused(pipeline):
    from diffusers import DDPMScheduler

    pipeline.scheduler = DDPMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="need a ScoreSDEScheduler, not a DDPMScheduler"):
        call(pipeline, num_inference_steps=None)


def test_without_torchdiffeq_the_ode_says_what_to_install(monkeypatch, pipeline):
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        call(pipeline, num_inference_steps=None)


def test_equal_steps_are_those_of_torchdiffeq():
    odeint = pytest.importorskip("torchdiffeq").odeint

    def derivative(u, state):
        first, second = state
        return torch.sin(3 * u) * first - second, first * second

    state = tuple(torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    begin, end = torch.tensor([0.9, 0.1], dtype=torch.float64)
    stops = torch.linspace(0, 1, 5, dtype=torch.float64) * (end - begin) + begin
    found = in_equal_steps(derivative, state, begin, end, steps=4)
    for each, expected in zip(found, odeint(derivative, state, stops, method="rk4"), strict=True):
        assert (each - expected[-1]).abs().max() < 1e-12
