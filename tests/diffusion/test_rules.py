"""The weighting rules: their published forms, the forms derived from those, and how they hang together."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erd_fast.diffusion import (
    RULES,
    SCHEDULES,
    TARGETS,
    get_schedule,
    is_derived,
    loss_factor,
    loss_weight,
    weight_table,
)

ROUND64, ROUND32 = 2.0**-53, 2.0**-24

# The published forms a second time, in the plain notation of the papers (f is SiT's drift, its d the derivatives).
PUBLISHED = {
    **{("constant", target): lambda p: 1.0 for target in TARGETS},
    ("erd", "x0"): lambda p: p.alpha,
    ("erd", "eps"): lambda p: p.sigma,
    ("erd", "v"): lambda p: math.sqrt(2) * p.alpha * p.sigma,
    ("erd", "u"): lambda p: math.sqrt(p.alpha**2 + p.sigma**2),
    ("erd", "flow"): lambda p: math.hypot(p.d_alpha * p.alpha, p.d_sigma * p.sigma),
    ("min_snr", "eps"): lambda p: min(p.snr, p.gamma) / p.snr,
    ("min_snr", "x0"): lambda p: min(p.snr, p.gamma),
    ("min_snr", "v"): lambda p: min(p.snr, p.gamma) / (p.snr + 1),
    ("max_snr", "eps"): lambda p: max(p.snr, p.gamma) / p.snr,
    ("max_snr", "x0"): lambda p: max(p.snr, p.gamma),
    ("soft_min_snr", "eps"): lambda p: p.gamma / (p.gamma + p.snr),
    ("soft_min_snr", "x0"): lambda p: p.snr * p.gamma / (p.snr + p.gamma),
    ("soft_min_snr", "v"): lambda p: p.snr * p.gamma / ((p.snr + p.gamma) * (p.snr + 1)),
    ("p2", "eps"): lambda p: 1 / (p.k + p.snr) ** p.gamma,
    ("p2", "v"): lambda p: p.snr / ((p.k + p.snr) ** p.gamma * (p.snr + 1)),
    ("debias", "eps"): lambda p: 1 / math.sqrt(p.snr),
    ("debias", "v"): lambda p: 1 / (p.snr + 1),
    ("min_debias", "eps"): lambda p: min(1 / math.sqrt(p.snr), 1),
    ("max_debias", "eps"): lambda p: max(1 / math.sqrt(p.snr), 1),
    ("snr", "x0"): lambda p: p.snr,
    ("inv_snr", "x0"): lambda p: 1 / p.snr,
    ("trunc_snr", "x0"): lambda p: max(p.snr, 1),
    **{("sigma_sqrt", target): lambda p: p.sigma**-2 for target in ("x0", "u", "flow")},
    **{
        ("cosmap", target): lambda p: 2 / (math.pi * (1 - 2 * p.sigma + 2 * p.sigma**2))
        for target in ("x0", "u", "flow")
    },
    ("sit_velocity", "eps"): lambda p: (p.f / p.sigma) ** 2,
    ("sit_likelihood", "eps"): lambda p: abs(p.f) / p.sigma**2,
}
DETERMINANTS = {
    "x0": lambda p: p.sigma,
    "eps": lambda p: p.alpha,
    "v": lambda p: p.alpha**2 + p.sigma**2,
    "u": lambda p: p.alpha + p.sigma,
    "flow": lambda p: p.alpha * p.d_sigma - p.sigma * p.d_alpha,
}
DEFAULT_GAMMA = {"min_snr": 5.0, "max_snr": 5.0, "soft_min_snr": 5.0, "p2": 1.0}
# Rules without an objective of their own; published forms that are not of the objective of the rule's first one, and
# those that are where variance is preserved: they divide by SNR + 1.
NO_OBJECTIVE = {"constant", "erd"}
OTHER_OBJECTIVE = {("debias", "v"), ("sigma_sqrt", "u"), ("sigma_sqrt", "flow"), ("cosmap", "u"), ("cosmap", "flow")}
VARIANCE_PRESERVING = {("min_snr", "v"), ("soft_min_snr", "v"), ("p2", "v")}
FIRST = {"debias": "eps", "sigma_sqrt": "x0", "cosmap": "x0"}


class Point:
    """One noise level, and the parameters of a rule there."""

    def __init__(self, alpha, sigma, d_alpha, d_sigma, gamma=1.0, k=1.0):
        self.alpha, self.sigma, self.d_alpha, self.d_sigma = alpha, sigma, d_alpha, d_sigma
        self.gamma, self.k = gamma, k

    @classmethod
    def on(cls, path, log_snr, gamma=1.0, k=1.0):
        """lambda on a path whose lambda falls by 3 a unit of time."""
        if path == "vp":
            a, s = 1 / (1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))
            alpha, sigma = math.sqrt(a), math.sqrt(s)
            return cls(alpha, sigma, -1.5 * alpha * s, 1.5 * sigma * a, gamma, k)
        alpha, sigma = 1 / (1 + math.exp(-log_snr / 2)), 1 / (1 + math.exp(log_snr / 2))
        return cls(alpha, sigma, -1.5 * alpha * sigma, 1.5 * alpha * sigma, gamma, k)

    def of_one_objective(self, rule):
        """Targets whose weights are all the same objective here."""
        others = OTHER_OBJECTIVE
        if abs(self.alpha**2 + self.sigma**2 - 1) > 8 * ROUND64:
            others = others | VARIANCE_PRESERVING
        return [target for target in TARGETS if (rule, target) not in others]

    @property
    def snr(self):
        return self.alpha**2 / self.sigma**2

    @property
    def f(self):
        return self.d_alpha / self.alpha * self.sigma**2 - self.sigma * self.d_sigma

    def made(self, make):
        """alpha, sigma and their derivatives as ``make`` makes them."""
        return [make(value) for value in (self.alpha, self.sigma, self.d_alpha, self.d_sigma)]

    def weight(self, rule, target, make=float, gamma=None):
        alpha, sigma, d_alpha, d_sigma = self.made(make)
        return loss_weight(
            rule, target, alpha, sigma, gamma=gamma or self.gamma, k=self.k, d_alpha=d_alpha, d_sigma=d_sigma
        )

    def rounding(self):
        """A form is 30 operations at most; none cancels but cosmap's sum of three, which is at least a tenth of them.

        A power multiplies the relative error of its base by its exponent.
        """
        return 32 * (1 + self.gamma) * ROUND64


PATHS = ("vp", "flow")
LEVELS = [Point.on(path, log_snr) for path in PATHS for log_snr in (-20, -1.5, 0, 0.4, 1.7, 7, 20)]
KINDS = {
    float: 0.0,
    np.float64: 0.0,
    lambda value: np.array([value]): 0.0,
    lambda value: torch.tensor([value], dtype=torch.float64): 0.0,
    lambda value: torch.tensor([value], dtype=torch.float32): ROUND32,
    lambda value: torch.tensor([value], dtype=torch.float16): ROUND32,  # the weight is float32
}


def _number(value):
    return value if isinstance(value, float) else value.item()


def _points(gamma=None):
    gammas = st.floats(0.1, 3) if gamma is None else gamma  # to the third power, float32 holds the weights
    return st.builds(Point.on, st.sampled_from(PATHS), st.floats(-20, 20), gammas, st.floats(0.1, 10))


def test_every_published_form_is_tested_here():
    assert set(PUBLISHED) == {(rule, target) for rule in RULES for target in RULES[rule].published}
    assert set(DETERMINANTS) == set(TARGETS)


@pytest.mark.parametrize(("rule", "target"), PUBLISHED)
@given(point=_points())
@settings(deadline=None, max_examples=15)
def test_published_forms_are_the_published_formulas(rule, target, point):
    for make, last_rounding in KINDS.items():
        alpha, sigma, d_alpha, d_sigma = (_number(value) for value in point.made(make))  # float32 and 16 round them
        expected = PUBLISHED[rule, target](Point(alpha, sigma, d_alpha, d_sigma, point.gamma, point.k))
        found = point.weight(rule, target, make)
        assert _number(found) == pytest.approx(expected, rel=point.rounding() + last_rounding)


def test_weights_are_of_the_kind_of_alpha():
    point = Point.on("vp", 0.3)
    for rule in RULES:
        weights = [point.weight(rule, "flow", make) for make in KINDS]
        assert [type(weight) for weight in weights] == [float, float, np.ndarray, *[torch.Tensor] * 3]
        dtypes = [torch.float64, torch.float32, torch.float32]
        assert [weight.dtype for weight in weights[3:]] == dtypes and weights[2].dtype == np.float64
    rows = torch.tensor([0.6, 0.1])[:, None]
    assert loss_weight("debias", "eps", rows, 0.5).shape == (2, 1)
    mixed = loss_weight("debias", "eps", 0.6, torch.tensor(0.8))
    assert isinstance(mixed, torch.Tensor) and mixed.item() == pytest.approx(0.8 / 0.6, rel=3 * ROUND32)


@pytest.mark.parametrize("rule", RULES)
def test_gamma_has_the_published_default(rule):
    point = Point.on("vp", math.log(5.5))
    slopes = {"d_alpha": point.d_alpha, "d_sigma": point.d_sigma}
    for target in TARGETS:
        default = loss_weight(rule, target, point.alpha, point.sigma, **slopes)
        assert default == point.weight(rule, target, gamma=DEFAULT_GAMMA.get(rule, 0.25))  # others ignore it
        if rule in DEFAULT_GAMMA:
            assert default != point.weight(rule, target, gamma=DEFAULT_GAMMA[rule] + 1)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in NO_OBJECTIVE])
@given(point=_points())
@settings(deadline=None, max_examples=15)
def test_the_weights_of_a_rule_are_one_objective(rule, point):
    # w |y - y'|^2 = w (D / sigma)^2 |x0 - x0'|^2 is the same for all targets: docs/math.md, B2.
    targets = point.of_one_objective(rule)
    sources = [target for target in targets if target in RULES[rule].published]
    assert sources
    for source in sources:
        published = PUBLISHED[rule, source](point)
        for target in targets:
            factor = (DETERMINANTS[target](point) / DETERMINANTS[source](point)) ** 2
            assert point.weight(rule, target) * factor == pytest.approx(published, rel=point.rounding())
            levels = (source, target, point.alpha, point.sigma)
            found = loss_factor(*levels, d_alpha=point.d_alpha, d_sigma=point.d_sigma)
            assert found == pytest.approx(factor, rel=16 * ROUND64)


@pytest.mark.parametrize(("rule", "target"), sorted(OTHER_OBJECTIVE | VARIANCE_PRESERVING))
def test_forms_listed_as_of_another_objective_are(rule, target):
    point, source = Point.on("flow", 1.0), FIRST.get(rule, "eps")
    factor = (DETERMINANTS[target](point) / DETERMINANTS[source](point)) ** 2
    assert point.weight(rule, target) * factor != pytest.approx(point.weight(rule, source), rel=0.01)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", RULES)
def test_derived_forms_are_those_without_a_published_one(rule, target):
    assert is_derived(rule, target) == ((rule, target) not in PUBLISHED)


def test_derived_forms_are_marked_under_aliases_too():
    assert is_derived("p2", "sample") and not is_derived("p2", "v_prediction") and not is_derived("p2", "epsilon")


def test_erd_is_half_a_power_of_p2_for_eps_and_nothing_for_u_where_variance_is_preserved():
    for log_snr in np.linspace(-20, 20, 41):
        point = Point.on("vp", log_snr)
        p2 = point.weight("p2", "eps", gamma=0.5)
        assert point.weight("erd", "eps") == pytest.approx(p2, rel=point.rounding())
        assert point.weight("erd", "u") == pytest.approx(1.0, rel=8 * ROUND64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sit_weights_are_a_constant_velocity_weight_and_half_the_slope_of_the_log_snr(schedule):
    grid = get_schedule(schedule)
    velocity = weight_table("sit_velocity", "flow", grid, "none")
    assert np.abs(velocity - 1.0).max() <= 16 * ROUND64
    if not grid.discrete:  # tables of alpha and of ln SNR have finite differences that are not each other's
        t = grid.time
        slope = {
            "flow": lambda: 2 / (t * (1 - t)),
            "vp": lambda: (0.1 + 19.9 * t) / grid.sigma**2,
            "gvp": lambda: 2 * np.pi / np.sin(np.pi * t),
            "logsnr_flow": lambda: np.full_like(t, 20.0),
        }[schedule]()
        found = weight_table("sit_likelihood", "eps", grid, "none")
        # Ten roundings; near t = 1, gvp's cosine and sin(pi t) suffer alike from that of pi t, and it cancels.
        assert np.abs(found / (slope / 2) - 1.0).max() <= 32 * ROUND64


@pytest.mark.parametrize("point", LEVELS)
def test_rules_that_are_each_other(point):
    def same(one, other):
        return one == pytest.approx(other, rel=point.rounding())

    for target in point.of_one_objective("min_snr"):
        assert same(point.weight("max_snr", target), point.weight("trunc_snr", target))  # gamma 1
        product = point.weight("min_debias", target) * point.weight("max_debias", target)
        assert same(product, point.weight("debias", "eps") * (point.alpha / DETERMINANTS[target](point)) ** 4)
        both = point.weight("min_snr", target) * point.weight("max_snr", target)
        assert same(both, point.weight("snr", "x0") * (point.sigma / DETERMINANTS[target](point)) ** 4)
    assert same(point.weight("snr", "eps"), point.weight("constant", "eps"))
    assert same(point.weight("snr", "x0") * point.weight("inv_snr", "x0"), 1.0)
    assert same(point.weight("sigma_sqrt", "eps"), point.alpha**-2)
    assert same(point.weight("sit_velocity", "flow"), point.weight("constant", "flow"))


@pytest.mark.parametrize("target", TARGETS)
@given(point=_points(st.floats(0.01, 100)))
@settings(deadline=None, max_examples=15)
def test_soft_min_snr_is_min_snr_within_a_factor_of_two(target, point):
    soft, hard = point.weight("soft_min_snr", target), point.weight("min_snr", target)
    slack = 1 + 64 * ROUND64
    assert soft <= hard * slack and hard <= 2 * soft * slack
    # SNR g / (SNR + g) = SNR / (1 + SNR / g): SNR below 5e8 leaves 1e-11 of g = 5e19.
    for rule in ("soft_min_snr", "min_snr"):
        if target in point.of_one_objective(rule):
            snr = point.weight("snr", target)
            assert point.weight(rule, target, gamma=5e19) == pytest.approx(snr, rel=1e-11 + 64 * ROUND64)


# Weights that grow without bound as SNR falls to 0; there, they are 1.
DIVERGES_AT_ZERO_SNR = {
    *(("inv_snr", target) for target in TARGETS),
    ("max_snr", "eps"),
    ("debias", "eps"),
    ("max_debias", "eps"),
    ("trunc_snr", "eps"),
    ("sigma_sqrt", "eps"),
    ("cosmap", "eps"),
    ("sit_velocity", "eps"),
    ("sit_likelihood", "eps"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", RULES)
def test_zero_snr_gives_the_limit_or_one(rule, target):
    near, zero = (Point(alpha, 1.0, -1.5, 0.5, gamma=2.0, k=3.0) for alpha in (1e-12, 0.0))
    found = [_number(zero.weight(rule, target, make)) for make in KINDS]
    if (rule, target) in DIVERGES_AT_ZERO_SNR:
        assert near.weight(rule, target) > 1e11
        assert found == [1.0] * len(KINDS)
    else:  # an error of the order of alpha; the float32 ones are rounded
        assert found == pytest.approx([near.weight(rule, target)] * len(KINDS), rel=ROUND32, abs=1e-10)


def test_known_weights_at_zero_snr():
    zero = Point(0.0, 1.0, -1.5, 0.5, gamma=5.0, k=2.0)
    assert [zero.weight("min_snr", target) for target in TARGETS] == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert [zero.weight("max_snr", target) for target in TARGETS] == [5.0, 1.0, 5.0, 5.0, 5.0 / 1.5**2]
    assert [zero.weight("erd", target) for target in TARGETS] == [0.0, 1.0, 0.0, 1.0, 0.5]
    assert zero.weight("p2", "eps") == 2.0**-5 and zero.weight("snr", "eps") == 1.0
    assert zero.weight("debias", "v") == 1.0


@pytest.mark.parametrize(("prediction", "offset"), [("eps", 0), ("v", 1)])
def test_min_snr_is_that_of_the_scripts_of_diffusers(prediction, offset):
    training_utils = pytest.importorskip("diffusers.training_utils")
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    t = torch.arange(1000)
    snr = training_utils.compute_snr(scheduler, t)
    expected = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0] / (snr + offset)
    found = weight_table("min_snr", prediction, get_schedule("cosine"), "none", gamma=5.0)
    # Its float32 alpha^2 has a rounding of factor and product a step, the last factor 0.001 = 1 - 0.999 that of 0.999;
    # SNR = alpha^2 / (1 - alpha^2) has (1 + SNR) times their sum, and a few of its own.
    error = (t + 1) * 2 * ROUND32 + (t == 999) * 1000 * ROUND32
    bound = error.numpy() * (1 + np.exp(get_schedule("cosine").log_snr)) + 8 * ROUND32
    assert (np.abs(found / expected.double().numpy() - 1.0) <= bound).all()


@pytest.mark.parametrize("rule", ["sigma_sqrt", "cosmap"])
def test_sd3_weights_are_those_of_diffusers(rule):
    training_utils = pytest.importorskip("diffusers.training_utils")
    grid = get_schedule("flow")
    expected = training_utils.compute_loss_weighting_for_sd3(rule, torch.from_numpy(grid.sigma)).double().numpy()
    for target in ("u", "flow", "x0"):  # sigma_sqrt is float32 there
        found = weight_table(rule, target, grid, "none")
        assert np.abs(found / expected - 1.0).max() <= ROUND32 * 1.01
