/*
adamw_ema on a GPU: one small block works out the numbers of the step, then a block for each chunk updates it by them.

A thread has four neighbouring elements of every array in flight at once. Nothing is read twice, so all of it leaves the
caches first. Tensors with an odd address take single elements, and so do the last elements of others. The format of a
gradient is asked for within the loop, once the loads of all other arrays are on their way: one kernel serves every
format.

Bytes an element, with one average: 32 of parameter, moments and average, and gradient and copy.
*/
#include <cstring>
#include <type_traits>

#include "adamw_ema.h"
#include "chunks.h"
#include "kernel.cuh"

namespace erd_fast {

// ----------------------------------------------------------------------------
// Kernels

constexpr int THREADS = 256, ADVANCE_THREADS = 32;

__global__ void __launch_bounds__(ADVANCE_THREADS) adamw_ema_advance_fwd_kernel(AdamwEmaArguments a) {
    StepCounts counts = *a.counts;
    StepScalars scalars = *a.scalars;
    double norm = unscaled_norm(*a.norm, scalars);
    for (int64_t group = threadIdx.x; group < a.groups; group += ADVANCE_THREADS) {
        set_factors(a.settings[group], counts, scalars, norm, a.factors + group);
    }
    __syncthreads();  // all have read what one now changes
    if (threadIdx.x) return;
    count_step(norm, a.growth_interval, &counts, &scalars);
    *a.counts = counts;
    *a.scalars = scalars;
}

// The unsigned numbers that neighbours of so many bytes are loaded and stored as.
template <int BYTES>
using Word = std::conditional_t<BYTES == 16, uint4,
                                std::conditional_t<BYTES == 8, uint2,
                                                   std::conditional_t<BYTES == 4, uint32_t, uint16_t>>>;

template <typename T, int WIDTH>
__device__ inline void load_once(const void* from, int64_t place, float (&values)[WIDTH]) {
    auto word = __ldcs((const Word<WIDTH * sizeof(T)>*)((const T*)from + place));
    T parts[WIDTH];
    memcpy(parts, &word, sizeof word);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) values[j] = widen(parts[j]);
}

template <typename T, int WIDTH>
__device__ inline void store_once(void* to, int64_t place, const float (&values)[WIDTH]) {
    T parts[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; j++) parts[j] = narrow<T>(values[j]);
    Word<WIDTH * sizeof(T)> word;
    memcpy(&word, parts, sizeof word);
    __stcs((Word<WIDTH * sizeof(T)>*)((T*)to + place), word);
}

template <int WIDTH>
__device__ inline void load_gradient(Dtype dtype, const void* from, int64_t place, float (&values)[WIDTH]) {
    switch (dtype) {
        case Dtype::BFLOAT16:
            return load_once<__nv_bfloat16>(from, place, values);
        case Dtype::FLOAT16:
            return load_once<__half>(from, place, values);
        default:
            return load_once<float>(from, place, values);
    }
}

template <int WIDTH>
__device__ inline void store_copy(Dtype dtype, void* to, int64_t place, const float (&values)[WIDTH]) {
    switch (dtype) {
        case Dtype::BFLOAT16:
            return store_once<__nv_bfloat16>(to, place, values);
        case Dtype::FLOAT16:
            return store_once<__half>(to, place, values);
        default:
            return store_once<float>(to, place, values);
    }
}

// Elements [first, last) of a chunk, WIDTH at a time.
template <int DECAYS, int WIDTH>
__device__ inline void update_chunk(const TensorRow& row, const GroupFactors& f, const Chunk& chunk, int first,
                                    int last) {
#pragma unroll 1
    for (int i = first + WIDTH * threadIdx.x; i < last; i += WIDTH * THREADS) {
        int64_t place = chunk.first + i;
        float p[WIDTH], m[WIDTH], v[WIDTH], g[WIDTH], emas[MOST_EMAS][WIDTH];
        load_once<float>(row.parameter, place, p);
        load_once<float>(row.exp_avg, place, m);
        load_once<float>(row.exp_avg_sq, place, v);
#pragma unroll
        for (int k = 0; k < DECAYS; k++) {
            if (row.emas[k]) load_once<float>(row.emas[k], place, emas[k]);
        }
        load_gradient(chunk.gradient, row.gradient, place, g);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) update(f, g[j], &p[j], &m[j], &v[j]);
        store_once<float>(row.parameter, place, p);
        store_once<float>(row.exp_avg, place, m);
        store_once<float>(row.exp_avg_sq, place, v);
#pragma unroll
        for (int k = 0; k < DECAYS; k++) {
            if (!row.emas[k]) continue;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) emas[k][j] = averaged(emas[k][j], p[j], f.emas[k]);
            store_once<float>(row.emas[k], place, emas[k]);
        }
        if (row.copy) store_copy(chunk.copy, row.copy, place, p);
    }
}

template <int DECAYS>
__global__ void __launch_bounds__(THREADS, 4) adamw_ema_fwd_kernel(AdamwEmaArguments a) {
    const ChunkPlace place = a.table.places[blockIdx.x];
    const TensorRow row = a.table.rows[place.row];
    const GroupFactors f = a.factors[row.group];
    if (f.apply == 0.0f) return;
    const Chunk chunk = chunk_of(place, row);
    int packed = chunk.aligned ? chunk.length / 4 * 4 : 0;
    update_chunk<DECAYS, 4>(row, f, chunk, 0, packed);
    update_chunk<DECAYS, 1>(row, f, chunk, packed, chunk.length);
}

// ----------------------------------------------------------------------------
// Launchers

template <int DECAYS>
static void launch_update(const AdamwEmaArguments& a, cudaStream_t stream) {
    if (a.table.chunks) launch(adamw_ema_fwd_kernel<DECAYS>, (unsigned)a.table.chunks, THREADS, 0, stream, a);
    check_launch("adamw_ema");
}

void launch_adamw_ema_fwd(const AdamwEmaArguments& a, cudaStream_t stream) {
    launch(adamw_ema_advance_fwd_kernel, 1, ADVANCE_THREADS, 0, stream, a);
    switch (a.decays) {
        case 0:
            return launch_update<0>(a, stream);
        case 1:
            return launch_update<1>(a, stream);
        case 2:
            return launch_update<2>(a, stream);
        case 3:
            return launch_update<3>(a, stream);
        default:
            return launch_update<4>(a, stream);
    }
}

}  // namespace erd_fast
