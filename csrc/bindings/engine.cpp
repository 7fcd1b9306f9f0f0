// tinyvllm._core.Engine and what it is made of: sampling, block pool, and the bare model for tests.
#include "engine/engine.h"

#include <pybind11/numpy.h>
#include <pybind11/operators.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/errors.h"
#include "base/host.h"
#include "base/philox.h"
#include "bindings/bindings.h"
#include "engine/decode_sizes.h"
#include "engine/make_runner.h"
#include "engine/memory_sizes.h"
#include "ops/logit_maxima.h"
#include "ops/repack.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace tinyvllm {
namespace {

using Ints = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;

std::optional<DType> parse_dtype(const std::string& name) {
  if (name == "auto") return std::nullopt;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float32") return DType::kFloat32;
  throw InvalidRequestError("dtype is \"" + name + "\"; it must be auto, bfloat16 or float32.");
}

Device parse_device(const std::string& name) {
  if (name == "auto") return Device::kAuto;
  if (name == "cpu") return Device::kCpu;
  if (name == "cuda") return Device::kCuda;
  throw InvalidRequestError("device is \"" + name + "\"; it must be auto, cpu or cuda.");
}

FinishReason parse_finish(const std::string& name) {
  if (name == "stop") return FinishReason::kStop;
  if (name == "length") return FinishReason::kLength;
  if (name == "abort") return FinishReason::kAbort;
  throw InvalidRequestError("finish reason \"" + name + "\" is not stop, length or abort.");
}

// The sampling fields that the core knows, by name; stop strings and the like stay in Python.
SamplingParams make_params(const py::kwargs& fields) {
  SamplingParams params;
  std::size_t num_taken = 0;
  const auto take = [&](const char* name, auto& target) {
    if (!fields.contains(name)) return;
    target = fields[name].cast<std::decay_t<decltype(target)>>();
    ++num_taken;
  };
  take("n", params.n);
  take("temperature", params.temperature);
  take("top_p", params.top_p);
  take("top_k", params.top_k);
  take("min_p", params.min_p);
  take("repetition_penalty", params.repetition_penalty);
  take("presence_penalty", params.presence_penalty);
  take("frequency_penalty", params.frequency_penalty);
  take("seed", params.seed);
  take("stop_token_ids", params.stop_token_ids);
  take("ignore_eos", params.ignore_eos);
  take("max_tokens", params.max_tokens);
  take("min_tokens", params.min_tokens);
  take("logprobs", params.logprobs);
  take("prompt_logprobs", params.prompt_logprobs);
  take("logit_bias", params.logit_bias);
  if (num_taken != fields.size()) throw py::type_error("SamplingParams() got an unknown field");
  params.validate();
  return params;
}

py::tuple logprobs_tuple(const TokenLogprobs& logprobs) {
  return py::make_tuple(logprobs.chosen, logprobs.chosen_rank, logprobs.top_ids,
                        logprobs.top_logprobs);
}

py::object optional_logprobs(const std::unique_ptr<TokenLogprobs>& logprobs) {
  if (!logprobs) return py::none();
  return logprobs_tuple(*logprobs);
}

// A property of StepOutput: a list with value(event) of each event.
template <typename F>
auto list_of_events(F value) {
  return [value](const StepOutput& output) {
    py::list list(output.events.size());
    for (std::size_t i = 0; i < output.events.size(); ++i) list[i] = value(output.events[i]);
    return list;
  };
}

void bind_step_output(py::module_& module) {
  using Event = StepOutput::Event;
  py::class_<StepOutput>(module, "StepOutput",
                         "Events of one step, as parallel lists with an entry an event.")
      .def_property_readonly("request", list_of_events([](const Event& e) { return e.request; }),
                             "Request ids.")
      .def_property_readonly("sample", list_of_events([](const Event& e) { return e.sample; }),
                             "Which of the request's outputs.")
      .def_property_readonly("token", list_of_events([](const Event& e) { return e.token; }),
                             "The new token, or -1 for an end without one.")
      .def_property_readonly("finish",
                             list_of_events([](const Event& e) { return name_of(e.finish); }),
                             "None, or stop, length, abort, error.")
      .def_property_readonly(
          "logprobs", list_of_events([](const Event& e) { return optional_logprobs(e.logprobs); }),
          "None, or (logprob of the token, its rank, best ids, their logprobs).")
      .def_property_readonly(
          "ended",
          [](const StepOutput& output) {
            py::list ended;
            for (const StepOutput::Ended& entry : output.ended) {
              ended.append(py::make_tuple(
                  entry.request, entry.num_cached_tokens,
                  entry.error ? python_exception(entry.error, "TinyvllmError") : py::none()));
            }
            return ended;
          },
          "(request id, cached tokens of its prompt, exception or None), once for each request.")
      .def_property_readonly(
          "prompt_logprobs",
          [](const StepOutput& output) {
            py::dict requests;
            for (const auto& [id, tokens] : output.prompt_logprobs) {
              py::list entries;
              for (const TokenLogprobs& entry : tokens) entries.append(logprobs_tuple(entry));
              requests[py::cast(id)] = entries;
            }
            return requests;
          },
          "Request id -> the logprobs of its prompt tokens but the first, as in `logprobs`.");
}

py::dict stats_of(const EngineStats& stats) {
  return py::dict(
      "num_requests_running"_a = stats.num_running, "num_requests_waiting"_a = stats.num_waiting,
      "num_blocks"_a = stats.num_blocks, "num_free_blocks"_a = stats.num_free_blocks,
      "num_cached_blocks"_a = stats.num_cached_blocks, "num_steps"_a = stats.num_steps,
      "prompt_tokens"_a = stats.num_prefill_tokens, "generation_tokens"_a = stats.num_output_tokens,
      "scheduling_seconds"_a = stats.step_seconds - stats.model_seconds,
      "num_preemptions"_a = stats.scheduler.num_preemptions,
      "prefix_cache_queries"_a = stats.scheduler.prefix_cache_queries,
      "prefix_cache_hits"_a = stats.scheduler.prefix_cache_hits);
}

// Where everything is, for tests of the bookkeeping.
py::dict snapshot_of(const Engine& engine) {
  const EngineSnapshot snapshot = engine.snapshot();
  py::list sequences;
  for (const EngineSnapshot::Entry& entry : snapshot.sequences) {
    sequences.append(py::dict("request"_a = entry.request, "sample"_a = entry.sample,
                              "running"_a = entry.running, "num_slots"_a = entry.num_slots,
                              "tokens"_a = entry.tokens, "num_computed"_a = entry.num_computed,
                              "block_table"_a = entry.block_table));
  }
  return py::dict("sequences"_a = sequences, "block_counts"_a = snapshot.block_counts,
                  "cached_blocks"_a = snapshot.cached_blocks);
}

py::dict info_of(const Engine& engine) {
  const RunnerInfo runner = engine.runner().info();
  const ModelConfig& model = engine.checkpoint().config();
  const KvShape& kv = engine.kv_shape();
  return py::dict(
      "device"_a = runner.device, "isa"_a = runner.isa, "num_threads"_a = runner.num_threads,
      "dtype"_a = std::string(name_of(runner.compute)),
      "checkpoint_dtype"_a = std::string(name_of(engine.checkpoint().dtype())),
      "copied_weight_bytes"_a = runner.copied_weight_bytes, "vocab_size"_a = model.vocab_size,
      "model_max_position_embeddings"_a = model.max_position_embeddings,
      "max_model_len"_a = engine.max_model_len(),
      "kv_cache_tokens"_a = kv.num_blocks * kv.block_size,
      "kv_cache_bytes_per_token"_a = kv.bytes_per_block() / kv.block_size,
      "warnings"_a = engine.warnings());
}

// Holds an engine until close(), so that its memory goes back then and not when Python collects it.
// A call that another thread is in keeps the engine alive until it returns.
class EngineHandle {
 public:
  explicit EngineHandle(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}
  void close() { engine_.reset(); }

  const Engine& get() const { return *held(); }

  // Calls f(engine) without Python's lock.
  template <typename F>
  auto unlocked(F&& f) const {
    const std::shared_ptr<Engine> engine = held();
    const py::gil_scoped_release release;
    return f(*engine);
  }

 private:
  const std::shared_ptr<Engine>& held() const {
    if (!engine_) throw Error("This engine is closed. Make a new one.");
    return engine_;
  }

  std::shared_ptr<Engine> engine_;
};

void bind_engine_class(py::module_& module) {
  py::class_<EngineHandle>(module, "Engine", "See csrc/engine/engine.h.")
      .def(py::init([](const std::filesystem::path& model, const std::string& dtype,
                       std::optional<std::int64_t> max_model_len, std::int64_t max_num_seqs,
                       std::int64_t max_num_batched_tokens, std::int64_t block_size,
                       std::optional<std::int64_t> num_blocks,
                       std::optional<std::int64_t> kv_cache_memory_bytes, int num_threads,
                       std::uint64_t seed, bool prefix_caching, bool static_batching,
                       std::uint64_t prefix_hash_mask, std::int64_t fail_at_step,
                       std::vector<std::int32_t> eos_token_ids,
                       std::optional<std::filesystem::path> trace, const std::string& device,
                       double gpu_memory_utilization, bool enforce_eager, bool batch_invariant,
                       bool repack_weights) {
             const EngineConfig config{.device = parse_device(device),
                                       .dtype = parse_dtype(dtype),
                                       .max_model_len = max_model_len,
                                       .max_num_seqs = max_num_seqs,
                                       .max_num_batched_tokens = max_num_batched_tokens,
                                       .block_size = block_size,
                                       .num_blocks = num_blocks,
                                       .kv_cache_memory_bytes = kv_cache_memory_bytes,
                                       .num_threads = num_threads,
                                       .repack_weights = repack_weights,
                                       .gpu_memory_utilization = gpu_memory_utilization,
                                       .enforce_eager = enforce_eager,
                                       .batch_invariant = batch_invariant,
                                       .cuda_library_directories = cuda_library_directories(),
                                       .seed = seed,
                                       .prefix_caching = prefix_caching,
                                       .static_batching = static_batching,
                                       .prefix_hash_mask = prefix_hash_mask,
                                       .fail_at_step = fail_at_step,
                                       .eos_token_ids = std::move(eos_token_ids),
                                       .trace = std::move(trace)};
             const py::gil_scoped_release release;
             return EngineHandle(std::make_shared<Engine>(model, config));
           }),
           "model"_a, py::kw_only(), "dtype"_a = "auto", "max_model_len"_a = py::none(),
           "max_num_seqs"_a = 256, "max_num_batched_tokens"_a = 2048, "block_size"_a = 16,
           "num_blocks"_a = py::none(), "kv_cache_memory_bytes"_a = py::none(), "num_threads"_a = 0,
           "seed"_a = 0, "prefix_caching"_a = true, "static_batching"_a = false,
           "prefix_hash_mask"_a = ~std::uint64_t{0}, "fail_at_step"_a = 0,
           "eos_token_ids"_a = std::vector<std::int32_t>(), "trace"_a = py::none(),
           "device"_a = "auto", "gpu_memory_utilization"_a = 0.9, "enforce_eager"_a = false,
           "batch_invariant"_a = false, "repack_weights"_a = false)
      .def(
          "add_request",
          [](const EngineHandle& handle, RequestId id, std::vector<std::int32_t> prompt,
             const SamplingParams& params) {
            handle.unlocked(
                [&](Engine& engine) { engine.add_request(id, std::move(prompt), params); });
          },
          "id"_a, "prompt"_a, "params"_a)
      .def("step",
           [](const EngineHandle& handle) {
             return handle.unlocked([](Engine& engine) { return engine.step(); });
           })
      .def(
          "finish",
          [](const EngineHandle& handle, RequestId id, std::int32_t sample,
             const std::string& reason) {
            const FinishReason parsed = parse_finish(reason);
            handle.unlocked([&](Engine& engine) { engine.finish(id, sample, parsed); });
          },
          "id"_a, "sample"_a, "reason"_a)
      .def(
          "abort",
          [](const EngineHandle& handle, RequestId id) {
            handle.unlocked([&](Engine& engine) { engine.abort(id); });
          },
          "id"_a)
      .def("reset_prefix_cache",
           [](const EngineHandle& handle) {
             return handle.unlocked([](Engine& engine) { return engine.reset_prefix_cache(); });
           })
      .def("snapshot", [](const EngineHandle& handle) { return snapshot_of(handle.get()); })
      .def("has_unfinished",
           [](const EngineHandle& handle) {
             return handle.unlocked([](Engine& engine) { return engine.has_unfinished(); });
           })
      .def("stats",
           [](const EngineHandle& handle) {
             return stats_of(handle.unlocked([](Engine& engine) { return engine.stats(); }));
           })
      .def("info", [](const EngineHandle& handle) { return info_of(handle.get()); })
      .def("close", &EngineHandle::close);
}

// The forward pass without the engine: teacher-forced logits of one sequence.
class Model {
 public:
  Model(const std::filesystem::path& directory, const std::string& dtype, int num_threads,
        std::int64_t block_size, const std::string& device, bool enforce_eager,
        bool batch_invariant, bool repack_weights)
      : checkpoint_(Checkpoint::open(directory)) {
    config_.device = parse_device(device);
    config_.dtype = parse_dtype(dtype);
    config_.max_num_seqs = 1;
    config_.block_size = block_size;
    config_.num_threads = num_threads;
    config_.enforce_eager = enforce_eager;
    config_.batch_invariant = batch_invariant;
    config_.repack_weights = repack_weights;
    config_.cuda_library_directories = cuda_library_directories();
  }

  py::array_t<float> logits(const Ints& token_ids, std::int64_t chunk_size) const {
    const std::int64_t total = token_ids.size(), vocab = checkpoint_.config().vocab_size;
    if (total == 0 || chunk_size < 0)
      throw InvalidRequestError("Give tokens and a chunk size >= 0.");
    Request request;
    request.num_prompt_tokens = static_cast<std::size_t>(total);
    Sequence sequence(request, {token_ids.data(), token_ids.data() + total});
    for (const std::int32_t token : sequence.tokens) {
      if (token < 0 || token >= vocab)
        throw InvalidRequestError("A token id is not in the vocabulary.");
    }
    py::array_t<float> out({total, vocab});
    float* target = out.mutable_data();
    const py::gil_scoped_release release;
    const std::int64_t chunk = chunk_size == 0 ? total : std::min(chunk_size, total);
    EngineConfig config = config_;
    config.max_num_batched_tokens = chunk;
    config.max_model_len = total;
    const std::unique_ptr<Runner> runner = make_runner(checkpoint_, config, {});
    const std::int64_t num_blocks = (total + config.block_size - 1) / config.block_size;
    runner->make_kv_cache({.num_layers = checkpoint_.config().num_layers,
                           .num_blocks = num_blocks,
                           .block_size = config.block_size,
                           .num_kv_heads = checkpoint_.config().num_kv_heads,
                           .head_dim = checkpoint_.config().head_dim,
                           .dtype = runner->info().compute});
    // Backwards, so that a mixed-up block table shows.
    for (std::int64_t block = num_blocks; block-- > 0;) {
      sequence.block_table.push_back(static_cast<BlockId>(block));
    }
    for (std::int64_t first = 0; first < total; first += chunk) {
      const std::int64_t count = std::min(chunk, total - first);
      sequence.num_computed_tokens = static_cast<std::size_t>(first);
      const std::vector<ScheduledSequence> sequences = {{&sequence, count}};
      const std::vector<BlockCopy> no_copies;
      runner->launch({.sequences = sequences,
                      .copies = no_copies,
                      .draws = {},
                      .prompt_rows = {},
                      .all_rows = true});
      runner->collect();
      std::vector<std::int32_t> rows(static_cast<std::size_t>(count));
      std::iota(rows.begin(), rows.end(), 0);
      runner->copy_logits(rows, target + first * vocab);
    }
    checkpoint_.check_files();
    return out;
  }

 private:
  const Checkpoint checkpoint_;
  EngineConfig config_;
};

// A pool and its cache in one, because neither can be used without the other.
struct CachedPool {
  PrefixCache cache;
  BlockPool pool;
  CachedPool(std::int64_t num_blocks, std::uint64_t hash_mask)
      : cache(num_blocks, hash_mask), pool(num_blocks, cache) {}
};

void bind_parts(py::module_& module) {
  py::class_<Model>(module, "Model", "The forward pass alone, for tests and for study.")
      .def(py::init<const std::filesystem::path&, const std::string&, int, std::int64_t,
                    const std::string&, bool, bool, bool>(),
           "directory"_a, "dtype"_a = "auto", "num_threads"_a = 0, "block_size"_a = 16,
           "device"_a = "auto", "enforce_eager"_a = false, "batch_invariant"_a = false,
           "repack_weights"_a = false)
      .def("logits", &Model::logits, "token_ids"_a, "chunk_size"_a = 0,
           "Logits [T, vocab] of a sequence; chunk_size > 0 feeds it through the KV cache in "
           "chunks.");

  py::class_<ContentKey>(module, "ContentKey", "See csrc/engine/prefix_cache.h.")
      .def(py::init())
      .def_readonly("serial", &ContentKey::serial)
      .def(py::self == py::self);
  py::class_<CachedPool>(module, "BlockPool", "See csrc/engine/block_pool.h and prefix_cache.h.")
      .def(py::init<std::int64_t, std::uint64_t>(), "num_blocks"_a,
           "prefix_hash_mask"_a = ~std::uint64_t{0})
      .def("allocate", [](CachedPool& self) { return self.pool.allocate(); })
      .def(
          "share", [](CachedPool& self, BlockId block) { self.pool.share(block); }, "block"_a)
      .def(
          "release", [](CachedPool& self, BlockId block) { self.pool.release(block); }, "block"_a)
      .def(
          "forget", [](CachedPool& self, BlockId block) { self.pool.forget(block); }, "block"_a)
      .def(
          "count", [](const CachedPool& self, BlockId block) { return self.pool.count(block); },
          "block"_a)
      .def(
          "publish",
          [](CachedPool& self, BlockId block, const ContentKey& before,
             const std::vector<std::int32_t>& tokens) {
            return self.cache.publish(block, before, tokens);
          },
          "block"_a, "before"_a, "tokens"_a)
      .def(
          "find",
          [](const CachedPool& self, const ContentKey& before,
             const std::vector<std::int32_t>& tokens) { return self.cache.find(before, tokens); },
          "before"_a, "tokens"_a)
      .def(
          "key_of", [](const CachedPool& self, BlockId block) { return self.cache.key_of(block); },
          "block"_a)
      .def_property_readonly("num_blocks", [](const CachedPool& s) { return s.pool.num_blocks(); })
      .def_property_readonly("num_free", [](const CachedPool& s) { return s.pool.num_free(); })
      .def_property_readonly("num_used", [](const CachedPool& s) { return s.pool.num_used(); })
      .def_property_readonly("num_cached", [](const CachedPool& s) { return s.pool.num_cached(); });

  module.def(
      "sample",
      [](const SamplingParams& params, const std::vector<float>& logits,
         const std::vector<std::int32_t>& prompt, const std::vector<std::int32_t>& output,
         std::uint64_t seed, std::vector<std::int32_t> eos_token_ids, std::int32_t sample_index) {
        Request request;
        request.params = params;
        request.seed = params.seed.value_or(seed);
        request.num_prompt_tokens = prompt.size();
        Sequence sequence(request, prompt);
        sequence.tokens.insert(sequence.tokens.end(), output.begin(), output.end());
        for (const std::int32_t token : output) ++sequence.output_counts[token];
        params.validate_for(static_cast<std::int64_t>(logits.size()));
        for (const auto* ids : {&sequence.tokens, &eos_token_ids}) {
          for (const std::int32_t token : *ids) {
            if (token < 0 || static_cast<std::size_t>(token) >= logits.size()) {
              throw InvalidRequestError("sample: a token id is outside the logits.");
            }
          }
        }
        std::vector<float> maxima(
            static_cast<std::size_t>(logit_blocks(static_cast<std::int64_t>(logits.size()))));
        logit_maxima(CpuContext(1), logits, maxima.data());
        Sampler::Workspace workspace;
        const Sample sample = Sampler(std::move(eos_token_ids))
                                  .sample(sequence, sample_index, {logits, maxima}, workspace);
        return py::make_tuple(sample.token, optional_logprobs(sample.logprobs));
      },
      "params"_a, "logits"_a, "prompt"_a, "output"_a, "seed"_a = 0,
      "eos_token_ids"_a = std::vector<std::int32_t>(), "sample_index"_a = 0,
      "The token that a request with this history takes from these logits, and its logprobs.");
  module.def("gumbel_noise", &gumbel_noise, "seed"_a, "sample_index"_a, "position"_a, "token"_a);
  module.def("philox", &philox, "key"_a, "counter"_a, "See csrc/base/philox.h.");
}

// What tinyvllm/memory_plan.py asks the engine for. A config is as parse_model_config gives it.
ModelConfig sizes_of(const py::object& config) {
  const auto size = [&](const char* name) { return config[py::str(name)].cast<std::int64_t>(); };
  ModelConfig sizes;
  sizes.vocab_size = size("vocab_size");
  sizes.hidden_size = size("hidden_size");
  sizes.intermediate_size = size("intermediate_size");
  sizes.num_layers = size("num_layers");
  sizes.num_heads = size("num_heads");
  sizes.num_kv_heads = size("num_kv_heads");
  sizes.head_dim = size("head_dim");
  return sizes;
}

void bind_memory_sizes(py::module_& module) {
  module.def("padded_batch_size", &padded_batch_size, "num_sequences"_a,
             "Rows of a step of decodes on a GPU.");
  module.def("most_decode_items", &most_decode_items, "max_num_seqs"_a, "num_kv_heads"_a,
             "max_model_len"_a, "Splits of sequences that a step of decodes has there at most.");
  module.def("num_decode_sizes", &num_decode_sizes, "max_num_seqs"_a, "num_kv_heads"_a,
             "max_model_len"_a, "Batches of decodes that need a CUDA graph of their own.");
  module.def("check_batch_limits", &check_batch_limits, "max_num_seqs"_a,
             "max_num_batched_tokens"_a);
  module.def(
      "step_memory_bytes",
      [](const py::object& config, const std::string& device, const std::string& dtype,
         std::int64_t max_num_seqs, std::int64_t max_num_batched_tokens, std::int64_t max_model_len,
         std::int64_t block_size, int num_threads) {
        const StepLimits limits{.max_tokens = max_num_batched_tokens,
                                .max_sequences = max_num_seqs,
                                .max_model_len = max_model_len,
                                .block_size = block_size};
        const ModelConfig model = sizes_of(config);
        const DType compute = parse_dtype(dtype).value();
        if (parse_device(device) == Device::kCuda) {
          return gpu_step_memory_bytes(limits, model, compute);
        }
        return cpu_step_memory_bytes(CpuContext(num_threads), limits, model, compute);
      },
      "config"_a, "device"_a, "dtype"_a, "max_num_seqs"_a, "max_num_batched_tokens"_a,
      "max_model_len"_a, "block_size"_a, "num_threads"_a,
      "What an engine takes beside the weights and the KV cache.");
  module.def(
      "kv_block_bytes",
      [](const py::object& config, const std::string& dtype, std::int64_t block_size) {
        const ModelConfig sizes = sizes_of(config);
        const KvShape shape{.num_layers = sizes.num_layers,
                            .num_blocks = 1,
                            .block_size = block_size,
                            .num_kv_heads = sizes.num_kv_heads,
                            .head_dim = sizes.head_dim,
                            .dtype = parse_dtype(dtype).value()};
        return shape.bytes_per_block();
      },
      "config"_a, "dtype"_a, "block_size"_a);
  module.def("host_kv_cache_budget", &host_kv_cache_budget, "available"_a);
  module.def("gpu_kv_cache_budget", &gpu_kv_cache_budget, "total"_a, "used"_a, "utilization"_a);
  module.def(
      "gpu_reserve_bytes",
      [](const py::object& config, std::int64_t max_num_seqs, std::int64_t max_model_len) {
        return gpu_reserve_bytes({.max_tokens = 0,
                                  .max_sequences = max_num_seqs,
                                  .max_model_len = max_model_len,
                                  .block_size = 0},
                                 sizes_of(config));
      },
      "config"_a, "max_num_seqs"_a, "max_model_len"_a,
      "What CUDA graphs and the driver are left of a GPU.");
  module.def(
      "repacked_bytes",
      [](std::int64_t rows, std::int64_t depth, const std::string& dtype) {
        Weight weight{.blocks = {}, .depth = depth, .dtype = parse_dtype(dtype).value()};
        weight.blocks[0].rows = rows;
        return repacked_bytes(weight);
      },
      "rows"_a, "depth"_a, "dtype"_a, "See csrc/ops/repack.h.");
}

}  // namespace

void bind_engine(py::module_& module) {
  py::class_<SamplingParams>(module, "SamplingParams", "See csrc/engine/sampling_params.h.")
      .def(py::init(&make_params));
  bind_step_output(module);
  bind_engine_class(module);
  bind_parts(module);
  module.def("supported_isas", &supported_isas,
             "CPU kernel sets that run here, the fastest first.");
  module.def("default_num_threads", &default_num_threads);
  module.def("available_memory", &available_memory,
             "Bytes that this process could still allocate.");
  module.def("require_cuda_build", &require_cuda_build);
  module.def("refuse_repacked_weights", &refuse_repacked_weights);
  bind_memory_sizes(module);
}

}  // namespace tinyvllm
