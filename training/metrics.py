"""Distances between sets of images, from the features of a network."""

import torch


def moments(features):
    """Mean (D,) and covariance (D, D), float64, of features (N, D)."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean, covariance, other_mean, other_covariance):
    """Squared Fréchet distance of two normal distributions (Heusel et al. 2017):
    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2).

    The trace of the root is that of (C^1/2 C' C^1/2)^1/2, which is symmetric. Raises ValueError for a covariance that
    has a negative eigenvalue beyond rounding: the root would be imaginary.
    """

    def root(matrix, name):
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        if values.min() < -1e-6 * values.abs().max():
            raise ValueError(f"{name} has the eigenvalue {float(values.min()):g}: it is no covariance")
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    half = root(covariance, "the covariance")
    root(other_covariance, "the other covariance")
    cross = root(half @ other_covariance @ half, "the product of the covariances")
    distance = (mean - other_mean).square().sum() + (covariance + other_covariance - 2 * cross).trace()
    return float(distance)
