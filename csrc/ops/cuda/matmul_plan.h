// How one product of a model is computed on the GPU: by which kernel, in which shape. The plan of
// an op follows from the weight's shape and the number of rows alone, through a table that
// benchmarks/tune_gemm.py writes (matmul_table.inc) and, for what is not in it, a rule.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "base/tensor.h"
#include "ops/matmul.h"

namespace tinyvllm::cuda {

enum class MatmulKernel : std::uint8_t {
  kStreaming,  // streaming_matmul.h: bfloat16, the weights read once
  kCublasLt,   // NVIDIA's library: bfloat16, without a bias
  kPlain,      // plain_matmul.h: float32, or sizes and addresses that the others do not take
};

struct MatmulPlan {
  MatmulKernel kernel = MatmulKernel::kPlain;
  // kStreaming: which of streaming_shapes, how many blocks a multiprocessor gets at most, each
  // doing several tiles (0: a block for each tile), and whether a norm in front is computed in the
  // kernel.
  int shape = 0;
  int blocks_per_multiprocessor = 0;
  bool fuses_norm = false;
  // kCublasLt: which of the library's proposals, in its own order.
  int rank = 0;

  bool operator==(const MatmulPlan&) const = default;
};

// What surrounds the product.
enum class MatmulUse : std::uint8_t { kStore, kAdd, kNorm, kNormSwiGlu };

struct MatmulCall {
  MatmulUse use = MatmulUse::kStore;
  TensorView x{};
  const Weight* weight = nullptr;
  MutTensorView out{};          // kAdd: the residual
  const float* norm = nullptr;  // kNorm and kNormSwiGlu, with all that follows
  float eps = 0;
  MutTensorView normalized{};
  MutTensorView gate_up{};  // kNormSwiGlu
};

// The shapes of the streaming kernel, each the parameters of a StreamingShape. The first ones can
// compute a norm.
std::span<const std::array<int, 4>> streaming_shapes();
int num_normalising_shapes();

// The plan that the op takes for the call.
MatmulPlan plan_of(const CudaContext& ctx, const MatmulCall& call);

// Computes the call by the plan. Throws Error if the plan's kernel does not take it.
void run(const CudaContext& ctx, const MatmulCall& call, const MatmulPlan& plan);

}  // namespace tinyvllm::cuda
