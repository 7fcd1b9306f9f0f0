#include "base/printable.h"

#include <cstdint>

namespace tinyvllm {
namespace {

constexpr std::size_t kMaxPrintedBytes = 200;

// The length of the UTF-8 sequence that starts at `at`, or 0 if there is none: bytes missing, more
// bytes than needed (an overlong form), a surrogate, or a code point above U+10FFFF.
std::size_t sequence_length(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<std::uint8_t>(text[at + i]); };
  const std::size_t left = text.size() - at;
  const std::uint8_t first = byte(0);
  if (first < 0x80) return 1;
  std::size_t length = 0;
  std::uint8_t low = 0x80, high = 0xbf;  // the range of the second byte
  if (first >= 0xc2 && first <= 0xdf) {
    length = 2;
  } else if (first >= 0xe0 && first <= 0xef) {
    length = 3;
    if (first == 0xe0) low = 0xa0;
    if (first == 0xed) high = 0x9f;
  } else if (first >= 0xf0 && first <= 0xf4) {
    length = 4;
    if (first == 0xf0) low = 0x90;
    if (first == 0xf4) high = 0x8f;
  }
  if (length == 0 || length > left || byte(1) < low || byte(1) > high) return 0;
  for (std::size_t i = 2; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  return length;
}

}  // namespace

std::size_t first_invalid_utf8(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t length = sequence_length(text, at);
    if (length == 0) return at;
    at += length;
  }
  return at;
}

std::string printable(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t length = sequence_length(text, at);
    if (out.size() + length > kMaxPrintedBytes) return out + "...";
    const auto byte = static_cast<std::uint8_t>(text[at]);
    const bool control =
        byte < 0x20 || byte == 0x7f ||
        // U+0080 to U+009F: terminals obey these too
        (length == 2 && byte == 0xc2 && static_cast<std::uint8_t>(text[at + 1]) < 0xa0);
    if (length == 0 || control) {
      const std::uint8_t escaped =
          control && length == 2 ? static_cast<std::uint8_t>(text[at + 1]) : byte;
      out += "\\x";
      out += kHex[escaped >> 4];
      out += kHex[escaped & 15];
      at += length == 0 ? 1 : length;
    } else {
      out.append(text, at, length);
      at += length;
    }
  }
  return out;
}

}  // namespace tinyvllm
