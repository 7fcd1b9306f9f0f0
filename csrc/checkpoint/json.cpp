#include "checkpoint/json.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "base/errors.h"
#include "base/mapped_file.h"
#include "base/printable.h"

namespace tinyvllm {
namespace {

constexpr std::size_t kMaxDepth = 32;          // a config nests about 4 deep
constexpr std::size_t kMaxValues = 4'000'000;  // 100,000 tensors need about 1,000,000
constexpr std::size_t kMaxFileBytes = 100'000'000;

// Builds the document from the parser's events. Returning false stops the parser; `problem` says
// why.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  Json root;
  std::string problem;

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t&) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t&) override { return stop("holds binary data"); }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    Json::object_t& object = open_.back()->get_ref<Json::object_t&>();
    const auto [entry, inserted] = object.emplace(std::move(name), nullptr);
    if (!inserted) return stop("has the key " + in_quotes(entry->first) + " twice");
    slot_ = &entry->second;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    // The parser's own text may quote the input at any length, and it is not for a user.
    // It counts the bytes that it has read, of which the last is the wrong one.
    return stop("is not valid JSON at byte " + std::to_string(position > 0 ? position - 1 : 0));
  }

 private:
  bool stop(std::string why) {
    problem = std::move(why);
    return false;
  }

  // Puts a value where the next one belongs: the root, an array's end, or after a key.
  Json* place(Json value) {
    if (open_.empty()) return &(root = std::move(value));
    if (open_.back()->is_array()) {
      Json::array_t& array = open_.back()->get_ref<Json::array_t&>();
      return &array.emplace_back(std::move(value));
    }
    return &(*slot_ = std::move(value));
  }

  bool add(Json value) {
    if (++num_values_ > kMaxValues) {
      return stop("holds more than " + std::to_string(kMaxValues) + " values");
    }
    place(std::move(value));
    return true;
  }

  bool open(Json empty) {
    if (open_.size() == kMaxDepth) {
      return stop("nests more than " + std::to_string(kMaxDepth) + " levels deep");
    }
    if (++num_values_ > kMaxValues) {
      return stop("holds more than " + std::to_string(kMaxValues) + " values");
    }
    open_.push_back(place(std::move(empty)));
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  // The containers that are open, outermost first. An array may move its elements as it grows, but
  // only while none of them is open.
  std::vector<Json*> open_;
  Json* slot_ = nullptr;
  std::size_t num_values_ = 0;
};

}  // namespace

Json parse_json_object(std::string_view text, const std::string& where) {
  const auto fail = [&](const std::string& problem) {
    throw CheckpointError(where + " " + problem + ". The file is damaged; download it again.");
  };
  if (const std::size_t at = first_invalid_utf8(text); at != text.size()) {
    fail("is not UTF-8 at byte " + std::to_string(at));
  }
  if (const std::size_t at = text.find('\0'); at != std::string_view::npos) {
    fail("is not valid JSON at byte " + std::to_string(at) + " (a NUL)");
  }
  Builder builder;
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) fail(builder.problem);
  if (!builder.root.is_object()) fail("is not a JSON object but " + printable_json(builder.root));
  return std::move(builder.root);
}

Json read_json_object(const std::filesystem::path& path) {
  const std::string where = printable(path) + ":";
  const auto file = MappedFile::open(path);
  const std::span<const std::byte> bytes = file->bytes();
  if (bytes.size() > kMaxFileBytes) {
    throw CheckpointError(where + " has " + std::to_string(bytes.size()) +
                          " bytes, more than the " + std::to_string(kMaxFileBytes) +
                          " that are read. Download it again.");
  }
  // Copied, because the parser must see one and the same text from the first byte to the last.
  const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  file->check();
  return parse_json_object(text, where);
}

std::string printable_json(const Json& value) {
  if (value.is_string()) return in_quotes(value.get_ref<const std::string&>());
  if (value.is_structured() && value.size() > 8) {
    return (value.is_object() ? "an object of " : "a list of ") + std::to_string(value.size()) +
           " values";
  }
  return printable(value.dump(-1, ' ', false, Json::error_handler_t::replace));
}

}  // namespace tinyvllm
