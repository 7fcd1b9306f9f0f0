#include "engine/cuda_arrays.h"

#include <algorithm>

#include "engine/decode_sizes.h"
#include "ops/paged_attention.h"

namespace tinyvllm {
namespace {

static_assert(kNumStepArrays == kStepsInFlight);

std::int64_t ceil_divide(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

}  // namespace

StepArrays::StepArrays(const CudaContext& ctx, const cuda::Stream& copies, const StepLimits& limits,
                       const ModelConfig& model, bool batch_invariant)
    : limits_(limits),
      num_heads_(model.num_heads),
      num_kv_heads_(model.num_kv_heads),
      max_blocks_(ceil_divide(limits.max_model_len, limits.block_size)),
      batch_invariant_(batch_invariant),
      inputs_(ctx, copies, step_array_bytes(limits, model), "the arrays of a step"),
      tables_(block_table_bytes(limits), "the block tables") {
  // Entries that no sequence has written are read by nobody; they begin as block 0 all the same.
  cuda::fill_bytes(ctx, tables_.data(), 0, tables_.size());
}

// Decodes and chunks of the plan, and how much there is of everything.
StepArrays::Counts StepArrays::sort(const StepPlan& plan) {
  decodes_.clear();
  chunks_.clear();
  std::int64_t num_tokens = 0, num_blocks = 0, longest = 0;  // the longest context of a decode
  for (const auto& [sequence, count] : plan.sequences) {
    // Decodes read K and V of earlier steps before the kernels in front of them have ended, and write
    // their own beside other decodes: what this step computes may be hit by chunks only.
    const bool decode = count == 1 && !sequence->is_new && !batch_invariant_;
    (decode ? decodes_ : chunks_).push_back({sequence, count, num_tokens});
    if (decode) {
      longest = std::max(longest, static_cast<std::int64_t>(sequence->num_computed_tokens) + 1);
    }
    num_tokens += count;
    num_blocks += std::ssize(sequence->block_table);
  }
  rows_.assign(static_cast<std::size_t>(num_tokens), -1);

  const bool pad = chunks_.empty();
  const std::int64_t num_decodes =
      pad ? padded_batch_size(std::ssize(decodes_)) : std::ssize(decodes_);
  Counts counts{.decodes = num_decodes,
                .chunks = std::ssize(chunks_),
                .rows = pad ? num_decodes : num_tokens,
                .tiles = 0,
                .split = decode_split(num_decodes, num_kv_heads_, longest),
                .splits = num_decodes - std::ssize(decodes_),  // a padded row has one
                .blocks = num_blocks,
                .draws = pad ? num_decodes : std::ssize(plan.draws)};
  for (const Entry& decode : decodes_) {
    counts.splits += ceil_divide(
        static_cast<std::int64_t>(decode.sequence->num_computed_tokens) + 1, counts.split);
  }
  const std::int64_t tile = chunk_tile_tokens(num_heads_, num_kv_heads_);
  for (const Entry& chunk : chunks_) counts.tiles += ceil_divide(chunk.num_tokens, tile);
  return counts;
}

// Arrays whose size follows from the padded batch come first, so that they lie where a graph knows
// them; the work list and the block tables behind them are as long as they are.
StepArrays::Arrays StepArrays::lay_out(std::size_t number, const Counts& counts) {
  inputs_.begin(number, 0);
  return {.tokens = inputs_.add<std::int32_t>(counts.rows),
          .sources = inputs_.add<std::int32_t>(counts.rows),
          .positions = inputs_.add<std::int32_t>(counts.rows),
          .slots = inputs_.add<std::int64_t>(counts.rows),
          .context_lengths = inputs_.add<std::int32_t>(counts.sequences()),
          .table_starts = inputs_.add<std::int32_t>(counts.sequences() + 1),
          .num_items = inputs_.add<std::int32_t>(1),
          .logit_rows = inputs_.add<std::int32_t>(counts.rows),
          .chunk_starts = inputs_.add<std::int32_t>(counts.chunks + 1),
          .chunk_tiles = inputs_.add<std::int32_t>(2 * counts.tiles),
          .draws = inputs_.add<SampleRow>(counts.draws),
          .items = inputs_.add<std::int32_t>(2 * counts.splits + counts.blocks)};
}

void StepArrays::write_sequence(const Entry& entry, const Arrays& arrays, Cursor& at) {
  const Sequence& sequence = *entry.sequence;
  const auto first = static_cast<std::int64_t>(sequence.num_computed_tokens);
  arrays.table_starts.host[at.sequence] = at.entry;
  std::copy(sequence.block_table.begin(), sequence.block_table.end(), arrays.items.host + at.entry);
  at.entry += static_cast<std::int32_t>(sequence.block_table.size());
  arrays.context_lengths.host[at.sequence] = static_cast<std::int32_t>(first + entry.num_tokens);
  for (std::int64_t i = 0; i < entry.num_tokens; ++i, ++at.row) {
    const std::int64_t position = first + i;
    const bool known = position < std::ssize(sequence.tokens);
    arrays.tokens.host[at.row] = known ? sequence.tokens[static_cast<std::size_t>(position)] : 0;
    arrays.sources.host[at.row] = known ? -1 : sequence.pending_draw;
    arrays.positions.host[at.row] = static_cast<std::int32_t>(position);
    arrays.slots.host[at.row] = sequence.slot(position, limits_.block_size);
    rows_[static_cast<std::size_t>(entry.plan_row + i)] = at.row;
  }
}

// The splits of a decode; a padded row has one.
void StepArrays::write_items(std::int64_t context, std::int64_t split, const Arrays& arrays,
                             Cursor& at) {
  for (std::int64_t i = 0; i < std::max<std::int64_t>(1, ceil_divide(context, split)); ++i) {
    arrays.items.host[2 * at.item] = at.sequence;
    arrays.items.host[2 * at.item + 1] = static_cast<std::int32_t>(i);
    ++at.item;
  }
}

void StepArrays::write_decodes(const Counts& counts, const Arrays& arrays, Cursor& at) {
  for (const Entry& decode : decodes_) {
    write_sequence(decode, arrays, at);
    write_items(arrays.context_lengths.host[at.sequence], counts.split, arrays, at);
    ++at.sequence;
  }
  for (; at.sequence < counts.decodes; ++at.sequence, ++at.row) {  // padding
    arrays.tokens.host[at.row] = 0;
    arrays.sources.host[at.row] = -1;
    arrays.positions.host[at.row] = 0;
    arrays.slots.host[at.row] = -1;
    arrays.table_starts.host[at.sequence] = at.entry;
    arrays.context_lengths.host[at.sequence] = 0;
    write_items(0, counts.split, arrays, at);
  }
  arrays.num_items.host[0] = at.item;
}

void StepArrays::write_chunks(const Counts& counts, const Arrays& arrays, Cursor& at) {
  const std::int64_t tile = chunk_tile_tokens(num_heads_, num_kv_heads_);
  const auto num_decodes = static_cast<std::int32_t>(counts.decodes);
  std::int32_t chunk = 0;
  for (const Entry& entry : chunks_) {
    arrays.chunk_starts.host[chunk] = at.row - num_decodes;
    write_sequence(entry, arrays, at);
    ++at.sequence;
    for (std::int64_t first = 0; first < entry.num_tokens; first += tile, ++at.tile) {
      arrays.chunk_tiles.host[2 * at.tile] = chunk;
      arrays.chunk_tiles.host[2 * at.tile + 1] = static_cast<std::int32_t>(first);
    }
    ++chunk;
  }
  arrays.chunk_starts.host[chunk] = at.row - num_decodes;
  arrays.table_starts.host[at.sequence] = at.entry;
}

// Which rows have logits, and where: all of a padded step, else those that something is drawn from.
std::int32_t StepArrays::write_logit_rows(const StepPlan& plan, const Counts& counts,
                                          const Arrays& arrays) {
  logits_.assign(static_cast<std::size_t>(counts.rows), -1);
  std::int32_t number = 0;
  const auto want = [&](std::int32_t row) {
    std::int32_t& index = logits_[static_cast<std::size_t>(row)];
    if (index >= 0) return;
    index = number;
    arrays.logit_rows.host[number++] = row;
  };
  if (counts.chunks == 0) {
    for (std::int32_t row = 0; row < counts.rows; ++row) want(row);
  } else {
    for (const Draw& draw : plan.draws) want(row_of(draw.row));
  }
  return number;
}

DeviceStep StepArrays::fill(std::size_t number, const StepPlan& plan) {
  const Counts counts = sort(plan);
  const Arrays arrays = lay_out(number, counts);
  Cursor at;
  at.entry = static_cast<std::int32_t>(2 * counts.splits);
  write_decodes(counts, arrays, at);
  write_chunks(counts, arrays, at);
  const std::int32_t num_logits = write_logit_rows(plan, counts, arrays);

  const auto rows = static_cast<std::size_t>(counts.rows);
  const std::int64_t most_items = tinyvllm::max_decode_items(
      std::max<std::int64_t>(1, counts.decodes), num_kv_heads_, limits_.max_model_len);
  return {.batch = {.tokens = {arrays.tokens.device, rows},
                    .positions = {arrays.positions.device, rows},
                    .slots = {arrays.slots.device, rows},
                    .sequences = {.num_decodes = static_cast<std::int32_t>(counts.decodes),
                                  .num_chunks = static_cast<std::int32_t>(counts.chunks),
                                  .context_lengths = arrays.context_lengths.device,
                                  .block_tables = tables_.as<std::int32_t>(),
                                  .max_blocks = static_cast<std::int32_t>(max_blocks_),
                                  .decode_items = arrays.items.device,
                                  .num_decode_items = arrays.num_items.device,
                                  .max_decode_items = static_cast<std::int32_t>(most_items),
                                  .split = static_cast<std::int32_t>(counts.split),
                                  .chunk_starts = arrays.chunk_starts.device,
                                  .chunk_tiles = arrays.chunk_tiles.device,
                                  .num_chunk_tiles = at.tile}},
          .padded = counts.chunks == 0,
          .tokens = arrays.tokens.device,
          .sources = arrays.sources.device,
          .block_tables = tables_.as<std::int32_t>(),
          .table_entries = arrays.items.device,
          .table_starts = arrays.table_starts.device,
          .num_sequences = static_cast<std::int32_t>(counts.sequences()),
          .logit_rows = {arrays.logit_rows.device, static_cast<std::size_t>(num_logits)},
          .only_draws = plan.only_draws(),
          .draws = arrays.draws,
          .num_draws = counts.draws};
}

}  // namespace tinyvllm
