// tinyvllm._core.Checkpoint: a checkpoint directory as Python sees it, for tests and for `tinyvllm
// inspect`.
#include "checkpoint/checkpoint.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstring>
#include <vector>

#include "base/bfloat16.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace tinyvllm {
namespace {

const char* name_of(RopeType type) {
  switch (type) {
    case RopeType::kDefault:
      return "default";
    case RopeType::kLinear:
      return "linear";
    case RopeType::kLlama3:
      return "llama3";
    case RopeType::kYarn:
      return "yarn";
  }
  return "unknown";
}

py::dict dict_of(const RopeConfig& rope) {
  py::dict out;
  out["type"] = name_of(rope.type);
  out["theta"] = rope.theta;
  out["factor"] = rope.factor;
  out["low_freq_factor"] = rope.low_freq_factor;
  out["high_freq_factor"] = rope.high_freq_factor;
  out["original_max_position_embeddings"] = rope.original_max_position_embeddings;
  out["attention_factor"] = rope.attention_factor;
  out["beta_fast"] = rope.beta_fast;
  out["beta_slow"] = rope.beta_slow;
  out["truncate"] = rope.truncate;
  return out;
}

py::dict dict_of(const ModelConfig& config) {
  py::dict out;
  out["family"] = config.family;
  out["vocab_size"] = config.vocab_size;
  out["hidden_size"] = config.hidden_size;
  out["intermediate_size"] = config.intermediate_size;
  out["num_layers"] = config.num_layers;
  out["num_heads"] = config.num_heads;
  out["num_kv_heads"] = config.num_kv_heads;
  out["head_dim"] = config.head_dim;
  out["max_position_embeddings"] = config.max_position_embeddings;
  out["rms_norm_eps"] = config.rms_norm_eps;
  out["tie_word_embeddings"] = config.tie_word_embeddings;
  out["qkv_bias"] = config.qkv_bias;
  out["attention_output_bias"] = config.attention_output_bias;
  out["mlp_bias"] = config.mlp_bias;
  out["qk_norm"] = config.qk_norm;
  out["sliding_window"] = config.sliding_window;
  out["rope"] = dict_of(config.rope);
  out["dtype"] = config.dtype;
  return out;
}

py::dict tensor_info(const Checkpoint& checkpoint, const std::string& name) {
  const TensorInfo& info = checkpoint.info(name);
  py::dict out;
  out["dtype"] = info.dtype;
  out["shape"] = py::tuple(py::cast(info.shape));
  out["file"] = py::cast(info.file->path());
  out["num_bytes"] = info.num_bytes;
  return out;
}

template <typename T>
void widen(const std::byte* from, float* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, from + i * sizeof(T), sizeof(T));  // may be aligned to nothing
    to[i] = to_float(value);
  }
}

py::array_t<float> read(const Checkpoint& checkpoint, const std::string& name) {
  const CheckpointTensor tensor = checkpoint.tensor(name, checkpoint.info(name).shape);
  const std::vector<py::ssize_t> shape(tensor.shape.begin(), tensor.shape.end());
  if (tensor.num_bytes == 0) {
    // NumPy would allocate memory for the other dimensions, and nothing bounds them.
    static const float nothing = 0;
    return py::array_t<float>(shape, &nothing,
                              py::capsule(static_cast<const void*>(&nothing), [](void*) {}));
  }
  py::array_t<float> out(shape);
  float* to = out.mutable_data();
  const std::size_t count = tensor.num_bytes / size_of(tensor.dtype);
  {
    const py::gil_scoped_release release;
    switch (tensor.dtype) {
      case DType::kFloat32:
        widen<float>(tensor.data, to, count);
        break;
      case DType::kBFloat16:
        widen<BFloat16>(tensor.data, to, count);
        break;
      case DType::kFloat16:
        widen<Float16>(tensor.data, to, count);
        break;
    }
    tensor.file->check();
  }
  return out;
}

}  // namespace

void bind_checkpoint(py::module_& module) {
  py::class_<Checkpoint>(
      module, "Checkpoint",
      "A checkpoint directory, wholly checked when it is opened. Reads no weight then.")
      .def(py::init(&Checkpoint::open), py::arg("directory"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("config",
                             [](const Checkpoint& self) { return dict_of(self.config()); })
      .def_property_readonly(
          "dtype", [](const Checkpoint& self) { return std::string(name_of(self.dtype())); },
          "The dtype of most weights: what dtype=\"auto\" looks at.")
      .def("names", &Checkpoint::names, "The tensors' names, sorted.")
      .def("tensor_info", &tensor_info, py::arg("name"),
           "What the file says: {dtype, shape, file, num_bytes}.")
      .def("read", &read, py::arg("name"),
           "The tensor's values, widened to float32: exact for each of F32, F16 and BF16.")
      .def("warnings", &Checkpoint::warnings, "What is odd but harmless, one line each.")
      .def_property_readonly("failed", &Checkpoint::any_file_failed,
                             "Whether a page of a file could not be read since it was opened.")
      .def("check_files", &Checkpoint::check_files, py::call_guard<py::gil_scoped_release>(),
           "Raises CheckpointError if a file has changed since it was opened.");
  module.def(
      "parse_model_config",
      [](const std::filesystem::path& path) { return dict_of(parse_model_config(path)); },
      py::arg("config_json"), "config.json as the engine understands it.");
}

}  // namespace tinyvllm
