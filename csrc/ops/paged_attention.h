// Causal attention over the paged KV cache, for a flat batch of tokens of many sequences:
//
//   out[t, h] = sum_p softmax_p(scale q[t, h] . K[p, h / group]) V[p, h / group]
//
// over the positions p of t's own sequence with  position(t) - window < p <= position(t)  (window
// 0: all p <= position(t)); group = num_heads / num_kv_heads (grouped-query attention, Ainslie et
// al. 2023).
//
//   q    [num_tokens, num_heads * head_dim]  float32 (on CUDA what enters a product); rows may be
//        part of wider rows (qkv)
//   kv   one layer of the pool; the K and V of every token of the batch are already in it
//   out  [num_tokens, num_heads * head_dim]  float32 or bfloat16, what the next matmul reads
//
// Prefill chunks and decode tokens are the same thing here: a token reads K and V back from the
// pool, in tiles aligned to absolute position and splits cut at fixed positions, so its result
// depends neither on its batch nor on how its prompt was cut into chunks (docs/promises.md, 2).
// Slots outside the range are never read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

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

// For an engine to ask before it loads weights: throws UnsupportedModelError where more than
// kMaxGroup (cpu/kernels.h) query heads share a KV head.
void check_attention(const CpuContext& ctx, std::int64_t num_heads, std::int64_t num_kv_heads);

// Throws where check_attention() does.
void paged_attention(const CpuContext& ctx, TensorView q, const KvLayer& kv,
                     std::span<const BatchSequence> sequences, std::int64_t num_heads,
                     std::int64_t window, float scale, MutTensorView out);

// --- On the GPU ----------------------------------------------------------------------------------
//
// The same formula. q, kv and out have one dtype. bfloat16 with a head_dim of 64, 80, 96 or 128
// runs on the tensor cores, where q and the weights of the softmax are rounded to bfloat16;
// everything else takes a plain path in float32. A row of a chunk has the same bits in any batch
// and chunking; a decode's also depend on the split: on how many decodes there are and, where they
// are few, on the longest context, by steps.

// A batch as the kernels see it. All arrays are device memory, so that a captured graph reads them
// anew at each replay.
//
// The first kernel of a step is launched without overlaps_previous: what lies in these arrays, and
// K and V of the positions before this step's, is then complete before any attention of the step
// begins, and is read before wait_for_previous().
struct CudaSequences {
  std::int32_t num_decodes = 0;  // sequences with one token: row i of q is sequence i's. Padded.
  std::int32_t num_chunks = 0;   // sequences with several tokens (prefill chunks), behind them
  const std::int32_t* context_lengths = nullptr;  // [num_decodes + num_chunks], with this step's
                                                  // tokens; 0: a padded row, whose out is zero
  const std::int32_t* block_tables = nullptr;     // [num_decodes + num_chunks, max_blocks]
  std::int32_t max_blocks = 0;

  // The work of the decodes: pairs (sequence, number of a split), a split being `split` positions
  // at a multiple of it, as decode_split() chooses it. The splits of a sequence lie side by side,
  // ascending from 0; a padded row has one. The grid is fixed and loops.
  const std::int32_t* decode_items = nullptr;      // [*num_decode_items, 2]
  const std::int32_t* num_decode_items = nullptr;  // a scalar
  std::int32_t max_decode_items = 0;               // how many it and the workspace have room for
  std::int32_t split = 0;                          // a multiple of 128

  // The chunks: chunk i has the rows num_decodes + chunk_starts[i] to num_decodes +
  // chunk_starts[i + 1] of q, cut into tiles of chunk_tile_tokens() tokens. Never in a graph.
  const std::int32_t* chunk_starts = nullptr;  // [num_chunks + 1]
  const std::int32_t* chunk_tiles = nullptr;   // [num_chunk_tiles, 2]: chunk, first token in it
  std::int32_t num_chunk_tiles = 0;
};

// How many positions a split of a decode has: few where few sequences have to fill the GPU, else
// many, as what a split costs beside its reading is that of some hundred positions (measured by
// benchmarks/gpu_attention.py). By the padded number of sequences, so that a graph and the same
// batch without one agree.
//
// Of few sequences with long contexts there are longer splits, too: their blocks are then as many
// as begin at once, and fewer results are merged (from about 5,000 positions on, on an H200).
constexpr std::int64_t decode_split(std::int64_t num_decodes, std::int64_t num_kv_heads,
                                    std::int64_t longest_context) {
  const std::int64_t shares = num_decodes * num_kv_heads;
  if (shares < 32) return longest_context <= 5120 ? 256 : 512;
  return shares < 128 ? 512 : shares < 256 ? 1024 : 2048;
}

// How many tokens a tile of a chunk has: its query heads over one KV head fill a block's rows.
constexpr std::int64_t chunk_tile_tokens(std::int64_t num_heads, std::int64_t num_kv_heads) {
  const std::int64_t tokens = 128 / (num_heads / num_kv_heads);
  return tokens > 0 ? tokens : 1;
}

// The work of one decode, and of one chunk, behind that of the ones before it.
inline void append_decode_items(std::int32_t sequence, std::int64_t context_length,
                                std::int64_t split, std::vector<std::int32_t>& items) {
  std::int32_t index = 0;
  do {
    items.insert(items.end(), {sequence, index});
  } while (++index * split < context_length);
}

inline void append_chunk_tiles(std::int32_t chunk, std::int64_t num_tokens,
                               std::int64_t tile_tokens, std::vector<std::int32_t>& tiles) {
  for (std::int64_t token = 0; token < num_tokens; token += tile_tokens) {
    tiles.insert(tiles.end(), {chunk, static_cast<std::int32_t>(token)});
  }
}

// The scratch memory (CudaContext::workspace) that so many items need. It is used only where a
// sequence has several splits.
constexpr std::size_t paged_attention_workspace_bytes(std::int64_t max_decode_items,
                                                      std::int64_t num_heads,
                                                      std::int64_t head_dim) {
  return static_cast<std::size_t>(max_decode_items * num_heads * (head_dim + 2)) * sizeof(float);
}

// For an engine to ask before it takes memory: throws UnsupportedModelError where head_dim is over
// 256, and InvalidRequestError where so many decodes, or one with so long a context, are more than a
// launch on this card can take. No decodes: all tokens are chunks.
void check_attention(const CudaContext& ctx, const KvShape& kv, std::int64_t num_heads,
                     std::int64_t max_decodes, std::int64_t max_context);

// Throws where check_attention() does.
void paged_attention(const CudaContext& ctx, TensorView q, const KvLayer& kv,
                     const CudaSequences& sequences, std::int64_t num_heads, std::int64_t window,
                     float scale, MutTensorView out);

}  // namespace tinyvllm
