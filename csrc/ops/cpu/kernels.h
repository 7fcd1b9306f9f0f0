// The inner loops of the CPU ops, as one table of functions for each instruction set.
//
// kernels.cpp is compiled once for every set, with that set's compiler flags, and defines one
// table. The ops (csrc/ops/*_cpu.cpp) check shapes and share out the work; what they call for a
// share is here. All pointers need only be aligned to their element.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bfloat16.h"
#include "base/dtype.h"

namespace tinyvllm {

// out[m, n] = bias[n] + sum_k x[m, k] * weight[n, k], or += where `accumulate` says so.
//
// One output element has one vector accumulator over ascending k and one horizontal sum at the end,
// whatever num_rows and num_outputs are, so that a row of x gives the same bits in any batch. (Of a NaN
// only that it is one: compilers swap the operands of additions.)
//
// The weights may lie in panels instead of rows (ops/repack.h). An output is then one lane of a
// vector, which adds up ascending k, and of a pair of bfloat16 the second one first.
//
// Bfloat16 on AMX has an order of its own, the same for both: 32 elements of k at a time, as amx.h
// says. For vdpbf16ps, weights in rows, an output has two sums, of the even pairs of k and of the odd
// ones, each like a lane of a panel.
//
// For weights in rows a float32 x may be in another order, made once for all shares of a product, in
// which zeros fill up the last step:
//
//   matmul_f32_bf16: pair order. Of as many pairs of elements as a vector of the set has lanes, the
//   second ones and then the first ones. One operation then widens a vector of weights, which has them
//   in the high and in the low halves of its lanes.
//
//   matmul_lanes_*: lane order, as matmul_lanes_kernel.h says.
template <typename X, typename W>
struct MatmulShare {
  // [num_rows, depth], rows x_stride elements apart, in the kernel's order; or packed, where x_stride is
  // that of rows behind panels.
  const X* x;
  std::int64_t x_stride;
  const W* weight;    // [num_outputs, depth], contiguous; or in panels, from the first of one on
  const float* bias;  // [num_outputs], or null
  float* out;         // [num_rows, num_outputs], rows out_stride elements apart
  std::int64_t out_stride;
  bool accumulate;
  std::int64_t num_rows, num_outputs, depth;
  float* scratch;  // of kMatmulScratch or lane_scratch(...), aligned to 64 bytes; or null
};

// What a row of x takes in these orders, with whole steps for every set and dtype.
constexpr std::int64_t whole_steps(std::int64_t depth) { return (depth + 31) / 32 * 32; }

// From so many rows on x is in lane order, and a share works in lane_scratch(...) floats: 1 MiB of
// weights with what lies between their panels, but 32 outputs at least.
inline constexpr std::int64_t kManyRows = 24;
constexpr std::int64_t lane_scratch(std::int64_t depth, std::size_t weight_bytes) {
  const std::int64_t bytes = whole_steps(depth) * static_cast<std::int64_t>(weight_bytes);
  const std::int64_t outputs = 32 * (bytes / 4 + 8), least = 272 * 1024;
  return outputs > least ? outputs : least;
}

// How far apart the rows of a product's x lie, in elements: an odd number of cache lines, so that the
// rows of a tile do not all fall into one set of the L1 cache, as rows 4 KiB apart do.
constexpr std::int64_t operand_stride(DType dtype, std::int64_t cols) {
  constexpr std::int64_t kLine = 64;
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t lines = (cols * size + kLine - 1) / kLine;
  return (lines | 1) * kLine / size;
}

// What packs x, once for all shares of a product, a piece at a time. `x` of a MatmulShare is then the
// packed one.
struct PackShare {
  const BFloat16* x;  // [num_rows, depth], rows x_stride elements apart
  std::int64_t x_stride, num_rows, depth;
  std::int64_t piece;
  BFloat16* packed;  // all pieces, aligned to 64 bytes
};

// AMX wants x in tiles (matmul_amx_operands.h). A piece is 16 rows or what is left of them, in one block
// of the depth. Its blocks are of up to kPackedSteps steps of kPackedDepth elements, the last step
// filled up with zeros.
inline constexpr std::int64_t kPackedRows = 16, kPackedDepth = 32, kPackedSteps = 9;
constexpr std::int64_t packed_blocks(std::int64_t depth) {
  return (depth + kPackedDepth * kPackedSteps - 1) / (kPackedDepth * kPackedSteps);
}
constexpr std::int64_t packed_pieces(std::int64_t num_rows, std::int64_t depth) {
  return (num_rows + kPackedRows - 1) / kPackedRows * packed_blocks(depth);
}
constexpr std::int64_t packed_elements(std::int64_t num_rows, std::int64_t depth) {
  const std::int64_t whole_rows = (num_rows + kPackedRows - 1) / kPackedRows * kPackedRows;
  const std::int64_t steps = (depth + kPackedDepth - 1) / kPackedDepth;
  return (num_rows < kPackedRows ? num_rows : whole_rows) * steps * kPackedDepth;
}

// What need not be packed, because it would look the same: one row of whole steps.
constexpr bool lies_packed(std::int64_t num_rows, std::int64_t depth) {
  return num_rows == 1 && depth % kPackedDepth == 0;
}

// vdpbf16ps wants x in panels (matmul_bf16_kernel.h): 16 rows side by side, [parity of a pair][word of
// two pairs][row], zeros beyond x. Up to kMostFewRows rows that are left lie behind the last panel,
// x_rest_stride(depth) apart; so few alone are used as they lie. A piece is some of the depth of a panel,
// and after all of these the rows that are left.
inline constexpr std::int64_t kXPanelRows = 16, kMostFewRows = 11, kXPanelPiece = 512;
constexpr std::int64_t x_panels(std::int64_t num_rows) {
  return (num_rows + kXPanelRows - 1 - kMostFewRows) / kXPanelRows;
}
constexpr std::int64_t x_panel_size(std::int64_t depth) {
  return (depth + 3) / 4 * 4 * kXPanelRows;
}
constexpr std::int64_t x_panel_pieces(std::int64_t depth) {  // of one panel
  return (depth + kXPanelPiece - 1) / kXPanelPiece;
}
constexpr std::int64_t x_rest(std::int64_t num_rows) {
  const std::int64_t rest = num_rows - x_panels(num_rows) * kXPanelRows;
  return rest > 0 ? rest : 0;  // the last panel may not be full
}
constexpr std::int64_t x_rest_stride(std::int64_t depth) {
  return operand_stride(DType::kBFloat16, depth);
}
constexpr std::int64_t x_panels_elements(std::int64_t num_rows, std::int64_t depth) {
  return x_panels(num_rows) * x_panel_size(depth) + x_rest(num_rows) * x_rest_stride(depth);
}

// An x of up to so many elements, 1 MiB of bfloat16, is taken to find room in the L2 cache.
inline constexpr std::int64_t kCachedOperand = 512 * 1024;

// With up to so many rows of x each weight is read from memory once and not copied.
inline constexpr std::int64_t kStreamedRows = 64;

// Of a product with x in tiles: the sums of a share that wait in memory, and the most outputs of a
// share, with many rows and with few.
inline constexpr std::int64_t kMatmulScratch = 128 * 1024;
inline constexpr std::int64_t kMostPackedOutputs = 256, kMostStreamedOutputs = 1024;

// The outputs that lie side by side in a panel, and the elements of k that it has of each: those of
// whole lanes of 32 bits. The panel that begins with output n begins at element n * panel_depth.
inline constexpr std::int64_t kPanelOutputs = 32;
constexpr std::int64_t panel_depth(DType dtype, std::int64_t depth) {
  const std::int64_t pair = 4 / static_cast<std::int64_t>(size_of(dtype));
  return (depth + pair - 1) / pair * pair;
}

// Long contexts are cut into splits at fixed absolute positions; each has an online softmax of its
// own, and they are merged in ascending order. The cuts do not depend on who computes a split.
inline constexpr std::int64_t kAttentionSplit = 1024;
// Keys and values are taken in tiles of this many positions, aligned to absolute position. Divides
// the split.
inline constexpr std::int64_t kAttentionTile = 64;

// The most query heads that may share one KV head.
inline constexpr std::int64_t kMaxGroup = 256;

// The columns that the attention kernels work on: head_dim in whole vectors of every set.
inline constexpr std::int64_t attention_columns(std::int64_t head_dim) {
  return (head_dim + 15) / 16 * 16;
}

// What an online softmax knows of some positions, for rows of queries. A row that has seen none of
// them has the maximum -inf and the total 0.
struct AttentionState {
  float* sums;     // [rows, columns]  the weighted sum of the values
  float* maximum;  // [rows]           a score that none exceeds by much, before `scale`
  float* total;    // [rows]           the sum of the weights exp(scale (score - maximum))

  static constexpr std::int64_t size(std::int64_t rows, std::int64_t head_dim) {  // in floats
    return rows * (attention_columns(head_dim) + 2);
  }
  static AttentionState at(float* memory, std::int64_t rows, std::int64_t head_dim) {
    float* maximum = memory + rows * attention_columns(head_dim);
    return {memory, maximum, maximum + rows};
  }
};

// Attention of successive tokens of one sequence over the positions of one split, for some KV heads
// and the group of query heads of each. Rows are [num_heads, num_tokens, group].
template <typename Kv>
struct AttentionShare {
  const float* query;  // [num_tokens, num_heads, group, head_dim], tokens query_stride apart
  std::int64_t query_stride;
  const Kv* keys;    // [num_blocks, num_kv_heads, block_size, head_dim], at the first of the heads
  const Kv* values;  // likewise
  std::int64_t block_stride;  // elements from one block to the next
  const std::int32_t* block_table;
  std::int64_t block_size, head_dim, num_heads, group;
  std::int64_t num_tokens, first_position;  // token i is at first_position + i
  std::int64_t window;                      // 0: none
  std::int64_t split;                       // the first position of the split
  float scale;
  float* scratch;  // attention_scratch_size(...) floats aligned to 64 bytes
  // Of the sequence that this thread is likely to have next, or null: its block table, and how many
  // positions it has. The keys of its first tile are prefetched, for as many heads.
  const std::int32_t* next_block_table;
  std::int64_t next_positions;
  AttentionState out;
};

constexpr std::int64_t attention_scratch_size(std::int64_t rows, std::int64_t head_dim) {
  const std::int64_t columns = attention_columns(head_dim);
  return (kAttentionTile + 1 + rows) * columns + rows * (kAttentionTile + 16);
}

struct Kernels {
  const char* isa;

  // Weights in rows. The first is null where it is faster to widen x once, before.
  void (*matmul_bf16_bf16)(const MatmulShare<BFloat16, BFloat16>&);
  void (*matmul_f32_bf16)(const MatmulShare<float, BFloat16>&);
  void (*matmul_f32_f32)(const MatmulShare<float, float>&);
  // The same with many rows of x, in lane order; null where that is no faster.
  void (*matmul_lanes_f32_bf16)(const MatmulShare<float, BFloat16>&);
  void (*matmul_lanes_f32_f32)(const MatmulShare<float, float>&);
  // Weights in panels.
  void (*matmul_panels_bf16_bf16)(const MatmulShare<BFloat16, BFloat16>&);  // null likewise
  void (*matmul_panels_f32_bf16)(const MatmulShare<float, BFloat16>&);
  void (*matmul_panels_f32_f32)(const MatmulShare<float, float>&);

  // What packs x for matmul_bf16_bf16 and for matmul_panels_bf16_bf16 in tiles, and for the first in
  // panels; null where they take x otherwise.
  void (*pack_x)(const PackShare&);
  void (*pack_x_for_panels)(const PackShare&);
  void (*pack_x_panel)(const PackShare&);
  // What puts a row of x [size] in another order, out of up to whole_steps(size): in pair order; in
  // lane order for weights of bfloat16 (of bfloat16 x null where products of it are no faster so), and
  // of float32.
  void (*pair_f32)(const float* x, std::int64_t size, float* out);
  void (*pair_bf16)(const BFloat16* x, std::int64_t size, float* out);
  void (*lane_f32)(const float* x, std::int64_t size, float* out);
  void (*lane_bf16)(const BFloat16* x, std::int64_t size, float* out);
  void (*lane_f32_for_f32)(const float* x, std::int64_t size, float* out);

  void (*attention_bf16)(const AttentionShare<BFloat16>&);
  void (*attention_f32)(const AttentionShare<float>&);
  // Adds what `from` knows of later positions to `into`.
  void (*attention_merge)(const AttentionState& into, const AttentionState& from, std::int64_t rows,
                          std::int64_t head_dim, float scale);
  // out[i] = sums[i] / total
  void (*divide_f32)(const float* sums, float total, std::int64_t size, float* out);
  void (*divide_bf16)(const float* sums, float total, std::int64_t size, BFloat16* out);

  // out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]; out may be x.
  void (*rms_norm_f32)(const float* x, const float* weight, float eps, std::int64_t size,
                       float* out);
  void (*rms_norm_bf16)(const float* x, const float* weight, float eps, std::int64_t size,
                        BFloat16* out);
  // Of each of the heads [num_heads, head_dim], element i turns with element i + head_dim / 2 by
  // the angle whose cosine is cos_sin[i] and whose sine is cos_sin[i + head_dim / 2].
  void (*rotate)(float* heads, std::int64_t num_heads, const float* cos_sin, std::int64_t head_dim);
  // out[i] = silu(gate[i]) * up[i]
  void (*silu_mul_f32)(const float* gate, const float* up, std::int64_t size, float* out);
  void (*silu_mul_bf16)(const float* gate, const float* up, std::int64_t size, BFloat16* out);
  // The largest of some numbers, or NaN where one of them is not finite.
  float (*finite_maximum)(const float* x, std::int64_t size);
  void (*to_bfloat16)(const float* x, std::int64_t size, BFloat16* out);
  void (*to_float)(const BFloat16* x, std::int64_t size, float* out);

  // For the machine's limits. Reads `size` values, a multiple of 64, and returns their xor.
  std::uint32_t (*read)(const std::uint32_t* data, std::int64_t size);
  // `rounds` rounds of the multiply-add that products of bfloat16 are made of, on registers loaded from
  // operands [64]. Returns the number of floating-point operations, and puts a sum that depends on
  // them into *result.
  double (*multiply_registers)(std::int64_t rounds, const float* operands, float* result);
};

// The table of the named set; throws InvalidRequestError where this build or this CPU lacks it.
const Kernels& kernels_for(const char* isa);

}  // namespace tinyvllm
