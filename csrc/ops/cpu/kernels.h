// The inner loops of the CPU ops, as one table of functions for each instruction set.
//
// kernels.cpp is compiled once for every set, with that set's compiler flags, and defines one
// table. The ops (csrc/ops/*_cpu.cpp) check shapes and share out the work; what they call for a
// share is here. All pointers need only be aligned to their element.
#pragma once

#include <cstdint>

#include "base/bfloat16.h"

namespace tinyvllm {

// out[m, n] = bias[n] + sum_k x[m, k] * weight[n, k], or += where `accumulate` says so.
//
// One output element has one vector accumulator over ascending k and one horizontal sum at the end,
// whatever num_rows and num_outputs are, so that a row of x gives the same bits in any batch.
template <typename X, typename W>
struct MatmulShare {
  const X* x;  // [num_rows, depth], rows x_stride elements apart
  std::int64_t x_stride;
  const W* weight;    // [num_outputs, depth], contiguous
  const float* bias;  // [num_outputs], or null
  float* out;         // [num_rows, num_outputs], rows out_stride elements apart
  std::int64_t out_stride;
  bool accumulate;
  std::int64_t num_rows, num_outputs, depth;
};

// Attention of the query heads of one KV head at one token.
template <typename Kv>
struct AttentionShare {
  const float* query;         // [group, head_dim]
  const Kv* keys;             // [num_blocks, num_kv_heads, block_size, head_dim], at this KV head
  const Kv* values;           // likewise
  std::int64_t block_stride;  // elements from one block to the next
  const std::int32_t* block_table;
  std::int64_t block_size, head_dim, group;
  std::int64_t first, last;  // attends to the positions first..last, both included
  float scale;
  float* scratch;  // [group, head_dim], the calling thread's own
  float* out;      // [group, head_dim]
};

struct Kernels {
  const char* isa;

  void (*matmul_bf16_bf16)(const MatmulShare<BFloat16, BFloat16>&);
  void (*matmul_f32_bf16)(const MatmulShare<float, BFloat16>&);
  void (*matmul_f32_f32)(const MatmulShare<float, float>&);

  void (*attention_bf16)(const AttentionShare<BFloat16>&);
  void (*attention_f32)(const AttentionShare<float>&);

  // out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]; out may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t size, float* out);
  // out[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(const float* gate, const float* up, std::int64_t size, float* out);
  void (*to_bfloat16)(const float* x, std::int64_t size, BFloat16* out);
  void (*to_float)(const BFloat16* x, std::int64_t size, float* out);
};

// Long contexts are cut at fixed absolute positions; each piece has an online softmax of its own,
// and the pieces are merged in ascending order. The cuts do not depend on who computes a piece.
inline constexpr std::int64_t kAttentionSplit = 1024;
// Scores are computed in tiles of this many positions, aligned to absolute position. Divides the
// split.
inline constexpr std::int64_t kAttentionTile = 16;

// The most query heads that may share one KV head.
inline constexpr std::int64_t kMaxGroup = 256;

// The table of the named set; throws InvalidRequestError where this build or this CPU lacks it.
const Kernels& kernels_for(const char* isa);

}  // namespace tinyvllm
