// The one way to start a kernel. It checks for errors, takes the context's stream, sets the launch
// attributes, and is where the emulator takes over.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/context.h"
#include "cuda/device.h"
#include "cuda/error.h"
#if defined(TINYVLLM_CUDA_EMULATE)
#include "cuda/emulator/runtime.h"
#endif

namespace tinyvllm::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
  // The kernel may begin while the one before it still runs (compute capability 9.0; else it has no
  // effect). It then keeps the third rule of device.h.
  bool overlaps_previous = false;
};

// Throws Error with the name of the kernel, the shape and CUDA's own words. A grid without
// blocks is nothing to do.
//
//   launch(ctx, "rms_norm", {.grid = rows, .block = 256}, rms_norm_kernel<BFloat16>, x, weight, ...);
template <typename... Parameters, typename... Arguments>
void launch(const CudaContext& ctx, const char* name, const LaunchShape& shape,
            void (*kernel)(Parameters...), Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
#if defined(TINYVLLM_CUDA_EMULATE)
  const cudaError_t error = emulator::launch(
      ctx.stream(), emulator::make_kernel(name, shape.grid, shape.block, shape.shared_bytes,
                                          shape.overlaps_previous, kernel, arguments...));
#else
  // Two kernels share a multiprocessor only if it is split into L1 cache and shared memory as both
  // want it: those that overlap all want as much shared memory as there is.
  cudaLaunchAttribute overlap[2] = {};
  overlap[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap[0].val.programmaticStreamSerializationAllowed = 1;
  overlap[1].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  overlap[1].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = ctx.stream();
  config.attrs = overlap;
  config.numAttrs = shape.overlaps_previous && ctx.compute_capability() >= 90 ? 2 : 0;

  constexpr std::size_t kSharedWithoutOptIn = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kSharedWithoutOptIn) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
  }
  if (error == cudaSuccess) {
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
#endif
  if (error != cudaSuccess) {
    const auto text = [](dim3 d) {
      return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
    };
    throw Error("cuda: kernel " + std::string(name) + ", grid " + text(shape.grid) + ", block " +
                text(shape.block) + ", " + std::to_string(shape.shared_bytes) +
                " bytes of shared memory: " + sentence(cudaGetErrorString(error)));
  }
}

}  // namespace tinyvllm::cuda
