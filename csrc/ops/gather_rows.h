// Rows picked by number:  out[i, j] = table[rows[i], j]
//
//   rows   [num_rows]          each in [0, rows of table); the caller has checked it
//   table  [any, cols]         float32 or bfloat16
//   out    [num_rows, cols]    float32, or the dtype of table
//
// With token ids and the embedding matrix this is the token embedding; the rows are read where they
// lie.
#pragma once

#include <span>

#include "base/tensor.h"
#include "ops/cpu_context.h"

namespace tinyvllm {

class CudaContext;

void gather_rows(const CpuContext& ctx, std::span<const std::int32_t> rows, TensorView table,
                 MutTensorView out);
void gather_rows(const CudaContext& ctx, std::span<const std::int32_t> rows, TensorView table,
                 MutTensorView out);

}  // namespace tinyvllm
