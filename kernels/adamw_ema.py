"""adamw_ema: what a step does to every parameter, in two launches, of which the second goes once through the memory.

*Advance* makes the numbers of this step in float64, a group a lane of one warp. *Update* is a program a chunk, which
goes through it in blocks of four elements a thread: 16 bytes of float32, 8 of 16-bit types, so that a thread has the
same elements of every tensor. All loads of a block are on their way before the first is waited for. A chunk's last
block, if it is not whole, and all blocks of tensors that are not aligned move in single elements.

Roots and quotients of elements are correctly rounded: memory leaves time for 300 instructions an element on sm_90 and
for 150 on sm_100, and these are 60 in all.

Bytes an element, with one average: 32 for parameter, moments and average, in and out, and those of the gradient in and
of the copy out.
"""

import triton
import triton.language as tl
from torch import Tensor

from .chunks import ALIGNED, BFLOAT16, FLOAT16, FORMAT, FORMATS, GRADIENT, chunk_of, element_at

# Columns of a row, as in erd_fast/ops/tensor_table.py; an average is _EMA and the next three.
_PARAMETER, _EXP_AVG, _EXP_AVG_SQ, _COPY, _EMA, _GROUP = (tl.constexpr(column) for column in (1, 2, 3, 4, 5, 10))
# Columns of settings (_S) and factors (_F), as in erd_fast/ops/adamw_ema.py.
_S_LR, _S_BETA1, _S_BETA2, _S_EPS, _S_WEIGHT_DECAY, _S_GRAD_CLIP, _S_WARMUP, _S_COSINE_STEPS, _S_START, _S_EMA_DECAY = (
    tl.constexpr(column) for column in range(10)
)
_F_APPLY, _F_GRADIENT, _F_KEEP, _F_NEW1, _F_OLD2, _F_NEW2, _F_ROOT, _F_EPS, _F_STEP, _F_EMA = (
    tl.constexpr(column) for column in range(10)
)
_F_LR, _COLUMNS = tl.constexpr(13), tl.constexpr(16)
_MOST_EMAS = tl.constexpr(4)
_CLIP_EPS = tl.constexpr(1e-6)
_SMALLEST_SCALE, _LARGEST_SCALE = tl.constexpr(1.0), tl.constexpr(2.0**32)
_HALF_PI = tl.constexpr(1.5707963267948966)
# What a step touches once gives way in the caches to what the next forward pass reads: parameters and copies, written.
_ONCE = tl.constexpr("evict_first")

_GROUPS = 32  # at a time
# With one average a thread has 64 registers (Triton 3.8 and 3.6; 56 without one, 94 with four), and an sm_90
# multiprocessor room for 8 programs: 72 bytes a thread are 73 KB on their way, where about 40 hide the latency of
# memory. Programs of eight warps would be half as many, and the compiler takes 107 registers there for two averages.
_WARPS = 4
_BLOCK = 4 * 32 * _WARPS


@triton.jit(do_not_specialize=("growth_interval", "groups"))
def _advance_kernel(
    settings_ptr,
    norm_ptr,
    counts_ptr,
    scalars_ptr,
    factors_ptr,
    growth_interval: tl.int64,
    groups: tl.int32,
    GROUPS: tl.constexpr,
):
    opt_step, growth, skipped = tl.load(counts_ptr), tl.load(counts_ptr + 1), tl.load(counts_ptr + 2)
    loss_scale = tl.load(scalars_ptr)
    norm = tl.load(norm_ptr).to(tl.float64) / loss_scale.to(tl.float64)
    finite = tl.abs(norm) < float("inf")
    start = 0
    while start < groups:  # Triton 3.6 interprets no range() up to a device value
        group = start + tl.arange(0, GROUPS)
        _store_factors(
            settings_ptr + group * _COLUMNS,
            factors_ptr + group * _COLUMNS,
            group < groups,
            opt_step + 1,
            norm,
            loss_scale.to(tl.float64),
            finite,
        )
        start += GROUPS

    tl.debug_barrier()  # all threads have read what one of them now overwrites
    tl.store(counts_ptr, tl.where(finite, opt_step + 1, opt_step))
    tl.store(counts_ptr + 2, tl.where(finite, skipped, skipped + 1))
    tl.store(scalars_ptr + 1, norm)
    if growth_interval != 0:
        grown = growth + 1 >= growth_interval
        loss_scale *= tl.where(finite, tl.where(grown, 2.0, 1.0), 0.5)
        tl.store(scalars_ptr, tl.minimum(tl.maximum(loss_scale, _SMALLEST_SCALE), _LARGEST_SCALE))
        tl.store(counts_ptr + 1, tl.where(finite, tl.where(grown, 0, growth + 1), 0))


@triton.jit
def _store_factors(settings_ptr, factors_ptr, mask, step, norm, loss_scale, finite):
    """The numbers of a step for some groups."""
    n = step - tl.load(settings_ptr + _S_START, mask=mask, other=0.0)
    warmup = tl.load(settings_ptr + _S_WARMUP, mask=mask, other=0.0)
    cosine_steps = tl.load(settings_ptr + _S_COSINE_STEPS, mask=mask, other=0.0)
    lr = tl.load(settings_ptr + _S_LR, mask=mask, other=0.0) * _scheduled(n, warmup, cosine_steps)
    weight_decay = tl.load(settings_ptr + _S_WEIGHT_DECAY, mask=mask, other=0.0)
    beta1 = tl.load(settings_ptr + _S_BETA1, mask=mask, other=0.0)
    beta2 = tl.load(settings_ptr + _S_BETA2, mask=mask, other=0.0)
    clip = tl.load(settings_ptr + _S_GRAD_CLIP, mask=mask, other=0.0)
    ratio = clip / (norm + _CLIP_EPS)
    clipped = tl.where(clip > 0.0, tl.where(ratio > 1.0, 1.0, ratio), 1.0)

    tl.store(factors_ptr + _F_APPLY, tl.where(finite, 1.0, 0.0), mask=mask)
    tl.store(factors_ptr + _F_GRADIENT, clipped / loss_scale, mask=mask)
    tl.store(factors_ptr + _F_KEEP, 1.0 - lr * weight_decay, mask=mask)
    tl.store(factors_ptr + _F_NEW1, 1.0 - beta1, mask=mask)
    tl.store(factors_ptr + _F_OLD2, beta2, mask=mask)
    tl.store(factors_ptr + _F_NEW2, 1.0 - beta2, mask=mask)
    tl.store(factors_ptr + _F_ROOT, 1.0 / tl.sqrt(1.0 - _power(beta2, n)), mask=mask)
    tl.store(factors_ptr + _F_EPS, tl.load(settings_ptr + _S_EPS, mask=mask, other=0.0), mask=mask)
    tl.store(factors_ptr + _F_STEP, lr / (1.0 - _power(beta1, n)), mask=mask)
    tl.store(factors_ptr + _F_LR, lr, mask=mask)
    for number in tl.static_range(_MOST_EMAS):
        decay = tl.load(settings_ptr + _S_EMA_DECAY + number, mask=mask, other=0.0)
        tl.store(factors_ptr + _F_EMA + number, 1.0 - tl.minimum(decay, n / (n + 9.0)), mask=mask)


@triton.jit
def _scheduled(n, warmup, cosine_steps):
    """Factor of the learning rate at step n; (1 + cos(pi x)) / 2 is sin(pi / 2 (1 - x))^2."""
    progress = tl.maximum(n - 1.0 - warmup, 0.0) / tl.maximum(cosine_steps - warmup, 1.0)
    sine = _sine(_HALF_PI * tl.maximum(1.0 - progress, 0.0))
    cosine = tl.where(cosine_steps > 0.0, sine * sine, 1.0)
    return tl.where(n <= warmup, n / tl.maximum(warmup, 1.0), cosine)


@triton.jit
def _sine(x):
    """Of 0 to pi / 2, by eleven terms of its series, to 2^-53: tl.sin and tl.cos reduce any argument, on a stack."""
    square = x * x
    rest = 1.0
    for k in tl.static_range(20, 0, -2):
        rest = 1.0 - square * rest * (1.0 / (k * (k + 1)))
    return x * rest


@triton.jit
def _power(base, n):
    return tl.exp(n * tl.log(base))


@triton.jit
def _update_kernel(rows_ptr, places_ptr, factors_ptr, CHUNK: tl.constexpr, DECAYS: tl.constexpr, BLOCK: tl.constexpr):
    row_ptr, first, count = chunk_of(rows_ptr, places_ptr, CHUNK)
    factors_ptr += tl.load(row_ptr + _GROUP) * _COLUMNS
    if tl.load(factors_ptr + _F_APPLY) == 0.0:
        return
    factors = _columns(factors_ptr, _F_EMA + DECAYS)
    addresses = _columns(row_ptr, _EMA + DECAYS)
    form = tl.load(row_ptr + FORMAT)
    whole = tl.where(form >= ALIGNED, count // BLOCK * BLOCK, 0)
    start = 0
    while start < whole:
        _update(addresses, factors, form, first + start, BLOCK, DECAYS, BLOCK, True)
        start += BLOCK
    # Half a block: blocks of one size share a layout, and single elements want another than vectors do.
    while start < count:
        _update(addresses, factors, form, first + start, count - start, DECAYS, BLOCK // 2, False)
        start += BLOCK // 2


@triton.jit
def _columns(ptr, COUNT: tl.constexpr):
    values = tl.tuple([])
    for column in tl.static_range(COUNT):
        values += (tl.load(ptr + column),)
    return values


@triton.jit
def _update(addresses, factors, form, first, count, DECAYS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """One block, from an element on: all of it if it is whole, else ``count`` elements."""
    p = _load(addresses[_PARAMETER], first, count, tl.float32, BLOCK, WHOLE)
    m = _load(addresses[_EXP_AVG], first, count, tl.float32, BLOCK, WHOLE)
    v = _load(addresses[_EXP_AVG_SQ], first, count, tl.float32, BLOCK, WHOLE)
    averages = tl.tuple([])
    for number in tl.static_range(DECAYS):
        averages += (_load(addresses[_EMA + number], first, count, tl.float32, BLOCK, WHOLE),)
    # The gradient comes last: its branches end with a conversion, which waits for it.
    if form % FORMATS == BFLOAT16:
        g = _load(addresses[GRADIENT], first, count, tl.bfloat16, BLOCK, WHOLE)
    elif form % FORMATS == FLOAT16:
        g = _load(addresses[GRADIENT], first, count, tl.float16, BLOCK, WHOLE)
    else:
        g = _load(addresses[GRADIENT], first, count, tl.float32, BLOCK, WHOLE)

    g *= factors[_F_GRADIENT]
    m += factors[_F_NEW1] * (g - m)
    v = factors[_F_OLD2] * v + factors[_F_NEW2] * (g * g)
    denominator = tl.sqrt_rn(v) * factors[_F_ROOT] + factors[_F_EPS]
    p = factors[_F_KEEP] * p - factors[_F_STEP] * tl.div_rn(m, denominator)

    _store(addresses[_PARAMETER], first, count, p, tl.float32, WHOLE, "")
    _store(addresses[_EXP_AVG], first, count, m, tl.float32, WHOLE, _ONCE)
    _store(addresses[_EXP_AVG_SQ], first, count, v, tl.float32, WHOLE, _ONCE)
    for number in tl.static_range(DECAYS):
        average = averages[number] + factors[_F_EMA + number] * (p - averages[number])
        _store(addresses[_EMA + number], first, count, average, tl.float32, WHOLE, _ONCE)
    if addresses[_COPY] != 0:
        if form // FORMATS % FORMATS == BFLOAT16:
            _store(addresses[_COPY], first, count, p, tl.bfloat16, WHOLE, "")
        elif form // FORMATS % FORMATS == FLOAT16:
            _store(addresses[_COPY], first, count, p, tl.float16, WHOLE, "")
        else:
            _store(addresses[_COPY], first, count, p, tl.float32, WHOLE, "")


@triton.jit
def _load(address, first, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    element = tl.arange(0, BLOCK)
    mask = None if WHOLE else element < count
    value = tl.load(element_at(address, first, DTYPE, WHOLE) + element, mask=mask, eviction_policy=_ONCE)
    return value.to(tl.float32)


@triton.jit
def _store(address, first, count, value, DTYPE: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    element = tl.arange(0, value.shape[0])
    mask = None if WHOLE else element < count
    tl.store(element_at(address, first, DTYPE, WHOLE) + element, value.to(DTYPE), mask=mask, eviction_policy=EVICT)


def forward(
    rows: Tensor,
    places: Tensor,
    chunk: int,
    settings: Tensor,
    norm: Tensor,
    growth_interval: int,
    decays: int,
    counts: Tensor,
    scalars: Tensor,
    factors: Tensor,
) -> None:
    """A step: change counts and scalars, fill factors, and change what the table says.

    Args:
        rows, places: (tensors, 12) int64 and (chunks, 2) int32, a table of erd_fast/ops/tensor_table.py. Gradients,
            read, and copies, written, are fp32, bf16 or fp16; parameters, moments and averages are fp32.
        chunk: elements of a chunk, a multiple of 512.
        settings: (groups, 16) fp64.
        norm: () fp32, of the gradients as they are.
        growth_interval: steps without overflow after which the loss scale is doubled; 0 keeps it.
        decays: averages of each tensor, 0 to 4.
        counts: (3,) int64: steps taken, steps since the loss scale changed, steps skipped.
        scalars: (2,) fp32: loss scale, and out the norm divided by it.
        factors: (groups, 16) fp32 out.
    """
    state = (counts, scalars, factors)
    _advance_kernel[(1,)](settings, norm, *state, growth_interval, len(settings), GROUPS=_GROUPS, num_warps=1)
    chunks = len(places)
    if chunks:
        _update_kernel[(chunks,)](rows, places, factors, CHUNK=chunk, DECAYS=decays, BLOCK=_BLOCK, num_warps=_WARPS)
