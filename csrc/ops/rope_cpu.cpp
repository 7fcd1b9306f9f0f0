#include <cmath>
#include <cstring>

#include "ops/rope.h"

namespace tinyvllm {

void rope_angles(const CpuContext& ctx, std::span<const std::int32_t> positions,
                 std::span<const float> inverse_frequencies, float scale, MutTensorView cos_sin) {
  const std::size_t half = inverse_frequencies.size();
  ctx.parallel_for(static_cast<std::int64_t>(positions.size()), [&](std::int64_t t, int) {
    const auto position = static_cast<float>(positions[static_cast<std::size_t>(t)]);
    float* row = cos_sin.row<float>(t);
    for (std::size_t i = 0; i < half; ++i) {
      const float angle = position * inverse_frequencies[i];
      row[i] = std::cos(angle) * scale;
      row[half + i] = std::sin(angle) * scale;
    }
  });
}

void qk_norm_rope_and_cache(const CpuContext& ctx, MutTensorView qkv, std::int64_t num_heads,
                            const float* q_norm, const float* k_norm, float eps, TensorView cos_sin,
                            std::span<const std::int64_t> slots, const KvLayer& cache) {
  const KvShape& shape = cache.shape;
  const std::int64_t dim = shape.head_dim, num_kv_heads = shape.num_kv_heads;
  const Kernels& kernels = ctx.kernels();
  const auto write = [&](void* array, std::int64_t offset, const float* head) {
    if (shape.dtype == DType::kBFloat16) {
      kernels.to_bfloat16(head, dim, static_cast<BFloat16*>(array) + offset);
    } else {
      std::memcpy(static_cast<float*>(array) + offset, head,
                  static_cast<std::size_t>(dim) * sizeof(float));
    }
  };
  ctx.parallel_for(qkv.rows, [&](std::int64_t t, int) {
    float* row = qkv.row<float>(t);
    for (std::int64_t h = 0; h < num_heads + num_kv_heads; ++h) {
      float* head = row + h * dim;
      const float* norm = h < num_heads ? q_norm : k_norm;
      if (norm != nullptr) kernels.rms_norm_f32(head, norm, eps, dim, head);
    }
    kernels.rotate(row, num_heads + num_kv_heads, cos_sin.row<float>(t), dim);
    const std::int64_t slot = slots[static_cast<std::size_t>(t)];
    const std::int64_t block = slot / shape.block_size, in_block = slot % shape.block_size;
    for (std::int64_t h = 0; h < num_kv_heads; ++h) {
      const std::int64_t offset =
          block * shape.block_stride() + (h * shape.block_size + in_block) * dim;
      write(cache.keys, offset, row + (num_heads + h) * dim);
      write(cache.values, offset, row + (num_heads + num_kv_heads + h) * dim);
    }
  });
}

}  // namespace tinyvllm
