// Checking tiles on the GPU: every place is asked at once, and the first one with a fault is told.
#pragma once

#include <cstdint>

#include "formats/tile64/bounds.h"
#include "formats/tile64/pack_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kCheckThreads = 256;
inline constexpr int kMostCheckBlocks = 1024;

/// Starts and offsets of a place against those before and after it: the rule of check_ref.cpp.
__device__ inline Tile64Finding check_offsets(const Tile64Data& tiles, std::int64_t b, std::int64_t t) {
  const bool is_f16 = tiles.bits == kUnquantizedBits;
  const std::int64_t place = b * tiles.offsets_stride() + t;
  const std::int64_t offset = tiles.offsets[place];
  if (is_f16 && t == 0 && tiles.starts[b] < 0) return {Tile64Fault::kStartNegative, 0, b, t, tiles.starts[b], 0};
  if (offset < 0) return {Tile64Fault::kStartNegative, 0, b, t, offset, 0};
  const bool has_previous = t > 0 || (!is_f16 && b > 0);
  const std::int64_t previous = has_previous ? tiles.offsets[place - 1] : 0;
  if (offset < previous) return {Tile64Fault::kOffsetBackwards, 0, b, t, offset, previous};
  if (t == tiles.tiles) return {};  // the end of a batch of 16 bits
  const tile64::PayloadRange range = tile64::payload_range(tiles, b, t, __popcll(tiles.bitmaps[b * tiles.tiles + t]));
  const std::int64_t taken = range.end - range.first;
  if (range.end > tiles.payload_capacity) {
    return {Tile64Fault::kPastTheEnd, 0, b, t, range.end, tiles.payload_capacity};
  }
  const bool has_next = is_f16 || t + 1 < tiles.tiles || b + 1 < tiles.batches;
  const std::int64_t next = has_next ? tiles.offsets[place + 1] : 0;
  const std::int64_t given = (next - offset) * (is_f16 ? tile64_f16::kHalvesPerOffset : 1);
  if (has_next && given >= 0 && given != taken) return {Tile64Fault::kCountDisagrees, 0, b, t, given, taken};
  return {};
}

__device__ inline Tile64Finding check_grid(const Tile64Data& tiles, std::int64_t b, std::int64_t t) {
  const float scale = tiles.scales[b * tiles.tiles + t];
  const float zero = tiles.zeros[b * tiles.tiles + t];
  const std::int64_t scale_bits = __float_as_uint(scale);
  const std::int64_t zero_bits = __float_as_uint(zero);
  if (!isfinite(scale)) return {Tile64Fault::kGridNotFinite, 0, b, t, scale_bits, 0};
  if (!isfinite(zero)) return {Tile64Fault::kGridNotFinite, 0, b, t, zero_bits, 1};
  if (floorf(zero) != zero) return {Tile64Fault::kZeroNotWhole, 0, b, t, zero_bits, 0};
  return {};
}

__device__ inline Tile64Finding check_place(const Tile64Data& tiles, std::int64_t place) {
  const std::int64_t b = place / tiles.offsets_stride();
  const std::int64_t t = place % tiles.offsets_stride();
  const Tile64Finding found = check_offsets(tiles, b, t);
  if (found.fault != Tile64Fault::kNone || tiles.bits == kUnquantizedBits) return found;
  return check_grid(tiles, b, t);
}

/// Finds, for each block of threads, the first place that has a fault.
///
///   places     0 1 2 3 4 5 6 7       two blocks of two threads take 0 1 4 5 and 2 3 6 7
///   faults           x x   x         first_of_blocks: 4, 3
///
/// Launch  at most kMostCheckBlocks blocks of kCheckThreads
/// Work    thread i takes places i, i + threads, ... up to its first fault
/// Reads   bitmaps, offsets (up to 3 times, from L1), starts, scales, zeros
/// Writes  first_of_blocks [blocks]: a place, or the number of places
/// Needs   at least one place
__global__ void __launch_bounds__(kCheckThreads)
    find_faults_kernel(Tile64Data tiles, std::int64_t places, std::int64_t* first_of_blocks) {
  const auto earlier = [](std::int64_t a, std::int64_t b) { return min(a, b); };
  std::int64_t first = places;
  for (std::int64_t p = blockIdx.x * static_cast<std::int64_t>(kCheckThreads) + threadIdx.x; p < places;
       p += static_cast<std::int64_t>(gridDim.x) * kCheckThreads) {
    if (check_place(tiles, p).fault == Tile64Fault::kNone) continue;
    first = p;
    break;
  }
  first = block_reduce<kCheckThreads>(first, earlier);
  if (threadIdx.x == 0) first_of_blocks[blockIdx.x] = first;
}

/// Tells what is wrong at the first of the blocks' places.
///
///   first_of_blocks  4 3             3 is the first; place 3 is checked once more
///
/// Launch  one block of kCheckThreads
/// Work    a minimum, then one thread checks that place again
/// Reads   first_of_blocks [blocks]; the tiles at one place
/// Writes  *finding
/// Needs   find_faults_kernel before it in the stream
__global__ void __launch_bounds__(kCheckThreads)
    tell_fault_kernel(Tile64Data tiles, std::int64_t places, const std::int64_t* first_of_blocks, int blocks,
                      Tile64Finding* finding) {
  const auto earlier = [](std::int64_t a, std::int64_t b) { return min(a, b); };
  std::int64_t first = places;
  for (int i = static_cast<int>(threadIdx.x); i < blocks; i += kCheckThreads) first = min(first, first_of_blocks[i]);
  first = block_reduce<kCheckThreads>(first, earlier);
  if (threadIdx.x != 0) return;
  *finding = {};
  if (first < places) *finding = check_place(tiles, first);
}

}  // namespace kvpack::cuda
