#include "cuda/launch.h"
#include "ops/block_tables.h"

namespace tinyvllm {
namespace {

constexpr int kThreads = 128;

__global__ void spread_kernel(const std::int32_t* entries, const std::int32_t* starts,
                              std::int32_t max_blocks, std::int32_t* tables) {
  const std::int32_t first = starts[blockIdx.x];
  const std::int32_t count = starts[blockIdx.x + 1] - first;
  std::int32_t* table = tables + static_cast<std::int64_t>(blockIdx.x) * max_blocks;
  for (std::int32_t j = static_cast<std::int32_t>(threadIdx.x); j < count; j += kThreads) {
    table[j] = entries[first + j];
  }
}

}  // namespace

// The first kernel of a step: it waits for the step before (see CudaSequences).
void spread_block_tables(const CudaContext& ctx, const std::int32_t* entries,
                         const std::int32_t* starts, std::int32_t num_sequences,
                         std::int32_t max_blocks, std::int32_t* tables) {
  cuda::launch(ctx, "spread_block_tables",
               {.grid = dim3(static_cast<unsigned>(num_sequences)), .block = dim3(kThreads)},
               spread_kernel, entries, starts, max_blocks, tables);
}

}  // namespace tinyvllm
