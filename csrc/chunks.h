/*
A chunk of a table of tensors, as the CUDA kernels and the CPU twins meet it; erd_fast/ops/tensor_table.py makes the table.
*/
#pragma once

#include "host_device.h"
#include "launchers.h"

namespace erd_fast {

struct Chunk {
    int64_t first;  // element of its tensor
    int length;
    Dtype gradient, copy;
    bool aligned;  // every address is a multiple of 16 bytes
};

ERD_FAST_HD inline Chunk chunk_of(const ChunkPlace& place, const TensorRow& row) {
    int64_t first = (int64_t)place.number * CHUNK, left = row.numel - first;
    return {first, left < CHUNK ? (int)left : CHUNK, (Dtype)(row.format & 3), (Dtype)(row.format >> 2 & 3),
            (row.format & 16) != 0};
}

}  // namespace erd_fast
