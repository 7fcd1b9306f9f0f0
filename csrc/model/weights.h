// The weights of a Llama-family model, found by their names in a checkpoint.
//
// A matrix is used where it lies in the mapped file wherever its dtype allows:
//
//   file      compute bfloat16       compute float32
//   bfloat16  as it lies             as it lies, widened in registers
//   float16   copied to bfloat16     copied to float32
//   float32   copied to bfloat16     as it lies
//
// Norm weights and biases are small: they are copied to float32. A tensor that is not aligned to
// its own element size is copied, too. Of what has been copied the process drops the file's pages.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "base/memory.h"
#include "base/tensor.h"
#include "checkpoint/checkpoint.h"
#include "ops/cpu_context.h"
#include "ops/matmul.h"

namespace tinyvllm {

struct LayerWeights {
  const float* input_norm;           // [hidden]
  Weight qkv;                        // [(num_heads + 2 num_kv_heads) * head_dim, hidden]
  const float* q_norm = nullptr;     // [head_dim], or null
  const float* k_norm = nullptr;     // [head_dim], or null
  Weight attention_output;           // [hidden, num_heads * head_dim]
  const float* post_attention_norm;  // [hidden]
  Weight gate_up;                    // [2 intermediate, hidden]
  Weight down;                       // [hidden, intermediate]
};

struct Weights {
  DType compute;  // bfloat16 or float32: the dtype of activations that enter a matrix product
  TensorView embedding;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  const float* final_norm;                     // [hidden]
  std::span<const float> inverse_frequencies;  // [head_dim / 2], see rope_frequencies.h
  Weight lm_head;  // [vocab, hidden]; the embedding itself where the two are tied

  // Those that a step multiplies by, in its order.
  std::vector<Weight*> matrices();

  // What had to be copied, and its size in bytes. All else points into the checkpoint's mappings.
  std::vector<Memory> copies;
  std::size_t copied_bytes = 0;
};

// The checkpoint must outlive the weights. Throws CheckpointError for a tensor that is absent or of
// another shape, UnsupportedModelError for one of another dtype.
Weights load_weights(const CpuContext& ctx, const Checkpoint& checkpoint, DType compute);

// Puts the matrices that lie in files into this process's memory, by all threads at once. The first
// step, which reads all of them, would do so fault by fault, and memory wait meanwhile. Nothing where
// memory does not hold them: what was read first would be gone before the step.
void populate_weights(const CpuContext& ctx, const Checkpoint& checkpoint, Weights& weights);

}  // namespace tinyvllm
