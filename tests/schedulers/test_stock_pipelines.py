"""Stock pipelines with our scheduler, built from tiny random components by benchmarks/stock_pipelines.py: the same
images as with the stock scheduler, also from an image and in parts; and what pipelines and training scripts read and
pass."""

import copy
import inspect

import diffusers
import pytest
import stock_pipelines
import torch
from diffusers.training_utils import compute_snr
from tiny import seeded

from score_sde import ScoreSDEScheduler


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FAST = (
    ("StableDiffusionPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionControlNetImg2ImgPipeline")
    + ("DDPMPipeline", "DDIMPipeline", "LDMTextToImagePipeline", "IFPipeline", "KandinskyV22PriorPipeline")
    + ("UnCLIPPipeline", "StableDiffusionSAGPipeline", "FluxPipeline", "WanPipeline", "StableDiffusion3Pipeline")
    + ("ZImagePipeline", "LTXPipeline", "CogView3PlusPipeline", "WuerstchenCombinedPipeline", "StableAudioPipeline")
    + ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", "ConsistencyModelPipeline")
)
PIPELINES = stock_pipelines.pipelines()
# those of a consistency model are in test_consistency_pipelines
TAKE_STRENGTH = [
    name
    for name, kind in PIPELINES.items()
    if "strength" in inspect.signature(kind.__call__).parameters and "Consistency" not in name
]
FAST_FROM_IMAGES = ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", "FluxImg2ImgPipeline")


def named(fast, all_names):
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in all_names if name not in fast)]


@pytest.mark.parametrize("name", named(FAST, PIPELINES))
def test_the_same_images_as_with_the_stock_scheduler(name):
    row = stock_pipelines.check(name, PIPELINES[name], steps=4, long=0)
    if name not in FAST and not row.get("runs"):
        pytest.skip(row.get("reason") or row["error"])
    assert "failed" not in row, row["trace"]
    assert row["equal"], row


def parts(name):
    """(class, case, components, its stock scheduler) of a pipeline."""
    kind, case = PIPELINES[name], stock_pipelines.case_of(name)
    components = stock_pipelines.components_of(kind, case)
    return kind, case, components, stock_pipelines.one_step_method(components["scheduler"])[0]


@pytest.mark.parametrize("name", named(FAST_FROM_IMAGES, TAKE_STRENGTH))
def test_an_image_keeps_as_much_as_with_the_stock_scheduler(name):
    if name not in FAST_FROM_IMAGES and not stock_pipelines.check(name, PIPELINES[name], 4, 0).get("equal"):
        pytest.skip("does not run, or not with our scheduler")
    kind, case, components, stock = parts(name)
    case.call = case.call | {"strength": 0.5}

    def draw(scheduler, steps):
        return stock_pipelines.draw(kind, case, components, {"scheduler": scheduler}, steps)

    exact, few = draw(stock, 200), draw(stock, 20)
    ours = draw(ScoreSDEScheduler.from_config(stock.config), 20)
    assert stock_pipelines.distance(ours, exact) <= max(stock_pipelines.distance(few, exact), 0.01)


@pytest.mark.parametrize(
    "stock", [diffusers.DDIMScheduler(**SCHEDULE), diffusers.FlowMatchEulerDiscreteScheduler(shift=3)]
)
@pytest.mark.parametrize("begin", [1, 10, 19])
def test_auto_begins_at_the_stock_grids_time_in_place(stock, begin):
    ours = ScoreSDEScheduler.from_config(stock.config, clip_sample=False)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(20)
    before = ours.timesteps.clone()
    cut = ours.timesteps[begin:]
    ours.set_begin_index(begin)
    assert abs(float(cut[0]) - float(stock.timesteps[begin])) < 1e-3
    assert len(cut) == 20 - begin and (cut.diff() < 0).all()
    assert ours.timesteps.data_ptr() + begin * cut.element_size() == cut.data_ptr()
    assert torch.equal(ours.timesteps[:begin], before[:begin])
    # the samples are those of a trajectory that begins there
    exact = torch.full((2, 3), 0.25)
    x = ours.add_noise(exact, torch.ones(2, 3), cut[:1].repeat(2))
    for t in cut:
        noise_level = ours.path.sigma(ours.path_time(t))
        epsilon = (x - ours.path.alpha(ours.path_time(t)) * exact) / noise_level
        output = epsilon if ours.config.sde_type != "linear" else epsilon - exact
        x = ours.step(output.float(), t, ours.scale_model_input(x, t), return_dict=False)[0]
    assert (x - exact).abs().max() < 1e-5


def test_parts_of_a_trajectory_make_the_whole():
    kind, case, components, stock = parts("StableDiffusionXLImg2ImgPipeline")
    case.call = case.call | {"output_type": "latent"}
    config = stock.config
    whole = {"num_inference_steps": 12, "generator": seeded(0), "output_type": "latent", "height": 32, "width": 32}
    inner = {name: part for name, part in components.items() if name != "requires_aesthetics_score"}
    base = diffusers.StableDiffusionXLPipeline(**inner | {"scheduler": ScoreSDEScheduler.from_config(config)})
    refiner = kind(**components | {"scheduler": ScoreSDEScheduler.from_config(config)})
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    # guidance and the size are told to both in the same way
    expected = base("a cat", guidance_scale=5.0, **whole).images
    half = base("a cat", guidance_scale=5.0, denoising_end=0.7, **whole | {"generator": seeded(0)}).images
    found = refiner(
        "a cat",
        image=half,
        denoising_start=0.7,
        guidance_scale=5.0,
        num_inference_steps=12,
        output_type="latent",
        original_size=(32, 32),
        target_size=(32, 32),
    ).images
    assert not torch.equal(half, expected)
    # multistep solvers begin anew at the joint
    assert (found - expected).abs().max() < 0.02 * expected.std()


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1, 0.2, 0.3]}]
)
def test_tables_are_those_of_the_stock_scheduler(schedule):
    n = len(schedule.get("trained_betas", range(1000)))
    stock = diffusers.DDIMScheduler(n, **schedule)
    ours = ScoreSDEScheduler.from_config(stock.config)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "alphas", "betas"):
        assert (getattr(ours, name) - getattr(stock, name)).abs().max() < 1e-6
    timesteps = torch.tensor([0, 1, n - 1])
    assert (compute_snr(ours, timesteps) / compute_snr(stock, timesteps) - 1).abs().max() < 1e-3


def test_tables_are_views_on_the_path_and_absent_where_they_mean_nothing():
    for sde_type in ("vp", "cosine_vp", "discrete_vp"):
        scheduler = ScoreSDEScheduler(sde_type=sde_type)
        t = scheduler.path_time(torch.arange(1000))
        assert (scheduler.alphas_cumprod - scheduler.path.alpha(t) ** 2).abs().max() < 1e-6
        assert ((1 - scheduler.betas).cumprod(0) - scheduler.alphas_cumprod).abs().max() < 1e-5
    for sde_type in ("subvp", "ve", "edm", "linear"):
        scheduler = ScoreSDEScheduler(sde_type=sde_type)
        assert not hasattr(scheduler, "betas")
        with pytest.raises(AttributeError, match=f"alphas_cumprod has no meaning with sde_type '{sde_type}'.*alpha"):
            _ = scheduler.alphas_cumprod
    with pytest.raises(AttributeError, match="indexed by whole timesteps"):
        _ = ScoreSDEScheduler(sde_type="vp", time_scale=1.0).alphas
    with pytest.raises(AttributeError, match="no attribute 'beta'"):
        _ = copy.deepcopy(scheduler).beta


def test_ddim_pipelines_eta_is_the_trajectorys():
    kind, case, components, _ = parts("DDIMPipeline")
    stock = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False)
    case.call = case.call | {"eta": 0.5, "use_clipped_model_output": True}

    def draw(scheduler):
        return stock_pipelines.draw(kind, case, components, {"scheduler": scheduler}, 5)

    def of(**settings):
        return ScoreSDEScheduler.from_config(stock.config, **settings)

    expected, found = draw(stock), draw(of(predictor="ddim"))
    assert stock_pipelines.difference(found, expected) < 1e-5
    with pytest.raises(ValueError, match="takes no eta"):
        draw(of(predictor="deis_2"))
    # the pipeline's default of 0 leaves the scheduler's own
    case.call = case.call | {"eta": 0.0}
    assert stock_pipelines.difference(draw(of(predictor="ddim", eta=0.5)), expected) < 1e-5


def test_step_refuses_what_it_does_not_know():
    scheduler = ScoreSDEScheduler(predictor="ddim")
    scheduler.set_timesteps(3)
    x = torch.ones(1, 2)
    with pytest.raises(TypeError, match="variance_noise"):
        scheduler.step(x, scheduler.timesteps[0], x, variance_noise=x)
    # one timestep for each sample, and the next one, as the pipelines of Wuerstchen and UnCLIP pass them
    t = scheduler.timesteps
    found = scheduler.step(x, t[0].expand(1), x, prev_timestep=t[1], return_dict=False)[0]
    scheduler.set_timesteps(3)
    assert torch.equal(found, scheduler.step(x, t[0], x, return_dict=False)[0])
