// Rotary position embedding (Su et al. 2021), half-split form: element i turns with element i +
// d/2.
#pragma once

#include <span>

#include "base/tensor.h"
#include "ops/cpu_context.h"
#include "ops/kv_cache.h"

namespace tinyvllm {

class CudaContext;

// cos_sin[t, i] = scale * cos(p inv_freq[i]),  cos_sin[t, d/2 + i] = scale * sin(p inv_freq[i])
// with p = positions[t].
//
//   positions    [num_tokens]
//   inverse_frequencies  [head_dim / 2]  float32
//   scale        1, except for YaRN (its attention factor)
//   cos_sin      [num_tokens, head_dim]  float32
//
// The angle is a float32 product, as in Transformers: at position 100,000 its rounding is visible,
// and models were trained with it.
void rope_angles(const CpuContext& ctx, std::span<const std::int32_t> positions,
                 std::span<const float> inverse_frequencies, float scale, MutTensorView cos_sin);
void rope_angles(const CudaContext& ctx, std::span<const std::int32_t> positions,
                 std::span<const float> inverse_frequencies, float scale, MutTensorView cos_sin);

// What is done to the queries and keys of a layer before attention, in one pass:
//
//   q, k <- rms_norm of each head with its weight, where the model has one (Qwen3)
//   q, k <- rotated by the token's angles
//   cache[slots[t]] <- k, v, rounded to the cache's dtype
//
//   qkv      [num_tokens, (num_heads + 2 num_kv_heads) * head_dim]  float32 (on CUDA what enters a
//            product); q is replaced in place, k and v are left as working space
//   q_norm, k_norm  [head_dim] float32, or null
//   cos_sin  [num_tokens, head_dim]  from rope_angles
//   slots    [num_tokens]  each token's own; no two are equal. On CUDA -1 stands for a padded row,
//            of which nothing is written
void qk_norm_rope_and_cache(const CpuContext& ctx, MutTensorView qkv, std::int64_t num_heads,
                            const float* q_norm, const float* k_norm, float eps, TensorView cos_sin,
                            std::span<const std::int64_t> slots, const KvLayer& cache);
void qk_norm_rope_and_cache(const CudaContext& ctx, MutTensorView qkv, std::int64_t num_heads,
                            const float* q_norm, const float* k_norm, float eps, TensorView cos_sin,
                            std::span<const std::int64_t> slots, const KvLayer& cache);

}  // namespace tinyvllm
