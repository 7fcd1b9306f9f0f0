// Philox4x32-10 (Salmon et al. 2011): random numbers without state. The same key and counter give
// the same number on any device, in any order.
#pragma once

#include <array>
#include <cstdint>

namespace tinyvllm {

inline constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// One round on the counter (a, b, c, d).
constexpr void philox_round(std::uint32_t& a, std::uint32_t& b, std::uint32_t& c, std::uint32_t& d,
                            std::uint32_t key0, std::uint32_t key1) {
  const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * a;
  const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c;
  a = static_cast<std::uint32_t>(product1 >> 32) ^ b ^ key0;
  b = static_cast<std::uint32_t>(product1);
  c = static_cast<std::uint32_t>(product0 >> 32) ^ d ^ key1;
  d = static_cast<std::uint32_t>(product0);
}

constexpr std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 2> key,
                                              std::array<std::uint32_t, 4> counter) {
  for (int round = 0; round < 10; ++round) {
    philox_round(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
    key[0] += kPhiloxWeyl0;
    key[1] += kPhiloxWeyl1;
  }
  return counter;
}

}  // namespace tinyvllm
