// Much host memory onto the device, at the speed of the bus: weights out of mapped files.
//
// The device reads at full speed only from pinned memory, and a mapped file is not. So several
// threads copy pieces into pinned buffers, two for each thread: while the device takes one, the
// thread fills the other.
#pragma once

#include <cstddef>
#include <span>

#include "cuda/context.h"

namespace tinyvllm::cuda {

struct Upload {
  void* device;
  const void* host;
  std::size_t bytes;
};

// Returns when all is there. Throws CapacityError for the pinned buffers, and Error.
void upload(const CudaContext& ctx, std::span<const Upload> pieces, int num_threads);

}  // namespace tinyvllm::cuda
