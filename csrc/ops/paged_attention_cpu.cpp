#include <algorithm>
#include <new>
#include <string>

#include "base/errors.h"
#include "ops/paged_attention.h"

namespace tinyvllm {
namespace {

// Rows (a token times a query head of the group) that share the panels of a tile of keys and
// values. More of them cost less packing, and outgrow the L1 cache.
constexpr std::int64_t kRows = 64;
// KV heads that a share takes together where they have few rows: their panels stay in the L2 cache.
constexpr std::int64_t kHeads = 8;
// Items that each thread should find, so that all end at about the same time.
constexpr std::int64_t kItemsPerThread = 4;

// Successive tokens of a sequence that go through the context together. The tile's work is cut into
// items: groups of KV heads and, where a batch has few tiles, its splits.
struct Tile {
  const BatchSequence* sequence;
  std::int64_t token, num_tokens;  // of the sequence's in this batch
  std::int64_t first_split, num_splits;
  std::int64_t heads;        // of an item
  bool is_spread;            // an item has one split, not all of them
  std::int64_t first_item;   // of the batch's
  std::int64_t first_state;  // floats; where it is spread: of its states [head group][split]
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <typename Kv>
class PagedAttention {
 public:
  PagedAttention(const CpuContext& ctx, TensorView q, const KvLayer& kv, std::int64_t num_heads,
                 std::int64_t window, float scale, MutTensorView out,
                 void (*kernel)(const AttentionShare<Kv>&))
      : ctx_(ctx),
        q_(q),
        kv_(kv),
        kv_heads_(kv.shape.num_kv_heads),
        group_(num_heads / kv_heads_),
        window_(window),
        scale_(scale),
        out_(out),
        kernel_(kernel),
        tile_tokens_(std::max<std::int64_t>(1, kRows / group_)) {
    const std::int64_t rows = std::max(kRows, group_);
    state_size_ = padded(AttentionState::size(rows, kv.shape.head_dim));
    scratch_size_ = padded(attention_scratch_size(rows, kv.shape.head_dim));
  }

  void run(std::span<const BatchSequence> sequences) {
    std::int64_t num_tiles = 0, work = 0;  // in splits of one KV head
    for_each_tile(sequences, [&](const Tile& tile) {
      ++num_tiles;
      work += tile.num_splits * kv_heads_;
    });
    // Work that one item may have.
    const std::int64_t most = std::max<std::int64_t>(1, work / (kItemsPerThread * num_threads()));
    std::int64_t num_items = 0, state_floats = 0;
    const auto cut = [&](Tile& tile) {
      const std::int64_t heads_by_rows = kRows / (tile.num_tokens * group_);
      tile.is_spread = tile.num_splits > 1 && tile.num_splits * kHeads > most;
      tile.heads = std::min(
          {kHeads, kv_heads_, heads_by_rows, most / (tile.is_spread ? 1 : tile.num_splits)});
      tile.heads = std::max<std::int64_t>(1, tile.heads);
      const std::int64_t head_groups = ceil_div(kv_heads_, tile.heads);
      tile.first_item = num_items;
      tile.first_state = state_floats;
      num_items += head_groups * (tile.is_spread ? tile.num_splits : 1);
      if (tile.is_spread) state_floats += head_groups * tile.num_splits * state_size_;
    };
    for_each_tile(sequences, cut);

    const std::int64_t floats = num_threads() * worker_size() + state_floats;
    const auto bytes = static_cast<std::size_t>(floats) * sizeof(float);
    std::byte* memory = ctx_.scratch(bytes + static_cast<std::size_t>(num_tiles) * sizeof(Tile));
    workers_ = reinterpret_cast<float*>(memory);
    states_ = workers_ + num_threads() * worker_size();
    tiles_ = reinterpret_cast<Tile*>(memory + bytes);
    tiles_end_ = tiles_ + num_tiles;
    num_items = state_floats = num_tiles = 0;
    for_each_tile(sequences, [&](Tile& tile) {
      cut(tile);
      new (tiles_ + num_tiles++) Tile(tile);
    });

    ctx_.parallel_for(num_items, [&](std::int64_t item, int worker) {
      const auto begins_later = [](std::int64_t value, const Tile& other) {
        return value < other.first_item;
      };
      const Tile& tile = *(std::upper_bound(tiles_, tiles_ + num_tiles, item, begins_later) - 1);
      item -= tile.first_item;
      if (tile.is_spread) {  // neighbours in memory after each other: all heads of a split
        const std::int64_t head_groups = ceil_div(kv_heads_, tile.heads);
        attend(tile, item % head_groups, item / head_groups, worker,
               state_of(tile, item % head_groups, item / head_groups));
      } else {
        attend_all(tile, item, worker);
      }
    });
    if (state_floats == 0) return;
    ctx_.parallel_for(num_tiles * kv_heads_, [&](std::int64_t item, int) {
      const Tile& tile = tiles_[item / kv_heads_];
      const std::int64_t head_group = item % kv_heads_;
      if (tile.is_spread && head_group * tile.heads < kv_heads_) merge_all(tile, head_group);
    });
  }

 private:
  static std::int64_t padded(std::int64_t floats) { return ceil_div(floats, 16) * 16; }
  std::int64_t num_threads() const { return ctx_.num_threads(); }
  std::int64_t worker_size() const { return scratch_size_ + 2 * state_size_; }

  std::int64_t heads_of(const Tile& tile, std::int64_t head_group) const {
    return std::min(tile.heads, kv_heads_ - head_group * tile.heads);
  }
  std::int64_t rows_of(const Tile& tile, std::int64_t head_group) const {
    return heads_of(tile, head_group) * tile.num_tokens * group_;
  }
  AttentionState state_at(const Tile& tile, std::int64_t head_group, float* memory) const {
    return AttentionState::at(memory, rows_of(tile, head_group), kv_.shape.head_dim);
  }
  AttentionState state_of(const Tile& tile, std::int64_t head_group, std::int64_t split) const {
    const std::int64_t index = head_group * tile.num_splits + split;
    return state_at(tile, head_group, states_ + tile.first_state + index * state_size_);
  }

  // The last tile first, because later tokens see more.
  template <typename F>
  void for_each_tile(std::span<const BatchSequence> sequences, F&& f) const {
    for (auto sequence = sequences.rbegin(); sequence != sequences.rend(); ++sequence) {
      for (std::int64_t i = ceil_div(sequence->num_tokens, tile_tokens_) - 1; i >= 0; --i) {
        Tile tile{};
        tile.sequence = &*sequence;
        tile.token = i * tile_tokens_;
        tile.num_tokens = std::min(tile_tokens_, sequence->num_tokens - tile.token);
        const std::int64_t position = sequence->first_position + tile.token;
        const std::int64_t oldest =
            window_ > 0 ? std::max<std::int64_t>(0, position - window_ + 1) : 0;
        tile.first_split = oldest / kAttentionSplit;
        tile.num_splits = (position + tile.num_tokens - 1) / kAttentionSplit + 1 - tile.first_split;
        f(tile);
      }
    }
  }

  static std::int64_t end_of(const Tile& tile) {  // one past its last position
    return tile.sequence->first_position + tile.token + tile.num_tokens;
  }

  // What the thread that has this tile takes behind it, if threads take turns, or null: where both are
  // one item each, as in decode, and begin with their sequences' first positions.
  const Tile* likely_next(const Tile& tile) const {
    const auto is_one_item = [&](const Tile& t) { return t.heads == kv_heads_ && !t.is_spread; };
    if (window_ > 0 || tiles_end_ - &tile <= num_threads()) return nullptr;
    const Tile* next = &tile + num_threads();
    return is_one_item(tile) && is_one_item(*next) ? next : nullptr;
  }

  void attend(const Tile& tile, std::int64_t head_group, std::int64_t split, int worker,
              const AttentionState& state) const {
    const KvShape& shape = kv_.shape;
    const std::int64_t kv_head = head_group * tile.heads;
    const std::int64_t head_offset = kv_head * shape.block_size * shape.head_dim;
    const float* query = q_.row<float>(tile.sequence->first_token + tile.token);
    const Tile* next = split + 1 == tile.num_splits ? likely_next(tile) : nullptr;
    kernel_({.query = query + kv_head * group_ * shape.head_dim,
             .query_stride = q_.row_stride,
             .keys = static_cast<const Kv*>(kv_.keys) + head_offset,
             .values = static_cast<const Kv*>(kv_.values) + head_offset,
             .block_stride = shape.block_stride(),
             .block_table = tile.sequence->block_table,
             .block_size = shape.block_size,
             .head_dim = shape.head_dim,
             .num_heads = heads_of(tile, head_group),
             .group = group_,
             .num_tokens = tile.num_tokens,
             .first_position = tile.sequence->first_position + tile.token,
             .window = window_,
             .split = (tile.first_split + split) * kAttentionSplit,
             .scale = scale_,
             .scratch = workers_ + worker * worker_size(),
             .next_block_table = next == nullptr ? nullptr : next->sequence->block_table,
             .next_positions = next == nullptr ? 0 : end_of(*next),
             .out = state});
  }

  void attend_all(const Tile& tile, std::int64_t head_group, int worker) const {
    float* memory = workers_ + worker * worker_size() + scratch_size_;
    const AttentionState all = state_at(tile, head_group, memory);
    const AttentionState one = state_at(tile, head_group, memory + state_size_);
    attend(tile, head_group, 0, worker, all);
    for (std::int64_t split = 1; split < tile.num_splits; ++split) {
      attend(tile, head_group, split, worker, one);
      merge(tile, head_group, one, all);
    }
    write(tile, head_group, all);
  }

  void merge_all(const Tile& tile, std::int64_t head_group) const {
    const AttentionState all = state_of(tile, head_group, 0);
    for (std::int64_t split = 1; split < tile.num_splits; ++split) {
      merge(tile, head_group, state_of(tile, head_group, split), all);
    }
    write(tile, head_group, all);
  }

  void merge(const Tile& tile, std::int64_t head_group, const AttentionState& from,
             const AttentionState& into) const {
    ctx_.kernels().attention_merge(into, from, rows_of(tile, head_group), kv_.shape.head_dim,
                                   scale_);
  }

  void write(const Tile& tile, std::int64_t head_group, const AttentionState& state) const {
    const std::int64_t dim = kv_.shape.head_dim, first_head = head_group * tile.heads * group_;
    const Kernels& kernels = ctx_.kernels();
    std::int64_t r = 0;
    for (std::int64_t head = 0; head < heads_of(tile, head_group); ++head) {
      for (std::int64_t t = 0; t < tile.num_tokens; ++t) {
        for (std::int64_t i = 0; i < group_; ++i, ++r) {
          const float* sums = state.sums + r * attention_columns(dim);
          const std::int64_t row = tile.sequence->first_token + tile.token + t;
          const std::int64_t column = (first_head + head * group_ + i) * dim;
          if (out_.dtype == DType::kFloat32) {
            kernels.divide_f32(sums, state.total[r], dim, out_.row<float>(row) + column);
          } else {
            kernels.divide_bf16(sums, state.total[r], dim, out_.row<BFloat16>(row) + column);
          }
        }
      }
    }
  }

  const CpuContext& ctx_;
  const TensorView q_;
  const KvLayer& kv_;
  const std::int64_t kv_heads_, group_, window_;
  const float scale_;
  const MutTensorView out_;
  void (*const kernel_)(const AttentionShare<Kv>&);
  const std::int64_t tile_tokens_;
  std::int64_t state_size_, scratch_size_;  // in floats
  float* workers_ = nullptr;                // for each thread: the kernel's scratch and two states
  float* states_ = nullptr;                 // of the tiles that are spread
  Tile *tiles_ = nullptr, *tiles_end_ = nullptr;
};

}  // namespace

void check_attention(const CpuContext& /*ctx*/, std::int64_t num_heads, std::int64_t num_kv_heads) {
  if (num_heads / num_kv_heads <= kMaxGroup) return;
  throw UnsupportedModelError("Attention has " + std::to_string(num_heads) + " query heads over " +
                              std::to_string(num_kv_heads) + " KV heads; on a CPU at most " +
                              std::to_string(kMaxGroup) + " may share one. Try the device cuda.");
}

void paged_attention(const CpuContext& ctx, TensorView q, const KvLayer& kv,
                     std::span<const BatchSequence> sequences, std::int64_t num_heads,
                     std::int64_t window, float scale, MutTensorView out) {
  check_attention(ctx, num_heads, kv.shape.num_kv_heads);
  const Kernels& kernels = ctx.kernels();
  if (kv.shape.dtype == DType::kBFloat16) {
    PagedAttention<BFloat16>(ctx, q, kv, num_heads, window, scale, out, kernels.attention_bf16)
        .run(sequences);
  } else {
    PagedAttention<float>(ctx, q, kv, num_heads, window, scale, out, kernels.attention_f32)
        .run(sequences);
  }
}

}  // namespace tinyvllm
