// From compressed tiles to floats, 64 tiles at a time, in the instruction set at hand. Compiled once per instruction set.

#if KVPACK_ISA_LANES == 16
#include "attend/expand_avx512.h"
#elif KVPACK_ISA_LANES == 8
#include "attend/expand_avx2.h"
#else
#include "attend/expand_scalar.h"
#endif

namespace kvpack::KVPACK_ISA {
namespace {

/// The tiles of one batch as the loop below reads them.
template <typename Survivor>
class TileReader {
 public:
  TileReader(const Tile64Data& tiles, std::int64_t batch, OutsideTile& outside)
      : tiles_(tiles),
        batch_(batch),
        outside_(outside),
        bitmaps_(tiles.bitmaps + batch * tiles.tiles),
        offsets_(tiles.offsets + batch * tiles.offsets_stride()),
        payload_(static_cast<const std::byte*>(tiles.payload)) {
    if constexpr (Survivor::kHasGrid) {
      scales_ = tiles.scales + batch * tiles.tiles;
      zeros_ = tiles.zeros + batch * tiles.tiles;
    } else {
      base_ = tiles.starts[batch];
    }
    constexpr std::int64_t kElementBytes = Survivor::kHasGrid ? 4 : 2;
    last_whole_ = tiles.payload_capacity * kElementBytes - Survivor::kReadBytes;
  }

  /// Writes tiles [first, first + kTileElements) as `out` [kTileElements][64] floats, each in the lane order that
  /// order_elements puts right. `first` is a multiple of 64.
  void expand_tiles(std::int64_t first, float* out) const {
    std::uint64_t masks[kTileElements];
    reverse_bitmaps(bitmaps_ + first, masks);
    for (std::int64_t t = 0; t < kTileElements; ++t) {
      const std::int64_t tile = first + t;
      const std::int64_t byte = start_of(tile);
      tile64_q::Grid grid;
      if constexpr (Survivor::kHasGrid) grid = {scales_[tile], zeros_[tile]};
      // Nearly all tiles lie so far from the payload's end that no count is needed to read them safely.
      if (byte >= 0 && byte <= last_whole_) [[likely]] {
        expand(Survivor{}, masks[t], payload_ + byte, grid, out + t * kTileElements);
      } else {
        expand_copy(tile, masks[t], grid, out + t * kTileElements);
      }
    }
  }

  /// Asks for what expand_tiles(first, ..) will read, up to the payload, which the processor streams by itself.
  void prefetch(std::int64_t first) const {
    if (first >= tiles_.tiles) return;
    for (std::int64_t t = 0; t < kTileElements; t += 8) __builtin_prefetch(bitmaps_ + first + t);
    for (std::int64_t t = 0; t < kTileElements; t += 16) {
      __builtin_prefetch(offsets_ + first + t);
      if constexpr (Survivor::kHasGrid) {
        __builtin_prefetch(scales_ + first + t);
        __builtin_prefetch(zeros_ + first + t);
      }
    }
  }

 private:
  [[nodiscard]] std::int64_t start_of(std::int64_t tile) const {
    if constexpr (Survivor::kHasGrid) return std::int64_t{4} * offsets_[tile];
    return 2 * tile64_f16::first_half(base_, offsets_[tile]);
  }

  [[gnu::noinline]] void expand_copy(std::int64_t tile, std::uint64_t mask, tile64_q::Grid grid, float* out) const {
    std::byte buffer[Survivor::kReadBytes];
    copy_tile(tiles_, batch_, tile, &mask, buffer, Survivor::kReadBytes, outside_);
    expand(Survivor{}, mask, buffer, grid, out);
  }

  const Tile64Data& tiles_;
  std::int64_t batch_;
  OutsideTile& outside_;
  const std::uint64_t* bitmaps_;
  const std::int32_t* offsets_;
  const std::byte* payload_;
  const float* scales_ = nullptr;
  const float* zeros_ = nullptr;
  std::int32_t base_ = 0;
  std::int64_t last_whole_ = 0;  // last byte from which kReadBytes may be read
};

}  // namespace
}  // namespace kvpack::KVPACK_ISA
