#include "cuda/launch.h"
#include "ops/read_memory.h"

namespace tinyvllm {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kLoads = 8;  // in flight a thread

__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* memory, std::size_t count, std::uint32_t* checksum) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * kThreads;
  std::uint32_t sum = 0;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += kLoads * stride) {
    uint4 loaded[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      loaded[j] = i + j * stride < count ? cuda::load_streaming(memory + i + j * stride)
                                         : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      sum += loaded[j].x + loaded[j].y + loaded[j].z + loaded[j].w;
    }
  }
#pragma unroll
  for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(cuda::kAllLanes, sum, offset);
  }
  if (threadIdx.x % cuda::kWarpSize == 0) atomicAdd(checksum, sum);
}

}  // namespace

void read_memory(const CudaContext& ctx, const void* memory, std::size_t bytes,
                 std::uint32_t* checksum) {
  cuda::launch(
      ctx, "read_memory",
      {.grid = dim3(static_cast<unsigned>(kBlocksPerMultiprocessor * ctx.num_multiprocessors())),
       .block = dim3(kThreads)},
      read_kernel, static_cast<const uint4*>(memory), bytes / sizeof(uint4), checksum);
}

}  // namespace tinyvllm
