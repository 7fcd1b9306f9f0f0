#include "ops/cuda/attention_launch.h"
#include "ops/rope.h"
#include "ops/rope_and_attend.h"

namespace tinyvllm {
namespace {

// The head_dims whose decodes are rotated by the kernel that attends.
template <typename F>
bool with_rotating_dim(std::int64_t head_dim, F&& f) {
  return cuda::with_dim<64, 128>(head_dim, f);
}

template <typename View>
View rows_from(View view, std::int64_t first) {
  const auto bytes = first * view.row_stride * static_cast<std::int64_t>(size_of(view.dtype));
  using Byte = std::conditional_t<std::is_same_v<View, TensorView>, const std::byte, std::byte>;
  view.data = static_cast<Byte*>(view.data) + bytes;
  view.rows -= first;
  return view;
}

// The chunks of a batch, as a batch of their own.
CudaSequences without_decodes(CudaSequences sequences) {
  const std::int64_t first = sequences.num_decodes;
  sequences.context_lengths += first;
  sequences.block_tables += first * sequences.max_blocks;
  sequences.num_decodes = 0;
  return sequences;
}

}  // namespace

void rope_and_attend(const CudaContext& ctx, MutTensorView qkv, std::int64_t num_heads,
                     const float* q_norm, const float* k_norm, float eps, TensorView cos_sin,
                     std::span<const std::int64_t> slots, const KvLayer& cache,
                     const CudaSequences& sequences, std::int64_t window, float scale,
                     MutTensorView out) {
  const std::int64_t head_dim = cache.shape.head_dim;
  const bool fused = sequences.num_decodes > 0 && with_rotating_dim(head_dim, [](auto) {}) &&
                     cuda::for_tensor_cores(qkv, cache, num_heads, out) &&
                     cuda::is_aligned(cos_sin.data, 2 * cos_sin.row_stride) &&
                     cuda::is_aligned(q_norm, 0) && cuda::is_aligned(k_norm, 0);
  const std::int64_t num_fused = fused ? sequences.num_decodes : 0;
  if (num_fused < qkv.rows) {
    qk_norm_rope_and_cache(ctx, rows_from(qkv, num_fused), num_heads, q_norm, k_norm, eps,
                           rows_from(cos_sin, num_fused),
                           slots.subspan(static_cast<std::size_t>(num_fused)), cache);
  }
  if (!fused) {
    paged_attention(ctx, qkv, cache, sequences, num_heads, window, scale, out);
    return;
  }
  const auto arguments =
      cuda::attention_arguments<BFloat16>(qkv, cache, sequences, num_heads, window, scale, out);
  const cuda::RopeArguments rope{.q_norm = q_norm,
                                 .k_norm = k_norm,
                                 .eps = eps,
                                 .cos_sin = static_cast<const float*>(cos_sin.data),
                                 .stride = cos_sin.row_stride};
  with_rotating_dim(head_dim,
                    [&](auto dim) { cuda::attend_decodes<dim(), true>(ctx, arguments, rope); });
  if (sequences.num_chunk_tiles > 0) {
    paged_attention(ctx, rows_from(TensorView(qkv), num_fused), cache, without_decodes(sequences),
                    num_heads, window, scale, rows_from(out, num_fused));
  }
}

}  // namespace tinyvllm
