"""linear_gelu: what is elementwise about an MLP's first layer and its gradient, each in one pass beside torch's GEMMs.

The forward pass reads z = x W^T + b as the GEMM left it, and writes GELU(z). The backward pass reads the activation's
gradient and z, writes z's gradient, the activation again where it was not kept, and the bias gradient's partial sums:
a program sums its block of columns over its chunk of rows, and a second kernel sums over chunks. Both sums have a fixed
order, so the same input gives the same bits.

GELU is z times a share of 1: sigmoid(2 sqrt(2/pi) (z + 0.044715 z^3)) in the tanh form, (1 + erf(z / sqrt(2))) / 2 in
the other. Beyond |z| = 10 both shares are 0 or 1 to float32, so they and their slopes are taken of z cut there, and
nothing overflows. NaN stays NaN.

Bytes, M rows of H: forward 2 M H numbers; backward 3 M H, with the activation 4 M H, and H float32 a chunk twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CUT = tl.constexpr(10.0)
_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.07135481627260025)  # 0.044715 of it
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)

_FORWARD_BLOCK, _FORWARD_WARPS = 2048, 4
_TILE, _TILE_WARPS = 2048, 4  # 16 numbers a thread: two loads of 16 bytes of a 16-bit type from each tensor
_WIDEST = 256  # columns of a tile: 512 neighbouring bytes of a 16-bit type
_LEAST_ROWS, _MOST_ROWS = 32, 256  # of a chunk
_PROGRAMS = 2048  # more than all multiprocessors hold at once, where there are rows enough
_SUM_ROWS, _SUM_COLUMNS, _SUM_WARPS = 32, 32, 4


@triton.jit
def _share_and_slope(z, ERF: tl.constexpr):
    """GELU(z) / z, and its derivative, of a z within the cut."""
    if ERF:
        share = 0.5 + 0.5 * tl.erf(z * _SQRT_HALF)
        slope = _NORMAL * tl.exp(-0.5 * z * z)
    else:
        square = z * z
        rest = tl.exp(-z * (_LINEAR + _CUBIC * square))
        share = 1.0 / (1.0 + rest)
        slope = rest * share * share * (_LINEAR + 3.0 * _CUBIC * square)  # 1 - share would lose what is small
    return share, slope


@triton.jit
def _cut(z):
    z = tl.where(z < -_CUT, -_CUT, z)
    return tl.where(z > _CUT, _CUT, z)


@triton.jit(do_not_specialize=("units",))
def _linear_gelu_fwd_kernel(
    pre_ptr, activation_ptr, units: tl.int64, UNIT: tl.constexpr, ERF: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < units * UNIT
    z = tl.load(pre_ptr + place, mask=inside, other=0.0).to(tl.float32)
    share, _ = _share_and_slope(_cut(z), ERF)
    activation = tl.where(z < -_CUT, -_CUT, z) * share
    tl.store(activation_ptr + place, activation.to(activation_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows", "units"))
def _linear_gelu_bwd_kernel(
    dactivation_ptr,
    pre_ptr,
    dpre_ptr,
    activation_ptr,
    partial_ptr,
    rows: tl.int64,
    units: tl.int64,
    UNIT: tl.constexpr,
    ERF: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    width = units * UNIT
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for start in range(0, CHUNK, BLOCK_M):
        row = chunk * CHUNK + start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        dactivation = tl.load(dactivation_ptr + place, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(pre_ptr + place, mask=inside, other=0.0).to(tl.float32)
        share, slope = _share_and_slope(_cut(z), ERF)
        dpre = dactivation * (share + _cut(z) * slope)
        total += dpre
        tl.store(dpre_ptr + place, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
        if activation_ptr is not None:
            activation = tl.where(z < -_CUT, -_CUT, z) * share
            tl.store(activation_ptr + place, activation.to(activation_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + chunk * width + column, tl.sum(total, axis=0), mask=column < width)


@triton.jit(do_not_specialize=("chunks", "units"))
def _linear_gelu_sum_bwd_kernel(
    partial_ptr,
    dbias_ptr,
    chunks: tl.int64,
    units: tl.int64,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    width = units * UNIT
    column = tl.program_id(0).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    start = tl.zeros((), tl.int64)
    while start < chunks:  # Triton 3.6 interprets no range() up to a device value
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < chunks)[:, None] & (column < width)[None, :]
        total += tl.load(partial_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        start += BLOCK_M
    tl.store(dbias_ptr + column, tl.sum(total, axis=0), mask=column < width)


def forward(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, activation: Tensor, pre: Tensor) -> None:
    """Fill z and GELU(z).

    Args:
        x: (M, K). weight: (H, K). bias: (H,). All contiguous and fp32, bf16 or fp16, as all here.
        approximate: "tanh" or "none".
        activation: (M, H) out. pre: (M, H) out, z.
    """
    torch.addmm(bias, x, weight.t(), out=pre)
    units, unit = _in_units(pre.numel())
    _linear_gelu_fwd_kernel[(triton.cdiv(pre.numel(), _FORWARD_BLOCK),)](
        pre, activation, units, UNIT=unit, ERF=approximate == "none", BLOCK=_FORWARD_BLOCK, num_warps=_FORWARD_WARPS
    )


def backward(
    dy: Tensor,
    next_weight: Tensor | None,
    pre: Tensor,
    approximate: str,
    dpre: Tensor,
    dbias: Tensor,
    activation: Tensor | None,
) -> None:
    """Fill the gradients of z and of the bias, and GELU(z) if it is asked for.

    Args:
        dy: (M, D), the gradient of the next layer's output; without ``next_weight`` (M, H), the activation's.
        next_weight: (D, H) or None.
        pre: (M, H), z.
        approximate: "tanh" or "none".
        dpre: (M, H) out; it may be ``dy`` itself.
        dbias: (H,) fp32 out.
        activation: (M, H) out, or None.
    """
    dactivation = dy if next_weight is None else torch.mm(dy, next_weight, out=dpre)
    rows, width = pre.shape
    units, unit = _in_units(width)
    columns = min(triton.next_power_of_2(width), _WIDEST)
    blocks = triton.cdiv(width, columns)
    chunk = _rows_of_a_chunk(rows, blocks, _TILE // columns)
    chunks = triton.cdiv(rows, chunk)
    partial = torch.empty((chunks, width), dtype=torch.float32, device=pre.device)
    _linear_gelu_bwd_kernel[(chunks, blocks)](
        dactivation,
        pre,
        dpre,
        activation,
        partial,
        rows,
        units,
        UNIT=unit,
        ERF=approximate == "none",
        CHUNK=chunk,
        BLOCK_M=_TILE // columns,
        BLOCK_H=columns,
        num_warps=_TILE_WARPS,
    )
    _linear_gelu_sum_bwd_kernel[(triton.cdiv(width, _SUM_COLUMNS),)](
        partial, dbias, chunks, units, UNIT=unit, BLOCK_M=_SUM_ROWS, BLOCK_H=_SUM_COLUMNS, num_warps=_SUM_WARPS
    )


def _in_units(count: int) -> tuple[int, int]:
    """A count as a product whose second factor the compiler knows: by it, it sees which accesses are whole vectors."""
    unit = 8 if count % 8 == 0 else 1
    return count // unit, unit


def _rows_of_a_chunk(rows: int, blocks: int, tile: int) -> int:
    """A power of two: few rows where more would leave multiprocessors idle, many to have few partial sums."""
    wanted = triton.next_power_of_2(triton.cdiv(rows * blocks, _PROGRAMS))
    return max(min(max(wanted, _LEAST_ROWS), _MOST_ROWS), tile)
