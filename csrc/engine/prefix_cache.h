// Which blocks hold which tokens, so that a later request with the same beginning can use them
// again.
//
// A full block's content is its own tokens and everything before them. It is found by a 128-bit
// hash, chained from block to block; a hit counts only if the tokens are equal and the block before
// it is the very one that was matched, so that a collision of hashes costs time and never a wrong
// answer.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

namespace tinyvllm {

using BlockId = std::int32_t;

// A block's content by name: its hash, and a number that no other content ever had. The default is
// the beginning of every sequence, before its first block.
struct ContentKey {
  std::uint64_t hash_low = 0, hash_high = 0;
  std::uint64_t serial = 0;

  bool operator==(const ContentKey&) const = default;
};

class PrefixCache {
 public:
  // hash_mask: which bits of a hash count. Tests set it to 0, so that every two contents collide.
  PrefixCache(std::int64_t num_blocks, std::uint64_t hash_mask = ~std::uint64_t{0});

  // The block that holds `tokens` after the content `before`.
  std::optional<BlockId> find(const ContentKey& before, std::span<const std::int32_t> tokens) const;

  // Makes a block known by its content. If another block is known for it already, that one stays
  // and this one remains unknown. Returns the content's key either way.
  ContentKey publish(BlockId block, const ContentKey& before, std::span<const std::int32_t> tokens);

  // The block's content is about to change. Unknown blocks are ignored.
  void forget(BlockId block);

  bool contains(BlockId block) const {
    return entries_[static_cast<std::size_t>(block)].has_value();
  }
  const ContentKey& key_of(BlockId block) const {
    return entries_[static_cast<std::size_t>(block)]->key;
  }
  std::int64_t size() const { return static_cast<std::int64_t>(by_hash_.size()); }

 private:
  struct Entry {
    ContentKey key;
    std::uint64_t before;  // serial of the content before it
    std::vector<std::int32_t> tokens;
  };

  ContentKey hashed(const ContentKey& before, std::span<const std::int32_t> tokens) const;

  const std::uint64_t hash_mask_;
  std::uint64_t num_contents_ = 0;
  std::vector<std::optional<Entry>> entries_;                // [num_blocks]
  std::unordered_multimap<std::uint64_t, BlockId> by_hash_;  // low half of the hash -> block
};

}  // namespace tinyvllm
