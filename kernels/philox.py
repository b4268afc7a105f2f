"""Philox-4x32-10, normals and the order bijection as Triton device functions.

``erd_fast/random.py`` is the definition and says what the numbers mean; here is the same arithmetic, to be
called from kernels. Words and orders are equal to it bit for bit. Normals agree to 2e-6: coefficients and
evaluation order are the same, each ``tl.fma`` is one instruction with one rounding on a GPU (Triton's
interpreter rounds twice), and every other product that meets a sum is by a power of two, so contraction by
the compiler changes nothing.

Words are uint32 blocks or scalars. Sums and products that wrap on purpose are written ``tl.add``, ``tl.sub``
and ``tl.mul`` with ``sanitize_overflow=False``, else Triton's debug mode would stop at them.
"""

import math

import triton
import triton.language as tl

# The constants of random.py, which a kernel file may not import; a test holds the two equal.
PHILOX_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
PHILOX_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
PHILOX_KEY_STEP_0 = tl.constexpr(0x9E3779B9)
PHILOX_KEY_STEP_1 = tl.constexpr(0xBB67AE85)
PHILOX_ROUNDS = tl.constexpr(10)
LOG = tl.constexpr((0.3333333134651184, -0.2500081956386566, 0.20001226663589478, -0.16623356938362122,
                    0.14201757311820984, -0.13160181045532227, 0.1276157796382904,
                    -0.07634502649307251))  # fmt: skip
SIN = tl.constexpr((3.1415927410125732, -5.167707920074463, 2.549767255783081, -0.5890786647796631))
COS = tl.constexpr((1.0, -4.934802055358887, 4.058707237243652, -1.3350446224212646,
                    0.23132970929145813))  # fmt: skip
LN2 = tl.constexpr(0.693147182464599609375)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
ORDER_ROUNDS = tl.constexpr(12)
ORDER_PURPOSE_STREAM = tl.constexpr(5 << 8 | 0)  # Purpose.ORDER, Stream.SCALARS
SMALLEST_SIDE = 8


@triton.jit
def philox_4x32(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10: four words from a counter of four and a key of two, all uint32, broadcast together."""
    tl.static_assert(c0.dtype == tl.uint32 and c1.dtype == tl.uint32, "c0, c1: not uint32")
    tl.static_assert(c2.dtype == tl.uint32 and c3.dtype == tl.uint32, "c2, c3: not uint32")
    tl.static_assert(k0.dtype == tl.uint32 and k1.dtype == tl.uint32, "k0, k1: not uint32")
    for _ in tl.static_range(PHILOX_ROUNDS):
        high0 = tl.umulhi(c0, PHILOX_MULTIPLIER_0)
        high1 = tl.umulhi(c2, PHILOX_MULTIPLIER_1)
        low0 = tl.mul(c0, PHILOX_MULTIPLIER_0, sanitize_overflow=False)
        low1 = tl.mul(c2, PHILOX_MULTIPLIER_1, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, PHILOX_KEY_STEP_0, sanitize_overflow=False)
        k1 = tl.add(k1, PHILOX_KEY_STEP_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def key_words(seed):
    """Low and high uint32 word of a 64-bit seed, given as the int64 of the same bits."""
    seed = tl.cast(seed, tl.int64)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def words(k0, k1, purpose_stream, g, block):
    """The four words of image ``g`` (>= 0) at element block ``block``: elements 4 * block ... 4 * block + 3.

    ``k0``, ``k1`` are the low and high word of the seed, ``purpose_stream`` is ``purpose << 8 | stream``; any
    integer types, blocks or scalars.
    """
    g = tl.cast(g, tl.int64)
    return philox_4x32(
        tl.cast(block, tl.uint32),
        tl.cast(purpose_stream, tl.uint32),
        g.to(tl.uint32),
        (g >> 32).to(tl.uint32),
        tl.cast(k0, tl.uint32),
        tl.cast(k1, tl.uint32),
    )


@triton.jit
def unit_interval(word):
    """(word + 1/2) * 2**-32 in float32, rounded once: in [2**-33, 1], never zero."""
    return word.to(tl.float32) * 2.0**-32 + 2.0**-33


@triton.jit
def bounded(word, limit):
    """Uniform integer in [0, limit) from a word: ``(word * limit) >> 32``, uint32."""
    return tl.umulhi(word, tl.cast(limit, tl.uint32))


@triton.jit
def box_muller(w0, w1):
    """Two standard normals from two words: r(w0) cos 2*pi*w1*2**-32 and r(w0) sin(same), r as in random.py.

    |n| <= 6.77, never infinite.
    """
    # sqrt_rn: tl.sqrt is the approximate instruction on a GPU.
    radius = tl.sqrt_rn(-2.0 * _log(unit_interval(w0)))
    cosine, sine = _cos_sin_turn(w1)
    return radius * cosine, radius * sine


@triton.jit
def box_muller_4(w0, w1, w2, w3):
    """Four standard normals from four words, as the elements of a Philox block take them."""
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def interleave_4(x0, x1, x2, x3):
    """(4 * Q,) from four (Q,) blocks: element 4 * q + i is ``xi[q]``."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (4 * x0.shape[0],))


@triton.jit
def _log(u):
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    tail = tl.fma(square * f, _polynomial(LOG, 7, f), square * -0.5)
    return tl.fma(exponent.to(tl.float32), LN2, f + tail)


@triton.jit
def _cos_sin_turn(word):
    # Modulo 2**32, so the fifth quarter of random.py (the last eighth turn, rounded up) is the first: the
    # same signs.
    quarter = tl.add(word, 1 << 29, sanitize_overflow=False) >> 30
    rest = tl.sub(word, quarter << 30, sanitize_overflow=False).to(tl.int32, bitcast=True)
    y = rest.to(tl.float32) * 2.0**-31
    square = y * y
    s = y * _polynomial(SIN, 3, square)
    c = _polynomial(COS, 4, square)
    swap = (quarter & 1) == 1
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -cosine, cosine), tl.where((quarter & 2) == 2, -sine, sine)


@triton.jit
def _polynomial(coefficients: tl.constexpr, degree: tl.constexpr, x):
    # The degree is an argument because the interpreter knows no len() of a constexpr tuple.
    total = coefficients[degree]
    for i in tl.static_range(degree - 1, -1, -1):
        total = tl.fma(total, x, coefficients[i])
    return total


def order_side(dataset_size: int) -> int:
    """The ``side`` of :func:`sample_order`, on the host: max(ceil(sqrt(n)), 8)."""
    return max(math.isqrt(dataset_size - 1) + 1, SMALLEST_SIDE)


@triton.jit
def sample_order(k0, k1, g, dataset_size, side):
    """Which sample each image ``g`` of the training sequence shows: int64 in [0, dataset_size).

    A block walks until its last lane lands inside the data set, so lanes that are masked off need a valid
    ``g`` too: load them with ``other=0``.

    Args:
        k0, k1: low and high word of the seed.
        g: int64, >= 0, a block or a scalar.
        dataset_size: n, 1 <= n <= 2**32.
        side: ``order_side(n)``.
    """
    n = tl.cast(dataset_size, tl.int64)
    g = tl.cast(g, tl.int64)
    keys = _round_keys(k0, k1, ORDER_PURPOSE_STREAM, g // n, 0)
    return _bijection(g % n, keys, n, side)


@triton.jit
def stratum(k0, k1, purpose_stream, g, strata, side):
    """Which of ``strata`` equal parts of the unit interval each image ``g`` takes: int64 in [0, strata).

    As :func:`sample_order`, with the batch ``g // strata`` for the epoch and round keys from blocks 1, 2, 3 of
    ``purpose_stream``; ``side`` is ``order_side(strata)``.
    """
    n = tl.cast(strata, tl.int64)
    g = tl.cast(g, tl.int64)
    keys = _round_keys(k0, k1, purpose_stream, g // n, 1)
    return _bijection(g % n, keys, n, side)


@triton.jit
def stratified_word(word, part, strata):
    """A word within its stratum: (part * 2**32 + word) // strata, uint32, for strata <= 2**31."""
    return (((part << 32) + word.to(tl.int64)) // tl.cast(strata, tl.int64)).to(tl.uint32)


@triton.jit
def _round_keys(k0, k1, purpose_stream, g, FIRST_BLOCK: tl.constexpr):
    # Three blocks of four words: ORDER_ROUNDS keys.
    return (
        words(k0, k1, purpose_stream, g, FIRST_BLOCK)
        + words(k0, k1, purpose_stream, g, FIRST_BLOCK + 1)
        + words(k0, k1, purpose_stream, g, FIRST_BLOCK + 2)
    )


@triton.jit
def _bijection(index, keys, size, side):
    side = tl.cast(side, tl.uint32)
    last = (size - 1).to(tl.uint32)  # size itself may be 2**32
    index = _feistel(index.to(tl.uint32), keys, side)
    outside = index > last
    while _any(outside):
        index = tl.where(outside, _feistel(index, keys, side), index)
        outside = index > last
    return index.to(tl.int64)


@triton.jit
def _feistel(index, keys, side):
    left = index // side
    right = index % side
    for i in tl.static_range(ORDER_ROUNDS):
        # left < side and bounded(...) < side <= 2**16: no wrap, and one subtraction is the remainder.
        moved = left + bounded(_mix(right ^ keys[i]), side)
        left, right = right, tl.where(moved >= side, moved - side, moved)
    return left * side + right


@triton.jit
def _mix(h):
    h = tl.mul(h ^ (h >> 16), 0x85EBCA6B, sanitize_overflow=False)
    h = tl.mul(h ^ (h >> 13), 0xC2B2AE35, sanitize_overflow=False)
    return h ^ (h >> 16)


@triton.jit
def _any(flag):
    if flag.type.is_block():
        return tl.max(flag.to(tl.int32)) > 0
    else:
        return flag
