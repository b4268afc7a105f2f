/*
The compiled ops, free of torch: what each takes, the launcher of its CUDA kernel and its CPU twin.

An argument struct holds raw pointers to contiguous memory; a null pointer is an argument left out. bindings.cpp fills
it and has checked it. A launcher enqueues on the stream and returns; it throws std::runtime_error if the launch is
refused. A twin does images or chunks [first, last), so that the caller may cut a batch among threads; no result depends
on the cut.
*/
#pragma once

#include <cstdint>

#ifdef ERD_FAST_CUDA
#include <cuda_runtime_api.h>
#endif

namespace erd_fast {

enum class Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, UINT8 = 3 };

inline int64_t bytes_of(Dtype dtype) {
    return dtype == Dtype::FLOAT32 ? 4 : dtype == Dtype::UINT8 ? 1 : 2;
}

// ----------------------------------------------------------------------------
// draw: the integer decisions of a batch

struct DrawArguments {
    const int64_t* counter;  // one number on the device
    uint32_t k0, k1;         // low and high word of the seed
    uint32_t purpose;
    int64_t offset, dataset_size, num_timesteps, strata;
    uint64_t drop_threshold;
    uint32_t order_side, strata_side;
    const int64_t* t_table;  // (num_timesteps,) or null
    int64_t count;
    int64_t *ids, *sample_index, *t_index;  // (count,) out
    bool *label_drop, *flip;                // (count,) out
};

void draw_fwd_cpu(const DrawArguments& a, int64_t first, int64_t last);

// ----------------------------------------------------------------------------
// q_sample: stored latents to noisy input and target

struct QSampleArguments {
    const void* latents;  // (stored, C or 2 C, H, W)
    Dtype latents_dtype;
    int kind;
    int64_t stored, count, channels, height, width;
    const float* coefficients;  // (steps, 4)
    int64_t steps;
    const int64_t *t_index, *index;  // (count,) or null: row i for image i
    const float *scale, *shift;      // (C,) or null
    const bool* flip;                // (count,) or null
    const int64_t* ids;              // (count,), where noise is drawn
    uint32_t k0, k1, purpose;
    const float *noise, *posterior_noise;  // (count, C, H, W) or null: drawn
    int64_t patch;                         // 0: x_t like target
    void* x_t;                             // (count, C, H, W), or tokens
    Dtype x_t_dtype;
    float* target;  // (count, C, H, W)
};

// Rows of latents and coefficients are in range.
void q_sample_fwd_cpu(const QSampleArguments& a, int64_t first, int64_t last);

// ----------------------------------------------------------------------------
// diffusion_loss: weighted mean squared error, its parts and its gradient

struct DiffusionLossArguments {
    const void* prediction;  // (count, predicted_channels, H, W), or tokens
    Dtype dtype;
    const float* target;  // (count, C, H, W)
    int64_t count, channels, predicted_channels, height, width, patch;
    const float* weight;  // (steps,)
    int64_t steps;
    const int64_t* t_index;  // (count,), or null: weight i for image i
    int64_t batch_size;
    const float* loss_scale;  // one number on the device, or null: 1
    float *loss, *per_sample;
    float *bin_sum, *bin_count;  // (num_bins,)
    int64_t num_bins;
    void* dprediction;  // like prediction, or null
};

// Images first, then, once all are done, the sums over them.
void diffusion_loss_fwd_cpu(const DiffusionLossArguments& a, int64_t first, int64_t last);
void diffusion_loss_sum_cpu(const DiffusionLossArguments& a);

// ----------------------------------------------------------------------------
// linear_gelu: z = x W^T + b and GELU(z), tanh form; on a GPU alone

struct LinearGeluArguments {
    const void *x, *weight, *bias;  // (rows, inputs), (hidden, inputs), (hidden,)
    void *activation, *pre;         // (rows, hidden) out, pre is z
    Dtype dtype;                    // of all of them
    int64_t rows, inputs, hidden;
    int device;
    void* workspace;
};

struct LinearGeluBackwardArguments {
    const void* dy;           // (rows, outputs), or without next_weight (rows, hidden): the activation's gradient
    const void* next_weight;  // (outputs, hidden) or null
    const void* pre;          // (rows, hidden)
    void* dpre;               // (rows, hidden) out; without next_weight it may be dy
    float* dbias;             // (hidden,) out
    void* activation;         // (rows, hidden) out, or null
    Dtype dtype;              // of all but dbias
    int64_t rows, outputs, hidden;
    int device;
    void* workspace;
};

// ----------------------------------------------------------------------------
// many tensors as one launch: the table of erd_fast/ops/tensor_table.py, which names its columns

constexpr int CHUNK = 8192, MOST_EMAS = 4;

struct TensorRow {
    const void* gradient;
    float *parameter, *exp_avg, *exp_avg_sq;
    void* copy;              // or null
    float* emas[MOST_EMAS];  // each may be null
    int64_t numel, group, format;
};

struct ChunkPlace {
    int32_t row, number;  // in the table; of the chunk within its tensor
};

struct ChunkTable {
    const TensorRow* rows;
    const ChunkPlace* places;
    int64_t chunks;
};

constexpr int64_t TABLE_COLUMNS = 12, PLACE_COLUMNS = 2;
static_assert(sizeof(TensorRow) == TABLE_COLUMNS * sizeof(int64_t), "a row is what torch holds as int64");

// ----------------------------------------------------------------------------
// grad_norm: the norm of all gradients together

struct GradNormArguments {
    ChunkTable table;
    float* norm;      // one number, out
    float* partials;  // (chunks,) out: sums of squares
};

// Chunks first, then, once all are done, the sum over them.
void grad_norm_fwd_cpu(const GradNormArguments& a, int64_t first, int64_t last);
void grad_norm_sum_cpu(const GradNormArguments& a);

// ----------------------------------------------------------------------------
// adamw_ema: a step of AdamW with averages; the structs are rows of tensors that erd_fast/ops/adamw_ema.py explains

struct GroupSettings {
    double lr, beta1, beta2, eps, weight_decay, grad_clip, warmup, cosine_steps, start, ema_decays[MOST_EMAS], rest[3];
};

struct GroupFactors {
    float apply, gradient, keep, new1, old2, new2, root, eps, step, emas[MOST_EMAS], lr, rest[2];
};

struct StepCounts {
    int64_t opt_step, growth, skipped;
};

struct StepScalars {
    float loss_scale, grad_norm;
};

constexpr int64_t GROUP_COLUMNS = 16;
static_assert(sizeof(GroupSettings) == GROUP_COLUMNS * sizeof(double), "a row of settings");
static_assert(sizeof(GroupFactors) == GROUP_COLUMNS * sizeof(float), "a row of factors");

struct AdamwEmaArguments {
    ChunkTable table;
    const GroupSettings* settings;  // (groups,)
    int64_t groups;
    const float* norm;  // one number on the device
    int64_t growth_interval;
    int decays;
    StepCounts* counts;     // one
    StepScalars* scalars;   // one
    GroupFactors* factors;  // (groups,) out
};

// The numbers of the step first, then chunks.
void adamw_ema_advance_cpu(const AdamwEmaArguments& a);
void adamw_ema_fwd_cpu(const AdamwEmaArguments& a, int64_t first, int64_t last);

// ----------------------------------------------------------------------------
// instruction sets of the CPU twins; results are the same bits on each

enum CpuLevel : int { BASELINE = 0, AVX2 = 1, AVX512 = 2 };

int cpu_level();                // in use: the best of this machine, unless one was set
bool set_cpu_level(int level);  // false, and nothing changes, if this machine lacks it

#ifdef ERD_FAST_CUDA
void launch_draw_fwd(const DrawArguments& a, cudaStream_t stream);
void launch_q_sample_fwd(const QSampleArguments& a, cudaStream_t stream);
void launch_diffusion_loss_fwd(const DiffusionLossArguments& a, cudaStream_t stream);
void launch_grad_norm_fwd(const GradNormArguments& a, cudaStream_t stream);
void launch_adamw_ema_fwd(const AdamwEmaArguments& a, cudaStream_t stream);

// hidden, inputs and outputs are multiples of 8, and matrices begin at multiples of 16 bytes. The workspace has as many
// bytes as are asked for and begins at a multiple of WORKSPACE_ALIGNMENT; asking throws too, if cuBLASLt cannot do it.
constexpr int64_t WORKSPACE_ALIGNMENT = 256;
int64_t linear_gelu_fwd_workspace(const LinearGeluArguments& a);
int64_t linear_gelu_bwd_workspace(const LinearGeluBackwardArguments& a);
void launch_linear_gelu_fwd(const LinearGeluArguments& a, cudaStream_t stream);
void launch_linear_gelu_bwd(const LinearGeluBackwardArguments& a, cudaStream_t stream);
#endif

}  // namespace erd_fast
