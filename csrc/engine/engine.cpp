#include "engine/engine.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "base/errors.h"
#include "base/host.h"
#include "base/philox.h"
#include "engine/make_runner.h"
#include "engine/memory_table.h"

namespace tinyvllm {
namespace {

std::string gibibytes(std::int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.2f GiB", static_cast<double>(bytes) / (1 << 30));
  return text;
}

void require(bool holds, const char* field, std::int64_t value, const std::string& range) {
  if (holds) return;
  throw InvalidRequestError(std::string(field) + " is " + std::to_string(value) + "; it must be " +
                            range + ".");
}

// Adds the CPU time of its scope to a total.
class CpuTimer {
 public:
  explicit CpuTimer(double& total) : total_(total), began_(thread_cpu_seconds()) {}
  ~CpuTimer() { total_ += thread_cpu_seconds() - began_; }
  CpuTimer(const CpuTimer&) = delete;
  CpuTimer& operator=(const CpuTimer&) = delete;

 private:
  double& total_;
  const double began_;
};

// The config, if its numbers are in range.
EngineConfig checked(const EngineConfig& config) {
  require(config.block_size >= 1 && config.block_size <= 4096, "block_size", config.block_size,
          "from 1 to 4096 tokens");
  check_batch_limits(config.max_num_seqs, config.max_num_batched_tokens);
  if (config.num_blocks) {
    require(*config.num_blocks >= 1 && *config.num_blocks <= INT32_MAX, "num_gpu_blocks_override",
            *config.num_blocks, "at least 1");
  }
  if (config.kv_cache_memory_bytes) {
    require(*config.kv_cache_memory_bytes >= 1, "kv_cache_memory_bytes",
            *config.kv_cache_memory_bytes, "at least 1");
  }
  if (!(config.gpu_memory_utilization > 0 && config.gpu_memory_utilization <= 1)) {
    throw InvalidRequestError("gpu_memory_utilization is " +
                              std::to_string(config.gpu_memory_utilization) +
                              "; it must be above 0 and at most 1.");
  }
  if (config.max_model_len) {
    require(*config.max_model_len >= 2, "max_model_len", *config.max_model_len,
            "at least 2 (one token of prompt and one of output)");
  }
  return config;
}

// The same, held against the model. Before its weights are loaded, and memory is taken for it.
const EngineConfig& checked_for(const ModelConfig& model, const EngineConfig& config) {
  const std::int64_t own = model.max_position_embeddings;
  if (config.max_model_len) {
    require(*config.max_model_len <= own, "max_model_len", *config.max_model_len,
            "at most " + std::to_string(own) + ", the model's max_position_embeddings");
  }
  return config;
}

// A request without a seed gets one from the engine's seed and its arrival number.
std::uint64_t derived_seed(std::uint64_t engine_seed, std::uint64_t arrival) {
  const auto words = philox(
      {static_cast<std::uint32_t>(engine_seed), static_cast<std::uint32_t>(engine_seed >> 32)},
      {static_cast<std::uint32_t>(arrival), static_cast<std::uint32_t>(arrival >> 32), 0, 1});
  return (std::uint64_t{words[1]} << 32) | words[0];
}

// The ids of `tokens` that the model has: files name end tokens that it can never choose.
std::vector<std::int32_t> within_vocabulary(std::vector<std::int32_t> tokens, std::int64_t vocab) {
  std::erase_if(tokens, [vocab](std::int32_t token) { return token < 0 || token >= vocab; });
  return tokens;
}

bool contains(const std::vector<std::int32_t>& values, std::int32_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

}  // namespace

void check_batch_limits(std::int64_t max_num_seqs, std::int64_t max_num_batched_tokens) {
  require(max_num_seqs >= 1 && max_num_seqs <= 65536, "max_num_seqs", max_num_seqs,
          "from 1 to 65536");
  require(
      max_num_batched_tokens >= max_num_seqs && max_num_batched_tokens <= 1 << 20,
      "max_num_batched_tokens", max_num_batched_tokens,
      "at least max_num_seqs, which is " + std::to_string(max_num_seqs) + ", and at most 1048576");
}

Engine::Engine(const std::filesystem::path& model, const EngineConfig& config)
    : config_(checked(config)),
      checkpoint_(Checkpoint::open(model)),
      eos_token_ids_(within_vocabulary(config.eos_token_ids, checkpoint_.config().vocab_size)),
      runner_(make_runner(checkpoint_, checked_for(checkpoint_.config(), config), eos_token_ids_)),
      kv_shape_(make_kv_cache()),
      max_model_len_(choose_max_model_len()),
      trace_(config.trace ? std::make_unique<Trace>(*config.trace) : nullptr),
      prefix_cache_(kv_shape_.num_blocks, config.prefix_hash_mask),
      pool_(kv_shape_.num_blocks, prefix_cache_, trace_.get()),
      scheduler_({.max_num_batched_tokens = config.max_num_batched_tokens,
                  .max_num_seqs = config.max_num_seqs,
                  .block_size = config.block_size,
                  .prefix_caching = config.prefix_caching,
                  .static_batching = config.static_batching},
                 pool_, prefix_cache_, trace_.get()) {
  checkpoint_.check_files();
  if (trace_) trace_->engine_is_made(scheduler_.config(), kv_shape_.num_blocks);
}

KvShape Engine::choose_kv_shape() const {
  const ModelConfig& model = checkpoint_.config();
  KvShape shape{.num_layers = model.num_layers,
                .num_blocks = 1,
                .block_size = config_.block_size,
                .num_kv_heads = model.num_kv_heads,
                .head_dim = model.head_dim,
                .dtype = runner_->info().compute};
  if (config_.num_blocks) {
    shape.num_blocks = *config_.num_blocks;
    return shape;
  }
  const std::int64_t bytes_per_block = shape.bytes_per_block();
  const std::int64_t budget = config_.kv_cache_memory_bytes.value_or(runner_->kv_cache_budget());
  const std::int64_t longest = config_.max_model_len.value_or(model.max_position_embeddings);
  const std::int64_t blocks_a_sequence = (longest + config_.block_size - 1) / config_.block_size;
  const std::int64_t affordable = std::min<std::int64_t>(budget / bytes_per_block, INT32_MAX);
  if (affordable < 1) {
    const char* advice = config_.kv_cache_memory_bytes      ? "Raise kv_cache_memory_bytes."
                         : runner_->info().device == "cuda" ? "Raise gpu_memory_utilization, or "
                                                              "free memory of the GPU."
                                                            : "Free memory.";
    throw CapacityError("A KV cache of " + gibibytes(budget) + " does not hold one block: " +
                        std::to_string(bytes_per_block) + " bytes for " +
                        std::to_string(config_.block_size) + " tokens. " + advice + memory_table());
  }
  shape.num_blocks = config_.kv_cache_memory_bytes
                         ? affordable
                         : std::min(affordable, config_.max_num_seqs * blocks_a_sequence);
  return shape;
}

KvShape Engine::make_kv_cache() const {
  const KvShape shape = choose_kv_shape();
  try {
    runner_->make_kv_cache(shape);
  } catch (const CapacityError& error) {
    throw CapacityError(error.what() + memory_table());
  }
  return shape;
}

std::string Engine::memory_table() const {
  return tinyvllm::memory_table(checkpoint_, runner_->info().compute, runner_->memory_use());
}

std::int64_t Engine::choose_max_model_len() const {
  const std::int64_t own = checkpoint_.config().max_position_embeddings;
  const std::int64_t pool_tokens = kv_shape_.num_blocks * kv_shape_.block_size;
  if (!config_.max_model_len) return std::min(own, pool_tokens);
  const std::int64_t wanted = *config_.max_model_len;
  if (wanted > pool_tokens) {
    const std::int64_t bytes_per_token = kv_shape_.bytes_per_block() / kv_shape_.block_size;
    throw CapacityError(
        "max_model_len " + std::to_string(wanted) + " needs " +
        gibibytes(wanted * bytes_per_token) + " of KV cache (" + std::to_string(bytes_per_token) +
        " bytes a token); the pool holds " + std::to_string(pool_tokens) + " tokens, " +
        gibibytes(pool_tokens * bytes_per_token) + ". Lower max_model_len to " +
        std::to_string(pool_tokens) + " or raise kv_cache_memory_bytes." + memory_table());
  }
  return wanted;
}

void Engine::add_request(RequestId id, std::vector<std::int32_t> prompt,
                         const SamplingParams& params) {
  const std::int64_t vocab = checkpoint_.config().vocab_size;
  params.validate();
  params.validate_for(vocab);
  if (prompt.empty()) {
    throw InvalidRequestError("The prompt has no tokens. Give at least one.");
  }
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    if (prompt[i] < 0 || prompt[i] >= vocab) {
      throw InvalidRequestError(
          "Prompt token " + std::to_string(i) + " is " + std::to_string(prompt[i]) +
          "; the model's vocabulary has the ids 0 to " + std::to_string(vocab - 1) + ".");
    }
  }
  const auto num_prompt_tokens = static_cast<std::int64_t>(prompt.size());
  if (num_prompt_tokens >= max_model_len_) {
    throw InvalidRequestError("The prompt has " + std::to_string(num_prompt_tokens) +
                              " tokens and max_model_len is " + std::to_string(max_model_len_) +
                              "; prompt and output share it. Shorten the prompt to at most " +
                              std::to_string(max_model_len_ - 1) + " tokens" +
                              (max_model_len_ < checkpoint_.config().max_position_embeddings
                                   ? ", or raise max_model_len."
                                   : "."));
  }

  if (params.n > config_.max_num_seqs) {
    throw InvalidRequestError(
        "n is " + std::to_string(params.n) + " and max_num_seqs is " +
        std::to_string(config_.max_num_seqs) +
        "; all outputs of a request run together. Lower n or raise max_num_seqs.");
  }

  const std::lock_guard lock(mutex_);
  const bool reported = std::any_of(reported_.ended.begin(), reported_.ended.end(),
                                    [id](const auto& ended) { return ended.request == id; });
  if (requests_.contains(id) || reported) {
    throw InvalidRequestError("Request id " + std::to_string(id) + " is in use. Choose another.");
  }
  auto request = std::make_unique<Request>();
  request->id = id;
  request->params = params;
  request->arrival = num_arrivals_++;
  request->seed = params.seed ? *params.seed : derived_seed(config_.seed, request->arrival);
  request->max_total_tokens = max_model_len_;
  if (params.max_tokens && *params.max_tokens < max_model_len_ - num_prompt_tokens) {
    request->max_total_tokens = num_prompt_tokens + *params.max_tokens;
  }
  request->num_prompt_tokens = prompt.size();
  request->num_unfinished = params.n;
  scheduler_.add(std::make_unique<Sequence>(*request, std::move(prompt)));
  requests_.emplace(id, std::move(request));
}

StepOutput Engine::step() {
  const std::lock_guard lock(mutex_);
  const CpuTimer timer(totals_.step_seconds);
  StepOutput output = std::exchange(reported_, {});
  // A traced step is alone, so that the times in the trace are its own.
  const std::size_t max_in_flight = trace_ ? 1 : runner_->max_in_flight();
  while (in_flight_.size() < max_in_flight && launch_next(output)) {
  }
  if (!in_flight_.empty()) collect_oldest(output);
  while (requests_.empty() && !in_flight_.empty()) collect_oldest(output);  // all ended meanwhile
  return output;
}

// Schedules and launches a step. False if there was nothing to launch, or it failed.
bool Engine::launch_next(StepOutput& output) {
  if (trace_) trace_->step_begins();
  InFlight next{.step = scheduler_.schedule(), .requests = {}, .targets = {}, .prompt_owners = {}};
  if (trace_) trace_->step_is_scheduled(next.step);
  if (next.step.sequences.empty()) {
    if (trace_) trace_->flush();
    return false;
  }
  ++totals_.num_steps;
  StepPlan plan = this->plan(next.step, next);
  try {
    if (totals_.num_steps == config_.fail_at_step) throw Error("This step fails, as asked for.");
    const CpuTimer timer(totals_.model_seconds);
    runner_->launch(plan);
  } catch (...) {
    in_flight_.push_back(std::move(next));
    fail_all_in_flight(std::current_exception(), output);
    return false;
  }
  advance(next, plan);
  in_flight_.push_back(std::move(next));
  return true;
}

// What is to be sampled, and which logprobs of the prompts are wanted. Row t of a prompt gives the
// logprobs of token t + 1; those whose results are there already, from before a preemption, are left
// out.
StepPlan Engine::plan(const ScheduledStep& step, InFlight& in_flight) const {
  StepPlan plan{.sequences = step.sequences, .copies = step.copies, .draws = {}, .prompt_rows = {}};
  plan.draws.reserve(step.sequences.size());
  in_flight.requests.reserve(step.sequences.size());
  std::int64_t first_row = 0;  // of the sequence in the batch
  for (const auto& [sequence, num_tokens] : step.sequences) {
    in_flight.requests.push_back(sequence->id);
    const auto first = static_cast<std::int64_t>(sequence->num_computed_tokens);
    const std::int64_t end = first + num_tokens;
    if (end == static_cast<std::int64_t>(sequence->num_tokens())) {
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(sequence->num_slots()); ++i) {
        plan.draws.push_back({.sequence = sequence,
                              .sample = sequence->sample + i,
                              .row = static_cast<std::int32_t>(first_row + num_tokens - 1)});
      }
    }
    if (sequence->has_prompt_logprobs && sequence->request->wants_prompt_logprobs()) {
      const Request& request = *sequence->request;
      const std::int64_t last = static_cast<std::int64_t>(request.num_prompt_tokens) - 1;
      for (std::int64_t position = std::max(first, std::ssize(request.prompt_logprobs));
           position < std::min(end, last); ++position) {
        plan.prompt_rows.push_back(
            {.row = static_cast<std::int32_t>(first_row + position - first),
             .token = sequence->tokens[static_cast<std::size_t>(position + 1)],
             .k = *request.params.prompt_logprobs});
        in_flight.prompt_owners.push_back(request.id);
      }
    }
    first_row += num_tokens;
  }
  return plan;
}

// What the scheduler may take for granted once a step is launched: its tokens are computed, and
// every sequence that reached its end has one more, though nobody knows yet which.
void Engine::advance(InFlight& in_flight, const StepPlan& plan) {
  for (const auto& [sequence, num_tokens] : in_flight.step.sequences) {
    const std::int64_t prompt_left = static_cast<std::int64_t>(sequence->num_prompt_tokens) -
                                     static_cast<std::int64_t>(sequence->num_computed_tokens);
    totals_.num_prefill_tokens += std::clamp<std::int64_t>(prompt_left, 0, num_tokens);
    sequence->num_computed_tokens += static_cast<std::size_t>(num_tokens);
  }
  in_flight.targets.reserve(plan.draws.size());
  auto sequence = in_flight.step.sequences.begin();
  while (in_flight.targets.size() < plan.draws.size()) {
    const Sequence* due = plan.draws[in_flight.targets.size()].sequence;
    while (sequence->sequence != due) ++sequence;
    in_flight.targets.push_back(sequence->sequence);
    if (!due->stands_for_all) continue;
    const std::vector<Sequence*> forks = scheduler_.fork(*sequence->sequence);
    in_flight.targets.insert(in_flight.targets.end(), forks.begin(), forks.end());
  }
  for (std::size_t i = 0; i < in_flight.targets.size(); ++i) {
    Sequence& target = *in_flight.targets[i];
    ++target.num_pending;
    target.pending_draw = static_cast<std::int32_t>(i);
    __builtin_prefetch(target.tokens.data() + target.tokens.size());  // for accept()
  }
}

// Hands out what a step has given. Output gets nothing before all that can fail is done.
void Engine::collect_oldest(StepOutput& output) {
  StepResult* result;
  try {
    const CpuTimer timer(totals_.model_seconds);
    result = &runner_->collect();
    // Zeros were read in place of a page that is gone: nothing of this step may leave.
    if (checkpoint_.any_file_failed()) checkpoint_.check_files();
  } catch (...) {
    fail_all_in_flight(std::current_exception(), output);
    return;
  }
  const InFlight step = std::move(in_flight_.front());
  in_flight_.pop_front();
  if (trace_) trace_->step_is_computed(step.step);

  for (std::size_t i = 0; i < step.prompt_owners.size(); ++i) {
    const auto owner = requests_.find(step.prompt_owners[i]);
    if (owner == requests_.end()) continue;  // aborted meanwhile
    Request& request = *owner->second;
    request.prompt_logprobs.push_back(std::move(result->prompt_logprobs[i]));
    if (!request.wants_prompt_logprobs()) {
      output.prompt_logprobs.emplace_back(request.id, request.prompt_logprobs);
    }
  }
  std::map<RequestId, std::exception_ptr> failed;
  output.events.reserve(output.events.size() + step.targets.size());
  for (std::size_t i = 0; i < step.targets.size(); ++i) {
    Sequence* sequence = step.targets[i];
    if (sequence == nullptr) continue;
    --sequence->num_pending;
    if (result->errors[i]) {
      failed.emplace(sequence->id, result->errors[i]);
    } else {
      accept(*sequence, std::move(result->samples[i]), output);
    }
  }
  for (const auto& [id, error] : failed) fail(id, error, output);
  if (trace_) trace_end_of_step(false);
}

// Ends every request that is in a step in flight: a step builds on the results of those before it.
void Engine::fail_all_in_flight(const std::exception_ptr& error, StepOutput& output) {
  runner_->abandon();
  std::set<RequestId> ids;
  for (const InFlight& step : in_flight_) {
    scheduler_.forget(step.step);
    ids.insert(step.requests.begin(), step.requests.end());
  }
  in_flight_.clear();
  for (const RequestId id : ids) fail(id, error, output);
  if (trace_) trace_end_of_step(true);
}

void Engine::trace_end_of_step(bool failed) {
  trace_->step_ends(totals_.num_steps, failed, pool_, scheduler_.num_running(),
                    scheduler_.num_waiting());
}

void Engine::accept(Sequence& sequence, Sample sample, StepOutput& output) {
  const std::int32_t token = sample.token;
  sequence.tokens.push_back(token);
  if (sequence.has_penalties) ++sequence.output_counts[token];
  ++totals_.num_output_tokens;

  FinishReason finish = FinishReason::kNone;
  if ((!sequence.ignores_eos && contains(eos_token_ids_, token)) ||
      (sequence.has_stop_token_ids && contains(sequence.request->params.stop_token_ids, token))) {
    finish = FinishReason::kStop;
  } else if (std::ssize(sequence.tokens) >= sequence.max_total_tokens) {
    finish = FinishReason::kLength;
  }
  output.events.push_back({.request = sequence.id,
                           .sample = sequence.sample,
                           .token = token,
                           .finish = finish,
                           .logprobs = std::move(sample.logprobs)});
  if (finish == FinishReason::kNone) return;
  if (trace_) trace_->finished(sequence, finish);
  end(sequence, output);
}

// Drops a sequence whose last event is out, and its request after the last one.
void Engine::end(const Sequence& sequence, StepOutput& output, std::exception_ptr error) {
  Request& request = *sequence.request;
  request.num_unfinished -= static_cast<std::int32_t>(sequence.num_slots());
  for (InFlight& step : in_flight_) {
    std::replace_if(
        step.targets.begin(), step.targets.end(),
        [&](const Sequence* target) { return target == &sequence; }, nullptr);
  }
  scheduler_.remove(sequence);
  if (request.num_unfinished > 0) return;
  output.ended.push_back({request.id, std::max<std::int64_t>(0, request.num_cached_tokens), error});
  requests_.erase(request.id);
}

// Ends a sequence, and all that it stands for, without another token.
void Engine::cut_off(const Sequence& sequence, FinishReason reason, StepOutput& output,
                     std::exception_ptr error) {
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(sequence.num_slots()); ++i) {
    output.events.push_back({.request = sequence.id,
                             .sample = sequence.sample + i,
                             .token = -1,
                             .finish = reason,
                             .logprobs = nullptr});
  }
  if (trace_) trace_->finished(sequence, reason);
  end(sequence, output, error);
}

// Ends all that is left of a request with an error.
void Engine::fail(RequestId id, const std::exception_ptr& error, StepOutput& output) {
  for (const Sequence* sequence : scheduler_.find(id)) {
    cut_off(*sequence, FinishReason::kError, output, error);
  }
}

void Engine::finish(RequestId id, std::int32_t sample, FinishReason reason) {
  const std::lock_guard lock(mutex_);
  for (const Sequence* sequence : scheduler_.find(id)) {
    if (sequence->sample == sample && !sequence->stands_for_all) {
      cut_off(*sequence, reason, reported_);
    }
  }
}

void Engine::abort(RequestId id) {
  const std::lock_guard lock(mutex_);
  for (const Sequence* sequence : scheduler_.find(id)) {
    cut_off(*sequence, FinishReason::kAbort, reported_);
  }
}

bool Engine::reset_prefix_cache() {
  const std::lock_guard lock(mutex_);
  if (!requests_.empty()) return false;
  for (BlockId block = 0; block < pool_.num_blocks(); ++block) pool_.forget(block);
  return true;
}

bool Engine::has_unfinished() const {
  const std::lock_guard lock(mutex_);
  return !requests_.empty() || !reported_.ended.empty() || !reported_.events.empty();
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats stats = totals_;
  stats.num_running = scheduler_.num_running();
  stats.num_waiting = scheduler_.num_waiting();
  stats.num_blocks = pool_.num_blocks();
  stats.num_free_blocks = pool_.num_free();
  stats.num_cached_blocks = prefix_cache_.size();
  stats.scheduler = scheduler_.stats();
  return stats;
}

std::vector<std::string> Engine::warnings() const {
  std::vector<std::string> warnings = checkpoint_.warnings();
  if (trace_ && trace_->problem()) warnings.push_back(*trace_->problem());
  return warnings;
}

EngineSnapshot Engine::snapshot() const {
  const std::lock_guard lock(mutex_);
  EngineSnapshot snapshot;
  scheduler_.visit([&](const Sequence& sequence, bool running) {
    snapshot.sequences.push_back({sequence.id, sequence.sample, running, sequence.num_slots(),
                                  sequence.tokens, sequence.num_computed_tokens,
                                  sequence.block_table});
  });
  for (BlockId block = 0; block < pool_.num_blocks(); ++block) {
    snapshot.block_counts.push_back(pool_.count(block));
    if (prefix_cache_.contains(block)) snapshot.cached_blocks.push_back(block);
  }
  return snapshot;
}

}  // namespace tinyvllm
