"""draw: the integer decisions of a batch, one image a lane.

No float is involved, so the results equal those of ``erd_fast/ops/draw.py`` bit for bit. The work is a few hundred
integer instructions an image and 26 bytes out: what counts is latency. Hence one warp a program: lanes whose index
falls outside the data set walk on, and a warp waits for its own lanes only.
"""

import triton
import triton.language as tl
from torch import Tensor

from .philox import bounded, key_words, order_side, sample_order, stratified_word, stratum, words

_BLOCK = 32
_NUM_WARPS = 1
# The scalars of a run: never a reason to compile again.
_NOT_SPECIALIZED = (
    "seed",
    "dataset_size",
    "side",
    "num_timesteps",
    "drop_threshold",
    "offset",
    "purpose_stream",
    "strata",
    "strata_side",
    "count",
)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _draw_fwd_kernel(
    counter_ptr,
    t_table_ptr,
    ids_ptr,
    sample_index_ptr,
    t_index_ptr,
    label_drop_ptr,
    flip_ptr,
    seed: tl.int64,
    dataset_size: tl.int64,
    side: tl.int64,
    num_timesteps: tl.int64,
    drop_threshold: tl.int64,
    offset: tl.int64,
    purpose_stream: tl.int64,
    strata: tl.int64,
    strata_side: tl.int64,
    count: tl.int64,
    STRATIFIED: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = image < count
    k0, k1 = key_words(seed)
    g = tl.load(counter_ptr) + offset + image
    counted = g >= 0  # else the bijections need not end; rows of -1 make NaN of the image
    safe = tl.where(counted, g, 0)
    t_word, drop_word, flip_word, _ = words(k0, k1, purpose_stream, g, 0)
    if STRATIFIED:
        t_word = stratified_word(t_word, stratum(k0, k1, purpose_stream, safe, strata, strata_side), strata)
    if t_table_ptr is None:
        t_index = bounded(t_word, num_timesteps).to(tl.int64)
    else:
        t_index = _entries_up_to(t_table_ptr, t_word, num_timesteps, SEARCH_STEPS)
    tl.store(ids_ptr + image, g, mask=mask)
    sample_index = sample_order(k0, k1, safe, dataset_size, side)
    tl.store(sample_index_ptr + image, tl.where(counted, sample_index, -1), mask=mask)
    tl.store(t_index_ptr + image, tl.where(counted, t_index, -1), mask=mask)
    tl.store(label_drop_ptr + image, drop_word.to(tl.int64) < drop_threshold, mask=mask)
    tl.store(flip_ptr + image, (flip_word >> 31) == 1, mask=mask)


@triton.jit
def _entries_up_to(table_ptr, word, length, STEPS: tl.constexpr):
    """How many entries of an ascending table are <= word, for length <= 2**STEPS and a last entry above every word."""
    word = word.to(tl.int64)
    found = tl.zeros_like(word)
    for i in tl.static_range(STEPS):
        wider = found + (1 << (STEPS - 1 - i))
        inside = wider < length
        entry = tl.load(table_ptr + wider - 1, mask=inside, other=0)
        found = tl.where(inside & (entry <= word), wider, found)
    return found


def forward(
    counter: Tensor,
    seed: int,
    dataset_size: int,
    num_timesteps: int,
    drop_threshold: int,
    offset: int,
    purpose: int,
    t_table: Tensor | None,
    strata: int,
    ids: Tensor,
    sample_index: Tensor,
    t_index: Tensor,
    label_drop: Tensor,
    flip: Tensor,
) -> None:
    """Fill the (N,) outputs for images counter + offset + 0 ... N - 1.

    Args:
        counter: () int64, read on the device.
        seed: the 64-bit key as the int64 of the same bits.
        drop_threshold: in [0, 2**32]; a label drops where its word is smaller.
        t_table: (num_timesteps,) int64, ascending, its last entry 2**32; None for uniform timesteps.
        strata: images whose timesteps are spread evenly; 0 for none.
        ids, sample_index, t_index: (N,) int64 out. label_drop, flip: (N,) bool out.
    """
    count = ids.numel()
    _draw_fwd_kernel[(triton.cdiv(count, _BLOCK),)](
        counter,
        t_table,
        ids,
        sample_index,
        t_index,
        label_drop,
        flip,
        seed,
        dataset_size,
        order_side(dataset_size),
        num_timesteps,
        drop_threshold,
        offset,
        purpose << 8,  # stream 0: scalars
        strata,
        order_side(strata) if strata else 0,
        count,
        STRATIFIED=strata > 0,
        SEARCH_STEPS=0 if t_table is None else (num_timesteps - 1).bit_length(),
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
