// The micro-kernel of y = x W^T, both operands contiguous along the depth (k): dot products in a
// tile of registers. See MatmulShare in kernels.h for what it computes and in which order it adds.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

// How a pair of element types is loaded and multiplied. kStep: elements of k that one step
// consumes.
template <typename X, typename W>
struct Product {
  static constexpr int kStep = kLanes;
  TINYVLLM_INLINE static Float load_x(const X* p) { return load(p); }
  TINYVLLM_INLINE static Float load_w(const W* p) { return load(p); }
  TINYVLLM_INLINE static Float accumulate(Float sum, Float x, Float w) {
    return multiply_add(x, w, sum);
  }
};

#if defined(__AVX512BF16__)
// vdpbf16ps: lane i adds x[2i] w[2i] + x[2i+1] w[2i+1] in float32.
template <>
struct Product<BFloat16, BFloat16> {
  static constexpr int kStep = 2 * kLanes;
  TINYVLLM_INLINE static __m512bh load_x(const BFloat16* p) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  }
  TINYVLLM_INLINE static __m512bh load_w(const BFloat16* p) { return load_x(p); }
  TINYVLLM_INLINE static Float accumulate(Float sum, __m512bh x, __m512bh w) {
    return _mm512_dpbf16_ps(sum, x, w);
  }
};
#endif

// Registers: kTileRows x kTileOutputs accumulators, one vector of weights for each output, one of
// x.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 4, kTileOutputs = 6;  // of 32
#else
inline constexpr int kTileRows = 2, kTileOutputs = 4;  // of 16
#endif

template <int kRows, int kOutputs, typename X, typename W>
TINYVLLM_INLINE void add_step(Float (&sums)[kRows][kOutputs], const X* x, std::int64_t x_stride,
                              const W* weight, std::int64_t weight_stride) {
  using P = Product<X, W>;
  decltype(P::load_w(weight)) w[kOutputs];
#pragma GCC unroll 8
  for (int n = 0; n < kOutputs; ++n) w[n] = P::load_w(weight + n * weight_stride);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    const auto row = P::load_x(x + m * x_stride);
#pragma GCC unroll 8
    for (int n = 0; n < kOutputs; ++n) sums[m][n] = P::accumulate(sums[m][n], row, w[n]);
  }
}

// The outputs [kRows, kOutputs] at row m and output n of the share.
template <int kRows, int kOutputs, typename X, typename W>
TINYVLLM_INLINE void matmul_tile(const MatmulShare<X, W>& share, std::int64_t m, std::int64_t n) {
  constexpr int kStep = Product<X, W>::kStep;
  const X* x = share.x + m * share.x_stride;
  const W* weight = share.weight + n * share.depth;
  Float sums[kRows][kOutputs] = {};
  std::int64_t k = 0;
  for (; k + kStep <= share.depth; k += kStep) {
    add_step<kRows, kOutputs>(sums, x + k, share.x_stride, weight + k, share.depth);
  }
  if (k < share.depth) {  // the last, partial step: padded with zeros, which add nothing
    X x_padded[kRows][kStep] = {};
    W weight_padded[kOutputs][kStep] = {};
    for (std::int64_t i = 0; k + i < share.depth; ++i) {
      for (int row = 0; row < kRows; ++row) x_padded[row][i] = x[row * share.x_stride + k + i];
      for (int o = 0; o < kOutputs; ++o) weight_padded[o][i] = weight[o * share.depth + k + i];
    }
    add_step<kRows, kOutputs>(sums, &x_padded[0][0], kStep, &weight_padded[0][0], kStep);
  }
  for (int row = 0; row < kRows; ++row) {
    for (int o = 0; o < kOutputs; ++o) {
      const float bias = share.bias ? share.bias[n + o] : 0.0f;
      float& out = share.out[(m + row) * share.out_stride + n + o];
      const float value = horizontal_sum(sums[row][o]) + bias;
      out = share.accumulate ? out + value : value;
    }
  }
}

// All rows against kOutputs rows of the weight, which stay in the L1 cache meanwhile.
template <int kOutputs, typename X, typename W>
TINYVLLM_INLINE void matmul_strip(const MatmulShare<X, W>& share, std::int64_t n) {
  std::int64_t m = 0;
  for (; m + kTileRows <= share.num_rows; m += kTileRows) {
    matmul_tile<kTileRows, kOutputs>(share, m, n);
  }
  for (; m < share.num_rows; ++m) matmul_tile<1, kOutputs>(share, m, n);
}

template <typename X, typename W>
void matmul(const MatmulShare<X, W>& share) {
  std::int64_t n = 0;
  for (; n + kTileOutputs <= share.num_outputs; n += kTileOutputs) {
    matmul_strip<kTileOutputs>(share, n);
  }
  for (; n < share.num_outputs; ++n) matmul_strip<1>(share, n);
}

}  // namespace tinyvllm::TINYVLLM_ISA
