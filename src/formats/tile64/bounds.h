// Where a tile's payload lies, for code that must not trust offsets, starts or bitmaps: on the CPU a tile that points
// outside the payload is the caller's mistake.
#pragma once

#include <bit>
#include <cstdint>

#include "core/check.h"
#include "formats/tile64/implementations.h"
#include "formats/tile64_f16/layout.h"
#include "formats/tile64_q/layout.h"

namespace kvpack::tile64 {

/// Elements of the payload (halves or words), padding included: [first, end).
struct PayloadRange {
  std::int64_t first;
  std::int64_t end;
};

/// What the bytes say; the range may lie anywhere.
inline PayloadRange payload_range(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile) {
  const std::int64_t count = std::popcount(tiles.bitmaps[batch * tiles.tiles + tile]);
  const std::int32_t offset = tiles.offsets[batch * tiles.offsets_stride() + tile];
  if (tiles.bits != kUnquantizedBits) return {offset, offset + tile64_q::tile_words(count, tiles.bits)};
  const std::int64_t first = tile64_f16::first_half(tiles.starts[batch], offset);
  return {first, first + tile64_f16::tile_halves(count)};
}

/// True when a range can be read. A tile without survivors reads nothing, wherever it points.
inline bool is_inside(const Tile64Data& tiles, PayloadRange range) {
  return range.first == range.end || (range.first >= 0 && range.end <= tiles.payload_capacity);
}

/// Throws InvalidArgument that names the tile.
[[noreturn]] inline void throw_outside(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile) {
  const PayloadRange range = payload_range(tiles, batch, tile);
  throw InvalidArgument(text("batch ", batch, ", tile ", tile, ": takes elements ", range.first, " to ", range.end,
                             " of the payload, which has ", tiles.payload_capacity));
}

/// Throws InvalidArgument: compressing needs `taken` elements of payload.
[[noreturn]] inline void throw_too_small(const Tile64Data& out, std::int64_t taken) {
  throw InvalidArgument(text("out.payload has ", out.payload_capacity, " elements; the tiles take ", taken));
}

}  // namespace kvpack::tile64
