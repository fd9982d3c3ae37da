"""Inverse problems: operators, and samplers against the closed-form posterior of Gaussian data."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from exact import GaussianImages
from tiny import random_dit, seeded, tiny_pipeline, tiny_vae

from score_sde import ScoreSDEInversePipeline, ScoreSDEPipeline, ScoreSDEScheduler, load_bundle
from score_sde.pipelines.operators import (
    LinearOperator,
    colourisation,
    conjugate_gradients,
    deblurring,
    inpainting,
    super_resolution,
)
from score_sde.pipelines.pipeline_score_sde_inverse import METHODS


def random_mask(*shape):
    return torch.rand(shape, generator=seeded(3)) < 0.5


OPERATORS = {
    "inpainting": inpainting(random_mask(4, 6)),
    "inpainting by channel": inpainting(random_mask(3, 4, 6)),
    "inpainting by image": inpainting(random_mask(2, 1, 4, 6)),
    "colourisation": colourisation(),
    "super-resolution": super_resolution(2),
    "deblurring": deblurring(0.6),
    "deblurring by a kernel": deblurring(torch.rand(3, 3, generator=seeded(4)) / 4),
    "pair": LinearOperator(lambda x: x.flatten(1)[:, :5].cumsum(1), None),
}
SHAPE = (2, 3, 4, 6)


def matrix(operator, shape=SHAPE):
    """The operator as a matrix, from one image at a time."""
    basis = torch.eye(torch.Size(shape[1:]).numel(), dtype=torch.float64).reshape(-1, *shape[1:])
    columns = [operator(image.expand(shape[0], *shape[1:]))[0].flatten() for image in basis]
    return torch.stack(columns, dim=1)


# --- operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_what_they_say(name):
    operator = OPERATORS[name]
    assert operator.check(SHAPE) == operator(torch.zeros(SHAPE)).shape
    a = matrix(operator)
    x = torch.randn(SHAPE, generator=seeded(0), dtype=torch.float64)
    if name != "inpainting by image":
        assert (operator(x).flatten(1) - x.flatten(1) @ a.T).abs().max() < 1e-12
        y = operator(torch.randn(SHAPE, generator=seeded(1), dtype=torch.float64))
        assert (operator.adjoint(y, SHAPE).flatten(1) - y.flatten(1) @ a).abs().max() < 1e-12
        if operator.gram is not None:
            assert (a @ a.T @ y[0].flatten() - operator.gram * y[0].flatten()).abs().max() < 1e-12
        solved = operator.solve(y, SHAPE, torch.tensor([0.5, 2.0]), 0.1)
        for i, variance in enumerate((0.5, 2.0)):
            both = variance * a @ a.T + 0.1 * torch.eye(len(a))
            assert (both @ solved[i].flatten() - y[i].flatten()).abs().max() < 1e-4
        smallest = y.flatten(1) @ torch.linalg.pinv(a).T
        assert (operator.pseudo_inverse(y, SHAPE).flatten(1) - smallest).abs().max() < 1e-3
    if operator.value_range is not None:
        values = operator(torch.rand(SHAPE, generator=seeded(2)).mul(2).sub(1).sign())
        assert operator.value_range[0] - 1e-6 <= values.min()
        assert values.max() <= operator.value_range[1] + 1e-6


@pytest.mark.parametrize("std", [0.4, 0.8])
def test_a_blur_by_its_standard_deviation_is_gaussian(std):
    """The image of a point: exp(-distance^2 / (2 std^2)), of sum 1, so that even images stay what they are."""
    point = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    point[..., 4, 4] = 1
    blurred = deblurring(std)(point)
    assert blurred.sum() == pytest.approx(1)
    for i, j in ((0, 1), (1, 1)):
        expected = torch.exp(torch.tensor(-(i**2 + j**2) / (2 * std**2))).item()
        assert blurred[0, 0, 4 + i, 4 - j] / blurred[0, 0, 4, 4] == pytest.approx(expected)
    assert torch.allclose(deblurring(std)(torch.ones(1, 1, 9, 9)), torch.ones(1, 1, 9, 9))


def test_conjugate_gradients_solve_every_sample_in_as_many_steps_as_dimensions():
    factor = torch.randn(3, 5, 5, generator=seeded(0), dtype=torch.float64)
    positive = factor @ factor.mT + 0.1 * torch.eye(5)
    y = torch.randn(3, 5, generator=seeded(1), dtype=torch.float64)
    y[1] = 0
    solved = conjugate_gradients(lambda v: (positive @ v[..., None])[..., 0], y, iterations=10, tolerance=1e-12)
    assert (solved - torch.linalg.solve(positive, y)).abs().max() < 1e-8


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_conjugate_gradients_stop_where_the_relative_error_is_small(scale):
    """Whatever the size of the right-hand side: as many steps as for any other."""
    positive, y, calls = torch.diag(torch.linspace(1, 10, 12, dtype=torch.float64)), torch.ones(1, 12).double(), []

    def apply(v):
        calls[-1] += 1
        return v @ positive

    for right in (y, scale * y):
        calls.append(0)
        solved = conjugate_gradients(apply, right, tolerance=1e-3)
        assert 0 < (solved @ positive - right).norm() / right.norm() <= 1e-3
    assert 2 < calls[0] == calls[1] < 12


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinearOperator(lambda x: x**2), r"not linear: A\(a - 2 b\) differs from A\(a\) - 2 A\(b\) by"),
        (lambda: LinearOperator(lambda x: x + 1), "not linear"),
        (lambda: LinearOperator(lambda x: x.mean(0)), "not linear"),
        (lambda: LinearOperator(lambda x: 2 * x, lambda y: y), "adjoint is wrong: <A x, y> ="),
        (lambda: LinearOperator(lambda x: x[:, :1], lambda y: y), r"adjoint returns shape \(2, 1, 4, 6\)"),
        (lambda: LinearOperator(lambda x: x @ torch.zeros(5, 5)), "does not take images of shape"),
        (lambda: inpainting(torch.full((4, 6), 0.5)), "must be 0 .unknown. or 1 .known.; it has .0.5"),
        (lambda: inpainting(torch.ones(5, 6)), r"a mask of shape \(5, 6\) does not fit images of shape \(2, 3, 4, 6\)"),
        (lambda: inpainting(torch.ones(3, 3, 4, 6)), "a mask of shape"),
        (lambda: colourisation(4), "colourisation of 4 channels does not fit"),
        (lambda: super_resolution(3), "super-resolution by 3 does not fit"),
        (lambda: deblurring(torch.ones(2, 2)), r"kernel must be \(k, k\) with odd k; got shape \(2, 2\)"),
        (lambda: deblurring(5.0), "does not take images of shape"),
    ],
)
def test_wrong_operators_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build().check(SHAPE, generator=seeded(0))


# --- the closed-form posterior ------------------------------------------------------------------------------------


# not orthogonal, so that conjugate gradients are needed
DENSE = LinearOperator(lambda x: x.flatten(1) @ torch.randn(12, 4, generator=seeded(8)).to(x) / 3)
PROBLEMS = {"colourisation": colourisation(), "inpainting": inpainting([[1, 0], [0, 1]]), "dense": DENSE}


def distances(isotropic, problem, noise_std=0.1, samples=4000, scheduler=None, **arguments):
    """Distances of the samples' mean and covariance from the posterior's."""
    network = GaussianImages(isotropic)
    y, *posterior = network.measure(PROBLEMS[problem], noise_std)
    pipeline = ScoreSDEInversePipeline(ScoreSDEScheduler(prediction_type="sample", **(scheduler or {})), unet=network)
    network.scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"batch_size": samples, "noise_std": noise_std, "generator": seeded(0)} | arguments
    return network.distance(pipeline(PROBLEMS[problem], y, output_type="latent", **arguments).images, *posterior)


def sampling_noise(dimensions=12, samples=4000):
    """What an exact sampler would show of both distances, doubled."""
    return 2 * 3 / samples**0.5, 2 * (dimensions / samples) ** 0.5


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [
        ({}, {"num_inference_steps": 50}),
        ({"sde_type": "edm"}, {"num_inference_steps": 50}),
        ({"predictor": "ancestral"}, {"num_inference_steps": 300}),
        ({"sde_type": "linear", "predictor": "heun"}, {"num_inference_steps": 50}),
        ({}, {"num_inference_steps": None, "rtol": 1e-3, "atol": 1e-3}),
    ],
)
def test_pigdm_is_exact_for_isotropic_data(problem, scheduler, arguments):
    arguments = {"method": "pigdm", "data_std": 0.5, "adaptive_weight": False, "scheduler": scheduler} | arguments
    mean, covariance = distances(True, problem, **arguments)
    allowed = sampling_noise()
    assert mean < allowed[0]
    assert covariance < allowed[1]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("scheduler", [{}, {"sde_type": "edm"}, {"predictor": "ancestral"}])
def test_tmpd_is_exact_for_gaussian_data(problem, scheduler):
    steps = 300 if scheduler.get("predictor") else 50
    found = distances(False, problem, method="tmpd", cg_steps=12, num_inference_steps=steps, scheduler=scheduler)
    allowed = sampling_noise()
    assert found[0] < allowed[0]
    assert found[1] < allowed[1]


def test_the_tests_of_exactness_can_fail():
    """Further than the sampling noise: pigdm on correlated data or with the paper's weight, and the other methods."""
    allowed = sampling_noise()
    pigdm = distances(False, "dense", method="pigdm", num_inference_steps=50)
    assert pigdm[1] > allowed[1]
    weighted = distances(True, "colourisation", method="pigdm", data_std=0.5, num_inference_steps=50)
    assert weighted[0] > allowed[0]
    replacement = distances(False, "dense", method="replacement", num_inference_steps=50)
    assert replacement[0] > allowed[0]


@pytest.mark.parametrize(
    "arguments",
    [{"method": "pigdm", "adaptive_weight": weight} for weight in (True, False)]
    + [{"method": "dps", "step_size": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("sde_type", ["vp", "linear"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_evaluation_is_the_formula(problem, sde_type, arguments):
    """From noise to clean data in one step: the guided denoised sample, by hand, with a measurement's matrix."""
    network, operator, noise_std = GaussianImages(isotropic=True), PROBLEMS[problem], 0.2
    y, *_ = network.measure(operator, noise_std)
    scheduler = ScoreSDEScheduler(sde_type=sde_type, prediction_type="sample", predictor="euler", t_max=0.6)
    pipeline = ScoreSDEInversePipeline(scheduler, unet=network)
    network.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 2, 2, generator=seeded(0))
    found = (
        pipeline(
            operator,
            y,
            latents=noise,
            noise_std=noise_std,
            num_inference_steps=1,
            output_type="latent",
            data_std=0.5,
            **arguments,
        )
        .images.flatten(1)
        .double()
    )

    alpha, sigma = (float(each(torch.tensor(0.6).double())) for each in (scheduler.path.alpha, scheduler.path.sigma))
    x, a = (noise * scheduler.init_noise_sigma).flatten(1).double(), matrix(operator, (1, 3, 2, 2))
    gain = 0.25 / (alpha**2 * 0.25 + sigma**2)
    jacobian, variance = alpha * gain, sigma**2 * gain
    denoised = network.mean + jacobian * (x - alpha * network.mean)
    error = y.flatten(1).double() - denoised @ a.T
    if arguments["method"] == "dps":
        # -gradient of |y - A D|
        expected = denoised + 0.3 * jacobian * (error @ a) / error.norm(dim=1, keepdim=True)
    else:
        inverse = torch.linalg.inv(variance * a @ a.T + noise_std**2 * torch.eye(len(a)))
        weight = variance / (sigma / alpha) ** 2 if arguments["adaptive_weight"] else 1.0
        expected = denoised + sigma**2 / alpha * weight * jacobian * error @ inverse @ a
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("problem", ["colourisation", "inpainting"])
def test_replaced_measurements_have_the_noise_of_their_time(problem):
    """Of a measurement with noise, as long as that is less than the sample's: A x_t - alpha A x0 has the standard
    deviation sigma sqrt(gram), whatever A A^T is."""
    operator, noise_std, seen = PROBLEMS[problem], 0.3, []
    scheduler = ScoreSDEScheduler(predictor="ancestral", prediction_type="sample")
    network = GaussianImages(isotropic=True)
    network.scheduler, pipeline = scheduler, ScoreSDEInversePipeline(scheduler, unet=network)
    pipeline.set_progress_bar_config(disable=True)
    known = operator(torch.ones(1, 3, 2, 2)) != 0
    y = noise_std * known * torch.randn(4000, *known.shape[1:], generator=seeded(2))

    def watch(pipe, i, timestep, tensors):
        if i + 1 < pipe.num_timesteps:
            t = pipe.scheduler.path_time(pipe.scheduler.timesteps[i + 1])
            sigma, alpha = float(scheduler.path.sigma(t)), float(scheduler.path.alpha(t))
            if sigma**2 * operator.gram > 1.2 * (alpha * noise_std) ** 2:
                measured = operator(tensors["latents"])[:, known[0]]
                seen.append(float(measured.std()) / (sigma * operator.gram**0.5))

    pipeline(
        operator, y, "replacement", noise_std, num_inference_steps=8, generator=seeded(0), callback_on_step_end=watch
    )
    assert len(seen) > 3
    assert seen == pytest.approx([1.0] * len(seen), abs=0.03)


def test_resampling_brings_replacement_closer():
    ancestral = {"predictor": "ancestral"}
    arguments = {"samples": 1000, "num_inference_steps": 250, "scheduler": ancestral}
    once = distances(False, "inpainting", method="replacement", **arguments)
    again = distances(False, "inpainting", method="repaint", jump_length=5, resamplings=10, **arguments)
    assert again[0] < once[0] / 2
    assert again[1] < once[1] / 2


# --- the pipeline -------------------------------------------------------------------------------------------------


def inverse_pipeline(**scheduler):
    return tiny_pipeline(ScoreSDEInversePipeline, random_dit(sample_size=8), **scheduler)


def solve(pipeline, operator=None, measurement=None, **arguments):
    """The pipeline's output for two measurements of random images."""
    operator = super_resolution(2) if operator is None else operator
    if measurement is None:
        measurement = operator(torch.rand(2, 1, 8, 8, generator=seeded(1)) * 2 - 1)
    arguments = {"num_inference_steps": 10, "output_type": "pt", "generator": seeded(0)} | arguments
    return pipeline(operator, measurement, **arguments)


SAMPLERS = [
    {},
    {"predictor": "heun", "s_churn": 2.0},
    {"predictor": "ancestral", "corrector": "langevin"},
    {"predictor": "reverse_diffusion", "corrector": "langevin", "corrector_position": "before"},
    {"predictor": "rk4", "sde_type": "edm", "sigma_max": 5.0},
    {"predictor": "dpmpp_2m", "sde_type": "discrete_vp", "eta": 0.5},
    {"predictor": "euler", "sde_type": "linear"},
    {"predictor": "unipc_2", "denoise_final": False},
]


@pytest.mark.parametrize("scheduler", SAMPLERS, ids=lambda scheduler: "-".join(map(str, scheduler.values())) or "auto")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_every_sampler(method, scheduler):
    pipeline = inverse_pipeline(**scheduler)
    arguments = {"method": method, "jump_length": 3, "resamplings": 2, "class_labels": [0, 2], "guidance_scale": 2.0}
    output = solve(pipeline, **arguments)
    assert output.images.shape == (2, 1, 8, 8)
    pipeline.scheduler.set_timesteps(10)
    assert output.nfe == pipeline.scheduler.nfe * (2 if method == "repaint" else 1)
    assert torch.equal(solve(pipeline, **arguments).images, output.images)
    if method in ("tmpd", "replacement") and pipeline.scheduler.config.denoise_final:
        # without noise the measurement is met
        assert output.residual.max() < 0.02
    free = solve(pipeline, method="dps", step_size=1e-9)
    assert output.residual.mean() < free.residual.mean()


def test_noise_in_the_measurement_is_not_fitted():
    image = torch.zeros(1, 1, 8, 8)
    noisy = image + 0.2 * torch.randn(1, 1, 8, 8, generator=seeded(2))
    pipeline, everything = inverse_pipeline(), inpainting(torch.ones(8, 8))
    for method in ("tmpd", "replacement"):
        assert solve(pipeline, everything, noisy, method=method, noise_std=0.0).residual < 0.01
        assert solve(pipeline, everything, noisy, method=method, noise_std=0.2).residual > 0.1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_measurement_reaches_beyond_its_range_by_its_noise(sign):
    """Six standard deviations are noise, more is another range."""
    pipeline, at = inverse_pipeline(), torch.zeros(1, 1, 4, 4)
    at[0, 0, 0, 0] = sign
    assert torch.isfinite(solve(pipeline, None, 1.55 * at, noise_std=0.1, num_inference_steps=1).residual).all()
    with pytest.raises(ValueError, match=r"from -1 to 1, and noise_std is 0\.1"):
        solve(pipeline, None, 1.65 * at, noise_std=0.1, num_inference_steps=1)


def test_repaint_goes_back_and_forth():
    pipeline, entries = inverse_pipeline(predictor="ancestral"), []

    def watch(pipe, i, timestep, tensors):
        entries.append(pipe.scheduler.timesteps.tolist().index(float(timestep)))

    solve(pipeline, method="repaint", jump_length=4, resamplings=2, callback_on_step_end=watch)
    assert entries == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 8, 9]


def test_latent_models_by_dps_only():
    pipeline = inverse_pipeline()
    latent = ScoreSDEInversePipeline(
        pipeline.scheduler, transformer=random_dit(sample_size=4, in_channels=3), vae=tiny_vae()
    )
    latent.set_progress_bar_config(disable=True)
    operator = super_resolution(2)
    y = operator(torch.rand(1, 1, 8, 8, generator=seeded(1)))
    free, guided = (
        solve(latent, operator, y, method="dps", num_inference_steps=30, step_size=size).residual
        for size in (1e-9, 1.0)
    )
    assert guided < free
    with pytest.raises(ValueError, match="method 'pigdm' needs a model of pixels"):
        solve(latent, operator, y)


def test_it_opens_the_folders_of_the_other_pipeline_and_its_own(tmp_path):
    tiny_pipeline(network=random_dit(sample_size=8)).save_pretrained(tmp_path / "plain")
    pipeline = ScoreSDEInversePipeline.from_pretrained(tmp_path / "plain")
    pipeline.set_progress_bar_config(disable=True)
    found = solve(pipeline).images
    pipeline.save_pretrained(tmp_path / "inverse")
    for again in (
        load_bundle(tmp_path / "inverse"),
        ScoreSDEInversePipeline(**ScoreSDEPipeline.from_pretrained(tmp_path / "inverse").components),
        DiffusionPipeline.from_pretrained(tmp_path / "inverse", trust_remote_code=True),
    ):
        again.set_progress_bar_config(disable=True)
        assert type(again).__name__ == "ScoreSDEInversePipeline"
        assert torch.equal(solve(again).images, found)


def test_a_broken_network_is_named():
    pipeline = inverse_pipeline()
    with torch.no_grad():
        next(pipeline.transformer.parameters()).fill_(float("nan"))
    for method in METHODS:
        with pytest.raises(FloatingPointError, match="the network's output is not finite near t = 1"):
            solve(pipeline, method=method)


def test_stock_schedulers_are_refused():
    pipeline = inverse_pipeline()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="inverse problems need a ScoreSDEScheduler, not a DDIMScheduler"):
        solve(pipeline)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ddrm"}, "method 'ddrm' is unknown; choose one of pigdm, tmpd, dps, replacement, repaint"),
        ({"operator": lambda x: x, "measurement": torch.zeros(1, 1, 8, 8)}, "operator is a function, not a LinearOp"),
        ({"measurement": torch.zeros(2, 1, 8, 8)}, r"has shape \(2, 1, 8, 8\); of 2 images .* makes \(2, 1, 4, 4\)"),
        ({"measurement": torch.zeros(3, 1, 4, 4), "batch_size": 2}, r"has shape \(3, 1, 4, 4\); of 2 images"),
        (
            {"measurement": torch.full((1, 1, 4, 4), 255.0)},
            "values from 255 to 255; of images in .-1, 1. .* from -1 to",
        ),
        ({"measurement": torch.full((1, 1, 4, 4), float("nan"))}, "not finite"),
        ({"measurement": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)}, "must be a floating-point tensor"),
        ({"operator": inpainting(torch.ones(7, 8))}, r"a mask of shape \(7, 8\) does not fit images of shape"),
        ({"operator": LinearOperator(lambda x: x, lambda y: -y)}, "adjoint is wrong"),
        ({"noise_std": -1.0}, "noise_std -1.0"),
        ({"step_size": 0.0}, "'step_size': 0.0"),
        ({"resamplings": 0}, "resamplings 0"),
        ({"data_std": float("nan")}, "'data_std': nan"),
        ({"num_inference_steps": None, "method": "dps"}, "method 'dps' needs num_inference_steps"),
        ({"num_inference_steps": None, "rtol": -1.0}, "rtol=-1.0"),
        ({"class_labels": [0, 1, 2], "batch_size": 2}, "3 class_labels were given for 2 samples"),
        ({"output_type": "jpg"}, "output_type 'jpg' is unknown"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    pipeline = inverse_pipeline()
    pipeline.transformer.register_forward_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=message):
        solve(pipeline, **arguments)
