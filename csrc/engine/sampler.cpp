#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "base/errors.h"
#include "ops/gumbel.h"

namespace tinyvllm {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The lowest id among the largest values.
std::int32_t argmax(std::span<const float> values) {
  return static_cast<std::int32_t>(std::max_element(values.begin(), values.end()) - values.begin());
}

void apply_bias_and_mask(const Sequence& sequence, std::span<const std::int32_t> eos_token_ids,
                         std::span<float> logits) {
  for (const auto& [token, bias] : sequence.request->params.logit_bias) {
    logits[static_cast<std::size_t>(token)] += static_cast<float>(bias);
  }
  if (sequence.num_output_tokens() >= static_cast<std::size_t>(sequence.request->params.min_tokens))
    return;
  for (const std::int32_t token : sequence.request->params.stop_token_ids) {
    logits[static_cast<std::size_t>(token)] = kMinusInfinity;
  }
  if (sequence.request->params.ignore_eos) return;
  for (const std::int32_t token : eos_token_ids) {
    logits[static_cast<std::size_t>(token)] = kMinusInfinity;
  }
}

void apply_penalties(const Sequence& sequence, std::span<float> logits) {
  const SamplingParams& params = sequence.request->params;
  if (params.repetition_penalty != 1.0) {
    const float penalty = positive_float(params.repetition_penalty);
    std::vector<bool> seen(logits.size());
    for (const std::int32_t token : sequence.tokens) {
      const auto index = static_cast<std::size_t>(token);
      if (seen[index]) continue;
      seen[index] = true;
      logits[index] = logits[index] > 0 ? logits[index] / penalty : logits[index] * penalty;
    }
  }
  for (const auto& [token, count] : sequence.output_counts) {
    logits[static_cast<std::size_t>(token)] -= static_cast<float>(
        params.frequency_penalty * count + params.presence_penalty * (count > 0 ? 1.0 : 0.0));
  }
}

// The ids that min_p, top_k and top_p leave, given logits that are already divided by the
// temperature. Each filter sees the distribution that the one before it left, scaled to sum to one.
std::vector<std::int32_t> kept_tokens(const SamplingParams& params, std::span<const float> logits) {
  std::vector<std::int32_t> kept;
  const float maximum = *std::max_element(logits.begin(), logits.end());
  const float lowest =
      params.min_p > 0 ? maximum + log_min_p(params) : std::numeric_limits<float>::lowest();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] >= lowest) kept.push_back(static_cast<std::int32_t>(i));
  }
  const auto before = [&](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  };
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < kept.size()) {
    std::nth_element(kept.begin(), kept.begin() + params.top_k - 1, kept.end(), before);
    kept.resize(static_cast<std::size_t>(params.top_k));
  }
  if (params.top_p < 1.0) {
    const auto weight = [&](std::int32_t id) {
      return std::exp(static_cast<double>(logits[static_cast<std::size_t>(id)]) - maximum);
    };
    double total = 0;
    for (const std::int32_t id : kept) total += weight(id);
    // The nucleus is usually small: sort only as far as it reaches, doubling the sorted part.
    std::size_t sorted = 0;
    double mass = 0;
    for (std::size_t next = 64; sorted < kept.size(); next *= 2) {
      const std::size_t end = std::min(next, kept.size());
      std::partial_sort(kept.begin() + static_cast<std::ptrdiff_t>(sorted),
                        kept.begin() + static_cast<std::ptrdiff_t>(end), kept.end(), before);
      for (; sorted < end; ++sorted) {
        mass += weight(kept[sorted]);
        if (mass >= params.top_p * total) {
          kept.resize(sorted + 1);
          return kept;
        }
      }
    }
  }
  return kept;
}

std::int32_t draw(const Sequence& sequence, std::uint32_t sample_index,
                  std::span<const std::int32_t> kept, std::span<const float> logits) {
  const std::uint64_t seed = sequence.request->seed;
  const auto position = static_cast<std::uint32_t>(sequence.tokens.size());
  double best = -std::numeric_limits<double>::infinity();
  std::int32_t winner = kept.front();
  std::array<std::uint32_t, 4> words{};  // of the four tokens that share a counter
  std::uint32_t loaded = ~std::uint32_t{0};
  for (const std::int32_t token : kept) {
    const auto id = static_cast<std::uint32_t>(token);
    if (id / 4 != loaded) {
      loaded = id / 4;
      words = token_noise(seed, sample_index, position, loaded);
    }
    const std::uint32_t bits = words[id % 4];
    const double logit = logits[id];
    if (logit + gumbel_upper_bound(bits) < best) continue;  // nearly all: only a few can still win
    const double value = logit + gumbel(bits);
    if (value > best || (value == best && token < winner)) {
      best = value;
      winner = token;
    }
  }
  return winner;
}

}  // namespace

float positive_float(double value) {
  return static_cast<float>(std::clamp<double>(value, std::numeric_limits<float>::min(),
                                               std::numeric_limits<float>::max()));
}

float inverse_temperature(const SamplingParams& params) {
  return positive_float(1.0 / params.temperature);
}

float log_min_p(const SamplingParams& params) {
  return params.min_p > 0 ? static_cast<float>(std::log(params.min_p)) : kMinusInfinity;
}

DrawOrigin::DrawOrigin(const Sequence& sequence)
    : request(sequence.request->id),
      position(static_cast<std::int64_t>(sequence.num_tokens()) - 1),
      min_tokens(sequence.request->params.min_tokens),
      num_stop_token_ids(sequence.request->params.stop_token_ids.size()) {}

std::string DrawOrigin::not_finite() const {
  return "Request " + std::to_string(request) + ": a logit at position " +
         std::to_string(position) +
         " is not a finite number. The weights are damaged, or too large for their dtype; try "
         "dtype "
         "float32.";
}

std::string DrawOrigin::no_token() const {
  return "Request " + std::to_string(request) + ": min_tokens is " + std::to_string(min_tokens) +
         " and the " + std::to_string(num_stop_token_ids) +
         " stop_token_ids leave no token to choose. Lower min_tokens to 0.";
}

double gumbel_noise(std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position,
                    std::uint32_t token) {
  return gumbel(token_noise(seed, sample_index, position, token / 4)[token % 4]);
}

TokenLogprobs top_logprobs(std::span<const float> logits, std::int32_t chosen, std::int32_t k) {
  const double maximum = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float logit : logits) total += std::exp(logit - maximum);
  const double log_total = maximum + std::log(total);
  const auto logprob = [&](std::int32_t id) {
    return static_cast<float>(logits[static_cast<std::size_t>(id)] - log_total);
  };

  TokenLogprobs result;
  const float taken = logits[static_cast<std::size_t>(chosen)];
  result.chosen = logprob(chosen);
  result.chosen_rank =
      1 + static_cast<std::int32_t>(std::count_if(logits.begin(), logits.end(),
                                                  [&](float logit) { return logit > taken; }));
  std::vector<std::int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto end = ids.begin() + std::min<std::ptrdiff_t>(k, std::ssize(ids));
  std::partial_sort(ids.begin(), end, ids.end(), [&](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  });
  for (auto id = ids.begin(); id != end; ++id) {
    result.top_ids.push_back(*id);
    result.top_logprobs.push_back(logprob(*id));
  }
  return result;
}

Sample Sampler::sample(const Sequence& sequence, std::int32_t sample_index,
                       std::span<const float> raw) const {
  const SamplingParams& params = sequence.request->params;
  if (!std::all_of(raw.begin(), raw.end(), [](float x) { return std::isfinite(x); })) {
    throw Error(DrawOrigin(sequence).not_finite());
  }
  // Other samples of the request may draw from the same row, and logprobs are those of the raw
  // logits.
  std::vector<float> logits(raw.begin(), raw.end());
  apply_bias_and_mask(sequence, eos_token_ids_, logits);
  if (params.has_penalties()) apply_penalties(sequence, logits);

  Sample sample;
  sample.token = argmax(logits);
  if (logits[static_cast<std::size_t>(sample.token)] == kMinusInfinity) {
    throw Error(DrawOrigin(sequence).no_token());
  }
  if (!params.greedy()) {
    const float inverse = inverse_temperature(params);
    for (float& logit : logits) logit *= inverse;
    sample.token = draw(sequence, static_cast<std::uint32_t>(sample_index),
                        kept_tokens(params, logits), logits);
  }
  if (params.logprobs) sample.logprobs = top_logprobs(raw, sample.token, *params.logprobs);
  return sample;
}

}  // namespace tinyvllm
