// The random part of sampling, the same on the CPU and on the GPU.
//
// A draw is the argmax of  logit / temperature + noise  with Gumbel noise (the Gumbel-max trick: it
// follows the softmax exactly). The noise of a token comes from Philox, keyed by the request's seed
// and counted by (token id, position, sample index), so that neither the order of the tokens, nor
// the batch, nor the device can change it.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "base/philox.h"

// nvcc takes constexpr functions into kernels; those that call a logarithm have to say so.
#if defined(__CUDACC__)
#define TINYVLLM_HOST_DEVICE __host__ __device__
#else
#define TINYVLLM_HOST_DEVICE
#endif

namespace tinyvllm {

// The random bits of the tokens 4 i .. 4 i + 3: one Philox call has room for four.
constexpr std::array<std::uint32_t, 4> token_noise(std::uint64_t seed, std::uint32_t sample_index,
                                                   std::uint32_t position, std::uint32_t i) {
  return philox({static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)},
                {i, position, sample_index, 0});
}

// The noise that 32 random bits give: -log(-log(u)) for u in the middle of one of 2^32 equal parts
// of (0, 1).
TINYVLLM_HOST_DEVICE inline double gumbel(std::uint32_t bits) {
  return -std::log(-std::log((static_cast<double>(bits) + 0.5) * 0x1p-32));
}

// Bounds of gumbel(bits) without a logarithm, from the number k of leading ones:
// 2^-(k + 1) <= 1 - u <= 2^-k.
constexpr float kLn2 = 0.693147181f;

// -log(-log(u)) <= -log(1 - u) <= (k + 1) log 2.
constexpr float gumbel_upper_bound(std::uint32_t bits) {
  return static_cast<float>(std::countl_one(bits) + 1) * kLn2;
}

// Where k > 0, u >= 1/2 and -log(u) <= 2 log(2) (1 - u), so that -log(-log(u)) >= k log 2 -
// log(2 log 2). The lowest noise of all is -log(33 log 2) = -3.13.
constexpr float gumbel_lower_bound(std::uint32_t bits) {
  const int ones = std::countl_one(bits);
  return ones > 0 ? static_cast<float>(ones) * kLn2 - 0.3267f : -3.14f;
}

}  // namespace tinyvllm
