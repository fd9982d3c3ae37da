"""Schedulers made from a stock config take the stock scheduler's steps: the same network, the same samples."""

import math

import pytest
import torch
from diffusers import schedulers

from score_sde import ScoreSDEScheduler


# of diffusers' own numpy code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LATENTS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SVD = LATENTS | {"timestep_type": "continuous", "prediction_type": "v_prediction", "steps_offset": 1}
SVD_LEVELS = {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0, "timestep_spacing": "leading"}


def network(model_input, timestep):
    """Of what a network receives: its scaled input and its time."""
    return 0.5 * torch.tanh(model_input) + 0.1 * math.cos(float(timestep) / 300)


def noise(seed=0):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def both(name, arguments, **ours):
    stock = getattr(schedulers, name)(**arguments)
    return stock, ScoreSDEScheduler.from_config({"_class_name": name} | stock.config, **ours)


def run(scheduler, n=10, **step):
    """From the scheduler's own noise to its end, as pipelines do."""
    scheduler.set_timesteps(n)
    x = noise() * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **step).prev_sample
    return x


def assert_close(expected, found, tolerance=2e-5):
    assert torch.isfinite(expected).all()
    assert (expected - found).abs().max() < tolerance * expected.abs().max()


TO_NOISE = LATENTS | {"rescale_betas_zero_snr": True}
EULER = "EulerDiscreteScheduler"
SAME = [
    *((EULER, LATENTS | {"timestep_spacing": spacing}) for spacing in ("linspace", "leading", "trailing")),
    (EULER, LATENTS | {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1}),
    (EULER, LATENTS | {"use_beta_sigmas": True}),
    (EULER, LATENTS | {"use_karras_sigmas": True, "interpolation_type": "log_linear"}),
    (EULER, LATENTS | {"use_exponential_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0}),
    (
        EULER,
        LATENTS | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ),
    (EULER, SVD),
    (EULER, SVD | SVD_LEVELS),
    (EULER, SVD | SVD_LEVELS | {"timestep_spacing": "linspace"}),
    *(
        ("EDMEulerScheduler", {"prediction_type": kind, "sigma_schedule": schedule})
        for kind in ("epsilon", "v_prediction")
        for schedule in ("karras", "exponential")
    ),
    ("EDMEulerScheduler", {"sigma_min": 0.01, "sigma_max": 9.0, "sigma_data": 1.3, "rho": 3.0}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 1}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 1, "thresholding": True, "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", LATENTS | {"solver_order": 1}),
    ("DPMSolverSinglestepScheduler", LATENTS | {"solver_order": 1, "thresholding": True}),
    ("CogVideoXDDIMScheduler", {"timestep_spacing": "trailing", "snr_shift_scale": 1.0}),
    ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction"}),
    *(
        (name, TO_NOISE | {"prediction_type": kind, "timestep_spacing": spacing} | more)
        for name, more in (("DDIMScheduler", {"clip_sample": False}), ("CogVideoXDDIMScheduler", {}))
        for kind in ("v_prediction", "sample")
        for spacing in ("trailing", "leading")
    ),
]


@pytest.mark.parametrize(("name", "arguments"), SAME, ids=lambda value: value if isinstance(value, str) else None)
def test_steps_of_first_order_equal_the_stock_ones(name, arguments):
    stock, ours = both(name, arguments, predictor="ddim")
    # Euler's own samples are of the size of its levels, up to 4096, in float32
    large = name == EULER and arguments.get("rescale_betas_zero_snr")
    assert_close(run(stock), run(ours), 1e-4 if large else 2e-5)


def test_a_last_level_without_signal_says_nothing_by_its_noise():
    """Where stock's first step gives nan; a grid that does not reach the level is as good as any."""
    arguments = TO_NOISE | {"prediction_type": "epsilon", "clip_sample": False}
    for spacing in ("trailing", "leading"):
        stock, ours = both("DDIMScheduler", arguments | {"timestep_spacing": spacing}, predictor="ddim")
        if spacing == "trailing":
            assert not torch.isfinite(run(stock)).all()
            assert ours.t_max == 0.999 and torch.isfinite(run(ours)).all()
            with pytest.raises(ValueError, match="prediction_type 'epsilon' says nothing of clean samples at t = 1"):
                ScoreSDEScheduler.from_config(ours.config, t_max=1.0).set_timesteps(5)
        else:
            assert_close(run(stock), run(ours))


def test_a_last_level_without_signal_is_kept_in_the_config():
    ours = both("DDIMScheduler", TO_NOISE)[1]
    assert ours.alphas_cumprod[-1] == 0 and ScoreSDEScheduler.from_config(ours.config).alphas_cumprod[-1] == 0
    again = schedulers.EulerDiscreteScheduler.from_config(ours.config)
    assert again.alphas_cumprod[-1] == 2**-24

    assert ScoreSDEScheduler(sde_type="discrete_vp", rescale_betas_zero_snr=True).alphas_cumprod[-1] > 0


@pytest.mark.parametrize("arguments", [{}, {"sigma_schedule": "karras", "prediction_type": "epsilon"}], ids=str)
def test_stable_audio_has_its_path_and_prediction(arguments):
    pytest.importorskip("torchsde")
    stock, ours = both("CosineDPMSolverMultistepScheduler", arguments)
    ours = ScoreSDEScheduler.from_config(ours.config, predictor="ddim")
    for scheduler in (stock, ours):
        scheduler.set_timesteps(7)
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-6
    assert (stock.sigmas[:7] / ours.sigmas[:7] - 1).abs().max() < 1e-5
    assert stock.init_noise_sigma == pytest.approx(ours.init_noise_sigma)
    x, timestep = noise() * stock.init_noise_sigma, ours.timesteps[0]
    assert_close(stock.scale_model_input(x, stock.timesteps[0]), ours.scale_model_input(x, timestep))
    expected = stock.convert_model_output(noise(1), sample=x)
    assert_close(expected, ours.step(noise(1), timestep, x).pred_original_sample)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "limit", [{"clip_sample_range": 0.5}, {"thresholding": True, "dynamic_thresholding_ratio": 0.9}], ids=str
)
@pytest.mark.parametrize("redone", [False, True])
def test_clipped_samples_are_those_of_ddim(limit, kind, eta, redone):
    """By default its noise stays as the network had it; `use_clipped_model_output` works it out anew."""
    stock, ours = both("DDIMScheduler", {"prediction_type": kind} | limit, predictor="ddim", eta=eta)
    assert ours.config.use_clipped_model_output is False
    if redone:
        ours = ScoreSDEScheduler.from_config(ours.config, use_clipped_model_output=True)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = run(stock, eta=eta, use_clipped_model_output=redone, generator=generators[0])
    assert_close(expected, run(ours, generator=generators[1]))


def test_the_two_ways_to_clip_differ():
    _, ours = both("DDIMScheduler", {"clip_sample_range": 0.5}, predictor="ddim")
    redone = ScoreSDEScheduler.from_config(ours.config, use_clipped_model_output=True)
    never = ScoreSDEScheduler.from_config(ours.config, use_clipped_model_output=None)
    plain = ScoreSDEScheduler.from_config(ours.config, clip_sample=False)
    assert (run(ours) - run(redone)).abs().max() > 1e-3
    assert torch.equal(run(never), run(plain))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"clip_sample": False}, {"clip_sample": False, "thresholding": True}, {"variance_type": "fixed_large"}],
    ids=str,
)
def test_ddpm_takes_the_stock_steps(arguments):
    stock, ours = both("DDPMScheduler", arguments, predictor="ancestral")
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert_close(run(stock, generator=generators[0]), run(ours, generator=generators[1]))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"prediction_type": "sample"}, {"variance_type": "learned_range", "clip_sample_range": 2.0}],
    ids=str,
)
def test_unclip_takes_the_stock_steps(arguments):
    stock, ours = both("UnCLIPScheduler", arguments, predictor="ancestral")
    ends = []
    for scheduler in (stock, ours):
        generator, x = torch.Generator().manual_seed(1), noise()
        scheduler.set_timesteps(6)
        times = scheduler.timesteps.tolist()
        for timestep, after in zip(times, [*times[1:], -1], strict=True):
            output = network(x, timestep)
            if "variance_type" in arguments:
                output = torch.cat([output, -output], dim=1)
            after = {"prev_timestep": after} if scheduler is stock else {}
            x = scheduler.step(output, timestep, x, generator=generator, **after).prev_sample
        ends.append(x)
    # theirs has 1 - beta in float32, which is 0 at the first step and inexact at the last
    assert_close(*ends, tolerance=2e-3)


@pytest.mark.parametrize("arguments", [{}, {"scaler": 2.0}, {"s": 0.02}], ids=str)
def test_wuerstchen_takes_the_stock_steps(arguments):
    stock, ours = both("DDPMWuerstchenScheduler", arguments, predictor="ancestral")
    # on the levels of the path, which is a curve through 1,000 of the stock one's
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    # both hold the end, too, which their pipelines leave out, and pass
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-6
    ours.set_timesteps(timesteps=ours.timesteps)
    assert ours.nfe == 10 and (stock.timesteps - ours.timesteps).abs().max() < 1e-6
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    ends, x0 = [noise(), noise()], noise(3)
    for timestep, own in zip(stock.timesteps[:-1], ours.timesteps[:-1], strict=True):
        times = timestep.expand(2)
        assert_close(stock.add_noise(x0, noise(4), times), ours.add_noise(x0, noise(4), own))
        ends[0] = stock.step(network(ends[0], timestep), times, ends[0], generator=generators[0]).prev_sample
        ends[1] = ours.step(network(ends[1], timestep), own, ends[1], generator=generators[1]).prev_sample
        if timestep > 0.15:
            assert_close(*ends)
    # whose last level is 0.9999 of the variance, not clean data
    assert_close(*ends, tolerance=2e-3)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("DDPMScheduler", "sigmoid"), ("DDPMScheduler", "laplace"), ("HeunDiscreteScheduler", "exp")],
)
def test_beta_schedules_are_the_stock_ones(name, schedule):
    stock, ours = both(name, {"beta_schedule": schedule, "beta_start": 2e-4, "beta_end": 0.01})
    assert (stock.betas - ours.betas).abs().max() < 1e-7
    assert ours.config.beta_schedule == schedule


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("HeunDiscreteScheduler", LATENTS | {"clip_sample": True, "prediction_type": "sample"}),
        ("HeunDiscreteScheduler", LATENTS | {"use_karras_sigmas": True}),
    ],
    ids=["clipped", "karras"],
)
def test_heun_takes_the_stock_steps(name, arguments):
    stock, ours = both(name, arguments, predictor="ddim")
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    assert float(stock.init_noise_sigma) * float(ours.path.alpha(1.0)) == pytest.approx(ours.init_noise_sigma, rel=1e-5)
    # both in the coordinates of the data; the first half of their step is Euler's
    timestep = stock.timesteps[0]
    x = noise() * float(stock.init_noise_sigma)
    mine = noise() * float(ours.init_noise_sigma)
    inputs = stock.scale_model_input(x, timestep), ours.scale_model_input(mine, timestep)
    assert_close(*inputs)
    output = network(inputs[0], timestep)
    expected = stock.step(output, timestep, x).prev_sample
    found = ours.step(output, ours.timesteps[0], mine).prev_sample
    alpha = float(ours.path.alpha(ours.path_time(ours.timesteps[1].double())))
    assert_close(expected * alpha, found)
