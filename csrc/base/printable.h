// Text out of a file, made fit for a message: one line, valid UTF-8, no terminal escapes, not
// endless.
#pragma once

#include <concepts>
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace tinyvllm {

// The position of the first byte that is not UTF-8; text.size() if all of it is.
std::size_t first_invalid_utf8(std::string_view text);

// Control characters and bytes that are not UTF-8 become \xNN; after 200 bytes comes "...".
std::string printable(std::string_view text);

inline std::string in_quotes(std::string_view text) { return '"' + printable(text) + '"'; }

// Only for a path as such: a string converts to a path too.
template <std::same_as<std::filesystem::path> Path>
std::string printable(const Path& path) {
  return printable(std::string_view(path.native()));
}

}  // namespace tinyvllm
