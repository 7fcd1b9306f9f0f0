#include "ops/kv_cache.h"

#include <sys/mman.h>

#include <cstring>
#include <string>

#include "base/errors.h"

namespace tinyvllm {
namespace {

std::int64_t checked_product(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) {
    throw CapacityError("The KV cache would have more than 2^63 bytes. Ask for fewer blocks.");
  }
  return product;
}

}  // namespace

std::int64_t KvShape::bytes_per_block() const {
  const std::int64_t per_head = checked_product(block_size, head_dim);
  const std::int64_t per_layer = checked_product(checked_product(2, num_kv_heads), per_head);
  return checked_product(checked_product(per_layer, num_layers),
                         static_cast<std::int64_t>(size_of(dtype)));
}

KvCache::KvCache(const KvShape& shape)
    : shape_(shape),
      size_(static_cast<std::size_t>(checked_product(shape.bytes_per_block(), shape.num_blocks))) {
  void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw CapacityError("Cannot reserve " + std::to_string(size_) + " bytes for a KV cache of " +
                        std::to_string(shape.num_blocks) + " blocks of " +
                        std::to_string(shape.block_size) +
                        " tokens. Lower kv_cache_memory_bytes or max_model_len.");
  }
  data_ = static_cast<std::byte*>(memory);
}

KvCache::~KvCache() { munmap(data_, size_); }

KvLayer KvCache::layer(std::int64_t index) const {
  const std::size_t one = size_ / static_cast<std::size_t>(2 * shape_.num_layers);
  std::byte* keys = data_ + static_cast<std::size_t>(2 * index) * one;
  return {keys, keys + one, shape_};
}

void KvCache::copy_block(std::int32_t from, std::int32_t to) {
  const std::size_t block = static_cast<std::size_t>(shape_.block_stride()) * size_of(shape_.dtype);
  const std::size_t array = block * static_cast<std::size_t>(shape_.num_blocks);
  for (std::byte* blocks = data_; blocks != data_ + size_; blocks += array) {
    std::memcpy(blocks + static_cast<std::size_t>(to) * block,
                blocks + static_cast<std::size_t>(from) * block, block);
  }
}

}  // namespace tinyvllm
