// The emulated device: what launch.h and cublaslt.h need of it beyond the runtime's own functions.
//
// A stream is a queue. What is put into it waits there until somebody waits for the device; then one
// of the streams that can go on is drawn, and its first entry runs, until what was waited for is
// done. So nothing happens earlier than the program asked for, and only the order that it asked for
// is kept: within a stream, and where an event says so. In particular
//
//   - the host's memory of an asynchronous copy is read when the copy runs, not when it is queued;
//   - some blocks of a kernel that overlaps_previous run up to wait_for_previous() before the kernel
//     in front of it begins;
//   - a captured graph is a list of launches with their arguments; a replay runs it as it was.
//
// Device memory starts as NaN bytes and becomes NaN bytes again when it is freed. A kernel whose
// pointer arguments are not in memory that is allocated at that moment is refused.
//
// The order is drawn from the seed TINYVLLM_EMULATOR_SEED (default 1). The memory is as large as
// TINYVLLM_EMULATOR_MEMORY says, in MiB (default 512).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace tinyvllm::cuda::emulator {

// Queues a kernel. Returns cudaErrorInvalidConfiguration for a shape that no GPU takes.
cudaError_t launch(cudaStream_t stream, Kernel kernel);

// Queues something else that reads and writes device memory.
cudaError_t enqueue(cudaStream_t stream, const std::string& name, std::function<void()> action);

template <typename... Parameters, typename... Arguments>
Kernel make_kernel(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
                   bool overlaps_previous, void (*function)(Parameters...),
                   Arguments... arguments) {
  Kernel kernel{name, grid, block, shared_bytes, overlaps_previous, {}, {}};
  std::tuple<std::remove_cv_t<Parameters>...> values(arguments...);
  std::apply(
      [&](const auto&... value) {
        const auto collect = [&](const auto& one) {
          if constexpr (std::is_pointer_v<std::remove_cvref_t<decltype(one)>>) {
            if (one != nullptr) kernel.pointers.push_back(one);
          }
        };
        (collect(value), ...);
      },
      values);
  kernel.call = [function, values] { std::apply(function, values); };
  return kernel;
}

}  // namespace tinyvllm::cuda::emulator
