// Block tables that lie side by side, spread into rows of equal length for paged_attention:
//
//   tables[i, j] = entries[starts[i] + j]  for  0 <= j < starts[i + 1] - starts[i];  the rest stays
//
// The host sends only what there is: 256 tables of a model with a context of 131,072 tokens would be
// 8 MB a step.
//
//   entries  [starts[num_sequences]]      block ids; what lies before starts[0] is somebody else's
//   starts   [num_sequences + 1]
//   tables   [num_sequences, max_blocks]
//
// All pointers are device memory.
#pragma once

#include <cstdint>

namespace tinyvllm {

class CudaContext;

void spread_block_tables(const CudaContext& ctx, const std::int32_t* entries,
                         const std::int32_t* starts, std::int32_t num_sequences,
                         std::int32_t max_blocks, std::int32_t* tables);

}  // namespace tinyvllm
