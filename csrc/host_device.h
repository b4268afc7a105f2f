/*
What functions for both CUDA C++ and C++ are marked with.
*/
#pragma once

#ifdef __CUDACC__
#define ERD_FAST_HD __host__ __device__
#else
#define ERD_FAST_HD
#endif

// Loops of a known length are unrolled everywhere: keys and coefficients become registers and immediates, and g++ makes
// vectors over images or elements only of loops without loops inside.
#if defined(__CUDA_ARCH__) || defined(__clang__)
#define ERD_FAST_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define ERD_FAST_UNROLL _Pragma("GCC unroll 16")
#else
#define ERD_FAST_UNROLL
#endif
