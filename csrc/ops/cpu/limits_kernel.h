// Loops that do nothing but read, and nothing but multiply: what the other kernels are held against
// (ops/machine_limits.h).
#pragma once

#if defined(__AMX_BF16__)
#include "ops/cpu/amx.h"
#endif
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

#if defined(__AMX_BF16__)
// Four tiles of sums hide the latency of a multiplication, 52 cycles, of which one begins every 16.
inline double multiply_registers(std::int64_t rounds, const float* operands, float* result) {
  constexpr int kSums = 4, kLeft = 4, kRight = 5;
  TileConfig config;
  for (int tile = 0; tile <= kRight; ++tile) config.set(tile, kTileSide, kTileRowBytes);
  configure_tiles(config);
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  load_tile<kLeft>(operands, 0);  // each of its rows the same
  load_tile<kRight>(operands + kLanes, 0);
  for (std::int64_t round = 0; round < rounds; ++round) {
    multiply_tiles<0, kLeft, kRight>();
    multiply_tiles<1, kLeft, kRight>();
    multiply_tiles<2, kLeft, kRight>();
    multiply_tiles<3, kLeft, kRight>();
  }
  alignas(64) float sums[kTileFloats];
  store_tile<0>(sums, kTileRowBytes);
  release_tiles();
  *result = horizontal_sum(load(sums));
  return static_cast<double>(rounds) * kSums * kTileFloats * kTileDepth * 2;
}
#else
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
#endif

}  // namespace tinyvllm::TINYVLLM_ISA
