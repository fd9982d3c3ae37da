"""SDEdit: from an image under noise, with labels, by every kind of sampler."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny import random_dit, tiny_pipeline, tiny_vae

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines.latents import spatial_factor


@pytest.fixture
def pipeline():
    return tiny_pipeline(network=random_dit(sample_size=8))


def image(n=2):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def edit(pipeline, **arguments):
    arguments = {"image": image(), "class_labels": [0, 2], "num_inference_steps": 12} | arguments
    return pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **arguments)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"predictor": "heun", "s_churn": 3.0},
        {"predictor": "ancestral", "corrector": "langevin"},
        {"sde_type": "discrete_vp", "predictor": "ddim", "timestep_spacing": "trailing"},
        {"sde_type": "ve", "predictor": "euler_maruyama"},
        {"sde_type": "linear", "predictor": "dpmpp_3m"},
    ],
)
def test_less_strength_stays_closer_to_the_image(pipeline, settings):
    pipeline.scheduler = ScoreSDEScheduler(prediction_type="v_prediction", **settings)
    distances = []
    for strength in (0.05, 0.4, 1.0):
        output = edit(pipeline, strength=strength)
        assert output.images.shape == (2, 1, 8, 8)
        distances.append((output.images - image()).abs().mean())
        pipeline.scheduler.set_timesteps(12, t_start=pipeline.scheduler.t_min + strength * (1 - 1e-3))
        assert output.nfe == pipeline.scheduler.nfe
    assert distances[0] < distances[1]
    assert distances[0] < 0.3


def test_it_begins_where_the_noise_puts_it(pipeline):
    """Strength s is the path time at which the trajectory begins, with all of its steps."""
    output = edit(pipeline, strength=0.4)
    scheduler = pipeline.scheduler
    begin = torch.tensor(scheduler.t_min + 0.4 * (1 - scheduler.t_min), dtype=torch.float64)
    assert output.nfe == 12
    # by hand
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = scheduler.path.sample(2 * image() - 1, noise, begin)
    scheduler.set_timesteps(12, t_start=float(begin), guidance_scale=1.0)
    network = pipeline.guided_network(2, [0, 2])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(network(x, timestep.expand(2)), timestep, x).prev_sample
    assert (output.images - (x / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


def test_one_image_makes_several_and_pil_is_taken(pipeline):
    output = pipeline(image=image(1), class_labels=[0, 1, 2], num_inference_steps=3, output_type="pil")
    assert len(output.images) == 3
    again = pipeline(image=output.images, class_labels=[0, 1, 2], num_inference_steps=3, output_type="pt")
    assert again.images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("adaptive_solver", ["ode", "sde"])
def test_adaptive_solvers_begin_there_too(pipeline, adaptive_solver):
    weak = edit(pipeline, num_inference_steps=None, strength=0.1, adaptive_solver=adaptive_solver)
    strong = edit(pipeline, num_inference_steps=None, strength=1.0, adaptive_solver=adaptive_solver)
    assert weak.nfe < strong.nfe
    assert (weak.images - image()).abs().mean() < (strong.images - image()).abs().mean()
    if adaptive_solver == "ode":
        fixed = edit(pipeline, num_inference_steps=60, strength=0.1)
        assert (fixed.images - weak.images).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.0}, "strength 0.0 must lie in .0, 1."),
        ({"strength": 1.2}, "strength 1.2"),
        ({"image": torch.rand(3, 1, 8, 8)}, "3 images were given for batch_size 2"),
        ({"image": torch.rand(2, 1, 4, 4)}, r"shape \(2, 1, 8, 8\), not \(2, 1, 4, 4\)"),
    ],
)
def test_wrong_arguments_are_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        edit(pipeline, **arguments)


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16", "LA", "CMYK", "F"])
def test_pil_images_of_every_mode(mode, channels):
    """The same grey ramp in any mode begins the same trajectory, up to what the mode can hold."""
    pipeline = tiny_pipeline(network=random_dit(sample_size=8, in_channels=channels))
    if mode == "I;16":
        picture = Image.fromarray(GREY.astype(np.uint16) * 257)
    elif mode == "F":
        picture = Image.fromarray(GREY.astype(np.float32) / 255)
    else:
        picture = Image.fromarray(GREY).convert(mode)
    made = pipeline.prepare_image(picture)
    assert made.shape == (1, channels, 8, 8)
    expected = torch.from_numpy(np.asarray(Image.fromarray(GREY).convert("1" if mode == "1" else "L")) * 1.0)
    expected = expected * (255 if mode == "1" else 1) / 127.5 - 1
    assert (made - expected).abs().max() <= 2.1 / 255
    seen = [
        pipeline(image=each, strength=0.05, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        for each in (picture, [picture], [picture.copy()])
    ]
    assert all((np.asarray(each) == np.asarray(seen[0])).all() for each in seen)


def test_transparent_is_white():
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    pipeline = tiny_pipeline(network=random_dit(sample_size=8, in_channels=3))
    assert (pipeline.prepare_image(picture) == 1).all()


def test_arrays_and_tensors_are_the_same_image(pipeline):
    tensor = image(2)
    array = tensor.permute(0, 2, 3, 1).numpy()
    for each in (tensor, array, list(tensor), list(array), [tensor[:1], tensor[1:]], tensor.double()):
        assert (pipeline.prepare_image(each) - (2 * tensor - 1)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 3, 8, 8), r"shape \(1, 3, 8, 8\); this model takes tensors \(1, height, width\)"),
        (
            np.zeros((8, 8, 4), dtype=np.float32),
            r"shape \(1, 4, 8, 8\); .* arrays \(height, width, 1\)",
        ),
        (np.zeros((8, 8), dtype=np.float32), r"shape \(8, 8\)"),
        (torch.rand(1, 8, 8) * 2 - 1, r"floating-point in \[0, 1\]; got torch.float32 from -0"),
        (torch.full((1, 8, 8), float("nan")), "got torch.float32 from nan to nan"),
        (np.full((8, 8, 1), 200, dtype=np.uint8), "got torch.uint8 from 200 to 200"),
        ([torch.rand(1, 8, 8), torch.rand(1, 4, 4)], "all of one size"),
        ("photo.png", "must be a PIL image, .* got a str"),
        ([], "an empty list"),
        (Image.fromarray(np.full((8, 8), 70000, dtype=np.int32)), "70000"),
    ],
)
def test_what_is_no_image_is_refused_before_the_network_runs(pipeline, image, message):
    pipeline.transformer.register_forward_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=message):
        pipeline(image=image)


def test_autoencoders_take_what_they_were_made_for():
    pipeline = tiny_pipeline(network=random_dit(sample_size=4, in_channels=3))
    pipeline.vae = tiny_vae(channels=3)
    for mode in ("L", "RGBA", "RGB"):
        output = pipeline(image=Image.new(mode, (8, 8)), num_inference_steps=2, output_type="pt")
        assert output.images.shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images must be a tensor \(batch, 3, height, width\); got shape"):
        pipeline.encode(images=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="got a ndarray"):
        pipeline.encode(images=np.zeros((1, 3, 8, 8), dtype=np.float32))
    four = tiny_pipeline(network=random_dit(sample_size=8, in_channels=4))
    with pytest.raises(ValueError, match="a PIL image has no 4 channels"):
        four(image=Image.new("RGBA", (8, 8)))


def test_the_size_of_an_image_is_that_of_pixels(pipeline):
    latent = ScoreSDEPipeline(ScoreSDEScheduler(), transformer=random_dit(4, 3), vae=tiny_vae())
    for whole, size in ((pipeline, 8), (latent, 4 * spatial_factor(latent.vae))):
        for high, wide in ((48, 32), (47, 33)):  # an autoencoder takes sizes that it doesn't divide, too
            with pytest.raises(ValueError, match=f"images from {high} x {wide} to {size} x {size} pixels"):
                whole(image=Image.new("L", (wide, high)), num_inference_steps=2)


def test_stock_schedulers_are_refused(pipeline):
    pipeline.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="image needs a ScoreSDEScheduler"):
        edit(pipeline)


def test_the_scheduler_refuses_a_start_outside_the_path():
    scheduler = ScoreSDEScheduler()
    for arguments in ({"num_inference_steps": 5, "t_start": 1.5}, {"timesteps": [500.0], "t_start": 0.5}):
        with pytest.raises(ValueError, match="t_start .* must lie above 0.001 and at most at 1"):
            scheduler.set_timesteps(**arguments)
