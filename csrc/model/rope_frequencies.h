// The frequencies that rotary position embedding turns with, for every rope type that we support.
#pragma once

#include <vector>

#include "checkpoint/model_config.h"

namespace tinyvllm {

// [head_dim / 2] float32. Element i turns by inv_freq[i] radians a token; the plain ones are
// theta^(-2i / head_dim) (Su et al. 2021).
//
//   linear  all divided by factor (Chen et al. 2023, position interpolation)
//   llama3  by wavelength: long ones divided by factor, short ones kept, a linear blend between
//           (Llama 3.1)
//   yarn    by rotations within the original context: a linear ramp over i from kept to divided by
//           factor ("NTK by parts", Peng et al. 2023)
//
// Every step is rounded to float32, as in Transformers: multiplied by a position of many thousands,
// one unit in the last place of a frequency is visible in the logits, and models were trained with
// these.
std::vector<float> rope_inverse_frequencies(const RopeConfig& rope, std::int64_t head_dim);

}  // namespace tinyvllm
