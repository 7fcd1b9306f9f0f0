// The tensor-core kernel of y = x W^T for few rows of x: it streams the weights once, at the rate
// of the memory, and leaves room for the next kernel to begin its own stream meanwhile.
//
// One block computes tiles of kTileOutputs outputs x kTileRows rows, one after the other; its eight
// warps share the depth, each a contiguous range of it. A warp copies its own slices of the weights
// (and of x) through a ring in shared memory, asynchronously and far ahead, and waits for no other
// warp until the eight partial sums are added, in the order of the warps.
//
// The weights are the 16-row side of the product, so that eight rows of x waste nothing. A product
// does not care which k is which as long as both sides agree: lane (g, t) takes elements 8t .. 8t +
// 7 of 32 for its two products, so that every fragment is one 16-byte load from shared memory.
//
// The order in which an output is summed depends on the depth only, never on the shape of the tiles
// or the number of rows: all instances of this kernel give the same bits
// (docs/promises.md, 2), save those that normalise x themselves.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bfloat16.h"
#include "cuda/device.h"
#include "ops/cuda/store.h"

namespace tinyvllm::cuda {

enum class Epilogue {
  kStore,   // out[m, n] = y[m, n]
  kAdd,     // out[m, n] += y[m, n]
  kSwiGlu,  // out[m, i] = silu(y[m, i]) * y[m, outputs / 2 + i]
};

struct StreamingArguments {
  const BFloat16* weight;  // [outputs, depth], aligned to 16 bytes, the depth a multiple of 8
  std::int64_t outputs;
  std::int64_t depth;
  const void* x;  // [rows, depth] bfloat16, or float32 to be normalised; rows aligned to 16
  std::int64_t x_stride;
  int rows;
  const float* norm;  // [depth], aligned to 16, and eps: where the kernel normalises
  float eps;
  const float* bias;  // [outputs], or null
  void* out;
  std::int64_t out_stride;
};

inline constexpr int kStreamingWarps = 8;
inline constexpr int kStreamingThreads = kStreamingWarps * kWarpSize;

// kRowTiles x 16 outputs by kColumnTiles x 8 rows of x a tile; kSlice elements of the depth a step
// of the ring, kStages steps in it.
template <int kRowTiles_, int kColumnTiles_, int kSlice_, int kStages_>
struct StreamingShape {
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kSlice = kSlice_;
  static constexpr int kStages = kStages_;

  static constexpr int kTileOutputs = 16 * kRowTiles;
  static constexpr int kTileRows = 8 * kColumnTiles;
  // Column tiles whose partial sums meet in shared memory at a time.
  static constexpr int kRoundTiles = kColumnTiles < 4 ? kColumnTiles : 4;
  static constexpr int kSliceBytes = 2 * kSlice;  // of one row

  // Blocks of a multiprocessor that the registers suffice for.
  static constexpr int kBlocksInRegisters = kRowTiles * kColumnTiles <= 16 ? 2 : 1;

  static_assert(kSlice == 32 || kSlice == 64 || kSlice == 128);
};

// How the block's shared memory is carved up.
template <typename Shape>
struct StreamingLayout {
  std::size_t normalized;  // bytes of a row of the normalised x, 0 where x comes through the ring
  std::size_t stage;       // bytes of a step of a warp's ring
  std::size_t ring, sums, scales, total;  // offsets, and the size of it all

  __host__ __device__ StreamingLayout(std::int64_t depth, int rows, bool normalises) {
    // The half line between rows spreads the eight rows of a fragment over all banks.
    normalized = normalises ? static_cast<std::size_t>(padded_depth(depth)) * 2 + 64 : 0;
    const int x_rows = rows < Shape::kTileRows ? rows : Shape::kTileRows;
    stage = static_cast<std::size_t>(Shape::kTileOutputs + (normalises ? 0 : x_rows)) *
            Shape::kSliceBytes;
    ring = 0;
    sums = kStreamingWarps * Shape::kStages * stage;
    scales = sums + sizeof(float4) * kStreamingWarps * Shape::kRoundTiles * kWarpSize;
    total = scales + sizeof(float) * (kStreamingWarps + 1) * Shape::kTileRows;
    total = (total + 127) / 128 * 128;
    if (normalises) total += static_cast<std::size_t>(x_rows) * normalized;
  }

  // Where the last step of a warp ends at most; zeros from the depth to there.
  __host__ __device__ static std::int64_t padded_depth(std::int64_t depth) {
    return (depth + 63) / 64 * 64 + (Shape::kSlice > 64 ? Shape::kSlice - 64 : 0);
  }

  __device__ std::size_t normalized_rows(int rows) const {
    return total - static_cast<std::size_t>(rows) * normalized;
  }
};

// Where 16-byte column `column` of row `row` lies in a slice. Two rows of 64 bytes fill the banks
// by themselves; of rows of 128 bytes every other one swaps its halves, so that eight lanes that
// read four columns of two rows meet no bank twice.
template <typename Shape>
__device__ inline int slice_offset(int row, int column) {
  const int swap = Shape::kSlice > 32 ? (row & 1) * 4 : 0;
  return row * Shape::kSliceBytes + (column ^ swap) * 16;
}

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

// The outputs of a tile, each of the two halves counted once for SwiGLU.
template <typename Shape, Epilogue kEpilogue>
inline constexpr int kTileGroup =
    kEpilogue == Epilogue::kSwiGlu ? Shape::kTileOutputs / 2 : Shape::kTileOutputs;

template <typename Shape, Epilogue kEpilogue>
__host__ __device__ inline int num_streaming_tiles(std::int64_t outputs, int rows) {
  if (kEpilogue == Epilogue::kSwiGlu) outputs /= 2;
  constexpr int kGroup = kTileGroup<Shape, kEpilogue>;
  return static_cast<int>((outputs + kGroup - 1) / kGroup) *
         ((rows + Shape::kTileRows - 1) / Shape::kTileRows);
}

// Writes x * norm to `normalized`, rounded, and adds up this thread's squares of x. The scales of
// the norm that were loaded before x was there are those of the first two rounds.
template <typename Shape, int kNormRows>
__device__ inline void multiply_by_norm(const StreamingArguments& a,
                                        const float4 (&early_scales)[2], std::byte* normalized,
                                        std::size_t row_bytes, float (&squares)[kNormRows]) {
  const auto* x = static_cast<const float*>(a.x);
#pragma unroll 2
  for (int i = 0, k = 4 * static_cast<int>(threadIdx.x);
       k < StreamingLayout<Shape>::padded_depth(a.depth); ++i, k += 4 * kStreamingThreads) {
    const bool inside = k < a.depth;
    float4 scale = {0, 0, 0, 0};
    if (i == 0) {
      scale = early_scales[0];
    } else if (i == 1) {
      scale = early_scales[1];
    } else if (inside) {
      scale = *reinterpret_cast<const float4*>(a.norm + k);
    }
    float4 values[kNormRows];
#pragma unroll
    for (int m = 0; m < kNormRows; ++m) {
      values[m] = {0, 0, 0, 0};
      if (inside && m < a.rows) {
        values[m] = *reinterpret_cast<const float4*>(x + m * a.x_stride + k);
      }
    }
#pragma unroll
    for (int m = 0; m < kNormRows; ++m) {
      const float4 v = values[m];
      squares[m] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      if (m < a.rows) {
        *reinterpret_cast<uint2*>(normalized + m * row_bytes + k * 2) = {
            pack_bfloat16(v.x * scale.x, v.y * scale.y),
            pack_bfloat16(v.z * scale.z, v.w * scale.w)};
      }
    }
  }
}

// products[i][j] += the weights of a slice, 16 rows i, times eight rows j of x. x_at(row, half) is
// where this lane's eight elements of x lie, of each 32.
template <typename Shape, typename XAt>
__device__ inline void multiply_slice(const std::byte* slice, XAt&& x_at,
                                      float (&products)[Shape::kRowTiles][Shape::kColumnTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int group = lane / 4, pair = lane % 4;
#pragma unroll
  for (int half = 0; half < Shape::kSlice / 32; ++half) {
    uint4 x[Shape::kColumnTiles];
#pragma unroll
    for (int j = 0; j < Shape::kColumnTiles; ++j) {
      x[j] = *reinterpret_cast<const uint4*>(x_at(j * 8 + group, half));
    }
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
      const auto weights_at = [&](int row) {
        return slice + slice_offset<Shape>(i * 16 + row, half * 4 + pair);
      };
      const uint4 low = *reinterpret_cast<const uint4*>(weights_at(group));
      const uint4 high = *reinterpret_cast<const uint4*>(weights_at(group + 8));
#pragma unroll
      for (int j = 0; j < Shape::kColumnTiles; ++j) {
        multiply_add_16x8x16(products[i][j], {low.x, high.x, low.y, high.y}, x[j].x, x[j].y);
        multiply_add_16x8x16(products[i][j], {low.z, high.z, low.w, high.w}, x[j].z, x[j].w);
      }
    }
  }
}

// kNormRows > 0: x is the float32 residual stream, at most so many rows of it. Each block
// multiplies it by the norm's weights and rounds it to bfloat16; the scale 1 / sqrt(mean(x^2) +
// eps) of a row is applied to the sums.
template <typename Shape, int kNormRows, Epilogue kEpilogue, typename Out>
__global__ void __launch_bounds__(kStreamingThreads, Shape::kBlocksInRegisters)
    streaming_matmul(StreamingArguments a) {
  constexpr int kRowTiles = Shape::kRowTiles, kColumnTiles = Shape::kColumnTiles;
  constexpr int kSlice = Shape::kSlice, kStages = Shape::kStages;
  constexpr int kVectors = kSlice / 8;                // of 16 bytes in a row of a slice
  constexpr int kRowsPerCopy = kWarpSize / kVectors;  // that a warp copies at a time
  constexpr bool kNormalises = kNormRows > 0;
  static_assert(!kNormalises || (kColumnTiles == 1 && kNormRows <= 8));

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int group = lane / 4, pair = lane % 4;  // g and t of the fragments
  std::byte* shared = shared_memory();
  const StreamingLayout<Shape> layout(a.depth, a.rows, kNormalises);
  std::byte* ring = shared + layout.ring + static_cast<std::size_t>(warp) * kStages * layout.stage;
  auto* sums = reinterpret_cast<float4*>(shared + layout.sums);
  auto* scales = reinterpret_cast<float*>(shared + layout.scales);  // [rows], then [rows][warps]
  std::byte* normalized = shared + layout.normalized_rows(a.rows);

  // This warp's range of the depth, in units of 64 so that it is the same for every shape.
  const auto depth = static_cast<int>(a.depth);
  const int share = ((depth + 63) / 64 + kStreamingWarps - 1) / kStreamingWarps * 64;
  const int first_k = min(warp * share, depth), last_k = min(first_k + share, depth);
  const int steps = (last_k - first_k + kSlice - 1) / kSlice;

  // The tiles of this block. Blocks that run side by side take the same weights for other rows of
  // x.
  const int group_outputs =
      static_cast<int>(kEpilogue == Epilogue::kSwiGlu ? a.outputs / 2 : a.outputs);
  constexpr int kGroupOutputs = kTileGroup<Shape, kEpilogue>;
  const int column_blocks = (a.rows + Shape::kTileRows - 1) / Shape::kTileRows;
  const int num_tiles = num_streaming_tiles<Shape, kEpilogue>(a.outputs, a.rows);

  // The row of the weights that is row `row` of a tile, and whether it is there. For SwiGLU the
  // second half of each 16 rows is the up rows of the first half's gate rows, so that one lane
  // holds both.
  struct WeightRow {
    std::int64_t row;
    bool inside;
  };
  const auto weight_row_of = [&](int tile, int row) -> WeightRow {
    const int first = tile / column_blocks * kGroupOutputs;
    if constexpr (kEpilogue == Epilogue::kSwiGlu) {
      const int output = first + row / 16 * 8 + row % 8;
      return {output + (row % 16 < 8 ? 0 : group_outputs), output < group_outputs};
    }
    return {first + row, first + row < group_outputs};
  };
  const auto copy_weights = [&](std::byte* stage, int tile, int k) {
    const int column = lane % kVectors;
#pragma unroll
    for (int i = 0; i < Shape::kTileOutputs / kRowsPerCopy; ++i) {
      const int row = lane / kVectors + i * kRowsPerCopy;
      const auto [weight_row, inside] = weight_row_of(tile, row);
      copy_async_16(stage + slice_offset<Shape>(row, column),
                    a.weight + weight_row * a.depth + k + column * 8,
                    inside && k + column * 8 < last_k);
    }
  };
  const auto copy_x = [&](std::byte* stage, int tile, int k) {
    const int first = tile % column_blocks * Shape::kTileRows;
    const int rows = min(a.rows - first, Shape::kTileRows);
    const int column = lane % kVectors;
    const auto* x = static_cast<const BFloat16*>(a.x) + first * a.x_stride;
#pragma unroll
    for (int i = 0; i < (Shape::kTileRows + kRowsPerCopy - 1) / kRowsPerCopy; ++i) {
      const int row = lane / kVectors + i * kRowsPerCopy;
      if (row >= rows) break;
      copy_async_16(stage + slice_offset<Shape>(Shape::kTileOutputs + row, column),
                    x + row * a.x_stride + k + column * 8, k + column * 8 < last_k);
    }
  };

  // What goes into the ring next, `kStages` steps ahead of what is multiplied.
  int next_tile = static_cast<int>(blockIdx.x), next_k = first_k;
  const auto advance = [&] {
    next_k += kSlice;
    if (next_k >= last_k) {
      next_k = first_k;
      next_tile += static_cast<int>(gridDim.x);
    }
  };

  // The weights are nobody's output: their copies begin before the wait.
  if (steps > 0) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (next_tile < num_tiles) copy_weights(ring + stage * layout.stage, next_tile, next_k);
      if constexpr (kNormalises) commit_copies();
      advance();
    }
  }
  float4 early_scales[2];
  if constexpr (kNormalises) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = 4 * (static_cast<int>(threadIdx.x) + i * kStreamingThreads);
      early_scales[i] =
          k < depth ? *reinterpret_cast<const float4*>(a.norm + k) : float4{0, 0, 0, 0};
    }
  }
  // A next kernel that streams weights, too, begins when this block has asked for the last of its
  // own: the memory is then busy while sums meet here and the next kernel waits for them. Behind a
  // product that only stores come attention or the draw, which have little to read and many loads
  // that need one another: the earlier they begin, the better.
  constexpr bool kEarly = kNormalises && kEpilogue == Epilogue::kStore;
  if (kEarly || next_tile >= num_tiles) let_next_begin();
  wait_for_previous();

  float squares[kNormalises ? kNormRows : 1] = {};
  if constexpr (kNormalises) {
    multiply_by_norm<Shape>(a, early_scales, normalized, layout.normalized, squares);
    __syncthreads();
  } else if (steps > 0) {
    int tile = static_cast<int>(blockIdx.x), k = first_k;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (tile < num_tiles) copy_x(ring + stage * layout.stage, tile, k);
      commit_copies();
      k += kSlice;
      if (k >= last_k) {
        k = first_k;
        tile += static_cast<int>(gridDim.x);
      }
    }
  }

  int stage = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < num_tiles;
       tile += static_cast<int>(gridDim.x)) {
    const int first_output = tile / column_blocks * kGroupOutputs;
    const int first_row = tile % column_blocks * Shape::kTileRows;

    // What a thread adds its sums to is on its way while they are summed.
    float addends[2][2] = {};
    if constexpr (kEpilogue == Epilogue::kAdd && kRowTiles == 1 && kColumnTiles <= 4) {
      if (warp < kColumnTiles) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int row = first_row + warp * 8 + pair * 2 + c;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int output = first_output + group + 8 * h;
            if (row < a.rows && output < group_outputs) {
              addends[h][c] = static_cast<const Out*>(a.out)[row * a.out_stride + output];
            }
          }
        }
      }
    }

    float products[kRowTiles][kColumnTiles][4] = {};
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 1>();
      __syncwarp();
      const std::byte* slice = ring + stage * layout.stage;
      // The rows behind the last one are never stored: any value serves.
      const int last_row = a.rows - first_row - 1;
      multiply_slice<Shape>(
          slice,
          [&](int row, int half) {
            row = min(row, last_row);
            return kNormalises
                       ? normalized + row * layout.normalized +
                             (first_k + step * kSlice + half * 32 + pair * 8) * 2
                       : slice + slice_offset<Shape>(Shape::kTileOutputs + row, half * 4 + pair);
          },
          products);
      __syncwarp();
      if (next_tile < num_tiles) {
        copy_weights(ring + stage * layout.stage, next_tile, next_k);
        if constexpr (!kNormalises) copy_x(ring + stage * layout.stage, next_tile, next_k);
        advance();
        if (!kEarly && next_tile >= num_tiles) let_next_begin();
      }
      commit_copies();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    if (kNormalises && tile == static_cast<int>(blockIdx.x)) {
#pragma unroll
      for (int m = 0; m < kNormRows; ++m) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
          squares[m] += __shfl_xor_sync(kAllLanes, squares[m], offset);
        }
        if (lane == 0) scales[Shape::kTileRows + m * kStreamingWarps + warp] = squares[m];
      }
    }

    // The eight partial sums of each product meet, kRoundTiles x 8 columns at a time.
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int round = 0; round < kColumnTiles; round += Shape::kRoundTiles) {
        __syncthreads();  // the round before has been read
        if (kNormalises && tile == static_cast<int>(blockIdx.x) && i == 0 &&
            static_cast<int>(threadIdx.x) < kNormRows) {
          float total = 0;
#pragma unroll
          for (int w = 0; w < kStreamingWarps; ++w) {
            total += scales[Shape::kTileRows + static_cast<int>(threadIdx.x) * kStreamingWarps + w];
          }
          scales[threadIdx.x] = 1.0f / sqrtf(total / static_cast<float>(depth) + a.eps);
        }
#pragma unroll
        for (int j = 0; j < Shape::kRoundTiles; ++j) {
          const float(&p)[4] = products[i][round + j];
          sums[(warp * Shape::kRoundTiles + j) * kWarpSize + lane] = {p[0], p[1], p[2], p[3]};
        }
        __syncthreads();
        if (warp >= Shape::kRoundTiles) continue;
        float y[4] = {};
#pragma unroll
        for (int w = 0; w < kStreamingWarps; ++w) {
          const float4 part = sums[(w * Shape::kRoundTiles + warp) * kWarpSize + lane];
          y[0] += part.x, y[1] += part.y, y[2] += part.z, y[3] += part.w;
        }
        const int column = (round + warp) * 8 + pair * 2;
        const int upper = first_output + i * (kEpilogue == Epilogue::kSwiGlu ? 8 : 16) + group;
        auto* out = static_cast<Out*>(a.out) + (first_row + column) * a.out_stride;
#pragma unroll
        for (int c = 0; c < 2; ++c, out += a.out_stride) {
          if (first_row + column + c >= a.rows) break;
          const float scale = kNormalises ? scales[column + c] : 1.0f;
          const auto value = [&](float sum, int output) {
            return sum * scale + (a.bias == nullptr ? 0.0f : a.bias[output]);
          };
          if constexpr (kEpilogue == Epilogue::kSwiGlu) {
            if (upper < group_outputs) {
              const float gate = value(y[c], upper);
              store(out + upper, silu(gate) * value(y[2 + c], group_outputs + upper));
            }
          } else {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int output = upper + 8 * h;
              if (output >= group_outputs) continue;
              const float result = value(y[2 * h + c], output);
              if constexpr (kEpilogue == Epilogue::kAdd) {
                const float before =
                    kRowTiles == 1 && kColumnTiles <= 4 ? addends[h][c] : out[output];
                store(out + output, before + result);
              } else {
                store(out + output, result);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace tinyvllm::cuda
