#include "engine/cuda_runner.h"

#include <algorithm>
#include <memory>
#include <set>
#include <utility>

#include "base/errors.h"
#include "engine/decode_sizes.h"
#include "engine/sample_rows.h"
#include "model/cuda_weights.h"
#include "ops/block_tables.h"
#include "ops/host_copy.h"
#include "ops/paged_attention.h"

namespace tinyvllm {
namespace {

// Left for CUDA graphs and the driver's own needs when the KV cache is sized.
constexpr std::int64_t kReserveBytes = std::int64_t{384} << 20;

// The weights, through the host: what has to be converted is converted there.
Weights weights_on(const CudaContext& ctx, const Checkpoint& checkpoint, DType compute) {
  const CpuContext host;
  return upload_weights(ctx, load_weights(host, checkpoint, compute), checkpoint.config());
}

// Where the logprobs of `rows` tokens lie behind `base`, on the device or on the host.
LogprobOutputs logprobs_at(std::byte* base, std::int64_t rows) {
  auto* words = reinterpret_cast<std::int32_t*>(base);
  return {.chosen = reinterpret_cast<float*>(words),
          .ranks = words + rows,
          .top_tokens = words + 2 * rows,
          .top_logprobs = reinterpret_cast<float*>(words + (2 + kMaxLogprobs) * rows)};
}

constexpr std::size_t logprob_bytes(std::int64_t rows) {
  return static_cast<std::size_t>(rows) * (2 + 2 * kMaxLogprobs) * sizeof(std::int32_t);
}

LogprobOutputs from_row(const LogprobOutputs& outputs, std::int64_t row) {
  return {.chosen = outputs.chosen + row,
          .ranks = outputs.ranks + row,
          .top_tokens = outputs.top_tokens + row * kMaxLogprobs,
          .top_logprobs = outputs.top_logprobs + row * kMaxLogprobs};
}

TokenLogprobs read_logprobs(const LogprobOutputs& outputs, std::int64_t row, std::int32_t k) {
  const LogprobOutputs at = from_row(outputs, row);
  return {.chosen = *at.chosen,
          .chosen_rank = *at.ranks,
          .top_ids = {at.top_tokens, at.top_tokens + k},
          .top_logprobs = {at.top_logprobs, at.top_logprobs + k}};
}

}  // namespace

CudaRunner::CudaRunner(const Checkpoint& checkpoint, const CudaOptions& options,
                       std::vector<std::int32_t> eos_token_ids)
    : options_(options),
      eos_token_ids_(std::move(eos_token_ids)),
      ctx_(0, options.batch_invariant, options.library_directories),
      model_(ctx_, checkpoint.config(), weights_on(ctx_, checkpoint, options.compute),
             std::max(options.max_tokens, padded(options.max_draws)),
             std::max(padded(options.max_draws), kPromptLogprobRows)),
      max_blocks_((options.max_model_len + options.block_size - 1) / options.block_size),
      step_inputs_(ctx_, copies_, max_step_bytes(), "the arrays of a step"),
      copy_inputs_(ctx_, copies_, 4096, "copies of blocks"),
      edit_inputs_(ctx_, copies_, 4096, "changes of logits"),
      prompt_inputs_(ctx_, copies_, 4096, "logprobs of prompts"),
      tables_(
          static_cast<std::size_t>(padded(options.max_draws) * max_blocks_) * sizeof(std::int32_t),
          "the block tables"),
      results_(static_cast<std::size_t>(2 * padded(options.max_draws)) * sizeof(std::int32_t),
               "sampled tokens") {
  for (auto& host : host_results_) host = cuda::PinnedMemory(results_.size(), "sampled tokens");
  const ModelConfig& config = model_.config();
  ctx_.reserve_workspace(std::max(
      {paged_attention_workspace_bytes(max_decode_items(0), config.num_heads, config.head_dim),
       sample_workspace_bytes(padded(options.max_draws))}));
  // Entries that no sequence has written are read by nobody; they begin as block 0 all the same.
  cuda::fill_bytes(ctx_, tables_.data(), 0, tables_.size());
  cuda::fill_bytes(ctx_, results_.data(), 0, results_.size());  // padded rows draw nothing
}

RunnerInfo CudaRunner::info() const {
  return {.device = "cuda",
          .isa = ctx_.name(),
          .num_threads = 0,
          .compute = model_.weights().compute,
          .copied_weight_bytes = model_.weights().copied_bytes};
}

MemoryUse CudaRunner::memory_use() const {
  return {.workspace =
              model_.activation_bytes() + static_cast<std::int64_t>(tables_.size()) + kReserveBytes,
          .free = static_cast<std::int64_t>(cuda::memory_info().free)};
}

std::int64_t CudaRunner::kv_cache_budget() const {
  const cuda::MemoryInfo memory = cuda::memory_info();
  const auto total = static_cast<double>(memory.total);
  const auto allowed = static_cast<std::int64_t>(total * options_.memory_utilization);
  const auto used = static_cast<std::int64_t>(memory.total - memory.free);
  return std::max<std::int64_t>(0, allowed - used - kReserveBytes);
}

void CudaRunner::make_kv_cache(const KvShape& shape) {
  kv_cache_.emplace(tinyvllm::make_kv_cache(ctx_, shape));
}

std::int64_t CudaRunner::padded(std::int64_t num_sequences) const {
  return padded_batch_size(num_sequences);
}

// How many splits so many decodes have at most; with 0, any number of them.
std::int64_t CudaRunner::max_decode_items(std::int64_t num_decodes) const {
  const std::int64_t kv_heads = model_.config().num_kv_heads, longest = options_.max_model_len;
  if (num_decodes == 0) return most_decode_items(options_.max_draws, kv_heads, longest);
  return tinyvllm::max_decode_items(num_decodes, kv_heads, longest);
}

// A step's arrays at their largest: what there is a row, a sequence, a split and a block of.
std::size_t CudaRunner::max_step_bytes() const {
  const std::int64_t sequences = padded(options_.max_draws);
  const std::int64_t rows = std::max(options_.max_tokens, sequences);
  return static_cast<std::size_t>(
      rows * std::int64_t{4 * sizeof(std::int32_t) + sizeof(std::int64_t)} +
      sequences * std::int64_t{8 * sizeof(std::int32_t) + sizeof(SampleRow)} +
      rows * std::int64_t{2 * sizeof(std::int32_t)} +
      (2 * max_decode_items(0) + sequences * max_blocks_) * std::int64_t{sizeof(std::int32_t)} +
      1024);
}

void CudaRunner::launch(const StepPlan& plan) {
  ctx_.activate();
  InFlight& in_flight = in_flight_[num_launched_ % kStepsInFlight];
  copy_forked_blocks(plan.copies);
  const DeviceStep step = send(plan, in_flight);
  const bool decodes_only = step.batch.sequences.num_chunks == 0;
  if (decodes_only && !options_.eager) {
    compute_as_graph(step);
  } else {
    compute(step);
    draw(step.draws);
  }
  if (step.draws.any_logprobs) fetch_logprobs();
  find_prompt_logprobs(plan, in_flight);
  in_flight.done.record(ctx_.stream());
  ++num_launched_;
}

// The batch on the device has the sequences with one token in front. A step that has no others is
// padded, and the logits of all its rows are computed.
CudaRunner::DeviceStep CudaRunner::send(const StepPlan& plan, InFlight& in_flight) {
  struct Entry {
    const Sequence* sequence;
    std::int64_t num_tokens;
    std::int64_t plan_row;
  };
  std::vector<Entry> decodes, chunks;
  std::int64_t num_tokens = 0, num_blocks = 0;
  for (const auto& [sequence, count] : plan.sequences) {
    const bool decode = count == 1 && !options_.batch_invariant;
    (decode ? decodes : chunks).push_back({sequence, count, num_tokens});
    num_tokens += count;
    num_blocks += std::ssize(sequence->block_table);
  }
  const ModelConfig& config = model_.config();
  const bool pad = chunks.empty();
  const std::int64_t num_decodes = pad ? padded(std::ssize(decodes)) : std::ssize(decodes);
  const std::int64_t num_rows = pad ? num_decodes : num_tokens;
  const std::int64_t num_sequences = num_decodes + std::ssize(chunks);
  const std::int64_t tile = chunk_tile_tokens(config.num_heads, config.num_kv_heads);
  std::int64_t num_tiles = 0;
  for (const Entry& chunk : chunks) num_tiles += num_splits(chunk.num_tokens, tile);

  // Arrays whose size follows from the padded batch come first, so that they lie where a graph
  // knows them; the work list and the block tables behind them are as long as they are.
  StepInputs& in = step_inputs_;
  in.begin(num_launched_, 0);
  const auto tokens = in.add<std::int32_t>(num_rows);
  const auto sources = in.add<std::int32_t>(num_rows);
  const auto positions = in.add<std::int32_t>(num_rows);
  const auto slots = in.add<std::int64_t>(num_rows);
  const auto context_lengths = in.add<std::int32_t>(num_sequences);
  const auto table_starts = in.add<std::int32_t>(num_sequences + 1);
  const auto num_items = in.add<std::int32_t>(1);
  const auto logit_rows = in.add<std::int32_t>(num_rows);
  const auto chunk_starts = in.add<std::int32_t>(std::ssize(chunks) + 1);
  const auto chunk_tiles = in.add<std::int32_t>(2 * num_tiles);
  const auto draws = in.add<SampleRow>(pad ? num_decodes : std::ssize(plan.draws));
  const std::int64_t split = decode_split(num_decodes, config.num_kv_heads);
  std::int64_t num_splits_in_all = num_decodes - std::ssize(decodes);
  for (const Entry& decode : decodes) {
    num_splits_in_all +=
        num_splits(static_cast<std::int64_t>(decode.sequence->num_computed_tokens) + 1, split);
  }
  const auto items = in.add<std::int32_t>(2 * num_splits_in_all + num_blocks);
  std::int32_t num_entries = static_cast<std::int32_t>(2 * num_splits_in_all);

  device_rows_.assign(static_cast<std::size_t>(num_tokens), -1);
  std::int32_t row = 0, sequence_index = 0;
  const auto add_sequence = [&](const Entry& entry) {
    const Sequence& sequence = *entry.sequence;
    const auto first = static_cast<std::int64_t>(sequence.num_computed_tokens);
    table_starts.host[sequence_index] = num_entries;
    std::copy(sequence.block_table.begin(), sequence.block_table.end(), items.host + num_entries);
    num_entries += static_cast<std::int32_t>(sequence.block_table.size());
    context_lengths.host[sequence_index++] = static_cast<std::int32_t>(first + entry.num_tokens);
    for (std::int64_t i = 0; i < entry.num_tokens; ++i, ++row) {
      const std::int64_t position = first + i;
      const bool known = position < std::ssize(sequence.tokens);
      tokens.host[row] = known ? sequence.tokens[static_cast<std::size_t>(position)] : 0;
      sources.host[row] = known ? -1 : sequence.pending_draw;
      positions.host[row] = static_cast<std::int32_t>(position);
      slots.host[row] = sequence.slot(position, options_.block_size);
      device_rows_[static_cast<std::size_t>(entry.plan_row + i)] = row;
    }
  };

  std::int32_t num_pairs = 0;
  const auto add_items = [&](std::int32_t index, std::int64_t context) {
    for (std::int64_t i = 0; i < std::max<std::int64_t>(1, num_splits(context, split)); ++i) {
      items.host[2 * num_pairs] = index;
      items.host[2 * num_pairs + 1] = static_cast<std::int32_t>(i);
      ++num_pairs;
    }
  };
  for (const Entry& decode : decodes) {
    add_sequence(decode);
    add_items(sequence_index - 1, context_lengths.host[sequence_index - 1]);
  }
  for (; sequence_index < num_decodes; ++row) {  // padding
    tokens.host[row] = 0;
    sources.host[row] = -1;
    positions.host[row] = 0;
    slots.host[row] = -1;
    table_starts.host[sequence_index] = num_entries;
    add_items(sequence_index, 0);
    context_lengths.host[sequence_index++] = 0;
  }
  num_items.host[0] = num_pairs;

  std::int32_t num_tile = 0;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    chunk_starts.host[i] = row - static_cast<std::int32_t>(num_decodes);
    add_sequence(chunks[i]);
    for (std::int64_t first = 0; first < chunks[i].num_tokens; first += tile, ++num_tile) {
      chunk_tiles.host[2 * num_tile] = static_cast<std::int32_t>(i);
      chunk_tiles.host[2 * num_tile + 1] = static_cast<std::int32_t>(first);
    }
  }
  chunk_starts.host[chunks.size()] = row - static_cast<std::int32_t>(num_decodes);
  table_starts.host[num_sequences] = num_entries;

  // Which rows have logits, and where: all of a padded step, else those that something is drawn from.
  logits_index_.assign(static_cast<std::size_t>(num_rows), -1);
  std::int32_t num_logits = 0;
  const auto want = [&](std::int32_t device_row) {
    std::int32_t& index = logits_index_[static_cast<std::size_t>(device_row)];
    if (index >= 0) return;
    index = num_logits;
    logit_rows.host[num_logits++] = device_row;
  };
  if (pad) {
    for (std::int32_t i = 0; i < num_rows; ++i) want(i);
  } else {
    for (const Draw& draw : plan.draws) want(device_rows_[static_cast<std::size_t>(draw.row)]);
  }

  const SampleBatch sample_batch =
      send_draws(plan, draws, pad ? num_decodes : std::ssize(plan.draws), in_flight);
  in.send();
  in_flight.num_draws = sample_batch.num_rows;
  const auto rows = static_cast<std::size_t>(num_rows);
  return {.batch = {.tokens = {tokens.device, rows},
                    .positions = {positions.device, rows},
                    .slots = {slots.device, rows},
                    .sequences = {.num_decodes = static_cast<std::int32_t>(num_decodes),
                                  .num_chunks = static_cast<std::int32_t>(chunks.size()),
                                  .context_lengths = context_lengths.device,
                                  .block_tables = tables_.as<std::int32_t>(),
                                  .max_blocks = static_cast<std::int32_t>(max_blocks_),
                                  .decode_items = items.device,
                                  .num_decode_items = num_items.device,
                                  .max_decode_items = static_cast<std::int32_t>(
                                      max_decode_items(std::max<std::int64_t>(1, num_decodes))),
                                  .chunk_starts = chunk_starts.device,
                                  .chunk_tiles = chunk_tiles.device,
                                  .num_chunk_tiles = num_tile}},
          .tokens = tokens.device,
          .sources = sources.device,
          .table_entries = items.device,
          .table_starts = table_starts.device,
          .num_sequences = static_cast<std::int32_t>(num_sequences),
          .logit_rows = {logit_rows.device, static_cast<std::size_t>(num_logits)},
          .draws = sample_batch};
}

// The kernels of a step up to the logits, in the order of the stream.
void CudaRunner::compute(const DeviceStep& step) {
  spread_block_tables(ctx_, step.table_entries, step.table_starts, step.num_sequences,
                      static_cast<std::int32_t>(max_blocks_), tables_.as<std::int32_t>());
  feed_tokens(ctx_, device_tokens(), step.sources,
              static_cast<std::int32_t>(step.batch.tokens.size()), step.tokens);
  model_.forward(step.batch, *kv_cache_);
  logits_ = step.logit_rows.empty() ? MutTensorView{} : model_.logits(step.logit_rows);
}

void CudaRunner::compute_as_graph(const DeviceStep& step) {
  const auto size = static_cast<std::int64_t>(step.batch.tokens.size());
  const bool draws_inside =
      !step.draws.any_filter && !step.draws.any_logprobs && step.draws.num_edits == 0;
  const GraphKey key{size, num_launched_ % kStepsInFlight, draws_inside};
  auto graph = graphs_.find(key);
  if (graph == graphs_.end()) {
    const auto record = [&] {
      compute(step);
      if (draws_inside) draw(step.draws);
    };
    graph = graphs_.try_emplace(key, ctx_, record).first;
  }
  graph->second.replay(ctx_);
  logits_ = model_.logits_view(size);
  if (!draws_inside) draw(step.draws);
}

// The GPU makes all copies of a launch at once: one that touches the target of another waits for the
// next launch.
void CudaRunner::copy_forked_blocks(const std::vector<BlockCopy>& copies) {
  if (copies.empty()) return;
  copy_inputs_.begin(num_launched_, copies.size() * sizeof(BlockCopy) + 16);
  const auto array = copy_inputs_.add<BlockCopy>(std::ssize(copies));
  std::copy(copies.begin(), copies.end(), array.host);
  copy_inputs_.send();
  std::set<std::int32_t> read, written;
  std::size_t first = 0;
  for (std::size_t i = 0; i <= copies.size(); ++i) {
    const bool conflict =
        i < copies.size() && (written.contains(copies[i].from) || written.contains(copies[i].to) ||
                              read.contains(copies[i].to));
    if (i == copies.size() || conflict) {
      copy_blocks(ctx_, *kv_cache_, {array.device + first, i - first});
      first = i;
      read.clear();
      written.clear();
    }
    if (i == copies.size()) break;
    read.insert(copies[i].from);
    written.insert(copies[i].to);
  }
}

// What is drawn, into `rows`, of which those behind the last draw are padding; the changes of logits
// that some requests ask for are sent.
SampleBatch CudaRunner::send_draws(const StepPlan& plan, StepInputs::Array<SampleRow> rows,
                                   std::int64_t num_rows, InFlight& step) {
  step.origins.clear();
  step.num_logprobs.clear();
  SampleBatch batch{.rows = rows.device, .num_rows = static_cast<std::int32_t>(num_rows)};
  std::vector<LogitEdit> edits;
  std::int32_t last_edited = -1;  // the draws of one row lie side by side
  for (std::size_t i = 0; i < plan.draws.size(); ++i) {
    const Draw& draw = plan.draws[i];
    const std::int32_t device_row = device_rows_[static_cast<std::size_t>(draw.row)];
    const std::int32_t logits_row = logits_index_[static_cast<std::size_t>(device_row)];
    if (logits_row != last_edited) {
      append_logit_edits(*draw.sequence, eos_token_ids_, logits_row, edits);
    }
    last_edited = logits_row;
    SampleRow& row = rows.host[i];
    row = sample_row(*draw.sequence, draw.sample, logits_row);
    batch.any_filter = batch.any_filter || row.has_filter();
    batch.any_logprobs = batch.any_logprobs || row.num_logprobs >= 0;
    step.origins.emplace_back(*draw.sequence);
    step.num_logprobs.push_back(row.num_logprobs);
  }
  std::fill(rows.host + plan.draws.size(), rows.host + num_rows, SampleRow{});
  if (!edits.empty()) {
    edit_inputs_.begin(num_launched_, edits.size() * sizeof(LogitEdit));
    const auto array = edit_inputs_.add<LogitEdit>(std::ssize(edits));
    std::copy(edits.begin(), edits.end(), array.host);
    edit_inputs_.send();
    batch.edits = array.device;
    batch.num_edits = static_cast<std::int32_t>(edits.size());
  }
  if (batch.any_logprobs) make_room(draw_logprobs_, options_.max_draws);
  return batch;
}

// The tokens stay where the next step finds them, and go to the host.
void CudaRunner::draw(const SampleBatch& draws) {
  if (draws.num_rows == 0) return;
  std::int32_t* errors = device_tokens() + draws.num_rows;
  sample(ctx_, logits_, draws,
         {.tokens = device_tokens(),
          .errors = reinterpret_cast<SampleError*>(errors),
          .logprobs = draws.any_logprobs
                          ? logprobs_at(draw_logprobs_.device.data(), draw_logprobs_.rows)
                          : LogprobOutputs{}});
  push_to_host(ctx_, results_.data(), host_results_[num_launched_ % kStepsInFlight].data(),
               static_cast<std::size_t>(draws.num_rows) * 2 * sizeof(std::int32_t));
}

void CudaRunner::fetch_logprobs() {
  cuda::copy_to_host(ctx_, draw_logprobs_.host[num_launched_ % kStepsInFlight].data(),
                     draw_logprobs_.device.data(), draw_logprobs_.device.size());
}

void CudaRunner::find_prompt_logprobs(const StepPlan& plan, InFlight& step) {
  step.num_of_prompts.clear();
  const auto count = static_cast<std::int64_t>(plan.prompt_rows.size());
  if (count == 0) return;
  for (const PromptRow& row : plan.prompt_rows) step.num_of_prompts.push_back(row.k);
  prompt_inputs_.begin(num_launched_, static_cast<std::size_t>(count) * 8 + 64);
  const auto rows = prompt_inputs_.add<std::int32_t>(count);
  const auto tokens = prompt_inputs_.add<std::int32_t>(count);
  for (std::int64_t i = 0; i < count; ++i) {
    const PromptRow& row = plan.prompt_rows[static_cast<std::size_t>(i)];
    rows.host[i] = device_rows_[static_cast<std::size_t>(row.row)];
    tokens.host[i] = row.token;
  }
  prompt_inputs_.send();
  make_room(prompt_logprobs_, count);
  const LogprobOutputs outputs = logprobs_at(prompt_logprobs_.device.data(), prompt_logprobs_.rows);
  for (std::int64_t first = 0; first < count; first += kPromptLogprobRows) {
    const std::int64_t piece = std::min(kPromptLogprobRows, count - first);
    const MutTensorView logits =
        model_.logits({rows.device + first, static_cast<std::size_t>(piece)});
    logprobs(ctx_, logits, tokens.device + first, kMaxLogprobs, from_row(outputs, first));
  }
  cuda::copy_to_host(ctx_, prompt_logprobs_.host[num_launched_ % kStepsInFlight].data(),
                     prompt_logprobs_.device.data(), prompt_logprobs_.device.size());
}

void CudaRunner::make_room(LogprobBuffers& buffers, std::int64_t rows) {
  if (rows <= buffers.rows) return;
  ctx_.synchronize();
  // Nothing of a step in flight may be lost.
  std::array<cuda::PinnedMemory, kStepsInFlight> old = std::move(buffers.host);
  const std::int64_t old_rows = buffers.rows;
  buffers.rows = rows;
  buffers.device = cuda::DeviceMemory(logprob_bytes(rows), "logprobs");
  for (std::size_t i = 0; i < kStepsInFlight; ++i) {
    buffers.host[i] = cuda::PinnedMemory(logprob_bytes(rows), "logprobs");
    const LogprobOutputs from = logprobs_at(old[i].data(), old_rows);
    const LogprobOutputs to = logprobs_at(buffers.host[i].data(), rows);
    std::copy_n(from.chosen, old_rows, to.chosen);
    std::copy_n(from.ranks, old_rows, to.ranks);
    std::copy_n(from.top_tokens, old_rows * kMaxLogprobs, to.top_tokens);
    std::copy_n(from.top_logprobs, old_rows * kMaxLogprobs, to.top_logprobs);
  }
}

StepResult& CudaRunner::collect() {
  ctx_.activate();
  const std::size_t slot = num_collected_ % kStepsInFlight;
  const InFlight& step = in_flight_[slot];
  step.done.synchronize();
  ++num_collected_;

  const auto* tokens = host_results_[slot].as<std::int32_t>();
  const auto* errors = reinterpret_cast<const SampleError*>(tokens + step.num_draws);
  result_.samples.resize(step.origins.size());
  result_.errors.assign(step.origins.size(), nullptr);
  for (std::size_t i = 0; i < step.origins.size(); ++i) {
    if (errors[i] != SampleError::kNone) {
      const DrawOrigin& origin = step.origins[i];
      result_.errors[i] = std::make_exception_ptr(
          Error(errors[i] == SampleError::kNoToken ? origin.no_token() : origin.not_finite()));
      continue;
    }
    result_.samples[i] = {.token = tokens[i], .logprobs = nullptr};
    if (step.num_logprobs[i] >= 0) {
      result_.samples[i].logprobs = std::make_unique<TokenLogprobs>(
          read_logprobs(logprobs_at(draw_logprobs_.host[slot].data(), draw_logprobs_.rows),
                        static_cast<std::int64_t>(i), step.num_logprobs[i]));
    }
  }
  result_.prompt_logprobs.clear();
  for (std::size_t i = 0; i < step.num_of_prompts.size(); ++i) {
    result_.prompt_logprobs.push_back(
        read_logprobs(logprobs_at(prompt_logprobs_.host[slot].data(), prompt_logprobs_.rows),
                      static_cast<std::int64_t>(i), step.num_of_prompts[i]));
  }
  return result_;
}

void CudaRunner::copy_logits(std::span<const std::int32_t> rows, float* out) {
  for (std::size_t first = 0; first < rows.size(); first += kPromptLogprobRows) {
    const auto count = std::min<std::int64_t>(std::ssize(rows) - static_cast<std::int64_t>(first),
                                              kPromptLogprobRows);
    ctx_.synchronize();
    prompt_inputs_.begin(0, static_cast<std::size_t>(count) * sizeof(std::int32_t));
    const auto device_rows = prompt_inputs_.add<std::int32_t>(count);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int32_t row = rows[first + static_cast<std::size_t>(i)];
      device_rows.host[i] = device_rows_[static_cast<std::size_t>(row)];
    }
    prompt_inputs_.send();
    const MutTensorView logits =
        model_.logits({device_rows.device, static_cast<std::size_t>(count)});
    const std::int64_t size = logits.rows * logits.cols;
    cuda::copy_to_host(ctx_, out, logits.data, static_cast<std::size_t>(size) * sizeof(float));
    ctx_.synchronize();
    out += size;
  }
}

void CudaRunner::abandon() {
  num_collected_ = num_launched_;
  try {
    ctx_.synchronize();
  } catch (const DeviceError&) {
    // The error that led here says it already.
  }
}

}  // namespace tinyvllm
