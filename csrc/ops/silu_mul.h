// The gated activation of SwiGLU (Shazeer 2020):  out[t, i] = silu(gate[t, i]) * up[t, i]
//
//   gate_up  [num_tokens, 2 * intermediate]  float32 (on CUDA what enters a product), gate in the
//                                            left half, up in the right
//   out      [num_tokens, intermediate]      float32 or bfloat16, what the next matmul reads
//
// silu(x) = x / (1 + e^-x)
#pragma once

#include "base/tensor.h"
#include "ops/cpu_context.h"

namespace tinyvllm {

class CudaContext;

void silu_mul(const CpuContext& ctx, TensorView gate_up, MutTensorView out);
void silu_mul(const CudaContext& ctx, TensorView gate_up, MutTensorView out);

}  // namespace tinyvllm
