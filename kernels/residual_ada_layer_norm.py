"""residual_ada_layer_norm: a branch joins the residual stream, which is normalised and modulated, in one pass.

    x_out = x + gate * branch                             rounded to x's dtype; x, if there is no branch
    y     = (offset + scale) * xhat + shift               xhat = (x_out - mean) * rstd

A row (rows.py) stays in registers, so the variance takes a second pass over it without a second read.

Forward: one warp a row up to 1536 columns, so that sums are shuffles alone, without barriers. A program walks a few
rows of one sample, and its gate, scale and shift then come from the L1 cache: from L2 they would be half as much again
as the rows.

Backward: a program walks up to 32 rows of one sample, with the gate and the scale, and the sums over the rows for
dshift, dscale and dgate, in registers. Rows to come are on their way to shared memory meanwhile, and one barrier a row
serves both of its means. The sums go to a workspace, and a second kernel adds those of a sample in their order. How
rows are parted is a matter of T and D alone, so the sums of a sample are the same bits in any batch.

Contraction is off (``enable_fp_fusion``) and every fma is written out: whichever outputs a call asks for, x_out and
xhat are the same operations, and the backward pass makes x_out again to the bit.

Bytes an element: x + branch + x_out + y forward; dy + dx_out + x + branch + dx + dbranch backward, and the workspace
out and in, 24 / 32 with a gate and 16 / 32 without: 4 % of a float32 stream with bfloat16 branches. A row: 8, of mean
and rstd.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import AGAIN, ONCE, aligned_elements, blocks_of, by_thread, load, store

# Rows of a sample in one program of the backward pass, at most. Half as many would make 128 programs of a batch of
# 8 x 256 rows instead of 64, and a workspace of 8 % of the traffic instead of 4, at every batch.
_CHUNK = 32
_FEW_ROWS = 16384  # up to here a row has a program of its own: fewer would not fill a GPU
_SUMS = 512  # numbers that one program adds over the chunks
# Widest row -> warps of it. Forward a thread has up to 48 columns; backward, where it keeps three sums and up to three
# vectors of each, up to 10. At 1152 columns of a float32 stream with bfloat16 branches an sm_90 multiprocessor has
# room (Triton 3.8) for 28 rows forward, of 68 registers, and backward for 4 programs of 4 warps, 128 registers and
# 31 KB: 4 rows in hand and 8 on their way, 110 KB, where about 20 hide the latency of memory. Two warps (215 registers)
# have no more rows and half the warps; eight (80) issue 1.6 times the instructions. Beyond 4096 columns the sums alone
# are a third of all registers, and some values spill.
_FORWARD_WARPS = {1536: 1, 3072: 2, 8192: 8}
_BACKWARD_WARPS = {256: 1, 512: 2, 1280: 4, 2560: 8, 5120: 16, 8192: 32}


@triton.jit
def _joined(x, branch, gate, DTYPE: tl.constexpr):
    """x + gate * branch, rounded to the stream's dtype."""
    if gate is None:
        x += branch
    else:
        x = tl.fma(branch, gate, x)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _centred(x, mean, FIRST: tl.constexpr, D: tl.constexpr):
    x -= mean
    if FIRST + x.shape[0] > D:
        x = tl.where(FIRST + tl.arange(0, x.shape[0]) < D, x, 0.0)
    return x


@triton.jit(
    do_not_specialize=("stride_gate_n", "stride_shift_n", "stride_scale_n", "tokens", "programs", "rows"),
    # VEC says what is aligned, from what no slice of a batch changes: vectors change the order of summation.
    do_not_specialize_on_alignment=(
        "x_ptr", "branch_ptr", "gate_ptr", "shift_ptr", "scale_ptr", "x_out_ptr", "y_ptr", "mean_ptr", "rstd_ptr"
    ),
)  # fmt: skip
def _residual_ada_layer_norm_fwd_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    x_out_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_gate_n: tl.int64,
    stride_shift_n: tl.int64,
    stride_scale_n: tl.int64,
    tokens: tl.int32,
    programs: tl.int32,
    rows: tl.int32,
    offset: tl.float32,
    eps: tl.float32,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    VEC: tl.constexpr,
    THREADS: tl.constexpr,
):
    n = (tl.program_id(0) // programs).to(tl.int64)
    t = tl.program_id(0) % programs * rows
    end = tl.minimum(t + rows, tokens)
    while t < end:  # Triton 3.6 interprets no range() up to a device value
        row = n * tokens + t
        x_a, x_b = load(x_ptr, row * D, True, D, A, B, VEC, ONCE)
        if branch_ptr is not None:
            branch_a, branch_b = load(branch_ptr, row * D, True, D, A, B, VEC, ONCE)
            gate_a, gate_b = None, None
            if gate_ptr is not None:
                gate_a, gate_b = load(gate_ptr, n * stride_gate_n, True, D, A, B, VEC, AGAIN)
            x_a = _joined(x_a, branch_a, gate_a, x_ptr.dtype.element_ty)
            x_b = _joined(x_b, branch_b, gate_b, x_ptr.dtype.element_ty)
        if x_out_ptr is not None:
            store(x_out_ptr, row * D, True, x_a, x_b, D, A, B, VEC)

        mean = tl.sum(by_thread(x_a, x_b, THREADS)) * (1.0 / D)
        x_a = _centred(x_a, mean, 0, D)
        x_b = _centred(x_b, mean, A, D)
        rstd = tl.rsqrt(tl.sum(by_thread(x_a * x_a, x_b * x_b, THREADS)) * (1.0 / D) + eps)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)

        scale_a, scale_b = load(scale_ptr, n * stride_scale_n, True, D, A, B, VEC, AGAIN)
        shift_a, shift_b = load(shift_ptr, n * stride_shift_n, True, D, A, B, VEC, AGAIN)
        y_a = tl.fma(x_a * rstd, scale_a + offset, shift_a)
        y_b = tl.fma(x_b * rstd, scale_b + offset, shift_b)
        store(y_ptr, row * D, True, y_a, y_b, D, A, B, VEC)
        t += 1


@triton.jit(
    do_not_specialize=(
        "stride_gate_n", "stride_before_gate_n", "stride_scale_n", "stride_sums_chunk", "tokens", "chunks"
    ),
    do_not_specialize_on_alignment=(
        "dx_out_ptr", "dy_ptr", "x_ptr", "branch_ptr", "gate_ptr", "before_branch_ptr", "before_gate_ptr", "scale_ptr",
        "mean_ptr", "rstd_ptr", "dx_ptr", "dbranch_ptr", "dgate_ptr", "dshift_ptr", "dscale_ptr",
    ),
)  # fmt: skip
def _residual_ada_layer_norm_bwd_kernel(
    dx_out_ptr,
    dy_ptr,
    x_ptr,
    branch_ptr,
    gate_ptr,
    before_branch_ptr,
    before_gate_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    stride_gate_n: tl.int64,
    stride_before_gate_n: tl.int64,
    stride_scale_n: tl.int64,
    stride_sums_chunk: tl.int64,
    tokens: tl.int32,
    chunks: tl.int32,
    offset: tl.float32,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    VEC: tl.constexpr,
    THREADS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    scale_a, scale_b = load(scale_ptr, n * stride_scale_n, True, D, A, B, VEC, AGAIN)
    scale_a += offset
    scale_b += offset
    gate_a, gate_b = None, None
    if gate_ptr is not None:
        gate_a, gate_b = load(gate_ptr, n * stride_gate_n, True, D, A, B, VEC, AGAIN)
    before_gate_a, before_gate_b = None, None
    if before_gate_ptr is not None:
        before_gate_a, before_gate_b = load(before_gate_ptr, n * stride_before_gate_n, True, D, A, B, VEC, AGAIN)

    dshift_a, dshift_b = tl.zeros((A,), tl.float32), tl.zeros((B,), tl.float32)
    dscale_a, dscale_b = dshift_a, dshift_b
    dgate_a, dgate_b = dshift_a, dshift_b
    for step in tl.range(0, ROWS, num_stages=STAGES):
        t = chunk * ROWS + step
        row = n * tokens + t
        inside = t < tokens
        x_a, x_b = load(x_ptr, row * D, inside, D, A, B, VEC, ONCE)
        dy_a, dy_b = load(dy_ptr, row * D, inside, D, A, B, VEC, ONCE)
        mean = tl.load(mean_ptr + row, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=inside, other=0.0)
        if before_branch_ptr is not None:
            before_a, before_b = load(before_branch_ptr, row * D, inside, D, A, B, VEC, ONCE)
            x_a = _joined(x_a, before_a, before_gate_a, x_ptr.dtype.element_ty)
            x_b = _joined(x_b, before_b, before_gate_b, x_ptr.dtype.element_ty)
        if branch_ptr is not None:
            branch_a, branch_b = load(branch_ptr, row * D, inside, D, A, B, VEC, ONCE)
            x_a = _joined(x_a, branch_a, gate_a, x_ptr.dtype.element_ty)
            x_b = _joined(x_b, branch_b, gate_b, x_ptr.dtype.element_ty)

        xhat_a = (x_a - mean) * rstd
        xhat_b = (x_b - mean) * rstd
        dshift_a += dy_a
        dshift_b += dy_b
        dscale_a = tl.fma(dy_a, xhat_a, dscale_a)
        dscale_b = tl.fma(dy_b, xhat_b, dscale_b)
        dxhat_a = dy_a * scale_a
        dxhat_b = dy_b * scale_b
        along = tl.join(by_thread(dxhat_a, dxhat_b, THREADS), by_thread(dxhat_a * xhat_a, dxhat_b * xhat_b, THREADS))
        along_one, along_xhat = tl.split(tl.sum(along, axis=0) * (1.0 / D))
        dx_a = tl.fma(-xhat_a, along_xhat, dxhat_a - along_one)
        dx_b = tl.fma(-xhat_b, along_xhat, dxhat_b - along_one)
        if dx_out_ptr is None:
            dx_a *= rstd
            dx_b *= rstd
        else:
            dx_out_a, dx_out_b = load(dx_out_ptr, row * D, inside, D, A, B, VEC, ONCE)
            dx_a = tl.fma(dx_a, rstd, dx_out_a)
            dx_b = tl.fma(dx_b, rstd, dx_out_b)
        store(dx_ptr, row * D, inside, dx_a, dx_b, D, A, B, VEC)

        if dgate_ptr is not None:
            dgate_a = tl.fma(branch_a, dx_a, dgate_a)
            dgate_b = tl.fma(branch_b, dx_b, dgate_b)
        if gate_ptr is not None:
            dx_a *= gate_a
            dx_b *= gate_b
        if branch_ptr is not None:
            store(dbranch_ptr, row * D, inside, dx_a, dx_b, D, A, B, VEC)

    place = chunk * stride_sums_chunk + n * D
    store(dshift_ptr, place, True, dshift_a, dshift_b, D, A, B, VEC)
    store(dscale_ptr, place, True, dscale_a, dscale_b, D, A, B, VEC)
    if dgate_ptr is not None:
        store(dgate_ptr, place, True, dgate_a, dgate_b, D, A, B, VEC)


@triton.jit(do_not_specialize=("chunks",))
def _add_chunks_kernel(
    parts_ptr,
    dshift_ptr,
    dscale_ptr,
    dgate_ptr,
    size: tl.int64,
    chunks: tl.int32,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Sums over the chunks of (3, chunks, size) numbers, in their order; program_id(1) says which of the three."""
    which = tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    parts_ptr += which * chunks * size
    total = tl.zeros((BLOCK,), tl.float32)
    chunk = 0
    while chunk < chunks:
        for ahead in tl.static_range(AT_ONCE):
            mask = (place < size) & (chunk + ahead < chunks)
            total += tl.load(parts_ptr + (chunk + ahead) * size + place, mask=mask, other=0.0)
        chunk += AT_ONCE
    if which == 0:
        tl.store(dshift_ptr + place, total, mask=place < size)
    elif which == 1:
        tl.store(dscale_ptr + place, total, mask=place < size)
    elif dgate_ptr is not None:
        tl.store(dgate_ptr + place, total, mask=place < size)


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    offset: float,
    eps: float,
    x_out: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fill x_out, y, and mean and rstd for the backward pass.

    Args:
        x: (N, T, D) fp32, bf16 or fp16, contiguous; D up to 8192.
        branch: (N, T, D) of any of the dtypes, contiguous; None is 0.
        gate, shift, scale: (N, D) fp32, bf16 or fp16; rows may lie anywhere, columns side by side. No gate is 1.
        offset: added to the scale. eps: added to the variance.
        x_out: (N, T, D) out, of x's dtype; None where only y is wanted, which has the same bits.
        y: (N, T, D) out, of any of the dtypes. mean, rstd: (N, T, 1) fp32 out.
    """
    samples, tokens, width = x.shape
    if x.numel() == 0:
        return
    elements = aligned_elements(width, (x, branch, x_out, y), (gate, shift, scale))
    num_warps = _warps(_FORWARD_WARPS, width, elements)
    rows = 1 if samples * tokens <= _FEW_ROWS else 4
    programs = triton.cdiv(tokens, rows)
    _residual_ada_layer_norm_fwd_kernel[(samples * programs,)](
        x,
        branch,
        gate,
        shift,
        scale,
        x_out,
        y,
        mean,
        rstd,
        _stride(gate),
        _stride(shift),
        _stride(scale),
        tokens,
        programs,
        rows,
        offset,
        eps,
        D=width,
        **blocks_of(width, 32 * num_warps),
        VEC=elements,
        THREADS=32 * num_warps,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def backward(
    dx_out: Tensor | None,
    dy: Tensor,
    before_x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    before_branch: Tensor | None,
    before_gate: Tensor | None,
    scale: Tensor,
    offset: float,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dbranch: Tensor | None,
    dgate: Tensor | None,
    dshift: Tensor,
    dscale: Tensor,
) -> None:
    """Fill the gradients of x and branch, and those of gate, shift and scale, which are sums over a sample's tokens.

    Args:
        dx_out: (N, T, D) contiguous, of x's dtype; None is 0.
        dy: (N, T, D) contiguous, of y's dtype.
        branch, gate, scale, offset, mean, rstd: as in the forward pass, whose x_out is recomputed from x and them.
        before_x: x; or, with before_branch and before_gate, what x is computed from in the same way.
        dx: (N, T, D) out, of x's dtype. dbranch: (N, T, D) out, of branch's dtype.
        dgate, dshift, dscale: (N, D) fp32 out; dgate may be None.
    """
    samples, tokens, width = before_x.shape
    if before_x.numel() == 0:
        for output in (dshift, dscale, dgate):
            if output is not None:
                output.zero_()
        return
    chunks = triton.cdiv(tokens, _CHUNK)
    parts = dshift, dscale, dgate
    if chunks > 1:
        workspace = torch.empty((3, chunks, samples, width), dtype=torch.float32, device=before_x.device)
        parts = workspace[0], workspace[1], None if dgate is None else workspace[2]
    read = (before_x, dy, branch, dx_out, before_branch)
    elements = aligned_elements(width, (*read, dx, dbranch), (gate, before_gate, scale, *parts))
    num_warps = _warps(_BACKWARD_WARPS, width, elements)
    blocks = blocks_of(width, 64 * num_warps)  # two elements a thread: asynchronous copies are of four bytes or more
    _residual_ada_layer_norm_bwd_kernel[(samples * chunks,)](
        dx_out,
        dy,
        before_x,
        branch,
        gate,
        before_branch,
        before_gate,
        scale,
        mean,
        rstd,
        dx,
        dbranch,
        parts[2],
        parts[0],
        parts[1],
        _stride(gate),
        _stride(before_gate),
        _stride(scale),
        samples * width,
        tokens,
        chunks,
        offset,
        D=width,
        **blocks,
        VEC=elements,
        THREADS=32 * num_warps,
        ROWS=triton.cdiv(tokens, chunks),
        STAGES=_stages(sum(blocks.values()), read),
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    if chunks > 1:
        _add_chunks_kernel[(triton.cdiv(samples * width, _SUMS), 2 if dgate is None else 3)](
            workspace, dshift, dscale, dgate, samples * width, chunks, BLOCK=_SUMS, AT_ONCE=8, num_warps=4
        )


def _warps(table: dict[int, int], width: int, elements: int) -> int:
    """Twice those of the table for accesses of one element, whose addresses take registers too."""
    warps = next(warps for widest, warps in table.items() if width <= widest)
    return min(2 * warps, 32) if elements == 1 else warps


def _stages(columns: int, rows: tuple[Tensor | None, ...]) -> int:
    """One more than the rows that are on their way while one is in hand, as far as shared memory goes."""
    size = columns * sum(tensor.element_size() for tensor in rows if tensor is not None)
    if size <= 32 << 10:
        return 3
    return 2 if size <= 96 << 10 else 1


def _stride(vectors: Tensor | None) -> int:
    return 0 if vectors is None else vectors.stride(0)
