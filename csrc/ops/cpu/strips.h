// How the outputs of a matrix product are shared out to threads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <span>

#include "ops/matmul.h"

namespace tinyvllm {

// Outputs of one row block, which a thread multiplies with all rows of x.
struct Strip {
  std::size_t block;
  std::int64_t n, num_outputs;  // from which output of the block on, and how many
  std::int64_t column;          // of output n among those of all blocks
};

// Hands out strips, each to one thread: long ones first, so that weights are read in long runs of
// memory, and then ever shorter ones, so that the threads end at about the same time (guided
// self-scheduling, Polychronopoulos and Kuck 1987).
class Strips {
 public:
  // A strip has `least` to `most` outputs, as far as there is a multiple of `multiple` between them,
  // or what is left of a block.
  Strips(std::span<const RowBlock> blocks, std::int64_t multiple, std::int64_t least,
         std::int64_t most, int num_threads)
      : multiple_(multiple),
        least_(std::max<std::int64_t>(1, (least + multiple - 1) / multiple)),
        most_(std::max(least_, most / multiple)),
        num_threads_(num_threads) {
    for (const RowBlock& block : blocks) {
      const std::int64_t groups = (block.rows + multiple - 1) / multiple;
      end_ += groups;
      blocks_[num_blocks_++] = {block.rows, end_};
    }
  }

  std::int64_t most_outputs() const { return most_ * multiple_; }

  // The next strip, if there is one. Any thread may call it.
  std::optional<Strip> take() {
    std::int64_t first = next_.load(std::memory_order_relaxed), end = 0;
    std::size_t block = 0;
    do {
      if (first == end_) return std::nullopt;
      while (first >= blocks_[block].end) ++block;
      const std::int64_t share = (end_ - first) / (2 * num_threads_);
      end = std::min(first + std::clamp(share, least_, most_), blocks_[block].end);
    } while (!next_.compare_exchange_weak(first, end, std::memory_order_relaxed));

    std::int64_t before = 0;  // outputs of the blocks before this one
    for (std::size_t i = 0; i < block; ++i) before += blocks_[i].rows;
    const std::int64_t begin = block == 0 ? 0 : blocks_[block - 1].end;
    const std::int64_t n = (first - begin) * multiple_;
    const std::int64_t last = std::min((end - begin) * multiple_, blocks_[block].rows);
    return Strip{block, n, last - n, before + n};
  }

 private:
  // All counts but `rows` are in groups of `multiple` outputs.
  struct Block {
    std::int64_t rows, end;
  };

  const std::int64_t multiple_, least_, most_;
  const int num_threads_;
  std::array<Block, 3> blocks_{};
  std::size_t num_blocks_ = 0;
  std::int64_t end_ = 0;
  std::atomic<std::int64_t> next_{0};
};

}  // namespace tinyvllm
