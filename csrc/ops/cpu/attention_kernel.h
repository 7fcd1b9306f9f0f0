// Attention of one token over its paged context, with an online softmax (Milakov & Gimelshein 2018;
// FlashAttention, Dao et al. 2022): the scores of a tile are used and forgotten, and what was
// summed under an older maximum is scaled down when a larger score appears.
//
// A position outside [first, last] is never read: its slot may hold anything.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

inline constexpr float kMinusInfinity = -__builtin_inff();

TINYVLLM_INLINE float exp(float x) { return exp(broadcast(x))[0]; }

template <typename Kv>
TINYVLLM_INLINE float dot(const float* query, const Kv* key, std::int64_t size) {
  Float sum{};
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sum = multiply_add(load(query + i), load(key + i), sum);
  if (i < size) {
    sum = multiply_add(load_partial(query + i, size - i), load_partial(key + i, size - i), sum);
  }
  return horizontal_sum(sum);
}

// x[i] = x[i] * scale + y[i] * weight
template <typename T>
TINYVLLM_INLINE void scale_and_add(float* x, float scale, const T* y, float weight,
                                   std::int64_t size) {
  const Float scales = broadcast(scale), weights = broadcast(weight);
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store(x + i, multiply_add(load(y + i), weights, load(x + i) * scales));
  }
  if (i < size) {
    const Float sum = multiply_add(load_partial(y + i, size - i), weights,
                                   load_partial(x + i, size - i) * scales);
    store_partial(x + i, sum, size - i);
  }
}

// The state of an online softmax over values: maximum score, sum of weights, weighted sum of
// values.
struct Softmax {
  float maximum = kMinusInfinity;
  float total = 0.0f;
};

template <typename Kv>
TINYVLLM_INLINE std::int64_t slot_offset(const AttentionShare<Kv>& share, std::int64_t position) {
  const std::int64_t block = share.block_table[position / share.block_size];
  return block * share.block_stride + (position % share.block_size) * share.head_dim;
}

// Adds the positions first..last, which lie in one tile, to the state of one query head.
template <typename Kv>
TINYVLLM_INLINE void attend_tile(const AttentionShare<Kv>& share, const float* query,
                                 const std::int64_t (&offsets)[kAttentionTile], std::int64_t first,
                                 std::int64_t last, Softmax& state, float* sum) {
  alignas(64) float weights[kAttentionTile];
  for (std::int64_t j = 0; j < kAttentionTile; ++j) weights[j] = kMinusInfinity;
  float maximum = state.maximum;
  for (std::int64_t j = first; j <= last; ++j) {
    weights[j] = dot(query, share.keys + offsets[j], share.head_dim) * share.scale;
    maximum = weights[j] > maximum ? weights[j] : maximum;
  }
  Float total{};
  for (std::int64_t j = 0; j < kAttentionTile; j += kLanes) {
    const Float weight = exp(load(weights + j) - broadcast(maximum));
    store(weights + j, weight);
    total += weight;
  }
  // The first value also scales what was summed before; exp(-inf) = 0 starts from nothing.
  float rescale = exp(state.maximum - maximum);
  state.total = state.total * rescale + horizontal_sum(total);
  state.maximum = maximum;
  for (std::int64_t j = first; j <= last; ++j, rescale = 1.0f) {
    scale_and_add(sum, rescale, share.values + offsets[j], weights[j], share.head_dim);
  }
}

template <typename Kv>
void attention(const AttentionShare<Kv>& share) {
  const std::int64_t dim = share.head_dim;
  float* sums = share.scratch;  // [group, head_dim]: the weighted values of the current split
  Softmax merged[kMaxGroup], state[kMaxGroup];
  for (std::int64_t i = 0; i < share.group * dim; ++i) share.out[i] = 0.0f;

  for (std::int64_t split = share.first / kAttentionSplit * kAttentionSplit; split <= share.last;
       split += kAttentionSplit) {
    for (std::int64_t g = 0; g < share.group; ++g) state[g] = {};
    for (std::int64_t i = 0; i < share.group * dim; ++i) sums[i] = 0.0f;
    for (std::int64_t tile = split; tile < split + kAttentionSplit; tile += kAttentionTile) {
      const std::int64_t first = share.first > tile ? share.first - tile : 0;
      const std::int64_t last =
          share.last - tile < kAttentionTile - 1 ? share.last - tile : kAttentionTile - 1;
      if (first >= kAttentionTile || last < 0) continue;
      std::int64_t offsets[kAttentionTile];
      for (std::int64_t j = first; j <= last; ++j) offsets[j] = slot_offset(share, tile + j);
      for (std::int64_t g = 0; g < share.group; ++g) {  // the group's heads share the tile in L1
        attend_tile(share, share.query + g * dim, offsets, first, last, state[g], sums + g * dim);
      }
    }
    for (std::int64_t g = 0; g < share.group; ++g) {
      Softmax& all = merged[g];
      const float maximum = state[g].maximum > all.maximum ? state[g].maximum : all.maximum;
      const float old_scale = exp(all.maximum - maximum);
      const float new_scale = exp(state[g].maximum - maximum);
      scale_and_add(share.out + g * dim, old_scale, sums + g * dim, new_scale, dim);
      all.total = all.total * old_scale + state[g].total * new_scale;
      all.maximum = maximum;
    }
  }
  for (std::int64_t g = 0; g < share.group; ++g) {
    for (std::int64_t i = 0; i < dim; ++i) share.out[g * dim + i] /= merged[g].total;
  }
}

}  // namespace tinyvllm::TINYVLLM_ISA
