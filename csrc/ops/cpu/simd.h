// Vectors of float32 in the registers of the instruction set that this file is compiled for.
//
// Included by kernels.cpp only, which is compiled several times. Everything is inside a namespace
// named after the instruction set and nothing comes from the standard library, so that the linker
// can never pick a function built for a newer CPU on behalf of code that runs on an older one.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "base/bfloat16.h"

namespace tinyvllm::TINYVLLM_ISA {

#define TINYVLLM_INLINE [[gnu::always_inline]] inline

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;  // SSE2 and NEON registers
#endif

using Float = float __attribute__((vector_size(kLanes * 4)));
using Float4 = float __attribute__((vector_size(16)));
using Int = std::int32_t __attribute__((vector_size(kLanes * 4)));
using UInt = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using UShort = std::uint16_t __attribute__((vector_size(kLanes * 2)));

TINYVLLM_INLINE Float broadcast(float value) { return value - Float{}; }

TINYVLLM_INLINE Float load(const float* p) {
  Float v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

TINYVLLM_INLINE Float load(const BFloat16* p) {
  UShort half;
  __builtin_memcpy(&half, p, sizeof(half));
  const UInt wide = __builtin_convertvector(half, UInt) << 16;
  return reinterpret_cast<Float>(wide);
}

// Of kLanes pairs of bfloat16 the second ones (half 0) or the first ones (half 1): a bfloat16 in the
// high half of 32 bits is the float32, once the low half is cleared.
TINYVLLM_INLINE Float load_of_pairs(const void* p, int half) {
  UInt pairs;
  __builtin_memcpy(&pairs, p, sizeof(pairs));
  const UInt wide = half == 0 ? pairs & 0xffff0000u : pairs << 16;
  return reinterpret_cast<Float>(wide);
}

TINYVLLM_INLINE void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof(v)); }

// to_bfloat16 of base/bfloat16.h for each lane.
TINYVLLM_INLINE UShort to_bfloat16(Float v) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // vcvtneps2bf16 would make zeros of them
  if (_mm512_fpclass_ps_mask(v, kSubnormal) == 0) [[likely]] {
    return reinterpret_cast<UShort>(_mm512_cvtneps_pbh(v));
  }
#endif
  const auto bits = reinterpret_cast<UInt>(v);
  const UInt high = bits >> 16;
  const UInt rounded = (bits + (high & 1u) + 0x7fffu) >> 16;
  return __builtin_convertvector(v == v ? rounded : high | 0x40u, UShort);
}

TINYVLLM_INLINE void store(BFloat16* p, Float v) {
  const UShort rounded = to_bfloat16(v);
  __builtin_memcpy(p, &rounded, sizeof(rounded));
}

// a * b + c, rounded once where the instruction set can.
TINYVLLM_INLINE Float multiply_add(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The sum of all lanes as a tree of halves: lane i takes lane i + n/2, then i + n/4, ...
TINYVLLM_INLINE float horizontal_sum(Float v) {
#if defined(__AVX512F__)
  const __m256 half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  const __m256 half = v;
#endif
#if defined(__AVX2__)
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// The larger of each lane; b where one of the two is no number.
TINYVLLM_INLINE Float maximum(Float a, Float b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Whether a > b in any lane.
TINYVLLM_INLINE bool any_greater(Float a, Float b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
  const Int greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
#endif
}

TINYVLLM_INLINE float horizontal_maximum(Float v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#elif defined(__AVX2__)
  const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
#else
  const float left = v[0] > v[2] ? v[0] : v[2], right = v[1] > v[3] ? v[1] : v[3];
  return left > right ? left : right;
#endif
}

// The nearest whole number, ties to even, for |x| below 2^22.
TINYVLLM_INLINE Float nearest(Float x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Float shifted = x + magic;
  return shifted - magic;
#endif
}

// 2^(n + r) for whole n <= 127 and |r| <= 1/2, exact for r = 0. Where n is below -125 the result is
// 0 or less than the smallest normal number. The polynomial is fitted to 2^r: relative error 9.2e-8.
TINYVLLM_INLINE Float exp2_of_sum(Float n, Float r) {
  Float p = broadcast(1.326472731e-3f);
  p = multiply_add(p, r, broadcast(9.671512991e-3f));
  p = multiply_add(p, r, broadcast(5.550733581e-2f));
  p = multiply_add(p, r, broadcast(2.402224243e-1f));
  p = multiply_add(p, r, broadcast(6.931470037e-1f));
  p = multiply_add(p, r, broadcast(1.0f));
#if defined(__AVX512F__)
  // An underflow in vscalefps takes a Xeon more than a hundred cycles, and masked scores are one each.
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, broadcast(-125.0f), _CMP_NLT_UQ), p, n);
#else
  // Unsigned, so that lanes whose result nobody wants may wrap.
  const auto underflow = reinterpret_cast<UInt>(n < -125.0f);
  const auto exponent = reinterpret_cast<UInt>(__builtin_convertvector(n, Int));
  const UInt kept = (reinterpret_cast<UInt>(p) + (exponent << 23)) & ~underflow;
  return reinterpret_cast<Float>(kept);
#endif
}

// 2^x for x <= 127, to within 2 units in the last place; -inf gives 0.
TINYVLLM_INLINE Float exp2(Float x) {
  x = maximum(broadcast(-200.0f), x);
  const Float n = nearest(x);
  return exp2_of_sum(n, x - n);
}

// e^x for x <= 88, to within 4 units in the last place; -inf gives 0. Reduced to |r| <= ln(2)/2
// with ln 2 in two parts, of which n times the first is exact (as in Cephes' expf).
TINYVLLM_INLINE Float exp(Float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  x = maximum(broadcast(-135.0f), x);
  const Float n = nearest(x * kLog2E);
  Float r = multiply_add(n, broadcast(-0.693359375f), x);
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  return exp2_of_sum(n, r * kLog2E);
}

// Turns rows into columns: lane i of row j goes to lane j of row i.
TINYVLLM_INLINE void transpose(Float (&rows)[kLanes]) {
#if defined(__AVX512F__)
  Float pairs[16], quads[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  const auto pair = [&](int i) { return _mm512_castps_pd(pairs[i]); };
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {  // quads[i + c]: column c of rows i .. i + 3, 128 bits each of
    quads[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(i), pair(i + 2)));  // c, c + 4, + 8, + 12
    quads[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(i), pair(i + 2)));
    quads[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(i + 1), pair(i + 3)));
    quads[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(i + 1), pair(i + 3)));
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const Float low = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
    const Float high = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xdd);
    const Float low2 = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
    const Float high2 = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_f32x4(low, low2, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(high, high2, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    rows[12 + c] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
#elif defined(__AVX2__)
  Float pairs[8], quads[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {  // quads[i + c]: columns c and c + 4 of rows i .. i + 3
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x31);
  }
#else
  const Float a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Float b = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Float c = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Float d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

// Loads `count` < kLanes elements and zeros for the rest, touching no memory behind them.
template <typename T>
TINYVLLM_INLINE Float load_partial(const T* p, std::int64_t count) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
#else
  T padded[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
#endif
}

TINYVLLM_INLINE void store_partial(float* p, Float v, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) p[i] = v[i];
}
TINYVLLM_INLINE void store_partial(BFloat16* p, Float v, std::int64_t count) {
  const UShort rounded = to_bfloat16(v);
  for (std::int64_t i = 0; i < count; ++i) p[i].bits = rounded[i];
}

}  // namespace tinyvllm::TINYVLLM_ISA
