#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/errors.h"
#include "ops/cpu/strips.h"
#include "ops/logit_maxima.h"
#include "ops/matmul.h"

namespace tinyvllm {
namespace {

// Strips have up to so many bytes of weights, but kMostPackedOutputs where no cache holds x and that is
// more; with x in tiles as many outputs as kernels.h says.
constexpr std::int64_t kStripBytes = 1024 * 1024;
// So many they are to have at least, as to begin one costs something: where reading takes longer than
// arithmetic, with up to kMemoryBoundRows rows of x (kStreamedRows where it is in tiles), bytes; and else
// outputs.
constexpr std::int64_t kLeastStripBytes = 256 * 1024, kLeastStripOutputs = 32;
constexpr std::int64_t kMemoryBoundRows = 15;
constexpr std::int64_t kTileOutputs = 4;  // of a register tile of rows

// Whether x finds room in the L2 cache. If not, strips may be wider, as each reads all of it anew.
bool is_cached(TensorView x) { return x.rows * x.cols <= kCachedOperand; }

// What kernels get as x, once for all shares of a product: x as it lies,
template <typename X>
struct AsItLies {
  static constexpr bool kTiles = false;                   // whether it is for AMX
  static constexpr std::int64_t kOutputs = kTileOutputs;  // a share has a multiple of these
  TensorView x;

  std::int64_t stride() const { return x.row_stride; }
  std::size_t bytes() const { return 0; }
  std::int64_t scratch() const { return 0; }  // of a share, in floats
  const X* make(const CpuContext& /*ctx*/, std::byte* /*memory*/) const { return x.row<X>(0); }
};

// x in panels,
struct InPanels {
  static constexpr bool kTiles = false;
  static constexpr std::int64_t kOutputs = 8;  // of a tile
  TensorView x;
  void (*pack)(const PackShare&);

  bool as_it_lies() const { return x_panels(x.rows) == 0; }
  std::int64_t stride() const { return as_it_lies() ? x.row_stride : x_rest_stride(x.cols); }
  std::size_t bytes() const {
    if (as_it_lies()) return 0;
    return static_cast<std::size_t>(x_panels_elements(x.rows, x.cols)) * sizeof(BFloat16);
  }
  std::int64_t scratch() const { return 0; }
  const BFloat16* make(const CpuContext& ctx, std::byte* memory) const {
    if (as_it_lies()) return x.row<BFloat16>(0);
    auto* packed = reinterpret_cast<BFloat16*>(memory);
    const std::int64_t pieces = x_panels(x.rows) * x_panel_pieces(x.cols);
    ctx.parallel_for(pieces + (x_rest(x.rows) > 0 ? 1 : 0), [&](std::int64_t piece, int) {
      pack({x.row<BFloat16>(0), x.row_stride, x.rows, x.cols, piece, packed});
    });
    return packed;
  }
};

// in tiles of AMX,
struct InTiles {
  static constexpr bool kTiles = true;
  static constexpr std::int64_t kOutputs = kPanelOutputs;
  TensorView x;
  void (*pack)(const PackShare&);

  std::int64_t stride() const { return 0; }
  std::size_t bytes() const {
    return static_cast<std::size_t>(packed_elements(x.rows, x.cols)) * sizeof(BFloat16);
  }
  std::int64_t scratch() const { return kMatmulScratch; }
  const BFloat16* make(const CpuContext& ctx, std::byte* memory) const {
    if (lies_packed(x.rows, x.cols)) return x.row<BFloat16>(0);
    auto* packed = reinterpret_cast<BFloat16*>(memory);
    ctx.parallel_for(packed_pieces(x.rows, x.cols), [&](std::int64_t piece, int) {
      pack({x.row<BFloat16>(0), x.row_stride, x.rows, x.cols, piece, packed});
    });
    return packed;
  }
};

// its rows widened or in another order,
template <typename From>
struct Converted {
  static constexpr bool kTiles = false;
  static constexpr std::int64_t kOutputs = kTileOutputs;
  TensorView x;
  void (*convert)(const From* row, std::int64_t size, float* out);

  std::int64_t stride() const { return operand_stride(DType::kFloat32, whole_steps(x.cols)); }
  std::size_t bytes() const { return static_cast<std::size_t>(x.rows * stride()) * sizeof(float); }
  std::int64_t scratch() const { return 0; }
  const float* make(const CpuContext& ctx, std::byte* memory) const {
    auto* rows = reinterpret_cast<float*>(memory);
    ctx.parallel_for(x.rows, [&](std::int64_t row, int) {
      convert(x.row<From>(row), x.cols, rows + row * stride());
    });
    return rows;
  }
};

// or in lane order.
template <typename From, typename W>
struct InLanes : Converted<From> {
  static constexpr std::int64_t kOutputs = kPanelOutputs;

  std::int64_t scratch() const { return lane_scratch(this->x.cols, sizeof(W)); }
};

// Where sums of products go: rows of floats.
struct Target {
  float* first;
  std::int64_t stride;
  bool accumulate = false;
};

// One product: its kernel, the x that it gets, and memory of each thread's own.
template <typename X, typename W, typename Operand>
class Multiplication {
 public:
  Multiplication(const CpuContext& ctx, const Weight& weight,
                 void (*kernel)(const MatmulShare<X, W>&), Operand operand)
      : ctx_(ctx), weight_(weight), kernel_(kernel), operand_(operand) {}

  // The strips of `blocks`, of a multiple of `multiple` outputs each, and no more than `most` if that
  // allows it.
  Strips strips(std::span<const RowBlock> blocks, std::int64_t multiple, std::int64_t most) const {
    const bool panels = weight_.layout == WeightLayout::kPanels;
    multiple = std::max(multiple, panels ? kPanelOutputs : Operand::kOutputs);
    const std::int64_t row_bytes = stored_depth() * static_cast<std::int64_t>(sizeof(W));
    const bool few_rows = operand_.x.rows <= (Operand::kTiles ? kStreamedRows : kMemoryBoundRows);
    const std::int64_t packed_most = few_rows ? kMostStreamedOutputs : kMostPackedOutputs;
    const std::int64_t by_bytes = kStripBytes / row_bytes;
    const std::int64_t rows_most =
        is_cached(operand_.x) ? by_bytes : std::max(by_bytes, kMostPackedOutputs);
    most = std::min(most, Operand::kTiles ? packed_most : rows_most);
    const std::int64_t least =
        std::min(few_rows ? kLeastStripBytes / row_bytes : kLeastStripOutputs, most);
    const auto runs = few_rows ? Strips::Runs::kOne : Strips::Runs::kOfThreads;
    return {blocks, multiple, least, most, ctx_.num_threads(), runs};
  }

  // The memory that it works in, with `floats` of each thread's own for the caller.
  std::size_t scratch_bytes(std::int64_t floats = 0) const {
    return bytes_of_threads(floats) + operand_.bytes();
  }

  // Before the first product: takes that memory and makes x.
  void prepare(std::int64_t floats = 0) {
    thread_floats_ = operand_.scratch() + floats;
    std::byte* memory = ctx_.scratch(scratch_bytes(floats));
    memory_ = reinterpret_cast<float*>(memory);
    x_ = operand_.make(ctx_, memory + bytes_of_threads(floats));
  }

  float* floats_of(int worker) const {
    return memory_ + worker * thread_floats_ + operand_.scratch();
  }

  // Outputs n to n + num_outputs of a row block, for all rows of x.
  void multiply(const RowBlock& block, std::int64_t n, std::int64_t num_outputs, Target target,
                int worker) const {
    kernel_({.x = x_,
             .x_stride = operand_.stride(),
             .weight = static_cast<const W*>(block.data) + n * stored_depth(),
             .bias = block.bias == nullptr ? nullptr : block.bias + n,
             .out = target.first,
             .out_stride = target.stride,
             .accumulate = target.accumulate,
             .num_rows = operand_.x.rows,
             .num_outputs = num_outputs,
             .depth = weight_.depth,
             .scratch = operand_.scratch() == 0 ? nullptr : memory_ + worker * thread_floats_});
  }

 private:
  std::size_t bytes_of_threads(std::int64_t floats) const {
    const std::int64_t each = operand_.scratch() + floats;
    return static_cast<std::size_t>(ctx_.num_threads() * each) * sizeof(float);
  }

  std::int64_t stored_depth() const {
    const bool panels = weight_.layout == WeightLayout::kPanels;
    return panels ? panel_depth(weight_.dtype, weight_.depth) : weight_.depth;
  }

  const CpuContext& ctx_;
  const Weight& weight_;
  void (*const kernel_)(const MatmulShare<X, W>&);
  const Operand operand_;
  const X* x_ = nullptr;
  std::int64_t thread_floats_ = 0;  // of each thread's memory: the kernel's, then the caller's
  float* memory_ = nullptr;
};

// Calls f with the Multiplication of these dtypes and this layout.
template <typename F>
void with_multiplication(const CpuContext& ctx, TensorView x, const Weight& weight, F&& f) {
  if (weight.depth == 0) {
    throw Error("matmul: x and weight have a depth of 0; there is no product.");
  }
  const Kernels& kernels = ctx.kernels();
  const bool panels = weight.layout == WeightLayout::kPanels;
  const bool in_lanes = x.rows >= kManyRows && kernels.matmul_lanes_f32_bf16 != nullptr;
  const auto call = [&](auto kernel, auto operand) {
    f(Multiplication(ctx, weight, kernel, operand));
  };
  const auto is = [&](DType x_dtype, DType weight_dtype) {
    return x.dtype == x_dtype && weight.dtype == weight_dtype;
  };
  if (is(DType::kBFloat16, DType::kBFloat16)) {
    const auto kernel = panels ? kernels.matmul_panels_bf16_bf16 : kernels.matmul_bf16_bf16;
    const auto pack = panels ? kernels.pack_x_for_panels : kernels.pack_x;
    if (pack != nullptr) {
      call(kernel, InTiles{x, pack});
    } else if (!panels && kernels.pack_x_panel != nullptr) {
      call(kernel, InPanels{x, kernels.pack_x_panel});
    } else if (!panels && in_lanes && kernels.lane_bf16 != nullptr) {
      call(kernels.matmul_lanes_f32_bf16, InLanes<BFloat16, BFloat16>{{x, kernels.lane_bf16}});
    } else if (kernel != nullptr) {
      call(kernel, AsItLies<BFloat16>{x});
    } else if (panels) {
      call(kernels.matmul_panels_f32_bf16, Converted<BFloat16>{x, kernels.to_float});
    } else {
      call(kernels.matmul_f32_bf16, Converted<BFloat16>{x, kernels.pair_bf16});
    }
  } else if (is(DType::kFloat32, DType::kBFloat16)) {
    if (panels) {
      call(kernels.matmul_panels_f32_bf16, AsItLies<float>{x});
    } else if (in_lanes) {
      call(kernels.matmul_lanes_f32_bf16, InLanes<float, BFloat16>{{x, kernels.lane_f32}});
    } else {
      call(kernels.matmul_f32_bf16, Converted<float>{x, kernels.pair_f32});
    }
  } else if (is(DType::kFloat32, DType::kFloat32)) {
    if (panels) {
      call(kernels.matmul_panels_f32_f32, AsItLies<float>{x});
    } else if (in_lanes) {
      call(kernels.matmul_lanes_f32_f32, InLanes<float, float>{{x, kernels.lane_f32_for_f32}});
    } else {
      call(kernels.matmul_f32_f32, AsItLies<float>{x});
    }
  } else {
    throw Error("matmul: " + std::string(name_of(x.dtype)) + " x " +
                std::string(name_of(weight.dtype)) +
                " is not a supported pair of dtypes; convert one of them.");
  }
}

// maxima: of logits, or null.
void multiply(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out,
              bool accumulate, const MutTensorView* maxima = nullptr) {
  if (x.cols != weight.depth || out.cols != weight.outputs() || out.rows != x.rows ||
      out.dtype != DType::kFloat32) {
    throw Error("matmul: x [" + std::to_string(x.rows) + ", " + std::to_string(x.cols) +
                "], weight [" + std::to_string(weight.outputs()) + ", " +
                std::to_string(weight.depth) + "], out [" + std::to_string(out.rows) + ", " +
                std::to_string(out.cols) + "] " + std::string(name_of(out.dtype)) +
                " do not fit; out is float32 [rows of x, outputs of weight].");
  }
  if (x.rows == 0) return;
  with_multiplication(ctx, x, weight, [&](auto multiplication) {
    multiplication.prepare();
    Strips strips =
        multiplication.strips(weight.blocks, maxima ? kLogitBlock : 1, weight.outputs());
    ctx.parallel_for(ctx.num_threads(), [&](std::int64_t, int worker) {
      while (const std::optional<Strip> strip = strips.take(worker)) {
        multiplication.multiply(weight.blocks[strip->block], strip->n, strip->num_outputs,
                                {out.row<float>(0) + strip->column, out.row_stride, accumulate},
                                worker);
        if (maxima == nullptr) continue;
        for (std::int64_t row = 0; row < x.rows; ++row) {
          const float* logits = out.row<float>(row) + strip->n;
          logit_maxima(ctx, {logits, static_cast<std::size_t>(strip->num_outputs)},
                       maxima->row<float>(row) + strip->n / kLogitBlock);
        }
      }
    });
  });
}

// Strips of which only what becomes of them goes to memory: `parallel` of them, as of gate and up, are
// looked at while they are in the cache. They are so narrow that they find room there beside x, or,
// where x has none itself, as wide as can be, so that it is read less often.
template <typename M>
Strips cached_strips(const M& multiplication, TensorView x, const RowBlock& block,
                     std::int64_t parallel) {
  constexpr std::int64_t kCachedFloats = 64 * 1024;
  const std::int64_t most = is_cached(x) ? kCachedFloats / (parallel * x.rows) : kMostPackedOutputs;
  return multiplication.strips({&block, 1}, 1, most);
}

// Of a row of such strips side by side, in floats.
std::int64_t cached_stride(const Strips& strips, std::int64_t parallel) {
  return operand_stride(DType::kFloat32, parallel * strips.most_outputs());
}

// What matmul_largest works in, of each thread: the rows of a strip, and what it knows of each, in whole
// cache lines, as what is behind it is to begin with one.
std::int64_t largest_floats(std::int64_t rows, std::int64_t stride) {
  constexpr std::int64_t kFloats = sizeof(Largest) / sizeof(float);
  return rows * stride + operand_stride(DType::kFloat32, rows * kFloats);
}

// Of two results of a row, or of what two threads know of it: NaN is larger than all, and of equal ones
// the one of the lower output counts.
Largest larger(const Largest& a, const Largest& b) {
  if (std::isnan(a.value) || a.value > b.value) return a;
  if (a.value == b.value && a.output < b.output) return a;
  return b;
}

// Adds outputs n to n + size of a row to what is known of its largest.
void add_to_largest(const Kernels& kernels, const float* results, std::int64_t n, std::int64_t size,
                    Largest& largest) {
  const float maximum = kernels.finite_maximum(results, size);
  if (maximum < largest.value || std::isnan(largest.value)) return;
  const std::int64_t i = std::find(results, results + size, maximum) - results;
  largest = larger({maximum, static_cast<std::int32_t>(n + i)}, largest);
}

}  // namespace

std::size_t matmul_scratch_bytes(const CpuContext& ctx, DType x, std::int64_t rows,
                                 const Weight& weight, ProductKind kind) {
  std::size_t most = 0;
  for (std::int64_t m = 1; m <= rows; ++m) {  // strips are wider with fewer of them
    const TensorView operand{nullptr, x, m, weight.depth, weight.depth};
    with_multiplication(ctx, operand, weight, [&](const auto& multiplication) {
      const auto stride = [&](std::int64_t parallel) {
        const RowBlock& block = weight.blocks[0];
        return cached_stride(cached_strips(multiplication, operand, block, parallel), parallel);
      };
      const std::int64_t floats = kind == ProductKind::kSwiglu    ? m * stride(2)
                                  : kind == ProductKind::kLargest ? largest_floats(m, stride(1))
                                                                  : 0;
      most = std::max(most, multiplication.scratch_bytes(floats));
    });
  }
  return most;
}

void matmul(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out) {
  multiply(ctx, x, weight, out, false);
}

void matmul_logits(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out,
                   MutTensorView maxima) {
  if (weight.blocks[0].rows != weight.outputs() || maxima.rows != out.rows ||
      maxima.cols != logit_blocks(out.cols)) {
    throw Error("matmul_logits: weight is one block, and maxima are [" + std::to_string(out.rows) +
                ", " + std::to_string(logit_blocks(out.cols)) + "], not [" +
                std::to_string(maxima.rows) + ", " + std::to_string(maxima.cols) + "].");
  }
  multiply(ctx, x, weight, out, false, &maxima);
}

void matmul_largest(const CpuContext& ctx, TensorView x, const Weight& weight,
                    std::span<Largest> largest) {
  const RowBlock& block = weight.blocks[0];
  if (x.cols != weight.depth || block.rows != weight.outputs() || block.rows == 0 ||
      std::ssize(largest) != x.rows) {
    throw Error("matmul_largest: x [" + std::to_string(x.rows) + ", " + std::to_string(x.cols) +
                "], weight [" + std::to_string(weight.outputs()) + ", " +
                std::to_string(weight.depth) + "], largest [" + std::to_string(largest.size()) +
                "] do not fit; weight is one block with outputs, largest [rows of x].");
  }
  if (x.rows == 0) return;
  std::fill(largest.begin(), largest.end(), Largest{-std::numeric_limits<float>::infinity(), 0});
  with_multiplication(ctx, x, weight, [&](auto multiplication) {
    Strips strips = cached_strips(multiplication, x, block, 1);
    const std::int64_t stride = cached_stride(strips, 1);
    multiplication.prepare(largest_floats(x.rows, stride));
    const auto largest_of = [&](int worker) {
      return reinterpret_cast<Largest*>(multiplication.floats_of(worker) + x.rows * stride);
    };
    for (int worker = 0; worker < ctx.num_threads(); ++worker) {
      std::uninitialized_copy(largest.begin(), largest.end(), largest_of(worker));
    }
    ctx.parallel_for(ctx.num_threads(), [&](std::int64_t, int worker) {
      float* results = multiplication.floats_of(worker);
      while (const std::optional<Strip> strip = strips.take(worker)) {
        multiplication.multiply(block, strip->n, strip->num_outputs, {results, stride}, worker);
        for (std::int64_t row = 0; row < x.rows; ++row) {
          add_to_largest(ctx.kernels(), results + row * stride, strip->n, strip->num_outputs,
                         largest_of(worker)[row]);
        }
      }
    });
    for (int worker = 0; worker < ctx.num_threads(); ++worker) {
      std::transform(largest.begin(), largest.end(), largest_of(worker), largest.begin(), larger);
    }
  });
}

void matmul_add(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView residual) {
  multiply(ctx, x, weight, residual, true);
}

void matmul_swiglu(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out) {
  const std::array<RowBlock, 3>& blocks = weight.blocks;
  if (x.cols != weight.depth || out.rows != x.rows || blocks[0].rows != out.cols ||
      blocks[1].rows != out.cols || blocks[2].rows != 0) {
    throw Error("matmul_swiglu: x [" + std::to_string(x.rows) + ", " + std::to_string(x.cols) +
                "], gate [" + std::to_string(blocks[0].rows) + ", " + std::to_string(weight.depth) +
                "], up [" + std::to_string(blocks[1].rows) + ", " + std::to_string(weight.depth) +
                "], out [" + std::to_string(out.rows) + ", " + std::to_string(out.cols) +
                "] do not fit; out is [rows of x, rows of gate and up].");
  }
  if (x.rows == 0) return;
  with_multiplication(ctx, x, weight, [&](auto multiplication) {
    Strips strips = cached_strips(multiplication, x, blocks[0], 2);
    const std::int64_t stride = cached_stride(strips, 2);
    multiplication.prepare(x.rows * stride);
    ctx.parallel_for(ctx.num_threads(), [&](std::int64_t, int worker) {
      while (const std::optional<Strip> strip = strips.take(worker)) {
        const std::int64_t n = strip->n, num_outputs = strip->num_outputs;
        float* gate = multiplication.floats_of(worker);
        float* up = gate + num_outputs;
        multiplication.multiply(blocks[0], n, num_outputs, {gate, stride}, worker);
        multiplication.multiply(blocks[1], n, num_outputs, {up, stride}, worker);
        for (std::int64_t row = 0; row < x.rows; ++row, gate += stride, up += stride) {
          if (out.dtype == DType::kFloat32) {
            ctx.kernels().silu_mul_f32(gate, up, num_outputs, out.row<float>(row) + n);
          } else {
            ctx.kernels().silu_mul_bf16(gate, up, num_outputs, out.row<BFloat16>(row) + n);
          }
        }
      }
    });
  });
}

}  // namespace tinyvllm
