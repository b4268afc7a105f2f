/*
A stand-in for libcublasLt on a CPU: the functions that csrc/linear_gelu.cu calls, doing in plain loops over host memory
what the descriptors they are given mean by cuBLASLt's documentation. What that forbids is refused.

It is compiled against cublasLt.h, so names, numbers and signatures are cuBLASLt's own.
*/
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t ROWS_NOT_SUPPORTED = 77, ROWS_WITHOUT_ALGORITHM = 78, ROWS_THAT_FAIL = 79;
constexpr size_t WORKSPACE = 1000;
constexpr uint64_t MARK = 0x5EED;
int heuristics = 0, multiplications = 0;

struct Desc {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    int32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void *bias = nullptr, *aux = nullptr;
    int64_t aux_ld = 0;
};

struct Layout {
    cudaDataType type;
    int64_t rows, columns, ld;
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};  // A, B, C, D
};

template <typename T>
cublasStatus_t take(T& into, const void* value, size_t bytes) {
    if (!value || bytes != sizeof into) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(&into, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

int bytes_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }

double read(cudaDataType type, const void* from, int64_t place) {
    if (type == CUDA_R_16F) return __half2float(((const __half*)from)[place]);
    if (type == CUDA_R_16BF) return __bfloat162float(((const __nv_bfloat16*)from)[place]);
    return ((const float*)from)[place];
}

void write(cudaDataType type, void* to, int64_t place, double value) {
    if (type == CUDA_R_16F) {
        ((__half*)to)[place] = __float2half_rn((float)value);
    } else if (type == CUDA_R_16BF) {
        ((__nv_bfloat16*)to)[place] = __float2bfloat16_rn((float)value);
    } else {
        ((float*)to)[place] = (float)value;
    }
}

bool is_aligned(const void* pointer, uint32_t bytes) { return (uintptr_t)pointer % bytes == 0; }

double inner(double z) { return std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z); }
double gelu(double z) { return 0.5 * z * (1 + std::tanh(inner(z))); }
double gelu_slope(double z) {
    double t = std::tanh(inner(z)), by_z = std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * z * z);
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * by_z;
}

// Whether a matmul of these descriptors has a meaning that this stand-in knows.
bool is_valid(const Desc& op, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    bool gelu = op.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS || op.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    int64_t m = op.transpose_a ? a.columns : a.rows, k = op.transpose_a ? a.rows : a.columns;
    bool shapes = op.transpose_b == CUBLAS_OP_N && b.rows == k && d.rows == m && d.columns == b.columns &&
                  c.rows == d.rows && c.columns == d.columns && c.ld == d.ld;
    for (const Layout* one : {&a, &b, &c, &d}) shapes = shapes && one->ld >= one->rows && one->type == d.type;
    bool types = op.compute == CUBLAS_COMPUTE_32F && op.scale == CUDA_R_32F;
    bool aux = op.aux && op.aux_ld >= d.rows && op.aux_ld % 8 == 0 && is_aligned(op.aux, 16);
    return gelu && shapes && types && aux && op.bias && is_aligned(op.bias, bytes_of(d.type));
}

}  // namespace

EXPORTED int stand_in_heuristics() { return heuristics; }
EXPORTED int stand_in_multiplications() { return multiplications; }

EXPORTED const char* cublasLtGetStatusName(cublasStatus_t status) {
    return status == CUBLAS_STATUS_NOT_SUPPORTED     ? "CUBLAS_STATUS_NOT_SUPPORTED"
           : status == CUBLAS_STATUS_INVALID_VALUE   ? "CUBLAS_STATUS_INVALID_VALUE"
           : status == CUBLAS_STATUS_EXECUTION_FAILED ? "CUBLAS_STATUS_EXECUTION_FAILED"
                                                      : "another status";
}

EXPORTED cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = (cublasLtHandle_t)&heuristics;
    return CUBLAS_STATUS_SUCCESS;
}

EXPORTED cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t compute,
                                                 cudaDataType_t scale) {
    *made = (cublasLtMatmulDesc_t) new Desc{compute, scale};
    return CUBLAS_STATUS_SUCCESS;
}

EXPORTED cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t which,
                                                       const void* value, size_t bytes) {
    Desc& op = *(Desc*)desc;
    switch (which) {
        case CUBLASLT_MATMUL_DESC_TRANSA:
            return take(op.transpose_a, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSB:
            return take(op.transpose_b, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            return take(op.epilogue, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
            return take(op.bias, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
            return take(op.aux, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
            return take(op.aux_ld, value, bytes);
        default:
            return CUBLAS_STATUS_INVALID_VALUE;
    }
}

EXPORTED cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, cudaDataType type, uint64_t rows,
                                                   uint64_t columns, int64_t ld) {
    *made = (cublasLtMatrixLayout_t) new Layout{type, (int64_t)rows, (int64_t)columns, ld};
    return CUBLAS_STATUS_SUCCESS;
}

EXPORTED cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
    *made = (cublasLtMatmulPreference_t) new Preference;
    return CUBLAS_STATUS_SUCCESS;
}

EXPORTED cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                             cublasLtMatmulPreferenceAttributes_t which,
                                                             const void* value, size_t bytes) {
    Preference& wanted = *(Preference*)preference;
    if (which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return take(wanted.workspace, value, bytes);
    int matrix = which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
    if (matrix < 0 || matrix > 3) return CUBLAS_STATUS_INVALID_VALUE;
    return take(wanted.alignment[matrix], value, bytes);
}

EXPORTED cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete (Preference*)preference;
    return CUBLAS_STATUS_SUCCESS;
}

// The first proposal is of no use; the second goes with as much alignment as was promised, and needs a workspace.
EXPORTED cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                       cublasLtMatmulPreference_t preference, int asked,
                                                       cublasLtMatmulHeuristicResult_t* results, int* found) {
    heuristics++;
    const Desc& op = *(const Desc*)desc;
    const Layout& out = *(const Layout*)d;
    const Preference& wanted = *(const Preference*)preference;
    *found = 0;
    if (handle != (cublasLtHandle_t)&heuristics) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!is_valid(op, *(const Layout*)a, *(const Layout*)b, *(const Layout*)c, out)) return CUBLAS_STATUS_INVALID_VALUE;
    if (out.columns == ROWS_NOT_SUPPORTED) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (out.columns == ROWS_WITHOUT_ALGORITHM) return CUBLAS_STATUS_SUCCESS;
    if (asked < 2 || wanted.workspace < WORKSPACE) return CUBLAS_STATUS_INVALID_VALUE;
    results[0].state = CUBLAS_STATUS_NOT_SUPPORTED;
    results[1] = {};
    results[1].state = CUBLAS_STATUS_SUCCESS;
    results[1].workspaceSize = WORKSPACE;
    uint64_t* algorithm = results[1].algo.data;
    algorithm[0] = MARK;
    for (int i = 0; i < 4; i++) algorithm[1 + i] = wanted.alignment[i];
    algorithm[5] = is_aligned(op.bias, 256) ? 256 : is_aligned(op.bias, 16) ? 16 : 1;
    algorithm[6] = is_aligned(op.aux, 256) ? 256 : 16;
    *found = 2;
    return CUBLAS_STATUS_SUCCESS;
}

EXPORTED cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                                       const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                                       cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                                       cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                                       const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t bytes,
                                       cudaStream_t) {
    multiplications++;
    const Desc& op = *(const Desc*)desc;
    const Layout &left = *(const Layout*)a_layout, &right = *(const Layout*)b_layout, &out = *(const Layout*)d_layout;
    if (handle != (cublasLtHandle_t)&heuristics) return CUBLAS_STATUS_NOT_INITIALIZED;
    bool valid = is_valid(op, left, right, *(const Layout*)c_layout, out) && c == d;
    valid = valid && *(const float*)alpha == 1.0f && *(const float*)beta == 0.0f;
    valid = valid && algorithm->data[0] == MARK && bytes >= WORKSPACE && is_aligned(workspace, 16);
    const void* pointers[] = {a, b, c, d, op.bias, op.aux};
    for (int i = 0; i < 6; i++) valid = valid && is_aligned(pointers[i], (uint32_t)algorithm->data[1 + i]);
    if (!valid) return CUBLAS_STATUS_INVALID_VALUE;
    if (out.columns == ROWS_THAT_FAIL) return CUBLAS_STATUS_EXECUTION_FAILED;
    bool backward = op.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    std::vector<double> sums(out.rows);
    int64_t depth = op.transpose_a ? left.rows : left.columns;
    for (int64_t column = 0; column < out.columns; column++) {
        for (int64_t row = 0; row < out.rows; row++) {
            double value = 0;
            for (int64_t k = 0; k < depth; k++) {
                int64_t place = op.transpose_a ? k + row * left.ld : row + k * left.ld;
                value += read(left.type, a, place) * read(right.type, b, k + column * right.ld);
            }
            if (backward) {
                value *= gelu_slope(read(out.type, op.aux, row + column * op.aux_ld));
                sums[row] += value;
            } else {
                value += read(out.type, op.bias, row);
                write(out.type, op.aux, row + column * op.aux_ld, value);
                value = gelu(value);
            }
            write(out.type, d, row + column * out.ld, value);
        }
    }
    for (int64_t row = 0; backward && row < out.rows; row++) write(out.type, op.bias, row, sums[row]);
    std::memset(workspace, 0xFF, bytes);  // nothing else may lie there
    return CUBLAS_STATUS_SUCCESS;
}
