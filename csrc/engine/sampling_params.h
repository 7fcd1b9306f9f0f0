// How one request's tokens are chosen. Names, defaults and meanings are vLLM's.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace tinyvllm {

struct SamplingParams {
  std::int32_t n = 1;                 // 1 for now: the engine refuses more
  double temperature = 1.0;           // 0: greedy
  double top_p = 1.0;                 // (0, 1]
  std::int32_t top_k = 0;             // 0 or -1: off
  double min_p = 0.0;                 // [0, 1]
  double repetition_penalty = 1.0;    // > 0; over prompt and output
  double presence_penalty = 0.0;      // [-2, 2]; over output
  double frequency_penalty = 0.0;     // [-2, 2]; over output
  std::optional<std::uint64_t> seed;  // absent: from the engine's seed and the arrival number
  std::vector<std::int32_t> stop_token_ids;     // end the output, besides the model's EOS tokens
  bool ignore_eos = false;                      // the model's EOS tokens do not end the output
  std::optional<std::int64_t> max_tokens = 16;  // absent: up to the engine's max_model_len
  std::int64_t min_tokens = 0;                  // before it, no EOS and no stop token can be chosen
  std::optional<std::int32_t> logprobs;         // also return the best k alternatives of each token
  std::vector<std::pair<std::int32_t, double>> logit_bias;  // token id -> added to its logit

  // Throws InvalidRequestError that names the field, its value and its range.
  void validate() const;
  // The same for what depends on the model.
  void validate_for(std::int64_t vocab_size) const;

  bool greedy() const { return temperature < kGreedyTemperature; }
  bool has_penalties() const {
    return repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0;
  }

  static constexpr double kGreedyTemperature = 1e-5;  // as in vLLM: below it, division overflows
  static constexpr std::int32_t kMaxLogprobs = 20;
};

}  // namespace tinyvllm
