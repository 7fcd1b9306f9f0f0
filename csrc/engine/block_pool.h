// Which blocks of the KV cache are free, and how many block tables hold each of the others.
//
// Exact bookkeeping and nothing else: free + used = total, and a block's count is the number of
// tables that hold it. A free block whose content the prefix cache knows keeps it until the pool
// needs the block: blocks without content are taken first, then the one that was freed the longest
// ago.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/prefix_cache.h"

namespace tinyvllm {

class Trace;

class BlockPool {
 public:
  BlockPool(std::int64_t num_blocks, PrefixCache& cache, Trace* trace = nullptr);

  std::int64_t num_blocks() const { return static_cast<std::int64_t>(counts_.size()); }
  std::int64_t num_free() const { return static_cast<std::int64_t>(empty_.size()) + num_cached_; }
  std::int64_t num_used() const { return num_blocks() - num_free(); }
  std::int64_t num_cached() const { return num_cached_; }  // free, with content that can be found
  std::int32_t count(BlockId block) const { return counts_[static_cast<std::size_t>(block)]; }

  // A free block, now held by one table; its content is forgotten. Throws Error if there is none:
  // ask num_free() first. A fresh pool gives its lowest blocks first; a freed block without content
  // is the next to be used again, because its memory is warm.
  BlockId allocate();

  // One more table holds the block: a fork of its sequence, or a prefix hit, which may find it
  // free. Throws Error on a free block without content.
  void share(BlockId block);

  // One table less holds it. Throws Error on a block that none holds.
  void release(BlockId block);

  // Releases a whole table and empties it; backwards, so that the end of a sequence is evicted
  // before its beginning, which more requests can use.
  void release_all(std::vector<BlockId>& block_table);

  // Forgets the content of a block, wherever it is.
  void forget(BlockId block);

 private:
  // Free blocks with content form a list, linked through these arrays; its head was freed first.
  static constexpr BlockId kNone = -1;
  void append_cached(BlockId block);
  void unlink_cached(BlockId block);
  BlockId& next(BlockId block) { return next_[static_cast<std::size_t>(block)]; }
  BlockId& previous(BlockId block) { return previous_[static_cast<std::size_t>(block)]; }

  PrefixCache& cache_;
  Trace* const trace_;                // null: none
  std::vector<std::int32_t> counts_;  // [num_blocks]
  std::vector<BlockId> empty_;        // free and without content; a stack
  std::vector<BlockId> next_, previous_;
  BlockId head_ = kNone, tail_ = kNone;
  std::int64_t num_cached_ = 0;
};

}  // namespace tinyvllm
