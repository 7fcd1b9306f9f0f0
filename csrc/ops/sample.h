// From rows of logits to tokens, on the GPU. What is computed, and in which order, is the CPU's:
// see engine/sampler.h. Equal logits give equal tokens there and here.
//
//   logits [num_logits, vocab]  float32
//
// All pointers are device memory. Nothing waits for the host: the next step reads the tokens where
// they are (feed_tokens), and the host fetches them when it pleases.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/tensor.h"

namespace tinyvllm {

class CudaContext;

// One token to choose. Several may draw from the same row of logits: the samples of a request with
// n > 1.
struct SampleRow {
  std::int32_t logits_row = -1;   // -1: a padded row, for which nothing is read or written
  std::int32_t top_k = 0;         // 0: all
  float inverse_temperature = 0;  // 0: greedy, and the other options have no meaning
  float log_min_p = 0;            // the float nearest to log(min_p); -infinity: all
  double top_p = 1;               // 1: all
  std::uint64_t seed = 0;
  std::uint32_t sample_index = 0;
  std::uint32_t position = 0;  // of the token that is chosen
  std::int32_t num_logprobs =
      -1;  // the best so many besides the chosen one; -1: no logprobs at all

  constexpr bool has_filter() const {
    return inverse_temperature != 0 && (top_k > 0 || top_p < 1 || log_min_p > -1e38f);
  }
};

// A change to one logit before anything else; at most one for each (row, token). In this order:
//   logit += bias;  repetition: logit > 0 ? logit / repetition : logit * repetition;
//   logit -= penalty;  and where `masked`, the token cannot be chosen.
struct LogitEdit {
  std::int32_t logits_row;  // -1: padding
  std::int32_t token;
  float bias = 0;
  float repetition = 1;
  float penalty = 0;  // presence and frequency
  std::int32_t masked = 0;
  float original = 0;  // room for what was there: sample() puts it back
};

struct SampleBatch {
  const SampleRow* rows = nullptr;
  std::int32_t num_rows = 0;
  LogitEdit* edits = nullptr;
  std::int32_t num_edits = 0;
  // What the launches depend on, as the host knows it: false where no row asks for it.
  bool any_filter = false;
  bool any_logprobs = false;
};

enum class SampleError : std::int32_t {
  kNone,
  kNotFinite,  // a logit is infinite or no number
  kNoToken,    // the masks leave nothing to choose
};

inline constexpr std::int32_t kMaxLogprobs = 20;

// Log-softmax of the raw logits, before edits and temperature.
struct LogprobOutputs {
  float* chosen = nullptr;             // [num_rows] of the token that was taken
  std::int32_t* ranks = nullptr;       // [num_rows] 1: the most likely
  std::int32_t* top_tokens = nullptr;  // [num_rows, kMaxLogprobs] by falling logit, then rising id
  float* top_logprobs = nullptr;       // [num_rows, kMaxLogprobs]
};

struct SampleOutputs {
  std::int32_t* tokens = nullptr;  // [num_rows]; 0 where there is an error
  SampleError* errors = nullptr;   // [num_rows]
  LogprobOutputs logprobs;         // may be null where no row asks for them
};

// Of CudaContext::workspace(): for each row 64 candidates of 16 bytes, and a cut of 8.
constexpr std::size_t sample_workspace_bytes(std::int64_t num_rows) {
  return static_cast<std::size_t>(num_rows) * (64 * 16 + 8);
}

// Chooses a token for each row. The logits are edited in place and put back. Throws Error where
// there are more rows than counters for them.
void sample(const CudaContext& ctx, MutTensorView logits, const SampleBatch& batch,
            const SampleOutputs& outputs);

// The logprobs of given tokens, of which tokens[i] was chosen from row i of logits, with the best
// num_logprobs: for the tokens of prompts.
void logprobs(const CudaContext& ctx, TensorView logits, const std::int32_t* tokens,
              std::int32_t num_logprobs, const LogprobOutputs& outputs);

// tokens[i] = sampled[sources[i]] where sources[i] >= 0: the tokens of the next step that the host
// does not know yet. A launch that does not overlap the one before it.
void feed_tokens(const CudaContext& ctx, const std::int32_t* sampled, const std::int32_t* sources,
                 std::int32_t count, std::int32_t* tokens);

}  // namespace tinyvllm
