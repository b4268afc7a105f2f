/*
q_sample on the CPU: stored latents to noisy input and target, in one pass over memory.

An image is done in runs of whole rows of one channel, about a thousand elements, so that what is drawn and what is
still to be narrowed stays in the first-level cache. One loop reads all inputs and writes both outputs; for a mirrored
image it takes the noise turned round, and the rows of the outputs are turned after it. Noise is drawn four neighbouring
elements a Philox call; the compiler makes vectors over the calls. For patch tokens x_t is collected as an image, and
written token by token when that is whole.
*/
#include <algorithm>
#include <vector>

#include "cpu_twin.h"
#include "diffusion_math.h"

namespace erd_fast {

namespace {

constexpr int64_t LONGEST = 1024;  // of a run, unless a row is longer

// What one thread works in: a run each, and, for tokens, an image of x_t.
struct Scratch {
    float *normals, *eps, *mirrored, *x_t;
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

// x0 of one stored element; `spread` is how far on its spread lies.
template <int KIND, typename In>
ERD_FAST_PART float x_start_of(const In* stored, int64_t spread, const float* normal, float shift, float scale) {
    float z = widen(*stored);
    if (KIND == PIXELS) z = of_pixel(z);
    if (KIND == MEAN_STD) z = posterior_sample(z, widen(stored[spread]), *normal);
    if (KIND == MEAN_LOGVAR) z = posterior_sample(z, std_of_logvar(widen(stored[spread])), *normal);
    return normalized(z, shift, scale);
}

// A run of an image: what its outputs are made of, all in the order in which they lie, and where they go.
struct Run {
    const void* latents;
    int64_t first, spread;  // numbers of latents: of the run's first element, and how far on its spread lies
    const float *normals, *eps;  // no normals without a spread
    float shift, scale;
    Coefficients k;
    int64_t length;
    float *target, *x_t;
};

// Every number is read and written once, all arrays at a time.
template <int KIND, typename In>
ERD_FAST_PART void mix_run(const Run& r) {
    const In* __restrict stored = (const In*)r.latents + r.first;
    const float *__restrict n = r.normals, *__restrict eps = r.eps;
    float *__restrict target = r.target, *__restrict x_t = r.x_t;
    for (int64_t i = 0; i < r.length; i++) {
        float x = x_start_of<KIND>(stored + i, r.spread, n + i, r.shift, r.scale);
        target[i] = combined(r.k.c_x, x, r.k.c_eps, eps[i]);
        x_t[i] = combined(r.k.alpha, x, r.k.sigma, eps[i]);
    }
}

template <typename In>
ERD_FAST_PART void mix_by_kind(int kind, const Run& r) {
    switch (kind) {
        case MEAN_STD:
            return mix_run<MEAN_STD, In>(r);
        case MEAN_LOGVAR:
            return mix_run<MEAN_LOGVAR, In>(r);
        default:
            return mix_run<SAMPLE_KIND, In>(r);
    }
}

ERD_FAST_PART void mix(const QSampleArguments& a, const Run& r) {
    switch (a.latents_dtype) {
        case Dtype::BFLOAT16:
            return mix_by_kind<BFloat16>(a.kind, r);
        case Dtype::FLOAT16:
            return mix_by_kind<Float16>(a.kind, r);
        case Dtype::UINT8:
            return mix_run<PIXELS, uint8_t>(r);
        default:
            return mix_by_kind<float>(a.kind, r);
    }
}

ERD_FAST_PART void mirror(float* rows, int64_t length, int64_t width) {
    for (float* row = rows; row < rows + length; row += width) std::reverse(row, row + width);
}

template <typename T>
ERD_FAST_PART void narrow_run(const float* __restrict from, int64_t length, T* __restrict to) {
    for (int64_t i = 0; i < length; i++) narrow(from[i], to + i);
}

template <typename T>
ERD_FAST_PART void store_tokens(const QSampleArguments& a, const void* image, int64_t place) {
    write_tokens((const T*)image, a.channels, a.channels, a.height, a.width, a.patch, (T*)a.x_t + place);
}

ERD_FAST_PART void image_body(const QSampleArguments& a, int64_t image, const Scratch& s) {
    int64_t plane = a.height * a.width, size = a.channels * plane, start = image * size;
    int64_t longest = std::max(LONGEST / a.width, (int64_t)1) * a.width;
    bool spreads = a.kind == MEAN_STD || a.kind == MEAN_LOGVAR, mirrored = a.flip && a.flip[image];
    int64_t stored = (a.index ? a.index[image] : image) * (spreads ? 2 * size : size);
    const float* row = a.coefficients + 4 * (a.t_index ? a.t_index[image] : image);
    void* x_t = a.patch ? s.image : a.x_t;
    Run r{};
    r.latents = a.latents;
    r.spread = size;
    r.k = {row[0], row[1], row[2], row[3]};
    for (int64_t c = 0; c < a.channels; c++) {
        r.shift = a.shift ? a.shift[c] : 0.0f;
        r.scale = a.scale ? a.scale[c] : 1.0f;
        for (int64_t place = 0; place < plane; place += longest) {
            int64_t first = c * plane + place, out = a.patch ? first : start + first;
            r.first = stored + first;
            r.length = std::min(longest, plane - place);
            r.target = a.target + start + first;
            r.x_t = a.x_t_dtype == Dtype::FLOAT32 ? (float*)x_t + out : s.x_t;
            r.eps = normals_run(a, a.noise, NOISE, image, first, r.length, s.eps);
            if (spreads) r.normals = normals_run(a, a.posterior_noise, POSTERIOR, image, first, r.length, s.normals);
            if (mirrored) {  // x0 is, and the noise is not: x0 as it lies is mixed with the noise turned round
                std::copy(r.eps, r.eps + r.length, s.mirrored);
                mirror(s.mirrored, r.length, a.width);
                r.eps = s.mirrored;
            }
            mix(a, r);
            if (mirrored) {
                mirror(r.target, r.length, a.width);
                mirror(r.x_t, r.length, a.width);
            }
            if (a.x_t_dtype == Dtype::BFLOAT16) narrow_run(r.x_t, r.length, (BFloat16*)x_t + out);
            if (a.x_t_dtype == Dtype::FLOAT16) narrow_run(r.x_t, r.length, (Float16*)x_t + out);
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
    int64_t room = std::max(LONGEST, a.width) + 16;
    std::vector<float> memory(4 * room + (a.patch ? a.channels * a.height * a.width : 0));
    float* start = memory.data();
    images(a, first, last, {start, start + room, start + 2 * room, start + 3 * room, start + 4 * room});
}

}  // namespace erd_fast
