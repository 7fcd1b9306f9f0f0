// Decode attention on the tensor cores: one query token a sequence, its context cut into splits at
// fixed absolute positions (Flash-Decoding, Dao et al. 2023).
//
// Decoding is bound by reading K and V, so they go from memory straight into the registers of the
// product, 16 bytes a load, without shared memory between. A warp takes tiles of 16 positions; the
// query heads of one KV head are the 16 rows of m16n8k16. A group of 4 leaves 12 rows idle, and
// still the tensor cores wait for memory.
//
//   scores [16 heads, 16 positions] = q [16, head_dim] K^T      a row of K is a column of operand b
//   sums   [16 heads, head_dim]    += weights [16, 16] V        a row of V is a row of operand b
//
// The order of the dimensions in the first product, and of the columns of the second, is free. Both
// are chosen so that what a lane holds lies side by side in memory. Lane = 4 g + t throughout.
#pragma once

#include "ops/cuda/attention.h"

namespace tinyvllm::cuda {

inline constexpr int kDecodeTile = 16;   // positions that a warp takes at once
inline constexpr int kDecodeHeads = 16;  // query heads of one KV head that a block takes

// A partial result over some positions, for `heads` query heads: sums [heads, head_dim] of
// exp2(score - maximum) V, then the maxima [heads], then the totals [heads] of the weights.
constexpr std::size_t partial_floats(int heads, int head_dim) {
  return static_cast<std::size_t>(heads) * static_cast<std::size_t>(head_dim + 2);
}

// The union of the partial results of the warps, in ascending order, for one head and one dimension.
struct PartialAttention {
  float sum, maximum, total;
};

template <int kWarps>
__device__ inline PartialAttention merge_warps(const float* partials, std::size_t stride, int heads,
                                               int head_dim, int head, int dim) {
  const float* maxima = partials + heads * head_dim + head;
  PartialAttention merged{0.0f, kMinusInfinity, 0.0f};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) merged.maximum = fmaxf(merged.maximum, maxima[i * stride]);
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const float weight = fast_exp2(maxima[i * stride] - merged.maximum);
    merged.sum += partials[i * stride + head * head_dim + dim] * weight;
    merged.total += maxima[i * stride + heads] * weight;
  }
  return merged;
}

// Floats of shared memory that merge_splits() takes.
constexpr std::size_t merging_floats(int heads, std::int64_t num_splits) {
  return static_cast<std::size_t>(heads) * static_cast<std::size_t>(2 * num_splits + 1);
}

// out [heads, kDim] = the union of the partial results of the splits, which other blocks have
// written; all threads of the block take part. A way to the L2 cache and back is most of what it
// takes, so that of up to 32 splits the weights and the sums are asked for at once.
//
//   partials  [num_splits, partial_floats], rows stride floats apart
template <int kDim, int kWarps>
__device__ inline void merge_splits(const float* partials, int num_splits, std::size_t stride,
                                    int heads, float* shared, BFloat16* out) {
  constexpr int kAtOnce = 32;
  float* weights = shared;                        // [num_splits, heads]
  float* totals = weights + num_splits * heads;   // [num_splits, heads]
  float* inverses = totals + num_splits * heads;  // [heads]
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;

  // A thread's first sums are on their way while the weights are found.
  const auto load_sums = [&](int i, int first, float(&sums)[kAtOnce]) {
    const float* from = partials + first * stride + i;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j, from += stride) {
      sums[j] = 0.0f;
      if (i < heads * kDim && first + j < num_splits) sums[j] = load_written(from);
    }
  };
  float sums[kAtOnce];
  load_sums(static_cast<int>(threadIdx.x), 0, sums);

  for (int head = warp; head < heads; head += kWarps) {  // a warp for each head
    const float* maxima = partials + heads * kDim + head;
    float maximum = kMinusInfinity, total = 0.0f;
    for (int i = lane; i < num_splits; i += kWarpSize) {
      weights[i * heads + head] = load_written(maxima + i * stride);
      totals[i * heads + head] = load_written(maxima + i * stride + heads);
      maximum = fmaxf(maximum, weights[i * heads + head]);
    }
#pragma unroll
    for (int i = kWarpSize / 2; i > 0; i /= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, i));
    }
    for (int i = lane; i < num_splits; i += kWarpSize) {
      const float weight = fast_exp2(weights[i * heads + head] - maximum);
      weights[i * heads + head] = weight;
      total += weight * totals[i * heads + head];
    }
#pragma unroll
    for (int i = kWarpSize / 2; i > 0; i /= 2) total += __shfl_xor_sync(kAllLanes, total, i);
    if (lane == 0) inverses[head] = 1.0f / total;
  }
  __syncthreads();

  for (int i = static_cast<int>(threadIdx.x); i < heads * kDim; i += kWarps * kWarpSize) {
    const int head = i / kDim;
    float sum = 0.0f;
    for (int first = 0; first < num_splits; first += kAtOnce) {
      if (i != static_cast<int>(threadIdx.x) || first > 0) load_sums(i, first, sums);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j < num_splits) sum += sums[j] * weights[(first + j) * heads + head];
      }
    }
    out[i] = round_to_bfloat16(sum * inverses[head]);
  }
}

// The part of a row [kDim] of q or K that a lane holds: of each 32 dimensions 8t to 8t + 7, which
// serve two steps of 16 in the sum; of a last 16, 4t to 4t + 3. Words 2s and 2s + 1 are step s.
// Zeros where the row is not valid: it may not even be there.
template <int kDim>
__device__ inline void load_along_row(const BFloat16* row, bool valid, int t,
                                      std::uint32_t (&words)[kDim / 8]) {
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const uint4 v = load_streaming(row + 32 * i + 8 * t, valid);
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }
  if constexpr (kDim % 32 != 0) {
    const auto* rest = reinterpret_cast<const std::uint32_t*>(row + kDim / 32 * 32 + 4 * t);
    words[kDim / 32 * 4] = valid ? rest[0] : 0;
    words[kDim / 32 * 4 + 1] = valid ? rest[1] : 0;
  }
}

// The part of a row [kDim] of V that a lane holds: of each 64 dimensions 8g to 8g + 7, and its
// eighth of what is left. Its two elements in word w belong to column g of products 2w and 2w + 1.
template <int kDim>
__device__ inline void load_across_row(const BFloat16* row, bool valid, int g,
                                       std::uint32_t (&words)[kDim / 16]) {
#pragma unroll
  for (int i = 0; i < kDim / 64; ++i) {
    const uint4 v = load_streaming(row + 64 * i + 8 * g, valid);
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }
  constexpr int kRest = kDim % 64;
  if constexpr (kRest != 0) {
    const auto* rest = reinterpret_cast<const std::uint32_t*>(row + kDim / 64 * 64 + kRest / 8 * g);
#pragma unroll
    for (int i = 0; i < kRest / 16; ++i) words[kDim / 64 * 4 + i] = valid ? rest[i] : 0;
  }
}

// What the fused kernel does to a new token's q and k before it attends; see ops/rope.h.
struct RopeArguments {
  const float* q_norm;  // null: none
  const float* k_norm;
  float eps;
  const float* cos_sin;  // [num_tokens, head_dim], rows stride floats apart
  std::int64_t stride;
};

// The cosines and sines of the left half of a row, in the layout of load_along_row.
template <int kDim>
struct Angles {
  float cosine[kDim / 8], sine[kDim / 8];
};

// Eight floats that no one writes; aligned to 16 bytes.
__device__ inline void load_eight(const float* from, float* to) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const uint4 v = load_streaming(from + i);
    to[i] = __uint_as_float(v.x), to[i + 1] = __uint_as_float(v.y);
    to[i + 2] = __uint_as_float(v.z), to[i + 3] = __uint_as_float(v.w);
  }
}

template <int kDim>
__device__ inline Angles<kDim> load_angles(const float* cos_sin, int t) {
  Angles<kDim> angles;
#pragma unroll
  for (int i = 0; i < kDim / 64; ++i) {
    load_eight(cos_sin + 32 * i + 8 * t, angles.cosine + 8 * i);
    load_eight(cos_sin + kDim / 2 + 32 * i + 8 * t, angles.sine + 8 * i);
  }
  return angles;
}

// Normalises and rotates a row in the layout of load_along_row. The dimensions d and d + kDim / 2
// lie in one lane where kDim is a multiple of 64; the four lanes of a row sum their squares.
template <int kDim>
__device__ inline void norm_and_rotate(std::uint32_t (&words)[kDim / 8], const float* norm,
                                       float eps, const Angles<kDim>& angles, int t) {
  static_assert(kDim % 64 == 0);
  float x[kDim / 4];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    x[2 * i] = low_bfloat16(words[i]), x[2 * i + 1] = high_bfloat16(words[i]);
  }
  if (norm != nullptr) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) squares += x[i] * x[i];
    squares += __shfl_xor_sync(kAllLanes, squares, 1);
    squares += __shfl_xor_sync(kAllLanes, squares, 2);
    const float scale = 1.0f / sqrtf(squares / static_cast<float>(kDim) + eps);
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      float weight[8];
      load_eight(norm + 32 * i + 8 * t, weight);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[8 * i + j] *= scale * weight[j];
    }
  }
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    const float left = x[i], right = x[i + kDim / 8];
    x[i] = left * angles.cosine[i] - right * angles.sine[i];
    x[i + kDim / 8] = right * angles.cosine[i] + left * angles.sine[i];
  }
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) words[i] = pack_bfloat16(x[2 * i], x[2 * i + 1]);
}

// The dimension that column g of product `i` stands for.
template <int kDim>
__device__ inline int dimension_of(int i, int g) {
  constexpr int kWhole = kDim / 64 * 8;  // products over whole 64 dimensions
  if (i < kWhole) return i / 8 * 64 + 8 * g + i % 8;
  return kDim / 64 * 64 + kDim % 64 / 8 * g + (i - kWhole);
}

// One block: the query heads of one KV head (up to 16 of them) over one split of one sequence.
// Warp w takes the tiles w, w + kWarps, ... of the context, counted from its start, and the warps
// are merged in order; the last block of a sequence to finish merges the splits in order. So who
// computes when, and where a window begins, changes no bit of a tile's result.
//
// kRotates: a.q are rows of qkv as the product left them. The blocks normalise and rotate q for
// themselves; the warp that has the newest position does so with k, and puts k and v into the
// cache.
//
// A block without a task leaves at once and makes room for the next kernel's. Some block always has
// one, so that the grid ends after the kernel before it.
//
//   partials  [*num_decode_items, num_kv_heads * head_tiles, partial_floats]  in the workspace
//   counters  [num_decodes, num_kv_heads * head_tiles]  zero, and zero again afterwards
// kWarps: 8 where few sequences leave SMs idle. Where many wait for their turn, blocks of 4 begin
// and end at more different times, and some always read.
template <int kDim, bool kRotates, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize, (kDim <= 64 ? 16 : 8) / kWarps)
    decode_attention_kernel(const AttentionArguments<BFloat16> a, const RopeArguments rope,
                            int split_size, float* partials, std::uint32_t* counters) {
  constexpr int kThreads = kWarps * kWarpSize;
  let_next_begin();
  const int group = a.group(), head_tiles = (group + kDecodeHeads - 1) / kDecodeHeads;
  const int shares = a.num_kv_heads * head_tiles;
  const int num_tasks = *a.sequences.num_decode_items * shares;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  const float scale = a.scale * kLog2e;
  auto* new_key = reinterpret_cast<BFloat16*>(shared_memory());  // [kDim], where kRotates
  auto* new_value = new_key + kDim;
  auto* is_last = reinterpret_cast<int*>(new_value + kDim);
  auto* shared = reinterpret_cast<float*>(is_last + 1);  // what is merged
  bool waited = false;

  // Up to the first K and V every load needs the one before it. At few sequences that is most of
  // the time, so what can be asked for early is, and checked later: the item, the block.
  for (int task = static_cast<int>(blockIdx.x);; task += static_cast<int>(gridDim.x)) {
    const int item = task / shares, share = task % shares;
    if (item >= a.sequences.max_decode_items) break;
    const int kv_head = share / head_tiles;
    const int first_head = kv_head * group + share % head_tiles * kDecodeHeads;
    const int heads = min(kDecodeHeads, (kv_head + 1) * group - first_head);
    const int sequence = a.sequences.decode_items[2 * item];
    const int split = a.sequences.decode_items[2 * item + 1];
    if (task >= num_tasks) break;
    const std::int32_t* table = a.block_table(sequence);
    const int context = a.sequences.context_lengths[sequence];
    // Without a window the warp's first tile does not depend on the context.
    const int first_tile = split * split_size / kDecodeTile + warp;
    std::int64_t offset = 0;
    if (a.window == 0 && first_tile * kDecodeTile / a.block_size < a.sequences.max_blocks) {
      offset = a.offset(table, kv_head, first_tile * kDecodeTile);
    }
    const int first = a.first_seen(context - 1);
    const int begin = max(first, split * split_size), end = min(context, (split + 1) * split_size);
    BFloat16* out = a.out + sequence * a.out_stride + first_head * kDim;
    if (begin >= end) {  // wholly before the window, or a padded row
      if (context > 0) continue;
      if (!waited) wait_for_previous();
      waited = true;
      for (int i = static_cast<int>(threadIdx.x); i < heads * kDim; i += kThreads) {
        out[i] = BFloat16{0};
      }
      continue;
    }

    // Tiles in this split: those that are congruent to the warp's number.
    const int end_tile = (end + kDecodeTile - 1) / kDecodeTile;
    int tile = first_tile;
    while (tile < begin / kDecodeTile) tile += kWarps;

    std::uint32_t keys[2][kDim / 8], values[4][kDim / 16];
    const auto valid = [&](int position) { return position >= begin && position < end; };
    // What is in the cache already when this kernel begins.
    const int end_of_cached = kRotates ? min(end, context - 1) : end;
    const auto cached = [&](int position) { return position >= begin && position < end_of_cached; };
    const auto load_keys = [&](int tile, std::int64_t offset) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 8 * i + g;
        load_along_row<kDim>(a.keys + offset + row * kDim, cached(tile * kDecodeTile + row), t,
                             keys[i]);
      }
    };
    const auto load_values = [&](int tile, std::int64_t offset) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * t + i % 2 + i / 2 * 8;
        load_across_row<kDim>(a.values + offset + row * kDim, cached(tile * kDecodeTile + row), g,
                              values[i]);
      }
    };

    // This step's own K and V are the work of the kernel before; older ones can be read before it.
    const bool any = tile < end_tile;
    const bool early = any && (kRotates || waited || (tile + 1) * kDecodeTile < context);
    if (any && a.window > 0) offset = a.offset(table, kv_head, tile * kDecodeTile);
    if (early) load_keys(tile, offset), load_values(tile, offset);
    if (tile + kWarps < end_tile) {  // the warp's second tile: its K, then its V
      const std::int64_t row =
          a.offset(table, kv_head, (tile + kWarps) * kDecodeTile) + lane % kDecodeTile * kDim;
#pragma unroll
      for (int i = 0; i < kDim; i += 64)
        prefetch((lane < kDecodeTile ? a.keys : a.values) + row + i);
    }
    const int newest_tile = (context - 1) / kDecodeTile;
    const bool has_newest = kRotates && end == context && newest_tile % kWarps == warp;
    std::int64_t place = 0;  // of the newest k and v
    if (has_newest) place = a.offset(table, kv_head, context - 1);
    if (!waited) wait_for_previous();
    waited = true;
    if (any && !early) load_keys(tile, offset), load_values(tile, offset);

    std::uint32_t queries[kDim / 16][4];
    {
      const BFloat16* q = a.q + sequence * a.q_stride + first_head * kDim;
      std::uint32_t low[kDim / 8], high[kDim / 8];
      load_along_row<kDim>(q + g * kDim, g < heads, t, low);
      load_along_row<kDim>(q + (g + 8) * kDim, g + 8 < heads, t, high);
      if constexpr (kRotates) {
        const BFloat16* k = a.q + sequence * a.q_stride + (a.num_heads + kv_head) * kDim;
        std::uint32_t key[kDim / 8], value[kDim / 16];
        load_along_row<kDim>(k, has_newest, t, key);
        load_across_row<kDim>(k + a.num_kv_heads * kDim, has_newest, g, value);
        const Angles<kDim> angles = load_angles<kDim>(rope.cos_sin + sequence * rope.stride, t);
        norm_and_rotate<kDim>(low, rope.q_norm, rope.eps, angles, t);
        if (heads > 8) norm_and_rotate<kDim>(high, rope.q_norm, rope.eps, angles, t);
        if (has_newest) {
          norm_and_rotate<kDim>(key, rope.k_norm, rope.eps, angles, t);
          const bool keeps = share % head_tiles == 0;  // one block of the KV head
          const auto store = [](BFloat16* to, const std::uint32_t* words) {
            *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
          };
          if (g == 0) {
#pragma unroll
            for (int i = 0; i < kDim / 32; ++i) {
              const int dim = 32 * i + 8 * t;
              store(new_key + dim, key + 4 * i);
              if (keeps) store(a.keys_to_write() + place + dim, key + 4 * i);
            }
          }
          if (t == 0) {
#pragma unroll
            for (int i = 0; i < kDim / 64; ++i) {
              const int dim = 64 * i + 8 * g;
              store(new_value + dim, value + 4 * i);
              if (keeps) store(a.values_to_write() + place + dim, value + 4 * i);
            }
          }
          __syncwarp();
        }
      }
#pragma unroll
      for (int s = 0; s < kDim / 16; ++s) {
        queries[s][0] = low[2 * s], queries[s][1] = high[2 * s];
        queries[s][2] = low[2 * s + 1], queries[s][3] = high[2 * s + 1];
      }
    }

    float sums[kDim / 8][4] = {};
    float maxima[2] = {kMinusInfinity, kMinusInfinity}, totals[2] = {};  // of heads g and g + 8
    while (tile < end_tile) {
      if constexpr (kRotates) {
        if (tile == newest_tile) {  // its last row is still missing
          const int newest = context - 1 - tile * kDecodeTile;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (8 * i + g != newest) continue;
#pragma unroll
            for (int j = 0; j < kDim / 32; ++j) {
              const auto* from = reinterpret_cast<const std::uint32_t*>(new_key + 32 * j + 8 * t);
#pragma unroll
              for (int w = 0; w < 4; ++w) keys[i][4 * j + w] = from[w];
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (2 * t + i % 2 + i / 2 * 8 != newest) continue;
#pragma unroll
            for (int j = 0; j < kDim / 64; ++j) {
              const auto* from = reinterpret_cast<const std::uint32_t*>(new_value + 64 * j + 8 * g);
#pragma unroll
              for (int w = 0; w < 4; ++w) values[i][4 * j + w] = from[w];
            }
          }
        }
      }
      float scores[2][4] = {};
#pragma unroll
      for (int s = 0; s < kDim / 16; ++s) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add_16x8x16(scores[i], queries[s], keys[i][2 * s], keys[i][2 * s + 1]);
        }
      }
      const int next = tile + kWarps;
      if (next < end_tile) {
        offset = a.offset(table, kv_head, next * kDecodeTile);
        load_keys(next, offset);
      }

      // Columns 2t and 2t + 1 of each half are positions.
      float rescale[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float maximum = maxima[row];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[i / 2][2 * row + i % 2];
          const int position = tile * kDecodeTile + i / 2 * 8 + 2 * t + i % 2;
          score = valid(position) ? score * scale : kMinusInfinity;
          maximum = fmaxf(maximum, score);
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
        rescale[row] = fast_exp2(maxima[row] - maximum);
        maxima[row] = maximum;
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[i / 2][2 * row + i % 2];
          score = fast_exp2(score - maximum);
          total += score;
        }
        totals[row] = totals[row] * rescale[row] + total;
      }
      const std::uint32_t weights[4] = {
          pack_bfloat16(scores[0][0], scores[0][1]), pack_bfloat16(scores[0][2], scores[0][3]),
          pack_bfloat16(scores[1][0], scores[1][1]), pack_bfloat16(scores[1][2], scores[1][3])};
#pragma unroll
      for (int w = 0; w < kDim / 16; ++w) {
        const auto low = [](std::uint32_t x, std::uint32_t y) { return (x & 0xffffu) | (y << 16); };
        const auto high = [](std::uint32_t x, std::uint32_t y) {
          return (x >> 16) | (y & 0xffff0000u);
        };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[2 * w][i] *= rescale[i / 2];
          sums[2 * w + 1][i] *= rescale[i / 2];
        }
        multiply_add_16x8x16(sums[2 * w], weights, low(values[0][w], values[1][w]),
                             low(values[2][w], values[3][w]));
        multiply_add_16x8x16(sums[2 * w + 1], weights, high(values[0][w], values[1][w]),
                             high(values[2][w], values[3][w]));
      }
      if (next < end_tile) load_values(next, offset);
      tile = next;
    }

    // The warps' partial results meet in shared memory, laid out as in the workspace.
    const std::size_t partial_size = partial_floats(heads, kDim);
    float* mine = shared + warp * partial_size;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int head = g + 8 * row;
      totals[row] += __shfl_xor_sync(kAllLanes, totals[row], 1);
      totals[row] += __shfl_xor_sync(kAllLanes, totals[row], 2);
      if (head >= heads) continue;
      if (t == 0) {
        mine[heads * kDim + head] = maxima[row];
        mine[heads * kDim + heads + head] = totals[row];
      }
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        mine[head * kDim + dimension_of<kDim>(i, 2 * t)] = sums[i][2 * row];
        mine[head * kDim + dimension_of<kDim>(i, 2 * t + 1)] = sums[i][2 * row + 1];
      }
    }
    __syncthreads();

    const int first_split = first / split_size;
    const int num_splits = (context - 1) / split_size - first_split + 1;
    const std::size_t item_size = partial_floats(a.num_heads, kDim);
    float* partial = partials + item * item_size + partial_floats(first_head, kDim);
    for (int i = static_cast<int>(threadIdx.x); i < heads * kDim; i += kThreads) {
      const int head = i / kDim;
      const PartialAttention merged =
          merge_warps<kWarps>(shared, partial_size, heads, kDim, head, i % kDim);
      if (num_splits == 1) {
        out[i] = round_to_bfloat16(merged.sum / merged.total);
      } else {
        partial[i] = merged.sum;
        if (i % kDim == 0) {
          partial[heads * kDim + head] = merged.maximum;
          partial[heads * kDim + heads + head] = merged.total;
        }
      }
    }

    if (num_splits > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        std::uint32_t* counter = counters + sequence * shares + share;
        *is_last = static_cast<int>(atomicAdd(counter, 1u)) == num_splits - 1;
        if (*is_last) *counter = 0;
      }
      __syncthreads();
      if (*is_last) {
        __threadfence();
        merge_splits<kDim, kWarps>(partial - (split - first_split) * item_size, num_splits,
                                   item_size, heads, shared, out);
      }
    }
    __syncthreads();  // the next task writes where this one reads
  }
}

// The newest k and v, is_last, and the partial results of the warps, then what merging so many splits
// takes.
inline std::size_t decode_shared_bytes(int group, int head_dim, int warps,
                                       std::int64_t max_splits) {
  const int heads = group < kDecodeHeads ? group : kDecodeHeads;
  const std::size_t of_warps = static_cast<std::size_t>(warps) * partial_floats(heads, head_dim);
  const std::size_t of_splits = merging_floats(heads, max_splits);
  return 2 * static_cast<std::size_t>(head_dim) * sizeof(BFloat16) + sizeof(int) +
         (of_warps > of_splits ? of_warps : of_splits) * sizeof(float);
}

// How many splits so much shared memory is enough for, where it is for the warps.
inline std::int64_t max_splits_in(std::size_t shared_bytes, int group, int head_dim) {
  const int heads = group < kDecodeHeads ? group : kDecodeHeads;
  const std::size_t floats =
      (shared_bytes - decode_shared_bytes(0, head_dim, 0, 0)) / sizeof(float);
  return (static_cast<std::int64_t>(floats) / heads - 1) / 2;
}

}  // namespace tinyvllm::cuda
