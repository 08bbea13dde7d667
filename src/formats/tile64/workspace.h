// Working memory of compress_tile64 on a GPU: how its bytes are shared out, for the entry that asks for them and the
// kernels that use them.
//
//   | sizes: int32 [blocks] | up to 16 bytes | slot of block 0 | slot of block 1 | ...
//
// A block is 64 tokens of one batch. Its payload lies in its slot, which holds the worst case, until the sizes of all
// blocks before it are known: nothing has to be counted in advance, and no block waits for another one.
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "formats/tile64/tiles.h"

namespace kvpack::tile64 {

inline constexpr std::int64_t kSlotAlignment = 16;

/// Bytes of a block whose survivors are all of its elements: head_dim tiles of 64 * bits bits, whatever the format.
KVPACK_HOST_DEVICE constexpr std::int64_t slot_bytes(std::int32_t bits, std::int64_t head_dim) {
  return head_dim * kTileElements * bits / 8;
}

/// Bytes that compress_tile64 needs on a GPU, a multiple of 8.
constexpr std::int64_t compress_workspace_bytes(std::int32_t bits, std::int64_t batches, std::int64_t tokens,
                                                std::int64_t head_dim) {
  const std::int64_t blocks = batches * blocks_of(tokens);
  const std::int64_t words = divide_up(blocks, 2);  // of 8 bytes, for the sizes
  return words * static_cast<std::int64_t>(sizeof(std::int64_t)) + kSlotAlignment + blocks * slot_bytes(bits, head_dim);
}

}  // namespace kvpack::tile64
