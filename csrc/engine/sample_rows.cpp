#include "engine/sample_rows.h"

#include <algorithm>
#include <map>

#include "engine/sampler.h"

namespace tinyvllm {
SampleRow sample_row(const Sequence& sequence, std::int32_t sample_index, std::int32_t logits_row) {
  const SamplingParams& params = sequence.request->params;
  SampleRow row;
  row.logits_row = logits_row;
  row.num_logprobs = params.logprobs.value_or(-1);
  if (params.greedy()) return row;
  row.inverse_temperature = inverse_temperature(params);
  row.top_k = std::max(0, params.top_k);
  row.top_p = params.top_p;
  row.log_min_p = log_min_p(params);
  row.seed = sequence.request->seed;
  row.sample_index = static_cast<std::uint32_t>(sample_index);
  row.position = static_cast<std::uint32_t>(sequence.num_tokens());
  return row;
}

void append_logit_edits(const Sequence& sequence, std::span<const std::int32_t> eos_token_ids,
                        std::int32_t logits_row, std::vector<LogitEdit>& edits) {
  const SamplingParams& params = sequence.request->params;
  std::map<std::int32_t, LogitEdit> by_token;
  const auto edit = [&](std::int32_t token) -> LogitEdit& {
    return by_token.try_emplace(token, LogitEdit{.logits_row = logits_row, .token = token})
        .first->second;
  };
  for (const auto& [token, bias] : params.logit_bias) {
    edit(token).bias += static_cast<float>(bias);
  }
  if (sequence.num_output_tokens() < static_cast<std::size_t>(params.min_tokens)) {
    for (const std::int32_t token : params.stop_token_ids) edit(token).masked = 1;
    if (!params.ignore_eos) {
      for (const std::int32_t token : eos_token_ids) edit(token).masked = 1;
    }
  }
  if (params.repetition_penalty != 1.0) {
    const float penalty = positive_float(params.repetition_penalty);
    for (const std::int32_t token : sequence.tokens) edit(token).repetition = penalty;
  }
  if (params.has_penalties()) {
    for (const auto& [token, count] : sequence.output_counts) {
      edit(token).penalty = static_cast<float>(params.frequency_penalty * count +
                                               params.presence_penalty * (count > 0 ? 1.0 : 0.0));
    }
  }
  for (const auto& [token, change] : by_token) edits.push_back(change);
}

}  // namespace tinyvllm
