#include <cstdint>
#include <string>

#include "base/errors.h"
#include "cuda/launch.h"
#include "ops/cuda/attention_launch.h"
#include "ops/cuda/attention_plain.h"
#include "ops/cuda/attention_prefill.h"
#include "ops/paged_attention.h"

namespace tinyvllm {
namespace {

// The head_dims that have kernels on the tensor cores.
template <typename F>
bool with_tensor_core_dim(std::int64_t head_dim, F&& f) {
  return cuda::with_dim<64, 80, 96, 128>(head_dim, f);
}

bool has_tensor_core_kernels(std::int64_t head_dim) {
  return with_tensor_core_dim(head_dim, [](auto) {});
}

void check_head_dim(std::int64_t head_dim) {
  if (head_dim <= cuda::kPlainMaxDim) return;
  throw UnsupportedModelError("paged_attention: head_dim is " + std::to_string(head_dim) +
                              "; on CUDA it is at most " + std::to_string(cuda::kPlainMaxDim) +
                              ". Try the device cpu.");
}

template <int kDim>
void attend_on_tensor_cores(const CudaContext& ctx,
                            const cuda::AttentionArguments<BFloat16>& arguments) {
  if (arguments.sequences.num_decodes > 0) {
    cuda::attend_decodes<kDim, false>(ctx, arguments, {});
  }
  if (arguments.sequences.num_chunk_tiles > 0) {
    using Shape = cuda::PrefillShape<kDim>;
    cuda::launch(ctx, "prefill_attention",
                 {.grid = dim3(static_cast<unsigned>(arguments.num_kv_heads),
                               static_cast<unsigned>(arguments.sequences.num_chunk_tiles)),
                  .block = Shape::kThreads,
                  .shared_bytes = Shape::kSharedBytes,
                  .overlaps_previous = true},
                 cuda::prefill_attention_kernel<kDim>, arguments);
  }
}

template <typename T>
void attend_plainly(const CudaContext& ctx, const cuda::AttentionArguments<T>& arguments) {
  const CudaSequences& sequences = arguments.sequences;
  const auto tile_tokens =
      static_cast<int>(chunk_tile_tokens(arguments.num_heads, arguments.num_kv_heads));
  const int rows = sequences.num_decodes + sequences.num_chunk_tiles * tile_tokens;
  if (rows == 0) return;
  check_head_dim(arguments.head_dim);
  cuda::launch(
      ctx, "plain_attention",
      {.grid = dim3(static_cast<unsigned>(rows), static_cast<unsigned>(arguments.num_heads)),
       .block = cuda::kPlainThreads,
       .shared_bytes = cuda::plain_shared_bytes(arguments.head_dim),
       .overlaps_previous = true},
      cuda::plain_attention_kernel<T>, arguments, tile_tokens);
}

}  // namespace

static_assert(paged_attention_workspace_bytes(3, 5, 80) ==
              3 * cuda::partial_floats(5, 80) * sizeof(float));

void check_attention(const CudaContext& ctx, const KvShape& kv, std::int64_t num_heads,
                     std::int64_t max_decodes, std::int64_t max_context) {
  if (!cuda::for_tensor_cores(kv, num_heads) || !has_tensor_core_kernels(kv.head_dim)) {
    check_head_dim(kv.head_dim);
    return;
  }
  if (max_decodes == 0) return;
  const auto most = static_cast<std::int64_t>(CudaContext::kNumCounters) /
                    cuda::shares_of_a_decode(num_heads, kv.num_kv_heads);
  if (max_decodes > most) {
    throw InvalidRequestError("On a GPU a step decodes at most " + std::to_string(most) +
                              " sequences of a model with " + std::to_string(kv.num_kv_heads) +
                              " KV heads, not " + std::to_string(max_decodes) +
                              ". Lower max_num_seqs.");
  }
  // A sequence alone has the shortest splits, and so the most.
  const auto group = static_cast<int>(num_heads / kv.num_kv_heads);
  const std::int64_t splits =
      cuda::max_splits_in(ctx.max_shared_bytes(), group, static_cast<int>(kv.head_dim));
  const std::int64_t positions = splits * decode_split(1, kv.num_kv_heads, 1);
  const std::int64_t longest = positions / kv.block_size * kv.block_size;
  if (max_context > longest) {
    throw InvalidRequestError(
        "max_model_len is " + std::to_string(max_context) + "; with " + std::to_string(group) +
        " query heads to a KV head, " + ctx.name() + " decodes contexts of at most " +
        std::to_string(longest) + " tokens: their parts are merged in a block's " +
        std::to_string(ctx.max_shared_bytes()) + " bytes of shared memory. Lower max_model_len.");
  }
}

void paged_attention(const CudaContext& ctx, TensorView q, const KvLayer& kv,
                     const CudaSequences& sequences, std::int64_t num_heads, std::int64_t window,
                     float scale, MutTensorView out) {
  if (kv.shape.dtype == DType::kFloat32) {
    attend_plainly(
        ctx, cuda::attention_arguments<float>(q, kv, sequences, num_heads, window, scale, out));
    return;
  }
  const auto arguments =
      cuda::attention_arguments<BFloat16>(q, kv, sequences, num_heads, window, scale, out);
  const bool attended = cuda::for_tensor_cores(q, kv, num_heads, out) &&
                        with_tensor_core_dim(kv.shape.head_dim, [&](auto dim) {
                          attend_on_tensor_cores<dim()>(ctx, arguments);
                        });
  if (!attended) attend_plainly(ctx, arguments);
}

}  // namespace tinyvllm
