"""grad_norm: the norm of all gradients together, in two launches and one pass over them.

A program sums the squares of one chunk in float32, then one program adds these sums in float64, each in an order that
is always the same: there is no atomic, and the same gradients give the same bits. Values are masked by their place and
by nothing else, so NaN and infinity come through.

Bytes an element: the gradient's 2 or 4. A chunk: its sum out and in, 8.
"""

import triton
import triton.language as tl
from torch import Tensor

from .chunks import ALIGNED, BFLOAT16, FLOAT16, FORMAT, FORMATS, GRADIENT, chunk_of, element_at

# A chunk of 8192 is one block, without a loop: a thread has all of its 8 vectors of float32 on their way at once, or 4
# of a 16-bit type. With 48 registers (Triton 3.8) an sm_90 multiprocessor has room for 5 programs, which are 160 or
# 80 KB on their way, where about 40 hide the latency of memory.
_CHUNK_WARPS = 8
# The sums of 67 million elements at a time: a turn costs its latency and little else.
_SUMS, _SUMS_WARPS = 8192, 32


@triton.jit
def _squares_kernel(rows_ptr, places_ptr, partials_ptr, CHUNK: tl.constexpr):
    row_ptr, first, count = chunk_of(rows_ptr, places_ptr, CHUNK)
    address, form = tl.load(row_ptr + GRADIENT), tl.load(row_ptr + FORMAT)
    whole = (form >= ALIGNED) & (count == CHUNK)
    if form % FORMATS == BFLOAT16:
        total = _squares(address, first, count, whole, tl.bfloat16, CHUNK)
    elif form % FORMATS == FLOAT16:
        total = _squares(address, first, count, whole, tl.float16, CHUNK)
    else:
        total = _squares(address, first, count, whole, tl.float32, CHUNK)
    tl.store(partials_ptr + tl.program_id(0), total)


@triton.jit
def _squares(address, first, count, whole, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    element = tl.arange(0, CHUNK)
    if whole:
        total = _sum_squares(tl.load(element_at(address, first, DTYPE, True) + element))
    else:
        pointer = element_at(address, first, DTYPE, False) + element
        total = _sum_squares(tl.load(pointer, mask=element < count, other=0.0))
    return total


@triton.jit
def _sum_squares(gradient):
    gradient = gradient.to(tl.float32)
    return tl.sum(gradient * gradient)


@triton.jit(do_not_specialize=("chunks",))
def _norm_kernel(partials_ptr, norm_ptr, chunks: tl.int32, SUMS: tl.constexpr):
    total = tl.zeros((SUMS,), tl.float64)
    start = 0
    while start < chunks:  # Triton 3.6 interprets no range() up to a device value
        chunk = start + tl.arange(0, SUMS)
        total += tl.load(partials_ptr + chunk, mask=chunk < chunks, other=0.0)
        start += SUMS
    tl.store(norm_ptr, tl.sqrt(tl.sum(total)))


def forward(rows: Tensor, places: Tensor, chunk: int, norm: Tensor, partials: Tensor) -> None:
    """Fill the norm, and the sum of squares of each chunk.

    Args:
        rows: (tensors, 12) int64; places: (chunks, 2) int32: a table of erd_fast/ops/tensor_table.py.
        chunk: elements of a chunk, a power of two.
        norm: () fp32 out. partials: (chunks,) fp32 out.
    """
    chunks = len(places)
    if chunks:
        _squares_kernel[(chunks,)](rows, places, partials, CHUNK=chunk, num_warps=_CHUNK_WARPS)
    _norm_kernel[(1,)](partials, norm, len(partials), SUMS=_SUMS, num_warps=_SUMS_WARPS)
