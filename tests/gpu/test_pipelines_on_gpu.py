"""Pipelines on a GPU: what they make on the CPU of the same noise, in every way there is; generators of either device,
half precision, offloading, stock pipelines."""

import pytest
import torch
from device import DEVICE, ON_GPU, difference
from diffusers import AutoencoderKL, DDPMPipeline, DiTPipeline
from diffusers.guiders import ClassifierFreeGuidance
from networks import randn, tiny_dit
from tiny import latent_pipeline, random_dit, seeded, tiny_pipeline, tiny_vae
from words import prompt_pipeline

from score_sde import (
    DiTModel,
    NoiseConditionalClassifier,
    ScoreSDEInversePipeline,
    ScoreSDEPipeline,
    ScoreSDEScheduler,
    ScoreUNetModel,
    load_bundle,
    save_bundle,
)
from score_sde.pipelines.operators import LinearOperator, colourisation, deblurring, inpainting, super_resolution
from score_sde.pipelines.pipeline_score_sde_inverse import METHODS


pytestmark = pytest.mark.gpu

EXACT = 1e-3


def silent(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **arguments):
    """Latents of two samples, with noise of the CPU."""
    arguments = {"num_inference_steps": 5, "output_type": "latent", "generator": seeded(0)} | arguments
    return pipeline(**arguments).images


def compare(build, use=draw, bound=EXACT):
    """What use(pipeline) returns, on the GPU as on the CPU."""
    expected, found = use(silent(build())), use(silent(build()).to(DEVICE))
    assert found.device.type == DEVICE.type
    assert difference(found, expected) < bound
    return found


def unet_pipeline():
    torch.manual_seed(0)
    unet = ScoreUNetModel(8, 1, block_out_channels=(16, 16), layers_per_block=1, attention_resolutions=(4,))
    return ScoreSDEPipeline(ScoreSDEScheduler(prediction_type="v_prediction"), unet=unet.eval())


def signal_pipeline():
    torch.manual_seed(0)
    network = DiTModel((16,), 4, 1, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return tiny_pipeline(network=network.eval())


def seeing_pipeline():
    """In latents, told classes and a grey image beside."""
    torch.manual_seed(0)
    network = DiTModel(4, 2, 6, 16, 1, 2, num_classes=3, condition_channels=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scheduler = ScoreSDEScheduler(prediction_type="v_prediction")
    vae = tiny_vae(channels=3)
    return ScoreSDEPipeline(scheduler, transformer=network.eval(), vae=vae, condition_from="grayscale")


PIPELINES = {
    "pixels": (tiny_pipeline, {"class_labels": [0, 2]}),
    "a u-net": (unet_pipeline, {"batch_size": 2}),
    "latents": (latent_pipeline, {"class_labels": [0, 2]}),
    "signals": (signal_pipeline, {"class_labels": [0, 2]}),
    "an image": (
        seeing_pipeline,
        {"class_labels": [0, 2], "condition_image": torch.rand(2, 1, 8, 8, generator=seeded(1))},
    ),
    "words": (prompt_pipeline, {"prompt": ["a red hat", "the blue dress with dots"]}),
}
every_pipeline = pytest.mark.parametrize("name", PIPELINES)


@every_pipeline
def test_generation(name):
    build, told = PIPELINES[name]
    compare(build, lambda pipeline: draw(pipeline, **told))
    if name != "a u-net":
        compare(build, lambda pipeline: draw(pipeline, **told, guidance_scale=3.0))


def test_other_sizes():
    compare(tiny_pipeline, lambda pipeline: draw(pipeline, class_labels=[0, 2], height=8, width=4))
    compare(latent_pipeline, lambda pipeline: draw(pipeline, class_labels=[0, 2], height=8, width=16))


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_outputs_of_every_type(name):
    build, told = PIPELINES[name]
    pipeline = silent(build()).to(DEVICE)
    expected = draw(silent(build()), output_type="pt", **told)
    found = draw(pipeline, output_type="pt", **told)
    assert found.device.type == DEVICE.type and (found.cpu() - expected).abs().max() < EXACT
    assert abs(draw(pipeline, output_type="np", **told).transpose(0, 3, 1, 2) - expected.numpy()).max() < EXACT
    images = draw(pipeline, output_type="pil", **told)
    assert images[0].size == tuple(expected.shape[:1:-1])


def test_labels_and_latents_may_be_on_either_device():
    pipeline, noise = tiny_pipeline().to(DEVICE), randn(2, 1, 4, 4)
    expected = draw(pipeline, class_labels=[0, 2], latents=noise)
    for device in ("cpu", DEVICE):
        found = draw(pipeline, class_labels=torch.tensor([0, 2], device=device), latents=noise.to(device))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("settings", [{}, {"predictor": "ancestral", "corrector": "langevin"}], ids=["ode", "sde"])
@pytest.mark.parametrize("device", ["cpu", DEVICE], ids=["noise of the cpu", "noise of the gpu"])
def test_generators_of_either_device(settings, device):
    """The same seed gives the same images, each of several its own image, whatever else is in the batch."""
    pipeline = tiny_pipeline(**settings).to(DEVICE)

    def with_seeds(*seeds):
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        return draw(pipeline, class_labels=[1] * len(seeds), generator=generators)

    def with_seed(seed):
        return draw(pipeline, class_labels=[0, 2], generator=torch.Generator(device).manual_seed(seed))

    assert torch.equal(with_seed(1), with_seed(1)) and not torch.equal(with_seed(1), with_seed(2))
    assert difference(with_seeds(5, 6, 7)[1:2], with_seeds(6)) < (0.1 if settings else EXACT)


def test_noise_of_the_cpu_is_the_same_on_every_device():
    compare(lambda: tiny_pipeline(predictor="ancestral"), lambda pipeline: draw(pipeline, class_labels=[0, 2]))


@pytest.mark.parametrize("name", ["guider", "weaker network", "classifier"])
def test_guidance(name):
    def use(pipeline):
        torch.manual_seed(0)
        classifier = NoiseConditionalClassifier(4, 1, 3, block_out_channels=(16, 16), dropout=0.0).eval()
        arguments = {
            "guider": {"guider": ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.8)},
            "weaker network": {"weaker_network": random_dit(seed=1).to(pipeline.device), "guidance_scale": 2.0},
            "classifier": {"classifier": classifier.to(pipeline.device), "classifier_scale": 2.0},
        }[name]
        return draw(pipeline, class_labels=[0, 2], **arguments)

    compare(tiny_pipeline, use)


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_image_to_image(name):
    build, told = PIPELINES[name]
    image = torch.rand(2, 1, 4 if name == "pixels" else 8, 4 if name == "pixels" else 8, generator=seeded(3))
    compare(build, lambda pipeline: draw(pipeline, **told, image=image, strength=0.5))
    compare(build, lambda pipeline: draw(pipeline, **told, image=image.to(pipeline.device), strength=0.5))


@pytest.mark.parametrize("solver", ["ode", "sde"])
def test_adaptive_solvers(solver):
    if solver == "ode":
        pytest.importorskip("torchdiffeq")
    tolerances = {"rtol": 1e-4, "atol": 1e-4} if solver == "ode" else {"rtol": 0.2, "atol": 0.1}
    arguments = {"class_labels": [0, 2], "num_inference_steps": None, "adaptive_solver": solver, **tolerances}
    # rounding may choose other steps
    compare(tiny_pipeline, lambda pipeline: draw(pipeline, **arguments), 5e-3 if solver == "ode" else 0.1)


@pytest.mark.parametrize("trace", ["rademacher", "exact"])
def test_likelihoods(trace):
    pytest.importorskip("torchdiffeq")
    images = randn(2, 1, 4, 4).tanh()

    def bits(pipeline):
        found = pipeline.log_likelihood(images, class_labels=[0, 2], trace=trace, steps=4, generator=seeded(0))
        assert found.log_prob.device.type == pipeline.device.type
        return found.bits_per_dim()

    compare(tiny_pipeline, bits)
    compare(tiny_pipeline, lambda p: p.log_likelihood(images, trace=trace, rtol=1e-3, atol=1e-3).noise, 0.02)


def test_encodings():
    pytest.importorskip("torchdiffeq")
    images = randn(2, 1, 4, 4).tanh()
    compare(tiny_pipeline, lambda pipeline: pipeline.encode(images, class_labels=[0, 2], rtol=1e-4, atol=1e-4), 5e-3)


OPERATORS = {
    "inpainting": inpainting(torch.arange(16).reshape(4, 4) % 3 > 0),
    "colourisation": colourisation(),
    "super-resolution": super_resolution(2),
    "deblurring": deblurring(0.4),
    "pair": LinearOperator(lambda x: x.flatten(1)[:, :5].cumsum(1)),
}


def inverse_pipeline(**settings):
    return tiny_pipeline(ScoreSDEInversePipeline, random_dit(in_channels=3), **settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("operator", ["inpainting", "deblurring"])
def test_every_inverse_method(method, operator):
    solve_inverse(method, OPERATORS[operator])


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in ("inpainting", "deblurring")])
def test_every_operator(operator):
    solve_inverse("pigdm", OPERATORS[operator])


def solve_inverse(method, operator):
    settings = {"predictor": "ancestral"} if method in ("dps", "repaint") else {}
    arguments = {"jump_length": 2, "resamplings": 2} if method == "repaint" else {}
    y = operator(randn(2, 3, 4, 4).tanh())

    def use(pipeline):
        output = pipeline(
            operator,
            y,
            method,
            noise_std=0.0 if method == "dps" else 0.1,
            class_labels=[0, 2],
            num_inference_steps=5,
            generator=seeded(0),
            output_type="latent",
            **arguments,
        )
        assert output.residual.device.type == pipeline.device.type
        return output.images

    compare(lambda: inverse_pipeline(**settings), use, 5e-3)


def test_an_inverse_problem_of_latents():
    operator = inpainting(torch.arange(64).reshape(8, 8) % 3 > 0)
    y = operator(randn(2, 1, 8, 8).tanh())

    def build():
        return ScoreSDEInversePipeline(
            ScoreSDEScheduler(predictor="ancestral"), vae=tiny_vae(), transformer=random_dit(in_channels=3)
        )

    compare(build, lambda p: draw(p, operator=operator, measurement=y, method="dps", class_labels=[0, 2]), 5e-3)


# --- half precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_pipeline
def test_networks_in_half_precision(name, dtype):
    """The state of a trajectory stays float32."""
    build, told = PIPELINES[name]
    found = draw(silent(build()).to(DEVICE, dtype), **told)
    assert found.dtype == torch.float32
    assert difference(found, draw(silent(build()), **told)) < (0.01 if dtype == torch.float16 else 0.05)


# numpy has no bfloat16, and DDPMPipeline hands it what it has
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_stock_pipelines_around_our_network_and_scheduler(dtype):
    """Their states are of the network's precision."""
    unet = unet_pipeline().unet
    stock = silent(DDPMPipeline(unet, ScoreSDEScheduler(prediction_type="v_prediction"))).to(DEVICE, dtype)
    images = stock(2, generator=seeded(0), num_inference_steps=5, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and (images == images).all()
    torch.manual_seed(0)
    network = tiny_dit(sample_size=4, in_channels=4, num_classes=1000)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    stock = silent(DiTPipeline(network, vae, ScoreSDEScheduler())).to(DEVICE, dtype)
    images = stock([3, 5], generator=seeded(0), num_inference_steps=5, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and (images == images).all()


# --- offloading ---------------------------------------------------------------------------------------------------


OFFLOADING = {
    "models": lambda pipeline: pipeline.enable_model_cpu_offload(device=DEVICE),
    "layers": lambda pipeline: pipeline.enable_sequential_cpu_offload(device=DEVICE),
    "groups of blocks": lambda pipeline: pipeline.enable_group_offload(DEVICE, num_blocks_per_group=1),
    "leaves": lambda pipeline: pipeline.enable_group_offload(DEVICE, offload_type="leaf_level", use_stream=ON_GPU),
}


def blocks_of(network):
    """The larger parts of a network, which are offloaded in every way."""
    return network.blocks if isinstance(network, DiTModel) else [*network.down_blocks, *network.up_blocks]


# accelerate cannot offload layers from the CPU to itself
every_way = pytest.mark.parametrize("way", [name for name in OFFLOADING if ON_GPU or name != "layers"])


@every_way
@every_pipeline
def test_offloading(name, way):
    build, told = PIPELINES[name]
    pipeline = silent(build())
    OFFLOADING[way](pipeline)
    expected = draw(silent(build()), output_type="pt", **told)
    for _ in range(2):  # the second call finds what the first one left
        found = draw(pipeline, output_type="pt", **told)
        assert found.device.type == DEVICE.type and (found.cpu() - expected).abs().max() < EXACT
    # leaves may be fetched before they are needed
    if ON_GPU and way != "leaves":
        at_rest = {each.device.type for block in blocks_of(pipeline.denoiser) for each in block.parameters()}
        assert at_rest == ({"meta"} if way == "layers" else {"cpu"})


@every_way
def test_offloading_of_inverse_problems(way):
    pipeline, y = inverse_pipeline(), OPERATORS["inpainting"](randn(2, 3, 4, 4).tanh())
    OFFLOADING[way](pipeline)
    told = {"operator": OPERATORS["inpainting"], "measurement": y, "method": "pigdm", "class_labels": [0, 2]}
    assert difference(draw(pipeline, **told), draw(inverse_pipeline(), **told)) < 5e-3


# --- bundles ------------------------------------------------------------------------------------------------------


@every_pipeline
def test_a_bundle_of_the_cpu_opens_on_the_gpu_and_back(name, tmp_path):
    build, told = PIPELINES[name]
    expected = draw(silent(build()), **told)
    save_bundle(build(), tmp_path / "cpu")
    opened = silent(load_bundle(tmp_path / "cpu")).to(DEVICE)
    assert difference(draw(opened, **told), expected) < EXACT
    save_bundle(opened, tmp_path / "gpu")
    assert torch.equal(draw(silent(load_bundle(tmp_path / "gpu")), **told), expected)


# --- compilation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_compiled_networks(whole):
    """One compilation serves a trajectory, guided or not."""
    expected = [draw(tiny_pipeline(), class_labels=[0, 2], guidance_scale=scale) for scale in (1.0, 3.0)]
    pipeline = tiny_pipeline().to(DEVICE)
    if whole:
        pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, backend="eager")
    else:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        found = [draw(pipeline, class_labels=[0, 2], guidance_scale=1.0)]
        found.append(draw(pipeline, class_labels=[0, 2], guidance_scale=3.0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        # another batch and other steps ask for nothing new
        draw(pipeline, class_labels=[0, 1, 2], guidance_scale=3.0, num_inference_steps=3)
    assert max(difference(*each) for each in zip(found, expected, strict=True)) < EXACT
