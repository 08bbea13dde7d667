// Blocks of tiles on the CPU: the two passes of compressing, and the one of unpacking. No SIMD here.
#include "formats/tile64/blocks.h"

#include <memory>
#include <vector>

#include "core/parallel.h"
#include "formats/tile64/bounds.h"

namespace kvpack::tile64 {

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
  if (ends.back() > out.payload_capacity) throw_too_small(out, ends.back());

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
  require_inside(tiles, "tiles");
  const std::int64_t blocks = tiles.tiles / tiles.head_dim;
  auto unpack_task = [&](std::int64_t task) { unpack_block(problem, {task / blocks, task % blocks}); };
  parallel_for(tiles.batches * blocks, unpack_task);
}

}  // namespace kvpack::tile64
