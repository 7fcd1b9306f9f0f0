#include <algorithm>
#include <string>
#include <type_traits>

#include "base/errors.h"
#include "ops/logit_maxima.h"
#include "ops/matmul.h"

namespace tinyvllm {
namespace {

// A share of the work is a strip of outputs, for all rows of x: large enough that its rows of
// weights are long runs of memory, small enough that the threads end at about the same time.
constexpr std::int64_t kStripBytes = 1024 * 1024;
constexpr std::int64_t kStripsPerThread = 4;
constexpr std::int64_t kTileOutputs = 4;  // of a register tile of rows

// How `rows` outputs of a row block are cut into strips: `count` of them, the last one shorter.
struct Strips {
  std::int64_t count, outputs;
};

Strips cut_into_strips(std::int64_t rows, std::int64_t most_outputs, std::int64_t multiple) {
  if (rows == 0) return {0, 0};
  const std::int64_t count = (rows + most_outputs - 1) / most_outputs;
  const std::int64_t even = (rows + count - 1) / count;
  const std::int64_t outputs = (even + multiple - 1) / multiple * multiple;
  return {(rows + outputs - 1) / outputs, outputs};
}

// A set of kernels for one pair of dtypes and one layout of weights.
template <typename X, typename W>
struct Product {
  void (*multiply)(const MatmulShare<X, W>&);
  void (*pack)(const PackShare&) = nullptr;
};

// What the shares of a product read and work in: x as they want it, and memory of each thread's own.
template <typename X>
struct Operand {
  const X* x;
  float* scratch;

  float* of(int worker) const {
    return scratch == nullptr ? nullptr : scratch + worker * kMatmulScratch;
  }
};

Operand<BFloat16> pack(const CpuContext& ctx, TensorView x, void (*pack_piece)(const PackShare&)) {
  const auto scratch = static_cast<std::size_t>(ctx.num_threads() * kMatmulScratch) * sizeof(float);
  const std::int64_t elements = packed_elements(x.rows, x.cols);
  std::byte* memory = ctx.scratch(scratch + static_cast<std::size_t>(elements) * sizeof(BFloat16));
  auto* packed = reinterpret_cast<BFloat16*>(memory + scratch);
  ctx.parallel_for(packed_pieces(x.rows, x.cols), [&](std::int64_t piece, int) {
    pack_piece({x.row<BFloat16>(0), x.row_stride, x.rows, x.cols, piece, packed});
  });
  return {packed, reinterpret_cast<float*>(memory)};
}

// What becomes of the sums of products.
struct Target {
  MutTensorView out;
  bool accumulate = false;
  const MutTensorView* maxima = nullptr;  // of logits
};

template <typename X, typename W>
void multiply_strips(const CpuContext& ctx, TensorView x, const Weight& weight, Target target,
                     Product<X, W> product) {
  const bool panels = weight.layout == WeightLayout::kPanels;
  const std::int64_t multiple = target.maxima            ? kLogitBlock
                                : panels || product.pack ? kPanelOutputs
                                                         : kTileOutputs;
  const std::int64_t depth = panels ? panel_depth(weight.dtype, weight.depth) : weight.depth;
  const std::int64_t by_bytes = kStripBytes / (depth * static_cast<std::int64_t>(sizeof(W)) + 1);
  const std::int64_t by_threads = weight.outputs() / (kStripsPerThread * ctx.num_threads());
  std::int64_t most_outputs = std::min(by_bytes, by_threads);
  Operand<X> operand = {x.row<X>(0), nullptr};
  if constexpr (std::is_same_v<X, BFloat16>) {
    if (product.pack) {
      operand = pack(ctx, x, product.pack);
      most_outputs = std::min(by_threads, kMostPackedOutputs);
    }
  }
  most_outputs = std::max(multiple, most_outputs);
  std::array<Strips, 3> strips;
  for (std::size_t i = 0; i < strips.size(); ++i) {
    strips[i] = cut_into_strips(weight.blocks[i].rows, most_outputs, multiple);
  }
  ctx.parallel_for(
      strips[0].count + strips[1].count + strips[2].count, [&](std::int64_t strip, int worker) {
        std::int64_t first_output = 0;
        std::size_t i = 0;
        for (; strip >= strips[i].count; ++i) {
          strip -= strips[i].count;
          first_output += weight.blocks[i].rows;
        }
        const RowBlock& block = weight.blocks[i];
        const std::int64_t n = strip * strips[i].outputs;
        const std::int64_t num_outputs = std::min(strips[i].outputs, block.rows - n);
        product.multiply({.x = operand.x,
                          .x_stride = x.row_stride,
                          .weight = static_cast<const W*>(block.data) + n * depth,
                          .bias = block.bias == nullptr ? nullptr : block.bias + n,
                          .out = target.out.row<float>(0) + first_output + n,
                          .out_stride = target.out.row_stride,
                          .accumulate = target.accumulate,
                          .num_rows = x.rows,
                          .num_outputs = num_outputs,
                          .depth = weight.depth,
                          .scratch = operand.of(worker)});
        if (target.maxima == nullptr) return;
        for (std::int64_t row = 0; row < x.rows; ++row) {
          logit_maxima(ctx, {target.out.row<float>(row) + n, static_cast<std::size_t>(num_outputs)},
                       target.maxima->row<float>(row) + n / kLogitBlock);
        }
      });
}

void multiply(const CpuContext& ctx, TensorView x, const Weight& weight, Target target) {
  const MutTensorView& out = target.out;
  if (x.cols != weight.depth || out.cols != weight.outputs() || out.rows != x.rows ||
      out.dtype != DType::kFloat32) {
    throw Error("matmul: x [" + std::to_string(x.rows) + ", " + std::to_string(x.cols) +
                "], weight [" + std::to_string(weight.outputs()) + ", " +
                std::to_string(weight.depth) + "], out [" + std::to_string(out.rows) + ", " +
                std::to_string(out.cols) + "] " + std::string(name_of(out.dtype)) +
                " do not fit; out is float32 [rows of x, outputs of weight].");
  }
  if (x.rows == 0) return;
  const Kernels& kernels = ctx.kernels();
  const bool panels = weight.layout == WeightLayout::kPanels;
  if (x.dtype == DType::kBFloat16 && weight.dtype == DType::kBFloat16) {
    const Product<BFloat16, BFloat16> rows_product = {kernels.matmul_bf16_bf16, kernels.pack_x};
    const Product<BFloat16, BFloat16> panels_product = {kernels.matmul_panels_bf16_bf16,
                                                        kernels.pack_x_for_panels};
    multiply_strips(ctx, x, weight, target, panels ? panels_product : rows_product);
  } else if (x.dtype == DType::kFloat32 && weight.dtype == DType::kBFloat16) {
    multiply_strips<float, BFloat16>(
        ctx, x, weight, target,
        {panels ? kernels.matmul_panels_f32_bf16 : kernels.matmul_f32_bf16});
  } else if (x.dtype == DType::kFloat32 && weight.dtype == DType::kFloat32) {
    multiply_strips<float, float>(
        ctx, x, weight, target, {panels ? kernels.matmul_panels_f32_f32 : kernels.matmul_f32_f32});
  } else {
    throw Error("matmul: " + std::string(name_of(x.dtype)) + " x " +
                std::string(name_of(weight.dtype)) +
                " is not a supported pair of dtypes; convert one of them.");
  }
}

}  // namespace

void matmul(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out) {
  multiply(ctx, x, weight, {.out = out});
}

void matmul_logits(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out,
                   MutTensorView maxima) {
  if (weight.blocks[0].rows != weight.outputs() || maxima.rows != out.rows ||
      maxima.cols != logit_blocks(out.cols)) {
    throw Error("matmul_logits: weight is one block, and maxima are [" + std::to_string(out.rows) +
                ", " + std::to_string(logit_blocks(out.cols)) + "], not [" +
                std::to_string(maxima.rows) + ", " + std::to_string(maxima.cols) + "].");
  }
  multiply(ctx, x, weight, {.out = out, .maxima = &maxima});
}

void matmul_add(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView residual) {
  multiply(ctx, x, weight, {.out = residual, .accumulate = true});
}

}  // namespace tinyvllm
