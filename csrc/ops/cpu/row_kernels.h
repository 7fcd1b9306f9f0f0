// Kernels over one row of activations: normalisation, rotation, activation function, conversion.
#pragma once

#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

template <typename Out>
void rms_norm(const float* x, const float* weight, float eps, std::int64_t size, Out* out) {
  Float sums{};
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sums = multiply_add(load(x + i), load(x + i), sums);
  if (i < size) {
    const Float tail = load_partial(x + i, size - i);
    sums = multiply_add(tail, tail, sums);
  }
  const float mean = horizontal_sum(sums) / static_cast<float>(size);
  const Float scale = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for (i = 0; i + kLanes <= size; i += kLanes) {
    store(out + i, load(x + i) * scale * load(weight + i));
  }
  if (i < size) {
    store_partial(out + i,
                  load_partial(x + i, size - i) * scale * load_partial(weight + i, size - i),
                  size - i);
  }
}

inline void rotate(float* heads, std::int64_t num_heads, const float* cos_sin,
                   std::int64_t head_dim) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t h = 0; h < num_heads; ++h) {
    float *left = heads + h * head_dim, *right = left + half;
    const float *cos = cos_sin, *sin = cos_sin + half;
    std::int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const Float a = load(left + i), b = load(right + i);
      store(left + i, a * load(cos + i) - b * load(sin + i));
      store(right + i, b * load(cos + i) + a * load(sin + i));
    }
    for (; i < half; ++i) {
      const float a = left[i], b = right[i];
      left[i] = a * cos[i] - b * sin[i];
      right[i] = b * cos[i] + a * sin[i];
    }
  }
}

template <typename Out>
void divide(const float* sums, float total, std::int64_t size, Out* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(sums + i) / total);
  if (i < size) store_partial(out + i, load_partial(sums + i, size - i) / total, size - i);
}

// Below -88, where our e^-x ends, silu is 0 to within 1e-36; x * 0 lets infinity and NaN show.
TINYVLLM_INLINE Float silu(Float x) { return x < -88.0f ? x * 0.0f : x / (exp(-x) + 1.0f); }

template <typename Out>
void silu_mul(const float* gate, const float* up, std::int64_t size, Out* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    __builtin_prefetch(gate + i + 256);  // many rows come from the L3 cache or from memory
    __builtin_prefetch(up + i + 256);
    store(out + i, silu(load(gate + i)) * load(up + i));
  }
  if (i < size) {
    store_partial(out + i, silu(load_partial(gate + i, size - i)) * load_partial(up + i, size - i),
                  size - i);
  }
}

inline float finite_maximum(const float* x, std::int64_t size) {
  Float maxima = broadcast(-__builtin_inff()), flaws{};  // x * 0 lets infinity and NaN show
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Float v = load(x + i);
    maxima = v > maxima ? v : maxima;
    flaws += v * 0.0f;
  }
  float maximum = horizontal_maximum(maxima), flaw = horizontal_sum(flaws);
  for (; i < size; ++i) {
    maximum = x[i] > maximum ? x[i] : maximum;
    flaw += x[i] * 0.0f;
  }
  return maximum + flaw;
}

inline void convert_to_bfloat16(const float* x, std::int64_t size, BFloat16* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(x + i));
  if (i < size) store_partial(out + i, load_partial(x + i, size - i), size - i);
}

inline void convert_to_float(const BFloat16* x, std::int64_t size, float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(x + i));
  if (i < size) store_partial(out + i, load_partial(x + i, size - i), size - i);
}

}  // namespace tinyvllm::TINYVLLM_ISA
