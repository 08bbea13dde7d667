// The checks of tiles and of dense matrices that both entries share (tile64.cpp, attend.cpp), and their way to plain
// pointers.
#pragma once

#include <cstdint>

#include "core/check.h"
#include "formats/tile64/implementations.h"

namespace kvpack::tile64 {

/// Throws InvalidArgument unless `bits` is 1, 2, 4, 8 or 16 and `batches` matrices fit the int32 offsets of the format
/// even when nothing is pruned. Returns the tiles of one batch.
std::int64_t require_size(std::int32_t bits, std::int64_t batches, std::int64_t tokens, std::int64_t head_dim);

/// Checks all that Tile64 promises of its views (not of their bytes) and gives them as plain pointers. `name` is what
/// the caller calls the tiles.
Tile64Data checked_tiles(const Tile64& tiles, const char* name);

/// Batches of [batches, tokens, head_dim] or [batch, kv_heads, tokens, head_dim].
std::int64_t num_matrices(const TensorView& view);

/// Checks a dense view of rank 3 or 4 against the tiles it belongs to: shape, type, device, strides, memory.
DenseMatrices checked_matrices(const TensorView& view, const char* name, const Tile64Data& tiles, const Device& device);

}  // namespace kvpack::tile64
