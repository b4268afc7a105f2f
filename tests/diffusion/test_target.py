"""Targets: their coefficients and signs, and the way back to x0 and the noise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erd_fast.diffusion import (
    SCHEDULES,
    TARGETS,
    DiffusionProcess,
    get_schedule,
    invert_target,
    resolve_target,
    target_coefficients,
)
from erd_fast.errors import ConfigError

ROUND64 = 2.0**-53  # largest relative error of one float64 rounding
# Written out a second time, as what the noisy image is regressed on.
FORMULAS = {
    "x0": lambda x0, eps, alpha, sigma: x0,
    "eps": lambda x0, eps, alpha, sigma: eps,
    "v": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "u": lambda x0, eps, alpha, sigma: eps - x0,
}


def test_every_target_is_tested_here():
    assert set(FORMULAS) == set(TARGETS)


@pytest.mark.filterwarnings("ignore:target 'v'")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", FORMULAS)
def test_training_targets_have_the_published_signs(target, schedule):
    process = DiffusionProcess(get_schedule(schedule), target)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 2, 3, 3, generator=generator)
    rows = torch.tensor([0, 1, 400, 700, len(process.schedule) - 1])
    noisy = process.q_sample(x0, rows, noise=eps)
    alpha, sigma = (
        value.view(-1, 1, 1, 1) for value in process.schedule.alpha_sigma(torch.tensor(process.schedule.time[rows]))
    )
    expected = FORMULAS[target](x0.double(), eps.double(), alpha, sigma)
    # float32: the coefficient, two products and their sum, of terms no larger than |x0| and |eps|.
    assert ((noisy.target - expected).abs() <= 4 * 2.0**-24 * (x0.abs() + eps.abs())).all()
    assert ((noisy.x_t - alpha * x0 - sigma * eps).abs() <= 4 * 2.0**-24 * (x0.abs() + eps.abs())).all()


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


def _double_tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("make", [np.asarray, _double_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", FORMULAS)
@given(data=st.data())
@settings(deadline=None, max_examples=10)
def test_inversion_returns_what_was_mixed(target, schedule, make, data):
    grid = get_schedule(schedule)
    row = data.draw(st.sampled_from([0, len(grid) - 1]) | st.integers(0, len(grid) - 1))
    x0, eps = data.draw(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=2))
    alpha, sigma = grid.alpha[row], grid.sigma[row]
    x_t, y = alpha * x0 + sigma * eps, FORMULAS[target](x0, eps, alpha, sigma)
    found = invert_target(target, make([y]), make([x_t]), make([alpha]), make([sigma]))
    # x_t and y have 3 roundings of the terms they sum, and so again have the sums over D; |D| itself has no
    # cancellation in any target. Variance preserving tables have 1 = alpha^2 + sigma^2 within 4 more.
    c_x, c_eps = (float(c) for c in target_coefficients(target, alpha, sigma))
    x_size, y_size = abs(alpha * x0) + abs(sigma * eps), abs(c_x * x0) + abs(c_eps * eps)
    determinant = abs(c_x) * sigma + abs(c_eps) * alpha
    x0_bound = 16 * ROUND64 * (sigma * y_size + abs(c_eps) * x_size) / determinant
    eps_bound = 16 * ROUND64 * (abs(c_x) * x_size + alpha * y_size) / determinant
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
    c_x, c_eps = target_coefficients(target, kind(0.6), kind(0.8))
    assert isinstance(c_x, type(kind(0.6))) and isinstance(c_eps, type(kind(0.6)))
    # Columns: x0 alone and the noise alone.
    assert float(c_x) == pytest.approx(FORMULAS[target](1.0, 0.0, 0.6, 0.8), rel=1e-7)
    assert float(c_eps) == pytest.approx(FORMULAS[target](0.0, 1.0, 0.6, 0.8), rel=1e-7)


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
    assert target_coefficients(alias, 0.6, 0.8) == target_coefficients(target, 0.6, 0.8)


@pytest.mark.parametrize("name", ["v", "velocity", "v_prediction"])
def test_v_on_flow_warns_and_names_u(name):
    with pytest.warns(UserWarning, match="on 'flow' the velocity of flow matching, eps - x0, is target 'u'"):
        assert resolve_target(name, get_schedule("flow")) == "v"


@pytest.mark.parametrize(("wrong", "near"), [("epsilom", "epsilon"), ("x_strat", "x_start"), ("x1", "x0")])
def test_unknown_target_names_the_nearest(wrong, near):
    with pytest.raises(
        ConfigError, match=rf"unknown target '{wrong}' \(did you mean '{near}'\?\); allowed: x0, eps, v"
    ):
        resolve_target(wrong)
