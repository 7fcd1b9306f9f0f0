// The forward pass of a Llama-family decoder over a flat batch of tokens.
//
// There is no prefill path and no decode path: a batch is the tokens of any number of sequences,
// chunks of prompts and single new tokens side by side, and every token attends through its
// sequence's block table (PagedAttention).
//
// It is written once, over the ops; the context says on which device they run. Everything that a
// batch points to lies on that device.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>

#include "base/memory.h"
#include "model/weights.h"
#include "ops/cpu_context.h"
#include "ops/kv_cache.h"
#include "ops/paged_attention.h"

namespace tinyvllm {

// Sequences: what paged_attention takes on the device.
template <typename Sequences>
struct Batch {
  std::span<const std::int32_t> tokens;     // [num_tokens], each in [0, vocab)
  std::span<const std::int32_t> positions;  // [num_tokens]
  std::span<const std::int64_t> slots;      // [num_tokens], where each token's K and V go
  Sequences sequences;                      // in the order of their tokens, covering all of them
};

template <typename Context>
class Transformer {
 public:
  // The most tokens and logit rows that one batch may have; memory for them is reserved here. The
  // context and what the weights point to must outlive the model.
  Transformer(const Context& ctx, const ModelConfig& config, Weights weights,
              std::int64_t max_tokens, std::int64_t max_logit_rows);

  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }

  // The size of that memory.
  std::int64_t activation_bytes() const;

  // Runs all layers over the batch and writes the K and V of its tokens to `kv`. One batch at a
  // time.
  template <typename Sequences>
  void forward(const Batch<Sequences>& batch, const KvCache& kv);

  // The residual stream [rows, hidden], float32, of some tokens of the last batch behind all layers;
  // valid until the next call.
  TensorView hidden_states(std::span<const std::int32_t> rows);

  // Both at once, where no other tokens' are wanted: nothing looks at the others behind the attention
  // of the last layer, so that the rest of it is computed for these alone, each once.
  // hidden_states() cannot be asked for more of this batch.
  template <typename Sequences>
  TensorView forward(const Batch<Sequences>& batch, const KvCache& kv,
                     std::span<const std::int32_t> rows);

  // The logits [rows, vocab], float32, of such hidden states; valid until the next call. The output
  // matrix is the largest of all, so that only those are computed that are used.
  MutTensorView logits(TensorView hidden);

  // The largest logit of each alone, as matmul_largest has it: [rows of hidden].
  void largest_logits(TensorView hidden, std::span<Largest> largest)
    requires std::same_as<Context, CpuContext>;

  // What was found on the way, on the CPU (ops/logit_maxima.h): of the rows of the last logits.
  MutTensorView logit_maxima(std::int64_t num_rows) const {
    return first_rows(logit_maxima_.view, num_rows);
  }

  // Where the logits of so many rows are written.
  MutTensorView logits_view(std::int64_t num_rows) const {
    return first_rows(logits_.view, num_rows);
  }

 private:
  // A matrix of activations, at the size of the largest batch.
  struct Buffer {
    Memory memory;
    MutTensorView view;
    Buffer(const Context& ctx, DType dtype, std::int64_t rows, std::int64_t cols)
        : Buffer(ctx, dtype, rows, cols, cols) {}
    Buffer(const Context& ctx, DType dtype, std::int64_t rows, std::int64_t cols,
           std::int64_t row_stride);
    std::int64_t bytes() const {
      return view.rows * view.row_stride * static_cast<std::int64_t>(size_of(view.dtype));
    }
  };
  // One that is the x of a matrix product.
  struct Operand : Buffer {
    Operand(const Context& ctx, DType dtype, std::int64_t rows, std::int64_t cols)
        : Buffer(ctx, dtype, rows, cols, ctx.operand_stride(dtype, cols)) {}
  };

  template <typename Sequences>
  void run_layers(const Batch<Sequences>& batch, const KvCache& kv,
                  const std::span<const std::int32_t>* last_rows);
  void check_logit_rows(std::int64_t num_rows) const;

  const Context& ctx_;
  const ModelConfig config_;
  const Weights weights_;

  Buffer residual_;          // [max_tokens, hidden]                               float32
  Operand normalized_;       // [max_tokens, hidden]                               compute
  Buffer cos_sin_;           // [max_tokens, head_dim]                             float32
  Buffer qkv_;               // [max_tokens, (num_heads + 2 num_kv_heads) * head_dim]  product
  Operand attention_;        // [max_tokens, num_heads * head_dim]                 compute
  Buffer gate_up_;           // [gate_up_rows(max_tokens), 2 intermediate]         product
  Operand activated_;        // [max_tokens, intermediate]                         compute
  Operand last_attention_;   // [max_logit_rows, num_heads * head_dim]             compute
  Buffer last_residual_;     // [max_logit_rows, hidden]                           float32
  Operand last_normalized_;  // [max_logit_rows, hidden]                           compute
  Buffer logits_;            // [max_logit_rows, vocab]                            float32
  Buffer logit_maxima_;      // [max_logit_rows, logit_blocks(vocab)]              float32
};

// What activation_bytes() of such a model would be.
std::int64_t planned_activation_bytes(const ModelConfig& config, bool on_gpu, DType compute,
                                      std::int64_t max_tokens, std::int64_t max_logit_rows);

}  // namespace tinyvllm
