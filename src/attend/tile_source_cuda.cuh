// Tiles on their way from global memory: descriptions to registers, words to shared memory, memory-safe whatever the
// bytes say. Nothing here decodes.
//
// A warp takes 32 tiles at a time, one a lane. Words of lane l lie in a column of shared memory, word j at [32*j + l]:
// any lane may read any of its words without meeting another lane in a bank.
//
//   step s     descriptions of s+2 are loading | words of s+1 are being copied | tiles of s are expanded and multiplied
#pragma once

#include <cstdint>

#include "cuda/async_copy.cuh"
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "formats/tile64/implementations.h"
#include "formats/tile64_f16/layout.h"

namespace kvpack::cuda {

/// One lane's tile.
struct LaneTile {
  std::uint32_t first = 0;   // bitmap of elements 0 .. 31, most significant first
  std::uint32_t second = 0;  // 32 .. 63
  std::int32_t offset = 0;
  std::uint32_t count = 0;  // survivors; set by copy_words
  float scale = 1.0f;
  float zero = 0.0f;
};

/// The tiles of one batch, as one lane sees them: pointers are moved on by the lane.
struct TileSource {
  const uint2* bitmaps;  // little endian: y is the first half of a tile
  const std::int32_t* offsets;
  const float* scales;
  const float* zeros;
  const std::uint32_t* words;  // of the batch, whatever the lane
  std::uint32_t num_words;     // that may be read
};

/// The tiles of a batch from tile `first` on, which is this lane's.
template <int kBits>
__device__ inline TileSource source_of(const Tile64Data& tiles, std::int64_t batch, std::int64_t first) {
  TileSource source;
  source.bitmaps = reinterpret_cast<const uint2*>(tiles.bitmaps) + batch * tiles.tiles + first;
  source.offsets = tiles.offsets + batch * tiles.offsets_stride() + first;
  source.scales = tiles.scales + batch * tiles.tiles + first;
  source.zeros = tiles.zeros + batch * tiles.tiles + first;
  source.words = static_cast<const std::uint32_t*>(tiles.payload);
  std::int64_t num_words = tiles.payload_capacity;
  if constexpr (kBits == kUnquantizedBits) {
    const std::int64_t start = tile64_f16::first_half(tiles.starts[batch], 0) / tile64_f16::kHalvesPerOffset;
    num_words = tiles.payload_capacity / tile64_f16::kHalvesPerOffset - start;
    if (start < 0 || num_words < 0) num_words = 0;
    if (num_words > 0) source.words += start;
  }
  source.num_words = static_cast<std::uint32_t>(num_words < 0x7fffffff ? num_words : 0x7fffffff);
  return source;
}

/// Most words of a tile.
template <int kBits>
inline constexpr int kMostTileWords = static_cast<int>(kTileElements) * kBits / 32;

/// Words of a lane's column: a full tile, and what a window reads past its end.
template <int kBits>
inline constexpr int kLaneWords = kMostTileWords<kBits> + 2;

/// Loads this lane's tile and moves on by `step` tiles.
template <int kBits>
__device__ inline LaneTile load_tile(TileSource& source, std::int32_t step) {
  LaneTile tile;
  const uint2 bitmap = __ldcs(source.bitmaps);
  tile.first = bitmap.y;
  tile.second = bitmap.x;
  tile.offset = __ldcs(source.offsets);
  source.bitmaps += step;
  source.offsets += step;
  if constexpr (kBits != kUnquantizedBits) {
    tile.scale = __ldcs(source.scales);
    tile.zero = __ldcs(source.zeros);
    source.scales += step;
    source.zeros += step;
  }
  return tile;
}

/// Starts the copy of a tile's words to its column. A tile that points outside the payload becomes one of zeros.
template <int kBits>
__device__ inline void copy_words(const TileSource& source, LaneTile& tile, std::uint32_t column) {
  tile.count = __popc(tile.first) + __popc(tile.second);
  std::uint32_t num_words = (tile.count * kBits + 31) / 32;
  const auto first = static_cast<std::uint32_t>(tile.offset);
  if (first > source.num_words || num_words > source.num_words - first) {
    tile.first = tile.second = 0;
    num_words = 0;
  }
  const char* words = reinterpret_cast<const char*>(source.words) + std::uint64_t{first} * 4;
  asm volatile("" : "+l"(words));  // one address for all copies, which the compiler would work out for each
  constexpr int kUnrolled = kMostTileWords<kBits> < 4 ? kMostTileWords<kBits> : 4;
  for (std::uint32_t base = 0;; base += kUnrolled) {
#pragma unroll
    for (std::uint32_t j = 0; j < kUnrolled; ++j) {
      if (base + j < num_words) copy_word_async(column + (base + j) * kWarpLanes * 4, words + (base + j) * 4);
    }
    if constexpr (kMostTileWords<kBits> <= kUnrolled) break;
    if (!__any_sync(kAllLanes, num_words > base + kUnrolled)) break;
  }
  commit_copies();
}

}  // namespace kvpack::cuda
