// From a row of logits to a token.
//
// The order is fixed: logit_bias and the min_tokens mask; repetition, then frequency and presence
// penalty; temperature; min_p; top_k; top_p. Ties go to the lowest id, everywhere.
//
// A draw is the argmax over the kept tokens of  logit / temperature + Gumbel noise  (the Gumbel-max
// trick: it follows the softmax exactly). The noise of a token comes from Philox, keyed by the
// request's seed and counted by (token id, position, sample index), so that neither the order of
// the tokens nor the batch can change it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/request.h"
#include "ops/matmul.h"

namespace tinyvllm {

struct Sample {
  std::int32_t token = 0;
  std::unique_ptr<TokenLogprobs> logprobs;  // where SamplingParams::logprobs asks for them
};

// A row of logits, and the largest of each block of them (ops/logit_maxima.h).
struct LogitRow {
  std::span<const float> logits;  // [vocab]
  std::span<const float> maxima;  // [logit_blocks(vocab)]
};

class Sampler {
 public:
  // eos_token_ids: what min_tokens keeps from being chosen, besides the request's stop_token_ids.
  explicit Sampler(std::vector<std::int32_t> eos_token_ids)
      : eos_token_ids_(std::move(eos_token_ids)) {}

  // What one call at a time works in; kept from row to row so that most rows allocate nothing.
  struct Workspace {
    std::vector<float> edited;  // the row with what a request's options change
    std::vector<float> maxima;  // of its blocks
  };

  // Whether the next token of the sequence is that of its largest logit, and no more is asked of them.
  static bool takes_largest(const Sequence& sequence);

  // That token. Throws Error where a logit of the row is not finite.
  static Sample largest(const Sequence& sequence, const Largest& logit);

  // The next token of one of the request's samples, which `sequence` is or stands for, from
  // its row of logits. Throws Error where a logit is not finite, and where the masks leave no token.
  Sample sample(const Sequence& sequence, std::int32_t sample_index, const LogitRow& raw,
                Workspace& workspace) const;

 private:
  std::vector<std::int32_t> eos_token_ids_;
};

// The nearest float that is neither 0 nor infinite: their products with -inf and 0 are no numbers.
float positive_float(double value);

// 1 / temperature as both devices use it, and log(min_p): p >= min_p * p_max is a bound on the
// distance of two logits, without any softmax. -infinity where min_p is off.
float inverse_temperature(const SamplingParams& params);
float log_min_p(const SamplingParams& params);

// Why a row of logits gave no token: what to say to the user.
struct DrawOrigin {
  RequestId request;
  std::int64_t position;  // of the token whose logits they are
  std::int64_t min_tokens;
  std::size_t num_stop_token_ids;

  explicit DrawOrigin(const Sequence& sequence);
  std::string not_finite() const;
  std::string no_token() const;
};

// The log-softmax values that `logprobs` = k asks for.
TokenLogprobs top_logprobs(std::span<const float> logits, std::int32_t chosen, std::int32_t k);

// The Gumbel noise of one token at one position.
double gumbel_noise(std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position,
                    std::uint32_t token);

}  // namespace tinyvllm
