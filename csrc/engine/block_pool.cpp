#include "engine/block_pool.h"

#include <string>

#include "base/errors.h"
#include "engine/trace.h"

namespace tinyvllm {

BlockPool::BlockPool(std::int64_t num_blocks, PrefixCache& cache, Trace* trace)
    : cache_(cache),
      trace_(trace),
      counts_(static_cast<std::size_t>(num_blocks)),
      next_(static_cast<std::size_t>(num_blocks), kNone),
      previous_(static_cast<std::size_t>(num_blocks), kNone) {
  for (std::int64_t block = num_blocks; block-- > 0;) empty_.push_back(static_cast<BlockId>(block));
}

BlockId BlockPool::allocate() {
  BlockId block = head_;
  if (!empty_.empty()) {
    block = empty_.back();
    empty_.pop_back();
  } else if (block != kNone) {
    unlink_cached(block);
    cache_.forget(block);
    if (trace_) trace_->evicted(block);
  } else {
    throw Error("All " + std::to_string(num_blocks()) + " blocks are in use.");
  }
  counts_[static_cast<std::size_t>(block)] = 1;
  return block;
}

void BlockPool::share(BlockId block) {
  std::int32_t& count = counts_[static_cast<std::size_t>(block)];
  if (count == 0) {  // a free block that is shared was found by its content
    if (!cache_.contains(block)) {
      throw Error("Block " + std::to_string(block) +
                  " is shared but free and without content; this is a bug of the engine, please "
                  "report it.");
    }
    unlink_cached(block);
  }
  ++count;
}

void BlockPool::release(BlockId block) {
  const bool known = block >= 0 && block < num_blocks();
  if (!known || counts_[static_cast<std::size_t>(block)] == 0) {
    throw Error("Block " + std::to_string(block) +
                " is freed but not in use; this is a bug of the " + "engine, please report it.");
  }
  if (--counts_[static_cast<std::size_t>(block)] > 0) return;
  if (cache_.contains(block)) {
    append_cached(block);
  } else {
    empty_.push_back(block);
  }
}

void BlockPool::release_all(std::vector<BlockId>& block_table) {
  for (; !block_table.empty(); block_table.pop_back()) release(block_table.back());
}

void BlockPool::forget(BlockId block) {
  if (!cache_.contains(block)) return;
  cache_.forget(block);
  if (trace_) trace_->forgotten(block);
  if (count(block) > 0) return;
  unlink_cached(block);
  empty_.push_back(block);
}

void BlockPool::append_cached(BlockId block) {
  previous(block) = tail_;
  next(block) = kNone;
  (tail_ == kNone ? head_ : next(tail_)) = block;
  tail_ = block;
  ++num_cached_;
}

void BlockPool::unlink_cached(BlockId block) {
  (head_ == block ? head_ : next(previous(block))) = next(block);
  (tail_ == block ? tail_ : previous(next(block))) = previous(block);
  --num_cached_;
}

}  // namespace tinyvllm
