// Kernels over one row of activations: normalisation, activation function, conversion.
#pragma once

#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

inline void rms_norm(const float* x, const float* weight, float eps, std::int64_t size,
                     float* out) {
  Float sums{};
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sums = multiply_add(load(x + i), load(x + i), sums);
  if (i < size) {
    const Float tail = load_partial(x + i, size - i);
    sums = multiply_add(tail, tail, sums);
  }
  const float mean = horizontal_sum(sums) / static_cast<float>(size);
  const Float scale = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for (i = 0; i + kLanes <= size; i += kLanes)
    store(out + i, load(x + i) * scale * load(weight + i));
  if (i < size) {
    store_partial(out + i,
                  load_partial(x + i, size - i) * scale * load_partial(weight + i, size - i),
                  size - i);
  }
}

inline void divide(const float* sums, float total, std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = sums[i] / total;
}

// Below -88, where our e^-x ends, silu is 0 to within 1e-36; x * 0 lets infinity and NaN show.
TINYVLLM_INLINE Float silu(Float x) { return x < -88.0f ? x * 0.0f : x / (exp(-x) + 1.0f); }

inline void silu_mul(const float* gate, const float* up, std::int64_t size, float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
  if (i < size) {
    store_partial(out + i, silu(load_partial(gate + i, size - i)) * load_partial(up + i, size - i),
                  size - i);
  }
}

inline void convert_to_bfloat16(const float* x, std::int64_t size, BFloat16* out) {
  for (std::int64_t i = 0; i < size;
       ++i) {  // to_bfloat16 of base/bfloat16.h, in a form that vectorises
    std::uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t nan = (bits >> 16) | 0x40u;
    out[i].bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
}

inline void convert_to_float(const BFloat16* x, std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < size; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x[i].bits) << 16;
    __builtin_memcpy(out + i, &bits, sizeof(bits));
  }
}

}  // namespace tinyvllm::TINYVLLM_ISA
