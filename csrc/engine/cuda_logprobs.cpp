#include "engine/cuda_logprobs.h"

#include <algorithm>
#include <utility>

namespace tinyvllm {
namespace {

// Where the logprobs of `rows` tokens lie behind `base`, on the device or on the host, from row
// `first` on.
LogprobOutputs logprobs_at(std::byte* base, std::int64_t rows, std::int64_t first = 0) {
  auto* words = reinterpret_cast<std::int32_t*>(base);
  const std::int64_t first_best = first * kMaxLogprobs;
  return {.chosen = reinterpret_cast<float*>(words) + first,
          .ranks = words + rows + first,
          .top_tokens = words + 2 * rows + first_best,
          .top_logprobs = reinterpret_cast<float*>(words + (2 + kMaxLogprobs) * rows) + first_best};
}

constexpr std::size_t logprob_bytes(std::int64_t rows) {
  return static_cast<std::size_t>(rows) * (2 + 2 * kMaxLogprobs) * sizeof(std::int32_t);
}

}  // namespace

void LogprobBuffers::make_room(const CudaContext& ctx, std::int64_t rows) {
  if (rows <= rows_) return;
  ctx.synchronize();
  const std::array<cuda::PinnedMemory, kStepsInFlight> old = std::move(host_);
  const std::int64_t old_rows = std::exchange(rows_, rows);
  device_ = cuda::DeviceMemory(logprob_bytes(rows), "logprobs");
  cuda::fill_bytes(ctx, device_.data(), 0, device_.size());  // all of it is fetched, used or not
  for (std::size_t i = 0; i < kStepsInFlight; ++i) {
    host_[i] = cuda::PinnedMemory(logprob_bytes(rows), "logprobs");
    const LogprobOutputs from = logprobs_at(old[i].data(), old_rows);
    const LogprobOutputs to = logprobs_at(host_[i].data(), rows);
    std::copy_n(from.chosen, old_rows, to.chosen);
    std::copy_n(from.ranks, old_rows, to.ranks);
    std::copy_n(from.top_tokens, old_rows * kMaxLogprobs, to.top_tokens);
    std::copy_n(from.top_logprobs, old_rows * kMaxLogprobs, to.top_logprobs);
  }
}

LogprobOutputs LogprobBuffers::on_device(std::int64_t first) const {
  return logprobs_at(device_.data(), rows_, first);
}

void LogprobBuffers::fetch(const CudaContext& ctx, std::size_t step) const {
  cuda::copy_to_host(ctx, host_[step % kStepsInFlight].data(), device_.data(), device_.size());
}

TokenLogprobs LogprobBuffers::read(std::size_t step, std::int64_t row, std::int32_t k) const {
  const LogprobOutputs at = logprobs_at(host_[step % kStepsInFlight].data(), rows_, row);
  return {.chosen = *at.chosen,
          .chosen_rank = *at.ranks,
          .top_ids = {at.top_tokens, at.top_tokens + k},
          .top_logprobs = {at.top_logprobs, at.top_logprobs + k}};
}

}  // namespace tinyvllm
