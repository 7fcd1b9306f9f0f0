// Loops that do nothing but read, and nothing but multiply: what the other kernels are held against
// (ops/machine_limits.h).
#pragma once

#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

// As four streams, a quarter of the data each: one stream leaves the memory idle while the hardware
// prefetcher finds its way into every new page.
inline std::uint32_t read(const std::uint32_t* data, std::int64_t size) {
  constexpr int kStreams = 4;
  const std::int64_t part = size / kStreams;
  UInt sums[kStreams] = {};
  for (std::int64_t i = 0; i < part; i += kLanes) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      UInt v;
      __builtin_memcpy(&v, data + s * part + i, sizeof(v));
      sums[s] ^= v;
    }
  }
  const UInt all = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  std::uint32_t checksum = 0;
  for (int lane = 0; lane < kLanes; ++lane) checksum ^= all[lane];
  return checksum;
}

// Twelve accumulators: as many as hide the latency of the instruction on every CPU we know, and no
// more than the 16 registers of AVX2 hold beside the operands.
inline double multiply_registers(std::int64_t rounds, const float* operands, float* result) {
  constexpr int kAccumulators = 12;
  Float sums[kAccumulators];
  // Were they alike, the compiler would compute one and say that it was twelve.
  for (int i = 0; i < kAccumulators; ++i) sums[i] = broadcast(static_cast<float>(i));
#if defined(__AVX512BF16__)
  constexpr int kFlops = 4 * kLanes;  // a lane multiplies and adds two pairs
  const auto a = reinterpret_cast<__m512bh>(load(operands));
  const auto b = reinterpret_cast<__m512bh>(load(operands + kLanes));
#else
  constexpr int kFlops = 2 * kLanes;  // bfloat16 is widened before, which this does not count
  const Float a = load(operands), b = load(operands + kLanes);
#endif
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) {
#if defined(__AVX512BF16__)
      sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
#else
      sums[i] = multiply_add(a, b, sums[i]);
#endif
    }
  }
  Float all{};
  for (int i = 0; i < kAccumulators; ++i) all += sums[i];
  *result = horizontal_sum(all);
  return static_cast<double>(rounds) * kAccumulators * kFlops;
}

}  // namespace tinyvllm::TINYVLLM_ISA
