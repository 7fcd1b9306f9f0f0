// Attention for every shape and dtype, in float32: a block for each query head of each token.
// Nothing is shared between them; what it reads twice comes from the cache.
#pragma once

#include <cmath>

#include "ops/cuda/attention.h"

namespace tinyvllm::cuda {

inline constexpr int kPlainWarps = 8;
inline constexpr int kPlainThreads = kPlainWarps * kWarpSize;
inline constexpr int kPlainMaxDim = 256;

// q [head_dim], then for each warp: sums [head_dim], maximum, total.
inline std::size_t plain_shared_bytes(int head_dim) {
  return sizeof(float) * static_cast<std::size_t>(head_dim + kPlainWarps * (head_dim + 2));
}

__device__ inline void store(float value, float* out) { *out = value; }
__device__ inline void store(float value, BFloat16* out) { *out = round_to_bfloat16(value); }

// Warp w takes the tiles of 32 positions w, w + 8, ... of the context, counted from its start: a
// lane has the score of one position, then some dimensions of the weighted sum. blockIdx.x: the
// decodes, then tile_tokens for every tile of a chunk.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    plain_attention_kernel(const AttentionArguments<T> a, int tile_tokens) {
  let_next_begin();
  wait_for_previous();
  const CudaSequences& sequences = a.sequences;
  const int dim = a.head_dim, head = static_cast<int>(blockIdx.y), kv_head = head / a.group();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;

  const int index = static_cast<int>(blockIdx.x) - sequences.num_decodes;
  int sequence = static_cast<int>(blockIdx.x), position = -1;
  std::int64_t row = sequence;
  if (index < 0) {
    position = sequences.context_lengths[sequence] - 1;
  } else {
    const int tile = index / tile_tokens, chunk = sequences.chunk_tiles[2 * tile];
    const int token = sequences.chunk_tiles[2 * tile + 1] + index % tile_tokens;
    const int start = sequences.chunk_starts[chunk];
    const int num_tokens = sequences.chunk_starts[chunk + 1] - start;
    if (token >= num_tokens) return;
    sequence = sequences.num_decodes + chunk;
    position = sequences.context_lengths[sequence] - num_tokens + token;
    row = static_cast<std::int64_t>(sequences.num_decodes) + start + token;
  }
  T* out = a.out + row * a.out_stride + head * dim;
  if (position < 0) {  // a padded row
    for (int i = static_cast<int>(threadIdx.x); i < dim; i += kPlainThreads) store(0.0f, out + i);
    return;
  }

  auto* query = reinterpret_cast<float*>(shared_memory());
  const T* q = a.q + row * a.q_stride + head * dim;
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += kPlainThreads)
    query[i] = to_float(q[i]);
  __syncthreads();

  const std::int32_t* table = a.block_table(sequence);
  const int first = a.first_seen(position);
  float maximum = kMinusInfinity, total = 0.0f;
  float sums[kPlainMaxDim / kWarpSize] = {};  // of the dimensions lane, lane + 32, ...
  const int begin_tile = first / kWarpSize;
  for (int tile = begin_tile + ((warp - begin_tile) & (kPlainWarps - 1));
       tile * kWarpSize <= position; tile += kPlainWarps) {
    const int mine = tile * kWarpSize + lane;
    float score = kMinusInfinity;
    if (mine >= first && mine <= position) {
      const T* key = a.keys + a.offset(table, kv_head, mine);
      float dots[4] = {};
      for (int i = 0; i < dim; ++i)
        dots[i % 4] = __fmaf_rn(query[i], to_float(key[i]), dots[i % 4]);
      score = (dots[0] + dots[1] + (dots[2] + dots[3])) * a.scale;
    }
    float highest = fmaxf(maximum, score);
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, step));
    }
    const float rescale = expf(maximum - highest), weight = expf(score - highest);
    maximum = highest;
    total = total * rescale + weight;
    for (float& sum : sums) sum *= rescale;
    const int begin = first > tile * kWarpSize ? first - tile * kWarpSize : 0;
    const int end = min(kWarpSize, position + 1 - tile * kWarpSize);
    for (int j = begin; j < end; ++j) {
      const float shared_weight = __shfl_sync(kAllLanes, weight, j);
      const T* value = a.values + a.offset(table, kv_head, tile * kWarpSize + j);
#pragma unroll
      for (int i = 0; i < kPlainMaxDim / kWarpSize; ++i) {
        const int d = lane + i * kWarpSize;
        if (d < dim) sums[i] = __fmaf_rn(shared_weight, to_float(value[d]), sums[i]);
      }
    }
  }
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    total += __shfl_xor_sync(kAllLanes, total, step);
  }

  float* partials = query + dim;
  float* mine = partials + warp * (dim + 2);
#pragma unroll
  for (int i = 0; i < kPlainMaxDim / kWarpSize; ++i) {
    if (lane + i * kWarpSize < dim) mine[lane + i * kWarpSize] = sums[i];
  }
  if (lane == 0) mine[dim] = maximum, mine[dim + 1] = total;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += kPlainThreads) {
    float highest = kMinusInfinity, sum = 0.0f, all = 0.0f;
    for (int w = 0; w < kPlainWarps; ++w) highest = fmaxf(highest, partials[w * (dim + 2) + dim]);
    for (int w = 0; w < kPlainWarps; ++w) {
      const float* partial = partials + w * (dim + 2);
      const float weight = expf(partial[dim] - highest);
      sum += partial[i] * weight;
      all += partial[dim + 1] * weight;
    }
    store(sum / all, out + i);
  }
}

}  // namespace tinyvllm::cuda
