/*
Philox-4x32-10, normals and the order bijection, for CUDA C++ and C++.

erd_fast/random.py is the definition and says what the numbers mean; here is the same arithmetic, one element
at a time. Words and orders are equal to it bit for bit. Normals agree to 2e-6 absolute: coefficients and
evaluation order are the same, fmaf rounds once everywhere, and every other product that meets a sum is by a
power of two, so it makes no difference whether the compiler contracts. What would make one is fast math
(approximate sqrtf, reordered sums): do not build with it.

A kernel does, for element block b of image g:

    Words w = words(k0, k1, TRAIN << 8 | NOISE, g, b);
    Normals n = box_muller(w.w0, w.w1);               // elements 4b and 4b + 1
    Normals m = box_muller(w.w2, w.w3);               // elements 4b + 2 and 4b + 3
*/
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace erd_fast {

// What the numbers are for, and the independent sequences of an image: together the counter's second word.
enum Purpose : uint32_t { TRAIN = 0, EVAL = 1, SAMPLE = 2, ENCODE = 3, INIT = 4, ORDER = 5, LAB = 6 };
enum Stream : uint32_t { SCALARS = 0, POSTERIOR = 1, NOISE = 2 };

struct Words {
    uint32_t w0, w1, w2, w3;
};

struct Normals {
    float n0, n1;
};

// ----------------------------------------------------------------------------
// words

ERD_FAST_HD inline uint32_t multiply_high(uint32_t a, uint32_t b) {
    return (uint32_t)(((uint64_t)a * b) >> 32);
}

// Ten rounds (Salmon et al., SC 2011): two 32 x 32 -> 64 bit products, their halves exchanged and keyed.
ERD_FAST_HD inline Words philox_4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                     uint32_t k1) {
    constexpr uint32_t PHILOX_MULTIPLIER_0 = 0xD2511F53, PHILOX_MULTIPLIER_1 = 0xCD9E8D57;
    constexpr uint32_t PHILOX_KEY_STEP_0 = 0x9E3779B9, PHILOX_KEY_STEP_1 = 0xBB67AE85;
    constexpr int PHILOX_ROUNDS = 10;
    ERD_FAST_UNROLL
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        uint64_t product0 = (uint64_t)c0 * PHILOX_MULTIPLIER_0, product1 = (uint64_t)c2 * PHILOX_MULTIPLIER_1;
        c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)product1;
        c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)product0;
        k0 += PHILOX_KEY_STEP_0;
        k1 += PHILOX_KEY_STEP_1;
    }
    return {c0, c1, c2, c3};
}

// The four words of image g (>= 0) at an element block; k0 and k1 are the low and high word of the seed.
ERD_FAST_HD inline Words words(uint32_t k0, uint32_t k1, uint32_t purpose_stream, int64_t g, uint32_t block) {
    return philox_4x32(block, purpose_stream, (uint32_t)g, (uint32_t)((uint64_t)g >> 32), k0, k1);
}

// (word + 1/2) * 2^-32, rounded once: in [2^-33, 1], never zero.
ERD_FAST_HD inline float unit_interval(uint32_t word) {
    return (float)word * 0x1p-32f + 0x1p-33f;
}

// Uniform integer in [0, limit) from a word.
ERD_FAST_HD inline uint32_t bounded(uint32_t word, uint32_t limit) {
    return multiply_high(word, limit);
}

// ----------------------------------------------------------------------------
// normals

// Horner, lowest power first. The arrays are local to their functions, because device code may not index a
// constexpr array of namespace scope; unrolled, the coefficients become immediates.
template <int N>
ERD_FAST_HD inline float polynomial(const float (&coefficients)[N], float x) {
    float total = coefficients[N - 1];
    ERD_FAST_UNROLL
    for (int i = N - 2; i >= 0; i--) {
        total = fmaf(total, x, coefficients[i]);
    }
    return total;
}

// Natural logarithm of u > 0: split u = 2^e m with m in [sqrt(1/2), sqrt(2)), then a polynomial in f = m - 1.
ERD_FAST_HD inline float log_of(float u) {
    constexpr float LOG[] = {0.3333333134651184f,   -0.2500081956386566f, 0.20001226663589478f,
                             -0.16623356938362122f, 0.14201757311820984f, -0.13160181045532227f,
                             0.1276157796382904f,   -0.07634502649307251f};
    constexpr float LN2 = 0.693147182464599609375f;
    constexpr int32_t SQRT_HALF_BITS = 0x3F3504F3;
    int32_t bits;
    memcpy(&bits, &u, sizeof bits);
    int32_t exponent = (bits - SQRT_HALF_BITS) >> 23;
    bits -= exponent * (1 << 23);  // a shift of a negative exponent is undefined before C++20
    float m;
    memcpy(&m, &bits, sizeof m);
    float f = m - 1.0f;
    float square = f * f;
    float tail = fmaf(square * f, polynomial(LOG, f), square * -0.5f);
    return fmaf((float)exponent, LN2, f + tail);
}

// Cosine and sine of 2 pi word 2^-32: the nearest quarter turn is split off in integers, which loses nothing.
ERD_FAST_HD inline void cos_sin_turn(uint32_t word, float* cosine, float* sine) {
    constexpr float SIN[] = {3.1415927410125732f, -5.167707920074463f, 2.549767255783081f,
                             -0.5890786647796631f};
    constexpr float COS[] = {1.0f, -4.934802055358887f, 4.058707237243652f, -1.3350446224212646f,
                             0.23132970929145813f};
    uint32_t quarter = (word + (1u << 29)) >> 30;  // modulo 4: the last eighth turn joins the first
    float y = (float)(int32_t)(word - (quarter << 30)) * 0x1p-31f;
    float square = y * y;
    float s = y * polynomial(SIN, square);
    float c = polynomial(COS, square);
    bool swap = quarter & 1;
    *cosine = swap ? s : c;
    *sine = swap ? c : s;
    if ((quarter + 1) & 2) *cosine = -*cosine;
    if (quarter & 2) *sine = -*sine;
}

// Two standard normals from two words. |n| <= 6.77, never infinite.
ERD_FAST_HD inline Normals box_muller(uint32_t w0, uint32_t w1) {
    float radius = sqrtf(-2.0f * log_of(unit_interval(w0)));
    float cosine, sine;
    cos_sin_turn(w1, &cosine, &sine);
    return {radius * cosine, radius * sine};
}

// ----------------------------------------------------------------------------
// order

constexpr int ORDER_ROUNDS = 12;

// max(ceil(sqrt(n)), 8) for 1 <= n <= 2^32, for the host: once a launch, not once a thread.
inline uint32_t order_side(int64_t dataset_size) {
    constexpr uint32_t SMALLEST_SIDE = 8;
    uint32_t side = (uint32_t)std::sqrt((double)(dataset_size - 1)) + 1;  // exact below 2^52
    return side < SMALLEST_SIDE ? SMALLEST_SIDE : side;
}

// The 32-bit finalizer of MurmurHash3 (public domain).
ERD_FAST_HD inline uint32_t mix(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x85EBCA6B;
    h = (h ^ (h >> 13)) * 0xC2B2AE35;
    return h ^ (h >> 16);
}

ERD_FAST_HD inline uint32_t feistel(uint32_t index, const uint32_t (&keys)[ORDER_ROUNDS], uint32_t side) {
    uint32_t left = index / side, right = index % side;
    ERD_FAST_UNROLL
    for (int round = 0; round < ORDER_ROUNDS; round++) {
        // left < side and bounded(...) < side <= 2^16: no wrap, and one subtraction is the remainder.
        uint32_t moved = left + bounded(mix(right ^ keys[round]), side);
        left = right;
        right = moved >= side ? moved - side : moved;
    }
    return left * side + right;
}

// The keys of a network: words of g at blocks first_block, first_block + 1, first_block + 2.
ERD_FAST_HD inline void round_keys(uint32_t k0, uint32_t k1, uint32_t purpose_stream, int64_t g, uint32_t first_block,
                                   uint32_t (&keys)[ORDER_ROUNDS]) {
    ERD_FAST_UNROLL
    for (int block = 0; block < ORDER_ROUNDS / 4; block++) {
        Words w = words(k0, k1, purpose_stream, g, first_block + block);
        keys[4 * block] = w.w0;
        keys[4 * block + 1] = w.w1;
        keys[4 * block + 2] = w.w2;
        keys[4 * block + 3] = w.w3;
    }
}

// A permutation of [0, size), last = size - 1 (size itself may be 2^32): the network, walked until it lands inside.
ERD_FAST_HD inline uint32_t bijection(uint32_t index, const uint32_t (&keys)[ORDER_ROUNDS], uint32_t last,
                                      uint32_t side) {
    do {
        index = feistel(index, keys, side);
    } while (index > last);
    return index;
}

// Which sample image g (>= 0) of the training sequence shows: in [0, dataset_size), dataset_size 1 to 2^32.
// The position in the epoch goes through a bijection keyed by (seed, epoch); side = order_side(dataset_size).
ERD_FAST_HD inline int64_t sample_order(uint32_t k0, uint32_t k1, int64_t g, int64_t dataset_size,
                                        uint32_t side) {
    uint32_t keys[ORDER_ROUNDS];
    round_keys(k0, k1, ORDER << 8 | SCALARS, g / dataset_size, 0, keys);
    return bijection((uint32_t)(g % dataset_size), keys, (uint32_t)(dataset_size - 1), side);
}

// Which of `strata` (1 to 2^31) equal parts of the words' range image g (>= 0) takes: the images of one g / strata take
// each part once. side = order_side(strata); purpose_stream = purpose << 8 | SCALARS, whose block 0 is the image's own.
ERD_FAST_HD inline uint32_t stratum(uint32_t k0, uint32_t k1, uint32_t purpose_stream, int64_t g, int64_t strata,
                                    uint32_t side) {
    uint32_t keys[ORDER_ROUNDS];
    round_keys(k0, k1, purpose_stream, g / strata, 1, keys);
    return bijection((uint32_t)(g % strata), keys, (uint32_t)(strata - 1), side);
}

// The word within its part: (part * 2^32 + word) / strata.
ERD_FAST_HD inline uint32_t stratified_word(uint32_t word, uint32_t part, int64_t strata) {
    return (uint32_t)(((uint64_t)part << 32 | word) / (uint64_t)strata);
}

}  // namespace erd_fast
