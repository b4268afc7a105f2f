/*
draw on the CPU: the integer decisions of a batch, one image after the other.

A few hundred integer instructions an image; what they mean is said in erd_fast/ops/draw.py, to which every output is
equal bit for bit.
*/
#include <algorithm>

#include "launchers.h"
#include "philox.h"

namespace erd_fast {

void draw_fwd_cpu(const DrawArguments& a, int64_t first, int64_t last) {
    const uint32_t purpose_stream = a.purpose << 8 | SCALARS;
    for (int64_t i = first; i < last; i++) {
        int64_t g = *a.counter + a.offset + i;
        Words w = words(a.k0, a.k1, purpose_stream, g, 0);
        uint32_t t_word = w.w0;
        if (a.strata) {
            uint32_t part = stratum(a.k0, a.k1, purpose_stream, g, a.strata, a.strata_side);
            t_word = stratified_word(t_word, part, a.strata);
        }
        a.ids[i] = g;
        a.sample_index[i] = sample_order(a.k0, a.k1, g, a.dataset_size, a.order_side);
        a.t_index[i] = a.t_table ? std::upper_bound(a.t_table, a.t_table + a.num_timesteps, (int64_t)t_word) - a.t_table
                                 : bounded(t_word, (uint32_t)a.num_timesteps);
        a.label_drop[i] = w.w1 < a.drop_threshold;
        a.flip[i] = w.w2 >> 31;
    }
}

}  // namespace erd_fast
