/*
grad_norm on a GPU: sums of squares of chunks, a block each, then one block that adds them: no atomics, the same bits
every time.

Which thread adds what is settled by the length of a chunk alone: a thread takes neighbours of 16 bytes, then those a
block further on, AT_ONCE such groups in flight. Where an address or a length forbids 16-byte accesses it loads the same
numbers one by one, so that views of a larger buffer have the norm of the tensors by themselves.

Bytes: each gradient once; 4 a chunk out and in.
*/
#include <cmath>
#include <cstring>

#include "chunks.h"
#include "kernel.cuh"

namespace erd_fast {

// ----------------------------------------------------------------------------
// Kernels

constexpr int THREADS = 256, SUM_THREADS = 1024, AT_ONCE = 4;

// Neighbours place, place + 1, ... of a chunk: as many as are 16 bytes; 0 beyond its end.
template <bool PACKED, typename T, int WIDTH>
__device__ inline void load_group(const T* gradient, int place, int length, float (&values)[WIDTH]) {
    T parts[WIDTH] = {};
    if constexpr (PACKED) {
        if (place < length) {
            uint4 word = __ldg((const uint4*)(gradient + place));
            memcpy(parts, &word, sizeof word);
        }
    } else {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            if (place + j < length) parts[j] = __ldg(gradient + place + j);
        }
    }
#pragma unroll
    for (int j = 0; j < WIDTH; j++) values[j] = widen(parts[j]);
}

template <bool PACKED, typename T>
__device__ inline float squares(const T* gradient, int length) {
    constexpr int WIDTH = 16 / sizeof(T), STRIDE = WIDTH * THREADS;
    float sum = 0.0f;
    for (int first = WIDTH * threadIdx.x; first < length; first += AT_ONCE * STRIDE) {
        float values[AT_ONCE][WIDTH];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) load_group<PACKED>(gradient, first + k * STRIDE, length, values[k]);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) sum += values[k][j] * values[k][j];
        }
    }
    return sum;
}

template <typename T>
__device__ inline float squares_of(const void* tensor, const Chunk& chunk) {
    const T* gradient = (const T*)tensor + chunk.first;
    bool packed = chunk.aligned && chunk.length % (16 / sizeof(T)) == 0;
    return packed ? squares<true>(gradient, chunk.length) : squares<false>(gradient, chunk.length);
}

__device__ inline float squares_by_dtype(const void* tensor, const Chunk& chunk) {
    switch (chunk.gradient) {
        case Dtype::BFLOAT16:
            return squares_of<__nv_bfloat16>(tensor, chunk);
        case Dtype::FLOAT16:
            return squares_of<__half>(tensor, chunk);
        default:
            return squares_of<float>(tensor, chunk);
    }
}

__global__ void __launch_bounds__(THREADS) grad_norm_fwd_kernel(GradNormArguments a) {
    ChunkPlace place = a.table.places[blockIdx.x];
    const TensorRow& row = a.table.rows[place.row];
    float sum = block_sum(squares_by_dtype(row.gradient, chunk_of(place, row)));
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(SUM_THREADS) grad_norm_sum_fwd_kernel(GradNormArguments a) {
    double total = 0.0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < a.table.chunks; i += SUM_THREADS) total += (double)a.partials[i];
    total = block_sum(total);
    if (threadIdx.x == 0) *a.norm = (float)sqrt(total);
}

// ----------------------------------------------------------------------------
// Launchers

void launch_grad_norm_fwd(const GradNormArguments& a, cudaStream_t stream) {
    if (a.table.chunks) launch(grad_norm_fwd_kernel, (unsigned)a.table.chunks, THREADS, 0, stream, a);
    launch(grad_norm_sum_fwd_kernel, 1, SUM_THREADS, 0, stream, a);
    check_launch("grad_norm");
}

}  // namespace erd_fast
