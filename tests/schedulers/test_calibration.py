"""Times fitted to a model: they lower its error, and travel with the scheduler."""

import math

import pytest
import torch
from exact import MIXTURE

from score_sde import ScoreSDEScheduler
from score_sde.schedulers.calibration import Search, Trajectory
from score_sde.schedulers.timetables import grid


def sample(scheduler, steps, noise):
    network = MIXTURE.network(scheduler)
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep.double()), timestep, x).prev_sample
    return x


def draw(n, seed):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def calibrated(nfe, **arguments):
    scheduler = ScoreSDEScheduler(**arguments)
    perfect = MIXTURE.network(scheduler)
    errors = scheduler.calibrate(lambda x, timesteps: perfect(x, timesteps[0].double()), nfe, noise=draw(32, 1))
    return scheduler, errors


@pytest.mark.parametrize("sde_type", ["vp", "linear"])
def test_fitted_times_err_less_on_other_noise(sde_type):
    plain = ScoreSDEScheduler(sde_type=sde_type)
    fitted, errors = calibrated([5, 8], sde_type=sde_type)
    noise = draw(256, 2)
    exact = sample(plain, 400, noise)
    for nfe in (5, 8):
        before, after = ((sample(each, nfe, noise) - exact).norm(dim=1).median() for each in (plain, fitted))
        assert after < 0.8 * before
        assert errors[nfe][1] < errors[nfe][0]
        assert fitted.nfe == nfe
    # other numbers of steps are as before
    fitted.set_timesteps(6)
    plain.set_timesteps(6)
    assert torch.equal(fitted.timesteps, plain.timesteps)


def test_the_score_is_as_documented():
    """Half the logarithm of the geometric mean, and half that of the root mean square, of the samples' distances."""
    target = torch.zeros(3, 2, 2, dtype=torch.float64)
    distances = torch.tensor([0.5, 1.0, 8.0], dtype=torch.float64)
    search = Search(ScoreSDEScheduler(), 5)
    search.target = target
    mean, root = distances.log().mean().exp(), distances.pow(2).mean().sqrt()
    assert search.error(target + distances[:, None, None]) == pytest.approx(float((mean.log() + root.log()) / 2))
    assert search.error(target + math.nan) == math.inf
    # and what `calibrate` returns is the root of their product
    scheduler = ScoreSDEScheduler()
    network = MIXTURE.network(scheduler)
    noise = draw(8, 1)
    plain, reference = sample(scheduler, 5, noise), sample(scheduler, 100, noise)
    found = scheduler.calibrate(lambda x, timesteps: network(x, timesteps[0].double()), 5, noise=noise, sweeps=1)
    distances = (plain - reference).pow(2).mean(1).sqrt()
    expected = (distances.log().mean().exp() * distances.pow(2).mean().sqrt()).sqrt()
    assert found[5][0] == pytest.approx(float(expected), rel=1e-3)


def answered(requests, denoise):
    """What these requests for evaluations end in, and the times that they asked for."""
    asked, denoised = [], None
    while True:
        try:
            x, t = requests.send(denoised)
        except StopIteration as end:
            return end.value, asked
        asked.append(t)
        denoised = denoise(x, t)


def test_fitting_runs_only_what_changed():
    """A trajectory that shares its beginning with a known one takes that from there, and is the same."""
    scheduler = ScoreSDEScheduler()
    noise = draw(4, 1)

    def denoise(x, t):
        return MIXTURE.denoised(x, scheduler.path, torch.tensor(t, dtype=torch.float64))

    search = Search(scheduler, 6)
    search.target = torch.zeros_like(noise)
    times = grid(scheduler, 6, scheduler.t_max)
    nothing = Trajectory(times[:0], [], [noise], [])
    for predictor in ("adams_2", "dpmpp_3b"):
        first, asked = answered(search.run(times, predictor, nothing), denoise)
        assert asked == times.tolist()
        assert answered(search.run(times, predictor, first), denoise) == (first, [])
        for changed in range(1, 6):
            later = times.clone()
            later[changed] = (times[changed] + times[changed - 1]) / 2
            found, asked = answered(search.run(later, predictor, first), denoise)
            # the sample before the changed time is the same, and so is what the network makes of it
            assert asked == later[changed:].tolist()
            again, _ = answered(search.run(later, predictor, nothing), denoise)
            assert (found.samples[-1] - again.samples[-1]).abs().max() < 1e-12
            assert found.score == pytest.approx(again.score)


def test_the_cost_is_as_documented():
    scheduler, calls = ScoreSDEScheduler(), []
    perfect = MIXTURE.network(scheduler)

    def network(x, timesteps):
        calls.append(float(timesteps[0]))
        return perfect(x, timesteps[0].double())

    scheduler.calibrate(network, 8, noise=draw(8, 1), reference_steps=50, sweeps=2)
    *_, made_with = scheduler.config.calibration["8"]
    # some fifty beginnings, the first of which is auto
    starts = Search(scheduler, 8).starts
    assert torch.equal(starts[0][0], grid(scheduler, 8, scheduler.t_max)) and 50 < len(starts) < 55
    assert len(calls) == made_with["evaluations"] == 50 + len(starts) * 7 + 2 * 8 * 7
    # all trajectories begin with the same evaluation
    assert sum(timestep == 1000 for timestep in calls) == 1


def test_two_times_of_a_path_that_begins_in_noise_alone_are_fitted():
    """The one that can move has an infinite way to the first."""
    scheduler, errors = calibrated(2, sde_type="linear", prediction_type="flow_prediction")
    assert scheduler.path.half_log_snr(scheduler.t_max) == -math.inf
    assert errors[2][1] < errors[2][0]


def test_a_search_that_ends_early_leaves_a_full_bar(capsys):
    scheduler = ScoreSDEScheduler()
    perfect = MIXTURE.network(scheduler)
    most = Search(scheduler, 2, sweeps=50).cost
    scheduler.calibrate(lambda x, timesteps: perfect(x, timesteps[0].double()), 2, noise=draw(32, 1), sweeps=50)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in last and f"/{most}" not in last


def test_fitted_times_move_with_the_shift():
    """As the grids do: on the straight path by shift sigma / (1 + (shift - 1) sigma)."""
    scheduler, _ = calibrated(5, sde_type="linear", shift=2.0)
    times = torch.tensor(scheduler.config.calibration["5"][1], dtype=torch.float64)
    assert scheduler.config.calibration["5"][2]["shift"] == 2.0
    scheduler.set_timesteps(5)
    assert (scheduler.timesteps - 1000 * times).abs().max() < 1e-3
    scheduler.set_shift(6.0)
    scheduler.set_timesteps(5)
    # all begin at the largest
    assert (scheduler.timesteps - 3000 * times / (1 + 2 * times))[1:].abs().max() < 1e-3
    assert scheduler.timesteps[0] == 999
    # without a record they stay
    plain = ScoreSDEScheduler(sde_type="linear", calibration={"5": scheduler.config.calibration["5"][:2]}, shift=6.0)
    plain.set_timesteps(5)
    assert (plain.timesteps - 1000 * times).abs().max() < 1e-3


def test_fitted_times_travel_with_the_scheduler(tmp_path):
    scheduler, _ = calibrated(5)
    scheduler.save_pretrained(tmp_path)
    loaded = ScoreSDEScheduler.from_pretrained(tmp_path)
    noise = draw(4, 3)
    assert torch.equal(sample(loaded, 5, noise), sample(scheduler, 5, noise))
    assert not torch.equal(sample(loaded, 5, noise), sample(ScoreSDEScheduler(), 5, noise))
    # they belong to the automatic choice alone
    other = ScoreSDEScheduler.from_config(loaded.config, predictor="ddim")
    other.set_timesteps(5)
    assert other.timesteps[1] == pytest.approx(750, rel=0.01)


def test_more_numbers_are_added_to_those_there():
    scheduler, _ = calibrated(4)
    first = scheduler.config.calibration["4"]
    perfect = MIXTURE.network(scheduler)
    scheduler.calibrate(lambda x, timesteps: perfect(x, timesteps[0].double()), 6, noise=draw(8, 1), sweeps=1)
    assert scheduler.config.calibration["4"] == first
    assert "6" in scheduler.config.calibration


@pytest.mark.parametrize(
    ("arguments", "nfe", "message"),
    [
        ({"predictor": "heun"}, 5, "fitted for predictor 'auto'.*predictor='heun'"),
        ({"corrector": "langevin"}, 5, "corrector='langevin'"),
        ({"denoise_final": False}, 5, "denoise_final=False"),
        ({}, 1, "nfe 1 must be a whole number from 2 to 99"),
        ({}, [5, 100], "nfe 100 must be a whole number from 2 to 99"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, nfe, message):
    with pytest.raises(ValueError, match=message):
        calibrated(nfe, **arguments)


def test_a_model_without_noise_or_with_nan_is_refused():
    scheduler = ScoreSDEScheduler()
    with pytest.raises(ValueError, match="needs noise"):
        scheduler.calibrate(lambda x, timesteps: x, 5)
    with pytest.raises(ValueError, match="not finite on the reference trajectory"):
        scheduler.calibrate(lambda x, timesteps: x * float("nan"), 5, noise=draw(2, 0))
    assert scheduler.config.calibration is None


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"2": ["adams_2", [0.5, 0.9]]}, "calibration '2' must hold as many times, falling"),
        ({"3": ["adams_2", [0.9, 0.5]]}, "calibration '3' must hold as many times"),
        ({"2": ["adams_2", [0.9, 0.5], 3.0]}, "calibration '2' must say in a dictionary"),
        ({"2": ["adams_2", [0.9, 0.5], {"shift": 0}]}, "shift of calibration '2' 0 must be a number from 0.001"),
        ({"2": ["adams", [0.9, 0.5]]}, "predictor of calibration '2' 'adams' is unknown"),
    ],
)
def test_a_damaged_calibration_is_refused(calibration, message):
    with pytest.raises(ValueError, match=message):
        ScoreSDEScheduler(calibration=calibration)
