#include "engine/cpu_runner.h"

#include <algorithm>
#include <utility>

#include "base/host.h"
#include "model/repacked_weights.h"
#include "ops/paged_attention.h"

namespace tinyvllm {

namespace {

Weights weights_for(const CpuContext& ctx, const Checkpoint& checkpoint, DType compute,
                    bool repack) {
  const ModelConfig& config = checkpoint.config();
  check_attention(ctx, config.num_heads, config.num_kv_heads);
  Weights weights = load_weights(ctx, checkpoint, compute);
  if (repack) return repack_weights(ctx, checkpoint, std::move(weights));
  populate_weights(ctx, checkpoint, weights);
  return weights;
}

}  // namespace

CpuRunner::CpuRunner(const Checkpoint& checkpoint, DType compute, bool repack, int num_threads,
                     const BatchLimits& batch, std::vector<std::int32_t> eos_token_ids)
    : batch_(batch),
      ctx_(num_threads),
      model_(ctx_, checkpoint.config(), weights_for(ctx_, checkpoint, compute, repack),
             batch.max_tokens, batch.max_logit_rows),
      sampler_(std::move(eos_token_ids)),
      sampler_workspaces_(static_cast<std::size_t>(ctx_.num_threads())) {}

RunnerInfo CpuRunner::info() const {
  return {.device = "cpu",
          .isa = ctx_.kernels().isa,
          .num_threads = ctx_.num_threads(),
          .compute = model_.weights().compute,
          .copied_weight_bytes = model_.weights().copied_bytes};
}

MemoryUse CpuRunner::memory_use() const {
  const DType compute = model_.weights().compute;
  return {.workspace =
              model_.activation_bytes() + cpu_step_bytes(ctx_, batch_, model_.config(), compute),
          .free = available_memory()};
}

std::int64_t CpuRunner::kv_cache_budget() const { return host_kv_cache_budget(available_memory()); }

void CpuRunner::make_kv_cache(const KvShape& shape) {
  kv_cache_.emplace(tinyvllm::make_kv_cache(ctx_, shape));
}

void CpuRunner::launch(const StepPlan& plan) {
  copy_blocks(ctx_, *kv_cache_, plan.copies);
  draw(plan.draws, forward(plan));
  result_.prompt_logprobs.clear();
  for (std::size_t first = 0; first < plan.prompt_rows.size(); first += kPromptLogprobRows) {
    const std::span<const PromptRow> rest = std::span(plan.prompt_rows).subspan(first);
    find_prompt_logprobs(rest.first(std::min<std::size_t>(rest.size(), kPromptLogprobRows)));
  }
}

// The hidden states of the rows that are drawn from. Forks draw from the row of the sequence that
// stands for them: only their sample numbers differ.
TensorView CpuRunner::forward(const StepPlan& plan) {
  tokens_.clear();
  positions_.clear();
  slots_.clear();
  sequences_.clear();
  const std::int64_t block_size = kv_cache_->shape().block_size;
  for (const auto& [sequence, num_tokens] : plan.sequences) {
    const auto first = static_cast<std::int64_t>(sequence->num_computed_tokens);
    sequences_.push_back({.first_token = std::ssize(tokens_),
                          .num_tokens = num_tokens,
                          .first_position = first,
                          .block_table = sequence->block_table.data()});
    for (std::int64_t position = first; position < first + num_tokens; ++position) {
      tokens_.push_back(sequence->tokens[static_cast<std::size_t>(position)]);
      positions_.push_back(static_cast<std::int32_t>(position));
      slots_.push_back(sequence->slot(position, block_size));
    }
  }
  rows_.clear();
  for (const Draw& draw : plan.draws) {
    if (rows_.empty() || rows_.back() != draw.row) rows_.push_back(draw.row);
  }
  const Batch<std::span<const BatchSequence>> batch{tokens_, positions_, slots_, sequences_};
  if (plan.only_draws()) return model_.forward(batch, *kv_cache_, rows_);
  model_.forward(batch, *kv_cache_);
  return model_.hidden_states(rows_);
}

// A row that cannot be sampled is an error of its own draws and of no others.
void CpuRunner::draw(const std::vector<Draw>& draws, TensorView hidden) {
  result_.samples.resize(draws.size());
  result_.errors.assign(draws.size(), nullptr);
  if (draws.empty()) return;
  const auto draw_each = [&](auto&& sample) {
    ctx_.parallel_for(std::ssize(draws), [&](std::int64_t i, int worker) {
      const auto index = static_cast<std::size_t>(i);
      const Draw& draw = draws[index];
      const auto row = std::lower_bound(rows_.begin(), rows_.end(), draw.row) - rows_.begin();
      try {
        result_.samples[index] = sample(draw, row, static_cast<std::size_t>(worker));
      } catch (...) {
        result_.errors[index] = std::current_exception();
      }
    });
  };
  if (std::ranges::all_of(draws, Sampler::takes_largest,
                          [](const Draw& draw) -> const Sequence& { return *draw.sequence; })) {
    largest_.resize(rows_.size());
    model_.largest_logits(hidden, largest_);
    draw_each([&](const Draw& draw, std::ptrdiff_t row, std::size_t) {
      return Sampler::largest(*draw.sequence, largest_[static_cast<std::size_t>(row)]);
    });
    return;
  }
  const TensorView logits = model_.logits(hidden);
  const TensorView maxima = model_.logit_maxima(logits.rows);
  draw_each([&](const Draw& draw, std::ptrdiff_t row, std::size_t worker) {
    return sampler_.sample(*draw.sequence, draw.sample,
                           {{logits.row<float>(row), static_cast<std::size_t>(logits.cols)},
                            {maxima.row<float>(row), static_cast<std::size_t>(maxima.cols)}},
                           sampler_workspaces_[worker]);
  });
}

void CpuRunner::find_prompt_logprobs(std::span<const PromptRow> rows) {
  rows_.clear();
  for (const PromptRow& row : rows) rows_.push_back(row.row);
  const MutTensorView logits = model_.logits(model_.hidden_states(rows_));
  const std::size_t first = result_.prompt_logprobs.size();
  result_.prompt_logprobs.resize(first + rows.size());
  ctx_.parallel_for(std::ssize(rows), [&](std::int64_t i, int) {
    const PromptRow& row = rows[static_cast<std::size_t>(i)];
    result_.prompt_logprobs[first + static_cast<std::size_t>(i)] = top_logprobs(
        {logits.row<float>(i), static_cast<std::size_t>(logits.cols)}, row.token, row.k);
  });
}

void CpuRunner::copy_logits(std::span<const std::int32_t> rows, float* out) {
  for (std::size_t first = 0; first < rows.size(); first += kPromptLogprobRows) {
    const auto piece =
        rows.subspan(first, std::min<std::size_t>(rows.size() - first, kPromptLogprobRows));
    const MutTensorView logits = model_.logits(model_.hidden_states(piece));
    out = std::copy_n(logits.row<float>(0), logits.rows * logits.cols, out);
  }
}

}  // namespace tinyvllm
