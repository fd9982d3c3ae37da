"""Distances between sets of features against closed forms, and the features themselves."""

import numpy as np
import pytest
import torch
from tiny import seeded

from score_sde.training.parts.classifier import make_classifier
from score_sde.training.parts.metrics import (
    ClassifierFeatures,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    open_features,
    precision_and_recall,
    resized,
)


def normal(n, d=3, seed=0):
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def test_frechet_distance_of_normal_distributions():
    """Covariances that commute: |m - m'|^2 + sum (s - s')^2; and any two, by the roots of the eigenvalues of C C'."""
    rotation, _ = torch.linalg.qr(normal(4, 4))
    std, other = torch.tensor([1.0, 2, 0.5, 0], dtype=torch.float64), torch.tensor([2.0, 2, 1, 1], dtype=torch.float64)
    first, second = (rotation @ torch.diag(s**2) @ rotation.T for s in (std, other))
    mean = torch.tensor([1.0, 0, 2, 0], dtype=torch.float64)
    found = frechet_distance(mean, first, torch.zeros(4, dtype=torch.float64), second)
    assert found == pytest.approx(5 + float((std - other).square().sum()), abs=1e-6)
    a, b = (x.T @ x for x in (normal(9, 4, 1), normal(9, 4, 2)))
    expected = float((a + b).trace()) - 2 * sum(np.linalg.eigvals((a @ b).numpy()).real ** 0.5)
    assert frechet_distance(mean, a, mean, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="the covariance has the eigenvalue -1"):
        frechet_distance(mean, torch.diag(torch.tensor([1.0, 2, 3, -1])).double(), mean, b)


@pytest.mark.parametrize("batches", [(50,), (1, 1, 48), (20, 30), (49, 1)])
def test_moments_are_those_of_numpy_for_any_batches(batches):
    x = normal(50, 4) * torch.tensor([1, 10, 0.1, 1]) + torch.tensor([1e4, 0, -3, 5])
    found = Moments()
    for part in x.split(batches):
        found.add(part)
    for mean, covariance in (found.result(), moments(x, chunk=7)):
        assert np.allclose(mean, x.numpy().mean(0), rtol=1e-13, atol=1e-13)
        assert np.allclose(covariance, np.cov(x.numpy().T), rtol=1e-9, atol=1e-9)
    assert moments(x.float())[1].dtype == torch.float64
    assert np.allclose(moments(x[:2])[1], np.cov(x[:2].numpy().T))
    with pytest.raises(ValueError, match="1 features have no covariance"):
        moments(x[:1])


def test_the_distance_of_what_is_not_finite_is_nan():
    good = moments(normal(9, 4))
    x = normal(9, 4, 1)
    x[3, 2] = np.inf
    assert np.isnan(frechet_distance(*moments(x), *good)) and np.isnan(frechet_distance(*good, *moments(x)))


def kernel_distance_by_hand(x, y):
    """Every pair, one by one (Binkowski et al. 2018, Eq. 4)."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    others = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within + others - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_the_unbiased_estimate():
    """With subsets as large as the sets there is but one estimate."""
    x, y = normal(6, 5, 1), normal(6, 5, 2) + 0.5
    found, error = kernel_distance(x, y, subsets=4)
    assert found == pytest.approx(kernel_distance_by_hand(x, y), rel=1e-9)
    assert error == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x[:2], y[:2])[0] == pytest.approx(kernel_distance_by_hand(x[:2], y[:2]), rel=1e-9)
    for pair in ((x[:1], y), (x, y[:1])):
        with pytest.raises(ValueError, match="a kernel distance needs at least 2 features of each"):
            kernel_distance(*pair)
    # two samples of one distribution: 0 within a few of its own errors
    x, y = normal(1000, 5, 3), normal(800, 5, 4)
    found, error = kernel_distance(x, y, subsets=50, subset_size=100)
    assert abs(found) < 5 * error
    assert kernel_distance(x, y, subset_size=100, seed=1) == kernel_distance(x, y, subset_size=100, seed=1)
    assert kernel_distance(x, y, subset_size=100, seed=1) != kernel_distance(x, y, subset_size=100)


class Given(torch.nn.Module):
    """Passes features on to torchmetrics, which would compute them from images."""

    num_features = None

    def forward(self, features):
        return features


@pytest.mark.filterwarnings("ignore:Metric")
def test_scores_are_those_of_torchmetrics():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = normal(40, 5, 1), normal(30, 5, 2)
    kid, score = KernelInceptionDistance(Given(), subsets=7, subset_size=20), InceptionScore(Given(), splits=4)
    kid.update(y, real=True)
    kid.update(x, real=False)
    score.update(x)
    torch.manual_seed(3)
    mean, std = map(float, kid.compute())
    assert kernel_distance(x, y, 7, 20, seed=3) == pytest.approx((mean, std / 7**0.5), rel=1e-5)
    torch.manual_seed(3)
    assert inception_score(x, 4, seed=3) == pytest.approx(tuple(map(float, score.compute())), rel=1e-5)


def covered_by_hand(points, centres, neighbours):
    inside = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = sorted(float((centre - each).norm()) for j, each in enumerate(centres) if j != i)
            if float((point - centre).norm()) <= others[neighbours - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_those_of_every_pair(neighbours):
    real, generated = normal(23, 3, 1), 1.3 * normal(17, 3, 2) + 0.7
    expected = covered_by_hand(generated, real, neighbours), covered_by_hand(real, generated, neighbours)
    assert len({0, 1, *expected}) == 4  # nothing is trivial
    assert precision_and_recall(real, generated, neighbours, chunk=5) == pytest.approx(expected)
    # far from 0, as features are
    assert precision_and_recall(real + 1e6, generated + 1e6, neighbours) == pytest.approx(expected)
    for pair in ((real[:neighbours], generated), (real, generated[:neighbours])):
        with pytest.raises(ValueError, match=f"need at least {neighbours + 1} features of each"):
            precision_and_recall(*pair, neighbours)


def test_a_neighbour_at_the_edge_is_inside():
    line = torch.arange(4.0, dtype=torch.float64)[:, None]
    # every ball reaches to the next point, at 1
    others = torch.tensor([[4.0], [5.0], [6.5], [9.0]], dtype=torch.float64)
    assert precision_and_recall(line, others, 1) == (0.25, 0.25)
    assert precision_and_recall(line, others + 1e-9, 1)[0] == 0


def test_precision_and_recall_see_what_is_missing():
    real = torch.cat([normal(300, 2, 1), normal(300, 2, 2) + 20])
    # one of two clusters, and samples of neither
    generated = torch.cat([normal(300, 2, 3), normal(100, 2, 4) - 20])
    precision, recall = precision_and_recall(real, generated)
    assert precision == pytest.approx(0.75, abs=0.03)
    assert recall == pytest.approx(0.5, abs=0.03)
    assert precision_and_recall(real, real) == (1, 1)


def test_inception_score_counts_classes():
    sure = 2000 * torch.eye(5).repeat(200, 1)
    assert inception_score(sure, splits=2)[0] == pytest.approx(5, rel=0.02)  # classes are split at random
    assert inception_score(sure, splits=1)[0] == pytest.approx(5, rel=1e-6)
    assert inception_score(sure, splits=2) == inception_score(sure, splits=2)
    assert inception_score(torch.zeros(20, 5), splits=2) == pytest.approx((1, 0))
    # two images, of the classes with chances (0.9, 0.1) and (0.5, 0.5): by the definition
    chances = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    divergence = (chances * (chances / chances.mean(0)).log()).sum(1).mean()
    assert inception_score(chances.log(), splits=1)[0] == pytest.approx(float(divergence.exp()), rel=1e-6)
    with pytest.raises(ValueError, match="10 splits need at least as many logits; got 9"):
        inception_score(torch.zeros(9, 5))


def test_features_of_a_classifier_and_of_transformers(tmp_path):
    images = torch.rand(2, 1, 16, 16, generator=seeded(0)) * 2 - 1
    network = ClassifierFeatures(make_classifier(1, 7).eval())
    with torch.no_grad():
        features, logits = network(images)
        assert features.shape == (2, 64)
        assert torch.equal(logits, network.classifier(images))

    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    model = ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(
        tmp_path
    )
    network = open_features(str(tmp_path), "cpu")
    with torch.no_grad():
        features, logits = network(images)
        expected = model(2 * resized(images, 32)).pooler_output
    assert logits is None
    assert network.name == tmp_path.name
    assert (features - expected).abs().max() < 1e-5
    network.model.pooler = model.pooler = None
    with torch.no_grad():
        features, _ = network(images)
        expected = model(2 * resized(images, 32)).last_hidden_state.mean(1)
    assert (features - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["nobody/nothing", "absent.onnx"])
def test_features_that_cannot_be_opened_are_named(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=f"features '{name}'"):
        open_features(name, "cpu")
