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

// Hands out strips, each to one thread. They grow shorter towards the end of a run of outputs, so that
// the threads end at about the same time (guided self-scheduling, Polychronopoulos and Kuck 1987).
class Strips {
 public:
  // Where the runs lie that strips are cut from.
  enum class Runs {
    kOne,        // one, from which all threads take turns: they read memory side by side
    kOfThreads,  // one a thread, in order, so that what its kernel prefetches behind a strip is what it
                 // takes next; who is through helps the others, from the ends of theirs
  };

  // A strip has a multiple of `multiple` outputs, or what is left of a block or a run: from `least` to
  // `most` of them, or, where there is no multiple between these, `least` rounded up. `least` counts for
  // no more than a quarter of a thread's share of all outputs, `most` for no more than half of it.
  Strips(std::span<const RowBlock> blocks, std::int64_t multiple, std::int64_t least,
         std::int64_t most, int num_threads, Runs runs)
      : multiple_(multiple),
        num_runs_(runs == Runs::kOne ? 1 : std::min(kMostRuns, num_threads)),
        shares_(2 * ((num_threads + num_runs_ - 1) / num_runs_)) {
    std::int64_t end = 0;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      end += (blocks[i].rows + multiple - 1) / multiple;
      blocks_[i] = {blocks[i].rows, end};
    }
    const auto cut = [&](int i) { return static_cast<std::int32_t>(end * i / num_runs_); };
    for (int i = 0; i < num_runs_; ++i) {
      run(i).store({cut(i), cut(i + 1)}, std::memory_order_relaxed);
    }
    least = std::min(least, end * multiple / (4 * num_threads));
    least_ = std::max<std::int64_t>(1, (least + multiple - 1) / multiple);
    most_ = std::max(least_, std::min(most / multiple, end / num_runs_ / shares_));
  }

  std::int64_t most_outputs() const { return most_ * multiple_; }

  // The next strip for a thread, if there is one; `worker` is as parallel_for says. Which strips there
  // are and in which order they come is a matter of time, so that no result may depend on it.
  std::optional<Strip> take(int worker) {
    for (int i = 0; i < num_runs_; ++i) {
      const Side side = i == 0 ? Side::kFront : Side::kBack;
      if (const std::optional<Groups> groups = take_from(run((worker + i) % num_runs_), side)) {
        return strip_of(*groups);
      }
    }
    return std::nullopt;
  }

 private:
  static constexpr int kMostRuns = 64;  // with more threads several have one

  // All counts but `rows` are in groups of `multiple` outputs.
  struct Block {
    std::int64_t rows, end;
  };
  struct Groups {
    std::int32_t begin, end;
  };
  enum class Side { kFront, kBack };

  std::atomic<Groups>& run(int i) { return runs_[static_cast<std::size_t>(i)]; }

  // A share of what is left of a run, all in one block.
  std::optional<Groups> take_from(std::atomic<Groups>& run_left, Side side) {
    Groups left = run_left.load(std::memory_order_relaxed), taken{}, rest{};
    do {
      if (left.begin == left.end) return std::nullopt;
      const std::int64_t share = (left.end - left.begin) / shares_;
      const auto size = static_cast<std::int32_t>(std::clamp(share, least_, most_));
      taken = rest = left;
      if (side == Side::kFront) {
        const auto block_end = static_cast<std::int32_t>(blocks_[block_of(left.begin)].end);
        taken.end = rest.begin = std::min({left.begin + size, left.end, block_end});
      } else {
        const auto block_begin = static_cast<std::int32_t>(begin_of(block_of(left.end - 1)));
        taken.begin = rest.end = std::max({left.end - size, left.begin, block_begin});
      }
    } while (!run_left.compare_exchange_weak(left, rest, std::memory_order_relaxed));
    return taken;
  }

  std::size_t block_of(std::int64_t group) const {
    std::size_t block = 0;
    while (group >= blocks_[block].end) ++block;
    return block;
  }

  std::int64_t begin_of(std::size_t block) const { return block == 0 ? 0 : blocks_[block - 1].end; }

  Strip strip_of(Groups groups) const {
    const std::size_t block = block_of(groups.begin);
    std::int64_t before = 0;  // outputs of the blocks before this one
    for (std::size_t i = 0; i < block; ++i) before += blocks_[i].rows;
    const std::int64_t n = (groups.begin - begin_of(block)) * multiple_;
    const std::int64_t last =
        std::min((groups.end - begin_of(block)) * multiple_, blocks_[block].rows);
    return Strip{block, n, last - n, before + n};
  }

  const std::int64_t multiple_;
  const int num_runs_;
  const std::int64_t shares_;  // of what is left of a run, of which a strip is one
  std::int64_t least_, most_;
  std::array<Block, 3> blocks_{};
  std::array<std::atomic<Groups>, kMostRuns> runs_;  // what is left of each
};

}  // namespace tinyvllm
