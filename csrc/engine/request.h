// One request: a prompt, how to continue it, and how far it has come.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/sampling_params.h"

namespace tinyvllm {

using RequestId = std::int64_t;

enum class FinishReason : std::uint8_t {
  kNone,    // not finished
  kStop,    // an EOS or stop token, or a stop string that the front end found
  kLength,  // max_tokens, or the engine's max_model_len
  kAbort,   // the caller no longer wants it
  kError,   // a step failed; StepOutput::errors says how
};

struct Request {
  RequestId id = 0;
  SamplingParams params;
  std::uint64_t seed = 0;             // params.seed, or derived from the engine's
  std::int64_t max_total_tokens = 0;  // prompt and output together
  std::size_t num_prompt_tokens = 0;

  std::vector<std::int32_t> tokens;  // prompt, then output
  // Tokens whose K and V are in the cache. A request is in prefill while more than one is missing.
  std::size_t num_computed_tokens = 0;
  std::vector<std::int32_t> block_table;
  // How often each token was put out; kept only where penalties ask for it.
  std::unordered_map<std::int32_t, std::int32_t> output_counts;

  std::size_t num_output_tokens() const { return tokens.size() - num_prompt_tokens; }
};

}  // namespace tinyvllm
