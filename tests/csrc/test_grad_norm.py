"""grad_norm in C++ and CUDA against its definition in float64, within the rounding that float32 sums allow."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.ops import use_backend
from erd_fast.ops.grad_norm import grad_norm, grad_norm_reference
from erd_fast.ops.tensor_table import CHUNK, Slot, TensorTable

pytestmark = pytest.mark.build

HALF_ULP = 2.0**-24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 0, 8191, 8192, 8193, 20000)  # around multiples of a chunk, and of 16 bytes
# Every term of a chunk is positive, so relative errors add up: one rounding of a square, 128 sums by a lane (32 by a
# thread of a GPU), a tree of at most 10.
OF_CHUNK = 139 * HALF_ULP


def _gradients(dtype: torch.dtype | None = None) -> list[Tensor]:
    """One of each size; without a dtype they are mixed."""
    generator = torch.Generator().manual_seed(0)
    dtypes = itertools.cycle([dtype] if dtype else DTYPES)
    return [torch.randn(size, generator=generator).to(kind) for size, kind in zip(SIZES, dtypes, strict=False)]


def _table(gradients: list[Tensor]) -> TensorTable:
    table = TensorTable(torch.device("cpu"))
    table.update([Slot(gradient) for gradient in gradients])
    return table


def _run(ops: Any, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Norm and sums of chunks, of outputs that hold NaN."""
    table = _table(gradients)
    norm, partials = torch.tensor(torch.nan), torch.full((len(table.places),), torch.nan)
    ops.grad_norm_fwd(table.rows, table.places, CHUNK, norm, partials)
    return norm, partials


def _moved(gradients: list[Tensor]) -> list[Tensor]:
    """The same numbers one after the other in a buffer for each dtype, none of them at a multiple of 16 bytes."""
    moved, starts = [], dict.fromkeys(DTYPES, 1)
    buffers = {dtype: torch.zeros(sum(SIZES) + 8 * len(SIZES), dtype=dtype) for dtype in DTYPES}
    for gradient in gradients:
        start = starts[gradient.dtype]
        moved.append(buffers[gradient.dtype][start : start + gradient.numel()].copy_(gradient))
        starts[gradient.dtype] += -(-gradient.numel() // 8) * 8
    return moved


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_is_within_rounding_of_the_definition(ops, dtype):
    gradients = _gradients(dtype)
    norm, partials = _run(ops, gradients)
    chunks = [chunk for gradient in gradients for chunk in gradient.double().split(CHUNK) if chunk.numel()]
    squares = torch.stack([chunk.square().sum() for chunk in chunks])
    assert ((partials - squares).abs() <= OF_CHUNK * squares).all()
    truth = grad_norm_reference([gradient.double() for gradient in gradients])
    assert abs(norm - truth) <= (OF_CHUNK / 2 + HALF_ULP) * truth  # a root halves relative errors


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_by_itself(ops, dtype, size):
    gradient = torch.full((size,), 0.5, dtype=dtype)  # sums are exact
    norm, partials = _run(ops, [gradient])
    assert norm == torch.tensor(math.sqrt(size / 4))
    assert partials.tolist() == [chunk.numel() / 4 for chunk in gradient.split(CHUNK) if size]


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_addresses_change_nothing(ops, dtype):
    gradients = _gradients(dtype)
    moved = _moved(gradients)
    assert not any(gradient.data_ptr() % 16 == 0 for gradient in moved if gradient.numel())
    for one, other in zip(_run(ops, gradients), _run(ops, moved), strict=True):
        assert torch.equal(one, other)


def test_more_chunks_than_threads_that_add_them(ops):
    gradients = list(torch.arange(1, 1102, dtype=torch.float32))
    norm, partials = _run(ops, gradients)
    assert partials.tolist() == [float(number**2) for number in range(1, 1102)]
    assert norm == torch.tensor(math.sqrt(1101 * 1102 * 2203 / 6))


@pytest.mark.parametrize("place", [0, 255, 8191, 8192, 19999])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_comes_through(ops, dtype, place):
    for value in (torch.nan, torch.inf, -torch.inf):
        gradients = [torch.ones(9), torch.ones(20000, dtype=dtype)]
        gradients[1][place] = value
        for given in (gradients, [gradients[0], torch.cat((gradients[1][:1], gradients[1]))[1:]]):
            norm, partials = _run(ops, given)
            assert norm.isnan() if value != value else norm == torch.inf
            assert partials.isfinite().tolist() == [True, *(place // CHUNK != chunk for chunk in range(3))]


def test_squares_that_leave_float32_are_infinite(ops):
    assert _run(ops, [torch.tensor([2.0**64])])[0] == torch.inf
    assert _run(ops, [torch.full((4,), 2.0**62), torch.full((4,), 2.0**62)])[0] == 2.0**62 * torch.tensor(8.0).sqrt()


@pytest.mark.parametrize("gradients", [[], [torch.empty(0)], [torch.zeros(3)]], ids=["none", "empty", "zeros"])
def test_nothing_has_norm_0(ops, gradients):
    assert _run(ops, gradients)[0] == 0


def test_instruction_sets_give_equal_bits(cpu_ops):
    best, results = cpu_ops.cpu_level(), []
    for level in range(best + 1):
        cpu_ops.cpu_level(level)
        results.append(_run(cpu_ops, _gradients()))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_threads_change_nothing(cpu_ops):
    gradients = _gradients() * 8
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(_run(cpu_ops, gradients))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_the_public_op_runs_it(cpu_ops):
    gradients = _gradients()
    with use_backend(grad_norm="cpu"):
        assert torch.equal(grad_norm(gradients), _run(cpu_ops, gradients)[0])


def test_bad_arguments_are_named(cpu_ops):
    table = _table(_gradients())
    good = {
        "rows": table.rows,
        "places": table.places,
        "chunk": CHUNK,
        "norm": torch.tensor(0.0),
        "partials": torch.empty(len(table.places)),
    }
    for changed, message in (
        ({"rows": table.rows.int()}, "rows must be Long, got Int"),
        ({"rows": table.rows[:, :11].contiguous()}, "rows must have 72 elements, got 77"),
        ({"places": table.places.long()}, "places must be Int, got Long"),
        ({"places": table.places.flip(0).T}, "places must be contiguous"),
        ({"chunk": 4096}, "chunk must be 8192, got 4096"),
        ({"norm": torch.zeros(2)}, "norm must have 1 elements, got 2"),
        ({"norm": torch.tensor(0.0).double()}, "norm must be Float, got Double"),
        ({"partials": torch.empty(3)}, "partials must have 9 elements, got 3"),
    ):
        with pytest.raises(RuntimeError, match=f"grad_norm: {message}"):
            cpu_ops.grad_norm_fwd(**good | changed)
