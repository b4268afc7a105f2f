"""diffusion_loss: weighted squared error, its parts and its gradient, in one launch and one pass over the data.

One program an image: it reads prediction and target once, writes the gradient and the image's mean squared error, and
takes a ticket. The program that draws the last ticket sums loss and bins over all images in a fixed order, so there is
no float atomic and the same input gives the same bits. Tickets are counted in the four bytes of the loss, which are set
to 0 before the launch. An image's error depends on that image alone: neither the number of images nor its place among
them reaches the summation.

The walk is in the order of ``prediction``; patch tokens gather their targets, which the L1 cache serves after the first
touch of a sector.

Bytes per image of E = C H W elements and E' = C' H W predicted: (E or, as tokens, E') * size of prediction + 4 E in,
E' * size of prediction out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES_PER_THREAD = 16
_MOST_WARPS = 8
_MOST_BINS = 64  # of one sweep over the images


@triton.jit(
    do_not_specialize=("weight_count", "batch_size"),
    # Vector loads change the order of summation: ALIGNED decides for them, from what no slice of a batch changes.
    do_not_specialize_on_alignment=("prediction_ptr", "target_ptr", "dprediction_ptr"),
)
def _diffusion_loss_fwd_kernel(
    prediction_ptr,
    target_ptr,
    weight_ptr,
    t_index_ptr,
    loss_scale_ptr,
    loss_ptr,
    per_sample_ptr,
    bin_sum_ptr,
    bin_count_ptr,
    dprediction_ptr,
    ticket_ptr,
    weight_count: tl.int64,
    batch_size: tl.int64,
    CHANNELS: tl.constexpr,
    PREDICTED_CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    NUM_BINS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    SIZE: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    PREDICTED_SIZE: tl.constexpr = PREDICTED_CHANNELS * HEIGHT * WIDTH
    image = tl.program_id(0).to(tl.int64)
    prediction_ptr += image * PREDICTED_SIZE
    target_ptr += image * SIZE
    if dprediction_ptr is not None:
        dprediction_ptr += image * PREDICTED_SIZE
        _, weight = _row_and_weight(t_index_ptr, weight_ptr, image, True, weight_count)
        slope = tl.div_rn(2.0 * weight, tl.cast(batch_size, tl.float32) * SIZE)
        if loss_scale_ptr is not None:
            slope *= tl.load(loss_scale_ptr)
    if ALIGNED:
        prediction_ptr = tl.multiple_of(prediction_ptr, 16)
        target_ptr = tl.multiple_of(target_ptr, 16)
        if dprediction_ptr is not None:
            dprediction_ptr = tl.multiple_of(dprediction_ptr, 16)

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PREDICTED_SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)
        if PATCH == 0:
            element = place
            counted = place < SIZE
        else:
            c = place % PREDICTED_CHANNELS
            pixel = place // PREDICTED_CHANNELS
            token = pixel // (PATCH * PATCH)
            y = token // (WIDTH // PATCH) * PATCH + pixel // PATCH % PATCH
            x = token % (WIDTH // PATCH) * PATCH + pixel % PATCH
            element = (c * HEIGHT + y) * WIDTH + x
            counted = (c < CHANNELS) & (place < PREDICTED_SIZE)
        error = tl.load(prediction_ptr + place, mask=counted, other=0.0).to(tl.float32)
        error -= tl.load(target_ptr + element, mask=counted, other=0.0)
        squares += error * error
        if dprediction_ptr is not None:
            gradient = tl.where(counted, slope * error, 0.0)
            tl.store(
                dprediction_ptr + place, gradient.to(dprediction_ptr.dtype.element_ty), mask=place < PREDICTED_SIZE
            )
    tl.store(per_sample_ptr + image, tl.div_rn(tl.sum(squares), SIZE * 1.0))

    # The barrier: whichever thread stored, the one that takes the ticket releases it.
    tl.debug_barrier()
    count = tl.num_programs(0)
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == count - 1:
        _store_loss(per_sample_ptr, t_index_ptr, weight_ptr, loss_ptr, count, weight_count, batch_size, BLOCK // 4)
        _store_bins(per_sample_ptr, t_index_ptr, bin_sum_ptr, bin_count_ptr, count, weight_count, NUM_BINS, BINS, BLOCK)


@triton.jit
def _row_and_weight(t_index_ptr, weight_ptr, image, mask, weight_count):
    """Row of the weight table (-1 where out of range) and weight (there NaN) of images."""
    row = image.to(tl.int64)
    if t_index_ptr is not None:
        row = tl.load(t_index_ptr + image, mask=mask, other=-1)
    inside = (row >= 0) & (row < weight_count) & mask
    return tl.where(inside, row, -1), tl.load(weight_ptr + row, mask=inside, other=float("nan"))


@triton.jit
def _store_loss(
    per_sample_ptr, t_index_ptr, weight_ptr, loss_ptr, count, weight_count, batch_size, IMAGES: tl.constexpr
):
    total = tl.zeros((IMAGES,), tl.float32)
    start = 0
    while start < count:  # Triton 3.6 interprets no range() up to a device value
        image = start + tl.arange(0, IMAGES)
        mask = image < count
        _, weight = _row_and_weight(t_index_ptr, weight_ptr, image, mask, weight_count)
        # .cg: other multiprocessors wrote these, and L1 caches are not kept equal.
        mse = tl.load(per_sample_ptr + image, mask=mask, other=0.0, cache_modifier=".cg")
        total += tl.where(mask, weight * mse, 0.0)
        start += IMAGES
    tl.store(loss_ptr, tl.div_rn(tl.sum(total), tl.cast(batch_size, tl.float32)))


@triton.jit
def _store_bins(
    per_sample_ptr,
    t_index_ptr,
    bin_sum_ptr,
    bin_count_ptr,
    count,
    weight_count,
    NUM_BINS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    IMAGES: tl.constexpr = BLOCK // (4 * BINS)  # few, so that all sums stay in registers
    for first in range(0, NUM_BINS, BINS):
        bins = first + tl.arange(0, BINS)
        sums = tl.zeros((IMAGES, BINS), tl.float32)  # added up once: a sum over threads waits for all of them
        counts = tl.zeros((IMAGES, BINS), tl.float32)
        if t_index_ptr is not None:
            start = 0
            while start < count:
                image = start + tl.arange(0, IMAGES)
                mask = image < count
                t = tl.load(t_index_ptr + image, mask=mask, other=-1)
                mse = tl.load(per_sample_ptr + image, mask=mask, other=0.0, cache_modifier=".cg")
                bin_of = tl.where((t >= 0) & (t < weight_count), t * NUM_BINS // weight_count, -1)
                hit = bin_of[:, None] == bins[None, :]
                sums += tl.where(hit, mse[:, None], 0.0)
                counts += hit.to(tl.float32)
                start += IMAGES
        tl.store(bin_sum_ptr + bins, tl.sum(sums, axis=0), mask=bins < NUM_BINS)
        tl.store(bin_count_ptr + bins, tl.sum(counts, axis=0), mask=bins < NUM_BINS)


def forward(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    t_index: Tensor | None,
    batch_size: int,
    loss_scale: Tensor | None,
    patch: int,
    loss: Tensor,
    per_sample: Tensor,
    bin_sum: Tensor,
    bin_count: Tensor,
    dprediction: Tensor | None,
) -> None:
    """Fill loss, per-image and per-bin errors, and the gradient if ``dprediction`` is given.

    A timestep out of range makes the loss and that image's gradient NaN, and counts in no bin.

    Args:
        prediction: (N, C', H, W), or with ``patch`` p tokens (N, (H/p)(W/p), p*p*C'); C' >= C, fp32, bf16 or fp16.
        target: (N, C, H, W) fp32.
        weight: (K,) fp32 by ``t_index``, or (N,) where that is None.
        t_index: (N,) int64 or None.
        batch_size: images the loss is the mean over.
        loss_scale: () fp32, a factor of the gradient alone; None is 1.
        loss: () fp32 out. per_sample: (N,) fp32 out. bin_sum, bin_count: (num_bins,) fp32 out.
        dprediction: out, like ``prediction``, or None.
    """
    count, channels, height, width = target.shape
    if count == 0:
        for output in (loss, bin_sum, bin_count):
            output.zero_()
        return
    loss.zero_()
    predicted_channels = prediction.numel() // (count * height * width)
    predicted_size = predicted_channels * height * width
    rows = [(prediction, predicted_size), (target, channels * height * width)]
    if dprediction is not None:
        rows.append((dprediction, predicted_size))
    num_warps = min(triton.next_power_of_2(triton.cdiv(predicted_size, 32 * _VALUES_PER_THREAD)), _MOST_WARPS)
    _diffusion_loss_fwd_kernel[(count,)](
        prediction,
        target,
        weight,
        t_index,
        loss_scale,
        loss,
        per_sample,
        bin_sum,
        bin_count,
        dprediction,
        loss.view(torch.int32),
        weight.numel(),
        batch_size,
        CHANNELS=channels,
        PREDICTED_CHANNELS=predicted_channels,
        HEIGHT=height,
        WIDTH=width,
        PATCH=patch,
        NUM_BINS=bin_sum.numel(),
        ALIGNED=all(size * row.element_size() % 16 == 0 and row.data_ptr() % 16 == 0 for row, size in rows),
        BLOCK=num_warps * 32 * _VALUES_PER_THREAD,
        BINS=min(triton.next_power_of_2(bin_sum.numel()), _MOST_BINS),
        num_warps=num_warps,
    )
