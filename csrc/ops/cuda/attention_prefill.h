// Attention of prefill chunks on the tensor cores, after FlashAttention-2 (Dao 2023), over the
// paged cache.
//
// A block takes the query heads of one KV head at the tokens of one tile: row r of its 128 is head
// r % group at token r / group, so that a group shares K and V and a short chunk still fills rows.
// K and V pass through shared memory in tiles of 64 positions, at multiples of 64; while one tile
// is used the next, or the next two, are on their way. A row's sums and maxima move on only at
// tiles that it sees, so its bits do not depend on which rows share its block.
#pragma once

#include "ops/cuda/attention.h"

namespace tinyvllm::cuda {

inline constexpr int kPrefillRows = 128;
inline constexpr int kPrefillKeys = 64;  // positions of a tile of K and V

// A warp has 16 rows and as many registers as it wants. With 32 rows it would read half as much
// from shared memory, but then half as many warps hide what each of them waits for.
template <int kDim>
struct PrefillShape {
  static constexpr int kThreads = kPrefillRows / 16 * kWarpSize;
  static constexpr int kStages = kDim <= 64 ? 3 : 2;  // tiles of K and V in shared memory
  // Rows of shared memory: an odd number of 16-byte chunks, so that eight rows at the same chunk,
  // as load_matrices reads them, lie in different banks.
  static constexpr int kStride = kDim / 8 % 2 == 0 ? kDim + 8 : kDim;
  static constexpr std::size_t kTileBytes = kPrefillKeys * kStride * sizeof(BFloat16);
  static constexpr std::size_t kSharedBytes = kStages * 2 * kTileBytes;
};

template <int kDim>
__global__ void __launch_bounds__(PrefillShape<kDim>::kThreads, 1)
    prefill_attention_kernel(const AttentionArguments<BFloat16> a) {
  using Shape = PrefillShape<kDim>;
  constexpr int kStages = Shape::kStages, kStride = Shape::kStride;
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
  // Asks for a tile, where the block sees it; closes a group of copies either way.
  const auto load_tile = [&](int tile) {
    BFloat16* keys = shared + tile % kStages * 2 * kTile;
    BFloat16* values = keys + kTile;
    const int mine = static_cast<int>(threadIdx.x) / kChunks;
    const int column = static_cast<int>(threadIdx.x) % kChunks * 8;
    if (tile < end_tile && mine < kRowsAtOnce) {
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

  // Of each of the lane's two rows: where it lies in q and out, and its position; -1: none.
  std::int64_t token_of[2];
  int head_of[2], position_of[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + g;
    const int token = row / group;
    const bool valid = token < tokens;
    token_of[half] = a.sequences.num_decodes + chunk_start + first_token + token;
    head_of[half] = kv_head * group + row % group;
    position_of[half] = valid ? chunk_position + first_token + token : -1;
  }

  let_next_begin();
  wait_for_previous();
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load_tile(first / kPrefillKeys + stage);

  std::uint32_t queries[kDim / 16][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool valid = position_of[half] >= 0;
    const auto* q = reinterpret_cast<const std::uint32_t*>(a.q + token_of[half] * a.q_stride +
                                                           head_of[half] * kDim);
#pragma unroll
    for (int s = 0; s < kDim / 16; ++s) {
      queries[s][half] = valid ? q[8 * s + t] : 0;
      queries[s][half + 2] = valid ? q[8 * s + 4 + t] : 0;
    }
  }

  const float scale = a.scale * kLog2e;
  float sums[kDim / 8][4] = {};
  float maxima[2] = {kMinusInfinity, kMinusInfinity}, totals[2] = {};
  // The row of an operand that this lane names to load_matrices: of keys, matrices 0 to 3 are
  // (positions 0-7, dims 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15); of values the middle two the
  // other way round.
  const int matrix = lane / 8;
  const int key_offset = (matrix / 2 * 8 + lane % 8) * kStride + matrix % 2 * 8;
  const int value_offset = (matrix % 2 * 8 + lane % 8) * kStride + matrix / 2 * 8;

  for (int tile = first / kPrefillKeys; tile < end_tile; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // for this tile, and no warp uses the one before any more
    load_tile(tile + kStages - 1);
    const BFloat16* keys = shared + tile % kStages * 2 * kTile;
    const BFloat16* values = keys + kTile;

    float scores[kPrefillKeys / 8][4] = {};
#pragma unroll
    for (int s = 0; s < kDim / 16; ++s) {
#pragma unroll
      for (int n = 0; n < kPrefillKeys / 16; ++n) {
        std::uint32_t b[4];
        load_matrices(b, keys + key_offset + n * 16 * kStride + s * 16);
        multiply_add_16x8x16(scores[2 * n], queries[s], b[0], b[1]);
        multiply_add_16x8x16(scores[2 * n + 1], queries[s], b[2], b[3]);
      }
    }

    const int tile_position = tile * kPrefillKeys;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = position_of[half], oldest = a.first_seen(position);
      // Where every row of the block sees the whole tile this does nothing.
      if (oldest > tile_position || position < tile_position + kPrefillKeys - 1) {
#pragma unroll
        for (int n = 0; n < kPrefillKeys / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int key = tile_position + 8 * n + 2 * t + c;
            if (key > position || key < oldest) scores[n][2 * half + c] = kMinusInfinity;
          }
        }
      }
      float maximum = maxima[half];
#pragma unroll
      for (int n = 0; n < kPrefillKeys / 8; ++n) {
        maximum = fmaxf(maximum, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
      // A row that has seen nothing yet subtracts 0: all its weights are 2^-inf. A tile that a
      // row does not see must leave its sums as they are: rescale is then exactly 1.
      const float base = maximum == kMinusInfinity ? 0.0f : maximum;
      const float rescale = fast_exp2((maxima[half] - base) * scale);
      maxima[half] = maximum;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kPrefillKeys / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[n][2 * half + c];
          score = fast_exp2((score - base) * scale);
          total += score;
        }
      }
      totals[half] = totals[half] * rescale + total;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        sums[n][2 * half] *= rescale;
        sums[n][2 * half + 1] *= rescale;
      }
    }

#pragma unroll
    for (int s = 0; s < kPrefillKeys / 16; ++s) {
      std::uint32_t weights[4];
      const auto& left = scores[2 * s];
      const auto& right = scores[2 * s + 1];
      weights[0] = pack_bfloat16(left[0], left[1]);
      weights[1] = pack_bfloat16(left[2], left[3]);
      weights[2] = pack_bfloat16(right[0], right[1]);
      weights[3] = pack_bfloat16(right[2], right[3]);
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        std::uint32_t b[4];
        load_matrices_transposed(b, values + value_offset + s * 16 * kStride + n * 16);
        multiply_add_16x8x16(sums[2 * n], weights, b[0], b[1]);
        multiply_add_16x8x16(sums[2 * n + 1], weights, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = totals[half];
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    if (position_of[half] < 0) continue;
    const float inverse = 1.0f / total;
    auto* out = reinterpret_cast<std::uint32_t*>(a.out + token_of[half] * a.out_stride +
                                                 head_of[half] * kDim);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      out[4 * n + t] = pack_bfloat16(sums[n][2 * half] * inverse, sums[n][2 * half + 1] * inverse);
    }
  }
}

}  // namespace tinyvllm::cuda
