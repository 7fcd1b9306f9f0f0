// The KV cache in pages (PagedAttention, Kwon et al. 2023).
//
// Keys and values of all layers live in one pool of fixed-size blocks. A block holds block_size
// consecutive tokens of one sequence, in every layer; a sequence's block table says which. Only
// this file and the attention ops know the layout:
//
//   [layer][K or V][block][kv_head][slot][head_dim]     float32 or bfloat16
//
// A slot number is block * block_size + position % block_size.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace tinyvllm {

struct KvShape {
  std::int64_t num_layers, num_blocks, block_size, num_kv_heads, head_dim;
  DType dtype;

  std::int64_t block_stride() const { return num_kv_heads * block_size * head_dim; }  // elements
  // Bytes of one block over all layers, keys and values. Throws CapacityError where it overflows.
  std::int64_t bytes_per_block() const;
};

// One layer's keys and values: two arrays [num_blocks, num_kv_heads, block_size, head_dim].
struct KvLayer {
  void* keys;
  void* values;
  KvShape shape;
};

// The memory of a pool on the CPU: reserved at once, and taken from the system only as blocks are
// used.
class KvCache {
 public:
  // Throws CapacityError if the address space cannot be had.
  explicit KvCache(const KvShape& shape);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  const KvShape& shape() const { return shape_; }
  KvLayer layer(std::int64_t index) const;

  // Copies the K and V of a block, in all layers.
  void copy_block(std::int32_t from, std::int32_t to);

 private:
  KvShape shape_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace tinyvllm
