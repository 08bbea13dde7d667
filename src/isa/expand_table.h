// The inverse of isa/compress_table.h: lane i of a mask takes kept value number popcount(mask below i). AVX2 has no
// expand instruction. Lanes that are not kept take value 0 and must be cleared by the caller.
#pragma once

#include <array>
#include <cstdint>

namespace kvpack {

struct ExpandTable {
  alignas(8) std::array<std::array<std::uint8_t, 8>, 256> lanes{};
};

constexpr ExpandTable make_expand_table() {
  ExpandTable table;
  for (std::uint32_t mask = 0; mask < 256; ++mask) {
    std::uint8_t kept = 0;
    for (std::uint32_t lane = 0; lane < 8; ++lane) {
      if ((mask >> lane) & 1u) table.lanes[mask][lane] = kept++;
    }
  }
  return table;
}

inline constexpr ExpandTable kExpandTable = make_expand_table();

}  // namespace kvpack
