"""Points: the columns of data beside the coordinates of their domain, and through a pipeline."""

import math

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from exact import GaussianImages
from PIL import Image
from tiny import seeded

from score_sde import ScoreSDEPipeline, ScoreSDEScheduler
from score_sde.pipelines.coordinates import Coordinates
from score_sde.pipelines.kinds import kind_of
from score_sde.pipelines.scatter import ABOVE, DATA, HEIGHT, LEFT, SAMPLES, pairs_of


DEGREES = {"std": 180 / math.pi}
MAP = {"domain": "sphere", "channels": 3, "columns": ("latitude", "longitude"), "on_sphere": "latitude_longitude"}


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_latitude_and_longitude_are_unit_vectors():
    space = Coordinates(**MAP)
    values = numbers([0, 0], [0, 90], [90, 0], [-45, 180], [30, -60])
    half = 0.5**0.5
    wanted = numbers([1, 0, 0], [0, 1, 0], [0, 0, 1], [-half, 0, -half], [0.75**0.5 / 2, -0.75, 0.5])
    assert (space.to_points(values) - wanted).abs().max() < 1e-12
    assert (space.to_values(wanted)[[0, 1, 4]] - values[[0, 1, 4]]).abs().max() < 1e-12
    assert space.to_values(numbers([1e-20, 0, 1])).tolist() == [[90.0, 0.0]]


def test_the_two_ends_of_a_turn_are_one_angle():
    space = Coordinates("torus", 2, ("phi", "psi"), **DEGREES)
    assert space.to_points(numbers([180.0, -180.0], [179.99, 10])).tolist() == [[-180, -180], [179.99, 10]]


def test_a_product_has_the_columns_of_its_parts():
    domain = [["flat", 1], ["sphere", 3], ["torus", 1]]
    space = Coordinates(domain, 5, ("depth", "lat", "lon", "angle"), on_sphere="latitude_longitude")
    values = numbers([700.0, 12, -170, 3], [-5, -89, 4, -3])
    points = space.to_points(values)
    assert points.shape == (2, 5) and (points[:, 1:4].norm(dim=1) - 1).abs().max() < 1e-12
    assert (space.to_values(points) - values).abs().max() < 1e-9
    assert space.limits() == [None, (-90, 90), (-180, 180), (-math.pi, math.pi)]


@pytest.mark.parametrize(
    ("space", "values", "message"),
    [
        (
            Coordinates("torus", 2, ("phi", "psi")),
            numbers([1, -170], [0, 90]),
            r"psi: 2 of 2 values are outside of "
            r"\[-3.14159, 3.14159\], they lie from -170 to 90: they look like degrees; say units degrees",
        ),
        (
            Coordinates("torus", 1, ("phi",), **DEGREES),
            numbers([350.0]),
            "from 350 to 350: they look like angles from 0 on; subtract a turn, 360, from those above half of it",
        ),
        (Coordinates("torus", 1), numbers([6.2]), "column 0: .*subtract a turn, 6.28319"),
        (Coordinates("torus", 1, **DEGREES), numbers([math.nan], [2]), "column 0: 1 of 2 values are not finite"),
        (Coordinates("box", 1, ("a",)), numbers([1.2]), r"\[-1, 1\], they lie from 1.2 to 1.2: say by box_ranges"),
        (Coordinates("sphere", 3), numbers([0.5, 0.5, 0.5]), "unit vectors; these have lengths from 0.866"),
        (
            Coordinates("sphere", 2, ("latitude", "longitude")),
            numbers([10, 20]),
            "latitude: .*latitude and longitude in degrees; say units latitude_longitude",
        ),
        (Coordinates(**MAP), numbers([120, 20.0]), r"latitude: .*\[-90, 90\].*latitude comes first, then longitude"),
        (Coordinates("flat", 1), numbers([math.inf]), "column 0: 1 of 1 values are not finite"),
    ],
)
def test_values_that_are_no_points_are_refused(space, values, message):
    with pytest.raises(ValueError, match=message):
        space.to_points(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, ("a",)), r"columns \['a'\] are 1; domain None of 2 channels has 2"),
        (("torus", 3, None, None, None, "latitude_longitude"), "must be latitude_longitude, of a domain with a sphere"),
        (("sphere", 3, None, None, None, "polar"), "coordinates 'polar' must be latitude_longitude"),
        (({"torus": 2}, 3), "has 2 channels; the points have 3"),
    ],
)
def test_coordinates_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Coordinates(*arguments)


def gaussian_points(**arguments):
    """A pipeline of exactly known points, twelve independent numbers of standard deviation 0.5."""
    network = GaussianImages(isotropic=True, sample_size=(1,), in_channels=12)
    network.scheduler = ScoreSDEScheduler(prediction_type="sample", t_min=1e-4)
    pipeline = ScoreSDEPipeline(network.scheduler, unet=network, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, network.mean


def test_points_are_drawn_and_measured_in_the_units_of_their_data():
    scale = torch.linspace(1, 5, 12)
    units = {"data_mean": [*range(12)], "data_std": scale.tolist(), "columns": ",".join("abcdefghijkl")}
    pipeline, mean = gaussian_points(**units)
    mean, std = mean.float() * scale + torch.tensor(units["data_mean"]), 0.5 * scale
    values = pipeline(batch_size=4000, num_inference_steps=20, generator=seeded(0)).images
    assert isinstance(values, np.ndarray) and values.shape == (4000, 12)
    assert (np.abs(values.mean(0) - mean.numpy()) / std.numpy()).max() < 5 / 4000**0.5
    x = mean + std * torch.randn(5, 12, generator=seeded(1))
    found = pipeline.log_likelihood(images=x, trace="exact").log_prob
    exact = -(((x - mean) / std) ** 2 / 2 + std.log() + math.log(2 * math.pi) / 2).sum(1)
    assert (found - exact).abs().max() < 2e-2
    again = pipeline(image=x, strength=1e-3, num_inference_steps=2, generator=seeded(2), output_type="pt").images
    assert ((again - x) / std).abs().max() < 0.1
    with pytest.raises(ValueError, match=r"points must be floating-point numbers \(batch, 12\), a, b, c, "):
        pipeline.log_likelihood(images=x[:, :2])


def test_names_of_columns_are_of_points_alone():
    with pytest.raises(ValueError, match="columns and coordinates are of points"):
        ScoreSDEPipeline(ScoreSDEScheduler(), unet=GaussianImages(), columns="a,b,c")
    with pytest.raises(ValueError, match=r"columns \['a'\] are 1; domain None of 12 channels has 12"):
        gaussian_points(columns="a")


def shows(path, colour):
    return (np.asarray(Image.open(path)) == colour).all(2).any()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_show_samples_beside_data_by_class(tmp_path, channels):
    kind = kind_of({"sample_size": (1,), "in_channels": channels})
    values, classes = np.random.default_rng(0).normal(size=(30, channels)), ["a", "b", "b"] * 10
    kind.save_grid(values, tmp_path / "alone.png")
    kind.save_grid(values, tmp_path / "by_class.png", captions=classes, data=values, data_captions=classes)
    alone, by_class = (Image.open(tmp_path / f"{name}.png").size for name in ("alone", "by_class"))
    assert by_class == (2 * alone[0], 2 * alone[1])
    assert len(pairs_of(channels)) == (1 if channels < 3 else 2)
    assert [shows(tmp_path / "alone.png", colour) for colour in (SAMPLES, DATA)] == [True, False]
    assert all(shows(tmp_path / "by_class.png", colour) for colour in (SAMPLES, DATA))
    # so many classes have no room
    many = [str(number % 13) for number in range(30)]
    kind.save_grid(values, tmp_path / "many.png", captions=many, data=values, data_captions=many)
    assert Image.open(tmp_path / "many.png").size == (alone[0], 2 * alone[1])


def test_a_map_is_wide_and_has_longitude_across(tmp_path):
    kind = kind_of({"sample_size": (1,), "in_channels": 3}, coordinates=MAP | {"mean": None})
    # the whole of the equator
    kind.save_grid(np.stack([np.zeros(500), np.linspace(-180, 180, 500)], axis=1), tmp_path / "map.png")
    picture = np.asarray(Image.open(tmp_path / "map.png"))
    marked = np.argwhere((picture == SAMPLES).all(2))
    assert abs(marked[:, 0] - (ABOVE + HEIGHT / 2)).max() <= 2
    assert np.ptp(marked[:, 1]) >= 2 * HEIGHT - 4 and marked[:, 1].min() >= LEFT - 2


# --- on domains ---------------------------------------------------------------------------------------------------


class OnePoint(ModelMixin, ConfigMixin):
    """The exact network of data that are one point of a domain."""

    @register_to_config
    def __init__(self, point, prediction_type, sample_size=(1,), in_channels=3):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.scheduler = None

    def forward(self, sample, timestep):
        sigma = self.scheduler.path.sigma(self.scheduler.path_time(timestep))
        point = torch.tensor(self.config.point).reshape(1, -1, 1).to(sample).expand_as(sample)
        score = self.scheduler.domain.score(sample, point, sigma)
        is_score = self.config.prediction_type == "score"
        return UNet2DOutput(sample=score if is_score else -sigma.reshape(-1, 1, 1).to(score) * score)


@pytest.mark.parametrize("prediction_type", ["score", "epsilon"])
@pytest.mark.parametrize("domain", ["torus", "box", "sphere", {"torus": 1, "box": 2}])
def test_the_likelihood_on_a_domain_is_that_of_the_heat_kernel(domain, prediction_type):
    point = [0.6, 0.0, -0.8]
    scheduler = ScoreSDEScheduler(sde_type="ve", domain=domain, prediction_type=prediction_type, sigma_min=0.4)
    network = OnePoint(point, prediction_type)
    network.scheduler = scheduler
    pipeline = ScoreSDEPipeline(scheduler, unet=network)
    pipeline.set_progress_bar_config(disable=True)
    centre = torch.tensor(point).reshape(1, 3, 1).expand(4, 3, 1)
    x = scheduler.domain.perturb(centre, torch.full((4,), 0.4), generator=seeded(0))
    found = pipeline.log_likelihood(samples=x, trace="exact", rtol=1e-5, atol=1e-5).log_prob
    exact = scheduler.domain.log_kernel(x, centre, scheduler.path.sigma(torch.tensor(scheduler.t_min)))
    assert (found - exact).abs().max() < 1e-3
    for steps in (20, None):
        drawn = pipeline(batch_size=4, num_inference_steps=steps, generator=seeded(1), output_type="latent").images
        scheduler.domain.check(drawn)
        # the last step is a noise level long
        assert (drawn - centre).norm(dim=1).max() < 0.4
    with pytest.raises(ValueError, match="adaptive_solver 'sde' has no meaning on domain"):
        pipeline(num_inference_steps=None, adaptive_solver="sde")
