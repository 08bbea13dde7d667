// Blocks of tiles on the CPU: the two passes of compressing, and what unpacking checks first. No SIMD here.
#include "formats/tile64/blocks.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"

namespace kvpack::tile64 {

namespace {

void require_inside(const Tile64Data& tiles, FindOutside find_outside) {
  constexpr std::int64_t kNone = -1;
  std::atomic<std::int64_t> outside{kNone};  // one of them, counted through all batches
  const std::int64_t blocks = tiles.tiles / tiles.head_dim;
  auto check_block = [&](std::int64_t task) {
    const std::int64_t tile = find_outside(tiles, {task / blocks, task % blocks});
    if (tile >= 0) outside.store(task / blocks * tiles.tiles + tile);
  };
  parallel_for(tiles.batches * blocks, check_block);
  if (outside.load() == kNone) return;
  const std::int64_t batch = outside.load() / tiles.tiles;
  const std::int64_t tile = outside.load() % tiles.tiles;
  const PayloadRange range = range_of(tiles, batch, tile, std::popcount(tiles.bitmaps[outside.load()]));
  throw InvalidArgument(text("tile ", tile, " of batch ", batch, " takes payload elements ", range.first, " to ",
                             range.end, "; the payload has ", tiles.payload_capacity));
}

}  // namespace

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

void unpack_blocks(const UnpackTile64Problem& problem, FindOutside find_outside, UnpackBlock unpack_block) {
  const Tile64Data& tiles = problem.tiles;
  require_inside(tiles, find_outside);
  const std::int64_t blocks = tiles.tiles / tiles.head_dim;
  auto unpack_task = [&](std::int64_t task) { unpack_block(problem, {task / blocks, task % blocks}); };
  parallel_for(tiles.batches * blocks, unpack_task);
}

}  // namespace kvpack::tile64
