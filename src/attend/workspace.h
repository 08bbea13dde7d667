// Working memory of attention on tiles on a GPU, and how tokens are split: shared by the entry and the CUDA side.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/divide_up.h"
#include "formats/tile64/tiles.h"

namespace kvpack {

/// Most splits of the tokens for `units` independent pieces of work (a batch's 64 channels): enough thread blocks for a
/// GPU of 132 multiprocessors and more, without partial sums that outweigh the tiles.
constexpr std::int64_t most_splits(std::int64_t units) {
  return std::clamp<std::int64_t>(2048 / std::max<std::int64_t>(units, 1), 1, 256);
}

/// The parts of the working memory, each a multiple of 256 bytes: logits [batches, columns, tokens up to a multiple of
/// 64] float32; sums [batches, splits, columns, head_dim] float32; maxima [batches, splits, columns] two float32.
struct AttendWorkspace {
  std::int64_t logits_bytes = 0;
  std::int64_t sums_bytes = 0;
  std::int64_t maxima_bytes = 0;
  [[nodiscard]] constexpr std::int64_t bytes() const { return logits_bytes + sums_bytes + maxima_bytes; }
};

constexpr AttendWorkspace attend_workspace(std::int64_t batches, std::int64_t columns, std::int64_t tokens,
                                           std::int64_t head_dim) {
  const auto rounded = [](std::int64_t bytes) { return round_up(bytes, 256); };
  const std::int64_t blocks = tile64::blocks_of(tokens);
  const std::int64_t units = batches * std::max<std::int64_t>(head_dim / kTileElements, 1);
  const std::int64_t rows = batches * columns * std::min(most_splits(units), std::max<std::int64_t>(blocks, 1));
  return {rounded(batches * columns * blocks * kTileElements * 4), rounded(rows * head_dim * 4), rounded(rows * 8)};
}

constexpr std::int64_t attend_workspace_bytes(std::int64_t batches, std::int64_t columns, std::int64_t tokens,
                                              std::int64_t head_dim) {
  return attend_workspace(batches, columns, tokens, head_dim).bytes();
}

}  // namespace kvpack
