// Finding and refusing tiles that lie outside the payload. No SIMD here.
#include "formats/tile64/bounds.h"

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "core/parallel.h"

namespace kvpack::tile64 {

namespace {

/// The largest offset at which even a full tile lies inside, or -1. Starts below 0 have none.
std::int32_t last_full_offset(const Tile64Data& tiles, std::int64_t batch) {
  std::int64_t last = tiles.payload_capacity - tile64_q::tile_words(kTileElements, tiles.bits);
  if (tiles.bits == kUnquantizedBits) {
    if (tiles.starts[batch] < 0) return -1;
    const std::int64_t room = tiles.payload_capacity - tile64_f16::first_half(tiles.starts[batch], 0) - kTileElements;
    last = room < 0 ? -1 : room / tile64_f16::kHalvesPerOffset;
  }
  return static_cast<std::int32_t>(std::clamp<std::int64_t>(last, -1, std::numeric_limits<std::int32_t>::max()));
}

/// True when all of 64 offsets are 0 to last_full_offset: nearly all are, and bitmaps need not be looked at.
bool all_fit(const std::int32_t* offsets, std::int32_t last) {
  std::int32_t signs = last;
  // Below 0, or above `last`: a sign bit. Where the subtraction could overflow the offset itself has one.
  for (std::int64_t t = 0; t < kTileElements; ++t) {
    const auto offset = static_cast<std::uint32_t>(offsets[t]);
    signs |= static_cast<std::int32_t>(offset | (static_cast<std::uint32_t>(last) - offset));
  }
  return signs >= 0;
}

}  // namespace

void OutsideTile::note(std::int64_t place) noexcept {
  std::int64_t first = first_.load();
  while (place < first && !first_.compare_exchange_weak(first, place)) {
  }
}

void OutsideTile::require_none(const Tile64Data& tiles, const char* name) const {
  const std::int64_t place = first_.load();
  if (place == kNone) return;
  const std::int64_t batch = place / tiles.tiles;
  const std::int64_t tile = place % tiles.tiles;
  const PayloadRange range = payload_range(tiles, batch, tile);
  throw InvalidArgument(text(name, ": batch ", batch, ", tile ", tile, ": takes elements ", range.first, " to ",
                             range.end, " of the payload, which has ", tiles.payload_capacity));
}

void require_inside(const Tile64Data& tiles, const char* name) {
  constexpr std::int64_t kGroupsOfTask = 1024;  // some tens of microseconds
  const std::int64_t batch_groups = tiles.tiles / kTileElements;
  const std::int64_t groups = tiles.batches * batch_groups;
  OutsideTile outside;
  auto check_groups = [&](std::int64_t first_group, std::int64_t end) {
    for (std::int64_t group = first_group; group < end; ++group) {
      const std::int64_t batch = group / batch_groups;
      const std::int64_t first = group % batch_groups * kTileElements;
      if (all_fit(tiles.offsets + batch * tiles.offsets_stride() + first, last_full_offset(tiles, batch))) continue;
      for (std::int64_t t = first; t < first + kTileElements; ++t) {
        if (!is_inside(tiles, payload_range(tiles, batch, t))) outside.note(batch * tiles.tiles + t);
      }
    }
  };
  parallel_for_blocks(0, groups, kGroupsOfTask, check_groups);
  outside.require_none(tiles, name);
}

void throw_too_small(const Tile64Data& out, std::int64_t taken) {
  throw InvalidArgument(text("out.payload has ", out.payload_capacity, " elements; the tiles take ", taken));
}

}  // namespace kvpack::tile64
