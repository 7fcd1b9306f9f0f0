#include "model/cuda_weights.h"

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "cuda/upload.h"

namespace tinyvllm {
namespace {

// Places pieces of host memory behind each other in device memory. It runs twice over the same
// weights: first to measure, then, with the memory at hand, to say where each piece lies.
class Layout {
 public:
  explicit Layout(std::byte* base = nullptr) : base_(base) {}

  std::size_t size() const { return size_; }
  const std::vector<cuda::Upload>& uploads() const { return uploads_; }

  // Puts the next piece at a multiple of 256 bytes.
  void align() { size_ = (size_ + 255) / 256 * 256; }

  const void* put(const void* host, std::int64_t bytes) {
    std::byte* device = base_ + size_;
    uploads_.push_back({device, host, static_cast<std::size_t>(bytes)});
    size_ += static_cast<std::size_t>(bytes);
    return device;
  }

  void place(const float*& vector, std::int64_t size) {
    if (vector == nullptr) return;
    align();
    vector = static_cast<const float*>(put(vector, size * std::int64_t{sizeof(float)}));
  }

  void place(Weight& weight) {
    const auto width = weight.depth * static_cast<std::int64_t>(size_of(weight.dtype));
    const std::int64_t outputs = weight.outputs();
    align();
    const void* first = nullptr;
    for (const RowBlock& block : weight.blocks) {
      const void* device = put(block.data, block.rows * width);
      if (first == nullptr) first = device;
    }
    const float* bias = nullptr;  // either every block has one or none
    if (weight.blocks[0].bias != nullptr) {
      align();
      for (const RowBlock& block : weight.blocks) {
        const void* device = put(block.bias, block.rows * std::int64_t{sizeof(float)});
        if (bias == nullptr) bias = static_cast<const float*>(device);
      }
    }
    weight.blocks = {};
    weight.blocks[0] = {.data = first, .rows = outputs, .bias = bias};
  }

 private:
  std::byte* base_;
  std::size_t size_ = 0;
  std::vector<cuda::Upload> uploads_;
};

// The weights with every pointer moved to where `layout` puts it.
Weights placed(const Weights& host, const ModelConfig& config, Layout& layout) {
  Weights weights{.compute = host.compute,
                  .embedding = host.embedding,
                  .layers = host.layers,
                  .final_norm = host.final_norm,
                  .inverse_frequencies = host.inverse_frequencies,
                  .lm_head = host.lm_head,
                  .copies = {}};
  const bool tied = host.lm_head.blocks[0].data == host.embedding.data;
  layout.align();
  weights.embedding.data =
      layout.put(host.embedding.data, host.embedding.rows * host.embedding.cols *
                                          static_cast<std::int64_t>(size_of(host.embedding.dtype)));
  for (LayerWeights& layer : weights.layers) {
    layout.place(layer.input_norm, config.hidden_size);
    layout.place(layer.qkv);
    layout.place(layer.q_norm, config.head_dim);
    layout.place(layer.k_norm, config.head_dim);
    layout.place(layer.attention_output);
    layout.place(layer.post_attention_norm, config.hidden_size);
    layout.place(layer.gate_up);
    layout.place(layer.down);
  }
  layout.place(weights.final_norm, config.hidden_size);
  const float* frequencies = host.inverse_frequencies.data();
  layout.place(frequencies, std::ssize(host.inverse_frequencies));
  weights.inverse_frequencies = {frequencies, host.inverse_frequencies.size()};
  if (tied) {
    weights.lm_head.blocks[0].data = weights.embedding.data;
  } else {
    layout.place(weights.lm_head);
  }
  return weights;
}

}  // namespace

Weights upload_weights(const CudaContext& ctx, const Weights& host, const ModelConfig& config) {
  Layout measured;
  placed(host, config, measured);
  Memory memory = ctx.allocate(measured.size(), "the weights");
  Layout layout(static_cast<std::byte*>(memory.get()));
  Weights weights = placed(host, config, layout);
  weights.copied_bytes = measured.size();
  weights.copies.push_back(std::move(memory));
  constexpr int kThreads = 8;
  cuda::upload(ctx, layout.uploads(), kThreads);
  return weights;
}

}  // namespace tinyvllm
