#include <cstring>

#include "ops/gather_rows.h"

namespace tinyvllm {

void gather_rows(const CpuContext& ctx, std::span<const std::int32_t> rows, TensorView table,
                 MutTensorView out) {
  ctx.parallel_for(static_cast<std::int64_t>(rows.size()), [&](std::int64_t i, int) {
    const std::int64_t source = rows[static_cast<std::size_t>(i)];
    float* target = out.row<float>(i);
    if (table.dtype == DType::kBFloat16) {
      ctx.kernels().to_float(table.row<BFloat16>(source), table.cols, target);
    } else {
      std::memcpy(target, table.row<float>(source),
                  static_cast<std::size_t>(table.cols) * sizeof(float));
    }
  });
}

}  // namespace tinyvllm
