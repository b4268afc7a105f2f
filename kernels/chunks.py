"""Chunks of many tensors: device functions for the ops that take the table of erd_fast/ops/tensor_table.py.

A program is a chunk. Of a tensor it knows an address and what the row says: each dtype is a branch of its own, and
whole vectors move only where the row says that all of its addresses are multiples of 16 bytes.
"""

import triton
import triton.language as tl

# Columns of a row, and how many there are, as in erd_fast/ops/tensor_table.py.
GRADIENT, NUMEL, FORMAT, COLUMNS = (tl.constexpr(column) for column in (0, 9, 11, 12))
# FORMAT: that of the gradient, FORMATS times that of the copy, and ALIGNED; what is neither of the two is float32.
BFLOAT16, FLOAT16, FORMATS, ALIGNED = (tl.constexpr(part) for part in (1, 2, 4, 16))


@triton.jit
def chunk_of(rows_ptr, places_ptr, CHUNK: tl.constexpr):
    """The row of this program's chunk, the chunk's first element, and how many it has."""
    places_ptr += tl.program_id(0).to(tl.int64) * 2
    row_ptr = rows_ptr + tl.load(places_ptr).to(tl.int64) * COLUMNS
    first = tl.load(places_ptr + 1).to(tl.int64) * CHUNK
    return row_ptr, first, tl.minimum(tl.load(row_ptr + NUMEL) - first, CHUNK)


@triton.jit
def element_at(address, first, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointer to an element of the tensor at an address; one of whole vectors begins a vector there."""
    pointer = address.to(tl.pointer_type(DTYPE)) + first
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
