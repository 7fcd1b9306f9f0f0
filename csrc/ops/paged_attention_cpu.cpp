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

// Successive tokens of a sequence that go through the context together, for each KV head. Where
// the batch has too few of them for the threads, the splits of one are shared out as well.
struct Tile {
  const BatchSequence* sequence;
  std::int64_t token, num_tokens;  // of the sequence's in this batch
  std::int64_t first_split, num_splits;
  bool is_spread;            // an item for each split, not one for all
  std::int64_t first_item;   // of the tile's num_kv_heads (x num_splits) items
  std::int64_t first_state;  // where it is spread: of its states [kv_head][split]
};

template <typename Kv>
class PagedAttention {
 public:
  PagedAttention(const CpuContext& ctx, TensorView q, const KvLayer& kv, std::int64_t num_heads,
                 std::int64_t window, float scale, MutTensorView out,
                 void (*kernel)(const AttentionShare<Kv>&))
      : ctx_(ctx),
        q_(q),
        kv_(kv),
        group_(num_heads / kv.shape.num_kv_heads),
        window_(window),
        scale_(scale),
        out_(out),
        kernel_(kernel),
        tile_tokens_(std::max<std::int64_t>(1, kRows / group_)),
        state_size_(AttentionState::size(tile_tokens_ * group_, kv.shape.head_dim)),
        scratch_size_(attention_scratch_size(tile_tokens_ * group_, kv.shape.head_dim)) {}

  void run(std::span<const BatchSequence> sequences) {
    const std::int64_t heads = kv_.shape.num_kv_heads;
    std::int64_t num_tiles = 0, num_splits = 0;
    for_each_tile(sequences, [&](const Tile& tile) {
      ++num_tiles;
      num_splits += tile.num_splits * heads;
    });
    // Splits are shared out where a tile's take longer than a small part of a thread's work.
    const auto is_spread = [&](const Tile& tile) {
      return tile.num_splits > 1 && tile.num_splits * 8 * ctx_.num_threads() > num_splits;
    };
    std::int64_t num_states = 0;
    for_each_tile(sequences, [&](const Tile& tile) {
      if (is_spread(tile)) num_states += tile.num_splits * heads;
    });

    const auto floats = static_cast<std::size_t>(ctx_.num_threads() * worker_size() +
                                                 num_states * padded(state_size_));
    std::byte* memory =
        ctx_.scratch(floats * sizeof(float) + static_cast<std::size_t>(num_tiles) * sizeof(Tile));
    workers_ = reinterpret_cast<float*>(memory);
    states_ = workers_ + ctx_.num_threads() * worker_size();
    Tile* tiles = reinterpret_cast<Tile*>(memory + floats * sizeof(float));
    std::int64_t num_items = 0, state = 0, index = 0;
    for_each_tile(sequences, [&](Tile tile) {
      tile.is_spread = is_spread(tile);
      tile.first_item = num_items;
      tile.first_state = state;
      num_items += heads * (tile.is_spread ? tile.num_splits : 1);
      if (tile.is_spread) state += heads * tile.num_splits;
      new (tiles + index++) Tile(tile);
    });

    ctx_.parallel_for(num_items, [&](std::int64_t item, int worker) {
      const Tile& tile = *(std::upper_bound(tiles, tiles + num_tiles, item,
                                            [](std::int64_t value, const Tile& other) {
                                              return value < other.first_item;
                                            }) -
                           1);
      item -= tile.first_item;
      if (tile.is_spread) {
        const std::int64_t split = item % tile.num_splits;
        attend(tile, item / tile.num_splits, tile.first_split + split, worker,
               state_of(tile, item));
      } else {
        attend_all(tile, item, worker);
      }
    });
    if (num_states == 0) return;
    ctx_.parallel_for(num_tiles * heads, [&](std::int64_t item, int) {
      const Tile& tile = tiles[item / heads];
      if (tile.is_spread) merge(tile, item % heads);
    });
  }

 private:
  static std::int64_t padded(std::int64_t floats) { return (floats + 15) / 16 * 16; }
  std::int64_t worker_size() const { return padded(scratch_size_) + 2 * padded(state_size_); }

  AttentionState state_at(const Tile& tile, float* memory) const {
    return AttentionState::at(memory, tile.num_tokens * group_, kv_.shape.head_dim);
  }
  AttentionState state_of(const Tile& tile, std::int64_t head_and_split) const {
    return state_at(tile, states_ + (tile.first_state + head_and_split) * padded(state_size_));
  }

  // The last tile first, because later tokens see more.
  template <typename F>
  void for_each_tile(std::span<const BatchSequence> sequences, F&& f) const {
    for (auto sequence = sequences.rbegin(); sequence != sequences.rend(); ++sequence) {
      const std::int64_t count = (sequence->num_tokens + tile_tokens_ - 1) / tile_tokens_;
      for (std::int64_t i = count - 1; i >= 0; --i) {
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

  void attend(const Tile& tile, std::int64_t kv_head, std::int64_t split, int worker,
              const AttentionState& state) const {
    const KvShape& shape = kv_.shape;
    const std::int64_t head_offset = kv_head * shape.block_size * shape.head_dim;
    const float* query = q_.row<float>(tile.sequence->first_token + tile.token);
    kernel_({.query = query + kv_head * group_ * shape.head_dim,
             .query_stride = q_.row_stride,
             .keys = static_cast<const Kv*>(kv_.keys) + head_offset,
             .values = static_cast<const Kv*>(kv_.values) + head_offset,
             .block_stride = shape.block_stride(),
             .block_table = tile.sequence->block_table,
             .block_size = shape.block_size,
             .head_dim = shape.head_dim,
             .group = group_,
             .num_tokens = tile.num_tokens,
             .first_position = tile.sequence->first_position + tile.token,
             .window = window_,
             .split = split * kAttentionSplit,
             .scale = scale_,
             .scratch = workers_ + worker * worker_size(),
             .out = state});
  }

  void attend_all(const Tile& tile, std::int64_t kv_head, int worker) const {
    float* memory = workers_ + worker * worker_size() + padded(scratch_size_);
    const AttentionState all = state_at(tile, memory);
    const AttentionState one = state_at(tile, memory + padded(state_size_));
    for (std::int64_t i = 0; i < tile.num_splits; ++i) {
      attend(tile, kv_head, tile.first_split + i, worker, i == 0 ? all : one);
      if (i > 0) add(tile, one, all);
    }
    write(tile, kv_head, all);
  }

  void merge(const Tile& tile, std::int64_t kv_head) const {
    const AttentionState all = state_of(tile, kv_head * tile.num_splits);
    for (std::int64_t i = 1; i < tile.num_splits; ++i) {
      add(tile, state_of(tile, kv_head * tile.num_splits + i), all);
    }
    write(tile, kv_head, all);
  }

  void add(const Tile& tile, const AttentionState& from, const AttentionState& into) const {
    ctx_.kernels().attention_merge(into, from, tile.num_tokens * group_, kv_.shape.head_dim,
                                   scale_);
  }

  void write(const Tile& tile, std::int64_t kv_head, const AttentionState& state) const {
    const std::int64_t dim = kv_.shape.head_dim, first = tile.sequence->first_token + tile.token;
    for (std::int64_t r = 0; r < tile.num_tokens * group_; ++r) {
      const std::int64_t t = first + r / group_;
      const std::int64_t column = (kv_head * group_ + r % group_) * dim;
      float* sums = state.sums + r * attention_columns(dim);
      if (out_.dtype == DType::kFloat32) {
        ctx_.kernels().divide(sums, state.total[r], dim, out_.row<float>(t) + column);
      } else {
        ctx_.kernels().divide(sums, state.total[r], dim, sums);
        ctx_.kernels().to_bfloat16(sums, dim, out_.row<BFloat16>(t) + column);
      }
    }
  }

  const CpuContext& ctx_;
  const TensorView q_;
  const KvLayer& kv_;
  const std::int64_t group_, window_;
  const float scale_;
  const MutTensorView out_;
  void (*const kernel_)(const AttentionShare<Kv>&);
  const std::int64_t tile_tokens_, state_size_, scratch_size_;
  float* workers_ = nullptr;  // for each thread: the kernel's scratch and two states
  float* states_ = nullptr;   // of the tiles that are spread
};

}  // namespace

void paged_attention(const CpuContext& ctx, TensorView q, const KvLayer& kv,
                     std::span<const BatchSequence> sequences, std::int64_t num_heads,
                     std::int64_t window, float scale, MutTensorView out) {
  if (num_heads / kv.shape.num_kv_heads > kMaxGroup) {
    throw Error("paged_attention: " + std::to_string(num_heads) + " query heads over " +
                std::to_string(kv.shape.num_kv_heads) + " KV heads; at most " +
                std::to_string(kMaxGroup) + " may share one.");
  }
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
