#include "engine/memory_table.h"

#include <cstdio>

namespace tinyvllm {
namespace {

std::string line(const char* name, std::int64_t bytes, const char* remark = "") {
  char text[128];
  std::snprintf(text, sizeof(text), "\n  %-10s %10.2f MiB%s", name,
                static_cast<double>(bytes) / (1 << 20), remark);
  return text;
}

}  // namespace

std::string memory_table(const Checkpoint& checkpoint, DType compute, const MemoryUse& use) {
  std::int64_t weights = 0;
  for (const std::string& name : checkpoint.names()) {
    weights += static_cast<std::int64_t>(checkpoint.info(name).num_bytes);
  }
  const ModelConfig& model = checkpoint.config();
  const KvShape thousand_tokens{.num_layers = model.num_layers,
                                .num_blocks = 1000,
                                .block_size = 1,
                                .num_kv_heads = model.num_kv_heads,
                                .head_dim = model.head_dim,
                                .dtype = compute};
  return line("weights", weights) + line("KV cache", thousand_tokens.bytes(), " for 1000 tokens") +
         line("workspace", use.workspace) + line("free", use.free);
}

}  // namespace tinyvllm
