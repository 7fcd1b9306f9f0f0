// The sampling of ops/sample.h on NumPy arrays, for tests: requests are described as for the
// Sampler.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"

#if defined(TINYVLLM_HAS_CUDA)
#include <algorithm>
#include <deque>
#include <optional>
#include <tuple>
#include <vector>

#include "base/errors.h"
#include "bindings/operands.h"
#include "engine/sample_rows.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace tinyvllm {
namespace {

// Row of logits, params, prompt, output, seed, sample index; None: a padded row.
using Described = std::optional<std::tuple<std::int32_t, SamplingParams, std::vector<std::int32_t>,
                                           std::vector<std::int32_t>, std::uint64_t, std::int32_t>>;

template <typename T>
MutTensorView view_of(std::vector<T>& values) {
  static_assert(sizeof(T) == 4);
  const std::int64_t size = std::ssize(values);
  return {values.data(), DType::kFloat32, 1, size, size};
}

MutTensorView view_of(const py::array_t<float>& logits) {
  if (logits.ndim() != 2 || logits.strides(1) != py::ssize_t{sizeof(float)}) {
    throw InvalidRequestError("logits is not a matrix with contiguous rows.");
  }
  return {const_cast<float*>(logits.data()), DType::kFloat32, logits.shape(0), logits.shape(1),
          logits.strides(0) / py::ssize_t{sizeof(float)}};
}

// Logprobs of `count` tokens on the host, and where they go on the device.
struct HostLogprobs {
  explicit HostLogprobs(std::int64_t count)
      : chosen(static_cast<std::size_t>(count)),
        ranks(static_cast<std::size_t>(count)),
        top_tokens(static_cast<std::size_t>(count * kMaxLogprobs)),
        top_logprobs(static_cast<std::size_t>(count * kMaxLogprobs)) {}

  LogprobOutputs on_device(Operands<CudaContext>& operands) {
    return {.chosen = static_cast<float*>(operands.write(view_of(chosen)).data),
            .ranks = static_cast<std::int32_t*>(operands.write(view_of(ranks)).data),
            .top_tokens = static_cast<std::int32_t*>(operands.write(view_of(top_tokens)).data),
            .top_logprobs = static_cast<float*>(operands.write(view_of(top_logprobs)).data)};
  }

  // (logprob of the token, its rank, best ids, their logprobs), as the Sampler's.
  py::tuple tuple(std::size_t index, std::int32_t k) const {
    const auto first = static_cast<std::ptrdiff_t>(index * kMaxLogprobs);
    return py::make_tuple(
        chosen[index], ranks[index],
        std::vector<std::int32_t>(top_tokens.begin() + first, top_tokens.begin() + first + k),
        std::vector<float>(top_logprobs.begin() + first, top_logprobs.begin() + first + k));
  }

  std::vector<float> chosen;
  std::vector<std::int32_t> ranks, top_tokens;
  std::vector<float> top_logprobs;
};

py::list cuda_sample(const CudaContext& ctx, const py::array_t<float>& logits,
                     const std::vector<Described>& rows,
                     const std::vector<std::int32_t>& eos_token_ids) {
  const MutTensorView host_logits = view_of(logits);
  std::deque<Request> requests;
  std::vector<SampleRow> sample_rows;
  std::vector<LogitEdit> edits;
  std::vector<bool> edited(static_cast<std::size_t>(host_logits.rows));
  SampleBatch batch;
  for (const Described& row : rows) {
    if (!row) {
      sample_rows.push_back({});
      continue;
    }
    const auto& [logits_row, params, prompt, output, seed, sample_index] = *row;
    if (logits_row < 0 || logits_row >= host_logits.rows) {
      throw InvalidRequestError("cuda_sample: a row of logits is outside.");
    }
    params.validate_for(host_logits.cols);
    Request& request = requests.emplace_back();
    request.params = params;
    request.seed = seed;
    request.num_prompt_tokens = prompt.size();
    Sequence sequence(request, prompt);
    sequence.tokens.insert(sequence.tokens.end(), output.begin(), output.end());
    for (const std::int32_t token : output) ++sequence.output_counts[token];
    sample_rows.push_back(sample_row(sequence, sample_index, logits_row));
    batch.any_filter = batch.any_filter || sample_rows.back().has_filter();
    batch.any_logprobs = batch.any_logprobs || params.logprobs.has_value();
    if (!edited[static_cast<std::size_t>(logits_row)]) {  // a row has its edits once
      append_logit_edits(sequence, eos_token_ids, logits_row, edits);
      edited[static_cast<std::size_t>(logits_row)] = true;
    }
  }

  std::vector<std::int32_t> tokens(rows.size(), -1), errors(rows.size(), -1);
  HostLogprobs logprobs(std::ssize(rows));
  Operands<CudaContext> operands(ctx);
  batch.rows = operands.read(std::span<const SampleRow>(sample_rows)).data();
  batch.num_rows = static_cast<std::int32_t>(sample_rows.size());
  batch.edits = const_cast<LogitEdit*>(operands.read(std::span<const LogitEdit>(edits)).data());
  batch.num_edits = static_cast<std::int32_t>(edits.size());
  const SampleOutputs outputs{
      .tokens = static_cast<std::int32_t*>(operands.write(view_of(tokens)).data),
      .errors = static_cast<SampleError*>(operands.write(view_of(errors)).data),
      .logprobs = logprobs.on_device(operands)};
  sample(ctx, operands.write(host_logits), batch, outputs);
  operands.finish();

  py::list results;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const bool wanted = rows[i] && sample_rows[i].num_logprobs >= 0;
    const auto k = static_cast<std::int32_t>(
        std::min<std::int64_t>(sample_rows[i].num_logprobs, host_logits.cols));
    results.append(py::make_tuple(tokens[i], errors[i],
                                  wanted ? py::object(logprobs.tuple(i, k)) : py::none()));
  }
  return results;
}

py::list cuda_logprobs(const CudaContext& ctx, const py::array_t<float>& logits,
                       std::vector<std::int32_t> tokens, std::int32_t k) {
  const MutTensorView host_logits = view_of(logits);
  if (std::ssize(tokens) != host_logits.rows) {
    throw InvalidRequestError("cuda_logprobs: give a token for each row of logits.");
  }
  HostLogprobs results(std::ssize(tokens));
  Operands<CudaContext> operands(ctx);
  const auto* device_tokens = operands.read(std::span<const std::int32_t>(tokens)).data();
  logprobs(ctx, operands.read(TensorView(host_logits)), device_tokens, k,
           results.on_device(operands));
  operands.finish();
  py::list list;
  const auto there = static_cast<std::int32_t>(std::min<std::int64_t>(k, host_logits.cols));
  for (std::size_t i = 0; i < tokens.size(); ++i) list.append(results.tuple(i, there));
  return list;
}

std::vector<std::int32_t> cuda_feed_tokens(const CudaContext& ctx,
                                           const std::vector<std::int32_t>& sampled,
                                           const std::vector<std::int32_t>& sources,
                                           std::vector<std::int32_t> tokens) {
  Operands<CudaContext> operands(ctx);
  feed_tokens(ctx, operands.read(std::span<const std::int32_t>(sampled)).data(),
              operands.read(std::span<const std::int32_t>(sources)).data(),
              static_cast<std::int32_t>(sources.size()),
              static_cast<std::int32_t*>(operands.write(view_of(tokens)).data));
  operands.finish();
  return tokens;
}

}  // namespace

void bind_cuda_sampling(py::module_& module) {
  module.def("cuda_sample", &cuda_sample, "ctx"_a, "logits"_a, "rows"_a, "eos_token_ids"_a,
             "(token, error, logprobs or None) of each row; logits may change and change back.");
  module.def("cuda_logprobs", &cuda_logprobs, "ctx"_a, "logits"_a, "tokens"_a, "k"_a);
  module.def("cuda_feed_tokens", &cuda_feed_tokens, "ctx"_a, "sampled"_a, "sources"_a, "tokens"_a);
}

}  // namespace tinyvllm

#else

namespace tinyvllm {

void bind_cuda_sampling(pybind11::module_& /*module*/) {}

}  // namespace tinyvllm

#endif
