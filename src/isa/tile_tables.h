// Byte orders that move 16-bit lanes of an 8-lane vector to its front, and back: AVX2 has no compress or expand.
#pragma once

#include <array>
#include <cstdint>

namespace kvpack {

struct TileTable {
  alignas(16) std::array<std::array<std::uint8_t, 16>, 256> bytes{};
};

inline constexpr std::uint8_t kClearByte = 0x80;  // what makes vpshufb write a zero

/// Entry m moves the lanes of m's set bits to the front; the other lanes become zero.
constexpr TileTable make_compress_words_table() {
  TileTable table;
  for (std::uint32_t mask = 0; mask < 256; ++mask) {
    table.bytes[mask].fill(kClearByte);
    std::size_t kept = 0;
    for (std::uint32_t lane = 0; lane < 8; ++lane) {
      if (((mask >> lane) & 1u) == 0) continue;
      table.bytes[mask][2 * kept] = static_cast<std::uint8_t>(2 * lane);
      table.bytes[mask][2 * kept + 1] = static_cast<std::uint8_t>(2 * lane + 1);
      ++kept;
    }
  }
  return table;
}

/// Entry m moves the first lanes to the places of m's set bits; the other lanes become zero.
constexpr TileTable make_expand_words_table() {
  TileTable table;
  for (std::uint32_t mask = 0; mask < 256; ++mask) {
    table.bytes[mask].fill(kClearByte);
    std::size_t taken = 0;
    for (std::uint32_t lane = 0; lane < 8; ++lane) {
      if (((mask >> lane) & 1u) == 0) continue;
      table.bytes[mask][2 * lane] = static_cast<std::uint8_t>(2 * taken);
      table.bytes[mask][2 * lane + 1] = static_cast<std::uint8_t>(2 * taken + 1);
      ++taken;
    }
  }
  return table;
}

inline constexpr TileTable kCompressWords = make_compress_words_table();
inline constexpr TileTable kExpandWords = make_expand_words_table();

}  // namespace kvpack
