/*
diffusion_loss on the CPU: weighted squared error, its parts and its gradient, in one pass over memory.

Each image is one thread's: error, sum of squares, gradient. The sum runs in LANES fixed lanes that are added pairwise
at the end, so it is the same on every instruction set, for any number of threads, and wherever in a batch the image
lies; patch tokens are put in image order first, so it is the same for them too. The sums over images are taken in
order, in float64.
*/
#include <algorithm>
#include <vector>

#include "cpu_twin.h"
#include "diffusion_math.h"

namespace erd_fast {

namespace {

constexpr int LANES = 64;

template <typename T>
ERD_FAST_PART float squares(const T* __restrict prediction, const float* __restrict target, int64_t length) {
    float sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            float error = widen(prediction[i + lane]) - target[i + lane];
            sums[lane] += error * error;
        }
    }
    for (int lane = 0; i + lane < length; lane++) {
        float error = widen(prediction[i + lane]) - target[i + lane];
        sums[lane] += error * error;
    }
    return sum_of(sums);
}

// `out` may be `prediction`.
template <typename T>
ERD_FAST_PART void gradient(const T* prediction, const float* __restrict target, float slope, int64_t length, T* out) {
    for (int64_t i = 0; i < length; i++) narrow(slope * (widen(prediction[i]) - target[i]), out + i);
}

ERD_FAST_PART float weight_of(const DiffusionLossArguments& a, int64_t image) {
    return a.weight[a.t_index ? a.t_index[image] : image];
}

// `scratch` holds one image of up to 4 bytes a number, used for tokens alone.
template <typename T>
ERD_FAST_PART void image_body(const DiffusionLossArguments& a, int64_t image, void* scratch) {
    int64_t plane = a.height * a.width, size = a.channels * plane, predicted_size = a.predicted_channels * plane;
    const T* prediction = (const T*)a.prediction + image * predicted_size;
    const float* target = a.target + image * size;
    T* out = a.dprediction ? (T*)a.dprediction + image * predicted_size : nullptr;
    float loss_scale = a.loss_scale ? *a.loss_scale : 1.0f;
    float slope = out ? gradient_slope(weight_of(a, image), a.batch_size, size, loss_scale) : 0.0f;
    const T* values = prediction;
    if (a.patch) {
        read_tokens(prediction, a.channels, a.predicted_channels, a.height, a.width, a.patch, (T*)scratch);
        values = (const T*)scratch;
    }
    a.per_sample[image] = squares(values, target, size) / (float)size;
    if (!out) return;
    if (a.patch) {
        gradient(values, target, slope, size, (T*)scratch);
        write_tokens(values, a.channels, a.predicted_channels, a.height, a.width, a.patch, out);
    } else {
        gradient(values, target, slope, size, out);
        memset((void*)(out + size), 0, (predicted_size - size) * sizeof(T));
    }
}

ERD_FAST_PART void images_body(const DiffusionLossArguments& a, int64_t first, int64_t last, void* scratch) {
    for (int64_t image = first; image < last; image++) {
        switch (a.dtype) {
            case Dtype::BFLOAT16:
                image_body<BFloat16>(a, image, scratch);
                break;
            case Dtype::FLOAT16:
                image_body<Float16>(a, image, scratch);
                break;
            default:
                image_body<float>(a, image, scratch);
        }
    }
}

ERD_FAST_VARIANTS(images, images_body,
                  (const DiffusionLossArguments& a, int64_t first, int64_t last, void* scratch),
                  (a, first, last, scratch))

}  // namespace

void diffusion_loss_fwd_cpu(const DiffusionLossArguments& a, int64_t first, int64_t last) {
    std::vector<float> scratch(a.patch ? a.channels * a.height * a.width : 0);
    images(a, first, last, scratch.data());
}

void diffusion_loss_sum_cpu(const DiffusionLossArguments& a) {
    double loss = 0;
    std::vector<double> sums(a.num_bins);
    std::fill_n(a.bin_count, a.num_bins, 0.0f);
    for (int64_t image = 0; image < a.count; image++) {
        loss += (double)weight_of(a, image) * a.per_sample[image];
        if (a.t_index) {
            int64_t bin = time_bin(a.t_index[image], a.num_bins, a.steps);
            sums[bin] += a.per_sample[image];
            a.bin_count[bin] += 1.0f;
        }
    }
    *a.loss = (float)(loss / (double)a.batch_size);
    for (int64_t bin = 0; bin < a.num_bins; bin++) a.bin_sum[bin] = (float)sums[bin];
}

}  // namespace erd_fast
