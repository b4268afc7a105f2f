"""Targets turned into one another: predictions by convert_target, losses by loss_factor. What is expected are exact
fractions of the very numbers that the functions are given."""

import functools
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erd_fast.diffusion import (
    SCHEDULES,
    TARGETS,
    DiscreteSchedule,
    convert_target,
    get_schedule,
    invert_target,
    loss_factor,
    target_coefficients,
)
from erd_fast.errors import ConfigError

ROUND64 = 2.0**-53  # largest relative error of one float64 rounding
PAIRS = list(itertools.product(TARGETS, TARGETS))
grid = functools.cache(get_schedule)
images = st.floats(-100, 100, width=32).filter(lambda value: value == 0 or abs(value) > 1e-30)


def _row(schedule, number) -> dict:
    """alpha, sigma and their derivatives at one time of the grid, by name."""
    return {name: float(getattr(schedule, name)[number]) for name in ("alpha", "sigma", "d_alpha", "d_sigma")}


def _rows(schedule) -> st.SearchStrategy[dict]:
    last = len(schedule) - 1
    return (st.sampled_from([0, last]) | st.integers(0, last)).map(lambda number: _row(schedule, number))


def _coefficients(target: str, row: dict) -> tuple[Fraction, Fraction]:
    c_x, c_eps = target_coefficients(target, **row)  # no coefficient is a rounded number
    return Fraction(c_x), Fraction(c_eps)


def _mixed(target: str, x0: Fraction, eps: Fraction, row: dict) -> Fraction:
    c_x, c_eps = _coefficients(target, row)
    return c_x * x0 + c_eps * eps


def _x_t(x0: Fraction, eps: Fraction, row: dict) -> Fraction:
    return Fraction(row["alpha"]) * x0 + Fraction(row["sigma"]) * eps


def _bound(source: str, target: str, y: float, x_t: float, row: dict) -> float:
    """16 roundings of the terms of D' y + (c_x c_eps' - c_eps c_x') x_t over D; the D have no cancellation.

    One rounding of y and of x_t as they are given, 3 in D' and in the sum in front of x_t, 2 for products and the
    quotient, 1 for the sum, 3 in D: 10.
    """
    (c_x, c_eps), (c_x_new, c_eps_new) = (map(abs, target_coefficients(name, **row)) for name in (source, target))
    size = c_x * row["sigma"] + c_eps * row["alpha"]
    size_new = c_x_new * row["sigma"] + c_eps_new * row["alpha"]
    return 16 * ROUND64 * (size_new * abs(y) + (c_x * c_eps_new + c_eps * c_x_new) * abs(x_t)) / size


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_every_prediction_becomes_every_other(schedule, data):
    row = data.draw(_rows(grid(schedule)))
    x0, eps = Fraction(data.draw(images)), Fraction(data.draw(images))
    x_t = float(_x_t(x0, eps, row))
    for source, target in PAIRS:
        y, expected = float(_mixed(source, x0, eps, row)), _mixed(target, x0, eps, row)
        bound = _bound(source, target, y, x_t, row)
        found = convert_target(y, x_t, **row, source=source, target=target)
        assert abs(Fraction(found) - expected) <= bound
        # The detour over x0 and eps says the same, less exactly where the two cancel.
        c_x, c_eps = target_coefficients(target, **row)
        by_x0, by_eps = invert_target(source, y, x_t, **row)
        detour = abs(c_x) * _bound(source, "x0", y, x_t, row) + abs(c_eps) * _bound(source, "eps", y, x_t, row)
        assert abs(Fraction(c_x * by_x0 + c_eps * by_eps) - expected) <= 2 * detour


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_target_is_itself_without_an_error(schedule, target):
    rows = np.linspace(0, len(grid(schedule)) - 1, 500).astype(int)
    row = {name: getattr(grid(schedule), name)[rows] for name in ("alpha", "sigma", "d_alpha", "d_sigma")}
    y, x_t = np.random.default_rng(0).standard_normal((2, 500))
    assert np.array_equal(convert_target(y, x_t, **row, source=target, target=target), y)


@pytest.mark.parametrize(("alias", "target"), [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")])
def test_aliases_convert_as_their_target(alias, target):
    for other in ("u", "x0", "eps", "v"):
        for first, second in ((alias, other), (other, alias)):
            names = {"source": first, "target": second}
            own = {key: target if name == alias else name for key, name in names.items()}
            assert convert_target(0.3, 0.7, 0.6, 0.8, **names) == convert_target(0.3, 0.7, 0.6, 0.8, **own)
            assert loss_factor(first, second, 0.6, 0.8) == loss_factor(*own.values(), 0.6, 0.8)


# Tables that end without signal, and begin without noise: there D of eps, and of x0, is 0, and only theirs.
NO_SIGNAL = {"alpha": 0.0, "sigma": 1.0, "d_alpha": -1.5, "d_sigma": 0.125}
NO_NOISE = {"alpha": 1.0, "sigma": 0.0, "d_alpha": -0.125, "d_sigma": 1.5}


@pytest.mark.parametrize("make", [float, lambda value: torch.tensor([value], dtype=torch.float64)])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("row", "source"),
    [(NO_SIGNAL, name) for name in TARGETS if name != "eps"] + [(NO_NOISE, name) for name in TARGETS if name != "x0"],
)
def test_what_is_left_at_the_ends_becomes_every_other(row, source, target, make):
    x0, eps = Fraction(0.75), Fraction(-1.25)
    y, x_t = float(_mixed(source, x0, eps, row)), float(_x_t(x0, eps, row))
    found = convert_target(
        make(y), make(x_t), **{name: make(value) for name, value in row.items()}, source=source, target=target
    )
    assert abs(Fraction(float(found)) - _mixed(target, x0, eps, row)) <= _bound(source, target, y, x_t, row)


def test_a_users_table_without_signal_at_its_end_converts():
    schedule = DiscreteSchedule("mine", np.append(np.cos(np.linspace(0.1, 0.9, 9) * np.pi / 2), 0.0))
    row = _row(schedule, 9)
    assert row["alpha"] == 0 and row["sigma"] == 1
    # x_t = 0.5 is the noise, and x0 = 0.25 or -0.25 is in the prediction alone.
    assert convert_target(0.25, 0.5, **row, source="v", target="x0") == -0.25
    assert convert_target(0.25, 0.5, **row, source="u", target="eps") == 0.5
    assert convert_target(0.25, 0.5, **row, source="x0", target="v") == -0.25
    assert convert_target(0.25, 0.5, **row, source="x0", target="eps") == 0.5
    assert convert_target(row["d_alpha"] * 0.25, 0.0, **row, source="flow", target="x0") == 0.25


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversion_takes_rows_for_batches(source, target):
    rows = torch.tensor([0, 3_000, 65_535])
    y, x_t = torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    schedule = grid("gvp")
    row = {name: torch.tensor(getattr(schedule, name))[rows, None, None] for name in _row(schedule, 0)}
    found = convert_target(y, x_t, **row, source=source, target=target)
    assert found.shape == y.shape and found.dtype == torch.float64
    for index, number in enumerate(rows.tolist()):
        for place in ((0, 0), (1, 3)):
            one = [value[index][place].item() for value in (y, x_t)]
            alone = convert_target(*one, **_row(schedule, number), source=source, target=target)
            assert found[index][place] == pytest.approx(alone, abs=_bound(source, target, *one, _row(schedule, number)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_squared_errors_of_one_estimate_have_the_ratio_of_their_factor(schedule, data):
    row = data.draw(_rows(grid(schedule)))
    x0, eps, estimate = (Fraction(data.draw(images)) for _ in range(3))
    x_t = _x_t(x0, eps, row)
    implied = (x_t - Fraction(row["alpha"]) * estimate) / Fraction(row["sigma"])  # the noise that makes x_t of it
    errors = {
        target: (_mixed(target, estimate, implied, row) - _mixed(target, x0, eps, row)) ** 2 for target in TARGETS
    }
    for source, target in PAIRS:
        factor = Fraction(loss_factor(source, target, **row))
        # Two D of 3 roundings, their quotient, all squared, and the square.
        assert abs(factor * errors[source] - errors[target]) <= 16 * ROUND64 * errors[target]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_factors_from_x0_are_the_published_ones(schedule):
    alpha, sigma = grid(schedule).alpha, grid(schedule).sigma
    snr = np.exp(grid(schedule).log_snr)
    # lambda of at most 24 has 3 roundings, and exp 2 more.
    assert np.allclose(loss_factor("x0", "eps", alpha, sigma), snr, rtol=80 * ROUND64, atol=0)
    assert loss_factor("x0", "x0", alpha, sigma).tolist() == [1.0] * len(alpha)
    published = {"v": (alpha**2 + sigma**2) ** 2 / sigma**2, "u": (alpha + sigma) ** 2 / sigma**2}
    if grid(schedule).variance_preserving:
        assert np.allclose(loss_factor("x0", "v", alpha, sigma), snr + 1, rtol=100 * ROUND64, atol=0)
    if schedule == "flow":
        published["u"] = 1 / sigma**2
    for target, expected in published.items():
        assert np.allclose(loss_factor("x0", target, alpha, sigma), expected, rtol=16 * ROUND64, atol=0)


def test_factors_work_for_tensors_and_numbers():
    alpha, sigma = torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6])
    found = loss_factor("eps", "u", alpha, sigma)
    assert isinstance(found, torch.Tensor)
    # float32: two D with a rounding each, their quotient, all squared, and the square.
    assert found.tolist() == pytest.approx([(1.4 / 0.6) ** 2, (1.4 / 0.8) ** 2], rel=8 * 2.0**-24)
    assert loss_factor("eps", "u", 0.6, 0.8) == pytest.approx((1.4 / 0.6) ** 2, rel=8 * ROUND64)


@pytest.mark.parametrize("names", [("epz", "x0"), ("x0", "epz")])
def test_unknown_targets_are_refused(names):
    with pytest.raises(ConfigError, match=r"unknown target 'epz' \(did you mean 'eps'\?\)"):
        convert_target(0.3, 0.7, 0.6, 0.8, source=names[0], target=names[1])
    with pytest.raises(ConfigError, match=r"unknown target 'epz' \(did you mean 'eps'\?\)"):
        loss_factor(*names, 0.6, 0.8)
