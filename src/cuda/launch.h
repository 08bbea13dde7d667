// Sizes of grids. Every kernel loops over its tiles in steps of the grid, so a capped grid is still correct.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/divide_up.h"

namespace kvpack::cuda {

inline constexpr int kWarpLanes = 32;

/// Blocks for `num_tiles` tiles: one each up to a cap far above what any GPU holds at a time.
inline int grid_blocks(std::int64_t num_tiles) {
  constexpr std::int64_t kMostBlocks = 1 << 20;
  return static_cast<int>(std::clamp<std::int64_t>(num_tiles, 1, kMostBlocks));
}

}  // namespace kvpack::cuda
