// The micro-kernel of y = x W^T for bfloat16 on AMX (amx.h): a tile of sums is 16 outputs by 16 rows of
// x, and the arithmetic rate fifteen times that of vectors of float32. See MatmulShare in kernels.h.
//
// Weights in rows are left operands as they lie, weights in panels (ops/repack.h) right ones; x, which
// is small, is packed into tiles of the other kind once for all shares. Where weights are left
// operands, the tiles of sums have to be turned; with many rows of x it is less work to turn weights
// in rows, too. Either way gives the same bits.
//
// At this rate what matters is where the operands are. The sums of 32 outputs and 32 rows of x stay in
// registers for a block of the depth; between blocks they wait in memory as tiles, where others are
// multiplied in between. With few rows of x, weights are multiplied as they come from memory, those in
// rows by matmul_amx_streams.h. With more they are used again and again: a block of rows is copied, so
// that it fits the L1 cache (as they lie they are too far apart for its sets), and the next one is
// prefetched meanwhile (docs/performance-cpu.md has the numbers).
#pragma once

#include "ops/cpu/matmul_amx_operands.h"
#include "ops/cpu/matmul_amx_streams.h"

namespace tinyvllm::TINYVLLM_ISA {

// Whether it is weights in rows that are turned: the fewer of their tiles and of those of sums.
constexpr bool turns_weights(std::int64_t num_rows, std::int64_t depth) {
  return depth / kTileDepth < num_rows / kTileSide;
}

// kLeft: into left operands.
template <bool kLeft>
void pack_operands(const PackShare& share) {
  const PackedX x{share.num_rows};
  const std::int64_t block = share.piece / x.row_blocks(), row_block = share.piece % x.row_blocks();
  const Range steps = steps_of(block, share.depth);
  const std::int64_t row = row_block * kTileSide, rest = share.num_rows - row;
  const std::int64_t rows = rest < kTileSide ? rest : kTileSide;
  const auto columns = static_cast<__mmask16>((1u << x.tile_rows()) - 1);
  BFloat16* out = share.packed + x.offset(row_block, steps);
  for (std::int64_t step = steps.first; step < steps.end; ++step, out += x.tile_size()) {
    const std::int64_t k = step * kTileDepth;
    Float tile[kTileSide] = {};
    for (std::int64_t i = 0; i < rows; ++i) {
      const BFloat16* from = share.x + (row + i) * share.x_stride + k;
      tile[i] = _mm512_castsi512_ps(load_step(from, share.depth - k));
    }
    if constexpr (kLeft) {
      for (std::int64_t i = 0; i < x.tile_rows(); ++i) {
        __builtin_memcpy(out + i * kTileDepth, &tile[i], kTileRowBytes);
      }
    } else {
      transpose(tile);  // of pairs
      for (std::int64_t i = 0; i < kTileSide; ++i) {
        _mm512_mask_storeu_ps(out + i * x.tile_rows() * 2, columns, tile[i]);
      }
    }
  }
}

template <bool kPanels>
void pack_rows(const PackShare& share) {
  if (kPanels || turns_weights(share.num_rows, share.depth)) {
    pack_operands<true>(share);
  } else {
    pack_operands<false>(share);
  }
}

// The weights are right operands, or left ones.
template <bool kPanels, bool kRight>
class TileProduct {
 public:
  explicit TileProduct(const MatmulShare<BFloat16, BFloat16>& share)
      : share_(share), x_{share.num_rows} {}

  void run() {
    configure();
    // Where x does not fit the L2 cache, a block of its depth is multiplied with all outputs before
    // the next one is read; else the weights are best read in the order in which they lie.
    const bool cached = share_.num_rows * share_.depth <= kCachedOperand;
    const std::int64_t outputs = cached ? kPanelOutputs : kMostPackedOutputs;
    const std::int64_t row_blocks = kMatmulScratch / outputs / kTileSide;
    for (std::int64_t row = 0; row < x_.row_blocks(); row += row_blocks) {
      rows_ = {row, smaller(row + row_blocks, x_.row_blocks())};
      for (std::int64_t n = 0; n < share_.num_outputs; n += outputs) {
        outputs_ = {n, smaller(n + outputs, share_.num_outputs)};
        multiply();
      }
    }
    release_tiles();
  }

 private:
  // Weights of 32 outputs: a step of the depth is two tiles of 16 rows, or 32 lines of memory.
  struct Weights {
    const BFloat16* first;
    std::int64_t step, tile, row, line;  // from one to the next, in elements
    std::int64_t whole_steps;  // of this block of the depth; what comes then is in copies_
  };

  // What a pair of blocks of rows prefetches: with each step some lines of `from`, and from step
  // `wrap` on those of `wrapped`.
  struct Prefetch {
    const BFloat16 *from, *wrapped;
    std::int64_t wrap, lines;
  };

  static std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  void configure() const {
    TileConfig config;
    for (int i = 0; i < 2; ++i) {
      config.set(kWeightTile + i, kTileSide, kTileRowBytes);
      const int narrow[] = {kXTile + i, sum_tile(0, i), sum_tile(1, i)};
      for (const int tile : narrow) {
        if (kRight) {
          config.set(tile, x_.tile_rows(), kTileRowBytes);
        } else {
          config.set(tile, kTileSide, 4 * x_.tile_rows());
        }
      }
    }
    configure_tiles(config);
  }

  // The outputs and blocks of rows that are done at a time.
  void multiply() {
    const std::int64_t blocks = packed_blocks(share_.depth);
    prefetches_steps_ = kPanels && rows_.size() <= kStreamedRows / kTileSide;
    sums_stay_ = rows_.size() <= 2 && outputs_.size() <= kPanelOutputs;
    for (std::int64_t block = 0; block < blocks; ++block) {
      steps_ = steps_of(block, share_.depth);
      first_ = block == 0;
      last_ = block + 1 == blocks;
      float* sums = share_.scratch;
      for (std::int64_t n = outputs_.first; n < outputs_.end; n += kPanelOutputs) {
        const Weights weights = prepare(n);
        Prefetch prefetch = prefetches_steps_ ? next_steps(n) : next_block(n, block);
        for (std::int64_t row = rows_.first; row < rows_.end; row += 2) {
          if (row + 1 < rows_.end) {
            multiply_rows<2>(row, n, weights, prefetch, sums);
          } else {
            multiply_rows<1>(row, n, weights, prefetch, sums);
          }
          sums += 4 * kTileFloats;
          prefetch.from += prefetch.lines * weights_at(n, 0).line;
          if (prefetches_steps_) prefetch.lines = 0;  // the first pair has asked for all
        }
      }
    }
  }

  // The weights of output n and those behind it, from a step on, where they lie.
  Weights weights_at(std::int64_t n, std::int64_t step) const {
    if constexpr (kPanels) {
      constexpr std::int64_t kStep = kTileDepth * kPanelOutputs;
      const std::int64_t depth = panel_depth(DType::kBFloat16, share_.depth);
      const BFloat16* first = share_.weight + n * depth + step * kStep;
      return {first, kStep, 2 * kTileSide, 2 * kPanelOutputs, kTileDepth, whole_steps()};
    } else {
      const std::int64_t depth = share_.depth;
      const BFloat16* first = share_.weight + n * depth + step * kTileDepth;
      return {first, kTileDepth, kTileSide * depth, depth, depth, whole_steps()};
    }
  }

  // The steps of this block of the depth, but for one at the end of a row that is not whole.
  std::int64_t whole_steps() const {
    return smaller(steps_.end, share_.depth / kTileDepth) - steps_.first;
  }

  // The weights of output n and those behind it in this block of the depth, from where tiles of them
  // are to be loaded.
  Weights prepare(std::int64_t n) {
    const Weights weights = weights_at(n, steps_.first);
    const std::int64_t outputs = smaller(share_.num_outputs - n, kPanelOutputs);
    if (kPanels) {
      if (weights.whole_steps < steps_.size()) copy_last_step(weights);
      return weights;
    }
    for (std::int64_t i = 0; i < kPanelOutputs; ++i) {
      const BFloat16* from = weights.first + i * weights.row;
      const auto put = [&](std::int64_t step, __m512i part) {
        _mm512_store_si512(copies_[step][i / kTileSide][i % kTileSide], part);
      };
      const std::int64_t whole = i < outputs ? weights.whole_steps : 0;
      for (std::int64_t step = 0; step < whole; ++step) {
        put(step, _mm512_loadu_si512(from + step * kTileDepth));
      }
      for (std::int64_t step = whole; step < steps_.size(); ++step) {
        put(step, i < outputs ? load_step(from + step * kTileDepth, depth_from(step)) : __m512i{});
      }
    }
    if constexpr (kRight) turn_copies();
    constexpr std::int64_t kTile = kTileSide * kTileDepth;
    return {copies_[0][0][0], 2 * kTile, kTile, kTileDepth, kTileDepth, steps_.size()};
  }

  // Left operands become right ones.
  void turn_copies() {
    for (std::int64_t step = 0; step < steps_.size(); ++step) {
      for (auto& copy : copies_[step]) {
        Float tile[kTileSide];
        __builtin_memcpy(tile, copy, sizeof(tile));
        transpose(tile);  // of pairs
        __builtin_memcpy(copy, tile, sizeof(tile));
      }
    }
  }

  // A step of panels that is not whole is multiplied from a copy, with zeros for what is missing.
  void copy_last_step(const Weights& weights) {
    const std::int64_t step = weights.whole_steps, pairs = (depth_from(step) + 1) / 2;
    const BFloat16* from = weights.first + step * weights.step;
    for (auto& copy : copies_[step]) {
      for (std::int64_t i = 0; i < kTileSide; ++i) {
        const __m512i pair = i < pairs ? _mm512_loadu_si512(from + i * weights.row) : __m512i{};
        _mm512_store_si512(copy[i], pair);
      }
      from += weights.tile;
    }
  }

  // The elements of a row from a step of this block on.
  std::int64_t depth_from(std::int64_t step) const {
    return share_.depth - (steps_.first + step) * kTileDepth;
  }

  // All lines of what is multiplied a few steps later, which is behind the last step of these outputs the
  // first one of the next.
  Prefetch next_steps(std::int64_t n) const {
    const std::int64_t all = (share_.depth + kTileDepth - 1) / kTileDepth;
    const std::int64_t step = steps_.first + kStepsAhead;
    return {weights_at(n, step).first, weights_at(n + kPanelOutputs, step - all).first, all - step,
            kPanelOutputs};
  }

  // The next block of weights, in equal parts.
  Prefetch next_block(std::int64_t n, std::int64_t block) const {
    const std::int64_t pairs = (rows_.size() + 1) / 2;
    std::int64_t next = n + kPanelOutputs, step = steps_.first;
    if (next >= outputs_.end) {
      next = last_ ? outputs_.end : outputs_.first;
      step = last_ ? 0 : steps_of(block + 1, share_.depth).first;
    }
    const BFloat16* first = weights_at(next, step).first;
    return {first, first, steps_.size(), (kPanelOutputs + pairs - 1) / pairs};
  }

  template <typename F>
  TINYVLLM_INLINE static void for_each_sum(int row_tiles, F&& f) {
    f.template operator()<0, 0>();
    f.template operator()<1, 0>();
    if (row_tiles == 2) {
      f.template operator()<0, 1>();
      f.template operator()<1, 1>();
    }
  }

  template <int kW, int kX>
  TINYVLLM_INLINE static void multiply_tile() {
    if constexpr (kRight) {
      multiply_tiles<sum_tile(kW, kX), kXTile + kX, kWeightTile + kW>();
    } else {
      multiply_tiles<sum_tile(kW, kX), kWeightTile + kW, kXTile + kX>();
    }
  }

  // kTiles blocks of rows, from `row` on, with a block of weights.
  template <int kTiles>
  void multiply_rows(std::int64_t row, std::int64_t n, Weights weights, Prefetch prefetch,
                     float* sums) {
    for_each_sum(kTiles, [&]<int kW, int kX>() {
      if (first_) {
        zero_tile<sum_tile(kW, kX)>();
      } else if (!sums_stay_) {
        load_tile<sum_tile(kW, kX)>(sums + sum_tile(kW, kX) * kTileFloats, kTileRowBytes);
      }
    });
    const std::int64_t x_stride = kRight ? kTileRowBytes : 4 * x_.tile_rows();
    const std::int64_t next_rows = steps_.size() * x_.tile_size();
    const BFloat16* x = share_.x + x_.offset(row, steps_);
    const auto multiply_step = [&](const BFloat16* w, std::int64_t tile, std::int64_t row_bytes) {
      load_tile<kWeightTile>(w, row_bytes);
      load_tile<kXTile>(x, x_stride);
      multiply_tile<0, 0>();
      load_tile<kWeightTile + 1>(w + tile, row_bytes);
      multiply_tile<1, 0>();
      if constexpr (kTiles == 2) {
        load_tile<kXTile + 1>(x + next_rows, x_stride);
        multiply_tile<0, 1>();
        multiply_tile<1, 1>();
      }
      x += x_.tile_size();
    };
    if (last_) prefetch_out(row, kTiles, n);
    const Weights in_memory = weights_at(n, 0);
    for (std::int64_t step = 0; step < weights.whole_steps; ++step) {
      const BFloat16* lines = step < prefetch.wrap ? prefetch.from : prefetch.wrapped;
      lines += step * in_memory.step;
      for (std::int64_t i = 0; i < prefetch.lines; ++i, lines += in_memory.line) {
        __builtin_prefetch(lines, 0, 2);
      }
      multiply_step(weights.first + step * weights.step, weights.tile, 2 * weights.row);
    }
    if (weights.whole_steps < steps_.size()) {
      multiply_step(copies_[weights.whole_steps][0][0], kTileSide * kTileDepth, kTileRowBytes);
    }
    if (sums_stay_ && !last_) return;
    alignas(64) float out[kTiles * 2 * kTileFloats];
    for_each_sum(kTiles, [&]<int kW, int kX>() {
      constexpr int kSum = sum_tile(kW, kX);
      const std::int64_t m = (row + kX) * kTileSide, o = n + kW * kTileSide;
      if (last_ && is_whole(m, o)) {
        store_tile<kSum>(share_.out + m * share_.out_stride + o, 4 * share_.out_stride);
      } else {
        store_tile<kSum>((last_ ? out : sums) + kSum * kTileFloats, kTileRowBytes);
      }
    });
    if (!last_) return;
    for_each_sum(kTiles, [&]<int kW, int kX>() {
      const std::int64_t m = (row + kX) * kTileSide, o = n + kW * kTileSide;
      if (is_whole(m, o)) return;
      write_sums<!kRight>(share_, m, o, share_.num_outputs, out + sum_tile(kW, kX) * kTileFloats);
    });
  }

  // Whether a tile of sums is all that becomes of row m and output n and those behind them.
  bool is_whole(std::int64_t m, std::int64_t n) const {
    return kRight && !share_.accumulate && share_.bias == nullptr &&
           m + x_.tile_rows() <= share_.num_rows && n + kTileSide <= share_.num_outputs;
  }

  void prefetch_out(std::int64_t row, std::int64_t row_blocks, std::int64_t n) const {
    const std::int64_t end = smaller((row + row_blocks) * kTileSide, share_.num_rows);
    for (std::int64_t i = row * kTileSide; i < end; ++i) {
      const float* out = share_.out + i * share_.out_stride + n;
      __builtin_prefetch(out, 1, 3);
      __builtin_prefetch(out + kTileSide, 1, 3);
    }
  }

  // The tile registers: two of weights, two of x, and the sums of each with each.
  static constexpr int kWeightTile = 4, kXTile = 6;
  static constexpr int sum_tile(int w, int x) { return 2 * x + w; }
  static constexpr std::int64_t kStepsAhead = 4;

  const MatmulShare<BFloat16, BFloat16>& share_;
  const PackedX x_;
  Range rows_{}, outputs_{};  // of a call of multiply: blocks of 16 rows, and outputs
  bool prefetches_steps_{};   // of weights that come from memory, in place of blocks
  bool sums_stay_{};          // in registers, from one block of the depth to the next
  Range steps_{};             // of a block of the depth, which is
  bool first_{}, last_{};     // the first or last one
  alignas(64) BFloat16 copies_[kPackedSteps][2][kTileSide][kTileDepth];
};

template <bool kPanels>
void matmul_tiles(const MatmulShare<BFloat16, BFloat16>& share) {
  if (kPanels || turns_weights(share.num_rows, share.depth)) {
    TileProduct<kPanels, true>(share).run();
  } else if (share.num_rows <= kStreamedRows) {
    multiply_streams(share);
  } else {
    TileProduct<false, false>(share).run();
  }
}

}  // namespace tinyvllm::TINYVLLM_ISA
