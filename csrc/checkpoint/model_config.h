// config.json -> ModelConfig: the shape of a model, whatever family and generation of files it
// comes from.
//
// Transformers 5 moved and renamed fields, so that each is looked up in its new place, then in its
// old one, then in the family's default. The result says what to compute and leaves no question
// open: a forward pass never asks for the family's name.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace tinyvllm {

enum class RopeType : std::uint8_t { kDefault, kLinear, kLlama3, kYarn };

// Rotary position embedding. The plain frequencies are theta^(-2i / head_dim); the types change them:
//   linear  all divided by factor
//   llama3  wavelengths above original_max_position_embeddings / low_freq_factor divided by factor,
//           below original_max_position_embeddings / high_freq_factor untouched, a blend between
//   yarn    a blend between divided and untouched along i: from the i that turns beta_fast times
//           within original_max_position_embeddings to the i that turns beta_slow times (rounded
//           outwards to whole i where truncate is set)
// Fields that a type does not use hold the values below.
struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 10000.0;                       // greater than 1
  double factor = 1.0;                          // linear, llama3, yarn
  double low_freq_factor = 1.0;                 // llama3; less than high_freq_factor
  double high_freq_factor = 4.0;                // llama3
  double original_max_position_embeddings = 0;  // llama3, yarn
  double attention_factor = 1.0;                // yarn, resolved; cos and sin are multiplied by it
  double beta_fast = 32.0;                      // yarn
  double beta_slow = 1.0;                       // yarn
  bool truncate = true;                         // yarn

  bool operator==(const RopeConfig&) const = default;
};

struct ModelConfig {
  std::string family;  // model_type: llama, mistral, qwen2 or qwen3
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;  // a multiple of num_kv_heads
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;  // even; num_heads * head_dim need not be hidden_size
  std::int64_t max_position_embeddings = 0;
  float rms_norm_eps = 0;
  bool tie_word_embeddings = false;    // the output matrix is model.embed_tokens.weight
  bool qkv_bias = false;               // q_proj, k_proj and v_proj have biases
  bool attention_output_bias = false;  // o_proj has a bias
  bool mlp_bias = false;               // gate_proj, up_proj and down_proj have biases
  bool qk_norm = false;                // RMSNorm over each head of q and k, before RoPE
  // [num_layers]; 0: full attention; w: position i attends to j with i - w < j <= i.
  std::vector<std::int64_t> sliding_window;
  RopeConfig rope;
  std::string dtype;  // what the file says ("bfloat16") or empty; the weights' own dtype decides
};

// Throws CheckpointError if the file is missing, no JSON, contradicts itself or holds a number out
// of range; UnsupportedModelError if it is sound but describes what this engine does not implement.
ModelConfig parse_model_config(const std::filesystem::path& config_json);

}  // namespace tinyvllm
