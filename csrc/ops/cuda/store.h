// Rounding to the element type of an output, once, at the end.
#pragma once

#include <cstdint>

#include "base/bfloat16.h"
#include "cuda/device.h"

namespace tinyvllm::cuda {

__device__ inline void store(float* address, float value) { *address = value; }
__device__ inline void store(BFloat16* address, float value) {
  address->bits = static_cast<std::uint16_t>(pack_bfloat16(value, 0.0f));
}

}  // namespace tinyvllm::cuda
