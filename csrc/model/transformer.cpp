#include "model/transformer.h"

#include <cmath>
#include <new>
#include <string>

#include "base/errors.h"
#include "model/rope_frequencies.h"
#include "ops/gather_rows.h"
#include "ops/matmul.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/silu_mul.h"

namespace tinyvllm {

Transformer::Buffer::Buffer(DType dtype, std::int64_t rows, std::int64_t cols) {
  const std::size_t bytes = static_cast<std::size_t>(rows * cols) * size_of(dtype);
  try {
    memory = std::make_unique_for_overwrite<std::byte[]>(bytes);
  } catch (const std::bad_alloc&) {
    throw CapacityError("Cannot reserve " + std::to_string(bytes) + " bytes for activations [" +
                        std::to_string(rows) + ", " + std::to_string(cols) +
                        "]. Lower max_num_batched_tokens and max_num_seqs.");
  }
  view = {memory.get(), dtype, rows, cols, cols};
}

Transformer::Transformer(const CpuContext& ctx, const Checkpoint& checkpoint, DType compute,
                         std::int64_t max_tokens, std::int64_t max_logit_rows)
    : ctx_(ctx),
      config_(checkpoint.config()),
      weights_(load_weights(ctx, checkpoint, compute)),
      inverse_frequencies_(rope_inverse_frequencies(config_.rope, config_.head_dim)),
      residual_(DType::kFloat32, max_tokens, config_.hidden_size),
      branch_(DType::kFloat32, max_tokens, config_.hidden_size),
      normalized_(compute, max_tokens, config_.hidden_size),
      cos_sin_(DType::kFloat32, max_tokens, config_.head_dim),
      qkv_(DType::kFloat32, max_tokens,
           (config_.num_heads + 2 * config_.num_kv_heads) * config_.head_dim),
      attention_(compute, max_tokens, config_.num_heads * config_.head_dim),
      gate_up_(DType::kFloat32, max_tokens, 2 * config_.intermediate_size),
      activated_(compute, max_tokens, config_.intermediate_size),
      last_residual_(DType::kFloat32, max_logit_rows, config_.hidden_size),
      last_branch_(DType::kFloat32, max_logit_rows, config_.hidden_size),
      last_normalized_(compute, max_logit_rows, config_.hidden_size),
      logits_(DType::kFloat32, max_logit_rows, config_.vocab_size) {}

KvShape Transformer::kv_shape(std::int64_t num_blocks, std::int64_t block_size) const {
  return {config_.num_layers,   num_blocks,       block_size,
          config_.num_kv_heads, config_.head_dim, weights_.compute};
}

void Transformer::forward(const Batch& batch, const KvCache& kv) {
  const auto num_tokens = static_cast<std::int64_t>(batch.tokens.size());
  if (num_tokens > residual_.view.rows) {
    throw Error("A batch of " + std::to_string(num_tokens) +
                " tokens is larger than this model was made for (" +
                std::to_string(residual_.view.rows) + ").");
  }
  const MutTensorView residual = first_rows(residual_.view, num_tokens);
  const MutTensorView branch = first_rows(branch_.view, num_tokens);
  const MutTensorView normalized = first_rows(normalized_.view, num_tokens);
  const MutTensorView cos_sin = first_rows(cos_sin_.view, num_tokens);
  const MutTensorView qkv = first_rows(qkv_.view, num_tokens);
  const MutTensorView attention = first_rows(attention_.view, num_tokens);
  const MutTensorView gate_up = first_rows(gate_up_.view, num_tokens);
  const MutTensorView activated = first_rows(activated_.view, num_tokens);

  const float eps = config_.rms_norm_eps;
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  const auto attention_factor = static_cast<float>(config_.rope.attention_factor);

  rope_angles(ctx_, batch.positions, inverse_frequencies_, attention_factor, cos_sin);
  gather_rows(ctx_, batch.tokens, weights_.embedding, residual);

  for (std::int64_t l = 0; l < config_.num_layers; ++l) {
    const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(l)];
    if (l == 0) {
      rms_norm(ctx_, residual, layer.input_norm, eps, normalized);
    } else {
      add_rms_norm(ctx_, residual, branch, layer.input_norm, eps, normalized);
    }
    matmul(ctx_, normalized, layer.qkv, qkv);
    qk_norm_rope_and_cache(ctx_, qkv, config_.num_heads, layer.q_norm, layer.k_norm, eps, cos_sin,
                           batch.slots, kv.layer(l));
    paged_attention(ctx_, qkv, kv.layer(l), batch.sequences, config_.num_heads,
                    config_.sliding_window[static_cast<std::size_t>(l)], scale, attention);
    matmul(ctx_, attention, layer.attention_output, branch);

    add_rms_norm(ctx_, residual, branch, layer.post_attention_norm, eps, normalized);
    matmul(ctx_, normalized, layer.gate_up, gate_up);
    silu_mul(ctx_, gate_up, activated);
    matmul(ctx_, activated, layer.down, branch);
  }
}

MutTensorView Transformer::logits(std::span<const std::int32_t> rows) {
  const auto num_rows = static_cast<std::int64_t>(rows.size());
  if (num_rows > logits_.view.rows) {
    throw Error("Logits of " + std::to_string(num_rows) +
                " tokens are more than this model was made for (" +
                std::to_string(logits_.view.rows) + ").");
  }
  const MutTensorView residual = first_rows(last_residual_.view, num_rows);
  const MutTensorView branch = first_rows(last_branch_.view, num_rows);
  const MutTensorView normalized = first_rows(last_normalized_.view, num_rows);
  const MutTensorView logits = first_rows(logits_.view, num_rows);
  gather_rows(ctx_, rows, residual_.view, residual);
  gather_rows(ctx_, rows, branch_.view, branch);
  add_rms_norm(ctx_, residual, branch, weights_.final_norm, config_.rms_norm_eps, normalized);
  matmul(ctx_, normalized, weights_.lm_head, logits);
  return logits;
}

}  // namespace tinyvllm
