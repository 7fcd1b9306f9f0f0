#include <algorithm>

#include "cuda/launch.h"
#include "ops/cuda/elements.h"
#include "ops/rms_norm.h"

namespace tinyvllm {
namespace {

// A block a row. The row is read twice, the second time from the L1 cache: once for the sum of its
// squares, once to be scaled.
template <typename Out, int kWidth>
__global__ void rms_norm_kernel(const float* x, std::int64_t x_stride, const float* weight,
                                float eps, std::int64_t cols, Out* out, std::int64_t out_stride) {
  const float* row = x + blockIdx.x * x_stride;
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kWidth;
  const std::int64_t step = static_cast<std::int64_t>(blockDim.x) * kWidth;
  cuda::let_next_begin();
  cuda::wait_for_previous();

  float squares = 0;
  for (std::int64_t i = first; i < cols; i += step) {
    float values[kWidth];
    cuda::load(row + i, values);
    for (const float value : values) squares += value * value;
  }
  squares = cuda::block_sum(squares, reinterpret_cast<float*>(cuda::shared_memory()));
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(cols) + eps);

  for (std::int64_t i = first; i < cols; i += step) {
    float values[kWidth], weights[kWidth];
    cuda::load(row + i, values);
    cuda::load(weight + i, weights);
    for (int j = 0; j < kWidth; ++j) values[j] = values[j] * scale * weights[j];
    cuda::store(out + blockIdx.x * out_stride + i, values);
  }
}

}  // namespace

void rms_norm(const CudaContext& ctx, TensorView x, const float* weight, float eps,
              MutTensorView out) {
  constexpr int kWidth = 4;
  const bool wide = cuda::wide_rows(x, kWidth) && cuda::wide_rows(out, kWidth) &&
                    cuda::wide_elements(weight, DType::kFloat32, 0, kWidth);
  cuda::with_element(out.dtype, [&](auto element) {
    using Out = decltype(element);
    cuda::with_width<kWidth>(wide, [&](auto width) {
      // As many threads as the row has pieces, in whole warps: of the row alone, so that the order
      // of the sum is, too.
      const std::int64_t pieces = (x.cols + width() - 1) / width();
      const std::int64_t warps = std::clamp<std::int64_t>((pieces + 31) / 32, 1, 16);
      cuda::launch(ctx, "rms_norm",
                   {.grid = static_cast<unsigned>(x.rows),
                    .block = static_cast<unsigned>(32 * warps),
                    .shared_bytes = static_cast<std::size_t>(warps) * sizeof(float),
                    .overlaps_previous = true},
                   rms_norm_kernel<Out, width()>, x.row<float>(0), x.row_stride, weight, eps,
                   x.cols, out.row<Out>(0), out.row_stride);
    });
  });
}

}  // namespace tinyvllm
