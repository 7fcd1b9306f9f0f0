#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "base/errors.h"
#include "cuda/context.h"
#include "cuda/cublaslt.h"
#include "cuda/launch.h"
#include "ops/cuda/matmul_plan.h"
#include "ops/cuda/plain_matmul.h"
#include "ops/cuda/streaming_matmul.h"
#include "ops/matmul.h"
#include "ops/norm_matmul.h"
#include "ops/rms_norm.h"
#include "ops/silu_mul.h"

namespace tinyvllm {
namespace cuda {
namespace {

// --- The streaming kernel ------------------------------------------------------------------------

// Output tiles of 16, row tiles of 8, elements of the depth a step, steps in the ring. What a block
// keeps in flight is kept below half of a multiprocessor's shared memory where it can be, so that
// the next kernel's blocks find room for theirs.
using StreamingShapes = std::tuple<
    StreamingShape<1, 1, 64, 4>, StreamingShape<1, 1, 64, 6>, StreamingShape<1, 1, 128, 3>,
    StreamingShape<2, 1, 64, 3>,  // the last that normalises
    StreamingShape<1, 2, 64, 3>, StreamingShape<2, 2, 64, 4>, StreamingShape<1, 4, 32, 4>,
    StreamingShape<2, 4, 32, 3>, StreamingShape<1, 8, 32, 2>, StreamingShape<2, 8, 32, 2>,
    StreamingShape<4, 8, 32, 3>>;
constexpr int kNumShapes = std::tuple_size_v<StreamingShapes>;
constexpr int kNumNormalisingShapes = 4;
constexpr int kMaxNormRows = 8;

// Calls f(shape) with the shape of this number.
template <typename F>
void with_shape(int number, F&& f) {
  [&]<std::size_t... kNumbers>(std::index_sequence<kNumbers...>) {
    (void)((number == static_cast<int>(kNumbers) &&
            (f(std::tuple_element_t<kNumbers, StreamingShapes>{}), true)) ||
           ...);
  }(std::make_index_sequence<kNumShapes>{});
}

bool fits(const CudaContext& ctx, int shape, std::int64_t depth, std::int64_t rows,
          bool fuses_norm) {
  bool result = false;
  with_shape(shape, [&]<typename Shape>(Shape) {
    result = StreamingLayout<Shape>(depth, static_cast<int>(rows), fuses_norm).total <=
             ctx.max_shared_bytes();
  });
  return result;
}

using Parameters = std::array<int, 4>;

template <typename Shape>
constexpr Parameters kParametersOf = {Shape::kRowTiles, Shape::kColumnTiles, Shape::kSlice,
                                      Shape::kStages};

constexpr auto kShapeParameters =
    []<typename... Shapes>(std::type_identity<std::tuple<Shapes...>>) {
      return std::array{kParametersOf<Shapes>...};
    }(std::type_identity<StreamingShapes>{});

// The number of the shape with these parameters; a table that asks for one that is not there does not
// compile.
consteval int shape_number(const Parameters& parameters) {
  const auto* found = std::find(kShapeParameters.begin(), kShapeParameters.end(), parameters);
  if (found == kShapeParameters.end()) throw "no such shape";
  return static_cast<int>(found - kShapeParameters.begin());
}

// Fits the shared memory of every card at any size.
constexpr int kSmallestShape = shape_number({1, 8, 32, 2});

template <typename Shape, int kNormRows, Epilogue kEpilogue, typename Out>
void launch_streaming(const CudaContext& ctx, const StreamingArguments& arguments,
                      int blocks_per_multiprocessor) {
  const StreamingLayout<Shape> layout(arguments.depth, arguments.rows, kNormRows > 0);
  int blocks = num_streaming_tiles<Shape, kEpilogue>(arguments.outputs, arguments.rows);
  if (blocks_per_multiprocessor > 0) {
    blocks = std::min(blocks, blocks_per_multiprocessor * ctx.num_multiprocessors());
  }
  launch(ctx, "streaming_matmul",
         {.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(kStreamingThreads),
          .shared_bytes = layout.total,
          .overlaps_previous = true},
         streaming_matmul<Shape, kNormRows, kEpilogue, Out>, arguments);
}

template <typename Shape, int kNormRows>
void launch_streaming(const CudaContext& ctx, const MatmulCall& call,
                      const StreamingArguments& arguments, int blocks) {
  if (call.use == MatmulUse::kNormSwiGlu) {
    launch_streaming<Shape, kNormRows, Epilogue::kSwiGlu, BFloat16>(ctx, arguments, blocks);
  } else if (call.use == MatmulUse::kAdd) {
    if constexpr (kNormRows == 0) {
      launch_streaming<Shape, 0, Epilogue::kAdd, float>(ctx, arguments, blocks);
    }
  } else if (call.out.dtype == DType::kBFloat16) {
    launch_streaming<Shape, kNormRows, Epilogue::kStore, BFloat16>(ctx, arguments, blocks);
  } else {
    launch_streaming<Shape, kNormRows, Epilogue::kStore, float>(ctx, arguments, blocks);
  }
}

void run_streaming(const CudaContext& ctx, const MatmulCall& call, const MatmulPlan& plan,
                   TensorView x) {
  const RowBlock& block = call.weight->blocks[0];
  const StreamingArguments arguments{.weight = static_cast<const BFloat16*>(block.data),
                                     .outputs = block.rows,
                                     .depth = call.weight->depth,
                                     .x = x.data,
                                     .x_stride = x.row_stride,
                                     .rows = static_cast<int>(x.rows),
                                     .norm = call.norm,
                                     .eps = call.eps,
                                     .bias = block.bias,
                                     .out = call.out.data,
                                     .out_stride = call.out.row_stride};
  const int blocks = plan.blocks_per_multiprocessor;
  with_shape(plan.shape, [&]<typename Shape>(Shape) {
    if (!plan.fuses_norm) return launch_streaming<Shape, 0>(ctx, call, arguments, blocks);
    if constexpr (Shape::kColumnTiles == 1) {
      if (x.rows <= 1) return launch_streaming<Shape, 1>(ctx, call, arguments, blocks);
      if (x.rows <= 2) return launch_streaming<Shape, 2>(ctx, call, arguments, blocks);
      if (x.rows <= 4) return launch_streaming<Shape, 4>(ctx, call, arguments, blocks);
      launch_streaming<Shape, kMaxNormRows>(ctx, call, arguments, blocks);
    }
  });
}

// --- The other kernels ---------------------------------------------------------------------------

template <typename X, typename W, typename Out>
void launch_plain(const CudaContext& ctx, TensorView x, const Weight& weight, MutTensorView out,
                  bool accumulate) {
  const RowBlock& block = weight.blocks[0];
  const PlainArguments<X, W> arguments{.x = static_cast<const X*>(x.data),
                                       .x_stride = x.row_stride,
                                       .weight = static_cast<const W*>(block.data),
                                       .bias = block.bias,
                                       .rows = x.rows,
                                       .outputs = block.rows,
                                       .depth = weight.depth,
                                       .out_stride = out.row_stride};
  constexpr std::int64_t kBlockOutputs = kPlainWarps * kPlainOutputs;
  launch(ctx, "plain_matmul",
         {.grid = dim3(static_cast<unsigned>((block.rows + kBlockOutputs - 1) / kBlockOutputs),
                       static_cast<unsigned>((x.rows + kPlainRows - 1) / kPlainRows)),
          .block = dim3(kPlainThreads),
          .overlaps_previous = true},
         plain_matmul<X, W, Out>, arguments, static_cast<Out*>(out.data), accumulate);
}

void run_plain(const CudaContext& ctx, TensorView x, const Weight& weight, MutTensorView out,
               bool accumulate) {
  if (x.dtype == DType::kBFloat16 && weight.dtype == DType::kBFloat16) {
    if (out.dtype == DType::kBFloat16) {
      launch_plain<BFloat16, BFloat16, BFloat16>(ctx, x, weight, out, accumulate);
    } else {
      launch_plain<BFloat16, BFloat16, float>(ctx, x, weight, out, accumulate);
    }
  } else if (weight.dtype == DType::kBFloat16) {
    launch_plain<float, BFloat16, float>(ctx, x, weight, out, accumulate);
  } else {
    launch_plain<float, float, float>(ctx, x, weight, out, accumulate);
  }
}

void run_cublaslt(const CudaContext& ctx, TensorView x, const Weight& weight, MutTensorView out,
                  bool accumulate, int rank) {
  ctx.cublaslt().multiply(ctx,
                          {.rows = x.rows,
                           .outputs = weight.outputs(),
                           .depth = weight.depth,
                           .x_stride = x.row_stride,
                           .out_stride = out.row_stride,
                           .dtype = DType::kBFloat16,
                           .out_dtype = out.dtype,
                           .accumulate = accumulate},
                          x.data, weight.blocks[0].data, out.data, rank);
}

// --- Checks --------------------------------------------------------------------------------------

std::string text_of(TensorView view) {
  return "[" + std::to_string(view.rows) + ", " + std::to_string(view.cols) + "] " +
         std::string(name_of(view.dtype));
}

bool normalises(MatmulUse use) { return use == MatmulUse::kNorm || use == MatmulUse::kNormSwiGlu; }

// What enters the product.
TensorView operand_of(const MatmulCall& call) {
  return normalises(call.use) ? TensorView(call.normalized) : call.x;
}
// Where the product goes, unless a kernel does more than the product.
MutTensorView product_of(const MatmulCall& call) {
  return call.use == MatmulUse::kNormSwiGlu ? call.gate_up : call.out;
}

void check(const MatmulCall& call) {
  const Weight& weight = *call.weight;
  const TensorView x = operand_of(call), out = product_of(call);
  if (x.cols != weight.depth || out.cols != weight.outputs() || out.rows != x.rows ||
      call.x.rows != x.rows || call.x.cols != x.cols) {
    throw Error("matmul: x " + text_of(call.x) + ", weight [" + std::to_string(weight.outputs()) +
                ", " + std::to_string(weight.depth) + "], out " + text_of(out) +
                " do not fit; out is [rows of x, outputs of weight].");
  }
  if (weight.blocks[0].rows != weight.outputs()) {
    throw Error("matmul: on CUDA the row blocks of a weight lie side by side, as one.");
  }
  const bool pair = (x.dtype == DType::kBFloat16 && weight.dtype == DType::kBFloat16) ||
                    (x.dtype == DType::kFloat32 && weight.dtype != DType::kFloat16);
  if (!pair) {
    throw Error("matmul: " + std::string(name_of(x.dtype)) + " x " +
                std::string(name_of(weight.dtype)) +
                " is not a supported pair of dtypes; convert one of them.");
  }
  const bool rounded = out.dtype == DType::kBFloat16;
  if ((!rounded && out.dtype != DType::kFloat32) ||
      (rounded && (x.dtype == DType::kFloat32 || call.use == MatmulUse::kAdd))) {
    throw Error("matmul: from x " + text_of(x) + " out cannot be " +
                std::string(name_of(out.dtype)) +
                "; it is float32, or bfloat16 where x is and nothing is added to it.");
  }
}

bool aligned(const void* address, std::int64_t stride, std::int64_t element_size) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0 && stride * element_size % 16 == 0;
}
bool aligned(TensorView view) {
  return aligned(view.data, view.row_stride, static_cast<std::int64_t>(size_of(view.dtype)));
}

// Whether the operands of the product can be read 16 bytes at a time, and multiplied on tensor
// cores.
bool takes_vectors(const MatmulCall& call) {
  const TensorView x = operand_of(call);
  return x.dtype == DType::kBFloat16 && call.weight->dtype == DType::kBFloat16 && aligned(x) &&
         aligned(call.weight->blocks[0].data, call.weight->depth, 2) &&
         (call.use != MatmulUse::kNormSwiGlu || call.out.dtype == DType::kBFloat16);
}

bool can_fuse_norm(const CudaContext& ctx, const MatmulCall& call, int shape) {
  return normalises(call.use) && call.x.rows <= kMaxNormRows && shape < kNumNormalisingShapes &&
         aligned(call.x) && aligned(call.norm, 0, 4) &&
         fits(ctx, shape, call.weight->depth, call.x.rows, true);
}

// --- Plans ---------------------------------------------------------------------------------------

consteval MatmulPlan streaming(const Parameters& shape, int blocks_per_multiprocessor,
                               bool fuses_norm = false) {
  return {.kernel = MatmulKernel::kStreaming,
          .shape = shape_number(shape),
          .blocks_per_multiprocessor = blocks_per_multiprocessor,
          .fuses_norm = fuses_norm};
}
constexpr MatmulPlan cublaslt(int rank) {
  return {.kernel = MatmulKernel::kCublasLt, .rank = rank};
}

struct TunedPlan {
  std::int64_t outputs, depth;
  MatmulUse use;
  std::int64_t up_to_rows;
  MatmulPlan plan;
};

// In ascending order of up_to_rows for each matrix and use.
constexpr std::initializer_list<TunedPlan> kTunedPlans = {
#include "ops/cuda/matmul_table.inc"
};

MatmulPlan streaming_for(std::int64_t rows) {
  if (rows <= 8) return streaming({1, 1, 64, 6}, 2, true);
  if (rows <= 16) return streaming({1, 2, 64, 3}, 2);
  if (rows <= 32) return streaming({2, 4, 32, 3}, 2);
  if (rows <= 64) return streaming({2, 8, 32, 2}, 2);
  return streaming({4, 8, 32, 3}, 1);
}

MatmulPlan wanted(const MatmulCall& call) {
  const Weight& weight = *call.weight;
  for (const TunedPlan& tuned : kTunedPlans) {
    if (tuned.outputs == weight.outputs() && tuned.depth == weight.depth && tuned.use == call.use &&
        call.x.rows <= tuned.up_to_rows) {
      return tuned.plan;
    }
  }
  // Measured on an H200: from about here on the library's tiles read x less often.
  constexpr std::int64_t kMostStreamingRows = 16;
  return call.x.rows <= kMostStreamingRows ? streaming_for(call.x.rows) : cublaslt(0);
}

}  // namespace

std::span<const std::array<int, 4>> streaming_shapes() { return kShapeParameters; }
int num_normalising_shapes() { return kNumNormalisingShapes; }

MatmulPlan plan_of(const CudaContext& ctx, const MatmulCall& call) {
  if (!takes_vectors(call)) return {};
  MatmulPlan plan = wanted(call);
  // The library has no bias in float32 for a bfloat16 output, and no promise about its sums.
  const bool library =
      call.weight->blocks[0].bias == nullptr && aligned(product_of(call)) && !ctx.batch_invariant();
  if (plan.kernel == MatmulKernel::kCublasLt && !library) plan = streaming_for(call.x.rows);
  if (plan.kernel == MatmulKernel::kStreaming) {
    plan.fuses_norm =
        plan.fuses_norm && !ctx.batch_invariant() && can_fuse_norm(ctx, call, plan.shape);
    if (!fits(ctx, plan.shape, call.weight->depth, call.x.rows, plan.fuses_norm)) {
      plan.shape = kSmallestShape;
    }
  }
  return plan;
}

void run(const CudaContext& ctx, const MatmulCall& call, const MatmulPlan& plan) {
  check(call);
  const bool fast = plan.kernel != MatmulKernel::kPlain;
  if ((fast && !takes_vectors(call)) ||
      (plan.fuses_norm && !can_fuse_norm(ctx, call, plan.shape)) ||
      (plan.kernel == MatmulKernel::kStreaming && (plan.shape < 0 || plan.shape >= kNumShapes)) ||
      (plan.kernel == MatmulKernel::kCublasLt && call.weight->blocks[0].bias != nullptr)) {
    throw Error("matmul: this plan does not take x " + text_of(call.x) + " and weight [" +
                std::to_string(call.weight->outputs()) + ", " + std::to_string(call.weight->depth) +
                "].");
  }
  const bool fused = plan.kernel == MatmulKernel::kStreaming && plan.fuses_norm;
  if (normalises(call.use) && !fused) rms_norm(ctx, call.x, call.norm, call.eps, call.normalized);
  if (plan.kernel == MatmulKernel::kStreaming) {
    run_streaming(ctx, call, plan, fused ? call.x : operand_of(call));
    return;
  }
  const bool accumulate = call.use == MatmulUse::kAdd;
  if (plan.kernel == MatmulKernel::kCublasLt) {
    run_cublaslt(ctx, operand_of(call), *call.weight, product_of(call), accumulate, plan.rank);
  } else {
    run_plain(ctx, operand_of(call), *call.weight, product_of(call), accumulate);
  }
  if (call.use == MatmulUse::kNormSwiGlu) silu_mul(ctx, call.gate_up, call.out);
}

}  // namespace cuda

namespace {

void plan_and_run(const CudaContext& ctx, const cuda::MatmulCall& call) {
  cuda::run(ctx, call, cuda::plan_of(ctx, call));
}

}  // namespace

void matmul(const CudaContext& ctx, TensorView x, const Weight& weight, MutTensorView out) {
  plan_and_run(ctx, {.use = cuda::MatmulUse::kStore, .x = x, .weight = &weight, .out = out});
}

void matmul_add(const CudaContext& ctx, TensorView x, const Weight& weight,
                MutTensorView residual) {
  plan_and_run(ctx, {.use = cuda::MatmulUse::kAdd, .x = x, .weight = &weight, .out = residual});
}

void norm_matmul(const CudaContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView out) {
  plan_and_run(ctx, {.use = cuda::MatmulUse::kNorm,
                     .x = x,
                     .weight = &weight,
                     .out = out,
                     .norm = norm,
                     .eps = eps,
                     .normalized = normalized});
}

void norm_logits(const CudaContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView out,
                 MutTensorView /*maxima*/) {
  norm_matmul(ctx, x, norm, eps, weight, normalized, out);
}

void norm_swiglu(const CudaContext& ctx, TensorView x, const float* norm, float eps,
                 const Weight& weight, MutTensorView normalized, MutTensorView gate_up,
                 MutTensorView out) {
  plan_and_run(ctx, {.use = cuda::MatmulUse::kNormSwiGlu,
                     .x = x,
                     .weight = &weight,
                     .out = out,
                     .norm = norm,
                     .eps = eps,
                     .normalized = normalized,
                     .gate_up = gate_up});
}

}  // namespace tinyvllm
