#include "cuda/launch.h"
#include "ops/kv_cache.h"

namespace tinyvllm {
namespace {

// A copy for each block in x; in y one of the pool's arrays, K or V of a layer, which lie one after
// the other. A copy from or to a negative block is padding.
template <typename Word>
__global__ void copy_blocks_kernel(std::byte* __restrict__ pool, std::int64_t array_bytes,
                                   std::int64_t block_bytes, const BlockCopy* __restrict__ copies) {
  cuda::let_next_begin();
  cuda::wait_for_previous();
  const BlockCopy copy = copies[blockIdx.x];
  if (copy.from < 0 || copy.to < 0) return;
  std::byte* array = pool + blockIdx.y * array_bytes;
  const auto* from = reinterpret_cast<const Word*>(array + copy.from * block_bytes);
  auto* to = reinterpret_cast<Word*>(array + copy.to * block_bytes);
  const auto words = block_bytes / static_cast<std::int64_t>(sizeof(Word));
  for (std::int64_t i = threadIdx.x; i < words; i += blockDim.x) to[i] = from[i];
}

}  // namespace

KvCache make_kv_cache(const CudaContext& ctx, const KvShape& shape) {
  return {shape, ctx.allocate(static_cast<std::size_t>(shape.bytes()), "the KV cache")};
}

void copy_blocks(const CudaContext& ctx, const KvCache& cache, std::span<const BlockCopy> copies) {
  const KvShape& shape = cache.shape();
  const std::int64_t block_bytes =
      shape.block_stride() * static_cast<std::int64_t>(size_of(shape.dtype));
  const bool wide = block_bytes % static_cast<std::int64_t>(sizeof(uint4)) == 0;
  cuda::launch(ctx, "copy_blocks",
               {.grid = dim3(static_cast<unsigned>(copies.size()),
                             static_cast<unsigned>(2 * shape.num_layers)),
                .block = 256,
                .overlaps_previous = true},
               wide ? copy_blocks_kernel<uint4> : copy_blocks_kernel<std::uint16_t>,
               static_cast<std::byte*>(cache.layer(0).keys), block_bytes * shape.num_blocks,
               block_bytes, copies.data());
}

}  // namespace tinyvllm
