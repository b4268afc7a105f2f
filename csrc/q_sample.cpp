/*
q_sample on the CPU: stored latents to noisy input and target, in one pass over memory.

An image is done in runs of whole rows of one channel, about a thousand elements, that stay in the first-level cache:
load and widen, add the posterior's noise, scale, mirror the rows, then mix with the diffusion noise into both outputs.
Noise is drawn four neighbouring elements a Philox call; the compiler makes vectors over the calls. Posterior noise is
added before the rows are mirrored, since it belongs to the stored element. For patch tokens x_t is collected as an
image, and written token by token when that is whole.
*/
#include <algorithm>
#include <vector>

#include "cpu_twin.h"
#include "diffusion_math.h"

namespace erd_fast {

namespace {

constexpr int64_t RUN = 1024;

// What one thread works in: a run each, and, for tokens, an image of x_t.
struct Scratch {
    float *x_start, *spread, *normals;
    void* image;
};

// Elements [first, first + length) of image g's normals; the result is a place in `buffer`, of length + 8 numbers.
ERD_FAST_PART const float* draw_run(uint32_t k0, uint32_t k1, uint32_t purpose_stream, int64_t g, int64_t first,
                                    int64_t length, float* __restrict buffer) {
    uint32_t first_group = (uint32_t)(first / 4);
    int groups = (int)((first + length + 3) / 4 - first / 4);
    for (int i = 0; i < groups; i++) {
        Words w = words(k0, k1, purpose_stream, g, first_group + (uint32_t)i);
        Normals n = box_muller(w.w0, w.w1), m = box_muller(w.w2, w.w3);
        buffer[4 * i] = n.n0;
        buffer[4 * i + 1] = n.n1;
        buffer[4 * i + 2] = m.n0;
        buffer[4 * i + 3] = m.n1;
    }
    return buffer + first % 4;
}

ERD_FAST_PART const float* normals_run(const QSampleArguments& a, const float* given, Stream stream, int64_t image,
                                       int64_t first, int64_t length, float* buffer) {
    int64_t size = a.channels * a.height * a.width;
    if (given) return given + image * size + first;
    return draw_run(a.k0, a.k1, a.purpose << 8 | stream, a.ids[image], first, length, buffer);
}

// x0 of one run in stored order, not mirrored yet.
ERD_FAST_PART void x_start_run(const QSampleArguments& a, int64_t image, int64_t c, int64_t first, int64_t length,
                               const Scratch& s) {
    int64_t size = a.channels * a.height * a.width;
    int64_t row = a.index ? a.index[image] : image;
    bool spreads = a.kind == MEAN_STD || a.kind == MEAN_LOGVAR;
    int64_t stored = row * (spreads ? 2 * size : size) + first;
    float* __restrict x = s.x_start;
    load_run(a.latents, a.latents_dtype, stored, length, x);
    if (a.kind == PIXELS) {
        for (int64_t i = 0; i < length; i++) x[i] = of_pixel(x[i]);
    }
    if (spreads) {
        float* __restrict std = s.spread;
        load_run(a.latents, a.latents_dtype, stored + size, length, std);
        if (a.kind == MEAN_LOGVAR) {
            for (int64_t i = 0; i < length; i++) std[i] = std_of_logvar(std[i]);
        }
        const float* __restrict n = normals_run(a, a.posterior_noise, POSTERIOR, image, first, length, s.normals);
        for (int64_t i = 0; i < length; i++) x[i] = posterior_sample(x[i], std[i], n[i]);
    }
    float shift = a.shift ? a.shift[c] : 0.0f, scale = a.scale ? a.scale[c] : 1.0f;
    for (int64_t i = 0; i < length; i++) x[i] = normalized(x[i], shift, scale);
}

template <typename T>
ERD_FAST_PART void mix_run(float a, const float* __restrict x_start, float b, const float* __restrict eps,
                           int64_t length, T* __restrict out) {
    for (int64_t i = 0; i < length; i++) narrow(combined(a, x_start[i], b, eps[i]), out + i);
}

// x_t of one run, at number `place` of `out`.
ERD_FAST_PART void store_run(Dtype dtype, float a, const float* x_start, float b, const float* eps, int64_t length,
                             void* out, int64_t place) {
    switch (dtype) {
        case Dtype::BFLOAT16:
            return mix_run(a, x_start, b, eps, length, (BFloat16*)out + place);
        case Dtype::FLOAT16:
            return mix_run(a, x_start, b, eps, length, (Float16*)out + place);
        default:
            return mix_run(a, x_start, b, eps, length, (float*)out + place);
    }
}

template <typename T>
ERD_FAST_PART void store_tokens(const QSampleArguments& a, const void* image, int64_t place) {
    write_tokens((const T*)image, a.channels, a.channels, a.height, a.width, a.patch, (T*)a.x_t + place);
}

ERD_FAST_PART void image_body(const QSampleArguments& a, int64_t image, const Scratch& s) {
    int64_t plane = a.height * a.width, start = image * a.channels * plane;
    int64_t longest = std::max(RUN / a.width, (int64_t)1) * a.width;
    const float* k = a.coefficients + 4 * (a.t_index ? a.t_index[image] : image);
    for (int64_t c = 0; c < a.channels; c++) {
        for (int64_t place = 0; place < plane; place += longest) {
            int64_t first = c * plane + place, length = std::min(longest, plane - place);
            x_start_run(a, image, c, first, length, s);
            if (a.flip && a.flip[image]) {
                for (float* row = s.x_start; row < s.x_start + length; row += a.width) std::reverse(row, row + a.width);
            }
            const float* eps = normals_run(a, a.noise, NOISE, image, first, length, s.normals);
            mix_run(k[2], s.x_start, k[3], eps, length, a.target + start + first);
            void* x_t = a.patch ? s.image : a.x_t;
            store_run(a.x_t_dtype, k[0], s.x_start, k[1], eps, length, x_t, a.patch ? first : start + first);
        }
    }
    if (!a.patch) return;
    if (a.x_t_dtype == Dtype::FLOAT32) {
        store_tokens<float>(a, s.image, start);
    } else {
        store_tokens<uint16_t>(a, s.image, start);  // bits are moved, whatever they mean
    }
}

ERD_FAST_PART void images_body(const QSampleArguments& a, int64_t first, int64_t last, const Scratch& s) {
    for (int64_t image = first; image < last; image++) image_body(a, image, s);
}

ERD_FAST_VARIANTS(images, images_body, (const QSampleArguments& a, int64_t first, int64_t last, const Scratch& s),
                  (a, first, last, s))

}  // namespace

void q_sample_fwd_cpu(const QSampleArguments& a, int64_t first, int64_t last) {
    int64_t room = std::max(RUN, a.width) + 16;
    std::vector<float> memory(3 * room + (a.patch ? a.channels * a.height * a.width : 0));
    float* start = memory.data();
    images(a, first, last, {start, start + room, start + 2 * room, start + 3 * room});
}

}  // namespace erd_fast
