// The one way to start a kernel. It checks for errors, takes the context's stream, sets the launch
// attributes, and is where the emulator takes over.
#pragma once

#include <cstddef>

#include "cuda/context.h"
#include "cuda/device.h"

namespace tinyvllm::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
  // The kernel may begin while the one before it still runs (compute capability 9.0; else it has no
  // effect). It then keeps the third rule of device.h.
  bool overlaps_previous = false;
};

// Throws DeviceError with the name of the kernel, the shape and CUDA's own words.
//
//   launch(ctx, "rms_norm", {.grid = rows, .block = 256}, rms_norm_kernel<BFloat16>, x, weight, ...);
template <typename... Parameters, typename... Arguments>
void launch(const CudaContext& ctx, const char* name, const LaunchShape& shape,
            void (*kernel)(Parameters...), Arguments... arguments);

}  // namespace tinyvllm::cuda
