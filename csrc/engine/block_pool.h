// Which blocks of the KV cache are free. Exact bookkeeping and nothing else: free + used = total.
#pragma once

#include <cstdint>
#include <vector>

namespace tinyvllm {

class BlockPool {
 public:
  explicit BlockPool(std::int64_t num_blocks);

  std::int64_t num_blocks() const { return static_cast<std::int64_t>(used_.size()); }
  std::int64_t num_free() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t num_used() const { return num_blocks() - num_free(); }

  // Appends blocks to the table until it covers num_tokens. If there are too few free blocks it
  // changes nothing and returns false. A fresh pool gives its lowest blocks first; a freed block is
  // the next to be used again, because its memory is warm.
  bool grow(std::vector<std::int32_t>& block_table, std::int64_t num_tokens,
            std::int64_t block_size);

  // Frees every block of the table and empties it. Throws Error on a block that is not in use.
  void release(std::vector<std::int32_t>& block_table);

 private:
  std::vector<std::int32_t> free_;  // a stack
  std::vector<bool> used_;          // [num_blocks]
};

}  // namespace tinyvllm
