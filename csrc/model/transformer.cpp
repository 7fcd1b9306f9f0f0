#include "model/transformer.h"

#include <cmath>
#include <initializer_list>
#include <string>
#include <utility>

#include "base/errors.h"
#if defined(TINYVLLM_HAS_CUDA)
#include "cuda/context.h"
#endif
#include "ops/gather_rows.h"
#include "ops/logit_maxima.h"
#include "ops/norm_matmul.h"
#include "ops/rope.h"
#include "ops/rope_and_attend.h"

namespace tinyvllm {

template <typename Context>
Transformer<Context>::Buffer::Buffer(const Context& ctx, DType dtype, std::int64_t rows,
                                     std::int64_t cols, std::int64_t row_stride)
    : memory(ctx.allocate(static_cast<std::size_t>(rows * row_stride) * size_of(dtype))),
      view{memory.get(), dtype, rows, cols, row_stride} {}

template <typename Context>
Transformer<Context>::Transformer(const Context& ctx, const ModelConfig& config, Weights weights,
                                  std::int64_t max_tokens, std::int64_t max_logit_rows)
    : ctx_(ctx),
      config_(config),
      weights_(std::move(weights)),
      residual_(ctx, DType::kFloat32, max_tokens, config.hidden_size),
      normalized_(ctx, weights_.compute, max_tokens, config.hidden_size),
      cos_sin_(ctx, DType::kFloat32, max_tokens, config.head_dim),
      qkv_(ctx, ctx.product_dtype(weights_.compute), max_tokens,
           (config.num_heads + 2 * config.num_kv_heads) * config.head_dim),
      attention_(ctx, weights_.compute, max_tokens, config.num_heads * config.head_dim),
      gate_up_(ctx, ctx.product_dtype(weights_.compute), ctx.gate_up_rows(max_tokens),
               2 * config.intermediate_size),
      activated_(ctx, weights_.compute, max_tokens, config.intermediate_size),
      last_attention_(ctx, weights_.compute, max_logit_rows, config.num_heads * config.head_dim),
      last_residual_(ctx, DType::kFloat32, max_logit_rows, config.hidden_size),
      last_normalized_(ctx, weights_.compute, max_logit_rows, config.hidden_size),
      logits_(ctx, DType::kFloat32, max_logit_rows, config.vocab_size),
      logit_maxima_(ctx, DType::kFloat32, max_logit_rows, logit_blocks(config.vocab_size)) {}

template <typename Context>
std::int64_t Transformer<Context>::activation_bytes() const {
  std::int64_t bytes = 0;
  for (const Buffer* buffer : std::initializer_list<const Buffer*>{
           &residual_, &normalized_, &cos_sin_, &qkv_, &attention_, &gate_up_, &activated_,
           &last_attention_, &last_residual_, &last_normalized_, &logits_, &logit_maxima_}) {
    bytes += buffer->bytes();
  }
  return bytes;
}

namespace {

// Stands for a device of which no memory is taken.
struct PlannedContext {
  bool on_gpu;

  Memory allocate(std::size_t /*bytes*/) const { return {}; }
  std::int64_t operand_stride(DType dtype, std::int64_t cols) const {
    return on_gpu ? cols : CpuContext::operand_stride(dtype, cols);
  }
  DType product_dtype(DType compute) const { return on_gpu ? compute : DType::kFloat32; }
  std::int64_t gate_up_rows(std::int64_t num_tokens) const { return on_gpu ? num_tokens : 0; }
};

}  // namespace

std::int64_t planned_activation_bytes(const ModelConfig& config, bool on_gpu, DType compute,
                                      std::int64_t max_tokens, std::int64_t max_logit_rows) {
  Weights none{};
  none.compute = compute;
  const PlannedContext ctx{on_gpu};
  return Transformer(ctx, config, std::move(none), max_tokens, max_logit_rows).activation_bytes();
}

template <typename Context>
template <typename Sequences>
void Transformer<Context>::forward(const Batch<Sequences>& batch, const KvCache& kv) {
  run_layers(batch, kv, nullptr);
}

template <typename Context>
template <typename Sequences>
TensorView Transformer<Context>::forward(const Batch<Sequences>& batch, const KvCache& kv,
                                         std::span<const std::int32_t> rows) {
  check_logit_rows(std::ssize(rows));
  if (rows.size() == batch.tokens.size()) {
    run_layers(batch, kv, nullptr);
    return hidden_states(rows);
  }
  run_layers(batch, kv, &rows);
  return first_rows(last_residual_.view, std::ssize(rows));
}

// last_rows: of which tokens alone the last layer is computed to its end, or null: of all. They go
// into buffers of their own.
template <typename Context>
template <typename Sequences>
void Transformer<Context>::run_layers(const Batch<Sequences>& batch, const KvCache& kv,
                                      const std::span<const std::int32_t>* last_rows) {
  const auto num_tokens = static_cast<std::int64_t>(batch.tokens.size());
  if (num_tokens > residual_.view.rows) {
    throw Error("A batch of " + std::to_string(num_tokens) +
                " tokens is larger than this model was made for (" +
                std::to_string(residual_.view.rows) + ").");
  }
  MutTensorView residual = first_rows(residual_.view, num_tokens);
  MutTensorView normalized = first_rows(normalized_.view, num_tokens);
  MutTensorView attention = first_rows(attention_.view, num_tokens);
  MutTensorView gate_up = first_rows(gate_up_.view, ctx_.gate_up_rows(num_tokens));
  MutTensorView activated = first_rows(activated_.view, num_tokens);
  const MutTensorView cos_sin = first_rows(cos_sin_.view, num_tokens);
  const MutTensorView qkv = first_rows(qkv_.view, num_tokens);

  const float eps = config_.rms_norm_eps;
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  const auto attention_factor = static_cast<float>(config_.rope.attention_factor);

  rope_angles(ctx_, batch.positions, weights_.inverse_frequencies, attention_factor, cos_sin);
  gather_rows(ctx_, batch.tokens, weights_.embedding, residual);

  for (std::int64_t l = 0; l < config_.num_layers; ++l) {
    const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(l)];
    norm_matmul(ctx_, residual, layer.input_norm, eps, layer.qkv, normalized, qkv);
    rope_and_attend(ctx_, qkv, config_.num_heads, layer.q_norm, layer.k_norm, eps, cos_sin,
                    batch.slots, kv.layer(l), batch.sequences,
                    config_.sliding_window[static_cast<std::size_t>(l)], scale, attention);
    if (l == config_.num_layers - 1 && last_rows != nullptr) {
      const std::int64_t num_rows = std::ssize(*last_rows);
      if (num_rows == 0) return;
      gather_rows(ctx_, *last_rows, attention, first_rows(last_attention_.view, num_rows));
      gather_rows(ctx_, *last_rows, residual, first_rows(last_residual_.view, num_rows));
      attention = first_rows(last_attention_.view, num_rows);
      residual = first_rows(last_residual_.view, num_rows);
      normalized = first_rows(normalized, num_rows);
      gate_up = first_rows(gate_up, ctx_.gate_up_rows(num_rows));
      activated = first_rows(activated, num_rows);
    }
    matmul_add(ctx_, attention, layer.attention_output, residual);

    norm_swiglu(ctx_, residual, layer.post_attention_norm, eps, layer.gate_up, normalized, gate_up,
                activated);
    matmul_add(ctx_, activated, layer.down, residual);
  }
}

template <typename Context>
TensorView Transformer<Context>::hidden_states(std::span<const std::int32_t> rows) {
  check_logit_rows(std::ssize(rows));
  const MutTensorView hidden = first_rows(last_residual_.view, std::ssize(rows));
  if (!rows.empty()) gather_rows(ctx_, rows, residual_.view, hidden);
  return hidden;
}

template <typename Context>
MutTensorView Transformer<Context>::logits(TensorView hidden) {
  const MutTensorView logits = logits_view(hidden.rows);
  if (hidden.rows == 0) return logits;
  norm_logits(ctx_, hidden, weights_.final_norm, config_.rms_norm_eps, weights_.lm_head,
              first_rows(last_normalized_.view, hidden.rows), logits, logit_maxima(hidden.rows));
  return logits;
}

template <typename Context>
void Transformer<Context>::largest_logits(TensorView hidden, std::span<Largest> largest)
  requires std::same_as<Context, CpuContext>
{
  norm_largest(ctx_, hidden, weights_.final_norm, config_.rms_norm_eps, weights_.lm_head,
               first_rows(last_normalized_.view, hidden.rows), largest);
}

template <typename Context>
void Transformer<Context>::check_logit_rows(std::int64_t num_rows) const {
  if (num_rows <= logits_.view.rows) return;
  throw Error("Logits of " + std::to_string(num_rows) +
              " tokens are more than this model was made for (" +
              std::to_string(logits_.view.rows) + ").");
}

template class Transformer<CpuContext>;
template void Transformer<CpuContext>::forward(const Batch<std::span<const BatchSequence>>&,
                                               const KvCache&);
template TensorView Transformer<CpuContext>::forward(const Batch<std::span<const BatchSequence>>&,
                                                     const KvCache&, std::span<const std::int32_t>);
#if defined(TINYVLLM_HAS_CUDA)
template class Transformer<CudaContext>;
template void Transformer<CudaContext>::forward(const Batch<CudaSequences>&, const KvCache&);
template TensorView Transformer<CudaContext>::forward(const Batch<CudaSequences>&, const KvCache&,
                                                      std::span<const std::int32_t>);
#endif

}  // namespace tinyvllm
