// y = x W^T + b without tensor cores, for any sizes, strides and addresses and for float32:
// products in float32, exactly as written. A warp computes a few outputs of a few rows; its lanes
// stride along the depth, and their sums meet in a tree. The order of an output's sum depends on
// the depth only.
#pragma once

#include <cstdint>

#include "base/bfloat16.h"
#include "cuda/device.h"
#include "ops/cuda/store.h"

namespace tinyvllm::cuda {

inline constexpr int kPlainWarps = 8;
inline constexpr int kPlainThreads = kPlainWarps * kWarpSize;
inline constexpr int kPlainOutputs = 4;  // of a warp
inline constexpr int kPlainRows = 8;     // of a block

template <typename X, typename W>
struct PlainArguments {
  const X* x;  // [rows, depth]
  std::int64_t x_stride;
  const W* weight;  // [outputs, depth]
  const float* bias;
  std::int64_t rows, outputs, depth;
  std::int64_t out_stride;
};

template <typename X, typename W, typename Out>
__global__ void __launch_bounds__(kPlainThreads)
    plain_matmul(PlainArguments<X, W> a, Out* out, bool accumulate) {
  let_next_begin();
  wait_for_previous();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t first_output =
      (static_cast<std::int64_t>(blockIdx.x) * kPlainWarps + warp) * kPlainOutputs;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * kPlainRows;
  if (first_output >= a.outputs) return;

  // What lies behind the last row or output is computed from the last one and not stored.
  const X* x[kPlainRows];
  const W* weight[kPlainOutputs];
#pragma unroll
  for (int m = 0; m < kPlainRows; ++m) {
    x[m] = a.x + min(first_row + m, a.rows - 1) * a.x_stride;
  }
#pragma unroll
  for (int n = 0; n < kPlainOutputs; ++n) {
    weight[n] = a.weight + min(first_output + n, a.outputs - 1) * a.depth;
  }

  float sums[kPlainRows][kPlainOutputs] = {};
  for (std::int64_t k = lane; k < a.depth; k += kWarpSize) {
    float w[kPlainOutputs];
#pragma unroll
    for (int n = 0; n < kPlainOutputs; ++n) w[n] = to_float(weight[n][k]);
#pragma unroll
    for (int m = 0; m < kPlainRows; ++m) {
      const float value = to_float(x[m][k]);
#pragma unroll
      for (int n = 0; n < kPlainOutputs; ++n) sums[m][n] = __fmaf_rn(value, w[n], sums[m][n]);
    }
  }
#pragma unroll
  for (int m = 0; m < kPlainRows; ++m) {
#pragma unroll
    for (int n = 0; n < kPlainOutputs; ++n) {
      float sum = sums[m][n];
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, offset);
      }
      const std::int64_t row = first_row + m, output = first_output + n;
      if (lane == m * kPlainOutputs + n && row < a.rows && output < a.outputs) {
        if (a.bias != nullptr) sum += a.bias[output];
        Out* address = out + row * a.out_stride + output;
        if (accumulate) sum += to_float(*address);
        store(address, sum);
      }
    }
  }
}

}  // namespace tinyvllm::cuda
