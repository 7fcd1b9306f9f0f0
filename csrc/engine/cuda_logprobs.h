// Logprobs of tokens on their way from the device: a place there, and one on the host for each step
// in flight.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/context.h"
#include "cuda/memory.h"
#include "cuda/step_inputs.h"
#include "engine/sampler.h"
#include "ops/sample.h"

namespace tinyvllm {

class LogprobBuffers {
 public:
  // Grows to at least so many rows; what steps in flight have left on the host stays.
  void make_room(const CudaContext& ctx, std::int64_t rows);

  // Where the kernels write the logprobs of the rows from `first` on.
  LogprobOutputs on_device(std::int64_t first = 0) const;

  // Queues the copy to the host, for the step of this number.
  void fetch(const CudaContext& ctx, std::size_t step) const;

  // What a step that has ended left there: a row's logprobs, with the best k.
  TokenLogprobs read(std::size_t step, std::int64_t row, std::int32_t k) const;

 private:
  std::int64_t rows_ = 0;
  cuda::DeviceMemory device_;
  std::array<cuda::PinnedMemory, kStepsInFlight> host_;
};

}  // namespace tinyvllm
