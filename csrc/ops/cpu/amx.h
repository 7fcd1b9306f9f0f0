// The tile registers of AMX (Intel's Advanced Matrix Extensions, 4th generation Xeon and later). A
// tile has up to 16 rows of up to 64 bytes, as configured; it is loaded from rows of memory any
// distance apart.
//
// tdpbf16ps multiplies a left tile of bfloat16 [M][32] with a right one [16][N][2], in which pairs
// along the depth lie side by side, and adds the products to a tile of float32 [M][N]: first those of
// the even elements of the depth and those of the odd ones, each over ascending k, then their sum to
// what was there. It takes a cycle for each of M rows, whatever N is.
//
// Denormals count as zero, and become zero. The compiler's own functions take their register as text, so
// that no constant can name it, and GCC's do not say that they read memory.
#pragma once

#include <cstdint>

#include "base/bfloat16.h"
#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

inline constexpr std::int64_t kTileSide = 16;              // rows, columns, or pairs of a full tile
inline constexpr std::int64_t kTileDepth = 2 * kTileSide;  // elements of k
inline constexpr std::int64_t kTileRowBytes = 64, kTileFloats = kTileSide * kTileSide;

// Numbers of registers, for what is done to several of them.
template <int... kNumbers>
struct Indices {};

// What ldtilecfg reads.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, std::int64_t num_rows, std::int64_t bytes) {
    rows[tile] = static_cast<std::uint8_t>(num_rows);
    row_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
};

static_assert(sizeof(TileConfig) == 64);

// The configuration of this thread's registers, until they are released.
TINYVLLM_INLINE void configure_tiles(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
TINYVLLM_INLINE void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

template <int kTile>
TINYVLLM_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
TINYVLLM_INLINE void load_tile(const void* first_row, std::int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(first_row), "r"(stride_bytes), "i"(kTile)
               : "memory");
}

template <int kTile>
TINYVLLM_INLINE void store_tile(void* first_row, std::int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(first_row), "r"(stride_bytes), "i"(kTile)
               : "memory");
}

// sums += left x right
template <int kSums, int kLeft, int kRight>
TINYVLLM_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

}  // namespace tinyvllm::TINYVLLM_ISA
