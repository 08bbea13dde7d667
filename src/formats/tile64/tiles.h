// Which element of a matrix [tokens, head_dim] is where in tiles: shared by both tile formats, on CPU and GPU.
//
//   key tiles (head_dim 128)                      value tiles (head_dim 128, so two parts h)
//   tile   0 .. 127   channel = tile              tile   0 ..  63   token = tile,      channels  0 ..  63
//                     tokens  0 .. 63             tile  64 .. 127   token = tile - 64, channels 64 .. 127
//   tile 128 .. 255   channel = tile - 128        tile 128 .. 191   token = tile - 64, channels  0 ..  63
//                     tokens 64 .. 127
#pragma once

#include <cstdint>

#include "core/divide_up.h"
#include "core/portable.h"
#include "kvpack/tile64.h"

namespace kvpack::tile64 {

/// Where the first element of a tile lies; element i is i tokens (keys) or i channels (values) further.
struct TilePlace {
  std::int64_t token;
  std::int64_t channel;
};

/// The matrix place of tile `tile` of one batch.
KVPACK_HOST_DEVICE inline TilePlace place_of(CacheKind kind, std::int64_t head_dim, std::int64_t tile) {
  const std::int64_t block = tile / head_dim;
  const std::int64_t within = tile % head_dim;
  if (kind == CacheKind::kKey) return {block * kTileElements, within};
  return {block * kTileElements + within % kTileElements, within / kTileElements * kTileElements};
}

/// The bitmap bit of element i of a tile: most significant first.
KVPACK_HOST_DEVICE constexpr std::uint64_t bitmap_bit(int element) { return std::uint64_t{1} << (63 - element); }

/// Blocks of 64 tokens of one batch.
KVPACK_HOST_DEVICE constexpr std::int64_t blocks_of(std::int64_t tokens) { return divide_up(tokens, kTileElements); }

/// Tokens including those that fill up the last block.
KVPACK_HOST_DEVICE constexpr std::int64_t padded_tokens(std::int64_t tokens) { return round_up(tokens, kTileElements); }

}  // namespace kvpack::tile64
