// Blocks of tiles on the CPU: the two passes of compressing, and what unpacking checks first. No SIMD here.
#include "formats/tile64/blocks.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "formats/tile64_f16/layout.h"
#include "formats/tile64_q/layout.h"

namespace kvpack::tile64 {

namespace {

/// Payload elements that a tile reads, as the bytes describe it: [first, end).
struct Range {
  std::int64_t first;
  std::int64_t end;
};

Range range_of(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile) {
  const std::int64_t count = std::popcount(tiles.bitmaps[batch * tiles.tiles + tile]);
  const std::int32_t offset = tiles.offsets[batch * tiles.offsets_stride() + tile];
  if (tiles.bits != kUnquantizedBits) return {offset, offset + tile64_q::tile_words(count, tiles.bits)};
  const std::int64_t first = tile64_f16::first_half(tiles.starts[batch], offset);
  return {first, first + count};
}

void require_inside(const Tile64Data& tiles) {
  constexpr std::int64_t kNone = -1;
  std::atomic<std::int64_t> bad_tile{kNone};
  const std::int64_t blocks = tiles.tiles / tiles.head_dim;
  auto check_block = [&](std::int64_t task) {
    const std::int64_t batch = task / blocks;
    for (std::int64_t i = 0; i < tiles.head_dim; ++i) {
      const std::int64_t tile = task % blocks * tiles.head_dim + i;
      const Range range = range_of(tiles, batch, tile);
      // Without survivors nothing is read, wherever the tile points.
      if (range.first == range.end) continue;
      if (range.first < 0 || range.end > tiles.payload_capacity) bad_tile.store(batch * tiles.tiles + tile);
    }
  };
  parallel_for(tiles.batches * blocks, check_block);
  if (bad_tile.load() == kNone) return;
  const std::int64_t batch = bad_tile.load() / tiles.tiles;
  const std::int64_t tile = bad_tile.load() % tiles.tiles;
  const Range range = range_of(tiles, batch, tile);
  throw InvalidArgument(text("tile ", tile, " of batch ", batch, " takes payload elements ", range.first, " to ",
                             range.end, "; the payload has ", tiles.payload_capacity));
}

}  // namespace

std::int64_t tile_elements(std::int32_t bits, std::int64_t count) {
  return bits == kUnquantizedBits ? tile64_f16::tile_halves(count) : tile64_q::tile_words(count, bits);
}

void compress_blocks(const CompressTile64Problem& problem, MaskBlock mask_block, WriteBlock write_block) {
  const Tile64Data& out = problem.out;
  const std::int64_t blocks = out.tiles / out.head_dim;
  const std::int64_t num_tasks = out.batches * blocks;
  // 64 bits for 64 elements; not the output's bitmaps, which must stay as they are if the payload is too small.
  const auto masks = std::make_unique_for_overwrite<std::uint64_t[]>(static_cast<std::size_t>(out.batches * out.tiles));
  std::vector<std::int64_t> ends(static_cast<std::size_t>(num_tasks) + 1, 0);  // of blocks; ends[0] is 0
  auto mask_task = [&](std::int64_t task) {
    ends[static_cast<std::size_t>(task) + 1] =
        mask_block(problem, {task / blocks, task % blocks}, masks.get() + task * out.head_dim);
  };
  parallel_for(num_tasks, mask_task);
  for (std::size_t i = 1; i < ends.size(); ++i) ends[i] += ends[i - 1];
  require(ends.back() <= out.payload_capacity, "the tiles take ", ends.back(), " payload elements; the payload has ",
          out.payload_capacity);

  auto write_task = [&](std::int64_t task) {
    const std::int64_t batch = task / blocks;
    const PayloadPlace place{ends[static_cast<std::size_t>(task)], ends[static_cast<std::size_t>(batch * blocks)],
                             ends[static_cast<std::size_t>(task) + 1]};
    write_block(problem, {batch, task % blocks}, masks.get() + task * out.head_dim, place);
  };
  parallel_for(num_tasks, write_task);
  if (out.bits == kUnquantizedBits) {
    for (std::int64_t batch = 0; batch < out.batches; ++batch) {
      const std::int64_t first = ends[static_cast<std::size_t>(batch * blocks)];
      const std::int64_t end = ends[static_cast<std::size_t>((batch + 1) * blocks)];
      out.starts[batch] = static_cast<std::int32_t>(first / tile64_f16::kHalvesPerStart);
      out.offsets[batch * out.offsets_stride() + out.tiles] =
          static_cast<std::int32_t>((end - first) / tile64_f16::kHalvesPerOffset);
    }
  }
  if (problem.used != nullptr) *problem.used = ends.back();
}

void unpack_blocks(const UnpackTile64Problem& problem, UnpackBlock unpack_block) {
  const Tile64Data& tiles = problem.tiles;
  require_inside(tiles);
  const std::int64_t blocks = tiles.tiles / tiles.head_dim;
  auto unpack_task = [&](std::int64_t task) { unpack_block(problem, {task / blocks, task % blocks}); };
  parallel_for(tiles.batches * blocks, unpack_task);
}

}  // namespace kvpack::tile64
