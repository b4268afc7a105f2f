/*
What the CPU twins share: one body for several instruction sets, number formats, sums by lanes, and patch tokens.

A twin is written once, as loops over short runs of memory that the compiler turns into vector code, and compiled for
each instruction set by ERD_FAST_VARIANTS: the function named is made three times, everything it calls inlined. (Whole
files built with -mavx512f would not do: inline functions of the headers exist once in a library, and the linker could
keep the copy that an older CPU cannot run.) The arithmetic is elementwise, never contracted and never reordered, so
the variants give equal bits.
*/
#pragma once

#include <cstdint>
#include <cstring>

#include "launchers.h"

// Parts of a body must be inlined into every variant, or they would be built once, for the plainest CPU.
#if defined(__GNUC__)
#define ERD_FAST_PART static inline __attribute__((always_inline))
#else
#define ERD_FAST_PART static inline
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#define ERD_FAST_WIDE "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#define ERD_FAST_WIDE "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"
#endif
// name(a, ...) becomes the variant of cpu_level() of body(a, ...).
#define ERD_FAST_VARIANTS(name, body, parameters, arguments)                                    \
    __attribute__((flatten)) static void name##_baseline parameters { body arguments; }         \
    __attribute__((target("avx2,fma"), flatten)) static void name##_avx2 parameters {           \
        body arguments;                                                                         \
    }                                                                                           \
    __attribute__((target(ERD_FAST_WIDE), flatten)) static void name##_avx512 parameters {      \
        body arguments;                                                                         \
    }                                                                                           \
    static void name parameters {                                                               \
        int level = cpu_level();                                                                \
        if (level == AVX512) {                                                                  \
            name##_avx512 arguments;                                                            \
        } else if (level == AVX2) {                                                             \
            name##_avx2 arguments;                                                              \
        } else {                                                                                \
            name##_baseline arguments;                                                          \
        }                                                                                       \
    }
#else
#define ERD_FAST_VARIANTS(name, body, parameters, arguments) \
    static void name parameters { body arguments; }
#endif

namespace erd_fast {

// ----------------------------------------------------------------------------
// number formats, in integer arithmetic that vectorises; rounding to nearest, ties to even

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

ERD_FAST_PART uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

ERD_FAST_PART float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

ERD_FAST_PART float widen(float value) { return value; }

ERD_FAST_PART float widen(uint8_t value) { return (float)value; }

ERD_FAST_PART float widen(BFloat16 value) { return float_of((uint32_t)value.bits << 16); }

// The exponent's bias is changed by a product, which also makes subnormals normal.
ERD_FAST_PART float widen(Float16 value) {
    uint32_t magnitude = (uint32_t)(value.bits & 0x7FFF) << 13, sign = (uint32_t)(value.bits & 0x8000) << 16;
    uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7F800000;  // infinity and NaN
    return float_of((magnitude >= 0x0F800000 ? special : finite) | sign);
}

ERD_FAST_PART void narrow(float value, float* out) { *out = value; }

ERD_FAST_PART void narrow(float value, BFloat16* out) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    out->bits = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

ERD_FAST_PART void narrow(float value, Float16* out) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    // Below 2^-14 a sum with 1/2 leaves the rounded subnormal in the low bits.
    uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    uint32_t large = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;  // from 65520, which rounds to 2^16: infinity
    uint32_t finite = magnitude < 0x38800000 ? small : normal;
    out->bits = (uint16_t)((magnitude >= 0x477FF000 ? large : finite) | sign);
}

// ----------------------------------------------------------------------------
// sums

// What the lanes of a sum hold, pairwise: in the same order on every instruction set.
template <int LANES>
ERD_FAST_PART float sum_of(float (&lanes)[LANES]) {
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

// ----------------------------------------------------------------------------
// patch tokens: see Tokens in diffusion_math.h

// Calls body(pixel, token): the place in the (H, W) plane and the offset in the tokens of each pixel, token by token.
template <typename Body>
ERD_FAST_PART void each_pixel(int64_t token_channels, int64_t height, int64_t width, int64_t patch, Body body) {
    int64_t token = 0;
    for (int64_t top = 0; top < height; top += patch) {
        for (int64_t left = 0; left < width; left += patch) {
            for (int64_t y = top; y < top + patch; y++) {
                for (int64_t x = left; x < left + patch; x++, token += token_channels) body(y * width + x, token);
            }
        }
    }
}

// (C, H, W) to tokens of `token_channels` channels; those beyond C are 0 (of all types that are stored: bits 0).
template <typename T>
ERD_FAST_PART void write_tokens(const T* __restrict image, int64_t channels, int64_t token_channels, int64_t height,
                                int64_t width, int64_t patch, T* __restrict tokens) {
    int64_t plane = height * width;
    if (channels == 4 && token_channels == 4) {
        each_pixel(4, height, width, patch, [=](int64_t pixel, int64_t token) {
            for (int c = 0; c < 4; c++) tokens[token + c] = image[c * plane + pixel];
        });
    } else {
        each_pixel(token_channels, height, width, patch, [=](int64_t pixel, int64_t token) {
            for (int64_t c = 0; c < channels; c++) tokens[token + c] = image[c * plane + pixel];
            for (int64_t c = channels; c < token_channels; c++) tokens[token + c] = T{};
        });
    }
}

// The inverse: the first `channels` channels of tokens to (C, H, W).
template <typename T>
ERD_FAST_PART void read_tokens(const T* __restrict tokens, int64_t channels, int64_t token_channels, int64_t height,
                               int64_t width, int64_t patch, T* __restrict image) {
    int64_t plane = height * width;
    if (channels == 4 && token_channels == 4) {
        each_pixel(4, height, width, patch, [=](int64_t pixel, int64_t token) {
            for (int c = 0; c < 4; c++) image[c * plane + pixel] = tokens[token + c];
        });
    } else {
        each_pixel(token_channels, height, width, patch, [=](int64_t pixel, int64_t token) {
            for (int64_t c = 0; c < channels; c++) image[c * plane + pixel] = tokens[token + c];
        });
    }
}

}  // namespace erd_fast
