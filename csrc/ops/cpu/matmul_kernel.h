// The micro-kernel of y = x W^T, both operands contiguous along the depth (k): dot products in a
// tile of registers. See MatmulShare in kernels.h for what it computes and in which order it adds.
//
// The weights come from main memory, or at best from the L3 cache, and are read once for all rows
// of x that fit the L2 cache. Two things make that fast (docs/performance-cpu.md has the numbers):
// with few rows of x, the outputs of a tile lie a run of rows apart, so that each is a long
// contiguous stream, which the hardware prefetches across pages, some with help; and where a tile's
// weights are used again for more rows of x, the next ones are prefetched meanwhile, several times.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

// How a pair of element types is loaded and multiplied. A step consumes kStep elements of k, in
// kParts vectors. kWhole: rows of x are filled up to whole steps.
template <typename X, typename W>
struct Product {
  static constexpr int kStep = kLanes, kParts = 1;
  static constexpr bool kWhole = false;
  TINYVLLM_INLINE static Float load_x(const X* p, int) { return load(p); }
  TINYVLLM_INLINE static Float load_w(const W* p, int) { return load(p); }
  TINYVLLM_INLINE static Float accumulate(Float sum, Float x, Float w) {
    return multiply_add(x, w, sum);
  }
};

// Pairs, the second elements first.
template <>
struct Product<float, BFloat16> {
  static constexpr int kStep = 2 * kLanes, kParts = 2;
  static constexpr bool kWhole = true;
  TINYVLLM_INLINE static Float load_x(const float* p, int part) { return load(p + part * kLanes); }
  TINYVLLM_INLINE static Float load_w(const BFloat16* p, int part) {
    return load_of_pairs(p, part);
  }
  TINYVLLM_INLINE static Float accumulate(Float sum, Float x, Float w) {
    return multiply_add(x, w, sum);
  }
};

// The same order, with x widened like the weights.
template <>
struct Product<BFloat16, BFloat16> : Product<float, BFloat16> {
  static constexpr bool kWhole = false;
  TINYVLLM_INLINE static Float load_x(const BFloat16* p, int part) { return load_w(p, part); }
};

// A step of x in pair order.
TINYVLLM_INLINE void pair_step(const float* x, float* out) {
  for (int i = 0; i < kLanes; ++i) {
    out[i] = x[2 * i + 1];
    out[kLanes + i] = x[2 * i];
  }
}
TINYVLLM_INLINE void pair_step(const BFloat16* x, float* out) {
  for (int part = 0; part < 2; ++part) {
    store(out + part * kLanes, load_of_pairs(x, part));
  }
}

template <typename X>
void pair_row(const X* x, std::int64_t size, float* out) {
  constexpr int kStep = Product<float, BFloat16>::kStep;
  std::int64_t k = 0;
  for (; k + kStep <= size; k += kStep) pair_step(x + k, out + k);
  for (; k < whole_steps(size); k += kStep) {
    X padded[kStep] = {};
    for (std::int64_t i = 0; k + i < size && i < kStep; ++i) padded[i] = x[k + i];
    pair_step(padded, out + k);
  }
}

// The horizontal sums of four vectors, side by side. Of each, lane i takes lane i + 2 in every four,
// then lane i + 1; what is left of the fours is halved until one is left. In this order, and not in
// that of horizontal_sum, most shuffles stay within 128 bits, where they are cheapest.
TINYVLLM_INLINE Float4 horizontal_sums(Float a, Float b, Float c, Float d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512 fours =
      _mm512_shuffle_ps(ab, cd, 0b01'00'01'00) + _mm512_shuffle_ps(ab, cd, 0b11'10'11'10);
  const __m256 half = _mm512_castps512_ps256(fours) + _mm512_extractf32x8_ps(fours, 1);
#elif defined(__AVX2__)
  const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const __m256 half =
      _mm256_shuffle_ps(ab, cd, 0b01'00'01'00) + _mm256_shuffle_ps(ab, cd, 0b11'10'11'10);
#endif
#if defined(__AVX2__)
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#else
  const Float ab =
      __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Float cd =
      __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

// Registers: kTileRows x kTileOutputs sums, a vector of each row of x and one of weights.
inline constexpr int kTileOutputs = 4, kMostTileOutputs = 8;
#if defined(__AVX512F__)
inline constexpr int kTileRows = 6;  // 31 of 32 registers
#else
inline constexpr int kTileRows = 3;  // 16 of 16
#endif

// Up to so many rows of x, one tile has them all and reads eight streams of weights, or four, for which
// it asks so many bytes ahead: what a Xeon reads fastest; others nobody has measured.
inline constexpr std::int64_t kEightStreamsRows = kTileRows / 2, kFourStreamsRows = kTileRows;
inline constexpr std::int64_t kBytesAhead = 512;

// Where several tiles share weights, the first of them prefetch the next ones, so many rows each in turn:
// the hardware drops a prefetch when it is busy, so that a line needs several chances.
inline constexpr int kPrefetchedRows = 2, kPrefetchingTiles = 4;

// What a tile of the rows of x is multiplied with: as many rows of the weight as it has outputs. They
// lie `run` rows apart, at the share's output n.
struct Group {
  std::int64_t n, run;
};

// What a tile prefetches into the L2 cache while it computes: rows of weights, at the pace at which
// it reads its own. A nearer cache or a faster pace was slower.
struct Prefetch {
  const char* rows[kMostTileOutputs];

  template <int kCount>
  TINYVLLM_INLINE void at(std::int64_t bytes) const {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) __builtin_prefetch(rows[i] + bytes, 0, 2);
  }
};

template <int kRows, int kOutputs, typename X, typename W>
TINYVLLM_INLINE void add_step(Float (&sums)[kRows][kOutputs], const X* x, std::int64_t x_stride,
                              const W* weight, std::int64_t weight_stride) {
  using P = Product<X, W>;
#pragma GCC unroll 2
  for (int part = 0; part < P::kParts; ++part) {
    decltype(P::load_x(x, part)) rows[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) rows[m] = P::load_x(x + m * x_stride, part);
#pragma GCC unroll 8
    for (int n = 0; n < kOutputs; ++n) {
      const auto w = P::load_w(weight + n * weight_stride, part);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) sums[m][n] = P::accumulate(sums[m][n], rows[m], w);
    }
  }
}

// The outputs [kRows, kOutputs] at row m of the share and of one group.
template <int kRows, int kOutputs, int kPrefetch, typename X, typename W>
void matmul_tile(const MatmulShare<X, W>& share, std::int64_t m, Group group,
                 const Prefetch& prefetch) {
  using P = Product<X, W>;
  constexpr int kStep = P::kStep;
  const X* x = share.x + m * share.x_stride;
  const W* weight = share.weight + group.n * share.depth;
  const std::int64_t weight_stride = group.run * share.depth;
  Float sums[kRows][kOutputs] = {};
  std::int64_t k = 0;
  const Prefetch ahead = prefetch;
  for (; k + kStep <= share.depth; k += kStep) {
    ahead.at<kPrefetch>(k * static_cast<std::int64_t>(sizeof(W)));
    add_step<kRows, kOutputs>(sums, x + k, share.x_stride, weight + k, weight_stride);
  }
  if (k < share.depth) {  // the last, partial step: padded with zeros, which add nothing
    X x_padded[kRows][kStep] = {};
    W weight_padded[kOutputs][kStep] = {};
    for (int row = 0; row < kRows; ++row) {
      const std::int64_t count = P::kWhole ? kStep : share.depth - k;
      for (std::int64_t i = 0; i < count; ++i) x_padded[row][i] = x[row * share.x_stride + k + i];
    }
    for (std::int64_t i = 0; k + i < share.depth; ++i) {
      for (int o = 0; o < kOutputs; ++o) weight_padded[o][i] = weight[o * weight_stride + k + i];
    }
    add_step<kRows, kOutputs>(sums, &x_padded[0][0], kStep, &weight_padded[0][0], kStep);
  }
  constexpr int kFours = (kOutputs + 3) / 4, kFour = kOutputs < 4 ? kOutputs : 4;
  Float4 bias[kFours] = {};
  if (share.bias) {
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) bias[o / 4][o % 4] = share.bias[group.n + o * group.run];
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    float* out = share.out + (m + row) * share.out_stride + group.n;
    const auto sum = [&](int o) { return o < kOutputs ? sums[row][o] : Float{}; };
#pragma GCC unroll 2
    for (int i = 0; i < kFours; ++i, out += 4 * group.run) {
      Float4 totals = horizontal_sums(sum(4 * i), sum(4 * i + 1), sum(4 * i + 2), sum(4 * i + 3));
      if (share.bias) totals += bias[i];  // -0 + 0 is not -0
      if (share.accumulate) {
        Float4 old = {};
#pragma GCC unroll 4
        for (int o = 0; o < kFour; ++o) old[o] = out[o * group.run];
        totals = old + totals;
      }
      if (kFour == 4 && group.run == 1) {
        __builtin_memcpy(out, &totals, sizeof(totals));
      } else {
#pragma GCC unroll 4
        for (int o = 0; o < kFour; ++o) out[o * group.run] = totals[o];
      }
    }
  }
}

template <int kRows, int kOutputs, int kPrefetch, typename X, typename W>
void matmul_tile_of(std::int64_t rows, const MatmulShare<X, W>& share, std::int64_t m, Group group,
                    const Prefetch& prefetch) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return matmul_tile_of<kRows - 1, kOutputs, kPrefetch>(rows, share, m, group, prefetch);
    }
  }
  matmul_tile<kRows, kOutputs, kPrefetch>(share, m, group, prefetch);
}

// How rows of x are cut into tiles that are as equal as can be: the first `larger` of them have one
// row more than the others. Long rows make two tiles at least, as one alone would not prefetch, and the
// memory wait. With short rows the end of a second tile costs more.
struct Tiles {
  std::int64_t count, rows, larger;
};

inline Tiles cut_into_tiles(std::int64_t num_rows, std::int64_t depth) {
  std::int64_t count = (num_rows + kTileRows - 1) / kTileRows;
  if (count == 1 && depth >= 1024) count = 2;
  return {count, num_rows / count, num_rows % count};
}

// The rows from m on against one group; meanwhile the group at `next` is prefetched, unless that is
// null.
template <int kOutputs, typename X, typename W>
void matmul_group(const MatmulShare<X, W>& share, std::int64_t m, const Tiles& tiles, Group group,
                  const W* next) {
  constexpr int kFetched = kPrefetchedRows < kOutputs ? kPrefetchedRows : kOutputs;
  constexpr int kTurns = kOutputs / kFetched;
  const bool prefetches = next != nullptr && tiles.count > 1;
  Prefetch prefetch[kTurns] = {};
  if (prefetches) {
#pragma GCC unroll 4
    for (int output = 0; output < kOutputs; ++output) {
      prefetch[output / kFetched].rows[output % kFetched] =
          reinterpret_cast<const char*>(next + output * group.run * share.depth);
    }
  }
  for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
    const std::int64_t rows = tiles.rows + (tile < tiles.larger ? 1 : 0);
    if (prefetches && tile < kPrefetchingTiles) {
      matmul_tile_of<kTileRows, kOutputs, kFetched>(rows, share, m, group, prefetch[tile % kTurns]);
    } else {
      matmul_tile_of<kTileRows, kOutputs, 0>(rows, share, m, group, prefetch[0]);
    }
    m += rows;
  }
}

// All rows of x, which one tile has, against kOutputs streams of weights at a time.
template <int kOutputs, typename X, typename W>
void matmul_streams(const MatmulShare<X, W>& share) {
  constexpr std::int64_t kMostRows = kOutputs > kTileOutputs ? kEightStreamsRows : kFourStreamsRows;
  const std::int64_t run = share.num_outputs / kOutputs;
  for (std::int64_t n = 0; n < run; ++n) {
    Prefetch ahead{};
    for (int o = 0; o < kOutputs; ++o) {
      const W* row = share.weight + (n + o * run) * share.depth;
      ahead.rows[o] = reinterpret_cast<const char*>(row) + kBytesAhead;
    }
    matmul_tile_of<kMostRows, kOutputs, kOutputs>(share.num_rows, share, 0, {n, run}, ahead);
  }
  for (std::int64_t n = run * kOutputs; n < share.num_outputs; ++n) {
    matmul_tile_of<kMostRows, 1, 0>(share.num_rows, share, 0, {n, 0}, {});
  }
}

// Bytes of x that stay in a core's L2 cache while the weights stream past them.
inline constexpr std::int64_t kCacheBytes = 512 * 1024;
// From so many tiles on the outputs of a tile are neighbours: the prefetches read ahead well enough,
// and what a tile writes lies together.
inline constexpr std::int64_t kManyTiles = 3;

template <typename X, typename W>
void matmul(const MatmulShare<X, W>& share) {
  if (share.num_rows <= kEightStreamsRows) return matmul_streams<kMostTileOutputs>(share);
  if (share.num_rows <= kFourStreamsRows) return matmul_streams<kTileOutputs>(share);
  const std::int64_t row_bytes = share.depth * static_cast<std::int64_t>(sizeof(X));
  const std::int64_t fit = kCacheBytes / row_bytes, least = 2 * kTileRows;
  const std::int64_t most_rows = fit > least ? fit : least;
  const std::int64_t blocks = (share.num_rows + most_rows - 1) / most_rows;
  const std::int64_t groups = share.num_outputs / kTileOutputs;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t m = share.num_rows * block / blocks;
    const Tiles tiles = cut_into_tiles(share.num_rows * (block + 1) / blocks - m, share.depth);
    const bool neighbours = tiles.count >= kManyTiles;
    const std::int64_t run = neighbours ? 1 : groups, step = neighbours ? kTileOutputs : 1;
    for (std::int64_t group = 0; group < groups; ++group) {
      const W* next = nullptr;
      if (group + 1 < groups) {
        next = share.weight + (group + 1) * step * share.depth;
      } else if (block + 1 < blocks) {
        next = share.weight;
      }
      matmul_group<kTileOutputs>(share, m, tiles, {group * step, run}, next);
    }
    for (std::int64_t n = groups * kTileOutputs; n < share.num_outputs; ++n) {
      matmul_group<1, X, W>(share, m, tiles, {n, 0}, nullptr);
    }
  }
}

}  // namespace tinyvllm::TINYVLLM_ISA
