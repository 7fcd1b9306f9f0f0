// y = x W^T + b:  out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]
//
//   x       [num_rows, depth]    float32 or bfloat16
//   weight  [outputs, depth]     up to three row blocks stacked along the outputs, because q, k, v
//                                (and gate, up) are separate tensors on disk; one dtype, one layout
//   bias    [outputs]            float32, a part of each row block, or absent
//   out     [num_rows, outputs]  float32 (on CUDA also bfloat16); may not alias x
//
// Pairs (x, weight): bfloat16 x bfloat16, float32 x bfloat16 (widened in registers, exact), float32
// x float32. Products are added in float32, for one output always in the same order
// (docs/promises.md, 2); each layout has its own.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "base/tensor.h"
#include "ops/cpu_context.h"

namespace tinyvllm {

class CudaContext;

enum class WeightLayout : std::uint8_t {
  kRows,    // [rows, depth], contiguous, as in a checkpoint
  kPanels,  // on the CPU only: what repack.h makes of them
};

struct RowBlock {
  const void* data = nullptr;  // as the layout says
  std::int64_t rows = 0;
  const float* bias = nullptr;  // [rows], or null
};

struct Weight {
  std::array<RowBlock, 3> blocks{};  // those behind the last used one have no rows
  std::int64_t depth = 0;
  DType dtype = DType::kBFloat16;
  WeightLayout layout = WeightLayout::kRows;

  std::int64_t outputs() const { return blocks[0].rows + blocks[1].rows + blocks[2].rows; }
};

// Throws Error if the dtypes are none of the pairs above or the shapes do not fit; on the CPU also where
// the depth is 0.
void matmul(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out);
void matmul(const CudaContext& ctx, TensorView x, const Weight& weight, MutTensorView out);

// Where the results are logits: with maxima [num_rows, logit_blocks(outputs)] as logit_maxima.h has
// them, found while the product still has a block in its cache.
void matmul_logits(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out,
                   MutTensorView maxima);

// The largest result of a row, and the lowest output that has it; NaN where a result is not finite.
struct Largest {
  float value = 0;
  std::int32_t output = 0;
};

// Only that of each row: logits of which a greedy sampler asks no more. They are compared while they
// are in the cache, and none goes to memory.
//
//   weight   one row block
//   largest  [num_rows]
void matmul_largest(const CpuContext& ctx, TensorView x, const Weight& weight,
                    std::span<Largest> largest);

// out = silu(gate) * up  with  [gate, up] = x W^T + b, as silu_mul.h has it, of which only parts are
// ever in memory.
//
//   weight  two row blocks, gate and up
//   out     [num_rows, rows of gate]  float32 or bfloat16
void matmul_swiglu(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView out);

// What becomes of a product's results.
enum class ProductKind : std::uint8_t { kStored, kSwiglu, kLargest };

// The most scratch memory (CpuContext::scratch) that such a product takes on this context with up to
// so many rows of x. Of the weight all but its data counts.
std::size_t matmul_scratch_bytes(const CpuContext& ctx, DType x, std::int64_t rows,
                                 const Weight& weight, ProductKind kind);

// residual[m, n] += (x W^T + b)[m, n]: what a branch of a layer does at its end. float32; the sum of
// products is complete before it is added.
void matmul_add(const CpuContext& ctx, TensorView x, const Weight& weight, MutTensorView residual);
void matmul_add(const CudaContext& ctx, TensorView x, const Weight& weight, MutTensorView residual);

}  // namespace tinyvllm
