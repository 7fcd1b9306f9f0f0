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
#include <span>
#include <utility>

#include "base/dtype.h"
#include "base/memory.h"
#include "ops/cpu_context.h"

namespace tinyvllm {

class CudaContext;

struct KvShape {
  std::int64_t num_layers, num_blocks, block_size, num_kv_heads, head_dim;
  DType dtype;

  std::int64_t block_stride() const { return num_kv_heads * block_size * head_dim; }  // elements
  // Bytes of one block over all layers, keys and values, and of all blocks. Throw CapacityError
  // where it overflows.
  std::int64_t bytes_per_block() const;
  std::int64_t bytes() const;
};

// One layer's keys and values: two arrays [num_blocks, num_kv_heads, block_size, head_dim].
struct KvLayer {
  void* keys;
  void* values;
  KvShape shape;
};

// A pool of blocks. It owns its memory, on the device that it was made for.
class KvCache {
 public:
  KvCache(const KvShape& shape, Memory memory) : shape_(shape), memory_(std::move(memory)) {}

  const KvShape& shape() const { return shape_; }
  KvLayer layer(std::int64_t index) const;

 private:
  KvShape shape_;
  Memory memory_;
};

// On the CPU memory is reserved at once, and taken from the system only as blocks are used. Throws
// CapacityError if the address space, or the memory of the GPU, cannot be had.
KvCache make_kv_cache(const CpuContext& ctx, const KvShape& shape);
KvCache make_kv_cache(const CudaContext& ctx, const KvShape& shape);

// K and V of a block that forks share and one of them is about to write to (copy-on-write).
struct BlockCopy {
  std::int32_t from, to;
};

// Copies blocks in all layers, in this order. On CUDA all at once: no block may be the target of one
// copy and part of another.
void copy_blocks(const CpuContext& ctx, const KvCache& cache, std::span<const BlockCopy> copies);
void copy_blocks(const CudaContext& ctx, const KvCache& cache, std::span<const BlockCopy> copies);

}  // namespace tinyvllm
