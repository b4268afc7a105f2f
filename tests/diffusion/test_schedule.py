"""Schedules: published numbers, closed forms and their slopes, the grid, times from noise levels, users' tables."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf  # comes with torch, through sympy

import erd_fast
from erd_fast.diffusion import SCHEDULES, DiscreteSchedule, get_schedule
from erd_fast.errors import ConfigError

ROUND64 = 2.0**-53  # largest relative error of one float64 rounding; functions of a library are off by 2 of them
grid = functools.cache(get_schedule)
DISCRETE = ("cosine", "ddpm_linear", "logsnr")
CONTINUOUS = ("flow", "vp", "gvp", "logsnr_flow")

# Written out a second time, for any precision: (alpha, sigma) at t.
PATHS = {
    "flow": lambda t: (1 - t, t),
    "vp": lambda t: (
        mp.exp(-(t**2) * mpf("19.9") / 4 - t * mpf("0.1") / 2),
        mp.sqrt(1 - mp.exp(-(t**2) * mpf("19.9") / 2 - t * mpf("0.1"))),
    ),
    "gvp": lambda t: (mp.cos(mp.pi * t / 2), mp.sin(mp.pi * t / 2)),
    "logsnr_flow": lambda t: (1 / (1 + mp.exp(-(10 - 20 * t) / 2)), 1 / (1 + mp.exp((10 - 20 * t) / 2))),
}


def _error(name: str, value: float) -> float:
    """Bound on the rounding error of alpha, sigma and their derivatives on the grid.

    flow: the grid is dyadic, so nothing is rounded. vp: the exponent is at most 10.05 and has 6 roundings, so alpha is
    off by 30 + 2, -expm1 has a condition of at most 1, and d_sigma holds alpha twice: 82 in all. logsnr_flow: the
    exponent is at most 5 with one rounding, and alpha sigma is off by 2 (5 + 4) + 2. gvp: the angle is at most pi / 2
    with 2 roundings, the function adds 2, and pi / 2 times that with 2 more: 12, of 1 and not of the value.
    """
    return {"flow": 0.0, "vp": 100.0 * abs(value), "logsnr_flow": 25.0 * abs(value), "gvp": 12.0}[name] * ROUND64


def test_every_schedule_is_tested_here():
    assert set(SCHEDULES) == {*DISCRETE, *CONTINUOUS} and set(CONTINUOUS) == set(PATHS)
    assert {name for name in SCHEDULES if grid(name).discrete} == set(DISCRETE)
    assert {name for name in SCHEDULES if not grid(name).variance_preserving} == {"flow", "logsnr_flow"}
    assert all(grid(name).name == name for name in SCHEDULES)


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


def test_ddpm_linear_has_the_published_numbers():
    schedule = get_schedule("ddpm_linear")
    assert abs(schedule.alpha[0] - 0.99995) <= 0.5e-5
    assert abs(schedule.alpha[999] - 6.353e-3) <= 0.5e-6
    assert abs(schedule.log_snr[0] - 9.2102) <= 0.5e-4
    assert abs(schedule.log_snr[999] + 10.1177) <= 0.5e-4


def _cosine_beta(i: int, num_steps: int) -> float:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return min(1.0 - f((i + 1) / num_steps) / f(i / num_steps), 0.999)


def _linear_beta(i: int, num_steps: int) -> float:
    return 1e-4 + i * (0.02 - 1e-4) / (num_steps - 1)


@pytest.mark.parametrize("num_steps", [2, 10, 1000])
@pytest.mark.parametrize(("name", "beta"), [("cosine", _cosine_beta), ("ddpm_linear", _linear_beta)])
def test_alpha_squared_is_the_product_of_the_betas(name, beta, num_steps):
    schedule = get_schedule(name, num_steps)
    product = 1.0
    for i in range(num_steps):
        product *= 1.0 - beta(i, num_steps)
        # A rounding or two a factor; alpha has half the relative error of alpha^2.
        assert schedule.alpha[i] == pytest.approx(math.sqrt(product), rel=4 * (i + 1) * ROUND64)
        # sigma^2 = 1 - alpha^2 turns the error relative to alpha^2 into one relative to sigma^2.
        error = 4 * (i + 1) * ROUND64 * product / (1.0 - product) + 4 * ROUND64
        assert schedule.sigma[i] == pytest.approx(math.sqrt(1.0 - product), rel=error)
    assert len(schedule) == num_steps


@pytest.mark.parametrize(("name", "beta"), [("cosine", "squaredcos_cap_v2"), ("ddpm_linear", "linear")])
def test_alpha_squared_is_that_of_diffusers(name, beta):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(1000, beta_schedule=beta, beta_start=1e-4, beta_end=0.02)
    square = grid(name).alpha ** 2
    kept = square / np.append(1.0, square[:-1])  # 1 - beta
    # Its float32: beta and 1 - beta are rounded by up to 2^-25 each, which is 2^-24 / (1 - beta) of the factor, and the
    # product by 2^-24 a factor; linspace adds two roundings of beta <= 0.02.
    error = np.cumsum(2.0**-24 / kept + 1.1 * 2.0**-24)
    assert (np.abs(scheduler.alphas_cumprod.double().numpy() / square - 1) <= error).all()


@pytest.mark.parametrize("num_steps", [2, 7, 1000])
def test_logsnr_falls_by_the_same_amount_each_step(num_steps):
    schedule = get_schedule("logsnr", num_steps)
    with mp.workdps(40):
        for i in range(num_steps):
            log_snr = 10 - mpf(20 * (i + 1)) / num_steps
            # lambda is at most 10 with 3 roundings, exp adds 2 and the sum 1, the root halves them; 2 for it and 1 / x.
            for table, sign in ((schedule.alpha, -1), (schedule.sigma, 1)):
                assert abs(table[i] * mp.sqrt(1 + mp.exp(sign * log_snr)) - 1) <= 19 * ROUND64
    # Twice two logarithms, of at most 5 each, of values off by 19 roundings.
    expected = 10.0 - 20.0 * np.arange(1, num_steps + 1) / num_steps
    assert np.abs(schedule.log_snr - expected).max() <= 2 * 2 * (19 + 2 * 5 + 5) * ROUND64
    # Differences of two of those, over at least one step of 1/T.
    assert np.abs(schedule.d_log_snr + 20.0).max() <= 2 * 136 * num_steps * ROUND64


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


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_schedules_have_their_closed_forms_and_slopes(name):
    schedule = get_schedule(name, 1000)
    assert np.array_equal(schedule.time, (np.arange(65_536) + 0.5) / 65_536)  # whatever num_steps is
    log_snr, d_log_snr = schedule.log_snr, schedule.d_log_snr
    with mp.workdps(40):
        for row in np.linspace(0, 65_535, 40).astype(int):
            t = mpf(2 * int(row) + 1) / 131_072
            alpha, sigma = PATHS[name](t)
            slopes = [mp.diff(lambda s, i=i: PATHS[name](s)[i], t) for i in (0, 1)]
            found = (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma)
            for table, value in zip(found, (alpha, sigma, *slopes), strict=True):
                assert abs(table[row] - value) <= _error(name, float(value))
            # 2 (ln alpha - ln sigma): relative errors of alpha and sigma, and 2 roundings of each term.
            share = sum(_error(name, value) / value for value in (float(alpha), float(sigma)))
            size = abs(mp.log(alpha)) + abs(mp.log(sigma))
            assert abs(log_snr[row] - 2 * mp.log(alpha / sigma)) <= 2 * (share + 6 * ROUND64 * size)
            # 2 (a' / a - s' / s), two terms of one sign.
            terms = [
                (abs(slope) / value) * (4 * ROUND64 + _error(name, value) / value) + _error(name, slope) / value
                for slope, value in zip(map(float, slopes), (float(alpha), float(sigma)), strict=True)
            ]
            assert abs(d_log_snr[row] - 2 * (slopes[0] / alpha - slopes[1] / sigma)) <= 2 * sum(terms)


def test_logsnr_flow_is_the_flow_path_in_another_time():
    schedule, flow = get_schedule("logsnr_flow"), get_schedule("flow")
    assert np.abs(schedule.alpha + schedule.sigma - 1).max() <= 18 * ROUND64
    # ln alpha - ln sigma is at most 5, of values off by 9 roundings: the same time that reads lambda = 10 - 20 t.
    assert np.abs(schedule.log_snr - (10 - 20 * schedule.time)).max() <= 2 * 2 * (9 + 2 * 5 + 5) * ROUND64
    t = flow.time_at(np.exp(-(10 - 20 * schedule.time) / 2))
    # exp of at most 5 is off by 5 + 2 roundings, and t by 3 more.
    for mine, its in zip((schedule.alpha, schedule.sigma), flow.alpha_sigma(t), strict=True):
        assert np.abs(mine - its).max() <= 20 * ROUND64


@pytest.mark.parametrize("name", [*DISCRETE, "vp", "gvp"])
def test_variance_is_preserved(name):
    schedule = grid(name)
    # Root and square; the closed forms take alpha and sigma from one rounded argument, by functions off by 2 each.
    bound = 4 if name in ("cosine", "ddpm_linear") else 12
    assert np.abs(schedule.alpha**2 + schedule.sigma**2 - 1.0).max() <= bound * ROUND64


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_schedules_feed_indices(name):
    schedule = get_schedule(name, 50)
    assert schedule.discrete and schedule.time.tolist() == list(range(50))


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("num_steps", [2, 3, 1000])
def test_discrete_slopes_are_central_differences_per_unit_of_t(name, num_steps):
    schedule = get_schedule(name, num_steps)
    for slope, table in (
        (schedule.d_alpha, schedule.alpha),
        (schedule.d_sigma, schedule.sigma),
        (schedule.d_log_snr, schedule.log_snr),
    ):
        for i in range(num_steps):
            high, low = min(i + 1, num_steps - 1), max(i - 1, 0)  # one-sided at the ends
            expected = (table[high] - table[low]) / (high - low) * num_steps
            assert slope[i] == pytest.approx(expected, rel=6 * ROUND64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_grows_with_time(name):
    schedule = grid(name)
    assert (np.diff(schedule.time) > 0).all() and (np.diff(schedule.log_snr) < 0).all()
    assert np.isfinite(schedule.log_snr).all()
    assert (schedule.d_log_snr < 0).all() and (schedule.d_alpha <= 0).all() and (schedule.d_sigma >= 0).all()


@pytest.mark.parametrize("method", ["alpha_sigma", "derivatives"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_tensors_arrays_and_numbers_give_the_values_of_the_grid(name, method):
    schedule = grid(name)
    tables = {"alpha_sigma": (schedule.alpha, schedule.sigma), "derivatives": (schedule.d_alpha, schedule.d_sigma)}
    rows = [0, 1, 500, len(schedule) - 1]
    t, values = schedule.time[rows], getattr(schedule, method)
    for table, tensor, array, number in zip(
        tables[method], values(torch.tensor(t).view(2, 2)), values(t), values(float(t[2])), strict=True
    ):
        assert tensor.dtype == torch.float64 and array.dtype == np.float64 and isinstance(array, np.ndarray)
        assert tensor.shape == (2, 2) and np.shape(number) == ()
        assert array.tolist() == table[rows].tolist() and number == table[500]
        # PyTorch's functions of the same argument are others than NumPy's: 2 roundings each, at most 3 in a value.
        bound = 0 if name in (*DISCRETE, "flow") else 16 * ROUND64
        assert (np.abs(tensor.flatten().numpy() - table[rows]) <= bound * np.abs(table[rows])).all()


@pytest.mark.parametrize("method", ["alpha_sigma", "derivatives"])
@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_times_may_be_integers_of_any_type(name, method):
    schedule = grid(name)
    values, table = getattr(schedule, method), schedule.alpha if method == "alpha_sigma" else schedule.d_alpha
    kinds = (torch.tensor([3, 999]), torch.tensor([3, 999], dtype=torch.int32), torch.tensor([3.0, 999.0]))
    for t in (*kinds, np.array([3, 999]), np.array([3.0, 999.0])):
        assert values(t)[0].tolist() == table[[3, 999]].tolist()
    assert values(999)[0] == table[999]


def test_vp_leaves_zero_vertically_and_in_silence():
    for zero in (0.0, 0, np.zeros(1), torch.zeros(1)):
        alpha, sigma = grid("vp").alpha_sigma(zero)
        d_alpha, d_sigma = grid("vp").derivatives(zero)
        assert alpha == 1 and sigma == 0
        assert d_alpha == -0.05 and d_sigma == float("inf")  # half of beta(0) = 0.1


@pytest.mark.parametrize("method", ["alpha_sigma", "derivatives"])
@pytest.mark.parametrize("t", [-1, 1000, 0.5, 999.5, -0.5, float("nan")])
@pytest.mark.parametrize("kind", [float, np.asarray, lambda t: torch.tensor([0.0, t])])
def test_discrete_times_outside_the_grid_are_refused(t, kind, method):
    with pytest.raises(ValueError, match="schedule cosine: t: allowed whole numbers from 0 to 999"):
        getattr(grid("cosine"), method)(kind(t))


@pytest.mark.parametrize("method", ["alpha_sigma", "derivatives"])
@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("t", [-1e-9, 1.0000001, 500.0, float("nan")])
@pytest.mark.parametrize("kind", [float, np.asarray, lambda t: torch.tensor([0.5, t], dtype=torch.float64)])
def test_continuous_times_outside_zero_to_one_are_refused(t, kind, name, method):
    with pytest.raises(ValueError, match=f"schedule {name}: t: allowed 0 to 1"):
        getattr(grid(name), method)(kind(t))


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_time_at_is_the_nearest_index(name):
    schedule = grid(name)
    ratio = schedule.sigma / schedule.alpha
    assert np.array_equal(schedule.time_at(ratio), schedule.time)
    below, above = ratio[:-1] + 0.49 * np.diff(ratio), ratio[:-1] + 0.51 * np.diff(ratio)
    assert np.array_equal(schedule.time_at(below), schedule.time[:-1])
    assert np.array_equal(schedule.time_at(above), schedule.time[1:])
    assert schedule.time_at(np.array([0.0, 1e9])).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("name", CONTINUOUS)
@given(t=st.floats(0.0, 1.0, exclude_max=True))
@settings(deadline=None, max_examples=30)
def test_continuous_time_at_inverts_the_schedule(name, t):
    schedule = grid(name)
    alpha, sigma = schedule.alpha_sigma(t)
    # dt = d ln(sigma / alpha) / (s'/s - a'/a). The ratio is off by _error of alpha and sigma, and a rounding.
    # flow: t = r / (1 + r), three roundings of values that do not cancel, and that of 1 - t. vp: ln alpha is off by 60
    # relative to itself, and t by no more than that and 20 of the formula. gvp: the angle is off by 2 roundings, each
    # function by 2 of 1, arctan by 2. logsnr_flow: ln r is off by 18 + 2 * 5 roundings, a tenth of it and 2 of 1 in t.
    relative, absolute = {"flow": (6, 0), "vp": (80, 0), "gvp": (8, 4), "logsnr_flow": (0, 5)}[name]
    bound = {"rel": relative * ROUND64, "abs": absolute * ROUND64 + 1e-300}
    assert schedule.time_at(sigma / alpha) == pytest.approx(t, **bound)
    assert schedule.time_at(np.array([sigma / alpha])) == pytest.approx(np.array([t]), **bound)


def test_logsnr_flow_gives_its_ends_beyond_them():
    ends = np.exp(np.array([-5.0, 5.0]))  # sigma / alpha at t = 0 and 1
    ratios = np.array([0.0, 1e-9, 0.99 * ends[0], 1.01 * ends[1], 1e9, np.inf])
    assert grid("logsnr_flow").time_at(ratios).tolist() == [0, 0, 0, 1, 1, 1]
    inside = grid("logsnr_flow").time_at(ends * [1.01, 0.99])
    assert inside == pytest.approx([0.1 * math.log(1.01), 1 + 0.1 * math.log(0.99)], rel=100 * 8 * ROUND64)


def test_a_users_table_may_end_without_signal():
    alpha = np.append(np.cos(np.linspace(0.1, 0.9, 9) * np.pi / 2), 0.0)
    schedule = DiscreteSchedule("mine", alpha)
    assert schedule.name == "mine" and schedule.discrete and schedule.variance_preserving
    assert schedule.alpha.tolist() == alpha.tolist() and schedule.sigma[-1] == 1 and len(schedule) == 10
    assert np.isfinite(schedule.log_snr[:-1]).all() and schedule.log_snr[-1] == -np.inf
    assert np.isfinite(schedule.d_log_snr[:-2]).all() and (schedule.d_log_snr[-2:] == -np.inf).all()
    # tan(0.9 pi / 2) = 6.3 is nearer to every number than infinity.
    assert schedule.time_at(80.0) == 8 and schedule.time_at(np.array([0.0, 6.0, 1e9])).tolist() == [0, 8, 8]
    assert [x.item() for x in schedule.alpha_sigma(9)] == [0, 1]
    assert schedule.derivatives(9)[0] == pytest.approx(-10 * alpha[8], rel=4 * ROUND64)


def test_a_users_table_may_explode_in_variance():
    schedule = DiscreteSchedule("ve", [1, 1, 1], [0.5, 2, 50])
    assert not schedule.variance_preserving and schedule.d_alpha.tolist() == [0, 0, 0]
    assert schedule.time_at(np.array([0.0, 1.9, 30.0])).tolist() == [0, 1, 2]
    assert DiscreteSchedule("vp", [0.8, 0.6], [0.6, 0.8]).variance_preserving
    assert DiscreteSchedule("louder", [2.0, 1.0], [1.0, 1.0]).alpha.tolist() == [2, 1]  # with its sigma


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (([0.9, 0.5, 0.5],), r"alpha / sigma: given a table that does not fall at step 2; .*t grows with the noise"),
        (([0.1, 0.5, 0.9],), "alpha / sigma: given a table that does not fall at step 1"),
        (([0.9, 0.0, 0.0],), "alpha / sigma: given a table that does not fall at step 2"),
        (([0.9, 0.8], [0.5, 0.4]), "alpha / sigma: given a table that does not fall at step 1"),
        (([0.9, 0.5, np.nan],), "alpha: given nan at step 2, allowed finite numbers >= 0"),
        (([np.inf, 0.5], [0.1, 0.5]), "alpha: given inf at step 0, allowed finite numbers >= 0"),
        (([0.9, -0.5, 0.1],), "alpha: given -0.5 at step 1, allowed finite numbers >= 0"),
        (([0.9, 0.5], [0.1, -0.5]), "sigma: given -0.5 at step 1, allowed finite numbers >= 0"),
        (([1.5, 0.5],), "alpha: given 1.5, allowed 0 to 1 where sigma is not given"),
        (([0.9],), r"alpha: given shape \(1,\), allowed \(T,\) with T of 2 or more"),
        (([],), r"alpha: given shape \(0,\), allowed"),
        ((0.9,), r"alpha: given shape \(\), allowed"),
        (([[0.9, 0.5], [0.5, 0.1]],), r"alpha: given shape \(2, 2\), allowed"),
        (([0.9, 0.5], [[0.1, 0.5], [0.5, 0.9]]), r"sigma: given shape \(2, 2\), allowed"),
        (([0.9, 0.5, 0.1], [0.1, 0.9]), "sigma: given 2 values, allowed 3"),
    ],
)
def test_tables_that_are_no_schedule_are_refused(tables, message):
    with pytest.raises(ConfigError, match=f"^schedule mine: {message}"):
        DiscreteSchedule("mine", *tables)


def test_names_at_the_top_of_the_package():
    assert erd_fast.get_schedule is get_schedule


@pytest.mark.parametrize(
    ("wrong", "near"), [("cosin", "cosine"), ("flows", "flow"), ("linear", "ddpm_linear"), ("log_snr", "logsnr")]
)
def test_unknown_schedule_names_the_nearest(wrong, near):
    with pytest.raises(ConfigError, match=rf"unknown schedule '{wrong}' \(did you mean '{near}'\?\); allowed: cosine"):
        get_schedule(wrong)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 0, -5])
def test_too_few_steps_are_refused(name, num_steps):
    with pytest.raises(ConfigError, match=f"num_steps: given {num_steps}, allowed 2 or more"):
        get_schedule(name, num_steps)
