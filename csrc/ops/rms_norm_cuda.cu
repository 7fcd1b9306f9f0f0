#include <algorithm>

#include "cuda/launch.h"
#include "ops/cuda/elements.h"
#include "ops/rms_norm.h"

namespace tinyvllm {
namespace {

constexpr int kKept = 2;  // pieces of its row that a thread keeps in registers

// A block a row. What a thread does not keep it reads twice, the second time from the L1 cache: once
// for the sum of the squares, once to be scaled.
template <typename Out, int kWidth>
__global__ void rms_norm_kernel(const float* x, std::int64_t x_stride, const float* weight,
                                float eps, int cols, Out* out, std::int64_t out_stride) {
  const float* row = x + blockIdx.x * x_stride;
  Out* out_row = out + blockIdx.x * out_stride;
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  const int step = static_cast<int>(blockDim.x) * kWidth;
  cuda::let_next_begin();
  cuda::wait_for_previous();

  float kept[kKept][kWidth], squares = 0;
#pragma unroll
  for (int p = 0; p < kKept; ++p) {
    if (first + p * step >= cols) continue;
    cuda::load(row + first + p * step, kept[p]);
    for (const float value : kept[p]) squares += value * value;
  }
  for (int i = first + kKept * step; i < cols; i += step) {
    float values[kWidth];
    cuda::load(row + i, values);
    for (const float value : values) squares += value * value;
  }
  squares = cuda::block_sum(squares, reinterpret_cast<float*>(cuda::shared_memory()));
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(cols) + eps);

#pragma unroll
  for (int p = 0; p < kKept; ++p) {
    if (first + p * step >= cols) continue;
    float weights[kWidth];
    cuda::load(weight + first + p * step, weights);
    for (int j = 0; j < kWidth; ++j) kept[p][j] = kept[p][j] * scale * weights[j];
    cuda::store(out_row + first + p * step, kept[p]);
  }
  for (int i = first + kKept * step; i < cols; i += step) {
    float values[kWidth], weights[kWidth];
    cuda::load(row + i, values);
    cuda::load(weight + i, weights);
    for (int j = 0; j < kWidth; ++j) values[j] = values[j] * scale * weights[j];
    cuda::store(out_row + i, values);
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
      // As many threads as keep the row, in whole warps: of the row alone, so that the order of the
      // sum is, too.
      const std::int64_t pieces = (x.cols + width() - 1) / width();
      const std::int64_t warps =
          std::clamp<std::int64_t>((pieces + 32 * kKept - 1) / (32 * kKept), 1, 16);
      cuda::launch(ctx, "rms_norm",
                   {.grid = static_cast<unsigned>(x.rows),
                    .block = static_cast<unsigned>(32 * warps),
                    .shared_bytes = static_cast<std::size_t>(warps) * sizeof(float),
                    .overlaps_previous = true},
                   rms_norm_kernel<Out, width()>, x.row<float>(0), x.row_stride, weight, eps,
                   static_cast<int>(x.cols), out.row<Out>(0), out.row_stride);
    });
  });
}

}  // namespace tinyvllm
