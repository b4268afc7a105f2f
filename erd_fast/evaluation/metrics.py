"""Distances between sets of features."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_and_covariance(features: Array) -> tuple[Array, Array]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), N >= 2, in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(first: tuple[Array, Array], second: tuple[Array, Array]) -> float:
    """Squared Frechet distance of two Gaussians given as (mean, covariance).

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))`` (Dowson & Landau 1982; docs/math.md H3). The
    symmetric form needs no complex square root and is exact for singular covariances.
    """
    (mean1, cov1), (mean2, cov2) = first, second
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)).sum()
    difference = mean1 - mean2
    return float(difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * cross)
