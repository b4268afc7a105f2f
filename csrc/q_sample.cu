/*
q_sample on a GPU: stored latents to noisy input and target, in one launch; every number is read once, written once.

Images lie along grid.x, tiles of an image along grid.y. A thread takes four neighbouring elements of a row, which are
one access of each array and one Philox call of each noise. Those of a mirrored image read the mirrored four, whose
posterior noise is again one call, and turn them round: posterior noise belongs to the stored element, diffusion noise
to the element that is written.

The target, and x_t as an image, are written in element order. For patch tokens a tile is whole patches of all channels:
its tokens are then one run of addresses, so x_t is collected in shared memory in token order and stored by 16 bytes.

Shapes that the packs do not fit (a width not divisible by 4, odd addresses, very wide tiles) take the second kernel,
which loads and stores single numbers. A thread of it still has the four elements of one Philox call; stored elements
of a mirrored image may then lie in two or more calls and draw each for itself.

An image whose row of latents or coefficients is out of range becomes NaN, and nothing is read for it.

Bytes per image of E = C H W elements: the stored row once, E * (size of x_t + 4) out, and 4 E for each given noise.
*/
#include "diffusion_math.h"
#include "kernel.cuh"

namespace erd_fast {

// ----------------------------------------------------------------------------
// Kernels

constexpr int THREADS = 256;

// How the launch cuts an image.
struct QSampleShape {
    uint32_t channels, height, width, plane, size;  // H W, C H W
    Divisor by_width, by_plane;
    Tokens tokens;
    uint32_t tile_rows, tile_groups;          // rows of each channel, groups of four; 0 rows: a run of elements
    Divisor by_channel_groups, by_row_groups;  // tile_rows W / 4, W / 4
};

// What a thread knows of its image.
struct Image {
    int64_t number, row;
    bool valid, mirrored;
    Coefficients k;
};

__device__ inline Image image_of(const QSampleArguments& a) {
    Image image;
    image.number = blockIdx.x;
    image.row = a.index ? a.index[image.number] : image.number;
    image.mirrored = a.flip && a.flip[image.number];
    int64_t t = a.t_index ? a.t_index[image.number] : image.number;
    image.valid = image.row >= 0 && image.row < a.stored && t >= 0 && t < a.steps;
    float nan = not_a_number();
    image.k = {nan, nan, nan, nan};
    if (image.valid) {
        const float* k = a.coefficients + 4 * t;
        image.k = {k[0], k[1], k[2], k[3]};
    }
    return image;
}

__device__ inline bool spreads(int kind) {
    return kind == MEAN_STD || kind == MEAN_LOGVAR;
}

__device__ inline void draw_4(const QSampleArguments& a, Stream stream, int64_t image, uint32_t group,
                              float (&normals)[4]) {
    Words w = words(a.k0, a.k1, a.purpose << 8 | stream, a.ids[image], group);
    Normals n = box_muller(w.w0, w.w1), m = box_muller(w.w2, w.w3);
    normals[0] = n.n0;
    normals[1] = n.n1;
    normals[2] = m.n0;
    normals[3] = m.n1;
}

__device__ inline float pick(const float (&values)[4], uint32_t j) {
    float low = j & 1 ? values[1] : values[0], high = j & 1 ? values[3] : values[2];
    return j & 2 ? high : low;
}

// x0 of the stored elements place ... place + 3, before mirroring.
template <typename In>
__device__ inline void x_start_4(const QSampleArguments& a, const QSampleShape& g, const Image& image, uint32_t c,
                                 uint32_t place, float (&x)[4]) {
    int64_t stored = image.row * (spreads(a.kind) ? 2 : 1) * (int64_t)g.size + place;
    load_4<In>(a.latents, stored, x);
    if (a.kind == PIXELS) {
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = of_pixel(x[j]);
    }
    if (spreads(a.kind)) {
        float std[4], normals[4];
        load_4<In>(a.latents, stored + g.size, std);
        if (a.posterior_noise) {
            load_4<float>(a.posterior_noise, image.number * g.size + place, normals);
        } else {
            draw_4(a, POSTERIOR, image.number, place / 4, normals);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (a.kind == MEAN_LOGVAR) std[j] = std_of_logvar(std[j]);
            x[j] = posterior_sample(x[j], std[j], normals[j]);
        }
    }
    float shift = a.shift ? a.shift[c] : 0.0f, scale = a.scale ? a.scale[c] : 1.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = normalized(x[j], shift, scale);
}

// Elements element ... element + 3, at (c, y, x) and rightwards: the target is stored, x_t left in `x_t`.
template <typename In>
__device__ inline void group_of_4(const QSampleArguments& a, const QSampleShape& g, const Image& image,
                                  uint32_t element, uint32_t c, uint32_t x, float (&x_t)[4]) {
    float x_start[4] = {0, 0, 0, 0}, eps[4], target[4];
    if (image.valid) x_start_4<In>(a, g, image, c, image.mirrored ? element + g.width - 4 - 2 * x : element, x_start);
    if (a.noise) {
        load_4<float>(a.noise, image.number * g.size + element, eps);
    } else {
        draw_4(a, NOISE, image.number, element / 4, eps);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float x0 = image.mirrored ? x_start[3 - j] : x_start[j];
        target[j] = combined(image.k.c_x, x0, image.k.c_eps, eps[j]);
        x_t[j] = combined(image.k.alpha, x0, image.k.sigma, eps[j]);
    }
    store_4<float>(a.target, image.number * g.size + element, target);
}

template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS, 8) q_sample_fwd_kernel(QSampleArguments a, QSampleShape g) {
    const Image image = image_of(a);
    float x_t[4];
    for (uint32_t group = blockIdx.y * THREADS + threadIdx.x; group < g.size / 4; group += gridDim.y * THREADS) {
        uint32_t element = 4 * group, x = element - g.by_width.quotient(element) * g.width;
        group_of_4<In>(a, g, image, element, g.by_plane.quotient(element), x, x_t);
        store_4<Out>(a.x_t, image.number * g.size + element, x_t);
    }
}

template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS) q_sample_tokens_fwd_kernel(QSampleArguments a, QSampleShape g) {
#ifndef ERD_FAST_EMULATED  // which has an array of this name
    extern __shared__ uint4 shared[];
#endif
    Out* tile = (Out*)shared;
    const Image image = image_of(a);
    for (uint32_t top = blockIdx.y * g.tile_rows; top < g.height; top += gridDim.y * g.tile_rows) {
        uint32_t rows = min(g.tile_rows, g.height - top);
        float x_t[4];
        for (uint32_t group = threadIdx.x; group < g.tile_groups; group += THREADS) {
            uint32_t c = g.by_channel_groups.quotient(group);
            uint32_t rest = group - c * g.by_channel_groups.divisor;
            uint32_t y = g.by_row_groups.quotient(rest);
            uint32_t x = 4 * (rest - y * g.by_row_groups.divisor);
            if (y >= rows) continue;
            group_of_4<In>(a, g, image, c * g.plane + (top + y) * g.width + x, c, x, x_t);
#pragma unroll
            for (int j = 0; j < 4; j++) tile[g.tokens.offset(c, y, x + j)] = narrow<Out>(x_t[j]);
        }
        __syncthreads();
        uint32_t run = rows * g.width * g.channels;
        uint4* out = (uint4*)((Out*)a.x_t + image.number * g.size + (int64_t)top * g.width * g.channels);
        for (uint32_t i = threadIdx.x; i < run * sizeof(Out) / 16; i += THREADS) out[i] = shared[i];
        __syncthreads();
    }
}

// The x0 of one stored element.
__device__ inline float x_start_1(const QSampleArguments& a, const QSampleShape& g, const Image& image, uint32_t c,
                                  uint32_t place) {
    int64_t stored = image.row * (spreads(a.kind) ? 2 : 1) * (int64_t)g.size + place;
    float x = load_as(a.latents_dtype, a.latents, stored);
    if (a.kind == PIXELS) x = of_pixel(x);
    if (spreads(a.kind)) {
        float std = load_as(a.latents_dtype, a.latents, stored + g.size), normals[4], normal;
        if (a.posterior_noise) {
            normal = a.posterior_noise[image.number * g.size + place];
        } else {
            draw_4(a, POSTERIOR, image.number, place / 4, normals);
            normal = pick(normals, place % 4);
        }
        x = posterior_sample(x, a.kind == MEAN_LOGVAR ? std_of_logvar(std) : std, normal);
    }
    return normalized(x, a.shift ? a.shift[c] : 0.0f, a.scale ? a.scale[c] : 1.0f);
}

__global__ void __launch_bounds__(THREADS) q_sample_any_fwd_kernel(QSampleArguments a, QSampleShape g) {
    const Image image = image_of(a);
    const int64_t start = image.number * g.size;
    uint32_t groups = g.size / 4 + (g.size % 4 != 0);
    for (uint32_t group = blockIdx.y * THREADS + threadIdx.x; group < groups; group += gridDim.y * THREADS) {
        float normals[4];
        if (!a.noise) draw_4(a, NOISE, image.number, group, normals);
#pragma unroll 1
        for (uint32_t j = 0; j < 4 && 4 * group + j < g.size; j++) {
            uint32_t element = 4 * group + j;
            uint32_t c = g.by_plane.quotient(element), line = g.by_width.quotient(element);
            uint32_t x = element - line * g.width, y = line - c * g.height;
            float eps = a.noise ? a.noise[start + element] : pick(normals, j);
            uint32_t place = image.mirrored ? element + g.width - 1 - 2 * x : element;
            float x_start = image.valid ? x_start_1(a, g, image, c, place) : 0.0f;
            a.target[start + element] = combined(image.k.c_x, x_start, image.k.c_eps, eps);
            uint32_t offset = a.patch ? g.tokens.offset(c, y, x) : element;
            store_as(a.x_t_dtype, a.x_t, start + offset, combined(image.k.alpha, x_start, image.k.sigma, eps));
        }
    }
}

// ----------------------------------------------------------------------------
// Launchers

constexpr int64_t MOST_TILES = 65535;      // of grid.y; what is left over, blocks walk to
constexpr int64_t BLOCKS_THAT_FILL = 4096;  // some waves of the largest GPU
constexpr int64_t SHARED_BYTES = 48 << 10;  // what a block may have without asking

static QSampleShape shape_of(const QSampleArguments& a) {
    QSampleShape g{};
    g.channels = (uint32_t)a.channels;
    g.height = (uint32_t)a.height;
    g.width = (uint32_t)a.width;
    g.plane = (uint32_t)(a.height * a.width);
    g.size = (uint32_t)(a.channels * a.height * a.width);
    g.by_width = Divisor(g.width);
    g.by_plane = Divisor(g.plane);
    g.tokens = tokens_of(a.channels, a.width, a.patch);
    if (a.patch && a.width % 4 == 0) {
        // As many rows of patches as give each thread its four elements, one at least.
        int64_t patches_high = THREADS * 4 / (a.channels * a.width * a.patch);
        int64_t rows = a.patch * (patches_high < 1 ? 1 : patches_high);
        g.tile_rows = (uint32_t)(rows < a.height ? rows : a.height);
        g.tile_groups = (uint32_t)(a.channels * g.tile_rows * a.width / 4);
        g.by_channel_groups = Divisor(g.tile_rows * a.width / 4);
        g.by_row_groups = Divisor(a.width / 4);
    }
    return g;
}

static bool packs_fit(const QSampleArguments& a, const QSampleShape& g) {
    bool fit = a.width % 4 == 0 && aligned(a.latents, 4 * bytes_of(a.latents_dtype)) && aligned(a.target, 16) &&
               aligned(a.noise, 16) && aligned(a.posterior_noise, 16);
    int64_t size = bytes_of(a.x_t_dtype);
    if (!a.patch) return fit && aligned(a.x_t, 4 * size);
    int64_t tile = g.tile_rows * a.width * a.channels * size;
    return fit && aligned(a.x_t, 16) && a.patch * a.width * a.channels * size % 16 == 0 && tile <= SHARED_BYTES;
}

// How many blocks share an image. One takes several tiles where the images alone fill the GPU, since what comes before
// the first tile (rows and coefficients, one load after the other) is then paid for once.
static unsigned tiles(int64_t images, int64_t work, int64_t of_a_tile) {
    int64_t count = (work + of_a_tile - 1) / of_a_tile;
    int64_t enough = (BLOCKS_THAT_FILL + images - 1) / images;
    int64_t most = enough < MOST_TILES ? enough : MOST_TILES;
    return (unsigned)(count < most ? count : most);
}

template <typename In, typename Out>
static void launch_typed(const QSampleArguments& a, const QSampleShape& g, cudaStream_t stream) {
    if (a.patch) {
        dim3 grid((unsigned)a.count, tiles(a.count, g.height, g.tile_rows));
        size_t shared = (size_t)g.tile_groups * 4 * sizeof(Out);
        launch(q_sample_tokens_fwd_kernel<In, Out>, grid, THREADS, shared, stream, a, g);
    } else {
        dim3 grid((unsigned)a.count, tiles(a.count, g.size / 4, THREADS));
        launch(q_sample_fwd_kernel<In, Out>, grid, THREADS, 0, stream, a, g);
    }
}

template <typename In>
static void launch_by_x_t(const QSampleArguments& a, const QSampleShape& g, cudaStream_t stream) {
    switch (a.x_t_dtype) {
        case Dtype::BFLOAT16:
            return launch_typed<In, __nv_bfloat16>(a, g, stream);
        case Dtype::FLOAT16:
            return launch_typed<In, __half>(a, g, stream);
        default:
            return launch_typed<In, float>(a, g, stream);
    }
}

static void launch_by_latents(const QSampleArguments& a, const QSampleShape& g, cudaStream_t stream) {
    switch (a.latents_dtype) {
        case Dtype::BFLOAT16:
            return launch_by_x_t<__nv_bfloat16>(a, g, stream);
        case Dtype::FLOAT16:
            return launch_by_x_t<__half>(a, g, stream);
        case Dtype::UINT8:
            return launch_by_x_t<uint8_t>(a, g, stream);
        default:
            return launch_by_x_t<float>(a, g, stream);
    }
}

void launch_q_sample_fwd(const QSampleArguments& a, cudaStream_t stream) {
    if (a.count == 0) return;
    QSampleShape g = shape_of(a);
    if (packs_fit(a, g)) {
        launch_by_latents(a, g, stream);
    } else {
        dim3 grid((unsigned)a.count, tiles(a.count, (g.size + 3ll) / 4, THREADS));
        launch(q_sample_any_fwd_kernel, grid, THREADS, 0, stream, a, g);
    }
    check_launch("q_sample");
}

}  // namespace erd_fast
