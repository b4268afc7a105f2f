"""Rows of D numbers as two blocks: of the largest power of two below D, and of what remains.

1152 = 1024 + 128 leaves hardly a lane idle, where one block would have 2048. Both blocks of a row go through a kernel
side by side, and accesses are as wide as the alignment of all its tensors allows.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

# Rows are read once, and give way in the caches to what is read again.
ONCE, AGAIN = tl.constexpr("evict_first"), tl.constexpr("")


@triton.jit
def load(
    ptr, offset, inside, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, VEC: tl.constexpr, EVICT: tl.constexpr
):
    """D numbers in fp32, as two blocks; 0 past D, and everywhere if not ``inside``."""
    ptr = tl.multiple_of(ptr + offset, VEC * ptr.dtype.element_ty.primitive_bitwidth // 8)
    column_a, column_b = tl.arange(0, A), A + tl.arange(0, B)
    mask_a, mask_b = inside, inside
    if A > D:
        mask_a = (column_a < D) & inside
    if A + B > D:
        mask_b = (column_b < D) & inside
    a = tl.load(ptr + column_a, mask=mask_a, other=0.0, eviction_policy=EVICT)
    b = tl.load(ptr + column_b, mask=mask_b, other=0.0, eviction_policy=EVICT)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store(ptr, offset, inside, a, b, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, VEC: tl.constexpr):
    ptr = tl.multiple_of(ptr + offset, VEC * ptr.dtype.element_ty.primitive_bitwidth // 8)
    column_a, column_b = tl.arange(0, A), A + tl.arange(0, B)
    mask_a, mask_b = inside, inside
    if A > D:
        mask_a = (column_a < D) & inside
    if A + B > D:
        mask_b = (column_b < D) & inside
    tl.store(ptr + column_a, a.to(ptr.dtype.element_ty), mask=mask_a)
    tl.store(ptr + column_b, b.to(ptr.dtype.element_ty), mask=mask_b)


@triton.jit
def by_thread(a, b, THREADS: tl.constexpr):
    """Sums of what each thread has of two blocks, so that one exchange between threads does for both."""
    a = tl.reshape(a, (a.shape[0] // THREADS, THREADS), can_reorder=True)
    b = tl.reshape(b, (b.shape[0] // THREADS, THREADS), can_reorder=True)
    return tl.sum(a, axis=0) + tl.sum(b, axis=0)


def blocks_of(width: int, least: int) -> dict[str, int]:
    """Sizes of the two blocks of columns, each at least ``least``."""
    first = max(triton.next_power_of_2(width) // 2, least)
    return {"A": first, "B": max(triton.next_power_of_2(max(width - first, 1)), least)}


def aligned_elements(width: int, rows: tuple[Tensor | None, ...], vectors: tuple[Tensor | None, ...]) -> int:
    """Elements that one access may take of every tensor: 16 bytes of the widest of the (N, T, width) ``rows``, since
    all share one layout, or what alignment leaves of them."""
    given = [tensor for tensor in rows if tensor is not None]
    elements = math.gcd(16 // max(tensor.element_size() for tensor in given), width)
    for tensor in vectors:
        if tensor is not None:
            given.append(tensor)
            elements = math.gcd(elements, tensor.stride(0))
    return math.gcd(elements, *(tensor.data_ptr() // tensor.element_size() for tensor in given))
