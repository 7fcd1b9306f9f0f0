// Causal attention over the paged KV cache, for a flat batch of tokens of many sequences:
//
//   out[t, h] = sum_p softmax_p(scale q[t, h] . K[p, h / group]) V[p, h / group]
//
// over the positions p of t's own sequence with  position(t) - window < p <= position(t)  (window
// 0: all p <= position(t)); group = num_heads / num_kv_heads (grouped-query attention, Ainslie et
// al. 2023).
//
//   q    [num_tokens, num_heads * head_dim]  float32; rows may be part of wider rows (qkv)
//   kv   one layer of the pool; the K and V of every token of the batch are already in it
//   out  [num_tokens, num_heads * head_dim]  float32 or bfloat16, what the next matmul reads
//
// Prefill chunks and decode tokens are the same thing here: a token reads K and V back from the
// pool, in tiles aligned to absolute position and splits cut at fixed positions, so its result
// depends neither on its batch nor on how its prompt was cut into chunks (DESIGN 4.2). Slots
// outside the range are never read. Throws Error where a group has more than kMaxGroup heads.
#pragma once

#include <span>

#include "base/tensor.h"
#include "ops/cpu_context.h"
#include "ops/kv_cache.h"

namespace tinyvllm {

// The tokens of one sequence in a batch: rows [first_token, first_token + num_tokens) of q, at the
// positions [first_position, first_position + num_tokens).
struct BatchSequence {
  std::int64_t first_token;
  std::int64_t num_tokens;
  std::int64_t first_position;
  const std::int32_t* block_table;  // covers first_position + num_tokens positions
};

void paged_attention(const CpuContext& ctx, TensorView q, const KvLayer& kv,
                     std::span<const BatchSequence> sequences, std::int64_t num_heads,
                     std::int64_t window, float scale, MutTensorView out);

}  // namespace tinyvllm
