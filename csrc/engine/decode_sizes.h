// How large a step of decodes is on a GPU. Arithmetic that every build has, so that memory can be
// planned for a GPU that is elsewhere.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/paged_attention.h"

namespace tinyvllm {

// The next batch size that has a graph: 1, 2, 4, then steps of 8 up to 64, then steps of 16.
constexpr std::int64_t padded_batch_size(std::int64_t num_sequences) {
  if (num_sequences <= 2) return num_sequences;
  if (num_sequences <= 4) return 4;
  const std::int64_t step = num_sequences <= 64 ? 8 : 16;
  return (num_sequences + step - 1) / step * step;
}

// How many batches of decodes there are that need a graph of their own: each padded size with each
// split that it may have (decode_split), which are two at most, by the longest context.
constexpr std::int64_t num_decode_sizes(std::int64_t max_num_seqs, std::int64_t num_kv_heads,
                                        std::int64_t max_model_len) {
  std::int64_t count = 0;
  for (std::int64_t n = 1; n <= padded_batch_size(max_num_seqs); n = padded_batch_size(n + 1)) {
    const bool has_longer_splits =
        decode_split(n, num_kv_heads, 1) != decode_split(n, num_kv_heads, max_model_len);
    count += has_longer_splits ? 2 : 1;
  }
  return count;
}

// How many splits (decode_split) so many decodes have at most: no context has shorter ones than the
// shortest.
constexpr std::int64_t max_decode_items(std::int64_t num_decodes, std::int64_t num_kv_heads,
                                        std::int64_t max_model_len) {
  const std::int64_t split = decode_split(num_decodes, num_kv_heads, 1);
  return num_decodes * ((max_model_len + split - 1) / split);
}

// The same of every step up to a padded batch of max_num_seqs: more sequences may have fewer splits.
constexpr std::int64_t most_decode_items(std::int64_t max_num_seqs, std::int64_t num_kv_heads,
                                         std::int64_t max_model_len) {
  std::int64_t most = 1;
  for (std::int64_t n = 1; n <= padded_batch_size(max_num_seqs); ++n) {
    most = std::max(most, max_decode_items(n, num_kv_heads, max_model_len));
  }
  return most;
}

}  // namespace tinyvllm
