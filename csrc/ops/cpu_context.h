// What every op on the CPU gets first: the threads to use and the kernels of this CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/dtype.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "ops/cpu/kernels.h"

namespace tinyvllm {

class CpuContext {
 public:
  // num_threads 0: default_num_threads(). isa "": the environment variable TINYVLLM_CPU_ISA, and
  // without it the best that this CPU has. Throws InvalidRequestError for what it lacks.
  explicit CpuContext(int num_threads = 0, const std::string& isa = "");

  int num_threads() const { return pool_.num_threads(); }
  const Kernels& kernels() const { return *kernels_; }

  // Memory that is reserved here and taken from the system when first used. Throws CapacityError
  // with the purpose and the bytes.
  Memory allocate(std::size_t bytes, const char* purpose = "activations") const;

  // The same in pages of 2 MiB where the system has them, for what is read from end to end.
  Memory allocate_in_large_pages(std::size_t bytes, const char* purpose) const;

  // Where a model keeps the x of a product: see operand_stride in cpu/kernels.h.
  static std::int64_t operand_stride(DType dtype, std::int64_t cols) {
    return tinyvllm::operand_stride(dtype, cols);
  }

  // What matmul writes where its result is neither logits nor added to the residual stream.
  DType product_dtype(DType /*compute*/) const { return DType::kFloat32; }

  // For how many of a batch's tokens norm_swiglu wants memory for gate and up.
  static std::int64_t gate_up_rows(std::int64_t /*num_tokens*/) { return 0; }

  // See ThreadPool::parallel_for.
  template <typename F>
  void parallel_for(std::int64_t count, F&& f) const {
    pool_.parallel_for(count, f);
  }

  // Memory for one op to work in, aligned to 64 bytes. It is the context's own, grows to the most
  // that was asked for, and is the next op's after this one.
  std::byte* scratch(std::size_t bytes) const;

 private:
  const Kernels* kernels_;
  mutable ThreadPool pool_;  // an op does not change what it computes by running on the pool
  mutable std::unique_ptr<std::byte[]> scratch_;
  mutable std::size_t scratch_bytes_ = 0;
};

}  // namespace tinyvllm
