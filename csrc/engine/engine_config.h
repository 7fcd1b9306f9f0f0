// How an engine is built: plain values, none of them global.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace tinyvllm {

enum class Device : std::uint8_t {
  kAuto,  // a GPU if this build and this machine have one, else the CPU
  kCpu,
  kCuda,
};

struct EngineConfig {
  Device device = Device::kAuto;
  std::optional<DType> dtype;  // float32 or bfloat16; absent: float32 for F32 files, else bfloat16
  // Prompt and output together. Absent: the smaller of the model's own and what the pool holds.
  std::optional<std::int64_t> max_model_len;
  std::int64_t max_num_seqs = 256;
  std::int64_t max_num_batched_tokens = 2048;
  std::int64_t block_size = 16;
  // The KV pool, by its number of blocks, else by its bytes, else the smaller of max_num_seqs x
  // max_model_len tokens and 40% of the available memory (on a GPU: what is left of its share).
  std::optional<std::int64_t> num_blocks;
  std::optional<std::int64_t> kv_cache_memory_bytes;
  int num_threads = 0;  // 0: one a physical core
  // On a CPU: matrices in panels (ops/repack.h), a copy of all weights. Faster with many tokens a
  // step, slower to start; other bits than without, as much the same in every batch.
  bool repack_weights = false;
  // On a GPU: which share of its memory weights, KV pool and all else may take together; whether to
  // do without graphs; whether a request's bits are the same in every batch, as they are on the CPU;
  // and where cuBLASLt is looked for before the system's own places.
  double gpu_memory_utilization = 0.9;
  bool enforce_eager = false;
  bool batch_invariant = false;
  std::vector<std::string> cuda_library_directories;
  std::uint64_t seed = 0;
  bool prefix_caching = true;
  bool static_batching =
      false;  // admit only when nothing runs; to measure what continuous batching gains
  std::uint64_t prefix_hash_mask = ~std::uint64_t{0};  // see PrefixCache; for tests
  std::int64_t fail_at_step = 0;                       // the step that throws, from 1; for tests
  std::vector<std::int32_t> eos_token_ids;             // those outside the vocabulary are ignored
  std::optional<std::filesystem::path> trace;          // a file for events (trace.h)
};

}  // namespace tinyvllm
