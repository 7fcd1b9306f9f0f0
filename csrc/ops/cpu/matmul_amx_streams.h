// The product on AMX of few rows of x with weights in rows, which are multiplied as they come from
// memory, each once. See MatmulShare in kernels.h.
//
// A memory gives most to some long streams that are read a line of each at a time. So the outputs of a
// tile are not neighbours but lie a run apart: its row i is the next line, 64 bytes, of stream i. Where
// an output ends, its stream goes on with the next one, which lies right behind it. Neighbours would
// be many short pieces in as many pages.
#pragma once

#include "ops/cpu/matmul_amx_operands.h"

namespace tinyvllm::TINYVLLM_ISA {

template <int kTiles>  // blocks of 16 rows of x
class StreamProduct {
 public:
  explicit StreamProduct(const MatmulShare<BFloat16, BFloat16>& share)
      : share_(share), x_{share.num_rows} {}

  void run() {
    const std::int64_t outputs = share_.num_outputs, rest = outputs % kStreams;
    if (outputs >= kStreams) multiply(0, kStreams, outputs / kStreams);
    if (rest > 0) multiply(outputs - rest, rest, 1);
    release_tiles();
  }

 private:
  void configure(std::int64_t streams) const {
    TileConfig config;
    config.set(kWeightTile, streams, kTileRowBytes);
    for (int i = 0; i < kXTiles; ++i) config.set(kXTile + i, kTileSide, 4 * x_.tile_rows());
    for (int i = 0; i < kTiles; ++i) config.set(i, streams, 4 * x_.tile_rows());
    configure_tiles(config);
  }

  // The outputs from `first` on: `streams` of `run` each. The sums of 16 outputs of each stream wait
  // in memory, [block of rows][stream][output][row], so that they are written side by side.
  void multiply(std::int64_t first, std::int64_t streams, std::int64_t run) const {
    configure(streams);
    for (std::int64_t n = 0; n < run; n += kTileSide) {
      const std::int64_t end = n + kTileSide < run ? n + kTileSide : run;
      for (std::int64_t i = n; i < end; ++i) {
        add_up(first + i, streams, run, i + 1 == run, share_.scratch + (i - n) * kTileSide);
      }
      const float* sums = share_.scratch;
      for (std::int64_t block = 0; block < kTiles; ++block) {
        for (std::int64_t stream = 0; stream < streams; ++stream, sums += kTileFloats) {
          const std::int64_t begin = first + stream * run;
          write_sums<true>(share_, block * kTileSide, begin + n, begin + end, sums);
        }
      }
    }
  }

  // One output of each stream, `run` apart, for all rows of x. `last`: none comes behind it.
  void add_up(std::int64_t output, std::int64_t streams, std::int64_t run, bool last,
              float* sums) const {
    const std::int64_t depth = share_.depth, stride = run * depth;
    const std::int64_t whole_steps = depth / kTileDepth;
    const std::int64_t prefetches = last ? whole_steps - kStepsAhead : whole_steps;
    const BFloat16* weights = share_.weight + output * depth;
    for_each_tile([&]<int kTile>() { zero_tile<kTile>(); });
    std::int64_t step = 0;
    for (std::int64_t block = 0; block < packed_blocks(depth); ++block) {
      const Range steps = steps_of(block, depth);
      const std::int64_t next_rows = steps.size() * x_.tile_size();
      const BFloat16* x = share_.x + x_.offset(0, steps);
      for (; step < steps.end; ++step, weights += kTileDepth, x += x_.tile_size()) {
        if (step < prefetches) {
          const BFloat16* line = weights + kStepsAhead * kTileDepth;
          for (std::int64_t i = 0; i < streams; ++i, line += stride) __builtin_prefetch(line, 0, 2);
        }
        if (step < whole_steps) {
          load_tile<kWeightTile>(weights, 2 * stride);
        } else {
          load_part(weights, streams, stride, depth - step * kTileDepth);
        }
        for_each_tile([&]<int kTile>() {
          constexpr int kX = kXTile + kTile % kXTiles;
          load_tile<kX>(x + kTile * next_rows, 4 * x_.tile_rows());
          multiply_tiles<kTile, kWeightTile, kX>();
        });
      }
    }
    for_each_tile([&]<int kTile>() {
      store_tile<kTile>(sums + kTile * streams * kTileFloats, 4 * kTileFloats);
    });
  }

  // A step that is not whole, with zeros for what is missing.
  static void load_part(const BFloat16* weights, std::int64_t streams, std::int64_t stride,
                        std::int64_t count) {
    alignas(64) BFloat16 part[kTileSide][kTileDepth];
    for (std::int64_t i = 0; i < streams; ++i) {
      _mm512_store_si512(part[i], load_step(weights + i * stride, count));
    }
    load_tile<kWeightTile>(part, kTileRowBytes);
  }

  // f<tile>() for each tile of sums, whose registers have the numbers from 0 on.
  template <typename F>
  TINYVLLM_INLINE static void for_each_tile(F&& f) {
    f.template operator()<0>();
    if constexpr (kTiles > 1) f.template operator()<1>();
    if constexpr (kTiles > 2) f.template operator()<2>();
    if constexpr (kTiles > 3) f.template operator()<3>();
  }

  static constexpr int kWeightTile = 4, kXTile = 5, kXTiles = 3;
  // Eight streams are read fastest. More rows of x, which are read from the L2 cache for each output
  // of a stream, want twice as many outputs at a time (docs/performance-cpu.md).
  static constexpr std::int64_t kStreams = kTiles == 1 ? 8 : 16;
  static constexpr std::int64_t kStepsAhead = kTiles == 1 ? 8 : 4;

  const MatmulShare<BFloat16, BFloat16>& share_;
  const PackedX x_;
};

inline void multiply_streams(const MatmulShare<BFloat16, BFloat16>& share) {
  static_assert(kStreamedRows == 4 * kTileSide);
  if (share.num_rows <= kTileSide) return StreamProduct<1>(share).run();
  if (share.num_rows <= 2 * kTileSide) return StreamProduct<2>(share).run();
  if (share.num_rows <= 3 * kTileSide) return StreamProduct<3>(share).run();
  StreamProduct<4>(share).run();
}

}  // namespace tinyvllm::TINYVLLM_ISA
