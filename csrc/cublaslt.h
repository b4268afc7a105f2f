/*
The part of cuBLASLt that linear_gelu calls. The library is opened when it is first needed, and is the one that torch
brought: nothing here is linked, and nothing of cuBLASLt is needed to build. Numbers and layouts are those of its
documentation; tests/csrc/test_linear_gelu.py holds them equal to cublasLt.h.
*/
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

struct CUstream_st;  // what cudaStream_t points to

namespace erd_fast::lt {

// cublasStatus_t, cudaDataType_t, cublasComputeType_t, cublasOperation_t
constexpr int SUCCESS = 0, NOT_SUPPORTED = 15;
constexpr int R_32F = 0, R_16F = 2, R_16BF = 14;
constexpr int COMPUTE_32F = 68;
constexpr int32_t OP_N = 0, OP_T = 1;

// cublasLtMatmulDescAttributes_t, with the type of what is set
constexpr int DESC_TRANSA = 3;        // int32_t
constexpr int DESC_EPILOGUE = 7;      // uint32_t
constexpr int DESC_BIAS_POINTER = 8;  // void*, of as many numbers as D has rows, of D's type
constexpr int DESC_AUX_POINTER = 11;  // void*, of D's type
constexpr int DESC_AUX_LD = 12;       // int64_t, a multiple of 8

// cublasLtEpilogue_t: D = gelu(aux = A B + bias), and D = (A B) gelu'(aux) with its row sums in bias. A column of D is
// one of our rows, so those are sums over our rows.
constexpr uint32_t GELU_AUX_BIAS = 164, DGELU_BGRAD = 208;

// cublasLtMatmulPreferenceAttributes_t
constexpr int PREF_MAX_WORKSPACE_BYTES = 1;  // uint64_t
constexpr int PREF_MIN_ALIGNMENT_A = 5, PREF_MIN_ALIGNMENT_B = 6, PREF_MIN_ALIGNMENT_C = 7,
              PREF_MIN_ALIGNMENT_D = 8;  // uint32_t, in bytes

struct Algorithm {  // cublasLtMatmulAlgo_t
    uint64_t data[8];
};

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

using Handle = struct HandleOfLibrary*;
using Desc = struct DescOfLibrary*;
using Layout = struct LayoutOfLibrary*;
using Preference = struct PreferenceOfLibrary*;
using Stream = ::CUstream_st*;

struct Library {
    const char* (*status_name)(int);
    int (*create)(Handle*);
    int (*desc_create)(Desc*, int compute, int scale);
    int (*desc_set)(Desc, int attribute, const void*, size_t);
    int (*layout_create)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t ld);
    int (*preference_create)(Preference*);
    int (*preference_set)(Preference, int attribute, const void*, size_t);
    int (*preference_destroy)(Preference);
    int (*heuristic)(Handle, Desc, Layout, Layout, Layout, Layout, Preference, int asked, Heuristic*, int* found);
    int (*matmul)(Handle, Desc, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                  const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t bytes, Stream);
};

template <typename Function>
void find(void* opened, const char* name, Function*& function) {
    function = (Function*)dlsym(opened, name);
    if (!function) throw std::runtime_error(std::string("linear_gelu: cuBLASLt has no ") + name);
}

// Tests define other names, of a library that stands in for cuBLASLt.
#ifndef ERD_FAST_CUBLASLT
#define ERD_FAST_CUBLASLT "libcublasLt.so.13", "libcublasLt.so.12"
#endif

inline void* open_library() {
    constexpr const char* NAMES[] = {ERD_FAST_CUBLASLT};
    for (int already : {RTLD_NOLOAD, 0}) {  // what torch has loaded, before what lies about
        for (const char* name : NAMES) {
            if (void* opened = dlopen(name, RTLD_NOW | RTLD_LOCAL | already)) return opened;
        }
    }
    std::string tried;
    for (const char* name : NAMES) tried += std::string(tried.empty() ? "" : " and ") + name;
    throw std::runtime_error("linear_gelu: cuBLASLt was not found, tried " + tried);
}

inline Library load() {
    void* opened = open_library();
    Library found;
    find(opened, "cublasLtGetStatusName", found.status_name);
    find(opened, "cublasLtCreate", found.create);
    find(opened, "cublasLtMatmulDescCreate", found.desc_create);
    find(opened, "cublasLtMatmulDescSetAttribute", found.desc_set);
    find(opened, "cublasLtMatrixLayoutCreate", found.layout_create);
    find(opened, "cublasLtMatmulPreferenceCreate", found.preference_create);
    find(opened, "cublasLtMatmulPreferenceSetAttribute", found.preference_set);
    find(opened, "cublasLtMatmulPreferenceDestroy", found.preference_destroy);
    find(opened, "cublasLtMatmulAlgoGetHeuristic", found.heuristic);
    find(opened, "cublasLtMatmul", found.matmul);
    return found;
}

inline const Library& library() {
    static const Library found = load();
    return found;
}

inline void check(int status, const char* what) {
    if (status == SUCCESS) return;
    throw std::runtime_error(std::string("linear_gelu: cuBLASLt: ") + what + ": " + library().status_name(status));
}

}  // namespace erd_fast::lt
