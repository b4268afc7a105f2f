/*
The mathematics of q_sample and diffusion_loss, one element at a time, for the CUDA kernels and their CPU twins.

erd_fast/ops/q_sample.py and erd_fast/ops/diffusion_loss.py are the definitions; products and sums below come in their
order, each rounded to float32. That holds only where the compiler does not contract a product and a sum into an fma:
setup.py builds with -ffp-contract=off (g++) and -fmad=false (nvcc), so that CPU, GPU and the definition agree. The one
function of another form is exp_of: within 1 unit in the last place of the true exponential, as torch.exp is, but not
always the same one.

Also here, since both sides need them: the place of an element in patch tokens, and division by numbers that only the
launch knows.
*/
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace erd_fast {

// ----------------------------------------------------------------------------
// q_sample

// What a store holds: ready samples; VAE mean and std; VAE mean and log-variance; uint8 pixels.
enum Kind : int { SAMPLE_KIND = 0, MEAN_STD = 1, MEAN_LOGVAR = 2, PIXELS = 3 };

// One row of the schedule: x_t = alpha x0 + sigma eps, target = c_x x0 + c_eps eps.
struct Coefficients {
    float alpha, sigma, c_x, c_eps;
};

// exp(x) for |x| <= 80: x = k ln 2 + r, a polynomial of r in [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients), times 2^k.
// A NaN stays one: k is then arbitrary, the polynomial NaN.
ERD_FAST_HD inline float exp_of(float x) {
    constexpr float EXP[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                             8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
    constexpr float LOG2_E = 1.44269504088896341f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
    float shifted = fmaf(x, LOG2_E, TO_INTEGER);
    uint32_t bits, base;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&base, &TO_INTEGER, sizeof base);
    float k = shifted - TO_INTEGER;
    float r = fmaf(k, -LN2_LOW, fmaf(k, -LN2_HIGH, x));
    float mantissa = fmaf(polynomial(EXP, r), r * r, r) + 1.0f;
    uint32_t power_bits = (bits - base + 127) << 23;
    float power;
    memcpy(&power, &power_bits, sizeof power);
    return mantissa * power;
}

// exp(clamp(logvar, -30, 20) / 2), the clamp of the LDM autoencoder. Comparisons as written let NaN through.
ERD_FAST_HD inline float std_of_logvar(float logvar) {
    float low = logvar < -30.0f ? -30.0f : logvar;
    float clamped = low > 20.0f ? 20.0f : low;
    return exp_of(0.5f * clamped);
}

ERD_FAST_HD inline float of_pixel(float pixel) {
    return (2.0f * pixel - 255.0f) / 255.0f;
}

// z = mean + std n
ERD_FAST_HD inline float posterior_sample(float mean, float std, float normal) {
    return mean + std * normal;
}

// x0 = (z - shift) * scale; without a shift it is 0, without a scale 1, which change no bit but a NaN's payload.
ERD_FAST_HD inline float normalized(float z, float shift, float scale) {
    return (z - shift) * scale;
}

// alpha x0 + sigma eps and c_x x0 + c_eps eps
ERD_FAST_HD inline float combined(float a, float x_start, float b, float eps) {
    return a * x_start + b * eps;
}

// ----------------------------------------------------------------------------
// diffusion_loss

// dL/dprediction = slope * (prediction - target), slope = 2 w / (B C H W) * loss_scale.
ERD_FAST_HD inline float gradient_slope(float weight, int64_t batch_size, int64_t size, float loss_scale) {
    return 2.0f * weight / ((float)batch_size * (float)size) * loss_scale;
}

// Which of num_bins equal parts of the grid timestep t in [0, steps) lies in; num_bins and steps up to 2^31.
ERD_FAST_HD inline int64_t time_bin(int64_t t, int64_t num_bins, int64_t steps) {
    return (int64_t)((uint64_t)t * (uint64_t)num_bins / (uint64_t)steps);
}

// ----------------------------------------------------------------------------
// places

// Quotients of n in [0, 2^31) by a divisor in [1, 2^31) without a division (Granlund and Montgomery, PLDI 1994).
struct Divisor {
    uint32_t divisor, multiplier, shift;
#ifndef __CUDACC_RTC__
    Divisor() : Divisor(1) {}
    explicit Divisor(int64_t by) : divisor((uint32_t)by), shift(0) {
        while ((1ull << shift) < divisor) shift++;
        multiplier = (uint32_t)(((1ull << 32) * ((1ull << shift) - divisor)) / divisor + 1);
    }
#endif
    ERD_FAST_HD uint32_t quotient(uint32_t n) const {
        return (multiply_high(n, multiplier) + n) >> shift;
    }
    ERD_FAST_HD uint32_t remainder(uint32_t n) const {
        return n - quotient(n) * divisor;
    }
};

// (C, H, W) cut into patches of p x p: token (y / p, x / p) in row-major order, feature ((y % p) p + x % p) C + c.
struct Tokens {
    uint32_t channels;
    Divisor by_channels, patch, across;  // C, p, W / p

    ERD_FAST_HD uint32_t offset(uint32_t c, uint32_t y, uint32_t x) const {
        uint32_t row = patch.quotient(y), column = patch.quotient(x);
        uint32_t inner_y = y - row * patch.divisor, inner_x = x - column * patch.divisor;
        uint32_t token = row * across.divisor + column;
        return ((token * patch.divisor + inner_y) * patch.divisor + inner_x) * channels + c;
    }

    // The inverse.
    ERD_FAST_HD void place(uint32_t offset, uint32_t* c, uint32_t* y, uint32_t* x) const {
        uint32_t pixel = by_channels.quotient(offset);
        *c = offset - pixel * channels;
        uint32_t strip = patch.quotient(pixel);  // pixels of one row of one patch
        uint32_t inner_x = pixel - strip * patch.divisor;
        uint32_t token = patch.quotient(strip);
        uint32_t inner_y = strip - token * patch.divisor;
        uint32_t row = across.quotient(token);
        *y = row * patch.divisor + inner_y;
        *x = (token - row * across.divisor) * patch.divisor + inner_x;
    }
};

inline Tokens tokens_of(int64_t channels, int64_t width, int64_t patch) {
    int64_t side = patch ? patch : 1;
    return {(uint32_t)channels, Divisor(channels), Divisor(side), Divisor(width / side)};
}

}  // namespace erd_fast
