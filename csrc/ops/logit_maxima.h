// What a sampler on the host asks of a row of logits first: the largest of each block of them, so that
// it need not look at most blocks again. The product that makes them finds it on the way
// (matmul_logits); this is the same for logits that are there.
//
//   logits  [vocab]                float32
//   maxima  [logit_blocks(vocab)]  float32; NaN for a block with a logit that is not finite
#pragma once

#include <cstdint>
#include <span>

#include "ops/cpu_context.h"

namespace tinyvllm {

inline constexpr std::int64_t kLogitBlock = 256;

constexpr std::int64_t logit_blocks(std::int64_t vocab) {
  return (vocab + kLogitBlock - 1) / kLogitBlock;
}

void logit_maxima(const CpuContext& ctx, std::span<const float> logits, float* maxima);

}  // namespace tinyvllm
