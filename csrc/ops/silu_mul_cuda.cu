#include "cuda/launch.h"
#include "ops/cuda/elements.h"
#include "ops/silu_mul.h"

namespace tinyvllm {
namespace {

// A row for each block in x, cut into pieces for the blocks in y.
template <typename T, typename Out, int kWidth>
__global__ void silu_mul_kernel(const T* gate_up, std::int64_t stride, std::int64_t cols, Out* out,
                                std::int64_t out_stride) {
  cuda::let_next_begin();
  cuda::wait_for_previous();
  const std::int64_t first =
      (static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
  if (first >= cols) return;
  const T* gates = gate_up + blockIdx.x * stride + first;
  float gate[kWidth], up[kWidth];
  cuda::load(gates, gate);
  cuda::load(gates + cols, up);
  for (int i = 0; i < kWidth; ++i) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
  cuda::store(out + blockIdx.x * out_stride + first, gate);
}

}  // namespace

void silu_mul(const CudaContext& ctx, TensorView gate_up, MutTensorView out) {
  constexpr int kWidth = 8, kThreads = 128;
  // cols is a multiple of the width, too: so is where the right half begins.
  const bool wide = cuda::wide_rows(gate_up, kWidth) && cuda::wide_rows(out, kWidth);
  cuda::with_element(gate_up.dtype, [&](auto in) {
    cuda::with_element(out.dtype, [&](auto result) {
      cuda::with_width<kWidth>(wide, [&](auto width) {
        using T = decltype(in);
        using Out = decltype(result);
        const std::int64_t piece = kThreads * width();
        cuda::launch(ctx, "silu_mul",
                     {.grid = dim3(static_cast<unsigned>(out.rows),
                                   static_cast<unsigned>((out.cols + piece - 1) / piece)),
                      .block = kThreads,
                      .overlaps_previous = true},
                     silu_mul_kernel<T, Out, width()>, gate_up.row<T>(0), gate_up.row_stride,
                     out.cols, out.row<Out>(0), out.row_stride);
      });
    });
  });
}

}  // namespace tinyvllm
