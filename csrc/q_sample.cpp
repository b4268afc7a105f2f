/*
q_sample on the CPU: stored latents to noisy input and target, in one pass over memory.

An image is done in runs of whole rows of one channel, about a thousand elements, that stay in the first-level cache:
one loop makes x0 of the stored numbers, the rows are mirrored, and one loop mixes in the diffusion noise.
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
    float *x_start, *normals, *mean, *spread;
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

// x0 of a run in stored order: every number is read, and x0 written, once.
template <int KIND, typename T>
ERD_FAST_PART void x_start_of(const T* __restrict stored, const T* __restrict spread, const float* __restrict normals,
                              float shift, float scale, int64_t length, float* __restrict x) {
    for (int64_t i = 0; i < length; i++) {
        float z = widen(stored[i]);
        if (KIND == PIXELS) z = of_pixel(z);
        if (KIND == MEAN_STD) z = posterior_sample(z, widen(spread[i]), normals[i]);
        if (KIND == MEAN_LOGVAR) z = posterior_sample(z, std_of_logvar(widen(spread[i])), normals[i]);
        x[i] = normalized(z, shift, scale);
    }
}

template <typename T>
ERD_FAST_PART void x_start_typed(int kind, const T* stored, const T* spread, const float* normals, float shift,
                                 float scale, int64_t length, float* x) {
    switch (kind) {
        case MEAN_STD:
            return x_start_of<MEAN_STD>(stored, spread, normals, shift, scale, length, x);
        case MEAN_LOGVAR:
            return x_start_of<MEAN_LOGVAR>(stored, spread, normals, shift, scale, length, x);
        default:
            return x_start_of<SAMPLE_KIND>(stored, stored, normals, shift, scale, length, x);
    }
}

// x0 of one run, not mirrored yet.
ERD_FAST_PART void x_start_run(const QSampleArguments& a, int64_t image, int64_t c, int64_t first, int64_t length,
                               const Scratch& s) {
    int64_t size = a.channels * a.height * a.width;
    int64_t row = a.index ? a.index[image] : image;
    bool spreads = a.kind == MEAN_STD || a.kind == MEAN_LOGVAR;
    int64_t place = row * (spreads ? 2 * size : size) + first;
    const float* n = spreads ? normals_run(a, a.posterior_noise, POSTERIOR, image, first, length, s.normals) : nullptr;
    float shift = a.shift ? a.shift[c] : 0.0f, scale = a.scale ? a.scale[c] : 1.0f;
    switch (a.latents_dtype) {
        case Dtype::FLOAT32: {
            const float* stored = (const float*)a.latents + place;
            return x_start_typed(a.kind, stored, stored + size, n, shift, scale, length, s.x_start);
        }
        case Dtype::BFLOAT16: {
            const BFloat16* stored = (const BFloat16*)a.latents + place;
            return x_start_typed(a.kind, stored, stored + size, n, shift, scale, length, s.x_start);
        }
        case Dtype::FLOAT16: {
            const Float16* stored = (const Float16*)a.latents + place;
            widen_halves(stored, length, s.mean);
            if (spreads) widen_halves(stored + size, length, s.spread);
            return x_start_typed(a.kind, s.mean, s.spread, n, shift, scale, length, s.x_start);
        }
        case Dtype::UINT8: {
            const uint8_t* pixels = (const uint8_t*)a.latents + place;
            return x_start_of<PIXELS>(pixels, pixels, n, shift, scale, length, s.x_start);
        }
    }
}

template <typename T>
ERD_FAST_PART void mix_typed(const Coefficients& k, const float* __restrict x_start, const float* __restrict eps,
                             int64_t length, float* __restrict target, T* __restrict x_t) {
    for (int64_t i = 0; i < length; i++) {
        target[i] = combined(k.c_x, x_start[i], k.c_eps, eps[i]);
        narrow(combined(k.alpha, x_start[i], k.sigma, eps[i]), x_t + i);
    }
}

// Target and x_t of one run; x_t from number `place` of `out` on.
ERD_FAST_PART void mix_run(Dtype dtype, const Coefficients& k, const float* x_start, const float* eps, int64_t length,
                           float* target, void* out, int64_t place) {
    switch (dtype) {
        case Dtype::BFLOAT16:
            return mix_typed(k, x_start, eps, length, target, (BFloat16*)out + place);
        case Dtype::FLOAT16:
            return mix_typed(k, x_start, eps, length, target, (Float16*)out + place);
        default:
            return mix_typed(k, x_start, eps, length, target, (float*)out + place);
    }
}

template <typename T>
ERD_FAST_PART void store_tokens(const QSampleArguments& a, const void* image, int64_t place) {
    write_tokens((const T*)image, a.channels, a.channels, a.height, a.width, a.patch, (T*)a.x_t + place);
}

ERD_FAST_PART void image_body(const QSampleArguments& a, int64_t image, const Scratch& s) {
    int64_t plane = a.height * a.width, start = image * a.channels * plane;
    int64_t longest = std::max(RUN / a.width, (int64_t)1) * a.width;
    const float* row = a.coefficients + 4 * (a.t_index ? a.t_index[image] : image);
    const Coefficients k{row[0], row[1], row[2], row[3]};
    for (int64_t c = 0; c < a.channels; c++) {
        for (int64_t place = 0; place < plane; place += longest) {
            int64_t first = c * plane + place, length = std::min(longest, plane - place);
            x_start_run(a, image, c, first, length, s);
            if (a.flip && a.flip[image]) {
                for (float* x = s.x_start; x < s.x_start + length; x += a.width) std::reverse(x, x + a.width);
            }
            const float* eps = normals_run(a, a.noise, NOISE, image, first, length, s.normals);
            void* x_t = a.patch ? s.image : a.x_t;
            mix_run(a.x_t_dtype, k, s.x_start, eps, length, a.target + start + first, x_t,
                    a.patch ? first : start + first);
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
    std::vector<float> memory(4 * room + (a.patch ? a.channels * a.height * a.width : 0));
    float* start = memory.data();
    images(a, first, last, {start, start + room, start + 2 * room, start + 3 * room, start + 4 * room});
}

}  // namespace erd_fast
