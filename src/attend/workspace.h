// Bytes of working memory that attention on tiles and its two products need on a GPU. The CPU needs none.
#pragma once

#include <cstdint>

#include "formats/tile64/tiles.h"

namespace kvpack {

/// A multiple of 8. `columns` is group * rows; `head_dim` is 64, 128 or 256.
constexpr std::int64_t attend_workspace_bytes(std::int64_t batches, std::int64_t columns, std::int64_t tokens,
                                              std::int64_t head_dim) {
  const std::int64_t blocks = tile64::padded_tokens(tokens) / kTileElements + 1;
  return 8 * (batches * columns * blocks * (head_dim + 2) + 1024);
}

}  // namespace kvpack
