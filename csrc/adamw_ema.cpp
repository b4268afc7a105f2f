/*
adamw_ema on the CPU: a step of AdamW with averages, in one pass over memory.

A chunk is done in runs that stay in the first-level cache: gradients widened, parameter and moments updated, then the
averages and the copy, one after the other, of a parameter that is still there. So memory is read and written once,
with one loop for each kind of array, whatever a tensor has of them.
*/
#include "adamw_ema.h"

#include "chunks.h"
#include "cpu_twin.h"

namespace erd_fast {

namespace {

constexpr int RUN = 512;  // elements: with four averages 18 KiB

template <typename T>
ERD_FAST_PART const float* widen_run(const void* tensor, int64_t place, int length, float* __restrict buffer) {
    const T* __restrict from = (const T*)tensor + place;
    for (int i = 0; i < length; i++) buffer[i] = widen(from[i]);
    return buffer;
}

ERD_FAST_PART const float* gradient_run(Dtype dtype, const void* tensor, int64_t place, int length, float* buffer) {
    switch (dtype) {
        case Dtype::BFLOAT16:
            return widen_run<BFloat16>(tensor, place, length, buffer);
        case Dtype::FLOAT16:
            return widen_run<Float16>(tensor, place, length, buffer);
        default:
            return (const float*)tensor + place;
    }
}

template <typename T>
ERD_FAST_PART void narrow_run(const float* __restrict from, void* tensor, int64_t place, int length) {
    T* __restrict to = (T*)tensor + place;
    for (int i = 0; i < length; i++) narrow(from[i], to + i);
}

ERD_FAST_PART void copy_run(Dtype dtype, const float* from, void* tensor, int64_t place, int length) {
    switch (dtype) {
        case Dtype::BFLOAT16:
            return narrow_run<BFloat16>(from, tensor, place, length);
        case Dtype::FLOAT16:
            return narrow_run<Float16>(from, tensor, place, length);
        default:
            return narrow_run<float>(from, tensor, place, length);
    }
}

ERD_FAST_PART void update_run(const GroupFactors& factors, const float* __restrict gradient, float* __restrict p,
                              float* __restrict m, float* __restrict v, int length) {
    const GroupFactors f = factors;
    for (int i = 0; i < length; i++) update(f, gradient[i], p + i, m + i, v + i);
}

ERD_FAST_PART void average_run(float factor, const float* __restrict p, float* __restrict ema, int length) {
    for (int i = 0; i < length; i++) ema[i] = averaged(ema[i], p[i], factor);
}

ERD_FAST_PART void run_body(const AdamwEmaArguments& a, const TensorRow& row, const Chunk& chunk, int64_t place,
                            int length) {
    float buffer[RUN];
    const GroupFactors& f = a.factors[row.group];
    float* p = row.parameter + place;
    const float* gradient = gradient_run(chunk.gradient, row.gradient, place, length, buffer);
    update_run(f, gradient, p, row.exp_avg + place, row.exp_avg_sq + place, length);
    for (int i = 0; i < a.decays; i++) {
        if (row.emas[i]) average_run(f.emas[i], p, row.emas[i] + place, length);
    }
    if (row.copy) copy_run(chunk.copy, p, row.copy, place, length);
}

ERD_FAST_PART void chunks_body(const AdamwEmaArguments& a, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
        const TensorRow& row = a.table.rows[a.table.places[i].row];
        if (a.factors[row.group].apply == 0.0f) continue;
        Chunk chunk = chunk_of(a.table.places[i], row);
        for (int start = 0; start < chunk.length; start += RUN) {
            int left = chunk.length - start;
            run_body(a, row, chunk, chunk.first + start, left < RUN ? left : RUN);
        }
    }
}

ERD_FAST_VARIANTS(chunks, chunks_body, (const AdamwEmaArguments& a, int64_t first, int64_t last), (a, first, last))

}  // namespace

void adamw_ema_advance_cpu(const AdamwEmaArguments& a) {
    double norm = unscaled_norm(*a.norm, *a.scalars);
    for (int64_t group = 0; group < a.groups; group++) {
        set_factors(a.settings[group], *a.counts, *a.scalars, norm, a.factors + group);
    }
    count_step(norm, a.growth_interval, a.counts, a.scalars);
}

void adamw_ema_fwd_cpu(const AdamwEmaArguments& a, int64_t first, int64_t last) {
    chunks(a, first, last);
}

}  // namespace erd_fast
