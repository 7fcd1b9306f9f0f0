#include <algorithm>
#include <string>

#include "base/errors.h"
#include "cuda/launch.h"
#include "ops/cuda/sample_kernels.h"
#include "ops/sample.h"

namespace tinyvllm {
namespace {

// The workspace: candidates [num_rows, kMaxParts], then cuts [num_rows].
static_assert(sample_workspace_bytes(1) ==
              cuda::kMaxParts * sizeof(cuda::Candidate) + sizeof(cuda::Cut));

dim3 blocks_for(std::int32_t count) { return dim3(static_cast<unsigned>((count + 255) / 256)); }

}  // namespace

void sample(const CudaContext& ctx, MutTensorView logits, const SampleBatch& batch,
            const SampleOutputs& outputs) {
  const std::int32_t num_rows = batch.num_rows;
  if (num_rows == 0) return;
  if (static_cast<std::size_t>(num_rows) > CudaContext::kNumCounters) {
    throw Error("sample: " + std::to_string(num_rows) + " rows need more than " +
                std::to_string(CudaContext::kNumCounters) + " counters. Lower max_num_seqs.");
  }
  auto* data = static_cast<float*>(logits.data);
  const auto vocab = static_cast<int>(logits.cols);
  auto* parts = reinterpret_cast<cuda::Candidate*>(ctx.workspace(sample_workspace_bytes(num_rows)));
  auto* cuts = reinterpret_cast<cuda::Cut*>(parts + num_rows * cuda::kMaxParts);
  const auto grid_rows = static_cast<unsigned>(num_rows);

  if (batch.num_edits > 0) {
    cuda::launch(ctx, "edit_logits",
                 {.grid = blocks_for(batch.num_edits), .block = 256, .overlaps_previous = true},
                 cuda::edit_logits_kernel, data, logits.row_stride, batch.edits, batch.num_edits);
  }
  if (batch.any_filter) {
    cuda::launch(ctx, "filter",
                 {.grid = grid_rows,
                  .block = cuda::kRowThreads,
                  .shared_bytes = sizeof(cuda::SelectMemory),
                  .overlaps_previous = true},
                 cuda::filter_kernel, data, logits.row_stride, vocab, batch.rows, cuts);
  }
  // Blocks enough to fill the GPU, of at least 2,048 tokens; a multiple of 4 shares its noise.
  const int wanted = std::max(1, 8 * ctx.num_multiprocessors() / num_rows);
  const int num_parts = std::clamp((vocab + 2047) / 2048, 1, std::min(wanted, cuda::kMaxParts));
  const int part_size = ((vocab + num_parts - 1) / num_parts + 3) / 4 * 4;
  cuda::launch(ctx, "draw",
               {.grid = dim3(static_cast<unsigned>(num_parts), grid_rows),
                .block = cuda::kDrawThreads,
                .shared_bytes = cuda::kDrawWarps * sizeof(cuda::Candidate),
                .overlaps_previous = true},
               cuda::draw_kernel, data, logits.row_stride, vocab, part_size, batch.rows, cuts,
               parts, ctx.counters(), outputs.tokens, outputs.errors);
  if (batch.num_edits > 0) {
    cuda::launch(ctx, "restore_logits",
                 {.grid = blocks_for(batch.num_edits), .block = 256, .overlaps_previous = true},
                 cuda::restore_logits_kernel, data, logits.row_stride, batch.edits,
                 batch.num_edits);
  }
  if (batch.any_logprobs) {
    cuda::launch(ctx, "logprobs",
                 {.grid = grid_rows,
                  .block = cuda::kRowThreads,
                  .shared_bytes = sizeof(cuda::SelectMemory),
                  .overlaps_previous = true},
                 cuda::logprobs_kernel, data, logits.row_stride, vocab, batch.rows, outputs.tokens,
                 0, outputs.logprobs);
  }
}

void logprobs(const CudaContext& ctx, TensorView logits, const std::int32_t* tokens,
              std::int32_t num_logprobs, const LogprobOutputs& outputs) {
  if (logits.rows == 0) return;
  cuda::launch(ctx, "logprobs",
               {.grid = static_cast<unsigned>(logits.rows),
                .block = cuda::kRowThreads,
                .shared_bytes = sizeof(cuda::SelectMemory),
                .overlaps_previous = true},
               cuda::logprobs_kernel, static_cast<const float*>(logits.data), logits.row_stride,
               static_cast<int>(logits.cols), nullptr, tokens, num_logprobs, outputs);
}

void feed_tokens(const CudaContext& ctx, const std::int32_t* sampled, const std::int32_t* sources,
                 std::int32_t count, std::int32_t* tokens) {
  cuda::launch(ctx, "feed_tokens", {.grid = blocks_for(count), .block = 256},
               cuda::feed_tokens_kernel, sampled, sources, count, tokens);
}

}  // namespace tinyvllm
