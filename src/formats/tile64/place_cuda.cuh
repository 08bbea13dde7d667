// Second half of compressing: from payloads in slots of their own to one payload without gaps.
#pragma once

#include <cstdint>

#include "formats/tile64/pack_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kPlaceThreads = 256;
inline constexpr int kMostPlaceBlocks = 1056;  // 8 for each of 132 multiprocessors

/// Sum of `value` over the threads of a block. Every thread must call.
__device__ inline std::int64_t place_block_sum(std::int64_t value) {
  __shared__ std::int64_t of_warps[kPlaceThreads / kWarpLanes];
  std::int64_t sum = value;
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (threadIdx.x % kWarpLanes == 0) of_warps[threadIdx.x / kWarpLanes] = sum;
  __syncthreads();
  std::int64_t all = 0;
#pragma unroll
  for (int w = 0; w < kPlaceThreads / kWarpLanes; ++w) all += of_warps[w];
  __syncthreads();
  return all;
}

/// Units of all blocks from `first` up to, not with, `end`. Every thread must call.
__device__ inline std::int64_t units_between(const std::int32_t* sizes, std::int64_t first, std::int64_t end) {
  std::int64_t sum = 0;
#pragma unroll 8
  for (std::int64_t b = first + threadIdx.x; b < end; b += kPlaceThreads) sum += __ldg(sizes + b);
  return place_block_sum(sum);
}

/// Moves each block's payload from its slot to its place, lets its offsets count from the right start, and writes what
/// is told of whole batches.
///
///   slots      | a a a . . . . . | b . . . . . . . |      payload  | a a a b |
///   sizes      3 1 0 2      two batches of two blocks, 16 bits: starts 0 4, last offsets of the batches 16 8 (units of
///                           4), used 48 halves
///
/// Launch  any number of blocks of kPlaceThreads
/// Work    block i takes an equal share of adjacent blocks of tokens, a warp each, and adds up all sizes before them on
///         its own: at most 4 bytes of L2 cache for each block, where a scan would be one more kernel
/// Reads   slots, sizes
/// Writes  payload, nothing past its capacity; adds to offsets; 16 bits: starts, the last offset of each batch; *used, if
///         not null
/// Needs   Unit is uint4 for 16 bits (the payload starts on 16 bytes) and uint32_t for codes: one payload unit each
template <typename Unit>
__global__ void __launch_bounds__(kPlaceThreads)
    place_blocks_kernel(Tile64Data out, PackWorkspace workspace, std::int64_t* used) {
  constexpr bool kHasCodes = sizeof(Unit) == sizeof(std::uint32_t);
  constexpr int kWarps = kPlaceThreads / kWarpLanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int64_t share = divide_up(workspace.blocks, gridDim.x);
  const std::int64_t first = min(share * blockIdx.x, workspace.blocks);
  const std::int64_t end = min(first + share, workspace.blocks);
  if (first >= end) return;
  const std::int64_t first_of_batch = PackPlace(first, workspace).batch * workspace.blocks_per_batch;
  const std::int64_t capacity = kHasCodes ? out.payload_capacity : out.payload_capacity / kUnitHalves;
  std::int64_t origin = 0;  // where the batch's payload starts
  if constexpr (!kHasCodes) origin = units_between(workspace.sizes, 0, first_of_batch);
  std::int64_t base = origin + units_between(workspace.sizes, kHasCodes ? 0 : first_of_batch, first);
  std::int64_t next = first;  // the block that starts at base
  for (std::int64_t b = first + warp; b < end; b += kWarps) {
    // From the block before to this one; a batch may start on the way.
    for (; next < b; ++next) {
      base += __ldg(workspace.sizes + next);
      if (!kHasCodes && (next + 1) % workspace.blocks_per_batch == 0) origin = base;
    }
    const auto [batch, block] = PackPlace(b, workspace);
    const std::int64_t size = __ldg(workspace.sizes + b);
    const auto* slot = reinterpret_cast<const Unit*>(workspace.slots + b * workspace.slot_bytes);
    auto* target = static_cast<Unit*>(out.payload) + base;
    const int fitting = static_cast<int>(min(size, capacity - base));
#pragma unroll 4
    for (int i = lane; i < fitting; i += kWarpLanes) target[i] = __ldcs(slot + i);
    const int added = offset_of_units(static_cast<int>(base - origin), out.bits);
    const std::int64_t first_tile = block * out.head_dim;
    std::int32_t* offsets = out.offsets + batch * out.offsets_stride() + first_tile;
    if (added != 0) {
      for (int t = lane; t < static_cast<int>(out.head_dim); t += kWarpLanes) offsets[t] += added;
    }
    if (lane != 0) continue;
    const bool ends_batch = block == workspace.blocks_per_batch - 1;
    if (!kHasCodes && block == 0) {
      out.starts[batch] = static_cast<std::int32_t>(base * kUnitHalves / tile64_f16::kHalvesPerStart);
    }
    if (!kHasCodes && ends_batch) {
      out.offsets[batch * out.offsets_stride() + out.tiles] =
          static_cast<std::int32_t>((base - origin + size) * kUnitHalves / tile64_f16::kHalvesPerOffset);
    }
    if (b == workspace.blocks - 1 && used != nullptr) *used = (base + size) * (kHasCodes ? 1 : kUnitHalves);
  }
}

/// What place_blocks_kernel would tell of batches if there were blocks.
///
/// Launch  any number of blocks of kPlaceThreads
/// Writes  16 bits: starts, the last offset of each batch; *used, if not null
__global__ void __launch_bounds__(kPlaceThreads) place_nothing_kernel(Tile64Data out, std::int64_t* used) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x;
  if (first == 0 && used != nullptr) *used = 0;
  if (out.bits != kUnquantizedBits) return;
  for (std::int64_t batch = first; batch < out.batches; batch += static_cast<std::int64_t>(gridDim.x) * kPlaceThreads) {
    out.starts[batch] = 0;
    out.offsets[batch * out.offsets_stride() + out.tiles] = 0;
  }
}

}  // namespace kvpack::cuda
