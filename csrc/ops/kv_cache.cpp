#include "ops/kv_cache.h"

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

std::int64_t KvShape::bytes() const { return checked_product(bytes_per_block(), num_blocks); }

KvLayer KvCache::layer(std::int64_t index) const {
  const std::int64_t one = shape_.bytes() / (2 * shape_.num_layers);
  std::byte* keys = static_cast<std::byte*>(memory_.get()) + 2 * index * one;
  return {keys, keys + one, shape_};
}

}  // namespace tinyvllm
