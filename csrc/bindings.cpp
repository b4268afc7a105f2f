/*
torch.ops._erd_fast_C: the compiled ops as torch sees them, and the only file that sees torch.

Each binding fills the argument struct of launchers.h and calls the CUDA launcher or the CPU twin. Outputs are the
caller's. These ops are private: the public ones, erd_fast::..., are declared in Python, which checks shapes, ranges and
rows before it calls them. Checked here is what kernels rely on and Python may get wrong unnoticed: device, dtype,
contiguity and number of elements, and on the CPU the indices that Python cannot read while torch.compile traces.

Built against torch's stable ABI (TORCH_TARGET_VERSION, setup.py): one binary serves every torch from that version on.
The library needs no CUDA driver to load, nor a torch with CUDA: the one symbol that only such a torch has is weak.

Two macros are for tests only. ERD_FAST_LIBRARY names the ops, since a process can register a name once. With
ERD_FAST_EMULATED the CUDA path runs on CPU tensors, with kernels that tests/csrc/cuda_emulation.h executes.
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
#include <string>

#include "diffusion_math.h"
#include "launchers.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#ifndef ERD_FAST_LIBRARY
#define ERD_FAST_LIBRARY _erd_fast_C
#endif

namespace erd_fast {
namespace {

#ifdef ERD_FAST_EMULATED
constexpr bool EMULATED = true;
#else
constexpr bool EMULATED = false;
#endif

// ----------------------------------------------------------------------------
// checks

// The device of a call, and its checks.
struct Call {
    const char* op;
    bool cuda;
    bool on_gpu;  // whether CUDA kernels run it
    int32_t device;

    Call(const char* name, const Tensor& leader)
        : op(name), cuda(leader.is_cuda()), on_gpu(cuda || EMULATED), device(cuda ? leader.get_device_index() : 0) {}

    void check(const char* argument, const Tensor& tensor, ScalarType dtype, int64_t count) const {
        STD_TORCH_CHECK(tensor.is_cuda() == cuda && (!cuda || tensor.get_device_index() == device), op, ": ", argument,
                        " must be on ", cuda ? "cuda:" + std::to_string(device) : "cpu", ", got another device");
        STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", argument, " must be ",
                        torch::headeronly::toString(dtype), ", got ",
                        torch::headeronly::toString(tensor.scalar_type()));
        STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", argument, " must be contiguous");
        STD_TORCH_CHECK(tensor.numel() == count, op, ": ", argument, " must have ", count, " elements, got ",
                        tensor.numel());
    }

    template <typename T>
    const T* in(const char* argument, const Tensor& tensor, ScalarType dtype, int64_t count) const {
        check(argument, tensor, dtype, count);
        return (const T*)tensor.const_data_ptr();
    }

    template <typename T>
    const T* in(const char* argument, const OptionalTensor& tensor, ScalarType dtype, int64_t count) const {
        return tensor ? in<T>(argument, *tensor, dtype, count) : nullptr;
    }

    template <typename T>
    T* out(const char* argument, const Tensor& tensor, ScalarType dtype, int64_t count) const {
        check(argument, tensor, dtype, count);
        return (T*)tensor.mutable_data_ptr();
    }

    Dtype float_dtype(const char* argument, const Tensor& tensor) const {
        ScalarType given = tensor.scalar_type();
        STD_TORCH_CHECK(given == ScalarType::Float || given == ScalarType::BFloat16 || given == ScalarType::Half, op,
                        ": ", argument, " must be Float, BFloat16 or Half, got ",
                        torch::headeronly::toString(given));
        return given == ScalarType::Float      ? Dtype::FLOAT32
               : given == ScalarType::BFloat16 ? Dtype::BFLOAT16
                                               : Dtype::FLOAT16;
    }

    // Kernels count images, the elements of one, and blocks in 32 bits.
    void check_32_bits(std::initializer_list<int64_t> counts) const {
        for (int64_t count : counts) STD_TORCH_CHECK(count < int64_t(1) << 31, op, ": ", count, " is 2^31 or more");
    }

    // Rows of a table, of `count` images. Kernels of a GPU turn an image whose row is out of range into NaN.
    void check_rows(const char* argument, const int64_t* rows, int64_t count, int64_t limit) const {
        for (int64_t i = 0; rows && !on_gpu && i < count; i++) {
            STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < limit, op, ": ", argument, " must be in [0, ", limit, "), got ",
                            rows[i]);
        }
    }
};

// The table of erd_fast/ops/tensor_table.py, whose addresses and numbers are relied on.
ChunkTable table_of(const Call& call, const Tensor& rows, const Tensor& places, int64_t chunk) {
    STD_TORCH_CHECK(chunk == CHUNK, call.op, ": chunk must be ", CHUNK, ", got ", chunk);
    int64_t tensors = rows.numel() / TABLE_COLUMNS, chunks = places.numel() / PLACE_COLUMNS;
    call.check_32_bits({chunks});
    return {call.in<TensorRow>("rows", rows, ScalarType::Long, tensors * TABLE_COLUMNS),
            call.in<ChunkPlace>("places", places, ScalarType::Int, chunks * PLACE_COLUMNS), chunks};
}

// ----------------------------------------------------------------------------
// where it runs

// Elements worth a thread of their own: some twenty microseconds of work, several times what a fork costs.
constexpr int64_t DRAWN_ELEMENTS = 1 << 14, READ_ELEMENTS = 1 << 15, DRAWN_DECISIONS = 256;

int64_t grain(int64_t elements, int64_t size) {
    return size > 0 && elements > size ? elements / size : 1;
}

#ifdef ERD_FAST_CUDA
#ifdef ERD_FAST_EMULATED
struct OnDevice {
    explicit OnDevice(int32_t) {}
};

cudaStream_t current_stream(const Call&) { return nullptr; }
#else
using OnDevice = torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(const Call& call) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, call.op, ": this torch has no CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(call.device, &stream) == 0, call.op,
                    ": torch gives no current stream of cuda:", call.device);
    return (cudaStream_t)stream;
}
#endif

template <typename Arguments>
void launch(const Call& call, void (*launcher)(const Arguments&, cudaStream_t), const Arguments& arguments) {
    OnDevice guard(call.device);
    launcher(arguments, current_stream(call));
}
#endif

// ----------------------------------------------------------------------------
// ops

void draw_fwd(const Tensor& counter, int64_t seed, int64_t dataset_size, int64_t num_timesteps, int64_t drop_threshold,
              int64_t offset, int64_t purpose, const OptionalTensor& t_table, int64_t strata, const Tensor& ids,
              const Tensor& sample_index, const Tensor& t_index, const Tensor& label_drop, const Tensor& flip) {
    Call call("draw", counter);
    int64_t count = ids.numel();
    DrawArguments a{};
    a.counter = call.in<int64_t>("counter", counter, ScalarType::Long, 1);
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
    a.t_table = call.in<int64_t>("t_table", t_table, ScalarType::Long, num_timesteps);
    a.count = count;
    a.ids = call.out<int64_t>("ids", ids, ScalarType::Long, count);
    a.sample_index = call.out<int64_t>("sample_index", sample_index, ScalarType::Long, count);
    a.t_index = call.out<int64_t>("t_index", t_index, ScalarType::Long, count);
    a.label_drop = call.out<bool>("label_drop", label_drop, ScalarType::Bool, count);
    a.flip = call.out<bool>("flip", flip, ScalarType::Bool, count);
#ifdef ERD_FAST_CUDA
    if (call.on_gpu) return launch(call, launch_draw_fwd, a);
#endif
    // The walks of philox.h need not end for images of a number below 0.
    STD_TORCH_CHECK(*a.counter >= 0 && *a.counter <= int64_t(1) << 62, "draw: counter must be in [0, 2^62], got ",
                    *a.counter);
    torch::stable::parallel_for(0, count, DRAWN_DECISIONS,
                                [&](int64_t first, int64_t last) { draw_fwd_cpu(a, first, last); });
}

void q_sample_fwd(const Tensor& latents, const Tensor& coefficients, const OptionalTensor& t_index,
                  const OptionalTensor& index, int64_t kind, const OptionalTensor& scale, const OptionalTensor& shift,
                  const OptionalTensor& flip, const OptionalTensor& ids, int64_t seed, int64_t purpose,
                  const OptionalTensor& noise, const OptionalTensor& posterior_noise, int64_t patch, const Tensor& x_t,
                  const Tensor& target) {
    Call call("q_sample", target);
    int64_t count = target.size(0), channels = target.size(1), height = target.size(2), width = target.size(3);
    int64_t size = channels * height * width;
    bool spreads = kind == MEAN_STD || kind == MEAN_LOGVAR;
    call.check_32_bits({count, size});
    QSampleArguments a{};
    a.stored = index ? latents.size(0) : count;
    a.steps = t_index ? coefficients.size(0) : count;
    a.latents_dtype = kind == PIXELS ? Dtype::UINT8 : call.float_dtype("latents", latents);
    ScalarType stored_as = kind == PIXELS ? ScalarType::Byte : latents.scalar_type();
    a.latents = call.in<void>("latents", latents, stored_as, a.stored * (spreads ? 2 : 1) * size);
    a.kind = (int)kind;
    a.count = count;
    a.channels = channels;
    a.height = height;
    a.width = width;
    a.coefficients = call.in<float>("coefficients", coefficients, ScalarType::Float, 4 * a.steps);
    a.t_index = call.in<int64_t>("t_index", t_index, ScalarType::Long, count);
    a.index = call.in<int64_t>("index", index, ScalarType::Long, count);
    a.scale = call.in<float>("scale", scale, ScalarType::Float, channels);
    a.shift = call.in<float>("shift", shift, ScalarType::Float, channels);
    a.flip = call.in<bool>("flip", flip, ScalarType::Bool, count);
    a.ids = call.in<int64_t>("ids", ids, ScalarType::Long, count);
    a.k0 = (uint32_t)(uint64_t)seed;
    a.k1 = (uint32_t)((uint64_t)seed >> 32);
    a.purpose = (uint32_t)purpose;
    a.noise = call.in<float>("noise", noise, ScalarType::Float, count * size);
    a.posterior_noise = call.in<float>("posterior_noise", posterior_noise, ScalarType::Float, count * size);
    a.patch = patch;
    a.x_t_dtype = call.float_dtype("x_t", x_t);
    a.x_t = call.out<void>("x_t", x_t, x_t.scalar_type(), count * size);
    a.target = call.out<float>("target", target, ScalarType::Float, count * size);
    if (count * size == 0) return;
    call.check_rows("index", a.index, count, a.stored);
    call.check_rows("t_index", a.t_index, count, a.steps);
#ifdef ERD_FAST_CUDA
    if (call.on_gpu) return launch(call, launch_q_sample_fwd, a);
#endif
    int64_t images = grain(noise ? READ_ELEMENTS : DRAWN_ELEMENTS, size);
    torch::stable::parallel_for(0, count, images,
                                [&](int64_t first, int64_t last) { q_sample_fwd_cpu(a, first, last); });
}

void diffusion_loss_fwd(const Tensor& prediction, const Tensor& target, const Tensor& weight,
                        const OptionalTensor& t_index, int64_t batch_size, const OptionalTensor& loss_scale,
                        int64_t patch, const Tensor& loss, const Tensor& per_sample, const Tensor& bin_sum,
                        const Tensor& bin_count, const OptionalTensor& dprediction) {
    Call call("diffusion_loss", target);
    DiffusionLossArguments a{};
    a.count = target.size(0);
    a.channels = target.size(1);
    a.height = target.size(2);
    a.width = target.size(3);
    a.patch = patch;
    a.predicted_channels = patch ? prediction.size(2) / (patch * patch) : prediction.size(1);
    // With fewer channels than the target, the prediction has too few elements.
    int64_t plane = a.height * a.width, predicted_size = std::max(a.predicted_channels, a.channels) * plane;
    a.steps = t_index ? weight.numel() : a.count;
    a.num_bins = bin_sum.numel();
    call.check_32_bits({a.count, a.channels * plane, predicted_size, a.num_bins});
    a.dtype = call.float_dtype("prediction", prediction);
    ScalarType dtype = prediction.scalar_type();
    a.prediction = call.in<void>("prediction", prediction, dtype, a.count * predicted_size);
    a.target = call.in<float>("target", target, ScalarType::Float, a.count * a.channels * plane);
    a.weight = call.in<float>("weight", weight, ScalarType::Float, a.steps);
    a.t_index = call.in<int64_t>("t_index", t_index, ScalarType::Long, a.count);
    a.batch_size = batch_size;
    a.loss_scale = call.in<float>("loss_scale", loss_scale, ScalarType::Float, 1);
    a.loss = call.out<float>("loss", loss, ScalarType::Float, 1);
    a.per_sample = call.out<float>("per_sample", per_sample, ScalarType::Float, a.count);
    a.bin_sum = call.out<float>("bin_sum", bin_sum, ScalarType::Float, a.num_bins);
    a.bin_count = call.out<float>("bin_count", bin_count, ScalarType::Float, a.num_bins);
    if (dprediction) a.dprediction = call.out<void>("dprediction", *dprediction, dtype, a.count * predicted_size);
    call.check_rows("t_index", a.t_index, a.count, a.steps);
#ifdef ERD_FAST_CUDA
    if (call.on_gpu) return launch(call, launch_diffusion_loss_fwd, a);
#endif
    torch::stable::parallel_for(0, a.count, grain(READ_ELEMENTS, predicted_size),
                                [&](int64_t first, int64_t last) { diffusion_loss_fwd_cpu(a, first, last); });
    diffusion_loss_sum_cpu(a);
}

void grad_norm_fwd(const Tensor& rows, const Tensor& places, int64_t chunk, const Tensor& norm,
                   const Tensor& partials) {
    Call call("grad_norm", norm);
    GradNormArguments a{};
    a.table = table_of(call, rows, places, chunk);
    a.norm = call.out<float>("norm", norm, ScalarType::Float, 1);
    a.partials = call.out<float>("partials", partials, ScalarType::Float, a.table.chunks);
#ifdef ERD_FAST_CUDA
    if (call.on_gpu) return launch(call, launch_grad_norm_fwd, a);
#endif
    torch::stable::parallel_for(0, a.table.chunks, grain(READ_ELEMENTS, CHUNK),
                                [&](int64_t first, int64_t last) { grad_norm_fwd_cpu(a, first, last); });
    grad_norm_sum_cpu(a);
}

void adamw_ema_fwd(const Tensor& rows, const Tensor& places, int64_t chunk, const Tensor& settings, const Tensor& norm,
                   int64_t growth_interval, int64_t decays, const Tensor& counts, const Tensor& scalars,
                   const Tensor& factors) {
    Call call("adamw_ema", norm);
    AdamwEmaArguments a{};
    a.groups = settings.numel() / GROUP_COLUMNS;
    a.table = table_of(call, rows, places, chunk);
    a.settings = call.in<GroupSettings>("settings", settings, ScalarType::Double, a.groups * GROUP_COLUMNS);
    for (int64_t i = 0; !call.on_gpu && i < rows.numel() / TABLE_COLUMNS; i++) {  // nothing in Python checks them
        int64_t group = a.table.rows[i].group;
        STD_TORCH_CHECK(group >= 0 && group < a.groups, "adamw_ema: group must be in [0, ", a.groups, "), got ", group);
    }
    a.norm = call.in<float>("norm", norm, ScalarType::Float, 1);
    a.growth_interval = growth_interval;
    a.decays = (int)decays;
    a.counts = call.out<StepCounts>("counts", counts, ScalarType::Long, 3);
    a.scalars = call.out<StepScalars>("scalars", scalars, ScalarType::Float, 2);
    a.factors = call.out<GroupFactors>("factors", factors, ScalarType::Float, a.groups * GROUP_COLUMNS);
#ifdef ERD_FAST_CUDA
    if (call.on_gpu) return launch(call, launch_adamw_ema_fwd, a);
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
    OnDevice guard(call.device);
    int64_t size = bytes(arguments) + WORKSPACE_ALIGNMENT;
    Tensor workspace = torch::stable::new_empty(neighbour, {size}, ScalarType::Byte);
    auto start = (uintptr_t)workspace.mutable_data_ptr();
    arguments.workspace = (void*)((start + WORKSPACE_ALIGNMENT - 1) / WORKSPACE_ALIGNMENT * WORKSPACE_ALIGNMENT);
    launch(call, launcher, arguments);
}

// cuBLASLt's epilogues and our kernels read by 16 bytes.
void check_aligned(std::initializer_list<const void*> matrices) {
    for (const void* start : matrices) {
        STD_TORCH_CHECK((uintptr_t)start % 16 == 0, "linear_gelu: matrices must begin at a multiple of 16 bytes");
    }
}

void linear_gelu_fwd(const Tensor& x, const Tensor& weight, const Tensor& bias, std::string approximate,
                     const Tensor& activation, const Tensor& pre) {
    Call call("linear_gelu", pre);
    STD_TORCH_CHECK(approximate == "tanh", "linear_gelu: approximate must be tanh, got ", approximate);
    LinearGeluArguments a{};
    a.dtype = call.float_dtype("pre", pre);
    a.rows = pre.size(0);
    a.inputs = x.size(1);
    a.hidden = pre.size(1);
    a.device = call.device;
    call.check_32_bits({a.rows});
    ScalarType dtype = pre.scalar_type();
    a.x = call.in<void>("x", x, dtype, a.rows * a.inputs);
    a.weight = call.in<void>("weight", weight, dtype, a.hidden * a.inputs);
    a.bias = call.in<void>("bias", bias, dtype, a.hidden);
    a.activation = call.out<void>("activation", activation, dtype, a.rows * a.hidden);
    a.pre = call.out<void>("pre", pre, dtype, a.rows * a.hidden);
    check_aligned({a.x, a.weight, a.bias, a.activation, a.pre});
    launch_in(call, linear_gelu_fwd_workspace, launch_linear_gelu_fwd, a, pre);
}

void linear_gelu_bwd(const Tensor& dy, const OptionalTensor& next_weight, const Tensor& pre, std::string approximate,
                     const Tensor& dpre, const Tensor& dbias, const OptionalTensor& activation) {
    Call call("linear_gelu", pre);
    STD_TORCH_CHECK(approximate == "tanh", "linear_gelu: approximate must be tanh, got ", approximate);
    LinearGeluBackwardArguments a{};
    a.dtype = call.float_dtype("pre", pre);
    a.rows = pre.size(0);
    a.outputs = dy.size(1);
    a.hidden = pre.size(1);
    a.device = call.device;
    call.check_32_bits({a.rows});
    ScalarType dtype = pre.scalar_type();
    a.dy = call.in<void>("dy", dy, dtype, a.rows * (next_weight ? a.outputs : a.hidden));
    if (next_weight) a.next_weight = call.in<void>("next_weight", *next_weight, dtype, a.outputs * a.hidden);
    a.pre = call.in<void>("pre", pre, dtype, a.rows * a.hidden);
    a.dpre = call.out<void>("dpre", dpre, dtype, a.rows * a.hidden);
    a.dbias = call.out<float>("dbias", dbias, ScalarType::Float, a.hidden);
    if (activation) a.activation = call.out<void>("activation", *activation, dtype, a.rows * a.hidden);
    check_aligned({a.dy, a.next_weight, a.pre, a.dpre, a.activation});
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

#define ERD_FAST_DECLARE(library, m) STABLE_TORCH_LIBRARY(library, m)  // torch's macro would take a macro's name for it
ERD_FAST_DECLARE(ERD_FAST_LIBRARY, m) {
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

STABLE_TORCH_LIBRARY_IMPL(ERD_FAST_LIBRARY, CompositeExplicitAutograd, m) {
    m.impl("cpu_level", TORCH_BOX(&erd_fast::cpu_level_op));
    m.impl("has_cuda", TORCH_BOX(&erd_fast::has_cuda));
    m.impl("has_cuda_stream", TORCH_BOX(&erd_fast::has_cuda_stream));
}

#ifndef ERD_FAST_EMULATED
STABLE_TORCH_LIBRARY_IMPL(ERD_FAST_LIBRARY, CPU, m) {
    m.impl("draw_fwd", TORCH_BOX(&erd_fast::draw_fwd));
    m.impl("q_sample_fwd", TORCH_BOX(&erd_fast::q_sample_fwd));
    m.impl("diffusion_loss_fwd", TORCH_BOX(&erd_fast::diffusion_loss_fwd));
    m.impl("grad_norm_fwd", TORCH_BOX(&erd_fast::grad_norm_fwd));
    m.impl("adamw_ema_fwd", TORCH_BOX(&erd_fast::adamw_ema_fwd));
}
#endif

#ifdef ERD_FAST_CUDA
#ifdef ERD_FAST_EMULATED
STABLE_TORCH_LIBRARY_IMPL(ERD_FAST_LIBRARY, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ERD_FAST_LIBRARY, CUDA, m) {
#endif
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
