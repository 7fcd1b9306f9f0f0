#include "checkpoint/checkpoint.h"

#include <algorithm>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

#include "base/errors.h"
#include "base/printable.h"
#include "checkpoint/json.h"

namespace tinyvllm {
namespace {

constexpr const char* kWeights = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr std::size_t kMaxShards = 4096;

std::optional<DType> loadable(std::string_view dtype) {
  if (dtype == "F32") return DType::kFloat32;
  if (dtype == "F16") return DType::kFloat16;
  if (dtype == "BF16") return DType::kBFloat16;
  return std::nullopt;
}

// A file or a symbolic link of that name, even one that leads nowhere: opening it says what is
// wrong with it.
bool is_there(const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::symlink_status(path, error);
  return status.type() != std::filesystem::file_type::not_found &&
         status.type() != std::filesystem::file_type::none;
}

std::set<std::string> files_in(const std::filesystem::path& directory) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(directory, error);
  const std::string where = printable(directory) + ": ";
  if (status.type() == std::filesystem::file_type::not_found) {
    throw CheckpointError(
        where + "does not exist. Give a directory with config.json and model.safetensors.");
  }
  if (directory.extension() == ".gguf") {
    throw UnsupportedModelError(where +
                                "is a GGUF file, which is not supported. Give a directory with"
                                " config.json and model.safetensors.");
  }
  if (status.type() == std::filesystem::file_type::none) {
    throw CheckpointError(where + "cannot be examined: " + error.message() +
                          ". Check the path and its permissions.");
  }
  if (status.type() != std::filesystem::file_type::directory) {
    throw CheckpointError(where +
                          "is not a directory. Give a directory with config.json and"
                          " model.safetensors.");
  }
  std::set<std::string> names;
  std::filesystem::directory_iterator entry(directory, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    names.insert(entry->path().filename().native());
  }
  if (error)
    throw CheckpointError(where + "cannot be listed: " + error.message() +
                          ". Check its permissions.");
  return names;
}

// Explains a directory that has neither model.safetensors nor its index.
[[noreturn]] void refuse_other_formats(const std::filesystem::path& directory) {
  const std::set<std::string> names = files_in(directory);
  const std::string where = printable(directory) + ": ";
  const auto first_with = [&](std::initializer_list<std::string_view> endings) -> std::string {
    for (const std::string& name : names) {
      for (const std::string_view ending : endings) {
        if (name.ends_with(ending)) return name;
      }
    }
    return {};
  };
  const std::string other = first_with({".safetensors"});
  if (other.starts_with("adapter_model")) {
    throw UnsupportedModelError(
        where + "holds a LoRA adapter (" + in_quotes(other) +
        "), which is not supported. Merge it into its base model and save that.");
  }
  if (!other.empty()) {
    throw CheckpointError(where + "holds " + in_quotes(other) + ", but neither " + kWeights +
                          " nor " + kIndex + ". Download the whole model again.");
  }
  if (const std::string gguf = first_with({".gguf"}); !gguf.empty()) {
    throw UnsupportedModelError(
        where + "holds GGUF weights (" + in_quotes(gguf) +
        "), which are not supported. Download the model in safetensors format.");
  }
  if (const std::string pickle = first_with({".bin", ".pth", ".pt", ".ckpt", ".bin.index.json"});
      !pickle.empty()) {
    throw UnsupportedModelError(
        where + "holds pickled weights (" + in_quotes(pickle) +
        "), which can run code when they are read and are refused. Save the model again with"
        " Transformers' save_pretrained, which writes safetensors.");
  }
  throw CheckpointError(where + "holds no weights: neither " + kWeights + " nor " + kIndex +
                        " among its " + std::to_string(names.size()) +
                        " files. Download the whole model again.");
}

struct ShardIndex {
  std::map<std::string, std::string, std::less<>> shard_of;  // tensor -> file name
  std::set<std::string> shards;
  Json total_size;  // null if the file does not say
};

ShardIndex parse_index(const std::filesystem::path& path) {
  const std::string where = printable(path) + ": ";
  const auto fail = [&](const std::string& what) {
    throw CheckpointError(where + what + ". The file is damaged; download it again.");
  };
  const Json root = read_json_object(path);
  ShardIndex index;
  if (const auto metadata = root.find("metadata");
      metadata != root.end() && metadata->is_object()) {
    index.total_size = metadata->value("total_size", Json());
  }
  const auto map = root.find("weight_map");
  if (map == root.end()) fail("has no weight_map");
  if (!map->is_object()) fail("its weight_map is " + printable_json(*map) + ", not an object");
  for (const auto& [name, value] : map->items()) {
    const auto refuse = [&](const std::string& why) {
      fail("puts tensor " + in_quotes(name) + " into " + printable_json(value) + ", which " + why);
    };
    if (!value.is_string()) refuse("is not a file name");
    const std::string shard = value.get<std::string>();
    // Only a plain name in this very directory: an index must not make us open what else the user
    // may read.
    if (shard.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos || shard == "." ||
        shard == "..") {
      refuse("is not the name of a file beside the index");
    }
    if (!shard.ends_with(".safetensors")) refuse("is not a .safetensors file");
    index.shards.insert(shard);
    index.shard_of.emplace(name, shard);
  }
  if (index.shards.empty()) fail("its weight_map lists no tensor");
  if (index.shards.size() > kMaxShards) {
    fail("lists " + std::to_string(index.shards.size()) + " shards, more than " +
         std::to_string(kMaxShards));
  }
  return index;
}

}  // namespace

Checkpoint Checkpoint::open(const std::filesystem::path& directory) {
  files_in(directory);  // throws unless it is a directory
  const bool single = is_there(directory / kWeights);
  if (!single && !is_there(directory / kIndex)) refuse_other_formats(directory);

  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  checkpoint.config_ = parse_model_config(directory / "config.json");
  if (single) {
    checkpoint.add_file(directory / kWeights);
  } else {
    checkpoint.open_shards(directory / kIndex);
  }
  if (checkpoint.tensors_.empty()) {
    throw CheckpointError(printable(checkpoint.files_.front()->path()) +
                          ": holds 0 tensors. Download the model again.");
  }
  checkpoint.choose_dtype();
  checkpoint.check_files();
  return checkpoint;
}

void Checkpoint::add_file(const std::filesystem::path& path) {
  SafetensorsFile opened = open_safetensors(path);
  files_.push_back(opened.file);
  for (TensorInfo& tensor : opened.tensors) {
    const auto [other, inserted] = tensors_.try_emplace(tensor.name, tensor);
    if (!inserted) {
      throw CheckpointError(
          printable(directory_) + ": tensor " + in_quotes(tensor.name) + " is in two shards, " +
          printable(other->second.file->path().filename()) + " and " + printable(path.filename()) +
          ". Download the model again into an empty directory.");
    }
  }
}

void Checkpoint::open_shards(const std::filesystem::path& path) {
  const ShardIndex index = parse_index(path);
  std::size_t missing = 0;
  std::string first_missing;
  for (const std::string& shard : index.shards) {
    if (is_there(directory_ / shard)) continue;
    if (missing++ == 0) first_missing = shard;
  }
  if (missing > 0) {
    throw CheckpointError(printable(directory_) + ": shard " + in_quotes(first_missing) +
                          " is missing (" + std::to_string(missing) + " of the " +
                          std::to_string(index.shards.size()) + " that " + kIndex +
                          " lists). Download the model again.");
  }
  for (const std::string& shard : index.shards) add_file(directory_ / shard);

  for (const auto& [name, shard] : index.shard_of) {
    const auto found = tensors_.find(name);
    if (found != tensors_.end() && found->second.file->path().filename() == shard) continue;
    throw CheckpointError(
        printable(path) + ": puts tensor " + in_quotes(name) + " into " + in_quotes(shard) +
        ", which does not hold it" +
        (found == tensors_.end()
             ? std::string()
             : " (" + printable(found->second.file->path().filename()) + " does)") +
        ". Download the model again into an empty directory.");
  }

  std::size_t unlisted = 0;
  std::uint64_t total =
      0;  // no overflow: each file's bytes are mapped, so that they fit the address space
  std::string first_unlisted;
  for (const auto& [name, tensor] : tensors_) {
    total += tensor.num_bytes;
    if (!index.shard_of.contains(name) && unlisted++ == 0) first_unlisted = name;
  }
  if (unlisted > 0) {
    warnings_.push_back(printable(path) + ": does not list " + std::to_string(unlisted) +
                        " tensors that its shards hold, such as " + in_quotes(first_unlisted) +
                        ".");
  }
  if (!index.total_size.is_null() && index.total_size != Json(total)) {
    warnings_.push_back(printable(path) + ": total_size is " + printable_json(index.total_size) +
                        ", but the shards' tensors have " + std::to_string(total) + " bytes.");
  }
}

void Checkpoint::choose_dtype() {
  std::map<DType, std::uint64_t> elements;
  for (const auto& [name, tensor] : tensors_) {
    const std::optional<DType> dtype = loadable(tensor.dtype);
    if (dtype) elements[*dtype] += tensor.num_bytes / size_of(*dtype);
  }
  if (elements.empty()) {
    const auto& [name, tensor] = *tensors_.begin();
    throw UnsupportedModelError(printable(tensor.file->path()) + ": tensor " + in_quotes(name) +
                                " has dtype " + tensor.dtype + ", and none of the " +
                                std::to_string(tensors_.size()) +
                                " tensors is F32, F16 or BF16. Use the unquantised model.");
  }
  // Of two that are equally frequent the first of the enum: the wider one.
  dtype_ = std::max_element(elements.begin(), elements.end(), [](const auto& a, const auto& b) {
             return a.second < b.second;
           })->first;
}

const TensorInfo& Checkpoint::info(std::string_view name, std::string_view hint) const {
  const auto found = tensors_.find(name);
  if (found != tensors_.end()) return found->second;
  const std::string place = files_.size() == 1 ? printable(files_.front()->path())
                                               : printable(directory_) + " (" +
                                                     std::to_string(files_.size()) + " shards)";
  throw CheckpointError(place + ": tensor " + in_quotes(name) + " is missing among its " +
                        std::to_string(tensors_.size()) + " tensors. " +
                        (hint.empty()
                             ? "Check that config.json and the weights are of the same model."
                             : std::string(hint)));
}

CheckpointTensor Checkpoint::tensor(std::string_view name,
                                    std::span<const std::int64_t> expected_shape,
                                    std::string_view hint) const {
  const TensorInfo& found = info(name, hint);
  const std::string where = printable(found.file->path()) + ": tensor " + in_quotes(name);
  if (!std::ranges::equal(found.shape, expected_shape)) {
    throw CheckpointError(where + " is " + shape_text(found.shape) + ", but config.json makes it " +
                          shape_text(expected_shape) +
                          ". Check that config.json and the weights are of the same model.");
  }
  const std::optional<DType> dtype = loadable(found.dtype);
  if (!dtype) {
    throw UnsupportedModelError(
        where + " has dtype " + found.dtype +
        "; only F32, F16 and BF16 are supported. Use the unquantised model.");
  }
  return {*dtype, found.shape, found.data, found.num_bytes, found.file};
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> out;
  out.reserve(tensors_.size());
  for (const auto& [name, tensor] : tensors_) out.push_back(name);
  return out;
}

const MappedFile* Checkpoint::file_of(const void* data) const noexcept {
  for (const auto& file : files_) {
    const std::span<const std::byte> all = file->bytes();
    if (data >= all.data() && data < all.data() + all.size()) return file.get();
  }
  return nullptr;
}

void Checkpoint::populate_pages(const void* data, std::size_t bytes) const noexcept {
  if (const MappedFile* file = file_of(data)) {
    file->populate_pages({static_cast<const std::byte*>(data), bytes});
  }
}

void Checkpoint::release_pages(const void* data, std::size_t bytes) const noexcept {
  if (const MappedFile* file = file_of(data)) {
    file->release_pages({static_cast<const std::byte*>(data), bytes});
  }
}

bool Checkpoint::any_file_failed() const noexcept {
  return std::ranges::any_of(files_, [](const auto& file) { return file->failed(); });
}

void Checkpoint::check_files() const {
  for (const auto& file : files_) file->check();
}

}  // namespace tinyvllm
