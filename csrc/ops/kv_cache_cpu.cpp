#include <sys/mman.h>

#include <cstring>
#include <string>

#include "base/errors.h"
#include "ops/kv_cache.h"

namespace tinyvllm {
namespace {

// Asks for pages of 2 MiB behind the first 2 MiB of each array: attention over many or long
// contexts then waits less for addresses, and a few short ones still take little memory. That there
// may be no such pages is no error.
void ask_for_large_pages(const KvCache& cache) {
  constexpr std::uintptr_t kLarge = 2 << 20;
  const KvShape& shape = cache.shape();
  const auto bytes = static_cast<std::uintptr_t>(shape.bytes() / (2 * shape.num_layers));
  for (std::int64_t l = 0; l < shape.num_layers; ++l) {
    const KvLayer layer = cache.layer(l);
    for (void* array : {layer.keys, layer.values}) {
      const auto first = reinterpret_cast<std::uintptr_t>(array);
      const std::uintptr_t begin = (first + 2 * kLarge - 1) / kLarge * kLarge;
      const std::uintptr_t end = (first + bytes) / kLarge * kLarge;
      if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
  }
}

}  // namespace

KvCache make_kv_cache(const CpuContext& ctx, const KvShape& shape) {
  try {
    KvCache cache(shape, ctx.allocate(static_cast<std::size_t>(shape.bytes())));
    ask_for_large_pages(cache);
    return cache;
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
