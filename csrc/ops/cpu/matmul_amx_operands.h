// What the products on AMX (matmul_amx_kernel.h, matmul_amx_streams.h) share: how packed x
// lies, and what becomes of tiles of sums.
#pragma once

#include "ops/cpu/amx.h"
#include "ops/cpu/kernels.h"

namespace tinyvllm::TINYVLLM_ISA {

static_assert(kTileSide == kPackedRows && kTileDepth == kPackedDepth);
static_assert(kPanelOutputs == 2 * kTileSide);

struct Range {
  std::int64_t first, end;
  std::int64_t size() const { return end - first; }
};

// The steps of k of one block of the depth: blocks are as equal as can be.
inline Range steps_of(std::int64_t block, std::int64_t depth) {
  const std::int64_t steps = (depth + kTileDepth - 1) / kTileDepth, blocks = packed_blocks(depth);
  return {steps * block / blocks, steps * (block + 1) / blocks};
}

// Packed x is [block of the depth][block of rows][step][tile]. With fewer than 16 rows in all, tiles
// have so many rows, or columns, and no more: a single row is packed as it lies.
struct PackedX {
  std::int64_t num_rows;

  std::int64_t row_blocks() const { return (num_rows + kTileSide - 1) / kTileSide; }
  std::int64_t tile_rows() const { return num_rows < kTileSide ? num_rows : kTileSide; }
  std::int64_t tile_size() const { return tile_rows() * kTileDepth; }
  std::int64_t offset(std::int64_t row_block, Range steps) const {
    return (steps.first * row_blocks() + steps.size() * row_block) * tile_size();
  }
};

// A step of a row, of which there are `count` elements; zeros for the others.
TINYVLLM_INLINE __m512i load_step(const BFloat16* p, std::int64_t count) {
  if (count >= kTileDepth) return _mm512_loadu_si512(p);
  const auto mask = static_cast<__mmask32>((std::uint64_t{1} << count) - 1);
  return _mm512_maskz_loadu_epi16(mask, p);
}

// Puts a tile of sums, or as much of it as there is, where it belongs: the rows from `row` on, the
// outputs [n, end) and no more than 16 of each. kTurn: a row of the tile is an output, and a column a
// row of x.
template <bool kTurn>
void write_sums(const MatmulShare<BFloat16, BFloat16>& share, std::int64_t row, std::int64_t n,
                std::int64_t end, const float* sums) {
  if (n >= end) return;
  const std::int64_t left = share.num_rows - row, rows = left < kTileSide ? left : kTileSide;
  Float tile[kTileSide];
  for (int i = 0; i < kTileSide; ++i) tile[i] = load(sums + i * kTileSide);
  if constexpr (kTurn) transpose(tile);
  const auto mask = static_cast<__mmask16>(end - n < kTileSide ? (1u << (end - n)) - 1 : 0xffffu);
  const Float bias = share.bias ? _mm512_maskz_loadu_ps(mask, share.bias + n) : Float{};
  for (std::int64_t i = 0; i < rows; ++i) {
    float* out = share.out + (row + i) * share.out_stride + n;
    Float total = share.bias ? tile[i] + bias : tile[i];
    if (share.accumulate) total = _mm512_maskz_loadu_ps(mask, out) + total;
    _mm512_mask_storeu_ps(out, mask, total);
  }
}

}  // namespace tinyvllm::TINYVLLM_ISA
