// From tiles back to dense matrices. Whatever the bytes say, nothing outside the views is read.
#pragma once

#include <cstdint>

#include "formats/tile64/pack_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kUnpackThreads = 256;
inline constexpr int kGroup = 8;  // elements of a tile, or channels of a row, that a thread expands or writes at once

/// Where a tile's survivors lie in the payload; `count` is cut to what lies inside it.
struct PayloadRun {
  std::int64_t first = 0;  // element
  int count = 0;           // elements: halves or words
};

__device__ inline PayloadRun payload_run(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile) {
  const std::int32_t offset = tiles.offsets[batch * tiles.offsets_stride() + tile];
  const std::int64_t first =
      tiles.bits == kUnquantizedBits ? tile64_f16::first_half(tiles.starts[batch], offset) : offset;
  if (first < 0 || first >= tiles.payload_capacity) return {};
  return {first, static_cast<int>(min(tiles.payload_capacity - first, kTileElements))};
}

/// float32 bits of survivor `place` of a tile, or those of out_dtype where the payload has that type already.
__device__ inline std::uint32_t survivor_bits(const Tile64Data& tiles, PayloadRun run, tile64_q::Grid grid, int place,
                                              DType out_dtype) {
  if (tiles.bits == kUnquantizedBits) {
    if (place >= run.count) return 0;
    const std::uint16_t bits = static_cast<const std::uint16_t*>(tiles.payload)[run.first + place];
    return tiles.payload_type == out_dtype ? bits : widen(bits, tiles.payload_type);
  }
  const int word_bits = place * tiles.bits;
  if (word_bits / tile64_q::kWordBits >= run.count) return 0;
  const std::uint32_t word =
      static_cast<const std::uint32_t*>(tiles.payload)[run.first + word_bits / tile64_q::kWordBits];
  const std::uint32_t code = word >> word_bits % tile64_q::kWordBits & ((1u << tiles.bits) - 1u);
  const float value = tile64_q::value_of(code, grid);
  return value == value ? __float_as_uint(value) : 0x7fc00000u;  // the NaN of a processor, not of a GPU
}

/// Writes kGroup adjacent channels; float32 words become 16 bits unless they are that already.
__device__ inline void store_channels(const std::uint32_t (&words)[kGroup], const DenseMatrices& out,
                                      std::int64_t index, bool is_narrow) {
  if (out.dtype == DType::kFloat32) {
    auto* target = static_cast<std::uint32_t*>(out.data) + index;
    if (reinterpret_cast<std::uintptr_t>(target) % sizeof(uint4) == 0) {
      reinterpret_cast<uint4*>(target)[0] = make_uint4(words[0], words[1], words[2], words[3]);
      reinterpret_cast<uint4*>(target)[1] = make_uint4(words[4], words[5], words[6], words[7]);
      return;
    }
    for (int i = 0; i < kGroup; ++i) target[i] = words[i];
    return;
  }
  std::uint32_t bits[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) bits[i] = is_narrow ? words[i] : narrow(words[i], out.dtype);
  auto* target = static_cast<std::uint16_t*>(out.data) + index;
  if (reinterpret_cast<std::uintptr_t>(target) % sizeof(uint4) == 0) {
    *reinterpret_cast<uint4*>(target) =
        make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) target[i] = static_cast<std::uint16_t>(bits[i]);
}

/// Expands squares of 64 tokens x 64 channels, which are 64 tiles of either kind, and writes them row by row.
///
///   keys: tile i is column i of the square       values: tile i is row i
///   bitmap 0xc0..0, survivors 5 7                group 0 of tile 0: 5 7 0 0 0 0 0 0, groups 1 .. 7: zeros
///
/// Launch  any number of blocks of kUnpackThreads
/// Work    block i takes squares i, i + gridDim.x, ...; a thread expands 8 elements of a tile, then writes 8 channels
/// Reads   bitmaps, offsets, starts, scales and zeros 8 times from L1, survivors once
/// Writes  out once, without the tokens that fill up the last block
/// Needs   head_dim a multiple of 64
__global__ void __launch_bounds__(kUnpackThreads) unpack_squares_kernel(UnpackTile64Problem problem) {
  constexpr int kStride = kTileSize + 1;  // rows and columns of words both hit all banks
  __shared__ std::uint32_t square[kTileSize * kStride];
  const Tile64Data& tiles = problem.tiles;
  const std::int64_t parts = tiles.head_dim / kTileSize;
  const std::int64_t squares_per_batch = tile64::blocks_of(tiles.tokens) * parts;
  const bool is_key = tiles.kind == CacheKind::kKey;
  const bool is_narrow = tiles.bits == kUnquantizedBits && tiles.payload_type == problem.out.dtype;
  for (std::int64_t s = blockIdx.x; s < squares_per_batch * tiles.batches; s += gridDim.x) {
    const std::int64_t batch = s / squares_per_batch;
    const std::int64_t within = s % squares_per_batch;  // 64 * within is the first tile, for both kinds
    for (int item = static_cast<int>(threadIdx.x); item < kTileSize * kGroup; item += kUnpackThreads) {
      const int i = item % kTileSize;
      const int first = item / kTileSize * kGroup;
      const std::int64_t tile = within * kTileSize + i;
      const std::int64_t index = batch * tiles.tiles + tile;
      const std::uint64_t bitmap = tiles.bitmaps[index];
      const PayloadRun run = payload_run(tiles, batch, tile);
      tile64_q::Grid grid;
      if (tiles.bits != kUnquantizedBits) grid = {tiles.scales[index], tiles.zeros[index]};
      int place = first == 0 ? 0 : __popcll(bitmap >> (kTileSize - first));
      const std::uint32_t present = static_cast<std::uint32_t>(bitmap >> (kTileSize - kGroup - first)) & 0xffu;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        std::uint32_t word = 0;
        if ((present >> (kGroup - 1 - j) & 1u) != 0) word = survivor_bits(tiles, run, grid, place++, problem.out.dtype);
        square[is_key ? (first + j) * kStride + i : i * kStride + first + j] = word;
      }
    }
    __syncthreads();
    const std::int64_t token = within / parts * kTileElements;
    const std::int64_t start = matrix_start(problem.out, batch) + within % parts * kTileElements;
    for (int item = static_cast<int>(threadIdx.x); item < kTileSize * kGroup; item += kUnpackThreads) {
      const int row = item / (kTileSize / kGroup);
      const int channel = item % (kTileSize / kGroup) * kGroup;
      if (token + row >= tiles.tokens) break;  // rows only grow
      std::uint32_t words[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) words[j] = square[row * kStride + channel + j];
      store_channels(words, problem.out, start + (token + row) * problem.out.token_stride + channel, is_narrow);
    }
    __syncthreads();  // the next square
  }
}

}  // namespace kvpack::cuda
