"""ScoreSDEScheduler: stock schedulers step for step, configs, stock pipelines, every combination, every refusal."""

import copy
import inspect
import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from every_path import SCHEDULES
from exact import GAUSSIAN, TOLERANCE
from torch.utils._python_dispatch import TorchDispatchMode

from score_sde import ScoreSDEScheduler
from score_sde.schedulers.checks import FLAGS, NUMBERS
from score_sde.schedulers.paths import PREDICTIONS, SDE_TYPES, TIME_GRIDS, time_grid
from score_sde.schedulers.solvers import CORRECTORS, PREDICTORS, Option, Predictor, automatic, euler


def network(x, timestep):
    """Some smooth function in place of a network."""
    weights = torch.linspace(-0.4, 0.5, 9, dtype=x.dtype).reshape(3, 3)
    return torch.einsum("ij,bjhw->bihw", weights, torch.tanh(x)) * (1 + float(timestep) / 1000)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(scheduler, steps, x, generator=None, function=network):
    """Run a trajectory as pipelines do; return the end and every state on the way."""
    scheduler.set_timesteps(steps)
    states = []
    arguments = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        output = function(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **arguments).prev_sample
        states.append(x)
    return states


def difference(states, others):
    """max |a - b| relative to the size of the states, at least 1, which with the noise of fixed_large reach 500."""
    assert len(states) == len(others)
    return max(relative(a, b) for a, b in zip(states, others, strict=True))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1)).item()


# --- stock schedulers, step for step ------------------------------------------------------------------------------

PREDICTED = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize(("schedule", "prediction_type"), [*zip(SCHEDULES, PREDICTED, strict=True)])
def test_ddim_equals_diffusers(schedule, prediction_type):
    stock = diffusers.DDIMScheduler(beta_schedule=schedule, clip_sample=False, prediction_type=prediction_type)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="ddim")
    x = noise(2, 3, 4, 4)
    assert difference(run(stock, 20, x), run(ours, 20, x)) < TOLERANCE
    assert torch.equal(stock.timesteps, ours.timesteps)


@pytest.mark.parametrize("clip_sample", [False, True])
def test_ancestral_equals_ddpm_with_the_same_noise(clip_sample):
    stock = diffusers.DDPMScheduler(clip_sample=clip_sample)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="ancestral")
    x = noise(2, 3, 4, 4, dtype=torch.float32)
    states = [run(each, 25, x, torch.Generator().manual_seed(1)) for each in (stock, ours)]
    assert difference(*states) < TOLERANCE


def test_ddim_with_noise_equals_diffusers():
    stock = diffusers.DDIMScheduler(clip_sample=False)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="ddim", eta=0.6)
    x = noise(2, 3, 4, 4, dtype=torch.float32)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    stock.set_timesteps(20)
    mine, states = run(ours, 20, x, generators[0]), []
    for timestep in stock.timesteps:
        x = stock.step(network(x, timestep), timestep, x, eta=0.6, generator=generators[1]).prev_sample
        states.append(x)
    assert difference(mine, states) < TOLERANCE


# not squaredcos_cap_v2 with epsilon: 1 / alpha is 20,000 at its first level, so diffusers' float32 levels decide
@pytest.mark.parametrize(("schedule", "prediction_type"), [*zip(SCHEDULES, PREDICTED, strict=True)])
def test_dpm_solver_equals_diffusers(schedule, prediction_type):
    stock = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=schedule, timestep_spacing="trailing", prediction_type=prediction_type
    )
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="dpmpp_2m")
    x = noise(2, 3, 4, 4)
    assert difference(run(stock, 20, x), run(ours, 20, x)) < TOLERANCE
    assert torch.equal(stock.timesteps, ours.timesteps)


@pytest.mark.parametrize(
    ("order", "prediction_type", "spacing"),
    [(1, "epsilon", "leading"), (2, "epsilon", "linspace"), (3, "epsilon", "trailing"), (3, "v_prediction", "leading")],
)
def test_unipc_equals_diffusers(order, prediction_type, spacing):
    stock = diffusers.UniPCMultistepScheduler(
        solver_order=order, prediction_type=prediction_type, timestep_spacing=spacing, steps_offset=1
    )
    ours = ScoreSDEScheduler.from_config(stock.config, predictor=f"unipc_{order}")
    x = noise(2, 3, 4, 4)
    for steps in (5, 20):
        assert difference(run(stock, steps, x), run(ours, steps, x)) < TOLERANCE
        assert torch.equal(stock.timesteps, ours.timesteps)


def test_sde_dpm_solver_equals_diffusers_with_the_same_noise():
    stock = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", timestep_spacing="trailing")
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="dpmpp_2m", eta=1.0)
    x = noise(2, 3, 4, 4, dtype=torch.float32)
    states = [run(each, 15, x, torch.Generator().manual_seed(2)) for each in (stock, ours)]
    assert difference(*states) < TOLERANCE


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_every_variance_of_ddpm_equals_diffusers(variance_type):
    stock = diffusers.DDPMScheduler(clip_sample=False, variance_type=variance_type)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="ancestral")
    assert ours.config.variance_type == variance_type

    def learned(x, timestep):
        output = network(x, timestep)
        return torch.cat([output, torch.sin(x)], dim=1) if variance_type == "learned_range" else output

    x = noise(2, 3, 4, 4, dtype=torch.float32)
    states = [run(each, 25, x, torch.Generator().manual_seed(1), learned) for each in (stock, ours)]
    assert difference(*states) < TOLERANCE


def test_the_whole_chain_of_ddpm_equals_diffusers():
    stock = diffusers.DDPMScheduler()
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="ancestral")
    x = noise(1, 3, 2, 2, dtype=torch.float32)
    ends = [run(each, 1000, x, torch.Generator().manual_seed(1))[-1] for each in (stock, ours)]
    assert relative(*ends) < TOLERANCE


def test_a_learned_variance_needs_its_channels():
    scheduler = ScoreSDEScheduler(predictor="ancestral", variance_type="learned_range")
    scheduler.set_timesteps(3)
    x = noise(2, 3, 4, 4)
    with pytest.raises(ValueError, match="needs a network with 6 output channels; got 3"):
        scheduler.step(x, scheduler.timesteps[0], x)


# not squaredcos_cap_v2 with Heun, whose first step from sigma = 20,000 multiplies the rounding of float32 levels
@pytest.mark.parametrize(
    ("schedule", "stock_class", "predictor"),
    [
        ("linear", diffusers.HeunDiscreteScheduler, "heun"),
        ("scaled_linear", diffusers.HeunDiscreteScheduler, "heun"),
        ("squaredcos_cap_v2", diffusers.EulerDiscreteScheduler, "ddim"),
    ],
)
def test_heun_and_euler_equal_diffusers(schedule, stock_class, predictor):
    """Stock Heun and Euler carry x / alpha: compared as x_t. 28 steps of linspace fall on whole levels."""
    stock = stock_class(beta_schedule=schedule, prediction_type="v_prediction")
    ours = ScoreSDEScheduler.from_config(stock.config, predictor=predictor)
    stock.set_timesteps(28)
    ours.set_timesteps(28)
    assert (stock.timesteps.double() - ours.timesteps.double()).abs().max() < 1e-3
    # stock.sigmas belong to the states between the calls; the last one is 0
    scales = (1 + stock.sigmas.double() ** 2) ** -0.5
    scaled, x = noise(2, 3, 4, 4) / scales[0], noise(2, 3, 4, 4)
    worst = 0.0
    for i, (theirs, mine) in enumerate(zip(stock.timesteps, ours.timesteps, strict=True)):
        scaled = stock.step(network(stock.scale_model_input(scaled, theirs), theirs), theirs, scaled).prev_sample
        x = ours.step(network(x, mine), mine, x).prev_sample
        worst = max(worst, relative(scaled * scales[i + 1], x))
    assert worst < TOLERANCE


def test_euler_on_the_linear_path_is_flow_matching():
    stock = diffusers.FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(10)
    ours = ScoreSDEScheduler(sde_type="linear", prediction_type="flow_prediction", predictor="euler")
    ours.set_timesteps(timesteps=stock.timesteps)
    x = y = noise(2, 3, 4, 4)
    for timestep in stock.timesteps:
        x = stock.step(network(x, timestep), timestep, x).prev_sample
        y = ours.step(network(y, timestep), timestep, y).prev_sample
        assert relative(x, y) < 1e-4


def test_euler_on_the_edm_path_is_edm():
    stock = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    ours = ScoreSDEScheduler(
        sde_type="edm", prediction_type="edm", predictor="euler", timestep_spacing="karras", time_scale=0.25
    )
    x = 80 * noise(2, 3, 4, 4)
    assert difference(run(stock, 18, x), run(ours, 18, x)) < 1e-4
    # c_noise = log(sigma) / 4
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-5


# --- the samplers of the original papers, written as there --------------------------------------------------------


def test_ncsn_is_annealed_langevin_alone():
    """Song & Ermon 2019, algorithm 1: alpha_i = epsilon sigma_i^2 / sigma_L^2, T steps at each of L levels; and the
    final denoising of Jolicoeur-Martineau et al. 2020."""
    levels, steps, epsilon, sigma_min = 10, 5, 2e-5, 0.01
    scheduler = ScoreSDEScheduler(
        sde_type="ve",
        sigma_min=sigma_min,
        sigma_max=1.0,
        prediction_type="score",
        predictor="none",
        corrector="annealed_langevin",
        corrector_steps=steps,
        corrector_snr=epsilon**0.5 / (2 * sigma_min),
        corrector_position="before",
        timestep_spacing="log_snr",
    )
    x = noise(8, 4)
    ours = run(scheduler, levels, x, torch.Generator().manual_seed(0), GAUSSIAN.network(scheduler))[-1]
    assert scheduler.nfe == levels * steps + 1

    def score(x, sigma):
        return (GAUSSIAN.means - x) / (GAUSSIAN.variances + sigma**2)

    generator = torch.Generator().manual_seed(0)
    for sigma in torch.logspace(0, -2, levels, dtype=torch.float64):
        alpha = epsilon * sigma**2 / sigma_min**2
        for _ in range(steps):
            z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = x + alpha / 2 * score(x, sigma) + alpha.sqrt() * z
    x = x + sigma_min**2 * score(x, sigma_min)
    assert relative(ours, x) < 1e-4


def test_the_predictor_corrector_sampler_of_score_sde():
    """Song et al. 2021, algorithm 2 with their settings for VE: reverse diffusion after one Langevin step, r = 0.16."""
    n, snr = 30, 0.16
    scheduler = ScoreSDEScheduler(
        sde_type="ve",
        prediction_type="score",
        predictor="reverse_diffusion",
        corrector="langevin",
        corrector_snr=snr,
        corrector_position="before",
    )
    x = scheduler.init_noise_sigma * noise(8, 4)
    ours = run(scheduler, n, x, torch.Generator().manual_seed(0), GAUSSIAN.network(scheduler))[-1]
    assert scheduler.nfe == 2 * n

    def score(x, sigma):
        return (GAUSSIAN.means - x) / (GAUSSIAN.variances + sigma**2)

    generator = torch.Generator().manual_seed(0)
    sigmas = 0.01 * 5000 ** torch.linspace(1, 1e-5, n, dtype=torch.float64)
    for i, sigma in enumerate(sigmas):
        z, gradient = torch.randn(x.shape, generator=generator, dtype=torch.float64), score(x, sigma)
        step = 2 * (snr * z.norm(dim=1, keepdim=True) / gradient.norm(dim=1, keepdim=True)) ** 2
        x = x + step * gradient + (2 * step).sqrt() * z
        if i + 1 < n:
            variance = sigma**2 - sigmas[i + 1] ** 2
            z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = x + variance * score(x, sigma) + variance.sqrt() * z
    x = x + sigmas[-1] ** 2 * score(x, sigmas[-1])
    # our networks receive float32 timesteps
    assert relative(ours, x) < 1e-3


# --- configs ------------------------------------------------------------------------------------------------------

STOCK = [
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="sample"
    ),
    diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
    diffusers.DPMSolverMultistepScheduler(num_train_timesteps=500),
    diffusers.DDPMScheduler(trained_betas=[0.01 * (i + 1) for i in range(20)], num_train_timesteps=20),
    diffusers.UniPCMultistepScheduler(),
]


@pytest.mark.parametrize("stock", STOCK, ids=lambda stock: type(stock).__name__)
@pytest.mark.parametrize("saved", [False, True])
def test_from_config_gives_the_stock_path(stock, saved, tmp_path):
    config = stock.config
    if saved:
        stock.save_pretrained(tmp_path)
        config = type(stock).load_config(tmp_path)
    ours = ScoreSDEScheduler.from_config(config)
    levels = torch.arange(len(ours))
    alpha2 = ours.path.alpha(ours.path_time(levels)) ** 2
    assert (alpha2 - stock.alphas_cumprod.double()).abs().max() < 1e-6
    assert ours.config.prediction_type == stock.config.prediction_type
    assert ours.config.timestep_spacing == stock.config.timestep_spacing
    assert ours.config.clip_sample == stock.config.get("clip_sample", False)


def test_from_config_of_score_sde_ve():
    stock = diffusers.ScoreSdeVeScheduler(num_train_timesteps=2000, sigma_min=0.01, sigma_max=1348)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="reverse_diffusion", corrector="langevin")
    ours.set_timesteps(2000)
    # the network of ScoreSdeVePipeline receives sigma
    assert (ours.timesteps[::2] / stock.sigmas.to(ours.timesteps) - 1).abs().max() < 1e-3
    assert ours.config.prediction_type == "score"
    assert ours.init_noise_sigma == pytest.approx(1348)


def test_the_way_back_to_a_stock_scheduler():
    stock = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_large")
    back = diffusers.DDPMScheduler.from_config(ScoreSDEScheduler.from_config(stock.config).config)
    assert torch.equal(back.alphas_cumprod, stock.alphas_cumprod)
    assert back.config.variance_type == "fixed_large"


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_config_round_trip(sde_type, tmp_path):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, predictor="heun", t_min=0.01, corrector="langevin")
    scheduler.save_pretrained(tmp_path)
    loaded = ScoreSDEScheduler.from_pretrained(tmp_path)
    for each in (loaded, ScoreSDEScheduler.from_config(scheduler.config), copy.deepcopy(scheduler)):
        each.set_timesteps(9)
        scheduler.set_timesteps(9)
        assert torch.equal(each.timesteps, scheduler.timesteps)
        assert (each.t_min, each.t_max) == (0.01, scheduler.t_max)
        assert each.config.time_scale == scheduler.config.time_scale


def test_the_predictor_is_free_to_choose():
    trained = ScoreSDEScheduler(sde_type="cosine_vp", prediction_type="v_prediction")
    other = ScoreSDEScheduler.from_config(trained.config, predictor="euler_maruyama", eta=0.5)
    assert (other.config.sde_type, other.config.prediction_type) == ("cosine_vp", "v_prediction")
    # alpha(1) = 0: the deterministic solver starts there, the reverse SDE just before
    assert (trained.t_max, other.t_max) == (1.0, 0.999)


# --- every combination --------------------------------------------------------------------------------------------

ALL_PREDICTORS = ["auto", *(name for name, row in PREDICTORS.items() if not row.maps)]


def correctors(predictor):
    return CORRECTORS if predictor == "none" else (None, *CORRECTORS)


def assert_runs(steps, **arguments):
    """A trajectory on the exact score is finite and calls the network as often as it says."""
    scheduler = ScoreSDEScheduler(**arguments)
    perfect, calls = GAUSSIAN.network(scheduler), []

    def count(x, timestep):
        calls.append(timestep)
        return perfect(x, timestep.double())

    x = scheduler.init_noise_sigma * noise(16, 4)
    x = run(scheduler, steps, x, torch.Generator().manual_seed(0), count)[-1]
    assert torch.isfinite(x).all()
    assert len(calls) == scheduler.nfe == len(scheduler.timesteps)
    assert scheduler.num_inference_steps == steps


@pytest.mark.parametrize("predictor", ALL_PREDICTORS)
def test_every_predictor_runs_on_every_path(predictor):
    """Whatever else there is to choose takes its turn."""
    turn = ALL_PREDICTORS.index(predictor)
    for i, sde_type in enumerate(SDE_TYPES, start=turn):
        choices = list(correctors(predictor))
        assert_runs(
            6,
            sde_type=sde_type,
            predictor=predictor,
            prediction_type=list(PREDICTIONS)[i % len(PREDICTIONS)],
            corrector=choices[i % len(choices)],
            corrector_position=("after", "before")[i // 3 % 2],
            corrector_snr=0.1,
            timestep_spacing=list(TIME_GRIDS)[i % len(TIME_GRIDS)],
            denoise_final=bool(i % 2),
        )


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_every_prediction_and_every_grid_runs_on_every_path(sde_type):
    for prediction_type in PREDICTIONS:
        for predictor in ("auto", "euler_maruyama"):
            assert_runs(6, sde_type=sde_type, prediction_type=prediction_type, predictor=predictor)
    for spacing in TIME_GRIDS:
        for denoise_final in (True, False):
            given = {"timestep_spacing": spacing, "denoise_final": denoise_final, "prediction_type": "sample"}
            assert_runs(7, sde_type=sde_type, predictor="ddim", **given)


@pytest.mark.parametrize(
    ("sde_type", "convention"),
    [
        ("ve", {"time_input": "sigma"}),
        ("ve", {"time_input": "log_sigma", "time_scale": 1.0}),
        ("vp", {"time_scale": 999.0}),
        ("discrete_vp", {}),
        ("linear", {"time_scale": 1.0}),
        ("edm", {"time_scale": 0.25}),
    ],
)
@pytest.mark.parametrize("predictor", ["auto", "heun"])
def test_networks_are_told_the_time_their_way(sde_type, convention, predictor):
    """However the network counts time, the samples are the same."""
    ends = []
    for chosen in ({}, convention):
        scheduler = ScoreSDEScheduler(sde_type=sde_type, predictor=predictor, timestep_spacing="log_snr", **chosen)
        x = scheduler.init_noise_sigma * noise(4, 4)
        perfect = GAUSSIAN.network(scheduler)
        x = run(scheduler, 6, x, torch.Generator().manual_seed(0), lambda x, t, f=perfect: f(x, t.double()))[-1]
        ends.append(x)
    # the timesteps are float32
    assert (ends[0] - ends[1]).abs().max() < 2e-2 * ends[0].abs().max()


# a solver of each kind on every path, every solver on one
MOMENTS = {("vp", name) for name in ALL_PREDICTORS if name != "none"}
MOMENTS |= {(path, name) for path in SDE_TYPES for name in ("auto", "ancestral", "euler_maruyama")}


@pytest.mark.parametrize(("sde_type", "predictor"), sorted(MOMENTS))
def test_samples_have_the_moments_of_the_data(sde_type, predictor):
    scheduler = ScoreSDEScheduler(
        sde_type=sde_type,
        predictor=predictor,
        timestep_spacing="karras" if sde_type == "edm" else "linspace",
        prediction_type="sample",
    )
    x = scheduler.init_noise_sigma * noise(4000, 4)
    x = run(scheduler, 200, x, torch.Generator().manual_seed(0), GAUSSIAN.network(scheduler))[-1]
    std = GAUSSIAN.variances[0].sqrt()
    # the largest standard deviation is 2 and the discretisation is first order
    assert ((x.mean(0) - GAUSSIAN.means[0]).abs() < 0.1 * std.max()).all()
    assert ((x.std(0) - std).abs() < 0.1 * std + 0.03).all()


# --- the interface ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_sample_is_kept(dtype):
    scheduler = ScoreSDEScheduler(predictor="ancestral", corrector="langevin")
    states = run(scheduler, 4, noise(2, 3, 4, 4, dtype=torch.float32).to(dtype))
    assert all(state.dtype == dtype and torch.isfinite(state).all() for state in states)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 16), (2, 3, 4, 4), (1, 3, 2, 4, 4)])
def test_states_of_any_shape(shape):
    scheduler = ScoreSDEScheduler(predictor="ancestral", corrector="langevin")
    assert run(scheduler, 3, noise(*shape), function=lambda x, timestep: 0.1 * x)[-1].shape == shape


@pytest.mark.parametrize("predictor", ["adams_3", "rising_2", "heun", "unipc_3"])
def test_a_sample_may_be_overwritten_by_what_comes_next(predictor):
    """As Kandinsky 5's pipeline does: what later steps need of it stays."""
    scheduler = ScoreSDEScheduler(sde_type="linear", prediction_type="flow_prediction", predictor=predictor)
    ends = []
    for in_place in (False, True):
        x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            after = scheduler.step(torch.sin(3 * x), t, x).prev_sample
            x = x.copy_(after) if in_place else after
        ends.append(x)
    assert torch.equal(*ends)


def test_gradients_flow_through_step():
    scheduler = ScoreSDEScheduler(predictor="heun")
    x = noise(1, 3, 4, 4).requires_grad_()
    run(scheduler, 3, x)[-1].sum().backward()
    assert x.grad.abs().min() > 0


def test_timesteps_of_a_discrete_path_are_integers():
    scheduler = ScoreSDEScheduler(sde_type="discrete_vp", predictor="ddim")
    scheduler.set_timesteps(1000)
    assert torch.equal(scheduler.timesteps, torch.arange(999, -1, -1))
    assert len(scheduler) == 1000


@pytest.mark.parametrize("n", [500, 1000])
def test_what_networks_are_told_by_default(n):
    """t in training time steps, from 0 on a chain; noise levels themselves; of their logarithm 1000 times the c_noise
    of Karras et al. 2022 (Table 1), log(sigma) / 4."""
    t = torch.tensor([0.002, 0.3, 1.0], dtype=torch.float64)
    for sde_type, time_input, expected in [
        ("vp", None, n * t),
        ("discrete_vp", None, n * t - 1),
        ("edm", None, n * (80 * t).log() / 4),
        ("ve", "log_sigma", n * (0.01 * 5000**t).log() / 4),
        ("ve", "sigma", 0.01 * 5000**t),
    ]:
        scheduler = ScoreSDEScheduler(n, sde_type=sde_type, time_input=time_input)
        assert scheduler.timestep(t) == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_heun_and_correctors_count_in_order():
    scheduler = ScoreSDEScheduler(predictor="heun", corrector="langevin", corrector_steps=3)
    scheduler.set_timesteps(5)
    assert scheduler.order == 5
    assert scheduler.nfe == 4 * 5 + 1


@pytest.mark.parametrize("predictor", ["heun", "ancestral", "dpmpp_3m", "unipc_2", "adams_4"])
def test_image_to_image_begins_inside_the_plan(predictor):
    """Beginning at entry k is the trajectory whose grid begins there."""
    scheduler = ScoreSDEScheduler(sde_type="discrete_vp", predictor=predictor)
    scheduler.set_timesteps(10)
    begin, x = 4 * scheduler.order, noise(2, 3, 4, 4)
    times = scheduler.path_time(scheduler.timesteps[:: scheduler.order])
    later, y = ScoreSDEScheduler.from_config(scheduler.config), x
    later.set_timesteps(timesteps=later.timestep(times[4:]))
    assert torch.equal(later.timesteps, scheduler.timesteps[begin:])
    scheduler.set_begin_index(begin)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for timestep in later.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x, generator=generators[0]).prev_sample
        y = later.step(network(y, timestep), timestep, y, generator=generators[1]).prev_sample
    assert relative(x, y) < 1e-6


@pytest.mark.parametrize("sde_type", ["discrete_vp", "ve", "linear"])
def test_noise_levels_can_be_given(sde_type):
    """As diffusers counts them: sigma / alpha, or the flow's sigma."""
    scheduler = ScoreSDEScheduler(sde_type=sde_type, predictor="dpmpp_3m")
    sigmas = [0.9, 0.5, 0.2, 0.05]
    scheduler.set_timesteps(sigmas=sigmas)
    times = scheduler.path_time(scheduler.timesteps)
    expected = times if sde_type == "linear" else scheduler.path.sigma(times) / scheduler.path.alpha(times)
    assert (expected - torch.tensor(sigmas)).abs().max() < 1e-4
    assert scheduler.nfe == scheduler.num_inference_steps == 4


def test_auto_is_what_its_rules_say():
    automatic_one = ScoreSDEScheduler(sde_type="discrete_vp")
    automatic_one.set_timesteps(12)
    rule = automatic(12)
    named = ScoreSDEScheduler.from_config(automatic_one.config, predictor=rule.predictor)
    path = automatic_one.path
    grid = {"center": rule.center, "width": rule.width, "tail": rule.tail}
    times = time_grid(path, "logistic", 12, path.t_min, 1.0, levels=1000, **grid)
    named.set_timesteps(timesteps=automatic_one.timestep(times))
    x = noise(2, 3, 4, 4)
    states = []
    for scheduler in (automatic_one, named):
        state = x
        for timestep in scheduler.timesteps:
            state = scheduler.step(network(state, timestep), timestep, state).prev_sample
        states.append(state)
    assert (states[0] - states[1]).abs().max() < 1e-4


def test_set_timesteps_begins_anew():
    scheduler = ScoreSDEScheduler()
    x = noise(2, 3, 4, 4)
    assert difference(run(scheduler, 7, x), run(scheduler, 7, x)) == 0
    assert scheduler.step_index == 7
    scheduler.set_timesteps(7)
    assert scheduler.step_index is None


def test_a_list_of_generators_gives_each_sample_its_own_noise():
    def sample(seeds):
        scheduler = ScoreSDEScheduler(predictor="euler_maruyama", corrector="langevin")
        x = torch.cat([noise(1, 3, 4, 4, seed=seed, dtype=torch.float32) for seed in seeds])
        return run(scheduler, 5, x, [torch.Generator().manual_seed(seed) for seed in seeds])[-1]

    together = sample([3, 1, 2])
    for i, seed in enumerate([3, 1, 2]):
        assert (together[i] - sample([seed])[0]).abs().max() < 1e-4


class Waits(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), f"{func} waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clipping", [{}, {"clip_sample": True}, {"thresholding": True}])
def test_the_loop_never_waits_for_the_device(clipping):
    for predictor, corrector in (("auto", None), ("heun", "langevin"), ("ancestral", "annealed_langevin")):
        scheduler = ScoreSDEScheduler(predictor=predictor, corrector=corrector, **clipping)
        scheduler.set_timesteps(4)
        x, output = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
        with Waits():
            for timestep in scheduler.timesteps:
                scheduler.scale_model_input(x, timestep)
                x = scheduler.step(output, timestep, x).prev_sample


def test_step_returns_what_was_asked_for():
    scheduler = ScoreSDEScheduler(prediction_type="sample")
    scheduler.set_timesteps(3)
    x, x0 = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    output = copy.deepcopy(scheduler).step(x0, scheduler.timesteps[0], x)
    assert torch.equal(output.pred_original_sample, x0)
    prev_sample, denoised = scheduler.step(x0, scheduler.timesteps[0], x, return_dict=False)
    assert torch.equal(prev_sample, output.prev_sample) and torch.equal(denoised, x0)


@pytest.mark.parametrize("eta", [0, 0.0, None])
def test_the_eta_that_pipelines_pass_by_default_leaves_the_schedulers_own(eta):
    """Which they find in the signature."""
    assert {"eta", "generator", "return_dict"} <= inspect.signature(ScoreSDEScheduler.step).parameters.keys()

    def sampled(**step):
        scheduler, x = ScoreSDEScheduler(predictor="ddim", eta=0.5), noise(2, 3)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            x = scheduler.step(x / 2, t, x, generator=generator, **step).prev_sample
        return x

    assert torch.equal(sampled(eta=eta), sampled()) and not torch.equal(sampled(eta=0.9), sampled())


@pytest.mark.parametrize("shape", [(), (4,), (4, 4)])
def test_learned_variance_channels_are_left_out(shape):
    scheduler = ScoreSDEScheduler()
    scheduler.set_timesteps(3)
    x, output = noise(2, 3, *shape), noise(2, 6, *shape, seed=1)
    plain = copy.deepcopy(scheduler).step(output[:, :3], scheduler.timesteps[0], x).prev_sample
    assert torch.equal(scheduler.step(output, scheduler.timesteps[0], x).prev_sample, plain)


def test_steering_sees_what_the_network_says():
    """Not what clipping makes of it; and a learned variance stays."""
    scheduler = ScoreSDEScheduler(prediction_type="sample", clip_sample=True)
    output, timesteps = 3 * noise(2, 6, 4, 4), scheduler.timestep(torch.tensor([0.3, 0.7]))
    steered = scheduler.steered(lambda x, timesteps: output, lambda x, t, denoise: denoise(x, t))
    assert relative(steered(noise(2, 3, 4, 4, seed=1), timesteps), output) < 1e-12


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("time_input", ["t", "log_sigma"])
def test_a_trajectory_of_one_evaluation_may_begin_at_the_largest_timestep(sde_type, time_input):
    """Given as the scheduler has it: in float32, whose rounding may lead beyond t = 1."""
    scheduler = ScoreSDEScheduler(sde_type=sde_type, time_input=time_input, prediction_type="sample", t_max=1.0)
    largest = scheduler.timestep(1.0)
    if torch.isfinite(largest):
        scheduler.set_timesteps(timesteps=[largest.item()])
        assert scheduler.nfe == 1
        assert scheduler.path_time(scheduler.timesteps[0]) == pytest.approx(1.0, abs=1e-6)


def test_add_noise_and_velocity_equal_ddpm():
    stock = diffusers.DDPMScheduler()
    ours = ScoreSDEScheduler.from_config(stock.config)
    x0, eps, timesteps = noise(3, 3, 4, 4), noise(3, 3, 4, 4, seed=1), torch.tensor([0, 500, 999])
    for name in ("add_noise", "get_velocity"):
        assert (getattr(ours, name)(x0, eps, timesteps) - getattr(stock, name)(x0, eps, timesteps)).abs().max() < 1e-5


def test_thresholding_equals_diffusers():
    stock = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="ancestral")
    x = 2 * noise(2, 3, 4, 4, dtype=torch.float32)
    states = [run(each, 10, x, torch.Generator().manual_seed(1)) for each in (stock, ours)]
    assert difference(*states) < TOLERANCE


# --- stock pipelines ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def draw(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return torch.tensor(
        pipeline(
            generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np", **arguments
        ).images
    )


def test_ddpm_pipeline_draws_the_same_with_our_scheduler(unet):
    stock = diffusers.DDPMScheduler()
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="ancestral")
    images = [draw(diffusers.DDPMPipeline(unet, scheduler), batch_size=2) for scheduler in (stock, ours)]
    assert images[0].std() > 0.01
    assert (images[0] - images[1]).abs().max() < TOLERANCE


def test_ddpm_pipeline_runs_every_kind_of_sampler(unet):
    for predictor, corrector in (("auto", None), ("heun", "langevin"), ("none", "annealed_langevin")):
        scheduler = ScoreSDEScheduler(sde_type="discrete_vp", predictor=predictor, corrector=corrector)
        images = draw(diffusers.DDPMPipeline(unet, scheduler), batch_size=2)
        assert images.shape == (2, 8, 8, 3)
        assert torch.isfinite(images).all()


def test_dit_pipeline_draws_the_same_with_our_scheduler():
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, out_channels=8, norm_num_groups=8
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    stock = diffusers.DDIMScheduler(clip_sample=False)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="ddim")
    images = [
        draw(diffusers.DiTPipeline(transformer.eval(), vae.eval(), scheduler), class_labels=[1, 7], guidance_scale=3.0)
        for scheduler in (stock, ours)
    ]
    assert images[0].std() > 0.01
    assert (images[0] - images[1]).abs().max() < TOLERANCE
    pipeline = diffusers.DiTPipeline(
        transformer, vae, ScoreSDEScheduler.from_config(ours.config, predictor="heun", corrector="langevin")
    )
    assert torch.isfinite(draw(pipeline, class_labels=[1, 7])).all()


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sde_type": "vpp"}, "sde_type 'vpp' is unknown; choose one of vp, subvp"),
        ({"prediction_type": "noise"}, "prediction_type 'noise' is unknown; choose one of epsilon"),
        ({"predictor": "huen"}, "predictor 'huen' is unknown; choose one of auto, euler"),
        ({"corrector": "lang"}, "corrector 'lang' is unknown; choose one of None, langevin"),
        ({"timestep_spacing": "even"}, "timestep_spacing 'even' is unknown; choose one of linspace"),
        ({"time_input": "lambda"}, "time_input 'lambda' is unknown; choose one of t"),
        ({"predictor": "deis_2", "eta": 0.5}, "'deis_2' takes no eta .got 0.5.; those that do: heun, rk4, ddim"),
        ({"eta": 0.5}, "'auto' takes no eta"),
        ({"variance_type": "large"}, "variance_type 'large' is unknown; choose one of fixed_small, fixed_large"),
        (
            {"predictor": "ancestral", "variance_type": "learned"},
            "variance_type 'learned' is unknown; choose one of fixed_small, fixed_large, learned_range",
        ),
        ({"use_clipped_model_output": "no"}, "use_clipped_model_output 'no' is unknown; choose one of True, False"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True has no counterpart on sde_type 'vp'"),
        ({"invert_sigmas": True}, "invert_sigmas=True has no counterpart on sde_type 'vp'"),
        (
            {"preconditioned": True, "prediction_type": "sample"},
            "preconditioned needs prediction_type epsilon or v_pre",
        ),
        ({"interpolation_type": "cubic"}, "interpolation_type 'cubic' is unknown; choose one of linear, log_linear"),
        ({"timestep_type": "whole"}, "timestep_type 'whole' is unknown; choose one of discrete, continuous"),
        ({"init_noise": "prior"}, "init_noise 'prior' is unknown; choose one of None, sigma, unit_data"),
        ({"predictor": "ddim", "s_churn": 10}, "'ddim' takes no s_churn .got 10.; those that do: euler, heun, rk4"),
        ({"predictor": "heun", "s_churn": -1}, "s_churn -1 must be a number from 0 to"),
        ({"predictor": "heun", "s_tmin": 3.0, "s_tmax": 2.0}, "s_tmin 3.0 must be at most s_tmax 2.0"),
        ({"s_tmin": 3.0}, "'auto' takes no s_tmin .got 3.0.; those that do: euler, heun"),
        ({"predictor": "deis_2", "s_noise": 1.1}, "'deis_2' takes no s_noise"),
        ({"predictor": "heun", "predictor_kwargs": {"warp": 2}}, "'heun' takes no warp .got 2.; it takes eta, s_churn"),
        ({"predictor_kwargs": {"warp": 2}}, "'auto' takes no warp .got 2.; it takes none"),
        ({"predictor": "ddim", "predictor_kwargs": {"eta": "1"}}, "eta '1' must be a number from 0 to 1"),
        ({"predictor": "ddim", "predictor_kwargs": [0.5]}, "predictor_kwargs .0.5. must be a dictionary, or None"),
        (
            {"predictor": "ancestral", "predictor_kwargs": {"variance_type": "large"}},
            "variance_type 'large' is unknown; choose one of fixed_small",
        ),
        (
            {"predictor": "ddim", "eta": 0.2, "predictor_kwargs": {"eta": 0.3}},
            "eta is given twice: 0.2, and 0.3 in predictor_kwargs",
        ),
        ({"time_scale": 0}, "time_scale 0 would tell the network nothing"),
        (
            {"thresholding": True, "dynamic_thresholding_ratio": 3},
            "dynamic_thresholding_ratio 3 must be a number from 0",
        ),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value 0.5 must be a number from 1"),
        ({"clip_sample": True, "clip_sample_range": -1.0}, "clip_sample_range -1.0 must be"),
        ({"sde_type": "ve", "sigma_min": 0}, "sigma_min=0, sigma_max=50"),
        ({"sde_type": "vp", "beta_min": 0.0}, "beta_min=0.0, beta_max=20"),
        ({"sde_type": "edm", "sigma_min": 0.0}, "sigma_min=0.0"),
        ({"sde_type": "ve", "beta_min": 0.0}, "'ve' has no parameter beta_min"),
        ({"sde_type": "discrete_vp", "trained_betas": []}, "trained_betas must be a list of 1 to 100,000 numbers"),
        ({"sde_type": "discrete_vp", "trained_betas": ["a"]}, "trained_betas must be a list"),
        (
            {"sde_type": "discrete_vp", "trained_betas": [0.1, math.nan], "num_train_timesteps": 2},
            "two numbers in .0, 1.",
        ),
        ({"sde_type": ["vp"]}, "sde_type .'vp'. is unknown"),
        ({"calibration": [5]}, "calibration .5. must be a dictionary"),
        ({"calibration": {"2": None}}, "calibration '2' must hold a predictor and a list of times, not None"),
        ({"calibration": {"2": ["heun", ["a", "b"]]}}, "time of calibration '2' 'a' must be a number"),
        ({"calibration": {"0": ["heun", []]}}, "calibration '0' must hold as many times"),
        ({"predictor": "heun", "s_churn": 10, "eta": 0.5}, "s_churn 10 does not go with eta 0.5"),
        ({"predictor": "heun", "s_churn": 10, "corrector": "langevin"}, "s_churn 10 does not go with a corrector"),
        ({"predictor": "none"}, "'none' needs a corrector; choose one of langevin, annealed_langevin"),
        ({"corrector_position": "between"}, "corrector_position 'between' is unknown; choose one of after, before"),
        ({"rho": 0.0}, "rho 0.0 must be a number from 0.1"),
        ({"predictor": "ancestral", "eta": 0.5}, "'ancestral' takes no eta"),
        ({"predictor": "ddim", "eta": 1.5}, "eta 1.5 must be a number from 0 to 1"),
        ({"sde_type": "ve", "beta_min": 0.1}, "'ve' has no parameter beta_min; it has sigma_min, sigma_max"),
        ({"sde_type": "vp", "trained_betas": [0.1, 0.2]}, "'vp' has no parameter trained_betas"),
        ({"t_min": 0.0}, "t_min 0.0 must be a number from 1e-09 to 1"),
        ({"t_min": 0.5, "t_max": 0.4}, "got t_min=0.5, t_max=0.4"),
        ({"t_max": 1.5}, "t_max 1.5 must be a number from 1e-09 to 1"),
        ({"corrector_steps": 0}, "corrector_steps 0"),
        ({"corrector_snr": -1.0}, "corrector_snr -1.0"),
        ({"sigma_data": 0.0}, "sigma_data 0.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreSDEScheduler(**arguments)


@pytest.mark.parametrize("name", [*NUMBERS, *FLAGS])
def test_no_argument_takes_nonsense(name):
    """Every number and flag of the signature: not finite, of another type, out of its range."""
    least, largest, whole = NUMBERS.get(name, (0, 0, False))
    values = [math.nan, math.inf, -math.inf, "1", [1], {}, largest + 1, least - 1]
    if name in NUMBERS:
        values += [True] + [1.5] * whole
    default = inspect.signature(ScoreSDEScheduler).parameters[name].default
    for value in values + [None] * (default is not None):
        with pytest.raises(ValueError, match=f"{name}.* must be"):
            ScoreSDEScheduler(**{name: value})


OPTIONS = [(name, option) for name, row in PREDICTORS.items() for option in row.takes]


@pytest.mark.parametrize(("predictor", "option"), OPTIONS, ids=["-".join(each) for each in OPTIONS])
def test_no_option_takes_nonsense(predictor, option):
    row = PREDICTORS[predictor].takes[option]
    values = [math.nan, "1", [1], {}, True, None, -1] + [row.largest * 2] * (row.largest < math.inf)
    for value in values:
        with pytest.raises(ValueError, match=f"{option} .* (must be|is unknown)"):
            ScoreSDEScheduler(predictor=predictor, predictor_kwargs={option: value})


NUMERIC = (int, float, int | None, float | None)


def test_every_argument_that_is_a_number_has_its_range():
    parameters = inspect.signature(ScoreSDEScheduler).parameters.values()
    of_solvers = {option for _, option in OPTIONS}
    assert {each.name for each in parameters if each.annotation in NUMERIC} - of_solvers == set(NUMBERS)
    assert {each.name for each in parameters if each.annotation is bool} == set(FLAGS)


@pytest.mark.parametrize(
    "given",
    [
        {"predictor": "ddim", "eta": 0.5},
        {"predictor": "heun", "s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.1},
        {"predictor": "ancestral", "variance_type": "fixed_large"},
    ],
    ids=lambda given: given["predictor"],
)
def test_options_may_be_given_either_way(given, tmp_path):
    options = {name: value for name, value in given.items() if name != "predictor"}
    flat = ScoreSDEScheduler(**given)
    ours = ScoreSDEScheduler(predictor=given["predictor"], predictor_kwargs=options)
    ours.save_pretrained(tmp_path)
    x, ends = noise(2, 3, 4, 4), []
    for scheduler in (
        flat,
        ours,
        ScoreSDEScheduler.from_pretrained(tmp_path),
        ScoreSDEScheduler(predictor=given["predictor"]),
    ):
        ends.append(run(scheduler, 5, x, torch.Generator().manual_seed(1))[-1])
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[3])


def test_a_solver_with_an_option_of_its_own_is_one_row(monkeypatch, tmp_path):
    def damped(path, t, s, damping):
        return [[replace(stage, samples=(damping * stage.samples[0],))] for [stage] in euler(path, t, s)]

    monkeypatch.setitem(PREDICTORS, "damped", Predictor(damped, None, options={"damping": Option(1.0, 0.5, 1.0)}))
    scheduler = ScoreSDEScheduler(predictor="damped", predictor_kwargs={"damping": 0.75})
    scheduler.save_pretrained(tmp_path)
    x = noise(2, 3, 4, 4)
    for each, damping in (
        (scheduler, 0.75),
        (ScoreSDEScheduler.from_pretrained(tmp_path), 0.75),
        (ScoreSDEScheduler.from_config(scheduler.config, predictor_kwargs=None), 1.0),
    ):
        plain = ScoreSDEScheduler(predictor="euler")
        for one in (plain, each):
            one.set_timesteps(4)
        zero = torch.zeros_like(x)
        expected = plain.step(zero, plain.timesteps[0], x)
        found = each.step(zero, each.timesteps[0], x)
        assert (
            relative(
                found.prev_sample - expected.prev_sample, (damping - 1) * plain._planned().stages[0].samples[0] * x
            )
            < 1e-12
        )
    with pytest.raises(ValueError, match="damping 0.25 must be a number from 0.5 to 1"):
        ScoreSDEScheduler(predictor="damped", predictor_kwargs={"damping": 0.25})
    # of another solver it is refused, not forgotten
    with pytest.raises(ValueError, match="predictor 'ddim' takes no damping .got 0.75.; those that do: damped"):
        ScoreSDEScheduler.from_config(scheduler.config, predictor="ddim")


def test_the_ends_of_the_ranges_are_fine():
    """What is allowed builds, in no time, and runs."""
    scheduler = ScoreSDEScheduler(num_train_timesteps=10**5, sde_type="discrete_vp", beta_end=0.001)
    scheduler.set_timesteps(3)
    scheduler = ScoreSDEScheduler(predictor="none", corrector="langevin", corrector_steps=10**4)
    scheduler.set_timesteps(2)
    assert scheduler.nfe == 10**4 + 1
    with pytest.raises(ValueError, match="num_inference_steps 11 must be a whole number from 1 to 10"):
        scheduler.set_timesteps(11)


@pytest.mark.parametrize("convert", [np.array, torch.DoubleTensor, list, tuple])
def test_betas_of_any_kind_of_array(convert, tmp_path):
    betas = [0.01, 0.02, 0.05, 0.1]
    scheduler = ScoreSDEScheduler(sde_type="discrete_vp", num_train_timesteps=4, trained_betas=convert(betas))
    assert scheduler.config.trained_betas == betas
    scheduler.save_pretrained(tmp_path)
    assert ScoreSDEScheduler.from_pretrained(tmp_path).config.trained_betas == betas
    stock = diffusers.DDPMScheduler(4, trained_betas=betas)
    assert (scheduler.betas - stock.betas).abs().max() < 1e-7
    assert (scheduler.alphas_cumprod - stock.alphas_cumprod).abs().max() < 1e-6
    alpha2 = scheduler.path.alpha(scheduler.path_time(torch.arange(4))) ** 2
    assert (alpha2 - (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)).abs().max() < 1e-12


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_noise_is_added_between_data_and_noise(sde_type):
    scheduler = ScoreSDEScheduler(sde_type=sde_type, time_input="t", time_scale=1000.0, time_offset=-1.0)
    x0, z = noise(2, 3), noise(2, 3, seed=1)
    # to the last float32 number of each end
    assert torch.isfinite(scheduler.add_noise(x0, z, torch.tensor([-1.0, 999.0]))).all()
    assert (scheduler.add_noise(x0, z, -1)[0] - scheduler.path.sample(x0, z, 0.0)[0]).abs().max() < 1e-12
    for timesteps in (-2, 1000, torch.tensor([5.0, 999.5]), torch.tensor([-1.5, 5.0]), math.nan):
        for function in (scheduler.add_noise, scheduler.get_velocity):
            with pytest.raises(ValueError, match="must lie between -1 .clean data. and 999 .noise."):
                function(x0, z, timesteps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass either num_inference_steps or timesteps or sigmas"),
        ({"num_inference_steps": 5, "timesteps": [500, 100]}, "num_inference_steps 5 does not go with the 2 times"),
        ({"sigmas": [1.0, 0.5], "timesteps": [500, 100]}, "pass either num_inference_steps or timesteps or sigmas"),
        ({"sigmas": [0.5, 1.0]}, r"sigmas \[0.5, 1.0\] must fall strictly"),
        ({"sigmas": [500.0, 1.0]}, "from at most 157"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 must be a whole number from 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps 2.5 must be a whole number from 1"),
        ({"num_inference_steps": 10**9}, "num_inference_steps 1000000000 must be a whole number from 1 to 100000"),
        ({"num_inference_steps": 5, "t_start": math.nan}, "t_start nan must lie above 0.001"),
        ({"num_inference_steps": 5, "t_start": "0.5"}, "t_start 0.5 must lie above 0.001"),
        ({"timesteps": []}, "timesteps must be a list of 1 to 100,000 numbers"),
        ({"timesteps": ["a"]}, "timesteps must be a list"),
        ({"timesteps": 500}, "timesteps must be a list"),
        ({"timesteps": [math.nan, 5]}, "must fall strictly"),
        ({"sigmas": [1.0, 0.0, 0.0]}, "must fall strictly"),
        ({"sigmas": [0.0]}, "must fall strictly"),
        ({"timesteps": [100, 500]}, r"timesteps \[100.0, 500.0\] must fall strictly"),
        ({"timesteps": [5000, 500]}, "from at most 999"),
        ({"num_inference_steps": 2000}, "2000 time steps"),
    ],
)
def test_bad_timesteps_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreSDEScheduler(sde_type="discrete_vp", predictor="ddim").set_timesteps(**arguments)


def test_singular_ends_are_refused_with_the_remedy():
    scheduler = ScoreSDEScheduler(sde_type="linear", predictor="euler_maruyama", t_max=1.0)
    with pytest.raises(ValueError, match="pass t_max=0.999"):
        scheduler.set_timesteps(5)
    for predictor in ("auto", "ddim", "heun"):
        for options in ({"sde_type": "cosine_vp", "t_max": 1.0}, {"beta_max": 1000.0}):
            scheduler = ScoreSDEScheduler(predictor=predictor, **options)
            with pytest.raises(ValueError, match="'epsilon' says nothing of clean samples at t = 1, where alpha is"):
                scheduler.set_timesteps(5)


def test_bad_steps_are_refused():
    x = noise(2, 3, 4, 4)
    scheduler = ScoreSDEScheduler(predictor="heun")
    with pytest.raises(ValueError, match="call scheduler.set_timesteps"):
        scheduler.step(x, 1000, x)
    with pytest.raises(ValueError, match="call scheduler.set_timesteps"):
        _ = scheduler.nfe
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 3.3 is none of this trajectory"):
        scheduler.step(x, 3.3, x)
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 3, 4, 5\)"):
        scheduler.step(noise(2, 3, 4, 5), scheduler.timesteps[0], x)
    run(scheduler, 4, x)
    with pytest.raises(ValueError, match="all 7 entries of the plan have run"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="cannot begin at entry 3, inside a time step"):
        scheduler.step(x, scheduler.timesteps[3], x)


def test_every_grid_is_a_choice_of_the_scheduler():
    for spacing in TIME_GRIDS:
        scheduler = ScoreSDEScheduler(timestep_spacing=spacing, predictor="ddim")
        scheduler.set_timesteps(10)
        assert scheduler.nfe == 10
