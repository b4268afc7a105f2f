/*
draw on a GPU: the integer decisions of a batch, one image a thread.

The work is a few hundred integer instructions an image and 26 bytes out: what counts is latency. Hence small blocks,
spread over the multiprocessors; threads whose index falls outside the data set walk on, and a warp waits for its own
threads only. The counter is read on the device, so that a captured graph goes on counting.
*/
#include "kernel.cuh"
#include "philox.h"

namespace erd_fast {

// ----------------------------------------------------------------------------
// Kernels

constexpr int THREADS = 32;

// How many entries of an ascending table are <= word.
__device__ inline int64_t entries_up_to(const int64_t* table, int64_t length, int64_t word) {
    int64_t low = 0, high = length;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (table[middle] <= word) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

__global__ void __launch_bounds__(THREADS) draw_fwd_kernel(DrawArguments a) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.count) return;
    const uint32_t purpose_stream = a.purpose << 8 | SCALARS;
    int64_t g = *a.counter + a.offset + i;
    bool counted = g >= 0;  // else the bijections need not end; rows of -1 make NaN of the image
    Words w = words(a.k0, a.k1, purpose_stream, g, 0);
    uint32_t t_word = w.w0;
    if (a.strata && counted) {
        t_word = stratified_word(t_word, stratum(a.k0, a.k1, purpose_stream, g, a.strata, a.strata_side), a.strata);
    }
    int64_t t = a.t_table ? entries_up_to(a.t_table, a.num_timesteps, t_word) : bounded(t_word, a.num_timesteps);
    a.ids[i] = g;
    a.sample_index[i] = counted ? sample_order(a.k0, a.k1, g, a.dataset_size, a.order_side) : -1;
    a.t_index[i] = counted ? t : -1;
    a.label_drop[i] = w.w1 < a.drop_threshold;
    a.flip[i] = w.w2 >> 31;
}

// ----------------------------------------------------------------------------
// Launchers

void launch_draw_fwd(const DrawArguments& a, cudaStream_t stream) {
    if (a.count == 0) return;
    launch(draw_fwd_kernel, (unsigned)((a.count + THREADS - 1) / THREADS), THREADS, 0, stream, a);
    check_launch("draw");
}

}  // namespace erd_fast
