"""Loss weights: the recoverability score, its normalisation, published numbers."""

import math

import numpy as np
import pytest
import torch

import erd_fast
from erd_fast.diffusion import (
    RULES,
    SCHEDULES,
    TARGETS,
    get_schedule,
    loss_weight,
    target_coefficients,
    weight_table,
)
from erd_fast.errors import ConfigError

ROUND64 = 2.0**-53
SCORES = {
    "x0": lambda alpha, sigma: alpha,
    "eps": lambda alpha, sigma: sigma,
    "v": lambda alpha, sigma: math.sqrt(2) * alpha * sigma,
    "u": lambda alpha, sigma: np.sqrt(alpha**2 + sigma**2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", SCORES)
def test_erd_is_the_canonical_score(target, schedule):
    grid = get_schedule(schedule)
    found = weight_table("erd", target, grid, normalize="none")
    expected = SCORES[target](grid.alpha, grid.sigma)
    assert np.abs(found / expected - 1.0).max() <= 10 * ROUND64  # ten operations without cancellation


@pytest.mark.parametrize("row", [0, 300, 700, 999])
@pytest.mark.parametrize("target", TARGETS)
def test_erd_is_the_size_of_the_target_terms_in_x_t(target, row):
    # omega^2 = E |c_x alpha x0 + c_eps sigma eps|^2 / d with x0 and eps standard normal (ERD paper Eq. 11).
    grid, count = get_schedule("cosine"), 100_000
    alpha, sigma = grid.alpha[row], grid.sigma[row]
    c_x, c_eps = target_coefficients(target, alpha, sigma)
    x0, eps = np.random.default_rng(0).standard_normal((2, count))
    estimate = math.sqrt(np.mean((c_x * alpha * x0 + c_eps * sigma * eps) ** 2))
    # The mean of squares of count normals has the relative deviation sqrt(2 / count), its root half of that.
    assert estimate == pytest.approx(loss_weight("erd", target, alpha, sigma), rel=5 * math.sqrt(0.5 / count))


@pytest.mark.parametrize(
    ("schedule", "target", "normalizer"),
    [
        ("cosine", "x0", 0.63326),
        ("cosine", "eps", 0.64195),
        ("cosine", "v", 0.45343),
        ("cosine", "u", 1.0),
        ("flow", "x0", 0.5),
        ("flow", "eps", 0.5),
        ("flow", "v", 0.235702),
        ("flow", "u", 0.5 + math.asinh(1) / (2 * math.sqrt(2))),
    ],
)
def test_normalizers_have_the_published_values(schedule, target, normalizer):
    assert weight_table("erd", target, get_schedule(schedule), "none").mean() == pytest.approx(normalizer, abs=1e-5)


@pytest.mark.parametrize(
    ("target", "low", "high"),
    [
        ("eps", (0.0100, 0.5e-4), (1.5578, 0.5e-4)),
        ("x0", (7.78e-5, 0.5e-7), (1.5791, 0.5e-4)),
        ("v", (1.54e-4, 0.5e-6), (1.5594, 0.5e-4)),
        ("u", (1.0, 1e-12), (1.0, 1e-12)),
    ],
)
def test_weights_on_cosine_have_the_published_range(target, low, high):
    table = weight_table("erd", target, get_schedule("cosine"))  # each to half a unit of its last printed digit
    assert abs(table.min() - low[0]) <= low[1] and abs(table.max() - high[0]) <= high[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", RULES)
def test_the_mean_weight_over_uniform_times_is_one(rule, target, schedule):
    table = weight_table(rule, target, get_schedule(schedule))
    assert table.dtype == np.float64
    assert table.mean() == pytest.approx(1.0, abs=64 * ROUND64)  # NumPy sums in pairs: log2 K roundings, not K
    assert (table > 0).all()


def test_constant_is_one_in_every_normalisation():
    for normalize in ("mean", "none", "max"):
        assert (weight_table("constant", "v", get_schedule("cosine"), normalize) == 1.0).all()


def test_normalisations_differ_by_a_factor():
    grid = get_schedule("cosine")
    bare, mean, largest = (weight_table("erd", "eps", grid, normalize) for normalize in ("none", "mean", "max"))
    assert largest.max() == 1.0
    assert np.allclose(mean, bare / 0.64195, rtol=1e-5, atol=0)  # the digits of the published normalizer
    assert np.allclose(largest, bare / grid.sigma[-1], rtol=4 * ROUND64, atol=0)


def test_eps_weight_is_the_half_power_of_p2():
    grid = get_schedule("cosine")  # sigma = 1 / sqrt(1 + SNR) where variance is preserved
    p2 = (1.0 + np.exp(grid.log_snr)) ** -0.5
    # exp of ln SNR, up to 20, turns its roundings into 20 times as many; 1 - alpha^2 costs as many near t = 0.
    assert np.abs(weight_table("erd", "eps", grid, "none") / p2 - 1.0).max() <= 1000 * ROUND64


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", TARGETS)
def test_numbers_arrays_and_tensors_agree(rule, target):
    alpha, sigma = np.array([0.6, 0.1]), np.array([0.8, 0.99])
    array = loss_weight(rule, target, alpha, sigma)
    tensor = loss_weight(rule, target, torch.tensor(alpha), torch.tensor(sigma))
    assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
    number = loss_weight(rule, target, 0.6, 0.8)
    assert isinstance(number, float)
    assert np.allclose(array, tensor.numpy(), rtol=4 * ROUND64, atol=0)
    assert number == pytest.approx(array[0], rel=4 * ROUND64)
    halved = loss_weight(rule, target, 0.6, 0.8, normalizer=2.0)
    assert halved == number / 2


def test_aliases_have_the_weight_of_their_target():
    grid = get_schedule("cosine")
    assert np.array_equal(weight_table("erd", "velocity", grid), weight_table("erd", "v", grid))


def test_names_at_the_top_of_the_package():
    assert erd_fast.loss_weight is loss_weight and erd_fast.weight_table is weight_table


def test_unknown_names_suggest_the_nearest():
    grid = get_schedule("cosine", 10)
    with pytest.raises(ConfigError, match=r"unknown weighting 'ert' \(did you mean 'erd'\?\); allowed: constant, erd"):
        weight_table("ert", "eps", grid)
    with pytest.raises(ConfigError, match=r"unknown normalize 'meen' \(did you mean 'mean'\?\); allowed: mean, none"):
        weight_table("erd", "eps", grid, "meen")
    with pytest.raises(ConfigError, match=r"unknown target 'epz' \(did you mean 'eps'\?\)"):
        loss_weight("erd", "epz", 0.6, 0.8)
