"""Randomness as a pure function: Philox-4x32-10, normals and the order bijection, in PyTorch.

Every random number of the engine is ``f(seed, purpose, stream, g, element)``: no generator object, no state to save,
and the same value whatever the batch split, world size, device or backend (docs/design.md, "Randomness"). This file
is the definition; ``kernels/philox.py`` and ``csrc/philox.h`` hold the same arithmetic for Triton, CUDA C++ and C++.

Layout of one Philox call::

    key     = seed (64 bit: low word, high word)
    counter = (element block, purpose << 8 | stream, g low, g high)

``g`` counts images since the start of training (or names the image to sample, the epoch to order, the parameter to
initialise). One call gives four 32-bit words: elements ``4 * block ... 4 * block + 3`` of (C, H, W) flattened.

Words are int64 tensors with values in [0, 2**32): PyTorch has no full set of uint32 operations, and int64 products that
wrap modulo 2**64 still hold the right low and high words.
"""

import enum
import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10


class Purpose(enum.IntEnum):
    """What the numbers are for. Purposes never share a counter, so evaluation cannot disturb training."""

    TRAIN = 0
    EVAL = 1
    SAMPLE = 2
    ENCODE = 3
    INIT = 4
    ORDER = 5
    LAB = 6


class Stream(enum.IntEnum):
    """Independent sequences of one image: integer decisions, VAE posterior noise, diffusion noise."""

    SCALARS = 0
    POSTERIOR = 1
    NOISE = 2


def philox_4x32(counter: Tensor, key: tuple[int, int] | Tensor) -> Tensor:
    """Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: (..., 4) int64, each in [0, 2**32).
        key: two words in [0, 2**32), as numbers or as (..., 2) int64 that broadcasts against ``counter``.

    Returns:
        (..., 4) int64 words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1) if isinstance(key, Tensor) else key
    for _ in range(_PHILOX_ROUNDS):
        product0 = c0 * _PHILOX_MULTIPLIERS[0]
        product1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            _high_word(product1) ^ c1 ^ k0,
            product1 & _WORD,
            _high_word(product0) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def words(seed: int, purpose: Purpose, stream: Stream, g: Tensor, blocks: Tensor) -> Tensor:
    """Philox words of images ``g`` at element blocks ``blocks``.

    Args:
        seed: 64-bit key, 0 <= seed < 2**64.
        g: (N,) int64, >= 0.
        blocks: (B,) int64 in [0, 2**32).

    Returns:
        (N, B, 4) int64 words in [0, 2**32).
    """
    seed = check_seed(seed)
    count, size = g.shape[0], blocks.shape[0]
    counter = torch.stack(
        (
            blocks.expand(count, size),
            torch.full((count, size), int(purpose) << 8 | int(stream), dtype=torch.int64, device=g.device),
            (g & _WORD)[:, None].expand(count, size),
            _high_word(g)[:, None].expand(count, size),
        ),
        dim=-1,
    )
    return philox_4x32(counter, (seed & _WORD, seed >> 32))


def normals(seed: int, purpose: Purpose, stream: Stream, g: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normals for each image of ``g``: (N, \\*shape) float32, by :func:`box_muller` of :func:`words`.

    Element ``e`` of the flattened ``shape`` depends on (seed, purpose, stream, g, e) alone.
    """
    size = math.prod(shape)
    blocks = torch.arange(-(-size // 4), dtype=torch.int64, device=g.device)
    return box_muller(words(seed, purpose, stream, g, blocks)).flatten(1)[:, :size].reshape(-1, *shape)


def unit_interval(word: Tensor) -> Tensor:
    """u = (word + 1/2) * 2**-32 in float32, the word and then the sum rounded: in [2**-33, 1], never zero."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def bounded(word: Tensor, limit: int) -> Tensor:
    """Uniform integer in [0, limit) from a word: ``(word * limit) >> 32`` for limit <= 2**31."""
    return (word * limit) >> 32


def box_muller(word: Tensor) -> Tensor:
    """Standard normals from words, four from four: (..., 4) int64 -> (..., 4) float32.

    ``n0 = r(w0) cos 2*pi*w1*2**-32``, ``n1 = r(w0) sin(same)``, and the same of (w2, w3), with
    ``r(w) = sqrt(-2 log((w + 1/2) * 2**-32))``. |n| <= 6.77, never infinite. float32 fused multiply-adds on fixed
    coefficients, so that backends agree to 2e-6 absolute.
    """
    # Through float64, as torch.sqrt of float32 is not correctly rounded on every CPU.
    radius = torch.sqrt((-2.0 * _log(unit_interval(word[..., 0::2]))).double()).float()
    cosine, sine = _cos_sin_turn(word[..., 1::2])
    return torch.stack((radius * cosine, radius * sine), dim=-1).flatten(-2)


# Minimax coefficients (weighted Remez exchange in 40 digits, rounded to float32), lowest power first.
# log(1 + f) = f - f^2/2 + f^3 * LOG(f) on [sqrt(1/2) - 1, sqrt(2) - 1], relative error 6e-9.
LOG = (0.3333333134651184, -0.2500081956386566, 0.20001226663589478, -0.16623356938362122, 0.14201757311820984,
       -0.13160181045532227, 0.1276157796382904, -0.07634502649307251)  # fmt: skip
# sin(pi y) = y * SIN(y^2) and cos(pi y) = COS(y^2) on |y| <= 1/4, absolute errors 3e-9 and 5e-11.
SIN = (3.1415927410125732, -5.167707920074463, 2.549767255783081, -0.5890786647796631)
COS = (1.0, -4.934802055358887, 4.058707237243652, -1.3350446224212646, 0.23132970929145813)
_LN2 = 0.693147182464599609375  # float32(ln 2)
_SQRT_HALF_BITS = 0x3F3504F3  # the float32 sqrt(1/2)


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of float32 ``u`` > 0: split u = 2**e * m with m in [sqrt(1/2), sqrt(2)), then a polynomial."""
    bits = u.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    square = f * f
    tail = _fma(square * f, _polynomial(LOG, f), square * -0.5)
    return _fma(exponent.to(torch.float32), _LN2, f + tail)


def _cos_sin_turn(word: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of 2*pi*word*2**-32: the nearest quarter turn is split off in integers, so no accuracy is lost."""
    quarter = (word + (1 << 29)) >> 30
    y = (word - (quarter << 30)).to(torch.float32) * 2.0**-31
    square = y * y
    sine, cosine = y * _polynomial(SIN, square), _polynomial(COS, square)
    swap = (quarter & 1) == 1
    cosine, sine = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    negative_cosine = ((quarter + 1) & 2) == 2
    negative_sine = (quarter & 2) == 2
    return torch.where(negative_cosine, -cosine, cosine), torch.where(negative_sine, -sine, sine)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = _fma(total, x, coefficient)
    return total


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """float32 a * b + c as an fma gives it, but for rare ties: the float64 product is exact, its sum is not."""
    b64 = b.double() if isinstance(b, Tensor) else b
    c64 = c.double() if isinstance(c, Tensor) else c
    return (a.double() * b64 + c64).float()


ORDER_ROUNDS = 12
_SMALLEST_SIDE = 8  # on fewer than 64 pairs a Feistel network reaches too few permutations (side 3: the even ones only)


def sample_order(seed: int, g: Tensor, dataset_size: int) -> Tensor:
    """Which sample each image of the training sequence shows: every sample once an epoch, in a new order each epoch.

    ``epoch = g // n``, ``position = g % n``; the position goes through a bijection of [0, n) keyed by (seed, epoch): a
    12-round Feistel network on pairs modulo ``a = max(ceil(sqrt(n)), 8)``, walked until it lands below n. No table,
    so training can start anywhere at no cost, and a batch may straddle epochs.

    Args:
        g: (N,) int64 image numbers, >= 0.
        dataset_size: n, 1 <= n <= 2**32.

    Returns:
        (N,) int64 in [0, n).
    """
    if not 1 <= dataset_size <= 1 << 32:
        raise ValueError(f"dataset_size: given {dataset_size}, allowed 1 to 2**32")
    epoch, position = g // dataset_size, g % dataset_size
    return _bijection(position, _round_keys(seed, Purpose.ORDER, epoch, first_block=0), dataset_size)


def stratum(seed: int, purpose: Purpose, g: Tensor, strata: int) -> Tensor:
    """Which of ``strata`` equal parts of the unit interval each image takes: every part once in a batch.

    A batch is ``strata`` images: ``batch = g // strata``; the position ``g % strata`` goes through the bijection of
    :func:`sample_order`, with round keys from blocks 1, 2, 3 of the ``SCALARS`` stream of ``batch`` (block 0 is an
    image's own).

    Returns:
        (N,) int64 in [0, strata).
    """
    keys = _round_keys(seed, purpose, g // strata, first_block=1)
    return _bijection(g % strata, keys, strata)


def stratified_word(word: Tensor, part: Tensor, strata: int) -> Tensor:
    """A word within its stratum: (part * 2**32 + word) // strata, in [0, 2**32), for strata <= 2**31."""
    return ((part << 32) + word) // strata


def _round_keys(seed: int, purpose: Purpose, g: Tensor, first_block: int) -> tuple[Tensor, ...]:
    blocks = first_block + torch.arange(-(-ORDER_ROUNDS // 4), dtype=torch.int64, device=g.device)
    return words(seed, purpose, Stream.SCALARS, g, blocks).flatten(1)[:, :ORDER_ROUNDS].unbind(1)


def _bijection(index: Tensor, keys: tuple[Tensor, ...], size: int) -> Tensor:
    """A permutation of [0, size): Feistel rounds on pairs, walked until the result is below ``size``."""
    side = max(math.isqrt(size - 1) + 1, _SMALLEST_SIDE)
    index = _feistel(index, keys, side)
    while (outside := index >= size).any():
        index = torch.where(outside, _feistel(index, keys, side), index)
    return index


def _feistel(index: Tensor, keys: tuple[Tensor, ...], side: int) -> Tensor:
    left, right = index // side, index % side
    for key in keys:
        left, right = right, (left + bounded(_mix(right ^ key), side)) % side
    return left * side + right


def _mix(h: Tensor) -> Tensor:
    """The 32-bit finalizer of MurmurHash3 (public domain): every input bit reaches every output bit."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _WORD
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _WORD
    return h ^ (h >> 16)


def signed_seed(seed: int) -> int:
    """The 64 bits of a seed as the signed number that ops carry."""
    return check_seed(seed) - (seed >> 63 << 64)


def unsigned_seed(bits: int) -> int:
    """The inverse of :func:`signed_seed`."""
    return bits % (1 << 64)


def check_seed(seed: int) -> int:
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: given {seed}, allowed 0 to 2**64 - 1")
    return seed


def _high_word(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD
