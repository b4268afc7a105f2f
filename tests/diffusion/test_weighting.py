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
    DiscreteSchedule,
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


@pytest.mark.parametrize("part", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_erd_is_the_size_of_the_target_terms_in_x_t(target, schedule, part):
    # omega^2 = E |c_x alpha x0 + c_eps sigma eps|^2 / d with x0 and eps standard normal (ERD paper Eq. 11).
    grid, count = get_schedule(schedule), 20_000
    row = int(part * (len(grid) - 1))
    alpha, sigma = grid.alpha[row], grid.sigma[row]
    slopes = {"d_alpha": grid.d_alpha[row], "d_sigma": grid.d_sigma[row]}
    c_x, c_eps = target_coefficients(target, alpha, sigma, **slopes)
    x0, eps = np.random.default_rng(0).standard_normal((2, count))
    estimate = math.sqrt(np.mean((c_x * alpha * x0 + c_eps * sigma * eps) ** 2))
    # The mean of squares of count normals has the relative deviation sqrt(2 / count), its root half of that.
    expected = loss_weight("erd", target, alpha, sigma, **slopes)
    assert estimate == pytest.approx(expected, rel=5 * math.sqrt(0.5 / count))


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
        ("ddpm_linear", "x0", 0.39091),
        ("ddpm_linear", "eps", 0.80589),
        ("ddpm_linear", "v", 0.32055),
        ("ddpm_linear", "u", 1.0),
        ("flow", "u", 0.5 + math.asinh(1) / (2 * math.sqrt(2))),
        ("flow", "flow", 0.811613),
        ("gvp", "x0", 2 / math.pi),
        ("gvp", "eps", 2 / math.pi),
        ("gvp", "v", math.sqrt(2) / math.pi),
        ("gvp", "u", 1.0),
        ("gvp", "flow", math.sqrt(0.5)),  # pi / 2 times v
        ("vp", "x0", 0.391746),
        ("vp", "eps", 0.805559),
        ("vp", "v", 0.321372),
        ("vp", "u", 1.0),
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


@pytest.mark.parametrize(
    ("rule", "target", "gamma", "mean", "digits"),
    [
        ("min_snr", "eps", 5.0, 0.82402, 5),
        ("min_snr", "x0", 5.0, 2.00396, 5),
        ("min_snr", "v", 5.0, 0.32611, 5),
        ("p2", "eps", 1.0, 0.50442, 5),
        ("debias", "eps", None, 24.81, 2),
    ],
)
def test_bare_weights_on_cosine_have_the_published_means(rule, target, gamma, mean, digits):
    found = weight_table(rule, target, get_schedule("cosine"), "none", gamma=gamma).mean()
    assert abs(found - mean) <= 0.5 * 10.0**-digits  # half a unit of the last printed digit


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
    values = {"alpha": [0.6, 0.1], "sigma": [0.8, 0.99], "d_alpha": [-1.0, -2.0], "d_sigma": [0.75, 0.25]}
    array = loss_weight(rule, target, **{name: np.array(both) for name, both in values.items()})
    tensors = {name: torch.tensor(both, dtype=torch.float64) for name, both in values.items()}
    tensor = loss_weight(rule, target, **tensors)
    assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
    first = {name: both[0] for name, both in values.items()}
    number = loss_weight(rule, target, **first)
    assert isinstance(number, float)
    assert np.allclose(array, tensor.numpy(), rtol=4 * ROUND64, atol=0)
    assert number == pytest.approx(array[0], rel=4 * ROUND64)
    halved = loss_weight(rule, target, **first, normalizer=2.0)
    assert halved == number / 2
    assert torch.equal(loss_weight(rule, target, **tensors, normalizer=2.0), tensor / 2)


def _terms(grid):
    return {name: getattr(grid, name) for name in ("alpha", "sigma", "d_alpha", "d_sigma")}


def _slope(grid):
    """|d lambda / dt| in closed form, or by differences of ln SNR, and how exact it is."""
    t = grid.time
    closed = {
        "flow": lambda: 2 / (t * (1 - t)),
        "vp": lambda: (0.1 + 19.9 * t) / grid.sigma**2,
        "gvp": lambda: 2 * np.pi / np.sin(np.pi * t),
        "logsnr_flow": lambda: np.full_like(t, 20.0),
    }
    if grid.name in closed:
        return closed[grid.name](), 32 * ROUND64  # ten roundings here, as many there
    log_snr = np.log(grid.alpha**2 / grid.sigma**2)
    # ln SNR has a rounding of itself and a few of the SNR; a difference over one step has those of two.
    error = 2 * (np.abs(log_snr).max() + 8) * ROUND64
    return np.abs(np.gradient(log_snr) * len(t)), 4 * error / np.abs(np.diff(log_snr)).min()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", ["erd", "min_snr", "constant"])
def test_reading_log_snr_weighs_by_the_slope_of_the_log_snr(rule, target, schedule):
    grid = get_schedule(schedule)
    slope, error = _slope(grid)
    expected = loss_weight(rule, target, **_terms(grid)) * slope
    found = weight_table(rule, target, grid, "none", "log_snr")
    assert np.abs(found / expected - 1.0).max() <= error
    mean = weight_table(rule, target, grid, reading="log_snr")
    assert np.abs(mean * expected.mean() / expected - 1.0).max() <= 2 * error + 64 * ROUND64


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", ["logsnr", "logsnr_flow"])
def test_readings_agree_where_the_log_snr_is_linear_in_time(schedule, target):
    grid = get_schedule(schedule)  # ERD paper, Remark E.2
    by_t, by_log_snr = (weight_table("erd", target, grid, reading=reading) for reading in ("t", "log_snr"))
    assert np.abs(by_log_snr / by_t - 1.0).max() <= 2 * _slope(grid)[1] + 64 * ROUND64


def test_reading_log_snr_has_the_known_shapes():
    # |d lambda / dt| is 2 pi / sin(pi t) on gvp and 2 / (t (1 - t)) on flow: 1 / (alpha sigma) up to a factor.
    for schedule in ("gvp", "flow"):
        v = weight_table("erd", "v", get_schedule(schedule), reading="log_snr")
        assert np.abs(v - 1.0).max() <= (32 + 64) * ROUND64
    grid = get_schedule("cosine")  # whose step to the last time is nearly as steep as 1 / alpha
    eps, x0 = (weight_table("erd", target, grid, reading="log_snr") for target in ("eps", "x0"))
    assert round(eps.max()) == round(eps[-1]) == 280 and round(x0.max()) == round(x0[0]) == 63


SHORT = get_schedule("cosine", 40)
UNEVEN = np.where(np.arange(40) % 7 == 3, 0.0, np.arange(1.0, 41.0))
UNEVEN /= UNEVEN.sum()
EVEN = np.full(40, 1 / 40)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", RULES)
def test_a_density_normalises_and_rules_out_times(rule, target):
    drawn, bare = UNEVEN > 0, loss_weight(rule, target, **_terms(SHORT))
    for normalize, scale in (("mean", (UNEVEN * bare).sum()), ("none", 1.0), ("max", bare[drawn].max())):
        found = weight_table(rule, target, SHORT, normalize, density=UNEVEN)
        assert (found[~drawn] == 0).all()
        assert np.allclose(found[drawn], bare[drawn] / scale, rtol=64 * ROUND64, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reading", ["t", "log_snr"])
def test_importance_correction_gives_the_objective_of_uniform_times(reading, target):
    drawn = UNEVEN > 0
    uniform = weight_table("debias", target, SHORT, "none", reading)
    found = weight_table("debias", target, SHORT, "none", reading, density=UNEVEN, importance_correct=True)
    assert np.allclose((UNEVEN * found)[drawn], uniform[drawn] / 40, rtol=8 * ROUND64, atol=0)
    assert (found[~drawn] == 0).all()
    mean = weight_table("debias", target, SHORT, "mean", reading, density=UNEVEN, importance_correct=True)
    assert (UNEVEN * mean).sum() == pytest.approx(1.0, abs=64 * ROUND64)
    plain = weight_table("debias", target, SHORT, "none", reading, density=UNEVEN)
    assert np.array_equal(plain, found) == (reading == "log_snr")  # which corrects anyway
    # Uniform times need no correction; 1 / 40 * 40 rounds.
    even = weight_table("debias", target, SHORT, "none", reading, density=EVEN, importance_correct=True)
    assert np.allclose(even, uniform, rtol=4 * ROUND64, atol=0)


@pytest.mark.parametrize(
    ("density", "given"),
    [
        (np.ones(40), r"shape \(40,\) with sum 40.0"),
        (EVEN * (1 + 1e-5), r"with sum 1.00001"),
        (np.full(39, 1 / 39), r"shape \(39,\)"),
        (EVEN[:, None], r"shape \(40, 1\)"),
        (EVEN + np.array([0.1, -0.1] * 20), r"with sum"),
        (np.where(np.arange(40) == 3, np.nan, EVEN), r"with sum nan"),
    ],
)
def test_a_density_of_the_wrong_shape_or_sum_is_refused(density, given):
    with pytest.raises(ConfigError, match=rf"density: given .*{given}.*, allowed 40 probabilities with sum 1"):
        weight_table("erd", "eps", SHORT, density=density)


def _clipped(table, p, limit):
    """min(c table, limit) with mean 1, its c by bisection, and the share of the mean below the limit."""
    low, high = 1.0 / (p * table).sum(), limit / table[table > 0].min()
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if (p * np.minimum(middle * table, limit)).sum() < 1.0 else (low, middle)
    found = np.minimum(low * table, limit)
    return found, (p * found)[found < limit].sum()


@pytest.mark.parametrize("density", [None, UNEVEN], ids=["uniform", "uneven"])
@pytest.mark.parametrize("reading", ["t", "log_snr"])
@pytest.mark.parametrize(("rule", "target"), [("debias", "eps"), ("erd", "eps"), ("erd", "x0"), ("p2", "x0")])
@pytest.mark.parametrize("limit", [1.01, 1.5, 4.0, 1000.0])
def test_a_limit_keeps_the_mean_and_the_proportions_below_it(rule, target, reading, density, limit):
    p = EVEN if density is None else density
    bare = weight_table(rule, target, SHORT, "none", reading, density=density)
    expected, share = _clipped(bare, p, limit)
    found = weight_table(rule, target, SHORT, "mean", reading, limit, density=density)
    assert found.max() <= limit
    assert (p * found).sum() == pytest.approx(1.0, abs=64 * ROUND64 * limit)
    # Roundings of the mean, near 1, move the weights below the limit by their part of it.
    assert np.allclose(found, expected, rtol=100 * ROUND64 / share, atol=0)
    if limit == 1000.0:  # out of reach: a time's share of a mean of 1 is 1 at most, its probability 1 / 691 at least
        free = weight_table(rule, target, SHORT, "mean", reading, density=density)
        assert np.allclose(found, free, rtol=64 * ROUND64, atol=0)


@pytest.mark.parametrize("density", [None, UNEVEN], ids=["uniform", "uneven"])
def test_a_limit_of_one_leaves_a_constant(density):
    found = weight_table("debias", "eps", SHORT, clip_max=1.0, density=density)
    drawn = EVEN > 0 if density is None else UNEVEN > 0
    # The last weight gets what the others leave of 1: their roundings, over its probability, 1 / 691 or more.
    assert (found <= 1.0).all() and np.abs(found[drawn] - 1.0).max() <= 691 * 64 * ROUND64
    assert (found[~drawn] == 0).all()


def test_without_a_mean_to_keep_a_limit_is_a_plain_minimum():
    for normalize in ("none", "max"):
        free = weight_table("debias", "eps", SHORT, normalize)
        found = weight_table("debias", "eps", SHORT, normalize, clip_max=0.5)
        assert np.array_equal(found, np.minimum(free, 0.5)) and found.max() == 0.5


@pytest.mark.parametrize("limit", [0.99, 0.5])
def test_a_limit_below_the_mean_is_refused(limit):
    with pytest.raises(ConfigError, match=f"clip_max: given {limit}, allowed 1 or more"):
        weight_table("debias", "eps", SHORT, clip_max=limit)


# alpha ends at 0, as schedules rescaled to zero terminal SNR do.
ZERO_TERMINAL = DiscreteSchedule("zero", np.append(np.cos(np.arange(1, 50) / 50 * np.pi / 2), 0.0))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", RULES)
def test_zero_terminal_snr_has_weights_over_t_and_none_over_log_snr(rule, target):
    for normalize in ("mean", "none", "max"):
        table = weight_table(rule, target, ZERO_TERMINAL, normalize)
        assert np.isfinite(table).all() and (table >= 0).all() and table[-2] > 0
    message = f"weighting {rule} of target {target}, reading log_snr: given .* of schedule zero .*; allowed finite"
    with pytest.raises(ConfigError, match=message):
        weight_table(rule, target, ZERO_TERMINAL, reading="log_snr")


def test_weights_that_are_not_finite_are_refused():
    clean = DiscreteSchedule("clean", np.array([1.0, 0.8, 0.6]))  # sigma 0: infinite SNR
    with pytest.raises(ConfigError, match=r"weighting snr of target x0, reading t: given inf at index 0 of schedule c"):
        weight_table("snr", "x0", clean)


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
    with pytest.raises(ConfigError, match=r"unknown reading 'log-snr' \(did you mean 'log_snr'\?\); allowed: t, log_s"):
        weight_table("erd", "eps", grid, reading="log-snr")


@pytest.mark.parametrize("field", ["gamma", "k", "normalizer", "clip_max"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_parameters_are_numbers_above_zero(field, value):
    call, levels = (weight_table, [SHORT]) if field == "clip_max" else (loss_weight, [0.6, 0.8])
    with pytest.raises(ConfigError, match=f"{field}: given {value}, allowed numbers above 0"):
        call("p2", "eps", *levels, **{field: value})


@pytest.mark.parametrize("make", [float, lambda x: np.array([0.6, x]), lambda x: torch.tensor([0.6, x])])
@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["alpha", "sigma"])
def test_levels_are_finite_and_not_negative(field, wrong, make):
    levels = {"alpha": make(0.6), "sigma": make(0.8)} | {field: make(wrong)}
    with pytest.raises(ConfigError, match=f"^{field}: given .*, allowed finite numbers >= 0"):
        loss_weight("constant", "eps", **levels)


@pytest.mark.parametrize("make", [float, lambda x: np.array([0.6, x]), lambda x: torch.tensor([0.6, x])])
def test_there_is_data_or_noise(make):
    with pytest.raises(ConfigError, match=r"alpha, sigma: given .*, allowed one of them above 0"):
        loss_weight("constant", "eps", make(0.0), make(0.0))


@pytest.mark.parametrize(
    ("rule", "target", "named"),
    [
        *((rule, "flow", "target flow") for rule in ("erd", "p2")),
        ("sit_velocity", "eps", "weighting sit_velocity"),
        ("sit_likelihood", "x0", "weighting sit_likelihood"),
    ],
)
def test_missing_derivatives_are_named(rule, target, named):
    for given in ({}, {"d_alpha": -1.0}, {"d_sigma": 1.0}):
        with pytest.raises(ConfigError, match=f"{named}: d_alpha, d_sigma: not given, allowed the derivatives of"):
            loss_weight(rule, target, 0.6, 0.8, **given)


def test_weights_that_vanish_are_refused():
    with pytest.raises(ConfigError, match=r"weighting p2 of target eps with gamma 1000, k 3.0 .* mean 0, allowed"):
        weight_table("p2", "eps", get_schedule("cosine"), gamma=1000, k=3.0)
