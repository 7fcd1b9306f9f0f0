#include "engine/memory_sizes.h"

#include <algorithm>

#include "engine/decode_sizes.h"
#include "engine/runner.h"
#include "model/transformer.h"
#include "ops/matmul.h"
#include "ops/paged_attention.h"
#include "ops/sample.h"

namespace tinyvllm {
namespace {

std::int64_t max_blocks(const StepLimits& limits) {
  return (limits.max_model_len + limits.block_size - 1) / limits.block_size;
}

std::int64_t max_items(const StepLimits& limits, const ModelConfig& model) {
  return most_decode_items(limits.max_sequences, model.num_kv_heads, limits.max_model_len);
}

}  // namespace

BatchLimits batch_limits(const StepLimits& limits, bool on_gpu) {
  const std::int64_t sequences =
      on_gpu ? padded_batch_size(limits.max_sequences) : limits.max_sequences;
  return {.max_tokens = std::max(limits.max_tokens, sequences),
          .max_logit_rows = std::max(sequences, kPromptLogprobRows)};
}

// What there is a row, a sequence, a split and a block of.
std::size_t step_array_bytes(const StepLimits& limits, const ModelConfig& model) {
  const std::int64_t sequences = padded_batch_size(limits.max_sequences);
  const std::int64_t rows = batch_limits(limits, true).max_tokens;
  return static_cast<std::size_t>(
      rows * std::int64_t{6 * sizeof(std::int32_t) + sizeof(std::int64_t)} +
      sequences * std::int64_t{8 * sizeof(std::int32_t) + sizeof(SampleRow)} +
      (2 * max_items(limits, model) + sequences * max_blocks(limits)) *
          std::int64_t{sizeof(std::int32_t)} +
      1024);
}

std::size_t block_table_bytes(const StepLimits& limits) {
  return static_cast<std::size_t>(padded_batch_size(limits.max_sequences) * max_blocks(limits)) *
         sizeof(std::int32_t);
}

std::size_t op_workspace_bytes(const StepLimits& limits, const ModelConfig& model) {
  return std::max(
      paged_attention_workspace_bytes(max_items(limits, model), model.num_heads, model.head_dim),
      sample_workspace_bytes(padded_batch_size(limits.max_sequences)));
}

std::int64_t gpu_step_bytes(const StepLimits& limits, const ModelConfig& model) {
  return static_cast<std::int64_t>(kNumStepArrays * step_array_bytes(limits, model) +
                                   block_table_bytes(limits) + op_workspace_bytes(limits, model));
}

std::int64_t gpu_reserve_bytes(const StepLimits& limits, const ModelConfig& model) {
  if (!limits.graphs) return kDriverReserveBytes;
  // Of a layer two norms, RoPE, attention, SiLU and four products, which cuBLASLt may compute by two
  // kernels each. Beside the layers: block tables, tokens, angles, embedding; rows, norm and product
  // of the logits; the draw and the way of its tokens to the host.
  constexpr std::int64_t kNodesOfALayer = 13, kOtherNodes = 10;
  constexpr std::int64_t kGraphsOfASize = 2 * kNumStepArrays;  // with and without the draw
  const std::int64_t graphs =
      kGraphsOfASize *
      num_decode_sizes(limits.max_sequences, model.num_kv_heads, limits.max_model_len);
  const std::int64_t nodes = graphs * (kNodesOfALayer * model.num_layers + kOtherNodes);
  return kDriverReserveBytes + nodes * kGraphNodeBytes;
}

std::int64_t cpu_step_bytes(const CpuContext& ctx, const BatchLimits& batch,
                            const ModelConfig& model, DType compute) {
  const auto scratch = [&](std::int64_t outputs, std::int64_t depth, std::int64_t rows,
                           ProductKind kind) {
    std::size_t most = 0;
    for (const DType dtype : {compute, DType::kBFloat16}) {  // a file may have either
      Weight weight{.depth = depth, .dtype = dtype};
      weight.blocks[0].rows = outputs;
      if (kind == ProductKind::kSwiglu) weight.blocks[1].rows = outputs;
      most = std::max(most, matmul_scratch_bytes(ctx, compute, rows, weight, kind));
    }
    return most;
  };
  using enum ProductKind;
  const std::int64_t query = model.num_heads * model.head_dim;
  return static_cast<std::int64_t>(
      std::max({scratch(query, model.hidden_size, batch.max_tokens, kStored),
                scratch(model.hidden_size, query, batch.max_tokens, kStored),
                scratch(model.intermediate_size, model.hidden_size, batch.max_tokens, kSwiglu),
                scratch(model.hidden_size, model.intermediate_size, batch.max_tokens, kStored),
                scratch(model.vocab_size, model.hidden_size, batch.max_logit_rows, kLargest)}));
}

std::int64_t gpu_step_memory_bytes(const StepLimits& limits, const ModelConfig& model,
                                   DType compute) {
  const BatchLimits batch = batch_limits(limits, true);
  return gpu_step_bytes(limits, model) +
         planned_activation_bytes(model, true, compute, batch.max_tokens, batch.max_logit_rows);
}

std::int64_t cpu_step_memory_bytes(const CpuContext& ctx, const StepLimits& limits,
                                   const ModelConfig& model, DType compute) {
  const BatchLimits batch = batch_limits(limits, false);
  return cpu_step_bytes(ctx, batch, model, compute) +
         planned_activation_bytes(model, false, compute, batch.max_tokens, batch.max_logit_rows);
}

}  // namespace tinyvllm
