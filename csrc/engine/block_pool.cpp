#include "engine/block_pool.h"

#include <string>

#include "base/errors.h"

namespace tinyvllm {

BlockPool::BlockPool(std::int64_t num_blocks) : used_(static_cast<std::size_t>(num_blocks)) {
  for (std::int64_t block = num_blocks; block-- > 0;) {
    free_.push_back(static_cast<std::int32_t>(block));
  }
}

bool BlockPool::grow(std::vector<std::int32_t>& block_table, std::int64_t num_tokens,
                     std::int64_t block_size) {
  const std::int64_t wanted = (num_tokens + block_size - 1) / block_size;
  const std::int64_t missing = wanted - static_cast<std::int64_t>(block_table.size());
  if (missing > num_free()) return false;
  for (std::int64_t i = 0; i < missing; ++i) {
    const std::int32_t block = free_.back();
    free_.pop_back();
    used_[static_cast<std::size_t>(block)] = true;
    block_table.push_back(block);
  }
  return true;
}

void BlockPool::release(std::vector<std::int32_t>& block_table) {
  while (!block_table.empty()) {  // backwards, so that the next user gets them in the same order
    const std::int32_t block = block_table.back();
    const auto index = static_cast<std::size_t>(block);
    if (block < 0 || index >= used_.size() || !used_[index]) {
      throw Error("Block " + std::to_string(block) + " is freed but not in use; this is a bug of " +
                  "the engine, please report it.");
    }
    used_[index] = false;
    free_.push_back(block);
    block_table.pop_back();
  }
}

}  // namespace tinyvllm
