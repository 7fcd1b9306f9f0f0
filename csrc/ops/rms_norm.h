// RMSNorm (Zhang & Sennrich 2019):  out[t, i] = x[t, i] / sqrt(mean_i(x[t, i]^2) + eps) * weight[i]
//
//   x       [num_tokens, hidden]  float32, the residual stream
//   weight  [hidden]              float32
//   out     [num_tokens, hidden]  float32 or bfloat16, what the next matmul reads; may not alias x
//
// The sum over i runs in one fixed order whatever num_tokens is (docs/promises.md, 2).
#pragma once

#include "base/tensor.h"
#include "ops/cpu_context.h"

namespace tinyvllm {

class CudaContext;

void rms_norm(const CpuContext& ctx, TensorView x, const float* weight, float eps,
              MutTensorView out);
void rms_norm(const CudaContext& ctx, TensorView x, const float* weight, float eps,
              MutTensorView out);

}  // namespace tinyvllm
