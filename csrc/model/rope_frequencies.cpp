#include "model/rope_frequencies.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tinyvllm {
namespace {

// Llama 3.1: how much of the plain frequency is kept, from its wavelength in tokens.
double llama3_frequency(const RopeConfig& rope, double frequency) {
  const double wavelength = 2.0 * std::numbers::pi / frequency;
  const double context = rope.original_max_position_embeddings;
  const double keep = std::clamp((context / wavelength - rope.low_freq_factor) /
                                     (rope.high_freq_factor - rope.low_freq_factor),
                                 0.0, 1.0);
  return keep * frequency + (1.0 - keep) * frequency / rope.factor;
}

// YaRN: the index i whose frequency turns `rotations` times within the original context.
double yarn_index(const RopeConfig& rope, double rotations, double head_dim) {
  return head_dim *
         std::log(rope.original_max_position_embeddings / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(rope.theta));
}

}  // namespace

std::vector<float> rope_inverse_frequencies(const RopeConfig& rope, std::int64_t head_dim) {
  const auto dim = static_cast<double>(head_dim);
  double ramp_begin = 0, ramp_end = 0;
  if (rope.type == RopeType::kYarn) {
    ramp_begin = yarn_index(rope, rope.beta_fast, dim);
    ramp_end = yarn_index(rope, rope.beta_slow, dim);
    if (rope.truncate) {
      ramp_begin = std::floor(ramp_begin);
      ramp_end = std::ceil(ramp_end);
    }
    ramp_begin = std::max(ramp_begin, 0.0);
    ramp_end = std::min(ramp_end, dim - 1.0);
    if (ramp_begin == ramp_end) ramp_end += 0.001;  // a step instead of a division by zero
  }
  std::vector<float> frequencies;
  for (std::int64_t i = 0; i < head_dim / 2; ++i) {
    double frequency = std::pow(rope.theta, -2.0 * static_cast<double>(i) / dim);
    switch (rope.type) {
      case RopeType::kDefault:
        break;
      case RopeType::kLinear:
        frequency /= rope.factor;
        break;
      case RopeType::kLlama3:
        frequency = llama3_frequency(rope, frequency);
        break;
      case RopeType::kYarn: {
        const double ramp = std::clamp(
            (static_cast<double>(i) - ramp_begin) / (ramp_end - ramp_begin), 0.0, 1.0);
        frequency = (1.0 - ramp) * frequency + ramp * frequency / rope.factor;
        break;
      }
    }
    frequencies.push_back(static_cast<float>(frequency));
  }
  return frequencies;
}

}  // namespace tinyvllm
