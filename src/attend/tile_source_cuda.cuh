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

/// Pieces of 16 bytes of a tile's halves that a lane holds in registers between load and store. Copying halves to the
/// column by words, as codes are, keeps the first-level cache busy with addresses: 12 copies of 32 lanes each.
inline constexpr int kHeldPieces = 4;

struct HeldHalves {
  uint4 pieces[kHeldPieces];
  std::uint32_t count = 0;  // pieces of the tile
};

/// Starts the loads of a tile's halves. A tile that points outside the payload, or does not start at a piece, becomes one of zeros.
__device__ inline HeldHalves load_halves(const TileSource& source, LaneTile& tile) {
  HeldHalves held;
  const std::uint32_t count = __popc(tile.first) + __popc(tile.second);
  held.count = (count + 7) / 8;
  const auto first = static_cast<std::uint32_t>(tile.offset);
  if (first > source.num_words || held.count * 4 > source.num_words - first || first % 4 != 0) {
    tile.first = tile.second = 0;
    held.count = 0;
  }
  const uint4* pieces = reinterpret_cast<const uint4*>(source.words + first);
#pragma unroll
  for (std::uint32_t j = 0; j < kHeldPieces; ++j) {
    if (j < held.count) held.pieces[j] = __ldcs(pieces + j);
  }
  return held;
}

/// Puts a tile's halves into its column.
__device__ inline void store_halves(const TileSource& source, const LaneTile& tile, const HeldHalves& held,
                                    std::uint32_t* column) {
#pragma unroll
  for (std::uint32_t j = 0; j < kHeldPieces; ++j) {
    if (j >= held.count) continue;
    column[(4 * j) * kWarpLanes] = held.pieces[j].x;
    column[(4 * j + 1) * kWarpLanes] = held.pieces[j].y;
    column[(4 * j + 2) * kWarpLanes] = held.pieces[j].z;
    column[(4 * j + 3) * kWarpLanes] = held.pieces[j].w;
  }
  // Tiles with more than 32 survivors are few at the sparsities that pay, so their rest may wait for memory here.
  const std::uint32_t* words = source.words + static_cast<std::uint32_t>(tile.offset);
  for (std::uint32_t j = 4 * kHeldPieces; j < 4 * held.count; ++j) column[j * kWarpLanes] = words[j];
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
