// Reads device memory once, as fast as the card can: the limit that a benchmark holds kernels against
// whose time goes into reading weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinyvllm {

class CudaContext;

// checksum[0] += all 32-bit words of the memory. `memory` is aligned to 16, `bytes` a multiple of 16.
void read_memory(const CudaContext& ctx, const void* memory, std::size_t bytes,
                 std::uint32_t* checksum);

}  // namespace tinyvllm
