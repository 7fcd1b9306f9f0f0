// The attention of a layer, from the product to what the output projection reads:
// qk_norm_rope_and_cache (ops/rope.h), then paged_attention. The arguments are theirs.
//
// On CUDA a decode does both in one kernel where head_dim is 64 or 128 and the dtype bfloat16: at
// few sequences a launch costs as much as its work. What it leaves of q, k and v in qkv is then
// what was there before.
#pragma once

#include <span>

#include "ops/paged_attention.h"

namespace tinyvllm {

void rope_and_attend(const CpuContext& ctx, MutTensorView qkv, std::int64_t num_heads,
                     const float* q_norm, const float* k_norm, float eps, TensorView cos_sin,
                     std::span<const std::int64_t> slots, const KvLayer& cache,
                     std::span<const BatchSequence> sequences, std::int64_t window, float scale,
                     MutTensorView out);
void rope_and_attend(const CudaContext& ctx, MutTensorView qkv, std::int64_t num_heads,
                     const float* q_norm, const float* k_norm, float eps, TensorView cos_sin,
                     std::span<const std::int64_t> slots, const KvLayer& cache,
                     const CudaSequences& sequences, std::int64_t window, float scale,
                     MutTensorView out);

}  // namespace tinyvllm
