// Tiles at and beyond the payload's end: off the hot path.
#include "attend/survivors.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/check.h"

namespace kvpack {

void OutsideTile::note(std::int64_t batch, std::int64_t tile, std::int64_t tiles) noexcept {
  const std::int64_t place = batch * tiles + tile;
  std::int64_t first = first_.load(std::memory_order_relaxed);
  while (place < first && !first_.compare_exchange_weak(first, place, std::memory_order_relaxed)) {
  }
}

namespace {

/// Payload elements that a tile of `count` survivors takes.
std::int64_t tile_elements(const Tile64Data& tiles, std::int64_t count) {
  return tiles.bits == kUnquantizedBits ? tile64_f16::tile_halves(count) : tile64_q::tile_words(count, tiles.bits);
}

std::int64_t element_bytes_of(const Tile64Data& tiles) { return tiles.bits == kUnquantizedBits ? 2 : 4; }

std::int64_t first_element(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile) {
  const std::int32_t offset = tiles.offsets[batch * tiles.offsets_stride() + tile];
  return tiles.bits == kUnquantizedBits ? tile64_f16::first_half(tiles.starts[batch], offset) : offset;
}

}  // namespace

void OutsideTile::require_none(const Tile64Data& tiles, const char* name) const {
  const std::int64_t place = first_.load();
  if (place == kNone) return;
  const std::int64_t batch = place / tiles.tiles;
  const std::int64_t tile = place % tiles.tiles;
  const std::int64_t count = std::popcount(tiles.bitmaps[place]);
  const std::int64_t first = first_element(tiles, batch, tile);
  throw InvalidArgument(text("tile ", tile, " of batch ", batch, " of ", name, " takes payload elements ", first,
                             " to ", first + tile_elements(tiles, count), "; the payload has 0 to ",
                             tiles.payload_capacity));
}

void copy_tile(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile, std::uint64_t* mask, std::byte* buffer,
               std::int64_t buffer_bytes, OutsideTile& outside) {
  std::memset(buffer, 0, static_cast<std::size_t>(buffer_bytes));
  const std::int64_t elements = tile_elements(tiles, std::popcount(*mask));
  const std::int64_t first = first_element(tiles, batch, tile);
  if (first < 0 || first + elements > tiles.payload_capacity) {
    outside.note(batch, tile, tiles.tiles);
    *mask = 0;
    return;
  }
  const std::int64_t bytes = std::min(elements * element_bytes_of(tiles), buffer_bytes);
  const auto* payload = static_cast<const std::byte*>(tiles.payload);
  if (bytes > 0) {
    std::memcpy(buffer, payload + first * element_bytes_of(tiles), static_cast<std::size_t>(bytes));
  }
}

}  // namespace kvpack
