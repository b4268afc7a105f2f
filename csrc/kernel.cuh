/*
What the CUDA kernels share: four neighbouring numbers as one access, number formats by type or by name, sums over a
block, a launch and its check.

Tests compile the .cu files with a C++ compiler and ERD_FAST_EMULATED, which nothing else defines: a launch then runs the
kernel on the CPU.
*/
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launchers.h"

#ifdef ERD_FAST_EMULATED
#include "cuda_emulation.h"  // of tests/csrc
#endif

namespace erd_fast {

// Four numbers that lie in memory at a multiple of their size together: one load, one store.
template <typename T>
struct alignas(4 * sizeof(T)) Pack {
    T value[4];
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(uint8_t value) { return (float)value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) { return value; }
template <>
__device__ inline __half narrow<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

template <typename T>
__device__ inline void load_4(const void* from, int64_t place, float (&values)[4]) {
    Pack<T> pack = *(const Pack<T>*)((const T*)from + place);
#pragma unroll
    for (int j = 0; j < 4; j++) values[j] = widen(pack.value[j]);
}

template <typename T>
__device__ inline void store_4(void* to, int64_t place, const float (&values)[4]) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < 4; j++) pack.value[j] = narrow<T>(values[j]);
    *(Pack<T>*)((T*)to + place) = pack;
}

__device__ inline float load_as(Dtype dtype, const void* from, int64_t place) {
    switch (dtype) {
        case Dtype::BFLOAT16:
            return widen(((const __nv_bfloat16*)from)[place]);
        case Dtype::FLOAT16:
            return widen(((const __half*)from)[place]);
        case Dtype::UINT8:
            return widen(((const uint8_t*)from)[place]);
        default:
            return ((const float*)from)[place];
    }
}

__device__ inline void store_as(Dtype dtype, void* to, int64_t place, float value) {
    switch (dtype) {
        case Dtype::BFLOAT16:
            ((__nv_bfloat16*)to)[place] = narrow<__nv_bfloat16>(value);
            break;
        case Dtype::FLOAT16:
            ((__half*)to)[place] = narrow<__half>(value);
            break;
        default:
            ((float*)to)[place] = value;
    }
}

constexpr int WARP = 32;
constexpr unsigned WHOLE_WARP = 0xFFFFFFFF;

template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value += __shfl_down_sync(WHOLE_WARP, value, distance);
    }
    return value;  // lane 0 has it
}

// Thread 0 has the result, in an order that the size of the block alone settles. Every thread of the block calls it.
template <typename T>
__device__ inline T block_sum(T value) {
    __shared__ T of_warps[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    value = warp_sum(value);
    __syncthreads();
    if (lane == 0) of_warps[warp] = value;
    __syncthreads();
    if (warp == 0) value = warp_sum(lane < (int)blockDim.x / WARP ? of_warps[lane] : T(0));
    return value;
}

__device__ inline float not_a_number() { return __int_as_float(0x7FFFFFFF); }

inline bool aligned(const void* pointer, int64_t bytes) { return (uintptr_t)pointer % bytes == 0; }

// Enqueue kernel(arguments...); `shared` is the size of its dynamic shared memory.
template <typename... Parameters, typename... Arguments>
inline void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
#ifdef ERD_FAST_EMULATED
    emulate(grid, threads, [&] { kernel(arguments...); });
#else
    kernel<<<grid, threads, shared, stream>>>(arguments...);
#endif
}

inline void check_launch(const char* op) {
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": launch: " + cudaGetErrorString(error));
}

}  // namespace erd_fast
