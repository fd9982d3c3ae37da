"""A network of points: what it is told of their domain, and that it was told nothing before."""

import json
import math

import pytest
import torch
from networks import awake

from score_sde import DiTModel


SIZE = {"sample_size": (1,), "patch_size": 1, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}


def network(channels, **arguments):
    torch.manual_seed(0)
    return awake(DiTModel(in_channels=channels, num_classes=3, **SIZE, **arguments))


def points(channels, count=6):
    return torch.randn(count, channels, 1, generator=torch.Generator().manual_seed(1))


TIME = torch.tensor(300.0)


@pytest.mark.parametrize("domain", ["torus", {"flat": 1, "torus": 2}])
def test_a_network_is_periodic_in_angles_alone(domain):
    model, x, turns = network(3, domain=domain), points(3), torch.tensor([3, -1, 2.0])[:, None]
    angles = torch.tensor([domain == "torus", True, True])[:, None]
    output = model(x, TIME).sample
    assert output.std() > 0.01
    assert (model(x + 2 * math.pi * turns * angles, TIME).sample - output).abs().max() < 1e-4
    moved = (model(x + 2 * math.pi * turns * ~angles, TIME).sample - output).abs().max()
    assert (moved > 1e-3) == (domain != "torus")
    # half a turn is another angle
    assert (model(x + math.pi * angles, TIME).sample - output).abs().max() > 1e-3


@pytest.mark.parametrize(("domain", "sphere"), [("sphere", slice(0, 4)), ({"box": 1, "sphere": 3}, slice(1, 4))])
def test_what_it_returns_on_a_sphere_is_tangent(domain, sphere):
    model, x = network(4, domain=domain, num_frequencies=0), points(4)
    x[:, sphere] = torch.nn.functional.normalize(x[:, sphere], dim=1)
    output = model(x, TIME).sample
    along = (output * x)[:, sphere].sum(1)
    assert along.abs().max() < 1e-6 < 0.01 < output[:, sphere].abs().max()
    assert domain == "sphere" or output[:, 0].abs().max() > 1e-3


def test_without_a_domain_a_network_is_what_it_was():
    before = network(2)
    assert before.patch_embed.in_features == 2 and before.config.domain is None
    again = DiTModel.from_config({k: v for k, v in before.config.items() if k not in ("domain", "num_frequencies")})
    assert again.state_dict().keys() == before.state_dict().keys()


def test_the_order_of_a_domain_is_kept_in_a_file(tmp_path):
    model = network(3, domain={"torus": 2, "flat": 1})
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    opened = DiTModel.from_pretrained(tmp_path)
    assert opened.parts == model.parts and opened.config.domain == [["torus", 2], ["flat", 1]]
    assert torch.equal(opened(points(3), TIME).sample, model(points(3), TIME).sample)


def test_a_fresh_network_of_points_returns_exactly_zero():
    model = DiTModel(in_channels=3, num_classes=3, domain="sphere", **SIZE)
    assert not model(points(3), TIME).sample.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "circle"}, "domain 'circle' is unknown; choose one of torus, box, sphere, flat"),
        ({"domain": [["torus", 2]]}, r"domain \[\['torus', 2\]\] has 2 channels"),
        ({"domain": {"torus": 2}}, r"domain {'torus': 2} has 2 channels, the samples have 3"),
        ({"domain": {"torus": 3, "flat": 0}}, "domain flat 0 must be a whole number"),
        ({"domain": "torus", "num_frequencies": 0}, "num_frequencies 0 must be a whole number from 1 to 16"),
        ({"domain": "box", "num_frequencies": 17}, "num_frequencies 17 must be a whole number from 0 to 16"),
        (
            {"domain": "box", "learn_sigma": True},
            "domain 'box' is of points, which are no tokens and have no learn_sigma",
        ),
    ],
)
def test_a_domain_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiTModel(in_channels=3, num_classes=3, **SIZE, **arguments)
