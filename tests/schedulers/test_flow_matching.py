"""Flow matching: every stock scheduler of it has its path, times, shift and steps here."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules
from tiny import flux_transformer

from score_sde import ScoreSDEScheduler


# of diffusers' own numpy code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SHIFTED = {
    "plain": (diffusers.FlowMatchEulerDiscreteScheduler(), {}),
    "shift": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {}),
    "terminal": (diffusers.FlowMatchEulerDiscreteScheduler(500, shift=3.0, shift_terminal=0.1), {}),
    "exponential": (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {"mu": 0.8}),
    "linear": (
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        {"mu": 2.0},
    ),
}
shifted = pytest.mark.parametrize(("stock", "mu"), SHIFTED.values(), ids=SHIFTED)


def network(x, timestep):
    return torch.tanh(x) * (1 + float(timestep) / 1000)


def run(scheduler, x, **given):
    scheduler.set_timesteps(**given)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x).prev_sample
    return x


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigmas", [None, np.linspace(1.0, 1 / 8, 8), [0.9, 0.6, 0.2]], ids=["n", "even", "own"])
@shifted
def test_euler_equals_the_stock_scheduler(stock, mu, sigmas):
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    given = {"num_inference_steps": 8} if sigmas is None else {"sigmas": sigmas}
    x = noise(2, 3, 4, 4)
    assert (run(stock, x, **given, **mu) - run(ours, x, **given, **mu)).abs().max() < 2e-6
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-3
    assert (stock.sigmas - ours.sigmas).abs().max() < 1e-6


def test_heun_has_the_stock_times():
    stock = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="heun")
    for scheduler in (stock, ours):
        scheduler.set_timesteps(7)
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-3


@pytest.mark.parametrize(
    "kind", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"]
)
def test_flow_sigmas_are_the_straight_path(kind):
    stock = getattr(diffusers, kind)(**FLOW, flow_shift=3.0)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    for scheduler in (stock, ours):
        scheduler.set_timesteps(9)
    # UniPC begins 1e-6 later; DEIS ends elsewhere
    assert (stock.sigmas[:9] - ours.sigmas[:9]).abs().max() < 3e-6
    # theirs are cut to whole numbers
    assert (stock.timesteps - ours.timesteps).abs().max() < 1.001
    assert ours.config.prediction_type == "flow_prediction"
    back = getattr(diffusers, kind).from_config(ours.config)
    assert back.config.use_flow_sigmas and back.config.flow_shift == 3.0
    assert back.config.prediction_type == "flow_prediction"
    back.set_timesteps(9)
    assert torch.equal(back.timesteps, stock.timesteps)


def test_unipc_draws_what_stock_unipc_draws():
    stock = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="unipc_2")
    x = noise(2, 3, 4, 4)
    # theirs tells the network times cut to whole numbers, and begins at 1 - 1e-6 where ours begins at 0.999
    assert (run(stock, x, num_inference_steps=20) - run(ours, x, num_inference_steps=20)).abs().max() < 1e-2


@pytest.mark.parametrize("saved", [False, True])
@shifted
def test_the_way_back(stock, mu, saved, tmp_path):
    ours = ScoreSDEScheduler.from_config(stock.config)
    config = ours.config
    if saved:
        ours.save_pretrained(tmp_path)
        config = ScoreSDEScheduler.load_config(tmp_path)
        assert ScoreSDEScheduler.from_pretrained(tmp_path).config.t_min == ours.config.t_min
    back = type(stock).from_config(config)
    assert {key: back.config[key] for key in stock.config if key[0] != "_"} == {
        key: value for key, value in stock.config.items() if key[0] != "_"
    }
    again = ScoreSDEScheduler.from_config(back.config)
    assert (again.config.sde_type, again.config.shift) == ("linear", stock.config.shift)


def test_what_pipelines_read():
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.3, max_image_seq_len=99)
    ours = ScoreSDEScheduler.from_config(stock.config)
    for key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "use_dynamic_shifting"):
        assert ours.config.get(key) == stock.config.get(key)
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    for scheduler in (stock, ours):
        assert scheduler.shift == 3.0
        scheduler.set_shift(2.0)
        assert scheduler.shift == 2.0
        scheduler.set_timesteps(5)
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-3
    x0, z, times = noise(2, 3, 4, 4), noise(2, 3, 4, 4).flip(0), stock.timesteps[2:4]
    assert (stock.scale_noise(x0, times, z) - ours.scale_noise(x0, times, z)).abs().max() < 1e-6


def test_even_levels_are_for_auto_their_number():
    """Flow pipelines pass them always."""
    ours = ScoreSDEScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    ours.set_timesteps(12)
    own = ours.timesteps
    ours.set_timesteps(12, sigmas=np.linspace(1.0, 1 / 12, 12))
    assert torch.equal(ours.timesteps, own)
    ours.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    assert ours.timesteps.tolist() == pytest.approx([1000.0, 875.0, 3 * 0.2 / 1.4 * 1000], rel=1e-6)


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("sigmas", [None, [0.95, 0.7, 0.3, 0.1]], ids=["n", "own"])
@pytest.mark.parametrize("shift", [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.1}], ids=str)
def test_grids_of_sigma_equal_the_stock_ones(flag, sigmas, shift):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**{flag: True}, **shift)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    given = {"num_inference_steps": 7} if sigmas is None else {"sigmas": sigmas}
    given |= {"mu": 0.8} if "use_dynamic_shifting" in shift else {}
    x = noise(2, 3, 4, 4)
    assert (run(stock, x, **given) - run(ours, x, **given)).abs().max() < 2e-6
    assert (stock.sigmas - ours.sigmas).abs().max() < 1e-6


@pytest.mark.parametrize("ends", [{}, {"sigma_min": 0.01, "sigma_max": 200.0}], ids=["chain", "own"])
def test_karras_levels_of_unipc_are_those_of_sigma_over_alpha(ends):
    """Cosmos'."""
    stock = diffusers.UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True, **ends)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="unipc_2")
    for scheduler in (stock, ours):
        scheduler.set_timesteps(9)
    assert (stock.sigmas[:9] / ours.sigmas[:9] - 1).abs().max() < 1e-4
    assert (stock.timesteps - ours.timesteps).abs().max() < 1


@pytest.mark.parametrize("flag", ["use_exponential_sigmas", "use_beta_sigmas"])
def test_flow_sigmas_above_one_are_refused(flag):
    stock = diffusers.UniPCMultistepScheduler(**FLOW, **{flag: True})
    assert run(stock, noise(1, 3, 4, 4), num_inference_steps=5).isnan().any()
    with pytest.raises(ValueError, match=f"{flag} of UniPC.* has no counterpart with use_flow_sigmas"):
        ScoreSDEScheduler.from_config(stock.config)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_inverted_levels(shift):
    """Mochi's: the network is told how much of the sample is clean, and returns clean sample - noise."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, shift=shift)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    x = noise(2, 3, 4, 4)
    assert (run(stock, x, num_inference_steps=6) - run(ours, x, num_inference_steps=6)).abs().max() < 2e-6
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-3
    assert (stock.sigmas - ours.sigmas).abs().max() < 1e-6


def test_minimax_counts_its_last_level():
    stock = diffusers.schedulers.MiniMaxH3Scheduler(shift=5.0)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    x = noise(2, 3, 4, 4)
    assert (run(stock, x, num_inference_steps=9) - run(ours, x, num_inference_steps=8)).abs().max() < 2e-6
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-6


def test_ltx_has_the_grid_of_the_scheduler_it_was_made_of():
    before = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1, use_karras_sigmas=True)
    stock = diffusers.schedulers.LTXEulerAncestralRFScheduler.from_config(before.config)
    ours = ScoreSDEScheduler.from_config({"_class_name": "LTXEulerAncestralRFScheduler"} | stock.config)
    ours = ScoreSDEScheduler.from_config(ours.config, predictor="euler")
    for scheduler in (stock, ours):
        scheduler.set_timesteps(7)
    assert (stock.sigmas - ours.sigmas).abs().max() < 1e-6
    with pytest.raises(ValueError, match="eta=0.5 of LTX.* has no counterpart"):
        ScoreSDEScheduler.from_config({"_class_name": "LTXEulerAncestralRFScheduler", "eta": 0.5})


def test_shifts_that_mean_nothing_are_refused():
    ours = ScoreSDEScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    with pytest.raises(ValueError, match="pass mu to set_timesteps"):
        ours.set_timesteps(5)
    with pytest.raises(ValueError, match="shift_terminal 0.1 is for sde_type 'linear', not for 'vp'"):
        ScoreSDEScheduler(shift_terminal=0.1)
    with pytest.raises(ValueError, match="time_shift_type 'square' is unknown; choose one of exponential, linear"):
        ScoreSDEScheduler(time_shift_type="square")


def test_published_levels_with_their_last_zero():
    """Align Your Steps (Sabour et al. 2024) as diffusers has them: rounded, with a final 0."""
    stock = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = ScoreSDEScheduler.from_config(stock.config)
    levels = AysSchedules["StableDiffusionSigmas"]
    ours.set_timesteps(sigmas=levels)
    assert ours.nfe == len(levels) - 1
    assert (ours.sigmas[:-1] / torch.tensor(levels[:-1]) - 1).abs().max() < 1e-3
    assert ours.sigmas[-1] == 0


@pytest.fixture(scope="module")
def flux_components():
    transformer = flux_transformer()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), latent_channels=1, norm_num_groups=1, shift_factor=0.1, scaling_factor=1.5
    )
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return {"transformer": transformer, "vae": vae.eval()} | absent


def draw(components, scheduler, kind=diffusers.FluxPipeline, **arguments):
    pipeline = kind(**components, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=noise(1, 6, 32),
        pooled_prompt_embeds=noise(1, 32),
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **arguments,
    ).images


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [diffusers.FluxPipeline, diffusers.FluxImg2ImgPipeline], ids=["text", "image"])
def test_flux_draws_the_same_with_our_scheduler(flux_components, kind, dynamic):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    given = {"num_inference_steps": 6}
    if kind is diffusers.FluxImg2ImgPipeline:
        given |= {"image": noise(1, 3, 16, 16).clamp(0, 1), "strength": 0.6}
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    expected, found = (draw(flux_components, each, kind, **given) for each in (stock, ours))
    assert expected.std() > 0.01
    assert (expected - found).abs().max() < 1e-5
    assert torch.isfinite(draw(flux_components, ScoreSDEScheduler.from_config(stock.config), kind, **given)).all()


def test_networks_that_count_from_noise_to_data():
    """Mochi's and OmniGen's."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, invert_sigmas=True)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    assert ours.config.prediction_type == "inverted_flow_prediction"
    x, levels = noise(2, 3, 4, 4), np.linspace(1.0, 1 / 8, 8)
    assert (run(stock, x, sigmas=levels) - run(ours, x, sigmas=levels)).abs().max() < 2e-6
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-3 and ours.timesteps[0] == 0
    back = type(stock).from_config(ours.config)
    assert back.config.invert_sigmas and back.config.shift == 2.0
    assert ScoreSDEScheduler.from_config(ours.config).config.time_scale == -1000


def test_one_training_step_means_times_from_0_to_1():
    stock = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    x, levels = noise(2, 3, 4, 4), np.linspace(1.0, 1 / 8, 8)
    assert (run(stock, x, sigmas=levels) - run(ours, x, sigmas=levels)).abs().max() < 2e-6
    assert (stock.timesteps - ours.timesteps).abs().max() < 1e-6


def test_networks_are_told_the_timesteps_given_with_levels():
    """CogView 4 tells its network times that are not shifted with the levels."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    given = {"timesteps": np.linspace(1000, 1, 6).round(), "sigmas": np.linspace(1, 0.001, 6), "mu": 2.0}
    ours = ScoreSDEScheduler.from_config(stock.config, predictor="euler")
    x = noise(2, 3, 4, 4)
    assert (run(stock, x, **given) - run(ours, x, **given)).abs().max() < 2e-6
    assert torch.equal(stock.timesteps, ours.timesteps)
    # within a step, in between
    heun = ScoreSDEScheduler.from_config(stock.config, predictor="heun")
    heun.set_timesteps(**given)
    assert heun.timesteps[1:3].tolist() == [800.0, 800.0]
    with pytest.raises(ValueError, match="of one length; got 3 and 2"):
        ours.set_timesteps(timesteps=[900, 500, 100], sigmas=[1.0, 0.5], mu=1.0)


@pytest.mark.parametrize("predictor", ["euler", "adams_2"])
def test_tokens_at_times_of_their_own(predictor):
    """As LTX has them, whose given frames are clean: every token steps from its own noise level."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    ours = ScoreSDEScheduler.from_config(stock.config, predictor=predictor)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    x, largest = noise(1, 4, 3), torch.tensor([[1000.0, 1000.0, 700.0, 0.0]])
    expected = found = plain = x
    alone = ScoreSDEScheduler.from_config(stock.config, predictor=predictor)
    alone.set_timesteps(5)
    for timestep in stock.timesteps:
        own = torch.minimum(timestep, largest)
        expected = stock.step(-network(expected, 500), timestep, expected, per_token_timesteps=own).prev_sample
        found = ours.step(-network(found, 500), timestep, found, per_token_timesteps=own).prev_sample
        plain = alone.step(network(plain, 500), timestep, plain).prev_sample
        assert torch.equal(found[:, 3], x[:, 3])
    if predictor == "euler":
        assert (expected - found).abs().max() < 2e-6
    assert (found[:, :2] - plain[:, :2]).abs().max() < 2e-6
    with pytest.raises(ValueError, match="per_token_timesteps are for prediction_type 'flow_prediction'"):
        other = ScoreSDEScheduler()
        other.set_timesteps(5)
        other.step(x, other.timesteps[0], x, per_token_timesteps=largest)


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
def test_training_scripts_index_the_times_of_the_stock_scheduler(config):
    """Before set_timesteps, as diffusers' examples do."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = ScoreSDEScheduler.from_config(stock.config)
    assert len(ours.timesteps) == len(stock.timesteps) == 1000
    assert (ours.timesteps - stock.timesteps).abs().max() < 1e-3
    assert (ours.sigmas[:-1] - stock.sigmas).abs().max() < 1e-6


def test_times_are_fitted_in_a_call_of_flux_with_its_shift(flux_components):
    """FLUX passes even levels and mu, the shift of its size, to `set_timesteps`."""
    scheduler = ScoreSDEScheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    )
    pipeline = diffusers.FluxPipeline(**flux_components, scheduler=scheduler)
    call = {"prompt_embeds": noise(2, 6, 32), "pooled_prompt_embeds": noise(2, 32), "height": 16, "width": 16}
    times = []

    def record(model, given, kwargs, output):
        times.append(float(kwargs["timestep"][0]))

    hook = flux_components["transformer"].register_forward_hook(record, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    errors = scheduler.calibrate(
        pipeline, 3, call=call | {"generator": torch.Generator().manual_seed(1)}, reference_steps=10, sweeps=1
    )
    _, fitted, made_with = scheduler.config.calibration["3"]
    assert errors[3][1] < errors[3][0]
    assert len(times) == made_with["evaluations"] + 2
    # its default, which nothing here follows
    assert made_with["guidance_scale"] == 3.5
    mu = math.log(made_with["shift"])
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 3, 3), mu=mu)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in fitted], rel=1e-6)

    times.clear()
    draw(flux_components, scheduler, num_inference_steps=3)
    hook.remove()
    assert times == pytest.approx(fitted, rel=1e-5)
    # for another size they move
    scheduler.set_timesteps(3, mu=mu + math.log(2))
    moved = [2000 * t / (1 + t) for t in fitted]
    assert scheduler.timesteps.tolist() == pytest.approx(moved, rel=1e-6)
