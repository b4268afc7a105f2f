/*
linear_gelu on a GPU: z = x W^T + b and GELU(z) in one GEMM, and in the backward pass, in the next layer's
input-gradient GEMM, GELU's derivative and the bias gradient: cuBLASLt's epilogues GELU_AUX_BIAS and DGELU_BGRAD, which
see the accumulators before they are rounded.

cuBLASLt counts in columns: our row-major (M, H) is its H x M. Its product R, of H x M, is
    forward     R = gelu(A B + bias)    A = W, K x H, transposed    B = x, K x M     R = activation    aux = z
    backward    R = (A B) gelu'(aux)    A = V, H x D                B = dy, D x M    R = dz            aux = z
with V (D, H) the next layer's weight. The bias, and its gradient, has a number for each row of R; the gradient is the
sum over its M columns, our rows, and so that of the layer before V, whose z is aux.
The gradient comes in dz's type and is widened afterwards.

The first of cuBLASLt's proposals for a shape is kept with its descriptors; it says how much workspace it needs, which
the caller allocates. What has no GEMM in it are kernels of ours: the activation again from z, the derivative where the
activation's gradient is given, and its bias gradient, summed over chunks of rows and then over chunks, in fixed order.
*/
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "cublaslt.h"
#include "kernel.cuh"

namespace erd_fast {

// ----------------------------------------------------------------------------
// GEMMs with an epilogue

namespace {

struct Gemm {  // D (m x n) = op(A) (m x k) B (k x n), by columns and packed
    uint32_t epilogue;
    bool transpose_a;
    Dtype dtype;
    int64_t m, n, k;
    const void *a, *b;
    void *d, *aux, *vector;
    int device;
};

struct Plan {
    lt::Desc desc;
    lt::Layout a, b, d;
    lt::Heuristic chosen;
};

constexpr uint64_t MOST_WORKSPACE = 32 << 20;  // what Hopper's best algorithms ask for
constexpr int PROPOSALS = 8;
constexpr uint32_t FINEST_ALIGNMENT = WORKSPACE_ALIGNMENT;

std::mutex guard;

int64_t blocks_of(int64_t items, int64_t of_a_block) { return (items + of_a_block - 1) / of_a_block; }

int lt_type(Dtype dtype) {
    return dtype == Dtype::FLOAT32 ? lt::R_32F : dtype == Dtype::BFLOAT16 ? lt::R_16BF : lt::R_16F;
}

uint32_t alignment_of(const void* pointer) {
    uint32_t bytes = FINEST_ALIGNMENT;
    while (!aligned(pointer, bytes)) bytes /= 2;
    return bytes;
}

std::array<uint32_t, 5> alignments_of(const Gemm& g) {
    return {alignment_of(g.a), alignment_of(g.b), alignment_of(g.d), alignment_of(g.aux), alignment_of(g.vector)};
}

// Handles and plans live as long as the process: the library may be gone before our own destructors run.
lt::Handle handle_of(int device) {
    static auto& handles = *new std::map<int, lt::Handle>;
    auto found = handles.find(device);
    if (found != handles.end()) return found->second;
    lt::Handle handle;
    lt::check(lt::library().create(&handle), "cublasLtCreate");
    return handles[device] = handle;
}

template <typename T>
void set(lt::Desc desc, int attribute, T value) {
    lt::check(lt::library().desc_set(desc, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
}

template <typename T>
void set(lt::Preference preference, int attribute, T value) {
    lt::check(lt::library().preference_set(preference, attribute, &value, sizeof value),
              "cublasLtMatmulPreferenceSetAttribute");
}

lt::Layout layout(Dtype dtype, int64_t rows, int64_t columns) {
    lt::Layout made;
    lt::check(lt::library().layout_create(&made, lt_type(dtype), rows, columns, rows), "cublasLtMatrixLayoutCreate");
    return made;
}

void point(lt::Desc desc, const Gemm& g) {
    set(desc, lt::DESC_BIAS_POINTER, g.vector);
    set(desc, lt::DESC_AUX_POINTER, g.aux);
}

lt::Heuristic first_that_runs(const Plan& plan, const Gemm& g) {
    lt::Preference preference;
    lt::check(lt::library().preference_create(&preference), "cublasLtMatmulPreferenceCreate");
    set(preference, lt::PREF_MAX_WORKSPACE_BYTES, MOST_WORKSPACE);
    set(preference, lt::PREF_MIN_ALIGNMENT_A, alignment_of(g.a));
    set(preference, lt::PREF_MIN_ALIGNMENT_B, alignment_of(g.b));
    set(preference, lt::PREF_MIN_ALIGNMENT_C, alignment_of(g.d));
    set(preference, lt::PREF_MIN_ALIGNMENT_D, alignment_of(g.d));
    lt::Heuristic proposed[PROPOSALS];
    int count = 0;
    int status = lt::library().heuristic(handle_of(g.device), plan.desc, plan.a, plan.b, plan.d, plan.d, preference,
                                         PROPOSALS, proposed, &count);
    lt::library().preference_destroy(preference);
    if (status != lt::NOT_SUPPORTED) lt::check(status, "cublasLtMatmulAlgoGetHeuristic");
    for (int i = 0; i < count; i++) {
        if (proposed[i].state == lt::SUCCESS) return proposed[i];
    }
    throw std::runtime_error("linear_gelu: cuBLASLt has no algorithm with the epilogue for this GEMM");
}

// The plan for these shapes; `guard` is held, and the device is the current one.
const Plan& plan_of(const Gemm& g) {
    using Key = std::tuple<int, uint32_t, Dtype, int64_t, int64_t, int64_t, std::array<uint32_t, 5>>;
    static auto& plans = *new std::map<Key, Plan>;
    Key key{g.device, g.epilogue, g.dtype, g.m, g.n, g.k, alignments_of(g)};
    auto found = plans.find(key);
    if (found != plans.end()) return found->second;
    Plan plan{};
    plan.a = g.transpose_a ? layout(g.dtype, g.k, g.m) : layout(g.dtype, g.m, g.k);
    plan.b = layout(g.dtype, g.k, g.n);
    plan.d = layout(g.dtype, g.m, g.n);
    lt::check(lt::library().desc_create(&plan.desc, lt::COMPUTE_32F, lt::R_32F), "cublasLtMatmulDescCreate");
    set(plan.desc, lt::DESC_TRANSA, g.transpose_a ? lt::OP_T : lt::OP_N);
    set(plan.desc, lt::DESC_EPILOGUE, g.epilogue);
    set(plan.desc, lt::DESC_AUX_LD, g.m);
    point(plan.desc, g);  // the alignment of these pointers counts
    plan.chosen = first_that_runs(plan, g);
    return plans[key] = plan;
}

int64_t workspace_of(const Gemm& g) {
    std::lock_guard<std::mutex> lock(guard);
    return (int64_t)plan_of(g).chosen.workspace;
}

void multiply(const Gemm& g, void* workspace, cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(guard);
    const Plan& plan = plan_of(g);
    point(plan.desc, g);
    const float one = 1.0f, zero = 0.0f;
    int status = lt::library().matmul(handle_of(g.device), plan.desc, &one, g.a, plan.a, g.b, plan.b, &zero, g.d,
                                      plan.d, g.d, plan.d, &plan.chosen.algorithm, workspace, plan.chosen.workspace,
                                      stream);
    lt::check(status, "cublasLtMatmul");
}

Gemm gemm_of(const LinearGeluArguments& a) {
    Gemm g{};
    g.epilogue = lt::GELU_AUX_BIAS;
    g.transpose_a = true;
    g.dtype = a.dtype;
    g.m = a.hidden, g.n = a.rows, g.k = a.inputs;
    g.a = a.weight, g.b = a.x, g.d = a.activation;
    g.aux = a.pre, g.vector = (void*)a.bias;
    g.device = a.device;
    return g;
}

// cuBLASLt's bias gradient is of the GEMM's type: where that is not float32, it comes first in the workspace.
bool is_widened(const LinearGeluBackwardArguments& a) { return a.dtype != Dtype::FLOAT32; }

int64_t bytes_to_widen(const LinearGeluBackwardArguments& a) {
    return is_widened(a) ? blocks_of(a.hidden * bytes_of(a.dtype), WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT : 0;
}

Gemm gemm_of(const LinearGeluBackwardArguments& a) {
    // While the workspace is still to be allocated, an address of its alignment stands for it.
    void* workspace = a.workspace ? a.workspace : (void*)(uintptr_t)WORKSPACE_ALIGNMENT;
    Gemm g{};
    g.epilogue = lt::DGELU_BGRAD;
    g.dtype = a.dtype;
    g.m = a.hidden, g.n = a.rows, g.k = a.outputs;
    g.a = a.next_weight, g.b = a.dy, g.d = a.dpre;
    g.aux = (void*)a.pre, g.vector = is_widened(a) ? workspace : a.dbias;
    g.device = a.device;
    return g;
}

}  // namespace

// ----------------------------------------------------------------------------
// Kernels

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int COLUMNS = 4 * WARP;  // of a block: each lane has four neighbours
constexpr int PACKS_AT_ONCE = 4, ROWS_AT_ONCE = 2;  // that a thread has in flight
constexpr float CUT = 10.0f;       // beyond it, GELU(z) / z is 0 or 1 in float32, and flat

// GELU(z) / z in the tanh form, and its derivative, of a z within the cut.
struct Share {
    float value, slope;
};

__device__ inline Share share_of(float z) {
    constexpr float LINEAR = 1.5957691216057308f, CUBIC = 0.07135481627260025f;  // 2 sqrt(2/pi), and 0.044715 of it
    float square = z * z;
    float rest = expf(-z * (LINEAR + CUBIC * square)), share = 1.0f / (1.0f + rest);
    return {share, rest * share * share * (LINEAR + 3.0f * CUBIC * square)};  // 1 - share would lose what is small
}

// These leave NaN as it is.
__device__ inline float cut_below(float z) { return z < -CUT ? -CUT : z; }
__device__ inline float cut(float z) { return z > CUT ? CUT : cut_below(z); }

// z to GELU(z).
template <typename T>
__global__ void __launch_bounds__(THREADS) linear_gelu_again_bwd_kernel(LinearGeluBackwardArguments a) {
    int64_t packs = a.rows * a.hidden / 4, first = (int64_t)blockIdx.x * THREADS * PACKS_AT_ONCE + threadIdx.x;
    float z[PACKS_AT_ONCE][4];
#pragma unroll
    for (int i = 0; i < PACKS_AT_ONCE; i++) {
        if (first + i * THREADS < packs) load_4<T>(a.pre, 4 * (first + i * THREADS), z[i]);
    }
#pragma unroll
    for (int i = 0; i < PACKS_AT_ONCE; i++) {
        if (first + i * THREADS >= packs) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) z[i][j] = cut_below(z[i][j]) * share_of(cut(z[i][j])).value;
        store_4<T>(a.activation, 4 * (first + i * THREADS), z[i]);
    }
}

// The activation's gradient to z's, which may take its place, and its sums over a chunk of rows. A block has COLUMNS
// columns, a warp every WARPS-th row of the chunk.
template <typename T>
__global__ void __launch_bounds__(THREADS, 4) linear_gelu_bwd_kernel(LinearGeluBackwardArguments a, int64_t chunk,
                                                                    float* partial) {
    __shared__ float sums[WARPS][COLUMNS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t column = (int64_t)blockIdx.y * COLUMNS + 4 * lane, start = (int64_t)blockIdx.x * chunk;
    int64_t end = start + chunk < a.rows ? start + chunk : a.rows;
    float sum[4] = {};
    for (int64_t first = start + warp; first < end && column < a.hidden; first += ROWS_AT_ONCE * WARPS) {
        float gradient[ROWS_AT_ONCE][4], z[ROWS_AT_ONCE][4];
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) {
            int64_t row = first + i * WARPS;
            if (row >= end) continue;
            load_4<T>(a.dy, row * a.hidden + column, gradient[i]);
            load_4<T>(a.pre, row * a.hidden + column, z[i]);
        }
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) {
            int64_t row = first + i * WARPS;
            if (row >= end) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Share share = share_of(cut(z[i][j]));
                gradient[i][j] *= share.value + cut(z[i][j]) * share.slope;
                sum[j] += gradient[i][j];
                z[i][j] = cut_below(z[i][j]) * share.value;
            }
            store_4<T>(a.dpre, row * a.hidden + column, gradient[i]);
            if (a.activation) store_4<T>(a.activation, row * a.hidden + column, z[i]);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) sums[warp][4 * lane + j] = sum[j];
    __syncthreads();
    column = (int64_t)blockIdx.y * COLUMNS + threadIdx.x;
    if (threadIdx.x >= COLUMNS || column >= a.hidden) return;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += sums[i][threadIdx.x];
    partial[(int64_t)blockIdx.x * a.hidden + column] = total;
}

// Sums over chunks. A block has WARP columns, a warp every WARPS-th chunk.
__global__ void __launch_bounds__(THREADS) linear_gelu_sum_bwd_kernel(const float* partial, int64_t chunks,
                                                                     int64_t hidden, float* dbias) {
    __shared__ float sums[WARPS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t column = (int64_t)blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < hidden) {
#pragma unroll 8
        for (int64_t chunk = warp; chunk < chunks; chunk += WARPS) sum += partial[chunk * hidden + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp || column >= hidden) return;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += sums[i][lane];
    dbias[column] = total;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) linear_gelu_widen_bwd_kernel(const T* narrow, int64_t hidden, float* dbias) {
    int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (column < hidden) dbias[column] = widen(narrow[column]);
}

// ----------------------------------------------------------------------------
// Launchers

int64_t linear_gelu_fwd_workspace(const LinearGeluArguments& a) { return workspace_of(gemm_of(a)); }

void launch_linear_gelu_fwd(const LinearGeluArguments& a, cudaStream_t stream) {
    multiply(gemm_of(a), a.workspace, stream);
}

// Rows of a chunk, a power of two: few where more would leave multiprocessors idle, many to have few partial sums.
static int64_t chunk_of(const LinearGeluBackwardArguments& a) {
    constexpr int64_t LEAST = 32, MOST = 256, BLOCKS = 2048;
    int64_t chunk = LEAST;
    while (chunk < MOST && blocks_of(a.rows, chunk) * blocks_of(a.hidden, COLUMNS) > BLOCKS) chunk *= 2;
    return chunk;
}

int64_t linear_gelu_bwd_workspace(const LinearGeluBackwardArguments& a) {
    if (a.next_weight) return bytes_to_widen(a) + workspace_of(gemm_of(a));
    return blocks_of(a.rows, chunk_of(a)) * a.hidden * (int64_t)sizeof(float);
}

template <typename T>
static void launch_gemm(const LinearGeluBackwardArguments& a, cudaStream_t stream) {
    multiply(gemm_of(a), (char*)a.workspace + bytes_to_widen(a), stream);
    if constexpr (sizeof(T) < sizeof(float)) {
        unsigned blocks = (unsigned)blocks_of(a.hidden, THREADS);
        launch(linear_gelu_widen_bwd_kernel<T>, blocks, THREADS, 0, stream, (const T*)a.workspace, a.hidden, a.dbias);
    }
    if (a.activation) {
        unsigned blocks = (unsigned)blocks_of(a.rows * a.hidden / 4, THREADS * PACKS_AT_ONCE);
        launch(linear_gelu_again_bwd_kernel<T>, blocks, THREADS, 0, stream, a);
    }
}

template <typename T>
static void launch_elementwise(const LinearGeluBackwardArguments& a, cudaStream_t stream) {
    int64_t chunk = chunk_of(a), chunks = blocks_of(a.rows, chunk);
    float* partial = (float*)a.workspace;
    dim3 grid((unsigned)chunks, (unsigned)blocks_of(a.hidden, COLUMNS));
    launch(linear_gelu_bwd_kernel<T>, grid, THREADS, 0, stream, a, chunk, partial);
    unsigned blocks = (unsigned)blocks_of(a.hidden, WARP);
    launch(linear_gelu_sum_bwd_kernel, blocks, THREADS, 0, stream, partial, chunks, a.hidden, a.dbias);
}

template <typename T>
static void launch_typed(const LinearGeluBackwardArguments& a, cudaStream_t stream) {
    if (a.next_weight) {
        launch_gemm<T>(a, stream);
    } else {
        launch_elementwise<T>(a, stream);
    }
    check_launch("linear_gelu");
}

void launch_linear_gelu_bwd(const LinearGeluBackwardArguments& a, cudaStream_t stream) {
    switch (a.dtype) {
        case Dtype::BFLOAT16:
            return launch_typed<__nv_bfloat16>(a, stream);
        case Dtype::FLOAT16:
            return launch_typed<__half>(a, stream);
        default:
            return launch_typed<float>(a, stream);
    }
}

}  // namespace erd_fast
