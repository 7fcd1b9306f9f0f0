#include <algorithm>

#include "ops/silu_mul.h"

namespace tinyvllm {

void silu_mul(const CpuContext& ctx, TensorView gate_up, MutTensorView out) {
  constexpr std::int64_t kPiece = 1024;  // so that one token, too, is shared among the threads
  const std::int64_t pieces = (out.cols + kPiece - 1) / kPiece;
  ctx.parallel_for(out.rows * pieces, [&](std::int64_t index, int) {
    const std::int64_t t = index / pieces, first = index % pieces * kPiece;
    const std::int64_t size = std::min(kPiece, out.cols - first);
    const float* gate = gate_up.row<float>(t) + first;
    const float* up = gate + out.cols;
    if (out.dtype == DType::kFloat32) {
      ctx.kernels().silu_mul_f32(gate, up, size, out.row<float>(t) + first);
    } else {
      ctx.kernels().silu_mul_bf16(gate, up, size, out.row<BFloat16>(t) + first);
    }
  });
}

}  // namespace tinyvllm
