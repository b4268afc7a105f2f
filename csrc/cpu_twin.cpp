/*
Which instruction set the CPU twins use.
*/
#include "cpu_twin.h"

#include <atomic>

namespace erd_fast {

namespace {

bool supported(int level) {
#if defined(__x86_64__) && defined(__GNUC__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
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
