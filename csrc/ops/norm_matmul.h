// What a branch of a layer does at its beginning: normalise the residual stream (rms_norm.h), then
// multiply (matmul.h), and for the feed-forward branch activate (silu_mul.h). One op each, because a
// GPU does the three in one kernel when there are few tokens.
//
//   x           [num_tokens, hidden]   float32, the residual stream
//   norm        [hidden]               float32
//   weight      [outputs, hidden]      see matmul.h
//   normalized  [num_tokens, hidden]   working space, in the dtype that enters the product
//
// The results are bit for bit those of the separate ops on the CPU; on CUDA to within rounding.
#pragma once

#include "base/tensor.h"
#include "ops/cpu_context.h"
#include "ops/matmul.h"

namespace tinyvllm {

// out = rms_norm(x) W^T + b
//
//   out  [num_tokens, outputs]  what matmul writes; may alias neither x nor normalized
void norm_matmul(const CpuContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView out);
void norm_matmul(const CudaContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView out);

// The same for the output matrix, with what a sampler on the host wants to know of the logits.
//
//   maxima  [num_tokens, logit_blocks(outputs)]  see logit_maxima.h; CUDA leaves them as they are,
//                                                as its sampler looks at the logits themselves
void norm_logits(const CpuContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView out,
                 MutTensorView maxima);
void norm_logits(const CudaContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView out,
                 MutTensorView maxima);

// The largest logit of each row alone, as matmul_largest has it. On the CPU only: on CUDA the sampler
// looks for it.
void norm_largest(const CpuContext& ctx, TensorView x, const float* norm, float eps,
                  const Weight& weight, MutTensorView normalized, std::span<Largest> largest);

// out = silu(gate) * up  with  [gate, up] = rms_norm(x) W^T + b
//
//   weight   [2 intermediate, hidden]      gate above up; on the CPU a row block each
//   gate_up  [num_tokens, 2 intermediate]  working space, what matmul writes; the CPU takes none
//   out      [num_tokens, intermediate]    float32 or bfloat16, what the next matmul reads
void norm_swiglu(const CpuContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView gate_up,
                 MutTensorView out);
void norm_swiglu(const CudaContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView gate_up,
                 MutTensorView out);

}  // namespace tinyvllm
