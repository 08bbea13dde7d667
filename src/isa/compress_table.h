// Lane orders that move the kept lanes of an 8-lane vector to its front: AVX2 has no compress instruction.
#pragma once

#include <array>
#include <cstdint>

namespace kvpack {

struct CompressTable {
  alignas(32) std::array<std::array<std::uint32_t, 8>, 256> lanes{};
};

constexpr CompressTable make_compress_table() {
  CompressTable table;
  for (std::uint32_t mask = 0; mask < 256; ++mask) {
    std::size_t kept = 0;
    for (std::uint32_t lane = 0; lane < 8; ++lane) {
      if ((mask >> lane) & 1u) table.lanes[mask][kept++] = lane;
    }
  }
  return table;
}

inline constexpr CompressTable kCompressTable = make_compress_table();

}  // namespace kvpack
