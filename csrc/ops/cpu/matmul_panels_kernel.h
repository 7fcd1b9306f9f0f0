// The micro-kernel of y = x W^T with the weights in panels (ops/repack.h): outputs side by side in
// the lanes, an element of x broadcast to all of them. See MatmulShare in kernels.h for what it
// computes and in which order it adds.
//
// Of x and of a panel a tile reads a few bytes a cycle, which the L2 cache gives with ease. What
// matters is that the weights get there in time. All panels of a share are one stream of memory,
// which is taken in blocks: all tiles of x multiply one block, and prefetch the next one meanwhile
// (docs/performance-cpu.md has the numbers).
#pragma once

#include <cstddef>

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

// How a lane of 32 bits is multiplied: a float32,
template <typename X, typename W>
struct LaneProduct {
  static constexpr int kDepth = 1, kParts = 1;
  TINYVLLM_INLINE static Float load_x(const X* p, int) { return broadcast(*p); }
  TINYVLLM_INLINE static Float load_w(const std::byte* lanes, int) {
    return load(reinterpret_cast<const float*>(lanes));
  }
  TINYVLLM_INLINE static Float accumulate(Float sum, Float x, Float w) {
    return multiply_add(x, w, sum);
  }
};

// or a pair of bfloat16, the second one first.
template <>
struct LaneProduct<float, BFloat16> {
  static constexpr int kDepth = 2, kParts = 2;
  TINYVLLM_INLINE static Float load_x(const float* p, int part) { return broadcast(p[1 - part]); }
  TINYVLLM_INLINE static Float load_w(const std::byte* lanes, int part) {
    return load_of_pairs(lanes, part);
  }
  TINYVLLM_INLINE static Float accumulate(Float sum, Float x, Float w) {
    return multiply_add(x, w, sum);
  }
};

#if defined(__AVX512BF16__)
template <>
struct LaneProduct<BFloat16, BFloat16> {  // vdpbf16ps, in the same order
  static constexpr int kDepth = 2, kParts = 1;
  TINYVLLM_INLINE static __m512bh load_x(const BFloat16* p, int) {
    std::int32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  TINYVLLM_INLINE static __m512bh load_w(const std::byte* lanes, int) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(lanes));
  }
  TINYVLLM_INLINE static Float accumulate(Float sum, __m512bh x, __m512bh w) {
    return _mm512_dpbf16_ps(sum, x, w);
  }
};
#endif

// Registers: the sums, kColumnVectors of weights, and an element of x. A panel is one column of a
// tile, or several where vectors are shorter.
inline constexpr int kColumnVectors = 2, kColumnOutputs = kColumnVectors * kLanes;
#if defined(__AVX512F__)
inline constexpr int kPanelTileRows = 12;  // 27 of 32 registers
#else
inline constexpr int kPanelTileRows = 6;  // 15 of 16
#endif

// A line of a panel is what all its lanes have of one step of k. A block is so many lines that the
// end of a tile costs little, and that this block and the next fit the L2 cache beside x.
inline constexpr std::int64_t kLaneBytes = 4, kLineBytes = kPanelOutputs * kLaneBytes;
inline constexpr std::int64_t kBlockLines = 512, kCacheLine = 64;
inline constexpr std::int64_t kPanelsCacheBytes = 512 * 1024;  // of x
// Rows of x that a panel of several blocks is multiplied with at a time: as many as fit at most.
inline constexpr std::int64_t kMostSumRows = kPanelsCacheBytes / (kBlockLines * kLaneBytes);

// One column of a block: what there is to multiply, and where the sums go on and end.
struct PanelBlock {
  const std::byte* lanes;  // the first line
  std::int64_t k, depth;   // elements of x
  std::int64_t n;          // the first output, within the share
  bool first, last;        // of the blocks of a panel
  float* sums;             // [rows of x, kColumnOutputs], between the blocks of a panel
};

template <int kRows, typename X, typename W>
TINYVLLM_INLINE void add_line(Float (&sums)[kRows][kColumnVectors],
                              const X* const (&x)[(kRows + 2) / 3], std::int64_t x_stride,
                              std::int64_t k, const std::byte* lanes) {
  using P = LaneProduct<X, W>;
#pragma GCC unroll 2
  for (int part = 0; part < P::kParts; ++part) {
    const auto w0 = P::load_w(lanes, part);
    const auto w1 = P::load_w(lanes + sizeof(Float), part);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const auto row = P::load_x(x[m / 3] + m % 3 * x_stride + k, part);
      sums[m][0] = P::accumulate(sums[m][0], row, w0);
      sums[m][1] = P::accumulate(sums[m][1], row, w1);
    }
  }
}

// Writes one row's sums to the outputs of a column: all of them, or what the share has left.
template <typename X, typename W>
TINYVLLM_INLINE void store_column(const MatmulShare<X, W>& share, std::int64_t m, std::int64_t n,
                                  const Float (&sums)[kColumnVectors]) {
  float* out = share.out + m * share.out_stride + n;
  const std::int64_t count = share.num_outputs - n;
  if (count >= kColumnOutputs) {
#pragma GCC unroll 2
    for (int v = 0; v < kColumnVectors; ++v) {
      Float total = sums[v];
      if (share.bias) total += load(share.bias + n + v * kLanes);
      if (share.accumulate) total = load(out + v * kLanes) + total;
      store(out + v * kLanes, total);
    }
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    float total = sums[i / kLanes][i % kLanes];
    if (share.bias) total += share.bias[n + i];
    out[i] = share.accumulate ? out[i] + total : total;
  }
}

// Rows m .. m + kRows of x with one column of a block. Meanwhile kPrefetch cache lines from
// `prefetch` on are fetched into the L2 cache with each line of the block.
template <int kRows, int kPrefetch, typename X, typename W>
void panel_tile(const MatmulShare<X, W>& share, std::int64_t m, const PanelBlock& block,
                const std::byte* prefetch) {
  constexpr int kDepth = LaneProduct<X, W>::kDepth;
  const auto kept = [&](int row, int v) {
    return block.sums + (m + row) * kColumnOutputs + v * kLanes;
  };
  Float sums[kRows]
            [kColumnVectors];  // initialised one by one, as GCC clears larger arrays in memory
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kColumnVectors; ++v) {
      sums[row][v] = block.first ? Float{} : load(kept(row, v));
    }
  }
  // A pointer serves three rows, because x86 adds a register once or twice over: a pointer for each
  // would be more than there are registers.
  constexpr int kPointers = (kRows + 2) / 3;
  const X* x[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) x[i] = share.x + (m + 3 * i) * share.x_stride + block.k;
  const std::byte* lanes = block.lanes;
  std::int64_t k = 0;
  for (; k + kDepth <= block.depth; k += kDepth) {
#pragma GCC unroll 2
    for (int i = 0; i < kPrefetch; ++i) {
      __builtin_prefetch(prefetch, 0, 2);
      prefetch += kCacheLine;
    }
    add_line<kRows, X, W>(sums, x, share.x_stride, k, lanes);
    lanes += kLineBytes;
  }
  if (k < block.depth) {  // half a pair, whose other half is zero here as it is in the panel
    X padded[3 * kPointers][kDepth] = {};
    const X* rows[kPointers];
    for (int row = 0; row < kRows; ++row) padded[row][0] = x[row / 3][row % 3 * share.x_stride + k];
    for (int i = 0; i < kPointers; ++i) rows[i] = padded[3 * i];
    add_line<kRows, X, W>(sums, rows, kDepth, 0, lanes);
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    if (block.last) {
      store_column(share, m + row, block.n, sums[row]);
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < kColumnVectors; ++v) store(kept(row, v), sums[row][v]);
    }
  }
}

template <int kRows, int kPrefetch, typename X, typename W>
void panel_tile_of(std::int64_t rows, const MatmulShare<X, W>& share, std::int64_t m,
                   const PanelBlock& block, const std::byte* prefetch) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return panel_tile_of<kRows - 1, kPrefetch>(rows, share, m, block, prefetch);
    }
  }
  panel_tile<kRows, kPrefetch>(share, m, block, prefetch);
}

// All rows of the share, in tiles as equal as can be, with one block of `lines` lines. The next
// block, which lies behind it, is prefetched by the one tile, or half by half by the first two and
// once more by two others: the hardware drops prefetches when it is busy.
template <typename X, typename W>
void multiply_block(const MatmulShare<X, W>& share, PanelBlock block, std::int64_t lines) {
  constexpr int kColumns = kPanelOutputs / kColumnOutputs;
  const std::int64_t tiles = (share.num_rows + kPanelTileRows - 1) / kPanelTileRows;
  const std::byte* next = block.lanes + lines * kLineBytes;
  std::int64_t turn = 0;
  for (int column = 0; column < kColumns; ++column) {
    for (std::int64_t tile = 0; tile < tiles; ++tile, ++turn) {
      const std::int64_t m = share.num_rows * tile / tiles;
      const std::int64_t rows = share.num_rows * (tile + 1) / tiles - m;
      if (tiles * kColumns == 1) {
        panel_tile_of<kPanelTileRows, 2>(rows, share, m, block, next);
      } else if (turn < 4) {
        const std::byte* half = next + turn % 2 * lines * kCacheLine;
        panel_tile_of<kPanelTileRows, 1>(rows, share, m, block, half);
      } else {
        panel_tile_of<kPanelTileRows, 0>(rows, share, m, block, nullptr);
      }
    }
    block.lanes += kColumnOutputs * kLaneBytes;
    block.n += kColumnOutputs;
    block.sums += share.num_rows * kColumnOutputs;
  }
}

// All panels of the share, block after block.
template <typename X, typename W>
void multiply_panels(const MatmulShare<X, W>& share) {
  constexpr int kDepth = LaneProduct<X, W>::kDepth;
  const std::int64_t lines = (share.depth + kDepth - 1) / kDepth;
  const std::int64_t blocks = (lines + kBlockLines - 1) / kBlockLines;
  const auto* lanes = reinterpret_cast<const std::byte*>(share.weight);
  alignas(kCacheLine) float sums[kMostSumRows * kPanelOutputs];
  for (std::int64_t n = 0; n < share.num_outputs; n += kPanelOutputs) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t first = lines * block / blocks;
      const std::int64_t count = lines * (block + 1) / blocks - first;
      const std::int64_t k = first * kDepth, rest = share.depth - k;
      const std::int64_t depth = count * kDepth < rest ? count * kDepth : rest;
      multiply_block(share, {lanes, k, depth, n, block == 0, block + 1 == blocks, sums}, count);
      lanes += count * kLineBytes;
    }
  }
}

// Into how many blocks rows of x are cut, so that the cache holds one, or which has two tiles.
inline std::int64_t blocks_of_x(std::int64_t num_rows, std::int64_t row_bytes) {
  const std::int64_t fit = kPanelsCacheBytes / row_bytes, least = 2 * kPanelTileRows;
  const std::int64_t most_rows = fit > least ? fit : least;
  return (num_rows + most_rows - 1) / most_rows;
}

template <typename X, typename W>
void matmul_panels(const MatmulShare<X, W>& share) {
  const std::int64_t row_bytes = share.depth * static_cast<std::int64_t>(sizeof(X));
  const std::int64_t blocks = blocks_of_x(share.num_rows, row_bytes);
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t m = share.num_rows * block / blocks;
    MatmulShare<X, W> rows = share;
    rows.x += m * share.x_stride;
    rows.out += m * share.out_stride;
    rows.num_rows = share.num_rows * (block + 1) / blocks - m;
    multiply_panels(rows);
  }
}

}  // namespace tinyvllm::TINYVLLM_ISA
