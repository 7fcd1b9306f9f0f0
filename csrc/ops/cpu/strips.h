// How the outputs of a matrix product are shared out to threads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
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
  // A strip has a multiple of `multiple` outputs, or what is left of a block: from `least` to `most`
  // of them, or, where there is no multiple between these, `least` rounded up.
  Strips(std::span<const RowBlock> blocks, std::int64_t multiple, std::int64_t least,
         std::int64_t most, int num_threads)
      : multiple_(multiple),
        least_(std::max<std::int64_t>(1, (least + multiple - 1) / multiple)),
        shares_(2 * num_threads) {
    std::size_t i = 0;
    for (const RowBlock& block : blocks) {
      end_ += (block.rows + multiple - 1) / multiple;
      blocks_[i++] = {block.rows, end_};
    }
    most_ = std::max(least_, std::min(most / multiple, end_ / shares_));
  }

  std::int64_t most_outputs() const { return most_ * multiple_; }

  // The next strip, if there is one. Any thread may call it. Where a strip begins decides where it
  // ends, so that the cuts are the same in every run.
  std::optional<Strip> take() {
    std::int64_t first = next_.load(std::memory_order_relaxed), end = 0;
    std::size_t block = 0;
    do {
      if (first == end_) return std::nullopt;
      while (first >= blocks_[block].end) ++block;
      const std::int64_t share = (end_ - first) / shares_;
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

  const std::int64_t multiple_, least_;
  const std::int64_t shares_;  // of what is left, of which a strip is one
  std::int64_t most_;
  std::array<Block, 3> blocks_{};
  std::int64_t end_ = 0;
  std::atomic<std::int64_t> next_{0};
};

}  // namespace tinyvllm
