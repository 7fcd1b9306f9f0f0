#include "ops/rms_norm.h"

namespace tinyvllm {

void rms_norm(const CpuContext& ctx, TensorView x, const float* weight, float eps,
              MutTensorView out) {
  const Kernels& kernels = ctx.kernels();
  ctx.parallel_for(x.rows, [&](std::int64_t t, int) {
    if (out.dtype == DType::kFloat32) {
      kernels.rms_norm_f32(x.row<float>(t), weight, eps, out.cols, out.row<float>(t));
    } else {
      kernels.rms_norm_bf16(x.row<float>(t), weight, eps, out.cols, out.row<BFloat16>(t));
    }
  });
}

}  // namespace tinyvllm
