// Attention over a paged context with an online softmax (Milakov & Gimelshein 2018;
// FlashAttention, Dao et al. 2022): the scores of a tile of positions are used and forgotten, and
// what was summed under an older maximum is scaled down when a larger score appears.
//
// (That maximum may be a little less than the largest score: see weigh().)
//
// The rows are queries: the heads of one KV head, at one token or at several. A tile's keys are
// turned once into a panel [head_dim][position], its values into [position][head_dim], and both
// products are then the same loop: broadcast an element of the row, multiply with a vector of the
// panel, add. An output element has one accumulator over ascending k, in one lane, whatever the
// number of rows; a row's instructions depend on its own position only (docs/promises.md, 2).
//
// AMX (amx.h) takes both panels as right operands as they are, and adds up 32 elements of k at a time:
// of the keys where head_dim is made of such steps, of the values where a row sees all 64 positions.
// With few rows, in decode, turning the keys would be most of the work: there they are the left
// operand, as they lie in the cache, and the scores are turned, to the same bits.
//
// A score outside a row's range is replaced by -inf, whatever it is. Values outside it are not
// multiplied: their slots may hold anything.
#pragma once

#include "ops/cpu/attention_products.h"
#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace tinyvllm::TINYVLLM_ISA {

inline constexpr float kMinusInfinity = -__builtin_inff();

// The work on one share, tile by tile.
template <typename Kv>
class Attention {
 public:
  explicit Attention(const AttentionShare<Kv>& share)
      : share_(share),
        columns_(attention_columns(share.head_dim)),
        head_rows_(share.num_tokens * share.group),
        rows_(share.num_heads * head_rows_),
        exponent_(share.scale * 1.44269504088896341f),
        room_(kRoom / exponent_),
        keys_as_they_lie_(may_score_keys(head_rows_, share)) {
    float* memory = share.scratch;
    const auto take = [&](std::int64_t size) {
      float* taken = memory;
      memory += size;
      return taken;
    };
    panel_ = reinterpret_cast<Element*>(take(kTile * columns_));
    edge_ = reinterpret_cast<Element*>(take(columns_));
    query_ = reinterpret_cast<Element*>(take(rows_ * columns_));
    static_assert(!P::kTiles || 2 * sizeof(Element) <= sizeof(float));
    turned_query_ = query_ + rows_ * columns_;  // the other half of what is there; for Tiles only
    scores_ = take(rows_ * kTile);
    totals_ = take(rows_ * kLanes);
  }

  void run() {
    std::int64_t r = 0;
    for (std::int64_t head = 0; head < share_.num_heads; ++head) {
      for (std::int64_t token = 0; token < share_.num_tokens; ++token) {
        const float* query = share_.query + token * share_.query_stride;
        for (std::int64_t i = 0; i < share_.group; ++i, ++r) {
          start_row(r, query + (head * share_.group + i) * share_.head_dim);
        }
      }
    }
    if (keys_as_they_lie_) turn_queries();
    const std::int64_t end = share_.split + kAttentionSplit;
    const std::int64_t last = share_.first_position + share_.num_tokens - 1;
    for (std::int64_t tile = share_.split; tile < end && tile <= last; tile += kTile) {
      attend_tile(tile);
    }
    for (r = 0; r < rows_; ++r) {
      share_.out.total[r] = horizontal_sum(load(totals_ + r * kLanes));
    }
  }

 private:
  using P = Products<Kv>;
  using Element = typename P::Element;
  static constexpr float kRoom = 6.0f;

  void start_row(std::int64_t r, const float* query) {
    share_.out.maximum[r] = kMinusInfinity;
    store(totals_ + r * kLanes, Float{});
    for (std::int64_t i = 0; i < columns_; i += kLanes) {
      store(share_.out.sums + r * columns_ + i, Float{});
    }
    P::store_query(query, share_.head_dim, query_ + r * columns_);
  }

  // The positions of a tile that a token sees, relative to the tile's first. Empty: last < first.
  struct Range {
    std::int64_t first, last;
    bool has_vector_at(std::int64_t j) const { return j >= first && j + kLanes - 1 <= last; }
    bool all() const { return first == 0 && last == kTile - 1; }
    bool empty() const { return last < first; }
  };

  Range seen(std::int64_t token, std::int64_t tile) const {
    const std::int64_t position = share_.first_position + token - tile;
    const std::int64_t oldest = share_.window > 0 ? position - share_.window + 1 : 0;
    return {oldest > 0 ? oldest : 0, position < kTile - 1 ? position : kTile - 1};
  }

  // Head by head, first the keys and then the values, through a panel that stays in the L1 cache.
  // Memory is slow to give some lines here and some there when they are needed: so the tile's values are
  // prefetched while its keys are multiplied, and with the values the next tile's keys, or after the
  // last tile the next sequence's, some at each turn, in an order of their own (Ahead).
  void attend_tile(std::int64_t tile) {
    const Range oldest = seen(0, tile), newest = seen(share_.num_tokens - 1, tile);
    const Range any = {oldest.first, newest.last};
    if (any.empty()) return;
    std::int64_t* offsets = offsets_[tile / kTile % 2];
    if (located_ != tile) locate(share_.block_table, tile, any, offsets);
    const std::int64_t column = any.first / kLanes * kLanes;
    const std::int64_t vectors = any.last / kLanes + 1 - column / kLanes;
    Ahead values_ahead = ahead_of(share_.values, offsets, any, vectors);
    for (std::int64_t head = 0; head < share_.num_heads; ++head) {
      if constexpr (P::kTiles) {
        if (keys_as_they_lie_) {
          score_keys(head, offsets, any, values_ahead);
          continue;
        }
      }
      const std::int64_t row = head * head_rows_;
      pack(any, values_ahead, [&]<bool kWhole>(std::int64_t j) {
        pack_keys<kWhole>(share_.keys + head * head_stride(), offsets, j, any);
      });
      score(query_ + row * columns_, panel_ + column * P::kPair, scores_ + row * kTile + column,
            vectors);
    }
    const std::int64_t next_tile = tile + kTile;
    Range next = {seen(0, next_tile).first, seen(share_.num_tokens - 1, next_tile).last};
    if (next_tile == share_.split + kAttentionSplit) next = {0, -1};
    std::int64_t* next_offsets = offsets_[next_tile / kTile % 2];
    if (!next.empty()) {
      locate(share_.block_table, next_tile, next, next_offsets);
      located_ = next_tile;
    } else if (share_.next_block_table != nullptr) {
      next = {0, smaller(share_.next_positions, kTile) - 1};
      locate(share_.next_block_table, 0, next, next_offsets);
    }
    Ahead keys_ahead = ahead_of(share_.keys, next_offsets, next, vectors + head_rows_);
    const Range whole = tokens_that_see_all(tile);
    for (std::int64_t head = 0; head < share_.num_heads; ++head) {
      pack(any, keys_ahead, [&]<bool kWhole>(std::int64_t j) {
        pack_values<kWhole>(share_.values + head * head_stride(), offsets, j, any);
      });
      const std::int64_t row = head * head_rows_;
      for (std::int64_t token = 0; token < share_.num_tokens; ++token) {
        const Range range = seen(token, tile);
        if (range.empty()) continue;
        const std::int64_t r = row + token * share_.group;
        for (std::int64_t i = 0; i < share_.group; ++i) {
          prefetch(keys_ahead);
          weigh(r + i, range);
        }
      }
      add_values_of(row, tile, {0, whole.first - 1});
      if constexpr (P::kTiles) {
        add_all_values(row + whole.first * share_.group,
                       (whole.last - whole.first + 1) * share_.group);
      }
      add_values_of(row, tile, {whole.last + 1, share_.num_tokens - 1});
    }
  }

  // On AMX: the tokens that see all positions of this tile, whose values add_all_values is to add. An
  // empty range behind the last token if there are none.
  Range tokens_that_see_all(std::int64_t tile) const {
    Range whole = {share_.num_tokens, share_.num_tokens - 1};
    if (!P::kTiles) return whole;
    for (std::int64_t token = share_.num_tokens - 1; token >= 0; --token) {
      if (!seen(token, tile).all()) {
        if (whole.empty()) continue;
        break;
      }
      if (whole.empty()) whole.last = token;
      whole.first = token;
    }
    return whole;
  }

  // The scores of one head's rows, for some vectors of positions.
  void score(const Element* query, const Element* panel, float* scores, std::int64_t vectors) {
    if constexpr (P::kTiles) {
      if (share_.head_dim % P::Tiles::kStep == 0) {
        return tiles_.template multiply<true>(query, columns_, panel, kTile * P::kPair,
                                              share_.head_dim / P::Tiles::kStep, scores, kTile,
                                              head_rows_, vectors);
      }
    }
    product<P, true>(query, columns_, panel, kTile * P::kPair, steps(), scores, kTile, head_rows_,
                     vectors);
  }

  // sums[r] += weights[r] values, of all positions of the tile.
  void add_all_values(std::int64_t r, std::int64_t rows) {
    tiles_.template multiply<false>(weights_of(r), kWeightStride, panel_, columns_ * P::kPair,
                                    kTile / P::Tiles::kStep, share_.out.sums + r * columns_,
                                    columns_, rows, columns_ / kLanes);
  }

  // The same for some tokens, of what each of them sees. In ascending order: what only some see, what
  // all see, what only some see.
  void add_values_of(std::int64_t row, std::int64_t tile, Range tokens) {
    if (tokens.empty()) return;
    const Range oldest = seen(tokens.first, tile), newest = seen(tokens.last, tile);
    const Range common = common_steps({newest.first, oldest.last});
    const auto for_each_token = [&](auto&& f) {
      for (std::int64_t token = tokens.first; token <= tokens.last; ++token) {
        const Range range = seen(token, tile);
        if (!range.empty()) f(row + token * share_.group, range);
      }
    };
    if (oldest.first < common.first) {
      for_each_token([&](std::int64_t r, Range range) {
        add_values(r, share_.group, {range.first, smaller(range.last, common.first - 1)});
      });
    }
    add_values(row + tokens.first * share_.group, (tokens.last - tokens.first + 1) * share_.group,
               common);
    if (newest.last > common.last) {
      for_each_token([&](std::int64_t r, Range range) {
        add_values(r, share_.group, {larger(range.first, common.last + 1), range.last});
      });
    }
  }

  // The positions of a range that fill whole steps of k. If there are none, the empty range behind
  // the tile.
  static Range common_steps(Range range) {
    const std::int64_t first = (range.first + P::kPair - 1) / P::kPair * P::kPair;
    const std::int64_t last = (range.last + 1) / P::kPair * P::kPair - 1;
    return first <= last ? Range{first, last} : Range{kTile, kTile - 1};
  }

  static std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
  static std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

  // Steps of k in a product with the keys.
  std::int64_t steps() const { return (share_.head_dim + P::kPair - 1) / P::kPair; }

  std::int64_t head_stride() const { return share_.block_size * share_.head_dim; }

  // Keys or values that are needed next. A fetch takes `step` positions from each quarter of the tile,
  // head by head. Where a quarter is a block, whose heads lie one behind the other, these are four
  // streams of memory, a line of each in turn, and memory gives more of them than of one after the other.
  struct Ahead {
    const Kv* first;              // of the first head
    const std::int64_t* offsets;  // from there to each position's
    Range range;
    std::int64_t step;
    std::int64_t head, position;  // where the next fetch begins, in a quarter
  };

  static constexpr std::int64_t kQuarter = kTile / 4;

  // What is to be fetched with so many calls a head.
  static Ahead ahead_of(const Kv* first, const std::int64_t* offsets, Range range,
                        std::int64_t calls) {
    return {first, offsets, range, (kQuarter + calls - 1) / calls, 0, 0};
  }

  void prefetch(Ahead& ahead) const {
    if (ahead.range.empty() || ahead.head == share_.num_heads) return;
    constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(Kv));
    const Kv* head = ahead.first + ahead.head * head_stride();
    const std::int64_t end = smaller(ahead.position + ahead.step, kQuarter);
    for (std::int64_t i = ahead.position; i < end; ++i) {
      for (std::int64_t c = 0; c < share_.head_dim; c += kLine) {
        for (std::int64_t j = i; j <= ahead.range.last; j += kQuarter) {
          if (j >= ahead.range.first) __builtin_prefetch(head + ahead.offsets[j] + c, 0, 2);
        }
      }
    }
    ahead.position = end % kQuarter;
    if (end == kQuarter) ++ahead.head;
  }

  // Fills the panel with what part<whether all are in the range>(j) makes of one head's keys or
  // values at the positions from j on that fill one vector.
  template <typename F>
  void pack(Range range, Ahead& ahead, F&& part) {
    for (std::int64_t j = range.first / kLanes * kLanes; j <= range.last; j += kLanes) {
      prefetch(ahead);
      if (range.has_vector_at(j) && share_.head_dim % P::kLoad == 0) {
        part.template operator()<true>(j);
      } else {
        part.template operator()<false>(j);
      }
    }
  }

  // Where the keys and values of a tile's positions lie.
  void locate(const std::int32_t* block_table, std::int64_t tile, Range range,
              std::int64_t* offsets) const {
    const std::int64_t position = tile + range.first;
    const std::int32_t* block = block_table + position / share_.block_size;
    std::int64_t slot = position % share_.block_size;
    std::int64_t offset = *block * share_.block_stride + slot * share_.head_dim;
    for (std::int64_t j = range.first;; ++j) {
      offsets[j] = offset;
      if (j == range.last) return;
      offset += share_.head_dim;
      if (++slot == share_.block_size) {
        slot = 0;
        offset = *++block * share_.block_stride;
      }
    }
  }

  // On AMX: whether few rows are multiplied with keys where they lie.
  static bool may_score_keys(std::int64_t rows, const AttentionShare<Kv>& share) {
    if constexpr (P::kTiles) {
      return rows <= kLanes && share.head_dim % P::Tiles::kStep == 0 &&
             share.block_size % kLanes == 0;
    }
    return false;
  }

  // The queries of each head as a right operand, for score_keys.
  void turn_queries() {
    Element* out = turned_query_;
    for (std::int64_t head = 0; head < share_.num_heads; ++head) {
      const Element* queries = query_ + head * head_rows_ * columns_;
      for (std::int64_t k = 0; k < share_.head_dim; k += P::kPair) {
        for (std::int64_t r = 0; r < head_rows_; ++r, out += P::kPair) {
          __builtin_memcpy(out, queries + r * columns_ + k, P::kPair * sizeof(Element));
        }
      }
    }
  }

  // The scores of one head's few rows with its keys where they lie: the positions of a vector are
  // neighbours in one block.
  void score_keys(std::int64_t head, const std::int64_t* offsets, Range range, Ahead& ahead) {
    const std::int64_t dim = share_.head_dim, first = range.first / kLanes * kLanes;
    const Kv* keys = share_.keys + head * head_stride();
    const Element* queries = turned_query_ + head * head_rows_ * dim;
    alignas(64) float scores[kTile * kLanes];  // [positions, head_rows_]
    for (std::int64_t j = first; j <= range.last; j += kLanes) {
      prefetch(ahead);
      const Kv* vector =
          range.has_vector_at(j) ? keys + offsets[j] : copy_of_part(keys, offsets, j, range);
      tiles_.score_keys(vector, dim, queries, dim / P::Tiles::kStep, scores + j * head_rows_,
                        head_rows_);
    }
    for (std::int64_t r = 0; r < head_rows_; ++r) {
      float* row = scores_ + (head * head_rows_ + r) * kTile;
      for (std::int64_t j = first; j <= range.last; j += kLanes) {
        store(row + j, tiles_.scores_of_row(scores + j * head_rows_, head_rows_, r));
      }
    }
  }

  // A vector of positions that are not all in the range. Those outside it count as 0, and are not read.
  const Kv* copy_of_part(const Kv* keys, const std::int64_t* offsets, std::int64_t j,
                         Range range) const {
    const auto bytes = static_cast<std::size_t>(share_.head_dim) * sizeof(Kv);
    for (std::int64_t i = 0; i < kLanes; ++i) {
      Kv* row = panel_ + i * share_.head_dim;  // keys that need no panel leave it free
      if (j + i < range.first || j + i > range.last) {
        __builtin_memset(static_cast<void*>(row), 0, bytes);
      } else {
        __builtin_memcpy(row, keys + offsets[j + i], bytes);
      }
    }
    return panel_;
  }

  // kLoad columns from c on of a head's keys, at the positions from j on that fill one vector. part[i]
  // becomes the i-th step of the first product. Positions outside the range count as 0.
  template <bool kWhole>
  TINYVLLM_INLINE void load_keys(const Kv* keys, const std::int64_t* offsets, std::int64_t j,
                                 std::int64_t c, Range range, Float (&part)[kLanes]) const {
    if constexpr (kWhole) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) part[i] = P::load_row(keys + offsets[j + i] + c);
    } else {
      const std::int64_t left = share_.head_dim - c;
      for (int i = 0; i < kLanes; ++i) {
        part[i] = Float{};
        if (j + i < range.first || j + i > range.last) continue;
        const Kv* row = keys + offsets[j + i] + c;
        part[i] = left < P::kLoad ? P::load_row(row, left) : P::load_row(row);
      }
    }
    transpose(part);
  }

  // A step of the second product: kLoad columns from c on of a head's values, at the positions from j
  // on. Positions outside the range count as 0.
  template <bool kWhole>
  TINYVLLM_INLINE void load_values(const Kv* values, const std::int64_t* offsets, std::int64_t j,
                                   std::int64_t c, Range range, Float* columns) const {
    Float rows[P::kPair];
#pragma GCC unroll 2
    for (int i = 0; i < P::kPair; ++i) {
      if constexpr (kWhole) {
        rows[i] = P::load_row(values + offsets[j + i] + c);
      } else {
        const std::int64_t left = share_.head_dim - c;
        rows[i] = Float{};
        if (j + i < range.first || j + i > range.last) continue;
        const Kv* row = values + offsets[j + i] + c;
        rows[i] = left < P::kLoad ? P::load_row(row, left) : P::load_row(row);
      }
    }
    P::interleave(rows);
#pragma GCC unroll 2
    for (int i = 0; i < P::kPair; ++i) columns[i] = rows[i];
  }

  // The panel [head_dim / kPair][kTile][kPair] of one head's keys, at the positions from j on that
  // fill one vector.
  template <bool kWhole>
  void pack_keys(const Kv* keys, const std::int64_t* offsets, std::int64_t j, Range range) {
    for (std::int64_t c = 0; c < share_.head_dim; c += P::kLoad) {
      Float part[kLanes];
      load_keys<kWhole>(keys, offsets, j, c, range, part);
      Element* out = panel_ + (c / P::kPair * kTile + j) * P::kPair;
      const std::int64_t count = steps() - c / P::kPair;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < count) __builtin_memcpy(out + i * kTile * P::kPair, &part[i], sizeof(Float));
      }
    }
  }

  // The panel [kTile / kPair][columns][kPair] of one head's values, likewise.
  template <bool kWhole>
  void pack_values(const Kv* values, const std::int64_t* offsets, std::int64_t j, Range range) {
    const std::int64_t first = larger(j, range.first) / P::kPair * P::kPair;
    const std::int64_t last = smaller(j + kLanes - 1, range.last);
    const std::int64_t dim = share_.head_dim, columns = columns_;
    Element* panel = panel_;
    for (std::int64_t k = first; k <= last; k += P::kPair) {
      for (std::int64_t c = 0; c < dim; c += P::kLoad) {
        Float part[P::kPair];
        load_values<kWhole>(values, offsets, k, c, range, part);
#pragma GCC unroll 2
        for (int i = 0; i < P::kPair; ++i) {
          const std::int64_t column = c + i * kLanes;
          if (kWhole || column < columns) {
            __builtin_memcpy(panel + k * columns + column * P::kPair, &part[i], sizeof(Float));
          }
        }
      }
    }
  }

  // A row's scores become weights. What was summed before is scaled down only when a score appears
  // whose weight would be above 2^kRoom: seldom, so that the branch is well predicted.
  TINYVLLM_INLINE void weigh(std::int64_t r, Range range) {
    float* row = scores_ + r * kTile;
    float* totals = totals_ + r * kLanes;
    Float scores[kTileVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) scores[v] = load(row + v * kLanes);
    if (!range.all()) {
      Int lane{};
      for (int i = 0; i < kLanes; ++i) lane[i] = i;
      const auto first = static_cast<std::int32_t>(range.first);
      const auto last = static_cast<std::int32_t>(range.last);
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; ++v) {
        const Int position = lane + v * kLanes;
        scores[v] =
            (position >= first) & (position <= last) ? scores[v] : broadcast(kMinusInfinity);
      }
    }
    Float largest = scores[0];
#pragma GCC unroll 16
    for (int v = 1; v < kTileVectors; ++v) largest = maximum(scores[v], largest);
    float origin = share_.out.maximum[r];
    if (any_greater(largest, broadcast(origin + room_))) {
      const float now = horizontal_maximum(largest);
      const Float rescale = exp2(broadcast((origin - now) * exponent_));
      float* sums = share_.out.sums + r * columns_;
      for (std::int64_t i = 0; i < columns_; i += kLanes) store(sums + i, load(sums + i) * rescale);
      store(totals, load(totals) * rescale);
      share_.out.maximum[r] = origin = now;
    }
    // Where all scores are -inf the weights are to be 0, and -inf minus itself is no number.
    if (origin == kMinusInfinity) origin = 0.0f;
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) {
      scores[v] = exp2((scores[v] - broadcast(origin)) * broadcast(exponent_));
    }
    store(totals, P::store_weights(scores, row, load(totals)));
  }

  // Weights lie at the start of a row of scores, in the size of their type.
  static constexpr std::int64_t kWeightStride =
      kTile * static_cast<std::int64_t>(sizeof(float)) / static_cast<std::int64_t>(sizeof(Element));
  const Element* weights_of(std::int64_t r) const {
    return reinterpret_cast<const Element*>(scores_ + r * kTile);
  }

  // sums[r] += weights[r] values, over the range only.
  void add_values(std::int64_t r, std::int64_t rows, Range range) {
    if (range.empty()) return;
    const Element* weights = weights_of(r);
    float* sums = share_.out.sums + r * columns_;
    const auto add = [&](std::int64_t step, std::int64_t steps, const Element* panel) {
      product<P, false>(weights + step * P::kPair, kWeightStride, panel, columns_ * P::kPair, steps,
                        sums, columns_, rows, columns_ / kLanes);
    };
    std::int64_t step = range.first / P::kPair;
    std::int64_t last = range.last / P::kPair;
    if constexpr (P::kPair == 2) {
      // A pair of which only one is in the range: the other is replaced by 0.
      const auto add_edge = [&](std::int64_t edge) {
        const UInt left = UInt{} + (2 * edge >= range.first ? 0x0000ffffu : 0u);
        const UInt right = UInt{} + (2 * edge + 1 <= range.last ? 0xffff0000u : 0u);
        for (std::int64_t i = 0; i < columns_; i += kLanes) {
          UInt pairs;
          __builtin_memcpy(&pairs, panel_ + (edge * columns_ + i) * 2, sizeof(pairs));
          pairs &= left | right;
          __builtin_memcpy(edge_ + 2 * i, &pairs, sizeof(pairs));
        }
        add(edge, 1, edge_);
      };
      const bool first_is_cut = range.first % 2 == 1;
      const bool last_is_cut = range.last % 2 == 0 && !(first_is_cut && step == last);
      if (first_is_cut) add_edge(step++);
      if (last_is_cut) --last;
      if (step <= last) add(step, last - step + 1, panel_ + step * columns_ * 2);
      if (last_is_cut) add_edge(last + 1);
    } else {
      add(step, last - step + 1, panel_ + step * columns_);
    }
  }

  const AttentionShare<Kv>& share_;
  const std::int64_t columns_, head_rows_, rows_;
  const float exponent_;         // turns a difference of scores into a power of 2
  const float room_;             // the difference of scores that makes kRoom of it
  const bool keys_as_they_lie_;  // on AMX, where rows are few
  Element* panel_;               // of one head's keys, or of its values
  Element* edge_;                // one step of a panel of values
  Element* query_;               // [rows, columns]
  Element* turned_query_;        // [heads, head_dim / kPair, rows of a head, kPair]
  float* scores_;                // [rows, kTile], then the weights
  float* totals_;                // [rows, kLanes]: lane by lane
  // Where the positions of a tile and of the one before it or behind it lie, and of which one that
  // is behind it.
  std::int64_t offsets_[2][kTile];
  std::int64_t located_ = -1;
  [[no_unique_address]] typename P::Tiles tiles_;
};

template <typename Kv>
void attention(const AttentionShare<Kv>& share) {
  Attention<Kv>(share).run();
#if defined(__AMX_BF16__)
  release_tiles();
#endif
}

inline void attention_merge(const AttentionState& into, const AttentionState& from,
                            std::int64_t rows, std::int64_t head_dim, float scale) {
  const std::int64_t columns = attention_columns(head_dim);
  for (std::int64_t r = 0; r < rows; ++r) {
    // Rows that have seen nothing change nothing, not even the sign of a zero.
    if (from.maximum[r] == kMinusInfinity && from.total[r] == 0.0f) continue;
    const bool first = into.maximum[r] == kMinusInfinity && into.total[r] == 0.0f;
    const float now = from.maximum[r] > into.maximum[r] ? from.maximum[r] : into.maximum[r];
    const float origin = now == kMinusInfinity ? 0.0f : now;
    const float exponent = scale * 1.44269504088896341f;
    const Float old_scale = exp2(broadcast((into.maximum[r] - origin) * exponent));
    const Float new_scale = exp2(broadcast((from.maximum[r] - origin) * exponent));
    float* sums = into.sums + r * columns;
    const float* more = from.sums + r * columns;
    for (std::int64_t i = 0; i < columns; i += kLanes) {
      const Float added = load(more + i) * new_scale;
      store(sums + i, first ? added : load(sums + i) * old_scale + added);
    }
    const float added = from.total[r] * new_scale[0];
    into.total[r] = first ? added : into.total[r] * old_scale[0] + added;
    into.maximum[r] = now;
  }
}

}  // namespace tinyvllm::TINYVLLM_ISA
