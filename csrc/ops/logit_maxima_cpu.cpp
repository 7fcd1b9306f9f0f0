#include <algorithm>

#include "ops/cpu/kernels.h"
#include "ops/logit_maxima.h"

namespace tinyvllm {

void logit_maxima(const CpuContext& ctx, std::span<const float> logits, float* maxima) {
  const std::int64_t size = std::ssize(logits);
  for (std::int64_t first = 0; first < size; first += kLogitBlock) {
    *maxima++ =
        ctx.kernels().finite_maximum(logits.data() + first, std::min(kLogitBlock, size - first));
  }
}

}  // namespace tinyvllm
