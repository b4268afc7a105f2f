"""q_sample: stored latents to the noisy input x_t and the regression target, in one launch.

An image is cut into blocks of elements, a program each. A Philox call gives the normals of four neighbouring
elements in (C, H, W) order, so a block draws for its quarter of groups and interleaves; nothing is drawn twice but the
posterior noise of images that may be mirrored and whose width is no multiple of four. An element of a mirrored image
reads its stored latent, and the posterior noise that belongs to it, at the mirrored place.

Target and image layout are written in element order. For patch tokens a block is a box of all channels and whole
patches, transposed in shared memory before it is stored: its tokens are then one run of addresses. Sizes that no such
box fits (a width not divisible by 4, a patch size that is no power of two, very wide images) store each element at its
place in its token.

Bytes per image of E = C H W elements: the stored row once, E * (size of x_t + 4) out, and 4 E for each given noise.
"""

import triton
import triton.language as tl
from torch import Tensor

from .philox import box_muller, box_muller_4, interleave_4, key_words, words

SAMPLE = tl.constexpr(0)
MEAN_STD = tl.constexpr(1)
MEAN_LOGVAR = tl.constexpr(2)
PIXELS = tl.constexpr(3)
_LOGVAR_LOW = tl.constexpr(-30.0)  # the clamp of the LDM autoencoder
_LOGVAR_HIGH = tl.constexpr(20.0)
_POSTERIOR = tl.constexpr(1)  # Stream of random.py
_NOISE = tl.constexpr(2)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # 10 bits: its product with a small integer is exact
_LN2_LOW = tl.constexpr(-2.1219444005469058277e-4)

# Four elements a thread, one Philox group: then the interleaved normals never leave its registers.
_ELEMENTS_PER_WARP = 128
_BLOCK = 1024
_LARGEST_BOX = 4096


@triton.jit(do_not_specialize=("seed", "purpose", "stored_count", "coefficient_count"))
def _q_sample_fwd_kernel(
    latents_ptr,
    coefficients_ptr,
    t_index_ptr,
    index_ptr,
    scale_ptr,
    shift_ptr,
    flip_ptr,
    ids_ptr,
    noise_ptr,
    posterior_noise_ptr,
    x_t_ptr,
    target_ptr,
    seed: tl.int64,
    purpose: tl.int64,
    stored_count: tl.int64,
    coefficient_count: tl.int64,
    KIND: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    BOX_CHANNELS: tl.constexpr,
    BOX_ROWS: tl.constexpr,
    BOX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    SIZE: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    first = image * SIZE
    c, y, x, element, inside = _places(
        block, tl.arange(0, BLOCK), CHANNELS, HEIGHT, WIDTH, BOX_CHANNELS, BOX_ROWS, BOX_WIDTH, BLOCK
    )
    _, _, group_x, group, _ = _places(
        block, tl.arange(0, BLOCK // 4) * 4, CHANNELS, HEIGHT, WIDTH, BOX_CHANNELS, BOX_ROWS, BOX_WIDTH, BLOCK
    )
    k0, k1 = key_words(seed)

    row = image
    if index_ptr is not None:
        row = tl.load(index_ptr + image)
    t = image
    if t_index_ptr is not None:
        t = tl.load(t_index_ptr + image)
    valid = (row >= 0) & (row < stored_count) & (t >= 0) & (t < coefficient_count)
    # NaN in the coefficients is NaN in both outputs.
    alpha = tl.load(coefficients_ptr + t * 4, mask=valid, other=float("nan"))
    sigma = tl.load(coefficients_ptr + t * 4 + 1, mask=valid, other=float("nan"))
    c_x = tl.load(coefficients_ptr + t * 4 + 2, mask=valid, other=float("nan"))
    c_eps = tl.load(coefficients_ptr + t * 4 + 3, mask=valid, other=float("nan"))

    source = element
    if flip_ptr is not None:
        mirrored = tl.load(flip_ptr + image)
        source = tl.where(mirrored, element + (WIDTH - 1 - 2 * x), element)
    readable = inside & valid
    if (KIND == MEAN_STD) | (KIND == MEAN_LOGVAR):
        latents_ptr += row * (2 * SIZE)
        mean = tl.load(latents_ptr + source, mask=readable, other=0.0).to(tl.float32)
        std = tl.load(latents_ptr + SIZE + source, mask=readable, other=0.0).to(tl.float32)
        if KIND == MEAN_LOGVAR:
            std = tl.maximum(std, _LOGVAR_LOW, propagate_nan=tl.PropagateNan.ALL)
            std = tl.minimum(std, _LOGVAR_HIGH, propagate_nan=tl.PropagateNan.ALL)
            std = _exp(0.5 * std)
        if posterior_noise_ptr is not None:
            normal = tl.load(posterior_noise_ptr + first + source, mask=inside, other=0.0)
        else:
            g = tl.load(ids_ptr + image)
            tag = purpose << 8 | _POSTERIOR
            if flip_ptr is None:
                normal = interleave_4(*_group_normals(k0, k1, tag, g, group))
            elif WIDTH % 4 == 0:
                # A mirrored group of four is a stored group read backwards.
                group_source = tl.where(mirrored, group + (WIDTH - 4 - 2 * group_x), group)
                n0, n1, n2, n3 = _group_normals(k0, k1, tag, g, group_source)
                n0, n3 = tl.where(mirrored, n3, n0), tl.where(mirrored, n0, n3)
                n1, n2 = tl.where(mirrored, n2, n1), tl.where(mirrored, n1, n2)
                normal = interleave_4(n0, n1, n2, n3)
            else:
                normal = _element_normal(k0, k1, tag, g, source)
        x_start = mean + std * normal
    else:
        x_start = tl.load(latents_ptr + row * SIZE + source, mask=readable, other=0).to(tl.float32)
        if KIND == PIXELS:
            x_start = tl.div_rn(2.0 * x_start - 255.0, 255.0)
    if shift_ptr is not None:
        x_start -= tl.load(shift_ptr + c, mask=inside, other=0.0)
    if scale_ptr is not None:
        x_start *= tl.load(scale_ptr + c, mask=inside, other=0.0)

    if noise_ptr is not None:
        eps = tl.load(noise_ptr + first + element, mask=inside, other=0.0)
    else:
        eps = interleave_4(*_group_normals(k0, k1, purpose << 8 | _NOISE, tl.load(ids_ptr + image), group))

    tl.store(target_ptr + first + element, c_x * x_start + c_eps * eps, mask=inside)
    x_t = (alpha * x_start + sigma * eps).to(x_t_ptr.dtype.element_ty)
    if PATCH == 0:
        tl.store(x_t_ptr + first + element, x_t, mask=inside)
    elif BOX_CHANNELS == 0:
        tl.store(x_t_ptr + first + _token_offset(c, y, x, CHANNELS, WIDTH, PATCH), x_t, mask=inside)
    else:
        x_t = tl.reshape(x_t, (BOX_CHANNELS, BOX_ROWS // PATCH, PATCH, BOX_WIDTH // PATCH, PATCH))
        x_t = tl.reshape(tl.permute(x_t, (1, 3, 2, 4, 0)), (BLOCK,))
        place = tl.arange(0, BLOCK)
        if (BOX_CHANNELS == CHANNELS) & (BOX_WIDTH == WIDTH):
            offset = block * BLOCK + place  # said so that the compiler sees one run of addresses
            inside = offset < SIZE
        else:
            c = place % BOX_CHANNELS
            place = place // BOX_CHANNELS
            x = place % PATCH + place // (PATCH * PATCH) % (BOX_WIDTH // PATCH) * PATCH
            y = place // PATCH % PATCH + place // (PATCH * BOX_WIDTH) * PATCH + block * BOX_ROWS
            offset = _token_offset(c, y, x, CHANNELS, WIDTH, PATCH)
            inside = (c < CHANNELS) & (y < HEIGHT) & (x < WIDTH)
        tl.store(x_t_ptr + first + offset, x_t, mask=inside)


@triton.jit
def _places(
    block,
    position,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BOX_CHANNELS: tl.constexpr,
    BOX_ROWS: tl.constexpr,
    BOX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channel, row, column and element of positions in a block of the image, and whether they are in the image."""
    if BOX_CHANNELS == 0:
        element = block * BLOCK + position
        x = element % WIDTH
        y = element // WIDTH % HEIGHT
        c = element // (HEIGHT * WIDTH)
        inside = element < CHANNELS * HEIGHT * WIDTH
    else:
        x = position % BOX_WIDTH
        y = position // BOX_WIDTH % BOX_ROWS + block * BOX_ROWS
        c = position // (BOX_WIDTH * BOX_ROWS)
        element = (c * HEIGHT + y) * WIDTH + x
        inside = (c < CHANNELS) & (y < HEIGHT) & (x < WIDTH)
    return c, y, x, element, inside


@triton.jit
def _token_offset(c, y, x, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr):
    token = y // PATCH * (WIDTH // PATCH) + x // PATCH
    return ((token * PATCH + y % PATCH) * PATCH + x % PATCH) * CHANNELS + c


@triton.jit
def _group_normals(k0, k1, purpose_stream, g, first_element):
    w0, w1, w2, w3 = words(k0, k1, purpose_stream, g, first_element // 4)
    return box_muller_4(w0, w1, w2, w3)


@triton.jit
def _element_normal(k0, k1, purpose_stream, g, element):
    w0, w1, w2, w3 = words(k0, k1, purpose_stream, g, element // 4)
    second = (element & 2) == 2
    n0, n1 = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((element & 1) == 1, n1, n0)


@triton.jit
def _exp(x):
    """exp for |x| <= 60 to a few 2**-24: tl.exp rounds x * log2(e), which costs |x| * 2**-24 more."""
    k = tl.floor(x * _LOG2_E + 0.5)
    rest = tl.fma(k, -_LN2_LOW, tl.fma(k, -_LN2_HIGH, x))
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.exp2(rest * _LOG2_E) * power


def _box(channels: int, height: int, width: int, patch: int) -> tuple[int, int, int]:
    """(channels, rows, columns) of the block that is written as whole tokens, powers of two; zeros if there is none."""
    if patch == 0 or width % 4 or patch & (patch - 1):
        return 0, 0, 0
    channels, width = triton.next_power_of_2(channels), triton.next_power_of_2(width)
    rows = max(patch, min(_BLOCK // (channels * width), triton.next_power_of_2(height)))
    return (channels, rows, width) if channels * rows * width <= _LARGEST_BOX else (0, 0, 0)


def forward(
    latents: Tensor,
    coefficients: Tensor,
    t_index: Tensor | None,
    index: Tensor | None,
    kind: int,
    scale: Tensor | None,
    shift: Tensor | None,
    flip: Tensor | None,
    ids: Tensor | None,
    seed: int,
    purpose: int,
    noise: Tensor | None,
    posterior_noise: Tensor | None,
    patch: int,
    x_t: Tensor,
    target: Tensor,
) -> None:
    """Fill ``x_t`` and ``target`` of N images. A row or timestep out of range makes that image NaN.

    Args:
        latents: (M, C, H, W), for the two means with spread (M, 2C, H, W); fp32, bf16, fp16, uint8 for pixels.
        coefficients: (K, 4) fp32 by ``t_index``, or (N, 4) where that is None: alpha, sigma, c_x, c_eps.
        t_index, index, ids: (N,) int64. index: rows of ``latents``. ids: images, where noise is drawn.
        kind: 0 sample, 1 mean and std, 2 mean and log-variance, 3 pixels.
        scale, shift: (C,) fp32. flip: (N,) bool.
        seed: the 64-bit key as the int64 of the same bits.
        noise, posterior_noise: (N, C, H, W) fp32 in place of drawn ones.
        patch: 0, or the patch size p of the tokens.
        x_t: out, fp32, bf16 or fp16: (N, C, H, W), or with ``patch`` (N, (H/p)(W/p), p*p*C).
        target: (N, C, H, W) fp32 out.
    """
    count, channels, height, width = target.shape
    box = _box(channels, height, width, patch)
    if box[0]:
        block, blocks = box[0] * box[1] * box[2], triton.cdiv(height, box[1])
    else:
        size = channels * height * width
        block = min(max(triton.next_power_of_2(size), _ELEMENTS_PER_WARP), _BLOCK)
        blocks = triton.cdiv(size, block)
    _q_sample_fwd_kernel[(count * blocks,)](
        latents,
        coefficients,
        t_index,
        index,
        scale,
        shift,
        flip,
        ids,
        noise,
        posterior_noise,
        x_t,
        target,
        seed,
        purpose,
        latents.shape[0],
        coefficients.shape[0],
        KIND=kind,
        CHANNELS=channels,
        HEIGHT=height,
        WIDTH=width,
        PATCH=patch,
        BOX_CHANNELS=box[0],
        BOX_ROWS=box[1],
        BOX_WIDTH=box[2],
        BLOCK=block,
        BLOCKS=blocks,
        num_warps=max(block // _ELEMENTS_PER_WARP, 1),
    )
