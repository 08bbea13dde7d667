// Single tiles in their plainest form, for the references of the codec and of attention.
#pragma once

#include <array>
#include <vector>

#include "core/with_type.h"
#include "formats/tile64/bounds.h"
#include "formats/tile64/tiles.h"

namespace kvpack::reference {

/// The 64 values that a tile stands for, before they are rounded to a type. Throws InvalidArgument for a tile that
/// points outside the payload.
std::array<float, kTileElements> tile_values(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile);

/// One batch as a matrix [tokens, head_dim] whose values are rounded to T: what unpack_tile64 would write.
template <typename T>
std::vector<T> unpack_batch(const Tile64Data& tiles, std::int64_t batch) {
  std::vector<T> matrix(static_cast<std::size_t>(tiles.tokens * tiles.head_dim));
  for (std::int64_t t = 0; t < tiles.tiles; ++t) {
    const std::array<float, kTileElements> values = tile_values(tiles, batch, t);
    const tile64::TilePlace place = tile64::place_of(tiles.kind, tiles.head_dim, t);
    for (std::int64_t i = 0; i < kTileElements; ++i) {
      const std::int64_t token = place.token + (tiles.kind == CacheKind::kKey ? i : 0);
      const std::int64_t channel = place.channel + (tiles.kind == CacheKind::kKey ? 0 : i);
      if (token >= tiles.tokens) continue;  // fills up the last block
      from_float(values[static_cast<std::size_t>(i)],
                 matrix[static_cast<std::size_t>(token * tiles.head_dim + channel)]);
    }
  }
  return matrix;
}

}  // namespace kvpack::reference
