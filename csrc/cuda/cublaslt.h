// cuBLASLt: NVIDIA's matrix products, opened with dlopen when a context is made, so that the module
// also runs where it is not installed. One kind of product is used:
//
//   out[m, n] = sum_k x[m, k] weight[n, k]   (+ out[m, n] where `accumulate`)
//
//   x       [rows, depth]      bfloat16 or float32; rows may lie apart
//   weight  [outputs, depth]   the same dtype, contiguous
//   out     [rows, outputs]    bfloat16 or float32 (float32 x float32: float32); rows may lie apart
//
// All three begin at multiples of 256 bytes. Products are added in float32; TF32 is off.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace tinyvllm {
class CudaContext;
}

namespace tinyvllm::cuda {

// The shape of a product; pointers come when it runs.
struct Product {
  std::int64_t rows = 0, outputs = 0, depth = 0;
  std::int64_t x_stride = 0, out_stride = 0;  // elements from row to row
  DType dtype = DType::kBFloat16;             // of x and weight
  DType out_dtype = DType::kBFloat16;
  bool accumulate = false;
};

class CublasLt {
 public:
  // Scratch memory that every algorithm gets, at a fixed address.
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

  // Looks for the library in the directories, then where the system looks. Throws DeviceError with
  // what was tried.
  explicit CublasLt(const std::vector<std::string>& directories);
  // Opens the library, where it is there, so that the constructor need not wait for that. It stays
  // open until the process ends. Another thread may do this while the device is opened.
  static void open_early(const std::vector<std::string>& directories);
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  std::string version() const;  // "13.10.0", or "emulated"

  // The library proposes algorithms for a shape, best first by its own estimate, without any timing.
  // At most kMaxAlgorithms are asked for. Throws Error if there is none.
  static constexpr int kMaxAlgorithms = 16;
  int num_algorithms(const Product& product) const;

  // Queues the product in the context's stream, computed by the algorithm of this rank (0: the first
  // that is proposed; past the last one: the last). The proposals for a shape are asked for once.
  // Allocates no device memory.
  void multiply(const CudaContext& ctx, const Product& product, const void* x, const void* weight,
                void* out, int rank = 0) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tinyvllm::cuda
