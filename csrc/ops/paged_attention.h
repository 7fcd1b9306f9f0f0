// Causal attention over the paged KV cache, for a flat batch of tokens of many sequences:
//
//   out[t, h] = sum_p softmax_p(scale q[t, h] . K[p, h / group]) V[p, h / group]
//
// over the positions p of t's own sequence with  position(t) - window < p <= position(t)  (window
// 0: all p <= position(t)); group = num_heads / num_kv_heads (grouped-query attention, Ainslie et
// al. 2023).
//
//   q    [num_tokens, num_heads * head_dim]  float32 (on CUDA what enters a product); rows may be part
//        of wider rows (qkv)
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

class CudaContext;

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

// What the op on the GPU needs to know of a batch. The arrays are device memory at fixed addresses:
// a captured graph reads them anew at each replay. Sequences with one token come first.
struct CudaSequences {
  std::int32_t num_decodes = 0;       // sequences with one token: sequence i has row i. Padded.
  std::int32_t num_chunks = 0;        // sequences with several tokens, behind them
  std::int32_t num_chunk_tokens = 0;  // rows behind the decodes
  // [num_decodes + num_chunks], this step's tokens included; 0: a padded row
  const std::int32_t* context_lengths = nullptr;
  const std::int32_t* block_tables = nullptr;  // [num_decodes + num_chunks, max_blocks]
  std::int32_t max_blocks = 0;
  // [num_chunks + 1]: chunk i has the rows num_decodes + chunk_starts[i] up to chunk_starts[i + 1]
  const std::int32_t* chunk_starts = nullptr;
  // The work of the decodes: [number][2], sequence and split of its context, in ascending order.
  const std::int32_t* decode_items = nullptr;
  const std::int32_t* num_decode_items = nullptr;  // a scalar in device memory
  // The work of the chunks: [num_chunk_tiles][2], chunk and first row in it.
  const std::int32_t* chunk_tiles = nullptr;
  std::int32_t num_chunk_tiles = 0;
};

void paged_attention(const CudaContext& ctx, TensorView q, const KvLayer& kv,
                     const CudaSequences& sequences, std::int64_t num_heads, std::int64_t window,
                     float scale, MutTensorView out);

}  // namespace tinyvllm
