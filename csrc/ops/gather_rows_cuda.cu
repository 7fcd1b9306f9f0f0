#include "cuda/launch.h"
#include "ops/cuda/elements.h"
#include "ops/gather_rows.h"

namespace tinyvllm {
namespace {

// A row for each block in x, cut into pieces for the blocks in y.
template <typename T, typename Out, int kWidth>
__global__ void gather_rows_kernel(const std::int32_t* rows, const T* table,
                                   std::int64_t table_stride, std::int64_t cols, Out* out,
                                   std::int64_t out_stride) {
  cuda::let_next_begin();
  cuda::wait_for_previous();
  const std::int64_t first =
      (static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
  if (first >= cols) return;
  const std::int64_t source = rows[blockIdx.x];
  float values[kWidth];
  cuda::load(table + source * table_stride + first, values);
  cuda::store(out + blockIdx.x * out_stride + first, values);
}

}  // namespace

void gather_rows(const CudaContext& ctx, std::span<const std::int32_t> rows, TensorView table,
                 MutTensorView out) {
  constexpr int kWidth = 4, kThreads = 128;
  cuda::with_element(table.dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = cuda::wide_rows(table, kWidth) && cuda::wide_rows(out, kWidth);
    cuda::with_width<kWidth>(wide, [&](auto width) {
      const std::int64_t piece = kThreads * width();
      const auto launch = [&](auto result) {
        using Out = decltype(result);
        cuda::launch(ctx, "gather_rows",
                     {.grid = dim3(static_cast<unsigned>(rows.size()),
                                   static_cast<unsigned>((out.cols + piece - 1) / piece)),
                      .block = kThreads,
                      .overlaps_previous = true},
                     gather_rows_kernel<T, Out, width()>, rows.data(), table.row<T>(0),
                     table.row_stride, out.cols, out.row<Out>(0), out.row_stride);
      };
      if (out.dtype == table.dtype) {
        launch(T{});
      } else {
        launch(float{});
      }
    });
  });
}

}  // namespace tinyvllm
