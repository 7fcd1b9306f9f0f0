#include "ops/rope.h"
#include "ops/rope_and_attend.h"

namespace tinyvllm {

void rope_and_attend(const CpuContext& ctx, MutTensorView qkv, std::int64_t num_heads,
                     const float* q_norm, const float* k_norm, float eps, TensorView cos_sin,
                     std::span<const std::int64_t> slots, const KvLayer& cache,
                     std::span<const BatchSequence> sequences, std::int64_t window, float scale,
                     MutTensorView out) {
  qk_norm_rope_and_cache(ctx, qkv, num_heads, q_norm, k_norm, eps, cos_sin, slots, cache);
  paged_attention(ctx, qkv, cache, sequences, num_heads, window, scale, out);
}

}  // namespace tinyvllm
