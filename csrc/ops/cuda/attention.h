// What the three attention kernels share: their arguments and where a token's K and V lie.
#pragma once

#include "cuda/device.h"
#include "ops/paged_attention.h"

namespace tinyvllm::cuda {

inline constexpr float kMinusInfinity = -__builtin_inff();
inline constexpr float kLog2e = 1.4426950408889634f;

template <typename T>
struct AttentionArguments {
  const T* q;  // [num_tokens, num_heads * head_dim], rows q_stride elements apart
  std::int64_t q_stride;
  const T* keys;  // [num_blocks, num_kv_heads, block_size, head_dim]
  const T* values;
  T* out;  // [num_tokens, num_heads * head_dim], rows out_stride elements apart
  std::int64_t out_stride;
  std::int64_t block_stride;  // elements from block to block
  int num_heads, num_kv_heads, head_dim, block_size;
  int block_shift;  // log2(block_size); -1 where it is not a power of two
  int window;       // positions that a token sees, its own included; 0: all
  float scale;
  CudaSequences sequences;

  // A kernel that also fills the cache writes through these.
  __device__ T* keys_to_write() const { return const_cast<T*>(keys); }
  __device__ T* values_to_write() const { return const_cast<T*>(values); }
  __device__ int group() const { return num_heads / num_kv_heads; }
  // The first position that the token at `position` sees.
  __device__ int first_seen(int position) const {
    return window > 0 && position >= window ? position - window + 1 : 0;
  }
  __device__ const std::int32_t* block_table(int sequence) const {
    return sequences.block_tables + static_cast<std::int64_t>(sequence) * sequences.max_blocks;
  }
  // Where K and V of one KV head at one position lie in their arrays.
  __device__ std::int64_t offset(const std::int32_t* table, int kv_head, int position) const {
    const int index = block_shift >= 0 ? position >> block_shift : position / block_size;
    const int slot = position - index * block_size;
    return table[index] * block_stride +
           (static_cast<std::int64_t>(kv_head) * block_size + slot) * head_dim;
  }
};

}  // namespace tinyvllm::cuda
