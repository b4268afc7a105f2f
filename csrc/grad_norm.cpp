/*
grad_norm on the CPU: sums of squares of chunks, then the root of their sum, in one pass over memory.

A chunk's squares are summed in LANES fixed lanes that are added pairwise at the end, so its sum is the same on every
instruction set and for any number of threads. The sums of chunks are added in order, in float64.
*/
#include <cmath>

#include "chunks.h"
#include "cpu_twin.h"

namespace erd_fast {

namespace {

constexpr int LANES = 64;

template <typename T>
ERD_FAST_PART float squares(const void* tensor, int64_t first, int length) {
    const T* __restrict gradient = (const T*)tensor + first;
    float sums[LANES] = {};
    int i = 0;
    for (; i + LANES <= length; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            float value = widen(gradient[i + lane]);
            sums[lane] += value * value;
        }
    }
    for (int lane = 0; i + lane < length; lane++) {
        float value = widen(gradient[i + lane]);
        sums[lane] += value * value;
    }
    return sum_of(sums);
}

ERD_FAST_PART float chunk_body(const TensorRow& row, const Chunk& chunk) {
    switch (chunk.gradient) {
        case Dtype::BFLOAT16:
            return squares<BFloat16>(row.gradient, chunk.first, chunk.length);
        case Dtype::FLOAT16:
            return squares<Float16>(row.gradient, chunk.first, chunk.length);
        default:
            return squares<float>(row.gradient, chunk.first, chunk.length);
    }
}

ERD_FAST_PART void chunks_body(const GradNormArguments& a, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
        const ChunkPlace& place = a.table.places[i];
        const TensorRow& row = a.table.rows[place.row];
        a.partials[i] = chunk_body(row, chunk_of(place, row));
    }
}

ERD_FAST_VARIANTS(chunks, chunks_body, (const GradNormArguments& a, int64_t first, int64_t last), (a, first, last))

}  // namespace

void grad_norm_fwd_cpu(const GradNormArguments& a, int64_t first, int64_t last) {
    chunks(a, first, last);
}

void grad_norm_sum_cpu(const GradNormArguments& a) {
    double total = 0.0;
    for (int64_t i = 0; i < a.table.chunks; i++) total += a.partials[i];
    *a.norm = (float)std::sqrt(total);
}

}  // namespace erd_fast
