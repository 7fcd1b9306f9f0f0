// What every op on the GPU gets first: the device, its stream, cuBLASLt, and scratch memory.
//
// One context is one device and one stream. Ops are asynchronous: they return when their kernels are
// queued. All pointers that they are given are device memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/errors.h"
#include "base/memory.h"

struct CUstream_st;

namespace tinyvllm {

namespace cuda {
class CublasLt;
}

class CudaContext {
 public:
  // batch_invariant: every op gives the same bits whatever else is in the batch
  // (docs/promises.md, 2).
  // library_directories: where cuBLASLt is looked for first, before the system's own places.
  // Throws DeviceError: "device cuda: no NVIDIA driver", no such device, or cuBLASLt not found.
  explicit CudaContext(int device = 0, bool batch_invariant = false,
                       const std::vector<std::string>& library_directories = {});
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  // Whether this machine has a driver and a GPU that it shows.
  static bool is_available();

  const std::string& name() const;  // of the card
  CUstream_st* stream() const;
  int num_multiprocessors() const;
  int compute_capability() const;        // 90 for 9.0
  std::size_t max_shared_bytes() const;  // a block may ask for, opted in
  bool batch_invariant() const;
  const cuda::CublasLt& cublaslt() const;

  // Device memory, aligned to 256, with anything in it. Throws CapacityError with the purpose, the
  // bytes and what is free.
  Memory allocate(std::size_t bytes, const char* purpose = "activations") const;

  // How far apart the rows of a product's x lie, in elements.
  std::int64_t operand_stride(DType /*dtype*/, std::int64_t cols) const { return cols; }

  // What matmul writes where its result is neither logits nor added to the residual stream.
  DType product_dtype(DType compute) const { return compute; }

  // For how many of a batch's tokens norm_swiglu wants memory for gate and up.
  static std::int64_t gate_up_rows(std::int64_t num_tokens) { return num_tokens; }

  // CUDA keeps the current device for each thread: a thread other than the one that made the context
  // calls this before it uses the context or allocates for it.
  void activate() const;

  // Waits for everything queued so far. Throws Error for what failed in it.
  void synchronize() const;

  // Scratch memory for one op, aligned to 256, with anything in it: from here to the end of the op's
  // last kernel it is the op's, then the next op's. It lies at one address as long as the context
  // lives. Throws Error where more is asked for than was reserved.
  std::byte* workspace(std::size_t bytes) const;
  // Reserves it; not while a graph is recorded, nor after one that uses it was.
  void reserve_workspace(std::size_t bytes);

  // Counters for kernels whose blocks have to find out which of them is the last. They are zero, and
  // whoever uses them leaves them zero.
  static constexpr std::size_t kNumCounters = 65536;
  std::uint32_t* counters() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tinyvllm
