#include "checkpoint/safetensors.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <span>
#include <tuple>
#include <utility>

#include "base/errors.h"
#include "base/printable.h"
#include "checkpoint/json.h"

namespace tinyvllm {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr const char* kDamaged = ". The file is damaged or was cut off; download it again.";

// The dtypes that the format knows, with their bits an element.
constexpr std::pair<std::string_view, std::uint64_t> kBitsOfDType[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
};

std::optional<std::uint64_t> bits_of(std::string_view dtype) {
  for (const auto& [name, bits] : kBitsOfDType) {
    if (name == dtype) return bits;
  }
  return std::nullopt;
}

// The one place that turns a shape into a size. Nothing if it does not fit 64 bits, zeros left out:
// whoever multiplies the shape [0, 2^62, 2^62] in another order must not overflow either.
std::optional<std::uint64_t> bits_of_tensor(std::span<const std::int64_t> shape,
                                            std::uint64_t bits) {
  std::uint64_t product = bits;
  bool empty = false;
  for (const std::int64_t dimension : shape) {
    if (dimension == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(product, static_cast<std::uint64_t>(dimension), &product)) {
      return std::nullopt;
    }
  }
  return empty ? 0 : product;
}

struct Entry {  // one tensor of the header, its offsets not yet compared with its neighbours'
  TensorInfo info;
  std::uint64_t begin;
  std::uint64_t end;
};

// Everything about one tensor that its own entry can tell.
Entry parse_entry(const std::string& where, const std::string& name, const Json& value) {
  const auto fail = [&](const std::string& what) {
    throw CheckpointError(where + ": tensor " + in_quotes(name) + " " + what + kDamaged);
  };
  if (!value.is_object()) fail("is described by " + printable_json(value) + ", not by an object");
  const auto field = [&](const char* key) -> const Json& {
    const auto found = value.find(key);
    if (found == value.end()) fail(std::string("has no ") + key);
    return *found;
  };

  Entry entry{};
  entry.info.name = name;
  const Json& dtype = field("dtype");
  if (!dtype.is_string())
    fail("has the dtype " + printable_json(dtype) + ", which is not a string");
  entry.info.dtype = dtype.get<std::string>();
  const std::optional<std::uint64_t> bits = bits_of(entry.info.dtype);
  if (!bits)
    fail("has the dtype " + in_quotes(entry.info.dtype) + ", which the format does not know");

  const Json& shape = field("shape");
  if (!shape.is_array()) fail("has the shape " + printable_json(shape) + ", which is not a list");
  if (shape.size() > kMaxDimensions) {
    fail("has " + std::to_string(shape.size()) + " dimensions, more than " +
         std::to_string(kMaxDimensions));
  }
  for (const Json& dimension : shape) {
    constexpr std::uint64_t kLargest = std::numeric_limits<std::int64_t>::max();
    if (!dimension.is_number_unsigned() || dimension.get<std::uint64_t>() > kLargest) {
      fail("has the dimension " + printable_json(dimension) +
           ", which is not a whole number from 0 to " + std::to_string(kLargest));
    }
    entry.info.shape.push_back(dimension.get<std::int64_t>());
  }

  const Json& offsets = field("data_offsets");
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    fail("has the data_offsets " + printable_json(offsets) + ", which are not two whole numbers");
  }
  entry.begin = offsets[0].get<std::uint64_t>();
  entry.end = offsets[1].get<std::uint64_t>();
  if (entry.end < entry.begin) {
    fail("ends at byte " + std::to_string(entry.end) + " before it begins at byte " +
         std::to_string(entry.begin));
  }

  const std::string says = "says " + shape_text(entry.info.shape) + " " + entry.info.dtype;
  const std::optional<std::uint64_t> total_bits = bits_of_tensor(entry.info.shape, *bits);
  if (!total_bits) fail(says + ", whose size does not fit 64 bits");
  if (*total_bits % 8 != 0) {
    fail(says + " = " + std::to_string(*total_bits) + " bits, not whole bytes");
  }
  if (*total_bits / 8 != entry.end - entry.begin) {
    fail(says + " = " + std::to_string(*total_bits / 8) + " bytes, its data_offsets span " +
         std::to_string(entry.end - entry.begin));
  }
  return entry;
}

void check_metadata(const std::string& where, const Json& metadata) {
  if (!metadata.is_object()) {
    throw CheckpointError(where + ": __metadata__ is " + printable_json(metadata) +
                          ", not an object" + kDamaged);
  }
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) {
      throw CheckpointError(where + ": __metadata__ " + in_quotes(key) + " is " +
                            printable_json(value) + ", not a string" + kDamaged);
    }
  }
}

std::uint64_t little_endian(std::span<const std::byte> bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = bytes.size(); i-- > 0;)
    value = value << 8 | std::to_integer<std::uint64_t>(bytes[i]);
  return value;
}

// The header's text, copied: whoever writes to the file while we parse must not be seen twice.
std::string read_header(const std::string& where, std::span<const std::byte> bytes) {
  const auto fail = [&](const std::string& what) {
    throw CheckpointError(where + ": " + what + kDamaged);
  };
  constexpr std::string_view kPointer = "version https://git-lfs";
  if (std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size())
          .starts_with(kPointer)) {
    throw CheckpointError(where + ": is a Git LFS pointer of " + std::to_string(bytes.size()) +
                          " bytes, not the weights. Run `git lfs pull` in its directory.");
  }
  if (bytes.size() < kLengthBytes) {
    fail("has " + std::to_string(bytes.size()) +
         " bytes, fewer than the 8 that hold the header's length");
  }
  const std::uint64_t length = little_endian(bytes.first(kLengthBytes));
  if (length > kMaxHeaderBytes) {
    fail("says that its header has " + std::to_string(length) + " bytes, more than the " +
         std::to_string(kMaxHeaderBytes) + " that the format allows");
  }
  if (length > bytes.size() - kLengthBytes) {
    fail("says that its header has " + std::to_string(length) + " bytes, but only " +
         std::to_string(bytes.size() - kLengthBytes) + " follow");
  }
  return {reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
          static_cast<std::size_t>(length)};
}

}  // namespace

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) out += ", ";
    out += std::to_string(shape[i]);
  }
  return out + "]";
}

SafetensorsFile open_safetensors(const std::filesystem::path& path) {
  const std::string where = printable(path);
  SafetensorsFile out;
  out.file = MappedFile::open(path);
  const std::string header = read_header(where, out.file->bytes());
  if (out.file->failed()) out.file->check();
  const std::span<const std::byte> data = out.file->bytes().subspan(kLengthBytes + header.size());
  const Json root = parse_json_object(header, where + ": its header");
  const std::size_t num_tensors = root.size() - root.count("__metadata__");
  if (num_tensors > kMaxTensorsPerFile) {
    throw CheckpointError(where + ": holds " + std::to_string(num_tensors) +
                          " tensors, more than the " + std::to_string(kMaxTensorsPerFile) +
                          " that a file may have here. Save the model as several shards.");
  }

  std::vector<Entry> entries;
  entries.reserve(num_tensors);
  for (const auto& [name, value] : root.items()) {
    if (name == "__metadata__") {
      check_metadata(where, value);
    } else {
      entries.push_back(parse_entry(where, name, value));
    }
  }
  // By their bytes; an empty tensor lies before the one that begins where it does.
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });

  // Each begins where the one before it ended, and the last ends with the file: so none lies
  // outside of it.
  std::uint64_t end = 0;
  std::string previous = "the data before it";
  for (Entry& entry : entries) {
    if (entry.begin != end) {
      throw CheckpointError(where + ": tensor " + in_quotes(entry.info.name) + " begins at byte " +
                            std::to_string(entry.begin) + ", but " + previous + " ends at byte " +
                            std::to_string(end) +
                            (entry.begin < end ? ": they overlap" : ": a gap") + kDamaged);
    }
    end = entry.end;
    previous = "tensor " + in_quotes(entry.info.name);
  }
  if (end != data.size()) {
    const std::string last = entries.empty() ? "" : " (the last is " + previous + ")";
    throw CheckpointError(where + ": its " + std::to_string(entries.size()) +
                          " tensors end at byte " + std::to_string(end) + " of the data" + last +
                          ", but the file has " + std::to_string(data.size()) + " bytes of data" +
                          kDamaged);
  }

  out.tensors.reserve(entries.size());
  for (Entry& entry : entries) {
    entry.info.data = data.data() + entry.begin;
    entry.info.num_bytes = static_cast<std::size_t>(entry.end - entry.begin);
    entry.info.file = out.file.get();
    out.tensors.push_back(std::move(entry.info));
  }
  return out;
}

}  // namespace tinyvllm
