// Reference of checking tiles: what counts as a fault, and which one is found first.
#include <bit>
#include <cmath>

#include "formats/tile64/bounds.h"

namespace kvpack::reference {

namespace {

/// Elements of the payload in one step of an offset.
std::int64_t offset_unit(const Tile64Data& tiles) {
  return tiles.bits == kUnquantizedBits ? tile64_f16::kHalvesPerOffset : 1;
}

Tile64Finding finding(Tile64Fault fault, std::int64_t batch, std::int64_t tile, std::int64_t actual,
                      std::int64_t expected) {
  return {fault, 0, batch, tile, actual, expected};
}

/// Starts and offsets of one tile against those before and after it. `place` counts offsets through all batches.
Tile64Finding check_offsets(const Tile64Data& tiles, std::int64_t b, std::int64_t t) {
  const bool is_f16 = tiles.bits == kUnquantizedBits;
  const std::int64_t place = b * tiles.offsets_stride() + t;
  const std::int64_t offset = tiles.offsets[place];
  if (is_f16 && t == 0 && tiles.starts[b] < 0) return finding(Tile64Fault::kStartNegative, b, t, tiles.starts[b], 0);
  if (offset < 0) return finding(Tile64Fault::kStartNegative, b, t, offset, 0);
  // Offsets of codes run through all batches, those of 16 bits restart.
  const bool has_previous = t > 0 || (!is_f16 && b > 0);
  const std::int64_t previous = has_previous ? tiles.offsets[place - 1] : 0;
  if (offset < previous) return finding(Tile64Fault::kOffsetBackwards, b, t, offset, previous);
  if (t == tiles.tiles) return {};  // the end of a batch of 16 bits
  const tile64::PayloadRange range = tile64::payload_range(tiles, b, t);
  if (range.end > tiles.payload_capacity) {
    return finding(Tile64Fault::kPastTheEnd, b, t, range.end, tiles.payload_capacity);
  }
  const bool has_next = is_f16 || t + 1 < tiles.tiles || b + 1 < tiles.batches;
  const std::int64_t next = has_next ? tiles.offsets[place + 1] : 0;
  const std::int64_t given = (next - offset) * offset_unit(tiles);
  // A next offset that runs backwards is the fault of that one.
  if (has_next && given >= 0 && given != range.end - range.first) {
    return finding(Tile64Fault::kCountDisagrees, b, t, given, range.end - range.first);
  }
  return {};
}

Tile64Finding check_grid(const Tile64Data& tiles, std::int64_t b, std::int64_t t) {
  const float scale = tiles.scales[b * tiles.tiles + t];
  const float zero = tiles.zeros[b * tiles.tiles + t];
  const auto bits_of = [](float value) { return static_cast<std::int64_t>(std::bit_cast<std::uint32_t>(value)); };
  if (!std::isfinite(scale)) return finding(Tile64Fault::kGridNotFinite, b, t, bits_of(scale), 0);
  if (!std::isfinite(zero)) return finding(Tile64Fault::kGridNotFinite, b, t, bits_of(zero), 1);
  if (std::floor(zero) != zero) return finding(Tile64Fault::kZeroNotWhole, b, t, bits_of(zero), 0);
  return {};
}

}  // namespace

Tile64Finding check_tile64(const CheckTile64Problem& problem) {
  const Tile64Data& tiles = problem.tiles;
  for (std::int64_t b = 0; b < tiles.batches; ++b) {
    for (std::int64_t t = 0; t < tiles.offsets_stride(); ++t) {
      Tile64Finding found = check_offsets(tiles, b, t);
      if (found.fault == Tile64Fault::kNone && tiles.scales != nullptr) found = check_grid(tiles, b, t);
      if (found.fault != Tile64Fault::kNone) return found;
    }
  }
  return {};
}

}  // namespace kvpack::reference
