"""The process: tables of a schedule, a target and a weighting, and the two ops on them."""

import numpy as np
import pytest
import torch

from erd_fast.diffusion import (
    SCHEDULES,
    DiffusionProcess,
    get_schedule,
    target_coefficients,
    timestep_density,
    timestep_table,
    weight_table,
)
from erd_fast.errors import ConfigError
from erd_fast.ops import diffusion_loss, draw
from erd_fast.random import Purpose, Stream, normals


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", ["x0", "eps", "u", "flow"])
def test_tables_are_float64_ones_rounded_once(target, schedule):
    grid = get_schedule(schedule)
    process = DiffusionProcess(grid, target, "erd", "max")
    slopes = {"d_alpha": grid.d_alpha, "d_sigma": grid.d_sigma}
    columns = (grid.alpha, grid.sigma, *target_coefficients(target, grid.alpha, grid.sigma, **slopes))
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
    assert default.density is None  # uniform times


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
    with pytest.raises(ConfigError, match="unknown t_sampler"):
        DiffusionProcess(grid, "eps", t_sampler="logit-normal")
    with pytest.raises(ConfigError, match="unknown reading"):
        DiffusionProcess(grid, "eps", reading="time")


GRID = get_schedule("cosine", 60)
LOGIT = {"t_sampler": "logit_normal", "logit_mean": -0.5, "logit_std": 0.7}
LOGIT_DENSITY = timestep_density("logit_normal", 60, logit_mean=-0.5, logit_std=0.7)


@pytest.mark.parametrize("normalize", ["mean", "none", "max"])
@pytest.mark.parametrize(
    ("rule", "how"),
    [
        ("min_snr", {"gamma": 1.5}),
        ("p2", {"k": 3.0}),
        ("erd", {"reading": "log_snr"}),
        ("debias", {"clip_max": 1.25}),
    ],
)
def test_arguments_of_the_weight_reach_it(rule, how, normalize):
    found = DiffusionProcess(GRID, "x0", rule, normalize, **how).weight.numpy()
    assert np.array_equal(found, weight_table(rule, "x0", GRID, normalize, **how).astype(np.float32))
    if normalize != "max" or "clip_max" not in how:  # nothing is clipped above 1
        assert not np.array_equal(found, DiffusionProcess(GRID, "x0", rule, normalize).weight.numpy())


@pytest.mark.parametrize("importance_correct", [False, True])
@pytest.mark.parametrize("reading", ["t", "log_snr"])
def test_the_weight_is_normalised_under_the_density_of_the_times(reading, importance_correct):
    how = {"reading": reading, "importance_correct": importance_correct, "clip_max": 30.0}
    process = DiffusionProcess(GRID, "eps", "erd", **how, **LOGIT)
    assert np.array_equal(process.density, LOGIT_DENSITY)
    expected = weight_table("erd", "eps", GRID, density=LOGIT_DENSITY, **how)
    assert np.array_equal(process.weight.numpy(), expected.astype(np.float32))
    assert (LOGIT_DENSITY * process.weight.numpy()).sum() == pytest.approx(1.0, rel=2 * 2.0**-24)


@pytest.mark.parametrize("t_sampler", ["uniform", "stratified"])
def test_even_samplers_leave_the_weight(t_sampler):
    process = DiffusionProcess(GRID, "eps", "erd", t_sampler=t_sampler)
    assert process.density is None
    assert torch.equal(process.weight, DiffusionProcess(GRID, "eps", "erd").weight)


@pytest.mark.parametrize("normalize", ["mean", "none", "max"])
@pytest.mark.parametrize(
    ("rule", "how"),
    [("erd", {}), ("p2", {"gamma": 0.5, "k": 2.0}), ("debias", {"reading": "log_snr", "clip_max": 4.0})],
)
def test_drawing_by_weight_expects_the_loss_of_weighting_uniform_times(rule, how, normalize):
    process = DiffusionProcess(GRID, "x0", rule, normalize, t_sampler="weight", **how)
    wanted = weight_table(rule, "x0", GRID, normalize, **how)
    weight = process.weight.double().numpy()
    assert (weight == weight[0]).all() and process.density.sum() == 1.0
    for loss in (np.eye(60)[0], np.eye(60)[59], np.random.default_rng(0).exponential(size=60)):
        # A time's probability is right to a word; the weight is rounded to float32.
        error = 2.0**-32 * weight[0] * loss.sum() + 2.0**-24 * (wanted * loss).mean() * 1.01
        assert abs((process.density * weight * loss).sum() - (wanted * loss).mean()) <= error
    if normalize == "mean":
        assert weight[0] == 1.0


def test_drawing_by_weight_has_no_importance_to_correct():
    with pytest.raises(ConfigError, match="importance_correct: given True with t_sampler weight"):
        DiffusionProcess(GRID, "eps", t_sampler="weight", importance_correct=True)


@pytest.mark.parametrize("t_sampler", ["uniform", "stratified", "logit_normal", "weight"])
def test_draws_are_those_of_the_sampler(t_sampler):
    logit = {name: value for name, value in LOGIT.items() if name != "t_sampler" and t_sampler == "logit_normal"}
    process = DiffusionProcess(GRID, "x0", "erd", t_sampler=t_sampler, **logit)
    density = {"logit_normal": LOGIT_DENSITY, "weight": weight_table("erd", "x0", GRID)}.get(t_sampler)
    table = None if density is None else torch.from_numpy(timestep_table(density))
    how = {"seed": 3, "batch_size": 40, "dataset_size": 37, "label_drop": 0.5, "offset": 20, "purpose": Purpose.EVAL}
    found = process.draw(torch.tensor(100), global_batch=60, **how)
    strata = 60 if t_sampler == "stratified" else 0
    expected = draw(torch.tensor(100), num_timesteps=60, t_table=table, strata=strata, **how)
    uniform = draw(torch.tensor(100), num_timesteps=60, **how)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(found.t_index, uniform.t_index) == (t_sampler == "uniform")


def test_a_stratified_step_has_every_time_as_often():
    process = DiffusionProcess(GRID, "x0", t_sampler="stratified")
    parts = [
        process.draw(torch.tensor(240), seed=3, global_batch=120, batch_size=30, offset=offset, dataset_size=37).t_index
        for offset in range(0, 120, 30)
    ]
    assert torch.cat(parts).bincount().tolist() == [2] * 60
