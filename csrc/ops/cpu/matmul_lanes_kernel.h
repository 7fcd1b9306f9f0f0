// The micro-kernel of y = x W^T for many rows of x and weights in rows: the sums of matmul_kernel.h to
// the bit, in the loops of matmul_panels_kernel.h.
//
// A vector of sums of a dot product is kLanes sums of their own: lane l adds up what lies in lane l of
// each step of k. So the weights are copied, some outputs at a time, into a small panel for each lane,
// in which these outputs lie side by side, and x has for each lane what it is multiplied with. A tile
// adds up one lane after the other, and the lanes in the order of horizontal_sums. Copying costs about
// as much as multiplying with seven rows of x; a tile then reads a quarter of the bytes, or with
// shorter vectors a third (docs/performance-cpu.md has the numbers).
#pragma once

#include <cstddef>

#include "ops/cpu/kernels.h"
#include "ops/cpu/matmul_panels_kernel.h"
#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

// Lanes in the order in which their sums are added up: those at turns 2i and 2i + 1 first, these pairs
// in the same way, and so on. It is the tree of horizontal_sums.
constexpr int lane_at(int turn) {
  const auto swap = [](int two_bits) { return (two_bits & 1) << 1 | two_bits >> 1; };
  const int four = turn >> 2;
  return swap(turn & 3) | (kLanes == 16 ? swap(four) : four) << 2;
}
inline constexpr int kLevels = __builtin_ctz(kLanes);  // of that tree

// The elements of a lane, and of a step of k: a vector of weights.
template <typename W>
inline constexpr std::int64_t kLaneDepth = kLaneBytes / static_cast<std::int64_t>(sizeof(W));
template <typename W>
inline constexpr std::int64_t kStepDepth = kLanes * kLaneDepth<W>;
template <typename W>
constexpr std::int64_t lane_steps(std::int64_t depth) {  // the last one filled up with zeros
  return (depth + kStepDepth<W> - 1) / kStepDepth<W>;
}

TINYVLLM_INLINE float widen(float value) { return value; }
TINYVLLM_INLINE float widen(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  return __builtin_bit_cast(float, bits);
}

// A row of x, [turn][step][elements of a lane of W].
template <typename X, typename W>
void lane_row(const X* x, std::int64_t size, float* out) {
  constexpr std::int64_t kLane = kLaneDepth<W>, kStep = kStepDepth<W>;
  const std::int64_t steps = lane_steps<W>(size);
  const auto put = [&](const X* from, std::int64_t step) {
    for (int turn = 0; turn < kLanes; ++turn) {
      for (std::int64_t i = 0; i < kLane; ++i) {
        out[(turn * steps + step) * kLane + i] = widen(from[lane_at(turn) * kLane + i]);
      }
    }
  };
  std::int64_t step = 0;
  for (; (step + 1) * kStep <= size; ++step) put(x + step * kStep, step);
  if (step < steps) {
    X padded[kStep] = {};
    for (std::int64_t i = step * kStep; i < size; ++i) padded[i - step * kStep] = x[i];
    put(padded, step);
  }
}

// The panels of all lanes of kColumnOutputs outputs, [turn][step][output]. They begin an odd number of
// cache lines apart, so that what is written at a time does not all fall into one set of the L1 cache.
inline constexpr std::int64_t kColumnBytes = kColumnOutputs * kLaneBytes;
constexpr std::int64_t panel_bytes(std::int64_t steps) {
  return (((steps * kColumnBytes + kCacheLine - 1) / kCacheLine) | 1) * kCacheLine;
}

template <typename W>
void copy_lanes(const W* rows, std::int64_t num_rows, std::int64_t depth, std::byte* panels) {
  constexpr std::int64_t kStep = kStepDepth<W>;
  const std::int64_t steps = lane_steps<W>(depth), whole = depth / kStep;
  for (int v = 0; v < kColumnVectors; ++v, rows += kLanes * depth, num_rows -= kLanes) {
    for (std::int64_t step = 0; step < steps; ++step) {
      const W* from = rows + step * kStep;
      Float tile[kLanes] = {};
      if (step < whole && num_rows >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          __builtin_memcpy(&tile[i], from + i * depth, sizeof(Float));
        }
      } else {
        const std::int64_t rest = depth - step * kStep, count = rest < kStep ? rest : kStep;
        for (std::int64_t i = 0; i < kLanes && i < num_rows; ++i) {
          W padded[kStep] = {};
          for (std::int64_t k = 0; k < count; ++k) padded[k] = from[i * depth + k];
          __builtin_memcpy(&tile[i], padded, sizeof(Float));
        }
      }
      transpose(tile);
      std::byte* out = panels + step * kColumnBytes + v * static_cast<std::int64_t>(sizeof(Float));
#pragma GCC unroll 16
      for (int turn = 0; turn < kLanes; ++turn) {
        __builtin_memcpy(out + turn * panel_bytes(steps), &tile[lane_at(turn)], sizeof(Float));
      }
    }
  }
}

// Rows m .. m + kRows of x with the panels of the outputs from n on. kPrefetch: meanwhile half of the
// next outputs' weights, from `prefetch` on, is fetched into the L2 cache.
template <int kRows, bool kPrefetch, typename W>
void lane_tile(const MatmulShare<float, W>& share, std::int64_t m, std::int64_t n,
               const std::byte* panels, const std::byte* prefetch) {
  constexpr int kPointers = (kRows + 2) / 3;
  const std::int64_t steps = lane_steps<W>(share.depth);
  const float* x[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) x[i] = share.x + (m + 3 * i) * share.x_stride;
  Float pending[kLevels][kRows][kColumnVectors];
  for (int turn = 0; turn < kLanes; ++turn) {
    Float sums[kRows][kColumnVectors] = {};
    const std::byte* lanes = panels + turn * panel_bytes(steps);
    const std::int64_t first = turn * steps * kLaneDepth<W>;
    for (std::int64_t step = 0; step < steps; ++step) {
      if constexpr (kPrefetch) {
        __builtin_prefetch(prefetch, 0, 2);
        prefetch += kColumnBytes / 2;
      }
      add_line<kRows, float, W>(sums, x, share.x_stride, first + step * kLaneDepth<W>, lanes);
      lanes += kColumnBytes;
    }
    int level = 0;
    for (; (turn >> level & 1) != 0; ++level) {
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int v = 0; v < kColumnVectors; ++v) {
          sums[row][v] = pending[level][row][v] + sums[row][v];
        }
      }
    }
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      if (level == kLevels) {
        store_column(share, m + row, n, sums[row]);
      } else {
#pragma GCC unroll 2
        for (int v = 0; v < kColumnVectors; ++v) pending[level][row][v] = sums[row][v];
      }
    }
  }
}

template <int kRows, bool kPrefetch, typename W>
void lane_tile_of(std::int64_t rows, const MatmulShare<float, W>& share, std::int64_t m,
                  std::int64_t n, const std::byte* panels, const std::byte* prefetch) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return lane_tile_of<kRows - 1, kPrefetch>(rows, share, m, n, panels, prefetch);
    }
  }
  lane_tile<kRows, kPrefetch>(share, m, n, panels, prefetch);
}

// Rows [begin, end) of x with the panels of the outputs from n on. `next`: the weights behind these, to
// be prefetched half by half and twice (multiply_block says why), or null.
template <typename W>
void multiply_lanes(const MatmulShare<float, W>& share, std::int64_t begin, std::int64_t end,
                    std::int64_t n, const std::byte* panels, const W* next) {
  const std::int64_t tiles = (end - begin + kPanelTileRows - 1) / kPanelTileRows;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t m = begin + (end - begin) * tile / tiles;
    const std::int64_t rows = begin + (end - begin) * (tile + 1) / tiles - m;
    if (next != nullptr && tile < 4) {
      const W* half = next + tile % 2 * (kColumnOutputs / 2) * share.depth;
      lane_tile_of<kPanelTileRows, true>(rows, share, m, n, panels,
                                         reinterpret_cast<const std::byte*>(half));
    } else {
      lane_tile_of<kPanelTileRows, false>(rows, share, m, n, panels, nullptr);
    }
  }
}

// As many outputs at a time as there is memory for panels, with as many rows of x as a cache holds.
// The panels are made for the first of these rows.
template <typename W>
void matmul_lanes(const MatmulShare<float, W>& share) {
  const std::int64_t row_bytes = share.x_stride * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t blocks = blocks_of_x(share.num_rows, row_bytes);
  const std::int64_t column_bytes = kLanes * panel_bytes(lane_steps<W>(share.depth));
  const std::int64_t columns = lane_scratch(share.depth, sizeof(W)) * 4 / column_bytes;
  const std::int64_t outputs = columns * kColumnOutputs;
  for (std::int64_t first = 0; first < share.num_outputs; first += outputs) {
    const std::int64_t rest = share.num_outputs - first;
    const std::int64_t end = first + (rest < outputs ? rest : outputs);
    for (std::int64_t block = 0; block < blocks; ++block) {
      auto* panels = reinterpret_cast<std::byte*>(share.scratch);
      for (std::int64_t n = first; n < end; n += kColumnOutputs) {
        const W* weight = share.weight + n * share.depth;
        const W* next = nullptr;
        if (block == 0) {
          copy_lanes(weight, share.num_outputs - n, share.depth, panels);
          if (n + kColumnOutputs < share.num_outputs) next = weight + kColumnOutputs * share.depth;
        }
        multiply_lanes(share, share.num_rows * block / blocks,
                       share.num_rows * (block + 1) / blocks, n, panels, next);
        if (blocks > 1) panels += column_bytes;
      }
    }
  }
}

}  // namespace tinyvllm::TINYVLLM_ISA
