#include <cstring>

#include "ops/gather_rows.h"

namespace tinyvllm {

void gather_rows(const CpuContext& ctx, std::span<const std::int32_t> rows, TensorView table,
                 MutTensorView out) {
  ctx.parallel_for(static_cast<std::int64_t>(rows.size()), [&](std::int64_t i, int) {
    const std::int64_t source = rows[static_cast<std::size_t>(i)];
    if (table.dtype == DType::kFloat32) {
      std::memcpy(out.row<float>(i), table.row<float>(source),
                  static_cast<std::size_t>(table.cols) * sizeof(float));
    } else if (out.dtype == DType::kBFloat16) {
      std::memcpy(out.row<BFloat16>(i), table.row<BFloat16>(source),
                  static_cast<std::size_t>(table.cols) * sizeof(BFloat16));
    } else {
      ctx.kernels().to_float(table.row<BFloat16>(source), table.cols, out.row<float>(i));
    }
  });
}

}  // namespace tinyvllm
