/*
Which instruction set the CPU twins use.
*/
#include "cpu_twin.h"

#include <atomic>
#ifdef ERD_FAST_WIDE
#include <cpuid.h>
#endif

namespace erd_fast {

namespace {

bool supported(int level) {
#ifdef ERD_FAST_WIDE
    unsigned eax, ebx, ecx = 0, edx;
    bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);  // not every compiler knows its name
    bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return level == BASELINE || (level == AVX2 && avx2) || (level == AVX512 && avx512);
#else
    return level == BASELINE;
#endif
}

std::atomic<int> level_in_use{supported(AVX512) ? AVX512 : supported(AVX2) ? AVX2 : BASELINE};

}  // namespace

int cpu_level() {
    return level_in_use.load(std::memory_order_relaxed);
}

bool set_cpu_level(int level) {
    if (!supported(level)) return false;
    level_in_use.store(level, std::memory_order_relaxed);
    return true;
}

}  // namespace erd_fast
