// JSON that somebody else wrote: the header of a safetensors file, the index of shards,
// config.json.
//
// nlohmann's parser with what it leaves open shut: a key that appears twice in one object, bytes
// that are not UTF-8, a NUL (which it takes for the end of the text), and nesting or counts made to
// exhaust memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace tinyvllm {

using Json = nlohmann::json;

// Throws CheckpointError, with `where` (a printable file name) in front. The result is an object.
Json parse_json_object(std::string_view text, const std::string& where);

// The same for a whole file.
Json read_json_object(const std::filesystem::path& path);

// A short printable form of a value, for messages.
std::string printable_json(const Json& value);

}  // namespace tinyvllm
