// Attention over a batch that the host describes, for ops.cpp: on CUDA its arrays go to the
// device, as a runner of the engine sends them.
#pragma once

#include <algorithm>
#include <vector>

#include "bindings/operands.h"
#include "ops/paged_attention.h"

namespace tinyvllm {

struct AttentionCall {
  TensorView queries;
  KvLayer cache;
  std::vector<BatchSequence> sequences;
  std::vector<std::int64_t> table_sizes;  // blocks in the table of each
  std::int64_t num_heads, window;
  float scale;
  bool as_chunks;  // CUDA: sequences of one token, too
};

inline std::span<const BatchSequence> sequences_for(Operands<CpuContext>& /*operands*/,
                                                    const AttentionCall& call) {
  return call.sequences;
}

#if defined(TINYVLLM_HAS_CUDA)

// The sequences of one token lead the batch, unless they are run as chunks.
inline CudaSequences sequences_for(Operands<CudaContext>& operands, const AttentionCall& call) {
  const std::int64_t num_kv_heads = call.cache.shape.num_kv_heads;
  const std::int64_t tile_tokens = chunk_tile_tokens(call.num_heads, num_kv_heads);
  std::vector<std::int32_t> lengths, tables, items, starts{0}, tiles;
  CudaSequences sequences;
  sequences.max_blocks = static_cast<std::int32_t>(std::max<std::int64_t>(
      1, *std::max_element(call.table_sizes.begin(), call.table_sizes.end())));
  for (std::size_t i = 0; i < call.sequences.size(); ++i) {
    const BatchSequence& sequence = call.sequences[i];
    lengths.push_back(static_cast<std::int32_t>(sequence.first_position + sequence.num_tokens));
    // Nothing reads a block table behind its context.
    tables.insert(tables.end(), sequence.block_table, sequence.block_table + call.table_sizes[i]);
    tables.resize(lengths.size() * static_cast<std::size_t>(sequences.max_blocks), 0x7fffffff);
    if (sequence.num_tokens == 1 && !call.as_chunks) {
      ++sequences.num_decodes;
    } else {
      append_chunk_tiles(sequences.num_chunks++, sequence.num_tokens, tile_tokens, tiles);
      starts.push_back(starts.back() + static_cast<std::int32_t>(sequence.num_tokens));
    }
  }
  const auto decodes = std::span(lengths).first(static_cast<std::size_t>(sequences.num_decodes));
  sequences.split = static_cast<std::int32_t>(
      decode_split(sequences.num_decodes, num_kv_heads,
                   decodes.empty() ? 0 : *std::max_element(decodes.begin(), decodes.end())));
  for (std::int32_t i = 0; i < sequences.num_decodes; ++i) {
    append_decode_items(i, lengths[static_cast<std::size_t>(i)], sequences.split, items);
  }
  const std::vector<std::int32_t> num_items{static_cast<std::int32_t>(items.size() / 2)};
  const auto on_device = [&](const std::vector<std::int32_t>& values) {
    return operands.read(std::span<const std::int32_t>(values)).data();
  };
  sequences.context_lengths = on_device(lengths);
  sequences.block_tables = on_device(tables);
  sequences.decode_items = on_device(items);
  sequences.num_decode_items = on_device(num_items);
  sequences.max_decode_items = num_items.front();
  sequences.chunk_starts = on_device(starts);
  sequences.chunk_tiles = on_device(tiles);
  sequences.num_chunk_tiles = static_cast<std::int32_t>(tiles.size() / 2);
  return sequences;
}

#endif

}  // namespace tinyvllm
