// Text that may go into a message.
#pragma once

#include <algorithm>
#include <string>

namespace agl_grpc {

/// The first line of a text, at most so many bytes, as UTF-8: what is none becomes "?".
inline std::string first_line(const std::string& text, size_t most) {
  std::string line;
  for (size_t at = 0; at < text.size() && text[at] != '\n';) {
    const auto lead = static_cast<unsigned char>(text[at]);
    size_t length = lead < 0x80                   ? 1
                    : lead >= 0xc2 && lead < 0xe0 ? 2
                    : lead >= 0xe0 && lead < 0xf0 ? 3
                    : lead >= 0xf0 && lead < 0xf5 ? 4
                                                  : 0;
    bool good = length > 0 && at + length <= text.size();
    for (size_t next = 1; good && next < length; next++)
      good = (static_cast<unsigned char>(text[at + next]) & 0xc0) == 0x80;
    if (good && length > 2) {  // overlong forms, surrogates and what lies beyond Unicode
      const auto second = static_cast<unsigned char>(text[at + 1]);
      good = !(lead == 0xe0 && second < 0xa0) && !(lead == 0xed && second > 0x9f) && !(lead == 0xf0 && second < 0x90) &&
             !(lead == 0xf4 && second > 0x8f);
    }
    if (!good) length = 1;
    if (line.size() + length > most) break;
    line += good ? text.substr(at, length) : "?";
    at += length;
  }
  return line;
}

}  // namespace agl_grpc
