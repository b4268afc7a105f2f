"""The process: tables of a schedule, a target and a weighting, and the two ops on them."""

import numpy as np
import pytest
import torch

from erd_fast.diffusion import SCHEDULES, DiffusionProcess, get_schedule, target_coefficients, weight_table
from erd_fast.errors import ConfigError
from erd_fast.ops import diffusion_loss
from erd_fast.random import Purpose, Stream, normals


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", ["x0", "eps", "u"])
def test_tables_are_float64_ones_rounded_once(target, schedule):
    grid = get_schedule(schedule)
    process = DiffusionProcess(grid, target, "erd", "max")
    columns = (grid.alpha, grid.sigma, *target_coefficients(target, grid.alpha, grid.sigma))
    for number, column in enumerate(columns):
        assert np.array_equal(process.coefficients[:, number].numpy(), column.astype(np.float32))
    assert np.array_equal(process.weight.numpy(), weight_table("erd", target, grid, "max").astype(np.float32))
    assert np.array_equal(process.time.numpy(), grid.time.astype(np.float32))


def test_a_step_draws_its_noise_and_weighs_its_errors():
    process = DiffusionProcess(get_schedule("cosine"), "v", "erd")
    x0 = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    t_index, ids = torch.tensor([10, 990, 400, 400]), torch.arange(4) + 100
    noisy = process.q_sample(x0, t_index, ids=ids, seed=8)
    eps = normals(8, Purpose.TRAIN, Stream.NOISE, ids, (2, 3, 3))
    alpha, sigma = (
        torch.tensor(table[t_index]).view(4, 1, 1, 1) for table in process.schedule.alpha_sigma(np.arange(1000))
    )
    size = x0.abs() + eps.abs()
    # float32: the coefficient, two products and their sum.
    assert ((noisy.x_t - (alpha * x0 + sigma * eps)).abs() <= 4 * 2.0**-24 * size).all()
    assert ((noisy.target - (alpha * eps - sigma * x0)).abs() <= 4 * 2.0**-24 * size).all()

    prediction = torch.zeros_like(x0)
    found = process.loss(prediction, noisy.target, t_index, num_bins=5, batch_size=8)
    weight = weight_table("erd", "v", process.schedule)[t_index]
    expected = (weight * noisy.target.double().square().flatten(1).mean(1).numpy()).sum() / 8
    assert found.loss.item() == pytest.approx(expected, rel=(18 + 4 + 8) * 2.0**-24)  # one rounding an addition
    assert found.bin_count.tolist() == [1, 0, 2, 0, 1]


def test_eps_with_erd_is_the_default():
    grid = get_schedule("cosine", 10)
    default, named = DiffusionProcess(grid), DiffusionProcess(grid, "eps", "erd", "mean")
    assert default.target == "eps"
    assert torch.equal(default.coefficients, named.coefficients) and torch.equal(default.weight, named.weight)


def test_weights_change_the_loss_and_not_the_reported_errors():
    grid, t_index = get_schedule("cosine", 100), torch.tensor([5, 95])
    prediction, target = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    weighted, plain = (
        DiffusionProcess(grid, "eps", rule).loss(prediction, target, t_index) for rule in ("erd", "constant")
    )
    assert torch.equal(weighted.per_sample, plain.per_sample)
    assert weighted.loss != plain.loss
    assert torch.equal(plain.loss, diffusion_loss(prediction, target, torch.ones(2)).loss)


def test_v_on_flow_warns_and_names_u():
    with pytest.warns(UserWarning, match="is target 'u'"):
        process = DiffusionProcess(get_schedule("flow"), "velocity")
    assert process.target == "v"


def test_unknown_names_are_refused():
    grid = get_schedule("cosine", 10)
    with pytest.raises(ConfigError, match="unknown target"):
        DiffusionProcess(grid, "score")
    with pytest.raises(ConfigError, match="unknown weighting"):
        DiffusionProcess(grid, "eps", "min_snr_5")
