// A request and its sequences: a prompt, how to continue it, and how far each continuation has
// come.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/prefix_cache.h"
#include "engine/sampling_params.h"

namespace tinyvllm {

using RequestId = std::int64_t;

enum class FinishReason : std::uint8_t {
  kNone,    // not finished
  kStop,    // an EOS or stop token, or a stop string that the front end found
  kLength,  // max_tokens, or the engine's max_model_len
  kAbort,   // the caller no longer wants it
  kError,   // a step failed; StepOutput::ended says how
};

inline const char* name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return nullptr;
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kAbort:
      return "abort";
    case FinishReason::kError:
      return "error";
  }
  return nullptr;
}

// Log-probabilities under the softmax of the raw logits, before penalties and temperature.
struct TokenLogprobs {
  float chosen = 0;                   // of the token that was taken
  std::int32_t chosen_rank = 0;       // 1: the most likely
  std::vector<std::int32_t> top_ids;  // the best k, by falling logprob, then by rising id
  std::vector<float> top_logprobs;
};

struct Request {
  RequestId id = 0;
  SamplingParams params;
  std::uint64_t seed = 0;             // params.seed, or derived from the engine's
  std::uint64_t arrival = 0;          // how many requests came before
  std::int64_t max_total_tokens = 0;  // prompt and output of one sequence together
  std::size_t num_prompt_tokens = 0;
  std::int32_t num_unfinished = 1;  // of its n outputs
  std::int64_t num_cached_tokens =
      -1;  // of the prompt, found in the prefix cache; -1: not looked yet
  // Of prompt token 1, 2, ...; it grows as the prompt is computed, and survives preemption.
  std::vector<TokenLogprobs> prompt_logprobs;

  bool wants_prompt_logprobs() const {
    return params.prompt_logprobs && prompt_logprobs.size() + 1 < num_prompt_tokens;
  }
};

// One continuation of a request's prompt: what the scheduler schedules. A request with n > 1 begins
// as one sequence, which stands for all n until its prompt is computed, and then forks.
//
// The forward pass drives everything here out of the cache, so that what scheduling costs is how many
// cache lines it has to fetch again. All that a decode step reads of a sequence, and a copy of what it
// reads of the request, lies in the first two.
struct alignas(64) Sequence {
  Sequence(Request& request, std::vector<std::int32_t> prompt)
      : tokens(std::move(prompt)),
        max_total_tokens(request.max_total_tokens),
        stands_for_all(request.params.n > 1),
        has_penalties(request.params.has_penalties()),
        has_prompt_logprobs(request.params.prompt_logprobs.has_value()),
        has_stop_token_ids(!request.params.stop_token_ids.empty()),
        ignores_eos(request.params.ignore_eos),
        request(&request),
        id(request.id),
        num_prompt_tokens(tokens.size()) {}

  std::vector<std::int32_t> tokens;  // prompt, then output, as far as it is known
  // Tokens whose K and V are in the cache, or will be when the steps in flight have ended. A sequence
  // is in prefill while more than one is missing.
  std::size_t num_computed_tokens = 0;
  std::int64_t max_total_tokens;
  // Tokens behind the known ones that steps in flight sample; the last of them is this draw of the
  // step that was launched last.
  std::int32_t num_pending = 0;
  std::int32_t pending_draw = -1;
  std::int32_t sample = 0;  // which of the request's n outputs
  bool stands_for_all;      // not forked yet
  bool is_fork = false;  // has others beside it, with which it may share a block that is not full
  // Admitted in the step that was scheduled last: it may begin with blocks that this step fills.
  bool is_new = false;
  bool has_penalties, has_prompt_logprobs, has_stop_token_ids, ignores_eos;

  Request* request;
  RequestId id;
  std::size_t num_prompt_tokens;
  std::vector<BlockId> block_table;
  // How far the table's blocks are known to the prefix cache, and the key of the last of these.
  std::size_t num_published_blocks = 0;
  ContentKey published;
  // How often each token was put out; kept only where penalties ask for it.
  std::unordered_map<std::int32_t, std::int32_t> output_counts;

  // Begins to fetch what a decode step reads.
  void prefetch() const {
    __builtin_prefetch(&tokens);
    __builtin_prefetch(&request);
  }
  // With those that are not known yet.
  std::size_t num_tokens() const { return tokens.size() + static_cast<std::size_t>(num_pending); }
  std::size_t num_output_tokens() const { return num_tokens() - num_prompt_tokens; }
  // Where the K and V of a position lie (kv_cache.h).
  std::int64_t slot(std::int64_t position, std::int64_t block_size) const {
    return std::int64_t{block_table[static_cast<std::size_t>(position / block_size)]} * block_size +
           position % block_size;
  }
  // How many of max_num_seqs it takes.
  std::int64_t num_slots() const { return stands_for_all ? request->params.n : 1; }
};

}  // namespace tinyvllm
