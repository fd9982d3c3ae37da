"""Log-likelihoods and encodings against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from exact import GAUSSIAN, MIXTURE, GaussianMixture
from tiny import latents, random_dit, seeded, tiny_pipeline

from score_sde import ScoreSDEScheduler
from score_sde.pipelines.adaptive import probability_flow
from score_sde.pipelines.likelihood import (
    HALF_BIN,
    Likelihood,
    dequantize,
    dequantized,
    log_likelihood,
    slerp,
    truncated_normal,
    truncated_normal_entropy,
)
from score_sde.schedulers.paths import VESDE, VPSDE, CosineVPSDE, LinearSDE


PATHS = [VPSDE(), VESDE(), CosineVPSDE(), LinearSDE()]


def ends(path):
    return (torch.tensor(t, dtype=torch.float64) for t in (path.t_min, path.t_max))


def normal_log_density(x, mean, variance):
    return (-((x - mean) ** 2) / variance / 2 - (2 * math.pi * variance).log() / 2).sum(-1)


def measure(data, path, x, prior_std=None, tolerance=1e-7, **arguments):
    t_min, t_max = ends(path)
    prior_std = path.prior_std if prior_std is None else prior_std
    return log_likelihood(
        path, lambda x, t: data.denoised(x, path, t), x, t_min, t_max, prior_std, tolerance, tolerance, **arguments
    )


def draw(data, n, seed=0):
    return data.sample(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("trace", ["exact", "rademacher"])
def test_gaussian_data_to_1e_4_nats_per_dim(path, trace):
    """With a diagonal Jacobian a Rademacher probe is exact. The model's own density is known: its prior, carried back
    by the linear flow."""
    x = draw(GAUSSIAN, 16)
    found = measure(GAUSSIAN, path, x, trace=trace)
    t_min, t_max = ends(path)
    (_, [variance_min]), (_, [variance_max]) = GAUSSIAN.noised(path, t_min), GAUSSIAN.noised(path, t_max)
    noise = GAUSSIAN.flow(x, path, t_min, t_max)
    exact = normal_log_density(noise, 0.0, torch.full((4,), path.prior_std**2).double())
    exact = exact + (variance_max / variance_min).log().sum() / 2
    assert (found.log_prob - exact).abs().max() / 4 < 1e-4
    assert (found.noise * path.prior_std - noise).abs().max() < 1e-4 * path.prior_std
    assert found.dimensions == 4
    assert found.nfe > 10


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_fixed_number_of_steps(path):
    x = draw(MIXTURE, 16)
    exact = measure(MIXTURE, path, x, trace="exact", tolerance=1e-8).log_prob
    errors = []
    for steps in (50, 100):
        found = measure(MIXTURE, path, x, trace="exact", steps=steps)
        assert found.nfe == 4 * steps
        errors.append((found.log_prob - exact).abs().max() / 2)
    assert errors[1] < 1e-3
    assert errors[1] < errors[0] / 8


def test_gaussian_data_whose_prior_is_exact():
    """Data of unit variance on a variance-preserving path: the prior is what the data become, and log p is theirs."""
    data = GaussianMixture([1.0], [[0.0] * 3], [[1.0] * 3])
    x = draw(data, 32)
    found = measure(data, VPSDE(), x)
    exact = normal_log_density(x, 0.0, torch.ones(3).double())
    assert (found.log_prob - exact).abs().max() / 3 < 1e-4


def test_mixtures_within_the_stated_error():
    path, x = VPSDE(), draw(MIXTURE, 200)
    means, variances = MIXTURE.noised(path, torch.tensor(path.t_min, dtype=torch.float64))
    components = normal_log_density(x[:, None], means, variances)
    exact = torch.logsumexp(components + MIXTURE.weights.log(), dim=1)
    summed = measure(MIXTURE, path, x, trace="exact", tolerance=1e-6)
    # alpha(1) = 0.0066: the prior is not quite what the data become
    assert (summed.log_prob - exact).abs().max() / 2 < 0.01
    assert (summed.probe_error == 0).all()
    for trace in ("rademacher", "gaussian"):
        probed = measure(
            MIXTURE, path, x, trace=trace, num_probes=8, generator=torch.Generator().manual_seed(0), tolerance=1e-4
        )
        # with two dimensions the probes of a sample may all agree
        told = probed.probe_error > 1e-6
        assert told.sum() > 150
        offs = ((probed.log_prob - exact) / probed.probe_error)[told]
        # Student's t with 7 degrees of freedom has the median 0.71
        assert 0.5 < offs.abs().median() < 0.95
        mean = probed.nats_per_dim().mean()
        assert abs(mean + exact.mean() / 2) < 4 * (probed.probe_error.mean() / 2 / 200**0.5)


def test_probes_stay_the_same_along_the_trajectory_and_come_from_the_generator():
    x = draw(MIXTURE, 8)
    first, again = (
        measure(MIXTURE, VPSDE(), x, generator=torch.Generator().manual_seed(3), tolerance=1e-5) for _ in range(2)
    )
    assert torch.equal(first.log_prob, again.log_prob)
    assert first.probe_error.isnan().all()


def test_two_probes_are_the_mean_of_each_with_its_standard_error():
    x = draw(MIXTURE, 1)
    # the same numbers of the generator, as two probes of one sample or one of each of two
    two, each = (
        measure(MIXTURE, VPSDE(), copies, trace="gaussian", num_probes=probes, generator=seeded(0), steps=8)
        for copies, probes in ((x, 2), (x.expand(2, -1), 1))
    )
    a, b = each.log_prob.tolist()
    assert two.log_prob.item() == pytest.approx((a + b) / 2)
    assert two.probe_error.item() == pytest.approx(abs(a - b) / 2)
    assert abs(a - b) > 1e-3


def test_bits_per_dim_of_uniform_noise_is_8():
    """Whole numbers 0 to 255 drawn uniformly have 8 bits each, whatever the range of the samples."""
    numbers = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    samples = dequantize(numbers, torch.Generator().manual_seed(1))
    assert -1 <= samples.min() < samples.max() < 1
    assert torch.equal(((samples + 1) * 128).floor().to(torch.uint8), numbers)
    for width in (1.0, 2.0):
        uniform = Likelihood(torch.full((4,), -192 * math.log(width)), torch.zeros(4), 192, samples, 1)
        assert uniform.bits_per_dim(256, width) == pytest.approx(torch.full((4,), 8.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trace": "full"}, "trace 'full' is unknown; choose one of rademacher"),
        ({"num_probes": 0}, "num_probes 0"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(GAUSSIAN, VPSDE(), draw(GAUSSIAN, 2), **arguments)


def test_a_broken_network_is_named():
    broken = type("Broken", (), {"denoised": staticmethod(lambda x, path, t: x * float("nan"))})
    with pytest.raises(FloatingPointError, match="not finite near t = 0.001"):
        measure(broken, VPSDE(), draw(GAUSSIAN, 2))
    with pytest.raises(FloatingPointError, match="not finite near t = 0.001"):
        probability_flow(VPSDE(), lambda x, t: x * float("nan"), draw(GAUSSIAN, 2), *ends(VPSDE()), 1e-5, 1e-5)


# --- dequantisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-4, 2e-3, 0.01, 1.0])
def test_the_truncated_normal_is_that_of_its_density(sigma):
    """By quadrature: draws follow the normal density within the bin, and the entropy is that density's."""
    alpha, x0 = 0.97, 31 / 127.5 - 1
    images = torch.full((1, 20_000), x0, dtype=torch.float64)
    noise = truncated_normal(images, alpha, sigma, seeded(0)) - alpha * x0
    assert (noise.abs() <= alpha * HALF_BIN).all()
    z = torch.linspace(-alpha * HALF_BIN, alpha * HALF_BIN, 200_001, dtype=torch.float64)
    density = torch.exp(-((z / sigma) ** 2) / 2)
    density = density / torch.trapezoid(density, z)
    surprise = -torch.xlogy(density, density)
    assert truncated_normal_entropy(alpha, sigma) == pytest.approx(float(torch.trapezoid(surprise, z)), abs=1e-6)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density, z)])
    share = below[torch.searchsorted(z, noise[0].sort().values).clamp_max(len(z) - 1)]
    # Kolmogorov's statistic is below 1.95 / sqrt(n) in 999 of 1000 cases
    assert (share - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 1.95 / 20_000**0.5


class Pixels:
    """Images of D pixels, each drawn from a law of a few whole numbers."""

    numbers, law = torch.tensor([0, 3, 100, 255]), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    values = numbers.double() / 127.5 - 1
    entropy = float(-(law * law.log2()).sum())

    def draw(self, n, dimensions, generator):
        return self.values[torch.multinomial(self.law, n * dimensions, True, generator=generator)].reshape(n, -1)

    def denoised(self, x, path, t):
        """The mean of x0: a closed form."""
        near = (x[..., None] - path.alpha(t) * self.values) ** 2 / (2 * path.sigma(t) ** 2)
        return torch.softmax(self.law.log() - near, dim=-1) @ self.values

    def bound(self, path, t, dequantization):
        """Bits a pixel of the bound, by quadrature over every bin."""
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        place, half = (self.values, alpha * HALF_BIN) if dequantization == "truncated_normal" else (None, 1 / 256)
        centre = (self.numbers + 0.5) / 128 - 1 if place is None else alpha * place
        x = centre[:, None] + torch.linspace(-half, half, 2001, dtype=torch.float64)
        near = -((x[..., None] - alpha * self.values) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
        log_prob = torch.logsumexp(self.law.log() + near, dim=-1)
        density = torch.ones_like(x) if place is None else torch.exp(-((x - centre[:, None]) ** 2) / (2 * sigma**2))
        density = density / torch.trapezoid(density, x)[:, None]
        nats = torch.trapezoid(density * (density.log().nan_to_num(neginf=0.0) - log_prob), x)
        return float(self.law @ nats) / math.log(2)


@pytest.mark.parametrize(
    ("t_min", "excess"), [(1e-3, 1e-3), (4e-3, 0.6)], ids=["a quarter of half a bin", "as wide as half a bin"]
)
def test_bounds_on_the_entropy_of_pixels(t_min, excess):
    """The exact score of a law of whole numbers: the bounds are those of quadrature, above its entropy,
    truncated_normal nearer, and where the noise of t_min is narrow at it."""
    pixels, path, n = Pixels(), LinearSDE(), 300
    images, bounds = pixels.draw(n, 4, seeded(1)), {}
    time, t_max = (torch.tensor(t, dtype=torch.float64) for t in (t_min, path.t_max))
    own = torch.tensor([[float(-pixels.law[pixels.values == v].log2()) for v in image] for image in images]).mean(1)
    for name in ("truncated_normal", "uniform"):
        x, entropy = dequantized(images, name, path, t_min, seeded(2))
        found = log_likelihood(path, lambda x, t: pixels.denoised(x, path, t), x.double(), time, t_max, 1.0, 1e-4, 1e-4)
        # of these images' numbers, not of others
        bits = replace(found, entropy=entropy).bits_per_dim() - own + pixels.entropy
        bounds[name] = pixels.bound(path, time, name)
        assert abs(float(bits.mean()) - bounds[name]) < 4 * float(bits.std()) / n**0.5
    assert 0 <= bounds["truncated_normal"] - pixels.entropy < excess
    assert bounds["truncated_normal"] < bounds["uniform"]


@pytest.mark.parametrize("dequantization", ["uniform", "truncated_normal"])
def test_the_pipeline_dequantises(pipeline, dequantization):
    numbers = torch.randint(256, (2, 2, 4, 4), generator=seeded(0))
    generators = [seeded(i) for i in range(2)]
    options = {"steps": 2, "class_labels": [0, 2]}
    found = pipeline.log_likelihood(
        images=numbers / 127.5 - 1, generator=generators, dequantization=dequantization, **options
    )
    scheduler, generators = pipeline.scheduler, [seeded(i) for i in range(2)]
    path, t_min = scheduler.path, scheduler.t_min
    x, entropy = dequantized(numbers / 127.5 - 1, dequantization, path, t_min, generators)
    if dequantization == "uniform":
        assert torch.equal(x, torch.stack([dequantize(row, seeded(i)) for i, row in enumerate(numbers)]))
    by_hand = pipeline.log_likelihood(samples=x, generator=generators, **options)
    assert torch.equal(found.log_prob, by_hand.log_prob)
    assert found.bits_per_dim() == pytest.approx((by_hand.nats_per_dim() - entropy) / math.log(2))
    if dequantization == "uniform":
        assert found.bits_per_dim() == pytest.approx(by_hand.bits_per_dim())


def test_what_is_no_pixel_is_not_dequantised(pipeline):
    images = torch.zeros(2, 2, 4, 4)
    with pytest.raises(ValueError, match="is of whole numbers n from 0 to 255 as n / 127.5 - 1, and these images hold"):
        pipeline.log_likelihood(images=images, dequantization="uniform")
    with pytest.raises(ValueError, match="dequantization 'normal' is unknown; choose one of uniform, truncated_normal"):
        pipeline.log_likelihood(images=images, dequantization="normal")
    pipeline.register_to_config(data_mean=0.0, data_std=2.0)
    with pytest.raises(ValueError, match="'uniform' is of the images of a model of pixels: leave it out"):
        pipeline.log_likelihood(images=images, dequantization="uniform")


# --- encodings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_encodings_lead_back(path):
    t_min, t_max = ends(path)
    x = draw(MIXTURE, 32)

    def denoise(x, t):
        return MIXTURE.denoised(x, path, t)

    code = probability_flow(path, denoise, x, t_min, t_max, 1e-5, 1e-5)
    back = probability_flow(path, denoise, code, t_max, t_min, 1e-5, 1e-5)
    assert (back - x).abs().max() < 1e-3
    # what is encoded is distributed as the prior
    many = probability_flow(path, denoise, draw(MIXTURE, 2000, 1), t_min, t_max, 1e-4, 1e-4) / path.prior_std
    assert (many.mean(0)).abs().max() < 0.15
    assert (many.std(0) - 1).abs().max() < 0.1


def test_two_networks_of_the_same_score_give_the_same_code():
    x, codes = draw(MIXTURE, 8), []
    for prediction_type in ("epsilon", "v_prediction", "score"):
        scheduler = ScoreSDEScheduler(sde_type="vp", prediction_type=prediction_type)
        perfect = MIXTURE.network(scheduler)
        denoise = scheduler.denoiser(lambda x, timesteps, f=perfect: f(x, timesteps[0].double()))
        codes.append(probability_flow(scheduler.path, denoise, x, *ends(scheduler.path), 1e-5, 1e-5))
    assert (codes[0] - codes[1]).abs().max() < 1e-3
    assert (codes[0] - codes[2]).abs().max() < 1e-3


def test_slerp_keeps_lengths_and_ends():
    a, b = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    middle = slerp(a, b, 0.5).flatten(1).norm(dim=1)
    lengths = torch.stack([a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)])
    assert (middle > 0.9 * lengths.min(0).values).all()
    assert (middle < 1.1 * lengths.max(0).values).all()
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-5)


# --- the pipeline -------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline():
    return tiny_pipeline(network=random_dit(in_channels=2, std=0.03), denoise_final=False, clip_sample=True)


def test_the_pipeline_encodes_and_leads_back(pipeline):
    pipeline.scheduler.register_to_config(clip_sample=False)
    noise = pipeline.encode(samples=latents(), class_labels=[0, 2])
    back = pipeline(
        latents=noise, class_labels=[0, 2], num_inference_steps=None, rtol=1e-5, atol=1e-5, output_type="latent"
    )
    assert (back.images - latents()).abs().max() < 1e-3
    other = pipeline.encode(samples=latents(), class_labels=[1, 1])
    assert (other - noise).abs().max() > 1e-3


def test_the_pipeline_measures_likelihoods(pipeline):
    summed = pipeline.log_likelihood(samples=latents(), class_labels=[0, 2], trace="exact", rtol=1e-3, atol=1e-3)
    assert summed.dimensions == 32
    # probes agree with the sum; a batch gives what its samples give alone
    probed = pipeline.log_likelihood(
        samples=latents(), class_labels=[0, 2], num_probes=32, generator=torch.Generator().manual_seed(0), steps=8
    )
    assert ((probed.log_prob - summed.log_prob).abs() < 5 * probed.probe_error + 5e-2).all()
    alone = pipeline.log_likelihood(samples=latents()[:1], class_labels=[0], trace="exact", steps=8)
    assert abs(alone.log_prob[0] - summed.log_prob[0]) < 5e-2
    assert all(parameter.grad is None for parameter in pipeline.transformer.parameters())
    fixed = pipeline.log_likelihood(samples=latents(), class_labels=[0, 2], trace="exact", steps=8)
    assert (fixed.log_prob - summed.log_prob).abs().max() < 0.05
    # in pixels of a model without an autoencoder
    images = latents().clamp(-1, 1)
    assert torch.equal(
        pipeline.log_likelihood(images=images, steps=2, generator=seeded(0)).log_prob,
        pipeline.log_likelihood(samples=images, steps=2, generator=seeded(0)).log_prob,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass either images or samples"),
        ({"samples": torch.zeros(2, 3, 4, 4)}, r"shape \(2, 2, 4, 4\), not \(2, 3, 4, 4\)"),
        ({"images": torch.full((2, 2, 4, 4), 200.0)}, "floating-point in .-1, 1.; got torch.float32 from 200"),
        ({"images": torch.zeros(2, 2, 4, 4, dtype=torch.uint8)}, "got torch.uint8"),
        ({"samples": torch.zeros(2, 2, 4, 4), "class_labels": [0, 1, 2]}, "3 class_labels were given for 2 samples"),
        ({"samples": torch.zeros(2, 2, 4, 4), "rtol": -1.0}, "rtol=-1.0"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "log_likelihood"])
def test_wrong_data_are_refused(pipeline, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(pipeline, method)(**arguments)


def test_the_old_name_of_samples_still_works(pipeline):
    new = pipeline.encode(samples=latents(), rtol=1e-2, atol=1e-2)
    with pytest.warns(FutureWarning, match="pass clean samples as `samples`"):
        assert torch.equal(pipeline.encode(latents=latents(), rtol=1e-2, atol=1e-2), new)
    with pytest.warns(FutureWarning, match="pass clean samples as `samples`"):
        pipeline.log_likelihood(latents=latents(), steps=1)
    with pytest.raises(ValueError, match="pass samples alone"):
        pipeline.encode(samples=latents(), latents=latents())


def test_dequantisation_takes_a_generator_of_another_device():
    numbers = torch.zeros(2, 3, dtype=torch.uint8, device="meta")
    assert dequantize(numbers, torch.Generator().manual_seed(0)).device.type == "meta"


@pytest.mark.parametrize("scheduler", [{"sde_type": "ve", "sigma_max": 20.0}, {"sde_type": "edm", "sigma_max": 20.0}])
def test_codes_have_unit_variance_on_every_path(scheduler):
    """Where the prior is not standard normal: the code of (exact) data is."""
    pipeline = tiny_pipeline(network=random_dit(in_channels=2, std=0.01))
    pipeline.scheduler = ScoreSDEScheduler(prediction_type="sample", denoise_final=False, **scheduler)
    code = pipeline.encode(samples=latents(4))
    # nearly the flow of a point mass at 0: what is told of x stays in the code, in units of sigma_min / sigma_max
    assert pipeline.scheduler.init_noise_sigma == pytest.approx(20.0, rel=1e-3)
    back = pipeline(latents=code, num_inference_steps=None, rtol=1e-5, atol=1e-5, output_type="latent").images
    assert (back - latents(4)).abs().max() < 1e-3
