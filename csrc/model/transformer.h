// The forward pass of a Llama-family decoder over a flat batch of tokens.
//
// There is no prefill path and no decode path: a batch is the tokens of any number of sequences,
// chunks of prompts and single new tokens side by side, and every token attends through its
// sequence's block table (PagedAttention).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "model/weights.h"
#include "ops/cpu_context.h"
#include "ops/kv_cache.h"
#include "ops/paged_attention.h"

namespace tinyvllm {

struct Batch {
  std::span<const std::int32_t> tokens;      // [num_tokens], each in [0, vocab)
  std::span<const std::int32_t> positions;   // [num_tokens]
  std::span<const std::int64_t> slots;       // [num_tokens], where each token's K and V go
  std::span<const BatchSequence> sequences;  // in the order of their tokens, covering all of them
};

class Transformer {
 public:
  // The most tokens and logit rows that one batch may have; memory for them is reserved here and
  // taken when first used. The checkpoint and the context must outlive the model.
  Transformer(const CpuContext& ctx, const Checkpoint& checkpoint, DType compute,
              std::int64_t max_tokens, std::int64_t max_logit_rows);

  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  KvShape kv_shape(std::int64_t num_blocks, std::int64_t block_size) const;

  // Runs all layers over the batch and writes the K and V of its tokens to `kv`. One batch at a
  // time.
  void forward(const Batch& batch, const KvCache& kv);

  // The logits [rows, vocab], float32, of some tokens of the last batch; valid until the next call.
  // The output matrix is the largest of all, so that only those are computed that are used.
  MutTensorView logits(std::span<const std::int32_t> rows);

 private:
  // A matrix of activations, at the size of the largest batch.
  struct Buffer {
    std::unique_ptr<std::byte[]> memory;
    MutTensorView view;
    Buffer(DType dtype, std::int64_t rows, std::int64_t cols);
  };

  const CpuContext& ctx_;
  const ModelConfig config_;
  const Weights weights_;
  const std::vector<float> inverse_frequencies_;

  Buffer residual_;         // [max_tokens, hidden]                               float32
  Buffer branch_;           // [max_tokens, hidden]                               float32
  Buffer normalized_;       // [max_tokens, hidden]                               compute
  Buffer cos_sin_;          // [max_tokens, head_dim]                             float32
  Buffer qkv_;              // [max_tokens, (num_heads + 2 num_kv_heads) * head_dim]  float32
  Buffer attention_;        // [max_tokens, num_heads * head_dim]                 compute
  Buffer gate_up_;          // [max_tokens, 2 intermediate]                       float32
  Buffer activated_;        // [max_tokens, intermediate]                         compute
  Buffer last_residual_;    // [max_logit_rows, hidden]                           float32
  Buffer last_branch_;      // [max_logit_rows, hidden]                           float32
  Buffer last_normalized_;  // [max_logit_rows, hidden]                           compute
  Buffer logits_;           // [max_logit_rows, vocab]                            float32
};

}  // namespace tinyvllm
