#include "model/weights.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/errors.h"
#include "base/host.h"
#include "model/rope_frequencies.h"

namespace tinyvllm {
namespace {

// Reads element i of a tensor whose address may be aligned to nothing.
float element(const CheckpointTensor& tensor, std::int64_t i) {
  const std::byte* address = tensor.data + static_cast<std::size_t>(i) * size_of(tensor.dtype);
  if (tensor.dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, address, sizeof(value));
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, address, sizeof(bits));
  return tensor.dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

class Loader {
 public:
  Loader(const CpuContext& ctx, const Checkpoint& checkpoint, Weights& weights)
      : ctx_(ctx), checkpoint_(checkpoint), weights_(weights) {}

  const float* vector(const std::string& name, std::int64_t size) {
    const std::int64_t shape[] = {size};
    return static_cast<const float*>(copy(checkpoint_.tensor(name, shape), size, DType::kFloat32));
  }

  std::span<const float> copied(std::span<const float> values) {
    void* target = allocate(values.size_bytes());
    std::memcpy(target, values.data(), values.size_bytes());
    return {static_cast<const float*>(target), values.size()};
  }

  // The tensors `prefix + names[i] + ".weight"` of rows[i] rows each, as one stacked matrix, with
  // the biases beside them if there are any.
  Weight matrix(const std::string& prefix, std::initializer_list<const char*> names,
                std::initializer_list<std::int64_t> rows, std::int64_t depth, bool bias,
                const char* hint = "") {
    Weight weight{.blocks = {}, .depth = depth, .dtype = DType::kBFloat16};
    std::array<CheckpointTensor, 3> tensors;
    bool all_bfloat16 = true;
    std::size_t count = 0;
    for (const char* name : names) {
      const std::int64_t shape[] = {rows.begin()[count], depth};
      tensors[count] = checkpoint_.tensor(prefix + name + ".weight", shape, hint);
      all_bfloat16 = all_bfloat16 && tensors[count].dtype == DType::kBFloat16;
      ++count;
    }
    const bool mixed = weights_.compute == DType::kFloat32 && !all_bfloat16;
    weight.dtype = mixed ? DType::kFloat32 : DType::kBFloat16;
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t num_rows = rows.begin()[i];
      weight.blocks[i] = {
          .data = in_place_or_copied(tensors[i], num_rows * depth, weight.dtype),
          .rows = num_rows,
          .bias = bias ? vector(prefix + names.begin()[i] + ".bias", num_rows) : nullptr};
    }
    return weight;
  }

 private:
  const void* in_place_or_copied(const CheckpointTensor& tensor, std::int64_t size, DType dtype) {
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
    if (tensor.dtype == dtype && address % size_of(dtype) == 0) return tensor.data;
    return copy(tensor, size, dtype);
  }

  const void* copy(const CheckpointTensor& tensor, std::int64_t size, DType dtype) {
    std::byte* target = allocate(static_cast<std::size_t>(size) * size_of(dtype));
    constexpr std::int64_t kPiece = 1 << 20;
    ctx_.parallel_for((size + kPiece - 1) / kPiece, [&](std::int64_t piece, int) {
      const std::int64_t end = std::min(size, (piece + 1) * kPiece);
      for (std::int64_t i = piece * kPiece; i < end; ++i) {
        if (dtype == DType::kFloat32) {
          reinterpret_cast<float*>(target)[i] = element(tensor, i);
        } else {
          reinterpret_cast<BFloat16*>(target)[i] = to_bfloat16(element(tensor, i));
        }
      }
    });
    tensor.file->release_pages({tensor.data, tensor.num_bytes});
    return target;
  }

  std::byte* allocate(std::size_t bytes) {
    try {
      weights_.copies.push_back(ctx_.allocate(bytes));
    } catch (const CapacityError&) {
      throw CapacityError("Cannot allocate " + std::to_string(bytes) +
                          " bytes to copy a tensor to another dtype, after " +
                          std::to_string(weights_.copied_bytes) +
                          " bytes of other copies. Take the dtype of the files.");
    }
    weights_.copied_bytes += bytes;
    return static_cast<std::byte*>(weights_.copies.back().get());
  }

  const CpuContext& ctx_;
  const Checkpoint& checkpoint_;
  Weights& weights_;
};

}  // namespace

Weights load_weights(const CpuContext& ctx, const Checkpoint& checkpoint, DType compute) {
  const ModelConfig& config = checkpoint.config();
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t q_rows = config.num_heads * config.head_dim;
  const std::int64_t kv_rows = config.num_kv_heads * config.head_dim;

  Weights weights{.compute = compute,
                  .embedding = {},
                  .layers = {},
                  .final_norm = nullptr,
                  .inverse_frequencies = {},
                  .lm_head = {},
                  .copies = {}};
  Loader load(ctx, checkpoint, weights);

  const Weight embedding =
      load.matrix("model.", {"embed_tokens"}, {config.vocab_size}, hidden, false);
  weights.embedding = {embedding.blocks[0].data, embedding.dtype, config.vocab_size, hidden,
                       hidden};

  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    LayerWeights& target = weights.layers.emplace_back();
    target.input_norm = load.vector(prefix + "input_layernorm.weight", hidden);
    target.qkv = load.matrix(attention, {"q_proj", "k_proj", "v_proj"}, {q_rows, kv_rows, kv_rows},
                             hidden, config.qkv_bias);
    if (config.qk_norm) {
      target.q_norm = load.vector(attention + "q_norm.weight", config.head_dim);
      target.k_norm = load.vector(attention + "k_norm.weight", config.head_dim);
    }
    target.attention_output =
        load.matrix(attention, {"o_proj"}, {hidden}, q_rows, config.attention_output_bias);
    target.post_attention_norm = load.vector(prefix + "post_attention_layernorm.weight", hidden);
    target.gate_up =
        load.matrix(mlp, {"gate_proj", "up_proj"},
                    {config.intermediate_size, config.intermediate_size}, hidden, config.mlp_bias);
    target.down =
        load.matrix(mlp, {"down_proj"}, {hidden}, config.intermediate_size, config.mlp_bias);
  }
  weights.inverse_frequencies = load.copied(rope_inverse_frequencies(config.rope, config.head_dim));
  weights.final_norm = load.vector("model.norm.weight", hidden);
  weights.lm_head = config.tie_word_embeddings
                        ? embedding
                        : load.matrix("", {"lm_head"}, {config.vocab_size}, hidden, false,
                                      "If the output matrix is the embedding, config.json must say "
                                      "tie_word_embeddings: true.");
  return weights;
}

std::vector<Weight*> Weights::matrices() {
  std::vector<Weight*> matrices;
  for (LayerWeights& layer : layers) {
    matrices.insert(matrices.end(),
                    {&layer.qkv, &layer.attention_output, &layer.gate_up, &layer.down});
  }
  matrices.push_back(&lm_head);
  return matrices;
}

void populate_weights(const CpuContext& ctx, const Checkpoint& checkpoint, Weights& weights) {
  constexpr std::int64_t kPiece = 4 << 20;
  std::vector<std::span<const std::byte>> pieces;
  std::int64_t total = 0;
  for (const Weight* matrix : weights.matrices()) {
    for (const RowBlock& block : matrix->blocks) {
      const auto* data = static_cast<const std::byte*>(block.data);
      const std::int64_t size =
          block.rows * matrix->depth * static_cast<std::int64_t>(size_of(matrix->dtype));
      for (std::int64_t first = 0; first < size; first += kPiece) {
        pieces.emplace_back(data + first, static_cast<std::size_t>(std::min(kPiece, size - first)));
      }
      total += size;
    }
  }
  if (total > available_memory()) return;
  ctx.parallel_for(std::ssize(pieces), [&](std::int64_t i, int) {
    const std::span<const std::byte> piece = pieces[static_cast<std::size_t>(i)];
    checkpoint.populate_pages(piece.data(), piece.size());
  });
}

}  // namespace tinyvllm
