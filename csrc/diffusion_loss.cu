/*
diffusion_loss on a GPU: weighted squared error, its parts and its gradient, in one launch and one pass over the data.

One block an image: it reads prediction and target once, writes the gradient and the image's mean squared error, and
takes a ticket. The block that draws the last ticket sums loss and bins over all images in a fixed order, so there is no
float atomic, no second launch, and the same input gives the same bits. The tickets are counted in the four bytes of the
loss, which are set to 0 before the launch: no memory outlives a call, so graphs may be captured and replayed in any
order.

A thread takes four neighbouring numbers of the prediction, then the four a block further on. Which thread adds what is
settled by the shape of an image alone: neither the number of images, nor the image's place, nor whether its address
allows packs of four reaches the order of the sum. For patch tokens the targets are gathered; neighbouring threads take
neighbouring pixels, so whole sectors are used.

A timestep out of range makes the loss and that image's gradient NaN, and counts in no bin.

Bytes per image of E = C H W elements and E' = C' H W predicted: E' * size of prediction + 4 E in, E' * size of
prediction out.
*/
#include "diffusion_math.h"
#include "kernel.cuh"

namespace erd_fast {

// ----------------------------------------------------------------------------
// Kernels

constexpr int LEAST_THREADS = 128, MOST_THREADS = 256, NUMBERS_OF_A_THREAD = 16;
constexpr int BINS_OF_A_WARP = 4, AT_ONCE = 4;

struct LossShape {
    uint32_t channels, height, width, size, predicted_size;
    Tokens tokens;  // of prediction
};

// Row of the weight table, or -1.
__device__ inline int64_t row_of(const DiffusionLossArguments& a, int64_t image) {
    int64_t row = a.t_index ? a.t_index[image] : image;
    return row >= 0 && row < a.steps ? row : -1;
}

__device__ inline float weight_of(const DiffusionLossArguments& a, int64_t image) {
    int64_t row = row_of(a, image);
    return row < 0 ? not_a_number() : a.weight[row];
}

// prediction - target at places place ... place + 3 of an image; 0 at those that do not count: extra channels, and
// what is beyond the image.
template <typename T, bool PACKED>
__device__ inline void errors_of_4(const DiffusionLossArguments& a, const LossShape& g, const T* prediction,
                                   const float* target, uint32_t place, float (&error)[4],
                                   bool (&counted)[4]) {
    float predicted[4] = {0, 0, 0, 0}, wanted[4] = {0, 0, 0, 0};
    if (PACKED && (a.patch || place < g.size)) load_4<T>(prediction, place, predicted);
    if (PACKED && !a.patch && place < g.size) load_4<float>(target, place, wanted);
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
        uint32_t element = place + j;
        counted[j] = element < g.size;
        if (a.patch) {
            uint32_t c, y, x;
            g.tokens.place(place + j, &c, &y, &x);
            element = (c * g.height + y) * g.width + x;
            counted[j] = c < g.channels && place + j < g.predicted_size;
        }
        if (!PACKED && counted[j]) predicted[j] = widen(prediction[place + j]);
        if ((!PACKED || a.patch) && counted[j]) wanted[j] = target[element];
        error[j] = counted[j] ? predicted[j] - wanted[j] : 0.0f;
    }
}

template <typename T, bool PACKED>
__device__ inline float squares_and_gradient(const DiffusionLossArguments& a, const LossShape& g, int64_t image) {
    const T* prediction = (const T*)a.prediction + image * g.predicted_size;
    const float* target = a.target + image * g.size;
    T* out = a.dprediction ? (T*)a.dprediction + image * g.predicted_size : nullptr;
    float slope = 0.0f;
    if (out) slope = gradient_slope(weight_of(a, image), a.batch_size, g.size, a.loss_scale ? *a.loss_scale : 1.0f);
    float squares = 0.0f;
    for (uint32_t place = 4 * threadIdx.x; place < g.predicted_size; place += 4 * blockDim.x) {
        float error[4], gradient[4];
        bool counted[4];
        errors_of_4<T, PACKED>(a, g, prediction, target, place, error, counted);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            squares += error[j] * error[j];
            gradient[j] = counted[j] ? slope * error[j] : 0.0f;  // a NaN slope leaves extra channels 0
        }
        if (!out) continue;
        if (PACKED) {
            store_4<T>(out, place, gradient);
        } else {
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                if (place + j < g.predicted_size) out[place + j] = narrow<T>(gradient[j]);
            }
        }
    }
    return squares;
}

// Whether this block is the last of the grid to come here; what the others wrote before they came is then visible.
__device__ inline bool is_last(int32_t* ticket) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(ticket, 1) == (int32_t)gridDim.x - 1;
        if (last) __threadfence();
    }
    __syncthreads();
    return last;
}

// Loss and bins of all images. A thread has AT_ONCE images in flight, since what counts is the latency of their loads;
// each warp has BINS_OF_A_WARP bins and looks at all images. Errors of other blocks are read past the first-level cache
// (__ldcg), which is not kept equal among them.
__device__ inline void store_sums(const DiffusionLossArguments& a) {
    __shared__ float error[AT_ONCE * MOST_THREADS];
    __shared__ int32_t bin_of[AT_ONCE * MOST_THREADS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t bins_at_once = (int64_t)(blockDim.x / WARP) * BINS_OF_A_WARP;
    float total = 0.0f;
    for (int64_t first = 0; first < a.num_bins; first += bins_at_once) {
        int64_t mine = first + warp * BINS_OF_A_WARP;
        float sum[BINS_OF_A_WARP] = {}, count[BINS_OF_A_WARP] = {};
        for (int64_t start = 0; start < a.count; start += AT_ONCE * blockDim.x) {
            int64_t row[AT_ONCE];
            float mse[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                int64_t image = start + k * blockDim.x + threadIdx.x;
                bool there = image < a.count;
                row[k] = there ? row_of(a, image) : -1;
                mse[k] = there ? __ldcg(a.per_sample + image) : 0.0f;
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                int place = k * blockDim.x + threadIdx.x;
                bool counted = first == 0 && start + place < a.count;
                if (counted) total += (row[k] < 0 ? not_a_number() : a.weight[row[k]]) * mse[k];
                error[place] = mse[k];
                bin_of[place] = row[k] < 0 || !a.t_index ? -1 : (int32_t)time_bin(row[k], a.num_bins, a.steps);
            }
            __syncthreads();
            int64_t left = a.count - start;
            int images = (int)(left < AT_ONCE * blockDim.x ? left : AT_ONCE * blockDim.x);
            for (int i = lane; i < images; i += WARP) {
#pragma unroll
                for (int j = 0; j < BINS_OF_A_WARP; j++) {
                    bool hit = bin_of[i] == mine + j;
                    sum[j] += hit ? error[i] : 0.0f;
                    count[j] += hit ? 1.0f : 0.0f;
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < BINS_OF_A_WARP; j++) {
            float bin_sum = warp_sum(sum[j]), bin_count = warp_sum(count[j]);
            if (lane == 0 && mine + j < a.num_bins) {
                a.bin_sum[mine + j] = bin_sum;
                a.bin_count[mine + j] = bin_count;
            }
        }
    }
    total = block_sum(total);
    if (threadIdx.x == 0) *a.loss = total / (float)a.batch_size;
}

template <typename T, bool PACKED>
__global__ void __launch_bounds__(MOST_THREADS, 5) diffusion_loss_fwd_kernel(DiffusionLossArguments a, LossShape g) {
    int64_t image = blockIdx.x;
    float sum = block_sum(squares_and_gradient<T, PACKED>(a, g, image));
    if (threadIdx.x == 0) a.per_sample[image] = sum / (float)g.size;
    if (is_last((int32_t*)a.loss)) store_sums(a);
}

// ----------------------------------------------------------------------------
// Launchers

// A power of two, by the size of an image alone.
static int threads_of(const LossShape& g) {
    int threads = LEAST_THREADS;
    while (threads < MOST_THREADS && threads * NUMBERS_OF_A_THREAD < (int64_t)g.predicted_size) threads *= 2;
    return threads;
}

template <typename T>
static void launch_typed(const DiffusionLossArguments& a, const LossShape& g, cudaStream_t stream) {
    int64_t bytes = 4 * bytes_of(a.dtype);
    bool packed = g.size % 4 == 0 && g.predicted_size % 4 == 0 && aligned(a.prediction, bytes) &&
                  aligned(a.dprediction, bytes) && aligned(a.target, 16);
    unsigned images = (unsigned)a.count;
    cudaMemsetAsync(a.loss, 0, sizeof(float), stream);
    if (packed) {
        launch(diffusion_loss_fwd_kernel<T, true>, images, threads_of(g), 0, stream, a, g);
    } else {
        launch(diffusion_loss_fwd_kernel<T, false>, images, threads_of(g), 0, stream, a, g);
    }
    check_launch("diffusion_loss");
}

// No image: the sums are 0.
static void store_zeros(const DiffusionLossArguments& a, cudaStream_t stream) {
    cudaMemsetAsync(a.loss, 0, sizeof(float), stream);
    cudaMemsetAsync(a.bin_sum, 0, a.num_bins * sizeof(float), stream);
    cudaMemsetAsync(a.bin_count, 0, a.num_bins * sizeof(float), stream);
    check_launch("diffusion_loss");
}

void launch_diffusion_loss_fwd(const DiffusionLossArguments& a, cudaStream_t stream) {
    if (a.count == 0) return store_zeros(a, stream);
    int64_t plane = a.height * a.width;
    LossShape g{(uint32_t)a.channels, (uint32_t)a.height,
               (uint32_t)a.width,    (uint32_t)(a.channels * plane),
               (uint32_t)(a.predicted_channels * plane), tokens_of(a.predicted_channels, a.width, a.patch)};
    switch (a.dtype) {
        case Dtype::BFLOAT16:
            return launch_typed<__nv_bfloat16>(a, g, stream);
        case Dtype::FLOAT16:
            return launch_typed<__half>(a, g, stream);
        default:
            return launch_typed<float>(a, g, stream);
    }
}

}  // namespace erd_fast
