#include <cstdint>

#include "cuda/launch.h"
#include "ops/host_copy.h"

namespace tinyvllm {
namespace {

constexpr int kThreads = 256;

__global__ void push_to_host_kernel(const std::uint32_t* device, std::uint32_t* host,
                                    std::uint32_t num_words) {
  cuda::let_next_begin();
  cuda::wait_for_previous();
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < num_words) host[i] = device[i];
}

}  // namespace

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
