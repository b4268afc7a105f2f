"""Every backend that is here against the reference, on the same calls; Triton has its interpreter in tests/kernels."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.ops import BACKENDS, OPS, diffusion_loss, draw, q_sample, use_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUND = 2.0**-24  # largest relative error of one float32 rounding
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NORMALS = 2e-6  # by which drawn normals may differ between backends
HERE = [
    name
    for name in BACKENDS[:-1]
    if OPS["q_sample"].why_not(name) is None and (name == "cpu") == (DEVICE.type == "cpu")
]
pytestmark = pytest.mark.skipif(not HERE, reason="; ".join(f"{n}: {OPS['draw'].why_not(n)}" for n in BACKENDS[:-1]))
GENERATOR = torch.Generator().manual_seed(0)


def both(backend: str, call: Any, *args: Any, **how: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the backend gives, and the reference; outputs of kernels begin as NaN."""
    results = []
    for name in (backend, "reference"):
        with use_backend(name):
            results.append(tuple(value for value in call(*args, **how) if value is not None))
    return results[0], results[1]


TABLE = torch.tensor([0, 1 << 20, 1 << 31, (1 << 31) + 5, 1 << 32])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("size", [1, 7, 64, 257])
@pytest.mark.parametrize(
    "how",
    [
        {"dataset_size": 1, "num_timesteps": 1},
        {"dataset_size": 100, "num_timesteps": 1000, "strata": 64},
        {"dataset_size": 1797, "num_timesteps": 5, "t_table": TABLE, "label_drop": 0.1},
        {"dataset_size": 1 << 32, "num_timesteps": 1 << 31, "label_drop": 1.0, "offset": 3},
        {"dataset_size": 1_281_167, "num_timesteps": 5, "t_table": TABLE, "strata": 7, "label_drop": 0.5},
    ],
    ids=["one", "strata", "table", "largest", "table-strata"],
)
@pytest.mark.parametrize("counter", [0, 1001, (1 << 40) + 3])
def test_draws_are_equal_bit_for_bit(backend, size, how, counter):
    how = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in how.items()}
    for seed in (0, 5, (1 << 64) - 1):
        counted = torch.tensor(counter, device=DEVICE)
        found, expected = both(backend, draw, counted, seed=seed, batch_size=size, **how)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


SHAPES = [((4, 8, 8), 2), ((3, 5, 7), 1), ((1, 4, 12), 4), ((4, 32, 32), 2)]
KINDS = {
    "sample": [torch.float32, torch.bfloat16, torch.float16],
    "mean_std": [torch.float16, torch.float32],
    "mean_logvar": [torch.float16, torch.bfloat16],
    "pixels": [torch.uint8],
}


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
@pytest.mark.parametrize(("kind", "stored"), [(kind, stored) for kind in KINDS for stored in KINDS[kind]])
@pytest.mark.parametrize(("drawn", "mirrored", "patched"), list(itertools.product([False, True], repeat=3)))
def test_noisy_images_are_those_of_the_reference(backend, shape, patch, kind, stored, drawn, mirrored, patched):
    count, (channels, *sides) = 5, shape
    wide = channels * (2 if kind.startswith("mean_") else 1)
    if stored == torch.uint8:
        latents = torch.randint(0, 256, (9, wide, *sides), generator=GENERATOR, dtype=torch.uint8)
    else:
        latents = torch.randn(9, wide, *sides, generator=GENERATOR).to(stored)
    how: dict[str, Any] = {"kind": kind, "index": torch.tensor([8, 0, 3, 3, 1]), "patch": patch * patched}
    how |= {"ids": torch.arange(count) + (1 << 33), "seed": 11}
    if not drawn:
        how |= {"noise": torch.randn(count, *shape, generator=GENERATOR)}
        how |= {"posterior_noise": torch.randn(count, *shape, generator=GENERATOR)}
    if mirrored:
        how |= {"flip": torch.tensor([True, False, True, True, False])}
    if kind != "pixels":
        how |= {
            "scale": torch.rand(channels, generator=GENERATOR) + 0.5,
            "shift": torch.rand(channels, generator=GENERATOR),
        }
    rows, t_index = torch.rand(10, 4, generator=GENERATOR) - 0.3, torch.tensor([0, 9, 4, 4, 7])
    how = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in how.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        args = (latents.to(DEVICE), rows.to(DEVICE), t_index.to(DEVICE))
        found, expected = both(backend, q_sample, *args, **how, dtype=dtype)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            # Eight float32 roundings of terms of the output's size, e^x to 4 more, then one rounding to the dtype;
            # drawn normals enter twice, the posterior's with a standard deviation of up to e^2 = 8.
            size = float(b.double().abs().max()) + 1.0
            bound = (16 * ROUND + 2 * UNIT[b.dtype]) * size + drawn * 16 * NORMALS
            assert float((a.double() - b.double()).abs().max()) <= bound


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_losses_and_gradients_are_those_of_float64(backend, shape, patch, dtype, extra, patched, gradient):
    from erd_fast.ops.patchify import patchify

    count, (channels, height, width) = 6, shape
    prediction = torch.randn(count, channels + extra, height, width, generator=GENERATOR).to(dtype)
    target = torch.randn(count, *shape, generator=GENERATOR)
    weight, t_index = torch.rand(20, generator=GENERATOR) + 0.1, torch.tensor([0, 19, 7, 7, 3, 12])
    leaf = prediction.double().requires_grad_()
    mse = (leaf[:, :channels] - target).square().flatten(1).mean(1)
    truth = (weight[t_index].double() * mse).sum() / 8
    (expected,) = torch.autograd.grad(4.0 * truth, leaf)
    patch *= patched
    with use_backend(backend):
        found = diffusion_loss(
            patchify(prediction, patch).contiguous().to(DEVICE),
            target.to(DEVICE),
            weight.to(DEVICE),
            t_index.to(DEVICE),
            batch_size=8,
            num_bins=5,
            patch=patch,
            compute_grad=gradient,
            loss_scale=torch.tensor(4.0, device=DEVICE),
        )
    # A sum of E positive terms in any order: E roundings at most, and 4 of each term.
    bound = (mse[0].numel() + channels * height * width + 8) * ROUND
    assert (found.per_sample.cpu().double() - mse).abs().max() <= bound * mse.max()
    assert abs(found.loss.cpu().double() - truth) <= (bound + 8 * ROUND) * truth
    sums = torch.zeros(5, dtype=torch.float64).index_add(0, t_index * 5 // 20, mse.detach())
    assert (found.bin_sum.cpu().double() - sums).abs().max() <= (bound + 8 * ROUND) * sums.max()
    assert found.bin_count.tolist() == torch.bincount(t_index * 5 // 20, minlength=5).tolist()
    if not gradient:
        assert found.dprediction is None
        return
    assert found.dprediction is not None
    error = (found.dprediction.cpu().double() - patchify(expected, patch)).abs().max()
    assert error <= (8 * ROUND + UNIT[dtype]) * expected.abs().max() + 2.0**-24  # float16's smallest step


@pytest.mark.parametrize("backend", HERE)
def test_an_image_does_not_depend_on_its_batch(backend):
    prediction, target = torch.randn(2, 33, 4, 32, 32, generator=GENERATOR).to(DEVICE)
    t_index = (torch.arange(33) * 7 % 20).to(DEVICE)
    rows = torch.rand(20, 4, generator=GENERATOR).to(DEVICE)
    ids = torch.arange(33, device=DEVICE)
    with use_backend(backend):
        whole = diffusion_loss(prediction, target, rows[:, 0], t_index)
        noisy = q_sample(target, rows, t_index, ids=ids, seed=2)
        for part in (slice(0, 1), slice(5, 9), slice(32, 33)):
            one = diffusion_loss(prediction[part], target[part], rows[:, 0], t_index[part])
            assert torch.equal(one.per_sample, whole.per_sample[part])
            again = q_sample(target[part], rows, t_index[part], ids=ids[part], seed=2)
            assert torch.equal(again.x_t, noisy.x_t[part]) and torch.equal(again.target, noisy.target[part])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads of the CPU backend")
def test_threads_change_nothing():
    threads = torch.get_num_threads()
    prediction, target = torch.randn(2, 64, 4, 32, 32, generator=GENERATOR)
    rows, t_index, ids = torch.rand(20, 4, generator=GENERATOR), torch.arange(64) % 20, torch.arange(64)
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with use_backend("cpu"):
                loss = diffusion_loss(prediction, target, rows[:, 0], t_index, compute_grad=True)
                results.append((*loss, *q_sample(target, rows, t_index, ids=ids, seed=2)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
