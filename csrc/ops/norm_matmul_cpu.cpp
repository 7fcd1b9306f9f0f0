#include "ops/norm_matmul.h"
#include "ops/rms_norm.h"

namespace tinyvllm {

void norm_matmul(const CpuContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView out) {
  rms_norm(ctx, x, norm, eps, normalized);
  matmul(ctx, normalized, weight, out);
}

void norm_logits(const CpuContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView out,
                 MutTensorView maxima) {
  rms_norm(ctx, x, norm, eps, normalized);
  matmul_logits(ctx, normalized, weight, out, maxima);
}

void norm_largest(const CpuContext& ctx, TensorView x, const float* norm, float eps,
                  const Weight& weight, MutTensorView normalized, std::span<Largest> largest) {
  rms_norm(ctx, x, norm, eps, normalized);
  matmul_largest(ctx, normalized, weight, largest);
}

void norm_swiglu(const CpuContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView /*gate_up*/,
                 MutTensorView out) {
  rms_norm(ctx, x, norm, eps, normalized);
  matmul_swiglu(ctx, normalized, weight, out);
}

}  // namespace tinyvllm
