#include "engine/sampling_params.h"

#include <charconv>
#include <cmath>
#include <string>

#include "base/errors.h"

namespace tinyvllm {
namespace {

template <typename T>
void require(bool holds, const char* field, T value, const char* range) {
  if (holds) return;
  char text[32];  // the shortest digits that give back this very value
  const std::to_chars_result end = std::to_chars(text, text + sizeof(text), value);
  throw InvalidRequestError(std::string(field) + " is " + std::string(text, end.ptr) +
                            "; it must be " + range + ".");
}

}  // namespace

void SamplingParams::validate() const {
  require(n == 1, "n", n, "1 (several samples of one prompt are not supported; repeat the prompt)");
  require(temperature >= 0 && std::isfinite(temperature), "temperature", temperature,
          "0 (greedy) or more");
  require(top_p > 0 && top_p <= 1, "top_p", top_p, "greater than 0 and at most 1");
  require(top_k >= -1, "top_k", top_k, "0 or -1 (off), or at least 1");
  require(min_p >= 0 && min_p <= 1, "min_p", min_p, "from 0 to 1");
  require(repetition_penalty > 0 && std::isfinite(repetition_penalty), "repetition_penalty",
          repetition_penalty, "greater than 0 (1 is off)");
  require(presence_penalty >= -2 && presence_penalty <= 2, "presence_penalty", presence_penalty,
          "from -2 to 2");
  require(frequency_penalty >= -2 && frequency_penalty <= 2, "frequency_penalty", frequency_penalty,
          "from -2 to 2");
  require(min_tokens >= 0, "min_tokens", min_tokens, "0 or more");
  if (max_tokens) {
    require(*max_tokens >= 1, "max_tokens", *max_tokens, "at least 1");
    require(min_tokens <= *max_tokens, "min_tokens", min_tokens,
            ("at most max_tokens, which is " + std::to_string(*max_tokens)).c_str());
  }
  if (logprobs) {
    require(*logprobs >= 0 && *logprobs <= kMaxLogprobs, "logprobs", *logprobs, "from 0 to 20");
  }
  for (const auto& [token, bias] : logit_bias) {
    require(!std::isnan(bias) && bias >= -100 && bias <= 100, "a logit_bias", bias,
            "from -100 to 100");
  }
}

void SamplingParams::validate_for(std::int64_t vocab_size) const {
  const std::string range =
      "from 0 to " + std::to_string(vocab_size - 1) + ", the model's vocabulary";
  for (const auto& [token, bias] : logit_bias) {
    require(token >= 0 && token < vocab_size, "a token id of logit_bias", token, range.c_str());
  }
  for (const std::int32_t token : stop_token_ids) {
    require(token >= 0 && token < vocab_size, "a stop_token_id", token, range.c_str());
  }
}

}  // namespace tinyvllm
