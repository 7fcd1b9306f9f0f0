// The two products of attention, queries with keys and weights with values: rows with a panel of 64
// positions, or on AMX with keys where they lie. attention_kernel.h says what the panels are and why the order of the sums matters.
#pragma once

#if defined(__AMX_BF16__)
#include "ops/cpu/amx.h"
#endif
#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

inline constexpr std::int64_t kTile = kAttentionTile;
inline constexpr int kTileVectors = kTile / kLanes;

#if defined(__AMX_BF16__)
// The products on AMX, which takes panels of keys and values as right operands as they are. Its
// registers are configured for a number of rows, up to 16, and stay so: configuring takes as long as
// several products.
class TileProducts {
 public:
  static constexpr std::int64_t kStep = kTileDepth;  // elements of k

  // What product() below does, for steps of kStep elements of k.
  template <bool kFromZero>
  void multiply(const BFloat16* a, std::int64_t a_stride, const BFloat16* panel,
                std::int64_t panel_stride, std::int64_t steps, float* c, std::int64_t c_stride,
                std::int64_t rows, std::int64_t vectors) {
    for (std::int64_t r = 0; r < rows; r += kTileSide) {
      configure(rows - r < kTileSide ? rows - r : kTileSide);
      const auto strip = [&]<int... kSums>(std::int64_t v, Indices<kSums...>) {
        float* out = c + r * c_stride + v * kTileSide;
        const std::int64_t out_bytes = c_stride * 4;
        if constexpr (kFromZero) {
          (zero_tile<kSums>(), ...);
        } else {
          (load_tile<kSums>(out + kSums * kTileSide, out_bytes), ...);
        }
        for (std::int64_t k = 0; k < steps; ++k) {
          load_tile<kRows>(a + r * a_stride + k * kStep, a_stride * 2);
          const BFloat16* right = panel + k * kTileSide * panel_stride + v * kTileDepth;
          ((load_tile<kPositions>(right + kSums * kTileDepth, panel_stride * 2),
            multiply_tiles<kSums, kRows, kPositions>()),
           ...);
        }
        (store_tile<kSums>(out + kSums * kTileSide, out_bytes), ...);
      };
      std::int64_t v = 0;
      for (; v + 4 <= vectors; v += 4) strip(v, Indices<0, 1, 2, 3>{});
      for (; v < vectors; ++v) strip(v, Indices<0>{});
    }
  }

  // scores[p, r] = sum_k keys[p, k] queries[k, r], of 16 positions p and up to 16 rows r. The keys are a
  // left operand as they are; queries [k / 2][rows][2] are a right one. To the bit what multiply() makes
  // of the same keys in a panel.
  void score_keys(const BFloat16* keys, std::int64_t key_stride, const BFloat16* queries,
                  std::int64_t steps, float* scores, std::int64_t rows) {
    configure(rows);
    zero_tile<kScores>();
    for (std::int64_t k = 0; k < steps; ++k) {
      load_tile<kPositions>(keys + k * kStep, key_stride * 2);
      load_tile<kQueries>(queries + k * kStep * rows, rows * 4);
      multiply_tiles<kScores, kPositions, kQueries>();
    }
    store_tile<kScores>(scores, rows * 4);
  }

  // out[p] = scores[p, r] for 16 positions p, one row r.
  static Float scores_of_row(const float* scores, std::int64_t rows, std::int64_t r) {
    const __m512i p = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_mullo_epi32(p, _mm512_set1_epi32(static_cast<int>(rows)));
    return _mm512_i32gather_ps(index, scores + r, 4);
  }

 private:
  void configure(std::int64_t rows) {
    if (rows == configured_) return;
    TileConfig config;
    for (int tile = 0; tile <= kRows; ++tile) config.set(tile, rows, kTileRowBytes);
    config.set(kPositions, kTileSide, kTileRowBytes);
    config.set(kQueries, kTileSide, rows * 4);
    config.set(kScores, kTileSide, rows * 4);
    configure_tiles(config);
    configured_ = rows;
  }

  // Registers 0 to 3 are sums of four vectors of columns.
  static constexpr int kRows = 4, kPositions = 5, kQueries = 6, kScores = 7;
  std::int64_t configured_ = 0;  // for how many rows
};
#endif

struct NoTiles {};

// How the two products multiply. Generic: in float32, keys and values widened exactly.
template <typename Kv>
struct Products {
  static constexpr bool kTiles = false;  // whether there are Tiles, to be used where they can be
  using Tiles = NoTiles;
  using Element = float;                // of the panels, and of what they are multiplied with
  static constexpr int kPair = 1;       // successive elements of k that one step consumes
  static constexpr int kLoad = kLanes;  // elements of Kv in one vector

  TINYVLLM_INLINE static Float load_row(const Kv* p) { return load(p); }
  TINYVLLM_INLINE static Float load_row(const Kv* p, std::int64_t count) {
    return load_partial(p, count);
  }
  TINYVLLM_INLINE static Float broadcast_pair(const float* p) { return broadcast(*p); }
  TINYVLLM_INLINE static Float multiply_add_pairs(Float pairs, Float panel, Float sum) {
    return multiply_add(pairs, panel, sum);
  }
  TINYVLLM_INLINE static void store_query(const float* query, std::int64_t size, float* out) {
    for (std::int64_t i = 0; i < size; ++i) out[i] = query[i];
  }
  // Puts a row's weights where the second product reads them, and adds them to its totals.
  TINYVLLM_INLINE static Float store_weights(const Float (&weights)[kTileVectors], float* row,
                                             Float totals) {
    Float sum = weights[0];
#pragma GCC unroll 16
    for (int v = 1; v < kTileVectors; ++v) sum += weights[v];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) store(row + v * kLanes, weights[v]);
    return totals + sum;
  }
  // What a step of the second product reads: the values of kPair successive positions, of which
  // rows[i] is load_row's of the i-th, side by side.
  TINYVLLM_INLINE static void interleave(Float (&)[kPair]) {}
};

#if defined(__AVX512BF16__)
// bfloat16 as it is: vdpbf16ps adds the products of two successive elements of k in one lane. The
// query is rounded to bfloat16, which is what it is in Transformers, and so are the weights; their
// total is that of the rounded ones, so that the result is a true weighted mean.
template <>
struct Products<BFloat16> {
#if defined(__AMX_BF16__)
  static constexpr bool kTiles = true;
  using Tiles = TileProducts;
#else
  static constexpr bool kTiles = false;
  using Tiles = NoTiles;
#endif
  using Element = BFloat16;
  static constexpr int kPair = 2;
  static constexpr int kLoad = 32;

  TINYVLLM_INLINE static __m512bh as_pairs(Float v) { return reinterpret_cast<__m512bh>(v); }

  TINYVLLM_INLINE static Float load_row(const BFloat16* p) { return _mm512_loadu_ps(p); }
  TINYVLLM_INLINE static Float load_row(const BFloat16* p, std::int64_t count) {
    const auto mask = static_cast<__mmask32>((std::uint64_t{1} << count) - 1);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
  }
  TINYVLLM_INLINE static Float broadcast_pair(const BFloat16* p) {
    float pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_ps(pair);
  }
  TINYVLLM_INLINE static Float multiply_add_pairs(Float pairs, Float panel, Float sum) {
    return _mm512_dpbf16_ps(sum, as_pairs(pairs), as_pairs(panel));
  }
  TINYVLLM_INLINE static void store_query(const float* query, std::int64_t size, BFloat16* out) {
    for (std::int64_t i = 0; i < size; i += 16) {
      const auto mask = static_cast<__mmask16>(size - i < 16 ? (1u << (size - i)) - 1 : 0xffffu);
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, query + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), reinterpret_cast<__m256i>(rounded));
    }
  }
  TINYVLLM_INLINE static Float store_weights(const Float (&weights)[kTileVectors], float* row,
                                             Float totals) {
    const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v += 2) {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(weights[v + 1], weights[v]);
      _mm512_storeu_si512(row + v / 2 * kLanes, reinterpret_cast<__m512i>(rounded));
      totals = _mm512_dpbf16_ps(totals, rounded, ones);
    }
    return totals;
  }
  TINYVLLM_INLINE static void interleave(Float (&rows)[kPair]) {
    alignas(64) static constexpr std::uint16_t kLow[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i left = _mm512_castps_si512(rows[0]), right = _mm512_castps_si512(rows[1]);
    rows[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(left, low, right));
    rows[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(left, high, right));
  }
};
#endif

// c[r, :] (+)= sum_k a[r, k] panel[k, :], for kRows rows and kVectors vectors of columns. A step is
// kPair elements of k.
template <typename P, bool kFromZero, int kRows, int kVectors>
TINYVLLM_INLINE void product_tile(const typename P::Element* a, std::int64_t a_stride,
                                  const typename P::Element* panel, std::int64_t panel_stride,
                                  std::int64_t steps, float* c, std::int64_t c_stride) {
  Float sums[kRows][kVectors] = {};
  if constexpr (!kFromZero) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = load(c + r * c_stride + v * kLanes);
    }
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    Float columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      __builtin_memcpy(&columns[v], panel + step * panel_stride + v * kLanes * P::kPair,
                       sizeof(Float));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Float row = P::broadcast_pair(a + r * a_stride + step * P::kPair);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = P::multiply_add_pairs(row, columns[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
  }
}

// The vectors of columns that fit in registers with six rows.
#if defined(__AVX512F__)
inline constexpr int kWide = 4;  // of 32
#else
inline constexpr int kWide = 2;  // of 16
#endif

// The same for any number of rows and vectors; which of them are done together changes no bit.
template <typename P, bool kFromZero>
void product(const typename P::Element* a, std::int64_t a_stride, const typename P::Element* panel,
             std::int64_t panel_stride, std::int64_t steps, float* c, std::int64_t c_stride,
             std::int64_t rows, std::int64_t vectors) {
  const auto strip = [&]<int kVectors>(std::int64_t v) {
    const auto* columns = panel + v * kLanes * P::kPair;
    std::int64_t r = 0;
    const auto tile = [&]<int kRows>() {
      product_tile<P, kFromZero, kRows, kVectors>(a + r * a_stride, a_stride, columns, panel_stride,
                                                  steps, c + r * c_stride + v * kLanes, c_stride);
      r += kRows;
    };
    while (rows - r >= 6) tile.template operator()<6>();
    if (rows - r >= 4) tile.template operator()<4>();
    if (rows - r == 3) tile.template operator()<3>();
    if (rows - r == 2) tile.template operator()<2>();
    if (rows - r == 1) tile.template operator()<1>();
  };
  std::int64_t v = 0;
  for (; v + kWide <= vectors; v += kWide) strip.template operator()<kWide>(v);
  if constexpr (kWide == 4) {
    if (vectors - v >= 2) {
      strip.template operator()<2>(v);
      v += 2;
    }
  }
  if (v < vectors) strip.template operator()<1>(v);
}

}  // namespace tinyvllm::TINYVLLM_ISA
