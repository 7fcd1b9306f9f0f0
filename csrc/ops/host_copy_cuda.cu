#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"
#include "ops/host_copy.h"

namespace tinyvllm {
namespace {

constexpr int kThreads = 256;

// The words that are surely there are asked for together with the length: the way to the host and
// back takes a microsecond.
__global__ void pull_from_host_kernel(const uint4* host, uint4* device, std::uint32_t num_sure) {
  const std::uint32_t step = gridDim.x * blockDim.x;
  std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  uint4 word{};
  if (i < num_sure) word = host[i];
  const std::uint32_t num_words = *reinterpret_cast<const volatile std::uint32_t*>(host);
  if (i < num_sure) {
    device[i] = word;
    i += step;
  }
  for (; i < num_words; i += step) device[i] = host[i];
}

__global__ void push_to_host_kernel(const std::uint32_t* device, std::uint32_t* host,
                                    std::uint32_t num_words) {
  cuda::let_next_begin();
  cuda::wait_for_previous();
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < num_words) host[i] = device[i];
}

}  // namespace

void pull_from_host(const CudaContext& ctx, const void* host, void* device,
                    std::size_t sure_bytes) {
  const auto num_sure = static_cast<std::uint32_t>(sure_bytes / sizeof(uint4));
  cuda::launch(ctx, "pull_from_host",
               {.grid = dim3(1 + 2 * num_sure / kThreads), .block = dim3(kThreads)},
               pull_from_host_kernel, static_cast<const uint4*>(host), static_cast<uint4*>(device),
               num_sure);
}

void push_to_host(const CudaContext& ctx, const void* device, void* host, std::size_t bytes) {
  const auto num_words = static_cast<std::uint32_t>(bytes / sizeof(std::uint32_t));
  cuda::launch(ctx, "push_to_host",
               {.grid = dim3((num_words + kThreads - 1) / kThreads),
                .block = dim3(kThreads),
                .overlaps_previous = true},
               push_to_host_kernel, static_cast<const std::uint32_t*>(device),
               static_cast<std::uint32_t*>(host), num_words);
}

}  // namespace tinyvllm
