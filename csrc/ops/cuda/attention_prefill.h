// Attention of prefill chunks on the tensor cores, after FlashAttention-2 (Dao 2023), over the
// paged cache.
//
// A block takes the query heads of one KV head at the tokens of one tile: row r of its 128 is head
// r % group at token r / group, so that a group shares K and V and a short chunk still fills rows.
// K and V pass through shared memory in tiles of 64 positions, at multiples of 64; while one tile
// is used the next is on its way. A row's sums and maxima move on only at tiles that it sees, so
// its bits do not depend on which rows share its block.
#pragma once

#include "ops/cuda/attention.h"

namespace tinyvllm::cuda {

inline constexpr int kPrefillRows = 128;
inline constexpr int kPrefillKeys = 64;  // positions of a tile of K and V

// A warp has 16 kBands rows: with two bands each operand that is read from shared memory is used
// twice, where the registers suffice.
template <int kDim>
struct PrefillShape {
  static constexpr int kBands = kDim <= 64 ? 2 : 1;
  static constexpr int kThreads = kPrefillRows / (16 * kBands) * kWarpSize;
  // Rows of shared memory: an odd number of 16-byte chunks, so that eight rows at the same chunk,
  // as load_matrices reads them, lie in different banks.
  static constexpr int kStride = kDim / 8 % 2 == 0 ? kDim + 8 : kDim;
  static constexpr std::size_t kTileBytes = kPrefillKeys * kStride * sizeof(BFloat16);
  static constexpr std::size_t kSharedBytes = 4 * kTileBytes;  // K and V, two stages
};

template <int kDim>
__global__ void __launch_bounds__(PrefillShape<kDim>::kThreads, kDim <= 64 ? 2 : 1)
    prefill_attention_kernel(const AttentionArguments<BFloat16> a) {
  using Shape = PrefillShape<kDim>;
  constexpr int kBands = Shape::kBands, kStride = Shape::kStride;
  constexpr int kChunks = kDim / 8;  // of 16 bytes, a row
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  const int group = a.group(), kv_head = static_cast<int>(blockIdx.x);
  // Later tokens see more: they go first.
  const int tile_index = a.sequences.num_chunk_tiles - 1 - static_cast<int>(blockIdx.y);
  const int chunk = a.sequences.chunk_tiles[2 * tile_index];
  const int first_token = a.sequences.chunk_tiles[2 * tile_index + 1];
  const int chunk_start = a.sequences.chunk_starts[chunk];
  const int num_tokens = a.sequences.chunk_starts[chunk + 1] - chunk_start;
  const int sequence = a.sequences.num_decodes + chunk;
  const int chunk_position = a.sequences.context_lengths[sequence] - num_tokens;
  const std::int32_t* table = a.block_table(sequence);

  const int tokens = min(kPrefillRows / group, num_tokens - first_token);  // of this tile
  const int first = a.first_seen(chunk_position + first_token);
  const int last = chunk_position + first_token + tokens - 1;  // positions that the block sees
  const int end_tile = last / kPrefillKeys + 1;
  auto* shared = reinterpret_cast<BFloat16*>(shared_memory());
  constexpr int kTile = kPrefillKeys * kStride;

  // Sixteen rows lie in one block of the cache: its table is asked once for them.
  constexpr int kRowsAtOnce = Shape::kThreads / kChunks / 16 * 16;
  static_assert(kRowsAtOnce > 0);
  const auto load_tile = [&](int tile) {
    BFloat16* keys = shared + tile % 2 * 2 * kTile;
    BFloat16* values = keys + kTile;
    const int mine = static_cast<int>(threadIdx.x) / kChunks;
    const int column = static_cast<int>(threadIdx.x) % kChunks * 8;
    if (mine < kRowsAtOnce) {
#pragma unroll
      for (int first_row = 0; first_row < kPrefillKeys; first_row += kRowsAtOnce) {
        const int row = first_row + mine, position = tile * kPrefillKeys + row;
        if (row >= kPrefillKeys) break;
        const bool valid = position >= first && position <= last;
        const std::int64_t offset =
            valid ? a.offset(table, kv_head, position & ~15) + (position & 15) * kDim + column : 0;
        copy_async_16(keys + row * kStride + column, a.keys + offset, valid);
        copy_async_16(values + row * kStride + column, a.values + offset, valid);
      }
    }
    commit_copies();
  };

  // Of each of the lane's rows, two a band: where it lies in q and out, and its position; -1: none.
  std::int64_t token_of[kBands][2];
  int head_of[kBands][2], position_of[kBands][2];
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (warp * kBands + band) * 16 + half * 8 + g;
      const int token = row / group;
      const bool valid = token < tokens;
      token_of[band][half] = a.sequences.num_decodes + chunk_start + first_token + token;
      head_of[band][half] = kv_head * group + row % group;
      position_of[band][half] = valid ? chunk_position + first_token + token : -1;
    }
  }

  let_next_begin();
  wait_for_previous();
  load_tile(first / kPrefillKeys);

  std::uint32_t queries[kBands][kDim / 16][4];
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = position_of[band][half] >= 0;
      const auto* q = reinterpret_cast<const std::uint32_t*>(
          a.q + token_of[band][half] * a.q_stride + head_of[band][half] * kDim);
#pragma unroll
      for (int s = 0; s < kDim / 16; ++s) {
        queries[band][s][half] = valid ? q[8 * s + t] : 0;
        queries[band][s][half + 2] = valid ? q[8 * s + 4 + t] : 0;
      }
    }
  }

  const float scale = a.scale * kLog2e;
  float sums[kBands][kDim / 8][4] = {};
  float maxima[kBands][2], totals[kBands][2];
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
    maxima[band][0] = maxima[band][1] = kMinusInfinity;
    totals[band][0] = totals[band][1] = 0.0f;
  }
  // The row of an operand that this lane names to load_matrices: of keys, matrices 0 to 3 are
  // (positions 0-7, dims 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15); of values the middle two the
  // other way round.
  const int matrix = lane / 8;
  const int key_offset = (matrix / 2 * 8 + lane % 8) * kStride + matrix % 2 * 8;
  const int value_offset = (matrix % 2 * 8 + lane % 8) * kStride + matrix / 2 * 8;

  for (int tile = first / kPrefillKeys; tile < end_tile; ++tile) {
    if (tile + 1 < end_tile) {
      load_tile(tile + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    const BFloat16* keys = shared + tile % 2 * 2 * kTile;
    const BFloat16* values = keys + kTile;

    float scores[kBands][kPrefillKeys / 8][4] = {};
#pragma unroll
    for (int s = 0; s < kDim / 16; ++s) {
#pragma unroll
      for (int n = 0; n < kPrefillKeys / 16; ++n) {
        std::uint32_t b[4];
        load_matrices(b, keys + key_offset + n * 16 * kStride + s * 16);
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
          multiply_add_16x8x16(scores[band][2 * n], queries[band][s], b[0], b[1]);
          multiply_add_16x8x16(scores[band][2 * n + 1], queries[band][s], b[2], b[3]);
        }
      }
    }

    const int tile_position = tile * kPrefillKeys;
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = position_of[band][half], oldest = a.first_seen(position);
        // Where every row of the block sees the whole tile this does nothing.
        if (oldest > tile_position || position < tile_position + kPrefillKeys - 1) {
#pragma unroll
          for (int n = 0; n < kPrefillKeys / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int key = tile_position + 8 * n + 2 * t + c;
              if (key > position || key < oldest) {
                scores[band][n][2 * half + c] = kMinusInfinity;
              }
            }
          }
        }
        float maximum = maxima[band][half];
#pragma unroll
        for (int n = 0; n < kPrefillKeys / 8; ++n) {
          maximum = fmaxf(maximum, fmaxf(scores[band][n][2 * half], scores[band][n][2 * half + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
        // A row that has seen nothing yet subtracts 0: all its weights are 2^-inf. A tile that a
        // row does not see must leave its sums as they are: rescale is then exactly 1.
        const float base = maximum == kMinusInfinity ? 0.0f : maximum;
        const float rescale = fast_exp2((maxima[band][half] - base) * scale);
        maxima[band][half] = maximum;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kPrefillKeys / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& score = scores[band][n][2 * half + c];
            score = fast_exp2((score - base) * scale);
            total += score;
          }
        }
        totals[band][half] = totals[band][half] * rescale + total;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          sums[band][n][2 * half] *= rescale;
          sums[band][n][2 * half + 1] *= rescale;
        }
      }
    }

#pragma unroll
    for (int s = 0; s < kPrefillKeys / 16; ++s) {
      std::uint32_t weights[kBands][4];
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        const auto& left = scores[band][2 * s];
        const auto& right = scores[band][2 * s + 1];
        weights[band][0] = pack_bfloat16(left[0], left[1]);
        weights[band][1] = pack_bfloat16(left[2], left[3]);
        weights[band][2] = pack_bfloat16(right[0], right[1]);
        weights[band][3] = pack_bfloat16(right[2], right[3]);
      }
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        std::uint32_t b[4];
        load_matrices_transposed(b, values + value_offset + s * 16 * kStride + n * 16);
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
          multiply_add_16x8x16(sums[band][2 * n], weights[band], b[0], b[1]);
          multiply_add_16x8x16(sums[band][2 * n + 1], weights[band], b[2], b[3]);
        }
      }
    }
    __syncthreads();  // the next but one tile lands where this one lies
  }

#pragma unroll
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = totals[band][half];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      if (position_of[band][half] < 0) continue;
      const float inverse = 1.0f / total;
      auto* out = reinterpret_cast<std::uint32_t*>(a.out + token_of[band][half] * a.out_stride +
                                                   head_of[band][half] * kDim);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        out[4 * n + t] =
            pack_bfloat16(sums[band][n][2 * half] * inverse, sums[band][n][2 * half + 1] * inverse);
      }
    }
  }
}

}  // namespace tinyvllm::cuda
