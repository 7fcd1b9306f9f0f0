#include <algorithm>
#include <string>

#include "base/errors.h"
#include "ops/matmul.h"

namespace tinyvllm {
namespace {

// The work is cut into blocks of rows of x that stay in a core's L2 cache, and, inside, into strips
// of outputs for the threads to take. Neither cut changes the order in which an output is summed.
constexpr std::int64_t kCacheBytes = 512 * 1024;
constexpr std::int64_t kStripOutputs = 96;  // a multiple of every register tile

template <typename X, typename W>
void matmul_blocks(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out,
                   bool accumulate, void (*kernel)(const MatmulShare<X, W>&)) {
  const std::int64_t depth_bytes = weight.depth * static_cast<std::int64_t>(sizeof(X));
  const std::int64_t block_rows = std::max<std::int64_t>(16, kCacheBytes / depth_bytes);
  const auto strips_of = [](const RowBlock& block) {
    return (block.rows + kStripOutputs - 1) / kStripOutputs;
  };
  const std::int64_t strips =
      strips_of(weight.blocks[0]) + strips_of(weight.blocks[1]) + strips_of(weight.blocks[2]);

  for (std::int64_t m = 0; m < x.rows; m += block_rows) {
    const std::int64_t rows = std::min(block_rows, x.rows - m);
    ctx.parallel_for(strips, [&](std::int64_t strip, int) {
      std::int64_t first_output = 0;
      const RowBlock* block = weight.blocks.data();
      for (; strip >= strips_of(*block); ++block) {
        strip -= strips_of(*block);
        first_output += block->rows;
      }
      const std::int64_t n = strip * kStripOutputs;
      kernel({.x = x.row<X>(m),
              .x_stride = x.row_stride,
              .weight = static_cast<const W*>(block->data) + n * weight.depth,
              .bias = block->bias == nullptr ? nullptr : block->bias + n,
              .out = out.row<float>(m) + first_output + n,
              .out_stride = out.row_stride,
              .accumulate = accumulate,
              .num_rows = rows,
              .num_outputs = std::min(kStripOutputs, block->rows - n),
              .depth = weight.depth});
    });
  }
}

void multiply(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out,
              bool accumulate) {
  if (x.cols != weight.depth || out.cols != weight.outputs() || out.rows != x.rows ||
      out.dtype != DType::kFloat32) {
    throw Error("matmul: x [" + std::to_string(x.rows) + ", " + std::to_string(x.cols) +
                "], weight [" + std::to_string(weight.outputs()) + ", " +
                std::to_string(weight.depth) + "], out [" + std::to_string(out.rows) + ", " +
                std::to_string(out.cols) + "] " + std::string(name_of(out.dtype)) +
                " do not fit; out is float32 [rows of x, outputs of weight].");
  }
  const Kernels& kernels = ctx.kernels();
  if (x.dtype == DType::kBFloat16 && weight.dtype == DType::kBFloat16) {
    matmul_blocks<BFloat16, BFloat16>(ctx, x, weight, out, accumulate, kernels.matmul_bf16_bf16);
  } else if (x.dtype == DType::kFloat32 && weight.dtype == DType::kBFloat16) {
    matmul_blocks<float, BFloat16>(ctx, x, weight, out, accumulate, kernels.matmul_f32_bf16);
  } else if (x.dtype == DType::kFloat32 && weight.dtype == DType::kFloat32) {
    matmul_blocks<float, float>(ctx, x, weight, out, accumulate, kernels.matmul_f32_f32);
  } else {
    throw Error("matmul: " + std::string(name_of(x.dtype)) + " x " +
                std::string(name_of(weight.dtype)) +
                " is not a supported pair of dtypes; convert one of them.");
  }
}

}  // namespace

void matmul(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out) {
  multiply(ctx, x, weight, out, false);
}

void matmul_add(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView residual) {
  multiply(ctx, x, weight, residual, true);
}

}  // namespace tinyvllm
