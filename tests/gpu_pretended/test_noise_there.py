"""The noise mathematics on a pretended CUDA device: what depends on times alone is worked out on the host, and sent as
one tensor, or not at all where it is one number; the host waits for nothing."""

import pytest
import torch
from noise_work import (
    denoiser_call,
    different_times,
    loss,
    of_encoding,
    of_likelihood,
    per_evaluation,
    samples,
    steered_call,
    trajectory,
)
from pretended_cuda import CUDA, PretendedCuda

from score_sde import ScoreSDEScheduler
from score_sde.ema import PowerFunctionEMA
from score_sde.losses import TIME_DENSITIES, WEIGHTINGS
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES
from score_sde.schedulers.solvers import CORRECTORS, PREDICTORS


every_sde_type = pytest.mark.parametrize("sde_type", SDE_TYPES)
SEVERAL = torch.tensor([0.1, 0.2, 0.6, 0.9], dtype=torch.float64)


@pytest.fixture
def cuda():
    with PretendedCuda() as mode:
        yield mode


OBJECTIVES = [("uniform", weighting) for weighting in WEIGHTINGS]
OBJECTIVES += [(density, "output") for density in TIME_DENSITIES] + [("importance", "likelihood")]


def check_loss(before, work, kernels_before=7, kernels=11):
    assert before[0] <= kernels_before and len(work.kernels) <= kernels, work.kernels
    assert len(work.transfers) == 1 and before[1] == 1, work.transfers
    assert work.waits == []


@every_sde_type
@pytest.mark.parametrize(("density", "weighting"), OBJECTIVES)
def test_a_loss_of_every_path_and_objective(cuda, sde_type, density, weighting):
    check_loss(*loss(cuda, ScoreSDEScheduler(sde_type=sde_type), density, weighting))


@pytest.mark.parametrize("sde_type", ["vp", "discrete_vp"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_loss_of_every_prediction(cuda, sde_type, prediction_type):
    check_loss(*loss(cuda, ScoreSDEScheduler(sde_type=sde_type, prediction_type=prediction_type)))


@pytest.mark.parametrize("density", ["levels", "importance"])
def test_the_hybrid_loss(cuda, density):
    scheduler = ScoreSDEScheduler(sde_type="discrete_vp", variance_type="learned_range")
    check_loss(*loss(cuda, scheduler, density, kind="hybrid"), kernels=64)


@every_sde_type
def test_sliced_score_matching(cuda, sde_type):
    # the backward pass of the score belongs to it
    check_loss(*loss(cuda, ScoreSDEScheduler(sde_type=sde_type), kind="sliced"), kernels=50)


@every_sde_type
def test_times_that_are_on_the_device_stay_there(cuda, sde_type):
    """Of somebody's own loop: slower, but no table travels, and nothing waits."""
    scheduler, t = ScoreSDEScheduler(sde_type=sde_type), SEVERAL.to(CUDA)
    for _ in range(2):
        x, timesteps = samples(4, 3, 8, 8), scheduler.timestep(t)
        with cuda.watched() as work:
            scheduler.add_noise(x, x, timesteps)
            scheduler.add_noise(x, x, timesteps[0])
            scheduler.get_velocity(x, x, timesteps)
            scheduler.classifier_input(x, t)
            scheduler.denoiser(lambda x, timesteps: x)(x, t)
    assert work.counts[1:] == (0, 0), work


@every_sde_type
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "edm"])
def test_a_denoiser_sends_nothing_of_one_time(cuda, sde_type, prediction_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type=prediction_type)
    for t in (0.3, torch.full((4,), 0.3)):
        work = denoiser_call(cuda, scheduler, t)
        # the times for the network, its input, and the denoised sample
        assert len(work.kernels) <= 5 and work.counts[1:] == (0, 0), work
    work = denoiser_call(cuda, scheduler, SEVERAL)
    assert len(work.kernels) <= 4 and len(work.transfers) <= 2 and work.waits == [], work


@every_sde_type
def test_what_is_known_of_one_time_is_sent_nowhere(cuda, sde_type):
    path, x = ScoreSDEScheduler(sde_type=sde_type).path, samples(4, 3, 8, 8)
    computations = {
        "sample": lambda t: path.sample(x, x, t),
        "drift": lambda t: path.reverse_drift(x, x, t, eta=1.0),
        "velocity": lambda t: path.straight_velocity(x, x, t),
        "score": lambda t: path.add_to_score(x, x, t),
        "unit": lambda t: path.unit_variance(x, t),
    }
    for compute in computations.values():
        with cuda.watched() as work:
            compute(torch.tensor(0.3, dtype=torch.float64))
        assert len(work.kernels) <= 3 and work.counts[1:] == (0, 0), work
        with cuda.watched() as work:
            compute(SEVERAL)
        assert len(work.kernels) <= 3 and work.counts[1:] == (1, 0), work


@every_sde_type
@pytest.mark.parametrize("prediction_type", ["epsilon", "edm"])
def test_steering_knows_the_times_of_its_trajectory(cuda, sde_type, prediction_type):
    scheduler, seen = ScoreSDEScheduler(sde_type=sde_type, prediction_type=prediction_type), []

    def steer(x, t, denoise):
        seen.append(t)
        return scheduler.path.add_to_score(denoise(x, t), x, t)

    work = steered_call(cuda, scheduler, steer)
    assert len(work.kernels) <= 15 and work.counts[1:] == (0, 0), work
    with cuda.watched() as work:
        assert seen[-1].shape == (4,) and seen[-1].tolist() == [scheduler._planned().stages[1].t_eval] * 4
    assert work.counts == (0, 0, 0)


def test_times_that_are_no_entry_of_the_trajectory_are_their_own(cuda):
    scheduler, seen = ScoreSDEScheduler(), []
    scheduler.set_timesteps(4, CUDA)

    def steer(x, t, denoise):
        seen.append(t)
        return denoise(x, t)

    steered = scheduler.steered(lambda x, timesteps: x, steer)
    given = scheduler.timestep(SEVERAL).to(CUDA)
    for timesteps in (given, given[:1].expand(4), scheduler.timesteps):
        steered(samples(4, 3, 8, 8), timesteps)
        assert seen[-1].tolist() == pytest.approx(scheduler.path_time(timesteps).tolist(), rel=1e-6)


@every_sde_type
def test_a_trajectory_is_sent_once(cuda, sde_type):
    planning, work = trajectory(cuda, ScoreSDEScheduler(sde_type=sde_type, prediction_type="v_prediction"))
    assert planning.counts == (0, 1, 0)
    assert len(work.kernels) <= 10 * 7 and work.counts[1:] == (0, 0), work


@pytest.mark.parametrize("predictor", ["auto", *(name for name, row in PREDICTORS.items() if not row.maps)])
@pytest.mark.parametrize("corrector", [None, *CORRECTORS])
def test_every_predictor_and_corrector(cuda, predictor, corrector):
    if predictor == "none" and corrector is None:
        return
    scheduler = ScoreSDEScheduler(predictor=predictor, corrector=corrector)
    _, work = trajectory(cuda, scheduler)
    # adams combines its last samples and denoised samples; langevin measures norms
    most = 19 if corrector == "langevin" else 10
    assert len(work.kernels) <= len(scheduler.timesteps) * most and work.counts[1:] == (0, 0), work


@pytest.mark.parametrize("options", [{"clip_sample": True}, {"thresholding": True}, {"clip_sample": True, "eta": 0.5}])
def test_clipping_and_thresholding(cuda, options):
    _, work = trajectory(cuda, ScoreSDEScheduler(predictor="ddim", **options))
    assert work.counts[1:] == (0, 0), work


def test_tokens_with_times_of_their_own(cuda):
    scheduler = ScoreSDEScheduler(sde_type="linear", prediction_type="flow_prediction", predictor="euler")
    scheduler.set_timesteps(4, CUDA)
    x, own = samples(2, 6, 3), torch.full((2, 6), 700.0).to(CUDA)
    with cuda.watched() as work:
        for timestep in scheduler.timesteps:
            x = scheduler.step(x, timestep, x, per_token_timesteps=own).prev_sample
    assert len(work.transfers) <= 1 and work.waits == [], work


@pytest.mark.parametrize(("sde_type", "solve"), [*((each, of_likelihood) for each in SDE_TYPES), ("vp", of_encoding)])
def test_an_evaluation_of_the_ode(cuda, sde_type, solve):
    """The coefficients of the chain, too: of all there were 1,500 kernels an evaluation."""
    kernels, transfers, waits = per_evaluation(
        cuda, ScoreSDEScheduler(sde_type=sde_type, prediction_type="sample"), solve
    )
    assert kernels <= 45 and transfers <= 0.2
    assert waits <= (1 if solve is of_likelihood else 6)


def test_averages_of_weights(cuda):
    parameters = [torch.nn.Parameter(samples(3, 2)) for _ in range(4)]
    average = PowerFunctionEMA(parameters, 0.1)
    average.step(parameters)
    with cuda.watched() as work:
        average.step(parameters)
    # foreach: of all weights at once
    assert len(work.kernels) <= 2 and work.counts[1:] == (0, 0), work


def test_the_values_are_those_of_the_cpu(cuda):
    """The bound: coefficients are worked out in float64 in both places, and rounded once."""
    for sde_type in SDE_TYPES:
        path, x = ScoreSDEScheduler(sde_type=sde_type).path, torch.randn(4, 3)
        for t in (torch.tensor(0.3, dtype=torch.float64), SEVERAL):
            for compute in (path.sample, path.reverse_drift, path.straight_velocity):
                found = compute(x.to(CUDA), x.flip(0).to(CUDA), t).cpu()
                expected = compute(x, x.flip(0), t)
                assert (found - expected).abs().max() <= 2**-23 * expected.abs().max()


def test_different_times_are_different():
    assert len(set(different_times().tolist())) == 4
