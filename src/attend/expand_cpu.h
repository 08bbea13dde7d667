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

/// The tiles of one batch as the loop below reads them. One that lies outside the payload is noted and reads as zeros.
template <typename Survivor>
class TileReader {
 public:
  TileReader(const Tile64Data& tiles, std::int64_t batch, DType rounding, tile64::OutsideTile& outside)
      : tiles_(tiles),
        batch_(batch),
        outside_(outside),
        rounding_(rounding_to(rounding)),
        bitmaps_(tiles.bitmaps + batch * tiles.tiles),
        offsets_(tiles.offsets + batch * tiles.offsets_stride()),
        payload_(static_cast<const std::byte*>(tiles.payload)) {
    if constexpr (Survivor::kHasGrid) {
      scales_ = tiles.scales + batch * tiles.tiles;
      zeros_ = tiles.zeros + batch * tiles.tiles;
    } else {
      base_ = tiles.starts[batch];
    }
    last_whole_ = tiles.payload_capacity * kElementBytes - Survivor::kReadBytes;
  }

  /// Writes tiles [first, first + kTileElements) as `out` [kTileElements][64] floats, each in the lane order that
  /// order_elements puts right. `first` is a multiple of 64.
  void expand_tiles(std::int64_t first, float* out) const {
    std::uint64_t masks[kTileElements];
    load_masks(first, masks);
    if (!all_are_whole(first)) return expand_copies(first, masks, out);
    // No call in here: constants stay in registers.
    for (std::int64_t t = 0; t < kTileElements; ++t) {
      expand(Survivor{}, masks[t], bytes_of(first + t), grid_of(first + t), out + t * kTileElements);
    }
  }

  /// The pieces of expand_tiles, for a loop that does more with a tile: 64 masks, whether all of 64 tiles may be read
  /// without another look, where a tile's survivors are, and their grid.
  void load_masks(std::int64_t first, std::uint64_t* masks) const { reverse_bitmaps(bitmaps_ + first, masks); }

  /// Nearly all tiles lie so far from the payload's end that no count is needed to read them safely.
  [[nodiscard]] bool all_are_whole(std::int64_t first) const {
    std::int32_t low = offsets_[first];
    std::int32_t high = low;
    for (std::int64_t t = first; t < first + kTileElements; ++t) {
      low = std::min(low, offsets_[t]);
      high = std::max(high, offsets_[t]);
    }
    return byte_of(low) >= 0 && byte_of(high) <= last_whole_;
  }

  [[nodiscard]] const std::byte* bytes_of(std::int64_t tile) const { return payload_ + byte_of(offsets_[tile]); }

  [[nodiscard]] RoundedGrid grid_of(std::int64_t tile) const {
    if constexpr (Survivor::kHasGrid) {
      return {scales_[tile], zeros_[tile], rounding_.half_step, rounding_.odd_bit, rounding_.kept_bits};
    } else {
      return rounding_;
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
  static constexpr std::int64_t kElementBytes = Survivor::kHasGrid ? 4 : 2;

  /// Byte of the payload that an offset stands for.
  [[nodiscard]] std::int64_t byte_of(std::int32_t offset) const {
    if constexpr (Survivor::kHasGrid) return std::int64_t{4} * offset;
    return 2 * tile64_f16::first_half(base_, offset);
  }

  /// Tiles near the payload's end: an expansion may read on in a copy.
  [[gnu::noinline]] void expand_copies(std::int64_t first, const std::uint64_t* masks, float* out) const {
    for (std::int64_t t = 0; t < kTileElements; ++t) {
      std::byte buffer[Survivor::kReadBytes] = {};
      std::uint64_t mask = masks[t];
      const tile64::PayloadRange range = tile64::payload_range(tiles_, batch_, first + t);
      if (!tile64::is_inside(tiles_, range)) {
        outside_.note(batch_ * tiles_.tiles + first + t);
        mask = 0;
      }
      if (mask != 0) {
        std::memcpy(buffer, payload_ + range.first * kElementBytes,
                    static_cast<std::size_t>((range.end - range.first) * kElementBytes));
      }
      expand(Survivor{}, mask, buffer, grid_of(first + t), out + t * kTileElements);
    }
  }

  const Tile64Data& tiles_;
  std::int64_t batch_;
  tile64::OutsideTile& outside_;
  RoundedGrid rounding_;
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
