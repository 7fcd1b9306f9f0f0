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
  if (arguments.head_dim > cuda::kPlainMaxDim) {
    throw Error("paged_attention: head_dim is " + std::to_string(arguments.head_dim) +
                "; on CUDA it is at most " + std::to_string(cuda::kPlainMaxDim) +
                ". Try the device cpu.");
  }
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
  switch (cuda::for_tensor_cores(q, kv, num_heads, out) ? kv.shape.head_dim : 0) {
    case 64:
      return attend_on_tensor_cores<64>(ctx, arguments);
    case 80:
      return attend_on_tensor_cores<80>(ctx, arguments);
    case 96:
      return attend_on_tensor_cores<96>(ctx, arguments);
    case 128:
      return attend_on_tensor_cores<128>(ctx, arguments);
    default:
      return attend_plainly(ctx, arguments);
  }
}

}  // namespace tinyvllm
