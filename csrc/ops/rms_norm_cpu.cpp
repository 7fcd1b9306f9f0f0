#include <vector>

#include "ops/rms_norm.h"

namespace tinyvllm {
namespace {

void normalize_row(const Kernels& kernels, const float* x, const float* weight, float eps,
                   std::int64_t t, MutTensorView out) {
  if (out.dtype == DType::kFloat32) {
    kernels.rms_norm(x, weight, eps, out.cols, out.row<float>(t));
    return;
  }
  constexpr std::int64_t kOnStack = 8192;  // the hidden size of nearly every model
  float buffer[kOnStack];
  std::vector<float> large(out.cols > kOnStack ? static_cast<std::size_t>(out.cols) : 0);
  float* normalized = large.empty() ? buffer : large.data();
  kernels.rms_norm(x, weight, eps, out.cols, normalized);
  kernels.to_bfloat16(normalized, out.cols, out.row<BFloat16>(t));
}

}  // namespace

void rms_norm(const CpuContext& ctx, TensorView x, const float* weight, float eps,
              MutTensorView out) {
  ctx.parallel_for(x.rows, [&](std::int64_t t, int) {
    normalize_row(ctx.kernels(), x.row<float>(t), weight, eps, t, out);
  });
}

}  // namespace tinyvllm
