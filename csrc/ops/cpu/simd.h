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

TINYVLLM_INLINE Float broadcast(float value) { return Float{} + value; }

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

TINYVLLM_INLINE void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof(v)); }

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

// e^x for x <= about 88, to within 2 units in the last place; 0 below about -87, also for -inf.
// Range reduction to |r| <= ln(2)/2 and a polynomial of degree 6 (the first terms of the series
// with coefficients fitted to the interval, as in Cephes' expf).
TINYVLLM_INLINE Float exp(Float x) {
  const Float lowest = broadcast(-87.0f), highest = broadcast(88.0f);
  const Int underflow = x < lowest;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Float shifted = multiply_add(x, broadcast(1.44269504088896341f), magic);
  const Float n = shifted - magic;
  Float r = multiply_add(n, broadcast(-0.693359375f), x);  // ln 2 in two parts, the first one exact
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  Float p = broadcast(1.9875691500e-4f);
  p = multiply_add(p, r, broadcast(1.3981999507e-3f));
  p = multiply_add(p, r, broadcast(8.3334519073e-3f));
  p = multiply_add(p, r, broadcast(4.1665795894e-2f));
  p = multiply_add(p, r, broadcast(1.6666665459e-1f));
  p = multiply_add(p, r, broadcast(5.0000001201e-1f));
  p = multiply_add(p, r * r, r + 1.0f);
  const Int scaled = reinterpret_cast<Int>(p) + (__builtin_convertvector(n, Int) << 23);
  const Int kept = scaled & ~underflow;
  return reinterpret_cast<Float>(kept);
}

// Loads `count` < kLanes elements and zeros for the rest, touching no memory behind them.
template <typename T>
TINYVLLM_INLINE Float load_partial(const T* p, std::int64_t count) {
  T padded[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

TINYVLLM_INLINE void store_partial(float* p, Float v, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) p[i] = v[i];
}

}  // namespace tinyvllm::TINYVLLM_ISA
