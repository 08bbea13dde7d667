// Single tiles in their plainest form, for the references of the codec and of attention.
#pragma once

#include <array>
#include <type_traits>
#include <vector>

#include "core/with_type.h"
#include "formats/tile64/bounds.h"
#include "formats/tile64/tiles.h"

namespace kvpack::reference {

/// What survivor j of a tile of codes stands for. `place` counts tiles through all batches, `first` is the tile's word.
float code_value(const Tile64Data& tiles, std::int64_t place, std::int64_t first, std::int64_t j);

/// Survivor j of a tile in type T: one that T holds already keeps its bits, so a signalling NaN stays one.
template <typename T>
T survivor(const Tile64Data& tiles, std::int64_t place, std::int64_t first, std::int64_t j) {
  T element{};
  const auto convert = [&]<typename Stored>(Stored stored) {
    if constexpr (std::is_same_v<Stored, T>) {
      element = stored;
    } else {
      from_float(to_float(stored), element);
    }
  };
  if (tiles.bits != kUnquantizedBits) {
    convert(code_value(tiles, place, first, j));
  } else if (tiles.payload_type == DType::kFloat16) {
    convert(static_cast<const Half*>(tiles.payload)[first + j]);
  } else {
    convert(static_cast<const BFloat16*>(tiles.payload)[first + j]);
  }
  return element;
}

/// The 64 elements that a tile inside the payload stands for, rounded to T.
template <typename T>
std::array<T, kTileElements> tile_elements(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile) {
  const std::int64_t first = tile64::payload_range(tiles, batch, tile).first;
  const std::int64_t place = batch * tiles.tiles + tile;
  std::array<T, kTileElements> elements{};
  std::int64_t j = 0;  // survivors so far
  for (int i = 0; i < kTileElements; ++i) {
    if ((tiles.bitmaps[place] & tile64::bitmap_bit(i)) == 0) continue;
    elements[static_cast<std::size_t>(i)] = survivor<T>(tiles, place, first, j++);
  }
  return elements;
}

/// One batch as a matrix [tokens, head_dim] of T: what unpack_tile64 would write. The tiles lie inside the payload.
template <typename T>
std::vector<T> unpack_batch(const Tile64Data& tiles, std::int64_t batch) {
  std::vector<T> matrix(static_cast<std::size_t>(tiles.tokens * tiles.head_dim));
  for (std::int64_t t = 0; t < tiles.tiles; ++t) {
    const std::array<T, kTileElements> elements = tile_elements<T>(tiles, batch, t);
    const tile64::TilePlace place = tile64::place_of(tiles.kind, tiles.head_dim, t);
    for (std::int64_t i = 0; i < kTileElements; ++i) {
      const std::int64_t token = place.token + (tiles.kind == CacheKind::kKey ? i : 0);
      const std::int64_t channel = place.channel + (tiles.kind == CacheKind::kKey ? 0 : i);
      if (token >= tiles.tokens) continue;  // fills up the last block
      matrix[static_cast<std::size_t>(token * tiles.head_dim + channel)] = elements[static_cast<std::size_t>(i)];
    }
  }
  return matrix;
}

}  // namespace kvpack::reference
