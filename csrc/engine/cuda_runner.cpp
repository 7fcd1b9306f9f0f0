#include "engine/cuda_runner.h"

#include <algorithm>
#include <memory>
#include <set>
#include <utility>

#include "base/errors.h"
#include "engine/decode_sizes.h"
#include "engine/memory_sizes.h"
#include "engine/sample_rows.h"
#include "model/cuda_weights.h"
#include "ops/block_tables.h"
#include "ops/host_copy.h"
#include "ops/paged_attention.h"

namespace tinyvllm {
namespace {

// Throws for what the kernels cannot do on this card.
void check_kernels(const CudaContext& ctx, const ModelConfig& model, const CudaOptions& options) {
  const KvShape kv{.num_layers = model.num_layers,
                   .num_blocks = 1,
                   .block_size = options.step.block_size,
                   .num_kv_heads = model.num_kv_heads,
                   .head_dim = model.head_dim,
                   .dtype = options.compute};
  check_attention(ctx, kv, model.num_heads,
                  options.batch_invariant ? 0 : padded_batch_size(options.step.max_sequences),
                  options.step.max_model_len);
}

// The weights, through the host: what has to be converted is converted there. Before anything is taken
// of the card's memory, it is known that this model can be run on it.
Weights weights_on(const CudaContext& ctx, const Checkpoint& checkpoint,
                   const CudaOptions& options) {
  check_kernels(ctx, checkpoint.config(), options);
  const CpuContext host;
  return upload_weights(ctx, load_weights(host, checkpoint, options.compute), checkpoint.config());
}

}  // namespace

CudaRunner::CudaRunner(const Checkpoint& checkpoint, const CudaOptions& options,
                       std::vector<std::int32_t> eos_token_ids)
    : options_(options),
      eos_token_ids_(std::move(eos_token_ids)),
      ctx_(0, options.batch_invariant, options.library_directories),
      model_(ctx_, checkpoint.config(), weights_on(ctx_, checkpoint, options),
             batch_limits(options.step, true).max_tokens,
             batch_limits(options.step, true).max_logit_rows),
      arrays_(ctx_, copies_, options.step, checkpoint.config(), options.batch_invariant),
      copy_inputs_(ctx_, copies_, 4096, "copies of blocks"),
      edit_inputs_(ctx_, copies_, 4096, "changes of logits"),
      prompt_inputs_(ctx_, copies_, 4096, "logprobs of prompts"),
      results_(static_cast<std::size_t>(2 * padded_batch_size(options.step.max_sequences)) *
                   sizeof(std::int32_t),
               "sampled tokens") {
  for (auto& host : host_results_) host = cuda::PinnedMemory(results_.size(), "sampled tokens");
  ctx_.reserve_workspace(op_workspace_bytes(options.step, model_.config()));
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
  return {.workspace = model_.activation_bytes() + gpu_step_bytes(options_.step, model_.config()) +
                       gpu_reserve_bytes(options_.step, model_.config()),
          .free = static_cast<std::int64_t>(cuda::memory_info().free)};
}

std::int64_t CudaRunner::kv_cache_budget() const {
  const cuda::MemoryInfo memory = cuda::memory_info();
  return gpu_kv_cache_budget(static_cast<std::int64_t>(memory.total),
                             static_cast<std::int64_t>(memory.total - memory.free) +
                                 gpu_reserve_bytes(options_.step, model_.config()),
                             options_.memory_utilization);
}

void CudaRunner::make_kv_cache(const KvShape& shape) {
  kv_cache_.emplace(tinyvllm::make_kv_cache(ctx_, shape));
}

void CudaRunner::launch(const StepPlan& plan) {
  ctx_.activate();
  InFlight& in_flight = in_flight_[num_launched_ % kStepsInFlight];
  copy_forked_blocks(plan.copies);
  const DeviceStep step = arrays_.fill(num_launched_, plan);
  const SampleBatch draws = describe_draws(plan, step, in_flight);
  arrays_.send();
  if (step.padded && options_.step.graphs) {
    compute_as_graph(step, draws);
  } else {
    compute(step);
    draw(draws);
  }
  if (draws.any_logprobs) draw_logprobs_.fetch(ctx_, num_launched_);
  find_prompt_logprobs(plan, in_flight);
  in_flight.done.record(ctx_.stream());
  ++num_launched_;
}

// The kernels of a step up to the logits, in the order of the stream.
void CudaRunner::compute(const DeviceStep& step) {
  spread_block_tables(ctx_, step.table_entries, step.table_starts, step.num_sequences,
                      step.batch.sequences.max_blocks, step.block_tables);
  feed_tokens(ctx_, device_tokens(), step.sources,
              static_cast<std::int32_t>(step.batch.tokens.size()), step.tokens);
  if (step.only_draws) {
    logits_ = model_.logits(model_.forward(step.batch, *kv_cache_, step.logit_rows));
  } else {
    model_.forward(step.batch, *kv_cache_);
    logits_ = model_.logits(model_.hidden_states(step.logit_rows));
  }
}

void CudaRunner::compute_as_graph(const DeviceStep& step, const SampleBatch& draws) {
  const auto size = static_cast<std::int64_t>(step.batch.tokens.size());
  const bool draws_inside = !draws.any_filter && !draws.any_logprobs && draws.num_edits == 0;
  const GraphKey key{size, step.batch.sequences.split, num_launched_ % kStepsInFlight,
                     draws_inside};
  auto graph = graphs_.find(key);
  if (graph == graphs_.end()) {
    const auto record = [&] {
      compute(step);
      if (draws_inside) draw(draws);
    };
    graph = graphs_.try_emplace(key, ctx_, record).first;
  }
  graph->second.replay(ctx_);
  logits_ = model_.logits_view(size);
  if (!draws_inside) draw(draws);
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

// What is drawn, into the step's arrays; those behind the last draw are padding. The changes of
// logits that some requests ask for are sent.
SampleBatch CudaRunner::describe_draws(const StepPlan& plan, const DeviceStep& step,
                                       InFlight& in_flight) {
  in_flight.num_draws = static_cast<std::int32_t>(step.num_draws);
  in_flight.origins.clear();
  in_flight.num_logprobs.clear();
  SampleBatch batch{.rows = step.draws.device, .num_rows = in_flight.num_draws};
  std::vector<LogitEdit> edits;
  std::int32_t last_edited = -1;  // the draws of one row lie side by side
  for (std::size_t i = 0; i < plan.draws.size(); ++i) {
    const Draw& draw = plan.draws[i];
    const std::int32_t logits_row = arrays_.logits_of(draw.row);
    if (logits_row != last_edited) {
      append_logit_edits(*draw.sequence, eos_token_ids_, logits_row, edits);
    }
    last_edited = logits_row;
    SampleRow& row = step.draws.host[i];
    row = sample_row(*draw.sequence, draw.sample, logits_row);
    batch.any_filter = batch.any_filter || row.has_filter();
    batch.any_logprobs = batch.any_logprobs || row.num_logprobs >= 0;
    in_flight.origins.emplace_back(*draw.sequence);
    in_flight.num_logprobs.push_back(row.num_logprobs);
  }
  std::fill(step.draws.host + plan.draws.size(), step.draws.host + step.num_draws, SampleRow{});
  if (!edits.empty()) {
    edit_inputs_.begin(num_launched_, edits.size() * sizeof(LogitEdit));
    const auto array = edit_inputs_.add<LogitEdit>(std::ssize(edits));
    std::copy(edits.begin(), edits.end(), array.host);
    edit_inputs_.send();
    batch.edits = array.device;
    batch.num_edits = static_cast<std::int32_t>(edits.size());
  }
  if (batch.any_logprobs) draw_logprobs_.make_room(ctx_, options_.step.max_sequences);
  return batch;
}

// The tokens stay where the next step finds them, and go to the host.
void CudaRunner::draw(const SampleBatch& draws) {
  if (draws.num_rows == 0) return;
  std::int32_t* errors = device_tokens() + draws.num_rows;
  sample(ctx_, logits_, draws,
         {.tokens = device_tokens(),
          .errors = reinterpret_cast<SampleError*>(errors),
          .logprobs = draws.any_logprobs ? draw_logprobs_.on_device() : LogprobOutputs{}});
  push_to_host(ctx_, results_.data(), host_results_[num_launched_ % kStepsInFlight].data(),
               static_cast<std::size_t>(draws.num_rows) * 2 * sizeof(std::int32_t));
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
    rows.host[i] = arrays_.row_of(row.row);
    tokens.host[i] = row.token;
  }
  prompt_inputs_.send();
  prompt_logprobs_.make_room(ctx_, count);
  for (std::int64_t first = 0; first < count; first += kPromptLogprobRows) {
    const std::int64_t piece = std::min(kPromptLogprobRows, count - first);
    const MutTensorView logits =
        model_.logits(model_.hidden_states({rows.device + first, static_cast<std::size_t>(piece)}));
    logprobs(ctx_, logits, tokens.device + first, kMaxLogprobs, prompt_logprobs_.on_device(first));
  }
  prompt_logprobs_.fetch(ctx_, num_launched_);
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
  const auto logprobs_of = [&](const LogprobBuffers& buffers, std::size_t row, std::int32_t asked) {
    const auto most = static_cast<std::int32_t>(model_.config().vocab_size);
    return buffers.read(slot, static_cast<std::int64_t>(row), std::min(asked, most));
  };
  for (std::size_t i = 0; i < step.origins.size(); ++i) {
    if (errors[i] != SampleError::kNone) {
      const DrawOrigin& origin = step.origins[i];
      result_.errors[i] = std::make_exception_ptr(
          Error(errors[i] == SampleError::kNoToken ? origin.no_token() : origin.not_finite()));
      continue;
    }
    result_.samples[i] = {.token = tokens[i], .logprobs = nullptr};
    if (step.num_logprobs[i] >= 0) {
      result_.samples[i].logprobs =
          std::make_unique<TokenLogprobs>(logprobs_of(draw_logprobs_, i, step.num_logprobs[i]));
    }
  }
  result_.prompt_logprobs.clear();
  for (std::size_t i = 0; i < step.num_of_prompts.size(); ++i) {
    result_.prompt_logprobs.push_back(logprobs_of(prompt_logprobs_, i, step.num_of_prompts[i]));
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
      device_rows.host[i] = arrays_.row_of(rows[first + static_cast<std::size_t>(i)]);
    }
    prompt_inputs_.send();
    const MutTensorView logits =
        model_.logits(model_.hidden_states({device_rows.device, static_cast<std::size_t>(count)}));
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
  } catch (const Error&) {
    // The error that led here says it already.
  }
}

}  // namespace tinyvllm
