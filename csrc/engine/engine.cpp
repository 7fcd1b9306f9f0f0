#include "engine/engine.h"

#include <algorithm>
#include <cstdio>
#include <string>

#include "base/errors.h"
#include "base/host.h"
#include "engine/philox.h"

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

void emit(StepOutput& output, RequestId id, std::int32_t token, FinishReason finish,
          std::optional<TokenLogprobs> logprobs = std::nullopt) {
  output.request.push_back(id);
  output.sample.push_back(0);
  output.token.push_back(token);
  output.finish.push_back(finish);
  output.logprobs.push_back(std::move(logprobs));
}

}  // namespace

Engine::Engine(const std::filesystem::path& model, const EngineConfig& config)
    : config_(checked(config)),
      checkpoint_(Checkpoint::open(model)),
      ctx_(config.num_threads),
      model_(ctx_, checkpoint_, compute_dtype(config, checkpoint_), config.max_num_batched_tokens,
             config.max_num_seqs),
      num_blocks_(choose_num_blocks(model_.kv_shape(1, config.block_size))),
      max_model_len_(choose_max_model_len(
          config, model_.config(), num_blocks_ * config.block_size,
          model_.kv_shape(1, config.block_size).bytes_per_block() / config.block_size)),
      kv_cache_(model_.kv_shape(num_blocks_, config.block_size)),
      pool_(num_blocks_),
      scheduler_(pool_, config.block_size, config.max_num_batched_tokens),
      eos_token_ids_(within_vocabulary(config.eos_token_ids, model_.config().vocab_size)),
      sampler_(eos_token_ids_) {
  checkpoint_.check_files();
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

  const std::lock_guard lock(mutex_);
  const bool unreported = std::any_of(ended_.begin(), ended_.end(),
                                      [id](const auto& ended) { return ended.first == id; });
  if (scheduler_.contains(id) || unreported) {
    throw InvalidRequestError("Request id " + std::to_string(id) + " is in use. Choose another.");
  }
  auto request = std::make_unique<Request>();
  request->id = id;
  request->params = params;
  request->seed = params.seed ? *params.seed : derived_seed(config_.seed, num_arrivals_);
  request->max_total_tokens = max_model_len_;
  if (params.max_tokens && *params.max_tokens < max_model_len_ - num_prompt_tokens) {
    request->max_total_tokens = num_prompt_tokens + *params.max_tokens;
  }
  request->num_prompt_tokens = prompt.size();
  request->tokens = std::move(prompt);
  scheduler_.add(std::move(request));
  ++num_arrivals_;
}

StepOutput Engine::step() {
  const std::lock_guard lock(mutex_);
  StepOutput output;
  for (const auto& [id, reason] : std::exchange(ended_, {})) emit(output, id, -1, reason);

  const std::vector<ScheduledRequest> scheduled = scheduler_.schedule();
  if (scheduled.empty()) return output;
  ++totals_.num_steps;
  StepOutput tokens;
  try {
    run(scheduled, tokens);
  } catch (...) {
    for (const auto& [request, num_tokens] : scheduled) {
      const RequestId id = request->id;
      scheduler_.remove(id);
      emit(output, id, -1, FinishReason::kError);
      output.errors.emplace_back(id, std::current_exception());
    }
    return output;
  }
  for (std::size_t i = 0; i < tokens.request.size(); ++i) {
    emit(output, tokens.request[i], tokens.token[i], tokens.finish[i],
         std::move(tokens.logprobs[i]));
    if (tokens.finish[i] != FinishReason::kNone) scheduler_.remove(tokens.request[i]);
  }
  return output;
}

void Engine::run(const std::vector<ScheduledRequest>& scheduled, StepOutput& output) {
  // The flat batch: the scheduled tokens of every request, one request after the other.
  std::vector<std::int32_t> tokens, positions, logit_rows;
  std::vector<std::int64_t> slots;
  std::vector<BatchSequence> sequences;
  std::vector<Request*> sampled;
  for (const auto& [request, num_tokens] : scheduled) {
    const auto first = static_cast<std::int64_t>(request->num_computed_tokens);
    sequences.push_back({.first_token = static_cast<std::int64_t>(tokens.size()),
                         .num_tokens = num_tokens,
                         .first_position = first,
                         .block_table = request->block_table.data()});
    for (std::int64_t position = first; position < first + num_tokens; ++position) {
      const auto index = static_cast<std::size_t>(position / config_.block_size);
      tokens.push_back(request->tokens[static_cast<std::size_t>(position)]);
      positions.push_back(static_cast<std::int32_t>(position));
      slots.push_back(std::int64_t{request->block_table[index]} * config_.block_size +
                      position % config_.block_size);
    }
    if (first + num_tokens == static_cast<std::int64_t>(request->tokens.size())) {
      logit_rows.push_back(static_cast<std::int32_t>(tokens.size() - 1));
      sampled.push_back(request);
    }
  }

  const MutTensorView logits = model_.forward({.tokens = tokens,
                                               .positions = positions,
                                               .slots = slots,
                                               .sequences = sequences,
                                               .logit_rows = logit_rows},
                                              kv_cache_);
  // Zeros were read in place of a page that is gone: nothing of this step may leave.
  if (checkpoint_.any_file_failed()) checkpoint_.check_files();
  std::vector<Sample> samples;
  for (std::size_t i = 0; i < sampled.size(); ++i) {
    samples.push_back(sampler_.sample(*sampled[i], {logits.row<float>(static_cast<std::int64_t>(i)),
                                                    static_cast<std::size_t>(logits.cols)}));
  }

  for (const auto& [request, num_tokens] : scheduled) {
    const auto prompt_left = static_cast<std::int64_t>(request->num_prompt_tokens) -
                             static_cast<std::int64_t>(request->num_computed_tokens);
    totals_.num_prompt_tokens += std::clamp<std::int64_t>(prompt_left, 0, num_tokens);
    request->num_computed_tokens += static_cast<std::size_t>(num_tokens);
  }
  for (std::size_t i = 0; i < sampled.size(); ++i) {
    const FinishReason finish = accept(*sampled[i], samples[i].token);
    emit(output, sampled[i]->id, samples[i].token, finish, std::move(samples[i].logprobs));
    ++totals_.num_output_tokens;
  }
}

FinishReason Engine::accept(Request& request, std::int32_t token) const {
  request.tokens.push_back(token);
  if (request.params.has_penalties()) ++request.output_counts[token];
  const bool is_eos = !request.params.ignore_eos && contains(eos_token_ids_, token);
  if (is_eos || contains(request.params.stop_token_ids, token)) return FinishReason::kStop;
  const auto length = static_cast<std::int64_t>(request.tokens.size());
  return length >= request.max_total_tokens ? FinishReason::kLength : FinishReason::kNone;
}

void Engine::finish(RequestId id, std::int32_t /*sample*/, FinishReason reason) {
  const std::lock_guard lock(mutex_);
  if (scheduler_.remove(id) != nullptr) ended_.emplace_back(id, reason);
}

bool Engine::has_unfinished() const {
  const std::lock_guard lock(mutex_);
  return !ended_.empty() || scheduler_.num_running() + scheduler_.num_waiting() > 0;
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats stats = totals_;
  stats.num_running = scheduler_.num_running();
  stats.num_waiting = scheduler_.num_waiting();
  stats.num_blocks = pool_.num_blocks();
  stats.num_free_blocks = pool_.num_free();
  return stats;
}

}  // namespace tinyvllm
