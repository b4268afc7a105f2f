"""attention: softmax(q k^T / sqrt(K)) v of up to 512 tokens, from packed qkv, and its gradient into packed dqkv.

A token's row of qkv holds q, k and v, each heads x K: a program reads the tiles of its head through that stride, and
nothing is transposed or copied. K is covered by two pieces of powers of two, the second one masked: 72 is 64 + 16 and
costs 80 instead of 128. T is cut into blocks of a size that leaves little of the last one empty: 258 costs 5 x 64
instead of 3 x 128.

Forward: a program takes a block of queries of one head and walks over the keys with a running maximum. Backward: a
program takes a block of tokens of one head, first as queries (dq, over all keys), then as keys (dk and dv, over all
queries). Every sum has one place and one order, so there is no float atomic and the same input gives the same bits,
whatever else is in the batch. The programs of a head are neighbours in the grid: what one has read, the others find in
the L2 cache.

Bytes per sample of T tokens of D = heads x K: forward 3 T D in and T D out, backward 5 T D in (qkv, out, dout) and
3 T D out, times the size of an element; and 4 T heads of lse each time.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr,
    out_ptr,
    lse_ptr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    MASKED: tl.constexpr = TOKENS % BLOCK != 0
    STRIDE: tl.constexpr = 3 * HEADS * K
    first, head, sample = _place(TOKENS, HEADS, BLOCK)
    q_ptr = qkv_ptr + sample * (TOKENS * STRIDE) + head * K
    out_ptr += sample * (TOKENS * HEADS * K) + head * K
    lse_ptr += (sample * HEADS + head) * TOKENS

    q, q_rest = _load(q_ptr, first, BLOCK, MASKED, STRIDE, TOKENS, K, WIDTH, REST)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out, out_rest = _zeros(BLOCK, WIDTH, REST)
    for start in range(0, TOKENS, INNER):
        top, total, out, out_rest = _keys(
            q, q_rest, q_ptr, start, top, total, out, out_rest, SCALE, TOKENS, HEADS, K, WIDTH, REST, INNER, PRECISION
        )
    inverse = 1.0 / total
    out, out_rest = out * inverse[:, None], out_rest * inverse[:, None]
    _store(out_ptr, first, out, out_rest, BLOCK, MASKED, HEADS * K, TOKENS, K, WIDTH, REST)
    row = first + tl.arange(0, BLOCK)
    tl.store(lse_ptr + row, top * SCALE + tl.log2(total) * _LN_2, mask=row < TOKENS)


@triton.jit
def _keys(
    q,
    q_rest,
    q_ptr,
    start,
    top,
    total,
    out,
    out_rest,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """INNER keys from ``start``: the running maximum of q k, the sum of exponentials below it, and their sum over v."""
    MASKED: tl.constexpr = TOKENS % INNER != 0
    STRIDE: tl.constexpr = 3 * HEADS * K
    SLOPE: tl.constexpr = SCALE * _LOG2_E
    k, k_rest = _load(q_ptr + HEADS * K, start, INNER, MASKED, STRIDE, TOKENS, K, WIDTH, REST)
    score = _product(q, q_rest, k, k_rest, REST, PRECISION)
    if MASKED:
        score = tl.where((start + tl.arange(0, INNER) < TOKENS)[None, :], score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score * SLOPE - (higher * SLOPE)[:, None])
    shrink = tl.exp2((top - higher) * SLOPE)
    total = total * shrink + tl.sum(weight, 1)
    v, v_rest = _load(q_ptr + 2 * HEADS * K, start, INNER, MASKED, STRIDE, TOKENS, K, WIDTH, REST)
    out, out_rest = _add(out * shrink[:, None], out_rest * shrink[:, None], weight, v, v_rest, REST, PRECISION)
    return higher, total, out, out_rest


@triton.jit
def _attention_bwd_kernel(
    dout_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    dqkv_ptr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    MASKED: tl.constexpr = TOKENS % BLOCK != 0
    STRIDE: tl.constexpr = 3 * HEADS * K
    first, head, sample = _place(TOKENS, HEADS, BLOCK)
    q_ptr = qkv_ptr + sample * (TOKENS * STRIDE) + head * K
    dq_ptr = dqkv_ptr + sample * (TOKENS * STRIDE) + head * K
    dout_ptr += sample * (TOKENS * HEADS * K) + head * K
    out_ptr += sample * (TOKENS * HEADS * K) + head * K
    lse_ptr += (sample * HEADS + head) * TOKENS

    q, q_rest = _load(q_ptr, first, BLOCK, MASKED, STRIDE, TOKENS, K, WIDTH, REST)
    dout, dout_rest, delta, lse = _queries(
        dout_ptr, out_ptr, lse_ptr, first, BLOCK, MASKED, TOKENS, HEADS, K, WIDTH, REST
    )
    dq, dq_rest = _zeros(BLOCK, WIDTH, REST)
    for start in range(0, TOKENS, INNER):
        dq, dq_rest = _dq(
            q, q_rest, dout, dout_rest, delta, lse, dq, dq_rest, q_ptr, start,
            SCALE, TOKENS, HEADS, K, WIDTH, REST, INNER, PRECISION,
        )  # fmt: skip
    _store(dq_ptr, first, dq * SCALE, dq_rest * SCALE, BLOCK, MASKED, STRIDE, TOKENS, K, WIDTH, REST)

    k, k_rest = _load(q_ptr + HEADS * K, first, BLOCK, MASKED, STRIDE, TOKENS, K, WIDTH, REST)
    v, v_rest = _load(q_ptr + 2 * HEADS * K, first, BLOCK, MASKED, STRIDE, TOKENS, K, WIDTH, REST)
    dk, dk_rest = _zeros(BLOCK, WIDTH, REST)
    dv, dv_rest = _zeros(BLOCK, WIDTH, REST)
    for start in range(0, TOKENS, INNER):
        dk, dk_rest, dv, dv_rest = _dk_dv(
            k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, dout_ptr, q_ptr, out_ptr, lse_ptr, start,
            SCALE, TOKENS, HEADS, K, WIDTH, REST, INNER, PRECISION,
        )  # fmt: skip
    _store(dq_ptr + HEADS * K, first, dk * SCALE, dk_rest * SCALE, BLOCK, MASKED, STRIDE, TOKENS, K, WIDTH, REST)
    _store(dq_ptr + 2 * HEADS * K, first, dv, dv_rest, BLOCK, MASKED, STRIDE, TOKENS, K, WIDTH, REST)


@triton.jit
def _dq(
    q,
    q_rest,
    dout,
    dout_rest,
    delta,
    lse,
    dq,
    dq_rest,
    q_ptr,
    start,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What INNER keys from ``start`` add to dq / scale."""
    MASKED: tl.constexpr = TOKENS % INNER != 0
    STRIDE: tl.constexpr = 3 * HEADS * K
    k, k_rest = _load(q_ptr + HEADS * K, start, INNER, MASKED, STRIDE, TOKENS, K, WIDTH, REST)
    v, v_rest = _load(q_ptr + 2 * HEADS * K, start, INNER, MASKED, STRIDE, TOKENS, K, WIDTH, REST)
    score = _product(q, q_rest, k, k_rest, REST, PRECISION)
    weight = tl.exp2(score * (SCALE * _LOG2_E) - lse[:, None])
    if MASKED:
        weight = tl.where((start + tl.arange(0, INNER) < TOKENS)[None, :], weight, 0.0)
    dscore = weight * (_product(dout, dout_rest, v, v_rest, REST, PRECISION) - delta[:, None])
    return _add(dq, dq_rest, dscore, k, k_rest, REST, PRECISION)


@triton.jit
def _dk_dv(
    k,
    k_rest,
    v,
    v_rest,
    dk,
    dk_rest,
    dv,
    dv_rest,
    dout_ptr,
    q_ptr,
    out_ptr,
    lse_ptr,
    start,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What INNER queries from ``start`` add to dk / scale and to dv; tiles are keys x queries."""
    MASKED: tl.constexpr = TOKENS % INNER != 0
    q, q_rest = _load(q_ptr, start, INNER, MASKED, 3 * HEADS * K, TOKENS, K, WIDTH, REST)
    dout, dout_rest, delta, lse = _queries(dout_ptr, out_ptr, lse_ptr, start, INNER, MASKED, TOKENS, HEADS, K, WIDTH,
                                           REST)  # fmt: skip
    score = _product(k, k_rest, q, q_rest, REST, PRECISION)
    weight = tl.exp2(score * (SCALE * _LOG2_E) - lse[None, :])
    dv, dv_rest = _add(dv, dv_rest, weight, dout, dout_rest, REST, PRECISION)
    dscore = weight * (_product(v, v_rest, dout, dout_rest, REST, PRECISION) - delta[None, :])
    dk, dk_rest = _add(dk, dk_rest, dscore, q, q_rest, REST, PRECISION)
    return dk, dk_rest, dv, dv_rest


@triton.jit
def _place(TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """First token, head and sample of this program."""
    BLOCKS: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    return program % BLOCKS * BLOCK, program // BLOCKS % HEADS, (program // (BLOCKS * HEADS)).to(tl.int64)


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    return tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, REST if REST else 16), tl.float32)


@triton.jit
def _queries(
    dout_ptr,
    out_ptr,
    lse_ptr,
    first,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
):
    """dout, its product with out by row, and lse in units of log 2: infinite where no query is, so that it weighs 0."""
    dout, dout_rest = _load(dout_ptr, first, ROWS, MASKED, HEADS * K, TOKENS, K, WIDTH, REST)
    out, out_rest = _load(out_ptr, first, ROWS, MASKED, HEADS * K, TOKENS, K, WIDTH, REST)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if REST:
        delta += tl.sum(dout_rest.to(tl.float32) * out_rest.to(tl.float32), 1)
    row = first + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + row, mask=row < TOKENS, other=float("inf"))
    return dout, dout_rest, delta, lse * _LOG2_E


@triton.jit
def _product(a, a_rest, b, b_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both pieces of K."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if REST:
        product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision=PRECISION)
    return product


@triton.jit
def _add(total, total_rest, weight, tile, tile_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """Both pieces of total + weight tile."""
    weight = weight.to(tile.dtype)
    total = tl.dot(weight, tile, total, input_precision=PRECISION)
    if REST:
        total_rest = tl.dot(weight, tile_rest, total_rest, input_precision=PRECISION)
    return total, total_rest


@triton.jit
def _load(
    ptr,
    first,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
):
    """Both pieces of ROWS tokens from ``first`` of one head, 0 beyond its last column. Beyond the last token that one
    stands again, and the caller gives it no weight: masks of rows would take registers in every loop."""
    row = (first + tl.arange(0, ROWS))[:, None]
    if MASKED:
        row = tl.minimum(row, TOKENS - 1)
    tile = tl.load(ptr + row * STRIDE + tl.arange(0, WIDTH)[None, :])
    rest = tile
    if REST:
        column = WIDTH + tl.arange(0, REST)[None, :]
        if WIDTH + REST > K:
            rest = tl.load(ptr + row * STRIDE + column, mask=column < K, other=0.0)
        else:
            rest = tl.load(ptr + row * STRIDE + column)
    return tile, rest


@triton.jit
def _store(
    ptr,
    first,
    tile,
    rest,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
):
    row = (first + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = row < (TOKENS if MASKED else first + ROWS)
    tl.store(ptr + row * STRIDE + column, tile.to(ptr.dtype.element_ty), mask=inside)
    if REST:
        column = WIDTH + tl.arange(0, REST)[None, :]
        tl.store(ptr + row * STRIDE + column, rest.to(ptr.dtype.element_ty), mask=inside & (column < K))


class _Settings(NamedTuple):
    """Tokens of a program's block and of a step of its loop, and how it is launched."""

    block: int
    inner: int
    num_warps: int
    num_stages: int


def _settings(dtype: torch.dtype, width: int, tokens: int, backward: bool) -> _Settings:
    """The largest tiles that stay in registers, or smaller ones where they leave less of the last block empty.

    A tensor core takes 16 rows, so a warp has 16 of the block; in a forward pass there is room for 32.
    """
    if dtype == torch.float32:  # whole float32 runs on no tensor core, and its operands lie in registers
        return _Settings(16 if backward and width > 96 else 32, 16, 8, 1)
    if backward:
        block, inner, most_warps, stages = (128, 32, 8, 3) if width <= 80 else (64, 16, 4, 2)
    else:
        block, inner, most_warps, stages = 128 if width <= 96 else 64, 64 if width <= 64 else 32, 4, 2
    block, inner = _fitting(block, tokens, least=64), _fitting(inner, tokens, least=32)
    return _Settings(block, inner, min(block // 16, most_warps), stages)


def _fitting(size: int, tokens: int, least: int) -> int:
    """``size``, halved down to ``least`` while that covers the tokens with fewer; no more than they need."""
    while size > least and -(-tokens // (size // 2)) * (size // 2) < -(-tokens // size) * size:
        size //= 2
    return min(size, max(16, triton.next_power_of_2(tokens)))


def _launch(kernel, qkv: Tensor, num_heads: int, *tensors: Tensor, backward: bool) -> None:
    count, tokens, row = qkv.shape
    head_dim = row // (3 * num_heads)
    width = 1 << (head_dim.bit_length() - 1)
    rest = max(16, triton.next_power_of_2(head_dim - width)) if head_dim > width else 0
    settings = _settings(qkv.dtype, width + rest, tokens, backward)
    kernel[(count * num_heads * -(-tokens // settings.block),)](
        *tensors,
        SCALE=head_dim**-0.5,
        TOKENS=tokens,
        HEADS=num_heads,
        K=head_dim,
        WIDTH=width,
        REST=rest,
        BLOCK=settings.block,
        INNER=settings.inner,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        maxnreg=255,  # without a limit of ours the assembler spills to reach an occupancy of its own choice
    )


def forward(qkv: Tensor, num_heads: int, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse.

    Args:
        qkv: (N, T, 3 D) contiguous, fp32, bf16 or fp16; any T, D / num_heads a multiple of 8 from 16 to 128.
        out: (N, T, D) out, dtype of ``qkv``.
        lse: (N, num_heads, T) fp32 out, log of the sum of exponentials of a query's scores.
    """
    _launch(_attention_fwd_kernel, qkv, num_heads, qkv, out, lse, backward=False)


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, dqkv: Tensor) -> None:
    """Fill dqkv, (N, T, 3 D) in the dtype of ``qkv``, from dout (N, T, D) and what :func:`forward` had and gave."""
    _launch(_attention_bwd_kernel, qkv, num_heads, dout, qkv, out, lse, dqkv, backward=True)
