"""Distances between sets of features against closed forms, and the features themselves."""

import numpy as np
import pytest
import torch
from classifier import make_classifier
from metrics import (
    ClassifierFeatures,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    open_features,
    precision_and_recall,
    resized,
)
from tiny import seeded


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


def test_moments_are_those_of_numpy():
    x = normal(50, 4)
    mean, covariance = moments(x.float())
    assert np.allclose(mean, x.numpy().mean(0), atol=1e-6)
    assert np.allclose(covariance, np.cov(x.numpy().T), atol=1e-6)


def test_kernel_distance_is_the_unbiased_estimate():
    """With subsets as large as the sets there is but one estimate: by hand, without the diagonal."""
    pytest.importorskip("torchmetrics")
    a, b = normal(60, 5, 1), normal(60, 5, 2) + 0.5

    def kernel(x, y):
        return (x @ y.T / 5 + 1) ** 3

    within = sum((k.sum() - k.trace()) / (60 * 59) for k in (kernel(a, a), kernel(b, b)))
    found, error = kernel_distance(a, b, subsets=4)
    assert found == pytest.approx(float(within - 2 * kernel(a, b).mean()), rel=1e-4)
    assert error == pytest.approx(0, abs=1e-6)
    # two samples of one distribution: 0 within a few of its own errors
    found, error = kernel_distance(normal(2000, 5, 3), normal(2000, 5, 4), subsets=50, subset_size=200)
    assert abs(found) < 5 * error
    assert (
        kernel_distance(normal(2000, 5, 3), normal(2000, 5, 4), subset_size=200)[0]
        == kernel_distance(normal(2000, 5, 3), normal(2000, 5, 4), subset_size=200)[0]
    )


def test_precision_and_recall_see_what_is_missing():
    real = torch.cat([normal(300, 2, 1), normal(300, 2, 2) + 20])
    # one of two clusters, and samples of neither
    generated = torch.cat([normal(300, 2, 3), normal(100, 2, 4) - 20])
    precision, recall = precision_and_recall(real, generated)
    assert precision == pytest.approx(0.75, abs=0.03)
    assert recall == pytest.approx(0.5, abs=0.03)
    assert precision_and_recall(real, real) == (1, 1)


def test_inception_score_counts_classes():
    pytest.importorskip("torchmetrics")
    sure = 100 * torch.eye(5).repeat(200, 1)
    assert inception_score(sure, splits=2)[0] == pytest.approx(5, rel=0.02)  # classes are split at random
    assert inception_score(sure, splits=2) == inception_score(sure, splits=2)
    assert inception_score(torch.zeros(20, 5), splits=2)[0] == pytest.approx(1, rel=1e-4)


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


@pytest.mark.parametrize("name", ["nobody/nothing", "absent.onnx"])
def test_features_that_cannot_be_opened_are_named(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=f"features '{name}'"):
        open_features(name, "cpu")
