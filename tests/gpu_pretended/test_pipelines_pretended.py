"""Within a trajectory nothing is sent to the device, and nobody waits for it: every pipeline and way of guidance, on a
pretended one, which also refuses tensors of two devices."""

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from networks import small_dit, tiny_unet
from pretended_cuda import CUDA, PretendedCuda, generator
from tiny import latent_pipeline, random_dit, tiny_pipeline, tiny_vae
from words import prompt_pipeline

from score_sde import DiTModel, NoiseConditionalClassifier, ScoreSDEInversePipeline, ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines.latents import denormalize_latents, normalize_latents
from score_sde.pipelines.operators import deblurring, inpainting
from score_sde.pipelines.pipeline_score_sde_inverse import METHODS


@pytest.fixture
def cuda():
    with PretendedCuda() as cuda:
        yield cuda


def within_a_trajectory(cuda, pipeline, **arguments):
    """(transfers, waits) from the end of the second step to that of the last."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(CUDA)
    marks = []

    def note(pipeline, step, timestep, tensors):
        marks.append((len(work.transfers), len(work.waits)))

    told = {"num_inference_steps": 6, "generator": generator(), "output_type": "latent"} | arguments
    with cuda.watched() as work:
        found = pipeline(callback_on_step_end=note, **told).images
    assert found.is_cuda and len(marks) >= 6
    (begin_transfers, begin_waits), (transfers, waits) = marks[1], marks[-1]
    return work.transfers[begin_transfers:transfers], work.waits[begin_waits:waits]


def guided_by(name):
    torch.manual_seed(0)
    classifier = NoiseConditionalClassifier(4, 1, 3, block_out_channels=(16, 16), dropout=0.0).eval()
    return {
        "nothing": {},
        "a scale": {"guidance_scale": 3.0},
        "a guider": {"guider": ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.8)},
        "a weaker network": {"weaker_network": random_dit(seed=1).to(CUDA), "guidance_scale": 2.0},
        "a classifier": {"classifier": classifier.to(CUDA)},
    }[name]


@pytest.mark.parametrize("name", ["nothing", "a scale", "a guider", "a weaker network", "a classifier"])
def test_guidance(cuda, name):
    assert within_a_trajectory(cuda, tiny_pipeline(), class_labels=[0, 2], **guided_by(name)) == ([], [])


@pytest.mark.parametrize(
    "settings",
    [{"predictor": "ancestral", "corrector": "langevin"}, {"predictor": "heun", "s_churn": 3.0}, {"clip_sample": True}],
    ids=str,
)
def test_samplers_with_noise_and_limits(cuda, settings):
    assert within_a_trajectory(cuda, tiny_pipeline(**settings), class_labels=[0, 2]) == ([], [])


def test_latents_words_and_a_unet(cuda):
    assert within_a_trajectory(cuda, latent_pipeline(), class_labels=[0, 2]) == ([], [])
    assert within_a_trajectory(cuda, prompt_pipeline(), prompt=["a red hat"] * 2, guidance_scale=2.0) == ([], [])
    unet = ScoreSDEPipeline(ScoreSDEScheduler(), unet=tiny_unet())
    assert within_a_trajectory(cuda, unet, class_labels=[0, 2]) == ([], [])


def test_images_and_other_sizes(cuda):
    image = torch.rand(2, 1, 4, 4)
    assert within_a_trajectory(cuda, tiny_pipeline(), class_labels=[0, 2], image=image) == ([], [])
    network = DiTModel(4, 2, 2, hidden_size=16, num_layers=1, num_attention_heads=2, condition_channels=1)
    told = {"condition_image": image, "class_labels": [0, 2], "guidance_scale": 2.0}
    assert within_a_trajectory(cuda, tiny_pipeline(network=network.eval()), **told) == ([], [])
    assert within_a_trajectory(cuda, tiny_pipeline(), class_labels=[0, 2], height=8, width=4) == ([], [])


@pytest.mark.parametrize("scheduler", [{"network_map": "flow_map"}, {"network_map": "consistency"}, {}], ids=str)
@pytest.mark.parametrize("guidance", [{"guidance_embeds": True}, {"folded_guidance": 3.0}], ids=str)
def test_maps_and_learned_guidance(cuda, scheduler, guidance):
    guidance = guidance | {"two_times": scheduler.get("network_map") == "flow_map"}
    network = DiTModel(4, 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3, **guidance)
    pipeline = tiny_pipeline(network=network.eval(), **scheduler)
    assert within_a_trajectory(cuda, pipeline, class_labels=[0, 2], guidance_scale=3.0) == ([], [])


@pytest.mark.parametrize("domain", ["torus", "box", "sphere", {"torus": 1, "flat": 2}], ids=str)
def test_points_of_a_domain(cuda, domain):
    options = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "num_classes": 3, "domain": domain}
    network = DiTModel(sample_size=(1,), patch_size=1, in_channels=3, **options).eval()
    scheduler = ScoreSDEScheduler(sde_type="ve", domain=domain, prediction_type="score")
    pipeline = ScoreSDEPipeline(scheduler, transformer=network)
    assert within_a_trajectory(cuda, pipeline, class_labels=[0, 2], guidance_scale=2.0) == ([], [])


@pytest.mark.parametrize("method", METHODS)
def test_inverse_problems(cuda, method):
    operator = inpainting(torch.arange(16).reshape(4, 4) % 3 > 0)
    network = random_dit(in_channels=3)
    pipeline = tiny_pipeline(ScoreSDEInversePipeline, network, predictor="ancestral")
    y = operator(torch.randn(2, 3, 4, 4).tanh())
    told = {"operator": operator, "measurement": y, "method": method, "class_labels": [0, 2]}
    told |= {"jump_length": 2, "resamplings": 2} if method == "repaint" else {"noise_std": 0.1}
    assert within_a_trajectory(cuda, pipeline, **told) == ([], [])


def test_equations_are_looked_at_after_every_fifth_step(cuda):
    """Of an operator whose equations conjugate gradients solve: stopping saves more than waiting costs."""
    operator, network = deblurring(0.4), random_dit(in_channels=3)
    pipeline = tiny_pipeline(ScoreSDEInversePipeline, network)
    y = operator(torch.randn(2, 3, 4, 4).tanh())
    told = {"operator": operator, "measurement": y, "noise_std": 0.1, "class_labels": [0, 2]}
    transfers, waits = within_a_trajectory(cuda, pipeline, **told)
    assert not transfers and len(waits) <= 4 * 3 and all("operators.py" in each for each in waits)


def test_an_inverse_problem_of_latents(cuda):
    operator = inpainting(torch.arange(64).reshape(8, 8) % 3 > 0)
    pipeline = ScoreSDEInversePipeline(ScoreSDEScheduler(), vae=tiny_vae(), transformer=random_dit(in_channels=3))
    told = {"operator": operator, "measurement": operator(torch.randn(2, 1, 8, 8).tanh()), "method": "dps"}
    assert within_a_trajectory(cuda, pipeline, **told, class_labels=[0, 2]) == ([], [])


def test_statistics_of_latents_are_sent_once(cuda):
    config, latents = tiny_vae().config, torch.randn(2, 3, 4, 4).to(CUDA)
    normalize_latents(latents, config)
    with cuda.watched() as work:
        there = denormalize_latents(normalize_latents(latents, config), config)
    assert not work.transfers and not work.waits and len(work.kernels) == 4
    assert (there.cpu() - latents.cpu()).abs().max() < 1e-5


@pytest.mark.parametrize("position_embedding", ["sincos", "rotary"])
def test_positions_of_other_sizes_are_sent_once(cuda, position_embedding):
    model, x = small_dit(position_embedding=position_embedding).to(CUDA), torch.randn(2, 3, 8, 12).to(CUDA)
    told = torch.ones(2).to(CUDA), torch.tensor([1, 2]).to(CUDA)
    model(x, *told)
    with cuda.watched() as work:
        model(x, *told)
    assert not work.transfers and not work.waits


@pytest.mark.parametrize("build", [small_dit, tiny_unet])
def test_a_network_takes_what_is_on_the_host(cuda, build):
    model = build(cross_attention_dim=7, pooled_projection_dim=5)
    told = {
        "timestep": torch.tensor([30.0, 900.0]),
        "class_labels": torch.tensor([1, 3]),
        "encoder_hidden_states": torch.randn(2, 6, 7),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6]),
        "pooled_projections": torch.randn(2, 5),
    }
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x, **told).sample
        model.to(CUDA)
        assert (model(x.to(CUDA), **told).sample.cpu() - expected).abs().max() < 1e-4 * expected.abs().max()
    on_it = {name: each.to(CUDA) for name, each in told.items()}
    told_numbers = build(two_times=True, guidance_embeds=True).to(CUDA)
    inside = x.to(CUDA)
    for numbers in ({}, {"timestep_to": 3.0, "guidance": 2.0}):
        with cuda.watched() as work:
            told_numbers(inside, 30, class_labels=on_it["class_labels"], **numbers)
        assert not work.transfers and not work.waits
    with cuda.watched() as work:
        model(x.to(CUDA), **on_it)
        model.null_conditions(on_it)
    assert len(work.transfers) == 1  # of x
