// What every op on the GPU gets first: the device, its stream, cuBLASLt, and scratch memory.
//
// One context is one device and one stream. Ops are asynchronous: they return when their kernels are
// queued. All pointers that they are given are device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/errors.h"

struct CUstream_st;

namespace tinyvllm {

class CudaContext {
 public:
  // Throws DeviceError: "device cuda: no NVIDIA driver", no such device, or cuBLASLt not found.
  // batch_invariant: every op gives the same bits whatever else is in the batch (DESIGN 4.2).
  explicit CudaContext(int device = 0, bool batch_invariant = false);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  CUstream_st* stream() const;
  int num_multiprocessors() const;
  int compute_capability() const;             // 90 for 9.0
  std::size_t max_shared_bytes() const;       // a block may ask for, opted in
  bool batch_invariant() const;

  // Waits for everything queued so far. Throws DeviceError for what failed in it.
  void synchronize() const;
};

}  // namespace tinyvllm
