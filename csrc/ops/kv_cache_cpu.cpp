#include <sys/mman.h>

#include <cstring>
#include <string>

#include "base/errors.h"
#include "ops/kv_cache.h"

namespace tinyvllm {

KvCache make_kv_cache(const CpuContext& ctx, const KvShape& shape) {
  try {
    return {shape, ctx.allocate(static_cast<std::size_t>(shape.bytes()))};
  } catch (const CapacityError&) {
    throw CapacityError("Cannot reserve " + std::to_string(shape.bytes()) +
                        " bytes for a KV cache of " + std::to_string(shape.num_blocks) +
                        " blocks of " + std::to_string(shape.block_size) +
                        " tokens. Lower kv_cache_memory_bytes or max_model_len.");
  }
}

void copy_blocks(const CpuContext& /*ctx*/, const KvCache& cache,
                 std::span<const BlockCopy> copies) {
  const KvShape& shape = cache.shape();
  const std::size_t bytes = static_cast<std::size_t>(shape.block_stride()) * size_of(shape.dtype);
  for (const auto& [from, to] : copies) {
    for (std::int64_t l = 0; l < shape.num_layers; ++l) {
      const KvLayer layer = cache.layer(l);
      for (void* array : {layer.keys, layer.values}) {
        auto* blocks = static_cast<std::byte*>(array);
        std::memcpy(blocks + static_cast<std::size_t>(to) * bytes,
                    blocks + static_cast<std::size_t>(from) * bytes, bytes);
      }
    }
  }
}

}  // namespace tinyvllm
