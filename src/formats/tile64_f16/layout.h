// THE home of tile64_f16's bytes beside the bitmaps: where a tile's survivors lie. Spec with an example:
// docs/formats/tile64_f16.md.
//
//   payload of batch b starts at half 8 * starts[b]; its tile t at half 2 * offsets[b, t] from there
//   | h0 h1 h2 .. h(n-1) 0 .. 0 |   n survivors in ascending element order, then zeros up to a multiple of 8 halves
#pragma once

#include <cstdint>

#include "core/divide_up.h"
#include "core/portable.h"

namespace kvpack::tile64_f16 {

inline constexpr std::int64_t kTilePadHalves = 8;    // a tile takes a multiple of this many halves
inline constexpr std::int64_t kHalvesPerOffset = 2;  // unit of offsets: uint32
inline constexpr std::int64_t kHalvesPerStart = 8;   // unit of starts: 16 bytes

/// Halves that a tile of `count` survivors takes.
KVPACK_HOST_DEVICE constexpr std::int64_t tile_halves(std::int64_t count) { return round_up(count, kTilePadHalves); }

/// First half of a tile in the payload of all batches.
KVPACK_HOST_DEVICE constexpr std::int64_t first_half(std::int32_t start, std::int32_t offset) {
  return start * kHalvesPerStart + offset * kHalvesPerOffset;
}

}  // namespace kvpack::tile64_f16
