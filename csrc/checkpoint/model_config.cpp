#include "checkpoint/model_config.h"

#include <cmath>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <utility>

#include "base/errors.h"
#include "base/printable.h"
#include "checkpoint/json.h"

namespace tinyvllm {
namespace {

constexpr std::int64_t kMaxVocabulary = 1 << 24;
constexpr std::int64_t kMaxWidth = 1 << 22;  // hidden and intermediate size
constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kMaxHeads = 1 << 16;
constexpr std::int64_t kMaxHeadDim = 4096;
constexpr std::int64_t kMaxPositions = std::int64_t{1} << 31;

// What a family fixes in its code, and what it assumes where config.json is silent.
struct Family {
  std::string_view model_type;
  std::string_view architecture;
  std::int64_t num_kv_heads;  // 0: as many as query heads
  std::int64_t head_dim;      // 0: hidden_size / num_attention_heads
  std::int64_t max_position_embeddings;
  bool attention_bias_key;  // whether the family reads attention_bias
  bool mlp_bias_key;
  bool qkv_bias;
  bool qk_norm;
  enum { kNoWindow, kWindowEverywhere, kWindowByLayer } window;
};

constexpr Family kFamilies[] = {
    {"llama", "LlamaForCausalLM", 0, 0, 2048, true, true, false, false, Family::kNoWindow},
    {"mistral", "MistralForCausalLM", 8, 0, 131072, false, false, false, false,
     Family::kWindowEverywhere},
    {"qwen2", "Qwen2ForCausalLM", 32, 0, 32768, false, false, true, false, Family::kWindowByLayer},
    {"qwen3", "Qwen3ForCausalLM", 32, 128, 32768, true, false, false, true, Family::kWindowByLayer},
};
constexpr std::int64_t kDefaultWindow = 4096;
constexpr std::int64_t kDefaultMaxWindowLayers = 28;

// One JSON object of the file. A key that is null counts as absent unless `find` is asked directly.
// Every getter checks type and range, and names key and value when it throws.
class Fields {
 public:
  Fields(const Json& object, std::string where, std::string prefix = {})
      : object_(object), where_(std::move(where)), prefix_(std::move(prefix)) {}

  [[noreturn]] void damaged(const std::string& what) const {
    throw CheckpointError(where_ + ": " + what +
                          ". Compare it with the original model's config.json.");
  }
  [[noreturn]] void unsupported(const std::string& what, const std::string& advice) const {
    throw UnsupportedModelError(where_ + ": " + what + ". " + advice);
  }
  std::string name(std::string_view key) const { return prefix_ + std::string(key); }

  const Json* find(std::string_view key) const {
    const auto found = object_.find(key);
    return found == object_.end() ? nullptr : &*found;
  }
  const Json* get(std::string_view key) const {
    const Json* value = find(key);
    return value == nullptr || value->is_null() ? nullptr : value;
  }

  std::optional<double> number(std::string_view key, double low, double high) const {
    const Json* value = get(key);
    if (value == nullptr) return std::nullopt;
    const double number = value->is_number() ? value->get<double>() : std::nan("");
    if (!(number >= low && number <= high)) {
      damaged(name(key) + " is " + printable_json(*value) + ", not a number from " +
              printable_json(low) + " to " + printable_json(high));
    }
    return number;
  }

  // Accepts 4096.0 and 4e3 too: some writers make every number a float.
  std::optional<std::int64_t> integer(std::string_view key, std::int64_t low,
                                      std::int64_t high) const {
    const Json* value = get(key);
    if (value == nullptr) return std::nullopt;
    // Every bound is far below 2^53, so that a double decides exactly.
    const double number = value->is_number() ? value->get<double>() : std::nan("");
    if (!(number >= static_cast<double>(low) && number <= static_cast<double>(high)) ||
        number != std::floor(number)) {
      damaged(name(key) + " is " + printable_json(*value) + ", not a whole number from " +
              std::to_string(low) + " to " + std::to_string(high));
    }
    return static_cast<std::int64_t>(number);
  }

  std::optional<bool> boolean(std::string_view key) const {
    const Json* value = get(key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_boolean())
      damaged(name(key) + " is " + printable_json(*value) + ", not true or false");
    return value->get<bool>();
  }

  std::optional<std::string> string(std::string_view key) const {
    const Json* value = get(key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_string())
      damaged(name(key) + " is " + printable_json(*value) + ", not a string");
    return value->get<std::string>();
  }

  std::optional<Fields> object(std::string_view key) const {
    const Json* value = get(key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_object())
      damaged(name(key) + " is " + printable_json(*value) + ", not an object");
    return Fields(*value, where_, name(key) + ".");
  }

  bool empty() const { return object_.empty(); }

  template <typename T>
  T required(std::string_view key, std::optional<T> value) const {
    if (!value) damaged(name(key) + " is missing");
    return *value;
  }

 private:
  const Json& object_;
  std::string where_;
  std::string prefix_;
};

std::string supported() {
  std::string out = "Supported are";
  for (const Family& family : kFamilies) {
    out += (&family == kFamilies ? " " : ", ") + std::string(family.architecture);
  }
  return out + ".";
}

const Family& choose_family(const Fields& config) {
  std::optional<std::string> architecture;
  if (const Json* list = config.get("architectures")) {
    if (!list->is_array() || (!list->empty() && !list->front().is_string())) {
      config.damaged("architectures is " + printable_json(*list) + ", not a list of names");
    }
    if (!list->empty()) architecture = list->front().get<std::string>();
  }
  const std::optional<std::string> model_type = config.string("model_type");
  if (!architecture && !model_type) config.damaged("it has neither architectures nor model_type");
  for (const Family& family : kFamilies) {
    if (model_type.value_or(std::string(family.model_type)) == family.model_type &&
        architecture.value_or(std::string(family.architecture)) == family.architecture) {
      return family;
    }
  }
  std::string what = "the model is of";
  if (model_type) what += " model_type " + in_quotes(*model_type);
  if (model_type && architecture) what += " with";
  if (architecture) what += " architecture " + in_quotes(*architecture);
  config.unsupported(what + ", which is not supported", supported());
}

void refuse_unsupported(const Fields& config) {
  if (const auto quantization = config.object("quantization_config")) {
    std::string what = "the weights are quantised";
    if (const auto method = quantization->string("quant_method"))
      what += " by " + in_quotes(*method);
    config.unsupported(what + " (quantization_config is present), which is not supported",
                       "Use the unquantised model.");
  }
  const std::string activation = config.string("hidden_act").value_or("silu");
  if (activation != "silu" && activation != "swish") {  // two names of one function
    config.unsupported("hidden_act is " + in_quotes(activation) + "; only \"silu\" is supported",
                       "Use a model of a supported family.");
  }
  if (const Json* per_layer = config.get("per_layer_config");
      per_layer != nullptr && !per_layer->empty()) {
    config.unsupported("layers of different shapes (per_layer_config) are not supported",
                       "Use a model of a supported family.");
  }
}

// Mistral, Qwen2 and Qwen3 limit how far back a token looks, Mistral in every layer, Qwen in those
// that layer_types names "sliding_attention" (before Transformers 4.52: in layers from
// max_window_layers on).
std::vector<std::int64_t> parse_windows(const Fields& config, const Family& family,
                                        std::size_t num_layers) {
  std::int64_t window = 0;
  const bool by_layer = family.window == Family::kWindowByLayer;
  if (family.window == Family::kWindowEverywhere ||
      (by_layer && config.boolean("use_sliding_window").value_or(false))) {
    const bool absent =
        config.find("sliding_window") == nullptr;  // null is not absent: it means none
    window =
        config.integer("sliding_window", 1, kMaxPositions).value_or(absent ? kDefaultWindow : 0);
  }
  const std::int64_t first =
      by_layer
          ? config.integer("max_window_layers", 0, kMaxPositions).value_or(kDefaultMaxWindowLayers)
          : 0;
  std::vector<std::int64_t> windows(num_layers, 0);
  for (std::size_t i = 0; i < num_layers; ++i) {
    if (static_cast<std::int64_t>(i) >= first) windows[i] = window;
  }

  const Json* types = config.get("layer_types");
  if (types == nullptr || family.window == Family::kNoWindow) return windows;
  if (!types->is_array())
    config.damaged("layer_types is " + printable_json(*types) + ", not a list");
  if (types->size() != num_layers) {
    config.damaged("layer_types has " + std::to_string(types->size()) + " entries for " +
                   std::to_string(num_layers) + " layers");
  }
  for (std::size_t i = 0; i < num_layers; ++i) {
    const Json& type = (*types)[i];
    const std::string key = "layer_types[" + std::to_string(i) + "]";
    const bool sliding = type == "sliding_attention";
    if (!sliding && type != "full_attention" && type != "attention") {  // the last is the old name
      config.unsupported(key + " is " + printable_json(type) +
                             "; only \"full_attention\" and \"sliding_attention\" are supported",
                         "Use a model of a supported family.");
    }
    if (sliding && window == 0) {
      config.damaged(key +
                     " is \"sliding_attention\", but there is no window (sliding_window is null or"
                     " use_sliding_window is false)");
    }
    if (!by_layer && !sliding && window != 0) {
      config.unsupported(key + " is \"full_attention\" beside a sliding_window of " +
                             std::to_string(window) + "; this family has one kind of layer",
                         "Set sliding_window to null if no layer has a window.");
    }
    windows[i] = sliding ? window : 0;
  }
  return windows;
}

// The paper's attention temperature: 0.1 ln(factor) + 1, scaled by mscale where a model sets it.
double yarn_scale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

RopeConfig parse_rope_fields(const Fields& config, const Fields& rope, double max_positions) {
  constexpr double kTiny = 1e-9, kHuge = 1e15;
  RopeConfig out;
  const auto theta_of = [&](const Fields& fields) {
    return fields.number("rope_theta", 1 + kTiny, kHuge);
  };
  out.theta = theta_of(rope).value_or(theta_of(config).value_or(out.theta));

  const auto rotary = rope.number("partial_rotary_factor", 0, 1);
  const double share = rotary ? *rotary : config.number("partial_rotary_factor", 0, 1).value_or(1);
  if (share != 1) {
    config.unsupported(
        "partial_rotary_factor is " + printable_json(share) + "; only 1 is supported",
        "Use a model of a supported family.");
  }

  const auto new_name = rope.string("rope_type");
  const std::string type = new_name ? *new_name : rope.string("type").value_or("default");
  if (type == "default") return out;
  if (type == "linear") {
    out.type = RopeType::kLinear;
  } else if (type == "llama3") {
    out.type = RopeType::kLlama3;
  } else if (type == "yarn") {
    out.type = RopeType::kYarn;
  } else {
    config.unsupported(rope.name("rope_type") + " is " + in_quotes(type) +
                           "; only default, linear, llama3 and yarn are supported",
                       "Use a model without it: with other frequencies it would write nonsense.");
  }
  const std::optional<double> factor = rope.number("factor", kTiny, kHuge);
  if (out.type == RopeType::kLinear) {
    out.factor = rope.required("factor", factor);
    return out;
  }

  // The top level wins over the rope object here, as in Transformers; without either nothing was
  // extended.
  const auto original_of = [&](const Fields& fields) {
    return fields.number("original_max_position_embeddings", 1, static_cast<double>(kMaxPositions));
  };
  const std::optional<double> top_level = original_of(config);
  const std::optional<double> original = top_level ? top_level : original_of(rope);
  out.original_max_position_embeddings = original.value_or(max_positions);

  if (out.type == RopeType::kLlama3) {
    out.factor = rope.required("factor", factor);
    out.low_freq_factor =
        rope.required("low_freq_factor", rope.number("low_freq_factor", kTiny, kHuge));
    out.high_freq_factor =
        rope.required("high_freq_factor", rope.number("high_freq_factor", kTiny, kHuge));
    if (out.high_freq_factor <= out.low_freq_factor) {
      rope.damaged(rope.name("high_freq_factor") + " is " + printable_json(out.high_freq_factor) +
                   ", not above low_freq_factor " + printable_json(out.low_freq_factor));
    }
    return out;
  }

  if (!factor && !original) rope.required("factor", factor);
  out.factor = factor.value_or(max_positions / out.original_max_position_embeddings);
  const auto positive_or = [&](const char* key, double otherwise) {  // 0 counts as absent
    const double value = rope.number(key, 0, kHuge).value_or(0);
    return value == 0 ? otherwise : value;
  };
  out.beta_fast = positive_or("beta_fast", out.beta_fast);
  out.beta_slow = positive_or("beta_slow", out.beta_slow);
  if (out.beta_fast < out.beta_slow) {
    rope.damaged(rope.name("beta_fast") + " is " + printable_json(out.beta_fast) +
                 ", below beta_slow " + printable_json(out.beta_slow));
  }
  out.truncate = rope.boolean("truncate").value_or(out.truncate);
  const double mscale = positive_or("mscale", 0);
  const double mscale_all_dim = positive_or("mscale_all_dim", 0);
  out.attention_factor =
      mscale != 0 && mscale_all_dim != 0
          ? yarn_scale(out.factor, mscale) / yarn_scale(out.factor, mscale_all_dim)
          : yarn_scale(out.factor, 1);
  out.attention_factor =
      rope.number("attention_factor", kTiny, kHuge).value_or(out.attention_factor);
  return out;
}

// One rope object, or one for each kind of layer; all kinds must then agree.
RopeConfig parse_rope_object(const Fields& config, const Fields& rope, double max_positions) {
  std::optional<RopeConfig> agreed;
  for (const char* kind : {"full_attention", "sliding_attention"}) {
    const auto nested = rope.object(kind);
    if (!nested) continue;
    const RopeConfig parsed = parse_rope_fields(config, *nested, max_positions);
    if (agreed && *agreed != parsed) {
      config.unsupported(
          "full and sliding layers have different rope parameters, which is not supported",
          "Use a model of a supported family.");
    }
    agreed = parsed;
  }
  return agreed ? *agreed : parse_rope_fields(config, rope, max_positions);
}

// rope_parameters (Transformers 5), or rope_scaling beside rope_theta (before). Where a file has
// both for the sake of old readers they must mean the same.
RopeConfig parse_rope(const Fields& config, double max_positions) {
  const Json nothing = Json::object();
  std::optional<Fields> current = config.object("rope_parameters");
  std::optional<Fields> old = config.object("rope_scaling");
  if (current && current->empty()) current.reset();
  if (old && old->empty()) old.reset();
  if (!current && !old) return parse_rope_fields(config, Fields(nothing, "", ""), max_positions);
  const RopeConfig parsed = parse_rope_object(config, current ? *current : *old, max_positions);
  if (current && old && parse_rope_object(config, *old, max_positions) != parsed) {
    config.damaged("rope_parameters and rope_scaling contradict each other");
  }
  return parsed;
}

}  // namespace

ModelConfig parse_model_config(const std::filesystem::path& config_json) {
  const Json root = read_json_object(config_json);
  const Fields config(root, printable(config_json));
  const Family& family = choose_family(config);
  refuse_unsupported(config);

  const auto size_of = [&](const char* key, std::int64_t high) {
    return config.required(key, config.integer(key, 1, high));
  };
  ModelConfig out;
  out.family = family.model_type;
  out.vocab_size = size_of("vocab_size", kMaxVocabulary);
  out.hidden_size = size_of("hidden_size", kMaxWidth);
  out.intermediate_size = size_of("intermediate_size", kMaxWidth);
  out.num_layers = size_of("num_hidden_layers", kMaxLayers);
  out.num_heads = size_of("num_attention_heads", kMaxHeads);

  // Null means as many as query heads in every family; absent means the family's own number.
  const bool kv_heads_absent = config.find("num_key_value_heads") == nullptr;
  const std::int64_t kv_heads_default =
      kv_heads_absent && family.num_kv_heads != 0 ? family.num_kv_heads : out.num_heads;
  out.num_kv_heads = config.integer("num_key_value_heads", 1, kMaxHeads).value_or(kv_heads_default);
  if (out.num_heads % out.num_kv_heads != 0) {
    config.damaged(
        "num_attention_heads " + std::to_string(out.num_heads) +
        " is not a multiple of num_key_value_heads " + std::to_string(out.num_kv_heads) +
        (kv_heads_absent ? " (the default of " + out.family + "; the key is missing)" : ""));
  }

  if (const auto head_dim = config.integer("head_dim", 1, kMaxHeadDim)) {
    out.head_dim = *head_dim;
  } else if (family.head_dim != 0) {
    out.head_dim = family.head_dim;
  } else if (out.hidden_size % out.num_heads != 0) {
    config.damaged("hidden_size " + std::to_string(out.hidden_size) +
                   " is not a multiple of num_attention_heads " + std::to_string(out.num_heads) +
                   ", and there is no head_dim");
  } else {
    out.head_dim = out.hidden_size / out.num_heads;
  }
  if (out.head_dim % 2 != 0 || out.head_dim > kMaxHeadDim) {
    config.damaged("head_dim is " + std::to_string(out.head_dim) + ", not an even number up to " +
                   std::to_string(kMaxHeadDim));
  }

  out.max_position_embeddings = config.integer("max_position_embeddings", 1, kMaxPositions)
                                    .value_or(family.max_position_embeddings);
  out.rms_norm_eps = static_cast<float>(config.number("rms_norm_eps", 1e-30, 1).value_or(1e-6));
  out.tie_word_embeddings = config.boolean("tie_word_embeddings").value_or(false);
  const bool attention_bias =
      family.attention_bias_key && config.boolean("attention_bias").value_or(false);
  out.qkv_bias = family.qkv_bias || attention_bias;
  out.attention_output_bias = attention_bias;
  out.mlp_bias = family.mlp_bias_key && config.boolean("mlp_bias").value_or(false);
  out.qk_norm = family.qk_norm;
  out.sliding_window = parse_windows(config, family, static_cast<std::size_t>(out.num_layers));
  out.rope = parse_rope(config, static_cast<double>(out.max_position_embeddings));
  const auto dtype = config.string("dtype");
  out.dtype = dtype ? *dtype : config.string("torch_dtype").value_or("");
  return out;
}

}  // namespace tinyvllm
