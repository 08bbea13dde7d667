// How the CPU goes through tiles: blocks of 64 tokens in parallel, in two passes for compressing. The first finds every
// tile's survivors, so that the payload's size is known before anything is written; the second writes.
#pragma once

#include <cstdint>

#include "formats/tile64/implementations.h"

namespace kvpack::tile64 {

/// One block of 64 tokens of one batch: head_dim tiles.
struct Block {
  std::int64_t batch;
  std::int64_t index;  // within the batch
};

/// Where a block's tiles go in the payload, in its elements.
struct PayloadPlace {
  std::int64_t first;        // of the block, from the payload's start
  std::int64_t batch_first;  // of the block's batch
  std::int64_t end;          // of the block
};

/// Writes the head_dim survivor masks of a block in order of tiles (bit i is element i); returns the payload elements
/// that the block takes.
using MaskBlock = std::int64_t (*)(const CompressTile64Problem& problem, Block block, std::uint64_t* masks);

/// Writes bitmaps, offsets, grids and payload of a block.
using WriteBlock = void (*)(const CompressTile64Problem& problem, Block block, const std::uint64_t* masks,
                            PayloadPlace place);

/// Writes the dense elements of a block whose tiles lie inside the payload.
using UnpackBlock = void (*)(const UnpackTile64Problem& problem, Block block);

/// Compresses block by block.
///   Throws    InvalidArgument before anything is written when the payload is too small
void compress_blocks(const CompressTile64Problem& problem, MaskBlock mask_block, WriteBlock write_block);

/// Unpacks block by block.
///   Throws    InvalidArgument before anything is written when a tile lies outside the payload
void unpack_blocks(const UnpackTile64Problem& problem, UnpackBlock unpack_block);

}  // namespace kvpack::tile64
