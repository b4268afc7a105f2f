"""metrics: the Frechet distance against closed forms."""

import numpy as np
import pytest

from erd_fast.evaluation import frechet_distance, mean_and_covariance

DIM = 16


def _covariance(seed: int, rank: int = DIM) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(DIM, rank))
    return factor @ factor.T


def test_mean_and_unbiased_covariance():
    features = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    mean, covariance = mean_and_covariance(features)
    centred = features.astype(np.float64) - mean
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, centred.T @ centred / 49, rtol=1e-12)
    assert mean_and_covariance(features[:, :1])[1].shape == (1, 1)


@pytest.mark.parametrize("rank", [DIM, 3, 0])
def test_equal_gaussians_are_at_distance_zero(rank):
    """Also singular ones. sqrt(eigenvalues) turns rounding r of a zero eigenvalue into sqrt(r), in units of the
    trace."""
    one = (np.arange(DIM, dtype=float), _covariance(0, rank))
    assert abs(frechet_distance(one, one)) <= DIM * np.sqrt(DIM * 2.0**-52) * max(np.trace(one[1]), 1)


@pytest.mark.parametrize("rank", [DIM, 3])
def test_a_shift_of_the_mean_counts_its_square(rank):
    shift, covariance = np.linspace(-10, 10, DIM), _covariance(0, rank)
    found = frechet_distance((np.zeros(DIM), covariance), (shift, covariance))
    assert found == pytest.approx(shift @ shift, rel=1e-6)


def test_diagonal_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0, 4, DIM), rng.uniform(0, 4, DIM)
    first[:4] = second[2:6] = 0  # singular both
    mean = rng.normal(size=DIM)
    expected = mean @ mean + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet_distance((mean, np.diag(first)), (0 * mean, np.diag(second))) == pytest.approx(expected, rel=1e-7)


def test_one_dimension_is_the_difference_of_means_and_deviations():
    one, other = (np.array([1.0]), np.array([[4.0]])), (np.array([3.0]), np.array([[0.25]]))
    assert frechet_distance(one, other) == pytest.approx((1 - 3) ** 2 + (2 - 0.5) ** 2, rel=1e-12)


def test_general_covariances_agree_with_the_trace_of_the_square_root_of_the_product():
    """tr (S1 S2)^(1/2) is the sum of the square roots of the product's eigenvalues, which are real and not negative."""
    first, second = _covariance(1), _covariance(2)
    product = np.linalg.eigvals(first @ second).real
    expected = np.trace(first) + np.trace(second) - 2 * np.sqrt(product).sum()
    one, other = (np.zeros(DIM), first), (np.zeros(DIM), second)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)
    # Commuting covariances alone would allow the shortcut tr S1 + tr S2 - 2 sum sqrt(l1 l2).
    shortcut = np.sqrt(np.linalg.eigvalsh(first) * np.linalg.eigvalsh(second)).sum()
    assert shortcut != pytest.approx(np.sqrt(product).sum(), rel=1e-2)
