// Elements of rows in the kernels: several at a time, as float32 whatever they are stored as.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/dtype.h"
#include "base/tensor.h"
#include "cuda/device.h"

namespace tinyvllm::cuda {

// --- On the device ----------------------------------------------------------------------------------

// kWidth consecutive elements, 1, 4 or 8: more than one go through loads of 8 or 16 bytes, and the
// address is aligned to as many bytes (see wide_rows).
template <int kWidth>
__device__ inline void load(const float* address, float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    values[0] = *address;
  } else {
    for (int i = 0; i < kWidth; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(address + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }
}

template <int kWidth>
__device__ inline void load(const BFloat16* address, float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    values[0] = to_float(*address);
  } else if constexpr (kWidth == 4) {
    const uint2 packed = *reinterpret_cast<const uint2*>(address);
    values[0] = low_bfloat16(packed.x), values[1] = high_bfloat16(packed.x);
    values[2] = low_bfloat16(packed.y), values[3] = high_bfloat16(packed.y);
  } else {
    const uint4 packed = *reinterpret_cast<const uint4*>(address);
    values[0] = low_bfloat16(packed.x), values[1] = high_bfloat16(packed.x);
    values[2] = low_bfloat16(packed.y), values[3] = high_bfloat16(packed.y);
    values[4] = low_bfloat16(packed.z), values[5] = high_bfloat16(packed.z);
    values[6] = low_bfloat16(packed.w), values[7] = high_bfloat16(packed.w);
  }
}

template <int kWidth>
__device__ inline void store(float* address, const float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    *address = values[0];
  } else {
    for (int i = 0; i < kWidth; i += 4) {
      *reinterpret_cast<float4*>(address + i) =
          make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  }
}

template <int kWidth>
__device__ inline void store(BFloat16* address, const float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    *address = to_bfloat16(values[0]);
  } else if constexpr (kWidth == 4) {
    *reinterpret_cast<uint2*>(address) =
        make_uint2(pack_bfloat16(values[0], values[1]), pack_bfloat16(values[2], values[3]));
  } else {
    *reinterpret_cast<uint4*>(address) =
        make_uint4(pack_bfloat16(values[0], values[1]), pack_bfloat16(values[2], values[3]),
                   pack_bfloat16(values[4], values[5]), pack_bfloat16(values[6], values[7]));
  }
}

// The sum over the lanes of each group of `width` lanes, a power of two, given to all of them. The
// whole warp calls it.
__device__ inline float lanes_sum(float value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// The sum over the block, given to all threads: warps first, then one warp over their sums. The
// block has whole warps; `scratch` is one float a warp.
__device__ inline float block_sum(float value, float* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  value = lanes_sum(value, kWarpSize);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return lanes_sum(lane < num_warps ? scratch[lane] : 0.0f, kWarpSize);
}

// --- On the host ------------------------------------------------------------------------------------

// Calls f with a value of the element type: kernels are templates on it.
template <typename F>
void with_element(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) {
    f(BFloat16{});
  } else {
    f(float{});
  }
}

// Calls f with the number of elements to take at a time, as a constant: kWidth or 1.
template <int kWidth, typename F>
void with_width(bool wide, F&& f) {
  if (wide) {
    f(std::integral_constant<int, kWidth>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// Whether `width` elements at a time, from the start of a row on, are as aligned as load and store
// want them.
inline bool wide_elements(const void* data, DType dtype, std::int64_t row_stride, int width) {
  const std::uint64_t bytes = std::uint64_t{16} < width * size_of(dtype)
                                  ? std::uint64_t{16}
                                  : static_cast<std::uint64_t>(width) * size_of(dtype);
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0 && row_stride % width == 0;
}
inline bool wide_rows(TensorView view, int width) {
  return wide_elements(view.data, view.dtype, view.row_stride, width) && view.cols % width == 0;
}

}  // namespace tinyvllm::cuda
