#include "engine/engine.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "base/errors.h"
#include "base/host.h"
#include "base/philox.h"

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

// The most prompt rows that pass the output matrix at a time: [64, vocab] floats are 32 MB at 128k
// tokens.
constexpr std::int64_t kPromptLogprobRows = 64;

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
  require(config.max_num_seqs >= 1 && config.max_num_seqs <= 65536, "max_num_seqs",
          config.max_num_seqs, "from 1 to 65536");
  require(config.max_num_batched_tokens >= config.max_num_seqs &&
              config.max_num_batched_tokens <= 1 << 20,
          "max_num_batched_tokens", config.max_num_batched_tokens,
          "at least max_num_seqs, which is " + std::to_string(config.max_num_seqs) +
              ", and at most 1048576");
  if (config.num_blocks) {
    require(*config.num_blocks >= 1 && *config.num_blocks <= INT32_MAX, "num_gpu_blocks_override",
            *config.num_blocks, "at least 1");
  }
  if (config.kv_cache_memory_bytes) {
    require(*config.kv_cache_memory_bytes >= 1, "kv_cache_memory_bytes",
            *config.kv_cache_memory_bytes, "at least 1");
  }
  if (config.max_model_len) {
    require(*config.max_model_len >= 2, "max_model_len", *config.max_model_len,
            "at least 2 (one token of prompt and one of output)");
  }
  return config;
}

DType compute_dtype(const EngineConfig& config, const Checkpoint& checkpoint) {
  if (config.dtype) return *config.dtype;
  return checkpoint.dtype() == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
}

std::int64_t choose_max_model_len(const EngineConfig& config, const ModelConfig& model,
                                  std::int64_t pool_tokens, std::int64_t bytes_per_token) {
  const std::int64_t own = model.max_position_embeddings;
  if (!config.max_model_len) return std::min(own, pool_tokens);
  const std::int64_t wanted = *config.max_model_len;
  require(wanted <= own, "max_model_len", wanted,
          "at most " + std::to_string(own) + ", the model's max_position_embeddings");
  if (wanted > pool_tokens) {
    throw CapacityError("max_model_len " + std::to_string(wanted) + " needs " +
                        gibibytes(wanted * bytes_per_token) + " of KV cache (" +
                        std::to_string(bytes_per_token) + " bytes a token); the pool holds " +
                        std::to_string(pool_tokens) + " tokens, " +
                        gibibytes(pool_tokens * bytes_per_token) + ". Lower max_model_len to " +
                        std::to_string(pool_tokens) + " or raise kv_cache_memory_bytes.");
  }
  return wanted;
}

// A request without a seed gets one from the engine's seed and its arrival number.
std::uint64_t derived_seed(std::uint64_t engine_seed, std::uint64_t arrival) {
  const auto words = philox(
      {static_cast<std::uint32_t>(engine_seed), static_cast<std::uint32_t>(engine_seed >> 32)},
      {static_cast<std::uint32_t>(arrival), static_cast<std::uint32_t>(arrival >> 32), 0, 1});
  return (std::uint64_t{words[1]} << 32) | words[0];
}

// Files name end tokens that the model does not have; it can never choose them.
std::vector<std::int32_t> within_vocabulary(std::vector<std::int32_t> tokens, std::int64_t vocab) {
  std::erase_if(tokens, [vocab](std::int32_t token) { return token < 0 || token >= vocab; });
  return tokens;
}

bool contains(const std::vector<std::int32_t>& values, std::int32_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

void emit(StepOutput& output, const Sequence& sequence, std::int32_t sample, std::int32_t token,
          FinishReason finish, std::optional<TokenLogprobs> logprobs = std::nullopt) {
  output.request.push_back(sequence.request->id);
  output.sample.push_back(sample);
  output.token.push_back(token);
  output.finish.push_back(finish);
  output.logprobs.push_back(std::move(logprobs));
}

}  // namespace

Engine::Engine(const std::filesystem::path& model, const EngineConfig& config)
    : config_(checked(config)),
      trace_(config.trace ? std::make_unique<Trace>(*config.trace) : nullptr),
      checkpoint_(Checkpoint::open(model)),
      ctx_(config.num_threads),
      model_(ctx_, checkpoint_, compute_dtype(config, checkpoint_), config.max_num_batched_tokens,
             std::max(config.max_num_seqs, kPromptLogprobRows)),
      num_blocks_(choose_num_blocks(model_.kv_shape(1, config.block_size))),
      max_model_len_(choose_max_model_len(
          config, model_.config(), num_blocks_ * config.block_size,
          model_.kv_shape(1, config.block_size).bytes_per_block() / config.block_size)),
      kv_cache_(model_.kv_shape(num_blocks_, config.block_size)),
      prefix_cache_(num_blocks_, config.prefix_hash_mask),
      pool_(num_blocks_, prefix_cache_, trace_.get()),
      scheduler_({.max_num_batched_tokens = config.max_num_batched_tokens,
                  .max_num_seqs = config.max_num_seqs,
                  .block_size = config.block_size,
                  .prefix_caching = config.prefix_caching,
                  .static_batching = config.static_batching},
                 pool_, prefix_cache_, trace_.get()),
      eos_token_ids_(within_vocabulary(config.eos_token_ids, model_.config().vocab_size)),
      sampler_(eos_token_ids_) {
  checkpoint_.check_files();
  if (trace_) trace_->engine_is_made(scheduler_.config(), num_blocks_);
}

std::int64_t Engine::choose_num_blocks(const KvShape& one_block) const {
  if (config_.num_blocks) return *config_.num_blocks;
  const std::int64_t bytes_per_block = one_block.bytes_per_block();
  const std::int64_t available = available_memory();
  const std::int64_t budget = config_.kv_cache_memory_bytes.value_or(available / 5 * 2);
  const std::int64_t own = checkpoint_.config().max_position_embeddings;
  const std::int64_t longest = std::min(own, config_.max_model_len.value_or(own));
  const std::int64_t blocks_a_sequence = (longest + config_.block_size - 1) / config_.block_size;
  const std::int64_t affordable = std::min<std::int64_t>(budget / bytes_per_block, INT32_MAX);
  if (affordable < 1) {
    throw CapacityError("A KV cache of " + gibibytes(budget) + " does not hold one block: " +
                        std::to_string(bytes_per_block) + " bytes for " +
                        std::to_string(config_.block_size) + " tokens; " + gibibytes(available) +
                        " of memory are available. Raise kv_cache_memory_bytes.");
  }
  if (config_.kv_cache_memory_bytes) return affordable;
  return std::min(affordable, config_.max_num_seqs * blocks_a_sequence);
}

void Engine::add_request(RequestId id, std::vector<std::int32_t> prompt,
                         const SamplingParams& params) {
  const std::int64_t vocab = model_.config().vocab_size;
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
                              (max_model_len_ < model_.config().max_position_embeddings
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
  auto sequence = std::make_unique<Sequence>();
  sequence->request = request.get();
  sequence->stands_for_all = params.n > 1;
  sequence->tokens = std::move(prompt);
  scheduler_.add(std::move(sequence));
  requests_.emplace(id, std::move(request));
}

StepOutput Engine::step() {
  const std::lock_guard lock(mutex_);
  const CpuTimer timer(totals_.step_seconds);
  StepOutput output = std::exchange(reported_, {});
  if (trace_) trace_->step_begins();
  const ScheduledStep step = scheduler_.schedule();
  if (trace_) trace_->step_is_scheduled(step);
  if (step.sequences.empty()) {
    if (trace_) trace_->flush();
    return output;
  }
  ++totals_.num_steps;
  bool failed = false;
  try {
    run(step, output);
  } catch (...) {
    failed = true;
    scheduler_.forget(step);
    std::set<RequestId> ids;
    for (const auto& [sequence, num_tokens] : step.sequences) ids.insert(sequence->request->id);
    for (const RequestId id : ids) fail(id, std::current_exception(), output);
  }
  if (trace_) {
    trace_->step_ends(totals_.num_steps, failed, pool_, scheduler_.num_running(),
                      scheduler_.num_waiting());
  }
  return output;
}

// One forward pass, and what its logits become. Output gets nothing before all that can fail is
// done.
void Engine::run(const ScheduledStep& step, StepOutput& output) {
  std::vector<std::int32_t> last_rows;  // of the sequences whose next token is due
  compute(step, last_rows);

  std::vector<Sequence*> due;  // in the order of last_rows
  due.reserve(last_rows.size());
  for (const auto& [sequence, num_tokens] : step.sequences) {
    const std::size_t computed =
        sequence->num_computed_tokens + static_cast<std::size_t>(num_tokens);
    if (computed == sequence->tokens.size()) due.push_back(sequence);
  }
  StepOutput prompt_output;
  Draws draws = draw(due, last_rows);
  add_prompt_logprobs(step, prompt_output);
  // Zeros were read in place of a page that is gone: nothing of this step may leave.
  if (checkpoint_.any_file_failed()) checkpoint_.check_files();
  if (trace_) trace_->step_is_computed(step);

  for (const auto& [sequence, num_tokens] : step.sequences) {
    const std::int64_t prompt_left =
        static_cast<std::int64_t>(sequence->request->num_prompt_tokens) -
        static_cast<std::int64_t>(sequence->num_computed_tokens);
    totals_.num_prefill_tokens += std::clamp<std::int64_t>(prompt_left, 0, num_tokens);
    sequence->num_computed_tokens += static_cast<std::size_t>(num_tokens);
  }
  output.prompt_logprobs = std::move(prompt_output.prompt_logprobs);
  std::map<RequestId, std::exception_ptr> failed;
  auto sample = draws.samples.begin();
  for (std::size_t i = 0; i < due.size(); ++i) {
    if (draws.errors[i]) {
      failed.emplace(due[i]->request->id, draws.errors[i]);
      sample += due[i]->num_slots();
      continue;
    }
    std::vector<Sequence*> forks;
    if (due[i]->stands_for_all) forks = scheduler_.fork(*due[i]);
    accept(*due[i], std::move(*sample++), output);
    for (Sequence* fork : forks) accept(*fork, std::move(*sample++), output);
  }
  for (const auto& [id, error] : failed) fail(id, error, output);
}

// The next token of each sequence from its row of the batch. Forks draw from the row of the
// sequence that stands for them: only their sample numbers differ. A row that cannot be sampled
// fails its own request and no other.
Engine::Draws Engine::draw(const std::vector<Sequence*>& due,
                           const std::vector<std::int32_t>& rows) {
  const CpuTimer timer(totals_.model_seconds);
  std::vector<std::size_t> first;  // of each sequence's samples
  std::size_t num_samples = 0;
  for (const Sequence* sequence : due) {
    first.push_back(num_samples);
    num_samples += static_cast<std::size_t>(sequence->num_slots());
  }
  Draws draws{.samples = std::vector<Sample>(num_samples),
              .errors = std::vector<std::exception_ptr>(due.size())};
  const MutTensorView logits = model_.logits(rows);
  ctx_.parallel_for(std::ssize(due), [&](std::int64_t i, int) {
    const auto index = static_cast<std::size_t>(i);
    const std::span<const float> row(logits.row<float>(i), static_cast<std::size_t>(logits.cols));
    const Sequence& sequence = *due[index];
    try {
      for (std::int32_t k = 0; k < static_cast<std::int32_t>(sequence.num_slots()); ++k) {
        draws.samples[first[index] + static_cast<std::size_t>(k)] =
            sampler_.sample(sequence, sequence.sample + k, row);
      }
    } catch (...) {
      draws.errors[index] = std::current_exception();
    }
  });
  return draws;
}

// The forward pass over the scheduled tokens of every sequence, one sequence after the other.
// Appends the rows of the batch whose logits give a next token.
void Engine::compute(const ScheduledStep& step, std::vector<std::int32_t>& last_rows) {
  std::vector<std::int32_t> tokens, positions;
  std::vector<std::int64_t> slots;
  std::vector<BatchSequence> sequences;
  for (const auto& [sequence, num_tokens] : step.sequences) {
    const auto first = static_cast<std::int64_t>(sequence->num_computed_tokens);
    sequences.push_back({.first_token = std::ssize(tokens),
                         .num_tokens = num_tokens,
                         .first_position = first,
                         .block_table = sequence->block_table.data()});
    for (std::int64_t position = first; position < first + num_tokens; ++position) {
      const auto index = static_cast<std::size_t>(position / config_.block_size);
      tokens.push_back(sequence->tokens[static_cast<std::size_t>(position)]);
      positions.push_back(static_cast<std::int32_t>(position));
      slots.push_back(std::int64_t{sequence->block_table[index]} * config_.block_size +
                      position % config_.block_size);
    }
    if (first + num_tokens == std::ssize(sequence->tokens)) {
      last_rows.push_back(static_cast<std::int32_t>(tokens.size() - 1));
    }
  }
  if (totals_.num_steps == config_.fail_at_step) throw Error("This step fails, as asked for.");
  for (const auto& [from, to] : step.copies) kv_cache_.copy_block(from, to);
  const CpuTimer timer(totals_.model_seconds);
  model_.forward({.tokens = tokens, .positions = positions, .slots = slots, .sequences = sequences},
                 kv_cache_);
}

// Row t of a prompt gives the logprobs of token t + 1. Rows whose results are there already, from
// before a preemption, are left out.
void Engine::add_prompt_logprobs(const ScheduledStep& step, StepOutput& output) {
  std::int64_t first_row = 0;  // of the sequence in the batch
  for (const auto& [sequence, num_tokens] : step.sequences) {
    Request& request = *sequence->request;
    const std::int64_t first = static_cast<std::int64_t>(sequence->num_computed_tokens);
    std::int64_t position = std::max(first, std::ssize(request.prompt_logprobs));
    const std::int64_t end =
        std::min(first + num_tokens, static_cast<std::int64_t>(request.num_prompt_tokens) - 1);
    const bool wanted = request.wants_prompt_logprobs();
    while (wanted && position < end) {
      const std::int64_t count = std::min(kPromptLogprobRows, end - position);
      std::vector<std::int32_t> rows;
      for (std::int64_t i = 0; i < count; ++i) {
        rows.push_back(static_cast<std::int32_t>(first_row + position - first + i));
      }
      const MutTensorView logits = model_.logits(rows);
      std::vector<TokenLogprobs> entries(rows.size());
      ctx_.parallel_for(count, [&](std::int64_t i, int) {
        entries[static_cast<std::size_t>(i)] =
            top_logprobs({logits.row<float>(i), static_cast<std::size_t>(logits.cols)},
                         sequence->tokens[static_cast<std::size_t>(position + i + 1)],
                         *request.params.prompt_logprobs);
      });
      std::move(entries.begin(), entries.end(), std::back_inserter(request.prompt_logprobs));
      position += count;
    }
    if (wanted && !request.wants_prompt_logprobs()) {
      output.prompt_logprobs.emplace_back(request.id, request.prompt_logprobs);
    }
    first_row += num_tokens;
  }
}

void Engine::accept(Sequence& sequence, Sample sample, StepOutput& output) {
  const Request& request = *sequence.request;
  const std::int32_t token = sample.token;
  sequence.tokens.push_back(token);
  if (request.params.has_penalties()) ++sequence.output_counts[token];
  ++totals_.num_output_tokens;

  FinishReason finish = FinishReason::kNone;
  const bool is_eos = !request.params.ignore_eos && contains(eos_token_ids_, token);
  if (is_eos || contains(request.params.stop_token_ids, token)) {
    finish = FinishReason::kStop;
  } else if (std::ssize(sequence.tokens) >= request.max_total_tokens) {
    finish = FinishReason::kLength;
  }
  emit(output, sequence, sequence.sample, token, finish, std::move(sample.logprobs));
  if (finish == FinishReason::kNone) return;
  if (trace_) trace_->finished(sequence, finish);
  end(sequence, output);
}

// Drops a sequence whose last event is out, and its request after the last one.
void Engine::end(const Sequence& sequence, StepOutput& output, std::exception_ptr error) {
  Request& request = *sequence.request;
  request.num_unfinished -= static_cast<std::int32_t>(sequence.num_slots());
  scheduler_.remove(sequence);
  if (request.num_unfinished > 0) return;
  output.ended.push_back({request.id, std::max<std::int64_t>(0, request.num_cached_tokens), error});
  requests_.erase(request.id);
}

// Ends a sequence, and all that it stands for, without another token.
void Engine::cut_off(const Sequence& sequence, FinishReason reason, StepOutput& output,
                     std::exception_ptr error) {
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(sequence.num_slots()); ++i) {
    emit(output, sequence, sequence.sample + i, -1, reason);
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
  return !requests_.empty() || !reported_.ended.empty() || !reported_.request.empty();
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
    snapshot.sequences.push_back({sequence.request->id, sequence.sample, running,
                                  sequence.num_slots(), sequence.tokens,
                                  sequence.num_computed_tokens, sequence.block_table});
  });
  for (BlockId block = 0; block < pool_.num_blocks(); ++block) {
    snapshot.block_counts.push_back(pool_.count(block));
    if (prefix_cache_.contains(block)) snapshot.cached_blocks.push_back(block);
  }
  return snapshot;
}

}  // namespace tinyvllm
