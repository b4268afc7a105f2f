"""Schedules: published numbers, the grid, and times from noise levels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import erd_fast
from erd_fast.diffusion import SCHEDULES, get_schedule
from erd_fast.errors import ConfigError

ROUND64 = 2.0**-53  # largest relative error of one float64 rounding


def test_cosine_has_the_published_numbers():
    schedule = get_schedule("cosine")
    snr = np.exp(schedule.log_snr)
    # Each to half a unit of its last printed digit.
    assert abs(schedule.alpha[0] - 0.9999794) <= 0.5e-7
    assert abs(schedule.alpha[999] - 4.928e-5) <= 0.5e-8
    assert abs(snr[0] - 24221.33) <= 0.5e-2
    assert abs(snr[999] - 2.429e-9) <= 0.5e-12
    assert abs(schedule.log_snr[0] - 10.095) <= 0.5e-3
    assert abs(schedule.log_snr[999] + 19.836) <= 0.5e-3


@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_cosine_is_the_product_of_its_betas(num_steps):
    schedule = get_schedule("cosine", num_steps)

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    product = 1.0
    for i in range(num_steps):
        product *= 1.0 - min(1.0 - f((i + 1) / num_steps) / f(i / num_steps), 0.999)
        # A rounding or two a factor; alpha has half the relative error of alpha^2.
        assert schedule.alpha[i] == pytest.approx(math.sqrt(product), rel=4 * num_steps * ROUND64)
        # sigma^2 = 1 - alpha^2 turns the error relative to alpha^2 into one relative to sigma^2.
        error = 4 * num_steps * ROUND64 * product / (1.0 - product)
        assert schedule.sigma[i] == pytest.approx(math.sqrt(1.0 - product), rel=error)
    assert len(schedule) == num_steps


def test_cosine_feeds_indices_and_preserves_variance():
    schedule = get_schedule("cosine", 50)
    assert schedule.discrete and schedule.variance_preserving
    assert schedule.time.tolist() == list(range(50))
    assert np.abs(schedule.alpha**2 + schedule.sigma**2 - 1.0).max() <= 4 * ROUND64


def test_flow_is_the_line_from_data_at_zero_to_noise_at_one():
    schedule = get_schedule("flow")
    assert not schedule.discrete and not schedule.variance_preserving
    t = (np.arange(65_536) + 0.5) / 65_536
    assert np.array_equal(schedule.time, t)
    assert np.array_equal(schedule.alpha, 1.0 - t) and np.array_equal(schedule.sigma, t)
    expected = 2.0 * np.log((1.0 - t) / t)
    assert np.abs(schedule.log_snr - expected).max() <= 8 * ROUND64 * np.abs(expected).max()
    assert [x.item() for x in schedule.alpha_sigma(0.25)] == [0.75, 0.25]
    assert [x.item() for x in schedule.alpha_sigma(0.0)] == [1.0, 0.0]  # the ends are allowed
    assert [x.item() for x in schedule.alpha_sigma(1.0)] == [0.0, 1.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_grows_with_time(name):
    schedule = get_schedule(name)
    assert (np.diff(schedule.time) > 0).all() and (np.diff(schedule.log_snr) < 0).all()
    assert np.isfinite(schedule.log_snr).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_tensors_arrays_and_numbers_give_the_values_of_the_grid(name):
    schedule = get_schedule(name)
    rows = [0, 1, 500, len(schedule) - 1]
    t = schedule.time[rows]
    tensors, arrays = schedule.alpha_sigma(torch.tensor(t).view(2, 2)), schedule.alpha_sigma(t)
    for table, tensor, array, number in zip(
        (schedule.alpha, schedule.sigma), tensors, arrays, schedule.alpha_sigma(float(t[2])), strict=True
    ):
        assert tensor.dtype == torch.float64 and isinstance(array, np.ndarray)
        assert tensor.flatten().tolist() == array.tolist() == table[rows].tolist()
        assert tensor.shape == (2, 2) and number == table[500]


def test_discrete_times_may_be_integers_of_any_type():
    schedule = get_schedule("cosine")
    for t in (torch.tensor([3, 999]), torch.tensor([3, 999], dtype=torch.int32), torch.tensor([3.0, 999.0])):
        assert schedule.alpha_sigma(t)[0].tolist() == schedule.alpha[[3, 999]].tolist()


@pytest.mark.parametrize("t", [-1, 1000, 0.5, 999.5, -0.5, float("nan")])
@pytest.mark.parametrize("kind", [float, np.asarray, lambda t: torch.tensor([0.0, t])])
def test_discrete_times_outside_the_grid_are_refused(t, kind):
    with pytest.raises(ValueError, match="schedule cosine: t: allowed whole numbers from 0 to 999"):
        get_schedule("cosine").alpha_sigma(kind(t))


@pytest.mark.parametrize("t", [-1e-9, 1.0000001, 500.0])
@pytest.mark.parametrize("kind", [float, np.asarray, lambda t: torch.tensor([0.5, t], dtype=torch.float64)])
def test_continuous_times_outside_zero_to_one_are_refused(t, kind):
    with pytest.raises(ValueError, match="schedule flow: t: allowed 0 to 1"):
        get_schedule("flow").alpha_sigma(kind(t))


def test_discrete_time_at_is_the_nearest_index():
    schedule = get_schedule("cosine")
    ratio = schedule.sigma / schedule.alpha
    assert np.array_equal(schedule.time_at(ratio), schedule.time)
    below, above = ratio[:-1] + 0.49 * np.diff(ratio), ratio[:-1] + 0.51 * np.diff(ratio)
    assert np.array_equal(schedule.time_at(below), schedule.time[:-1])
    assert np.array_equal(schedule.time_at(above), schedule.time[1:])
    assert schedule.time_at(np.array([0.0, 1e9])).tolist() == [0.0, 999.0]


@given(t=st.floats(0.0, 1.0, exclude_max=True))
@settings(deadline=None, max_examples=30)
def test_continuous_time_at_inverts_the_schedule(t):
    schedule = get_schedule("flow")
    alpha, sigma = schedule.alpha_sigma(t)
    # t = r / (1 + r): three roundings of values that do not cancel, and that of 1 - t.
    assert schedule.time_at(sigma / alpha) == pytest.approx(t, rel=6 * ROUND64, abs=1e-300)


def test_names_at_the_top_of_the_package():
    assert erd_fast.get_schedule is get_schedule


@pytest.mark.parametrize(("wrong", "near"), [("cosin", "cosine"), ("flows", "flow")])
def test_unknown_schedule_names_the_nearest(wrong, near):
    with pytest.raises(ConfigError, match=rf"unknown schedule '{wrong}' \(did you mean '{near}'\?\); allowed: cosine"):
        get_schedule(wrong)


@pytest.mark.parametrize("num_steps", [1, 0, -5])
def test_too_few_steps_are_refused(num_steps):
    with pytest.raises(ConfigError, match=f"num_steps: given {num_steps}, allowed 2 or more"):
        get_schedule("cosine", num_steps)
