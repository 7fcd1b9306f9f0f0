#include "engine/prefix_cache.h"

#include <algorithm>

namespace tinyvllm {
namespace {

// The finaliser of MurmurHash3 (Appleby): every bit of the input changes half of the output's.
std::uint64_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  x ^= x >> 33;
  return x;
}

}  // namespace

PrefixCache::PrefixCache(std::int64_t num_blocks, std::uint64_t hash_mask)
    : hash_mask_(hash_mask), entries_(static_cast<std::size_t>(num_blocks)) {}

ContentKey PrefixCache::hashed(const ContentKey& before,
                               std::span<const std::int32_t> tokens) const {
  std::uint64_t low = mix(before.hash_low + 0x9e3779b97f4a7c15ULL);
  std::uint64_t high = mix(before.hash_high + 0xbf58476d1ce4e5b9ULL);
  for (const std::int32_t token : tokens) {
    const std::uint64_t value = static_cast<std::uint32_t>(token) + std::uint64_t{1};
    low = mix(low ^ value);
    high = mix(high + value * 0x94d049bb133111ebULL);
  }
  return {low & hash_mask_, high & hash_mask_, 0};
}

std::optional<BlockId> PrefixCache::find(const ContentKey& before,
                                         std::span<const std::int32_t> tokens) const {
  const ContentKey wanted = hashed(before, tokens);
  const auto [first, last] = by_hash_.equal_range(wanted.hash_low);
  for (auto candidate = first; candidate != last; ++candidate) {
    const Entry& entry = *entries_[static_cast<std::size_t>(candidate->second)];
    if (entry.key.hash_high == wanted.hash_high && entry.before == before.serial &&
        std::equal(tokens.begin(), tokens.end(), entry.tokens.begin(), entry.tokens.end())) {
      return candidate->second;
    }
  }
  return std::nullopt;
}

ContentKey PrefixCache::publish(BlockId block, const ContentKey& before,
                                std::span<const std::int32_t> tokens) {
  if (const auto known = find(before, tokens)) return key_of(*known);
  ContentKey key = hashed(before, tokens);
  key.serial = ++num_contents_;
  entries_[static_cast<std::size_t>(block)] = {
      key, before.serial, std::vector<std::int32_t>(tokens.begin(), tokens.end())};
  by_hash_.emplace(key.hash_low, block);
  return key;
}

void PrefixCache::forget(BlockId block) {
  auto& entry = entries_[static_cast<std::size_t>(block)];
  if (!entry) return;
  const auto [first, last] = by_hash_.equal_range(entry->key.hash_low);
  by_hash_.erase(
      std::find_if(first, last, [block](const auto& item) { return item.second == block; }));
  entry.reset();
}

}  // namespace tinyvllm
