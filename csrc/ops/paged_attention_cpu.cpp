#include <algorithm>
#include <string>
#include <vector>

#include "base/errors.h"
#include "ops/paged_attention.h"

namespace tinyvllm {
namespace {

template <typename Kv>
void attend(const CpuContext& ctx, TensorView q, const KvLayer& kv,
            std::span<const BatchSequence> sequences, std::int64_t num_heads, std::int64_t window,
            float scale, MutTensorView out, void (*kernel)(const AttentionShare<Kv>&)) {
  const KvShape& shape = kv.shape;
  const std::int64_t group = num_heads / shape.num_kv_heads, width = group * shape.head_dim;
  std::vector<float> buffers(static_cast<std::size_t>(2 * width * ctx.num_threads()));

  // One share: the query heads of one KV head at one token. Later tokens cost more, so they go
  // first.
  ctx.parallel_for(q.rows * shape.num_kv_heads, [&](std::int64_t index, int worker) {
    const std::int64_t t = q.rows - 1 - index / shape.num_kv_heads;
    const std::int64_t kv_head = index % shape.num_kv_heads;
    const auto sequence = std::upper_bound(sequences.begin(), sequences.end(), t,
                                           [](std::int64_t token, const BatchSequence& s) {
                                             return token < s.first_token;
                                           }) -
                          1;
    const std::int64_t position = sequence->first_position + t - sequence->first_token;
    const std::int64_t head_offset = kv_head * shape.block_size * shape.head_dim;
    float* scratch = buffers.data() + 2 * width * worker;
    float* result =
        out.dtype == DType::kFloat32 ? out.row<float>(t) + kv_head * width : scratch + width;
    kernel({.query = q.row<float>(t) + kv_head * width,
            .keys = static_cast<const Kv*>(kv.keys) + head_offset,
            .values = static_cast<const Kv*>(kv.values) + head_offset,
            .block_stride = shape.block_stride(),
            .block_table = sequence->block_table,
            .block_size = shape.block_size,
            .head_dim = shape.head_dim,
            .group = group,
            .first = window > 0 ? std::max<std::int64_t>(0, position - window + 1) : 0,
            .last = position,
            .scale = scale,
            .scratch = scratch,
            .out = result});
    if (out.dtype == DType::kBFloat16) {
      ctx.kernels().to_bfloat16(result, width, out.row<BFloat16>(t) + kv_head * width);
    }
  });
}

}  // namespace

void paged_attention(const CpuContext& ctx, TensorView q, const KvLayer& kv,
                     std::span<const BatchSequence> sequences, std::int64_t num_heads,
                     std::int64_t window, float scale, MutTensorView out) {
  if (num_heads / kv.shape.num_kv_heads > kMaxGroup) {
    throw Error("paged_attention: " + std::to_string(num_heads) + " query heads over " +
                std::to_string(kv.shape.num_kv_heads) + " KV heads; at most " +
                std::to_string(kMaxGroup) + " may share one.");
  }
  if (kv.shape.dtype == DType::kBFloat16) {
    attend<BFloat16>(ctx, q, kv, sequences, num_heads, window, scale, out,
                     ctx.kernels().attention_bf16);
  } else {
    attend<float>(ctx, q, kv, sequences, num_heads, window, scale, out,
                  ctx.kernels().attention_f32);
  }
}

}  // namespace tinyvllm
