// Where a tile's payload lies, for code that must not trust offsets, starts or bitmaps: on the CPU a tile that points
// outside the payload is the caller's mistake.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>

#include "core/portable.h"
#include "formats/tile64/implementations.h"
#include "formats/tile64_f16/layout.h"
#include "formats/tile64_q/layout.h"

namespace kvpack::tile64 {

/// Elements of the payload (halves or words), padding included: [first, end).
struct PayloadRange {
  std::int64_t first;
  std::int64_t end;
};

/// What the bytes say of a tile of `count` survivors; the range may lie anywhere.
KVPACK_HOST_DEVICE inline PayloadRange payload_range(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile,
                                                     std::int64_t count) {
  const std::int32_t offset = tiles.offsets[batch * tiles.offsets_stride() + tile];
  if (tiles.bits != kUnquantizedBits) return {offset, offset + tile64_q::tile_words(count, tiles.bits)};
  const std::int64_t first = tile64_f16::first_half(tiles.starts[batch], offset);
  return {first, first + tile64_f16::tile_halves(count)};
}

/// The same of a tile with as many survivors as its bitmap has bits.
inline PayloadRange payload_range(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile) {
  return payload_range(tiles, batch, tile, std::popcount(tiles.bitmaps[batch * tiles.tiles + tile]));
}

/// True when a tile can be read: its survivors and their padding. One without survivors reads nothing, wherever it points.
inline bool is_inside(const Tile64Data& tiles, PayloadRange range) {
  return range.first == range.end || (range.first >= 0 && range.end <= tiles.payload_capacity);
}

/// The first tile of a call that lies outside the payload. Tasks note it, the calling thread throws.
class OutsideTile {
 public:
  /// Keeps the lowest place, so that every run names the same tile. Places count tiles through all batches.
  void note(std::int64_t place) noexcept;
  /// Throws InvalidArgument if a tile was noted. `name` is what the caller calls the tiles.
  void require_none(const Tile64Data& tiles, const char* name) const;

 private:
  static constexpr std::int64_t kNone = INT64_MAX;
  std::atomic<std::int64_t> first_{kNone};
};

/// Throws InvalidArgument if any tile lies outside the payload, for functions that write before they have read everything.
void require_inside(const Tile64Data& tiles, const char* name);

/// Throws InvalidArgument: compressing needs `taken` elements of payload.
[[noreturn]] void throw_too_small(const Tile64Data& out, std::int64_t taken);

}  // namespace kvpack::tile64
