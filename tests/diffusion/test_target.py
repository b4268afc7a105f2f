"""Targets: their coefficients and signs, and the way back to x0 and the noise."""

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erd_fast.diffusion import (
    SCHEDULES,
    TARGETS,
    DiffusionProcess,
    convert_target,
    determinant,
    get_schedule,
    invert_target,
    loss_factor,
    resolve_target,
    target_coefficients,
)
from erd_fast.errors import ConfigError

ROUND64 = 2.0**-53  # largest relative error of one float64 rounding
grid = functools.cache(get_schedule)
# Written out a second time, as what the noisy image is regressed on.
FORMULAS = {
    "x0": lambda x0, eps, alpha, sigma, d_alpha, d_sigma: x0,
    "eps": lambda x0, eps, alpha, sigma, d_alpha, d_sigma: eps,
    "v": lambda x0, eps, alpha, sigma, d_alpha, d_sigma: alpha * eps - sigma * x0,
    "u": lambda x0, eps, alpha, sigma, d_alpha, d_sigma: eps - x0,
    "flow": lambda x0, eps, alpha, sigma, d_alpha, d_sigma: d_alpha * x0 + d_sigma * eps,
}


def _rows(schedule, rows) -> dict:
    """alpha, sigma and their derivatives at ``rows`` of the grid, by name."""
    return {name: getattr(schedule, name)[rows] for name in ("alpha", "sigma", "d_alpha", "d_sigma")}


def test_every_target_is_tested_here():
    assert set(FORMULAS) == set(TARGETS)


@pytest.mark.filterwarnings("ignore:target 'v'")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", FORMULAS)
def test_training_targets_have_the_published_signs(target, schedule):
    process = DiffusionProcess(grid(schedule), target)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 2, 3, 3, generator=generator)
    rows = torch.tensor([0, 1, 400, 700, len(process.schedule) - 1])
    noisy = process.q_sample(x0, rows, noise=eps)
    row = {name: torch.tensor(table).view(-1, 1, 1, 1) for name, table in _rows(process.schedule, rows).items()}
    for found, formula in (
        (noisy.target, FORMULAS[target]),
        (noisy.x_t, lambda x0, eps, alpha, sigma, **_: alpha * x0 + sigma * eps),
    ):
        one, nothing = torch.ones_like(x0).double(), torch.zeros_like(x0).double()
        size = (formula(one, nothing, **row) * x0).abs() + (formula(nothing, one, **row) * eps).abs()
        # float32: the coefficient, two products and their sum.
        assert ((found - formula(x0.double(), eps.double(), **row)).abs() <= 4 * 2.0**-24 * size).all()


def test_v_is_that_of_diffusers():
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    schedule = get_schedule("cosine")
    x0, eps = torch.randn(2, 9, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.arange(100, 1000, 100)
    expected = scheduler.get_velocity(x0, eps, t)
    row = np.stack((schedule.alpha, schedule.sigma))[:, t]
    alpha, sigma = torch.tensor(row)[:, :, None, None, None]
    c_x, c_eps = target_coefficients("v", alpha, sigma)
    # Its float32 product of up to 1000 factors is off by 1000 roundings of factor and product at most; halved by the
    # root for alpha, and divided by 2 sigma^2 >= 0.05 for sigma.
    bound = 1000 * 2.0**-23 / 0.05
    assert ((c_x * x0 + c_eps * eps - expected).abs() <= bound * (x0.abs() + eps.abs())).all()


def test_u_is_the_velocity_of_diffusers_flow_matching():
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(10)
    x0, eps = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    here, below = scheduler.sigmas[3:5].double()
    c_x, c_eps = target_coefficients("u", 1 - here, here)
    x_t = (1 - here) * x0.double() + here * eps.double()
    ahead = scheduler.step(c_x * x0 + c_eps * eps, scheduler.timesteps[3], x_t).prev_sample
    # Along the true velocity an Euler step stays on the straight path from eps to x0; float32 inside the scheduler.
    assert (ahead - (1 - below) * x0 - below * eps).abs().max() < 4 * 2.0**-23 * (x0.abs() + eps.abs()).max()


def test_flow_is_the_derivative_of_the_noisy_image():
    for name in SCHEDULES:
        slopes = {"d_alpha": grid(name).d_alpha, "d_sigma": grid(name).d_sigma}
        found = target_coefficients("flow", grid(name).alpha, grid(name).sigma, **slopes)
        assert np.array_equal(found, list(slopes.values()))


def test_flow_is_u_on_the_straight_path():
    row = _rows(grid("flow"), slice(None))
    assert np.array_equal(target_coefficients("flow", **row), target_coefficients("u", row["alpha"], row["sigma"]))


def test_flow_is_half_pi_v_on_the_trigonometric_path():
    row = _rows(grid("gvp"), slice(None))
    for flow, v in zip(target_coefficients("flow", **row), target_coefficients("v", **row), strict=True):
        assert (np.abs(flow - math.pi / 2 * v) <= 2 * ROUND64 * np.abs(flow)).all()  # one product on either side


@pytest.mark.parametrize("missing", [("d_alpha",), ("d_sigma",), ("d_alpha", "d_sigma")])
def test_flow_without_slopes_is_refused(missing):
    row = {"alpha": 0.6, "sigma": 0.8, "d_alpha": -1.0, "d_sigma": 1.0}
    for name in missing:
        del row[name]
    for call in (
        lambda: target_coefficients("flow", **row),
        lambda: invert_target("flow", 1.0, 1.0, **row),
        lambda: convert_target(1.0, 1.0, **row, source="flow", target="eps"),
        lambda: convert_target(1.0, 1.0, **row, source="eps", target="flow"),
        lambda: loss_factor("x0", "flow", **row),
        lambda: determinant("flow", **row),
    ):
        with pytest.raises(ConfigError, match="target flow: d_alpha, d_sigma: not given, allowed the derivatives"):
            call()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_determinants_are_the_published_ones(schedule):
    row = _rows(grid(schedule), slice(None))
    alpha, sigma = row["alpha"], row["sigma"]
    closed = {"x0": sigma, "eps": -alpha, "v": -(alpha**2 + sigma**2), "u": -(alpha + sigma)}
    for target, expected in closed.items():
        assert (np.abs(determinant(target, **row) / expected - 1) <= 6 * ROUND64).all()
    # alpha' sigma - sigma' alpha = alpha sigma lambda' / 2; both are negative on every grid, which has no 0.
    found = determinant("flow", **row)
    assert (found < 0).all()
    if not grid(schedule).discrete:
        assert (np.abs(found / (0.5 * alpha * sigma * grid(schedule).d_log_snr) - 1) <= 12 * ROUND64).all()


def test_prediction_with_data_at_one_is_minus_ours():
    # SiT, LightningDiT: x = tau x1 + (1 - tau) noise, trained on x1 - noise. Here t = 1 - tau, and x1 is x0.
    generator = torch.Generator().manual_seed(0)
    x1, noise, error = torch.randn(3, 7, 2, 4, dtype=torch.float64, generator=generator)
    tau = torch.tensor([0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95], dtype=torch.float64)[:, None, None]
    x = tau * x1 + (1 - tau) * noise
    predicted = x1 - noise + error
    size = 16 * ROUND64 * (x1.abs() + noise.abs() + error.abs()).max()
    flow = grid("flow")
    alpha, sigma = flow.alpha_sigma(1 - tau)
    d_alpha, d_sigma = flow.derivatives(1 - tau)
    for target in ("u", "flow"):
        x0, eps = invert_target(target, -predicted, x, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
        # Along its velocity theirs is at the data after 1 - tau more, and was at the noise tau ago.
        assert (x0 - (x + (1 - tau) * predicted)).abs().max() <= size
        assert (eps - (x - tau * predicted)).abs().max() <= size
        c_x, c_eps = target_coefficients(target, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
        assert (c_x * x1 + c_eps * noise + (x1 - noise)).abs().max() <= size
    # Without the sign it is another image altogether: by 2 (1 - tau) of the velocity.
    wrong = invert_target("u", predicted, x, alpha, sigma)[0]
    assert (wrong - (x - (1 - tau) * predicted)).abs().max() <= size


def test_flow_with_data_at_one_is_minus_ours_on_a_curved_path():
    # SiT's GVP path: x = sin(pi tau / 2) x1 + cos(pi tau / 2) noise, trained on its derivative by tau.
    tau = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    theirs = 0.5 * math.pi * torch.cos(0.5 * math.pi * tau), -0.5 * math.pi * torch.sin(0.5 * math.pi * tau)
    alpha, sigma = grid("gvp").alpha_sigma(1 - tau)
    d_alpha, d_sigma = grid("gvp").derivatives(1 - tau)
    ours = target_coefficients("flow", alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine + its).abs().max() <= 16 * ROUND64  # an angle of at most pi / 2 with 3 roundings, times pi / 2


def test_prediction_with_data_at_zero_is_ours():
    # REPA, diffusers: x = (1 - t) x0 + t noise, trained on noise - x0.
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(1000)
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = scheduler.timesteps[[0, 400, 998]]
    x = scheduler.scale_noise(x0, timesteps, noise).double()
    alpha, sigma = (value.view(3, 1, 1, 1) for value in grid("flow").alpha_sigma(timesteps / 1000))
    size = 4 * 2.0**-24 * (x0.abs() + noise.abs())  # float32: sigma, two products, their sum
    assert ((x - alpha * x0 - sigma * noise).abs() <= size).all()
    found = invert_target("u", (noise - x0).double(), x, alpha, sigma)
    for value, expected in zip(found, (x0, noise), strict=True):
        assert ((value - expected).abs() <= 2 * size).all()


def _double_tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("make", [np.asarray, _double_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", FORMULAS)
@given(data=st.data())
@settings(deadline=None, max_examples=10)
def test_inversion_returns_what_was_mixed(target, schedule, make, data):
    size = len(grid(schedule))
    number = data.draw(st.sampled_from([0, size - 1]) | st.integers(0, size - 1))
    x0, eps = data.draw(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=2))
    row = _rows(grid(schedule), number)
    alpha, sigma = row["alpha"], row["sigma"]
    x_t, y = alpha * x0 + sigma * eps, FORMULAS[target](x0, eps, **row)
    found = invert_target(target, make([y]), make([x_t]), **{name: make([value]) for name, value in row.items()})
    # x_t and y have 3 roundings of the terms they sum, and so again have the sums over D; |D| itself has no
    # cancellation in any target: c_x <= 0 <= c_eps, or one of them is 0. Variance preserving tables have
    # 1 = alpha^2 + sigma^2 within 4 more.
    c_x, c_eps = (float(c) for c in target_coefficients(target, **row))
    x_size, y_size = abs(alpha * x0) + abs(sigma * eps), abs(c_x * x0) + abs(c_eps * eps)
    det = abs(c_x) * sigma + abs(c_eps) * alpha
    x0_bound = 16 * ROUND64 * (sigma * y_size + abs(c_eps) * x_size) / det
    eps_bound = 16 * ROUND64 * (abs(c_x) * x_size + alpha * y_size) / det
    assert abs(float(found[0][0]) - x0) <= x0_bound
    assert abs(float(found[1][0]) - eps) <= eps_bound
    assert all(type(value) is type(make([y])) for value in found)


def test_inversion_takes_rows_for_batches():
    x0, eps = torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)[:, None, None]
    sigma = torch.sqrt(1 - alpha**2)
    found = invert_target("v", alpha * eps - sigma * x0, alpha * x0 + sigma * eps, alpha, sigma)
    for value, expected in zip(found, (x0, eps), strict=True):
        assert (value - expected).abs().max() <= 16 * ROUND64 * (x0.abs() + eps.abs()).max()


@pytest.mark.parametrize("kind", [float, np.float64, torch.tensor])
@pytest.mark.parametrize("target", FORMULAS)
def test_coefficients_keep_the_type_they_are_given(target, kind):
    c_x, c_eps = target_coefficients(target, kind(0.6), kind(0.8), d_alpha=kind(-0.7), d_sigma=kind(0.4))
    assert isinstance(c_x, type(kind(0.6))) and isinstance(c_eps, type(kind(0.6)))
    # Columns: x0 alone and the noise alone.
    assert float(c_x) == pytest.approx(FORMULAS[target](1.0, 0.0, 0.6, 0.8, -0.7, 0.4), rel=1e-7)
    assert float(c_eps) == pytest.approx(FORMULAS[target](0.0, 1.0, 0.6, 0.8, -0.7, 0.4), rel=1e-7)


@pytest.mark.parametrize(
    ("alias", "target"),
    [
        ("sample", "x0"),
        ("x_start", "x0"),
        ("epsilon", "eps"),
        ("v_prediction", "v"),
        ("velocity", "v"),
        *[(name, name) for name in FORMULAS],
    ],
)
def test_aliases_name_their_target(alias, target):
    assert resolve_target(alias) == target
    assert DiffusionProcess(get_schedule("cosine", 10), alias).target == target  # v on cosine: no warning
    row = {"alpha": 0.6, "sigma": 0.8, "d_alpha": -0.7, "d_sigma": 0.4}
    assert target_coefficients(alias, **row) == target_coefficients(target, **row)


@pytest.mark.parametrize("schedule", ["flow", "logsnr_flow"])
@pytest.mark.parametrize("name", ["v", "velocity", "v_prediction"])
def test_v_on_flow_paths_warns_and_names_u(name, schedule):
    with pytest.warns(UserWarning, match=f"on '{schedule}' the velocity of flow matching, eps - x0, is target 'u'"):
        assert resolve_target(name, grid(schedule)) == "v"


def test_no_other_pair_warns():
    with warnings.catch_warnings(action="error"):
        for target in TARGETS:
            for name in SCHEDULES:
                if target != "v" or grid(name).variance_preserving:
                    assert resolve_target(target, grid(name)) == target


@pytest.mark.parametrize(
    ("wrong", "near"), [("epsilom", "epsilon"), ("x_strat", "x_start"), ("x1", "x0"), ("flwo", "flow")]
)
def test_unknown_target_names_the_nearest(wrong, near):
    allowed = "x0, eps, v, u, flow, sample"
    with pytest.raises(ConfigError, match=rf"unknown target '{wrong}' \(did you mean '{near}'\?\); allowed: {allowed}"):
        resolve_target(wrong)
