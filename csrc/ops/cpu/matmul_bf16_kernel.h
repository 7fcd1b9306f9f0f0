// The micro-kernel of y = x W^T for vdpbf16ps and weights in rows. See MatmulShare in kernels.h for
// what it computes and in which order it adds.
//
// A dot product needs a vector of both operands for each multiplication, more than the L2 cache gives
// beside what comes from memory. Here one of the two is broadcast from where it lies, and serves a
// whole vector of rows of the other (docs/performance-cpu.md has the numbers):
//
//   Sixteen rows of x lie side by side, turned once a product. Each pair of weights is broadcast to all.
//
//   With fewer rows of x it is eight rows of weights that are turned, in registers, two pairs of each
//   at a time, and two pairs of x are broadcast. That an output has two sums, one for either pair, saves
//   a quarter of the turning.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/matmul_kernel.h"
#include "ops/cpu/matmul_panels_kernel.h"
#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

using Bf16Share = MatmulShare<BFloat16, BFloat16>;
using Bf16Lanes = LaneProduct<BFloat16, BFloat16>;
using Float8 = float __attribute__((vector_size(32)));

// The outputs of a tile. That many rows of weights have room in one set of the L1 cache, in which all
// rows lie if they are a multiple of 4 KiB long.
inline constexpr int kGroup = 8;
// A cache line has eight words of two pairs.
inline constexpr int kWords = 8, kWordElements = 4, kLineElements = 32;

// The first `count` elements of a word, and zeros.
TINYVLLM_INLINE __m512bh broadcast_word(const BFloat16* p, std::int64_t count = kWordElements) {
  std::int64_t word = 0;
  if (count >= kWordElements) {
    __builtin_memcpy(&word, p, sizeof(word));
  } else {
    BFloat16 padded[kWordElements] = {};
    for (std::int64_t i = 0; i < count; ++i) padded[i] = p[i];
    __builtin_memcpy(&word, padded, sizeof(word));
  }
  return reinterpret_cast<__m512bh>(_mm512_set1_epi64(word));
}

// Writes a group's outputs for one row of x.
TINYVLLM_INLINE void store_group(const Bf16Share& share, std::int64_t m, Group group,
                                 Float8 totals) {
  float* out = share.out + m * share.out_stride + group.n;
  if (group.run == 1) {
    if (share.bias) {
      Float8 bias;
      __builtin_memcpy(&bias, share.bias + group.n, sizeof(bias));
      totals += bias;  // -0 + 0 is not -0
    }
    if (share.accumulate) {
      Float8 old;
      __builtin_memcpy(&old, out, sizeof(old));
      totals = old + totals;
    }
    __builtin_memcpy(out, &totals, sizeof(totals));
    return;
  }
  const int count = group.run == 0 ? 1 : kGroup;
  for (int i = 0; i < count; ++i, out += group.run) {
    float total = totals[i];
    if (share.bias) total += share.bias[group.n + i * group.run];
    *out = share.accumulate ? *out + total : total;
  }
}

// Of eight rows of a line, word j of each goes to vector j.
TINYVLLM_INLINE void turn_words(__m512i (&rows)[kGroup]) {
  __m512i even[4], odd[4];  // words 0, 2, 4, 6 and 1, 3, 5, 7 of two rows, 128 bits each
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    even[i] = _mm512_unpacklo_epi64(rows[2 * i], rows[2 * i + 1]);
    odd[i] = _mm512_unpackhi_epi64(rows[2 * i], rows[2 * i + 1]);
  }
  const auto turn = [&](const __m512i(&words)[4], int first) {
    const __m512i low = _mm512_shuffle_i32x4(words[0], words[1], 0x44);
    const __m512i low2 = _mm512_shuffle_i32x4(words[2], words[3], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(words[0], words[1], 0xee);
    const __m512i high2 = _mm512_shuffle_i32x4(words[2], words[3], 0xee);
    rows[first] = _mm512_shuffle_i32x4(low, low2, 0x88);
    rows[first + 2] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    rows[first + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    rows[first + 6] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  };
  turn(even, 0);
  turn(odd, 1);
}

// What a tile of few rows of x prefetches into the L2 cache: of its own weights, which are eight long
// streams of memory, what lies ahead; of weights that are neighbours, the next group's; or nothing.
enum class Fetch { kAhead, kNextGroup, kNothing };
inline constexpr std::int64_t kAheadLines = 24;

// The outputs of kGroups neighbouring groups for kRows rows of x, at row m of the share. The first line
// of the weights begins `skew` words before them, where a cache line does.
template <int kRows, int kGroups, Fetch kFetch>
void few_rows_tile(const Bf16Share& share, const BFloat16* x_rows, std::int64_t m, Group group,
                   std::int64_t skew) {
  const std::int64_t depth = share.depth, stride = group.run * depth;
  // A pointer serves three rows, as x86 adds a register once or twice over.
  constexpr int kPointers = (kRows + 2) / 3;
  const BFloat16* x[kPointers];
#pragma GCC unroll 8
  for (int i = 0; i < kPointers; ++i) x[i] = x_rows + 3 * i * share.x_stride;
  const auto x_row = [&](int row) { return x[row / 3] + row % 3 * share.x_stride; };
  const BFloat16* const weight = share.weight + group.n * depth;
  const BFloat16* const w[3] = {weight, weight + 3 * stride, weight + 6 * stride};
  const auto w_row = [&](int row) { return w[row / 3] + row % 3 * stride; };
  const BFloat16* next = weight + kGroup * depth;  // a neighbour

  Float sums[kGroups][kRows];
#pragma GCC unroll 2
  for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[g][row] = Float{};
  }
  const auto partial = [&](std::int64_t k) {  // the line that begins at k, as far as it is there
    const std::int64_t first = k < 0 ? -k : 0;
    const std::int64_t end = depth - k < kLineElements ? depth - k : kLineElements;
    const auto until = [](std::int64_t i) { return static_cast<std::uint32_t>((1ull << i) - 1); };
    const __mmask32 there = until(end) & ~until(first);
    for (int g = 0; g < kGroups; ++g) {
      __m512i rows[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        rows[i] = _mm512_maskz_loadu_epi16(there, w_row(i) + g * kGroup * depth + k);
      }
      turn_words(rows);
      for (std::int64_t i = first; i < end; i += kWordElements) {
        for (int row = 0; row < kRows; ++row) {
          sums[g][row] = _mm512_dpbf16_ps(sums[g][row], broadcast_word(x_row(row) + k + i, end - i),
                                          reinterpret_cast<__m512bh>(rows[i / kWordElements]));
        }
      }
    }
  };
  std::int64_t k = -skew * kWordElements;
  if (k < 0) {
    partial(k);
    k += kLineElements;
  }
  for (; k + kLineElements <= depth; k += kLineElements) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      __m512i rows[kGroup];
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i) {
        const BFloat16* line = w_row(i) + g * kGroup * depth + k;
        rows[i] = _mm512_loadu_si512(line);
        if constexpr (kFetch == Fetch::kAhead) {
          __builtin_prefetch(line + kAheadLines * kLineElements, 0, 2);
        } else if constexpr (kFetch == Fetch::kNextGroup) {
          __builtin_prefetch(next, 0, 2);
          next += kLineElements;
        }
      }
      turn_words(rows);
#pragma GCC unroll 8
      for (int word = 0; word < kWords; ++word) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
          sums[g][row] =
              _mm512_dpbf16_ps(sums[g][row], broadcast_word(x_row(row) + k + word * kWordElements),
                               reinterpret_cast<__m512bh>(rows[word]));
        }
      }
    }
  }
  if (k < depth) partial(k);

  const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 15, 13, 11, 9, 7, 5, 3, 1);
#pragma GCC unroll 2
  for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const __m256 totals = _mm512_castps512_ps256(_mm512_permutexvar_ps(even, sums[g][row])) +
                            _mm512_castps512_ps256(_mm512_permutexvar_ps(odd, sums[g][row]));
      store_group(share, m + row, {group.n + g * kGroup, group.run}, totals);
    }
  }
}

template <int kRows, int kGroups, Fetch kFetch, int kLeastRows = 1>
void few_rows_tile_of(std::int64_t rows, const Bf16Share& share, const BFloat16* x, std::int64_t m,
                      Group group, std::int64_t skew) {
  if constexpr (kRows > kLeastRows) {
    if (rows < kRows) {
      return few_rows_tile_of<kRows - 1, kGroups, kFetch, kLeastRows>(rows, share, x, m, group,
                                                                      skew);
    }
  }
  few_rows_tile<kRows, kGroups, kFetch>(share, x, m, group, skew);
}

// A step of panels of x with a pair of each row of a group.
template <int kPanels, typename PairAt>
TINYVLLM_INLINE void add_pairs(Float (&sums)[kGroup][kPanels], const BFloat16* x, std::int64_t size,
                               const BFloat16* const (&w)[3], std::int64_t stride, std::int64_t k,
                               PairAt pair_at) {
  __m512bh columns[kPanels];
#pragma GCC unroll 2
  for (int panel = 0; panel < kPanels; ++panel) {
    columns[panel] = Bf16Lanes::load_w(reinterpret_cast<const std::byte*>(x + panel * size), 0);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kGroup; ++row) {
    const __m512bh pair = pair_at(w[row / 3] + row % 3 * stride + k);
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
      sums[row][panel] = Bf16Lanes::accumulate(sums[row][panel], columns[panel], pair);
    }
  }
}

// The outputs of a group for the first `rows` rows of a panel, at row m of the share.
TINYVLLM_INLINE void store_panel(const Bf16Share& share, std::int64_t m, std::int64_t rows,
                                 Group group, const Float (&sums)[kGroup]) {
  __m512d pairs[kGroup], fours[kGroup];
#pragma GCC unroll 4
  for (int i = 0; i < kGroup; i += 2) {
    pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(sums[i], sums[i + 1]));
    pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(sums[i], sums[i + 1]));
  }
  // fours[i + c]: rows c, c + 4, c + 8 and c + 12 of outputs i .. i + 3
#pragma GCC unroll 2
  for (int i = 0; i < kGroup; i += 4) {
    fours[i] = _mm512_unpacklo_pd(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_pd(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_pd(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_pd(pairs[i + 1], pairs[i + 3]);
  }
  const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  const auto store = [&](int row, __m512d two, int half) {
    const __m256d totals = half == 0 ? _mm512_castpd512_pd256(two) : _mm512_extractf64x4_pd(two, 1);
    if (row < rows) store_group(share, m + row, group, _mm256_castpd_ps(totals));
  };
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512d first = _mm512_permutex2var_pd(fours[c], low, fours[4 + c]);
    const __m512d last = _mm512_permutex2var_pd(fours[c], high, fours[4 + c]);
    store(c, first, 0);
    store(c + 4, first, 1);
    store(c + 8, last, 0);
    store(c + 12, last, 1);
  }
}

// The outputs of a group for kPanels panels of x, of which `rows` rows, from row m of the share on, are
// meant. kPrefetch: meanwhile `next`, the weights of another group, are fetched into the L2 cache,
// twice, as the hardware drops prefetches when it is busy.
template <int kPanels, bool kPrefetch>
void panels_tile(const Bf16Share& share, const BFloat16* panels, std::int64_t m, std::int64_t rows,
                 Group group, const BFloat16* next) {
  constexpr std::int64_t kStep = kXPanelRows * 2;  // elements of a panel
  const std::int64_t depth = share.depth, stride = group.run * depth, size = x_panel_size(depth);
  const std::int64_t whole_words = depth / kWordElements;
  Float sums[kGroup][kPanels], even_sums[kGroup][kPanels];
  for (int parity = 0; parity < 2; ++parity) {
#pragma GCC unroll 8
    for (int row = 0; row < kGroup; ++row) {
#pragma GCC unroll 2
      for (int panel = 0; panel < kPanels; ++panel) sums[row][panel] = Float{};
    }
    const BFloat16* const weight = share.weight + group.n * depth + 2 * parity;
    const BFloat16* const w[3] = {weight, weight + 3 * stride, weight + 6 * stride};
    const BFloat16* const x = panels + parity * (size / 2);
    const auto add = [&](std::int64_t word) __attribute__((always_inline)) {
      add_pairs(sums, x + word * kStep, size, w, stride, word * kWordElements,
                [](const BFloat16* p) { return Bf16Lanes::load_x(p, 0); });
    };
    std::int64_t word = 0;
    for (; word + kWords <= whole_words; word += kWords) {
#pragma GCC unroll 8
      for (int i = 0; i < kWords; ++i) {
        if constexpr (kPrefetch) __builtin_prefetch(next + (word + i) * kLineElements, 0, 2);
        add(word + i);
      }
    }
    for (; word < whole_words; ++word) add(word);
    if (word * kWordElements < depth) {  // a part of a word, of which this pair has `left` elements
      const std::int64_t left = depth - word * kWordElements - 2 * parity;
      add_pairs(sums, x + word * kStep, size, w, stride, word * kWordElements,
                [&](const BFloat16* p) {
                  const BFloat16 zero{}, pair[2] = {left > 0 ? p[0] : zero, left > 1 ? p[1] : zero};
                  return Bf16Lanes::load_x(pair, 0);
                });
    }
#pragma GCC unroll 8
    for (int row = 0; row < kGroup; ++row) {
#pragma GCC unroll 2
      for (int panel = 0; panel < kPanels; ++panel) {
        if (parity == 0) {
          even_sums[row][panel] = sums[row][panel];
        } else {
          sums[row][panel] = even_sums[row][panel] + sums[row][panel];
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int panel = 0; panel < kPanels; ++panel) {
    Float totals[kGroup];
#pragma GCC unroll 8
    for (int row = 0; row < kGroup; ++row) totals[row] = sums[row][panel];
    const std::int64_t first = panel * kXPanelRows;
    store_panel(share, m + first, rows - first, group, totals);
  }
}

// No more than kMostFewRows rows of x. Up to so many, the outputs of a group lie a run of rows apart:
// eight long streams.
inline constexpr int kMostStreamRows = 8;

inline void multiply_few_rows(const Bf16Share& share, std::int64_t skew) {
  const std::int64_t rows = share.num_rows, groups = share.num_outputs / kGroup;
  for (std::int64_t i = 0; i < groups; ++i) {
    if (rows <= kMostStreamRows) {
      few_rows_tile_of<kMostStreamRows, 1, Fetch::kAhead>(rows, share, share.x, 0, {i, groups},
                                                          skew);
    } else {
      few_rows_tile_of<kMostFewRows, 1, Fetch::kNextGroup, kMostStreamRows + 1>(
          rows, share, share.x, 0, {i * kGroup, 1}, skew);
    }
  }
  for (std::int64_t n = groups * kGroup; n < share.num_outputs; ++n) {
    few_rows_tile_of<kMostFewRows, 1, Fetch::kNothing>(rows, share, share.x, 0, {n, 0}, skew);
  }
}

// Panels [begin, end) of x with a group.
inline void multiply_panels_of_x(const Bf16Share& share, std::int64_t begin, std::int64_t end,
                                 Group group, const BFloat16* next) {
  for (std::int64_t panel = begin; panel < end; panel += 2) {
    const std::int64_t m = panel * kXPanelRows, rows = share.num_rows - m;
    const BFloat16* x = share.x + panel * x_panel_size(share.depth);
    if (end - panel == 1) {
      panel == begin ? panels_tile<1, true>(share, x, m, rows, group, next)
                     : panels_tile<1, false>(share, x, m, rows, group, next);
    } else {
      panel == begin ? panels_tile<2, true>(share, x, m, rows, group, next)
                     : panels_tile<2, false>(share, x, m, rows, group, next);
    }
  }
}

// The rows of x behind the panels with one group, or two neighbours. With up to so many rows both are
// taken together, as each addition to the sums of one would wait for the one before.
inline constexpr std::int64_t kPairedRows = 4;

inline void multiply_rest(const Bf16Share& share, std::int64_t rest, Group group, bool two_groups,
                          std::int64_t skew) {
  const std::int64_t m = share.num_rows - rest;
  const BFloat16* x = share.x + m / kXPanelRows * x_panel_size(share.depth);
  if (two_groups && rest <= kPairedRows) {
    return few_rows_tile_of<kPairedRows, 2, Fetch::kNothing>(rest, share, x, m, group, skew);
  }
  few_rows_tile_of<kMostFewRows, 1, Fetch::kNothing>(rest, share, x, m, group, skew);
  if (two_groups) {
    group.n += kGroup;
    few_rows_tile_of<kMostFewRows, 1, Fetch::kNothing>(rest, share, x, m, group, skew);
  }
}

inline void matmul_bf16(const Bf16Share& share) {
  const std::int64_t depth = share.depth;
  // Where a word may lie across two lines, or each row begins elsewhere in one, lines are of no use.
  const std::uintptr_t behind = reinterpret_cast<std::uintptr_t>(share.weight) % 64;
  const bool lines = depth % kLineElements == 0 && behind % 8 == 0;
  const std::int64_t skew = lines ? static_cast<std::int64_t>(behind / 8) : 0;
  const std::int64_t panels = x_panels(share.num_rows);
  if (panels == 0) return multiply_few_rows(share, skew);

  const std::int64_t rest = x_rest(share.num_rows);
  // As many panels at a time as find room in the L2 cache, but a tile's at least.
  const std::int64_t fit = kCacheBytes / (x_panel_size(depth) * 2), most = fit > 2 ? fit : 2;
  const std::int64_t groups = share.num_outputs / kGroup;
  for (std::int64_t begin = 0; begin < panels; begin += most) {
    const bool last = panels - begin <= most;
    const std::int64_t end = last ? panels : begin + most;
    for (std::int64_t i = 0; i < groups; i += 2) {
      const bool two = i + 1 < groups;
      const Group group{i * kGroup, 1}, second{group.n + kGroup, 1};
      // What is next after the last group is behind this share, or its first group once more.
      const bool again = i + 2 >= groups && !last;
      const BFloat16* next =
          share.weight + (again ? 0 : (two ? second.n : group.n) + kGroup) * depth;
      const BFloat16* second_weight = share.weight + second.n * depth;
      multiply_panels_of_x(share, begin, end, group, two ? second_weight : next);
      if (two) multiply_panels_of_x(share, begin, end, second, next);
      if (last && rest > 0) multiply_rest(share, rest, group, two, skew);
    }
    for (std::int64_t n = groups * kGroup; n < share.num_outputs; ++n) {
      multiply_panels_of_x(share, begin, end, {n, 0}, share.weight);
      if (last && rest > 0) multiply_rest(share, rest, {n, 0}, false, skew);
    }
  }
}

// A piece of x for matmul_bf16: some lines of the rows of a panel, or all rows behind the last one, as
// they are.
inline void pack_x_panel(const PackShare& share) {
  const std::int64_t depth = share.depth, size = x_panel_size(depth);
  const std::int64_t pieces = x_panel_pieces(depth), panel = share.piece / pieces;
  const BFloat16* x = share.x + panel * kXPanelRows * share.x_stride;
  BFloat16* out = share.packed + panel * size;
  const std::int64_t rows = share.num_rows - panel * kXPanelRows;
  if (panel == x_panels(share.num_rows)) {
    for (std::int64_t row = 0; row < rows; ++row) {
      __builtin_memcpy(out + row * x_rest_stride(depth), x + row * share.x_stride,
                       depth * sizeof(BFloat16));
    }
    return;
  }
  constexpr std::int64_t kStep = kXPanelRows * 2;
  const auto pack = [&](std::int64_t k, std::int64_t count) __attribute__((always_inline)) {
    const auto there = static_cast<__mmask32>((1ull << count) - 1);
    Float line[kXPanelRows];
#pragma GCC unroll 16
    for (int row = 0; row < kXPanelRows; ++row) {
      const __m512i elements =
          row < rows ? _mm512_maskz_loadu_epi16(there, x + row * share.x_stride + k) : __m512i{};
      line[row] = reinterpret_cast<Float>(elements);
    }
    transpose(line);
    BFloat16* word = out + k / kWordElements * kStep;
#pragma GCC unroll 16
    for (int pair = 0; pair < 2 * kWords; ++pair) {
      BFloat16* to = word + pair % 2 * (size / 2) + pair / 2 * kStep;
      if (pair / 2 * kWordElements < count) __builtin_memcpy(to, &line[pair], sizeof(Float));
    }
  };
  const std::int64_t begin = share.piece % pieces * kXPanelPiece;
  const std::int64_t end = begin + kXPanelPiece < depth ? begin + kXPanelPiece : depth;
  std::int64_t k = begin;
  for (; k + kLineElements <= end; k += kLineElements) {
    // Another core has most of these lines: they are asked for before they are written.
    BFloat16* next = out + (k + kLineElements) / kWordElements * kStep;
#pragma GCC unroll 8
    for (int i = 0; i < kWords; ++i) {
      __builtin_prefetch(next + i * kStep, 1);
      __builtin_prefetch(next + size / 2 + i * kStep, 1);
    }
    pack(k, kLineElements);
  }
  if (k < end) pack(k, end - k);
}

}  // namespace tinyvllm::TINYVLLM_ISA
