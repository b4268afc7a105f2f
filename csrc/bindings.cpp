/*
torch.ops._erd_fast_C: the compiled ops as torch sees them, and the only file that sees torch.

Each binding checks what could make a kernel read or write where it must not, fills the argument struct of launchers.h,
and calls the CUDA launcher or the CPU twin. Outputs are the caller's. The public ops, erd_fast::..., are declared in
Python, which also explains shapes; a check here says op, argument, what was given and what is allowed.

Built against torch's stable ABI (TORCH_TARGET_VERSION, setup.py): one binary serves every torch from that version on.
The library needs no CUDA driver to load, nor a torch with CUDA: the one symbol that only such a torch has is weak.
*/
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#include "diffusion_math.h"
#include "launchers.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace erd_fast {
namespace {

// ----------------------------------------------------------------------------
// checks

using Shape = std::initializer_list<int64_t>;

template <typename Numbers>
std::string listed(const Numbers& numbers) {
    std::ostringstream text;
    text << "(";
    for (size_t i = 0; i < numbers.size(); i++) text << (i ? ", " : "") << numbers.begin()[i];
    text << (numbers.size() == 1 ? ",)" : ")");
    return text.str();
}

// The device of a call, and its checks.
struct Call {
    const char* op;
    bool cuda;
    int32_t device;

    Call(const char* name, const Tensor& leader)
        : op(name), cuda(leader.is_cuda()), device(cuda ? leader.get_device_index() : 0) {}

    // What of a tensor is the same for all of its uses: device, layout, shape.
    void check(const char* argument, const Tensor& tensor, Shape shape) const {
        STD_TORCH_CHECK(tensor.is_cuda() == cuda && (!cuda || tensor.get_device_index() == device), op, ": ", argument,
                        ": given a tensor on another device, allowed ", cuda ? "cuda:" : "cpu",
                        cuda ? std::to_string(device) : "");
        STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", argument, ": given strides ", listed(tensor.strides()),
                        " of shape ", listed(tensor.sizes()), ", allowed contiguous memory");
        auto given = tensor.sizes();
        bool same = given.size() == shape.size() && std::equal(shape.begin(), shape.end(), given.begin());
        STD_TORCH_CHECK(same, op, ": ", argument, ": given shape ", listed(given), ", allowed ", listed(shape));
    }

    void check_dtype(const char* argument, const Tensor& tensor, ScalarType allowed) const {
        ScalarType given = tensor.scalar_type();
        STD_TORCH_CHECK(given == allowed, op, ": ", argument, ": given ", torch::headeronly::toString(given),
                        ", allowed ", torch::headeronly::toString(allowed));
    }

    template <typename T>
    const T* in(const char* argument, const Tensor& tensor, ScalarType dtype, Shape shape) const {
        check_dtype(argument, tensor, dtype);
        check(argument, tensor, shape);
        return (const T*)tensor.const_data_ptr();
    }

    template <typename T>
    const T* in(const char* argument, const OptionalTensor& tensor, ScalarType dtype, Shape shape) const {
        return tensor ? in<T>(argument, *tensor, dtype, shape) : nullptr;
    }

    template <typename T>
    T* out(const char* argument, const Tensor& tensor, ScalarType dtype, Shape shape) const {
        check_dtype(argument, tensor, dtype);
        check(argument, tensor, shape);
        return (T*)tensor.mutable_data_ptr();
    }

    Dtype float_dtype(const char* argument, const Tensor& tensor) const {
        ScalarType given = tensor.scalar_type();
        STD_TORCH_CHECK(given == ScalarType::Float || given == ScalarType::BFloat16 || given == ScalarType::Half, op,
                        ": ", argument, ": given ", torch::headeronly::toString(given),
                        ", allowed Float, BFloat16 or Half");
        return given == ScalarType::Float      ? Dtype::FLOAT32
               : given == ScalarType::BFloat16 ? Dtype::BFLOAT16
                                               : Dtype::FLOAT16;
    }

    void check_range(const char* argument, int64_t given, int64_t lowest, int64_t highest) const {
        STD_TORCH_CHECK(given >= lowest && given <= highest, op, ": ", argument, ": given ", given, ", allowed ",
                        lowest, " to ", highest);
    }

    // Rows of a table, of `count` images. On a GPU the kernel sees to it: an image out of range becomes NaN.
    void check_rows(const char* argument, const int64_t* rows, int64_t count, int64_t limit) const {
        for (int64_t i = 0; rows && !cuda && i < count; i++) {
            STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < limit, op, ": ", argument, ": row ", i, ": given ", rows[i],
                            ", allowed 0 to ", limit - 1);
        }
    }
};

// C, H and W of (N, C, H, W), an image below 2^31 elements, patches that fit.
void check_image(const Call& call, const char* argument, const Tensor& tensor, int64_t patch) {
    auto shape = tensor.sizes();
    STD_TORCH_CHECK(shape.size() == 4, call.op, ": ", argument, ": given shape ", listed(shape),
                    ", allowed (N, C, H, W)");
    constexpr int64_t LARGEST = (int64_t(1) << 31) - 1;
    call.check_range("count of images", shape[0], 0, LARGEST);
    int64_t size = 1;
    for (size_t i = 1; i < 4; i++) {
        bool fits = shape[i] >= 1 && shape[i] <= LARGEST / size;
        STD_TORCH_CHECK(fits, call.op, ": ", argument, ": given shape ", listed(shape), ", allowed images of 1 to ",
                        LARGEST, " elements");
        size *= shape[i];
    }
    bool whole = patch == 0 || (patch > 0 && shape[2] % patch == 0 && shape[3] % patch == 0);
    STD_TORCH_CHECK(whole, call.op, ": patch: given ", patch, ", allowed 0 or a divisor of height and width ",
                    listed(shape));
}

// The shape an image tensor of these channels has in memory: (N, C, H, W), or tokens.
void check_layout(const Call& call, const char* argument, const Tensor& tensor, const Tensor& image, int64_t channels,
                  int64_t patch) {
    int64_t count = image.size(0), height = image.size(2), width = image.size(3);
    if (patch) {
        call.check(argument, tensor, {count, height / patch * (width / patch), patch * patch * channels});
    } else {
        call.check(argument, tensor, {count, channels, height, width});
    }
}

// The table of erd_fast/ops/tensor_table.py. Its addresses are taken at their word; on a GPU, so are its other numbers.
ChunkTable table_of(const Call& call, const Tensor& rows, const Tensor& places, int64_t chunk) {
    call.check_range("chunk", chunk, CHUNK, CHUNK);
    int64_t tensors = rows.numel() / TABLE_COLUMNS, chunks = places.numel() / PLACE_COLUMNS;
    call.check_range("chunks", chunks, 0, (int64_t(1) << 31) - 1);
    ChunkTable table{call.in<TensorRow>("rows", rows, ScalarType::Long, {tensors, TABLE_COLUMNS}),
                     call.in<ChunkPlace>("places", places, ScalarType::Int, {chunks, PLACE_COLUMNS}), chunks};
    for (int64_t i = 0; !call.cuda && i < chunks; i++) {
        const ChunkPlace& place = table.places[i];
        call.check_range("row of places", place.row, 0, tensors - 1);
        call.check_range("chunk of places", place.number, 0, (table.rows[place.row].numel - 1) / CHUNK);
    }
    return table;
}

// ----------------------------------------------------------------------------
// where it runs

// Elements worth a thread of their own: some twenty microseconds of work, several times what a fork costs.
constexpr int64_t DRAWN_ELEMENTS = 1 << 14, READ_ELEMENTS = 1 << 15, DRAWN_DECISIONS = 256;

int64_t grain(int64_t elements, int64_t size) {
    return elements / size > 0 ? elements / size : 1;
}

#ifdef ERD_FAST_CUDA
template <typename Arguments>
void launch(const Call& call, void (*launcher)(const Arguments&, cudaStream_t), const Arguments& arguments) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, call.op, ": this torch has no CUDA");
    torch::stable::accelerator::DeviceGuard guard(call.device);
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(call.device, &stream) == 0, call.op,
                    ": torch gives no current stream of cuda:", call.device);
    launcher(arguments, (cudaStream_t)stream);
}
#endif

// ----------------------------------------------------------------------------
// ops

void draw_fwd(const Tensor& counter, int64_t seed, int64_t dataset_size, int64_t num_timesteps, int64_t drop_threshold,
              int64_t offset, int64_t purpose, const OptionalTensor& t_table, int64_t strata, const Tensor& ids,
              const Tensor& sample_index, const Tensor& t_index, const Tensor& label_drop, const Tensor& flip) {
    Call call("draw", counter);
    call.check_range("dataset_size", dataset_size, 1, int64_t(1) << 32);
    call.check_range("num_timesteps", num_timesteps, 1, int64_t(1) << 31);
    call.check_range("drop_threshold", drop_threshold, 0, int64_t(1) << 32);
    call.check_range("offset", offset, 0, int64_t(1) << 62);
    call.check_range("purpose", purpose, 0, LAB);
    call.check_range("strata", strata, 0, int64_t(1) << 31);
    int64_t count = ids.numel();
    DrawArguments a{};
    a.counter = call.in<int64_t>("counter", counter, ScalarType::Long, {});
    a.k0 = (uint32_t)(uint64_t)seed;
    a.k1 = (uint32_t)((uint64_t)seed >> 32);
    a.purpose = (uint32_t)purpose;
    a.offset = offset;
    a.dataset_size = dataset_size;
    a.num_timesteps = num_timesteps;
    a.strata = strata;
    a.drop_threshold = (uint64_t)drop_threshold;
    a.order_side = order_side(dataset_size);
    a.strata_side = strata ? order_side(strata) : 0;
    a.t_table = call.in<int64_t>("t_table", t_table, ScalarType::Long, {num_timesteps});
    a.count = count;
    a.ids = call.out<int64_t>("ids", ids, ScalarType::Long, {count});
    a.sample_index = call.out<int64_t>("sample_index", sample_index, ScalarType::Long, {count});
    a.t_index = call.out<int64_t>("t_index", t_index, ScalarType::Long, {count});
    a.label_drop = call.out<bool>("label_drop", label_drop, ScalarType::Bool, {count});
    a.flip = call.out<bool>("flip", flip, ScalarType::Bool, {count});
#ifdef ERD_FAST_CUDA
    if (call.cuda) return launch(call, launch_draw_fwd, a);
#endif
    call.check_range("counter", *a.counter, 0, int64_t(1) << 62);
    torch::stable::parallel_for(0, count, DRAWN_DECISIONS,
                                [&](int64_t first, int64_t last) { draw_fwd_cpu(a, first, last); });
}

void q_sample_fwd(const Tensor& latents, const Tensor& coefficients, const OptionalTensor& t_index,
                  const OptionalTensor& index, int64_t kind, const OptionalTensor& scale, const OptionalTensor& shift,
                  const OptionalTensor& flip, const OptionalTensor& ids, int64_t seed, int64_t purpose,
                  const OptionalTensor& noise, const OptionalTensor& posterior_noise, int64_t patch, const Tensor& x_t,
                  const Tensor& target) {
    Call call("q_sample", target);
    call.check_range("kind", kind, SAMPLE_KIND, PIXELS);
    call.check_range("purpose", purpose, 0, LAB);
    check_image(call, "target", target, patch);
    int64_t count = target.size(0), channels = target.size(1), height = target.size(2), width = target.size(3);
    bool spreads = kind == MEAN_STD || kind == MEAN_LOGVAR;
    STD_TORCH_CHECK(ids || (noise && (posterior_noise || !spreads)),
                    "q_sample: ids: given none, needed to draw the noise that is not given");
    STD_TORCH_CHECK(latents.dim() == 4 && coefficients.dim() == 2,
                    "q_sample: latents and coefficients: allowed (M, C, H, W) and (K, 4)");
    QSampleArguments a{};
    a.stored = latents.size(0);
    a.steps = coefficients.size(0);
    STD_TORCH_CHECK(index || a.stored == count, "q_sample: latents: given ", a.stored, " rows and no index, allowed ",
                    count);
    STD_TORCH_CHECK(t_index || a.steps == count, "q_sample: coefficients: given ", a.steps,
                    " rows and no t_index, allowed ", count);
    if (kind == PIXELS) {
        call.check_dtype("latents", latents, ScalarType::Byte);
        a.latents_dtype = Dtype::UINT8;
    } else {
        a.latents_dtype = call.float_dtype("latents", latents);
    }
    call.check("latents", latents, {a.stored, spreads ? 2 * channels : channels, height, width});
    a.latents = latents.const_data_ptr();
    a.kind = (int)kind;
    a.count = count;
    a.channels = channels;
    a.height = height;
    a.width = width;
    a.coefficients = call.in<float>("coefficients", coefficients, ScalarType::Float, {a.steps, 4});
    a.t_index = call.in<int64_t>("t_index", t_index, ScalarType::Long, {count});
    a.index = call.in<int64_t>("index", index, ScalarType::Long, {count});
    a.scale = call.in<float>("scale", scale, ScalarType::Float, {channels});
    a.shift = call.in<float>("shift", shift, ScalarType::Float, {channels});
    a.flip = call.in<bool>("flip", flip, ScalarType::Bool, {count});
    a.ids = call.in<int64_t>("ids", ids, ScalarType::Long, {count});
    a.k0 = (uint32_t)(uint64_t)seed;
    a.k1 = (uint32_t)((uint64_t)seed >> 32);
    a.purpose = (uint32_t)purpose;
    a.noise = call.in<float>("noise", noise, ScalarType::Float, {count, channels, height, width});
    a.posterior_noise =
        call.in<float>("posterior_noise", posterior_noise, ScalarType::Float, {count, channels, height, width});
    a.patch = patch;
    a.x_t_dtype = call.float_dtype("x_t", x_t);
    check_layout(call, "x_t", x_t, target, channels, patch);
    a.x_t = x_t.mutable_data_ptr();
    a.target = call.out<float>("target", target, ScalarType::Float, {count, channels, height, width});
    call.check_rows("index", a.index, count, a.stored);
    call.check_rows("t_index", a.t_index, count, a.steps);
#ifdef ERD_FAST_CUDA
    if (call.cuda) return launch(call, launch_q_sample_fwd, a);
#endif
    int64_t images = grain(noise ? READ_ELEMENTS : DRAWN_ELEMENTS, channels * height * width);
    torch::stable::parallel_for(0, count, images,
                                [&](int64_t first, int64_t last) { q_sample_fwd_cpu(a, first, last); });
}

void diffusion_loss_fwd(const Tensor& prediction, const Tensor& target, const Tensor& weight,
                        const OptionalTensor& t_index, int64_t batch_size, const OptionalTensor& loss_scale,
                        int64_t patch, const Tensor& loss, const Tensor& per_sample, const Tensor& bin_sum,
                        const Tensor& bin_count, const OptionalTensor& dprediction) {
    Call call("diffusion_loss", target);
    check_image(call, "target", target, patch);
    call.check_range("batch_size", batch_size, 1, int64_t(1) << 62);
    DiffusionLossArguments a{};
    a.count = target.size(0);
    a.channels = target.size(1);
    a.height = target.size(2);
    a.width = target.size(3);
    a.patch = patch;
    bool tokens = patch && prediction.dim() == 3 && prediction.size(2) % (patch * patch) == 0;
    STD_TORCH_CHECK(tokens || (!patch && prediction.dim() == 4), "diffusion_loss: prediction: given shape ",
                    listed(prediction.sizes()), ", allowed (N, C', H, W), or with a patch (N, T, p p C')");
    a.predicted_channels = patch ? prediction.size(2) / (patch * patch) : prediction.size(1);
    call.check_range("channels of prediction", a.predicted_channels, a.channels,
                     ((int64_t(1) << 31) - 1) / (a.height * a.width));
    a.dtype = call.float_dtype("prediction", prediction);
    check_layout(call, "prediction", prediction, target, a.predicted_channels, patch);
    a.prediction = prediction.const_data_ptr();
    a.target = call.in<float>("target", target, ScalarType::Float, {a.count, a.channels, a.height, a.width});
    a.steps = weight.numel();
    a.weight = call.in<float>("weight", weight, ScalarType::Float, {t_index ? a.steps : a.count});
    a.t_index = call.in<int64_t>("t_index", t_index, ScalarType::Long, {a.count});
    a.batch_size = batch_size;
    a.loss_scale = call.in<float>("loss_scale", loss_scale, ScalarType::Float, {});
    a.loss = call.out<float>("loss", loss, ScalarType::Float, {});
    a.per_sample = call.out<float>("per_sample", per_sample, ScalarType::Float, {a.count});
    a.num_bins = bin_sum.numel();
    call.check_range("size of bin_sum", a.num_bins, 1, (int64_t(1) << 31) - 1);
    a.bin_sum = call.out<float>("bin_sum", bin_sum, ScalarType::Float, {a.num_bins});
    a.bin_count = call.out<float>("bin_count", bin_count, ScalarType::Float, {a.num_bins});
    if (dprediction) {
        call.check_dtype("dprediction", *dprediction, prediction.scalar_type());
        check_layout(call, "dprediction", *dprediction, target, a.predicted_channels, patch);
        a.dprediction = dprediction->mutable_data_ptr();
    }
    call.check_rows("t_index", a.t_index, a.count, a.steps);
#ifdef ERD_FAST_CUDA
    if (call.cuda) return launch(call, launch_diffusion_loss_fwd, a);
#endif
    torch::stable::parallel_for(0, a.count, grain(READ_ELEMENTS, a.predicted_channels * a.height * a.width),
                                [&](int64_t first, int64_t last) { diffusion_loss_fwd_cpu(a, first, last); });
    diffusion_loss_sum_cpu(a);
}

void grad_norm_fwd(const Tensor& rows, const Tensor& places, int64_t chunk, const Tensor& norm,
                   const Tensor& partials) {
    Call call("grad_norm", norm);
    GradNormArguments a{};
    a.table = table_of(call, rows, places, chunk);
    a.norm = call.out<float>("norm", norm, ScalarType::Float, {});
    a.partials = call.out<float>("partials", partials, ScalarType::Float, {a.table.chunks});
#ifdef ERD_FAST_CUDA
    if (call.cuda) return launch(call, launch_grad_norm_fwd, a);
#endif
    torch::stable::parallel_for(0, a.table.chunks, grain(READ_ELEMENTS, CHUNK),
                                [&](int64_t first, int64_t last) { grad_norm_fwd_cpu(a, first, last); });
    grad_norm_sum_cpu(a);
}

void adamw_ema_fwd(const Tensor& rows, const Tensor& places, int64_t chunk, const Tensor& settings, const Tensor& norm,
                   int64_t growth_interval, int64_t decays, const Tensor& counts, const Tensor& scalars,
                   const Tensor& factors) {
    Call call("adamw_ema", norm);
    call.check_range("growth_interval", growth_interval, 0, int64_t(1) << 62);
    call.check_range("decays", decays, 0, MOST_EMAS);
    AdamwEmaArguments a{};
    a.groups = settings.numel() / GROUP_COLUMNS;
    a.table = table_of(call, rows, places, chunk);
    a.settings = call.in<GroupSettings>("settings", settings, ScalarType::Double, {a.groups, GROUP_COLUMNS});
    for (int64_t i = 0; !call.cuda && i < a.table.chunks; i++) {
        call.check_range("group of rows", a.table.rows[a.table.places[i].row].group, 0, a.groups - 1);
    }
    a.norm = call.in<float>("norm", norm, ScalarType::Float, {});
    a.growth_interval = growth_interval;
    a.decays = (int)decays;
    a.counts = call.out<StepCounts>("counts", counts, ScalarType::Long, {3});
    a.scalars = call.out<StepScalars>("scalars", scalars, ScalarType::Float, {2});
    a.factors = call.out<GroupFactors>("factors", factors, ScalarType::Float, {a.groups, GROUP_COLUMNS});
#ifdef ERD_FAST_CUDA
    if (call.cuda) return launch(call, launch_adamw_ema_fwd, a);
#endif
    adamw_ema_advance_cpu(a);
    torch::stable::parallel_for(0, a.table.chunks, grain(READ_ELEMENTS, CHUNK),
                                [&](int64_t first, int64_t last) { adamw_ema_fwd_cpu(a, first, last); });
}

#ifdef ERD_FAST_CUDA
// As launch, with memory for the kernels alone: torch may give it to others once they are enqueued.
template <typename Arguments>
void launch_in(const Call& call, int64_t (*bytes)(const Arguments&),
               void (*launcher)(const Arguments&, cudaStream_t), Arguments& arguments, const Tensor& neighbour) {
    torch::stable::accelerator::DeviceGuard guard(call.device);
    int64_t size = bytes(arguments) + WORKSPACE_ALIGNMENT;
    Tensor workspace = torch::stable::new_empty(neighbour, {size}, ScalarType::Byte);
    auto start = (uintptr_t)workspace.mutable_data_ptr();
    arguments.workspace = (void*)((start + WORKSPACE_ALIGNMENT - 1) / WORKSPACE_ALIGNMENT * WORKSPACE_ALIGNMENT);
    launch(call, launcher, arguments);
}

// A matrix that cuBLASLt's epilogues can take.
void check_matrix(const Call& call, const char* argument, const Tensor& tensor, Shape shape, ScalarType dtype) {
    call.check_dtype(argument, tensor, dtype);
    call.check(argument, tensor, shape);
    int64_t columns = shape.end()[-1];
    STD_TORCH_CHECK(columns > 0 && columns % 8 == 0, call.op, ": ", argument, ": given shape ", listed(shape),
                    ", allowed rows of a multiple of 8 numbers");
    STD_TORCH_CHECK((uintptr_t)tensor.const_data_ptr() % 16 == 0, call.op, ": ", argument,
                    ": given memory that does not begin at a multiple of 16 bytes");
}

void check_linear_gelu(const Call& call, const Tensor& pre, const std::string& approximate) {
    STD_TORCH_CHECK(approximate == "tanh", "linear_gelu: approximate: given ", approximate, ", allowed tanh");
    STD_TORCH_CHECK(pre.dim() == 2, "linear_gelu: pre: given shape ", listed(pre.sizes()), ", allowed (M, H)");
    call.check_range("rows of pre", pre.size(0), 1, (int64_t(1) << 31) - 1);
}

void linear_gelu_fwd(const Tensor& x, const Tensor& weight, const Tensor& bias, std::string approximate,
                     const Tensor& activation, const Tensor& pre) {
    Call call("linear_gelu", pre);
    check_linear_gelu(call, pre, approximate);
    STD_TORCH_CHECK(x.dim() == 2, "linear_gelu: x: given shape ", listed(x.sizes()), ", allowed (M, K)");
    LinearGeluArguments a{};
    a.dtype = call.float_dtype("pre", pre);
    a.rows = pre.size(0);
    a.inputs = x.size(1);
    a.hidden = pre.size(1);
    a.device = call.device;
    ScalarType dtype = pre.scalar_type();
    check_matrix(call, "x", x, {a.rows, a.inputs}, dtype);
    check_matrix(call, "weight", weight, {a.hidden, a.inputs}, dtype);
    check_matrix(call, "bias", bias, {a.hidden}, dtype);
    check_matrix(call, "activation", activation, {a.rows, a.hidden}, dtype);
    check_matrix(call, "pre", pre, {a.rows, a.hidden}, dtype);
    a.x = x.const_data_ptr();
    a.weight = weight.const_data_ptr();
    a.bias = bias.const_data_ptr();
    a.activation = activation.mutable_data_ptr();
    a.pre = pre.mutable_data_ptr();
    launch_in(call, linear_gelu_fwd_workspace, launch_linear_gelu_fwd, a, pre);
}

void linear_gelu_bwd(const Tensor& dy, const OptionalTensor& next_weight, const Tensor& pre, std::string approximate,
                     const Tensor& dpre, const Tensor& dbias, const OptionalTensor& activation) {
    Call call("linear_gelu", pre);
    check_linear_gelu(call, pre, approximate);
    STD_TORCH_CHECK(dy.dim() == 2, "linear_gelu: dy: given shape ", listed(dy.sizes()), ", allowed (M, D) or (M, H)");
    LinearGeluBackwardArguments a{};
    a.dtype = call.float_dtype("pre", pre);
    a.rows = pre.size(0);
    a.outputs = dy.size(1);
    a.hidden = pre.size(1);
    a.device = call.device;
    ScalarType dtype = pre.scalar_type();
    check_matrix(call, "dy", dy, {a.rows, next_weight ? a.outputs : a.hidden}, dtype);
    if (next_weight) {
        check_matrix(call, "next_weight", *next_weight, {a.outputs, a.hidden}, dtype);
        a.next_weight = next_weight->const_data_ptr();
    }
    check_matrix(call, "pre", pre, {a.rows, a.hidden}, dtype);
    check_matrix(call, "dpre", dpre, {a.rows, a.hidden}, dtype);
    if (activation) {
        check_matrix(call, "activation", *activation, {a.rows, a.hidden}, dtype);
        a.activation = activation->mutable_data_ptr();
    }
    a.dy = dy.const_data_ptr();
    a.pre = pre.const_data_ptr();
    a.dpre = dpre.mutable_data_ptr();
    a.dbias = call.out<float>("dbias", dbias, ScalarType::Float, {a.hidden});
    launch_in(call, linear_gelu_bwd_workspace, launch_linear_gelu_bwd, a, pre);
}
#endif

// ----------------------------------------------------------------------------
// what this build and this machine have

// -1 asks; 0 baseline, 1 AVX2, 2 AVX-512 (x86) choose the instruction set of the CPU twins. The one in use afterwards.
int64_t cpu_level_op(int64_t level) {
    STD_TORCH_CHECK(level == -1 || set_cpu_level((int)level), "cpu_level: given ", level,
                    ", allowed -1 to ask, or what this CPU has of 0 (baseline), 1 (AVX2) and 2 (AVX-512)");
    return cpu_level();
}

bool has_cuda() {
#ifdef ERD_FAST_CUDA
    return true;
#else
    return false;
#endif
}

// Whether torch's current CUDA stream can be asked for; without it every launch is refused.
bool has_cuda_stream() {
    return aoti_torch_get_current_cuda_stream != nullptr;
}

}  // namespace
}  // namespace erd_fast

STABLE_TORCH_LIBRARY(_erd_fast_C, m) {
    m.def(
        "draw_fwd(Tensor counter, int seed, int dataset_size, int num_timesteps, int drop_threshold, int offset, "
        "int purpose, Tensor? t_table, int strata, Tensor(a!) ids, Tensor(b!) sample_index, Tensor(c!) t_index, "
        "Tensor(d!) label_drop, Tensor(e!) flip) -> ()");
    m.def(
        "q_sample_fwd(Tensor latents, Tensor coefficients, Tensor? t_index, Tensor? index, int kind, Tensor? scale, "
        "Tensor? shift, Tensor? flip, Tensor? ids, int seed, int purpose, Tensor? noise, Tensor? posterior_noise, "
        "int patch, Tensor(a!) x_t, Tensor(b!) target) -> ()");
    m.def(
        "diffusion_loss_fwd(Tensor prediction, Tensor target, Tensor weight, Tensor? t_index, int batch_size, "
        "Tensor? loss_scale, int patch, Tensor(a!) loss, Tensor(b!) per_sample, Tensor(c!) bin_sum, "
        "Tensor(d!) bin_count, Tensor(e!)? dprediction) -> ()");
    m.def(
        "linear_gelu_fwd(Tensor x, Tensor weight, Tensor bias, str approximate, Tensor(a!) activation, "
        "Tensor(b!) pre) -> ()");
    m.def(
        "linear_gelu_bwd(Tensor dy, Tensor? next_weight, Tensor pre, str approximate, Tensor(a!) dpre, "
        "Tensor(b!) dbias, Tensor(c!)? activation) -> ()");
    m.def("grad_norm_fwd(Tensor rows, Tensor places, int chunk, Tensor(a!) norm, Tensor(b!) partials) -> ()");
    m.def(
        "adamw_ema_fwd(Tensor rows, Tensor places, int chunk, Tensor settings, Tensor norm, int growth_interval, "
        "int decays, Tensor(a!) counts, Tensor(b!) scalars, Tensor(c!) factors) -> ()");
    m.def("cpu_level(int level=-1) -> int");
    m.def("has_cuda() -> bool");
    m.def("has_cuda_stream() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(_erd_fast_C, CompositeExplicitAutograd, m) {
    m.impl("cpu_level", TORCH_BOX(&erd_fast::cpu_level_op));
    m.impl("has_cuda", TORCH_BOX(&erd_fast::has_cuda));
    m.impl("has_cuda_stream", TORCH_BOX(&erd_fast::has_cuda_stream));
}

STABLE_TORCH_LIBRARY_IMPL(_erd_fast_C, CPU, m) {
    m.impl("draw_fwd", TORCH_BOX(&erd_fast::draw_fwd));
    m.impl("q_sample_fwd", TORCH_BOX(&erd_fast::q_sample_fwd));
    m.impl("diffusion_loss_fwd", TORCH_BOX(&erd_fast::diffusion_loss_fwd));
    m.impl("grad_norm_fwd", TORCH_BOX(&erd_fast::grad_norm_fwd));
    m.impl("adamw_ema_fwd", TORCH_BOX(&erd_fast::adamw_ema_fwd));
}

#ifdef ERD_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(_erd_fast_C, CUDA, m) {
    m.impl("draw_fwd", TORCH_BOX(&erd_fast::draw_fwd));
    m.impl("q_sample_fwd", TORCH_BOX(&erd_fast::q_sample_fwd));
    m.impl("diffusion_loss_fwd", TORCH_BOX(&erd_fast::diffusion_loss_fwd));
    m.impl("grad_norm_fwd", TORCH_BOX(&erd_fast::grad_norm_fwd));
    m.impl("adamw_ema_fwd", TORCH_BOX(&erd_fast::adamw_ema_fwd));
    m.impl("linear_gelu_fwd", TORCH_BOX(&erd_fast::linear_gelu_fwd));
    m.impl("linear_gelu_bwd", TORCH_BOX(&erd_fast::linear_gelu_bwd));
}
#endif

// `import erd_fast._C` loads the library, which registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                     nullptr};
    return PyModule_Create(&definition);
}
