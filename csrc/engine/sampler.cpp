#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numbers>
#include <numeric>
#include <string>

#include "base/errors.h"
#include "base/philox.h"
#include "ops/gumbel.h"
#include "ops/logit_maxima.h"

namespace tinyvllm {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Rows are gone through in blocks; a block is skipped where its largest logit says enough.
constexpr auto kBlock = static_cast<std::size_t>(kLogitBlock);

// What the largest logits of the blocks of a row say of all of it.
struct RowMaximum {
  float maximum = kMinusInfinity;
  std::int32_t argmax = 0;  // the lowest id among the largest
  bool finite = true;
  std::span<const float> block_maxima;
};

RowMaximum maximum_of(const LogitRow& row) {
  RowMaximum result{.block_maxima = row.maxima};
  std::size_t best = 0;
  for (std::size_t block = 0; block < row.maxima.size(); ++block) {
    result.finite &= !std::isnan(row.maxima[block]);
    if (row.maxima[block] > result.maximum) {
      result.maximum = row.maxima[block];
      best = block;
    }
  }
  const auto found = std::find(row.logits.begin() + static_cast<std::ptrdiff_t>(best * kBlock),
                               row.logits.end(), result.maximum);
  if (found != row.logits.end()) {
    result.argmax = static_cast<std::int32_t>(found - row.logits.begin());
  }
  return result;
}

// The maxima of a row that has been edited: a token that is masked has minus infinity. In a form that
// compilers turn into vectors: lanes of their own, no early exit.
void find_maxima(std::span<const float> row, std::vector<float>& block_maxima) {
  constexpr std::size_t kLanes = 16;
  block_maxima.clear();
  for (std::size_t begin = 0; begin < row.size(); begin += kBlock) {
    const std::span<const float> block = row.subspan(begin, std::min(kBlock, row.size() - begin));
    std::array<float, kLanes> maxima;
    maxima.fill(kMinusInfinity);
    std::size_t i = 0;
    for (; i + kLanes <= block.size(); i += kLanes) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        maxima[lane] = block[i + lane] > maxima[lane] ? block[i + lane] : maxima[lane];
      }
    }
    for (; i < block.size(); ++i) maxima[0] = block[i] > maxima[0] ? block[i] : maxima[0];
    block_maxima.push_back(*std::max_element(maxima.begin(), maxima.end()));
  }
}

bool masks_end_tokens(const Sequence& sequence) {
  return sequence.num_output_tokens() <
         static_cast<std::size_t>(sequence.request->params.min_tokens);
}

bool changes_logits(const Sequence& sequence) {
  const SamplingParams& params = sequence.request->params;
  return !params.logit_bias.empty() || masks_end_tokens(sequence) || params.has_penalties();
}

void apply_bias_and_mask(const Sequence& sequence, std::span<const std::int32_t> eos_token_ids,
                         std::span<float> logits) {
  for (const auto& [token, bias] : sequence.request->params.logit_bias) {
    logits[static_cast<std::size_t>(token)] += static_cast<float>(bias);
  }
  if (!masks_end_tokens(sequence)) return;
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

// Logits as a draw sees them: divided by the temperature, on the way.
struct Scaled {
  std::span<const float> logits;
  float inverse_temperature;
  const RowMaximum& row;

  float operator[](std::size_t i) const { return logits[i] * inverse_temperature; }
  float maximum() const { return row.maximum * inverse_temperature; }
  float block_maximum(std::size_t block) const {
    return row.block_maxima[block] * inverse_temperature;
  }
  bool before(std::int32_t a, std::int32_t b) const {  // by falling logit, then by rising id
    const float x = (*this)[static_cast<std::size_t>(a)], y = (*this)[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  }
};

float lowest_logit(const SamplingParams& params, const Scaled& scaled) {
  return params.min_p > 0 ? scaled.maximum() + log_min_p(params)
                          : std::numeric_limits<float>::lowest();
}

// The ids that min_p, top_k and top_p leave. Each filter sees the distribution that the one before
// it left, scaled to sum to one.
std::vector<std::int32_t> kept_tokens(const SamplingParams& params, const Scaled& scaled) {
  float lowest = lowest_logit(params, scaled);
  const auto top_k = static_cast<std::size_t>(std::max(params.top_k, 0));
  const std::size_t num_blocks = scaled.row.block_maxima.size();
  if (top_k > 0 && top_k <= num_blocks) {  // k blocks have a token each that is as good as the kth
    std::vector<float> maxima(scaled.row.block_maxima.begin(), scaled.row.block_maxima.end());
    const auto kth = maxima.begin() + static_cast<std::ptrdiff_t>(top_k) - 1;
    std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<>());
    lowest = std::max(lowest, *kth * scaled.inverse_temperature);
  }
  std::vector<std::int32_t> kept;
  for (std::size_t block = 0; block < num_blocks; ++block) {
    if (scaled.block_maximum(block) < lowest) continue;
    const std::size_t end = std::min((block + 1) * kBlock, scaled.logits.size());
    for (std::size_t i = block * kBlock; i < end; ++i) {
      if (scaled[i] >= lowest) kept.push_back(static_cast<std::int32_t>(i));
    }
  }
  const auto before = [&](std::int32_t a, std::int32_t b) { return scaled.before(a, b); };
  if (top_k > 0 && top_k < kept.size()) {
    std::nth_element(kept.begin(), kept.begin() + params.top_k - 1, kept.end(), before);
    kept.resize(top_k);
  }
  if (params.top_p < 1.0) {
    const auto weight = [&](std::int32_t id) {
      return std::exp(static_cast<double>(scaled[static_cast<std::size_t>(id)]) - scaled.maximum());
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

// The largest logit + noise so far.
class Contest {
 public:
  double best() const { return best_; }
  std::int32_t winner() const { return winner_; }

  void enter(std::int32_t token, double logit, std::uint32_t bits) {
    if (logit + gumbel_upper_bound(bits) < best_) return;  // nearly all: only a few can still win
    const double value = logit + gumbel(bits);
    if (value > best_ || (value == best_ && token < winner_)) {
      best_ = value;
      winner_ = token;
    }
  }

 private:
  double best_ = -std::numeric_limits<double>::infinity();
  std::int32_t winner_ = std::numeric_limits<std::int32_t>::max();
};

// What the noise of a request's next token is keyed and counted by, besides the token id.
struct Noise {
  std::uint64_t seed;
  std::uint32_t sample_index, position;

  std::uint32_t operator()(std::int32_t token) const {
    const auto id = static_cast<std::uint32_t>(token);
    return token_noise(seed, sample_index, position, id / 4)[id % 4];
  }
  // Of the tokens first, first + 1, ...: many at a time, in a form that compilers turn into vectors.
  template <std::size_t kCount>
  std::array<std::uint32_t, kCount> of_many(std::size_t first) const {
    constexpr std::size_t kCalls = kCount / 4;
    std::array<std::uint32_t, kCalls> a, b, c, d;
    for (std::size_t i = 0; i < kCalls; ++i) {
      a[i] = static_cast<std::uint32_t>(first / 4 + i);
      b[i] = position;
      c[i] = sample_index;
      d[i] = 0;
    }
    auto low_key = static_cast<std::uint32_t>(seed),
         high_key = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (std::size_t i = 0; i < kCalls; ++i)
        philox_round(a[i], b[i], c[i], d[i], low_key, high_key);
      low_key += kPhiloxWeyl0;
      high_key += kPhiloxWeyl1;
    }
    std::array<std::uint32_t, kCount> bits;
    for (std::size_t i = 0; i < kCalls; ++i) {
      bits[4 * i] = a[i];
      bits[4 * i + 1] = b[i];
      bits[4 * i + 2] = c[i];
      bits[4 * i + 3] = d[i];
    }
    return bits;
  }
};

std::int32_t draw(const Noise& noise, const std::vector<std::int32_t>& kept, const Scaled& scaled) {
  Contest contest;
  for (const std::int32_t token : kept) {
    contest.enter(token, scaled[static_cast<std::size_t>(token)], noise(token));
  }
  return contest.winner();
}

// Whether a token of a block can still win: the same bound as gumbel_upper_bound, from the exponent of
// 1 - u as a float, and a little more for what is rounded here.
template <std::size_t kCount>
bool any_can_win(const float* logits, float inverse_temperature,
                 const std::array<std::uint32_t, kCount>& bits, double best) {
  const auto enough = static_cast<float>(best - 1e-4 - 1e-6 * std::abs(best));
  std::uint32_t any = 0;
  for (std::size_t i = 0; i < kCount; ++i) {
    const auto rest = static_cast<float>(static_cast<std::int32_t>(~bits[i] >> 1));  // 2^31 (1 - u)
    const auto exponent = static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(rest) >> 23);
    const float bound = static_cast<float>(158 - exponent) * std::numbers::ln2_v<float>;
    any |= logits[i] * inverse_temperature + bound >= enough ? 1u : 0u;
  }
  return any != 0;
}

// The draw among all tokens that lie before `end` in the order of Scaled::before and are no lower
// than `lowest`.
std::int32_t draw_among(const Noise& noise, const Scaled& scaled, float lowest, std::int32_t end) {
  const bool all = end < 0;
  const float edge = all ? kMinusInfinity : scaled[static_cast<std::size_t>(end)];
  lowest = std::max(lowest, edge);
  Contest contest;
  const auto enter = [&](std::int32_t token, std::uint32_t bits) {
    const float logit = scaled[static_cast<std::size_t>(token)];
    if (logit >= lowest && (all || scaled.before(token, end))) contest.enter(token, logit, bits);
  };
  enter(scaled.row.argmax, noise(scaled.row.argmax));  // hard to beat
  constexpr std::size_t kCount = 64;
  const std::size_t size = scaled.logits.size();
  for (std::size_t first = 0; first < size; first += kCount) {
    if (scaled.block_maximum(first / kBlock) < lowest) continue;
    const std::array<std::uint32_t, kCount> bits = noise.of_many<kCount>(first);
    const std::size_t count = std::min(kCount, size - first);
    if (count == kCount && !any_can_win(scaled.logits.data() + first, scaled.inverse_temperature,
                                        bits, contest.best())) {
      continue;
    }
    for (std::size_t i = 0; i < count; ++i) enter(static_cast<std::int32_t>(first + i), bits[i]);
  }
  return contest.winner();
}

enum class Membership { kInside, kOutside, kUnclear };

// Whether top_p keeps a token, by the mass of the tokens before it. Sums are in float32 here; what
// is too close to call is left to kept_tokens.
Membership nucleus_has(double top_p, const Scaled& scaled, float lowest, std::int32_t token) {
  const float maximum = scaled.maximum(), edge = scaled[static_cast<std::size_t>(token)];
  double total = 0, before = 0;
  for (std::size_t begin = 0; begin < scaled.logits.size(); begin += kBlock) {
    if (scaled.block_maximum(begin / kBlock) < lowest) continue;
    const std::size_t end = std::min(begin + kBlock, scaled.logits.size());
    float block_total = 0, block_before = 0;
    for (std::size_t i = begin; i < end; ++i) {
      const float logit = scaled[i];
      if (logit < lowest) continue;
      const float weight = std::exp(logit - maximum);
      block_total += weight;
      const bool is_before =
          logit > edge || (logit == edge && static_cast<std::int32_t>(i) < token);
      block_before += is_before ? weight : 0.0f;
    }
    total += block_total;
    before += block_before;
  }
  const double distance = before / total - top_p;
  if (std::abs(distance) < 1e-4) return Membership::kUnclear;
  return distance < 0 ? Membership::kInside : Membership::kOutside;
}

// The draw among the tokens that the filters leave. What wins among all and is kept has won. top_p
// keeps the first tokens of an order: a winner that it drops takes all after it along, and the next
// draw is among those before it.
std::int32_t filtered_draw(const SamplingParams& params, const Noise& noise, const Scaled& scaled) {
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < scaled.logits.size()) {
    return draw(noise, kept_tokens(params, scaled), scaled);
  }
  const float lowest = lowest_logit(params, scaled);
  std::int32_t winner = draw_among(noise, scaled, lowest, -1);
  if (params.top_p == 1.0) return winner;
  for (;;) {
    if (winner == scaled.row.argmax) return winner;  // the first token is always kept
    switch (nucleus_has(params.top_p, scaled, lowest, winner)) {
      case Membership::kInside:
        return winner;
      case Membership::kUnclear:
        return draw(noise, kept_tokens(params, scaled), scaled);
      case Membership::kOutside:
        winner = draw_among(noise, scaled, lowest, winner);
    }
  }
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
    : request(sequence.id),
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

bool Sampler::takes_largest(const Sequence& sequence) {
  const SamplingParams& params = sequence.request->params;
  return params.greedy() && !params.logprobs && !changes_logits(sequence);
}

Sample Sampler::largest(const Sequence& sequence, const Largest& logit) {
  if (std::isnan(logit.value)) throw Error(DrawOrigin(sequence).not_finite());
  return {.token = logit.output, .logprobs = nullptr};
}

Sample Sampler::sample(const Sequence& sequence, std::int32_t sample_index, const LogitRow& raw,
                       Workspace& workspace) const {
  const SamplingParams& params = sequence.request->params;
  RowMaximum row = maximum_of(raw);
  if (!row.finite) {
    throw Error(DrawOrigin(sequence).not_finite());
  }
  // Other samples of the request may draw from the same row, and logprobs are those of the raw
  // logits: what changes them works on a copy.
  std::span<const float> logits = raw.logits;
  if (changes_logits(sequence)) {
    workspace.edited.assign(logits.begin(), logits.end());
    apply_bias_and_mask(sequence, eos_token_ids_, workspace.edited);
    if (params.has_penalties()) apply_penalties(sequence, workspace.edited);
    logits = workspace.edited;
    find_maxima(logits, workspace.maxima);
    row = maximum_of({logits, workspace.maxima});
  }

  Sample sample;
  sample.token = row.argmax;
  if (row.maximum == kMinusInfinity) {
    throw Error(DrawOrigin(sequence).no_token());
  }
  if (!params.greedy()) {
    const Noise noise{sequence.request->seed, static_cast<std::uint32_t>(sample_index),
                      static_cast<std::uint32_t>(sequence.tokens.size())};
    sample.token = filtered_draw(params, noise, {logits, inverse_temperature(params), row});
  }
  if (params.logprobs) {
    sample.logprobs =
        std::make_unique<TokenLogprobs>(top_logprobs(raw.logits, sample.token, *params.logprobs));
  }
  return sample;
}

}  // namespace tinyvllm
