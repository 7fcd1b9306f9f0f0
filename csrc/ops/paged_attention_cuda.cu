#include <algorithm>
#include <cstdint>
#include <string>

#include "base/errors.h"
#include "cuda/launch.h"
#include "ops/cuda/attention_decode.h"
#include "ops/cuda/attention_plain.h"
#include "ops/cuda/attention_prefill.h"
#include "ops/paged_attention.h"

namespace tinyvllm {
namespace {

template <int kDim>
void attend_on_tensor_cores(const CudaContext& ctx,
                            const cuda::AttentionArguments<BFloat16>& arguments) {
  const CudaSequences& sequences = arguments.sequences;
  const int group = arguments.num_heads / arguments.num_kv_heads;
  if (sequences.num_decodes > 0) {
    const int head_tiles = (group + cuda::kDecodeHeads - 1) / cuda::kDecodeHeads;
    const int shares = arguments.num_kv_heads * head_tiles;
    if (static_cast<std::size_t>(sequences.num_decodes * shares) > CudaContext::kNumCounters) {
      throw Error("paged_attention: " + std::to_string(sequences.num_decodes) + " decodes of " +
                  std::to_string(arguments.num_kv_heads) + " KV heads need more than " +
                  std::to_string(CudaContext::kNumCounters) + " counters. Lower max_num_seqs.");
    }
    // Enough blocks for one split of each sequence; where fewer sequences have more splits, as many
    // as the GPU takes at once.
    const int blocks = std::max(sequences.num_decodes * shares, 2 * ctx.num_multiprocessors());
    cuda::launch(ctx, "decode_attention",
                 {.grid = dim3(static_cast<unsigned>(blocks)),
                  .block = cuda::kDecodeThreads,
                  .shared_bytes = cuda::decode_shared_bytes(group, kDim),
                  .overlaps_previous = true},
                 cuda::decode_attention_kernel<kDim>, arguments,
                 sequences.split > 0 ? sequences.split
                                     : static_cast<int>(decode_split(sequences.num_decodes,
                                                                     arguments.num_kv_heads)),
                 reinterpret_cast<float*>(ctx.workspace(paged_attention_workspace_bytes(
                     sequences.max_decode_items, arguments.num_heads, kDim))),
                 ctx.counters());
  }
  if (sequences.num_chunk_tiles > 0) {
    using Shape = cuda::PrefillShape<kDim>;
    cuda::launch(ctx, "prefill_attention",
                 {.grid = dim3(static_cast<unsigned>(arguments.num_kv_heads),
                               static_cast<unsigned>(sequences.num_chunk_tiles)),
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

template <typename T>
cuda::AttentionArguments<T> arguments_of(TensorView q, const KvLayer& kv,
                                         const CudaSequences& sequences, std::int64_t num_heads,
                                         std::int64_t window, float scale, MutTensorView out) {
  return {.q = static_cast<const T*>(q.data),
          .q_stride = q.row_stride,
          .keys = static_cast<const T*>(kv.keys),
          .values = static_cast<const T*>(kv.values),
          .out = static_cast<T*>(out.data),
          .out_stride = out.row_stride,
          .block_stride = kv.shape.block_stride(),
          .num_heads = static_cast<int>(num_heads),
          .num_kv_heads = static_cast<int>(kv.shape.num_kv_heads),
          .head_dim = static_cast<int>(kv.shape.head_dim),
          .block_size = static_cast<int>(kv.shape.block_size),
          .window = static_cast<int>(window),
          .scale = scale,
          .sequences = sequences};
}

bool is_aligned(const void* data, std::int64_t row_stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && row_stride % 8 == 0;
}

}  // namespace

std::size_t paged_attention_workspace_bytes(std::int64_t max_decode_items, std::int64_t num_heads,
                                            std::int64_t head_dim) {
  return sizeof(float) * static_cast<std::size_t>(max_decode_items) *
         cuda::partial_floats(static_cast<int>(num_heads), static_cast<int>(head_dim));
}

void paged_attention(const CudaContext& ctx, TensorView q, const KvLayer& kv,
                     const CudaSequences& sequences, std::int64_t num_heads, std::int64_t window,
                     float scale, MutTensorView out) {
  if (kv.shape.dtype == DType::kFloat32) {
    attend_plainly(ctx, arguments_of<float>(q, kv, sequences, num_heads, window, scale, out));
    return;
  }
  const auto arguments = arguments_of<BFloat16>(q, kv, sequences, num_heads, window, scale, out);
  const bool fast = kv.shape.block_size % cuda::kDecodeTile == 0 &&
                    num_heads / kv.shape.num_kv_heads <= cuda::kPrefillRows &&
                    is_aligned(q.data, q.row_stride) && is_aligned(out.data, out.row_stride) &&
                    is_aligned(kv.keys, 0) && is_aligned(kv.values, 0);
  switch (fast ? kv.shape.head_dim : 0) {
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
