/*
The mathematics of adamw_ema, for the CUDA kernels and their CPU twin: the numbers of a step, a group at a time and in
float64, and one element in float32.

erd_fast/ops/adamw_ema.py is the definition, and names what the structs of launchers.h hold. Products and sums of an
element are each rounded to float32, since setup.py lets no compiler contract them: equal factors give equal bits on
CPU and GPU. Comparisons are written so that NaN comes through.
*/
#pragma once

#include <cmath>

#include "host_device.h"
#include "launchers.h"

namespace erd_fast {

// ----------------------------------------------------------------------------
// the numbers of a step

ERD_FAST_HD inline double at_least(double least, double x) { return x < least ? least : x; }
ERD_FAST_HD inline double at_most(double most, double x) { return x > most ? most : x; }

// cos(pi x) of x in [0, 1].
ERD_FAST_HD inline double cos_pi(double x) {
#ifdef __CUDA_ARCH__
    return cospi(x);  // cos would need a stack to reduce large arguments
#else
    constexpr double PI = 3.14159265358979323846;
    return std::cos(PI * x);
#endif
}

// Factor of the learning rate at step n = 1, 2, ...
ERD_FAST_HD inline double scheduled(double n, double warmup, double cosine_steps) {
    if (n <= warmup) return n / at_least(1.0, warmup);
    if (!(cosine_steps > 0.0)) return 1.0;
    double progress = (n - 1.0 - warmup) / at_least(1.0, cosine_steps - warmup);
    return 0.5 * (1.0 + cos_pi(at_most(1.0, progress)));
}

ERD_FAST_HD inline double unscaled_norm(float norm, const StepScalars& scalars) {
    return (double)norm / (double)scalars.loss_scale;
}

ERD_FAST_HD inline bool is_taken(double norm) { return norm - norm == 0.0; }  // finite

ERD_FAST_HD inline void set_factors(const GroupSettings& s, const StepCounts& counts, const StepScalars& scalars,
                                    double norm, GroupFactors* f) {
    constexpr double CLIP_EPS = 1e-6;  // PyTorch's
    double n = (double)(counts.opt_step + 1) - s.start;
    double lr = s.lr * scheduled(n, s.warmup, s.cosine_steps);
    double clipped = s.grad_clip > 0.0 ? at_most(1.0, s.grad_clip / (norm + CLIP_EPS)) : 1.0;
    f->apply = is_taken(norm) ? 1.0f : 0.0f;
    f->gradient = (float)(clipped / (double)scalars.loss_scale);
    f->keep = (float)(1.0 - lr * s.weight_decay);
    f->new1 = (float)(1.0 - s.beta1);
    f->old2 = (float)s.beta2;
    f->new2 = (float)(1.0 - s.beta2);
    f->root = (float)(1.0 / std::sqrt(1.0 - std::pow(s.beta2, n)));
    f->eps = (float)s.eps;
    f->step = (float)(lr / (1.0 - std::pow(s.beta1, n)));
    for (int i = 0; i < MOST_EMAS; i++) f->emas[i] = (float)(1.0 - at_most(n / (n + 9.0), s.ema_decays[i]));
    f->lr = (float)lr;
}

// The counters after the step, and with a growth interval the loss scale.
ERD_FAST_HD inline void count_step(double norm, int64_t growth_interval, StepCounts* counts, StepScalars* scalars) {
    constexpr double SMALLEST_SCALE = 1.0, LARGEST_SCALE = 4294967296.0;
    bool taken = is_taken(norm);
    counts->opt_step += taken;
    counts->skipped += !taken;
    scalars->grad_norm = (float)norm;
    if (!growth_interval) return;
    int64_t growth = taken ? counts->growth + 1 : 0;
    bool grown = growth >= growth_interval;
    double scale = (double)scalars->loss_scale * (!taken ? 0.5 : grown ? 2.0 : 1.0);
    scalars->loss_scale = (float)at_most(LARGEST_SCALE, at_least(SMALLEST_SCALE, scale));
    counts->growth = grown ? 0 : growth;
}

// ----------------------------------------------------------------------------
// one element

ERD_FAST_HD inline void update(const GroupFactors& f, float gradient, float* parameter, float* exp_avg,
                               float* exp_avg_sq) {
    float g = gradient * f.gradient;
    float m = *exp_avg + f.new1 * (g - *exp_avg);
    float v = *exp_avg_sq * f.old2 + f.new2 * (g * g);
    *exp_avg = m;
    *exp_avg_sq = v;
    *parameter = *parameter * f.keep - f.step * (m / (sqrtf(v) * f.root + f.eps));
}

ERD_FAST_HD inline float averaged(float ema, float parameter, float factor) {
    return ema + factor * (parameter - ema);
}

}  // namespace erd_fast
