"""diffusion_loss: value, parts and gradient, against formulas written out here in float64."""

import math

import pytest
import torch

from erd_fast.diffusion import TARGETS, DiffusionProcess, get_schedule
from erd_fast.ops import diffusion_loss

COUNT, CHANNELS, SIDE, TIMESTEPS = 6, 3, 4, 20
SHAPE = (COUNT, CHANNELS, SIDE, SIDE)
ELEMENTS = CHANNELS * SIDE * SIDE
T_INDEX = torch.tensor([0, 19, 7, 10, 9, 7])
ROUND = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # one rounding, relative


def _case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    prediction = torch.randn(SHAPE, generator=generator).to(dtype).requires_grad_()
    target = torch.randn(SHAPE, generator=generator)
    weight = torch.rand(TIMESTEPS, generator=generator) + 0.1
    return prediction, target, weight


def _close(found: torch.Tensor, expected: torch.Tensor, relative: float) -> bool:
    return bool(((found.double() - expected).abs() <= relative * expected.abs()).all())


@pytest.mark.parametrize("dtype", ROUND)
def test_value_and_gradient_are_those_of_float64_autograd_and_of_the_closed_form(dtype):
    prediction, target, weight = _case(dtype)
    found = diffusion_loss(prediction, target, weight, T_INDEX)
    found.loss.backward()

    exact = prediction.detach().double().requires_grad_()
    mse = torch.stack([((exact[b] - target[b].double()) ** 2).sum() / ELEMENTS for b in range(COUNT)])
    loss = sum(weight[T_INDEX[b]].double() * mse[b] for b in range(COUNT)) / COUNT
    loss.backward()
    row = weight.double()[T_INDEX].view(-1, 1, 1, 1)
    closed = 2 * row * (prediction.detach().double() - target.double()) / (COUNT * ELEMENTS)

    # All summands are positive: their differences and squares cost 3 roundings, any order of a sum of n values n - 1,
    # weights and divisions 4 more. The loss is float32 whatever the prediction is.
    bound = 2.0**-24
    assert found.loss.dtype == torch.float32
    assert _close(found.per_sample, mse.detach(), (ELEMENTS + 4) * bound)
    assert _close(found.loss, loss.detach(), (ELEMENTS + COUNT + 8) * bound)
    # An element of the gradient is a product of five factors in float32, rounded once to the prediction's dtype;
    # float16 rounds what lies below its normal range to multiples of 2**-24.
    relative, below = 8 * bound + ROUND[dtype], 2.0**-25 if dtype == torch.float16 else 0.0
    assert prediction.grad.dtype == dtype
    for expected in (exact.grad, closed):
        assert ((prediction.grad.double() - expected).abs() <= relative * expected.abs() + below).all()


def test_per_sample_errors_are_not_weighted():
    prediction, target, weight = _case()
    one, other = (diffusion_loss(prediction, target, w, T_INDEX) for w in (weight, 100 * weight))
    assert torch.equal(one.per_sample, other.per_sample) and torch.equal(one.bin_sum, other.bin_sum)
    assert other.loss.item() == pytest.approx(100 * one.loss.item(), rel=1e-5)


def test_only_the_loss_carries_a_gradient():
    found = diffusion_loss(*_case(), T_INDEX)
    assert found.loss.requires_grad
    assert not any(part.requires_grad for part in found[1:4])


def test_weights_by_sample_equal_weights_by_timestep():
    prediction, target, weight = _case()
    by_timestep = diffusion_loss(prediction, target, weight, T_INDEX)
    by_sample = diffusion_loss(prediction, target, weight[T_INDEX])
    assert torch.equal(by_sample.loss, by_timestep.loss)
    assert torch.equal(by_sample.per_sample, by_timestep.per_sample)
    assert not by_sample.bin_count.any() and not by_sample.bin_sum.any()


def test_channels_beyond_the_target_count_for_nothing():
    prediction, target, weight = _case()
    wide = torch.cat((prediction.detach(), torch.full_like(prediction, 1e9)), dim=1).requires_grad_()
    narrow_loss, wide_loss = (diffusion_loss(p, target, weight, T_INDEX).loss for p in (prediction, wide))
    assert torch.equal(wide_loss, narrow_loss)
    narrow_loss.backward()
    wide_loss.backward()
    assert torch.equal(wide.grad[:, :CHANNELS], prediction.grad)
    assert not wide.grad[:, CHANNELS:].any()


@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
@pytest.mark.parametrize("num_bins", [1, 3, 10, 20, 64])
def test_bins_hold_the_errors_of_their_timesteps(num_bins, integer):
    prediction, target, weight = _case()
    found = diffusion_loss(prediction, target, weight, T_INDEX.to(integer), num_bins=num_bins)
    counts, sums = [0] * num_bins, [0.0] * num_bins
    for t, error in zip(T_INDEX.tolist(), found.per_sample.tolist(), strict=True):
        number = int(t * num_bins / TIMESTEPS + 1e-9)
        counts[number] += 1
        sums[number] += error
    assert found.bin_count.tolist() == counts
    assert found.bin_sum.tolist() == pytest.approx(sums, rel=COUNT * 2.0**-24)


def test_bins_of_the_finest_grid_do_not_overflow():
    prediction, target, _ = _case()
    t_index = torch.tensor([65_535, 0, 32_768, 32_767, 65_535, 6_553], dtype=torch.int32)
    found = diffusion_loss(prediction, target, torch.ones(65_536), t_index, num_bins=40_000)
    assert found.bin_count.nonzero().flatten().tolist() == sorted({t * 40_000 // 65_536 for t in t_index.tolist()})


def test_micro_batches_sum_to_the_whole_batch():
    prediction, target, weight = _case()
    whole = diffusion_loss(prediction, target, weight, T_INDEX)
    whole.loss.backward()
    kept, prediction.grad = prediction.grad, None
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.append(diffusion_loss(prediction[rows], target[rows], weight, T_INDEX[rows], batch_size=COUNT))
        parts[-1].loss.backward()
    assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item(), rel=2 * COUNT * 2.0**-24)
    assert _close(prediction.grad, kept.double(), 2 * 2.0**-24)  # the same products, divided in another place
    assert torch.equal(torch.cat([part.per_sample for part in parts]), whole.per_sample)
    assert torch.equal(sum(part.bin_count for part in parts), whole.bin_count)


@pytest.mark.filterwarnings("ignore:target 'v'")
@pytest.mark.parametrize("dtype", ROUND)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_the_ends_of_real_tables_are_finite(schedule, target, dtype):
    process = DiffusionProcess(get_schedule(schedule), target, "erd")
    last = len(process.schedule) - 1
    t_index = torch.tensor([0, last, 0, last])
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    noisy = process.q_sample(x, t_index, ids=torch.arange(4), seed=0, dtype=dtype)
    prediction = torch.zeros(4, 3, 4, 4, dtype=dtype).requires_grad_()
    found = process.loss(prediction, noisy.target, t_index)
    found.loss.backward()
    for value in (*noisy, *found, prediction.grad):
        assert value is None or value.isfinite().all()
    # A zero prediction of a standard normal target misses by about 1 at both ends, whatever the target is.
    assert (found.per_sample > 0.1).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"prediction": torch.zeros(COUNT, 2, SIDE, SIDE)},
            r"prediction \(6, 2, 4, 4\) and target \(6, 3, 4, 4\)",
        ),
        ({"prediction": torch.zeros(1, CHANNELS, SIDE, SIDE)}, r"prediction \(1, 3, 4, 4\)"),
        ({"prediction": torch.zeros(COUNT, CHANNELS, SIDE, 1)}, r"prediction \(6, 3, 4, 1\)"),
        ({"prediction": torch.zeros(COUNT, ELEMENTS)}, r"prediction \(6, 48\)"),
        (
            {"t_index": torch.zeros(5, dtype=torch.int64)},
            r"weight \(20,\) and t_index \(5,\): allowed \(K,\) and \(N,\)",
        ),
        ({"t_index": None}, r"weight \(20,\) and t_index None"),
        ({"weight": torch.ones(TIMESTEPS, 1)}, r"weight \(20, 1\)"),
        ({"t_index": T_INDEX[:, None]}, r"t_index: given shape \(6, 1\)"),
        ({"t_index": T_INDEX.float()}, "t_index: given torch.float32, allowed torch.int64, torch.int32"),
        ({"t_index": T_INDEX + TIMESTEPS}, r"t_index: given \d+, allowed 0 to 19"),
        ({"t_index": T_INDEX - TIMESTEPS}, r"t_index: given -\d+, allowed 0 to 19"),
        ({"weight": torch.full((TIMESTEPS,), math.nan)}, "weight: given nan in row 0, allowed finite numbers"),
        ({"weight": torch.ones(TIMESTEPS).double()}, "weight: given torch.float64, allowed torch.float32"),
        ({"weight": torch.ones(TIMESTEPS, device="meta")}, "weight must be on cpu as prediction, got meta"),
        ({"target": torch.zeros(0, CHANNELS, SIDE, SIDE)}, r"target: given \(0, 3, 4, 4\), allowed .* N of 1 or more"),
        ({"target": torch.zeros(COUNT, CHANNELS, SIDE, SIDE).double()}, "target: given torch.float64, allowed"),
        ({"prediction": torch.zeros(COUNT, CHANNELS, SIDE, SIDE).double()}, "prediction: given torch.float64, allowed"),
        ({"num_bins": 0}, "num_bins: given 0, allowed 1 or more"),
        ({"batch_size": 0}, "batch_size: given 0, allowed 1 or more"),
        ({"batch_size": -4}, "batch_size: given -4, allowed 1 or more"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(wrong, message):
    prediction, target, weight = _case()
    good = {"prediction": prediction, "target": target, "weight": weight, "t_index": T_INDEX}
    with pytest.raises(ValueError, match=message):
        diffusion_loss(**{**good, **wrong})
