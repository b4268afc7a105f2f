/*
Runs the CUDA kernels of csrc on a CPU, one block after the other, so that their indices, barriers and reductions are
tested where there is no GPU. Threads of a block are coroutines that change at barriers and shuffles. What it cannot
show: races between blocks, memory order, speed.

Compiled with ERD_FAST_EMULATED, csrc/kernel.cuh includes this and launches by emulate.
*/
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static

struct Block {
    struct Barrier {
        int arrived = 0, generation = 0;
    };
    struct Thread {
        ucontext_t context;
        std::unique_ptr<char[]> stack;
        bool done = false;
    };
    std::vector<Thread> threads;
    std::vector<Barrier> warps;
    std::vector<double> exchanged;  // float passes through unchanged
    Barrier all;
    int living = 0, current = 0;
    ucontext_t scheduler;
    const std::function<void()>* kernel = nullptr;
};

// One state for all sources: a function of kernel.cuh exists once in the library.
inline Block* block_now;
inline dim3 gridDim_now, blockDim_now;
inline uint3 threadIdx_now, blockIdx_now;
#define gridDim gridDim_now
#define blockDim blockDim_now
#define threadIdx threadIdx_now
#define blockIdx blockIdx_now

inline void give_way() {
    Block& block = *block_now;
    swapcontext(&block.threads[block.current].context, &block.scheduler);
}

inline void wait_at(Block::Barrier& barrier, int members) {
    int generation = barrier.generation;
    if (++barrier.arrived >= members) {
        barrier.arrived = 0;
        barrier.generation++;
    }
    while (barrier.generation == generation) give_way();
}

inline void __syncthreads() { wait_at(block_now->all, block_now->living); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
    Block& block = *block_now;
    int thread = block.current, lane = thread % 32;
    block.exchanged[thread] = value;
    wait_at(block.warps[thread / 32], 32);
    T other = lane + distance < 32 ? (T)block.exchanged[thread + distance] : value;
    wait_at(block.warps[thread / 32], 32);
    return other;
}

inline void __threadfence() {}

inline bool misaligned;  // a GPU would have stopped at an address that is no multiple of the access

inline int atomicAdd(int* place, int value) {
    int before = *place;
    *place += value;
    return before;
}

template <typename T>
T __ldcg(const T* place) {
    return *place;
}

template <typename T>
T __ldg(const T* place) {
    T value;
    misaligned |= (uintptr_t)place % sizeof value != 0;
    std::memcpy(&value, place, sizeof value);
    return value;
}

template <typename T>
T __ldcs(const T* place) {
    return __ldg(place);
}

template <typename T>
void __stcs(T* place, T value) {
    misaligned |= (uintptr_t)place % sizeof value != 0;
    std::memcpy(place, &value, sizeof value);
}

inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

using std::min;

inline void thread_main() {
    Block& block = *block_now;
    (*block.kernel)();
    block.threads[block.current].done = true;
    block.living--;
    if (block.living && block.all.arrived == block.living) {
        block.all.arrived = 0;
        block.all.generation++;
    }
    give_way();
}

inline void run_block(const std::function<void()>& kernel, int count) {
    constexpr size_t STACK = 64 << 10;
    static Block block;
    block_now = &block;
    block.kernel = &kernel;
    block.living = count;
    block.threads.resize(std::max((int)block.threads.size(), count));
    block.warps.assign((count + 31) / 32, {});
    block.exchanged.assign(count, 0);
    block.all = {};
    for (int i = 0; i < count; i++) {
        Block::Thread& thread = block.threads[i];
        if (!thread.stack) thread.stack = std::make_unique<char[]>(STACK);
        thread.done = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, thread_main, 0);
    }
    while (block.living) {
        for (int i = 0; i < count; i++) {
            if (block.threads[i].done) continue;
            block.current = i;
            threadIdx_now = {(unsigned)i, 0, 0};
            swapcontext(&block.scheduler, &block.threads[i].context);
        }
    }
}

inline void emulate(dim3 grid, int threads, const std::function<void()>& kernel) {
    gridDim_now = grid;
    blockDim_now = dim3(threads);
    // Backwards: no result may lean on the order of blocks.
    for (int y = (int)grid.y - 1; y >= 0; y--) {
        for (int x = (int)grid.x - 1; x >= 0; x--) {
            blockIdx_now = {(unsigned)x, (unsigned)y, 0};
            run_block(kernel, threads);
        }
    }
    if (misaligned) {
        misaligned = false;
        throw std::runtime_error("misaligned access");
    }
}

inline cudaError_t cudaGetLastError_now() { return cudaSuccess; }
#define cudaGetLastError cudaGetLastError_now
#define cudaGetErrorString(error) "no error"
#define cudaMemsetAsync(pointer, value, bytes, stream) std::memset(pointer, value, bytes)

namespace erd_fast {
alignas(16) inline uint4 shared[(48 << 10) / 16];
}
