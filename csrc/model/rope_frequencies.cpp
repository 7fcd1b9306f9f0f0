#include "model/rope_frequencies.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tinyvllm {
namespace {

// Llama 3.1: what becomes of a plain frequency depends on its wavelength, in tokens.
float llama3_frequency(const RopeConfig& rope, float frequency) {
  const auto context = static_cast<float>(rope.original_max_position_embeddings);
  const auto factor = static_cast<float>(rope.factor);
  const auto low = static_cast<float>(rope.low_freq_factor);
  const auto high = static_cast<float>(rope.high_freq_factor);
  const float wavelength = static_cast<float>(2.0 * std::numbers::pi) / frequency;
  if (wavelength > context / low) return frequency / factor;
  if (wavelength < context / high) return frequency;
  const float keep = (context / wavelength - low) / (high - low);
  return (1.0f - keep) * frequency / factor + keep * frequency;
}

// YaRN: the part of the plain frequency that index i keeps.
class YarnRamp {
 public:
  YarnRamp(const RopeConfig& rope, double head_dim) {
    double begin = index_of(rope, rope.beta_fast, head_dim);
    double end = index_of(rope, rope.beta_slow, head_dim);
    if (rope.truncate) {
      begin = std::floor(begin);
      end = std::ceil(end);
    }
    begin = std::max(begin, 0.0);
    end = std::min(end, head_dim - 1.0);
    if (begin == end) end += 0.001;  // a step instead of a division by zero
    begin_ = static_cast<float>(begin);
    width_ = static_cast<float>(end - begin);
  }

  float keep(std::int64_t i) const {
    return 1.0f - std::clamp((static_cast<float>(i) - begin_) / width_, 0.0f, 1.0f);
  }

 private:
  // The index whose frequency turns `rotations` times within the original context.
  static double index_of(const RopeConfig& rope, double rotations, double head_dim) {
    const double context = rope.original_max_position_embeddings;
    return head_dim * std::log(context / (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(rope.theta));
  }

  float begin_ = 0, width_ = 0;
};

}  // namespace

std::vector<float> rope_inverse_frequencies(const RopeConfig& rope, std::int64_t head_dim) {
  const auto factor = static_cast<float>(rope.factor);
  std::vector<float> frequencies;
  for (std::int64_t i = 0; i < head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const auto period = static_cast<float>(std::pow(rope.theta, static_cast<double>(exponent)));
    float frequency = 1.0f / period;
    switch (rope.type) {
      case RopeType::kDefault:
        break;
      case RopeType::kLinear:
        frequency /= factor;
        break;
      case RopeType::kLlama3:
        frequency = llama3_frequency(rope, frequency);
        break;
      case RopeType::kYarn: {
        const float keep = YarnRamp(rope, static_cast<double>(head_dim)).keep(i);
        frequency = 1.0f / (factor * period) * (1.0f - keep) + frequency * keep;
        break;
      }
    }
    frequencies.push_back(frequency);
  }
  return frequencies;
}

}  // namespace tinyvllm
